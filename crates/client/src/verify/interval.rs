//! Confidence intervals for a proportion, and the goals that are judged with them.

use std::ops::RangeInclusive;

use serde::Serialize;

/// Probability of each of the two errors: the true proportion lies below, or above, the interval.
const TAIL: f64 = 0.025;

/// The result of one goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The goal is met. A goal for a proportion is met if the whole interval meets it.
    Holds,
    /// The interval contains the goal: there were too few responses to decide.
    NotShown,
    /// The goal is missed. A goal for a proportion is missed if the whole interval lies below it.
    Fails,
    /// Nothing was measured.
    NotMeasured,
}

/// A number of successes among a number of trials.
///
/// The 95 % interval is Clopper and Pearson's ("The use of confidence or fiducial limits
/// illustrated in the case of the binomial", Biometrika 26, 1934). It contains the true proportion
/// with at least 95 % probability for any proportion. Wilson's interval is too short near 1: for
/// 149 successes in 150 trials it excludes 99.9 %, although at that proportion at least one failure
/// in 150 trials has a probability of 14 %.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Proportion {
    /// Number of successes.
    pub successes: u64,
    /// Number of trials.
    pub trials: u64,
}

impl Proportion {
    /// Returns the observed proportion; 1 without trials.
    #[must_use]
    pub fn observed(self) -> f64 {
        if self.trials == 0 {
            return 1.0;
        }
        self.successes as f64 / self.trials as f64
    }

    /// Returns the 95 % confidence interval; 0 to 1 without trials.
    #[must_use]
    pub fn interval(self) -> RangeInclusive<f64> {
        let failures = self.failures();
        let lower = if self.successes == 0 {
            0.0
        } else {
            // At the lower bound, this few failures have the probability `TAIL`.
            1.0 - bisect(|rate| at_most(failures, self.trials, rate) <= TAIL)
        };
        let upper = if failures == 0 {
            1.0
        } else {
            // At the upper bound, this many failures have the probability `TAIL`.
            1.0 - bisect(|rate| 1.0 - at_most(failures - 1, self.trials, rate) >= TAIL)
        };
        lower..=upper
    }

    /// Compares the interval with a goal below 1. Without trials, the goal is not measured.
    #[must_use]
    pub fn verdict(self, goal: f64) -> Verdict {
        let interval = self.interval();
        if self.trials == 0 {
            Verdict::NotMeasured
        } else if *interval.start() >= goal {
            Verdict::Holds
        } else if *interval.end() < goal {
            Verdict::Fails
        } else {
            Verdict::NotShown
        }
    }

    /// Returns the number of trials, these included, with which the goal would be shown if no
    /// further trial failed. `goal` must be below 1: no number of trials shows a goal of 1.
    #[must_use]
    pub fn trials_needed(self, goal: f64) -> u64 {
        let failures = self.failures();
        let is_enough = |trials| at_most(failures, trials, 1.0 - goal) <= TAIL;
        let mut enough = self.trials.max(1);
        while !is_enough(enough) && enough < u64::MAX / 4 {
            enough *= 2;
        }
        let mut too_few = failures;
        while too_few + 1 < enough {
            let middle = u64::midpoint(too_few, enough);
            if is_enough(middle) {
                enough = middle;
            } else {
                too_few = middle;
            }
        }
        enough.max(self.trials)
    }

    fn failures(self) -> u64 {
        self.trials.saturating_sub(self.successes)
    }
}

/// Returns the probability of at most `failures` in `trials`, each of probability `rate`.
fn at_most(failures: u64, trials: u64, rate: f64) -> f64 {
    if failures >= trials || rate <= 0.0 {
        return 1.0;
    }
    if rate >= 1.0 {
        return 0.0;
    }
    // Logarithms, because the first terms of a large sample are smaller than any `f64`.
    let (ln_rate, ln_success) = (rate.ln(), (-rate).ln_1p());
    let mut ln_term = trials as f64 * ln_success;
    let mut sum = ln_term.exp();
    for count in 0..failures {
        let ratio = (trials - count) as f64 / (count + 1) as f64;
        ln_term += ratio.ln() + ln_rate - ln_success;
        sum += ln_term.exp();
    }
    sum.min(1.0)
}

/// Returns the point in 0 to 1 from which a condition holds; 1 if it holds nowhere below. A
/// condition that holds at a point must hold at all larger ones.
fn bisect(holds: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if holds(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(successes: u64, trials: u64) -> Proportion {
        Proportion { successes, trials }
    }

    fn assert_interval(proportion: Proportion, lower: f64, upper: f64) {
        let interval = proportion.interval();
        let is_near = |a: f64, b: f64| (a - b).abs() < 5e-5;
        assert!(is_near(*interval.start(), lower), "{interval:?}");
        assert!(is_near(*interval.end(), upper), "{interval:?}");
    }

    #[test]
    fn intervals_have_known_values() {
        // Computed by another program, with exact binomial coefficients.
        assert_interval(of(5, 10), 0.1871, 0.8129);
        assert_interval(of(9, 10), 0.5550, 0.9975);
        assert_interval(of(0, 10), 0.0, 0.3085);
        assert_interval(of(10, 10), 0.6915, 1.0);
        assert_interval(of(149, 150), 0.9634, 0.9998);
        assert_interval(of(50, 100), 0.3983, 0.6017);
        assert_interval(of(0, 0), 0.0, 1.0);
        // Without a failure, the bound has a closed form.
        let lower = *of(3000, 3000).interval().start();
        assert!((lower - TAIL.powf(1.0 / 3000.0)).abs() < 1e-9);
        // The first terms of the sum underflow. The normal approximation is near.
        assert_interval(of(50_000, 100_000), 0.4969, 0.5031);
    }

    #[test]
    fn one_failure_in_150_is_consistent_with_99_9_percent() {
        assert_eq!(of(149, 150).verdict(0.999), Verdict::NotShown);
        assert_eq!(of(150, 150).verdict(0.999), Verdict::NotShown);
    }

    #[test]
    fn enough_responses_show_a_goal() {
        assert_eq!(of(4000, 4000).verdict(0.999), Verdict::Holds);
        assert_eq!(of(299, 300).verdict(0.97), Verdict::Holds);
    }

    #[test]
    fn a_proportion_far_below_its_goal_fails() {
        assert_eq!(of(140, 150).verdict(0.999), Verdict::Fails);
        assert_eq!(of(0, 3).verdict(0.97), Verdict::Fails);
        assert_eq!(of(0, 0).verdict(0.97), Verdict::NotMeasured);
    }

    #[test]
    fn the_number_needed_is_the_smallest_that_shows_the_goal() {
        // The smallest n with 0.999^n <= 0.025.
        assert_eq!(of(150, 150).trials_needed(0.999), 3688);
        for (successes, trials, goal) in [(150, 150, 0.999), (149, 150, 0.999), (95, 100, 0.97)] {
            let proportion = of(successes, trials);
            let needed = proportion.trials_needed(goal);
            let failures = trials - successes;
            let verdict = |trials| of(trials - failures, trials).verdict(goal);
            assert_eq!(verdict(needed), Verdict::Holds);
            assert_eq!(verdict(needed - 1), Verdict::NotShown);
        }
        assert_eq!(of(4000, 4000).trials_needed(0.99), 4000);
    }
}
