//! Deadlines and bounds of clients' connections and request bodies.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::fake_worker::*;
use foresee_gateway::GatewayConfig;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;

/// A deadline that a test waits for.
const SHORT: Duration = Duration::from_millis(150);

/// A deadline that no test waits for.
const FAR: Duration = Duration::from_secs(3600);

/// Returns a configuration in which no connection or body has a deadline that could pass.
fn patient(workers: &[&FakeWorker]) -> GatewayConfig {
    let mut config = config(workers);
    config.connections.head_timeout = FAR;
    config.connections.idle_timeout = FAR;
    config.connections.write_timeout = FAR;
    config.bodies.idle_timeout = FAR;
    config
}

/// Waits until the gateway has closed the connection, and returns what it sent before.
async fn rest_until_closed(client: &mut Client) -> Vec<u8> {
    let mut rest = Vec::new();
    let read = client.connection.stream.read_to_end(&mut rest);
    // A reset is an end as well.
    let _ = within("the connection to be closed", read).await;
    rest
}

#[tokio::test]
async fn a_slow_head_is_cut_off_and_an_idle_connection_is_not() {
    let worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.connections.head_timeout = SHORT;
    let gateway = gateway_with(config).await;
    let request = http("GET", "/health", "");
    let mut unused = Client::connect(gateway.address()).await;
    let mut used = Client::sending(gateway.address(), &request).await;
    assert_eq!(used.response().await.status(), 200);

    let started = Instant::now();
    let mut slow = Client::sending(gateway.address(), &request[..10]).await;
    let mut slow_again = Client::sending(gateway.address(), &request).await;
    assert_eq!(slow_again.response().await.status(), 200);
    slow_again.send(&request[..10]).await;
    for slow in [&mut slow, &mut slow_again] {
        assert_eq!(rest_until_closed(slow).await, b"");
        assert!(started.elapsed() >= SHORT);
    }
    // These have been idle for longer than the head may take.
    for idle in [&mut unused, &mut used] {
        idle.send(&request).await;
        assert_eq!(idle.response().await.status(), 200);
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_running_request_is_not() {
    let mut worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.connections.idle_timeout = SHORT;
    let gateway = gateway_with(config).await;
    let mut running =
        Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;

    let mut unused = Client::connect(gateway.address()).await;
    let mut used = Client::sending(gateway.address(), http("GET", "/health", "")).await;
    assert_eq!(used.response().await.status(), 200);
    assert_eq!(rest_until_closed(&mut unused).await, b"");
    assert_eq!(rest_until_closed(&mut used).await, b"");
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(running.head().await.status(), 200);
    exchange.end_stream().await;
    assert!(running.rest().await.unwrap().ends_with("[DONE]\n\n"));
}

#[tokio::test]
async fn a_body_that_stops_is_a_408_and_closes_the_connection() {
    let worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.bodies.idle_timeout = SHORT;
    let gateway = gateway_with(config).await;
    for framing in ["content-length: 1000", "transfer-encoding: chunked"] {
        let request = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\n{framing}\r\n\r\n1\r\n{{\r\n");
        let mut client = Client::sending(gateway.address(), request).await;
        let response = client.response().await;
        assert_eq!(response.error(408)["code"], "request_timeout");
        assert_eq!(response.head.get("connection"), Some("close"));
        assert_eq!(rest_until_closed(&mut client).await, b"");
    }
    assert!(worker.is_idle());
    until_metric(&gateway, "foresee_request_body_bytes", 0.0).await;
}

#[tokio::test]
async fn a_body_that_trickles_is_a_408() {
    let worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.bodies.idle_timeout = SHORT;
    let gateway = gateway_with(config).await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 1000\r\n\r\n");
    let mut client = Client::sending(gateway.address(), head).await;
    let trickle = async {
        loop {
            client.send("x").await;
            tokio::time::sleep(SHORT / 2).await;
        }
    };
    let _ = tokio::time::timeout(SHORT * 6, trickle).await;
    client.response().await.error(408);
}

#[tokio::test]
async fn a_slow_body_is_complete_in_the_end() {
    let mut worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.bodies.idle_timeout = SHORT * 4;
    let gateway = gateway_with(config).await;
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::connect(gateway.address()).await;
    let started = Instant::now();
    for part in request.chunks(request.len() / 8) {
        client.send(part).await;
        tokio::time::sleep(SHORT).await;
    }
    assert!(started.elapsed() > SHORT * 4);
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
}

/// Streams to the client until the gateway closes the connection to the worker or `count` chunks of
/// 16 KiB are sent. Returns whether all were sent.
async fn flood(exchange: &mut Exchange, count: usize) -> bool {
    exchange.start_stream().await;
    let event = chunk(token(&"x".repeat(16 << 10)));
    for _ in 0..count {
        if exchange.try_send(&event).await.is_err() {
            return false;
        }
    }
    true
}

#[tokio::test]
async fn a_client_that_does_not_read_releases_its_booking() {
    let mut worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.connections.write_timeout = SHORT;
    let gateway = gateway_with(config).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    let flooding = flood(&mut exchange, usize::MAX);
    assert!(!within("the gateway to close its connection", flooding).await);
    until_released(&gateway).await;
    assert_eq!(client.head().await.status(), 200);
    let series = "foresee_requests_total{outcome=\"client_left\"}";
    until_metric(&gateway, series, 1.0).await;
    until_metric(&gateway, "foresee_client_connections", 0.0).await;
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_everything() {
    const CHUNKS: usize = 256;
    let mut worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.connections.write_timeout = SHORT * 4;
    let gateway = gateway_with(config).await;
    let mut client = slow_client(gateway.address()).await;
    client.send(http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    let writing = tokio::spawn(async move {
        assert!(flood(&mut exchange, CHUNKS).await);
        exchange.end_stream().await;
    });
    let started = Instant::now();
    let (mut received, mut paused_at) = (Vec::new(), 0);
    while !received.ends_with(b"data: [DONE]\n\n\r\n0\r\n\r\n") {
        let read = client.connection.stream.read_buf(&mut received);
        assert!(within("more of the response", read).await.unwrap() > 0);
        if received.len() > paused_at + (256 << 10) {
            paused_at = received.len();
            tokio::time::sleep(SHORT).await;
        }
    }
    assert!(started.elapsed() > SHORT * 8, "the client was not slow");
    assert!(received.len() > CHUNKS * (16 << 10));
    writing.await.unwrap();
}

/// Connects with a receive buffer that holds a few chunks.
async fn slow_client(address: SocketAddr) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(32 << 10).unwrap();
    Client {
        connection: Connection::new(socket.connect(address).await.unwrap()),
    }
}

#[tokio::test]
async fn connections_above_the_maximum_are_refused() {
    let worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    config.connections.max_connections = Some(2);
    let gateway = gateway_with(config).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = Client::sending(gateway.address(), http("GET", "/health", "")).await;
        assert_eq!(client.response().await.status(), 200);
        open.push(client);
    }
    until_metric(&gateway, "foresee_client_connections", 2.0).await;
    let mut refused = Client::connect(gateway.address()).await;
    let response = refused.response().await;
    assert_eq!(response.error(503)["code"], "too_many_connections");
    assert_eq!(response.head.get("retry-after"), Some("1"));
    assert_eq!(rest_until_closed(&mut refused).await, b"");
    until_metric(&gateway, "foresee_refused_connections_total", 1.0).await;

    drop(open.pop());
    until_metric(&gateway, "foresee_client_connections", 1.0).await;
    let response = call(gateway.address(), "GET", "/health", "").await;
    assert_eq!(response.status(), 200);
    // The open connection is not affected.
    open[0].send(http("GET", "/health", "")).await;
    assert_eq!(open[0].response().await.status(), 200);
}

#[tokio::test]
async fn request_bodies_are_bounded_in_total() {
    let mut worker = FakeWorker::start().await;
    let mut config = patient(&[&worker]);
    let request = http("POST", CHAT, chat(&"long ".repeat(100), false));
    config.bodies.max_bytes_in_flight = request.len();
    let gateway = gateway_with(config).await;
    // The announced body counts, although most of it has not arrived.
    let (start, rest) = request.split_at(request.len() / 2);
    let mut first = Client::sending(gateway.address(), start).await;
    within("the body to be counted", async {
        while value(&metrics(&gateway).await, "foresee_request_body_bytes") == Some(0.0) {}
    })
    .await;
    let mut second = Client::sending(gateway.address(), &request).await;
    let response = second.response().await;
    assert_eq!(response.error(503)["code"], "router_overloaded");
    assert_eq!(response.head.get("retry-after"), Some("1"));
    // Without a length, a body counts as it arrives.
    let body = chunk("x".repeat(request.len()));
    let chunked = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut third = Client::sending(gateway.address(), [chunked.as_bytes(), &body].concat()).await;
    third.response().await.error(503);

    first.send(rest).await;
    let exchange = worker.request().await;
    exchange.respond_json("{}").await;
    assert_eq!(first.response().await.status(), 200);
    until_metric(&gateway, "foresee_request_body_bytes", 0.0).await;
    let mut again = Client::sending(gateway.address(), &request).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(again.response().await.status(), 200);
}

#[tokio::test]
async fn a_half_closed_client_gets_its_response() {
    use tokio::io::AsyncWriteExt;
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(patient(&[&worker])).await;
    for version in ["1.1", "1.0"] {
        let request = http("POST", CHAT, chat("hi", true));
        let request = String::from_utf8(request).unwrap();
        let request = request.replacen("1.1", version, 1);
        // The end is usually there before the gateway reads the request.
        let mut client = Client::sending(gateway.address(), request).await;
        client.connection.stream.shutdown().await.unwrap();
        let mut exchange = worker.request().await;
        // Health checks take longer than it takes the gateway to see the end.
        a_few_probe_intervals().await;
        exchange
            .send(whole("200 OK", "application/json", "{}"))
            .await;
        exchange.keep();
        let response = rest_until_closed(&mut client).await;
        let response = String::from_utf8(response).unwrap();
        let is_whole = response.contains("200 OK") && response.ends_with("{}");
        assert!(is_whole, "{response}");
    }
    // The client closes its side in the middle of a stream.
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(client.head().await.status(), 200);
    client.chunk().await;
    client.connection.stream.shutdown().await.unwrap();
    a_few_probe_intervals().await;
    exchange.send_chunk(token("y")).await;
    assert_eq!(client.chunk().await, token("y").as_bytes());
    exchange.end_stream().await;
    assert!(client.rest().await.unwrap().ends_with("[DONE]\n\n"));
    until_released(&gateway).await;
    let series = "foresee_requests_total{outcome=\"ok\"}";
    until_metric(&gateway, series, 3.0).await;
}

#[tokio::test]
async fn unknown_transfer_codings_are_a_501() {
    let worker = FakeWorker::start().await;
    let gateway = gateway_with(patient(&[&worker])).await;
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    );
    let mut client = Client::sending(gateway.address(), request).await;
    client.response().await.error(501);
    assert!(worker.is_idle());
}

#[tokio::test]
async fn too_large_a_head_is_a_431() {
    let worker = FakeWorker::start().await;
    let gateway = gateway_with(patient(&[&worker])).await;
    let request = format!("GET /health HTTP/1.1\r\nx: {}\r\n", "x".repeat(70 << 10));
    let mut client = Client::sending(gateway.address(), request).await;
    assert_eq!(client.response().await.status(), 431);
    assert_eq!(rest_until_closed(&mut client).await, b"");
}
