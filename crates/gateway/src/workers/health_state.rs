//! When a worker counts as healthy, and when it is checked next: pure, without a clock.

use std::hash::{BuildHasher, RandomState};

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::workers::health_config::HealthConfig;

/// Delays of the checks after refused connections, before the interval applies: a process that
/// restarts is found soon, and a refused connection costs nothing.
const FAST_DELAYS: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(500)];

/// Fraction by which the interval varies in both directions, so that checks of many workers and of
/// many routers do not coincide.
const JITTER: f64 = 0.1;

/// Smallest first interval, as a fraction of the interval; see [`CheckSchedule::next_delay`].
const MIN_FIRST_INTERVAL: f64 = 0.5;

/// Results of a worker's health checks, and what follows from them.
#[derive(Debug)]
pub(crate) struct HealthState {
    healthy_threshold: u32,
    unhealthy_threshold: u32,
    /// Successful checks in a row.
    successes: u32,
    /// Failed checks in a row.
    failures: u32,
    is_healthy: bool,
    /// Whether the worker has ever been healthy.
    was_healthy: bool,
}

impl HealthState {
    /// Creates the state of a worker that was not checked yet, which is unhealthy.
    pub(crate) fn new(config: &HealthConfig) -> Self {
        Self {
            healthy_threshold: config.healthy_threshold.get(),
            unhealthy_threshold: config.unhealthy_threshold.get(),
            successes: 0,
            failures: 0,
            is_healthy: false,
            was_healthy: false,
        }
    }

    /// Counts a successful check. `has_returned` says that the worker had refused a connection
    /// before, which made it unhealthy whatever the checks said. Returns whether the worker is
    /// healthy.
    pub(crate) fn on_success(&mut self, has_returned: bool) -> bool {
        if has_returned {
            self.is_healthy = false;
            self.successes = 0;
        }
        self.failures = 0;
        self.successes = self.successes.saturating_add(1);
        let is_recovering = self.was_healthy && !self.is_healthy;
        if !is_recovering || self.successes >= self.healthy_threshold {
            self.is_healthy = true;
            self.was_healthy = true;
        }
        self.is_healthy
    }

    /// Counts a failed check. Returns whether this failure is the one that reaches the threshold.
    pub(crate) fn on_failure(&mut self) -> bool {
        self.successes = 0;
        self.failures = self.failures.saturating_add(1);
        if self.failures >= self.unhealthy_threshold {
            self.is_healthy = false;
        }
        self.failures == self.unhealthy_threshold
    }

    /// Returns whether the worker is healthy by its checks.
    pub(crate) fn is_healthy(&self) -> bool {
        self.is_healthy
    }

    /// Returns the number of failed checks in a row.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }
}

/// Delays between a worker's health checks.
#[derive(Debug)]
pub(crate) struct CheckSchedule {
    interval: Duration,
    /// Refused connections in a row.
    refusals: usize,
    /// Whether the whole interval has not been used yet.
    is_first: bool,
    random: SmallRng,
}

impl CheckSchedule {
    /// Creates a schedule with a random phase.
    pub(crate) fn new(interval: Duration) -> Self {
        let seed = RandomState::new().hash_one(interval);
        Self::with_seed(interval, seed)
    }

    /// Creates a schedule whose random numbers follow from `seed`.
    fn with_seed(interval: Duration, seed: u64) -> Self {
        Self {
            interval,
            refusals: 0,
            is_first: true,
            random: SmallRng::seed_from_u64(seed),
        }
    }

    /// Returns the time until the next check. `was_refused` says that the connection of the last
    /// check was refused: the next checks then follow quickly, and later in intervals.
    ///
    /// The first interval is shortened by a random part, at most half, so that workers that were
    /// added at the same time are not checked at the same time.
    pub(crate) fn next_delay(&mut self, was_refused: bool) -> Duration {
        let fast = FAST_DELAYS.get(self.refusals).filter(|_| was_refused);
        self.refusals = if was_refused { self.refusals + 1 } else { 0 };
        if let Some(&delay) = fast {
            return delay.min(self.interval);
        }
        let factor = if std::mem::take(&mut self.is_first) {
            self.random.random_range(MIN_FIRST_INTERVAL..1.0)
        } else {
            self.random.random_range(1.0 - JITTER..1.0 + JITTER)
        };
        self.interval.mul_f64(factor)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn state(healthy: u32, unhealthy: u32) -> HealthState {
        let threshold = |count| NonZeroU32::new(count).unwrap();
        HealthState::new(&HealthConfig {
            healthy_threshold: threshold(healthy),
            unhealthy_threshold: threshold(unhealthy),
            ..HealthConfig::default()
        })
    }

    #[test]
    fn thresholds_count_results_in_a_row() {
        let mut state = state(3, 2);
        assert!(state.on_success(false), "the first success is enough");
        assert!(!state.on_failure());
        assert!(state.on_success(false), "one failure changes nothing");
        assert!(!state.on_failure());
        assert!(state.on_failure(), "the second failure in a row");
        assert!(!state.is_healthy());
        assert!(!state.on_failure(), "later failures are not reported again");
        assert!(!state.on_success(false));
        assert!(!state.on_success(false));
        assert!(!state.on_failure(), "the count starts again");
        assert!(!state.on_success(false));
        assert!(!state.on_success(false));
        assert!(state.on_success(false));
    }

    #[test]
    fn a_worker_that_refused_a_request_needs_the_threshold_too() {
        let mut state = state(2, 2);
        assert!(state.on_success(false));
        assert!(!state.on_success(true), "a request was refused meanwhile");
        assert!(state.on_success(false));
    }

    #[test]
    fn intervals_vary_by_a_tenth_after_a_random_phase() {
        let interval = Duration::from_secs(10);
        let mut firsts = Vec::new();
        for seed in 0..200 {
            let mut schedule = CheckSchedule::with_seed(interval, seed);
            let first = schedule.next_delay(false);
            assert!(first >= interval.mul_f64(0.5) && first <= interval);
            firsts.push(first);
            let later: Vec<_> = (0..50).map(|_| schedule.next_delay(false)).collect();
            assert!(later.iter().all(|delay| *delay >= interval.mul_f64(0.9)));
            assert!(later.iter().all(|delay| *delay <= interval.mul_f64(1.1)));
            let mean = later.iter().sum::<Duration>() / 50;
            assert!(mean.abs_diff(interval) < Duration::from_millis(600));
        }
        let (min, max) = (firsts.iter().min().unwrap(), firsts.iter().max().unwrap());
        assert!(*max - *min > Duration::from_secs(4), "phases are spread");
    }

    #[test]
    fn checks_follow_quickly_after_refused_connections() {
        let mut schedule = CheckSchedule::with_seed(Duration::from_secs(10), 1);
        schedule.next_delay(false);
        for _ in 0..2 {
            assert_eq!(schedule.next_delay(true), FAST_DELAYS[0]);
            assert_eq!(schedule.next_delay(true), FAST_DELAYS[1]);
            assert!(schedule.next_delay(true) >= Duration::from_secs(9));
            assert!(schedule.next_delay(true) >= Duration::from_secs(9));
            assert!(schedule.next_delay(false) >= Duration::from_secs(9));
        }
        let mut short = CheckSchedule::with_seed(Duration::from_millis(40), 1);
        assert_eq!(short.next_delay(true), Duration::from_millis(40));
    }
}
