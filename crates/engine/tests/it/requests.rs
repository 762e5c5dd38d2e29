//! What is read of request bodies as clients send them.
#![allow(clippy::unwrap_used, missing_docs)]

use std::num::NonZeroU32;

use foresee_core::batch::MOST_IN_BATCH;
use foresee_engine::request::{ANSWER_HEADING, ApiRequest, Endpoint, Prompt};
use proptest::prelude::*;
use serde_json::{Value, json};

const ENDPOINTS: [Endpoint; 3] = [
    Endpoint::ChatCompletions,
    Endpoint::Completions,
    Endpoint::Embeddings,
];

fn parse(endpoint: Endpoint, body: &str) -> ApiRequest {
    ApiRequest::parse(endpoint, body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"))
}

fn chat(body: &str) -> ApiRequest {
    parse(Endpoint::ChatCompletions, body)
}

fn complete(body: &str) -> ApiRequest {
    parse(Endpoint::Completions, body)
}

fn text(request: &ApiRequest) -> &[u8] {
    match &request.prompt {
        Prompt::Text(text) => text,
        Prompt::Tokens(tokens) => panic!("tokens {tokens:?}"),
    }
}

fn messages(messages: &Value) -> ApiRequest {
    chat(&json!({ "messages": messages }).to_string())
}

#[test]
fn a_request_for_lists_of_what_is_cached_is_seen() {
    let asks = |xargs: &str| {
        let body = format!(r#"{{"model": "m", "prompt": "p", "vllm_xargs": {xargs}}}"#);
        ApiRequest::parse(Endpoint::Completions, body.as_bytes())
            .unwrap()
            .lists_cached
    };
    assert!(asks(r#"{"kv_cache_report_mode": "full"}"#));
    assert!(asks(
        r#"{"other": [1], "kv_cache_report_mode": "f\u0075ll"}"#
    ));
    for other in [
        r#"{"kv_cache_report_mode": "incremental"}"#,
        r#"{"kv_cache_report_mode": 1}"#,
        "{}",
        "null",
        "[]",
    ] {
        assert!(!asks(other), "{other}");
    }
}

#[test]
fn a_chat_is_read() {
    let request = chat(
        r#"{"model": "Qwen/Qwen3-8B", "stream": true, "max_tokens": 100, "n": 2,
            "cache_salt": "s", "temperature": 0.7, "stop": ["a", {"deep": [[1]]}],
            "messages": [{"role": "user", "content": "Hi"}], "unknown": {"x": null}}"#,
    );
    assert_eq!(request.model, "Qwen/Qwen3-8B");
    assert!(request.stream);
    assert_eq!(request.max_tokens, Some(100));
    assert_eq!(request.choices, 2);
    assert_eq!(request.cache_salt.as_deref(), Some("s"));
    assert_eq!(text(&request), b"\xffuser\xfeHi");
    assert_eq!(request.prompt_bytes(), 8);
}

#[test]
fn what_is_absent_or_null_has_its_default() {
    let minimal = chat(r#"{"messages": []}"#);
    assert_eq!(
        minimal,
        chat(
            r#"{"messages": [], "model": null, "stream": null, "max_tokens": null, "n": null,
                "cache_salt": null, "tools": null, "max_completion_tokens": null,
                "ignore_eos": null}"#
        )
    );
    assert_eq!((minimal.model.as_str(), minimal.stream), ("", false));
    assert_eq!((minimal.max_tokens, minimal.choices), (None, 1));
    assert!(!minimal.has_tools && !minimal.ignores_eos);
    assert!(chat(r#"{"messages": [], "ignore_eos": true}"#).ignores_eos);
}

#[test]
fn tools_are_a_list_of_some() {
    for (tools, has_tools) in [
        (r#"[{"type": "function"}]"#, true),
        ("[ ]", false),
        ("{}", false),
    ] {
        let request = chat(&format!(r#"{{"messages": [], "tools": {tools}}}"#));
        assert_eq!(request.has_tools, has_tools, "{tools}");
    }
}

#[test]
fn the_newer_limit_of_a_chat_goes_before_the_older() {
    let limits = r#""max_tokens": 5, "max_completion_tokens": 7"#;
    let limit = chat(&format!(r#"{{"messages": [], {limits}}}"#)).max_tokens;
    assert_eq!(limit, Some(7));
    let limit = complete(&format!(r#"{{"prompt": "", {limits}}}"#)).max_tokens;
    assert_eq!(limit, Some(5));
}

#[test]
fn odd_fields_are_the_engines_business() {
    let request = chat(
        r#"{"messages": [{"role": 1, "content": 5, "name": []}, {"content": {"a": 1}}, {}],
            "max_tokens": -1, "n": 0, "stream": "yes", "cache_salt": 7, "tools": "?",
            "temperature": "hot"}"#,
    );
    assert_eq!((request.max_tokens, request.choices), (None, 1));
    assert!(!request.stream);
    assert_eq!(request.cache_salt, None);
    let large = chat(r#"{"messages": [], "max_tokens": 1e30, "n": 2.0}"#);
    assert_eq!((large.max_tokens, large.choices), (Some(u32::MAX), 2));
}

#[test]
fn a_key_given_twice_counts_as_last_given() {
    let request = chat(
        r#"{"model": "a", "messages": [{"role": "user", "content": "old"}], "model": "b",
            "max_tokens": 1, "max_tokens": 2,
            "messages": [{"role": "x", "content": ["old", {"type": "image_url"}],
                          "role": "user", "content": "new"}]}"#,
    );
    assert_eq!((request.model.as_str(), request.max_tokens), ("b", Some(2)));
    assert_eq!(text(&request), b"\xffuser\xfenew");
    assert_eq!(request.unmatched.tokens, 0);
}

#[test]
fn formatting_does_not_show_in_the_canonical_bytes() {
    let plain = chat(
        r#"{"messages":[{"role":"user","content":"Gr\u00fc\u00dfe"}],"tools":[{"a":1}],"model":"m"}"#,
    );
    let pretty = chat(
        r#"{ "tools" : [{"a":1}] , "model": "m",
             "messages": [ { "content" : [{"text": "Gr", "type": "text"}, "üße"],
                             "r\u006fle": "us\u0065r" } ] }"#,
    );
    assert_eq!(plain, pretty);
    assert_eq!(
        text(&plain),
        b"[{\"a\":1}]\xfc\xffuser\xfeGr\xc3\xbc\xc3\x9fe"
    );
}

#[test]
fn tool_calls_are_part_of_the_conversation() {
    let call = json!([{"id": "1", "function": {"name": "f", "arguments": "{}"}}]);
    let with = messages(&json!([{"role": "assistant", "content": null, "tool_calls": call}]));
    let expected = [b"\xffassistant\xfe\xfd", call.to_string().as_bytes()].concat();
    assert_eq!(text(&with), expected);
    let without = messages(&json!([{"role": "assistant", "content": null, "tool_calls": []}]));
    assert_eq!(text(&without), b"\xffassistant\xfe");
}

#[test]
fn an_answer_can_be_foretold_as_the_next_message() {
    let question = json!({"role": "user", "content": "Why?"});
    let answer = json!({"role": "assistant", "content": "Because."});
    let before = messages(&json!([question]));
    let after = messages(&json!([question, answer]));
    let foretold = [text(&before), ANSWER_HEADING, b"Because."].concat();
    assert_eq!(text(&after), foretold);
}

#[test]
fn what_follows_an_image_is_only_counted() {
    let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}});
    let request = messages(&json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "ab"}, image, "cde"]},
        {"role": "user", "content": "fgh"},
    ]));
    assert_eq!(text(&request), b"\xffsystem\xfes\xffuser\xfeab");
    assert_eq!(
        request.unmatched.bytes,
        "cde".len() + "user".len() + "fgh".len()
    );
    assert!(request.unmatched.tokens >= 100);
    assert_eq!(request.prompt_bytes(), 0, "teaches nothing about text");
    let block = NonZeroU32::new(16).unwrap();
    let sequence = request.sequences(&[], block, 4.0).first;
    assert!(sequence.tokens() as usize > request.unmatched.tokens);
}

#[test]
fn prompts_come_in_four_forms() {
    for (endpoint, field) in [
        (Endpoint::Completions, "prompt"),
        (Endpoint::Embeddings, "input"),
    ] {
        let read = |value: &str| {
            let request = parse(endpoint, &format!(r#"{{"{field}": {value}}}"#));
            assert!(request.is_matched_whole());
            let prompts: Vec<Prompt> = request.all_prompts().cloned().collect();
            assert_eq!(prompts.len(), request.prompts as usize);
            prompts
        };
        let text = |text: &str| Prompt::Text(text.into());
        let ids = |ids: &[u32]| Prompt::Tokens(ids.to_vec());
        assert_eq!(read(r#""a\nb""#), [text("a\nb")]);
        assert_eq!(
            read(r#"["ab", "cde", "f"]"#),
            [text("ab"), text("cde"), text("f")]
        );
        assert_eq!(read("[1, 2, 151645]"), [ids(&[1, 2, 151_645])]);
        assert_eq!(
            read("[[1, 2], [3], [4, 5]]"),
            [ids(&[1, 2]), ids(&[3]), ids(&[4, 5])]
        );
        assert_eq!(read("[]"), [text("")]);
        assert_eq!(read("null"), [text("")]);
    }
    let conversation = r#"{"messages": [{"role": "user", "content": "x"}]}"#;
    assert_eq!(
        text(&parse(Endpoint::Embeddings, conversation)),
        b"\xffuser\xfex"
    );
    assert_eq!(
        text(&complete(conversation)),
        b"",
        "not a field of completions"
    );
}

#[test]
fn errors_name_the_field_and_the_remedy() {
    let message_of = |endpoint, body: &str| {
        let error = ApiRequest::parse(endpoint, body.as_bytes()).expect_err(body);
        (error.param, error.message)
    };
    let long = "x".repeat(10_000);
    for (endpoint, body, param, remedy) in [
        (
            ENDPOINTS[0],
            "{}".to_owned(),
            Some("messages"),
            "must be an array of objects",
        ),
        (
            ENDPOINTS[0],
            format!(r#"{{"messages": "{long}"}}"#),
            Some("messages"),
            "must be an array of objects",
        ),
        (
            ENDPOINTS[0],
            r#"{"messages": ["hi"]}"#.to_owned(),
            Some("messages"),
            "must be an array of objects",
        ),
        (
            ENDPOINTS[0],
            r#"{"messages": [], "model": 5}"#.to_owned(),
            Some("model"),
            "must be a string",
        ),
        (
            ENDPOINTS[1],
            r#"{"prompt": 5}"#.to_owned(),
            Some("prompt"),
            "array of token ids",
        ),
        (
            ENDPOINTS[1],
            r#"{"prompt": [1, "a"]}"#.to_owned(),
            Some("prompt"),
            "array of token ids",
        ),
        (
            ENDPOINTS[1],
            r#"{"prompt": [-1]}"#.to_owned(),
            Some("prompt"),
            "array of token ids",
        ),
        (
            ENDPOINTS[1],
            r#"{"prompt": [[4294967296]]}"#.to_owned(),
            Some("prompt"),
            "array of token ids",
        ),
        (
            ENDPOINTS[2],
            r#"{"input": [1.5]}"#.to_owned(),
            Some("input"),
            "array of token ids",
        ),
        (ENDPOINTS[0], "[]".to_owned(), None, "must be a JSON object"),
        (ENDPOINTS[0], String::new(), None, "not valid JSON"),
        (
            ENDPOINTS[0],
            r#"{"messages": [}"#.to_owned(),
            None,
            "not valid JSON",
        ),
        (
            ENDPOINTS[0],
            r#"{"messages": []} x"#.to_owned(),
            None,
            "not valid JSON",
        ),
        (
            ENDPOINTS[0],
            r#"{"messages": [], "a": tru}"#.to_owned(),
            None,
            "not valid JSON",
        ),
    ] {
        let (at, message) = message_of(endpoint, &body);
        assert_eq!(at, param, "{message}");
        assert!(message.contains(remedy), "{message}");
        assert!(message.len() < 300, "does not quote the body");
    }
}

#[test]
fn deep_nesting_is_an_error_or_skipped() {
    for open in ["[", "{\"a\":"] {
        let deep = open.repeat(100_000);
        for endpoint in ENDPOINTS {
            for field in ["messages", "prompt", "input", "model", "other"] {
                let body = format!("{{\"{field}\": {deep}");
                assert!(ApiRequest::parse(endpoint, body.as_bytes()).is_err());
            }
        }
    }
}

#[test]
fn sequences_match_only_under_the_same_model_and_salt() {
    let block = NonZeroU32::new(16).unwrap();
    let sequence = |model: &str, salt: &str| {
        let prompt = "word ".repeat(100);
        let body = json!({"model": model, "prompt": prompt, "cache_salt": salt}).to_string();
        complete(&body).sequences(&[], block, 4.0).first
    };
    let first = sequence("m", "s");
    assert_eq!(first.tokens(), 125);
    assert_eq!(first.hashes().len(), 7);
    assert_eq!(first, sequence("m", "s"));
    assert_ne!(first.hashes()[0], sequence("lora", "s").hashes()[0]);
    assert_ne!(first.hashes()[0], sequence("m", "t").hashes()[0]);
}

/// The tokens of each sequence that is booked.
fn booked(body: &str) -> Vec<u32> {
    let block = NonZeroU32::new(2).unwrap();
    let sequences = complete(body).sequences(&[], block, 4.0);
    let all = std::iter::once(&sequences.first).chain(&sequences.further);
    all.map(|sequence| sequence.tokens()).collect()
}

#[test]
fn each_answer_to_each_prompt_is_a_sequence() {
    let block = NonZeroU32::new(2).unwrap();
    let body = r#"{"n": 2, "prompt": [[1, 2, 3], [4, 5], [1, 2]]}"#;
    assert_eq!(booked(body), [3, 3, 2, 2, 2, 2]);
    let sequences = complete(body).sequences(&[], block, 4.0);
    assert_eq!(sequences.prompt_tokens, 7, "as engines report them");
    assert_eq!(sequences.first, sequences.further[0]);
    let first = sequences.first.hashes();
    assert_ne!(first, sequences.further[1].hashes());
    assert_eq!(first, sequences.further[3].hashes());

    let texts = r#"{"prompt": ["12345678", "1234", "x"]}"#;
    assert_eq!(booked(texts), [2, 1, 1]);
    let known = vec![None, Some(vec![7, 8, 9]), None];
    let sequences = complete(texts).sequences(&known, block, 4.0);
    assert_eq!(sequences.further[0].tokens(), 3);
    assert_eq!(sequences.prompt_tokens, 6);

    assert_eq!(booked(r#"{"n": 3, "prompt": [1, 2, 3]}"#), [3, 3, 3]);
    let embedded = parse(Endpoint::Embeddings, r#"{"n": 3, "input": ["abcd", "e"]}"#);
    assert_eq!(embedded.sequences(&[], block, 4.0).further.len(), 1);
}

#[test]
fn what_is_too_much_to_book_apart_is_counted() {
    let prompts = |count: usize| vec![json!([1, 2, 3]); count];
    let body = |count, n: u32| json!({"prompt": prompts(count), "n": n}).to_string();
    assert_eq!(booked(&body(MOST_IN_BATCH, 1)), [3; MOST_IN_BATCH]);
    for (count, n, rest) in [
        (MOST_IN_BATCH + 1, 1, 6),
        (1000, 1, 3 * (1000 - 63)),
        // 63 answers begin 32 prompts.
        (MOST_IN_BATCH, 2, 3 * 32),
        (1, 1000, 0),
        (2, u32::MAX, 3),
    ] {
        let booked = booked(&body(count, n));
        assert_eq!(booked.len(), MOST_IN_BATCH, "{count} × {n}");
        let (last, apart) = booked.split_last().unwrap();
        assert!(apart.iter().all(|&tokens| tokens == 3));
        assert_eq!(*last as usize, rest, "{count} × {n}");
    }
    let images = r#"{"input": [{"image": "x"}, "abcd", {"image": "y"}]}"#;
    let request = parse(Endpoint::Embeddings, images);
    let sequences = request.sequences(&[], NonZeroU32::new(2).unwrap(), 4.0);
    assert_eq!(sequences.first.tokens(), 1);
    assert_eq!(
        sequences.further[0].tokens() as usize,
        request.unmatched.tokens
    );
}

#[derive(Clone, Debug)]
struct Turn {
    role: String,
    parts: Vec<String>,
    calls: bool,
}

impl Turn {
    fn to_json(&self, style: u8) -> Value {
        let content = match style % 3 {
            0 => json!(self.parts.concat()),
            1 => json!(self.parts),
            _ => self
                .parts
                .iter()
                .map(|text| json!({"type": "text", "text": text}))
                .collect(),
        };
        let mut message = json!({"role": self.role, "content": content});
        if self.calls {
            message["tool_calls"] = json!([{"id": "c"}]);
        }
        message
    }
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = (
        "(user|assistant|tool)",
        prop::collection::vec(any::<String>(), 0..3),
        any::<bool>(),
    );
    let turn = turn.prop_map(|(role, parts, calls)| Turn { role, parts, calls });
    prop::collection::vec(turn, 0..6)
}

fn conversation(turns: &[Turn], style: u8, pretty: bool, tools: bool) -> ApiRequest {
    let messages: Vec<Value> = turns.iter().map(|turn| turn.to_json(style)).collect();
    let mut body = json!({ "messages": messages });
    if tools {
        body["tools"] = json!([]);
    }
    chat(&if pretty {
        format!("{body:#}")
    } else {
        body.to_string()
    })
}

proptest! {
    #[test]
    fn an_earlier_turn_is_a_prefix_of_a_later_one(
        turns in turns(),
        earlier in any::<prop::sample::Index>(),
        style in any::<u8>(),
        pretty in any::<bool>(),
    ) {
        // Tool calls are compared as written, so only their formatting must stay the same.
        let pretty = pretty && !turns.iter().any(|turn| turn.calls);
        let earlier = earlier.index(turns.len() + 1);
        let before = conversation(&turns[..earlier], 0, false, false);
        let after = conversation(&turns, style, pretty, true);
        prop_assert!(text(&after).starts_with(text(&before)));
    }

    #[test]
    fn different_conversations_have_different_bytes(one in turns(), other in turns()) {
        let said = |turns: &[Turn]| -> Vec<_> {
            turns.iter().map(|turn| (turn.role.clone(), turn.parts.concat(), turn.calls)).collect()
        };
        let equal = said(&one) == said(&other);
        let one = conversation(&one, 0, false, false);
        let other = conversation(&other, 1, false, false);
        prop_assert_eq!(text(&one) == text(&other), equal);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for endpoint in ENDPOINTS {
            let _ = ApiRequest::parse(endpoint, &bytes);
        }
    }

    #[test]
    fn any_json_like_text_is_survived(
        body in r#"\{"(messages|prompt|input)": [\[\]{}",:0-9a-z\\\-. ]{0,40}\}"#,
        ratio in any::<f64>(),
    ) {
        for endpoint in ENDPOINTS {
            if let Ok(request) = ApiRequest::parse(endpoint, body.as_bytes()) {
                let _ = request.sequences(&[], NonZeroU32::new(16).unwrap(), ratio);
            }
        }
    }
}
