"""Replays traces of operations: with the Python library, and with the reference program in Rust."""

import json
import os
import subprocess
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foresee_router import Booking, Router, Worker

from traces import Operation

REFERENCE = os.environ.get("FORESEE_REFERENCE", "")
"""Path of the reference program, which `check` builds."""

Choice = tuple[int, str, int, float]
"""Number of the request, worker, overlap in blocks, and cost in blocks."""


def new_router(header: Operation, clock: Callable[[], float]) -> Router:
    """Return the router that the first object of a trace describes."""
    settings = {name: value for name, value in header.items() if name != "workers"}
    workers = [Worker(name, models=["m"], capacity_blocks=8192) for name in header["workers"]]
    return Router(workers, clock=clock, **settings)


def replay(header: Operation, operations: list[Operation]) -> list[Choice]:
    """Apply the operations with the Python library, and return the choices."""
    now = 0.0
    router = new_router(header, lambda: now)
    bookings: dict[int, Booking] = {}
    choices: list[Choice] = []
    for operation in operations:
        now = operation["at"]
        request = operation.get("request", -1)
        match operation["op"]:
            case "route":
                booking = router.route(
                    tokens=array("I", operation["tokens"]),
                    model=operation["model"],
                    max_tokens=operation["max_tokens"],
                )
                bookings[request] = booking
                costs = booking.costs
                choices.append((request, booking.worker, booking.overlap_blocks, costs["total"]))
            case "first_token":
                bookings[request].first_token()
            case "tokens":
                bookings[request].tokens(operation["count"])
            case "complete":
                bookings.pop(request).complete()
            case "release":
                bookings.pop(request).release()
            case "events":
                payload = bytes.fromhex(operation["payload"])
                missing = router.apply_events(operation["worker"], payload, operation["sequence"])
                assert missing is None
    assert router.booking_count == 0
    return choices


def reference(header: Operation, operations: list[Operation]) -> dict[str, Any]:
    """Apply the operations with the reference program, and return what it prints."""
    lines = "\n".join(json.dumps(line) for line in [header, *operations])
    done = subprocess.run([REFERENCE], input=lines, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def reference_choices(header: Operation, operations: list[Operation]) -> list[Choice]:
    """Return the choices of the reference program."""
    return [tuple(choice) for choice in reference(header, operations)["choices"]]
