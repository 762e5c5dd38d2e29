//! Keys of clients: who may send requests, what reaches the worker, and limits.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::num::NonZeroU32;

use crate::fake_worker::*;
use foresee_gateway::{ApiKeySource, Gateway, GatewayConfig, KeyConfig, KeyHash, KeyLimits};

/// Returns a key named `id` for all models, without limits. The key is the id as well.
fn key(id: &str) -> KeyConfig {
    KeyConfig::new(id, KeyHash::of(id.as_bytes()))
}

/// Returns the configuration of a gateway with one worker and these keys.
fn with_keys(worker: &FakeWorker, keys: Vec<KeyConfig>) -> GatewayConfig {
    let mut config = config(&[worker]);
    config.keys = Some(keys);
    config
}

/// Returns a request with a header line.
fn request(method: &str, path: &str, header: &str, body: &str) -> String {
    let request = String::from_utf8(http(method, path, body)).unwrap();
    request.replacen("\r\n", &format!("\r\n{header}\r\n"), 1)
}

/// Sends a chat completion with a key. Returns the client, which waits for its response.
async fn chat_with(gateway: &Gateway, key: &str) -> Client {
    let header = format!("authorization: Bearer {key}");
    let bytes = request("POST", CHAT, &header, &chat("hi", false));
    Client::sending(gateway.address(), bytes).await
}

/// Body of a response that has used these tokens.
fn usage(prompt: u32, output: u32) -> String {
    let usage = serde_json::json!({"prompt_tokens": prompt, "completion_tokens": output});
    serde_json::json!({"choices": [{"message": {"content": "x"}}], "usage": usage}).to_string()
}

#[tokio::test]
async fn a_request_needs_a_key_and_the_worker_never_sees_it() {
    let mut worker = FakeWorker::start().await;
    let mut config = with_keys(&worker, vec![key("secret")]);
    config.worker_key.source = Some(ApiKeySource::Value("engine".to_owned()));
    let gateway = gateway_with(config).await;
    for header in ["x: y", "authorization: Bearer wrong", "x-api-key: wrong"] {
        for (method, path) in [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/unknown")] {
            let bytes = request(method, path, header, &chat("hi", false));
            let mut client = Client::sending(gateway.address(), bytes).await;
            let error = client.response().await.error(401);
            assert_eq!(error["code"], "invalid_api_key", "{header} {path}");
        }
    }
    let health = call(gateway.address(), "GET", "/health", "").await;
    assert_eq!(health.status(), 200);
    for header in [
        "authorization: Bearer secret",
        "x-api-key: secret",
        "api-key: secret",
    ] {
        let bytes = request("POST", CHAT, header, &chat("hi", false));
        let mut client = Client::sending(gateway.address(), bytes).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.head.get("authorization"), Some("Bearer engine"));
        assert_eq!(exchange.head.get("x-api-key"), None);
        assert_eq!(exchange.head.get("api-key"), None);
        exchange.respond_json(usage(1, 1)).await;
        assert_eq!(client.response().await.status(), 200);
    }
    until_released(&gateway).await;
    let text = metrics(&gateway).await;
    let refused = |reason: &str| {
        value(
            &text,
            &format!("foresee_key_refusals_total{{reason=\"{reason}\"}}"),
        )
    };
    assert_eq!(
        (refused("missing"), refused("unknown")),
        (Some(3.0), Some(6.0))
    );
    assert!(!text.contains("secret"));
}

#[tokio::test]
async fn a_key_opens_only_its_models() {
    let mut worker = FakeWorker::start().await;
    let other = KeyConfig {
        models: vec!["other-*".to_owned()],
        ..key("other")
    };
    let gateway = gateway_with(with_keys(&worker, vec![key("all"), other])).await;
    let models = async |key: &str| {
        let bytes = request("GET", "/v1/models", &format!("x-api-key: {key}"), "");
        let mut client = Client::sending(gateway.address(), bytes).await;
        client.response().await.json()["data"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!((models("all").await, models("other").await), (1, 0));
    let mut client = chat_with(&gateway, "other").await;
    let error = client.response().await.error(403);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&"model_not_allowed".into(), &"model".into())
    );
    assert!(has_no_bookings(&gateway));
    // A stored response is fetched without naming a model.
    let bytes = request("GET", "/v1/responses/resp_1", "x-api-key: other", "");
    let mut client = Client::sending(gateway.address(), bytes).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
}

#[tokio::test]
async fn exactly_as_many_requests_run_as_the_key_allows() {
    let mut worker = FakeWorker::start().await;
    let limited = KeyConfig {
        limits: KeyLimits {
            concurrent_requests: NonZeroU32::new(3),
            ..KeyLimits::default()
        },
        ..key("a")
    };
    let gateway = gateway_with(with_keys(&worker, vec![limited, key("b")])).await;
    let mut clients = Vec::new();
    let mut exchanges = Vec::new();
    for _ in 0..3 {
        clients.push(chat_with(&gateway, "a").await);
        exchanges.push(worker.request().await);
    }
    for _ in 0..5 {
        let error = chat_with(&gateway, "a").await.response().await.error(429);
        assert_eq!(error["code"], "rate_limit_exceeded");
    }
    // Another key is not affected.
    let mut other = chat_with(&gateway, "b").await;
    worker.request().await.respond_json(usage(1, 1)).await;
    assert_eq!(other.response().await.status(), 200);
    // A client that leaves makes room, and so does a response that ends.
    drop(clients.pop());
    exchanges.pop().unwrap().closed().await;
    exchanges.pop().unwrap().respond_json(usage(1, 1)).await;
    assert_eq!(clients.pop().unwrap().response().await.status(), 200);
    until("bookings of one request", || {
        gateway.router().booking_count() == 1
    })
    .await;
    for _ in 0..2 {
        clients.push(chat_with(&gateway, "a").await);
        exchanges.push(worker.request().await);
    }
    chat_with(&gateway, "a").await.response().await.error(429);
}

#[tokio::test]
async fn tokens_are_reserved_by_the_prediction_and_settled_by_the_usage() {
    let mut worker = FakeWorker::start().await;
    let limited = KeyConfig {
        limits: KeyLimits {
            requests_per_minute: NonZeroU32::new(1000),
            tokens_per_minute: NonZeroU32::new(1000),
            ..KeyLimits::default()
        },
        ..key("a")
    };
    let gateway = gateway_with(with_keys(&worker, vec![limited])).await;
    let remaining = |response: &ClientResponse| {
        let header = response.head.get("x-ratelimit-remaining-tokens").unwrap();
        header.parse::<u32>().unwrap()
    };
    let mut client = chat_with(&gateway, "a").await;
    worker.request().await.respond_json(usage(300, 500)).await;
    let response = client.response().await;
    assert_eq!(
        response.head.get("x-ratelimit-limit-requests"),
        Some("1000")
    );
    assert_eq!(
        response.head.get("x-ratelimit-remaining-requests"),
        Some("999")
    );
    // The response was complete before its head was passed on.
    assert!((200..=210).contains(&remaining(&response)), "{response:?}");
    until_released(&gateway).await;
    // 800 tokens are taken, and an output like the first is expected.
    let response = chat_with(&gateway, "a").await.response().await;
    let error = response.error(429);
    assert_eq!(
        (&error["code"], &error["type"]),
        (&"rate_limit_exceeded".into(), &"rate_limit_error".into())
    );
    let seconds: u32 = response.head.get("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    assert!((190..=230).contains(&remaining(&response)), "{response:?}");
    assert!(has_no_bookings(&gateway));

    // A request that fits no minute is not retried.
    let long = chat(&"word ".repeat(2000), false);
    let bytes = request("POST", CHAT, "x-api-key: a", &long);
    let response = Client::sending(gateway.address(), bytes)
        .await
        .response()
        .await;
    response.error(429);
    assert_eq!(response.head.get("x-should-retry"), Some("false"));
    assert_eq!(response.head.get("retry-after"), None);
}
