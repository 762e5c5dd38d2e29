"""The exceptions of :mod:`foresee_router`. Their messages are those of the Rust library."""


class ForeseeError(Exception):
    """Base of all exceptions of this package."""


class ConfigError(ForeseeError, ValueError):
    """A setting has an invalid value."""


class WorkerError(ForeseeError, ValueError):
    """A worker cannot be added, or lacks what the call needs."""


class UnknownWorkerError(WorkerError, LookupError):
    """No worker has this name."""


class RouteError(ForeseeError):
    """A request was not booked."""


class UnknownModelError(RouteError):
    """The models of all workers are known, and none of them is the requested one."""


class NoWorkerError(RouteError):
    """Every worker that serves the model is unhealthy, draining or excluded."""


class BackpressureError(RouteError):
    """Every worker that could be chosen has refused requests and gets none for a while."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds until the first of them gets requests again."""

    def __reduce__(self) -> tuple[type["BackpressureError"], tuple[str, float]]:
        """Return how to make a copy, for :mod:`pickle`."""
        return type(self), (str(self), self.retry_after)


class BodyError(ForeseeError, ValueError):
    """The body of a request cannot be read."""


class TokenizerError(ForeseeError, ValueError):
    """The tokenizer cannot be loaded, or a text cannot be tokenised."""


class EventsError(ForeseeError, ValueError):
    """KV events cannot be decoded or used. The worker's cache is estimated meanwhile."""


class StateFileError(ForeseeError, ValueError):
    """The file does not contain what a router of this version has learned."""


class BookingEndedError(ForeseeError, RuntimeError):
    """The booking was completed or released before this call."""
