#!/usr/bin/env python3
"""Measures what predicts the length of an output, on two public traces.

    bench/lab/output_lengths.py --conversation mooncake_conversation_trace.jsonl \\
        --azure azure_2023_conversation.csv

Each request is forecast from the requests before it: by the mean of its class, which counts the mean
of a coarser class as ten outputs, like the router's model. The first 500 requests only teach.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from statistics_of_runs import mean

from tables import table  # of the league

#: Requests that are learned from and not counted.
WARM_UP = 500
#: Forecast without any output, and the number of outputs that a coarser class counts as.
PRIOR_TOKENS, PRIOR_OUTPUTS = 128.0, 10.0


@dataclass(frozen=True)
class Request:
    """A request of a trace, with its place in a conversation."""

    prompt_tokens: int
    output_tokens: int
    #: Number of the turn, from 1 on.
    turn: int = 1
    #: Output tokens of the turn before; `None` for a first turn.
    previous_output: int | None = None
    #: Prompt tokens beyond the prompt of the turn before; `None` for a first turn.
    growth: int | None = None


#: Class of a request in one property; `None` if the request does not have it.
Property = Callable[[Request], Hashable]


def octave(tokens: int | None) -> int | None:
    """Returns the number of binary digits of a number of tokens; `None` without a number."""
    return None if tokens is None else max(tokens, 1).bit_length()


#: Properties, from the coarsest class to the finest.
PREDICTORS: dict[str, list[Property]] = {
    "mean of all": [],
    "turn": [lambda request: min(request.turn, 6)],
    "prompt length": [lambda request: octave(request.prompt_tokens)],
    "new part of the prompt": [lambda request: octave(request.growth)],
    "previous output": [lambda request: octave(request.previous_output)],
    "prompt length, then previous output": [
        lambda request: octave(request.prompt_tokens),
        lambda request: octave(request.previous_output),
    ],
}


def conversation(path: Path) -> list[Request]:
    """Reads Mooncake's trace. A request continues the latest one whose complete blocks its prompt
    begins with."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    requests: list[Request] = []
    #: The latest request by its number of complete blocks and the last of them. Equal ids mean equal
    #: prefixes.
    ends: dict[tuple[int, int], Request] = {}
    for entry in sorted(entries, key=lambda entry: entry["timestamp"]):
        blocks, tokens = entry["hash_ids"], entry["input_length"]
        candidates = (ends.get((count, blocks[count - 1])) for count in range(len(blocks), 0, -1))
        previous = next((end for end in candidates if end and end.prompt_tokens < tokens), None)
        request = Request(
            prompt_tokens=tokens,
            output_tokens=entry["output_length"],
            turn=previous.turn + 1 if previous else 1,
            previous_output=previous.output_tokens if previous else None,
            growth=tokens - previous.prompt_tokens if previous else None,
        )
        requests.append(request)
        # Many first turns share their first block, which is a system prompt.
        complete = len(blocks) - 1
        if complete >= 2:
            ends[complete, blocks[complete - 1]] = request
    return requests


def azure(path: Path) -> list[Request]:
    """Reads Azure's trace, which does not tell conversations."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [Request(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]


def evaluate(requests: list[Request], properties: list[Property]) -> tuple[float, float]:
    """Returns the mean absolute error, relative to the mean length, and the share of the variance
    that the forecast explains."""
    levels: list[Property] = [lambda _: 0, *properties]
    sums = [defaultdict(float) for _ in levels]
    counts = [defaultdict(float) for _ in levels]
    pairs = []
    for number, request in enumerate(requests):
        forecast = PRIOR_TOKENS
        keys = [of_request(request) for of_request in levels]
        for level, key in enumerate(keys):
            if key is None:
                continue
            total = sums[level][key] + PRIOR_OUTPUTS * forecast
            forecast = total / (counts[level][key] + PRIOR_OUTPUTS)
        if number >= WARM_UP:
            pairs.append((forecast, request.output_tokens))
        for level, key in enumerate(keys):
            sums[level][key] += request.output_tokens
            counts[level][key] += 1.0
    average = mean([length for _, length in pairs])
    error = mean([abs(forecast - length) for forecast, length in pairs])
    residual = sum((forecast - length) ** 2 for forecast, length in pairs)
    variance = sum((average - length) ** 2 for _, length in pairs)
    return error / average, 1.0 - residual / variance


def log_correlation(requests: list[Request]) -> float:
    """Returns the correlation of the logarithms of an output's length and of the previous one's."""
    pairs = [
        (math.log(request.previous_output + 1), math.log(request.output_tokens + 1))
        for request in requests
        if request.previous_output is not None
    ]
    return statistics.correlation(*zip(*pairs, strict=True))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversation", type=Path, required=True, help="Mooncake's trace")
    parser.add_argument("--azure", type=Path, required=True, help="Azure's trace of 2023")
    options = parser.parse_args()
    all_turns, prompts = conversation(options.conversation), azure(options.azure)
    later_turns = [request for request in all_turns if request.previous_output is not None]
    print(f"{len(later_turns)} of {len(all_turns)} requests of Mooncake's trace continue another one.")
    print(f"Correlation with the previous output (logarithms): {log_correlation(later_turns):.2f}\n")
    lines = []
    for name, properties in PREDICTORS.items():
        cells = [name]
        for requests in (all_turns, later_turns, prompts):
            error, explained = evaluate(requests, properties)
            cells += [f"{error * 100:.0f}", f"{max(explained, 0.0):.2f}"]
        lines.append(cells)
    header = ["class", "Mooncake, error, %", "explained"]
    header += ["later turns, error, %", "explained", "Azure, error, %", "explained"]
    print("\n".join(table(header, lines)))


if __name__ == "__main__":
    main()
