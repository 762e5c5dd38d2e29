//! Clients disconnect, workers fail, requests are invalid: what each side receives, and that all bookings
//! are released.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::workers::WorkerState;
use serde_json::{Value, json};

// The client disconnects

#[tokio::test]
async fn a_client_that_leaves_before_the_first_byte_releases_its_booking() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    for head in [&b""[..], STREAM_HEAD] {
        let request = http("POST", CHAT, chat("hi", true));
        let client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(head).await;
        assert_eq!(worker_json(&gateway, "a").await.unwrap()["requests"], 1);
        drop(client);
        within(
            "the connection to the worker to be closed",
            exchange.closed(),
        )
        .await;
        until_released(&gateway).await;
    }
    until_metric(
        &gateway,
        "foresee_requests_total{outcome=\"client_left\"}",
        2.0,
    )
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_response_releases_its_booking() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let stream = [STREAM_HEAD, &chunk(token("x"))].concat();
    let json = whole("200 OK", "application/json", "{\"choices\": []}");
    let file = whole("200 OK", "application/octet-stream", [0; 100]);
    for response in [&stream[..], &json[..json.len() - 1], &file[..150]] {
        let request = http("POST", CHAT, chat("hi", true));
        let mut client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(response).await;
        client.head().await;
        assert_eq!(worker_json(&gateway, "a").await.unwrap()["requests"], 1);
        // The worker sends nothing more, so no failed write can reveal that the client has left.
        drop(client);
        within(
            "the connection to the worker to be closed",
            exchange.closed(),
        )
        .await;
        until_released(&gateway).await;
    }
    until_metric(
        &gateway,
        "foresee_requests_total{outcome=\"client_left\"}",
        3.0,
    )
    .await;
}

#[tokio::test]
async fn a_request_whose_client_leaves_before_its_end_reaches_no_worker() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let client = Client::sending(gateway.address(), &request[..request.len() - 1]).await;
    drop(client);
    // The response to a later request shows that the gateway had time to forward the first.
    let response = call(gateway.address(), "POST", CHAT, "{").await;
    response.error(400);
    assert!(worker.is_idle());
    assert!(has_no_bookings(&gateway));
}

// A worker fails before the first byte

/// Sends a request that the first worker fails by `fail`, and expects the second worker to serve it.
async fn assert_taken_over(stream: bool, fail: impl AsyncFnOnce(Exchange)) {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let body = chat("hi", stream);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, &body)).await;
    fail(first.request().await).await;

    let mut exchange = second.request().await;
    assert_eq!(exchange.body, body.as_bytes());
    let by_name = workers(&gateway);
    assert_eq!((by_name["a"].requests, by_name["b"].requests), (0, 1));
    assert_eq!(by_name["a"].active_blocks, 0, "the booking moved");
    assert!(by_name["b"].active_blocks > 0);
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    let head = client.head().await;
    assert_eq!(head.status(), 200);
    assert_eq!(head.get("x-foresee-worker"), Some("b"));
    let rest = client.rest().await.unwrap();
    assert_eq!(
        rest,
        token("x") + "data: [DONE]\n\n",
        "nothing of the first worker"
    );
    until_released(&gateway).await;
    until_metric(&gateway, "foresee_retries_total", 1.0).await;
    until_metric(&gateway, "foresee_requests_total{outcome=\"ok\"}", 1.0).await;
    // The first worker failed one request, but its health checks succeed.
    let probes = first.probes();
    until("the next health check", || first.probes() > probes + 1).await;
    assert_eq!(state(&gateway, "a"), WorkerState::Healthy);
}

#[tokio::test]
async fn another_worker_takes_over_after_a_reset() {
    assert_taken_over(true, async |exchange| exchange.reset()).await;
    assert_taken_over(false, async |exchange| exchange.reset()).await;
}

#[tokio::test]
async fn another_worker_takes_over_after_a_close() {
    assert_taken_over(true, async |exchange| exchange.close()).await;
}

#[tokio::test]
async fn another_worker_takes_over_after_half_a_head() {
    assert_taken_over(true, async |mut exchange| {
        exchange.send(&STREAM_HEAD[..STREAM_HEAD.len() - 2]).await;
        exchange.close();
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_a_stream_without_a_first_event() {
    assert_taken_over(true, async |mut exchange| {
        exchange.start_stream().await;
        exchange.close();
    })
    .await;
    assert_taken_over(true, async |mut exchange| {
        exchange.start_stream().await;
        exchange.reset();
    })
    .await;
    assert_taken_over(true, async |mut exchange| {
        exchange.start_stream().await;
        exchange.finish_chunks().await;
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_after_a_503() {
    assert_taken_over(true, async |exchange| {
        let response = whole("503 Service Unavailable", "text/plain", "busy");
        exchange.respond(response).await;
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_after_a_response_that_is_not_http() {
    assert_taken_over(true, async |mut exchange| {
        exchange.send("+PONG\r\n\r\n").await;
        exchange.close();
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_after_a_refused_connection() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    // No health check detects it.
    config.probe_interval = Duration::from_secs(60);
    let gateway = gateway_with(config).await;
    first.die().await;
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::sending(gateway.address(), request).await;
    second.request().await.respond_json("{}").await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.head.get("x-foresee-worker"), Some("b"));
    assert_eq!(state(&gateway, "a"), WorkerState::Unhealthy);
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_worker_that_does_not_respond_in_time_is_a_504() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.first_byte_timeout = Duration::from_millis(60);
    let gateway = gateway_with(config).await;
    for head in [&b""[..], STREAM_HEAD] {
        let request = http("POST", CHAT, chat("hi", true));
        let mut client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(head).await;
        client.response().await.error(504);
        within(
            "the connection to the worker to be closed",
            exchange.closed(),
        )
        .await;
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn a_lone_worker_that_closes_its_idle_connection_still_serves() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.probe_interval = Duration::from_secs(60);
    let gateway = gateway_with(config).await;
    for _ in 0..5 {
        let request = http("POST", CHAT, chat("hi", false));
        let mut client = Client::sending(gateway.address(), request).await;
        // The worker closes the connection just as the request arrives, so the request is lost.
        worker.request().await.reset();
        worker.request().await.respond_json("{}").await;
        assert_eq!(client.response().await.status(), 200);
        assert_eq!(state(&gateway, "a"), WorkerState::Healthy);
    }
    until_released(&gateway).await;
}

// A worker fails after the first byte

/// Asserts that a stream consists of the bytes that the worker sent, an error event and the end mark.
fn assert_ends_in_error(stream: &str, sent: &str) {
    let added = stream
        .strip_prefix(sent)
        .expect("the bytes that the worker sent");
    let mut events = added.trim_start_matches('\n').split("\n\n");
    let error = events.next().unwrap().strip_prefix("data: ").unwrap();
    let error: Value = serde_json::from_str(error).unwrap();
    assert!(error["error"]["message"].is_string(), "{error}");
    assert_eq!(error["error"]["type"], "server_error");
    assert_eq!(events.next(), Some("data: [DONE]"));
    assert_eq!(events.next(), Some(""));
    assert_eq!(events.next(), None);
}

#[tokio::test]
async fn a_stream_whose_connection_is_lost_ends_with_an_error_event() {
    let (mut first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let whole_event = token("é");
    let cuts = [
        whole_event.len(),
        whole_event.len() - 1,
        whole_event.len() - 2,
        whole_event.find('é').unwrap() + 1,
        5,
        1,
    ];
    for (index, cut) in cuts.into_iter().enumerate() {
        for resets in [true, false] {
            let request = http("POST", CHAT, chat("hi", true));
            let mut client = Client::sending(gateway.address(), request).await;
            let mut exchange = first.request().await;
            exchange.start_stream().await;
            exchange.send_chunk(token("whole")).await;
            exchange.send_chunk(&whole_event.as_bytes()[..cut]).await;
            assert_eq!(client.head().await.status(), 200);
            let mut received = Vec::new();
            while received.len() < token("whole").len() + cut {
                received.extend(client.chunk().await);
            }
            if resets {
                exchange.reset();
            } else {
                exchange.close();
            }
            let rest = client.connection.chunks();
            received.extend(within("the end", rest).await.unwrap());
            let sent = &whole_event.as_bytes()[..cut];
            let sent = [token("whole").as_bytes(), sent].concat();
            assert!(received.starts_with(&sent));
            let added = std::str::from_utf8(&received[sent.len()..]).unwrap();
            if cut < whole_event.len() - 1 {
                assert!(added.starts_with("\n\n"), "cut {index}: {added:?}");
            }
            assert_ends_in_error(added, "");
            until_released(&gateway).await;
            // The next request goes to the first worker again.
            skip_turn(&gateway, &second).await;
        }
    }
    assert!(second.is_idle(), "no request was repeated");
    let failed = "foresee_requests_total{outcome=\"worker_failed\"}";
    until_metric(&gateway, failed, 2.0 * cuts.len() as f64).await;
}

/// Books one request on the second worker, so that the next goes to the first. Explained and refused
/// requests do not advance the round robin.
async fn skip_turn(gateway: &foresee_gateway::Gateway, second: &FakeWorker) {
    assert_eq!(&*workers(gateway)["b"].name, "b");
    assert!(second.is_idle());
    let sequence = foresee_core::sequence::Sequence::unhashed(0, 16.try_into().unwrap());
    let request = foresee_core::router::Request::new(&sequence);
    drop(gateway.router().route(&request, Duration::ZERO).unwrap());
}

#[tokio::test]
async fn a_stream_whose_connection_is_lost_after_its_end_mark_is_whole() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.send_chunk("data: [DONE]\n\n").await;
    client.head().await;
    exchange.close();
    let received = client.rest().await.unwrap();
    assert_eq!(received, token("x") + "data: [DONE]\n\n");
    until_released(&gateway).await;
    until_metric(&gateway, "foresee_requests_total{outcome=\"ok\"}", 1.0).await;
}

#[tokio::test]
async fn an_error_event_of_a_worker_is_passed_on_and_counted() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    let error = "data: {\"error\": {\"message\": \"engine's own words\"}}\n\n";
    exchange.start_stream().await;
    exchange.send_chunk(error).await;
    exchange.end_stream().await;
    assert_eq!(client.head().await.status(), 200);
    let received = client.rest().await.unwrap();
    assert_eq!(received, format!("{error}data: [DONE]\n\n"));
    until_released(&gateway).await;
    let failed = "foresee_requests_total{outcome=\"worker_error\"}";
    until_metric(&gateway, failed, 1.0).await;
}

#[tokio::test]
async fn a_truncated_response_is_not_a_success() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let counted_body = whole("200 OK", "application/json", "{\"choices\": []}");
    let counted_body = counted_body[..counted_body.len() - 3].to_vec();
    let chunked_body = [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        &chunk("{\"choices\": []}")[..],
    ]
    .concat();
    for response in [counted_body, chunked_body] {
        let request = http("POST", CHAT, chat("hi", false));
        let mut client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(&response).await;
        exchange.close();
        let received = client.try_response().await;
        assert!(received.is_err(), "{received:?}");
        until_released(&gateway).await;
    }
    let failed = "foresee_requests_total{outcome=\"worker_failed\"}";
    until_metric(&gateway, failed, 2.0).await;
}

// No worker is left

#[tokio::test]
async fn without_workers_the_response_says_when_to_retry() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    config.probe_interval = Duration::from_secs(60);
    let gateway = gateway_with(config).await;
    first.die().await;
    second.die().await;
    // The first request finds the workers gone; for the second request that is known.
    for _ in 0..2 {
        let response = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
        let error = response.error(503);
        assert_eq!(error["type"], "server_error");
        assert_eq!(error["code"], "no_worker");
        let after = response.head.get("retry-after").unwrap();
        assert!(after.parse::<u32>().unwrap() >= 1);
        assert!(has_no_bookings(&gateway));
    }
    let health = call(gateway.address(), "GET", "/health", "").await;
    assert_eq!(health.status(), 503);
    let unavailable = "foresee_requests_total{outcome=\"unavailable\"}";
    until_metric(&gateway, unavailable, 2.0).await;
}

#[tokio::test]
async fn a_gateway_without_workers_is_unavailable() {
    let gateway = gateway(&[]).await;
    let response = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
    response.error(503);
    let response = call(gateway.address(), "GET", "/v1/models", "").await;
    assert_eq!(response.json(), json!({"object": "list", "data": []}));
}

#[tokio::test]
async fn a_request_that_all_workers_fail_is_a_502() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    first.request().await.reset();
    second.request().await.reset();
    let error = client.response().await.error(502);
    assert_eq!(error["type"], "server_error");
    assert!(has_no_bookings(&gateway));
}

#[tokio::test]
async fn a_503_of_all_workers_is_passed_on_from_the_last_one() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    for (worker, body) in [(&mut first, "one"), (&mut second, "two")] {
        let response = whole("503 Service Unavailable", "text/plain", body);
        worker.request().await.respond(response).await;
    }
    let response = client.response().await;
    assert_eq!((response.status(), response.text()), (503, "two"));
    assert_eq!(response.head.get("x-foresee-worker"), Some("b"));
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_request_that_crashes_workers_stops_after_three() {
    let mut fleet = Vec::new();
    for _ in 0..5 {
        fleet.push(FakeWorker::start().await);
    }
    let gateway = gateway(&fleet.iter().collect::<Vec<_>>()).await;
    let request = http("POST", CHAT, chat("crash", true));
    let mut client = Client::sending(gateway.address(), request).await;
    // The request goes to any worker that has not failed; which one is up to the policy.
    for _ in 0..3 {
        let mut exchange = None;
        until("the request to reach a worker", || {
            exchange = fleet.iter_mut().find_map(FakeWorker::try_request);
            exchange.is_some()
        })
        .await;
        exchange.unwrap().reset();
    }
    client.response().await.error(502);
    assert!(has_no_bookings(&gateway));
    assert!(
        fleet.iter().all(FakeWorker::is_idle),
        "two workers did not get the request"
    );

    let probes: Vec<usize> = fleet.iter().map(FakeWorker::probes).collect();
    until("a health check of each worker", || {
        let mut pairs = fleet.iter().zip(&probes);
        pairs.all(|(worker, &before)| worker.probes() > before)
    })
    .await;
    let by_name = workers(&gateway);
    let mut states = by_name.values().map(|worker| worker.state);
    assert!(states.all(|state| state == WorkerState::Healthy));
}

// The request is invalid

#[tokio::test]
async fn an_invalid_request_gets_an_openai_error() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let cases = [
        (CHAT, r#"{"model": "m", "messages": [}"#, 400, None),
        (CHAT, "", 400, None),
        (CHAT, "[]", 400, None),
        (CHAT, r#"{"model": "m"}"#, 400, Some("messages")),
        (
            CHAT,
            r#"{"model": "m", "messages": 7}"#,
            400,
            Some("messages"),
        ),
        (CHAT, r#"{"model": 7, "messages": []}"#, 400, Some("model")),
        ("/v1/completions", r#"{"prompt": {}}"#, 400, Some("prompt")),
        ("/v1/embeddings", r#"{"input": 7}"#, 400, Some("input")),
        (
            CHAT,
            r#"{"model": "gpt", "messages": []}"#,
            404,
            Some("model"),
        ),
    ];
    for (path, body, status, param) in cases {
        let response = call(gateway.address(), "POST", path, body).await;
        let error = response.error(status);
        assert_eq!(error["param"].as_str(), param, "{body}");
        let code = (status == 404).then_some("model_not_found");
        assert_eq!(error["code"].as_str(), code, "{body}");
    }
    assert!(worker.is_idle());
    assert!(has_no_bookings(&gateway));
    let refused = "foresee_requests_total{outcome=\"refused\"}";
    until_metric(&gateway, refused, cases.len() as f64).await;
}

#[tokio::test]
async fn connect_is_refused() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = "CONNECT example.org:80 HTTP/1.1\r\nhost: example.org:80\r\n\r\n";
    let mut client = Client::sending(gateway.address(), request).await;
    client.response().await.error(404);
    assert!(worker.is_idle());
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    let limit = chat("", false).len() + 100;
    config.max_body_bytes = limit;
    let gateway = gateway_with(config).await;

    // Exactly at the limit.
    let fits = chat(&"x".repeat(100), false);
    assert_eq!(fits.len(), limit);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, &fits)).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);

    let long = chat(&"x".repeat(101), false);
    let response = call(gateway.address(), "POST", CHAT, &long).await;
    let error = response.error(413);
    assert_eq!(error["type"], "invalid_request_error");

    // Refused because of its declared length.
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 99999999\r\n\r\n");
    let mut client = Client::sending(gateway.address(), head).await;
    client.response().await.error(413);

    // A client that sends `Expect: 100-continue` gets the error before it sends the body.
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
    );
    let mut client = Client::sending(gateway.address(), head).await;
    client.response().await.error(413);

    // Refused when the limit is exceeded, without waiting for the end.
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut client = Client::sending(gateway.address(), head).await;
    client.send(chunk(&long)).await;
    client.response().await.error(413);
    assert!(worker.is_idle());
    assert!(has_no_bookings(&gateway));
}

#[tokio::test]
async fn a_client_that_is_still_sending_a_refused_body_gets_the_error() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.max_body_bytes = 1 << 16;
    let gateway = gateway_with(config).await;
    let long = chat(&"x".repeat(8 << 20), false);
    // As common clients do: the whole request is written before the response is read.
    let response = call(gateway.address(), "POST", CHAT, &long).await;
    response.error(413);
}
