//! Aliases of models: the worker sees the model's name, and the client sees the alias.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;

use crate::fake_worker::*;
use crate::paths::stored_gzip;
use foresee_gateway::{Gateway, GatewayConfig, KeyConfig, KeyHash};
use serde_json::{Value, json};

/// Returns the configuration of a gateway with these workers and aliases.
fn with_aliases(workers: &[&FakeWorker], aliases: &[&str]) -> GatewayConfig {
    let mut config = config(workers);
    let aliases = aliases.iter().map(|alias| alias.parse().unwrap());
    config.model_aliases = aliases.collect();
    config
}

/// Returns a chat completion for a model, with a header line.
fn chat_for(model: &str, header: &str) -> String {
    let message = json!([{"role": "user", "content": "hi"}]);
    let body = json!({"messages": message, "model": model}).to_string();
    let request = String::from_utf8(http("POST", CHAT, body)).unwrap();
    request.replacen("\r\n", &format!("\r\n{header}\r\n"), 1)
}

/// Sends a request for `model`, and returns the model that the worker received.
async fn received_model(
    gateway: &Gateway,
    workers: &mut [&mut FakeWorker],
    request: String,
) -> String {
    let mut client = Client::sending(gateway.address(), request).await;
    let mut received = None;
    within("a request", async {
        while received.is_none() {
            received = workers.iter_mut().find_map(|worker| worker.try_request());
            tokio::task::yield_now().await;
        }
    })
    .await;
    let exchange = received.unwrap();
    let body: Value = serde_json::from_slice(&exchange.body).unwrap();
    let model = body["model"].as_str().unwrap().to_owned();
    exchange
        .respond_json(json!({"model": model, "id": "resp_1"}).to_string())
        .await;
    let response = client.response().await;
    assert_eq!(response.json()["model"], "public");
    model
}

#[tokio::test]
async fn the_worker_sees_the_model_and_the_client_the_alias() {
    let mut worker = FakeWorker::serving(&["served/a"]).await;
    let config = with_aliases(&[&worker], &["public=served/a"]);
    let gateway = gateway_with(config).await;

    let body =
        r#"{"messages":[{"role":"user","content":"\"model\":\"public\""}], "model" : "public"}"#;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, body)).await;
    let exchange = worker.request().await;
    let sent = body.replace(r#": "public""#, r#": "served/a""#);
    assert_eq!(exchange.body, sent.as_bytes());
    let length = exchange.head.get("content-length").unwrap().to_owned();
    assert_eq!(length, sent.len().to_string());
    exchange
        .respond_json(r#"{"model": "served/a", "choices": []}"#)
        .await;
    let response = client.response().await;
    assert_eq!(response.text(), r#"{"model": "public", "choices": []}"#);

    let mut client = Client::sending(
        gateway.address(),
        chat_for("public", "accept-encoding: gzip"),
    )
    .await;
    let mut exchange = worker.request().await;
    assert_eq!(exchange.head.get("accept-encoding"), None);
    exchange.start_stream().await;
    exchange.send_chunk("data: {\"mod").await;
    exchange.send_chunk("el\":\"ser").await;
    let rest = r#"ved/a","choices":[{"index":0,"delta":{"content":"x"}}]}"#;
    exchange.send_chunk(format!("{rest}\n\n")).await;
    exchange.end_stream().await;
    let response = client.response().await;
    let renamed = rest.replace("ved/a", "");
    let renamed = renamed.strip_prefix('"').unwrap();
    let expected = format!("data: {{\"model\":\"public\"{renamed}\n\ndata: [DONE]\n\n");
    assert_eq!(response.text(), expected);

    until_metric(
        &gateway,
        "foresee_model_alias_requests_total{alias=\"public\",model=\"served/a\"}",
        2.0,
    )
    .await;
    until_released(&gateway).await;
}

#[tokio::test]
async fn compressed_bodies_and_forms_are_rewritten() {
    let mut worker = FakeWorker::serving(&["served"]).await;
    let gateway = gateway_with(with_aliases(&[&worker], &["public=served"])).await;
    let body = r#"{"model":"public","prompt":"hi"}"#;
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\npublic\r\n--b--\r\n";
    let json_head = "content-type: application/json\r\ncontent-encoding: gzip";
    let form_head = "content-type: multipart/form-data; boundary=b";
    let gzip = stored_gzip(body.as_bytes());
    for (path, head, bytes, expected) in [
        (
            "/v1/completions",
            json_head,
            &gzip[..],
            body.replace("public", "served"),
        ),
        (
            "/v1/audio/transcriptions",
            form_head,
            form.as_bytes(),
            form.replace("public", "served"),
        ),
    ] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: g\r\n{head}\r\ncontent-length: {}\r\n\r\n",
            bytes.len()
        );
        let mut client =
            Client::sending(gateway.address(), [head.as_bytes(), bytes].concat()).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.body, expected.as_bytes());
        assert_eq!(exchange.head.get("content-encoding"), None);
        exchange.respond_json("{}").await;
        assert_eq!(client.response().await.status(), 200);
    }
}

#[tokio::test]
async fn a_session_keeps_its_model_and_shares_are_as_the_weights() {
    let mut first = FakeWorker::serving(&["a"]).await;
    let mut second = FakeWorker::serving(&["b"]).await;
    let config = with_aliases(&[&first, &second], &["public=a:3,b:1"]);
    let gateway = gateway_with(config).await;
    let mut by_session = HashMap::new();
    for round in 0..2 {
        for session in 0..40 {
            let header = format!("x-session-id: {session}");
            let request = chat_for("public", &header);
            let model = received_model(&gateway, &mut [&mut first, &mut second], request).await;
            let chosen = by_session.entry(session).or_insert_with(|| model.clone());
            assert_eq!(*chosen, model, "session {session}, round {round}");
        }
    }
    let share = by_session.values().filter(|model| *model == "a").count();
    assert!((22..=38).contains(&share), "{share} of 40");

    // Without a session, requests are spread.
    let mut models = HashMap::new();
    for _ in 0..40 {
        let request = chat_for("public", "x: y");
        let model = received_model(&gateway, &mut [&mut first, &mut second], request).await;
        *models.entry(model).or_insert(0) += 1;
    }
    assert!(models["a"] > models["b"], "{models:?}");
}

#[tokio::test]
async fn a_continued_response_stays_on_the_model_of_its_worker() {
    let mut first = FakeWorker::serving(&["a"]).await;
    let mut second = FakeWorker::serving(&["b"]).await;
    let config = with_aliases(&[&first, &second], &["public=a:1,b:1"]);
    let gateway = gateway_with(config).await;
    let request = |extra: Value| {
        let mut body = json!({"model": "public", "input": "hi"});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        String::from_utf8(http("POST", "/v1/responses", body.to_string())).unwrap()
    };
    let workers = &mut [&mut first, &mut second];
    let model = received_model(&gateway, workers, request(json!({}))).await;
    until_released(&gateway).await;
    for _ in 0..10 {
        let next = request(json!({"previous_response_id": "resp_1"}));
        assert_eq!(received_model(&gateway, workers, next).await, model);
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn aliases_are_listed_and_keys_name_them() {
    let worker = FakeWorker::serving(&["a"]).await;
    let mut config = with_aliases(&[&worker], &["public=zzz:9,a:1", "a=a", "dead=zzz"]);
    let mut key = KeyConfig::new("k", KeyHash::of(b"k"));
    key.models = vec!["public".to_owned()];
    config.keys = Some(vec![key, KeyConfig::new("all", KeyHash::of(b"all"))]);
    let gateway = gateway_with(config).await;
    let get = |path: &str, key: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: g\r\nx-api-key: {key}\r\n\r\n");
        let address = gateway.address();
        async move { Client::sending(address, request).await.response().await }
    };
    let ids = |list: &Value| -> Vec<String> {
        let data = list["data"].as_array().unwrap().iter();
        data.map(|entry| entry["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let list = get("/v1/models", "all").await.json();
    assert_eq!(ids(&list), ["public", "a"]);
    let list = get("/v1/models", "k").await.json();
    assert_eq!(ids(&list), ["public"]);
    assert_eq!(get("/v1/models/public", "k").await.json()["id"], "public");
    get("/v1/models/dead", "all").await.error(404);

    // The model behind the alias is not one of the key's.
    let mut client = Client::sending(gateway.address(), chat_for("a", "x-api-key: k")).await;
    client.response().await.error(403);
    let request = chat_for("dead", "x-api-key: all");
    let mut client = Client::sending(gateway.address(), request).await;
    let error = client.response().await.error(404);
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("`dead`") && message.contains("`public`"),
        "{message}"
    );
}
