//! Workers that fail fast, hang, fall silent or respond with nonsense: clients get responses of other
//! workers, and all bookings are released.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::outlier::OutlierConfig;
use foresee_core::policy;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, GatewayConfig};
use serde_json::json;
use tokio::sync::Semaphore;

const OK: &str = r#"{"choices":[{"message":{"content":"ok"}}],"usage":{"prompt_tokens":9,"completion_tokens":1}}"#;

/// Answers all requests of a worker with `respond`. Returns the number of requests so far.
fn behave<F>(
    mut worker: FakeWorker,
    respond: impl Fn(Exchange, usize) -> F + Send + 'static,
) -> Arc<AtomicUsize>
where
    F: Future<Output = ()> + Send + 'static,
{
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    tokio::spawn(async move {
        loop {
            let exchange = worker.request_at_any_time().await;
            let number = counter.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(respond(exchange, number));
        }
    });
    count
}

/// Responds with a stream of one token or a JSON body, after some milliseconds.
async fn serve_well(mut exchange: Exchange, _: usize) {
    tokio::time::sleep(Duration::from_millis(20)).await;
    if exchange
        .body
        .windows(13)
        .any(|window| window == b"\"stream\":true")
    {
        exchange.start_stream().await;
        exchange.send_chunk(token("x")).await;
        exchange.end_stream().await;
    } else {
        exchange.respond_json(OK).await;
    }
}

/// Returns a configuration with the default policy, queue and deadlines.
fn default_routing(workers: &[&FakeWorker]) -> GatewayConfig {
    let defaults = GatewayConfig::default();
    GatewayConfig {
        router: defaults.router,
        ..config(workers)
    }
}

/// Sends `count` chat requests, at most `concurrency` at a time. Returns the responses' statuses.
async fn send_many(gateway: &Gateway, count: usize, concurrency: usize, stream: bool) -> Vec<u16> {
    let permits = Arc::new(Semaphore::new(concurrency));
    let address = gateway.address();
    let requests = (0..count).map(|number| {
        let permits = Arc::clone(&permits);
        tokio::spawn(async move {
            let _permit = permits.acquire_owned().await.unwrap();
            let prompt = format!("request {number} {}", "word ".repeat(50));
            call(address, "POST", CHAT, chat(&prompt, stream))
                .await
                .status()
        })
    });
    let requests: Vec<_> = requests.collect();
    let mut statuses = Vec::new();
    for request in requests {
        statuses.push(request.await.unwrap());
    }
    statuses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_fails_at_once_does_not_attract_the_traffic() {
    let mut fleet = Vec::new();
    for _ in 0..4 {
        fleet.push(FakeWorker::start().await);
    }
    let gateway = gateway_with(default_routing(&fleet.iter().collect::<Vec<_>>())).await;
    let mut counts = Vec::new();
    for (index, worker) in fleet.into_iter().enumerate() {
        counts.push(if index == 0 {
            behave(worker, |exchange, _| async move {
                let error = r#"{"error":{"message":"CUDA error"}}"#;
                exchange
                    .respond(whole(
                        "500 Internal Server Error",
                        "application/json",
                        error,
                    ))
                    .await;
            })
        } else {
            behave(worker, serve_well)
        });
    }
    let statuses = send_many(&gateway, 400, 16, false).await;
    let failed = statuses.iter().filter(|&&status| status != 200).count();
    let drawn = counts[0].load(Ordering::SeqCst);
    assert!(failed <= 4, "{failed} of 400 failed");
    assert!(
        drawn <= 20,
        "the failing worker drew {drawn} of 400 requests"
    );
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_worker_that_fails_again_and_again_is_ejected() {
    let mut fleet = Vec::new();
    for _ in 0..3 {
        fleet.push(FakeWorker::start().await);
    }
    let mut config = config(&fleet.iter().collect::<Vec<_>>());
    config.router.outlier = OutlierConfig::default();
    let gateway = gateway_with(config).await;
    let mut counts = Vec::new();
    for (index, worker) in fleet.into_iter().enumerate() {
        counts.push(if index == 0 {
            behave(worker, |exchange, _| async move {
                exchange
                    .respond(whole("500 Oops", "text/plain", "CUDA error"))
                    .await;
            })
        } else {
            behave(worker, serve_well)
        });
    }
    // Five rounds of three: the worker fails its fifth request in a row.
    send_many(&gateway, 15, 1, false).await;
    assert_eq!(counts[0].load(Ordering::SeqCst), 5);
    assert_eq!(state(&gateway, "a"), WorkerState::Ejected);
    let shown = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(shown["state"], "ejected");
    assert_eq!(shown["outlier"]["ejected"], true);
    let text = metrics(&gateway).await;
    let ejected = "foresee_worker_ejected{worker=\"a\"}";
    assert_eq!(value(&text, ejected), Some(1.0));
    let ejections = "foresee_worker_ejections_total{worker=\"a\"}";
    assert_eq!(value(&text, ejections), Some(1.0));
    let body = chat("hi", false);
    let explained = call(gateway.admin_address(), "POST", "/admin/explain", body).await;
    let passed_over = json!([{"worker": "a", "reason": "ejected"}]);
    assert_eq!(explained.json()["passed_over"], passed_over);
    let statuses = send_many(&gateway, 10, 1, false).await;
    assert!(statuses.iter().all(|&status| status == 200));
    assert_eq!(counts[0].load(Ordering::SeqCst), 5);
    until_released(&gateway).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_is_lost_while_workers_reset_connections_before_the_first_byte() {
    let mut fleet = Vec::new();
    for _ in 0..8 {
        fleet.push(FakeWorker::start().await);
    }
    let gateway = gateway_with(default_routing(&fleet.iter().collect::<Vec<_>>())).await;
    let requests = Arc::new(AtomicUsize::new(0));
    for (index, worker) in fleet.into_iter().enumerate() {
        // One worker at a time resets its connections.
        let requests = Arc::clone(&requests);
        behave(worker, move |exchange, number| {
            let is_victim = requests.fetch_add(1, Ordering::SeqCst) / 40 % 8 == index;
            async move {
                if is_victim {
                    exchange.reset();
                } else {
                    serve_well(exchange, number).await;
                }
            }
        });
    }
    let statuses = send_many(&gateway, 300, 32, true).await;
    assert!(statuses.iter().all(|&status| status == 200), "{statuses:?}");
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_fleet_that_fails_as_a_whole_is_not_multiplied_by_retries() {
    let (first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let fail = |exchange: Exchange, _| async move {
        exchange
            .respond(whole("500 Oops", "application/json", "{}"))
            .await;
    };
    let counts = [behave(first, fail), behave(second, fail)];
    let statuses = send_many(&gateway, 200, 8, false).await;
    assert!(statuses.iter().all(|&status| status == 500));
    let sent: usize = counts
        .iter()
        .map(|count| count.load(Ordering::SeqCst))
        .sum();
    // The test takes less than ten seconds.
    assert!((200..=240 + 30).contains(&sent), "{sent} requests for 200");
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_stream_that_falls_silent_ends_with_an_error_event() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.stream_idle_timeout = Duration::from_millis(100);
    let gateway = gateway_with(config).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    for _ in 0..5 {
        // Not silent for long enough.
        tokio::time::sleep(Duration::from_millis(40)).await;
        exchange.send_chunk(token("x")).await;
    }
    assert_eq!(client.head().await.status(), 200);
    let received = client.rest().await.unwrap();
    let rest = received.strip_prefix(&token("x").repeat(5)).unwrap();
    assert!(rest.starts_with("data: {\"error\""), "{rest}");
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    within("the connection to be closed", exchange.closed()).await;
    until_released(&gateway).await;
    until_metric(
        &gateway,
        "foresee_requests_total{outcome=\"worker_failed\"}",
        1.0,
    )
    .await;
}

#[tokio::test]
async fn a_json_body_that_is_never_completed_breaks_off() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.stream_idle_timeout = Duration::from_millis(100);
    let gateway = gateway_with(config).await;
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    let response = whole("200 OK", "application/json", OK);
    exchange.send(&response[..response.len() - 5]).await;
    assert!(client.try_response().await.is_err());
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_stream_without_its_end_mark_ends_with_an_error_event() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.finish_chunks().await;
    client.head().await;
    let received = client.rest().await.unwrap();
    assert!(
        received.starts_with(&token("x")) && received.contains("\"error\""),
        "{received}"
    );
    until_released(&gateway).await;
}

#[tokio::test]
async fn unusable_successes_are_retried_on_another_worker() {
    let page = whole("200 OK", "text/html", "<html>It works!</html>");
    let unusable = [
        whole("200 OK", "application/json", ""),
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n".to_vec(),
        whole("200 OK", "application/json", "Internal Server Error"),
        page,
        whole("500 Oops", "text/plain", "oops"),
        whole("502 Bad Gateway", "text/plain", "oops"),
        whole("504 Gateway Timeout", "text/plain", "oops"),
        whole("503 Service Unavailable", "text/plain", "busy"),
        whole("429 Too Many Requests", "text/plain", "busy"),
    ];
    for response in unusable {
        let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
        let gateway = gateway(&[&first, &second]).await;
        let request = http("POST", CHAT, chat("hi", false));
        let mut client = Client::sending(gateway.address(), request).await;
        first.request().await.respond(&response).await;
        second.request().await.respond_json(OK).await;
        let received = client.response().await;
        let sent = String::from_utf8_lossy(&response).into_owned();
        assert_eq!((received.status(), received.text()), (200, OK), "{sent}");
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn a_worker_under_backpressure_takes_no_requests_until_its_time() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::sending(gateway.address(), &request).await;
    let busy = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 60\r\ncontent-length: 0\r\n\r\n";
    first.request().await.respond(busy).await;
    second.request().await.respond_json(OK).await;
    assert_eq!(client.response().await.status(), 200);
    for _ in 0..4 {
        let mut client = Client::sending(gateway.address(), &request).await;
        second.request().await.respond_json(OK).await;
        assert_eq!(client.response().await.status(), 200);
    }
    assert!(first.is_idle());
    assert_eq!(
        state(&gateway, "a"),
        WorkerState::Healthy,
        "backpressure is no failure"
    );
    // Both workers are busy, so the response says when to return.
    let mut client = Client::sending(gateway.address(), &request).await;
    second.request().await.respond(busy).await;
    assert_eq!(client.response().await.status(), 429);
    let refused = call(gateway.address(), "POST", CHAT, chat("hi", false)).await;
    assert_eq!(refused.error(429)["code"], "capacity_exceeded");
    let after: u64 = refused.head.get("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&after), "{after}");
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_body_with_both_framings_reaches_the_client_whole() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut response =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    response.extend(chunk(OK));
    response.extend(b"0\r\n\r\n");
    worker.request().await.respond(response).await;
    let received = client.response().await;
    assert_eq!(received.text(), OK);
    assert_ne!(received.head.get("content-length"), Some("5"));
    until_released(&gateway).await;
}

#[tokio::test]
async fn beyond_the_queue_limit_clients_are_asked_to_return() {
    let mut worker = FakeWorker::start().await;
    let mut config = default_routing(&[&worker]);
    config.workers = vec![format!("{},blocks=40", worker.spec("a")).parse().unwrap()];
    config.queue_limit = Some(2);
    let gateway = gateway_with(config).await;
    let prompt = "word ".repeat(300);
    let mut clients = Vec::new();
    let mut held = Vec::new();
    let mut refused = 0;
    for number in 0..20 {
        let request = http("POST", CHAT, chat(&format!("{number} {prompt}"), false));
        let mut client = Client::sending(gateway.address(), request).await;
        // Either the worker gets the request, or it is queued, or it is refused.
        until("the request to be placed", || {
            held.extend(worker.try_request());
            let queued = workers(&gateway)["a"].queued_requests as usize;
            held.len() + queued > clients.len() || queued == 2
        })
        .await;
        if workers(&gateway)["a"].queued_requests == 2 && clients.len() >= held.len() + 2 {
            let response = client.response().await;
            assert_eq!(response.error(429)["code"], "capacity_exceeded");
            let after: u64 = response.head.get("retry-after").unwrap().parse().unwrap();
            assert!((1..=30).contains(&after), "{after}");
            assert!(response.head.get("retry-after-ms").is_some());
            refused += 1;
        } else {
            clients.push(client);
        }
    }
    assert!(
        refused > 0,
        "{} held, {} waiting",
        held.len(),
        clients.len()
    );
    for exchange in held {
        exchange.respond_json(OK).await;
    }
    drop(clients);
    until_released(&gateway).await;
}

#[tokio::test]
async fn a_worker_that_hangs_loses_its_requests_to_another() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    config.router.policy = policy::ROUND_ROBIN;
    config.min_first_byte_timeout = Duration::from_millis(60);
    let gateway = gateway_with(config).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut hanging = first.request().await;
    let mut exchange = second.request().await;
    within("the connection to be closed", hanging.closed()).await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.end_stream().await;
    assert_eq!(client.head().await.status(), 200);
    client.rest().await.unwrap();
    until_released(&gateway).await;
}

#[tokio::test]
async fn error_messages_name_no_worker_unless_it_may_be_seen() {
    for is_exposed in [false, true] {
        let mut worker = FakeWorker::start().await;
        let mut config = config(&[]);
        config.workers = vec![format!("http://{}", worker.address).parse().unwrap()];
        config.expose_worker_header = is_exposed;
        let gateway = gateway_with(config).await;
        let request = http("POST", CHAT, chat("hi", true));
        let mut client = Client::sending(gateway.address(), &request).await;
        worker.request().await.reset();
        worker.request().await.reset();
        let error = client.response().await.error(502);
        let address = worker.address.to_string();
        let message = error["message"].as_str().unwrap();
        assert_eq!(message.contains(&address), is_exposed, "{message}");

        let mut client = Client::sending(gateway.address(), &request).await;
        let mut exchange = worker.request().await;
        exchange.start_stream().await;
        exchange.send_chunk(token("x")).await;
        let head = client.head().await;
        assert_eq!(head.get("x-foresee-worker").is_some(), is_exposed);
        exchange.reset();
        let rest = client.rest().await.unwrap();
        assert_eq!(rest.contains(&address), is_exposed, "{rest}");
        until_released(&gateway).await;
    }
}

#[tokio::test]
async fn a_request_that_changes_state_is_sent_once() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    config.pass_through = vec!["/custom/*".parse().unwrap()];
    let gateway = gateway_with(config).await;
    let request = http("POST", "/custom/change", json!({}).to_string());
    let mut client = Client::sending(gateway.address(), request).await;
    first
        .request()
        .await
        .respond(whole("503 Busy", "text/plain", "busy"))
        .await;
    assert_eq!(client.response().await.status(), 503);
    assert!(second.try_request().is_none());
    until_released(&gateway).await;
}
