//! The `strftime_now` function of chat templates, which writes the current date into a prompt.
//!
//! Dates are in UTC, the usual time zone of engines in containers.

use minijinja::{Error, ErrorKind};
use time::OffsetDateTime;
use time::format_description::{BorrowedFormatItem, Component, parse_strftime_borrowed};

/// Formats the current time, in UTC, like Python's `strftime`.
///
/// # Errors
/// If the format contains an unsupported code.
pub(crate) fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, OffsetDateTime::now_utc())
}

/// Formats a time. A `-` after `%` removes the leading zero of a number.
///
/// # Errors
/// If the format contains an unsupported code.
fn strftime(format: &str, time: OffsetDateTime) -> Result<String, Error> {
    let unsupported = |reason: String| {
        let reason = format!("strftime_now does not support the format {format:?}: {reason}");
        Error::new(ErrorKind::InvalidOperation, reason)
    };
    let items = parse_strftime_borrowed(format);
    let mut items = items.map_err(|error| unsupported(error.to_string()))?;
    for item in &mut items {
        // Sunday is 0 in Python and C; `time` makes it 1.
        if let BorrowedFormatItem::Component(Component::WeekdaySunday(weekday)) = item {
            *weekday = weekday.with_one_indexed(false);
        }
    }
    let text = time.format(&items);
    text.map_err(|error| unsupported(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Formats a time, given in seconds since 1970.
    fn format_at(format: &str, seconds: i64) -> Result<String, Error> {
        strftime(
            format,
            OffsetDateTime::from_unix_timestamp(seconds).unwrap(),
        )
    }

    #[test]
    fn dates_are_formatted_like_in_python() {
        let format_time = |seconds| format_at("%d %b %Y|%A %-d %B %y|%F %T|%%", seconds).unwrap();
        assert_eq!(
            format_time(0),
            "01 Jan 1970|Thursday 1 January 70|1970-01-01 00:00:00|%"
        );
        assert_eq!(
            format_time(1_709_211_599),
            "29 Feb 2024|Thursday 29 February 24|2024-02-29 12:59:59|%"
        );
        assert_eq!(
            format_time(4_102_444_800),
            "01 Jan 2100|Friday 1 January 00|2100-01-01 00:00:00|%"
        );
    }

    #[test]
    fn further_codes_of_python_are_known() {
        let text = format_at("%j %w %u %-I:%M %p, %e é", 1_709_211_599);
        assert_eq!(text.unwrap(), "060 4 4 12:59 PM, 29 é");
    }

    #[test]
    fn an_unknown_code_is_an_error() {
        assert!(format_at("%Q", 0).is_err());
        assert!(format_at("%", 0).is_err());
    }
}
