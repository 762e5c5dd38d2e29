"""Compares the time of a call from Python with that of the same call in Rust.

Replays the same trace alternately with the reference program and in this process, and prints the
median of each kind of call, in microseconds. `check` builds both; then, in its environment:

    FORESEE_REFERENCE=target/release/foresee-router-reference python bench.py
"""

import statistics
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from foresee_router import Booking

from replay import new_router, reference
from traces import Operation, conversations, header

Durations = dict[str, list[float]]
ROUNDS = 5


def measure(
    head: Operation, operations: list[Operation], prompts: Mapping[int, Sequence[int]]
) -> Durations:
    """Replay a trace whose prompts are `prompts`, and return the duration of each call."""
    now = 0.0
    router = new_router(head, lambda: now)
    bookings: dict[int, Booking] = {}
    durations: Durations = defaultdict(list)

    def timed(kind: str, call: Callable[[], object]) -> None:
        started = time.perf_counter_ns()
        call()
        durations[kind].append((time.perf_counter_ns() - started) / 1e3)

    for operation in operations:
        now, request, kind = operation["at"], operation["request"], operation["op"]
        match kind:
            case "route":
                prompt, limit = prompts[request], operation["max_tokens"]
                started = time.perf_counter_ns()
                bookings[request] = router.route(tokens=prompt, model="m", max_tokens=limit)
                durations[kind].append((time.perf_counter_ns() - started) / 1e3)
            case "first_token":
                timed(kind, bookings[request].first_token)
            case "tokens":
                booking, count = bookings[request], operation["count"]
                started = time.perf_counter_ns()
                booking.tokens(count)
                durations[kind].append((time.perf_counter_ns() - started) / 1e3)
            case "complete":
                timed(kind, bookings.pop(request).complete)
            case "release":
                bookings.pop(request).release()
    return durations


def main() -> None:
    print("| workers | prompt tokens | call | Rust | Python, array | Python, list | ratio, array |")
    print("|---|---|---|---|---|---|---|")
    for workers, first_prompt in ((8, 800), (64, 800), (8, 12_000)):
        head, operations = header(workers), conversations(600, first_prompt=first_prompt)
        routed = [operation for operation in operations if operation["op"] == "route"]
        lists = {operation["request"]: operation["tokens"] for operation in routed}
        arrays = {request: array("I", tokens) for request, tokens in lists.items()}
        median_prompt = statistics.median(len(tokens) for tokens in lists.values())
        rust: Durations = defaultdict(list)
        with_arrays: Durations = defaultdict(list)
        with_lists: Durations = defaultdict(list)
        for _ in range(ROUNDS):
            for total, durations in (
                (rust, reference(head, operations)["microseconds"]),
                (with_arrays, measure(head, operations, arrays)),
                (with_lists, measure(head, operations, lists)),
            ):
                for kind, values in durations.items():
                    total[kind] += values
        for kind in ("route", "first_token", "tokens", "complete"):
            times = [statistics.median(total[kind]) for total in (rust, with_arrays, with_lists)]
            cells = " | ".join(f"{value:.1f}" for value in times)
            ratio = times[1] / times[0]
            print(f"| {workers} | {median_prompt:.0f} | {kind} | {cells} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
