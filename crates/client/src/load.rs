//! Sends a workload to an OpenAI-compatible address, with the arrival rules of replay, and
//! measures latencies and throughput as clients see them.
//!
//! All times are in the engine's time. To a mock engine at ten times real speed, requests are sent
//! ten times as often, and a second of real time counts as ten. Results are therefore comparable
//! with those of replay.
//!
//! One task drives the arrivals, and each request is a task of its own. Only the workload limits
//! the number of requests in flight.

mod body;
mod cancellation;
mod client_request;
mod clock;
mod model;
mod outcome;
mod report;
mod summary;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_sim::arrivals::Arrivals;
use foresee_sim::workload::Workload;
use hyper::Uri;
use hyper::header::HeaderMap;
use hyper::http::uri::InvalidUri;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::task::{JoinError, JoinSet};

use cancellation::Cancellation;
use client_request::{ClientRequest, Record, Target};
use clock::Clock;
use outcome::Tally;

pub use crate::http::{ApiKey, FailureKind, InvalidApiKey};
pub use hyper::header::{HeaderName, HeaderValue};
pub use model::find_model;
pub use outcome::{Failures, LiveOutcome, WorkerTotals};
pub use report::{LiveReport, NamedOutcome};
pub use summary::LoadSummary;

/// The address to which a workload is sent, and how.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Base URL, with or without `/v1`: `http://127.0.0.1:8080`. A missing scheme means `http`,
    /// the only scheme that is supported.
    pub address: String,
    /// The model named in each request.
    pub model: String,
    /// Whether requests go to `/v1/chat/completions`, with the prompt as one message, instead of
    /// `/v1/completions`.
    pub chat: bool,
    /// How requests ask for the workload's number of output tokens.
    pub output_request: OutputRequest,
    /// The key sent with each request.
    pub api_key: Option<ApiKey>,
    /// Headers of each request besides the key.
    pub headers: HeaderMap,
    /// Workers behind the address, so that a worker without requests counts as idle.
    pub workers: usize,
    /// Seconds of the engine's time in one second of real time.
    pub speedup: f64,
    /// Fraction of streams, 0 to 1, that the client closes early: a quarter of them before the
    /// first byte, the others after some of their tokens.
    pub abort_fraction: f64,
    /// No request is sent later than this after the first, in the engine's time.
    pub duration: Option<Duration>,
    /// Decides which streams the client closes early, and when.
    pub seed: u64,
    /// Limit for the time of one request, in real time.
    pub timeout: Duration,
}

/// How a request asks for a number of output tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputRequest {
    /// Exactly this number: as `max_tokens`, with `ignore_eos`. vLLM and SGLang know the second
    /// field; other servers may refuse it. A router can read the length of the output.
    Exact,
    /// At most this number: as `max_tokens`.
    AtMost,
    /// At least this number: as `min_tokens`, with this `max_tokens`, or the number itself if it is
    /// larger. A mock engine ends the output after `min_tokens`, so a router knows its length as
    /// little as it knows that of an output which ends by itself.
    AtLeast {
        /// `max_tokens` of each request.
        max_tokens: u32,
    },
}

impl LoadConfig {
    /// Returns a configuration for one worker in real time, without a key or a limit of duration,
    /// with no stream closed early and ten minutes for each request.
    #[must_use]
    pub fn new(address: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            model: model.into(),
            chat: false,
            output_request: OutputRequest::Exact,
            api_key: None,
            headers: HeaderMap::new(),
            workers: 1,
            speedup: 1.0,
            abort_fraction: 0.0,
            duration: None,
            seed: 0,
            timeout: Duration::from_secs(600),
        }
    }
}

/// State of a running load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests sent.
    pub sent: usize,
    /// Sent requests that have ended: finished, failed or closed early.
    pub ended: usize,
    /// Sent requests that have failed.
    pub failed: usize,
    /// Requests of the workload.
    pub total: usize,
    /// Time since the beginning, in the engine's time.
    pub now: Duration,
}

/// The reason why a load cannot be sent. Failed requests are counted and are no such error.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The address is not a URL.
    #[error("cannot send requests to {address:?}: {reason}")]
    InvalidAddress {
        /// The given address.
        address: String,
        /// The parser's error.
        reason: InvalidUri,
    },
    /// The address has a scheme other than `http`.
    #[error("cannot send requests to {address:?}: only http:// addresses are supported")]
    NotHttp {
        /// The given address.
        address: String,
    },
    /// The factor does not allow times to be converted.
    #[error("the speedup is {0}: it must be from 0.001 to 1,000,000")]
    Speedup(f64),
    /// The fraction of streams to close early is out of range.
    #[error("the abort fraction is {0}: it must be from 0 to 1")]
    AbortFraction(f64),
    /// The server did not accept a connection, or closed it.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// The given address.
        address: String,
        /// The connection's error.
        reason: String,
    },
    /// The list of models does not determine the model.
    #[error("cannot choose a model from {address}/v1/models: {reason}; name one with --model")]
    UnknownModel {
        /// The given address.
        address: String,
        /// The problem with the list.
        reason: String,
    },
}

/// Sends `workload` and waits for the end of every response. Reports the progress at the beginning
/// and whenever requests have been sent or have ended. Dropping the future cancels all requests in
/// flight.
///
/// The first request is sent at once, at the time on the engine's clock at which the workload has
/// it due. Requests due after `config.duration` are not sent; the outcome does not count them.
///
/// Must be called within a Tokio runtime with I/O and time enabled.
///
/// # Errors
/// If the configuration is invalid. Failed requests are counted by kind.
pub async fn run(
    config: &LoadConfig,
    workload: &Workload,
    progress: impl Fn(Progress),
) -> Result<LiveOutcome, LoadError> {
    let mut load = Load::new(config, workload)?;
    // The first instant may have all of the requests. Their bodies are made before the clock
    // starts, so that a burst is sent as one.
    let begin = load.arrivals.next_due().unwrap_or_default();
    let mut first = Vec::new();
    while let Some(index) = load.arrivals.take_due(begin) {
        first.push((index, load.body(index)));
    }
    let clock = Clock::start(begin, config.speedup);
    for (index, body) in first {
        load.send(index, begin, body, clock);
    }
    loop {
        progress(load.progress(clock));
        let due = load.arrivals.next_due();
        tokio::select! {
            Some(ended) = load.requests.join_next() => {
                load.ended(ended);
                while let Some(ended) = load.requests.try_join_next() {
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

/// A load while it is sent.
struct Load<'a> {
    config: &'a LoadConfig,
    workload: &'a Workload,
    target: Arc<Target>,
    /// One for each request of the workload.
    cancellations: Vec<Option<Cancellation>>,
    arrivals: Arrivals,
    /// The requests in flight.
    requests: JoinSet<Record>,
    sent: usize,
    tally: Tally,
}

impl<'a> Load<'a> {
    /// Checks the configuration, and draws which streams are closed early. Nothing is sent yet.
    ///
    /// # Errors
    /// If the speedup, the abort fraction or the address is invalid.
    fn new(config: &'a LoadConfig, workload: &'a Workload) -> Result<Self, LoadError> {
        // Ranges are tested for what they contain, so that NaN is refused too.
        if !(0.001..=1e6).contains(&config.speedup) {
            return Err(LoadError::Speedup(config.speedup));
        }
        if !(0.0..=1.0).contains(&config.abort_fraction) {
            return Err(LoadError::AbortFraction(config.abort_fraction));
        }
        let mut rng = SmallRng::seed_from_u64(config.seed);
        let requests = workload.requests.iter();
        let cancellations = requests.map(|request| {
            Cancellation::draw(config.abort_fraction, request.output_tokens, &mut rng)
        });
        let path = if config.chat {
            "/v1/chat/completions"
        } else {
            "/v1/completions"
        };
        let uri = uri(&config.address, path)?;
        let target = Target::new(uri, config);
        Ok(Self {
            config,
            workload,
            target: Arc::new(target),
            cancellations: cancellations.collect(),
            arrivals: Arrivals::new(workload).within(config.duration),
            requests: JoinSet::new(),
            sent: 0,
            tally: Tally::default(),
        })
    }

    fn body(&self, index: usize) -> Bytes {
        body::body(&self.workload.requests[index], self.config)
    }

    /// Starts a task that sends a request of the workload at once. Latencies count from `due`.
    fn send(&mut self, index: usize, due: Duration, body: Bytes, clock: Clock) {
        let request = &self.workload.requests[index];
        let request = ClientRequest {
            index,
            due,
            prompt_tokens: request.prompt.len(),
            output_tokens: request.output_tokens,
            cancellation: self.cancellations[index],
        };
        let target = self.target.clone();
        self.requests
            .spawn(async move { request.run(&target, body, clock).await });
        self.sent += 1;
    }

    /// Records the result of a request, and makes the requests due that waited for its end.
    ///
    /// # Panics
    /// If the request's task panicked.
    fn ended(&mut self, request: Result<Record, JoinError>) {
        match request {
            Ok(record) => {
                self.arrivals
                    .on_request_end(record.request.index, record.ended);
                self.tally.add(record);
            }
            // No task is cancelled while `self` exists, so this one panicked.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    /// Returns the counts of requests so far, and the time since the clock was started.
    fn progress(&self, clock: Clock) -> Progress {
        Progress {
            sent: self.sent,
            ended: self.sent - self.requests.len(),
            failed: self.tally.failed(),
            total: self.workload.requests.len(),
            now: clock.now().saturating_sub(clock.begin()),
        }
    }
}

/// Returns the URL of a path below a base URL, which may end with `/v1` or a slash. `path` contains
/// the `/v1`. A base URL without a scheme means `http`.
///
/// # Errors
/// If the scheme is not `http`, or if the result is not a URL.
fn uri(base: &str, path: &str) -> Result<Uri, LoadError> {
    let address = base.trim_end_matches('/');
    let (scheme, rest) = address.split_once("://").unwrap_or(("http", address));
    if !scheme.eq_ignore_ascii_case("http") {
        return Err(LoadError::NotHttp {
            address: base.to_owned(),
        });
    }
    let rest = rest.strip_suffix("/v1").unwrap_or(rest);
    let uri = format!("http://{rest}{path}");
    uri.parse().map_err(|reason| LoadError::InvalidAddress {
        address: base.to_owned(),
        reason,
    })
}
