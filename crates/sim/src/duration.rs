//! Durations as text: `60ms`, `2s`, `10m`, `1h`.

use std::time::Duration;

/// A text that is not a duration with a unit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDuration {
    /// A number without a unit.
    #[error("`{0}` has no unit: write {0}ms, {0}s or {0}m")]
    NoUnit(String),
    /// A text that `humantime` cannot read.
    #[error("`{text}` is not a duration such as 60ms, 2s or 10m: {problem}")]
    Malformed {
        /// The text.
        text: String,
        /// The reason.
        problem: String,
    },
    /// A duration of more than a hundred years.
    #[error("`{0}` is longer than 100 years")]
    TooLong(String),
}

/// Reads a duration such as `250ms`, `1.5s` or `1h 30m`; a number needs its unit.
///
/// # Errors
/// If the unit is missing or unknown, the number is negative, or the duration exceeds 100 years.
pub fn parse(text: &str) -> Result<Duration, InvalidDuration> {
    let text = text.trim();
    if text.parse::<f64>().is_ok() {
        return Err(InvalidDuration::NoUnit(text.to_owned()));
    }
    let duration =
        humantime::parse_duration(text).map_err(|problem| InvalidDuration::Malformed {
            text: text.to_owned(),
            problem: problem.to_string(),
        })?;
    if duration > MAX_DURATION {
        return Err(InvalidDuration::TooLong(text.to_owned()));
    }
    Ok(duration)
}

/// The bound keeps the sum of a duration and a time of day within the range of a clock.
const MAX_DURATION: Duration = Duration::from_secs(100 * 365 * 86_400);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        for (text, milliseconds) in [
            ("60ms", 60),
            ("2s", 2000),
            ("1.5m", 90_000),
            ("1h", 3_600_000),
            ("1m 30s", 90_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)));
        }
        for text in ["2", "0", "0.5", "-1", "1e3"] {
            assert_eq!(parse(text), Err(InvalidDuration::NoUnit(text.to_owned())));
        }
        for text in ["", "s", "-1s", "2q", "nans", "1e300h", "9999999h"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
