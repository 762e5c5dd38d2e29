//! What passes through, passes unchanged: requests to workers, answers to clients.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use serde_json::json;

/// A body that no JSON library would write, and that every byte of must survive.
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
        "the worker's, not the gateway's"
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
        .answer(format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Engine: e\r\n\
             Connection: X-Inner\r\nX-Inner: 1\r\nKeep-Alive: timeout=9\r\n\
             x-foresee-worker: impostor\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.text(), body);
    let head = &answer.head;
    assert_eq!(head.get("x-engine"), Some("e"));
    assert_eq!(head.get("x-inner"), None);
    assert_eq!(head.get("keep-alive"), None);
    let cookies = head.headers.iter().filter(|(name, _)| name == "set-cookie");
    assert_eq!(cookies.count(), 2);
    assert_eq!(head.get("x-foresee-worker"), Some("a"));
    assert_eq!(head.get("x-foresee-overlap-tokens"), Some("0"));
    assert_eq!(head.get("x-request-id"), Some("mine-7"));
    freed(&gateway).await;
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
    exchange.answer_json("{}").await;
    assert_eq!(client.answer().await.text(), "{}");
}

#[tokio::test]
async fn an_answer_is_passed_on_piece_by_piece() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    // Odd line ends, comments and cuts: nothing is tidied up.
    let pieces: [&[u8]; 4] = [
        b": ping\r\rdata:{\"choices\":[{\"delta\":{\"content\":\"\xF0\x9F",
        b"\x98\x80\"}}]}\r",
        b"\n\r\nid: 7\nevent: odd\ndata: not json\n\n",
        b"\xFF\xFE\n\ndata: [DONE]",
    ];
    for (index, piece) in pieces.iter().enumerate() {
        exchange.send_chunk(piece).await;
        if index == 0 {
            assert_eq!(client.head().await.status(), 200);
        }
        // The next piece is not written before this one has arrived.
        assert_eq!(client.chunk().await, *piece, "piece {index}");
    }
    exchange.finish_chunks().await;
    assert_eq!(client.rest().await.unwrap(), "");
    freed(&gateway).await;
}

#[tokio::test]
async fn the_gateway_names_a_request_that_has_no_name() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut names = Vec::new();
    for _ in 0..2 {
        let mut client =
            Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
        let exchange = worker.request().await;
        let given = exchange.head.get("x-request-id").unwrap().to_owned();
        exchange.answer_json("{}").await;
        let answer = client.answer().await;
        assert_eq!(answer.head.get("x-request-id"), Some(given.as_str()));
        names.push(given);
    }
    assert_ne!(names[0], names[1]);
    // An answer the gateway makes itself has one, too.
    let answer = call(gateway.address(), "POST", CHAT, "{").await;
    assert!(answer.head.get("x-request-id").is_some());
}

#[tokio::test]
async fn the_overlap_of_a_known_prompt_is_told() {
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
        freed(&gateway).await;
    }
    assert_eq!(overlaps[0], 0);
    assert!(overlaps[1] >= 16 && overlaps[1] % 16 == 0, "{overlaps:?}");
}

#[tokio::test]
async fn other_paths_pass_through() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let cases = [
        ("GET", "/version?verbose=1&a=%2F", ""),
        ("POST", "/v1/rerank", "not { json"),
        ("POST", "/v1/load_lora_adapter", "{\"lora_name\": \"x\"}"),
        ("DELETE", "/v1/files/7", ""),
        ("PUT", "/odd//path/", "x"),
        ("POST", "/tokenize", "{ }"),
        ("GET", CHAT, ""),
    ];
    for (method, path, body) in cases {
        let mut client = Client::sending(gateway.address(), http(method, path, body)).await;
        let exchange = worker.request().await;
        assert_eq!(
            exchange.head.first_line,
            format!("{method} {path} HTTP/1.1")
        );
        assert_eq!(exchange.body, body.as_bytes());
        exchange
            .answer(whole("207 Odd Status", "text/odd", "as\0it is"))
            .await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.text()), (207, "as\0it is"));
        assert_eq!(answer.head.get("content-type"), Some("text/odd"));
        assert_eq!(answer.head.get("x-foresee-worker"), Some("a"));
    }
    freed(&gateway).await;
}

#[tokio::test]
async fn a_head_request_gets_a_head() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    for content_type in ["text/plain", "text/event-stream"] {
        let mut client = Client::sending(gateway.address(), http("HEAD", "/file", "")).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.head.first_line, "HEAD /file HTTP/1.1");
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: 1234\r\n\r\n"
        );
        exchange.answer(head).await;
        let head = client.head().await;
        assert_eq!(head.status(), 200);
        assert_eq!(head.get("content-length"), Some("1234"));
        assert_eq!(head.get("content-type"), Some(content_type));
        freed(&gateway).await;
    }
}

#[tokio::test]
async fn answers_without_a_length_end_with_the_connection() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = Client::sending(gateway.address(), http("GET", "/old", "")).await;
    let mut exchange = worker.request().await;
    exchange
        .send("HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nold ways")
        .await;
    exchange.close();
    assert_eq!(client.answer().await.text(), "old ways");

    let mut client = Client::sending(gateway.address(), http("DELETE", "/x", "")).await;
    let exchange = worker.request().await;
    exchange.answer("HTTP/1.1 204 No Content\r\n\r\n").await;
    let answer = client.head().await;
    assert_eq!(answer.status(), 204);
    freed(&gateway).await;
}

#[tokio::test]
async fn what_a_worker_says_is_wrong_reaches_the_client() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let body = "{\"object\":\"error\", \"message\":\"engine's own words\"}";
    for (status, outcome) in [
        ("400 Bad Request", "refused"),
        ("404 Not Found", "refused"),
        ("422 Unprocessable Entity", "refused"),
        ("429 Too Many Requests", "refused"),
        ("500 Internal Server Error", "worker_error"),
        ("503 Service Unavailable", "worker_error"),
        ("504 Gateway Timeout", "worker_error"),
    ] {
        let mut client =
            Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
        let exchange = worker.request().await;
        exchange
            .answer(whole(status, "application/json", body))
            .await;
        let answer = client.answer().await;
        assert_eq!(answer.head.first_line, format!("HTTP/1.1 {status}"));
        assert_eq!(answer.text(), body);
        freed(&gateway).await;
        let text = metrics(&gateway).await;
        let series = format!("foresee_requests_total{{outcome=\"{outcome}\"}}");
        assert!(value(&text, &series).unwrap() >= 1.0, "{status}");
    }
}

#[tokio::test]
async fn models_of_all_workers_are_listed_once() {
    let one = FakeWorker::serving(&["m1", "both"]).await;
    let two = FakeWorker::serving(&["both", "m2"]).await;
    one.set_model_list(
        r#"{"data":[{"id":"m1","root":"/x"},{"id":"both","max_model_len":1.0},{"no":"id"}]}"#,
    );
    let gateway = gateway(&[&one, &two]).await;
    let answer = call(gateway.address(), "GET", "/v1/models", "").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(
        answer.json(),
        json!({"object": "list", "data": [
            {"id": "m1", "root": "/x"},
            {"id": "both", "max_model_len": 1.0},
            {"id": "m2"},
        ]})
    );
    assert!(
        answer.text().contains(r#""max_model_len":1.0}"#),
        "an entry is as its worker wrote it"
    );
}

#[tokio::test]
async fn a_model_goes_to_a_worker_that_serves_it() {
    let mut one = FakeWorker::serving(&["m1"]).await;
    let mut two = FakeWorker::serving(&["m2"]).await;
    let gateway = gateway(&[&one, &two]).await;
    for _ in 0..3 {
        for (model, worker) in [("m1", &mut one), ("m2", &mut two)] {
            let body = json!({ "model": model, "prompt": "hi" }).to_string();
            let request = http("POST", "/v1/completions", body);
            let mut client = Client::sending(gateway.address(), request).await;
            worker.request().await.answer_json("{}").await;
            assert_eq!(client.answer().await.status(), 200);
        }
    }
}

#[tokio::test]
async fn a_worker_may_live_below_a_path() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[]);
    let spec = format!("http://{}/engines/one/,name=deep", worker.address);
    config.workers = vec![spec.parse().unwrap()];
    let gateway = foresee_gateway::Gateway::start(config).unwrap();
    // Its probes are not the fake worker's own paths, so the test answers them.
    let mut found = false;
    let mut client = None;
    loop {
        let exchange = worker.request().await;
        match exchange.head.first_line.as_str() {
            "GET /engines/one/health HTTP/1.1" => exchange.answer_json("").await,
            "GET /engines/one/v1/models HTTP/1.1" => exchange.answer_json("{}").await,
            "GET /engines/one/metrics HTTP/1.1" => exchange.answer_json("").await,
            "GET /engines/one/server_info HTTP/1.1" => {
                exchange.answer_json("{}").await;
                found = true;
            }
            line => {
                assert_eq!(line, "GET /engines/one/x?y=1 HTTP/1.1");
                break exchange.answer_json("there").await;
            }
        }
        if found && client.is_none() {
            until("the worker to be found", || {
                state(&gateway, "deep") == foresee_core::fleet::WorkerState::Healthy
            })
            .await;
            let request = http("GET", "/x?y=1", "");
            client = Some(Client::sending(gateway.address(), request).await);
        }
    }
    assert_eq!(client.unwrap().answer().await.text(), "there");
}
