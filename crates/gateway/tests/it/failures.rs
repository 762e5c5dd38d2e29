//! Clients leave, workers die, requests are wrong: who is told what, and what stays behind.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::fleet::WorkerState;
use serde_json::{Value, json};

// The client leaves

#[tokio::test]
async fn a_client_that_leaves_before_the_first_byte_frees_its_worker() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    for head in [&b""[..], STREAM_HEAD] {
        let request = http("POST", CHAT, chat("hi", true));
        let client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(head).await;
        assert_eq!(shown(&gateway, "a").await.unwrap()["requests"], 1);
        drop(client);
        within("the worker to be told", exchange.closed()).await;
        freed(&gateway).await;
    }
    counted(
        &gateway,
        "foresee_requests_total{outcome=\"client_left\"}",
        2.0,
    )
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_answer_frees_its_worker() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let stream = [STREAM_HEAD, &chunk(token("x"))].concat();
    let json = whole("200 OK", "application/json", "{\"choices\": []}");
    let file = whole("200 OK", "application/octet-stream", [0; 100]);
    for answer in [&stream[..], &json[..json.len() - 1], &file[..150]] {
        let request = http("POST", CHAT, chat("hi", true));
        let mut client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(answer).await;
        client.head().await;
        assert_eq!(shown(&gateway, "a").await.unwrap()["requests"], 1);
        // The worker stays silent, so nobody notices by failing to write.
        drop(client);
        within("the worker to be told", exchange.closed()).await;
        freed(&gateway).await;
    }
    counted(
        &gateway,
        "foresee_requests_total{outcome=\"client_left\"}",
        3.0,
    )
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_request_reaches_no_worker() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let client = Client::sending(gateway.address(), &request[..request.len() - 1]).await;
    drop(client);
    // What comes after it shows that the gateway has had time to forward it.
    let answer = call(gateway.address(), "POST", CHAT, "{").await;
    answer.error(400);
    assert!(worker.is_idle());
    assert!(is_free(&gateway));
}

// A worker fails before the first byte

/// Sends a request that the first worker fails as `fail` says, and expects the second to serve.
async fn taken_over(stream: bool, fail: impl AsyncFnOnce(Exchange)) {
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
        "no trace of the other"
    );
    freed(&gateway).await;
    counted(&gateway, "foresee_retries_total", 1.0).await;
    counted(&gateway, "foresee_requests_total{outcome=\"ok\"}", 1.0).await;
    // It failed one request, but its probe says that it lives.
    let probes = first.probes();
    until("the next probe", || first.probes() > probes + 1).await;
    assert_eq!(state(&gateway, "a"), WorkerState::Healthy);
}

#[tokio::test]
async fn another_worker_takes_over_after_a_reset() {
    taken_over(true, async |exchange| exchange.reset()).await;
    taken_over(false, async |exchange| exchange.reset()).await;
}

#[tokio::test]
async fn another_worker_takes_over_after_a_close() {
    taken_over(true, async |exchange| exchange.close()).await;
}

#[tokio::test]
async fn another_worker_takes_over_after_half_a_head() {
    taken_over(true, async |mut exchange| {
        exchange.send(&STREAM_HEAD[..STREAM_HEAD.len() - 2]).await;
        exchange.close();
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_a_stream_that_never_began() {
    taken_over(true, async |mut exchange| {
        exchange.start_stream().await;
        exchange.close();
    })
    .await;
    taken_over(true, async |mut exchange| {
        exchange.start_stream().await;
        exchange.reset();
    })
    .await;
    taken_over(true, async |mut exchange| {
        exchange.start_stream().await;
        exchange.finish_chunks().await;
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_from_one_that_is_overloaded() {
    taken_over(true, async |exchange| {
        let answer = whole("503 Service Unavailable", "text/plain", "busy");
        exchange.answer(answer).await;
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_from_one_that_speaks_no_http() {
    taken_over(true, async |mut exchange| {
        exchange.send("+PONG\r\n\r\n").await;
        exchange.close();
    })
    .await;
}

#[tokio::test]
async fn another_worker_takes_over_from_one_that_refuses_connections() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    // No probe finds it out.
    config.probe_interval = Duration::from_secs(60);
    let gateway = gateway_with(config).await;
    first.die().await;
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::sending(gateway.address(), request).await;
    second.request().await.answer_json("{}").await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.head.get("x-foresee-worker"), Some("b"));
    assert_eq!(state(&gateway, "a"), WorkerState::Unhealthy);
    freed(&gateway).await;
}

#[tokio::test]
async fn a_worker_that_gives_no_answer_in_time_is_a_504() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.first_byte_timeout = Duration::from_millis(60);
    let gateway = gateway_with(config).await;
    for head in [&b""[..], STREAM_HEAD] {
        let request = http("POST", CHAT, chat("hi", true));
        let mut client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(head).await;
        client.answer().await.error(504);
        within("the worker to be told", exchange.closed()).await;
        freed(&gateway).await;
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
        // It closes just as the request comes in, so the request is lost on the way.
        worker.request().await.reset();
        worker.request().await.answer_json("{}").await;
        assert_eq!(client.answer().await.status(), 200);
        assert_eq!(state(&gateway, "a"), WorkerState::Healthy);
    }
    freed(&gateway).await;
}

// A worker dies after the first byte

/// The events of a broken stream after what the worker sent: an error, then the end.
fn assert_ends_in_error(stream: &str, sent: &str) {
    let added = stream.strip_prefix(sent).expect("what was sent");
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
async fn a_stream_that_breaks_ends_with_an_error_event() {
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
            freed(&gateway).await;
            // The next request is again the first worker's.
            skip_turn(&gateway, &second).await;
        }
    }
    assert!(second.is_idle(), "nobody was asked again");
    let failed = "foresee_requests_total{outcome=\"worker_failed\"}";
    counted(&gateway, failed, 2.0 * cuts.len() as f64).await;
}

/// Uses up the second worker's turn: explained and refused requests take none.
async fn skip_turn(gateway: &foresee_gateway::Gateway, second: &FakeWorker) {
    let name = &workers(gateway)["b"].name;
    assert_eq!(name, "b");
    assert!(second.is_idle());
    let sequence = foresee_core::sequence::Sequence::opaque(0, std::num::NonZeroU32::MIN);
    let request = foresee_core::router::Request::new(&sequence);
    drop(gateway.router().route(&request, Duration::ZERO).unwrap());
}

#[tokio::test]
async fn a_stream_that_breaks_after_its_end_mark_is_whole() {
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
    freed(&gateway).await;
    counted(&gateway, "foresee_requests_total{outcome=\"ok\"}", 1.0).await;
}

#[tokio::test]
async fn an_error_in_a_stream_passes_and_counts() {
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
    freed(&gateway).await;
    let failed = "foresee_requests_total{outcome=\"worker_error\"}";
    counted(&gateway, failed, 1.0).await;
}

#[tokio::test]
async fn an_answer_cut_off_is_no_success() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let counted_body = whole("200 OK", "application/json", "{\"choices\": []}");
    let counted_body = counted_body[..counted_body.len() - 3].to_vec();
    let chunked_body = [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        &chunk("{\"choices\": []}")[..],
    ]
    .concat();
    for answer in [counted_body, chunked_body] {
        let request = http("POST", CHAT, chat("hi", false));
        let mut client = Client::sending(gateway.address(), request).await;
        let mut exchange = worker.request().await;
        exchange.send(&answer).await;
        exchange.close();
        let received = client.try_answer().await;
        assert!(received.is_err(), "{received:?}");
        freed(&gateway).await;
    }
    let failed = "foresee_requests_total{outcome=\"worker_failed\"}";
    counted(&gateway, failed, 2.0).await;
}

// Nobody is left

#[tokio::test]
async fn without_workers_the_client_is_told_when_to_come_back() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    config.probe_interval = Duration::from_secs(60);
    let gateway = gateway_with(config).await;
    first.die().await;
    second.die().await;
    // The first request finds it out, the second is told what is known.
    for _ in 0..2 {
        let answer = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
        let error = answer.error(503);
        assert_eq!(error["type"], "server_error");
        assert_eq!(error["code"], "no_worker_available");
        let after = answer.head.get("retry-after").unwrap();
        assert!(after.parse::<u32>().unwrap() >= 1);
        assert!(is_free(&gateway));
    }
    let health = call(gateway.address(), "GET", "/health", "").await;
    assert_eq!(health.status(), 503);
    let unavailable = "foresee_requests_total{outcome=\"unavailable\"}";
    counted(&gateway, unavailable, 2.0).await;
}

#[tokio::test]
async fn a_gateway_without_any_worker_is_unavailable() {
    let gateway = gateway(&[]).await;
    let answer = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
    answer.error(503);
    let answer = call(gateway.address(), "GET", "/v1/models", "").await;
    assert_eq!(answer.json(), json!({"object": "list", "data": []}));
}

#[tokio::test]
async fn when_all_workers_fail_a_request_it_is_a_502() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    first.request().await.reset();
    second.request().await.reset();
    let error = client.answer().await.error(502);
    assert_eq!(error["type"], "server_error");
    assert!(is_free(&gateway));
}

#[tokio::test]
async fn when_all_workers_are_overloaded_the_last_one_says_so() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    for (worker, says) in [(&mut first, "one"), (&mut second, "two")] {
        let answer = whole("503 Service Unavailable", "text/plain", says);
        worker.request().await.answer(answer).await;
    }
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.text()), (503, "two"));
    assert_eq!(answer.head.get("x-foresee-worker"), Some("b"));
    freed(&gateway).await;
}

#[tokio::test]
async fn a_poisonous_request_stops_after_three_workers() {
    let mut fleet = Vec::new();
    for _ in 0..5 {
        fleet.push(FakeWorker::start().await);
    }
    let gateway = gateway(&fleet.iter().collect::<Vec<_>>()).await;
    let request = http("POST", CHAT, chat("poison", true));
    let mut client = Client::sending(gateway.address(), request).await;
    // Each in turn, but for those that failed: which is whose turn is the policy's business.
    for _ in 0..3 {
        let mut exchange = None;
        until("a worker to be poisoned", || {
            exchange = fleet.iter_mut().find_map(FakeWorker::try_request);
            exchange.is_some()
        })
        .await;
        exchange.unwrap().reset();
    }
    client.answer().await.error(502);
    assert!(is_free(&gateway));
    assert!(fleet.iter().all(FakeWorker::is_idle), "two were spared");

    let probes: Vec<usize> = fleet.iter().map(FakeWorker::probes).collect();
    until("each to be probed", || {
        let mut pairs = fleet.iter().zip(&probes);
        pairs.all(|(worker, &before)| worker.probes() > before)
    })
    .await;
    let by_name = workers(&gateway);
    let mut states = by_name.values().map(|worker| worker.state);
    assert!(states.all(|state| state == WorkerState::Healthy));
}

// The request is wrong

#[tokio::test]
async fn a_wrong_request_is_refused_as_openai_refuses_it() {
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
        let answer = call(gateway.address(), "POST", path, body).await;
        let error = answer.error(status);
        assert_eq!(error["param"].as_str(), param, "{body}");
        let code = (status == 404).then_some("model_not_found");
        assert_eq!(error["code"].as_str(), code, "{body}");
    }
    assert!(worker.is_idle());
    assert!(is_free(&gateway));
    let refused = "foresee_requests_total{outcome=\"refused\"}";
    counted(&gateway, refused, cases.len() as f64).await;
}

#[tokio::test]
async fn there_are_no_tunnels() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = "CONNECT example.org:80 HTTP/1.1\r\nhost: example.org:80\r\n\r\n";
    let mut client = Client::sending(gateway.address(), request).await;
    client.answer().await.error(404);
    assert!(worker.is_idle());
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    let limit = chat("", false).len() + 100;
    config.max_body_bytes = limit;
    let gateway = gateway_with(config).await;

    // To the byte.
    let fits = chat(&"x".repeat(100), false);
    assert_eq!(fits.len(), limit);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, &fits)).await;
    worker.request().await.answer_json("{}").await;
    assert_eq!(client.answer().await.status(), 200);

    let long = chat(&"x".repeat(101), false);
    let answer = call(gateway.address(), "POST", CHAT, &long).await;
    let error = answer.error(413);
    assert_eq!(error["type"], "invalid_request_error");

    // Refused by its length alone.
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 99999999\r\n\r\n");
    let mut client = Client::sending(gateway.address(), head).await;
    client.answer().await.error(413);

    // A client that asks first is not told to send.
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
    );
    let mut client = Client::sending(gateway.address(), head).await;
    client.answer().await.error(413);

    // Refused once too much has come, without waiting for the end.
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut client = Client::sending(gateway.address(), head).await;
    client.send(chunk(&long)).await;
    client.answer().await.error(413);
    assert!(worker.is_idle());
    assert!(is_free(&gateway));
}

#[tokio::test]
async fn a_client_still_sending_a_body_too_long_reads_why() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.max_body_bytes = 1 << 16;
    let gateway = gateway_with(config).await;
    let long = chat(&"x".repeat(8 << 20), false);
    // As common clients do: all is written before anything is read.
    let answer = call(gateway.address(), "POST", CHAT, &long).await;
    answer.error(413);
}
