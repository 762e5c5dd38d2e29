//! Which paths reach a worker, and which worker: only inference, and only workers that serve the model.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use serde_json::{Value, json};

#[tokio::test]
async fn control_paths_of_engines_are_not_reachable() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    for path in [
        "/server_info",
        "/get_server_info",
        "/metrics",
        "/version",
        "/is_sleeping",
        "/v1/models/",
        "/docs",
        "/openapi.json",
        "/v1/files/7",
        "//v1/chat/completions",
    ] {
        let response = call(gateway.address(), "GET", path, "").await;
        assert_eq!(response.error(404)["code"], "unknown_url", "{path}");
    }
    for path in [
        "/flush_cache",
        "/reset_prefix_cache",
        "/sleep",
        "/wake_up",
        "/pause",
        "/update_weights_from_disk",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/collective_rpc",
        "/start_profile",
        "/abort_request",
        "/v1/chat/completions/",
        "/v1/chat/completions/render",
        "/V1/chat/completions",
        "/v1/../flush_cache",
        "/v1/%2e%2e/flush_cache",
        "/odd//path/",
    ] {
        let response = call(gateway.address(), "POST", path, "{}").await;
        response.error(404);
    }
    assert!(worker.try_request().is_none());
    assert!(has_no_bookings(&gateway));
}

#[tokio::test]
async fn another_method_is_refused() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    for method in ["GET", "PUT", "DELETE"] {
        let response = call(gateway.address(), method, CHAT, "").await;
        assert_eq!(response.error(405)["code"], "method_not_allowed");
    }
}

#[tokio::test]
async fn paths_of_the_operator_pass_through_unread() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.pass_through = vec!["/version".parse().unwrap(), "/v1/files/*".parse().unwrap()];
    let gateway = gateway_with(config).await;
    for (method, path, body) in [
        ("GET", "/version?verbose=1&a=%2F", ""),
        ("DELETE", "/v1/files/7", ""),
        ("POST", "/v1/files/x", "not { json"),
    ] {
        let mut client = Client::sending(gateway.address(), http(method, path, body)).await;
        let exchange = worker.request().await;
        assert_eq!(
            exchange.head.first_line,
            format!("{method} {path} HTTP/1.1")
        );
        assert_eq!(exchange.body, body.as_bytes());
        exchange
            .respond(whole("207 Odd Status", "text/odd", "as\0it is"))
            .await;
        let response = client.response().await;
        assert_eq!((response.status(), response.text()), (207, "as\0it is"));
    }
    for path in [
        "/v1/files",
        "/v1/files/../../flush_cache",
        "/v1/files/%2E%2e/x",
    ] {
        call(gateway.address(), "GET", path, "").await.error(404);
    }
    until_released(&gateway).await;
}

#[tokio::test]
async fn streams_of_unknown_apis_end_as_they_are() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.pass_through = vec!["/events".parse().unwrap()];
    let gateway = gateway_with(config).await;
    for path in ["/events", "/v1/responses/resp_1?stream=true"] {
        let mut client = Client::sending(gateway.address(), http("GET", path, "")).await;
        let mut exchange = worker.request().await;
        exchange.start_stream().await;
        let events = "event: response.completed\ndata: {\"type\": \"response.completed\"}\n\n";
        exchange.send_chunk(events).await;
        exchange.finish_chunks().await;
        client.head().await;
        assert_eq!(client.rest().await.unwrap(), events, "{path}");
    }
    until_metric(&gateway, "foresee_requests_total{outcome=\"ok\"}", 2.0).await;
}

#[tokio::test]
async fn a_client_cannot_remove_the_headers_of_the_gateway() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = String::from_utf8(http("POST", CHAT, chat("hi", false))).unwrap();
    let request = request.replacen(
        "\r\n",
        "\r\nconnection: keep-alive, x-forwarded-for, via, x-own\r\nx-own: 1\r\n",
        1,
    );
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.head.get("x-forwarded-for"), Some("127.0.0.1"));
    assert!(exchange.head.get("via").is_some());
    assert_eq!(exchange.head.get("x-own"), None);
    exchange.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
}

/// Bodies of every kind of path, without a model.
fn bodies() -> Vec<(&'static str, Value)> {
    let message = json!([{"role": "user", "content": "hi"}]);
    vec![
        ("/v1/chat/completions", json!({"messages": message})),
        ("/v1/completions", json!({"prompt": "hi"})),
        ("/v1/embeddings", json!({"input": "hi"})),
        ("/v1/responses", json!({"input": "hi"})),
        (
            "/v1/messages",
            json!({"messages": message, "max_tokens": 5}),
        ),
        ("/v1/messages/count_tokens", json!({"messages": message})),
        ("/v1/rerank", json!({"query": "q", "documents": ["d"]})),
        ("/rerank", json!({"query": "q", "documents": ["d"]})),
        ("/v1/score", json!({"text_1": "q", "text_2": "d"})),
        ("/classify", json!({"input": "hi"})),
        ("/pooling", json!({"input": "hi"})),
        ("/tokenize", json!({"prompt": "hi"})),
        ("/detokenize", json!({"tokens": [1]})),
        (
            "/inference/v1/generate",
            json!({"token_ids": [1, 2], "sampling_params": {}}),
        ),
        ("/generate", json!({"text": "hi"})),
        ("/v1/chat/completions/batch", json!({"requests": []})),
    ]
}

#[tokio::test]
async fn each_path_goes_to_a_worker_that_serves_the_model() {
    let mut first = FakeWorker::serving(&["a"]).await;
    let mut second = FakeWorker::serving(&["b"]).await;
    let gateway = gateway(&[&first, &second]).await;
    for (path, body) in bodies() {
        for (model, worker) in [("a", &mut first), ("b", &mut second)] {
            let mut body = body.clone();
            body["model"] = model.into();
            let body = body.to_string();
            let mut client = Client::sending(gateway.address(), http("POST", path, &body)).await;
            let exchange = worker.request().await;
            assert_eq!(exchange.body, body.as_bytes(), "{path}");
            exchange.respond_json("{}").await;
            assert_eq!(client.response().await.status(), 200, "{path}");
        }
        let mut unknown = body.clone();
        unknown["model"] = "zzz".into();
        let response = call(gateway.address(), "POST", path, unknown.to_string()).await;
        assert_eq!(response.status(), 404, "{path}");
        let message = response.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            message.contains("zzz") && message.contains("`a`, `b`"),
            "{message}"
        );
    }
    assert!(first.is_idle() && second.is_idle());
    until_released(&gateway).await;
}

#[tokio::test]
async fn the_model_is_read_from_compressed_and_multipart_bodies() {
    let mut first = FakeWorker::serving(&["a"]).await;
    let mut second = FakeWorker::serving(&["b"]).await;
    let gateway = gateway(&[&first, &second]).await;
    // gzip of {"model":"b","messages":[{"role":"user","content":"hi"}]}, stored without compression.
    let json = br#"{"model":"b","messages":[{"role":"user","content":"hi"}]}"#;
    let gzip = stored_gzip(json);
    let form = "--X\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\r\n\
                --X\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nb\r\n--X--\r\n";
    let requests = [
        (
            CHAT,
            "content-type: application/json\r\ncontent-encoding: gzip",
            gzip,
        ),
        (
            "/v1/audio/transcriptions",
            "content-type: multipart/form-data; boundary=X",
            form.as_bytes().to_vec(),
        ),
    ];
    for (path, headers, body) in requests {
        for _ in 0..3 {
            let length = body.len();
            let head = format!(
                "POST {path} HTTP/1.1\r\nhost: g\r\n{headers}\r\ncontent-length: {length}\r\n\r\n"
            );
            let request = [head.as_bytes(), &body].concat();
            let mut client = Client::sending(gateway.address(), request).await;
            let exchange = second.request().await;
            assert_eq!(exchange.body, body, "{path}");
            exchange.respond_json("{}").await;
            assert_eq!(client.response().await.status(), 200, "{path}");
        }
    }
    assert!(first.try_request().is_none());
}

/// Returns `data` in gzip format, in one stored block.
pub(crate) fn stored_gzip(data: &[u8]) -> Vec<u8> {
    let length = data.len() as u16;
    let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
    gzip.extend(length.to_le_bytes());
    gzip.extend((!length).to_le_bytes());
    gzip.extend_from_slice(data);
    gzip.extend(crc32(data).to_le_bytes());
    gzip.extend(u32::from(length).to_le_bytes());
    gzip
}

/// Returns the CRC-32 of `data` (IEEE 802.3).
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[tokio::test]
async fn errors_of_the_messages_api_have_anthropics_shape() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let body = json!({"model": "zzz", "max_tokens": 5, "messages": []}).to_string();
    let response = call(gateway.address(), "POST", "/v1/messages", body).await;
    assert_eq!(response.status(), 404);
    let body = response.json();
    assert_eq!(body["type"], "error");
    assert_eq!(body["error"]["type"], "not_found_error");
}

#[tokio::test]
async fn one_model_can_be_looked_up() {
    let worker = FakeWorker::serving(&["org/m 1"]).await;
    let gateway = gateway(&[&worker]).await;
    for path in ["/v1/models/org/m%201", "/v1/models/org%2Fm%201"] {
        let response = call(gateway.address(), "GET", path, "").await;
        assert_eq!(response.json()["id"], "org/m 1");
    }
    let response = call(gateway.address(), "GET", "/v1/models/other", "").await;
    assert_eq!(response.error(404)["code"], "model_not_found");
}

#[tokio::test]
async fn a_websocket_is_refused_and_an_offer_of_http2_is_ignored() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let upgrade = "GET /v1/realtime HTTP/1.1\r\nhost: g\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
    let mut client = Client::sending(gateway.address(), upgrade).await;
    let response = client.response().await;
    assert_eq!(response.error(501)["code"], "upgrade_not_supported");

    let body = chat("hi", false);
    let length = body.len();
    let offer = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n\
         http2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    let mut client = Client::sending(gateway.address(), offer).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.head.get("upgrade"), None);
    exchange.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
}

#[tokio::test]
async fn a_stored_response_is_continued_on_its_worker() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let start = json!({"model": MODEL, "input": "hi"}).to_string();
    let mut client =
        Client::sending(gateway.address(), http("POST", "/v1/responses", &start)).await;
    let reply = json!({"id": "resp_1", "object": "response", "status": "completed", "output": []});
    first.request().await.respond_json(reply.to_string()).await;
    client.response().await;
    until_released(&gateway).await;
    let next = json!({"model": MODEL, "input": "more", "previous_response_id": "resp_1"});
    for _ in 0..3 {
        let request = http("POST", "/v1/responses", next.to_string());
        let mut client = Client::sending(gateway.address(), request).await;
        first.request().await.respond_json("{}").await;
        client.response().await;
        let request = http("GET", "/v1/responses/resp_1", "");
        let mut client = Client::sending(gateway.address(), request).await;
        first.request().await.respond_json("{}").await;
        client.response().await;
    }
    assert!(second.try_request().is_none());
}
