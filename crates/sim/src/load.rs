//! Sends a workload to a live OpenAI-compatible address, by the rules replay goes by, and
//! measures what users would see.
//!
//! Everything is told in the engine's own time: an engine that runs ten times as fast as its law
//! says is sent requests ten times as often, and a second of the clock on the wall counts as ten.
//! So what is measured here compares with what replay predicts.
//!
//! One task drives the arrivals; each request is a task of its own. Nothing limits how many are
//! in flight but the workload itself.

mod body;
mod clock;
mod flight;
mod hang_up;
mod outcome;
mod report;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Uri;
use hyper::http::uri::InvalidUri;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::task::{JoinError, JoinSet};

use crate::arrivals::Arrivals;
use crate::workload::Workload;

use clock::Clock;
use flight::{Flight, Record, Target};
use hang_up::HangUp;
use outcome::Tally;

pub use outcome::{FailureKind, Failures, LiveOutcome, WorkerShare};
pub use report::{LiveReport, NamedOutcome};

/// Where to send a workload, and how.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Base URL without `/v1`: `http://127.0.0.1:8080`. A missing scheme is `http`, and there is
    /// no other.
    pub address: String,
    /// The model to ask for.
    pub model: String,
    /// Ask `/v1/chat/completions`, with the prompt as one message, not `/v1/completions`.
    pub chat: bool,
    /// Workers behind the address, so that one that is never chosen counts as idle.
    pub workers: usize,
    /// How many seconds of the engine's time pass in one of real time.
    pub time_scale: f64,
    /// Share of streams, 0 to 1, that the client breaks off: a quarter of them before the first
    /// byte, the others after some of their tokens.
    pub abort_share: f64,
    /// Decides which streams are broken off, and when.
    pub seed: u64,
    /// The longest a request may take, in real time.
    pub timeout: Duration,
}

impl LoadConfig {
    /// One worker in real time, nothing broken off, ten minutes for each request.
    #[must_use]
    pub fn new(address: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            model: model.into(),
            chat: false,
            workers: 1,
            time_scale: 1.0,
            abort_share: 0.0,
            seed: 0,
            timeout: Duration::from_secs(600),
        }
    }
}

/// How far a load has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests sent.
    pub sent: usize,
    /// Those of them that have ended, one way or another.
    pub ended: usize,
    /// Those of them that failed.
    pub failed: usize,
    /// Requests of the workload.
    pub total: usize,
    /// Time since the beginning, as the engine counts it.
    pub now: Duration,
}

/// Why a load cannot be sent. Requests that fail are no error: they are counted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The address is no URL.
    #[error("cannot send requests to {address:?}: {reason}")]
    InvalidAddress {
        /// The address given.
        address: String,
        /// What is wrong with it.
        reason: InvalidUri,
    },
    /// The address asks for another protocol.
    #[error("cannot send requests to {address:?}: only http:// addresses are supported")]
    NotHttp {
        /// The address given.
        address: String,
    },
    /// Times could not be converted.
    #[error("cannot run at a time scale of {0}: it must be from 0.001 to 1,000,000")]
    TimeScale(f64),
    /// No share at all.
    #[error("cannot break off a share of {0}: it must be from 0 to 1")]
    AbortShare(f64),
}

/// Sends `workload` to the end and waits for every answer. Tells the progress whenever requests
/// have been sent or have ended. Dropping the future drops every request that is in flight.
///
/// Must be called within a Tokio runtime that has I/O and time enabled.
///
/// # Errors
/// When the configuration makes no sense. A request that fails is counted, by kind.
pub async fn run(
    config: &LoadConfig,
    workload: &Workload,
    progress: impl Fn(Progress),
) -> Result<LiveOutcome, LoadError> {
    let mut load = Load::new(config, workload)?;
    // What is due first may be all there is: its bodies are made before the clock starts, so
    // that a burst is one.
    let begin = load.arrivals.next_due().unwrap_or_default();
    let mut first = Vec::new();
    while let Some(index) = load.arrivals.take_due(begin) {
        first.push((index, load.body(index)));
    }
    let clock = Clock::start(begin, config.time_scale);
    for (index, body) in first {
        load.send(index, begin, body, clock);
    }
    loop {
        progress(load.progress(clock));
        let due = load.arrivals.next_due();
        tokio::select! {
            Some(ended) = load.flights.join_next() => {
                load.ended(ended);
                while let Some(ended) = load.flights.try_join_next() {
                    load.ended(ended);
                }
            }
            () = clock.sleep_until(due.unwrap_or_default()), if due.is_some() => {}
            else => break,
        }
        while let Some(due) = load.arrivals.next_due()
            && let Some(index) = load.arrivals.take_due(clock.now())
        {
            let body = load.body(index);
            load.send(index, due, body, clock);
        }
    }
    Ok(load.tally.outcome(begin, config.workers))
}

struct Load<'a> {
    config: &'a LoadConfig,
    workload: &'a Workload,
    target: Arc<Target>,
    hang_ups: Vec<Option<HangUp>>,
    arrivals: Arrivals,
    flights: JoinSet<Record>,
    sent: usize,
    tally: Tally,
}

impl<'a> Load<'a> {
    fn new(config: &'a LoadConfig, workload: &'a Workload) -> Result<Self, LoadError> {
        // Written so that NaN is refused too.
        if !(0.001..=1e6).contains(&config.time_scale) {
            return Err(LoadError::TimeScale(config.time_scale));
        }
        if !(0.0..=1.0).contains(&config.abort_share) {
            return Err(LoadError::AbortShare(config.abort_share));
        }
        let mut rng = SmallRng::seed_from_u64(config.seed);
        let requests = workload.requests.iter();
        let hang_ups =
            requests.map(|it| HangUp::draw(config.abort_share, it.output_tokens, &mut rng));
        Ok(Self {
            config,
            workload,
            target: Arc::new(Target::new(uri(config)?, config.timeout)),
            hang_ups: hang_ups.collect(),
            arrivals: Arrivals::new(workload),
            flights: JoinSet::new(),
            sent: 0,
            tally: Tally::default(),
        })
    }

    fn body(&self, index: usize) -> Bytes {
        let request = &self.workload.requests[index];
        body::body(request, &self.config.model, self.config.chat)
    }

    fn send(&mut self, index: usize, due: Duration, body: Bytes, clock: Clock) {
        let request = &self.workload.requests[index];
        let flight = Flight {
            index,
            due,
            prompt_tokens: request.prompt.len(),
            output_tokens: request.output_tokens,
            hang_up: self.hang_ups[index],
        };
        let target = self.target.clone();
        self.flights
            .spawn(async move { flight.fly(&target, body, clock).await });
        self.sent += 1;
    }

    fn ended(&mut self, flight: Result<Record, JoinError>) {
        match flight {
            Ok(record) => {
                self.arrivals.ended(record.flight.index, record.ended);
                self.tally.take(record);
            }
            // None is ever cancelled while this lives, so it panicked.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn progress(&self, clock: Clock) -> Progress {
        Progress {
            sent: self.sent,
            ended: self.sent - self.flights.len(),
            failed: self.tally.failed(),
            total: self.workload.requests.len(),
            now: clock.now().saturating_sub(clock.begin()),
        }
    }
}

fn uri(config: &LoadConfig) -> Result<Uri, LoadError> {
    let address = config.address.trim_end_matches('/');
    let (scheme, rest) = address.split_once("://").unwrap_or(("http", address));
    if !scheme.eq_ignore_ascii_case("http") {
        return Err(LoadError::NotHttp {
            address: config.address.clone(),
        });
    }
    let path = if config.chat {
        "chat/completions"
    } else {
        "completions"
    };
    let uri = format!("http://{rest}/v1/{path}");
    uri.parse().map_err(|reason| LoadError::InvalidAddress {
        address: config.address.clone(),
        reason,
    })
}
