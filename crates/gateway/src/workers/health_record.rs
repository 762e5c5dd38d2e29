//! Results of a worker's health checks, for the admin API.

use std::time::{Duration, Instant};

use foresee_api::admin::Health;
use parking_lot::Mutex;

/// Maximum length of an error that is kept, in characters.
const MAX_ERROR_CHARS: usize = 256;

/// Results of a worker's health checks.
#[derive(Debug, Default)]
pub(crate) struct HealthRecord(Mutex<Results>);

/// Results and times of the last checks.
#[derive(Clone, Debug, Default)]
struct Results {
    /// When the last check ended.
    checked_at: Option<Instant>,
    /// When the next check is due.
    next_check_at: Option<Instant>,
    consecutive_failures: u32,
    /// Status code of the last check's response.
    status: Option<u16>,
    /// Error of the last check that failed.
    last_error: Option<String>,
}

impl HealthRecord {
    /// Records a successful check and the status code of its response, if it had one.
    pub(crate) fn on_success(&self, now: Instant, status: Option<u16>) {
        let mut results = self.0.lock();
        results.checked_at = Some(now);
        results.consecutive_failures = 0;
        results.status = status;
    }

    /// Records a failed check, the number of failures in a row, and the status code of its response,
    /// if it had one. A long `error` is cut.
    pub(crate) fn on_failure(
        &self,
        now: Instant,
        consecutive_failures: u32,
        status: Option<u16>,
        error: &str,
    ) {
        let mut results = self.0.lock();
        results.checked_at = Some(now);
        results.consecutive_failures = consecutive_failures;
        results.status = status;
        results.last_error = Some(error.chars().take(MAX_ERROR_CHARS).collect());
    }

    /// Records when the next check is due.
    pub(crate) fn set_next_check(&self, at: Instant) {
        self.0.lock().next_check_at = Some(at);
    }

    /// Returns the time until the next check is due; zero if it is running or overdue.
    pub(crate) fn next_check_in(&self, now: Instant) -> Duration {
        let next = self.0.lock().next_check_at;
        next.map_or(Duration::ZERO, |next| next.saturating_duration_since(now))
    }

    /// Returns the results, with the age of the last check at `now` and the time until the next.
    pub(crate) fn status(&self, now: Instant, next_check_in: Duration) -> Health {
        let results = self.0.lock().clone();
        let age = results
            .checked_at
            .map(|at| now.saturating_duration_since(at));
        Health {
            last_check_seconds_ago: age.map(|age| age.as_secs_f64()),
            next_check_in_seconds: next_check_in.as_secs_f64(),
            consecutive_failures: results.consecutive_failures,
            status: results.status,
            last_error: results.last_error,
        }
    }
}
