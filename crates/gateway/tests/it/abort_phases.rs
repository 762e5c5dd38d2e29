//! Three in ten clients disconnect in one phase of a request: while its body arrives, in the queue,
//! before the first byte of the response, or in the middle of the stream. Every gauge of load
//! returns to exactly zero, and the other requests end well.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::fake_worker::*;
use foresee_core::queue::QueueOrder;
use foresee_gateway::Gateway;

/// Number of clients in each phase.
const CLIENTS: usize = 20;

/// Number of clients that disconnect.
const ABORTS: usize = CLIENTS * 3 / 10;

/// Waits until a value of the metrics is at least `minimum`.
async fn until_at_least(gateway: &Gateway, series: &str, minimum: f64) {
    within(series, async {
        while value(&metrics(gateway).await, series).unwrap() < minimum {}
    })
    .await;
}

/// Returns the request of a client, whose prompt shares its first half with those of other clients.
fn request(number: usize) -> Vec<u8> {
    let prompt = format!(
        "{}{}",
        "the same ".repeat(200),
        format!("{number} ").repeat(300)
    );
    http("POST", CHAT, chat(&prompt, true))
}

/// Connects all clients and sends their requests.
async fn send_all(gateway: &Gateway) -> Vec<Client> {
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        clients.push(Client::sending(gateway.address(), request(number)).await);
    }
    clients
}

/// Responds to a request with one token.
async fn respond(mut exchange: Exchange) {
    exchange.start_stream().await;
    exchange.send_chunk(token("word")).await;
    exchange.end_stream().await;
}

async fn read_to_end(clients: Vec<Client>) {
    for mut client in clients {
        let response = client.response().await;
        assert_eq!(response.status(), 200);
        assert!(response.text().ends_with("data: [DONE]\n\n"));
    }
}

#[tokio::test]
async fn aborts_in_the_middle_of_bodies_leave_nothing() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let requests: Vec<_> = (0..CLIENTS).map(request).collect();
    let mut clients = Vec::new();
    for request in &requests {
        let half = &request[..request.len() / 2];
        clients.push(Client::sending(gateway.address(), half).await);
    }
    let body_bytes: usize = requests.iter().map(|request| request.len() / 2).sum();
    until_at_least(&gateway, "foresee_request_body_bytes", body_bytes as f64).await;
    clients.drain(..ABORTS);
    for (client, request) in clients.iter_mut().zip(&requests[ABORTS..]) {
        client.send(&request[request.len() / 2..]).await;
    }
    for _ in ABORTS..CLIENTS {
        respond(worker.request().await).await;
    }
    read_to_end(clients).await;
    until_all_gauges_are_zero(&gateway).await;
    assert!(worker.is_idle());
}

#[tokio::test]
async fn aborts_in_the_queue_leave_nothing() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.router.queue_order = Some(QueueOrder::Fcfs);
    let gateway = gateway_with(config).await;
    let prompt = "an introduction as long as a book ".repeat(10_000);
    let long = http("POST", CHAT, chat(&prompt, true));
    let first = Client::sending(gateway.address(), long).await;
    let exchange = worker.request().await;
    let mut clients = send_all(&gateway).await;
    until("all requests to be queued", || {
        gateway.router().queued_requests() == CLIENTS
    })
    .await;
    clients.drain(..ABORTS);
    until("the aborted requests to leave the queue", || {
        gateway.router().queued_requests() == CLIENTS - ABORTS
    })
    .await;
    respond(exchange).await;
    for _ in ABORTS..CLIENTS {
        respond(worker.request().await).await;
    }
    clients.push(first);
    read_to_end(clients).await;
    until_all_gauges_are_zero(&gateway).await;
    assert!(worker.is_idle());
}

#[tokio::test]
async fn aborts_before_the_first_byte_leave_nothing() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut clients = Vec::new();
    let mut exchanges = Vec::new();
    for number in 0..CLIENTS {
        clients.push(Client::sending(gateway.address(), request(number)).await);
        exchanges.push(worker.request().await);
    }
    clients.drain(..ABORTS);
    for mut exchange in exchanges.drain(..ABORTS) {
        within("the worker's connection to be closed", exchange.closed()).await;
    }
    until("the aborted requests to be released", || {
        gateway.router().booking_count() == CLIENTS - ABORTS
    })
    .await;
    for exchange in exchanges {
        respond(exchange).await;
    }
    read_to_end(clients).await;
    until_all_gauges_are_zero(&gateway).await;
}

#[tokio::test]
async fn aborts_in_the_middle_of_streams_leave_nothing() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut clients = Vec::new();
    let mut exchanges = Vec::new();
    for number in 0..CLIENTS {
        let mut client = Client::sending(gateway.address(), request(number)).await;
        let mut exchange = worker.request().await;
        exchange.start_stream().await;
        exchange.send_chunk(token("word")).await;
        assert_eq!(client.head().await.status(), 200);
        client.chunk().await;
        clients.push(client);
        exchanges.push(exchange);
    }
    clients.drain(..ABORTS);
    for mut exchange in exchanges.drain(..ABORTS) {
        within("the worker's connection to be closed", exchange.closed()).await;
    }
    until("the aborted requests to be released", || {
        gateway.router().booking_count() == CLIENTS - ABORTS
    })
    .await;
    for exchange in exchanges {
        exchange.end_stream().await;
    }
    for mut client in clients {
        let rest = client.rest().await.unwrap();
        assert!(rest.ends_with("data: [DONE]\n\n"));
    }
    until_all_gauges_are_zero(&gateway).await;
}
