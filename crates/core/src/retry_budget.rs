//! Retry budget: bounds retries to a fraction of the recent requests, so that retries do not multiply
//! the load of a fleet that fails as a whole.
//!
//! As in Finagle and linkerd, the budget is a fraction of the requests of a sliding window, plus a
//! fixed number per second, so that a fleet with few requests can retry at all. A retry counts when
//! it is decided, not when it is sent.

use std::time::Duration;

/// Number of seconds in the window.
const WINDOW_SECONDS: usize = 10;

/// Requests and retries that were counted in one second.
#[derive(Clone, Copy, Debug, Default)]
struct Second {
    /// The second that the counts belong to, since the epoch of the caller's clock.
    number: u64,
    requests: u64,
    retries: u64,
}

/// Limits retries over a sliding window of ten seconds.
#[derive(Debug)]
pub struct RetryBudget {
    /// Retries per request.
    ratio: f64,
    /// Retries per second in addition.
    per_second: f64,
    /// Counts of the latest seconds, by the second modulo the window.
    seconds: [Second; WINDOW_SECONDS],
    /// First second in which anything was counted.
    first_second: Option<u64>,
}

impl RetryBudget {
    /// Creates a budget of `ratio` retries per request and `per_second` retries per second.
    #[must_use]
    pub fn new(ratio: f64, per_second: f64) -> Self {
        Self {
            ratio,
            per_second,
            seconds: [Second::default(); WINDOW_SECONDS],
            first_second: None,
        }
    }

    /// Counts a request of a client, which adds to the budget.
    pub fn on_request(&mut self, now: Duration) {
        self.second(now).requests += 1;
    }

    /// Takes one retry from the budget. Returns `false`, and takes nothing, if the budget is used up.
    #[must_use = "a retry that was allowed is counted"]
    pub fn try_retry(&mut self, now: Duration) -> bool {
        let is_allowed = self.allows_retry(now);
        if is_allowed {
            self.second(now).retries += 1;
        }
        is_allowed
    }

    /// Returns a retry that was taken at `now` and not used.
    pub fn return_retry(&mut self, now: Duration) {
        let second = self.second(now);
        second.retries = second.retries.saturating_sub(1);
    }

    /// Returns whether [`try_retry`](Self::try_retry) would take a retry now.
    fn allows_retry(&self, now: Duration) -> bool {
        let current = now.as_secs();
        let oldest = current.saturating_sub(WINDOW_SECONDS as u64 - 1);
        let (mut requests, mut retries) = (0, 0);
        for second in &self.seconds {
            if (oldest..=current).contains(&second.number) {
                requests += second.requests;
                retries += second.retries;
            }
        }
        let first = self.first_second.unwrap_or(current).max(oldest);
        let elapsed_seconds = current.saturating_sub(first) + 1;
        let allowed = self.ratio * requests as f64 + self.per_second * elapsed_seconds as f64;
        (retries + 1) as f64 <= allowed
    }

    /// Returns the counts of the second of `now`, cleared if they belonged to an earlier one. A time
    /// before the latest one is counted in its own second or, if that is no longer kept, in the
    /// second that replaced it.
    fn second(&mut self, now: Duration) -> &mut Second {
        let number = now.as_secs();
        self.first_second.get_or_insert(number);
        let second = &mut self.seconds[(number % WINDOW_SECONDS as u64) as usize];
        if second.number < number {
            *second = Second {
                number,
                ..Second::default()
            };
        }
        second
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_quiet_fleet_can_retry_and_a_failing_fleet_stays_within_the_ratio() {
        let mut budget = RetryBudget::new(0.2, 3.0);
        let granted = (0..10).filter(|_| budget.try_retry(Duration::ZERO)).count();
        assert_eq!(granted, 3, "three in the first second");
        // 100 requests a second, each of which wants a retry, for a minute.
        let (mut requests, mut retries) = (0, 0);
        for tick in 0..6000 {
            let now = Duration::from_millis(1000 + tick * 10);
            budget.on_request(now);
            requests += 1;
            retries += u32::from(budget.try_retry(now));
        }
        let bound = 0.2 * f64::from(requests) + 3.0 * 61.0;
        assert!(f64::from(retries) <= bound, "{retries} of {requests}");
        assert!(f64::from(retries) > 0.9 * bound, "{retries} of {requests}");
    }

    proptest! {
        /// The budget grants a retry exactly if a list of all past events allows it.
        #[test]
        fn equals_a_list_of_all_events(events in prop::collection::vec((0_u64..3000, any::<bool>()), 1..200)) {
            let mut budget = RetryBudget::new(0.5, 1.0);
            let (mut requests, mut retries) = (Vec::new(), Vec::new());
            let mut now = Duration::ZERO;
            let mut first = None;
            for (step, is_retry) in events {
                now += Duration::from_millis(step);
                let second = now.as_secs();
                let first = *first.get_or_insert(second);
                if is_retry {
                    let oldest = second.saturating_sub(9);
                    let recent = |seconds: &[u64]| seconds.iter().filter(|&&at| at >= oldest).count();
                    let elapsed = second - first.max(oldest) + 1;
                    let allowed = 0.5 * recent(&requests) as f64 + elapsed as f64;
                    let expected = (recent(&retries) + 1) as f64 <= allowed;
                    prop_assert_eq!(budget.try_retry(now), expected);
                    if expected {
                        retries.push(second);
                    }
                } else {
                    budget.on_request(now);
                    requests.push(second);
                }
            }
        }
    }
}
