//! Each output of each prompt in a body has a booking, on the worker that receives the body.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_core::policy;
use foresee_gateway::Gateway;
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

/// Returns a prompt of two blocks that all prompts share, and a third block of its own.
fn prompt(last: u32) -> Vec<u32> {
    (0..32).chain(1000 * last..1000 * last + 16).collect()
}

fn body(prompts: &[Vec<u32>], n: u32, stream: bool) -> String {
    json!({"model": MODEL, "prompt": prompts, "n": n, "stream": stream, "max_tokens": 50})
        .to_string()
}

/// Returns one event of a choice.
fn choice_event(index: usize, text: &str, finish_reason: Value) -> String {
    let event =
        json!({"choices": [{"index": index, "text": text, "finish_reason": finish_reason}]});
    format!("data: {event}\n\n")
}

async fn sent(gateway: &Gateway, body: String) -> Client {
    Client::sending(gateway.address(), http("POST", COMPLETIONS, body)).await
}

#[tokio::test]
async fn each_output_grows_and_ends_on_its_own() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = sent(&gateway, body(&[prompt(1), prompt(2), prompt(3)], 2, true)).await;
    let mut exchange = worker.request().await;
    let load = || {
        let worker = workers(&gateway).remove("a").unwrap();
        (worker.requests, worker.active_blocks, worker.context_tokens)
    };
    // Two shared blocks, and one of each prompt.
    assert_eq!(load(), (6, 5, 6 * 48));
    assert_eq!(gateway.router().booking_count(), 6);

    exchange.start_stream().await;
    for _ in 0..17 {
        exchange.send_chunk(choice_event(3, "x", Value::Null)).await;
    }
    exchange.send_chunk(choice_event(0, "y", Value::Null)).await;
    let head = client.head().await;
    // Every output but the first finds two blocks cached; the last block is always computed.
    assert_eq!(head.get("x-foresee-overlap-tokens"), Some("160"));
    until("two outputs to have grown", || load().2 == 6 * 48 + 18).await;
    assert_eq!(load().1, 5 + 2 + 1);

    exchange
        .send_chunk(choice_event(3, "", json!("length")))
        .await;
    until("one output to be released", || load().0 == 5).await;
    assert_eq!((load().1, load().2), (5 + 1, 5 * 48 + 1));
    exchange.end_stream().await;
    client.rest().await.unwrap();
    until_released(&gateway).await;
    let text = metrics(&gateway).await;
    let total = |name: &str| value(&text, name);
    assert_eq!(total("foresee_prompt_tokens_total"), Some(3.0 * 48.0));
    assert_eq!(total("foresee_output_tokens_total"), Some(18.0));
    let predicted = "foresee_overlap_blocks_total{kind=\"predicted\"}";
    assert_eq!(total(predicted), Some(10.0));
}

#[tokio::test]
async fn a_failed_batch_moves_as_a_whole() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let mut client = sent(&gateway, body(&[prompt(1), prompt(2)], 1, false)).await;
    first.request().await.reset();
    let exchange = second.request().await;
    let load = |name: &str| {
        let worker = workers(&gateway).remove(name).unwrap();
        (worker.requests, worker.active_blocks, worker.context_tokens)
    };
    assert_eq!(load("a"), (0, 0, 0));
    assert_eq!(load("b"), (2, 4, 96));
    let usage = json!({"usage": {"prompt_tokens": 96, "completion_tokens": 8}});
    exchange.respond_json(usage.to_string()).await;
    let response = client.response().await;
    assert_eq!(response.head.get("x-foresee-worker"), Some("b"));
    assert_eq!(response.head.get("x-foresee-overlap-tokens"), Some("32"));
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_batch_is_routed_to_the_worker_with_its_prompts() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    config.router.policy = policy::KV;
    let gateway = gateway_with(config).await;
    let mut chosen = None;
    // The second time, both prompts are cached, except the block with the last token.
    for overlap in ["0", "64"] {
        let prompts = [prompt(1), (500..548).collect()];
        let mut client = sent(&gateway, body(&prompts, 1, false)).await;
        let mut exchange = None;
        until("a request to reach a worker", || {
            exchange = first.try_request().or_else(|| second.try_request());
            exchange.is_some()
        })
        .await;
        exchange.unwrap().respond_json("{}").await;
        let response = client.response().await;
        let found = response.head.get("x-foresee-overlap-tokens");
        assert_eq!(found, Some(overlap));
        let worker = response.head.get("x-foresee-worker").map(str::to_owned);
        assert_eq!(chosen.get_or_insert_with(|| worker.clone()), &worker);
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn the_number_of_bookings_of_a_batch_is_bounded() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let prompts: Vec<Vec<u32>> = (0..10_000).map(|last| vec![last; 3]).collect();
    let mut client = sent(&gateway, body(&prompts, 1, true)).await;
    let mut exchange = worker.request().await;
    let load = || workers(&gateway).remove("a").unwrap();
    assert_eq!(load().requests as usize, MAX_BATCH_PROMPTS);
    assert_eq!(load().context_tokens, 30_000);
    exchange.start_stream().await;
    for index in [0, 5_000, 9_999] {
        exchange
            .send_chunk(choice_event(index, "x", json!("stop")))
            .await;
    }
    client.head().await;
    until("three outputs to be counted", || {
        load().context_tokens == 30_000 - 3 + 2
    })
    .await;
    assert_eq!(load().requests as usize, MAX_BATCH_PROMPTS - 1);
    exchange.end_stream().await;
    client.rest().await.unwrap();
    until_released(&gateway).await;
}

/// Sends a text completion, lets any worker respond, and returns the predicted overlap in tokens.
async fn overlap(gateway: &Gateway, workers: &mut [&mut FakeWorker], body: Value) -> u32 {
    let mut client = sent(gateway, body.to_string()).await;
    let mut exchange = None;
    until("a request to reach a worker", || {
        exchange = workers.iter_mut().find_map(|worker| worker.try_request());
        exchange.is_some()
    })
    .await;
    exchange.unwrap().respond_json("{}").await;
    let response = client.response().await;
    until_released(gateway).await;
    let overlap = response.head.get("x-foresee-overlap-tokens").unwrap();
    overlap.parse().unwrap()
}

#[tokio::test]
async fn a_request_without_a_model_is_matched_as_the_only_model() {
    let mut worker = FakeWorker::serving(&["base", "adapter"]).await;
    let gateway = gateway(&[&worker]).await;
    let named = |model: &str| json!({"model": model, "prompt": prompt(1)});
    let unnamed = json!({"prompt": prompt(1)});
    assert_eq!(
        overlap(&gateway, &mut [&mut worker], named("base")).await,
        0
    );
    assert_eq!(overlap(&gateway, &mut [&mut worker], unnamed).await, 32);
    assert_eq!(
        overlap(&gateway, &mut [&mut worker], named("adapter")).await,
        0
    );
}

#[tokio::test]
async fn a_request_without_a_model_matches_only_others_like_it_where_workers_differ() {
    let mut first = FakeWorker::serving(&["m1"]).await;
    let mut second = FakeWorker::serving(&["m2"]).await;
    let gateway = gateway(&[&first, &second]).await;
    let body = |model: &str| json!({"model": model, "prompt": prompt(1)});
    for model in ["m1", "m2"] {
        assert_eq!(
            overlap(&gateway, &mut [&mut first, &mut second], body(model)).await,
            0
        );
    }
    let unnamed = json!({"prompt": prompt(1)});
    for _ in 0..2 {
        let found = overlap(&gateway, &mut [&mut first, &mut second], unnamed.clone()).await;
        assert_eq!(found, 0);
    }
    // They go to the workers in turn, and each worker has received one.
    let found = overlap(&gateway, &mut [&mut first, &mut second], unnamed).await;
    assert_eq!(found, 32);

    // Once the other worker is removed, there is only one model.
    call(gateway.admin_address(), "DELETE", "/admin/workers/b", "").await;
    until("the worker to be gone", || workers(&gateway).len() == 1).await;
    let renamed = json!({"prompt": prompt(7)});
    assert_eq!(overlap(&gateway, &mut [&mut first], renamed).await, 32);
}
