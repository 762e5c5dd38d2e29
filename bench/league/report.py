"""The report: tables in Markdown, and all results merged into one document."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rows import League
from tables import table as markdown_table
from verdicts import Comparison, Verdict, compare, geometric_mean, mean

#: The router whose verdicts are reported.
OURS = "foresee"

#: Fraction of lost requests above which a router's latencies are not compared, because they leave out
#: the requests that it lost.
MAX_LOST_FRACTION = 0.01

Result = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A measure with its rule."""

    name: str
    value: Callable[[Result], float]
    digits: int
    #: Relative difference up to which two routers tie; `None` without verdicts.
    tolerance: float | None = None
    higher_is_better: bool = False
    #: Divisor of differences; `None` for the rival's value. Percentages differ by points, because
    #: few requests are within the SLO in some rows.
    scale: float | None = None


def _latency(name: str, statistic: str, factor: float = 1.0) -> Callable[[Result], float]:
    return lambda result: result["outcome"][name][statistic] * factor


def _imbalance(result: Result) -> float:
    """Returns the computed prompt tokens of the busiest engine, divided by the mean."""
    tokens = [count for count in result["computed_tokens_by_engine"] if count is not None]
    return max(tokens) / mean([float(count) for count in tokens]) if any(tokens) else math.nan


MEASURES = (
    Measure("E2E mean, s", _latency("end_to_end", "mean"), 2, tolerance=0.01),
    Measure("E2E p50, s", _latency("end_to_end", "p50"), 2),
    Measure("E2E p99, s", _latency("end_to_end", "p99"), 2, tolerance=0.05),
    Measure("TTFT mean, s", _latency("time_to_first_token", "mean"), 3),
    Measure("TTFT p50, s", _latency("time_to_first_token", "p50"), 3),
    Measure("TTFT p99, s", _latency("time_to_first_token", "p99"), 2, tolerance=0.05),
    Measure("ITL mean, ms", _latency("inter_token_latency", "mean", 1e3), 1),
    Measure("ITL p50, ms", _latency("inter_token_latency", "p50", 1e3), 1),
    Measure("ITL p99, ms", _latency("inter_token_latency", "p99", 1e3), 0),
    Measure(
        "within SLO, %",
        lambda result: result["outcome"]["goodput"]["fraction"] * 100,
        1,
        tolerance=0.05,
        higher_is_better=True,
        scale=100.0,
    ),
    Measure("prefix hits, %", lambda result: result["outcome"]["hit_fraction"] * 100, 1),
    Measure("busiest engine ÷ mean", _imbalance, 2),
    Measure("lost", lambda result: result["lost"], 1),
    Measure("CPU, ms/request", lambda result: result["cpu_ms_per_request"], 2),
    Measure("peak RSS, MiB", lambda result: result["peak_rss_mib"], 0),
    Measure("client delay p99, ms", lambda result: result["client_delay_p99_ms"], 1),
)


class Results:
    """Saved results by row, router and seed."""

    def __init__(self, league: League, results: list[Result]) -> None:
        self.league = league
        self.all = results
        self.rows = [
            row.name for row in league.rows if any(r["row"] == row.name for r in results)
        ]

    def of(self, row: str, router: str) -> dict[int, Result]:
        """Returns the valid results of a router in a row, by seed."""
        return {
            result["seed"]: result
            for result in self.all
            if (result["row"], result["router"]) == (row, router)
            and not result["void"]
            and result["error"] is None
        }

    def routers(self, row: str) -> list[str]:
        """Returns the routers with results in a row, in the order of rows.toml."""
        seen = {result["router"] for result in self.all if result["row"] == row}
        return [router.name for router in self.league.routers if router.name in seen]

    def rivals(self, row: str) -> list[str]:
        """Returns the routers of a row that are other projects'."""
        ours = {router.name for router in self.league.routers if router.kind == "foresee"}
        return [name for name in self.routers(row) if name not in ours]

    def loses_too_much(self, row: str, router: str) -> bool:
        """Returns whether a router lost more of a row's requests than the limit, and than we did."""
        lost = self._lost_fraction(row, router)
        return lost > MAX_LOST_FRACTION and lost > self._lost_fraction(row, OURS)

    def _lost_fraction(self, row: str, router: str) -> float:
        results = list(self.of(row, router).values())
        sent = sum(result["outcome"]["sent"] for result in results)
        return sum(result["lost"] for result in results) / sent if sent else 0.0

    def comparison(self, row: str, measure: Measure) -> Comparison | None:
        """Compares us with the best rival of a row; `None` without common seeds."""
        if measure.tolerance is None:
            return None

        def values(router: str) -> dict[int, float]:
            return {seed: measure.value(result) for seed, result in self.of(row, router).items()}

        rivals = {
            name: values(name)
            for name in self.rivals(row)
            # Lost requests are no goodput, so there the comparison is fair.
            if measure.higher_is_better or not self.loses_too_much(row, name)
        }
        return compare(
            values(OURS),
            rivals,
            tolerance=measure.tolerance,
            higher_is_better=measure.higher_is_better,
            scale=measure.scale,
        )

    def undecided_rows(self) -> list[str]:
        """Returns the rows with a measure whose verdict is undecided."""
        judged = [measure for measure in MEASURES if measure.tolerance is not None]
        return [
            row
            for row in self.rows
            if any(
                comparison is not None and comparison.verdict is Verdict.UNDECIDED
                for comparison in (self.comparison(row, measure) for measure in judged)
            )
        ]


def merged(league: League, results: list[Result], versions: dict[str, str]) -> Result:
    """Returns one document with all results and verdicts."""
    table = Results(league, results)
    verdicts = []
    for row in table.rows:
        for measure in MEASURES:
            comparison = table.comparison(row, measure)
            if comparison is not None:
                entry = {"row": row, "measure": measure.name, **vars(comparison)}
                entry["verdict"] = comparison.verdict.value
                if math.isinf(comparison.margin):
                    entry["margin"] = None
                verdicts.append(entry)
    return {"versions": versions, "verdicts": verdicts, "runs": results}


def markdown(league: League, results: list[Result], versions: dict[str, str]) -> str:
    """Returns the report as text."""
    table = Results(league, results)
    parts = ["# League", "", "Versions: " + ", ".join(versions.values()) + ".", ""]
    parts += [
        "## Verdicts",
        "",
        f"`{OURS}` against the best rival of each row and measure: advantage ± half of the 95 % "
        "interval (in percent; in points for the SLO), rival, seeds. Geometric means are those of "
        "the ratios.",
        "",
        *verdict_table(table, {}),
        "",
    ]
    parts += ["## Measures", "", "Means over seeds, in the engines' time.", ""]
    for row in table.rows:
        parts += _row_table(table, row)
    parts += _evidence(table)
    parts += _problems(table)
    return "\n".join(parts) + "\n"


def verdict_table(table: Results, names: dict[str, str]) -> list[str]:
    """Returns the verdict of each row and judged measure against the best rival. `names` are those of
    the routers in the table."""
    judged = [measure for measure in MEASURES if measure.tolerance is not None]
    rows = []
    ratios: dict[str, list[float]] = {measure.name: [] for measure in judged}
    for row in table.rows:
        cells = [f"`{row}`"]
        for measure in judged:
            comparison = table.comparison(row, measure)
            if comparison is None:
                cells.append("–")
                continue
            ratios[measure.name].append(comparison.ratio)
            margin = "?" if math.isinf(comparison.margin) else f"{comparison.margin * 100:.1f}"
            advantage = f"{comparison.advantage * 100:+.1f}".replace("-", "−")
            rival = names.get(comparison.rival, comparison.rival)
            cells.append(
                f"{comparison.verdict.value}, {advantage} ± {margin} ({rival}, {comparison.seeds})"
            )
        rows.append(cells)
    means = [
        f"{(geometric_mean(ratios[measure.name]) - 1) * 100:+.1f} %".replace("-", "−")
        if ratios[measure.name]
        else "–"
        for measure in judged
    ]
    rows.append(["geometric mean", *means])
    return markdown_table(["row", *(measure.name for measure in judged)], rows)


def _row_table(table: Results, row: str) -> list[str]:
    entry = table.league.row(row)
    lines = [f"### {row}", "", f"{entry.description[0].upper()}{entry.description[1:]}.", ""]
    rows = []
    for router in table.routers(row):
        results = table.of(row, router)
        mark = " †" if table.loses_too_much(row, router) else ""
        cells = [router + mark, str(len(results))]
        for measure in MEASURES:
            value = mean([measure.value(result) for result in results.values()])
            cells.append("–" if math.isnan(value) else f"{value:.{measure.digits}f}")
        rows.append(cells)
    lines += markdown_table(["router", "seeds", *(measure.name for measure in MEASURES)], rows)
    if any(table.loses_too_much(row, router) for router in table.routers(row)):
        lines += ["", "† lost too many requests for its latencies to be compared"]
    return [*lines, ""]


def _evidence(table: Results) -> list[str]:
    """Returns, for each input of each router, in how many runs it was seen to arrive."""
    counts: dict[tuple[str, str], list[bool]] = {}
    lines: dict[tuple[str, str], str] = {}
    for result in table.all:
        for evidence in result.get("evidence", []):
            key = (result["router"], evidence["what"])
            counts.setdefault(key, []).append(evidence["seen"])
            if evidence["seen"]:
                lines[key] = evidence["line"]
    if not counts:
        return []
    rows = []
    for (router, what), seen in sorted(counts.items()):
        line = lines.get((router, what), "–").replace("|", "\\|")
        rows.append([router, what, f"{sum(seen)} of {len(seen)}", f"`{line[:160]}`"])
    header = ["router", "input", "runs", "a line"]
    return ["## Inputs that arrived", "", *markdown_table(header, rows), ""]


def _problems(table: Results) -> list[str]:
    """Returns the runs without a valid result."""
    lines = []
    for result in table.all:
        name = f"{result['row']}, {result['router']}, seed {result['seed']}"
        if result["error"] is not None:
            lines.append(f"- {name}: {result['error'].splitlines()[0]}")
        elif result["void"]:
            delay = result["client_delay_p99_ms"]
            lines.append(f"- {name}: void, the client was {delay:.1f} ms late at p99")
    return ["## Runs without a valid result", "", *lines, ""] if lines else []
