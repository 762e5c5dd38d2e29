//! With a tokenizer, prompts are matched as tokens for as long as the engine's token counts agree.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;

use crate::TINY;
use crate::fake_worker::*;
use foresee_gateway::{Gateway, StartError};
use serde_json::json;

/// Sends a chat, and lets the worker report `prompt_tokens` for its prompt.
async fn send_chat(gateway: &Gateway, worker: &mut FakeWorker, prompt_tokens: u32) {
    let mut client =
        Client::sending(gateway.address(), http("POST", CHAT, chat("Hello", false))).await;
    let usage = json!({"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}});
    let exchange = worker.request().await;
    exchange.respond_json(&usage.to_string()).await;
    assert_eq!(client.response().await.status(), 200);
}

/// Returns the value of a metric, given by its name and label; 0 if it does not exist.
async fn metric(gateway: &Gateway, name: &str) -> u32 {
    let response = call(gateway.admin_address(), "GET", "/metrics", "").await;
    let value = response
        .text()
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.unwrap_or(0)
}

const AS_TOKENS: &str = "foresee_tokenized_prompts_total{result=\"tokens\"}";
const SUSPENDED: &str = "foresee_tokenized_prompts_total{result=\"suspended\"}";
const EQUAL: &str = "foresee_token_parity_total{result=\"equal\"}";
const DIFFERENT: &str = "foresee_token_parity_total{result=\"different\"}";

#[tokio::test]
async fn token_counts_of_engines_are_compared_with_the_tokenizers() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.tokenizer = Some(Path::new(TINY).to_owned());
    let gateway = gateway_with(config).await;

    let tokenizer = foresee_engine::tokenizer::Tokenizer::load(Path::new(TINY)).unwrap();
    let text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    let framing = foresee_engine::tokenizer::SpecialTokens::AlreadyPresent;
    let tokens = tokenizer.encode(text, framing).unwrap().len() as u32;

    send_chat(&gateway, &mut worker, tokens).await;
    assert_eq!(metric(&gateway, AS_TOKENS).await, 1);
    assert_eq!(metric(&gateway, EQUAL).await, 1);

    for _ in 0..4 {
        send_chat(&gateway, &mut worker, tokens + 9).await;
    }
    assert_eq!(metric(&gateway, DIFFERENT).await, 4);
    send_chat(&gateway, &mut worker, tokens).await;
    assert_eq!(metric(&gateway, AS_TOKENS).await, 5);
    assert_eq!(metric(&gateway, SUSPENDED).await, 1);
    assert_eq!(metric(&gateway, EQUAL).await, 1, "nothing left to compare");
}

#[tokio::test]
async fn a_prompt_longer_than_the_models_context_occupies_no_blocks() {
    let mut worker = FakeWorker::start().await;
    let card = json!({ "id": MODEL, "max_model_len": 100 });
    worker.set_model_list(&json!({ "object": "list", "data": [card] }).to_string());
    let mut config = config(&[&worker]);
    config.tokenizer = Some(Path::new(TINY).to_owned());
    let gateway = gateway_with(config).await;
    for (words, has_blocks) in [(50, true), (500, false)] {
        let request = http("POST", CHAT, chat(&"one ".repeat(words), false));
        let mut client = Client::sending(gateway.address(), request).await;
        // The engine decides: it gets the request in any case.
        let exchange = worker.request().await;
        let shown = worker_json(&gateway, "a").await.unwrap();
        assert_eq!(shown["active_blocks"] != 0, has_blocks, "{words} words");
        exchange
            .respond(whole("400 Bad Request", "application/json", "{}"))
            .await;
        assert_eq!(client.response().await.status(), 400);
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn an_unreadable_tokenizer_fails_the_start() {
    let mut config = config(&[]);
    config.tokenizer = Some(Path::new("/nowhere").to_owned());
    let error = Gateway::start(config).unwrap_err();
    assert!(matches!(error, StartError::Tokenizer(_)), "{error}");
}
