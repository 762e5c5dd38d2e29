//! Rate at which queued requests are dispatched, from which `Retry-After` is derived when the queue is
//! full.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use parking_lot::Mutex;

/// Time constant of the average, in seconds.
const AVERAGE_SECONDS: f64 = 10.0;

/// Longest time that a client is asked to wait. Clients give up for good on much longer times.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Time that a client is asked to wait while no rate is known.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Largest relative change of the time, so that clients that were refused together do not return
/// together.
const JITTER: f64 = 0.2;

/// Exponentially decaying count of dispatched requests.
#[derive(Debug, Default)]
pub(crate) struct DrainRate {
    average: Mutex<Average>,
    /// Random keys, from which the jitter is derived.
    random: RandomState,
}

#[derive(Clone, Copy, Debug, Default)]
struct Average {
    /// Dispatches, each weighted by its age.
    weight: f64,
    /// When the weight was last brought up to date.
    at: Duration,
}

impl Average {
    /// Returns the weight at `now`.
    fn weight_at(&self, now: Duration) -> f64 {
        let age = now.saturating_sub(self.at).as_secs_f64();
        self.weight * (-age / AVERAGE_SECONDS).exp()
    }
}

impl DrainRate {
    /// Counts a queued request that was dispatched at `now`.
    pub(crate) fn record(&self, now: Duration) {
        let mut average = self.average.lock();
        let weight = average.weight_at(now) + 1.0;
        *average = Average { weight, at: now };
    }

    /// Returns after which time a refused client should try again: the time in which half of the
    /// `queued` requests are dispatched at the present rate, at most [`MAX_RETRY_AFTER`], with jitter.
    pub(crate) fn retry_after(&self, queued: usize, now: Duration) -> Duration {
        let rate = self.average.lock().weight_at(now) / AVERAGE_SECONDS;
        let seconds = queued as f64 / 2.0 / rate;
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(MAX_RETRY_AFTER);
        let wait = if rate > 1e-3 {
            wait
        } else {
            DEFAULT_RETRY_AFTER
        };
        let draw = self.random.hash_one(now) as f64 / u64::MAX as f64;
        let jitter = 1.0 + JITTER * (2.0 * draw - 1.0);
        wait.mul_f64(jitter).min(MAX_RETRY_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_follows_the_rate_within_the_jitter_and_the_bound() {
        let rate = DrainRate::default();
        let unknown = rate.retry_after(1000, Duration::ZERO).as_secs_f64();
        assert!((0.8..=1.2).contains(&unknown), "{unknown}");
        // Twenty dispatches a second for a minute.
        for tick in 0..1200 {
            rate.record(Duration::from_millis(tick * 50));
        }
        let now = Duration::from_secs(60);
        let waits: Vec<f64> = (0..50)
            .map(|step| rate.retry_after(200, now + Duration::from_micros(step)))
            .map(|wait| wait.as_secs_f64())
            .collect();
        assert!(
            waits.iter().all(|wait| (3.9..=6.1).contains(wait)),
            "{waits:?}"
        );
        assert!(waits.iter().any(|wait| *wait != waits[0]), "jitter");
        assert!(rate.retry_after(1_000_000, now) <= MAX_RETRY_AFTER);
    }
}
