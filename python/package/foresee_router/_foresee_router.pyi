from collections.abc import Callable, Sequence
from os import PathLike
from types import TracebackType
from typing import Literal, final

from typing_extensions import Buffer

from foresee_router.types import Costs, Explanation, Policy, Result, Worker, WorkerSnapshot

@final
class Router:
    """Chooses a worker for each request and books the request there.

    All methods can be called from several threads. The interpreter's lock is released while a
    prompt is read, tokenised and hashed, and while a worker is chosen.
    """

    def __init__(
        self,
        workers: Sequence[str | Worker] = (),
        *,
        policy: Policy = "marginal-delay",
        block_size: int = 16,
        overlap_weight: float = 1.0,
        ttft_weight: float = 1.0,
        temperature: float = 0.0,
        seed: int = 0,
        eject_failing: bool = True,
        engine: Literal["vllm", "sglang"] = "vllm",
        tokenizer: str | PathLike[str] | None = None,
        state: str | PathLike[str] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Create a router with these workers, which can be chosen at once.

        policy, overlap_weight, ttft_weight, temperature, block_size: as the flags of
        ``foresee serve``. block_size should be the block size of the engines.
        seed: seed of every random choice.
        eject_failing: whether workers that fail requests get fewer or none for a while.
        engine: the engine whose conversion of requests to chats is followed.
        tokenizer: folder of the model, or its ``tokenizer.json``. Without it, texts and bodies are
        matched as text, which KV events do not match.
        state: file to load, if it exists: see `load`.
        clock: function that returns seconds and never decreases. Monotonic time by default.

        Raises ConfigError, WorkerError, TokenizerError, StateFileError or OSError.
        """

    def add_worker(self, worker: str | Worker) -> None:
        """Add a worker, which can be chosen at once. Raises WorkerError if the name is taken."""

    def remove_worker(self, worker: str) -> None:
        """Remove a worker. Its bookings release nothing when they end."""

    def set_healthy(self, worker: str, healthy: bool) -> None:
        """Set whether a worker can be chosen. The router makes no health checks of its own."""

    def set_draining(self, worker: str, draining: bool) -> None:
        """Set whether a worker only finishes the requests that it has."""

    def set_capacity(self, worker: str, blocks: int) -> None:
        """Set the number of KV blocks of a worker, in blocks of the router."""

    def route(
        self,
        *,
        tokens: Sequence[int] | Buffer | None = None,
        text: str | None = None,
        body: bytes | None = None,
        path: str = "/v1/chat/completions",
        model: str | None = None,
        max_tokens: int | None = None,
        expected_output_tokens: int | None = None,
        tools: bool | None = None,
        stream: bool | None = None,
        cache_salt: str | None = None,
        exclude: Sequence[str] = (),
        explain: bool = False,
    ) -> Booking:
        """Choose a worker for a request and book the request there, in one step.

        Pass exactly one of
        tokens: token ids of the prompt. A buffer is copied at once, a list number by number.
        text: a prompt without a chat template.
        body: JSON body of a request to the inference API `path`. The other arguments replace what
        the body says.

        model: requested model. By default the first model of all workers, if they agree.
        max_tokens, tools: the output limit, and whether the output may call tools.
        expected_output_tokens: the output length that the caller expects, as a hint.
        stream: whether progress will be reported (the default, unless the body says otherwise).
        Otherwise it is estimated.
        cache_salt: only requests with an equal salt share cached blocks.
        exclude: names of workers that must not be chosen.
        explain: whether the booking keeps the costs on all workers.

        Raises RouteError if no worker can be chosen, BodyError, TokenizerError,
        UnknownWorkerError or ValueError for invalid arguments.
        """

    def explain(
        self,
        *,
        tokens: Sequence[int] | Buffer | None = None,
        text: str | None = None,
        body: bytes | None = None,
        path: str = "/v1/chat/completions",
        model: str | None = None,
        max_tokens: int | None = None,
        expected_output_tokens: int | None = None,
        tools: bool | None = None,
        stream: bool | None = None,
        cache_salt: str | None = None,
        exclude: Sequence[str] = (),
    ) -> Explanation:
        """Return how `route` would choose now, with the costs on all workers. Books nothing."""

    def apply_events(
        self,
        worker: str,
        payload: bytes,
        sequence: int | None = None,
        *,
        replayed: bool = False,
        skip_missing: bool = False,
    ) -> int | None:
        """Apply one message of a worker's KV events, from the first one on in place of an estimate.

        payload: the last frame of the message.
        sequence: its sequence number, the frame before that. Without it, the batch counts as the
        next one.
        replayed: whether the batch was replayed, so that it says nothing about the present.
        skip_missing: whether missing batches before this one are given up.

        Returns the number of the first missing batch if batches are missing, and then applies
        nothing: replay the events from there on, or call again with skip_missing. Returns None if
        the batch was applied, or was known.

        Raises EventsError if the batch cannot be decoded or the events cannot be used,
        WorkerError if the model of the worker is not known.
        """

    def stop_events(self, worker: str) -> None:
        """Forget a worker's KV events, because they no longer arrive. Its cache is estimated."""

    def clear_cache(self, worker: str) -> None:
        """Forget the estimate of a worker's cache, because its engine restarted."""

    def snapshot(self) -> list[WorkerSnapshot]:
        """Return the state of all workers."""

    @property
    def booking_count(self) -> int:
        """Number of bookings on all workers."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write what was learned (speeds, lengths, ratios; no text of a request) to a file.

        The file is that of ``foresee serve --state``. It is replaced in one step.
        """

    def load(self, path: str | PathLike[str]) -> None:
        """Read what was learned from a file. Applies to workers that are added afterwards.

        Raises StateFileError if the router has workers or the file is of another kind or version,
        OSError if the file cannot be read.
        """

@final
class Booking:
    """Everything that one routed request occupies on one worker, until the request ends.

    As a context manager it completes at the end of the block, and is released after an exception.
    Without that, call `complete` or `release`; the garbage collector releases a lost booking.
    Methods that report progress raise BookingEndedError once the booking has ended.
    """

    @property
    def worker(self) -> str:
        """Name of the worker to send the request to."""

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens. Estimated if the prompt is matched as text."""

    @property
    def overlap_tokens(self) -> int:
        """Number of prompt tokens that the worker is predicted to have cached."""

    @property
    def overlap_blocks(self) -> int:
        """Number of leading blocks that the worker is predicted to have cached."""

    @property
    def costs(self) -> Costs:
        """Costs for which the worker was chosen."""

    @property
    def explanation(self) -> Explanation | None:
        """Costs on all workers just before the choice, if `route` was called with explain."""

    @property
    def predicted_ttft(self) -> float:
        """Predicted time from the booking to the first token, in seconds."""

    @property
    def choices(self) -> int:
        """Number of outputs that the engine generates for the body, each with its own booking."""

    @property
    def ended(self) -> bool:
        """Whether the booking was completed or released."""

    def first_token(self, choice: int = 0) -> None:
        """Report that the first output token has arrived: the prompt is computed."""

    def tokens(self, count: int, choice: int = 0) -> None:
        """Report `count` output tokens since the last report, the first token included."""

    def usage(
        self,
        *,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """Report the ``usage`` of the response, which corrects what was counted or predicted."""

    def output(self, tokens: Sequence[int] | Buffer) -> None:
        """Set the output tokens that the worker has cached: all but the last one.

        A later prompt that continues them then matches. Needless with KV events. Raises ValueError
        if the prompt was not routed by its tokens.
        """

    def report(self, result: Result, *, retry_after: float | None = None) -> None:
        """Report how the worker handled the request. Call it before `reroute` and `release`.

        retry_after: seconds after which a worker with ``backpressure`` asked to be tried again.
        """

    def reroute(self, *, exclude: Sequence[str] = ()) -> None:
        """Book the request again on the worker that the policy chooses now.

        Raises RouteError if there is none. The booking then stays where it is.
        """

    def complete(self, choice: int | None = None) -> None:
        """Release a request that ended normally, or one choice of it. The router learns from it."""

    def release(self) -> None:
        """Release a request that failed or was abandoned. Has no effect if it has ended."""

    def __enter__(self) -> Booking: ...
    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]: ...
