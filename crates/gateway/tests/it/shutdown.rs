//! Shutdown: new connections are refused, running responses may end until the deadline.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::{Duration, Instant};

use crate::fake_worker::*;
use tokio::net::TcpStream;

/// A shutdown deadline that no test waits for: a gateway that stops has not waited for it.
const FAR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn running_streams_end_and_new_connections_are_refused() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.shutdown_timeout = FAR;
    let gateway = gateway_with(config).await;
    let router = gateway.router().clone();
    let addresses = [gateway.address(), gateway.admin_address()];
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

    let stopped = tokio::spawn(gateway.shut_down());
    for address in addresses {
        within("new connections to be refused", async {
            while TcpStream::connect(address).await.is_ok() {}
        })
        .await;
    }
    assert!(!stopped.is_finished());
    for _ in 0..3 {
        exchange.send_chunk(token("y")).await;
        assert_eq!(client.chunk().await, token("y").as_bytes());
    }
    exchange.end_stream().await;
    assert_eq!(client.rest().await.unwrap(), "data: [DONE]\n\n");
    // Before the deadline: idle connections do not delay the shutdown.
    within("the gateway to stop", stopped).await.unwrap();
    assert_eq!(router.booking_count(), 0);
    // Health checks have stopped too.
    let probes = worker.probes();
    a_few_probe_intervals().await;
    assert!(worker.probes() <= probes + 1);
}

#[tokio::test]
async fn a_stream_that_never_ends_is_aborted_at_the_deadline() {
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

    let stopping = Instant::now();
    within("the gateway to stop", gateway.shut_down()).await;
    let took = stopping.elapsed();
    assert!(took >= Duration::from_millis(150), "{took:?}");
    // Nothing of the request remains.
    within("the worker's connection to be closed", exchange.closed()).await;
    assert!(client.rest().await.is_err());
    until("the booking to be released", || router.booking_count() == 0).await;
}

#[tokio::test]
async fn an_idle_gateway_stops_immediately() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.shutdown_timeout = FAR;
    let gateway = gateway_with(config).await;
    within("the gateway to stop", gateway.shut_down()).await;
}
