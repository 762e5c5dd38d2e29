//! Requests of the Responses and Messages APIs have the token ids that vLLM renders.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;

use foresee_engine::chat_template::ChatTemplate;
use foresee_engine::conversion::Dialect;
use foresee_engine::prompt_encoder::PromptEncoder;
use foresee_engine::request::{ApiRequest, Endpoint};
use foresee_engine::tokenizer::Tokenizer;
use foresee_engine::usage::parse_usage;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::TINY;
use crate::render::post;

/// A line of `rendered.jsonl`, which `tests/apis/make.py` recorded from vLLM 0.32.
#[derive(Deserialize)]
struct Rendered<'l> {
    template: String,
    api: String,
    #[serde(borrow)]
    body: &'l RawValue,
    /// Token ids; `None` if vLLM rejects the body.
    ids: Option<Vec<u32>>,
}

const RENDERED: &str = include_str!("../apis/rendered.jsonl");

fn lines() -> Vec<Rendered<'static>> {
    let lines = RENDERED.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn endpoint(api: &str) -> Endpoint {
    match api {
        "messages" => Endpoint::Messages,
        "responses" => Endpoint::Responses,
        _ => Endpoint::ChatCompletions,
    }
}

/// Returns the ids of a body, or why it has none.
fn encode(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    dialect: Dialect,
    line: &Rendered<'_>,
) -> Result<Vec<u32>, String> {
    let body = line.body.get().as_bytes();
    let endpoint = endpoint(&line.api);
    let request = ApiRequest::parse(endpoint, body).map_err(|error| error.to_string())?;
    let encoder = PromptEncoder {
        tokenizer,
        template: Some(template),
        dialect,
    };
    let ids = encoder.encode(endpoint, &request, &request.prompt, body);
    ids.map_err(|error| error.to_string())
}

#[test]
fn converted_requests_have_the_ids_of_vllm() {
    let tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
    let template = |source| ChatTemplate::from_source(source).unwrap();
    let templates = BTreeMap::from([
        ("tools", template(include_str!("../apis/tools.jinja"))),
        ("parts", template(include_str!("../apis/parts.jinja"))),
    ]);
    let mut equal = BTreeMap::<String, usize>::new();
    let mut different = Vec::new();
    for line in lines() {
        let template = &templates[line.template.as_str()];
        let ours = encode(&tokenizer, template, Dialect::Vllm, &line);
        match (ours, &line.ids) {
            (Ok(ours), Some(ids)) if ours == *ids => *equal.entry(line.api).or_default() += 1,
            // The engine rejects such a body, and ids for it do no harm.
            (_, None) => {}
            (ours, Some(ids)) => different.push(format!(
                "{} {} {}\n  ours {ours:?}\n  vllm {ids:?}",
                line.template, line.api, line.body
            )),
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    assert!(equal["messages"] >= 80 && equal["responses"] >= 90 && equal["chat/completions"] >= 16);
}

/// The test above would prove little if the ids did not depend on what is converted.
#[test]
fn tools_change_the_ids() {
    let ids = |body: Value| {
        let found = lines().into_iter().find(|line| {
            let recorded: Value = serde_json::from_str(line.body.get()).unwrap();
            line.template == "tools" && recorded == body
        });
        found.and_then(|line| line.ids).unwrap()
    };
    let without = serde_json::json!({"model": "tiny", "input": "Hi"});
    let mut with = without.clone();
    with["tools"] = serde_json::json!([{"type": "function", "name": "noop"}]);
    assert_ne!(ids(without), ids(with));
}

/// Optional test: the token counts of an SGLang that serves the tokenizer of `tests/tiny_model` with
/// the template `tests/apis/tools.jinja` are equal to those of the conversion for SGLang.
/// `FORESEE_TEST_SGLANG_URL` is its URL.
#[test]
fn converted_requests_have_the_token_counts_of_sglang() {
    let Ok(url) = std::env::var("FORESEE_TEST_SGLANG_URL") else {
        println!("skipped: set FORESEE_TEST_SGLANG_URL to compare");
        return;
    };
    let address = url.trim_start_matches("http://").trim_end_matches('/');
    let tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
    let template = ChatTemplate::from_source(include_str!("../apis/tools.jinja")).unwrap();
    let (mut equal, mut rejected, mut different) = (0, 0, Vec::new());
    for line in lines().iter().filter(|line| line.template == "tools") {
        let mut body: Value = serde_json::from_str(line.body.get()).unwrap();
        // The effect depends on the server's reasoning parser.
        if body.get("thinking").is_some() {
            continue;
        }
        let (path, limit) = match line.api.as_str() {
            "responses" => ("/v1/responses", "max_output_tokens"),
            "messages" => ("/v1/messages", "max_tokens"),
            _ => ("/v1/chat/completions", "max_tokens"),
        };
        body[limit] = 3.into();
        let (status, response) = post(address, path, &body.to_string());
        let usage = parse_usage(response.to_string().as_bytes());
        let Some(reported) = usage.and_then(|usage| usage.prompt_tokens) else {
            println!("{status} {}: {response}", line.body);
            rejected += 1;
            continue;
        };
        match encode(&tokenizer, &template, Dialect::Sglang, line) {
            Ok(ids) if ids.len() == reported as usize => equal += 1,
            // Such requests are matched as text.
            Err(error) => println!("no ids ({error}): {}", line.body),
            Ok(ids) => different.push(format!(
                "{} {}, not {reported}: {}",
                line.api,
                ids.len(),
                line.body
            )),
        }
    }
    println!("{equal} equal, {rejected} rejected");
    assert!(different.is_empty(), "{}", different.join("\n"));
    assert!(equal > 60);
}
