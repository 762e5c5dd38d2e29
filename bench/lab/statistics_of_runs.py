"""Means, ratios and significance over the seeds of `foresee replay suite --json`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Intervals are computed as in the league.
sys.path.append(str(Path(__file__).resolve().parents[1] / "league"))
from verdicts import geometric_mean, half_interval, mean  # noqa: E402

Outcome = dict[str, Any]
Measure = Callable[[Outcome], float]

E2E: Measure = lambda run: run["end_to_end"]["mean"]
E2E_P99: Measure = lambda run: run["end_to_end"]["p99"]
TTFT: Measure = lambda run: run["time_to_first_token"]["mean"]
TTFT_P99: Measure = lambda run: run["time_to_first_token"]["p99"]
ITL: Measure = lambda run: run["inter_token_latency"]["mean"]
WITHIN_SLO: Measure = lambda run: 100 * run["goodput"]["fraction"]
HITS: Measure = lambda run: 100 * run["hit_fraction"]


class Suite:
    """Outcomes of a suite, by workload, policy and seed."""

    def __init__(self, file: Path, default: str) -> None:
        report = json.loads(file.read_text())
        self.default = default
        self.policies: list[str] = report["policies"]
        self.rows: dict[str, dict[str, dict[int, Outcome]]] = {}
        for row in report["rows"]:
            by_policy = self.rows.setdefault(row["name"], {})
            for run in row["report"]["outcomes"]:
                by_policy.setdefault(run["policy"], {})[run["seed"]] = run

    def values(self, row: str, policy: str, measure: Measure) -> list[float]:
        """Returns the measure of each seed, in their order."""
        runs = self.rows[row][policy]
        return [measure(runs[seed]) for seed in sorted(runs)]

    def mean(self, row: str, policy: str, measure: Measure) -> float:
        return mean(self.values(row, policy, measure))

    def is_separate(self, row: str, policy: str, other: str, measure: Measure) -> bool:
        """Returns whether the difference between two policies, paired by seed, excludes zero."""
        pairs = zip(self.values(row, policy, measure), self.values(row, other, measure))
        differences = [a - b for a, b in pairs]
        return abs(mean(differences)) > half_interval(differences)

    def ratio(self, policy: str, measure: Measure) -> float:
        """Returns the geometric mean, over the workloads, of the ratios to the default."""
        return geometric_mean(
            [
                self.mean(row, policy, measure) / self.mean(row, self.default, measure)
                for row in self.rows
            ]
        )

    def difference(self, policy: str, measure: Measure) -> float:
        """Returns the mean difference to the default, over the workloads."""
        return mean(
            [
                self.mean(row, policy, measure) - self.mean(row, self.default, measure)
                for row in self.rows
            ]
        )

    def change(self, policy: str, measure: Measure) -> tuple[float, float]:
        """Returns the change against the default in per cent, as the geometric mean over the
        workloads, with half of its interval over the seeds. For a measure in points, the difference.
        """
        seeds = sorted(next(iter(self.rows.values()))[policy])
        changes = []
        for seed in seeds:
            pairs = [
                (measure(runs[policy][seed]), measure(runs[self.default][seed]))
                for runs in self.rows.values()
            ]
            if measure in (WITHIN_SLO, HITS):
                changes.append(mean([a - b for a, b in pairs]))
            else:
                changes.append(100 * (geometric_mean([a / b for a, b in pairs]) - 1))
        return mean(changes), half_interval(changes)
