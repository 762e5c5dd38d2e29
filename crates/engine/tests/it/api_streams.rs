//! Observation of the streams and bodies of the Responses, Messages and generate APIs, as vLLM 0.32
//! and SGLang 0.5.23 sent them.
#![allow(clippy::unwrap_used, missing_docs)]

use foresee_engine::error::ApiError;
use foresee_engine::output_text::{parse_output_and_usage, parse_output_text_for};
use foresee_engine::request::Endpoint;
use foresee_engine::stream::{StreamObserver, parse_response_id};
use foresee_engine::usage::{Usage, parse_usage};
use proptest::prelude::*;

/// A recorded stream, the body of the same request without a stream, and what both report.
struct Recording {
    endpoint: Endpoint,
    stream: &'static str,
    body: &'static str,
    /// Tokens counted before the usage report arrives.
    counted: u32,
    prompt_tokens: u32,
    completion_tokens: u32,
}

macro_rules! recording {
    ($endpoint:ident, $name:literal, $counted:expr, $prompt:expr, $completion:expr) => {
        Recording {
            endpoint: Endpoint::$endpoint,
            stream: include_str!(concat!("../apis/", $name, ".sse")),
            body: include_str!(concat!("../apis/", $name, ".json")),
            counted: $counted,
            prompt_tokens: $prompt,
            completion_tokens: $completion,
        }
    };
}

fn recordings() -> Vec<Recording> {
    vec![
        recording!(Messages, "vllm-messages-text", 12, 42, 12),
        recording!(Messages, "vllm-messages-thinking", 12, 42, 12),
        recording!(Messages, "vllm-messages-tool", 5, 171, 60),
        recording!(Responses, "vllm-responses-text", 10, 43, 12),
        recording!(Responses, "vllm-responses-reasoning", 11, 43, 12),
        recording!(Responses, "vllm-responses-tool", 7, 181, 60),
        recording!(VllmGenerate, "vllm-generate", 5, 100, 5),
        recording!(Messages, "sglang-messages-text", 10, 42, 12),
        recording!(Responses, "sglang-responses-text", 6, 42, 10),
        recording!(SglangGenerate, "sglang-generate", 5, 16, 6),
    ]
}

fn observe(endpoint: Endpoint, chunks: &[&[u8]]) -> StreamObserver {
    let mut observer = StreamObserver::for_endpoint(endpoint, true);
    for chunk in chunks {
        observer.feed(chunk);
    }
    observer
}

/// Splits a stream before its last events, of which there are `count`.
fn split_end(stream: &str, count: usize) -> (&str, &str) {
    let events: Vec<&str> = stream.split_inclusive("\n\n").collect();
    let end: usize = events
        .iter()
        .rev()
        .take(count)
        .map(|event| event.len())
        .sum();
    stream.split_at(stream.len() - end)
}

#[test]
fn recorded_streams_are_counted_and_corrected_by_their_usage() {
    for recording in recordings() {
        let name = recording.body;
        // The usage is in the last event, or in the last but one.
        let usage_events = match recording.endpoint {
            Endpoint::Responses => 1,
            _ => 2,
        };
        let (before, _) = split_end(recording.stream, usage_events);
        let observer = observe(recording.endpoint, &[before.as_bytes()]);
        assert_eq!(observer.tokens(), recording.counted, "{name}");
        let observer = observe(recording.endpoint, &[recording.stream.as_bytes()]);
        let usage = observer.usage().unwrap();
        assert_eq!(observer.tokens(), recording.completion_tokens, "{name}");
        assert_eq!(usage.completion_tokens, Some(recording.completion_tokens));
        assert_eq!(usage.prompt_tokens, Some(recording.prompt_tokens), "{name}");
        // SGLang leaves out the tokens of a Messages request if there are none.
        let reports_cached =
            recording.stream.contains("cache_read") || recording.stream.contains("cached_tokens");
        assert_eq!(usage.cached_tokens.is_some(), reports_cached, "{name}");
        assert_eq!(observer.unread_events(), 0, "{name}");
        assert!(!observer.has_error(), "{name}");
        assert!(observer.choices()[0].finished, "{name}");
    }
}

#[test]
fn a_stream_is_done_with_its_last_event_and_not_before() {
    for recording in recordings() {
        let (before, last) = split_end(recording.stream, 1);
        let mut observer = observe(recording.endpoint, &[before.as_bytes()]);
        assert!(!observer.is_done(), "{}", recording.body);
        observer.feed(last.as_bytes());
        assert!(observer.is_done(), "{}", recording.body);
    }
}

#[test]
fn bodies_report_the_usage_and_the_text_of_streams() {
    for recording in recordings() {
        let mut observer = observe(recording.endpoint, &[recording.stream.as_bytes()]);
        let usage = parse_usage(recording.body.as_bytes()).unwrap();
        assert_eq!(usage.prompt_tokens, Some(recording.prompt_tokens));
        assert_eq!(usage.completion_tokens, Some(recording.completion_tokens));
        let text = parse_output_text_for(recording.endpoint, recording.body.as_bytes()).unwrap();
        let both = parse_output_and_usage(recording.endpoint, recording.body.as_bytes());
        assert_eq!(both.0.unwrap().text(), text.text());
        assert_eq!(both.1, Some(usage));
        let streamed = observer.take_output().unwrap();
        // These tool calls were cut off, and vLLM sends them as text in a body.
        if recording.completion_tokens < 60 {
            assert_eq!(text.text(), streamed.text());
        }
    }
    let has_text = |recording: Recording| {
        let mut observer = observe(recording.endpoint, &[recording.stream.as_bytes()]);
        observer.take_output().unwrap().text().len() > 10
    };
    let known: Vec<bool> = recordings().into_iter().map(has_text).collect();
    // Reasoning and tool calls are not text, and ids are not decoded.
    let expected = [
        true, false, false, true, false, false, false, true, true, false,
    ];
    assert_eq!(known, expected);
}

#[test]
fn only_a_response_that_can_be_stored_has_an_id() {
    for recording in recordings() {
        let observer = observe(recording.endpoint, &[recording.stream.as_bytes()]);
        let has_id = recording.endpoint == Endpoint::Responses;
        let id = observer.response_id();
        assert_eq!(id.is_some_and(|id| id.starts_with("resp_")), has_id);
        if has_id {
            let id = parse_response_id(recording.body.as_bytes()).unwrap();
            assert!(id.starts_with("resp_"));
        }
    }
    let (first, _) = recordings()[3].stream.split_once("\n\n").unwrap();
    let first = format!("{first}\n\n");
    let observer = observe(Endpoint::Responses, &[first.as_bytes()]);
    assert!(
        observer.response_id().is_some(),
        "known with the first event"
    );
    let long = format!(
        "data: {{\"type\":\"response.created\",\"response\":{{\"id\":\"{}\"}}}}\n\n",
        "x".repeat(257)
    );
    let observer = observe(Endpoint::Responses, &[long.as_bytes()]);
    assert_eq!(observer.response_id(), None);
}

#[test]
fn errors_end_a_stream() {
    let error = ApiError::bad_gateway("Worker a failed.");
    for recording in recordings() {
        let (before, _) = split_end(recording.stream, 1);
        let half = &before[..before.len() - 5];
        let event = error.to_stream_event(recording.endpoint);
        let observer = observe(recording.endpoint, &[half.as_bytes(), b"\n\n", &event]);
        assert!(observer.has_error() && observer.is_done());
        assert!(!observer.is_mid_event());
    }
    let failed = "event: response.failed\ndata: {\"type\":\"response.failed\",\"response\":{\"status\":\"failed\",\"usage\":null}}\n\n";
    let observer = observe(Endpoint::Responses, &[failed.as_bytes()]);
    assert!(observer.has_error() && observer.is_done());
}

#[test]
fn a_ping_counts_nothing() {
    let ping = "event: ping\ndata: {\"type\": \"ping\"}\n\n";
    let observer = observe(Endpoint::Messages, &[ping.as_bytes()]);
    assert_eq!((observer.tokens(), observer.unread_events()), (0, 0));
    assert!(!observer.is_done());
}

/// Anthropic's own API reports the prompt at the start and the output at the end.
#[test]
fn the_usage_of_several_events_is_merged() {
    let stream = concat!(
        "event: message_start\n",
        "data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":10,\"cache_creation_input_tokens\":3,\"cache_read_input_tokens\":20,\"output_tokens\":1}}}\n\n",
        "event: content_block_delta\n",
        "data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hi\"}}\n\n",
        "event: message_delta\n",
        "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":7}}\n\n",
    );
    let observer = observe(Endpoint::Messages, &[stream.as_bytes()]);
    let usage = Usage {
        prompt_tokens: Some(33),
        completion_tokens: Some(7),
        cached_tokens: Some(20),
    };
    assert_eq!(observer.usage(), Some(usage));
    assert_eq!(observer.tokens(), 7);
}

/// An event of SGLang's `/generate`; `index` is present for several outputs.
fn sglang_event(index: Option<u32>, completion_tokens: u32, finish_reason: &str) -> String {
    let index = index.map_or(String::new(), |index| format!("\"index\":{index},"));
    format!(
        "data: {{{index}\"text\":\" a b\",\"output_ids\":[1,2],\"meta_info\":{{\"id\":\"x\",\"finish_reason\":{finish_reason},\"prompt_tokens\":9,\"cached_tokens\":4,\"completion_tokens\":{completion_tokens}}}}}\n\n"
    )
}

#[test]
fn sglangs_generate_counts_the_reported_tokens() {
    let stop = "{\"type\":\"stop\",\"matched\":2}";
    let stream = [
        sglang_event(None, 1, "null"),
        sglang_event(None, 4, "null"),
        sglang_event(None, 6, stop),
    ]
    .concat();
    let mut observer = observe(Endpoint::SglangGenerate, &[stream.as_bytes()]);
    assert_eq!(observer.tokens(), 6);
    assert!(observer.choices()[0].finished && !observer.is_done());
    let usage = Usage {
        prompt_tokens: Some(9),
        completion_tokens: Some(6),
        cached_tokens: Some(4),
    };
    assert_eq!(observer.usage(), Some(usage));
    assert_eq!(observer.take_output().unwrap().text(), "");
    observer.feed(b"data: [DONE]\n\n");
    assert!(observer.is_done());
    let event = sglang_event(None, 6, stop);
    let body = event.strip_prefix("data: ").unwrap();
    assert_eq!(parse_usage(body.as_bytes()), Some(usage));
}

#[test]
fn sglangs_generate_adds_the_tokens_of_several_outputs() {
    let stream = [
        sglang_event(Some(0), 3, "null"),
        sglang_event(Some(1), 2, "null"),
        sglang_event(Some(0), 5, "{\"type\":\"length\",\"length\":5}"),
    ]
    .concat();
    let observer = observe(Endpoint::SglangGenerate, &[stream.as_bytes()]);
    assert_eq!(observer.tokens(), 7);
    let tokens = observer.choices().iter().map(|choice| choice.tokens);
    assert_eq!(tokens.collect::<Vec<_>>(), [5, 2]);
    assert_eq!(observer.usage().unwrap().prompt_tokens, None);
    let bodies = stream.replace("data: ", "").trim().replace("\n\n", ",");
    let usage = parse_usage(format!("[{bodies}]").as_bytes()).unwrap();
    assert_eq!(usage.completion_tokens, Some(10));
    let error = "data: {\"error\":{\"message\":\"too long\",\"code\":400}}\n\n";
    let observer = observe(Endpoint::SglangGenerate, &[error.as_bytes()]);
    assert!(observer.has_error());
    assert_eq!(observer.tokens(), 0);
}

#[test]
fn the_sum_of_several_outputs_has_an_upper_limit() {
    let body = format!(
        r#"[{{"meta_info":{{"completion_tokens":5}}}},{{"meta_info":{{"completion_tokens":{}}}}}]"#,
        u32::MAX
    );
    let usage = parse_usage(body.as_bytes()).unwrap();
    assert_eq!(usage.completion_tokens, Some(u32::MAX));
}

proptest! {
    #[test]
    fn recorded_streams_can_be_split_anywhere(size in 1_usize..900) {
        for recording in recordings() {
            let whole = observe(recording.endpoint, &[recording.stream.as_bytes()]);
            let chunks: Vec<&[u8]> = recording.stream.as_bytes().chunks(size).collect();
            let split = observe(recording.endpoint, &chunks);
            prop_assert_eq!(split.tokens(), whole.tokens());
            prop_assert_eq!(split.usage(), whole.usage());
            prop_assert_eq!(split.response_id(), whole.response_id());
            prop_assert_eq!(split.is_done(), whole.is_done());
        }
    }

    #[test]
    fn no_event_causes_a_panic(
        data in "[{}\\[\\]:,\"a-z_.0-9]{0,80}",
        kind in "(message_start|message_delta|content_block_delta|response.created|response.completed|error)",
    ) {
        for endpoint in [Endpoint::Responses, Endpoint::Messages, Endpoint::SglangGenerate] {
            observe(endpoint, &[b"data: ", data.as_bytes(), b"\n\n"]);
            let typed = format!("data: {{\"type\":\"{kind}\",\"x\":\"{}\"}}\n\n", data.replace('"', ""));
            observe(endpoint, &[typed.as_bytes()]);
            let _ = parse_output_text_for(endpoint, data.as_bytes());
        }
        let _ = (parse_usage(data.as_bytes()), parse_response_id(data.as_bytes()));
    }
}
