//! Reads request traces: arrival times, lengths and shared prefixes of requests, without any text.
//!
//! Two formats are recognised by their first line:
//!
//! - One JSON object per line, as in <https://github.com/kvcache-ai/Mooncake> (FAST'25 release):
//!   the arrival time, the lengths, and for each 512 tokens of the prompt an id that stands for these
//!   tokens and all tokens before them. The field `tokens_per_hash_id` gives the number of tokens
//!   if it is not 512.
//! - The tables of <https://github.com/Azure/AzurePublicDataset> (see `azure`), which contain no
//!   information about shared prefixes.

use std::io::BufRead;
use std::num::NonZeroU32;
use std::time::Duration;

use foresee_api::trace::TraceRecord;

mod azure;

/// Tokens per id in Mooncake's traces.
const TOKENS_PER_HASH_ID: NonZeroU32 = NonZeroU32::new(512).expect("not zero");

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// Time since the first request.
    pub arrival: Duration,
    /// Length of the prompt; at least 1.
    pub prompt_tokens: u32,
    /// Length of the output; at least 1.
    pub output_tokens: u32,
    /// Content of the prompt: each id stands for `tokens_per_hash_id` tokens and all tokens before
    /// them.
    pub hash_ids: Vec<u64>,
    /// Tokens of each id; the last id may stand for fewer.
    pub tokens_per_hash_id: NonZeroU32,
}

/// The reason why a trace cannot be used, with the line. Lines are counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The reader failed.
    #[error("line {line}: cannot read: {source}")]
    Read {
        /// Number of the line.
        line: usize,
        /// The reader's error.
        source: std::io::Error,
    },
    /// The line is not JSON, or a field is missing or has the wrong type.
    #[error("line {line}: {source}")]
    Json {
        /// Number of the line.
        line: usize,
        /// The parser's error, which names the field.
        source: serde_json::Error,
    },
    /// A field has an invalid value.
    #[error("line {line}: field `{field}`: {problem}")]
    Value {
        /// Number of the line.
        line: usize,
        /// Name of the field.
        field: &'static str,
        /// The problem with the value.
        problem: String,
    },
    /// The first line has no known format.
    #[error(
        "line {line}: neither a JSON object, as in Mooncake's traces, nor a table's header with {}",
        azure::NAMES.join(", ")
    )]
    Format {
        /// Number of the line.
        line: usize,
    },
    /// The trace has no request.
    #[error("the trace is empty")]
    Empty,
}

/// Format of a trace.
#[derive(Clone, Copy)]
enum Format {
    Json,
    Azure(azure::Columns),
}

/// Reads a whole trace. Returns the requests in the order of arrival, whatever the order of the
/// lines. The first arrival is time zero. Empty lines are skipped. The first other line selects the
/// format.
///
/// # Errors
/// If a line cannot be read or is invalid, in which case the error names the line and, for an
/// invalid value, the field; if the first line has no known format; or if the trace has no request.
pub fn read(reader: impl BufRead) -> Result<Vec<TraceRequest>, TraceError> {
    let mut requests: Vec<TraceRequest> = Vec::new();
    let mut format = None;
    for (index, text) in reader.lines().enumerate() {
        let line = index + 1;
        let text = text.map_err(|source| TraceError::Read { line, source })?;
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            continue;
        }
        let value_error = |(field, problem)| TraceError::Value {
            line,
            field,
            problem,
        };
        let read = match format {
            Some(Format::Azure(columns)) => columns.read(text, requests.len()),
            None if !text.starts_with('{') => {
                let columns = azure::Columns::find(text).ok_or(TraceError::Format { line })?;
                format = Some(Format::Azure(columns));
                continue;
            }
            None | Some(Format::Json) => {
                format = Some(Format::Json);
                let fields = serde_json::from_str(text);
                check(fields.map_err(|source| TraceError::Json { line, source })?)
            }
        };
        let request = read.map_err(value_error)?;
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(TraceError::Empty);
    }
    // A recorder that writes requests as they end writes them in that order.
    requests.sort_by_key(|request| request.arrival);
    let first = requests[0].arrival;
    requests
        .iter_mut()
        .for_each(|request| request.arrival -= first);
    Ok(requests)
}

/// Keeps the first `max_requests` requests, and of these only the ones that arrive within
/// `duration` after the first, exclusive. `None` is no limit. `requests` must be in the order of
/// arrival.
pub fn truncate(
    requests: &mut Vec<TraceRequest>,
    max_requests: Option<usize>,
    duration: Option<Duration>,
) {
    requests.truncate(max_requests.unwrap_or(usize::MAX));
    if let (Some(duration), Some(first)) =
        (duration, requests.first().map(|request| request.arrival))
    {
        requests.retain(|request| request.arrival - first < duration);
    }
}

/// Returns the requests of one section of a trace, with arrivals relative to its start. The trace
/// is divided into sections of `length`; a rest that is shorter than 0.9 sections is dropped,
/// unless it is the only section. Numbers count from 0 and continue with the first section after
/// the last. `requests` must be in the order of arrival, and `length` must not be zero.
#[must_use]
pub fn section(requests: &[TraceRequest], length: Duration, number: u64) -> Vec<TraceRequest> {
    let last = requests
        .last()
        .map_or(Duration::ZERO, |request| request.arrival);
    // A tenth is added, so that a last section that is only slightly too short counts too.
    let sections = (last.as_secs_f64() / length.as_secs_f64() + 0.1).max(1.0) as u64;
    let start = length.saturating_mul((number % sections) as u32);
    let inside = requests
        .iter()
        .filter(|request| request.arrival >= start && request.arrival - start < length);
    let shifted = inside.map(|request| TraceRequest {
        arrival: request.arrival - start,
        ..request.clone()
    });
    shifted.collect()
}

/// Converts a line in Mooncake's format to a request. The arrival is the line's timestamp, which
/// [`read`] later makes relative to the first request. An output of 0 tokens becomes 1 token. An
/// error is the field and the problem with it: an invalid timestamp, an empty prompt, or a number
/// of ids that does not match the prompt's length.
fn check(line: TraceRecord) -> Result<TraceRequest, (&'static str, String)> {
    let arrival = Duration::try_from_secs_f64(line.timestamp / 1000.0)
        .map_err(|error| ("timestamp", format!("{} ms: {error}", line.timestamp)))?;
    if line.input_length == 0 {
        return Err((
            "input_length",
            "a prompt must have at least one token".to_owned(),
        ));
    }
    let tokens_per_hash_id = line.tokens_per_hash_id.unwrap_or(TOKENS_PER_HASH_ID);
    let expected = line.input_length.div_ceil(tokens_per_hash_id.get()) as usize;
    if line.hash_ids.len() != expected {
        let problem = format!(
            "{} ids for input_length {}, which takes {expected} of {tokens_per_hash_id} tokens",
            line.hash_ids.len(),
            line.input_length
        );
        return Err(("hash_ids", problem));
    }
    Ok(TraceRequest {
        arrival,
        prompt_tokens: line.input_length,
        // Some requests of the release have no output; an engine always generates a token.
        output_tokens: line.output_length.max(1),
        hash_ids: line.hash_ids,
        tokens_per_hash_id,
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
                    tokens_per_hash_id: TOKENS_PER_HASH_ID,
                },
                TraceRequest {
                    arrival: Duration::from_millis(1500),
                    prompt_tokens: 512,
                    output_tokens: 1,
                    hash_ids: vec![0],
                    tokens_per_hash_id: TOKENS_PER_HASH_ID,
                },
            ]
        );
    }

    #[test]
    fn errors_name_the_line_and_the_field() {
        let good = r#"{"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": [0]}"#;
        let missing = format!("{good}\n{{\"timestamp\": 9, \"input_length\": 1}}");
        assert!(error_of(&missing).starts_with("line 2: missing field `output_length`"));
        let ids = r#"{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [0]}"#;
        assert_eq!(
            error_of(ids),
            "line 1: field `hash_ids`: 1 ids for input_length 513, which takes 2 of 512 tokens"
        );
        let negative = good.replace('9', "-1");
        assert!(error_of(&negative).starts_with("line 1: field `timestamp`: -1 ms:"));
        assert_eq!(error_of("\n"), "the trace is empty");
    }

    #[test]
    fn requests_are_sorted_by_arrival() {
        let line = |timestamp: u64, id: u64| {
            format!(
                r#"{{"timestamp": {timestamp}, "input_length": 1, "output_length": 1, "hash_ids": [{id}]}}"#
            )
        };
        let text = [line(1_763_000_000_900, 2), line(1_763_000_000_400, 1)].join("\n");
        let trace = read(text.as_bytes()).unwrap();
        let requests = trace
            .iter()
            .map(|request| (request.hash_ids[0], request.arrival.as_millis()));
        assert_eq!(requests.collect::<Vec<_>>(), [(1, 0), (2, 500)]);
    }

    #[test]
    fn a_line_can_set_the_number_of_tokens_per_id() {
        let text = r#"{"timestamp": 0, "input_length": 40, "output_length": 1,
            "hash_ids": [7, 8, 9], "tokens_per_hash_id": 16, "model": "m"}"#;
        let trace = read(text.replace('\n', "").as_bytes()).unwrap();
        assert_eq!(trace[0].tokens_per_hash_id.get(), 16);
        let none = text.replace('\n', "").replace("16", "0");
        assert!(error_of(&none).contains("nonzero"), "{}", error_of(&none));
    }

    #[test]
    fn a_trace_is_truncated_by_number_and_by_time() {
        let request = |arrival| TraceRequest {
            arrival: Duration::from_secs(arrival),
            prompt_tokens: 1,
            output_tokens: 1,
            hash_ids: vec![0],
            tokens_per_hash_id: TOKENS_PER_HASH_ID,
        };
        let all: Vec<TraceRequest> = (100..110).map(request).collect();
        let remaining = |max_requests, seconds: Option<u64>| {
            let mut requests = all.clone();
            truncate(
                &mut requests,
                max_requests,
                seconds.map(Duration::from_secs),
            );
            requests.len()
        };
        assert_eq!(remaining(None, None), 10);
        assert_eq!(remaining(Some(4), None), 4);
        assert_eq!(remaining(None, Some(3)), 3);
        assert_eq!(remaining(Some(2), Some(3)), 2);
    }

    #[test]
    fn the_error_for_an_unknown_format_names_the_known_formats() {
        let error = error_of("time,in,out\n1,2,3\n");
        assert!(
            error.starts_with("line 1: neither a JSON object"),
            "{error}"
        );
        assert!(error.contains("TIMESTAMP, ContextTokens, GeneratedTokens"));
    }

    #[test]
    fn a_trace_is_divided_into_sections_that_start_at_zero() {
        let minute = Duration::from_secs(60);
        let request = |seconds| TraceRequest {
            arrival: Duration::from_secs(seconds),
            prompt_tokens: seconds as u32,
            output_tokens: 1,
            hash_ids: vec![seconds],
            tokens_per_hash_id: TOKENS_PER_HASH_ID,
        };
        let cut = |requests: &[TraceRequest], number| {
            let section = section(requests, minute, number).into_iter();
            section
                .map(|request| (request.arrival.as_secs(), request.prompt_tokens))
                .collect::<Vec<_>>()
        };
        let trace = [0, 59, 60, 119, 130].map(request);
        assert_eq!(cut(&trace, 0), [(0, 0), (59, 59)]);
        assert_eq!(cut(&trace, 1), [(0, 60), (59, 119)]);
        assert_eq!(
            cut(&trace, 2),
            cut(&trace, 0),
            "the rest is too short for a third section"
        );
        assert_eq!(
            cut(&trace[..4], 1),
            [(0, 60), (59, 119)],
            "a section of 0.98 of the length counts"
        );
        assert_eq!(cut(&trace[..2], 5), [(0, 0), (59, 59)]);
        assert_eq!(cut(&[], 1), []);
    }
}
