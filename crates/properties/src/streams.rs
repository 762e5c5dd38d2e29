//! Streamed responses, of all APIs.

use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use foresee_engine::stream::{ChoiceProgress, MAX_ID_BYTES, StreamObserver};
use foresee_engine::usage::Usage;

use crate::slow_events::{read_events, write_events};

/// One API for each form of events.
const ENDPOINTS: [Endpoint; 4] = [
    Endpoint::ChatCompletions,
    Endpoint::Responses,
    Endpoint::Messages,
    Endpoint::SglangGenerate,
];

/// Everything that an observer reports of a stream.
#[derive(Debug, PartialEq)]
struct Observation {
    tokens: u32,
    choices: Vec<ChoiceProgress>,
    usage: Option<Usage>,
    is_done: bool,
    has_error: bool,
    unread_events: u32,
    response_id: Option<String>,
    text: String,
}

/// Checks the observation of a stream by all APIs. Panics if it depends on the chunks in which the
/// stream arrives, if it differs from that of the same events as a slow reader of the format finds
/// them, if it is larger than the stream allows, or if an error event does not end the stream.
pub fn check(stream: &[u8]) {
    let events = read_events(stream);
    let rewritten = write_events(&events);
    for endpoint in ENDPOINTS {
        let whole = observe(endpoint, [stream]);
        let text_bytes = whole.text.len();
        assert!(text_bytes <= stream.len());
        assert!(whole.choices.len() <= MAX_BATCH_PROMPTS);
        assert!(whole.unread_events as usize <= events.len());
        let id = whole.response_id.as_ref();
        assert!(id.is_none_or(|id| id.len() <= MAX_ID_BYTES));
        assert_eq!(observe(endpoint, stream.chunks(1)), whole, "{endpoint:?}");
        assert_eq!(observe(endpoint, uneven_chunks(stream)), whole);
        assert_eq!(observe(endpoint, [rewritten.as_slice()]), whole);
        check_broken_off(endpoint, stream);
    }
}

/// Returns the observation of a stream that arrives in these chunks. Panics if a token count falls
/// or an error or the end is forgotten between two chunks, or if the counts of the chunks do not add
/// up to at least the final one.
fn observe<'s>(endpoint: Endpoint, chunks: impl IntoIterator<Item = &'s [u8]>) -> Observation {
    let mut observer = StreamObserver::for_endpoint(endpoint, true);
    let mut new_tokens = 0_u64;
    for chunk in chunks {
        let (was_done, had_error) = (observer.is_done(), observer.has_error());
        let observed = observer.feed(chunk);
        new_tokens += u64::from(observed.new_tokens);
        assert!(observed.done == observer.is_done() && observed.error == observer.has_error());
        assert!(observed.done >= was_done && observed.error >= had_error);
    }
    assert!(new_tokens >= u64::from(observer.tokens()));
    let text = observer
        .take_output()
        .map(|output| output.text().to_owned());
    Observation {
        tokens: observer.tokens(),
        choices: observer.choices().to_vec(),
        usage: observer.usage(),
        is_done: observer.is_done(),
        has_error: observer.has_error(),
        unread_events: observer.unread_events(),
        response_id: observer.response_id().map(str::to_owned),
        text: text.unwrap_or_default(),
    }
}

/// Divides a stream into chunks whose lengths depend on its bytes.
fn uneven_chunks(stream: &[u8]) -> Vec<&[u8]> {
    let mut chunks = Vec::new();
    let mut rest = stream;
    while let Some(&first) = rest.first() {
        let length = (1 + usize::from(first) % 37).min(rest.len());
        let (chunk, after) = rest.split_at(length);
        chunks.push(chunk);
        rest = after;
    }
    chunks
}

/// Checks that an error event after a stream that broke off, at any byte, is read as such.
fn check_broken_off(endpoint: Endpoint, stream: &[u8]) {
    let mut observer = StreamObserver::for_endpoint(endpoint, false);
    observer.feed(stream);
    if observer.is_mid_event() {
        observer.feed(b"\n\n");
    }
    observer.feed(&ApiError::bad_gateway("The worker failed.").to_stream_event(endpoint));
    assert!(observer.has_error() && observer.is_done());
    assert!(!observer.is_mid_event());
}
