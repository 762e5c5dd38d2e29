//! Arrival rate of one worker: how much of its time the requests that come next will take.

use std::time::Duration;

/// Requests that arrive per second, and the time that their prefills take. An arrival counts less
/// the longer ago it was.
#[derive(Clone, Copy, Debug)]
pub struct ArrivalRate {
    /// Requests per second.
    requests: f64,
    /// Fraction of the worker's time that the predicted prefills of those requests take.
    prefill_utilisation: f64,
    /// Mean time for which an arrival counts, in seconds.
    memory_seconds: f64,
    /// Latest time for which the rates were computed.
    updated_at: Duration,
}

/// Rates of one worker as of `updated_at`. They decay with the [weight](decay) of their age.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ArrivalRates {
    /// Requests per second.
    pub requests: f64,
    /// Fraction of the worker's time that their prefills take.
    pub prefill_utilisation: f64,
    /// Mean time for which an arrival counts, in seconds.
    pub memory_seconds: f64,
    /// Time up to which the rates have decayed, since the epoch that the caller chose.
    pub updated_at: Duration,
}

/// Mean time for which an arrival counts, in decode steps of an engine without load. It is in steps
/// because the load of an engine that is twice as fast changes twice as fast.
const MEMORY_STEPS: f64 = 1000.0;

/// Step times that are assumed at least and at most, in seconds.
const STEP_SECONDS: std::ops::RangeInclusive<f64> = 0.001..=0.1;

/// Returns the weight of an arrival after `age` seconds: close to an exponential decay, at a tenth
/// of its computing cost.
#[inline]
fn decay(memory_seconds: f64, age: f64) -> f64 {
    memory_seconds / (memory_seconds + age)
}

impl Default for ArrivalRate {
    fn default() -> Self {
        Self {
            requests: 0.0,
            prefill_utilisation: 0.0,
            memory_seconds: MEMORY_STEPS * STEP_SECONDS.end(),
            updated_at: Duration::ZERO,
        }
    }
}

impl ArrivalRate {
    /// Counts a request that arrives `now` and needs `prefill_seconds` of prefill, at a worker that
    /// needs `step_seconds` for a decode step without load.
    pub fn add(&mut self, prefill_seconds: f64, step_seconds: f64, now: Duration) {
        self.decay_until(now);
        let step_seconds = step_seconds.clamp(*STEP_SECONDS.start(), *STEP_SECONDS.end());
        self.memory_seconds = MEMORY_STEPS * step_seconds;
        self.requests += 1.0 / self.memory_seconds;
        self.prefill_utilisation += prefill_seconds / self.memory_seconds;
    }

    /// Subtracts a request that was added at `at` with `prefill_seconds` of prefill, because it
    /// moves to another worker. Subtracts only the weight that is left of it at `now`, and no rate
    /// falls below zero.
    pub fn undo(&mut self, (at, prefill_seconds): (Duration, f64), now: Duration) {
        self.decay_until(now);
        let elapsed = now.saturating_sub(at).as_secs_f64();
        let weight = decay(self.memory_seconds, elapsed) / self.memory_seconds;
        self.requests = (self.requests - weight).max(0.0);
        self.prefill_utilisation = (self.prefill_utilisation - weight * prefill_seconds).max(0.0);
    }

    /// Computes the rates for `now`.
    fn decay_until(&mut self, now: Duration) {
        (self.requests, self.prefill_utilisation) = self.rates(now);
        self.updated_at = self.updated_at.max(now);
    }

    /// Returns the values from which [`rates`](Self::rates) follow at any later time.
    #[inline]
    #[must_use]
    pub fn rates_at_last_update(&self) -> ArrivalRates {
        ArrivalRates {
            requests: self.requests,
            prefill_utilisation: self.prefill_utilisation,
            memory_seconds: self.memory_seconds,
            updated_at: self.updated_at,
        }
    }

    /// Returns the requests per second, and the fraction of the worker's time that their prefills
    /// take.
    #[inline]
    #[must_use]
    pub fn rates(&self, now: Duration) -> (f64, f64) {
        let age = now.saturating_sub(self.updated_at).as_secs_f64();
        let weight = decay(self.memory_seconds, age);
        (self.requests * weight, self.prefill_utilisation * weight)
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
            arrivals.add(0.1, 0.02, at(now));
        }
        let (rate, utilisation) = arrivals.rates(at(now));
        assert!((rate / 4.0 - 1.0).abs() < 0.05, "{rate}");
        assert!((utilisation / 0.4 - 1.0).abs() < 0.05, "{utilisation}");
        assert!(arrivals.rates(at(now + 6000.0)).0 < 0.1);
    }

    /// An engine ten times as fast has ten times the rate after the same arrivals, ten times as
    /// fast.
    #[test]
    fn the_memory_scales_with_the_speed_of_the_engine() {
        let mut arrivals = [ArrivalRate::default(), ArrivalRate::default()];
        for index in 0..50 {
            for (arrivals, scale) in arrivals.iter_mut().zip([1.0, 0.1]) {
                let now = f64::from(index) * 0.4 * scale;
                arrivals.add(0.1 * scale, 0.02 * scale, at(now));
            }
        }
        let [slow, fast] = [arrivals[0].rates(at(30.0)), arrivals[1].rates(at(3.0))];
        assert!(
            (fast.0 / slow.0 / 10.0 - 1.0).abs() < 1e-6,
            "{slow:?} {fast:?}"
        );
        assert!((fast.1 / slow.1 - 1.0).abs() < 1e-6, "{slow:?} {fast:?}");
    }

    #[test]
    fn a_request_that_moves_leaves_no_rate_behind() {
        let mut arrivals = ArrivalRate::default();
        arrivals.add(0.5, 0.02, at(1.0));
        arrivals.undo((at(1.0), 0.5), at(4.0));
        let (rate, utilisation) = arrivals.rates(at(4.0));
        assert!(rate.abs() < 1e-9 && utilisation.abs() < 1e-9);
    }
}
