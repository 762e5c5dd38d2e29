//! Arrival rate of one worker: how much of its time the requests that come next will take.

use std::time::Duration;

/// Recent arrival rate of requests and of their prefill work, with decay. Both sums are as of
/// `updated_at`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ArrivalRate {
    /// Number of requests, with decay.
    requests: f64,
    /// Predicted prefill seconds of those requests, with decay.
    seconds: f64,
    /// Latest time for which the sums were computed.
    updated_at: Duration,
}

/// Arrivals of one worker, with decay up to `updated_at`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ArrivalSums {
    /// Number of requests.
    pub requests: f64,
    /// Predicted prefill seconds of those requests.
    pub prefill_seconds: f64,
    /// Time up to which the arrivals have decayed, since the epoch that the caller chose.
    pub updated_at: Duration,
}

/// Mean time for which an arrival counts, in seconds.
pub const ARRIVAL_MEMORY_SECONDS: f64 = 20.0;

impl ArrivalRate {
    /// Counts a request that arrives `now` and needs `seconds` of prefill.
    pub fn add(&mut self, seconds: f64, now: Duration) {
        let decay = self.decay(now);
        self.requests = self.requests * decay + 1.0;
        self.seconds = self.seconds * decay + seconds;
        self.updated_at = self.updated_at.max(now);
    }

    /// Subtracts a request that was added at `at` with `seconds` of prefill, because it moves to
    /// another worker. Subtracts only the weight that is left of it at `now`, and no sum falls
    /// below zero.
    pub fn undo(&mut self, (at, seconds): (Duration, f64), now: Duration) {
        let decay = self.decay(now);
        let elapsed = now.saturating_sub(at).as_secs_f64();
        let weight = ARRIVAL_MEMORY_SECONDS / (ARRIVAL_MEMORY_SECONDS + elapsed);
        self.requests = (self.requests * decay - weight).max(0.0);
        self.seconds = (self.seconds * decay - weight * seconds).max(0.0);
        self.updated_at = self.updated_at.max(now);
    }

    /// Returns the weight at `now` of what was counted up to the last update.
    #[inline]
    fn decay(&self, now: Duration) -> f64 {
        // Close to an exponential decay at a tenth of its computing cost.
        ARRIVAL_MEMORY_SECONDS
            / (ARRIVAL_MEMORY_SECONDS + now.saturating_sub(self.updated_at).as_secs_f64())
    }

    /// Returns the sums from which [`rates`](Self::rates) follow at any later time.
    #[inline]
    #[must_use]
    pub fn sums(&self) -> ArrivalSums {
        ArrivalSums {
            requests: self.requests,
            prefill_seconds: self.seconds,
            updated_at: self.updated_at,
        }
    }

    /// Returns the requests per second, and the fraction of the worker's time that their prefills
    /// take.
    #[inline]
    #[must_use]
    pub fn rates(&self, now: Duration) -> (f64, f64) {
        let decay_per_second = self.decay(now) / ARRIVAL_MEMORY_SECONDS;
        (
            self.requests * decay_per_second,
            self.seconds * decay_per_second,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn the_arrival_rate_follows_arrivals_and_decays() {
        let mut arrivals = ArrivalRate::default();
        let mut now = 0.0;
        for _ in 0..2000 {
            now += 0.25;
            arrivals.add(0.1, at(now));
        }
        let (rate, utilisation) = arrivals.rates(at(now));
        assert!((rate / 4.0 - 1.0).abs() < 0.05, "{rate}");
        assert!((utilisation / 0.4 - 1.0).abs() < 0.05, "{utilisation}");
        assert!(arrivals.rates(at(now + 6000.0)).0 < 0.1);
    }
}
