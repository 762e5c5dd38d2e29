//! Observation of response streams as engines send them.

use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_engine::error::ApiError;
use foresee_engine::stream::{
    ChoiceProgress, MAX_EVENT_BYTES, Observed, StreamObserver, error_event,
};
use foresee_engine::usage::{Usage, parse_usage};
use proptest::prelude::*;

const VLLM_CHAT: &str = concat!(
    r#"data: {"id":"chatcmpl-9","object":"chat.completion.chunk","created":1760000000,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-9","object":"chat.completion.chunk","created":1760000000,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"content":"Grüße \"你好\""},"logprobs":null,"finish_reason":null,"token_ids":null}]}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-9","object":"chat.completion.chunk","created":1760000000,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"reasoning_content":"\n"},"logprobs":null,"finish_reason":null,"token_ids":null}]}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-9","object":"chat.completion.chunk","created":1760000000,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}]}"#,
    "\n\n",
    r#"data: {"id":"chatcmpl-9","object":"chat.completion.chunk","created":1760000000,"model":"Qwen/Qwen3-8B","choices":[],"usage":{"prompt_tokens":33,"total_tokens":38,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":16}}}"#,
    "\n\ndata: [DONE]\n\n",
);

const SGLANG_CHAT: &str = concat!(
    r#"data: {"id":"f00","object":"chat.completion.chunk","created":1760000000,"model":"default","choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}"#,
    "\n\n",
    r#"data: {"id":"f00","object":"chat.completion.chunk","created":1760000000,"model":"default","choices":[{"index":0,"delta":{"role":null,"content":"Hi","reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}"#,
    "\n\n",
    r#"data: {"id":"f00","object":"chat.completion.chunk","created":1760000000,"model":"default","choices":[{"index":0,"delta":{"role":null,"content":null,"tool_calls":[{"id":"c","index":0,"type":"function","function":{"name":"f","arguments":""}}]},"finish_reason":null}],"usage":null}"#,
    "\n\n",
    r#"data: {"id":"f00","object":"chat.completion.chunk","created":1760000000,"model":"default","choices":[{"index":0,"delta":{"role":null,"content":null,"reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":"stop","matched_stop":151645}],"usage":null}"#,
    "\n\n",
    "data: [DONE]\n\n",
);

const VLLM_COMPLETION: &str = concat!(
    ": keep-alive\n\n",
    r#"data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":[264,265,266]},{"index":1,"text":"b","finish_reason":null}],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}"#,
    "\r\n\r\n",
    "event: message\r",
    r#"data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"c","finish_reason":"length"}],"usage":{"prompt_tokens":7,"total_tokens":16,"completion_tokens":9}}"#,
    "\r\r",
    "data: {\"choices\": [{\"index\": 0,\n",
    "data: \"text\": \"d\"}]}\n\n",
);

fn observe(chunks: &[&[u8]]) -> (StreamObserver, u32, Observed) {
    let mut observer = StreamObserver::new();
    let mut sum = 0;
    let mut last = Observed::default();
    for chunk in chunks {
        last = observer.feed(chunk);
        sum += last.new_tokens;
    }
    (observer, sum, last)
}

fn observe_text(text: &str) -> (StreamObserver, u32, Observed) {
    observe(&[text.as_bytes()])
}

#[test]
fn a_vllm_chat_is_counted_and_corrected_by_its_usage() {
    let (observer, sum, last) = observe_text(VLLM_CHAT);
    // Two events have text; the usage reports five tokens.
    assert_eq!((observer.tokens(), sum), (5, 5));
    assert!(last.done && !last.error && !observer.is_mid_event());
    let usage = Usage {
        prompt_tokens: Some(33),
        completion_tokens: Some(5),
        cached_tokens: Some(16),
    };
    assert_eq!(observer.usage(), Some(usage));
    assert_eq!(observer.unread_events(), 0);
}

#[test]
fn an_event_with_only_a_role_counts_no_token() {
    let first_event = VLLM_CHAT.split_inclusive("\n\n").next().unwrap();
    assert_eq!(observe_text(first_event).0.tokens(), 0);
}

#[test]
fn the_tokens_of_an_sglang_chat_are_counted() {
    let (observer, sum, last) = observe_text(SGLANG_CHAT);
    assert_eq!((observer.tokens(), sum), (2, 2));
    assert!(last.done);
    assert_eq!(observer.usage(), None);
}

#[test]
fn completions_are_counted_by_ids_choices_and_continuous_usage() {
    let events: Vec<&str> = VLLM_COMPLETION.split_inclusive("\r\n\r\n").collect();
    // Three ids in one choice, a text in the other. The usage covers one choice.
    assert_eq!(observe_text(events[0]).0.tokens(), 4);
    // The usage can report more tokens than the events contained. One more event follows.
    let (observer, sum, last) = observe_text(VLLM_COMPLETION);
    assert_eq!((observer.tokens(), sum), (11, 11));
    assert!(!last.done);
    let choice = |tokens, finished| ChoiceProgress { tokens, finished };
    assert_eq!(observer.choices(), [choice(10, true), choice(1, false)]);
}

#[test]
fn choices_beyond_the_limit_are_summed_in_the_last() {
    let mut observer = StreamObserver::new();
    for index in [
        0,
        3,
        MAX_BATCH_PROMPTS - 1,
        MAX_BATCH_PROMPTS,
        4_000_000_000,
    ] {
        let event = format!("data: {{\"choices\":[{{\"index\":{index},\"text\":\"x\"}}]}}\n\n");
        observer.feed(event.as_bytes());
    }
    assert_eq!(observer.tokens(), 5);
    let tokens: Vec<u32> = observer
        .choices()
        .iter()
        .map(|choice| choice.tokens)
        .collect();
    assert_eq!(tokens.len(), MAX_BATCH_PROMPTS);
    assert_eq!(tokens[..5], [1, 0, 0, 1, 0]);
    assert_eq!(tokens[MAX_BATCH_PROMPTS - 1], 3);
}

#[test]
fn the_last_usage_counts_even_if_it_is_lower() {
    let event = |json| format!("data: {json}\n\n");
    let text = event(r#"{"choices":[{"text":"x"}]}"#).repeat(3)
        + &event(r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#);
    assert_eq!(observe_text(&text).0.tokens(), 2);
}

#[test]
fn errors_of_all_engines_are_recognised() {
    for text in [
        "data: {\"error\": {\"message\": \"boom\", \"type\": \"InternalServerError\", \"code\": 500}}\n\n",
        "data: {\"object\":\"error\",\"message\":\"boom\",\"code\":400}\n\n",
        "event: error\ndata: out of memory\n\n",
        "event:error\r\ndata:{}\r\n\r\n",
    ] {
        let (observer, sum, last) = observe_text(text);
        assert!(last.error, "{text}");
        assert_eq!((sum, observer.unread_events()), (0, 0), "{text}");
    }
    let no_error = "data: {\"error\": null, \"choices\": [{\"text\": \"error\"}]}\n\n";
    assert!(!observe_text(no_error).2.error);
}

#[test]
fn an_event_ends_with_its_blank_line() {
    for (text, is_mid_event) in [
        ("", false),
        ("data: x", true),
        ("data: x\n", true),
        ("data: x\r\n", true),
        ("data: x\n\n", false),
        ("data: x\r\n\r", false),
        ("data: x\r\n\r\n", false),
        ("data: x\n\nd", true),
        (": comment\n\n", false),
    ] {
        assert_eq!(
            observe_text(text).0.is_mid_event(),
            is_mid_event,
            "{text:?}"
        );
    }
}

#[test]
fn an_unknown_event_counts_as_one_token() {
    let (observer, sum, _) = observe_text("data: <html>\n\ndata: {\"choices\": 3}\n\ndata: {}\n\n");
    assert_eq!((sum, observer.unread_events()), (2, 2));
    // A body without `data` lines has no tokens.
    let (observer, sum, _) = observe_text("{\"detail\":\"Not Found\"}\n\nid: 7\nretry: 10\n\n");
    assert_eq!((sum, observer.unread_events()), (0, 0));
}

#[test]
fn an_event_above_the_size_limit_is_skipped_and_the_next_one_read() {
    let text = "x".repeat(MAX_EVENT_BYTES);
    let long_line = format!("data: {{\"choices\":[{{\"text\":\"{text}\"}}]}}\n\n");
    let half = &text[..MAX_EVENT_BYTES / 2 + 1];
    let many_lines = format!("data: {half}\ndata: {half}\n\n");
    let next = "data: {\"choices\":[{\"text\":\"y\"},{\"text\":\"z\"}]}\n\n";
    for long in [long_line, many_lines] {
        let stream = long + next;
        for size in [stream.len(), 100_000, 4_099] {
            let chunks: Vec<&[u8]> = stream.as_bytes().chunks(size).collect();
            let (observer, sum, _) = observe(&chunks);
            assert_eq!((sum, observer.unread_events()), (3, 1), "chunks of {size}");
        }
    }
}

#[test]
fn a_broken_stream_can_be_ended_with_an_error_event() {
    let tail = error_event(&ApiError::bad_gateway("the worker\nwent away"));
    let (observer, sum, last) = observe(&[b"data: {\"choi", b"\n\n", &tail]);
    assert!(last.error && last.done && !observer.is_mid_event());
    assert_eq!(sum, 1, "the incomplete event");
}

#[test]
fn usage_is_read_from_complete_bodies() {
    let vllm = br#"{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":"x"}],"service_tier":null,"usage":{"prompt_tokens":4000,"total_tokens":4016,"completion_tokens":16,"prompt_tokens_details":{"cached_tokens":3984}},"kv_transfer_params":null}"#;
    let usage = Usage {
        prompt_tokens: Some(4000),
        completion_tokens: Some(16),
        cached_tokens: Some(3984),
    };
    assert_eq!(parse_usage(vllm), Some(usage));
    let embedding = br#"{"usage":{"prompt_tokens":8,"total_tokens":8,"completion_tokens":null,"prompt_tokens_details":null}}"#;
    let usage = Usage {
        prompt_tokens: Some(8),
        ..Usage::default()
    };
    assert_eq!(parse_usage(embedding), Some(usage));
    for nothing in [
        &b"{}"[..],
        b"",
        b"[]",
        b"{\"usage\":null}",
        b"{\"usage\":5}",
    ] {
        assert_eq!(parse_usage(nothing), None);
    }
}

/// Returns streams of valid and invalid lines with all line endings.
fn streams() -> impl Strategy<Value = Vec<u8>> {
    let line_end = || prop_oneof![Just("\n"), Just("\r\n"), Just("\r")];
    let line = prop_oneof![
        Just(r#"data: {"choices":[{"delta":{"content":"é你"}}]}"#.to_owned()),
        Just(r#"data:{"choices":[],"usage":{"completion_tokens":7}}"#.to_owned()),
        Just("data: [DONE]".to_owned()),
        Just("event: error".to_owned()),
        Just(String::new()),
        "[a-z:{} \"]{0,12}",
        "data: [\\[\\]{}\":a-z]{0,12}",
    ];
    prop::collection::vec((line, line_end()), 0..24).prop_map(|lines| {
        let lines = lines.into_iter().map(|(line, end)| line + end);
        lines.collect::<String>().into_bytes()
    })
}

type Outcome = (u32, u32, Option<Usage>, bool, bool, bool);

fn outcome(chunks: &[&[u8]]) -> Outcome {
    let (observer, _, last) = observe(chunks);
    (
        observer.tokens(),
        observer.unread_events(),
        observer.usage(),
        observer.is_mid_event(),
        last.done,
        last.error,
    )
}

/// Splits bytes at positions, which are taken modulo the length.
fn split(bytes: &[u8], mut positions: Vec<usize>) -> Vec<&[u8]> {
    positions
        .iter_mut()
        .for_each(|position| *position %= bytes.len() + 1);
    positions.sort_unstable();
    let mut chunks = Vec::new();
    let mut start = 0;
    for position in positions {
        chunks.push(&bytes[start..position]);
        start = position;
    }
    chunks.push(&bytes[start..]);
    chunks
}

proptest! {
    #[test]
    fn the_result_does_not_depend_on_how_a_stream_is_split(
        stream in streams(),
        positions in prop::collection::vec(any::<usize>(), 0..12),
    ) {
        let single: Vec<&[u8]> = stream.chunks(1).collect();
        let expected = outcome(&[&stream]);
        prop_assert_eq!(outcome(&split(&stream, positions)), expected);
        if !single.is_empty() {
            prop_assert_eq!(outcome(&single), expected);
        }
    }

    #[test]
    fn real_streams_can_be_split_anywhere(positions in prop::collection::vec(any::<usize>(), 0..12)) {
        for stream in [VLLM_CHAT, SGLANG_CHAT, VLLM_COMPLETION] {
            let chunks = split(stream.as_bytes(), positions.clone());
            prop_assert_eq!(outcome(&chunks), outcome(&[stream.as_bytes()]));
        }
    }

    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        outcome(&[&bytes]);
        let _ = parse_usage(&bytes);
    }
}
