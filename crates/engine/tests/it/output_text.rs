//! The text of outputs, and the blocks that an output adds to its prompt.
#![allow(clippy::unwrap_used, missing_docs)]

use std::num::NonZeroU32;
use std::path::Path;

use crate::TINY;
use foresee_core::sequence::Sequence;
use foresee_engine::output_text::{
    Continuation, MAX_OUTPUT_TEXT_BYTES, OutputEnd, OutputText, parse_output_text,
};
use foresee_engine::request::{ApiRequest, Endpoint};
use foresee_engine::stream::StreamObserver;
use foresee_engine::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Value, json};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();
const WHOLE: OutputEnd = OutputEnd::Complete(None);

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

fn delta(delta: Value) -> String {
    event(&json!({"choices": [{"index": 0, "delta": delta}]}))
}

fn content(text: &str) -> String {
    delta(json!({ "content": text }))
}

fn finished(reason: &str) -> String {
    event(&json!({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": reason}]}))
}

fn collect(events: &[String]) -> OutputText {
    let mut observer = StreamObserver::collecting();
    observer.feed(events.concat().as_bytes());
    observer.take_output().unwrap()
}

#[test]
fn the_text_of_the_first_choice_is_collected() {
    let output = collect(&[
        delta(json!({"role": "assistant", "content": ""})),
        content("Hel"),
        event(&json!({"choices": [
            {"index": 1, "delta": {"content": "other"}},
            {"index": 0, "delta": {"content": "lo \"\u{e9}\"\n"}},
        ]})),
        event(&json!({"choices": [], "usage": {"completion_tokens": 3}})),
        "data: [DONE]\n\n".to_owned(),
    ]);
    assert_eq!(output.text(), "Hello \"\u{e9}\"\n");
    let output = collect(&[
        event(&json!({"choices": [{"text": "plain "}]})),
        event(&json!({"choices": [{"text": "text"}]})),
    ]);
    assert_eq!(output.text(), "plain text");
    let mut observer = StreamObserver::new();
    observer.feed(content("unwanted").as_bytes());
    assert!(observer.take_output().is_none());
}

#[test]
fn an_output_that_is_not_streamed_is_read() {
    let chat = json!({"choices": [
        {"index": 0, "message": {"content": "Hi", "tool_calls": null}, "finish_reason": "stop"},
    ]});
    assert_eq!(
        parse_output_text(chat.to_string().as_bytes())
            .unwrap()
            .text(),
        "Hi"
    );
    let completion = json!({"choices": [{"index": 0, "text": "Hi"}]});
    let output = parse_output_text(completion.to_string().as_bytes()).unwrap();
    assert_eq!(output.text(), "Hi");
    assert!(parse_output_text(b"no JSON").is_none());
}

#[test]
fn text_after_unknown_content_is_not_collected() {
    let cases = [
        delta(json!({"reasoning_content": "hm"})),
        delta(json!({"reasoning": "hm"})),
        delta(json!({"tool_calls": [{"index": 0}]})),
        delta(json!({"content": ["parts"]})),
        content("\u{fffd}"),
        "data: {\n\n".to_owned(),
    ];
    for unknown in cases {
        let output = collect(&[content("known"), unknown.clone(), content("lost")]);
        assert_eq!(output.text(), "known", "after {unknown}");
        assert_eq!(collect(&[unknown, content("lost")]).text(), "");
    }
}

#[test]
fn the_collected_text_is_limited() {
    let event = content(&"x".repeat(1 << 16));
    let output = collect(&vec![event; 10]);
    assert_eq!(output.text().len(), MAX_OUTPUT_TEXT_BYTES);
}

/// Returns the block sequence of a request, and its continuation by an output.
fn request(
    endpoint: Endpoint,
    body: &Value,
    ids: Option<&[u32]>,
) -> (Sequence, Option<Continuation>) {
    let request = ApiRequest::parse(endpoint, body.to_string().as_bytes()).unwrap();
    let prompts: Vec<Option<Vec<u32>>> = ids.map(|ids| Some(ids.to_vec())).into_iter().collect();
    let sequences = request.sequences(&prompts, BLOCK_SIZE, 4.0);
    (sequences.first, request.continuation(ids, BLOCK_SIZE, 4.0))
}

fn chat(messages: &[(&str, &str)]) -> Value {
    let messages = messages
        .iter()
        .map(|(role, text)| json!({"role": role, "content": text}));
    json!({"messages": messages.collect::<Vec<_>>()})
}

#[test]
fn without_a_tokenizer_the_next_turn_starts_with_the_output() {
    let output = "An answer of some length, so that it fills a few pieces of text.";
    let (prompt, continuation) = request(
        Endpoint::ChatCompletions,
        &chat(&[("user", "Hello there")]),
        None,
    );
    let (next, _) = request(
        Endpoint::ChatCompletions,
        &chat(&[
            ("user", "Hello there"),
            ("assistant", output),
            ("user", "And then?"),
        ]),
        None,
    );
    let continuation = continuation.unwrap();
    let stopped = collect(&[content(output), finished("stop")]);
    let stored = continuation
        .sequence(&prompt, &stopped, WHOLE, None)
        .unwrap();
    assert!(next.hashes().starts_with(stored.hashes()));
    let bytes = b"\xffuser\xfeHello there\xffassistant\xfe".len() + output.len();
    assert_eq!(stored.hashes().len(), bytes / 8);

    // The last token of a truncated output is not stored. Of an abandoned output, two tokens may be
    // missing.
    let truncated = collect(&[content(output), finished("length")]);
    let shorter = continuation
        .sequence(&prompt, &truncated, WHOLE, None)
        .unwrap();
    assert_eq!(shorter.hashes().len(), (bytes - 4) / 8);
    let abandoned = continuation
        .sequence(&prompt, &truncated, OutputEnd::Abandoned, None)
        .unwrap();
    assert_eq!(abandoned.hashes().len(), (bytes - 8) / 8);

    let (prompt, continuation) =
        request(Endpoint::Completions, &json!({"prompt": "Once upon"}), None);
    let (next, _) = request(
        Endpoint::Completions,
        &json!({"prompt": format!("Once upon{output}")}),
        None,
    );
    let stored = continuation
        .unwrap()
        .sequence(&prompt, &stopped, WHOLE, None)
        .unwrap();
    assert_eq!(stored.hashes(), next.hashes());
}

#[test]
fn there_is_no_continuation_if_the_request_changes_what_follows_the_prompt() {
    let mut echo = json!({"prompt": "Hello"});
    echo["echo"] = json!(true);
    assert!(request(Endpoint::Completions, &echo, None).1.is_none());
    for several in [
        json!({"prompt": ["one", "two"]}),
        json!({"prompt": "one", "n": 2}),
    ] {
        assert!(request(Endpoint::Completions, &several, None).1.is_none());
    }
    for (option, value) in [
        ("continue_final_message", true),
        ("add_generation_prompt", false),
    ] {
        let mut body = chat(&[("user", "Hi")]);
        body[option] = json!(value);
        assert!(
            request(Endpoint::ChatCompletions, &body, None).1.is_none(),
            "{option}"
        );
        let continuation = request(Endpoint::ChatCompletions, &body, Some(&[1, 2, 3])).1;
        assert!(
            continuation.unwrap().is_token_based(),
            "token ids are followed by the generated ids"
        );
    }
    let (prompt, continuation) =
        request(Endpoint::Completions, &json!({"prompt": [1, 2, 3]}), None);
    let output = collect(&[content("text")]);
    let stored = continuation
        .unwrap()
        .sequence(&prompt, &output, WHOLE, None);
    assert_eq!(stored, None, "the ids of the output are unknown");
}

/// Returns the output of an engine that streams `texts`, each in one event of one or several
/// tokens.
fn streamed(texts: &[&str], reason: &str) -> OutputText {
    let mut events: Vec<String> = texts.iter().map(|text| content(text)).collect();
    events.push(finished(reason));
    collect(&events)
}

/// A request with known token ids, and the tokenizer.
struct TokenizedRequest {
    tokenizer: Tokenizer,
    prompt: Sequence,
    continuation: Continuation,
}

impl TokenizedRequest {
    fn new() -> Self {
        let (prompt, continuation) =
            request(Endpoint::Completions, &json!({"prompt": [1, 2, 3]}), None);
        Self {
            tokenizer: Tokenizer::load(Path::new(TINY)).unwrap(),
            prompt,
            continuation: continuation.unwrap(),
        }
    }

    fn ids(&self, text: &str) -> Vec<u32> {
        self.tokenizer
            .encode(text, SpecialTokens::AlreadyPresent)
            .unwrap()
    }

    /// Returns the text of each token.
    fn token_texts<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let lengths = self.tokenizer.text_lengths(&self.ids(text));
        let mut rest = text;
        lengths
            .into_iter()
            .map(|length| {
                let (token_text, after) = rest.split_at(length);
                rest = after;
                token_text
            })
            .collect()
    }

    /// Returns the number of output tokens that are known to be stored, and checks their hashes.
    fn stored(&self, output: &OutputText, end: OutputEnd) -> usize {
        let tokenizer = Some(&self.tokenizer);
        let sequence = self
            .continuation
            .sequence(&self.prompt, output, end, tokenizer);
        let Some(sequence) = sequence else { return 0 };
        let stored = sequence.tokens() as usize - 3;
        let ids = [vec![1, 2, 3], self.ids(output.text())[..stored].to_vec()].concat();
        let expected = request(Endpoint::Completions, &json!({ "prompt": ids }), None).0;
        assert_eq!(sequence.hashes(), expected.hashes());
        stored
    }
}

#[test]
fn token_ids_are_used_as_far_as_their_boundaries_equal_the_engines() {
    let tokenized = TokenizedRequest::new();
    let text = "import the default value of this function";
    let token_texts = tokenized.token_texts(text);
    let count = token_texts.len();
    assert!(count > 6, "{token_texts:?}");
    let generated = |extra: usize| OutputEnd::Complete(Some((count + extra) as u32));

    let truncated = streamed(&token_texts, "length");
    assert_eq!(tokenized.stored(&truncated, WHOLE), count - 1);
    assert_eq!(tokenized.stored(&truncated, generated(0)), count - 1);
    assert_eq!(
        tokenized.stored(&truncated, OutputEnd::Abandoned),
        count - 1
    );
    assert_eq!(
        tokenized.stored(&truncated, generated(1)),
        0,
        "one token has no text"
    );
    let stopped = streamed(&token_texts, "stop");
    assert_eq!(tokenized.stored(&stopped, WHOLE), count);
    assert_eq!(tokenized.stored(&stopped, generated(1)), count);

    // Two tokens in one event are certain only if the number of tokens is right.
    let joined = token_texts[2].to_owned() + token_texts[3];
    let mut merged = token_texts.clone();
    merged.splice(2..4, [joined.as_str()]);
    let merged = streamed(&merged, "stop");
    assert_eq!(tokenized.stored(&merged, generated(1)), count);
    assert_eq!(tokenized.stored(&merged, generated(2)), 2);
    assert_eq!(tokenized.stored(&merged, WHOLE), 2);

    // The engine has divided the text differently.
    let (head, tail) = token_texts[3].split_at(1);
    let mut divided = token_texts.clone();
    divided.splice(3..4, [head, tail]);
    assert_eq!(
        tokenized.stored(&streamed(&divided, "stop"), generated(2)),
        3
    );

    // Without streaming, only the number of tokens confirms the ids.
    let body = json!({"choices": [{"text": text, "finish_reason": "length"}]});
    let complete = parse_output_text(body.to_string().as_bytes()).unwrap();
    assert_eq!(tokenized.stored(&complete, generated(0)), count - 1);
    assert_eq!(tokenized.stored(&complete, generated(1)), 0);
    assert_eq!(tokenized.stored(&complete, WHOLE), 0);
}

#[test]
fn the_length_of_characters_of_several_bytes_or_tokens_is_right() {
    let tokenized = TokenizedRequest::new();
    let text = "na\u{ef}ve \u{1f600} \u{4f60}\u{597d}\n";
    let ids = tokenized.ids(text);
    let lengths = tokenized.tokenizer.text_lengths(&ids);
    assert_eq!(lengths.iter().sum::<usize>(), text.len());
    assert_eq!(
        tokenized
            .tokenizer
            .text_lengths(&tokenized.ids("a<|im_end|>b"))
            .len(),
        1
    );
}
