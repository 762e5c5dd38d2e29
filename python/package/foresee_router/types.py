"""Types of arguments and results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

Policy: TypeAlias = Literal[
    "marginal-delay",
    "kv",
    "lmetric",
    "least-requests",
    "power-of-two",
    "consistent-hash",
    "round-robin",
    "random",
]
"""Rule by which a worker is chosen: see ``docs/policies.md`` of the project."""

Result: TypeAlias = Literal["success", "failure", "soft_failure", "backpressure"]
"""How a worker handled a request.

``success``: it produced output. ``failure``: it failed the request (lost connection, 500, 502, 504,
a silent stream). ``soft_failure``: the stream ended without its end mark. ``backpressure``: it
responded with 429 or 503.
"""


@dataclass(frozen=True, slots=True)
class Worker:
    """One engine replica, or one data-parallel rank of it."""

    name: str
    """Unique name, such as the URL of the engine."""
    models: Sequence[str] = ()
    """Models that it serves, the base model first. Empty if they are unknown: then it can be chosen
    for every model, and its KV events cannot be used."""
    capacity_blocks: int | None = None
    """Number of its KV blocks, in blocks of the router. Learned from the traffic if it is unknown."""
    prefix_caching: bool = True
    """Whether the engine has a prefix cache."""
    eviction: Literal["queue", "radix"] = "queue"
    """Rule by which it evicts blocks: ``queue`` for vLLM, ``radix`` for SGLang."""
    rank: int | None = None
    """Its data-parallel rank. Events of other ranks are refused."""


class Costs(TypedDict):
    """Costs for which a worker was chosen, in blocks."""

    overlap_blocks: int
    """Leading blocks of the prompt that need not be computed there."""
    cached_blocks: int
    """Leading blocks of the prompt in the worker's prefix cache."""
    active_blocks: int
    """Leading blocks of the prompt that other requests on the worker pin."""
    prefill_blocks: int
    """Blocks of the prompt that must be computed there."""
    active_blocks_if_placed: int
    """Active blocks of the worker with this request."""
    total: float
    """``overlap_weight * prefill_blocks + active_blocks_if_placed``."""
    best_overlap_blocks: int
    """Largest overlap of any worker."""


class Candidate(TypedDict):
    """A worker among which the policy chooses, with its costs. ``docs/api.md`` has the fields."""

    worker: str
    requests: int
    active_blocks: int
    overlap_blocks: int
    overlap_cached_blocks: int
    overlap_active_blocks: int
    prefill_blocks: int
    active_blocks_if_placed: int
    cost: float
    delay_seconds: dict[str, float]
    policy_cost: float
    probability: float


class PassedOver(TypedDict):
    """A healthy worker that is passed over."""

    worker: str
    reason: str


class Explanation(TypedDict):
    """The decision that the router would make: the JSON of ``POST /admin/explain``."""

    policy: str
    overlap_weight: float
    ttft_weight: float
    temperature: float
    choice: str | None
    replicates_prefix_to: str | None
    trial_on: str | None
    candidates: list[Candidate]
    passed_over: list[PassedOver]


class WorkerSnapshot(TypedDict):
    """State of one worker at one instant."""

    name: str
    state: Literal["healthy", "unhealthy", "ejected", "draining"]
    models: list[str]
    requests: int
    """Requests booked on the worker."""
    active_blocks: int
    """KV blocks that they pin; shared ones count once."""
    context_tokens: int
    """Their prompt and output tokens; shared ones count each time."""
    prefill_tokens: int
    """Booked prompt tokens that are not computed yet, as predicted."""
    cached_blocks: int
    """KV blocks in the prefix cache, pinned or not."""
    cache_source: Literal["events", "estimated"]
    """Whether the cache is known from KV events or estimated."""
    events_exact: bool
    """Whether KV events describe the cache exactly: nothing was missed."""
    capacity_blocks: int
    capacity_source: str
    """``configured``, ``reported``, ``learned`` or ``assumed``."""
    eviction: str
    prefill_backlog_seconds: float
    """Predicted time until all booked prompts are computed."""
    inter_token_latency_seconds: float
    """Predicted time between two output tokens of one request."""
