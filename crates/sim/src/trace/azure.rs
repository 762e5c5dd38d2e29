//! Reads Azure's tables of 2023 and 2024: each row has a date and two lengths, separated by commas.
//!
//! The tables contain no information about common prefixes, so the prompts get none.

use std::num::NonZeroU32;
use std::time::{Duration, UNIX_EPOCH};

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
/// another form or a field is out of range. A time zone that begins with `+` or `Z` is ignored,
/// because it is equal in all rows.
fn time(text: &str) -> Option<Duration> {
    let without_zone = text.split(['+', 'Z']).next()?;
    let time = humantime::parse_rfc3339_weak(without_zone).ok()?;
    time.duration_since(UNIX_EPOCH).ok()
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
            ("1970-01-01", 0),
            ("1972-03-01", 790),
            ("2000-02-29", 11_016),
            ("2023-11-16", 19_677),
        ] {
            let midnight = time(&format!("{date} 00:00:00"));
            assert_eq!(midnight, Some(Duration::from_secs(days * 86_400)));
        }
        assert_eq!(time("2023-02-29 00:00:00"), None);
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
