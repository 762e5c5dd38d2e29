//! How long a replay socket is left alone after it failed. While it is asked, nothing live is
//! applied, so one that keeps failing must be asked ever more seldom.
//!
//! Pure: it is handed times.

use std::time::Duration;

use tokio::time::Instant;

/// Rests double from the first to the last.
const FIRST_REST: Duration = Duration::from_secs(5);
const LAST_REST: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct ReplayRest {
    until: Option<Instant>,
    /// How often it failed since it last worked.
    failures: u32,
}

impl ReplayRest {
    /// Whether it may be asked.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// It failed; `now` is after the attempt. Returns whether that is news.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        let doubled = FIRST_REST * (1 << self.failures.min(8));
        self.until = Some(now + doubled.min(LAST_REST));
        self.failures += 1;
        self.failures == 1
    }

    /// It worked. Returns whether that is news.
    pub(super) fn worked(&mut self) -> bool {
        self.until = None;
        std::mem::take(&mut self.failures) > 0
    }

    /// Another process may have come, whose socket works: it may be asked now.
    pub(super) fn end(&mut self) {
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_to_a_minute_and_are_news_once() {
        let mut rest = ReplayRest::default();
        let mut now = Instant::now();
        for round in 0..2 {
            assert!(rest.is_over(now));
            for (failure, seconds) in [5, 10, 20, 40, 60, 60, 60].into_iter().enumerate() {
                assert_eq!(rest.failed(now), failure == 0, "round {round}");
                now += Duration::from_secs(seconds);
                assert!(!rest.is_over(now - Duration::from_millis(1)));
                assert!(rest.is_over(now));
            }
            rest.failed(now);
            assert!(rest.worked());
            assert!(!rest.worked());
        }
    }

    #[test]
    fn somebody_new_is_asked_at_once_and_is_no_news_if_it_fails_too() {
        let mut rest = ReplayRest::default();
        let now = Instant::now();
        rest.failed(now);
        rest.end();
        assert!(rest.is_over(now));
        assert!(!rest.failed(now));
        assert!(!rest.is_over(now + Duration::from_secs(9)));
    }
}
