"""Router for LLM inference engines, as a library.

A :class:`Router` predicts the load and the KV cache of each worker, chooses the best worker for a
request, and books the request there::

    router = Router(["http://gpu1:8000", "http://gpu2:8000"])
    with router.route(text=prompt, model="llama") as booking:
        for token in send(booking.worker, prompt):
            booking.tokens(1)

All decisions are made by the Rust library. See ``docs/python.md`` of the project.
"""

from foresee_router._foresee_router import Booking, Router
from foresee_router.errors import (
    BackpressureError,
    BodyError,
    BookingEndedError,
    ConfigError,
    EventsError,
    ForeseeError,
    NoWorkerError,
    RouteError,
    StateFileError,
    TokenizerError,
    UnknownModelError,
    UnknownWorkerError,
    WorkerError,
)
from foresee_router.types import (
    Candidate,
    Costs,
    Explanation,
    PassedOver,
    Policy,
    Result,
    Worker,
    WorkerSnapshot,
)

__all__ = [
    "BackpressureError",
    "BodyError",
    "Booking",
    "BookingEndedError",
    "Candidate",
    "ConfigError",
    "Costs",
    "EventsError",
    "Explanation",
    "ForeseeError",
    "NoWorkerError",
    "PassedOver",
    "Policy",
    "Result",
    "RouteError",
    "Router",
    "StateFileError",
    "TokenizerError",
    "UnknownModelError",
    "UnknownWorkerError",
    "Worker",
    "WorkerError",
    "WorkerSnapshot",
]
