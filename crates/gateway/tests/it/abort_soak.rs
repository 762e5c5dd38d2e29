//! Many concurrent streams, a third of them aborted by their clients at random points: all bookings
//! must be released.
//!
//! `FORESEE_SOAK_STREAMS` sets the number of streams (default 300).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::policy;
use tokio::sync::Semaphore;

/// Maximum number of concurrent connections. A test may not have many file descriptors.
const MAX_CONNECTIONS: usize = 150;

/// Number of events of a stream that is not aborted.
const EVENTS: u64 = 20;

/// Random number generator. The course of each stream depends only on the stream's number.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (word ^ (word >> 31)) % limit
    }
}

/// Responds to every request until the test ends, and resets some of the connections.
async fn respond_to_all(mut worker: FakeWorker, seed: u64) {
    let mut served = seed;
    loop {
        let mut exchange = worker.request_at_any_time().await;
        served += 1;
        tokio::spawn(async move {
            let mut dice = Dice(served);
            if dice.below(50) == 0 {
                return exchange.reset();
            }
            let mut bytes = STREAM_HEAD.to_vec();
            for _ in 0..EVENTS {
                bytes.extend(chunk(token("word")));
                if dice.below(3) > 0 {
                    if exchange.try_send(&bytes).await.is_err() {
                        return;
                    }
                    bytes.clear();
                    tokio::task::yield_now().await;
                }
                if dice.below(1000) == 0 {
                    return exchange.reset();
                }
            }
            bytes.extend(chunk("data: [DONE]\n\n"));
            bytes.extend_from_slice(b"0\r\n\r\n");
            if exchange.try_send(&bytes).await.is_ok() {
                exchange.keep();
            }
        });
    }
}

#[derive(Debug, PartialEq)]
enum End {
    Whole,
    Aborted,
    Failed,
}

/// Runs one client. Three in ten disconnect after a random number of events, some of them before the
/// first byte. The gateway may have sent more than these.
async fn stream(address: SocketAddr, number: u64) -> End {
    let mut dice = Dice(number << 32);
    let common = "what many have in common ".repeat(20 * dice.below(4) as usize);
    let prompt = format!("{common}and what only {number} says");
    let mut client = Client::sending(address, http("POST", CHAT, chat(&prompt, true))).await;
    let events = match dice.below(10) {
        0..3 => dice.below(EVENTS),
        _ => u64::MAX,
    };
    if events == 0 {
        return End::Aborted;
    }
    if client.head().await.status() != 200 {
        return End::Failed;
    }
    let mut body = String::new();
    while (body.matches("word").count() as u64) < events {
        match within("a chunk", client.connection.chunk()).await.unwrap() {
            Some(chunk) => body += std::str::from_utf8(&chunk).unwrap(),
            None => break,
        }
    }
    if body.contains("\"error\"") {
        End::Failed
    } else if events < EVENTS {
        End::Aborted
    } else if body.ends_with("data: [DONE]\n\n") {
        assert_eq!(body.matches("word").count() as u64, EVENTS);
        End::Whole
    } else {
        End::Aborted
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aborted_streams_leave_no_gauge_above_zero() {
    let streams = std::env::var("FORESEE_SOAK_STREAMS");
    let streams: u64 = streams.map_or(300, |count| count.parse().unwrap());
    let mut fleet = Vec::new();
    for _ in 0..4 {
        fleet.push(FakeWorker::start().await);
    }
    let mut config = config(&fleet.iter().collect::<Vec<_>>());
    config.router.policy = policy::KV;
    config.router.temperature = 0.5;
    let gateway = gateway_with(config).await;
    for (worker, seed) in fleet.into_iter().zip(1..) {
        tokio::spawn(respond_to_all(worker, seed << 48));
    }

    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut clients = Vec::new();
    for number in 0..streams {
        let permits = Arc::clone(&permits);
        let address = gateway.address();
        clients.push(tokio::spawn(async move {
            let _permit = permits.acquire().await.unwrap();
            stream(address, number).await
        }));
    }
    let mut ends = Vec::new();
    for client in clients {
        let max_wait = Duration::from_secs(10 + streams / 50);
        ends.push(
            tokio::time::timeout(max_wait, client)
                .await
                .unwrap()
                .unwrap(),
        );
    }
    let count = |end: End| ends.iter().filter(|&other| *other == end).count() as u64;
    let (whole, aborted, failed) = (count(End::Whole), count(End::Aborted), count(End::Failed));
    assert!(aborted >= streams / 5, "{aborted} of {streams} aborted");
    assert!(failed <= streams / 10, "{failed} of {streams} failed");
    assert_eq!(whole + aborted + failed, streams);

    // The gateway accepts this request after all earlier ones, some of which it may not have read.
    call(gateway.address(), "GET", "/health", "").await;
    until_released(&gateway).await;
    until_all_gauges_are_zero(&gateway).await;
    // Every request has one outcome, except requests whose clients disconnected before they were read.
    // The response to a request that was aborted late may have been whole when the gateway sent it.
    let text = metrics(&gateway).await;
    let outcome = |outcome: &str| {
        let series = format!("foresee_requests_total{{outcome=\"{outcome}\"}}");
        value(&text, &series).unwrap_or(0.0) as u64
    };
    let (ok, left) = (outcome("ok"), outcome("client_left"));
    let worker_failed = outcome("worker_failed");
    assert!(
        (whole..=whole + aborted).contains(&ok),
        "{ok} ok of {whole}"
    );
    assert!(
        (failed..=failed + aborted).contains(&worker_failed),
        "{worker_failed} failed"
    );
    assert!((1..=aborted).contains(&left), "{left} left of {aborted}");
    assert!(ok + left + worker_failed <= streams);
}
