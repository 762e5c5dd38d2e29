//! HTTP/2 of the API: requests that share a connection, and the ends of streams and connections.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use bytes::Bytes;
use foresee_gateway::{Gateway, GatewayConfig};
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::fake_worker::*;
use crate::tls::{Authority, Files, connect_offering};

/// A gateway with TLS, and the authority of its certificate.
struct Server {
    gateway: Gateway,
    authority: Authority,
    _files: Files,
}

/// A client's connection, and the task that drives it, which ends with the connection.
struct Http2Client {
    requests: SendRequest<Full<Bytes>>,
    connection: JoinHandle<hyper::Result<()>>,
}

impl Server {
    /// Starts a gateway. `name` is that of the test, and `change` changes the settings.
    async fn start(
        worker: &FakeWorker,
        name: &str,
        change: impl FnOnce(&mut GatewayConfig),
    ) -> Self {
        let authority = Authority::new();
        let files = Files::new(name, &authority.sign("a"));
        let mut config = config(&[worker]);
        config.tls = Some(files.config(None));
        change(&mut config);
        Self {
            gateway: gateway_with(config).await,
            authority,
            _files: files,
        }
    }

    /// Connects with HTTP/2. `window` is the size of the stream's flow control window, in bytes.
    async fn connect(&self, window: u32) -> Http2Client {
        let (address, protocols) = (self.gateway.address(), ["h2", "http/1.1"]);
        let stream = connect_offering(address, &self.authority, None, &protocols);
        let stream = stream.await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(window);
        let handshake = builder.handshake(TokioIo::new(stream)).await;
        let (requests, connection) = handshake.unwrap();
        Http2Client {
            requests,
            connection: tokio::spawn(connection),
        }
    }
}

impl Http2Client {
    /// Sends a request, and returns the response once its head has arrived.
    fn send(
        &self,
        method: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> JoinHandle<hyper::Result<Response<Incoming>>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("https://localhost{path}"))
            .header("content-type", "application/json")
            .body(Full::new(body.into()));
        let mut requests = self.requests.clone();
        tokio::spawn(async move { requests.send_request(request.unwrap()).await })
    }
}

/// Returns a response, once its head has arrived.
async fn head_of(response: JoinHandle<hyper::Result<Response<Incoming>>>) -> Response<Incoming> {
    within("a response", response).await.unwrap().unwrap()
}

/// Returns the whole body of a response.
async fn text_of(response: Response<Incoming>) -> String {
    let body = within("a body", response.into_body().collect()).await;
    String::from_utf8(body.unwrap().to_bytes().to_vec()).unwrap()
}

/// Returns the next part of a body.
async fn part_of(response: &mut Response<Incoming>) -> Option<Bytes> {
    let frame = within("data", response.body_mut().frame()).await?;
    frame.unwrap().into_data().ok()
}

#[tokio::test]
async fn requests_share_a_connection_and_a_reset_stream_is_released_alone() {
    let mut worker = FakeWorker::start().await;
    let server = Server::start(&worker, "h2-share", |_| {}).await;
    let client = server.connect(1 << 20).await;
    let first = client.send("POST", CHAT, chat("one", true));
    let mut first_exchange = worker.request().await;
    let second = client.send("POST", CHAT, chat("two", true));
    let mut second_exchange = worker.request().await;
    let head = &second_exchange.head;
    assert_eq!(head.get("x-forwarded-proto"), Some("https"));
    assert_eq!(head.get("x-forwarded-host"), Some("localhost"));

    // The second response arrives while the first one runs.
    first_exchange.start_stream().await;
    second_exchange.start_stream().await;
    second_exchange.send_chunk(token("two")).await;
    let mut second = head_of(second).await;
    assert_eq!(second.version(), Version::HTTP_2);
    let part = part_of(&mut second).await.unwrap();
    assert!(String::from_utf8_lossy(&part).contains("two"));

    // The client resets the first stream.
    first_exchange.send_chunk(token("one")).await;
    let first = head_of(first).await;
    assert_eq!(workers(&server.gateway)["a"].requests, 2);
    drop(first);
    within("the worker's connection to end", first_exchange.closed()).await;
    until("the booking to be released", || {
        workers(&server.gateway)["a"].requests == 1
    })
    .await;
    second_exchange.end_stream().await;
    assert!(text_of(second).await.ends_with("data: [DONE]\n\n"));
    until_released(&server.gateway).await;

    // Own responses and errors have their usual form.
    let models = head_of(client.send("GET", "/v1/models", "")).await;
    let models: Value = serde_json::from_str(&text_of(models).await).unwrap();
    assert_eq!(models["data"][0]["id"], MODEL);
    let error = head_of(client.send("POST", "/unknown", "{}")).await;
    assert_eq!(error.status(), 404);
    assert!(error.headers().get("connection").is_none());
    assert!(text_of(error).await.contains("unknown_url"));
}

#[tokio::test]
async fn clients_without_http2_speak_http1() {
    let worker = FakeWorker::start().await;
    let server = Server::start(&worker, "h2-none", |_| {}).await;
    for (offered, expected) in [(&["http/1.1"][..], Some(&b"http/1.1"[..])), (&[], None)] {
        let address = server.gateway.address();
        let stream = connect_offering(address, &server.authority, None, offered).await;
        assert_eq!(stream.unwrap().get_ref().1.alpn_protocol(), expected);
    }
}

#[tokio::test]
async fn a_shutdown_lets_streams_end_and_then_ends_them_with_an_error() {
    let mut worker = FakeWorker::start().await;
    let server = Server::start(&worker, "h2-shutdown", |config| {
        config.shutdown.delay = Duration::ZERO;
        config.shutdown_timeout = Duration::from_millis(300);
    })
    .await;
    let client = server.connect(1 << 20).await;
    let short = client.send("POST", CHAT, chat("short", true));
    let mut short_exchange = worker.request().await;
    let long = client.send("POST", CHAT, chat("long", true));
    let mut long_exchange = worker.request().await;
    let waiting = client.send("POST", CHAT, chat("waiting", false));
    let _waiting_exchange = worker.request().await;
    short_exchange.start_stream().await;
    short_exchange.send_chunk(token("x")).await;
    long_exchange.start_stream().await;
    long_exchange.send_chunk(token("x")).await;
    let (short, long) = (head_of(short).await, head_of(long).await);

    let shutdown = tokio::spawn(server.gateway.shut_down());
    short_exchange.end_stream().await;
    assert!(text_of(short).await.ends_with("data: [DONE]\n\n"));
    let text = text_of(long).await;
    assert!(text.contains("shutting_down"), "{text}");
    let waiting = head_of(waiting).await;
    assert_eq!(waiting.status(), 503);
    assert!(text_of(waiting).await.contains("shutting_down"));
    within("the connection to end", client.connection)
        .await
        .unwrap()
        .unwrap();
    within("the shutdown", shutdown).await.unwrap();
}

#[tokio::test]
async fn a_response_that_is_not_read_ends_alone() {
    let mut worker = FakeWorker::start().await;
    let server = Server::start(&worker, "h2-stall", |config| {
        config.connections.write_timeout = Duration::from_millis(200);
    })
    .await;
    let client = server.connect(16 << 10).await;
    let stalled = client.send("POST", CHAT, chat("hi", true));
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    let read = client.send("POST", CHAT, chat("ho", true));
    let mut other = worker.request().await;
    other.start_stream().await;
    // More than the client's window and the gateway's buffer.
    let long = token(&"x".repeat(32 << 10));
    exchange.send_chunk(&long).await;
    other.send_chunk(token("a")).await;
    let stalled = head_of(stalled).await;
    let read = head_of(read).await;
    while exchange.try_send(chunk(&long)).await.is_ok() {}
    other.send_chunk(token("b")).await;
    other.end_stream().await;
    let text = text_of(read).await;
    assert!(text.contains("[DONE]"), "{text}");
    within("the reset", stalled.into_body().collect())
        .await
        .unwrap_err();
    until_released(&server.gateway).await;
}

#[tokio::test]
async fn requests_on_a_connection_count_in_the_limit_of_connections() {
    let mut worker = FakeWorker::start().await;
    let server = Server::start(&worker, "h2-limit", |config| {
        config.connections.max_connections = Some(2);
    })
    .await;
    let client = server.connect(1 << 20).await;
    let send = || client.send("POST", CHAT, chat("hi", false));
    let running = [send(), send()];
    let exchanges = [worker.request().await, worker.request().await];
    let refused = head_of(send()).await;
    assert_eq!(refused.status(), 503);
    let text = text_of(refused).await;
    assert!(text.contains("too_many_connections"), "{text}");
    for exchange in exchanges {
        exchange.respond_json("{}").await;
    }
    for response in running {
        assert_eq!(head_of(response).await.status(), 200);
    }
    let later = send();
    worker.request().await.respond_json("{}").await;
    assert_eq!(head_of(later).await.status(), 200);
}

#[tokio::test]
async fn an_idle_connection_ends_and_a_running_stream_keeps_it() {
    let mut worker = FakeWorker::start().await;
    let server = Server::start(&worker, "h2-idle", |config| {
        config.connections.idle_timeout = Duration::from_millis(100);
    })
    .await;
    let client = server.connect(1 << 20).await;
    let response = client.send("POST", CHAT, chat("hi", true));
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    let response = head_of(response).await;
    let closed = tokio::time::timeout(Duration::from_millis(400), exchange.closed());
    closed.await.expect_err("the running stream was ended");
    exchange.end_stream().await;
    text_of(response).await;
    within("the connection to end", client.connection)
        .await
        .unwrap()
        .unwrap();
}
