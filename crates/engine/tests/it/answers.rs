//! What is known of an answer, and the blocks it adds to its prompt.
#![allow(clippy::unwrap_used, missing_docs)]

use std::num::NonZeroU32;
use std::path::Path;

use crate::TINY;
use foresee_core::sequence::Sequence;
use foresee_engine::answer::{Answer, Continuation, End, MAX_ANSWER_BYTES, parse_answer};
use foresee_engine::request::{ApiRequest, Endpoint};
use foresee_engine::stream::StreamObserver;
use foresee_engine::tokenizer::{Framing, Tokenizer};
use serde_json::{Value, json};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();
const WHOLE: End = End::Whole(None);

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

fn collect(events: &[String]) -> Answer {
    let mut observer = StreamObserver::collecting();
    observer.feed(events.concat().as_bytes());
    observer.take_answer().unwrap()
}

#[test]
fn the_text_of_the_first_choice_is_collected() {
    let answer = collect(&[
        delta(json!({"role": "assistant", "content": ""})),
        content("Hel"),
        event(&json!({"choices": [
            {"index": 1, "delta": {"content": "other"}},
            {"index": 0, "delta": {"content": "lo \"\u{e9}\"\n"}},
        ]})),
        event(&json!({"choices": [], "usage": {"completion_tokens": 3}})),
        "data: [DONE]\n\n".to_owned(),
    ]);
    assert_eq!(answer.text(), "Hello \"\u{e9}\"\n");
    let answer = collect(&[
        event(&json!({"choices": [{"text": "plain "}]})),
        event(&json!({"choices": [{"text": "text"}]})),
    ]);
    assert_eq!(answer.text(), "plain text");
    let mut observer = StreamObserver::new();
    observer.feed(content("unwanted").as_bytes());
    assert!(observer.take_answer().is_none());
}

#[test]
fn an_answer_that_is_not_streamed_is_read_as_well() {
    let chat = json!({"choices": [
        {"index": 0, "message": {"content": "Hi", "tool_calls": null}, "finish_reason": "stop"},
    ]});
    assert_eq!(
        parse_answer(chat.to_string().as_bytes()).unwrap().text(),
        "Hi"
    );
    let completion = json!({"choices": [{"index": 0, "text": "Hi"}]});
    let answer = parse_answer(completion.to_string().as_bytes()).unwrap();
    assert_eq!(answer.text(), "Hi");
    assert!(parse_answer(b"no JSON").is_none());
}

#[test]
fn what_follows_something_unknown_is_unknown() {
    let cases = [
        delta(json!({"reasoning_content": "hm"})),
        delta(json!({"reasoning": "hm"})),
        delta(json!({"tool_calls": [{"index": 0}]})),
        delta(json!({"content": ["parts"]})),
        content("\u{fffd}"),
        "data: {\n\n".to_owned(),
    ];
    for unknown in cases {
        let answer = collect(&[content("known"), unknown.clone(), content("lost")]);
        assert_eq!(answer.text(), "known", "after {unknown}");
        assert_eq!(collect(&[unknown, content("lost")]).text(), "");
    }
}

#[test]
fn no_more_than_so_much_is_kept() {
    let piece = content(&"x".repeat(1 << 16));
    let answer = collect(&vec![piece; 10]);
    assert_eq!(answer.text().len(), MAX_ANSWER_BYTES);
}

/// A request's sequence, and how it goes on.
fn request(
    endpoint: Endpoint,
    body: &Value,
    ids: Option<&[u32]>,
) -> (Sequence, Option<Continuation>) {
    let request = ApiRequest::parse(endpoint, body.to_string().as_bytes()).unwrap();
    let given: Vec<Option<Vec<u32>>> = ids.map(|ids| Some(ids.to_vec())).into_iter().collect();
    let sequences = request.sequences(&given, BLOCK_SIZE, 4.0);
    (sequences.first, request.continuation(ids, BLOCK_SIZE, 4.0))
}

fn chat(messages: &[(&str, &str)]) -> Value {
    let messages = messages
        .iter()
        .map(|(role, text)| json!({"role": role, "content": text}));
    json!({"messages": messages.collect::<Vec<_>>()})
}

#[test]
fn without_a_tokenizer_the_next_turns_text_begins_with_the_answers() {
    let said = "An answer of some length, so that it fills a few pieces of text.";
    let (prompt, continuation) = request(
        Endpoint::ChatCompletions,
        &chat(&[("user", "Hello there")]),
        None,
    );
    let (next, _) = request(
        Endpoint::ChatCompletions,
        &chat(&[
            ("user", "Hello there"),
            ("assistant", said),
            ("user", "And then?"),
        ]),
        None,
    );
    let continuation = continuation.unwrap();
    let stopped = collect(&[content(said), finished("stop")]);
    let stored = continuation
        .sequence(&prompt, &stopped, WHOLE, None)
        .unwrap();
    assert!(next.hashes().starts_with(stored.hashes()));
    let bytes = b"\xffuser\xfeHello there\xffassistant\xfe".len() + said.len();
    assert_eq!(stored.hashes().len(), bytes / 8);

    // The last token of an answer that was cut is not stored; of one given up, who knows.
    let cut = collect(&[content(said), finished("length")]);
    let shorter = continuation.sequence(&prompt, &cut, WHOLE, None).unwrap();
    assert_eq!(shorter.hashes().len(), (bytes - 4) / 8);
    let given_up = continuation
        .sequence(&prompt, &cut, End::Abandoned, None)
        .unwrap();
    assert_eq!(given_up.hashes().len(), (bytes - 8) / 8);

    let (prompt, continuation) =
        request(Endpoint::Completions, &json!({"prompt": "Once upon"}), None);
    let (next, _) = request(
        Endpoint::Completions,
        &json!({"prompt": format!("Once upon{said}")}),
        None,
    );
    let stored = continuation
        .unwrap()
        .sequence(&prompt, &stopped, WHOLE, None)
        .unwrap();
    assert_eq!(stored.hashes(), next.hashes());
}

#[test]
fn nothing_is_guessed_where_the_template_or_the_request_changes_what_follows() {
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
        let of_tokens = request(Endpoint::ChatCompletions, &body, Some(&[1, 2, 3])).1;
        assert!(
            of_tokens.unwrap().is_of_tokens(),
            "after ids the generated ones follow"
        );
    }
    let (prompt, continuation) =
        request(Endpoint::Completions, &json!({"prompt": [1, 2, 3]}), None);
    let answer = collect(&[content("text")]);
    let stored = continuation
        .unwrap()
        .sequence(&prompt, &answer, WHOLE, None);
    assert_eq!(stored, None, "its ids are not known");
}

/// Events as an engine sends them that generated `pieces`, each a token or several.
fn streamed(pieces: &[&str], reason: &str) -> Answer {
    let mut events: Vec<String> = pieces.iter().map(|piece| content(piece)).collect();
    events.push(finished(reason));
    collect(&events)
}

struct Told {
    tokenizer: Tokenizer,
    prompt: Sequence,
    continuation: Continuation,
}

impl Told {
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
        self.tokenizer.encode(text, Framing::InText).unwrap()
    }

    /// The text of each of our tokens.
    fn pieces<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let lengths = self.tokenizer.text_lengths(&self.ids(text));
        let mut rest = text;
        lengths
            .into_iter()
            .map(|length| {
                let (piece, after) = rest.split_at(length);
                rest = after;
                piece
            })
            .collect()
    }

    /// How many ids of the answer are known to be stored, rounded down to whole blocks.
    fn stored(&self, answer: &Answer, end: End) -> usize {
        let tokenizer = Some(&self.tokenizer);
        let sequence = self
            .continuation
            .sequence(&self.prompt, answer, end, tokenizer);
        let Some(sequence) = sequence else { return 0 };
        let stored = sequence.tokens() as usize - 3;
        let ids = [vec![1, 2, 3], self.ids(answer.text())[..stored].to_vec()].concat();
        let expected = request(Endpoint::Completions, &json!({ "prompt": ids }), None).0;
        assert_eq!(sequence.hashes(), expected.hashes());
        stored
    }
}

#[test]
fn the_ids_of_the_text_are_believed_as_far_as_they_end_where_the_engines_do() {
    let told = Told::new();
    let text = "import the default value of this function";
    let pieces = told.pieces(text);
    let count = pieces.len();
    assert!(count > 6, "{pieces:?}");
    let generated = |more: usize| End::Whole(Some((count + more) as u32));

    let cut = streamed(&pieces, "length");
    assert_eq!(told.stored(&cut, WHOLE), count - 1);
    assert_eq!(told.stored(&cut, generated(0)), count - 1);
    assert_eq!(told.stored(&cut, End::Abandoned), count - 1);
    assert_eq!(told.stored(&cut, generated(1)), 0, "one token came unseen");
    let stopped = streamed(&pieces, "stop");
    assert_eq!(told.stored(&stopped, WHOLE), count);
    assert_eq!(told.stored(&stopped, generated(1)), count);

    // Two tokens in one event: certain only if the count is right.
    let joined = pieces[2].to_owned() + pieces[3];
    let mut merged = pieces.clone();
    merged.splice(2..4, [joined.as_str()]);
    let merged = streamed(&merged, "stop");
    assert_eq!(told.stored(&merged, generated(1)), count);
    assert_eq!(told.stored(&merged, generated(2)), 2);
    assert_eq!(told.stored(&merged, WHOLE), 2);

    // The engine divided the text otherwise.
    let (head, tail) = pieces[3].split_at(1);
    let mut divided = pieces.clone();
    divided.splice(3..4, [head, tail]);
    assert_eq!(told.stored(&streamed(&divided, "stop"), generated(2)), 3);

    // Not streamed, the count alone speaks for it.
    let body = json!({"choices": [{"text": text, "finish_reason": "length"}]});
    let whole = parse_answer(body.to_string().as_bytes()).unwrap();
    assert_eq!(told.stored(&whole, generated(0)), count - 1);
    assert_eq!(told.stored(&whole, generated(1)), 0);
    assert_eq!(told.stored(&whole, WHOLE), 0);
}

#[test]
fn characters_of_several_bytes_and_tokens_are_measured_right() {
    let told = Told::new();
    let text = "na\u{ef}ve \u{1f600} \u{4f60}\u{597d}\n";
    let ids = told.ids(text);
    let lengths = told.tokenizer.text_lengths(&ids);
    assert_eq!(lengths.iter().sum::<usize>(), text.len());
    assert_eq!(
        told.tokenizer.text_lengths(&told.ids("a<|im_end|>b")).len(),
        1
    );
}
