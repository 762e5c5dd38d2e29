//! The selection API: a client selects a worker, sends the request itself and reports its progress.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;
use std::time::Duration;

use crate::TINY;
use crate::fake_worker::*;
use foresee_core::policy;
use foresee_core::queue::QueueOrder;
use foresee_gateway::{AdminKey, Gateway, GatewayConfig};
use serde_json::{Value, json};

const EXPIRED: &str = "foresee_reservations_expired_total";

async fn admin(gateway: &Gateway, method: &str, path: &str, body: Value) -> ClientResponse {
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    call(gateway.admin_address(), method, path, body).await
}

/// Selects a worker and returns the response's body.
async fn select(gateway: &Gateway, body: Value) -> Value {
    let response = admin(gateway, "POST", "/admin/select", body).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    response.json()
}

/// Returns the body of a selection for a chat.
fn for_chat(prompt: &str) -> Value {
    let body: Value = serde_json::from_str(&chat(prompt, true)).unwrap();
    json!({ "path": CHAT, "body": body })
}

/// Returns `body` with further fields.
fn with(mut body: Value, fields: Value) -> Value {
    let more = fields.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    body
}

fn path_of(selected: &Value) -> String {
    let id = selected["reservation"].as_str().unwrap();
    format!("/admin/reservations/{id}")
}

async fn report(gateway: &Gateway, selected: &Value, body: Value) -> Value {
    let path = path_of(selected) + "/progress";
    let response = admin(gateway, "POST", &path, body).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    response.json()
}

async fn end(gateway: &Gateway, selected: &Value, query: &str) -> Value {
    let path = path_of(selected) + query;
    let response = admin(gateway, "DELETE", &path, Value::Null).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    response.json()
}

/// Waits until no request occupies anything, and there are no reservations.
async fn until_all_is_released(gateway: &Gateway) {
    until_metric(gateway, "foresee_reservations", 0.0).await;
    until_all_gauges_are_zero(gateway).await;
}

async fn outcomes(gateway: &Gateway, outcome: &str) -> f64 {
    let series = format!("foresee_requests_total{{outcome=\"{outcome}\"}}");
    value(&metrics(gateway).await, &series).unwrap_or(0.0)
}

#[tokio::test]
async fn a_selected_request_is_load_until_its_reservation_is_deleted() {
    let workers = [FakeWorker::start().await, FakeWorker::start().await];
    let gateway = gateway(&[&workers[0], &workers[1]]).await;
    let prompt = "a prompt of many blocks ".repeat(40);
    let selected = select(&gateway, with(for_chat(&prompt), json!({"ttl": "90s"}))).await;
    let name = selected["worker"]["name"].as_str().unwrap();
    let worker = &workers[usize::from(name == "b")];
    let url = worker.spec(name);
    let url = url.split(',').next().unwrap();
    assert_eq!(selected["worker"]["url"], url);
    assert_eq!(selected["ttl_seconds"], 90.0);
    let decision = &selected["decision"];
    assert_eq!(decision["choice"], name);
    assert_eq!(decision["candidates"].as_array().unwrap().len(), 2);
    assert!(selected["prompt_tokens"].as_u64().unwrap() > 100);

    let before = worker_json(&gateway, name).await.unwrap();
    assert_eq!(before["requests"], 1);
    assert!(before["prefill_tokens"].as_u64().unwrap() > 0);
    report(&gateway, &selected, json!({"first_token": true})).await;
    let decoding = worker_json(&gateway, name).await.unwrap();
    assert_eq!(decoding["prefill_tokens"], 0);
    report(&gateway, &selected, json!({"output_tokens": 100})).await;
    let renewed = report(
        &gateway,
        &selected,
        json!({"output_tokens": 150, "ttl": "2m"}),
    )
    .await;
    assert_eq!(renewed["ttl_seconds"], 120.0);
    let grown = worker_json(&gateway, name).await.unwrap();
    let tokens = |worker: &Value| worker["context_tokens"].as_u64().unwrap();
    assert_eq!(tokens(&grown), tokens(&decoding) + 150);
    let text = metrics(&gateway).await;
    assert_eq!(value(&text, "foresee_output_tokens_total"), Some(150.0));
    assert_eq!(value(&text, "foresee_reservations"), Some(1.0));

    let ended = end(&gateway, &selected, "?outcome=completed&output_tokens=160").await;
    assert_eq!(ended["outcome"], "completed");
    until_all_is_released(&gateway).await;
    assert_eq!(outcomes(&gateway, "ok").await, 1.0);
    let text = metrics(&gateway).await;
    assert_eq!(value(&text, "foresee_output_tokens_total"), Some(160.0));
    let listed = admin(&gateway, "GET", "/admin/workers", Value::Null).await;
    assert_eq!(listed.json()["output_lengths"]["outputs"], 1);
    for worker in &workers {
        assert!(worker.is_idle(), "the router sends nothing itself");
    }
}

#[tokio::test]
async fn an_abandoned_reservation_is_released_when_its_time_has_passed() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let long = select(&gateway, with(for_chat("hi"), json!({"ttl": "10m"}))).await;
    let short = select(&gateway, with(for_chat("ho"), json!({"ttl": "30ms"}))).await;
    until_metric(&gateway, EXPIRED, 1.0).await;
    until_metric(&gateway, "foresee_reservations", 1.0).await;
    until_metric(&gateway, "foresee_bookings", 1.0).await;
    let path = path_of(&short);
    for (method, path) in [
        ("POST", format!("{path}/progress")),
        ("DELETE", path.clone()),
        ("DELETE", "/admin/reservations/0".to_owned()),
    ] {
        let error = admin(&gateway, method, &path, Value::Null).await.error(404);
        assert_eq!(error["code"], "reservation_not_found", "{method} {path}");
    }

    // A report can shorten the time.
    report(&gateway, &long, json!({"ttl": "20ms"})).await;
    until_metric(&gateway, EXPIRED, 2.0).await;
    until_all_is_released(&gateway).await;
    assert_eq!(outcomes(&gateway, "client_left").await, 2.0);
}

#[tokio::test]
async fn the_outcome_of_a_request_is_learned() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let probes = worker.probes();
    let selected = select(&gateway, for_chat("hi")).await;
    end(&gateway, &selected, "?outcome=failed").await;
    assert_eq!(outcomes(&gateway, "worker_failed").await, 1.0);
    let shown = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(shown["outlier"]["consecutive_failures"], 1);
    until("a health check", || worker.probes() > probes).await;

    let selected = select(&gateway, for_chat("hi")).await;
    let counts = json!({"cached_tokens": 0, "prompt_tokens": 9, "output_tokens": 3});
    report(&gateway, &selected, counts).await;
    end(&gateway, &selected, "?outcome=completed").await;
    let selected = select(&gateway, for_chat("hi")).await;
    assert_eq!(end(&gateway, &selected, "").await["outcome"], "abandoned");
    assert_eq!(outcomes(&gateway, "ok").await, 1.0);
    assert_eq!(outcomes(&gateway, "client_left").await, 1.0);
    until_all_is_released(&gateway).await;
}

#[tokio::test]
async fn the_number_of_reservations_is_bounded() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.admin.max_reservations = 2;
    let gateway = gateway_with(config).await;
    let first = select(&gateway, for_chat("1")).await;
    let second = select(&gateway, for_chat("2")).await;
    let refused = admin(&gateway, "POST", "/admin/select", for_chat("3")).await;
    assert!(refused.head.get("retry-after").is_some());
    let error = refused.error(429);
    assert_eq!(error["code"], "too_many_reservations");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("--max-reservations"), "{message}");
    assert_eq!(worker_json(&gateway, "a").await.unwrap()["requests"], 2);
    end(&gateway, &first, "").await;
    let third = select(&gateway, for_chat("3")).await;
    end(&gateway, &second, "").await;
    end(&gateway, &third, "").await;
    until_all_is_released(&gateway).await;
}

#[tokio::test]
async fn invalid_requests_are_refused_and_book_nothing() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let unknown = json!({"model": "unknown", "token_ids": [1]});
    for (body, status, param, code) in [
        (json!({}), 400, json!("body"), Value::Null),
        (json!({"body": {}}), 400, json!("path"), Value::Null),
        (
            json!({"path": CHAT, "body": {"model": 3}}),
            400,
            json!("model"),
            Value::Null,
        ),
        (
            with(for_chat("hi"), json!({"ttl": "soon"})),
            400,
            json!("ttl"),
            Value::Null,
        ),
        (
            with(for_chat("hi"), json!({"exclude": ["x"]})),
            400,
            json!("exclude"),
            Value::Null,
        ),
        (
            with(for_chat("hi"), json!({"exclude": ["a", "a"]})),
            400,
            json!("exclude"),
            Value::Null,
        ),
        (
            with(for_chat("hi"), json!({"exclude": ["a"]})),
            503,
            Value::Null,
            json!("no_worker"),
        ),
        (unknown, 404, json!("model"), json!("model_not_found")),
    ] {
        let response = admin(&gateway, "POST", "/admin/select", body.clone()).await;
        let error = response.error(status);
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{body}");
    }
    let selected = select(&gateway, for_chat("hi")).await;
    let path = path_of(&selected);
    let report = json!({"output_tokens": "many"});
    let response = admin(&gateway, "POST", &format!("{path}/progress"), report).await;
    assert_eq!(response.error(400)["param"], "output_tokens");
    let response = admin(
        &gateway,
        "DELETE",
        &format!("{path}?outcome=x"),
        Value::Null,
    )
    .await;
    assert_eq!(response.error(400)["param"], "outcome");
    let response = admin(&gateway, "GET", &path, Value::Null).await;
    assert_eq!(response.error(404)["code"], "unknown_url");
    let response = call(gateway.address(), "POST", "/admin/select", "{}").await;
    assert_eq!(response.error(404)["code"], "unknown_url");
    end(&gateway, &selected, "").await;
    until_all_is_released(&gateway).await;
}

#[tokio::test]
async fn the_selection_api_needs_the_admin_key() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.admin.key = Some(AdminKey::new("s3cret").unwrap());
    let gateway = gateway_with(config).await;
    for (method, path) in [
        ("POST", "/admin/select"),
        ("POST", "/admin/reservations/0/progress"),
        ("DELETE", "/admin/reservations/0"),
    ] {
        let response = admin(&gateway, method, path, Value::Null).await;
        assert_eq!(response.error(401)["code"], "invalid_api_key", "{path}");
    }
    assert!(has_no_bookings(&gateway));
}

/// Sends a request through the proxy and returns the name of the worker that it was sent to, and the
/// predicted overlap.
async fn send(
    gateway: &Gateway,
    workers: &mut [FakeWorker],
    path: &str,
    body: &str,
) -> (String, u64) {
    let mut client = Client::sending(gateway.address(), http("POST", path, body)).await;
    let mut exchange = None;
    until("a request to reach a worker", || {
        exchange = workers.iter_mut().find_map(FakeWorker::try_request);
        exchange.is_some()
    })
    .await;
    exchange.unwrap().respond_json("{}").await;
    let head = client.response().await.head;
    let overlap = head.get("x-foresee-overlap-tokens").unwrap().parse();
    let worker = head.get("x-foresee-worker").unwrap().to_owned();
    (worker, overlap.unwrap())
}

#[tokio::test]
async fn the_same_worker_is_selected_as_for_a_request_of_the_proxy() {
    let mut workers = [FakeWorker::start().await, FakeWorker::start().await];
    let mut config = config(&[&workers[0], &workers[1]]);
    config.router.policy = policy::KV;
    config.tokenizer = Some(Path::new(TINY).to_owned());
    let gateway = gateway_with(config).await;
    let ids: Vec<u32> = (0..200).collect();
    let completion = json!({"model": MODEL, "prompt": ids, "max_tokens": 5}).to_string();
    let chat = chat(&"tell me about prefix caches ".repeat(30), false);
    let paths = [("/v1/completions", completion), (CHAT, chat)];
    for (path, body) in &paths {
        // The second worker is the only one without load, and so gets the prompt.
        let load = select(&gateway, json!({"model": MODEL, "token_ids": vec![7; 400]})).await;
        let (first, _) = send(&gateway, &mut workers, path, body).await;
        assert_ne!(load["worker"]["name"], *first);
        end(&gateway, &load, "").await;
        let (second, overlap) = send(&gateway, &mut workers, path, body).await;
        assert_eq!(first, second);
        assert!(overlap > 50, "{overlap}");

        let body: Value = serde_json::from_str(body).unwrap();
        let selected = select(&gateway, json!({"path": path, "body": body})).await;
        assert_eq!(selected["worker"]["name"], *first);
        assert_eq!(selected["overlap_tokens"], overlap);
        end(&gateway, &selected, "").await;
    }
    let tokens = json!({"model": MODEL, "token_ids": ids, "max_tokens": 5, "explain": false});
    let selected = select(&gateway, tokens).await;
    assert_eq!(
        selected["overlap_tokens"], 192,
        "whole blocks, less the last token"
    );
    assert_eq!(selected["prompt_tokens"], 200);
    assert_eq!(selected["decision"], Value::Null);
    end(&gateway, &selected, "").await;
    until_all_is_released(&gateway).await;
}

fn queueing(worker: &FakeWorker) -> GatewayConfig {
    let mut config = config(&[worker]);
    config.router.queue_order = Some(QueueOrder::Fcfs);
    config
}

/// Returns a selection with a prompt so long that a worker is busy with it.
fn for_long_chat(name: &str) -> Value {
    for_chat(&format!("{name} {}", "tell me more ".repeat(20_000)))
}

#[tokio::test]
async fn a_selection_waits_for_its_dispatch_only_if_the_client_wants_that() {
    let worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&worker)).await;
    let first = select(&gateway, for_long_chat("a")).await;
    let at_once = select(&gateway, for_long_chat("b")).await;
    assert_eq!(gateway.router().queued_requests(), 0);
    let refused = with(for_long_chat("c"), json!({"wait": "20ms"}));
    let refused = admin(&gateway, "POST", "/admin/select", refused).await;
    assert_eq!(refused.error(429)["code"], "queue_timeout");
    until("the request to leave the queue", || {
        gateway.router().booking_count() == 2
    })
    .await;

    let waiting = with(for_long_chat("d"), json!({"wait": "60s"}));
    let waiting = select(&gateway, waiting);
    let room = async {
        until("the request to be queued", || {
            gateway.router().queued_requests() == 1
        })
        .await;
        report(&gateway, &first, json!({"first_token": true})).await;
        report(&gateway, &at_once, json!({"first_token": true})).await;
    };
    let (waited, ()) = tokio::join!(waiting, room);
    assert_eq!(gateway.router().queued_requests(), 0);
    for selected in [first, at_once, waited] {
        end(&gateway, &selected, "").await;
    }
    until_all_is_released(&gateway).await;
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_has_no_booking() {
    let worker = FakeWorker::start().await;
    let gateway = gateway_with(queueing(&worker)).await;
    let first = select(&gateway, for_long_chat("a")).await;
    let body = with(for_long_chat("b"), json!({"wait": "60s"})).to_string();
    let request = http("POST", "/admin/select", body);
    let client = Client::sending(gateway.admin_address().unwrap(), request).await;
    until("the request to be queued", || {
        gateway.router().queued_requests() == 1
    })
    .await;
    drop(client);
    until("the request to leave the queue", || {
        gateway.router().booking_count() == 1
    })
    .await;
    end(&gateway, &first, "").await;
    until_all_is_released(&gateway).await;
}

#[tokio::test]
async fn a_shutdown_releases_all_reservations() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    select(&gateway, with(for_chat("hi"), json!({"ttl": "10m"}))).await;
    let router = gateway.router().clone();
    assert_eq!(router.booking_count(), 1);
    within("the shutdown", gateway.shut_down()).await;
    assert_eq!(router.booking_count(), 0);
    assert_eq!(router.workers(Duration::ZERO)[0].requests, 0);
}
