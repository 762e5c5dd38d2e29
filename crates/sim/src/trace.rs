//! Reads request traces: when requests came, how long they were, what they shared; no contents.
//!
//! Either one JSON object a line, as <https://github.com/kvcache-ai/Mooncake> has it (FAST'25
//! release): arrival time, lengths, and for each 512 tokens of the prompt an id that stands for
//! them and all before; a line's field `tokens_per_hash_id` says how many they are if not 512.
//! Or the tables of <https://github.com/Azure/AzurePublicDataset> (see `azure`), which do not say
//! what prompts share. The first line tells which.

use std::io::BufRead;
use std::num::NonZeroU32;
use std::time::Duration;

use serde::Deserialize;

mod azure;

/// Mooncake's.
const TOKENS_PER_HASH_ID: NonZeroU32 = NonZeroU32::new(512).expect("not zero");

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// Time since the first request.
    pub arrival: Duration,
    /// Prompt length; at least 1.
    pub prompt_tokens: u32,
    /// Answer length; at least 1.
    pub output_tokens: u32,
    /// Content of the prompt: each stands for some tokens and all before.
    pub hash_ids: Vec<u64>,
    /// How many tokens; the last id may stand for fewer.
    pub tokens_per_hash_id: NonZeroU32,
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
    /// The first line is of no format that is known.
    #[error(
        "line {line}: neither a JSON object, as in Mooncake's traces, nor a table's header with {}",
        azure::NAMES.join(", ")
    )]
    Format {
        /// Counted from 1.
        line: usize,
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
    tokens_per_hash_id: Option<NonZeroU32>,
}

/// How a line is read.
#[derive(Clone, Copy)]
enum Format {
    Json,
    Azure(azure::Columns),
}

/// Reads a whole trace. Empty lines are skipped. Lines may be in any order; requests come in that
/// of their arrivals.
///
/// # Errors
/// Says on which line, and which field, is wrong.
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
                let columns = azure::Columns::of(text).ok_or(TraceError::Format { line })?;
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
    // Who records requests as they end writes them in that order.
    requests.sort_by_key(|it| it.arrival);
    let first = requests[0].arrival;
    requests.iter_mut().for_each(|it| it.arrival -= first);
    Ok(requests)
}

/// Keeps the first `most` requests, and of them those of the first `duration`.
pub fn shorten(requests: &mut Vec<TraceRequest>, most: Option<usize>, duration: Option<Duration>) {
    requests.truncate(most.unwrap_or(usize::MAX));
    if let (Some(duration), Some(first)) = (duration, requests.first().map(|it| it.arrival)) {
        requests.retain(|it| it.arrival - first < duration);
    }
}

/// The requests of one of the stretches of that length that a trace can be cut into, counted from 0
/// and after the last from 0 again, as if it began there. What is left behind the last whole one
/// belongs to none, if there is one.
#[must_use]
pub fn stretch(requests: &[TraceRequest], length: Duration, number: u64) -> Vec<TraceRequest> {
    let last = requests.last().map_or(Duration::ZERO, |it| it.arrival);
    // Of a trace a little too short for the last one, that one is whole enough.
    let whole = (last.as_secs_f64() / length.as_secs_f64() + 0.1).max(1.0) as u64;
    let start = length.saturating_mul((number % whole) as u32);
    let inside = requests
        .iter()
        .filter(|it| it.arrival >= start && it.arrival - start < length);
    let shifted = inside.map(|it| TraceRequest {
        arrival: it.arrival - start,
        ..it.clone()
    });
    shifted.collect()
}

fn check(line: Line) -> Result<TraceRequest, (&'static str, String)> {
    let arrival = Duration::try_from_secs_f64(line.timestamp / 1000.0)
        .map_err(|error| ("timestamp", format!("{} ms: {error}", line.timestamp)))?;
    if line.input_length == 0 {
        return Err(("input_length", "a prompt has at least one token".to_owned()));
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
        // Some requests of the release generated nothing; an engine always computes one.
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
    fn errors_name_line_and_field() {
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
    fn requests_come_in_the_order_of_arrival_whatever_that_of_the_lines() {
        let line = |timestamp: u64, id: u64| {
            format!(
                r#"{{"timestamp": {timestamp}, "input_length": 1, "output_length": 1, "hash_ids": [{id}]}}"#
            )
        };
        let text = [line(1_763_000_000_900, 2), line(1_763_000_000_400, 1)].join("\n");
        let trace = read(text.as_bytes()).unwrap();
        let told = trace
            .iter()
            .map(|it| (it.hash_ids[0], it.arrival.as_millis()));
        assert_eq!(told.collect::<Vec<_>>(), [(1, 0), (2, 500)]);
    }

    #[test]
    fn a_line_may_say_how_many_tokens_an_id_stands_for() {
        let text = r#"{"timestamp": 0, "input_length": 40, "output_length": 1,
            "hash_ids": [7, 8, 9], "tokens_per_hash_id": 16, "model": "m"}"#;
        let trace = read(text.replace('\n', "").as_bytes()).unwrap();
        assert_eq!(trace[0].tokens_per_hash_id.get(), 16);
        let none = text.replace('\n', "").replace("16", "0");
        assert!(error_of(&none).contains("nonzero"), "{}", error_of(&none));
    }

    #[test]
    fn a_trace_is_shortened_by_number_and_by_time() {
        let request = |arrival| TraceRequest {
            arrival: Duration::from_secs(arrival),
            prompt_tokens: 1,
            output_tokens: 1,
            hash_ids: vec![0],
            tokens_per_hash_id: TOKENS_PER_HASH_ID,
        };
        let all: Vec<TraceRequest> = (100..110).map(request).collect();
        let left = |most, seconds: Option<u64>| {
            let mut requests = all.clone();
            shorten(&mut requests, most, seconds.map(Duration::from_secs));
            requests.len()
        };
        assert_eq!(left(None, None), 10);
        assert_eq!(left(Some(4), None), 4);
        assert_eq!(left(None, Some(3)), 3);
        assert_eq!(left(Some(2), Some(3)), 2);
    }

    #[test]
    fn what_is_no_trace_is_told_what_would_be() {
        let error = error_of("time,in,out\n1,2,3\n");
        assert!(
            error.starts_with("line 1: neither a JSON object"),
            "{error}"
        );
        assert!(error.contains("TIMESTAMP, ContextTokens, GeneratedTokens"));
    }

    #[test]
    fn a_trace_is_cut_into_stretches_that_each_begin_at_zero() {
        let minute = Duration::from_secs(60);
        let request = |seconds| TraceRequest {
            arrival: Duration::from_secs(seconds),
            prompt_tokens: seconds as u32,
            output_tokens: 1,
            hash_ids: vec![seconds],
            tokens_per_hash_id: TOKENS_PER_HASH_ID,
        };
        let cut = |requests: &[TraceRequest], number| {
            let its = stretch(requests, minute, number).into_iter();
            its.map(|it| (it.arrival.as_secs(), it.prompt_tokens))
                .collect::<Vec<_>>()
        };
        let trace = [0, 59, 60, 119, 130].map(request);
        assert_eq!(cut(&trace, 0), [(0, 0), (59, 59)]);
        assert_eq!(cut(&trace, 1), [(0, 60), (59, 119)]);
        assert_eq!(cut(&trace, 2), cut(&trace, 0), "the third is not whole");
        assert_eq!(
            cut(&trace[..4], 1),
            [(0, 60), (59, 119)],
            "this one nearly is"
        );
        assert_eq!(cut(&trace[..2], 5), [(0, 0), (59, 59)]);
        assert_eq!(cut(&[], 1), []);
    }
}
