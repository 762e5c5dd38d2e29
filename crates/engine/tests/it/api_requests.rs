//! Parsing of the request bodies of further APIs.
#![allow(clippy::unwrap_used, missing_docs)]

use std::num::NonZeroU32;

use foresee_engine::chat_template::{ChatTemplate, TemplateError};
use foresee_engine::conversion::{Conversion, Dialect};
use foresee_engine::prompt_encoder::parse_chat;
use foresee_engine::request::{ApiRequest, CompletionFollows, Endpoint, Prompt, UnhashedInput};
use proptest::prelude::*;
use serde_json::{Value, json};

const ENDPOINTS: [Endpoint; 15] = [
    Endpoint::ChatCompletions,
    Endpoint::Completions,
    Endpoint::Embeddings,
    Endpoint::Responses,
    Endpoint::Messages,
    Endpoint::MessagesCountTokens,
    Endpoint::VllmGenerate,
    Endpoint::SglangGenerate,
    Endpoint::Rerank,
    Endpoint::Score,
    Endpoint::Classify,
    Endpoint::Pooling,
    Endpoint::Tokenize,
    Endpoint::Detokenize,
    Endpoint::Other,
];

fn parse(endpoint: Endpoint, body: &Value) -> ApiRequest {
    let text = body.to_string();
    ApiRequest::parse(endpoint, text.as_bytes()).unwrap_or_else(|error| panic!("{body}: {error}"))
}

fn text(request: &ApiRequest) -> &[u8] {
    match &request.prompt {
        Prompt::Text(text) => text,
        Prompt::Tokens(tokens) => panic!("tokens {tokens:?}"),
    }
}

#[test]
fn the_same_conversation_has_the_same_text_in_all_apis() {
    let turns = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
    ]);
    let chat_turns = json!([
        {"role": "system", "content": "Be brief."}, turns[0], turns[1], turns[2],
    ]);
    let chat = parse(Endpoint::ChatCompletions, &json!({"messages": chat_turns}));
    let messages = json!({"system": "Be brief.", "messages": turns, "max_tokens": 5});
    let messages = parse(Endpoint::Messages, &messages);
    let items = json!([
        {"role": "user", "content": "Hi"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "And "}, {"type": "input_text", "text": "now?"}]},
    ]);
    let responses = json!({"instructions": "Be brief.", "input": items, "max_output_tokens": 6});
    let responses = parse(Endpoint::Responses, &responses);
    assert_eq!(text(&messages), text(&chat));
    assert_eq!(text(&responses), text(&chat));
    assert_eq!(messages.max_tokens, Some(5));
    assert_eq!(responses.max_tokens, Some(6));
    for request in [&chat, &messages, &responses] {
        assert_eq!(
            request.completion_follows,
            CompletionFollows::AssistantHeader
        );
        assert!(request.is_fully_hashed());
    }
}

#[test]
fn the_text_of_earlier_turns_is_a_prefix_of_later_ones() {
    let call = json!({"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}});
    let turns = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "?"}, {"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "12"}]}]},
        {"role": "assistant", "content": "It is 12."},
        {"role": "user", "content": "Thanks."},
    ]);
    let turns = turns.as_array().unwrap();
    let tools = json!([{"name": "f", "input_schema": {}}]);
    let parsed: Vec<ApiRequest> = (1..=turns.len())
        .map(|count| {
            let body = json!({"messages": turns[..count], "tools": tools, "max_tokens": 1});
            parse(Endpoint::Messages, &body)
        })
        .collect();
    for pair in parsed.windows(2) {
        assert!(text(&pair[1]).starts_with(text(&pair[0])));
        assert!(text(&pair[1]).len() > text(&pair[0]).len());
    }
    assert!(parsed[0].has_tools);
}

#[test]
fn a_line_that_changes_with_each_request_is_not_part_of_the_text() {
    let header = |number| format!("x-anthropic-billing-header: cch={number};");
    let messages = |number| {
        let system =
            json!([{"type": "text", "text": header(number)}, {"type": "text", "text": "S"}]);
        let body = json!({"system": system, "messages": [{"role": "user", "content": "Hi"}]});
        text(&parse(Endpoint::Messages, &body)).to_vec()
    };
    assert_eq!(messages(1), messages(2));
    let chat = |number| {
        let system = format!("{}\nS", header(number));
        let body = json!({"messages": [{"role": "system", "content": system}]});
        text(&parse(Endpoint::ChatCompletions, &body)).to_vec()
    };
    assert_eq!(chat(1), chat(2));
    let body = json!({"messages": [{"role": "system", "content": "S"}]});
    assert_eq!(chat(1), text(&parse(Endpoint::ChatCompletions, &body)));
}

#[test]
fn a_required_input_is_required() {
    let error = |endpoint, body: Value| {
        ApiRequest::parse(endpoint, body.to_string().as_bytes()).unwrap_err()
    };
    let missing = error(Endpoint::Responses, json!({"model": "m"}));
    assert_eq!(missing.param, Some("input"));
    assert!(missing.message.contains("is missing"), "{missing}");
    let number = error(Endpoint::Responses, json!({"input": 5}));
    assert_eq!(
        number.message,
        "`input` must be a string or an array of items."
    );
    let text = error(Endpoint::Messages, json!({"messages": "Hi"}));
    assert_eq!(text.param, Some("messages"));
    let ids = error(Endpoint::VllmGenerate, json!({"token_ids": [1, "a"]}));
    assert_eq!(ids.param, Some("token_ids"));
    for endpoint in ENDPOINTS {
        if !matches!(
            endpoint,
            Endpoint::ChatCompletions | Endpoint::Responses | Endpoint::Messages
        ) {
            let request = parse(endpoint, &json!({"model": "m"}));
            assert_eq!(request.model, "m");
        }
    }
}

#[test]
fn items_that_are_not_known_end_the_matching_and_are_no_error() {
    let body = json!({"input": [
        {"role": "user", "content": "Hi"},
        {"type": "computer_call", "action": {}},
        {"role": "user", "content": "more"},
        5,
    ]});
    let request = parse(Endpoint::Responses, &body);
    assert!(
        text(&request).ends_with(b"user\xfe"),
        "{:?}",
        request.prompt
    );
    assert!(request.unhashed.tokens > 0 && request.unhashed.bytes > 0);
    let body = json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "document", "source": {}}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": 7},
    ]});
    let request = parse(Endpoint::Messages, &body);
    assert!(
        text(&request).ends_with(b"user\xfea"),
        "{:?}",
        request.prompt
    );
    assert!(!request.is_fully_hashed());
}

#[test]
fn a_request_that_continues_a_stored_response_is_only_counted() {
    let body = json!({"input": "more", "previous_response_id": "resp_1"});
    let request = parse(Endpoint::Responses, &body);
    assert_eq!(request.previous_response_id.as_deref(), Some("resp_1"));
    assert_eq!(text(&request), b"");
    assert!(request.unhashed.bytes > 4);
    assert!(request.continuation(None, NonZeroU32::MIN, 4.0).is_none());
    let chat = parse_chat(
        Endpoint::Responses,
        Conversion::default(),
        body.to_string().as_bytes(),
    );
    assert!(chat.is_err());
}

#[test]
fn a_session_has_a_key() {
    let key = |body: Value| parse(Endpoint::Completions, &body).session_key;
    assert_eq!(key(json!({"prompt_cache_key": "k"})).as_deref(), Some("k"));
    assert_eq!(key(json!({"session_id": "s"})).as_deref(), Some("s"));
    let both = json!({"session_id": "s", "prompt_cache_key": "k"});
    assert_eq!(key(both).as_deref(), Some("k"));
    for none in [
        json!(""),
        json!(5),
        json!(null),
        json!({}),
        json!("x".repeat(257)),
    ] {
        assert_eq!(key(json!({"session_id": none})), None);
    }
    let user = json!({"messages": [], "metadata": {"user_id": "u"}});
    assert_eq!(parse(Endpoint::Messages, &user).session_key, None);
}

#[test]
fn the_same_image_has_the_same_hash_in_all_apis() {
    let url = "https://example.org/cat.png";
    let chat = |part: Value| {
        let body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]});
        parse(Endpoint::ChatCompletions, &body).media_hash
    };
    let messages = |source: Value| {
        let body = json!({"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]});
        parse(Endpoint::Messages, &body).media_hash
    };
    let responses = |image: &str| {
        let part = json!({"type": "input_image", "image_url": image});
        let body = json!({"input": [{"role": "user", "content": [part]}]});
        parse(Endpoint::Responses, &body).media_hash
    };
    let of_url = chat(json!({"type": "image_url", "image_url": {"url": url, "detail": "low"}}));
    assert!(of_url.is_some());
    assert_eq!(messages(json!({"type": "url", "url": url})), of_url);
    assert_eq!(responses(url), of_url);
    let data = "iVBORw0KGgo=".repeat(5_000);
    let data_url = format!("data:image/png;base64,{data}");
    let of_data = chat(json!({"type": "image_url", "image_url": {"url": data_url}}));
    assert!(of_data.is_some() && of_data != of_url);
    let source = json!({"type": "base64", "media_type": "image/png", "data": data});
    assert_eq!(messages(source), of_data);
    assert_eq!(responses(&data_url), of_data);
    // The first image counts, and an id of the client is preferred to the data.
    let with_id = |url: &str| json!({"type": "image_url", "uuid": "u1", "image_url": {"url": url}});
    assert_eq!(chat(with_id("a")), chat(with_id("b")));
    assert_eq!(chat(json!({"type": "text", "text": "y"})), None);
    let in_result = json!({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
        "content": [{"type": "image", "source": {"type": "url", "url": url}}]}]}]});
    assert_eq!(parse(Endpoint::Messages, &in_result).media_hash, of_url);
}

#[test]
fn token_prompts_are_hashed_as_tokens() {
    let body = json!({"model": "m", "token_ids": [1, 2, 3], "stream": true,
        "sampling_params": {"max_tokens": 7, "n": 2, "ignore_eos": true}});
    let request = parse(Endpoint::VllmGenerate, &body);
    assert_eq!(request.prompt, Prompt::Tokens(vec![1, 2, 3]));
    assert_eq!((request.max_tokens, request.choices), (Some(7), 2));
    assert!(request.stream && request.ignore_eos);
    let body =
        json!({"input_ids": [[1, 2], [3]], "text": null, "sampling_params": {"max_new_tokens": 9}});
    let request = parse(Endpoint::SglangGenerate, &body);
    let prompts: Vec<&Prompt> = request.all_prompts().collect();
    assert_eq!(
        prompts,
        [&Prompt::Tokens(vec![1, 2]), &Prompt::Tokens(vec![3])]
    );
    assert_eq!(request.max_tokens, Some(9));
    let body = json!({"text": "Once", "image_data": "https://example.org/cat.png", "sampling_params": [{}]});
    let request = parse(Endpoint::SglangGenerate, &body);
    assert_eq!(text(&request), b"Once");
    assert!(request.media_hash.is_some() && !request.is_fully_hashed());
    assert_eq!(request.completion_follows, CompletionFollows::Prompt);
}

#[test]
fn a_query_counts_once_for_each_document() {
    let bytes = |endpoint, body: Value| parse(endpoint, &body).unhashed;
    let unhashed = |bytes, tokens| UnhashedInput { bytes, tokens };
    let rerank = json!({"query": "abc", "documents": ["1234", "12345"], "max_tokens": 5});
    assert_eq!(bytes(Endpoint::Rerank, rerank.clone()), unhashed(15, 0));
    let request = parse(Endpoint::Rerank, &rerank);
    assert_eq!(
        (text(&request), request.prompts, request.choices),
        (&b""[..], 1, 1)
    );
    let sequences = request.sequences(&[], NonZeroU32::MIN, 4.0);
    assert_eq!(sequences.prompt_tokens, 4);
    let score = json!({"text_1": ["a", "bb"], "text_2": ["c", "dd"], "n": 3});
    assert_eq!(bytes(Endpoint::Score, score.clone()), unhashed(6, 0));
    assert_eq!(parse(Endpoint::Score, &score).choices, 1);
    let items = json!({"query": [1, 2, 3], "items": [[1], [2, 3]]});
    assert_eq!(bytes(Endpoint::Score, items), unhashed(0, 9));
    let many: Vec<String> = (0..500).map(|_| "x".repeat(10)).collect();
    let many = json!({"query": "q", "documents": many});
    assert_eq!(bytes(Endpoint::Rerank, many), unhashed(5_500, 0));
}

#[test]
fn bodies_of_other_apis_are_only_skimmed() {
    let body = json!({"model": "m", "stream": true, "max_completion_tokens": 3, "max_tokens": 4,
        "messages": 5, "input": {"deep": [[[]]]}, "prompt": ["x"], "tools": [1]});
    let request = parse(Endpoint::Other, &body);
    assert_eq!((request.model.as_str(), request.max_tokens), ("m", Some(3)));
    assert!(request.stream && request.is_fully_hashed());
    assert_eq!(text(&request), b"");
    let count = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
    assert_eq!(text(&parse(Endpoint::MessagesCountTokens, &count)), b"");
}

/// Renders the roles, contents and tools of a request.
fn render(dialect: Dialect, endpoint: Endpoint, body: &Value) -> Result<String, TemplateError> {
    let template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}\
                    {% for tool in tools or [] %}{{ tool.function | tojson }}{% endfor %}";
    let template = ChatTemplate::from_source(template).unwrap();
    let conversion = Conversion {
        dialect,
        merges_system: template.needs_leading_system(dialect),
    };
    let chat = parse_chat(endpoint, conversion, body.to_string().as_bytes())?;
    template.render(&chat)
}

/// The differences of SGLang's conversion from vLLM's, by its source.
#[test]
fn sglangs_conversion_keeps_the_order_of_texts_and_tool_results() {
    let render = |dialect, endpoint, body: &Value| render(dialect, endpoint, body).unwrap();
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": "r"});
    let body = json!({
        "system": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, result, {"type": "text", "text": "y"}]}],
    });
    let vllm = render(Dialect::Vllm, Endpoint::Messages, &body);
    assert_eq!(vllm, "[system:AB][tool:r][user:x\ny]");
    let sglang = render(Dialect::Sglang, Endpoint::Messages, &body);
    assert_eq!(sglang, "[system:A\nB][user:x][tool:r][user:y]");
    let assistant = |text| json!({"role": "assistant", "content": text});
    let output = json!([{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]);
    let body = json!({"input": [
        {"role": "developer", "content": "D"},
        assistant("a"), assistant("b"),
        {"type": "function_call_output", "call_id": "c", "output": output},
    ]});
    let vllm = render(Dialect::Vllm, Endpoint::Responses, &body);
    assert_eq!(vllm, "[system:D][assistant:a][assistant:b][tool:1\n2]");
    let sglang = render(Dialect::Sglang, Endpoint::Responses, &body);
    assert_eq!(
        sglang,
        "[system:Developer instructions:\nD][assistant:a\n\nb][tool:12]"
    );
}

#[test]
fn sglang_renders_parts_and_tools_in_its_own_way() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]);
    let tool = |name| json!({"type": "function", "function": {"parameters": {}, "name": name, "x": 1, "strict": null}});
    let body = json!({
        "messages": [{"role": "system", "content": "x-anthropic-billing-header: 1\nS"}, {"role": "user", "content": parts}],
        "tools": [tool("f"), tool("g")],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    });
    let vllm = render(Dialect::Vllm, Endpoint::ChatCompletions, &body).unwrap();
    let function =
        |name| format!(r#"{{"name": "{name}", "description": null, "parameters": {{}}}}"#);
    assert_eq!(
        vllm,
        format!("[system:S][user:a\nb]{}{}", function("f"), function("g"))
    );
    // `json!` sorts the keys.
    let sglang = render(Dialect::Sglang, Endpoint::ChatCompletions, &body).unwrap();
    assert_eq!(
        sglang,
        "[system:x-anthropic-billing-header: 1\nS][user:a  b]{\"name\": \"f\", \"parameters\": {}, \"description\": null}"
    );
    let tools = json!([{"name": "f", "input_schema": {"type": "object"}}]);
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "tools": tools});
    let sglang = render(Dialect::Sglang, Endpoint::Messages, &body).unwrap();
    assert_eq!(
        sglang,
        r#"[user:Hi]{"name": "f", "description": "", "parameters": {"type": "object"}, "strict": false}"#
    );
    body["tool_choice"] = json!({"type": "none"});
    let sglang = render(Dialect::Sglang, Endpoint::Messages, &body).unwrap();
    assert_eq!(sglang, "[user:Hi]");
    let thinking = json!({"type": "thinking", "thinking": "?"});
    let body = json!({"messages": [{"role": "assistant", "content": [thinking]}]});
    assert!(render(Dialect::Sglang, Endpoint::Messages, &body).is_err());
}

#[test]
fn a_later_system_message_is_moved_if_the_template_needs_it() {
    let needs = |source: &str| {
        let template = ChatTemplate::from_source(source).unwrap();
        [Dialect::Vllm, Dialect::Sglang].map(|dialect| template.needs_leading_system(dialect))
    };
    assert_eq!(
        needs("{% for m in messages %}{{ m.content }}{% endfor %}"),
        [false, false]
    );
    let rejects = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}{% endfor %}";
    assert_eq!(needs(rejects), [true, true]);
    let ignores = "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}";
    assert_eq!(needs(ignores), [false, true]);
}

proptest! {
    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for endpoint in ENDPOINTS {
            let _ = ApiRequest::parse(endpoint, &bytes);
        }
    }

    #[test]
    fn no_items_cause_a_panic(
        items in prop::collection::vec(
            "(\"type\"|\"role\"|\"content\"|\"text\"|\"message\"|\"function_call\"|\"reasoning\"|\"tool_use\"|\"tool_result\"|\"user\"|\"assistant\"|\"system\"|\"input\"|\"tool\"|\"name\"|\"source\"|null|1|true|\\[\\]|\\{\\}|:|,|\\[|\\]|\\{|\\}){0,24}",
            0..4,
        ),
        valid in prop::bool::ANY,
    ) {
        // Half of the bodies have items that are at least objects with a known type.
        let items: Vec<String> = items.into_iter().map(|item| match valid {
            true => format!("{{\"type\":\"message\",\"role\":\"user\",\"content\":[{{\"type\":\"text\",\"text\":{}}}]}}", json!(item)),
            false => item,
        }).collect();
        let list = items.join(",");
        for dialect in [Dialect::Vllm, Dialect::Sglang] {
            for merges_system in [false, true] {
                let conversion = Conversion { dialect, merges_system };
                for (endpoint, field) in [(Endpoint::Responses, "input"), (Endpoint::Messages, "messages")] {
                    let body = format!("{{\"{field}\":[{list}]}}");
                    let _ = ApiRequest::parse(endpoint, body.as_bytes());
                    let _ = parse_chat(endpoint, conversion, body.as_bytes());
                }
            }
        }
    }
}
