//! Traces, in all formats.

use std::time::Duration;

use foresee_sim::trace::{self, TraceRequest};
use serde_json::json;

/// Checks a trace. Panics if its requests are not in the order of arrival, have invalid lengths or
/// more ids than the trace has bytes, or if they differ after they were written and read again.
pub fn check(bytes: &[u8]) {
    let requests = match trace::read(bytes) {
        Ok(requests) => requests,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert_eq!(requests[0].arrival, Duration::ZERO);
    assert!(requests.is_sorted_by_key(|request| request.arrival));
    let id_counts = requests.iter().map(|request| request.hash_ids.len());
    assert!(id_counts.sum::<usize>() <= bytes.len());
    for request in &requests {
        let tokens_per_id = request.tokens_per_hash_id.get();
        assert!(request.prompt_tokens >= 1 && request.output_tokens >= 1);
        let id_count = request.prompt_tokens.div_ceil(tokens_per_id);
        assert_eq!(id_count as usize, request.hash_ids.len());
    }
    let lines: Vec<String> = requests.iter().map(to_line).collect();
    let Ok(again) = trace::read(lines.join("\n").as_bytes()) else {
        panic!("a trace that was written cannot be read");
    };
    assert_eq!(again.len(), requests.len());
    for (again, request) in again.iter().zip(&requests) {
        // A float of milliseconds has a relative error.
        let tolerance = Duration::from_nanos(1) + request.arrival.mul_f64(1e-15);
        assert!(again.arrival.abs_diff(request.arrival) <= tolerance);
        let same_arrival = TraceRequest {
            arrival: request.arrival,
            ..again.clone()
        };
        assert_eq!(&same_arrival, request);
    }
}

/// Returns a request as a line of Mooncake's format, as a recording has it.
fn to_line(request: &TraceRequest) -> String {
    let line = json!({
        "timestamp": request.arrival.as_secs_f64() * 1e3,
        "input_length": request.prompt_tokens,
        "output_length": request.output_tokens,
        "hash_ids": request.hash_ids,
        "tokens_per_hash_id": request.tokens_per_hash_id,
    });
    line.to_string()
}
