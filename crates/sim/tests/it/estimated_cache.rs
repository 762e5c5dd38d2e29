//! Estimation of the cache of an engine that sends no events: the router learns only from the
//! cached tokens in responses.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerSnapshot, WorkerSpec};
use foresee_core::{CapacitySource, DEFAULT_CAPACITY_BLOCKS};
use foresee_sim::engine::{Engine, EngineConfig, EngineRequest};
use foresee_sim::step_time::L40S_8B;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();
const OUTPUT: u32 = 20;

/// Information that the router gets about the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reported {
    Nothing,
    Hits,
    Capacity,
}

/// An engine and a router that receives only its responses.
struct Pair {
    reported: Reported,
    engine: Engine,
    router: Router,
    rng: SmallRng,
    running: HashMap<u64, Booking>,
    requests: u64,
    now: Duration,
    /// Predicted and actual hits of each response, in blocks.
    hits: Vec<(u32, u32)>,
}

impl Pair {
    fn new(blocks: u32, reported: Reported) -> Self {
        let config = RouterConfig {
            block_size: BLOCK_SIZE,
            queue_order: None,
            ..RouterConfig::default()
        };
        let router = Router::new(config).unwrap();
        let spec = WorkerSpec {
            prefix_caching: true,
            capacity_blocks: (reported == Reported::Capacity).then_some(blocks),
            ..WorkerSpec::default()
        };
        let worker = router.add_worker(spec).unwrap();
        router.set_healthy(worker, true);
        Self {
            reported,
            engine: engine(blocks),
            router,
            rng: SmallRng::seed_from_u64(1),
            running: HashMap::new(),
            requests: 0,
            now: Duration::ZERO,
            hits: Vec::new(),
        }
    }

    /// Sends a question about one of `documents` documents. The popularity of documents differs.
    fn ask(&mut self, documents: u32) {
        let popularity: f64 = self.rng.random();
        let document = (f64::from(documents) * popularity * popularity) as u32;
        self.requests += 1;
        let length = 16 * (32 + document * 37 % 64);
        let question = (0..40).map(|token| 1 << 30 | (self.requests as u32) << 6 | token);
        let tokens: Vec<u32> = (0..length)
            .map(|token| document << 11 | token)
            .chain(question)
            .collect();
        let sequence = Sequence::from_tokens(&tokens, BLOCK_SIZE, 0);
        let request = Request::new(&sequence);
        let booking = self.router.route(&request, self.now).unwrap();
        let request = EngineRequest {
            id: self.requests,
            hashes: Arc::from(sequence.hashes()),
            prompt_tokens: sequence.tokens(),
            output_tokens: OUTPUT,
        };
        self.engine.submit(request).unwrap();
        self.running.insert(self.requests, booking);
    }

    fn step(&mut self) {
        let step = self.engine.begin_step().unwrap();
        self.now += step.duration;
        for event in self.engine.end_step(step) {
            let booking = self.running.get_mut(&event.id).unwrap();
            booking.on_tokens(1, self.now);
            if event.finished {
                let mut booking = self.running.remove(&event.id).unwrap();
                let predicted = booking.decision().cost.overlap_blocks;
                self.hits
                    .push((predicted, event.cached_tokens / BLOCK_SIZE));
                if self.reported == Reported::Hits {
                    booking.on_cached_tokens(event.cached_tokens);
                }
                booking.complete(self.now);
            }
        }
    }

    /// Sends `requests` questions with at most `concurrency` in flight, and waits for the
    /// responses.
    fn ask_many(&mut self, documents: u32, requests: usize, concurrency: usize) {
        for _ in 0..requests {
            while self.running.len() >= concurrency {
                self.step();
            }
            self.ask(documents);
        }
        while !self.running.is_empty() {
            self.step();
        }
    }

    fn worker(&self) -> WorkerSnapshot {
        self.router.workers(self.now).remove(0)
    }
}

fn engine(blocks: u32) -> Engine {
    Engine::new(EngineConfig {
        blocks,
        ..EngineConfig::from_preset(&L40S_8B, BLOCK_SIZE)
    })
}

/// Returns the fraction of responses whose cached blocks were predicted exactly.
fn agreement(hits: &[(u32, u32)]) -> f64 {
    let equal = hits
        .iter()
        .filter(|(predicted, actual)| predicted == actual);
    equal.count() as f64 / hits.len() as f64
}

#[test]
fn the_capacity_is_learned_from_hits_and_misses() {
    for (blocks, requests) in [
        (DEFAULT_CAPACITY_BLOCKS / 8, 4_000),
        (DEFAULT_CAPACITY_BLOCKS, 8_000),
        (DEFAULT_CAPACITY_BLOCKS * 8, 16_000),
    ] {
        // The documents need about twice the capacity.
        let documents = blocks / 32;
        let without_learning = |reported| {
            let mut pair = Pair::new(blocks, reported);
            pair.ask_many(documents, requests, 8);
            agreement(&pair.hits[requests - 1000..])
        };
        let (assumed, configured) = (
            without_learning(Reported::Nothing),
            without_learning(Reported::Capacity),
        );
        let mut pair = Pair::new(blocks, Reported::Hits);
        let mut learned = None;
        for hundred in 0..requests / 100 {
            pair.ask_many(documents, 100, 8);
            let estimate = pair.worker().capacity_blocks;
            if learned.is_none() && estimate.abs_diff(blocks) * 10 < blocks {
                learned = Some(hundred * 100 + 100);
            }
        }
        let worker = pair.worker();
        let last = agreement(&pair.hits[requests - 1000..]);
        println!(
            "{blocks} blocks: {} {}, within 10 % after {learned:?} responses; of the last 1,000 \
             predictions {:.1} % are exact, {:.1} % with the assumed capacity, {:.1} % with the \
             configured capacity",
            worker.capacity_source.as_str(),
            worker.capacity_blocks,
            100.0 * last,
            100.0 * assumed,
            100.0 * configured,
        );
        let error = f64::from(worker.capacity_blocks) / f64::from(blocks) - 1.0;
        assert!(error.abs() < 0.05, "{}", worker.capacity_blocks);
        assert!(
            last > configured - 0.01,
            "{last} learned, {configured} configured"
        );
        if blocks != DEFAULT_CAPACITY_BLOCKS {
            assert!(last > assumed + 0.1, "{last} learned, {assumed} assumed");
            assert_eq!(worker.capacity_source, CapacitySource::Learned);
        }
    }
}

#[test]
fn the_unannounced_loss_of_a_cache_is_detected() {
    let mut pair = Pair::new(DEFAULT_CAPACITY_BLOCKS, Reported::Hits);
    pair.ask_many(100, 1_000, 8);
    let before = pair.hits.len();
    pair.engine = engine(DEFAULT_CAPACITY_BLOCKS);
    pair.ask_many(100, 300, 8);
    let after = &pair.hits[before..];
    let wrong: Vec<usize> = (0..after.len())
        .filter(|&index| after[index].0 != after[index].1)
        .collect();
    println!("wrong after the loss: responses {wrong:?}");
    // Four responses prove the loss. Seven others were predicted before these had arrived.
    assert!(wrong.len() <= 4 + 7, "{wrong:?}");
    assert!(wrong.iter().all(|&index| index < 20), "{wrong:?}");
    assert_eq!(agreement(&after[20..]), 1.0);
}
