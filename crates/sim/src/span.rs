//! Lengths of time as people write them: `60ms`, `2s`, `10m`, `1h`.

use std::time::Duration;

/// Not a length of time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a length of time: write a number and ms, s, m or h, as in 60ms")]
pub struct InvalidSpan {
    /// What was written.
    pub text: String,
}

/// Reads a number followed by its unit.
///
/// # Errors
/// When there is no unit, it is unknown, or the number is negative or out of range.
pub fn parse(text: &str) -> Result<Duration, InvalidSpan> {
    let invalid = || InvalidSpan {
        text: text.to_owned(),
    };
    let digits = text.trim_end_matches(|it: char| it.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(invalid()),
    };
    let number: f64 = digits.parse().map_err(|_| invalid())?;
    let span = Duration::try_from_secs_f64(number * unit).map_err(|_| invalid())?;
    // Further off, sums with other times would not fit in a clock.
    let fits = span <= LONGEST;
    fits.then_some(span).ok_or_else(invalid)
}

/// A hundred years.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_needed() {
        for (text, milliseconds) in [
            ("60ms", 60),
            ("2s", 2000),
            ("1.5m", 90_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)));
        }
        for text in [
            "", "2", "s", "-1s", "2 s", "2d", "nans", "1e300h", "9999999h",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
