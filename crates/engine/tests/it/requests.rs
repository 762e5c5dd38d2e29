//! Parsing of request bodies as clients send them.
#![allow(clippy::unwrap_used, missing_docs)]

use std::num::NonZeroU32;

use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_engine::request::{ASSISTANT_HEADING, ApiRequest, Endpoint, Prompt};
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
fn a_request_for_the_full_report_mode_is_recognised() {
    let full_report_mode = |xargs: &str| {
        let body = format!(r#"{{"model": "m", "prompt": "p", "vllm_xargs": {xargs}}}"#);
        ApiRequest::parse(Endpoint::Completions, body.as_bytes())
            .unwrap()
            .full_report_mode
    };
    assert!(full_report_mode(r#"{"kv_cache_report_mode": "full"}"#));
    assert!(full_report_mode(
        r#"{"other": [1], "kv_cache_report_mode": "f\u0075ll"}"#
    ));
    for other in [
        r#"{"kv_cache_report_mode": "incremental"}"#,
        r#"{"kv_cache_report_mode": 1}"#,
        "{}",
        "null",
        "[]",
    ] {
        assert!(!full_report_mode(other), "{other}");
    }
}

#[test]
fn a_chat_is_parsed() {
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
fn absent_and_null_fields_have_their_defaults() {
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
    assert!(!minimal.has_tools && !minimal.ignore_eos);
    assert!(chat(r#"{"messages": [], "ignore_eos": true}"#).ignore_eos);
}

#[test]
fn tools_are_a_list_that_is_not_empty() {
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
fn max_completion_tokens_takes_precedence_over_max_tokens_in_a_chat() {
    let limits = r#""max_tokens": 5, "max_completion_tokens": 7"#;
    let limit = chat(&format!(r#"{{"messages": [], {limits}}}"#)).max_tokens;
    assert_eq!(limit, Some(7));
    let limit = complete(&format!(r#"{{"prompt": "", {limits}}}"#)).max_tokens;
    assert_eq!(limit, Some(5));
}

#[test]
fn invalid_optional_fields_are_left_to_the_engine() {
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
fn the_last_value_of_a_duplicate_key_counts() {
    let request = chat(
        r#"{"model": "a", "messages": [{"role": "user", "content": "old"}], "model": "b",
            "max_tokens": 1, "max_tokens": 2,
            "messages": [{"role": "x", "content": ["old", {"type": "image_url"}],
                          "role": "user", "content": "new"}]}"#,
    );
    assert_eq!((request.model.as_str(), request.max_tokens), ("b", Some(2)));
    assert_eq!(text(&request), b"\xffuser\xfenew");
    assert_eq!(request.unhashed.tokens, 0);
}

#[test]
fn formatting_does_not_change_the_canonical_bytes() {
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
    let with_calls = messages(&json!([{"role": "assistant", "content": null, "tool_calls": call}]));
    let expected = [b"\xffassistant\xfe\xfd", call.to_string().as_bytes()].concat();
    assert_eq!(text(&with_calls), expected);
    let without_calls =
        messages(&json!([{"role": "assistant", "content": null, "tool_calls": []}]));
    assert_eq!(text(&without_calls), b"\xffassistant\xfe");
}

#[test]
fn the_bytes_of_an_output_as_the_next_message_can_be_predicted() {
    let question = json!({"role": "user", "content": "Why?"});
    let output = json!({"role": "assistant", "content": "Because."});
    let before = messages(&json!([question]));
    let after = messages(&json!([question, output]));
    let predicted = [text(&before), ASSISTANT_HEADING, b"Because."].concat();
    assert_eq!(text(&after), predicted);
}

#[test]
fn content_after_an_image_is_only_counted() {
    let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}});
    let request = messages(&json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "ab"}, image, "cde"]},
        {"role": "user", "content": "fgh"},
    ]));
    assert_eq!(text(&request), b"\xffsystem\xfes\xffuser\xfeab");
    assert_eq!(
        request.unhashed.bytes,
        "cde".len() + "user".len() + "fgh".len()
    );
    assert!(request.unhashed.tokens >= 100);
    assert_eq!(
        request.prompt_bytes(),
        0,
        "the request says nothing about bytes per token"
    );
    let block = NonZeroU32::new(16).unwrap();
    let sequence = request.sequences(&[], block, 4.0).first;
    assert!(sequence.tokens() as usize > request.unhashed.tokens);
}

#[test]
fn prompts_can_be_texts_and_token_ids_one_or_several() {
    for (endpoint, field) in [
        (Endpoint::Completions, "prompt"),
        (Endpoint::Embeddings, "input"),
    ] {
        let read = |value: &str| {
            let request = parse(endpoint, &format!(r#"{{"{field}": {value}}}"#));
            assert!(request.is_fully_hashed());
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
        "completions have no messages"
    );
}

#[test]
fn errors_name_the_field_and_the_remedy() {
    let error_of = |endpoint, body: &str| {
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
        let (field, message) = error_of(endpoint, &body);
        assert_eq!(field, param, "{message}");
        assert!(message.contains(remedy), "{message}");
        assert!(message.len() < 300, "the message must not quote the body");
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

/// Returns the tokens of each sequence that is booked.
fn booked(body: &str) -> Vec<u32> {
    let block = NonZeroU32::new(2).unwrap();
    let sequences = complete(body).sequences(&[], block, 4.0);
    let sequences = std::iter::once(&sequences.first).chain(&sequences.rest);
    sequences.map(|sequence| sequence.tokens()).collect()
}

#[test]
fn each_choice_of_each_prompt_is_a_sequence() {
    let block = NonZeroU32::new(2).unwrap();
    let body = r#"{"n": 2, "prompt": [[1, 2, 3], [4, 5], [1, 2]]}"#;
    assert_eq!(booked(body), [3, 3, 2, 2, 2, 2]);
    let sequences = complete(body).sequences(&[], block, 4.0);
    assert_eq!(
        sequences.prompt_tokens, 7,
        "engines report each prompt once"
    );
    assert_eq!(sequences.first, sequences.rest[0]);
    let first = sequences.first.hashes();
    assert_ne!(first, sequences.rest[1].hashes());
    assert_eq!(first, sequences.rest[3].hashes());

    let texts = r#"{"prompt": ["12345678", "1234", "x"]}"#;
    assert_eq!(booked(texts), [2, 1, 1]);
    let token_ids = vec![None, Some(vec![7, 8, 9]), None];
    let sequences = complete(texts).sequences(&token_ids, block, 4.0);
    assert_eq!(sequences.rest[0].tokens(), 3);
    assert_eq!(sequences.prompt_tokens, 6);

    assert_eq!(booked(r#"{"n": 3, "prompt": [1, 2, 3]}"#), [3, 3, 3]);
    let embedded = parse(Endpoint::Embeddings, r#"{"n": 3, "input": ["abcd", "e"]}"#);
    assert_eq!(embedded.sequences(&[], block, 4.0).rest.len(), 1);
}

#[test]
fn sequences_beyond_the_limit_are_summed_in_the_last() {
    let prompts = |count: usize| vec![json!([1, 2, 3]); count];
    let body = |count, n: u32| json!({"prompt": prompts(count), "n": n}).to_string();
    assert_eq!(booked(&body(MAX_BATCH_PROMPTS, 1)), [3; MAX_BATCH_PROMPTS]);
    for (count, n, rest) in [
        (MAX_BATCH_PROMPTS + 1, 1, 6),
        (1000, 1, 3 * (1000 - 63)),
        // The first 63 sequences belong to 32 prompts.
        (MAX_BATCH_PROMPTS, 2, 3 * 32),
        (1, 1000, 0),
        (2, u32::MAX, 3),
    ] {
        let booked = booked(&body(count, n));
        assert_eq!(booked.len(), MAX_BATCH_PROMPTS, "{count} × {n}");
        let (last, separate) = booked.split_last().unwrap();
        assert!(separate.iter().all(|&tokens| tokens == 3));
        assert_eq!(*last as usize, rest, "{count} × {n}");
    }
    let images = r#"{"input": [{"image": "x"}, "abcd", {"image": "y"}]}"#;
    let request = parse(Endpoint::Embeddings, images);
    let sequences = request.sequences(&[], NonZeroU32::new(2).unwrap(), 4.0);
    assert_eq!(sequences.first.tokens(), 1);
    assert_eq!(sequences.rest[0].tokens() as usize, request.unhashed.tokens);
}

/// A message of a generated conversation.
#[derive(Clone, Debug)]
struct Turn {
    role: String,
    parts: Vec<String>,
    calls: bool,
}

impl Turn {
    /// Returns the message, with its content in one of three forms.
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
    fn the_bytes_of_earlier_turns_are_a_prefix_of_later_ones(
        turns in turns(),
        earlier in any::<prop::sample::Index>(),
        style in any::<u8>(),
        pretty in any::<bool>(),
    ) {
        // Tool calls are compared byte by byte, so their formatting must not differ.
        let pretty = pretty && !turns.iter().any(|turn| turn.calls);
        let earlier = earlier.index(turns.len() + 1);
        let before = conversation(&turns[..earlier], 0, false, false);
        let after = conversation(&turns, style, pretty, true);
        prop_assert!(text(&after).starts_with(text(&before)));
    }

    #[test]
    fn different_conversations_have_different_bytes(a in turns(), b in turns()) {
        let contents = |turns: &[Turn]| -> Vec<_> {
            turns.iter().map(|turn| (turn.role.clone(), turn.parts.concat(), turn.calls)).collect()
        };
        let equal = contents(&a) == contents(&b);
        let a = conversation(&a, 0, false, false);
        let b = conversation(&b, 1, false, false);
        prop_assert_eq!(text(&a) == text(&b), equal);
    }

    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for endpoint in ENDPOINTS {
            let _ = ApiRequest::parse(endpoint, &bytes);
        }
    }

    #[test]
    fn no_json_like_text_causes_a_panic(
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
