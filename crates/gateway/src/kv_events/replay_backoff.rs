//! Back-off of replay requests to an engine's replay socket.
//!
//! A subscription applies no live events while it waits for a replay, so a socket that keeps failing
//! is asked at growing intervals. Pure: times are parameters.

use std::time::Duration;

use tokio::time::Instant;

/// Back-off after the first failure. Each further failure doubles it, up to [`MAX_BACKOFF`].
const INITIAL_BACKOFF: Duration = Duration::from_secs(5);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// When a replay socket may be asked again.
#[derive(Debug, Default)]
pub(crate) struct ReplayBackoff {
    /// End of the current back-off; `None` if there is none.
    until: Option<Instant>,
    /// Number of failures since the last success.
    failures: u32,
}

impl ReplayBackoff {
    /// Returns whether the socket may be asked at `now`.
    pub(crate) fn is_elapsed(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// Starts a back-off after a failed replay; `now` is the time after the attempt. Returns whether
    /// this is the first failure since the last success.
    pub(crate) fn on_failure(&mut self, now: Instant) -> bool {
        let doubled = INITIAL_BACKOFF * (1 << self.failures.min(8));
        self.until = Some(now + doubled.min(MAX_BACKOFF));
        self.failures += 1;
        self.failures == 1
    }

    /// Ends the back-off after a successful replay. Returns whether a failure preceded it.
    pub(crate) fn on_success(&mut self) -> bool {
        self.until = None;
        std::mem::take(&mut self.failures) > 0
    }

    /// Ends the back-off when a connection is made: another process may listen there, whose socket
    /// works. Keeps the number of failures.
    pub(crate) fn reset(&mut self) {
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_doubles_up_to_a_minute_and_only_the_first_failure_is_reported() {
        let mut backoff = ReplayBackoff::default();
        let mut now = Instant::now();
        for round in 0..2 {
            assert!(backoff.is_elapsed(now));
            for (failure, seconds) in [5, 10, 20, 40, 60, 60, 60].into_iter().enumerate() {
                assert_eq!(backoff.on_failure(now), failure == 0, "round {round}");
                now += Duration::from_secs(seconds);
                assert!(!backoff.is_elapsed(now - Duration::from_millis(1)));
                assert!(backoff.is_elapsed(now));
            }
            backoff.on_failure(now);
            assert!(backoff.on_success());
            assert!(!backoff.on_success());
        }
    }

    #[test]
    fn a_new_connection_ends_the_backoff_but_keeps_the_failures() {
        let mut backoff = ReplayBackoff::default();
        let now = Instant::now();
        backoff.on_failure(now);
        backoff.reset();
        assert!(backoff.is_elapsed(now));
        assert!(!backoff.on_failure(now));
        assert!(!backoff.is_elapsed(now + Duration::from_secs(9)));
    }
}
