//! Shutdown: readiness fails first, connections are accepted for a while, running responses may end
//! until the deadline, and the admin listener ends last.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::fake_worker::*;
use foresee_core::queue::QueueOrder;
use foresee_gateway::{Gateway, InheritedListeners, ProgramParts};
use tokio::net::TcpStream;

/// A shutdown deadline that no test waits for: a gateway that stops has not waited for it.
const FAR: Duration = Duration::from_secs(3600);

/// Waits until new connections are refused.
async fn until_refused(address: SocketAddr) {
    within("new connections to be refused", async {
        while TcpStream::connect(address).await.is_ok() {}
    })
    .await;
}

#[tokio::test]
async fn running_streams_end_and_the_admin_listener_ends_last() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.shutdown_timeout = FAR;
    let gateway = gateway_with(config).await;
    let router = gateway.router().clone();
    let admin = gateway.admin_address().unwrap();
    // One connection is idle, one has never been used.
    let mut idle = Client::sending(gateway.address(), http("GET", "/health", "")).await;
    assert_eq!(idle.response().await.status(), 200);
    let _unused = Client::connect(gateway.address()).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(client.head().await.status(), 200);
    client.chunk().await;

    let address = gateway.address();
    let stopped = tokio::spawn(gateway.shut_down());
    until_refused(address).await;
    assert!(!stopped.is_finished());
    for _ in 0..3 {
        exchange.send_chunk(token("y")).await;
        assert_eq!(client.chunk().await, token("y").as_bytes());
        // The operator can still see the gateway.
        let ready = call(admin, "GET", "/health/ready", "").await;
        assert_eq!(ready.error(503)["code"], "shutting_down");
        assert_eq!(call(admin, "GET", "/health/live", "").await.status(), 200);
        assert_eq!(call(admin, "GET", "/metrics", "").await.status(), 200);
    }
    exchange.end_stream().await;
    assert_eq!(client.rest().await.unwrap(), "data: [DONE]\n\n");
    // Before the deadline: idle connections do not delay the shutdown for long.
    within("the gateway to stop", stopped).await.unwrap();
    until_refused(admin).await;
    assert_eq!(router.booking_count(), 0);
    // Health checks have stopped too.
    let probes = worker.probes();
    a_few_probe_intervals().await;
    assert!(worker.probes() <= probes + 1);
}

#[tokio::test]
async fn requests_are_served_until_connections_are_refused() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.shutdown.delay = Duration::from_millis(500);
    config.shutdown_timeout = FAR;
    let gateway = gateway_with(config).await;
    let (api, admin) = (gateway.address(), gateway.admin_address());
    let mut open = Client::sending(api, http("GET", "/v1/models", "")).await;
    assert_eq!(open.response().await.status(), 200);
    let mut late = Client::sending(api, http("GET", "/v1/models", "")).await;
    let response = late.response().await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.head.get("connection"), None);
    let mut unused = Client::connect(api).await;

    let stopping = Instant::now();
    let stopped = tokio::spawn(gateway.shut_down());
    within("readiness to fail", async {
        while call(admin, "GET", "/health/ready", "").await.status() == 200 {}
    })
    .await;
    assert_eq!(call(api, "GET", "/health", "").await.status(), 503);
    // Open and new connections are served, and their responses close them.
    for client in [&mut open, &mut Client::connect(api).await] {
        client.send(http("POST", CHAT, chat("hi", false))).await;
        worker.request().await.respond_json("{}").await;
        let response = client.response().await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.head.get("connection"), Some("close"));
    }
    assert!(stopping.elapsed() < Duration::from_millis(500));
    until_refused(api).await;
    assert!(stopping.elapsed() >= Duration::from_millis(500));
    // A later request on a used connection is refused; the first one of a connection is served.
    late.send(http("POST", CHAT, chat("hi", false))).await;
    unused.send(http("POST", CHAT, chat("hi", false))).await;
    let response = late.response().await;
    assert_eq!(response.error(503)["code"], "shutting_down");
    assert_eq!(response.head.get("connection"), Some("close"));
    worker.request().await.respond_json("{}").await;
    assert_eq!(unused.response().await.status(), 200);
    within("the gateway to stop", stopped).await.unwrap();
}

#[tokio::test]
async fn a_stream_that_never_ends_gets_an_error_event_at_the_deadline() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.shutdown_timeout = Duration::from_millis(150);
    let gateway = gateway_with(config).await;
    let router = gateway.router().clone();
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    client.head().await;
    client.chunk().await;
    // This request has no response yet.
    let mut waiting =
        Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
    let mut second = worker.request().await;
    // This response cannot contain an error.
    let mut cut = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
    let mut third = worker.request().await;
    let json = whole("200 OK", "application/json", "{}");
    third.send(&json[..json.len() - 1]).await;
    cut.head().await;

    let stopping = Instant::now();
    let (stopped, rest, response) = tokio::join!(
        async {
            within("the gateway to stop", gateway.shut_down()).await;
            stopping.elapsed()
        },
        client.rest(),
        waiting.response(),
    );
    assert!(stopped >= Duration::from_millis(150), "{stopped:?}");
    let rest = rest.unwrap();
    assert!(rest.contains("\"code\":\"shutting_down\""), "{rest}");
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert_eq!(response.error(503)["code"], "shutting_down");
    assert!(cut.rest().await.is_err());
    // Nothing of the requests remains.
    for exchange in [&mut exchange, &mut second, &mut third] {
        within("the worker's connection to be closed", exchange.closed()).await;
    }
    until("the bookings to be released", || {
        router.booking_count() == 0
    })
    .await;
}

#[tokio::test]
async fn a_queued_request_is_served_within_the_time_or_refused() {
    let mut worker = FakeWorker::start().await;
    for is_served in [true, false] {
        let mut config = config(&[&worker]);
        config.router.queue_order = Some(QueueOrder::Fcfs);
        config.shutdown_timeout = match is_served {
            true => FAR,
            false => Duration::from_millis(150),
        };
        let gateway = gateway_with(config).await;
        // So long that the worker is busy with it.
        let prompt = "tell me more ".repeat(20_000);
        let request = http("POST", CHAT, chat(&prompt, false));
        let mut first = Client::sending(gateway.address(), &request).await;
        let running = worker.request().await;
        // Another prompt: one that the worker is computing already would be sent at once.
        let request = http("POST", CHAT, chat(&format!("Please {prompt}"), false));
        let mut queued = Client::sending(gateway.address(), &request).await;
        until("a request to be queued", || {
            gateway.router().queued_requests() == 1
        })
        .await;
        let stopped = tokio::spawn(gateway.shut_down());
        if is_served {
            running.respond_json("{}").await;
            worker.request().await.respond_json("{}").await;
            assert_eq!(first.response().await.status(), 200);
            assert_eq!(queued.response().await.status(), 200);
        } else {
            let response = queued.response().await;
            assert_eq!(response.error(503)["code"], "shutting_down");
            assert_eq!(first.response().await.status(), 503);
        }
        within("the gateway to stop", stopped).await.unwrap();
    }
}

#[tokio::test]
async fn connections_wait_at_an_inherited_socket_for_the_next_gateway() {
    let worker = FakeWorker::start().await;
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let start = || {
        let inherited = InheritedListeners {
            api: Some(socket.try_clone().unwrap()),
            admin: None,
        };
        Gateway::start_on(inherited, config(&[&worker]), ProgramParts::default()).unwrap()
    };
    let gateway = start();
    assert_eq!(gateway.address(), address);
    assert_eq!(call(address, "GET", "/v1/models", "").await.status(), 200);
    gateway.shut_down().await;
    // Nothing accepts this connection yet.
    let mut client = Client::sending(address, http("GET", "/v1/models", "")).await;
    let gateway = start();
    assert_eq!(client.response().await.status(), 200);
    gateway.shut_down().await;
}

#[tokio::test]
async fn an_idle_gateway_stops_immediately() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.shutdown_timeout = FAR;
    let gateway = gateway_with(config).await;
    within("the gateway to stop", gateway.shut_down()).await;
}
