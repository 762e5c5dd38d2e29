//! Requests are queued in the gateway until their worker can take them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::queue::QueueOrder;
use foresee_gateway::{Gateway, GatewayConfig};

/// Returns a prompt so long that a worker is busy with it.
fn long_chat(name: &str) -> String {
    chat(&format!("{name} {}", "tell me more ".repeat(20_000)), true)
}

fn queueing(workers: &[&FakeWorker], order: QueueOrder) -> GatewayConfig {
    let mut config = config(workers);
    config.router.queue_order = Some(order);
    config
}

async fn until_queued(gateway: &Gateway, requests: usize) {
    until("requests to be queued", || {
        gateway.router().queued_requests() == requests
    })
    .await;
}

async fn send(gateway: &Gateway, name: &str, headers: &str) -> Client {
    let request = http("POST", CHAT, long_chat(name));
    let text = String::from_utf8(request).unwrap();
    let (line, rest) = text.split_once("\r\n").unwrap();
    let request = format!("{line}\r\n{headers}{rest}");
    Client::sending(gateway.address(), request).await
}

/// Responds to the next request and returns the name in its prompt.
async fn respond_to_next(worker: &mut FakeWorker) -> String {
    let mut exchange = worker.request().await;
    let body = String::from_utf8_lossy(&exchange.body).into_owned();
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    let name = body.split("content").nth(1).unwrap();
    name.trim_start_matches(['"', ':', ' '])
        .chars()
        .take(1)
        .collect()
}

#[tokio::test]
async fn the_next_request_is_dispatched_after_the_first_token_of_the_previous_one() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], QueueOrder::Fcfs)).await;
    let mut first = send(&gateway, "a", "").await;
    let mut exchange = worker.request().await;
    let mut second = send(&gateway, "b", "").await;
    until_queued(&gateway, 1).await;
    assert!(worker.is_idle());
    let worker_a = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(
        (&worker_a["requests"], &worker_a["queued_requests"]),
        (&2.into(), &1.into())
    );
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(respond_to_next(&mut worker).await, "b");
    second.response().await;
    exchange.end_stream().await;
    first.response().await;
    until_released(&gateway).await;
    until_metric(&gateway, "foresee_queue_duration_seconds_count", 2.0).await;
}

#[tokio::test]
async fn requests_with_a_lower_priority_value_are_dispatched_first() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], QueueOrder::ShortestPrefillFirst)).await;
    let mut clients = vec![send(&gateway, "a", "").await];
    let mut exchange = worker.request().await;
    for (waiting, (name, priority)) in [("b", "5"), ("c", "0"), ("d", "-7")]
        .into_iter()
        .enumerate()
    {
        let header = format!("x-foresee-priority: {priority}\r\n");
        clients.push(send(&gateway, name, &header).await);
        until_queued(&gateway, waiting + 1).await;
    }
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    for expected in ["d", "c", "b"] {
        assert_eq!(respond_to_next(&mut worker).await, expected);
    }
    for client in &mut clients {
        client.response().await;
    }
    for header in ["x-foresee-priority", "x-foresee-expected-tokens"] {
        let mut client = send(&gateway, "e", &format!("{header}: high\r\n")).await;
        assert_eq!(client.response().await.error(400)["param"], header);
    }
}

#[tokio::test]
async fn the_tenant_header_identifies_the_tenant() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], QueueOrder::FairByTenant)).await;
    let mut clients = Vec::new();
    for (waiting, (name, key)) in [("a", "one"), ("b", "one"), ("c", "one"), ("d", "two")]
        .into_iter()
        .enumerate()
    {
        let header = format!("authorization: Bearer {key}\r\n");
        clients.push(send(&gateway, name, &header).await);
        until("the request to be booked", || {
            gateway.router().booking_count() == waiting + 1
        })
        .await;
        until_queued(&gateway, waiting).await;
    }
    for expected in ["a", "d", "b", "c"] {
        assert_eq!(respond_to_next(&mut worker).await, expected);
    }
    for client in &mut clients {
        client.response().await;
    }
}

#[tokio::test]
async fn a_full_queue_refuses_requests_until_one_leaves() {
    let mut worker = FakeWorker::start().await;
    let mut config = queueing(&[&worker], QueueOrder::Fcfs);
    config.queue_limit = Some(1);
    let gateway = gateway_with(config).await;
    let mut first = send(&gateway, "a", "").await;
    let mut exchange = worker.request().await;
    let waiting = send(&gateway, "b", "").await;
    until_queued(&gateway, 1).await;
    let refused = send(&gateway, "c", "").await.response().await;
    refused.error(429);
    assert!(refused.head.get("retry-after").is_some());
    drop(waiting);
    until_queued(&gateway, 0).await;
    let mut fourth = send(&gateway, "d", "").await;
    until_queued(&gateway, 1).await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    first.response().await;
    assert_eq!(respond_to_next(&mut worker).await, "d");
    fourth.response().await;
    until_released(&gateway).await;
}

#[tokio::test]
async fn requests_queued_for_an_unhealthy_worker_move_to_another() {
    let (mut a, mut b) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway_with(queueing(&[&a, &b], QueueOrder::Fcfs)).await;
    let mut clients = Vec::new();
    for (name, waiting) in [("a", 0), ("b", 0), ("c", 1), ("d", 2)] {
        clients.push(send(&gateway, name, "").await);
        until("the request to be booked", || {
            gateway.router().booking_count() == clients.len()
        })
        .await;
        until_queued(&gateway, waiting).await;
    }
    let running = a.request().await;
    let first = b.request().await;
    a.set_healthy(false);
    let b_queues_both = || workers(&gateway)["b"].queued_requests == 2;
    until(
        "both requests to be queued for the other worker",
        b_queues_both,
    )
    .await;
    for mut exchange in [first, running] {
        exchange.start_stream().await;
        exchange.send_chunk(token("x")).await;
        exchange.end_stream().await;
    }
    respond_to_next(&mut b).await;
    respond_to_next(&mut b).await;
    for client in &mut clients {
        client.response().await;
    }
    until_released(&gateway).await;
}

#[tokio::test]
async fn requests_queued_for_the_only_worker_are_refused_when_it_dies() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], QueueOrder::Fcfs)).await;
    let mut running = send(&gateway, "a", "").await;
    let exchange = worker.request().await;
    let mut queued = send(&gateway, "b", "").await;
    until_queued(&gateway, 1).await;
    worker.die().await;
    exchange.reset();
    for client in [&mut running, &mut queued] {
        let response = client.response().await;
        response.error(503);
        assert!(response.head.get("retry-after").is_some(), "{response:?}");
    }
    until_released(&gateway).await;
}

#[tokio::test]
async fn the_time_in_the_queue_is_limited_by_the_first_byte_timeout() {
    let mut worker = FakeWorker::start().await;
    let mut config = queueing(&[&worker], QueueOrder::Fcfs);
    config.first_byte_timeout = Duration::from_millis(500);
    let gateway = gateway_with(config).await;
    let mut first = send(&gateway, "a", "").await;
    let exchange = worker.request().await;
    let mut second = send(&gateway, "b", "").await;
    until_queued(&gateway, 1).await;
    // The first request times out; then the second is dispatched and times out too.
    first.response().await.error(504);
    second.response().await;
    exchange.keep();
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_request_that_would_miss_its_deadline_is_refused_at_once() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let with_deadline = |milliseconds: &str, prompt: &str| {
        let request = String::from_utf8(http("POST", CHAT, chat(prompt, true))).unwrap();
        let header = format!("\r\nx-foresee-deadline-ms: {milliseconds}\r\n");
        request.replacen("\r\n", &header, 1)
    };
    // The initial estimate is 100 µs for each token.
    let long = with_deadline("100", &"word ".repeat(20_000));
    let response = Client::sending(gateway.address(), long)
        .await
        .response()
        .await;
    let error = response.error(429);
    assert_eq!(error["code"], "deadline_unreachable");
    assert!(response.head.get("retry-after").is_some());
    assert!(worker.is_idle() && has_no_bookings(&gateway));
    let text = metrics(&gateway).await;
    assert_eq!(
        value(&text, "foresee_deadlines_unreachable_total"),
        Some(1.0)
    );

    // A worker that lets the deadline pass is not to blame.
    let short = with_deadline("200", "hi");
    let mut client = Client::sending(gateway.address(), short).await;
    let mut exchange = worker.request().await;
    client.response().await.error(504);
    exchange.closed().await;
    assert_eq!(
        state(&gateway, "a"),
        foresee_core::workers::WorkerState::Healthy
    );

    let invalid = with_deadline("soon", "hi");
    let response = Client::sending(gateway.address(), invalid)
        .await
        .response()
        .await;
    assert_eq!(response.error(400)["param"], "x-foresee-deadline-ms");
}

#[tokio::test]
async fn a_tenant_that_fills_the_queue_loses_its_own_requests() {
    let mut worker = FakeWorker::start().await;
    let mut config = queueing(&[&worker], QueueOrder::FairByTenant);
    config.queue_limit = Some(2);
    let gateway = gateway_with(config).await;
    let _running = send(&gateway, "running", "authorization: greedy\r\n").await;
    let exchange = worker.request().await;
    let _first = send(&gateway, "a", "authorization: greedy\r\n").await;
    until_queued(&gateway, 1).await;
    let mut second = send(&gateway, "b", "authorization: greedy\r\n").await;
    until_queued(&gateway, 2).await;
    let mut third = send(&gateway, "c", "authorization: greedy\r\n").await;
    let error = third.response().await.error(429);
    assert_eq!(error["code"], "capacity_exceeded");

    let _modest = send(&gateway, "d", "authorization: modest\r\n").await;
    let error = second.response().await.error(429);
    assert_eq!(error["code"], "capacity_exceeded");
    until_queued(&gateway, 2).await;
    until_metric(&gateway, "foresee_queue_displaced_total", 1.0).await;
    exchange.keep();
}

#[tokio::test]
async fn a_request_leaves_the_queue_when_its_time_there_ends() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], QueueOrder::Fcfs)).await;
    let _first = send(&gateway, "a", "").await;
    let exchange = worker.request().await;
    let mut second = send(&gateway, "b", "x-llm-d-inference-ttl: 100ms\r\n").await;
    let error = second.response().await.error(429);
    assert_eq!(error["code"], "queue_timeout");
    assert!(worker.try_request().is_none());
    exchange.keep();
}

#[tokio::test]
async fn a_dry_run_reports_what_the_least_delay_would_have_chosen() {
    let mut workers = [FakeWorker::start().await, FakeWorker::start().await];
    let mut config = config(&[&workers[0], &workers[1]]);
    config.dry_run = true;
    let gateway = gateway_with(config).await;
    // Round robin sends the second request, of the same prompt, to the other worker.
    let prompt = "word ".repeat(2000);
    for worker in &mut workers {
        let request = http("POST", CHAT, chat(&prompt, false));
        let mut client = Client::sending(gateway.address(), request).await;
        worker.request().await.respond_json("{}").await;
        assert_eq!(client.response().await.status(), 200);
        until_released(&gateway).await;
    }
    let text = metrics(&gateway).await;
    let count = |labels: &str| value(&text, &format!("foresee_dry_run_{labels}"));
    assert_eq!(count("decisions_total{result=\"different\"}"), Some(1.0));
    assert_eq!(count("decisions_total{result=\"same\"}"), Some(1.0));
    assert_eq!(count("overlap_blocks_total{kind=\"chosen\"}"), Some(0.0));
    assert!(count("overlap_blocks_total{kind=\"least_delay\"}").unwrap() > 100.0);
    assert!(count("delay_seconds_sum").unwrap() > 0.1);
}
