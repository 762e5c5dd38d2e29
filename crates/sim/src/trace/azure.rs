//! Reads Azure's tables of 2023 and 2024: each row has a date and two lengths, separated by commas.
//!
//! The tables contain no information about common prefixes, so the prompts get none.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::trace::{TOKENS_PER_HASH_ID, TraceRequest};

const TIMESTAMP: &str = "TIMESTAMP";
const PROMPT: &str = "ContextTokens";
const OUTPUT: &str = "GeneratedTokens";
/// Names of the required columns.
pub(super) const NAMES: [&str; 3] = [TIMESTAMP, PROMPT, OUTPUT];

/// Positions of the columns.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    timestamp: usize,
    prompt: usize,
    output: usize,
}

impl Columns {
    /// Returns the positions of the columns in a header, whose other columns are ignored; `None` if
    /// a column is missing.
    pub(super) fn find(header: &str) -> Option<Self> {
        let position = |name: &str| header.split(',').position(|column| column.trim() == name);
        Some(Self {
            timestamp: position(TIMESTAMP)?,
            prompt: position(PROMPT)?,
            output: position(OUTPUT)?,
        })
    }

    /// Returns the request of the row with this index. Its arrival is the time since 1970, and its
    /// prompt has no prefix in common with other rows. Lengths of 0 tokens become 1 token. An error
    /// is the field and the problem with it.
    pub(super) fn read(
        self,
        row: &str,
        index: usize,
    ) -> Result<TraceRequest, (&'static str, String)> {
        let cell = |column: usize, name: &'static str| {
            let cell = row.split(',').nth(column).map(str::trim);
            cell.ok_or_else(|| (name, "is missing".to_owned()))
        };
        let number = |column, name| {
            let text = cell(column, name)?;
            let number = text.parse::<u32>();
            number.map_err(|error| (name, format!("{text:?}: {error}")))
        };
        let text = cell(self.timestamp, TIMESTAMP)?;
        let arrival = time(text).ok_or_else(|| {
            let problem = format!("{text:?} is not a time like 2023-11-16 18:15:46.68");
            (TIMESTAMP, problem)
        })?;
        let prompt_tokens = NonZeroU32::new(number(self.prompt, PROMPT)?);
        Ok(TraceRequest {
            arrival,
            // Some rows have no prompt tokens; an engine always computes a token.
            prompt_tokens: prompt_tokens.map_or(1, NonZeroU32::get),
            output_tokens: number(self.output, OUTPUT)?.max(1),
            hash_ids: vec![index as u64],
            tokens_per_hash_id: prompt_tokens.unwrap_or(TOKENS_PER_HASH_ID),
        })
    }
}

/// Parses `YEAR-MONTH-DAY HOUR:MINUTE:SECONDS` as the time since 1970; `None` if the text has
/// another form or a field is out of range. The length of the month is not checked. A time zone
/// that begins with `+` or `Z` is ignored, because it is equal in all rows.
fn time(text: &str) -> Option<Duration> {
    let (date, clock) = text.split_once([' ', 'T'])?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let clock = clock.split(['+', 'Z']).next()?;
    let mut clock = clock.splitn(3, ':');
    let hour: u64 = clock.next()?.parse().ok()?;
    let minute: u64 = clock.next()?.parse().ok()?;
    let second: f64 = clock.next()?.parse().ok()?;
    let is_valid = (1970..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        // 60 is a leap second.
        && (0.0..61.0).contains(&second);
    if !is_valid {
        return None;
    }
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60;
    let fraction = Duration::try_from_secs_f64(second).ok()?;
    Some(Duration::from_secs(seconds) + fraction)
}

/// Returns the number of days from 1970-01-01 to a date of the Gregorian calendar. Years are
/// counted from March, so that the leap day is the last day of a year.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let leap_days = year / 4 - year / 100 + year / 400;
    let days_in_year = (153 * month + 2) / 5 + day - 1;
    year * 365 + leap_days + days_in_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::read;

    const TABLE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
        2023-12-31 23:59:59.5000000,374,44\r\n\
        2024-01-01 00:00:01.2500000,396,0\r\n";

    #[test]
    fn rows_become_requests_that_share_nothing() {
        let trace = read(TABLE.as_bytes()).unwrap();
        assert_eq!(trace[0].arrival, Duration::ZERO);
        assert_eq!(trace[1].arrival, Duration::from_millis(1750));
        assert_eq!((trace[0].prompt_tokens, trace[0].output_tokens), (374, 44));
        assert_eq!((trace[1].prompt_tokens, trace[1].output_tokens), (396, 1));
        assert_ne!(trace[0].hash_ids, trace[1].hash_ids);
        assert_eq!(trace[0].hash_ids.len(), 1);
    }

    #[test]
    fn dates_are_converted_to_days() {
        for (date, days) in [
            ((1970, 1, 1), 0),
            ((1972, 3, 1), 790),
            ((2000, 2, 29), 11_016),
            ((2023, 11, 16), 19_677),
        ] {
            assert_eq!(days_since_1970(date.0, date.1, date.2), days);
        }
        assert_eq!(time("2024-05-10 00:00:18446744073709549568"), None);
        assert_eq!(time("2024-05-10 00:00:61"), None);
        let zoned = time("2024-05-10 00:00:00.009930+00:00").unwrap();
        assert_eq!(zoned.subsec_micros(), 9930);
    }

    #[test]
    fn errors_name_the_line_and_the_column() {
        let error = |old: &str, new: &str| {
            let text = TABLE.replace(old, new);
            read(text.as_bytes()).unwrap_err().to_string()
        };
        let date = error("2024-01-01", "2024-13-01");
        assert!(
            date.starts_with("line 3: field `TIMESTAMP`: \"2024-13"),
            "{date}"
        );
        let text = error("374", "many");
        assert_eq!(
            text,
            "line 2: field `ContextTokens`: \"many\": invalid digit found in string"
        );
        let short = error(",44", "");
        assert_eq!(short, "line 2: field `GeneratedTokens`: is missing");
    }
}
