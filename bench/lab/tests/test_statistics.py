"""Ratios, differences and significance of a suite of two workloads."""

import json
import tempfile
import unittest
from pathlib import Path

from statistics_of_runs import E2E, WITHIN_SLO, Suite, half_interval


def outcome(policy: str, seed: int, e2e: float, fraction: float) -> dict[str, object]:
    times = {"mean": e2e, "p99": 2 * e2e}
    return {
        "policy": policy,
        "seed": seed,
        "end_to_end": times,
        "time_to_first_token": times,
        "inter_token_latency": times,
        "goodput": {"fraction": fraction},
        "hit_fraction": 0.5,
    }


def suite(latencies: dict[str, dict[str, list[float]]]) -> Suite:
    """Returns a suite with these mean latencies by workload, policy and seed."""
    rows = []
    for name, by_policy in latencies.items():
        runs = [
            outcome(policy, seed, e2e, 0.9 if policy == "a" else 0.8)
            for policy, values in by_policy.items()
            for seed, e2e in enumerate(values)
        ]
        rows.append({"name": name, "report": {"outcomes": runs}})
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "suite.json"
        file.write_text(json.dumps({"policies": ["a", "b"], "rows": rows}))
        return Suite(file, default="a")


class StatisticsTest(unittest.TestCase):
    def test_interval_of_three_values(self) -> None:
        self.assertAlmostEqual(half_interval([1.0, 2.0, 3.0]), 4.303 / 3**0.5)
        self.assertEqual(half_interval([1.0]), float("inf"))

    def test_ratio_is_the_geometric_mean_over_workloads(self) -> None:
        two = {"x": {"a": [1.0], "b": [2.0]}, "y": {"a": [10.0], "b": [80.0]}}
        self.assertAlmostEqual(suite(two).ratio("b", E2E), 4.0)
        self.assertAlmostEqual(suite(two).difference("b", WITHIN_SLO), -10.0)

    def test_policies_are_separate_if_all_seeds_agree(self) -> None:
        rows = {
            "steady": {"a": [1.0, 2.0, 3.0], "b": [1.5, 2.51, 3.49]},
            "noisy": {"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.0]},
        }
        self.assertTrue(suite(rows).is_separate("steady", "b", "a", E2E))
        self.assertFalse(suite(rows).is_separate("noisy", "b", "a", E2E))


if __name__ == "__main__":
    unittest.main()
