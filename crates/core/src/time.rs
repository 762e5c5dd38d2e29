//! Conversion of forecast times.

use std::time::Duration;

/// Converts a forecast in seconds. Returns `Duration::MAX` if it is too long for a duration, and
/// also if it is negative or not a number.
pub(crate) fn duration_from_secs_saturating(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
