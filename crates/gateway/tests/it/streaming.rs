//! Streams are observed as they pass: each token increases the load, and the end releases it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use crate::fake_worker::*;
use foresee_gateway::Gateway;
use serde_json::json;

async fn active_blocks(gateway: &Gateway) -> u64 {
    let worker = worker_json(gateway, "a").await.unwrap();
    worker["active_blocks"].as_u64().unwrap()
}

async fn context_tokens(gateway: &Gateway) -> u64 {
    let worker = worker_json(gateway, "a").await.unwrap();
    worker["context_tokens"].as_u64().unwrap()
}

/// Returns a streaming client and its exchange on the worker, after the response's head was sent.
async fn streaming(gateway: &Gateway, worker: &mut FakeWorker) -> (Client, Exchange) {
    let request = http("POST", CHAT, chat("a short prompt", true));
    let client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    (client, exchange)
}

#[tokio::test]
async fn tokens_grow_the_booking_and_the_end_releases_it() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let (mut client, mut exchange) = streaming(&gateway, &mut worker).await;
    let before = active_blocks(&gateway).await;
    let context = context_tokens(&gateway).await;
    assert!(before > 0, "a request is counted before its first byte");

    // An event with the role and a comment contain no token.
    let role = json!({"choices": [{"delta": {"role": "assistant", "content": ""}}]});
    exchange.send_chunk(format!("data: {role}\n\n")).await;
    assert_eq!(client.head().await.status(), 200);
    client.chunk().await;
    exchange.send_chunk(": ping\n\n").await;
    client.chunk().await;
    assert_eq!(context_tokens(&gateway).await, context);

    for count in 1..=64 {
        exchange.send_chunk(token("é")).await;
        client.chunk().await;
        assert_eq!(context_tokens(&gateway).await, context + count);
    }
    let worker_a = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(active_blocks(&gateway).await, before + 64 / 16);
    assert_eq!(worker_a["prefill_tokens"], 0);
    assert_eq!(worker_a["requests"], 1);

    exchange.end_stream().await;
    assert_eq!(client.rest().await.unwrap(), "data: [DONE]\n\n");
    until_released(&gateway).await;
    assert_eq!(active_blocks(&gateway).await, 0);
    assert_eq!(context_tokens(&gateway).await, 0);
    let text = metrics(&gateway).await;
    assert_eq!(value(&text, "foresee_output_tokens_total"), Some(64.0));
    let ttft_count = "foresee_time_to_first_token_seconds_count";
    assert_eq!(value(&text, ttft_count), Some(1.0));
    let itl_count = "foresee_inter_token_latency_seconds_count";
    assert_eq!(value(&text, itl_count), Some(63.0));
    let ok = "foresee_requests_total{outcome=\"ok\"}";
    assert_eq!(value(&text, ok), Some(1.0));
}

#[tokio::test]
async fn tokens_are_counted_wherever_the_stream_is_cut() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let (mut client, mut exchange) = streaming(&gateway, &mut worker).await;
    let context = context_tokens(&gateway).await;
    // Three tokens, with each byte in a chunk of its own.
    let stream = [token("é"), token("\u{1F600}\\n"), token("z")].concat();
    for byte in stream.as_bytes() {
        exchange.send_chunk([*byte]).await;
    }
    client.head().await;
    let mut received = Vec::new();
    while received.len() < stream.len() {
        received.extend(client.chunk().await);
    }
    assert_eq!(received, stream.as_bytes());
    assert_eq!(context_tokens(&gateway).await, context + 3);
    exchange.send_chunk("data: [DO").await;
    exchange.send_chunk("NE]\n\n").await;
    exchange.finish_chunks().await;
    assert_eq!(client.rest().await.unwrap(), "data: [DONE]\n\n");
    until_released(&gateway).await;
}

#[tokio::test]
async fn reported_usage_corrects_the_token_count() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let (mut client, mut exchange) = streaming(&gateway, &mut worker).await;
    let context = context_tokens(&gateway).await;
    exchange.send_chunk(token("many tokens in one event")).await;
    client.head().await;
    client.chunk().await;
    assert_eq!(context_tokens(&gateway).await, context + 1);
    for reported in [40, 7] {
        let usage = json!({"choices": [], "usage": {
            "prompt_tokens": 100, "completion_tokens": reported,
            "prompt_tokens_details": {"cached_tokens": 32},
        }});
        exchange.send_chunk(format!("data: {usage}\n\n")).await;
        client.chunk().await;
        assert_eq!(context_tokens(&gateway).await, context + reported);
    }
    exchange.end_stream().await;
    client.rest().await.unwrap();
    until_released(&gateway).await;
    let text = metrics(&gateway).await;
    let actual = "foresee_overlap_blocks_total{kind=\"actual\"}";
    assert_eq!(value(&text, actual), Some(2.0));
    let under = "foresee_overlap_predictions_total{result=\"under\"}";
    assert_eq!(value(&text, under), Some(1.0));
}

#[tokio::test]
async fn a_response_that_does_not_stream_keeps_its_booking_until_its_end() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("a prompt", false));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    let body = json!({"choices": [], "usage": {"completion_tokens": 5}}).to_string();
    let response = whole("200 OK", "application/json", &body);
    let (first, last) = response.split_at(response.len() - 5);
    exchange.send(first).await;
    client.head().await;
    assert_eq!(worker_json(&gateway, "a").await.unwrap()["requests"], 1);
    exchange.respond(last).await;
    until_released(&gateway).await;
    until_metric(&gateway, "foresee_output_tokens_total", 5.0).await;
}

#[tokio::test]
async fn one_connection_carries_one_stream_after_another() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = Client::connect(gateway.address()).await;
    for _ in 0..3 {
        client.send(http("POST", CHAT, chat("again", true))).await;
        let mut exchange = worker.request().await;
        exchange.start_stream().await;
        exchange.send_chunk(token("x")).await;
        exchange.end_stream().await;
        assert_eq!(client.head().await.status(), 200);
        assert!(client.rest().await.unwrap().ends_with("data: [DONE]\n\n"));
    }
    until_released(&gateway).await;
    // Health checks may use connections of their own.
    assert!(worker.connections() <= 3, "{}", worker.connections());
}

#[tokio::test]
async fn what_has_arrived_is_passed_on_at_once_and_together() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("a short prompt", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    let events: Vec<String> = (0..16).map(|number| token(&number.to_string())).collect();
    let chunks: Vec<u8> = events.iter().flat_map(chunk).collect();
    // One write arrives in one read. A chunk of the response is one write of the gateway or a part
    // of one.
    exchange.send([STREAM_HEAD, &chunks].concat()).await;
    client.head().await;
    assert_eq!(client.chunk().await, events.concat().as_bytes());
    // The next event does not wait for others.
    exchange.send_chunk(token("alone")).await;
    assert_eq!(client.chunk().await, token("alone").as_bytes());
    exchange.send(&chunks).await;
    assert_eq!(client.chunk().await, events.concat().as_bytes());
    let end = chunk("data: [DONE]\n\n");
    exchange
        .send([&chunks, &end, &b"0\r\n\r\n"[..]].concat())
        .await;
    let expected = events.concat() + "data: [DONE]\n\n";
    assert_eq!(client.chunk().await, expected.as_bytes());
    assert_eq!(client.rest().await.unwrap(), "");
    exchange.keep();
    until_metric(&gateway, "foresee_output_tokens_total", 49.0).await;
    until_released(&gateway).await;
}

#[tokio::test]
async fn events_that_arrive_with_the_loss_of_the_connection_are_passed_on() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let (mut client, mut exchange) = streaming(&gateway, &mut worker).await;
    let events = [token("a"), token("b")];
    let chunks: Vec<u8> = events.iter().flat_map(chunk).collect();
    exchange.send(chunks).await;
    exchange.close();
    client.head().await;
    let received = client.rest().await.unwrap();
    let error = received.strip_prefix(&events.concat()).unwrap();
    assert!(error.contains("The worker failed"), "{error}");
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_stream_of_known_length_that_breaks_off_ends_with_an_error() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    let event = token("a");
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {}\r\n\r\n",
        event.len() + 5
    );
    exchange.send(head + &event).await;
    let head = client.head().await;
    assert_eq!(head.get("content-length"), None);
    exchange.close();
    let rest = client.rest().await.unwrap();
    assert!(rest.contains("worker_failed"), "{rest}");
}

#[tokio::test]
async fn an_idle_connection_to_a_worker_is_closed() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("a prompt", false));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    let body = json!({"choices": []}).to_string();
    exchange
        .send(whole("200 OK", "application/json", body))
        .await;
    assert_eq!(client.response().await.status(), 200);
    // vLLM keeps idle connections for 5 s. The gateway closes them after 4 s to 5 s.
    let closed = tokio::time::timeout(Duration::from_secs(20), exchange.closed());
    closed.await.expect("the connection stays open");
}
