//! Requests wait at the gateway until their worker has room.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::queue::Order;
use foresee_gateway::{Gateway, GatewayConfig};

/// Long enough that a worker is busy with it.
fn long(name: &str) -> String {
    chat(&format!("{name} {}", "tell me more ".repeat(20_000)), true)
}

fn queueing(workers: &[&FakeWorker], order: Order) -> GatewayConfig {
    let mut config = config(workers);
    config.router.queue = Some(order);
    config
}

async fn held(gateway: &Gateway, requests: usize) {
    until("requests to wait", || {
        gateway.router().held_requests() == requests
    })
    .await;
}

async fn sends(gateway: &Gateway, name: &str, headers: &str) -> Client {
    let request = http("POST", CHAT, long(name));
    let text = String::from_utf8(request).unwrap();
    let (line, rest) = text.split_once("\r\n").unwrap();
    let request = format!("{line}\r\n{headers}{rest}");
    Client::sending(gateway.address(), request).await
}

/// Answers the next request. Returns whose it is.
async fn answers(worker: &mut FakeWorker) -> String {
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
async fn the_next_is_sent_when_the_last_has_its_first_token() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], Order::Fcfs)).await;
    let mut first = sends(&gateway, "a", "").await;
    let mut exchange = worker.request().await;
    let mut second = sends(&gateway, "b", "").await;
    held(&gateway, 1).await;
    assert!(worker.is_idle());
    let shown = shown(&gateway, "a").await.unwrap();
    assert_eq!(
        (&shown["requests"], &shown["held_requests"]),
        (&2.into(), &1.into())
    );
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(answers(&mut worker).await, "b");
    second.answer().await;
    exchange.end_stream().await;
    first.answer().await;
    freed(&gateway).await;
    counted(&gateway, "foresee_queue_duration_seconds_count", 2.0).await;
}

#[tokio::test]
async fn the_urgent_are_sent_first() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], Order::Shortest)).await;
    let mut clients = vec![sends(&gateway, "a", "").await];
    let mut exchange = worker.request().await;
    for (waiting, (name, priority)) in [("b", "5"), ("c", "0"), ("d", "-7")]
        .into_iter()
        .enumerate()
    {
        let header = format!("x-foresee-priority: {priority}\r\n");
        clients.push(sends(&gateway, name, &header).await);
        held(&gateway, waiting + 1).await;
    }
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    for expected in ["d", "c", "b"] {
        assert_eq!(answers(&mut worker).await, expected);
    }
    for client in &mut clients {
        client.answer().await;
    }
    for header in ["x-foresee-priority", "x-foresee-expected-tokens"] {
        let mut client = sends(&gateway, "e", &format!("{header}: high\r\n")).await;
        assert_eq!(client.answer().await.error(400)["param"], header);
    }
}

#[tokio::test]
async fn tenants_are_told_apart_by_their_keys() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&[&worker], Order::Fair)).await;
    let mut clients = Vec::new();
    for (waiting, (name, key)) in [("a", "one"), ("b", "one"), ("c", "one"), ("d", "two")]
        .into_iter()
        .enumerate()
    {
        let header = format!("authorization: Bearer {key}\r\n");
        clients.push(sends(&gateway, name, &header).await);
        until("it to be booked", || {
            gateway.router().bookings() == waiting + 1
        })
        .await;
        held(&gateway, waiting).await;
    }
    for expected in ["a", "d", "b", "c"] {
        assert_eq!(answers(&mut worker).await, expected);
    }
    for client in &mut clients {
        client.answer().await;
    }
}

#[tokio::test]
async fn too_many_are_refused_and_who_leaves_makes_room() {
    let mut worker = FakeWorker::start().await;
    let mut config = queueing(&[&worker], Order::Fcfs);
    config.queue_limit = Some(1);
    let gateway = gateway_with(config).await;
    let mut first = sends(&gateway, "a", "").await;
    let mut exchange = worker.request().await;
    let waiting = sends(&gateway, "b", "").await;
    held(&gateway, 1).await;
    let refused = sends(&gateway, "c", "").await.answer().await;
    refused.error(503);
    assert!(refused.head.get("retry-after").is_some());
    drop(waiting);
    held(&gateway, 0).await;
    let mut fourth = sends(&gateway, "d", "").await;
    held(&gateway, 1).await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    first.answer().await;
    assert_eq!(answers(&mut worker).await, "d");
    fourth.answer().await;
    freed(&gateway).await;
}

#[tokio::test]
async fn whoever_waits_for_a_worker_that_dies_goes_to_another() {
    let (mut a, mut b) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway_with(queueing(&[&a, &b], Order::Fcfs)).await;
    let mut clients = Vec::new();
    for (name, waiting) in [("a", 0), ("b", 0), ("c", 1), ("d", 2)] {
        clients.push(sends(&gateway, name, "").await);
        until("it to be booked", || {
            gateway.router().bookings() == clients.len()
        })
        .await;
        held(&gateway, waiting).await;
    }
    let running = a.request().await;
    let first = b.request().await;
    a.set_healthy(false);
    let b_waits = || workers(&gateway)["b"].held_requests == 2;
    until("both to wait for the other", b_waits).await;
    for mut exchange in [first, running] {
        exchange.start_stream().await;
        exchange.send_chunk(token("x")).await;
        exchange.end_stream().await;
    }
    answers(&mut b).await;
    answers(&mut b).await;
    for client in &mut clients {
        client.answer().await;
    }
    freed(&gateway).await;
}

#[tokio::test]
async fn nobody_waits_longer_than_for_a_first_byte() {
    let mut worker = FakeWorker::start().await;
    let mut config = queueing(&[&worker], Order::Fcfs);
    config.first_byte_timeout = Duration::from_millis(500);
    let gateway = gateway_with(config).await;
    let mut first = sends(&gateway, "a", "").await;
    let exchange = worker.request().await;
    let mut second = sends(&gateway, "b", "").await;
    held(&gateway, 1).await;
    // The first is given up, and the second is sent and given up in its turn.
    first.answer().await.error(504);
    second.answer().await;
    exchange.keep();
    freed(&gateway).await;
}
