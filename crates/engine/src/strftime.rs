//! The `strftime_now` function of chat templates, which writes the current date into a prompt.
//!
//! Dates are in UTC, the usual time zone of engines in containers.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats the current time, in UTC, like Python's `strftime`. A clock before 1970 counts as the
/// start of 1970.
///
/// # Errors
/// If the format contains an unsupported code.
pub(crate) fn strftime_now(format: &str) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime(format, now.map_or(0, |now| now.as_secs()))
}

/// Formats a time, given in seconds since 1970, in UTC. A `-` after `%` removes the leading zero of
/// a number.
///
/// # Errors
/// If the format contains an unsupported code.
fn strftime(format: &str, unix_seconds: u64) -> Result<String, Error> {
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (
        unix_seconds / 3600 % 24,
        unix_seconds / 60 % 60,
        unix_seconds % 60,
    );
    let (year, month, day) = civil(days);
    let name = |names: &[&'static str], index: u64| {
        usize::try_from(index)
            .ok()
            .and_then(|index| names.get(index).copied())
            .unwrap_or_default()
    };
    // 1970-01-01 was a Thursday.
    let day_name = name(&DAYS, (days + 3) % 7);
    let month_name = name(&MONTHS, month - 1);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let code = characters.next();
        // `%-d` is `%d` without the leading zero.
        let (code, is_unpadded) = match code {
            Some('-') => (characters.next(), true),
            code => (code, false),
        };
        let number = |number: u64| match is_unpadded {
            true => number.to_string(),
            false => format!("{number:02}"),
        };
        text.push_str(&match code {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(day),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name.chars().take(3).collect(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name.chars().take(3).collect(),
            Some('H') => number(hour),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            code => {
                let code = code.map(String::from).unwrap_or_default();
                let reason = format!("strftime_now does not support %{code}");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        });
    }
    Ok(text)
}

/// Returns year, month (from 1) and day (from 1) of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years start in March here, so that the leap day is the last day of a year; an era is 400
    // years.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year_of_era + next_year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_formatted_like_in_python() {
        let format_time = |seconds| strftime("%d %b %Y|%A %-d %B %y|%F %T|%%", seconds).unwrap();
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
    fn an_unknown_code_is_an_error() {
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("%", 0).is_err());
    }
}
