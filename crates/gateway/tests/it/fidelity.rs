//! Requests and responses are passed on unchanged.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use serde_json::json;

/// Body that no JSON library would write. Every byte of it must reach the worker.
const ODD_BODY: &str = "{ \"model\" :\t\"m\",\r\n \"messages\":[ {\"role\":\"user\",\"content\":\
    \"caf\\u00e9 \\ud83d\\ude00 \u{1F600} \\/\"} ] ,\"temperature\":1.0e0,\"temperature\":0.50,\
    \"unknown\":{\"deep\":[1,2.0,{}]},\"seed\":12345678901234567890 }\n ";

#[tokio::test]
async fn a_request_reaches_the_worker_byte_for_byte() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let length = ODD_BODY.len();
    let request = format!(
        "POST {CHAT}?beta=a%20b&x HTTP/1.1\r\nHost: gateway.example\r\n\
         Authorization: Bearer sk-secret\r\nX-Custom: one\r\nX-Custom: two\r\n\
         x-foresee-mine: kept\r\nContent-Type: application/json; charset=utf-8\r\n\
         Connection: keep-alive, x-private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nTE: trailers\r\n\
         X-Request-Id: mine-7\r\nContent-Length: {length}\r\n\r\n{ODD_BODY}"
    );
    let mut client = Client::sending(gateway.address(), request).await;

    let exchange = worker.request().await;
    assert_eq!(exchange.body, ODD_BODY.as_bytes());
    let head = &exchange.head;
    assert_eq!(
        head.first_line,
        format!("POST {CHAT}?beta=a%20b&x HTTP/1.1")
    );
    assert_eq!(
        head.get("host"),
        Some(worker.address.to_string().as_str()),
        "the worker's address, and not the gateway's"
    );
    assert_eq!(head.get("authorization"), Some("Bearer sk-secret"));
    let custom = head.headers.iter().filter(|(name, _)| name == "x-custom");
    assert_eq!(custom.count(), 2);
    assert_eq!(head.get("x-foresee-mine"), Some("kept"));
    assert_eq!(
        head.get("content-type"),
        Some("application/json; charset=utf-8")
    );
    assert_eq!(
        head.get("content-length"),
        Some(length.to_string().as_str())
    );
    assert_eq!(head.get("x-request-id"), Some("mine-7"));
    for name in [
        "connection",
        "x-private",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
    ] {
        assert_eq!(head.get(name), None, "{name} belongs to the connection");
    }

    let body = "{\"id\": \"x\",\n\"unknown\" : 1.0}";
    exchange
        .respond(format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Engine: e\r\n\
             Connection: X-Inner\r\nX-Inner: 1\r\nKeep-Alive: timeout=9\r\n\
             x-foresee-worker: impostor\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.text(), body);
    let head = &response.head;
    assert_eq!(head.get("x-engine"), Some("e"));
    assert_eq!(head.get("x-inner"), None);
    assert_eq!(head.get("keep-alive"), None);
    let cookies = head.headers.iter().filter(|(name, _)| name == "set-cookie");
    assert_eq!(cookies.count(), 2);
    assert_eq!(head.get("x-foresee-worker"), Some("a"));
    assert_eq!(head.get("x-foresee-overlap-tokens"), Some("0"));
    assert_eq!(head.get("x-request-id"), Some("mine-7"));
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_chunked_request_arrives_whole_and_is_counted() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let mut client = Client::sending(gateway.address(), head).await;
    let informed = client.head().await;
    assert_eq!(informed.status(), 100);
    // The cut lies within the bytes of one character.
    let cut = ODD_BODY.find('\u{1F600}').unwrap() + 2;
    let (first, second) = ODD_BODY.as_bytes().split_at(cut);
    client.send(chunk(first)).await;
    client.send(chunk(second)).await;
    client.send("0\r\n\r\n").await;

    let exchange = worker.request().await;
    assert_eq!(exchange.body, ODD_BODY.as_bytes());
    assert_eq!(
        exchange.head.get("content-length"),
        Some(ODD_BODY.len().to_string().as_str())
    );
    assert_eq!(exchange.head.get("transfer-encoding"), None);
    assert_eq!(exchange.head.get("expect"), None);
    exchange.respond_json("{}").await;
    assert_eq!(client.response().await.text(), "{}");
}

#[tokio::test]
async fn a_response_is_passed_on_chunk_by_chunk() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    // Unusual line ends, comments and cuts must stay as they are.
    let chunks: [&[u8]; 4] = [
        b": ping\r\rdata:{\"choices\":[{\"delta\":{\"content\":\"\xF0\x9F",
        b"\x98\x80\"}}]}\r",
        b"\n\r\nid: 7\nevent: odd\ndata: not json\n\n",
        b"\xFF\xFE\n\ndata: [DONE]",
    ];
    for (index, chunk) in chunks.iter().enumerate() {
        exchange.send_chunk(chunk).await;
        if index == 0 {
            assert_eq!(client.head().await.status(), 200);
        }
        // The next chunk is not sent before this one has arrived.
        assert_eq!(client.chunk().await, *chunk, "chunk {index}");
    }
    exchange.finish_chunks().await;
    assert_eq!(client.rest().await.unwrap(), "");
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_request_without_an_id_gets_one() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        let mut client =
            Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
        let exchange = worker.request().await;
        let given = exchange.head.get("x-request-id").unwrap().to_owned();
        exchange.respond_json("{}").await;
        let response = client.response().await;
        assert_eq!(response.head.get("x-request-id"), Some(given.as_str()));
        ids.push(given);
    }
    assert_ne!(ids[0], ids[1]);
    // The gateway's own responses have one too.
    let response = call(gateway.address(), "POST", CHAT, "{").await;
    assert!(response.head.get("x-request-id").is_some());
}

#[tokio::test]
async fn the_response_reports_the_overlap_of_a_known_prompt() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let prompt = "a prompt long enough for many blocks ".repeat(40);
    let mut overlaps = Vec::new();
    for _ in 0..2 {
        let mut client =
            Client::sending(gateway.address(), http("POST", CHAT, chat(&prompt, true))).await;
        let mut exchange = worker.request().await;
        exchange.start_stream().await;
        exchange.send_chunk(token("x")).await;
        exchange.end_stream().await;
        let head = client.head().await;
        let overlap = head.get("x-foresee-overlap-tokens").unwrap();
        overlaps.push(overlap.parse::<u32>().unwrap());
        client.rest().await.unwrap();
        until_released(&gateway).await;
    }
    assert_eq!(overlaps[0], 0);
    assert!(overlaps[1] >= 16 && overlaps[1] % 16 == 0, "{overlaps:?}");
}

#[tokio::test]
async fn a_head_request_gets_a_response_without_a_body() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.pass_through = vec!["/file".parse().unwrap()];
    let gateway = gateway_with(config).await;
    for content_type in ["text/plain", "text/event-stream"] {
        let mut client = Client::sending(gateway.address(), http("HEAD", "/file", "")).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.head.first_line, "HEAD /file HTTP/1.1");
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: 1234\r\n\r\n"
        );
        exchange.respond(head).await;
        let head = client.head().await;
        assert_eq!(head.status(), 200);
        assert_eq!(head.get("content-length"), Some("1234"));
        assert_eq!(head.get("content-type"), Some(content_type));
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn responses_without_a_length_end_with_the_connection() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.pass_through = vec!["/old".parse().unwrap(), "/x".parse().unwrap()];
    let gateway = gateway_with(config).await;
    let mut client = Client::sending(gateway.address(), http("GET", "/old", "")).await;
    let mut exchange = worker.request().await;
    exchange
        .send("HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nold ways")
        .await;
    exchange.close();
    assert_eq!(client.response().await.text(), "old ways");

    let mut client = Client::sending(gateway.address(), http("DELETE", "/x", "")).await;
    let exchange = worker.request().await;
    exchange.respond("HTTP/1.1 204 No Content\r\n\r\n").await;
    let response = client.head().await;
    assert_eq!(response.status(), 204);
    until_released(&gateway).await;
}

#[tokio::test]
async fn error_responses_of_a_worker_reach_the_client() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let body = "{\"object\":\"error\", \"message\":\"engine's own words\"}";
    for (status, outcome) in [
        ("400 Bad Request", "refused"),
        ("404 Not Found", "refused"),
        ("422 Unprocessable Entity", "refused"),
        ("500 Internal Server Error", "worker_error"),
        ("504 Gateway Timeout", "worker_error"),
        // The worker gets no further request for a second.
        ("429 Too Many Requests", "refused"),
    ] {
        let mut client =
            Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
        let exchange = worker.request().await;
        exchange
            .respond(whole(status, "application/json", body))
            .await;
        let response = client.response().await;
        assert_eq!(response.head.first_line, format!("HTTP/1.1 {status}"));
        assert_eq!(response.text(), body);
        until_released(&gateway).await;
        let text = metrics(&gateway).await;
        let series = format!("foresee_requests_total{{outcome=\"{outcome}\"}}");
        assert!(value(&text, &series).unwrap() >= 1.0, "{status}");
    }
}

#[tokio::test]
async fn models_of_all_workers_are_listed_once() {
    let first = FakeWorker::serving(&["m1", "both"]).await;
    let second = FakeWorker::serving(&["both", "m2"]).await;
    first.set_model_list(
        r#"{"data":[{"id":"m1","root":"/x"},{"id":"both","max_model_len":1.0},{"no":"id"}]}"#,
    );
    let gateway = gateway(&[&first, &second]).await;
    let response = call(gateway.address(), "GET", "/v1/models", "").await;
    assert_eq!(response.status(), 200);
    assert_eq!(
        response.json(),
        json!({"object": "list", "data": [
            {"id": "m1", "root": "/x"},
            {"id": "both", "max_model_len": 1.0},
            {"id": "m2"},
        ]})
    );
    assert!(
        response.text().contains(r#""max_model_len":1.0}"#),
        "an entry is as its worker wrote it"
    );
}

#[tokio::test]
async fn a_request_is_routed_to_a_worker_that_serves_its_model() {
    let mut first = FakeWorker::serving(&["m1"]).await;
    let mut second = FakeWorker::serving(&["m2"]).await;
    let gateway = gateway(&[&first, &second]).await;
    for _ in 0..3 {
        for (model, worker) in [("m1", &mut first), ("m2", &mut second)] {
            let body = json!({ "model": model, "prompt": "hi" }).to_string();
            let request = http("POST", "/v1/completions", body);
            let mut client = Client::sending(gateway.address(), request).await;
            worker.request().await.respond_json("{}").await;
            assert_eq!(client.response().await.status(), 200);
        }
    }
}

#[tokio::test]
async fn a_workers_url_may_have_a_path() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[]);
    config.pass_through = vec!["/x".parse().unwrap()];
    let spec = format!("http://{}/engines/one/,name=deep", worker.address);
    config.workers = vec![spec.parse().unwrap()];
    let gateway = foresee_gateway::Gateway::start(config).unwrap();
    // The fake worker does not know these paths, so the test responds to the health checks.
    let mut is_discovered = false;
    let mut client = None;
    loop {
        let exchange = worker.request().await;
        match exchange.head.first_line.as_str() {
            "GET /engines/one/health HTTP/1.1" => exchange.respond_json("").await,
            "GET /engines/one/v1/models HTTP/1.1" => exchange.respond_json("{}").await,
            "GET /engines/one/metrics HTTP/1.1" => exchange.respond_json("").await,
            "GET /engines/one/server_info HTTP/1.1" => {
                exchange.respond_json("{}").await;
                is_discovered = true;
            }
            line => {
                assert_eq!(line, "GET /engines/one/x?y=1 HTTP/1.1");
                break exchange.respond_json("there").await;
            }
        }
        if is_discovered && client.is_none() {
            until("the worker to be healthy", || {
                state(&gateway, "deep") == foresee_core::workers::WorkerState::Healthy
            })
            .await;
            let request = http("GET", "/x?y=1", "");
            client = Some(Client::sending(gateway.address(), request).await);
        }
    }
    assert_eq!(client.unwrap().response().await.text(), "there");
}
