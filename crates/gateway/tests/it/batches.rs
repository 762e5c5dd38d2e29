//! Every answer to every prompt of a body has its booking, all on the worker that gets the body.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use foresee_core::batch::MOST_IN_BATCH;
use foresee_core::choose::Policy;
use foresee_gateway::Gateway;
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

/// A prompt of two blocks that others share and a third that they do not.
fn prompt(last: u32) -> Vec<u32> {
    (0..32).chain(1000 * last..1000 * last + 16).collect()
}

fn body(prompts: &[Vec<u32>], n: u32, stream: bool) -> String {
    json!({"model": MODEL, "prompt": prompts, "n": n, "stream": stream, "max_tokens": 50})
        .to_string()
}

/// One event of a choice.
fn piece(index: usize, text: &str, finish_reason: Value) -> String {
    let event =
        json!({"choices": [{"index": index, "text": text, "finish_reason": finish_reason}]});
    format!("data: {event}\n\n")
}

async fn sent(gateway: &Gateway, body: String) -> Client {
    Client::sending(gateway.address(), http("POST", COMPLETIONS, body)).await
}

#[tokio::test]
async fn each_answer_grows_and_ends_by_itself() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = sent(&gateway, body(&[prompt(1), prompt(2), prompt(3)], 2, true)).await;
    let mut exchange = worker.request().await;
    let held = || {
        let worker = workers(&gateway).remove("a").unwrap();
        (worker.requests, worker.active_blocks, worker.context_tokens)
    };
    // Two shared blocks, and one of each prompt.
    assert_eq!(held(), (6, 5, 6 * 48));
    assert_eq!(gateway.router().bookings(), 6);

    exchange.start_stream().await;
    for _ in 0..17 {
        exchange.send_chunk(piece(3, "x", Value::Null)).await;
    }
    exchange.send_chunk(piece(0, "y", Value::Null)).await;
    let head = client.head().await;
    // Every answer but the first finds two blocks; the last of a prompt is always computed.
    assert_eq!(head.get("x-foresee-overlap-tokens"), Some("160"));
    until("two answers to have grown", || held().2 == 6 * 48 + 18).await;
    assert_eq!(held().1, 5 + 2 + 1);

    exchange.send_chunk(piece(3, "", json!("length"))).await;
    until("one answer to be free", || held().0 == 5).await;
    assert_eq!((held().1, held().2), (5 + 1, 5 * 48 + 1));
    exchange.end_stream().await;
    client.rest().await.unwrap();
    freed(&gateway).await;
    let text = metrics(&gateway).await;
    let total = |name: &str| value(&text, name);
    assert_eq!(total("foresee_prompt_tokens_total"), Some(3.0 * 48.0));
    assert_eq!(total("foresee_output_tokens_total"), Some(18.0));
    let predicted = "foresee_overlap_blocks_total{kind=\"predicted\"}";
    assert_eq!(total(predicted), Some(10.0));
}

#[tokio::test]
async fn a_batch_that_fails_moves_whole() {
    let (mut one, mut two) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&one, &two]).await;
    let mut client = sent(&gateway, body(&[prompt(1), prompt(2)], 1, false)).await;
    one.request().await.reset();
    let exchange = two.request().await;
    let held = |name: &str| {
        let worker = workers(&gateway).remove(name).unwrap();
        (worker.requests, worker.active_blocks, worker.context_tokens)
    };
    assert_eq!(held("a"), (0, 0, 0));
    assert_eq!(held("b"), (2, 4, 96));
    let usage = json!({"usage": {"prompt_tokens": 96, "completion_tokens": 8}});
    exchange.answer_json(usage.to_string()).await;
    let answer = client.answer().await;
    assert_eq!(answer.head.get("x-foresee-worker"), Some("b"));
    assert_eq!(answer.head.get("x-foresee-overlap-tokens"), Some("32"));
    freed(&gateway).await;
}

#[tokio::test]
async fn a_batch_goes_where_its_prompts_are_cached() {
    let (mut one, mut two) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&one, &two]);
    config.router.policy = Policy::Kv;
    let gateway = gateway_with(config).await;
    let mut chosen = None;
    // The second time, both prompts are there, less the block that holds the last token.
    for overlap in ["0", "64"] {
        let prompts = [prompt(1), (500..548).collect()];
        let mut client = sent(&gateway, body(&prompts, 1, false)).await;
        let mut exchange = None;
        until("a worker to be asked", || {
            exchange = one.try_request().or_else(|| two.try_request());
            exchange.is_some()
        })
        .await;
        exchange.unwrap().answer_json("{}").await;
        let answer = client.answer().await;
        let found = answer.head.get("x-foresee-overlap-tokens");
        assert_eq!(found, Some(overlap));
        let worker = answer.head.get("x-foresee-worker").map(str::to_owned);
        assert_eq!(chosen.get_or_insert_with(|| worker.clone()), &worker);
        freed(&gateway).await;
    }
}

#[tokio::test]
async fn ten_thousand_prompts_are_not_ten_thousand_bookings() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let prompts: Vec<Vec<u32>> = (0..10_000).map(|last| vec![last; 3]).collect();
    let mut client = sent(&gateway, body(&prompts, 1, true)).await;
    let mut exchange = worker.request().await;
    let held = || workers(&gateway).remove("a").unwrap();
    assert_eq!(held().requests as usize, MOST_IN_BATCH);
    assert_eq!(held().context_tokens, 30_000);
    exchange.start_stream().await;
    for index in [0, 5_000, 9_999] {
        exchange.send_chunk(piece(index, "x", json!("stop"))).await;
    }
    client.head().await;
    until("three answers to be counted", || {
        held().context_tokens == 30_000 - 3 + 2
    })
    .await;
    assert_eq!(held().requests as usize, MOST_IN_BATCH - 1);
    exchange.end_stream().await;
    client.rest().await.unwrap();
    freed(&gateway).await;
}

/// Sends a text completion, has any worker answer it, and says how many tokens were found.
async fn overlap(gateway: &Gateway, workers: &mut [&mut FakeWorker], body: Value) -> u32 {
    let mut client = sent(gateway, body.to_string()).await;
    let mut exchange = None;
    until("a worker to be asked", || {
        exchange = workers.iter_mut().find_map(|worker| worker.try_request());
        exchange.is_some()
    })
    .await;
    exchange.unwrap().answer_json("{}").await;
    let answer = client.answer().await;
    freed(gateway).await;
    let overlap = answer.head.get("x-foresee-overlap-tokens").unwrap();
    overlap.parse().unwrap()
}

#[tokio::test]
async fn a_request_without_a_model_is_for_the_one_there_is() {
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
async fn without_a_model_nothing_is_assumed_where_workers_differ() {
    let mut one = FakeWorker::serving(&["m1"]).await;
    let mut two = FakeWorker::serving(&["m2"]).await;
    let gateway = gateway(&[&one, &two]).await;
    let body = |model: &str| json!({"model": model, "prompt": prompt(1)});
    for model in ["m1", "m2"] {
        assert_eq!(
            overlap(&gateway, &mut [&mut one, &mut two], body(model)).await,
            0
        );
    }
    let unnamed = json!({"prompt": prompt(1)});
    for _ in 0..2 {
        let found = overlap(&gateway, &mut [&mut one, &mut two], unnamed.clone()).await;
        assert_eq!(found, 0);
    }
    // They go to each worker in turn, and each has seen one by now.
    let found = overlap(&gateway, &mut [&mut one, &mut two], unnamed).await;
    assert_eq!(found, 32);

    // Once the other is gone, it is known again.
    call(gateway.admin_address(), "DELETE", "/admin/workers/b", "").await;
    until("the worker to be gone", || workers(&gateway).len() == 1).await;
    let renamed = json!({"prompt": prompt(7)});
    assert_eq!(overlap(&gateway, &mut [&mut one], renamed).await, 32);
}
