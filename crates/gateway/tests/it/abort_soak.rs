//! Many streams at once, a third of them given up at random points: nothing may stay behind.
//!
//! `FORESEE_SOAK_STREAMS` sets how many (300).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::choose::Policy;
use tokio::sync::Semaphore;

/// Connections at once: a test may not have many file descriptors.
const AT_ONCE: usize = 150;

/// Events of one answer that is not given up.
const EVENTS: u64 = 20;

/// A small generator, so that each stream's fate follows from its number.
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

/// Answers every request, some of them badly, until the test ends.
async fn answer_all(mut worker: FakeWorker, seed: u64) {
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
    GivenUp,
    Failed,
}

/// One client: three in ten leave after so many chunks, some of them before the first byte.
async fn stream(address: SocketAddr, number: u64) -> End {
    let mut dice = Dice(number << 32);
    let shared = "what many have in common ".repeat(20 * dice.below(4) as usize);
    let prompt = format!("{shared}and what only {number} says");
    let mut client = Client::sending(address, http("POST", CHAT, chat(&prompt, true))).await;
    let chunks = match dice.below(10) {
        0..3 => dice.below(EVENTS),
        _ => u64::MAX,
    };
    if chunks == 0 {
        return End::GivenUp;
    }
    if client.head().await.status() != 200 {
        return End::Failed;
    }
    let mut body = Vec::new();
    for _ in 0..chunks {
        match within("a chunk", client.connection.chunk()).await.unwrap() {
            Some(chunk) => body.extend(chunk),
            None => break,
        }
    }
    let body = String::from_utf8(body).unwrap();
    if body.contains("\"error\"") {
        End::Failed
    } else if body.ends_with("data: [DONE]\n\n") {
        assert_eq!(body.matches("word").count() as u64, EVENTS);
        End::Whole
    } else {
        End::GivenUp
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_gauge_drifts() {
    let streams = std::env::var("FORESEE_SOAK_STREAMS");
    let streams: u64 = streams.map_or(300, |count| count.parse().unwrap());
    let mut fleet = Vec::new();
    for _ in 0..4 {
        fleet.push(FakeWorker::start().await);
    }
    let mut config = config(&fleet.iter().collect::<Vec<_>>());
    config.router.policy = Policy::Kv;
    config.router.temperature = 0.5;
    let gateway = gateway_with(config).await;
    for (worker, seed) in fleet.into_iter().zip(1..) {
        tokio::spawn(answer_all(worker, seed << 48));
    }

    let permits = Arc::new(Semaphore::new(AT_ONCE));
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
        let patience = Duration::from_secs(10 + streams / 50);
        ends.push(
            tokio::time::timeout(patience, client)
                .await
                .unwrap()
                .unwrap(),
        );
    }
    let count = |end: End| ends.iter().filter(|&other| *other == end).count() as u64;
    let (whole, given_up, failed) = (count(End::Whole), count(End::GivenUp), count(End::Failed));
    assert!(given_up >= streams / 5, "{given_up} of {streams} given up");
    assert!(failed <= streams / 10, "{failed} of {streams} failed");
    assert_eq!(whole + given_up + failed, streams);

    // Accepted after all those before it, some of which the gateway may not have read yet.
    call(gateway.address(), "GET", "/health", "").await;
    freed(&gateway).await;
    for name in ['a', 'b', 'c', 'd'] {
        for gauge in [
            "requests",
            "active_blocks",
            "prefill_tokens",
            "context_tokens",
        ] {
            let series = format!("foresee_worker_{gauge}{{worker=\"{name}\"}}");
            counted(&gateway, &series, 0.0).await;
        }
    }
    counted(&gateway, "foresee_bookings", 0.0).await;
    // Every request ended in one way, but for those whose client left before they were read. One
    // given up late may have been answered whole, as far as the gateway can know.
    let text = metrics(&gateway).await;
    let outcome = |outcome: &str| {
        let series = format!("foresee_requests_total{{outcome=\"{outcome}\"}}");
        value(&text, &series).unwrap_or(0.0) as u64
    };
    let (ok, left) = (outcome("ok"), outcome("client_left"));
    let worker_failed = outcome("worker_failed");
    assert!(
        (whole..=whole + given_up).contains(&ok),
        "{ok} ok of {whole}"
    );
    assert!(
        (failed..=failed + given_up).contains(&worker_failed),
        "{worker_failed} failed"
    );
    assert!((1..=given_up).contains(&left), "{left} left of {given_up}");
    assert!(ok + left + worker_failed <= streams);
}
