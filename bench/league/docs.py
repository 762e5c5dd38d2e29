#!/usr/bin/env python3
"""Writes the league's tables into docs/benchmarks.md, and its picture, from the saved runs.

    bench/league/docs.py [RESULTS]

A table replaces the text between `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import rows
import svg
from report import MEASURES, OURS, Measure, Result, Results, verdict_table
from store import Store
from tables import replace_place, table
from verdicts import mean

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS = ROOT / "docs"

#: Names of the routers in the tables.
NAMES = {
    "foresee": "Foresee",
    "foresee-events": "Foresee, KV events",
    "smg": "SMG",
    "smg-least-load": "SMG, least_load",
    "sglang-router": "sglang-router",
    "vllm-router": "vllm-router",
    "vllm-router-events": "vllm-router, kv_aware",
    "nginx": "nginx, round-robin",
}
#: Rivals in the picture.
SHOWN = ["smg", "sglang-router", "vllm-router", "nginx"]
#: Measures of the table, with their headings.
COLUMNS = {
    "E2E mean, s": "E2E mean",
    "E2E p99, s": "E2E p99",
    "TTFT mean, s": "TTFT mean",
    "TTFT p99, s": "TTFT p99",
    "within SLO, %": "within SLO",
    "lost": "lost",
    "CPU, ms/request": "router CPU",
}


def main() -> int:
    """Writes the documents and returns the exit code."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target" / "league" / "results"
    league = rows.read(HERE / "rows.toml")
    results = Results(league, Store(directory).all())
    if not results.all:
        print(f"error: {directory} has no results", file=sys.stderr)
        return 1
    path = DOCS / "benchmarks.md"
    text = path.read_text()
    for name, lines in {
        "league verdicts": verdict_table(results, NAMES),
        "league behind": behind_table(results),
        "league": measure_table(results),
    }.items():
        try:
            text = replace_place(text, name, lines)
        except KeyError as error:
            print(f"error: {path}: {error.args[0]}", file=sys.stderr)
            return 1
    path.write_text(text)
    (DOCS / "images" / "league.svg").write_text(picture(results))
    return 0


def runs_of(results: Results, row: str, router: str) -> tuple[list[Result], bool]:
    """Returns the valid runs of a router in a row, or else the void ones, and whether they are
    valid."""
    valid = list(results.of(row, router).values())
    if valid:
        return valid, True
    return [
        run
        for run in results.all
        if (run["row"], run["router"]) == (row, router) and run["error"] is None
    ], False


def value(results: Results, row: str, router: str, measure: Measure) -> float:
    """Returns the mean of a measure over a router's runs in a row; not a number without any."""
    runs, _ = runs_of(results, row, router)
    return mean([measure.value(run) for run in runs]) if runs else math.nan


def measure_table(results: Results) -> list[str]:
    """Returns all rows and routers with their measures; those of void runs in parentheses."""
    measures = [measure for measure in MEASURES if measure.name in COLUMNS]
    lines = []
    for row in results.rows:
        for number, router in enumerate(results.routers(row)):
            runs, is_valid = runs_of(results, row, router)
            cells = [f"`{row}`" if number == 0 else "", NAMES.get(router, router), str(len(runs))]
            for measure in measures:
                number_text = f"{value(results, row, router, measure):.{measure.digits}f}"
                cells.append(number_text if is_valid else f"({number_text})")
            lines.append(cells)
    return table(["row", "router", "seeds", *(COLUMNS[measure.name] for measure in measures)], lines)


def behind_table(results: Results) -> list[str]:
    """Returns every router that was better than ours by more than the tolerance of a tie, over the
    seeds that it has in common with ours."""
    lines = []
    for row in results.rows:
        for measure in [measure for measure in MEASURES if measure.tolerance is not None]:
            for router in results.rivals(row):
                gap = gap_to(results, row, router, measure)
                if gap is None or gap[0] <= (measure.tolerance or 0.0):
                    continue
                unit = "points" if measure.higher_is_better else "%"
                lines.append(
                    [
                        f"`{row}`",
                        measure.name,
                        NAMES.get(router, router),
                        f"{gap[0] * 100:.1f} {unit}",
                        str(gap[1]),
                    ]
                )
    return table(["row", "measure", "better router", "by", "common seeds"], lines)


def gap_to(
    results: Results, row: str, router: str, measure: Measure
) -> tuple[float, int] | None:
    """Returns by how much a router is better than ours in a measure, and over how many seeds."""
    ours, theirs = results.of(row, OURS), results.of(row, router)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or (results.loses_too_much(row, router) and not measure.higher_is_better):
        return None
    our_mean = mean([measure.value(ours[seed]) for seed in seeds])
    their_mean = mean([measure.value(theirs[seed]) for seed in seeds])
    difference = their_mean - our_mean if measure.higher_is_better else our_mean - their_mean
    return difference / (measure.scale or abs(their_mean) or 1.0), len(seeds)


def picture(results: Results) -> str:
    """Returns a picture of the mean latency of each rival, relative to ours."""
    measure = next(measure for measure in MEASURES if measure.name == "E2E mean, s")
    lines = []
    for row in results.rows:
        ours = value(results, row, OURS, measure)
        lines.append((row, [value(results, row, rival, measure) / ours for rival in SHOWN]))
    return svg.dots(
        "Mean end-to-end latency in the league, relative to Foresee",
        "The routers' own programs before the same mock engines. Right of the line is slower.",
        [NAMES[rival] for rival in SHOWN],
        lines,
        "Mean end-to-end latency of four routers in each row of the league, relative to Foresee",
    )


if __name__ == "__main__":
    sys.exit(main())
