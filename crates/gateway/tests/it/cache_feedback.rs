//! Output that a response leaves in the cache of a worker without events is predicted for the next turn.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;

use crate::TINY;
use crate::fake_worker::*;
use foresee_gateway::Gateway;
use serde_json::{Value, json};

const QUESTION: &str = "What does this function return, and where is it used?";

fn turns(messages: &[(&str, &str)], stream: bool) -> String {
    let messages = messages
        .iter()
        .map(|(role, text)| json!({"role": role, "content": text}));
    let messages: Vec<Value> = messages.collect();
    json!({"model": MODEL, "stream": stream, "messages": messages}).to_string()
}

/// Returns the number of blocks of the next turn that are predicted to be cached.
async fn predicted(gateway: &Gateway, response: &str) -> u64 {
    let next = [
        ("user", QUESTION),
        ("assistant", response),
        ("user", "And then?"),
    ];
    let body = turns(&next, false);
    let explained = call(gateway.admin_address(), "POST", "/admin/explain", body).await;
    let candidate = &explained.json()["candidates"][0];
    candidate["overlap_cached_blocks"].as_u64().unwrap()
}

/// Sends the question and responds with `chunks`: one event for each, or one body.
async fn respond_to_question(
    gateway: &Gateway,
    worker: &mut FakeWorker,
    chunks: &[&str],
    streamed: bool,
) {
    let request = http("POST", CHAT, turns(&[("user", QUESTION)], streamed));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    if streamed {
        exchange.start_stream().await;
        for chunk in chunks {
            exchange.send_chunk(token(chunk)).await;
        }
        exchange.end_stream().await;
        client.head().await;
        client.rest().await.unwrap();
    } else {
        let usage = json!({"completion_tokens": chunks.len()});
        let choice = json!({"index": 0, "message": {"content": chunks.concat()}});
        let body = json!({"choices": [choice], "usage": usage});
        exchange.respond_json(body.to_string()).await;
        client.response().await;
    }
    until_released(gateway).await;
}

/// Returns forty words, each a token of the tiny model.
fn words() -> Vec<&'static str> {
    let words = [" return", " the", " value", " of", " class"];
    words.into_iter().cycle().take(40).collect()
}

#[tokio::test]
async fn the_next_turn_finds_the_output_by_text() {
    for streamed in [true, false] {
        let mut worker = FakeWorker::start().await;
        let gateway = gateway(&[&worker]).await;
        respond_to_question(&gateway, &mut worker, &words(), streamed).await;
        let text = words().concat();
        // A text block is 64 bytes. It is unknown whether the last 4 bytes are stored.
        let prompt = b"\xffuser\xfe\xffassistant\xfe".len() + QUESTION.len();
        let stored = prompt + text.len() - 4;
        assert_eq!(predicted(&gateway, &text).await, stored as u64 / 64);
        let other = predicted(&gateway, "Nothing").await;
        assert_eq!(other, prompt as u64 / 64);
    }
}

#[tokio::test]
async fn the_next_turn_finds_the_output_by_tokens() {
    for streamed in [true, false] {
        let mut worker = FakeWorker::start().await;
        let mut config = config(&[&worker]);
        config.tokenizer = Some(Path::new(TINY).to_owned());
        let gateway = gateway_with(config).await;
        respond_to_question(&gateway, &mut worker, &words(), streamed).await;

        let tokenizer = foresee_engine::tokenizer::Tokenizer::load(Path::new(TINY)).unwrap();
        let framing = foresee_engine::tokenizer::SpecialTokens::AlreadyPresent;
        let stored = format!(
            "<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{}",
            words().concat()
        );
        let stored = tokenizer.encode(&stored, framing).unwrap().len() - 1;
        let found = predicted(&gateway, &words().concat()).await;
        assert_eq!(found, stored as u64 / 16);
    }
}

#[tokio::test]
async fn an_aborted_output_is_known_up_to_the_abort() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, turns(&[("user", QUESTION)], true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    for (index, word) in words().into_iter().enumerate() {
        exchange.send_chunk(token(word)).await;
        if index == 0 {
            client.head().await;
        }
        client.chunk().await;
    }
    drop(client);
    exchange.closed().await;
    until_released(&gateway).await;
    let text = words().concat();
    let bytes = b"\xffuser\xfe\xffassistant\xfe".len() + QUESTION.len() + text.len();
    assert_eq!(predicted(&gateway, &text).await, bytes as u64 / 64 - 1);
}

#[tokio::test]
async fn a_long_output_is_tokenised_off_the_io_threads() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.tokenizer = Some(Path::new(TINY).to_owned());
    let gateway = gateway_with(config).await;
    let words: Vec<&str> = words().into_iter().cycle().take(2_000).collect();
    respond_to_question(&gateway, &mut worker, &words, true).await;
    assert!(predicted(&gateway, &words.concat()).await > 120);
}

#[tokio::test]
async fn an_unobserved_loss_of_the_cache_is_detected_from_reported_hits() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let prompt = |number: usize| format!("Document {number}: {}", "word ".repeat(100));
    let mut predictions = Vec::new();
    for (round, hits) in [(0, 0), (1, 8), (2, 0), (2, 0)] {
        for number in 0..10 {
            let request = http("POST", CHAT, chat(&prompt(number), false));
            let mut client = Client::sending(gateway.address(), request).await;
            // After the loss each document is computed once.
            let hits = if round == 2 && predictions.len() >= 30 {
                8
            } else {
                hits
            };
            let usage = json!({
                "prompt_tokens": 131,
                "prompt_tokens_details": {"cached_tokens": 16 * hits},
            });
            let exchange = worker.request().await;
            exchange
                .respond_json(json!({ "usage": usage }).to_string())
                .await;
            let response = client.response().await;
            let predicted: u64 = response
                .head
                .get("x-foresee-overlap-tokens")
                .unwrap()
                .parse()
                .unwrap();
            predictions.push(predicted / 16);
        }
    }
    assert_eq!(predictions[..10], [0; 10]);
    assert_eq!(predictions[10..20], [8; 10]);
    assert_eq!(predictions[20..24], [8; 4], "the loss was not reported");
    assert_eq!(predictions[24..30], [0; 6]);
    assert_eq!(predictions[30..], [8; 10]);
    let worker = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(worker["capacity_source"], "assumed");
}
