"""Traces of operations on a router, which the tests and the bench replay in Rust and in Python.

A trace is a list of JSON objects. The first describes the router, each further one is one operation
at a time in seconds.
"""

import heapq
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Operation = dict[str, Any]

RECORDED = Path(__file__).parents[2] / "crates/engine/tests/kv_events/recorded"

# Pace of the engines in a trace: the times of the responses do not depend on the choices.
PREFILL_TOKENS_PER_SECOND = 20_000
SECONDS_PER_TOKEN = 0.02


def header(workers: int, **settings: object) -> Operation:
    """Return the first object of a trace, with workers named w0, w1 and so on."""
    names = [f"w{index}" for index in range(workers)]
    return {"policy": "marginal-delay", "temperature": 0.0, "seed": 7, **settings, "workers": names}


def response(at: float, request: int, prompt: int, output: int, rng: random.Random) -> Iterator[Operation]:
    """Yield the operations after a request was routed. A few requests end without completion."""
    at += 0.01 + prompt / PREFILL_TOKENS_PER_SECOND
    yield {"op": "first_token", "at": at, "request": request}
    for start in range(0, output, 8):
        count = min(8, output - start)
        at += count * SECONDS_PER_TOKEN
        yield {"op": "tokens", "at": at, "request": request, "count": count}
    end = "release" if rng.random() < 0.05 else "complete"
    yield {"op": end, "at": at + 0.001, "request": request}


def merged(operations: Iterator[Operation] | list[Operation]) -> list[Operation]:
    """Return operations in the order of their times."""
    queue = [(operation["at"], number, operation) for number, operation in enumerate(operations)]
    heapq.heapify(queue)
    return [heapq.heappop(queue)[2] for _ in range(len(queue))]


def conversations(requests: int, seed: int = 1, first_prompt: int = 800) -> list[Operation]:
    """Return the operations of conversations: each turn's prompt continues the one before."""
    rng = random.Random(seed)
    system = [[rng.randrange(32_000) for _ in range(256)] for _ in range(4)]
    prompts: list[list[int]] = []
    operations: list[Operation] = []
    at = 0.0
    for request in range(requests):
        at += rng.expovariate(40.0)
        if prompts and rng.random() < 0.6:
            prompt = prompts.pop(rng.randrange(len(prompts)))
        else:
            prompt = list(rng.choice(system))
            prompt += [rng.randrange(32_000) for _ in range(rng.randrange(50, first_prompt))]
        output = rng.randrange(1, 200)
        limit = output if rng.random() < 0.5 else None
        operations.append(
            {"op": "route", "at": at, "request": request, "tokens": prompt, "max_tokens": limit, "model": "m"}
        )
        operations += response(at, request, len(prompt), output, rng)
        prompts.append(prompt + [rng.randrange(32_000) for _ in range(output + 40)])
    return merged(operations)


def mooncake(path: Path, requests: int) -> list[Operation]:
    """Return the operations of the first requests of a trace in Mooncake's format."""
    rng = random.Random(3)
    operations: list[Operation] = []
    with path.open() as lines:
        for request, line in zip(range(requests), lines):
            entry = json.loads(line)
            tokens = [block * 512 + offset for block in entry["hash_ids"] for offset in range(512)]
            tokens = tokens[: entry["input_length"]]
            at, output = entry["timestamp"] / 1000, entry["output_length"]
            operations.append(
                {"op": "route", "at": at, "request": request, "tokens": tokens, "max_tokens": None, "model": "m"}
            )
            operations += response(at, request, len(tokens), output, rng)
    return merged(operations)


def recorded_messages(name: str) -> list[list[bytes]]:
    """Return the messages of a recorded stream of KV events, each as its frames."""
    data = (RECORDED / name).read_bytes()
    position = 0

    def number() -> int:
        nonlocal position
        position += 4
        return int.from_bytes(data[position - 4 : position], "big")

    messages = []
    while position < len(data):
        frames = []
        for _ in range(number()):
            length = number()
            frames.append(data[position : position + length])
            position += length
        messages.append(frames)
    return messages


def recorded_events() -> list[Operation]:
    """Return the operations of requests to a vLLM whose KV events were recorded, as worker w0."""
    operations: list[Operation] = []
    messages = recorded_messages("full_report/full.stream.bin")
    requests = json.loads((RECORDED / "full_report/found.json").read_text())
    applied = 0
    rng = random.Random(5)
    for request, entry in enumerate(requests):
        at = request * 0.5
        for _, sequence, payload in messages[applied : entry["batches"]]:
            number = int.from_bytes(sequence, "big")
            operations.append(
                {"op": "events", "at": at, "worker": "w0", "sequence": number, "payload": payload.hex()}
            )
        applied = entry["batches"]
        tokens = entry["prompt"]
        operations.append(
            {"op": "route", "at": at + 0.1, "request": request, "tokens": tokens, "max_tokens": 8, "model": "m"}
        )
        operations += response(at + 0.1, request, len(tokens), 8, rng)
    return merged(operations)
