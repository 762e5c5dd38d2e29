#!/usr/bin/env python3
"""Compares saved runs of the league with their replay in the simulator.

    bench/league/replays.py [--out RESULTS] [--trace-dir TRACES]

A run is replayed with the same traffic, seed and engines, under the policy that imitates its router.
README.md says which rows and routers have a replay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
from report import Result
from rows import Event, League, Row
from store import Store
from tables import table
from verdicts import mean

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "target"

#: Policy of `foresee replay` for each router.
POLICIES = {
    "foresee": "marginal-delay+shortest",
    "smg": "smg",
    "sglang-router": "sglang",
    "vllm-router": "sglang",
    "vllm-router-events": "kv-aware",
    "nginx": "round-robin",
}


@dataclass(frozen=True)
class Pair:
    """The outcomes of a run and of its replay."""

    row: str
    router: str
    seed: int
    live: dict[str, Any]
    replay: dict[str, Any]

    def values(self, measure: str, statistic: str) -> tuple[float, float]:
        """Returns a statistic of a measure in the run and in its replay, in seconds."""
        return self.live[measure][statistic], self.replay[measure][statistic]


def main() -> int:
    """Prints the comparison and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--foresee", type=Path, default=TARGET / "release" / "foresee", help="program that replays")
    add("--out", type=Path, default=TARGET / "league" / "results", help="results of the league")
    add("--trace-dir", type=Path, default=Path(), help="directory of the trace files")
    options = parser.parse_args()
    league = rows.read(HERE / "rows.toml")
    results = [result for result in Store(options.out).all() if can_replay(league, result)]
    if not results:
        print(f"error: {options.out} has no run that can be replayed", file=sys.stderr)
        return 1
    pairs = []
    for result in results:
        flags = replay_flags(league.row(result["row"]), result, options.trace_dir)
        replay = run_replay(options.foresee, flags)
        live, seed = result["outcome"], result["seed"]
        pairs.append(Pair(result["row"], result["router"], seed, live, replay))
    print("\n".join(comparison(league, pairs)))
    return 0


def can_replay(league: League, result: Result) -> bool:
    """Returns whether a run is valid and the simulator can imitate it."""
    row = league.row(result["row"])
    is_valid = result["error"] is None and not result["void"] and not result["lost"]
    actions = {event.action for event in row.events}
    return is_valid and result["router"] in POLICIES and actions <= {"join", "slow"}


def replay_flags(row: Row, result: Result, traces: Path) -> list[str]:
    """Returns the flags of `foresee replay run` for a run."""
    flags = ["--trace", str(traces / row.trace)] if row.trace else []
    flags += [*row.load, *row.engine]
    for engine, speed in row.speeds:
        flags += ["--fleet-change", f"{engine}:speed={speed}"]
    for event in row.events:
        flags += ["--fleet-change", fleet_change(event, row.speedup)]
    signal = "events" if result["router"].endswith("-events") else "estimated"
    flags += ["--cache-signal", signal, "--policy", POLICIES[result["router"]]]
    return [*flags, "--seed", str(result["seed"])]


def fleet_change(event: Event, speedup: float) -> str:
    """Returns an event as a value of `--fleet-change`, whose times are the engines'."""
    time = f"{event.at * speedup:g}s"
    if event.action == "join":
        return f"{event.engine}:join@{time}"
    return f"{event.engine}:speed={1.0 / event.slowdown:g}@{time}"


def run_replay(foresee: Path, flags: list[str]) -> dict[str, Any]:
    """Returns the outcome of one replay."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "replay.json"
        command = [str(foresee), "replay", "run", *flags, "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        outcome: dict[str, Any] = json.loads(path.read_text())["outcomes"][0]
        return outcome


def comparison(league: League, pairs: list[Pair]) -> list[str]:
    """Returns the table of all rows and routers: means over the seeds, live and in replay."""
    lines = []
    for row in league.rows:
        for router in POLICIES:
            chosen = [pair for pair in pairs if (pair.row, pair.router) == (row.name, router)]
            if not chosen:
                continue
            cells = [f"`{row.name}`", router, str(len(chosen))]
            for measure in ("end_to_end", "time_to_first_token", "inter_token_latency"):
                values = [pair.values(measure, "mean") for pair in chosen]
                live, replay = mean([v[0] for v in values]), mean([v[1] for v in values])
                cells += [f"{live:.3f} / {replay:.3f}", f"{(live / replay - 1) * 100:+.1f}"]
            lines.append(cells)
    header = ["row", "router", "seeds", "E2E mean, s: live / replay", "%"]
    return table([*header, "TTFT mean, s", "%", "ITL mean, s", "%"], lines)


if __name__ == "__main__":
    sys.exit(main())
