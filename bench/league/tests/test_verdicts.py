"""Statistics and verdicts."""

import math
import unittest

from verdicts import Verdict, compare, geometric_mean, half_interval, verdict


class Statistics(unittest.TestCase):
    def test_the_interval_has_known_values(self) -> None:
        # The standard deviation is 1, and t(0.975, 2) is 4.303.
        self.assertAlmostEqual(half_interval([1.0, 2.0, 3.0]), 4.303 / math.sqrt(3), places=3)
        self.assertEqual(half_interval([5.0, 5.0]), 0.0)
        self.assertEqual(half_interval([5.0]), math.inf)

    def test_a_geometric_mean_ignores_what_is_no_ratio(self) -> None:
        self.assertAlmostEqual(geometric_mean([0.5, 2.0, math.nan]), 1.0)
        self.assertTrue(math.isnan(geometric_mean([])))


class Verdicts(unittest.TestCase):
    def test_a_small_difference_ties_only_with_a_narrow_interval(self) -> None:
        self.assertEqual(verdict(0.005, 0.01, 0.01), Verdict.TIED)
        self.assertEqual(verdict(-0.01, 0.01, 0.01), Verdict.TIED)
        self.assertEqual(verdict(0.005, 0.02, 0.01), Verdict.UNDECIDED)
        self.assertEqual(verdict(0.0, math.inf, 0.01), Verdict.UNDECIDED)

    def test_a_larger_difference_needs_an_interval_without_zero(self) -> None:
        self.assertEqual(verdict(0.05, 0.04, 0.01), Verdict.FIRST)
        self.assertEqual(verdict(-0.05, 0.04, 0.01), Verdict.BEHIND)
        self.assertEqual(verdict(0.05, 0.06, 0.01), Verdict.UNDECIDED)


class Comparisons(unittest.TestCase):
    def test_the_best_rival_is_the_opponent(self) -> None:
        ours = {1: 1.0, 2: 1.1, 3: 1.2}
        rivals = {"good": {1: 1.2, 2: 1.3, 3: 1.4}, "bad": {1: 3.0, 2: 3.0, 3: 3.0}}
        result = compare(ours, rivals, tolerance=0.01)
        assert result is not None
        self.assertEqual((result.rival, result.verdict, result.seeds), ("good", Verdict.FIRST, 3))
        self.assertAlmostEqual(result.advantage, 0.2 / 1.3)
        self.assertAlmostEqual(result.margin, 0.0)
        self.assertAlmostEqual(result.ratio, 1.3 / 1.1)

    def test_pairing_removes_what_seeds_have_in_common(self) -> None:
        ours = {1: 10.0, 2: 20.0, 3: 30.0}
        rivals = {"rival": {1: 11.0, 2: 21.0, 3: 31.0}}
        result = compare(ours, rivals, tolerance=0.01)
        assert result is not None
        self.assertEqual(result.verdict, Verdict.FIRST)

    def test_goodput_is_better_if_it_is_higher(self) -> None:
        ours = {1: 80.0, 2: 81.0}
        rivals = {"low": {1: 40.0, 2: 41.0}, "high": {1: 99.0, 2: 99.5}}
        result = compare(ours, rivals, tolerance=0.05, higher_is_better=True)
        assert result is not None
        self.assertEqual((result.rival, result.verdict), ("high", Verdict.BEHIND))
        self.assertLess(result.ratio, 1.0)

    def test_only_common_seeds_count(self) -> None:
        result = compare({1: 1.0, 2: 1.0}, {"rival": {2: 1.0, 3: 9.0}}, tolerance=0.01)
        assert result is not None
        self.assertEqual((result.seeds, result.verdict), (1, Verdict.UNDECIDED))
        self.assertIsNone(compare({1: 1.0}, {"rival": {2: 1.0}}, tolerance=0.01))
        self.assertIsNone(compare({1: 1.0}, {}, tolerance=0.01))


if __name__ == "__main__":
    unittest.main()
