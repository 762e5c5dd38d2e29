//! Reads request traces in Mooncake's format: one JSON object a line, without contents.
//!
//! The format of <https://github.com/kvcache-ai/Mooncake> (FAST'25 release): arrival time,
//! lengths, and for each 512 tokens of the prompt an id that stands for them and all before.

use std::io::BufRead;
use std::time::Duration;

use serde::Deserialize;

/// Tokens that one hash id stands for; the last id of a prompt may stand for fewer.
pub const TOKENS_PER_HASH_ID: u32 = 512;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// Time since the trace began.
    pub arrival: Duration,
    /// Prompt length; at least 1.
    pub prompt_tokens: u32,
    /// Answer length; at least 1.
    pub output_tokens: u32,
    /// Content of the prompt, [`TOKENS_PER_HASH_ID`] tokens each.
    pub hash_ids: Vec<u64>,
}

/// Why a trace cannot be used, and where.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file or stream failed.
    #[error("line {line}: cannot read: {source}")]
    Read {
        /// Counted from 1.
        line: usize,
        /// What the reader said.
        source: std::io::Error,
    },
    /// Not JSON, or a field is missing or of the wrong type.
    #[error("line {line}: {source}")]
    Json {
        /// Counted from 1.
        line: usize,
        /// Names the field.
        source: serde_json::Error,
    },
    /// A field's value makes no sense.
    #[error("line {line}: field `{field}`: {problem}")]
    Value {
        /// Counted from 1.
        line: usize,
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// There was no request in it.
    #[error("the trace is empty")]
    Empty,
}

#[derive(Deserialize)]
struct Line {
    /// Milliseconds; some releases write fractions.
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// Reads a whole trace. Empty lines are skipped; arrivals must not go back in time.
///
/// # Errors
/// Says on which line, and which field, is wrong.
pub fn read(reader: impl BufRead) -> Result<Vec<TraceRequest>, TraceError> {
    let mut requests: Vec<TraceRequest> = Vec::new();
    for (index, text) in reader.lines().enumerate() {
        let line = index + 1;
        let text = text.map_err(|source| TraceError::Read { line, source })?;
        if text.trim().is_empty() {
            continue;
        }
        let fields = serde_json::from_str(&text);
        let fields = fields.map_err(|source| TraceError::Json { line, source })?;
        let request = check(fields).map_err(|(field, problem)| TraceError::Value {
            line,
            field,
            problem,
        })?;
        if let Some(previous) = requests.last().filter(|it| it.arrival > request.arrival) {
            return Err(TraceError::Value {
                line,
                field: "timestamp",
                problem: format!(
                    "{} ms is before the previous request's {} ms",
                    request.arrival.as_millis(),
                    previous.arrival.as_millis()
                ),
            });
        }
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(TraceError::Empty);
    }
    Ok(requests)
}

fn check(line: Line) -> Result<TraceRequest, (&'static str, String)> {
    let arrival = Duration::try_from_secs_f64(line.timestamp / 1000.0)
        .map_err(|error| ("timestamp", format!("{} ms: {error}", line.timestamp)))?;
    if line.input_length == 0 {
        return Err(("input_length", "a prompt has at least one token".to_owned()));
    }
    let expected = line.input_length.div_ceil(TOKENS_PER_HASH_ID) as usize;
    if line.hash_ids.len() != expected {
        let problem = format!(
            "{} ids for input_length {}, which takes {expected} of {TOKENS_PER_HASH_ID} tokens",
            line.hash_ids.len(),
            line.input_length
        );
        return Err(("hash_ids", problem));
    }
    Ok(TraceRequest {
        arrival,
        prompt_tokens: line.input_length,
        // Some requests of the release generated nothing; an engine always computes one.
        output_tokens: line.output_length.max(1),
        hash_ids: line.hash_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        read(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn reads_requests() {
        let text = r#"{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}

{"timestamp": 1500, "input_length": 512, "output_length": 0, "hash_ids": [0]}"#;
        let requests = read(text.as_bytes()).unwrap();
        assert_eq!(
            requests,
            [
                TraceRequest {
                    arrival: Duration::ZERO,
                    prompt_tokens: 600,
                    output_tokens: 5,
                    hash_ids: vec![0, 1],
                },
                TraceRequest {
                    arrival: Duration::from_millis(1500),
                    prompt_tokens: 512,
                    output_tokens: 1,
                    hash_ids: vec![0],
                },
            ]
        );
    }

    #[test]
    fn errors_name_line_and_field() {
        let good = r#"{"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": [0]}"#;
        let missing = format!("{good}\n{{\"timestamp\": 9, \"input_length\": 1}}");
        assert!(error_of(&missing).starts_with("line 2: missing field `output_length`"));
        let ids = r#"{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [0]}"#;
        assert_eq!(
            error_of(ids),
            "line 1: field `hash_ids`: 1 ids for input_length 513, which takes 2 of 512 tokens"
        );
        let back = format!("{good}\n{}", good.replace('9', "8"));
        assert_eq!(
            error_of(&back),
            "line 2: field `timestamp`: 8 ms is before the previous request's 9 ms"
        );
        let negative = good.replace('9', "-1");
        assert!(error_of(&negative).starts_with("line 1: field `timestamp`: -1 ms:"));
        assert_eq!(error_of("\n"), "the trace is empty");
    }
}
