//! Replays a trace of operations with the Rust library, without the bindings: prints the choices, and
//! how long each kind of operation took.
//!
//! The trace on standard input is described in `tests/traces.py`.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::io::{self, BufRead};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use foresee_core::booking::Booking;
use foresee_core::event_index::CacheDelta;
use foresee_core::policy::NamedPolicy;
use foresee_core::router::{CacheSource, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, prefix_salt};
use foresee_core::workers::{WorkerId, WorkerSpec};
use foresee_engine::kv_events::Message;
use foresee_engine::kv_events::follower::{Follower, Received};
use serde::Deserialize;
use serde_json::json;

/// Tokens per block.
const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();

/// The first line of a trace.
#[derive(Deserialize)]
struct Header {
    policy: String,
    temperature: f64,
    seed: u64,
    workers: Vec<String>,
}

/// One operation.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Operation {
    Route {
        at: f64,
        request: u64,
        model: String,
        tokens: Vec<u32>,
        max_tokens: Option<u32>,
    },
    FirstToken {
        at: f64,
        request: u64,
    },
    Tokens {
        at: f64,
        request: u64,
        count: u32,
    },
    Complete {
        at: f64,
        request: u64,
    },
    Release {
        request: u64,
    },
    Events {
        at: f64,
        worker: String,
        sequence: u64,
        payload: String,
    },
}

/// A router and the state of a replay.
struct Replay {
    router: Router,
    workers: HashMap<String, WorkerId>,
    followers: HashMap<String, Follower>,
    bookings: HashMap<u64, Booking>,
    /// Number of the request, worker, overlap and cost in blocks.
    choices: Vec<(u64, String, u32, f64)>,
    /// Duration of each operation in microseconds, by its kind.
    durations: BTreeMap<&'static str, Vec<f64>>,
}

impl Replay {
    /// Returns a replay on an idle router.
    fn new(header: &Header) -> Result<Self, Box<dyn Error>> {
        let router = Router::new(RouterConfig {
            policy: header.policy.parse::<NamedPolicy>()?,
            temperature: header.temperature,
            seed: header.seed,
            block_size: BLOCK_SIZE,
            queue_order: None,
            ..RouterConfig::default()
        })?;
        let mut workers = HashMap::new();
        for name in &header.workers {
            let id = router.add_worker(WorkerSpec {
                name: name.clone(),
                models: vec!["m".to_owned()],
                capacity_blocks: Some(8192),
                prefix_caching: true,
                ..WorkerSpec::default()
            })?;
            router.set_healthy(id, true);
            workers.insert(name.clone(), id);
        }
        Ok(Self {
            router,
            workers,
            followers: HashMap::new(),
            bookings: HashMap::new(),
            choices: Vec::new(),
            durations: BTreeMap::new(),
        })
    }

    /// Adds the time since `started` to the durations of `kind`.
    fn measure(&mut self, kind: &'static str, started: Instant) {
        let microseconds = started.elapsed().as_secs_f64() * 1e6;
        self.durations.entry(kind).or_default().push(microseconds);
    }

    /// Applies one operation.
    fn apply(&mut self, operation: Operation) -> Result<(), Box<dyn Error>> {
        match operation {
            Operation::Route {
                at,
                request,
                model,
                tokens,
                max_tokens,
            } => {
                let now = Duration::from_secs_f64(at);
                let started = Instant::now();
                let salt = prefix_salt(&model, None, None);
                let prompt = Sequence::from_tokens(&tokens, BLOCK_SIZE, salt);
                let routed = Request {
                    model: &model,
                    max_tokens,
                    ..Request::new(&prompt)
                };
                let booking = self.router.route(&routed, now)?;
                self.measure("route", started);
                let mut names = self.workers.iter();
                let name = names.find(|(_, id)| **id == booking.worker());
                let name = name.ok_or("unknown worker")?.0.clone();
                let cost = booking.decision().cost;
                self.choices
                    .push((request, name, cost.overlap_blocks, cost.total));
                self.bookings.insert(request, booking);
            }
            Operation::FirstToken { at, request } => {
                let booking = self.bookings.get_mut(&request).ok_or("no booking")?;
                let started = Instant::now();
                booking.on_first_token(Duration::from_secs_f64(at));
                self.measure("first_token", started);
            }
            Operation::Tokens { at, request, count } => {
                let booking = self.bookings.get_mut(&request).ok_or("no booking")?;
                let started = Instant::now();
                booking.on_tokens(count, Duration::from_secs_f64(at));
                self.measure("tokens", started);
            }
            Operation::Complete { at, request } => {
                let booking = self.bookings.remove(&request).ok_or("no booking")?;
                let started = Instant::now();
                booking.complete(Duration::from_secs_f64(at));
                self.measure("complete", started);
            }
            Operation::Release { request } => {
                drop(self.bookings.remove(&request).ok_or("no booking")?);
            }
            Operation::Events {
                at,
                worker,
                sequence,
                payload,
            } => self.apply_events(at, &worker, sequence, &decode_hex(&payload)?)?,
        }
        Ok(())
    }

    /// Applies one batch of KV events, which must be the next of its worker.
    fn apply_events(
        &mut self,
        at: f64,
        worker: &str,
        sequence: u64,
        payload: &[u8],
    ) -> Result<(), Box<dyn Error>> {
        let id = *self.workers.get(worker).ok_or("unknown worker")?;
        let new = || {
            self.router.set_cache_source(id, CacheSource::Events);
            Follower::new(BLOCK_SIZE, "m".to_owned(), None)
        };
        let follower = self.followers.entry(worker.to_owned());
        let follower = follower.or_insert_with(new);
        let message = Message {
            topic: b"",
            sequence,
            payload,
        };
        let Received::Applied(changes) = follower.receive(&message) else {
            return Err("the batch is not the next one".into());
        };
        // The first batch joins what was cached before; the time of the others is known.
        let observed = match sequence {
            0 => Observed::Replayed,
            _ => Observed::Live(Duration::from_secs_f64(at)),
        };
        for delta in &changes {
            self.router.apply_cache_delta(id, delta, observed);
        }
        if changes.is_empty() {
            self.router
                .apply_cache_delta(id, &CacheDelta::default(), observed);
        }
        Ok(())
    }
}

/// Reads bytes written as hexadecimal digits.
fn decode_hex(digits: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let pairs = (0..digits.len()).step_by(2);
    pairs
        .map(|start| {
            let pair = digits.get(start..start + 2).ok_or("odd number of digits")?;
            Ok(u8::from_str_radix(pair, 16)?)
        })
        .collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut lines = io::stdin().lock().lines();
    let header: Header = serde_json::from_str(&lines.next().ok_or("the trace is empty")??)?;
    let operations: Vec<Operation> = lines
        .map(|line| Ok::<_, Box<dyn Error>>(serde_json::from_str(&line?)?))
        .collect::<Result<_, _>>()?;
    let mut replay = Replay::new(&header)?;
    for operation in operations {
        replay.apply(operation)?;
    }
    println!(
        "{}",
        json!({ "choices": replay.choices, "microseconds": replay.durations })
    );
    Ok(())
}
