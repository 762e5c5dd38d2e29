//! Workers are drained, kept, and removed at a deadline.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use foresee_core::workers::WorkerState;
use foresee_gateway::Gateway;
use serde_json::{Value, json};

async fn admin(gateway: &Gateway, method: &str, path: &str) -> ClientResponse {
    call(gateway.admin_address(), method, path, "").await
}

/// Starts a stream on `worker`, and returns both of its ends after the first token.
async fn running_stream(gateway: &Gateway, worker: &mut FakeWorker) -> (Client, Exchange) {
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(client.head().await.status(), 200);
    client.chunk().await;
    (client, exchange)
}

/// Ends a stream on both sides.
async fn finish((mut client, exchange): (Client, Exchange)) {
    exchange.end_stream().await;
    client.rest().await.unwrap();
}

/// Asserts that the worker stays for as long as several checks of drained workers take, by draining
/// and removing another one several times.
async fn assert_stays(gateway: &Gateway, name: &str) {
    let other = FakeWorker::start().await;
    for _ in 0..3 {
        let body = json!({ "url": other.spec("other") }).to_string();
        let added = call(gateway.admin_address(), "POST", "/admin/workers", body).await;
        assert_eq!(added.status(), 202);
        admin(gateway, "DELETE", "/admin/workers/other").await;
        until("the other worker to be removed", || {
            !workers(gateway).contains_key("other")
        })
        .await;
    }
    assert!(workers(gateway).contains_key(name));
}

fn seconds(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[tokio::test]
async fn a_worker_leaves_at_the_deadline_and_its_streams_continue() {
    let (mut first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let (mut client, mut exchange) = running_stream(&gateway, &mut first).await;
    let response = admin(&gateway, "DELETE", "/admin/workers/a").await;
    assert_eq!(response.status(), 202);
    assert_eq!(seconds(&response.json()["drain_deadline_seconds"]), 600.0);
    let listed = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(
        (&listed["draining"], &listed["requests"]),
        (&json!(true), &json!(1))
    );
    let left = seconds(&listed["drain_deadline_seconds"]);
    assert!((590.0..=600.0).contains(&left), "{left}");
    assert_stays(&gateway, "a").await;

    // A later request replaces the deadline.
    let response = admin(&gateway, "DELETE", "/admin/workers/a?timeout=60ms").await;
    assert_eq!(response.status(), 202);
    until("the worker to be removed", || {
        !workers(&gateway).contains_key("a")
    })
    .await;
    for _ in 0..3 {
        exchange.send_chunk(token("y")).await;
        assert_eq!(client.chunk().await, token("y").as_bytes());
    }
    exchange.end_stream().await;
    assert_eq!(client.rest().await.unwrap(), "data: [DONE]\n\n");
    until_released(&gateway).await;
}

#[tokio::test]
async fn undrain_cancels_a_removal() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let (mut client, mut exchange) = running_stream(&gateway, &mut worker).await;
    admin(&gateway, "DELETE", "/admin/workers/a").await;
    assert_eq!(state(&gateway, "a"), WorkerState::Draining);
    let response = admin(&gateway, "POST", "/admin/workers/a/undrain").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.json(), json!({ "name": "a", "state": "healthy" }));
    let listed = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(listed["draining"], false);
    assert_eq!(listed["drain_deadline_seconds"], Value::Null);

    exchange.send_chunk(token("y")).await;
    client.chunk().await;
    exchange.end_stream().await;
    client.rest().await.unwrap();
    until_released(&gateway).await;
    // The worker has no requests now, and stays.
    assert_stays(&gateway, "a").await;
    finish(running_stream(&gateway, &mut worker).await).await;
}

#[tokio::test]
async fn a_worker_can_be_drained_without_being_removed() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let response = admin(&gateway, "POST", "/admin/workers/a/drain").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.json(), json!({ "name": "a", "state": "draining" }));
    let listed = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(listed["draining"], true);
    assert_eq!(listed["drain_deadline_seconds"], Value::Null);
    for _ in 0..3 {
        finish(running_stream(&gateway, &mut second).await).await;
    }
    assert_stays(&gateway, "a").await;

    // Draining without removal also cancels a removal.
    let running = running_stream(&gateway, &mut second).await;
    admin(&gateway, "DELETE", "/admin/workers/b").await;
    admin(&gateway, "POST", "/admin/workers/b/drain").await;
    finish(running).await;
    until_released(&gateway).await;
    assert_stays(&gateway, "b").await;
    assert_eq!(state(&gateway, "b"), WorkerState::Draining);

    admin(&gateway, "POST", "/admin/workers/a/undrain").await;
    finish(running_stream(&gateway, &mut first).await).await;
}

#[tokio::test]
async fn an_idle_worker_leaves_at_once_and_cannot_be_undrained() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    admin(&gateway, "DELETE", "/admin/workers/a?timeout=0s").await;
    until("the worker to be removed", || workers(&gateway).is_empty()).await;
    for (method, path) in [
        ("DELETE", "/admin/workers/a"),
        ("POST", "/admin/workers/a/drain"),
        ("POST", "/admin/workers/a/undrain"),
    ] {
        let error = admin(&gateway, method, path).await.error(404);
        assert_eq!(error["code"], "worker_not_found", "{path}");
        assert!(error["message"].as_str().unwrap().contains("`a`"));
    }
    for path in [
        "/admin/workers/a",
        "/admin/workers/drain",
        "/admin/workers/",
    ] {
        let error = admin(&gateway, "POST", path).await.error(404);
        assert_eq!(error["code"], "unknown_url", "{path}");
    }
    let response = admin(&gateway, "DELETE", "/admin/workers/a?timeout=30").await;
    assert_eq!(response.error(400)["param"], "timeout");
}

#[tokio::test]
async fn the_name_of_an_engine_drains_all_its_ranks() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[]);
    config.workers = vec![(worker.spec("gpu") + ",ranks=2").parse().unwrap()];
    let gateway = gateway_with(config).await;
    admin(&gateway, "POST", "/admin/workers/gpu/drain").await;
    let states = || ["gpu/0", "gpu/1"].map(|name| state(&gateway, name));
    assert_eq!(states(), [WorkerState::Draining; 2]);
    admin(&gateway, "POST", "/admin/workers/gpu%2F1/undrain").await;
    assert_eq!(states(), [WorkerState::Draining, WorkerState::Healthy]);
    admin(&gateway, "POST", "/admin/workers/gpu/0/undrain").await;
    assert_eq!(states(), [WorkerState::Healthy; 2]);
}
