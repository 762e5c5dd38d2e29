//! Holds a router's predictions against engines that run: sends requests through the router, and
//! compares what it said before with what the engines say after.
//!
//! Two things are predicted. How much of a prompt is cached on the worker that was chosen:
//! `x-foresee-overlap-tokens`, against `cached_tokens` in the answer's usage. And how many blocks
//! running requests pin there: `active_blocks` in the router's admin API, against the KV cache
//! usage in the engine's metrics.

mod exchange;
mod judge;
mod page;
mod report;
mod script;
mod truth;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::http::client;
use exchange::{Ending, exchange};
use script::Script;
use truth::{Reader, Watch};

pub use judge::Check;
pub use report::{ActiveBlocks, Difference, Hits, Parity, Phase, Verification, WorkerResult};
pub use script::{Kind, Lengths};

/// Time for the router's workers to be found.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a client lets pass after a failure: a router that restarts must not be met by all that
/// is left.
const AFTER_FAILURE: Duration = Duration::from_millis(500);

/// How long the router and its engines may take to be at rest after the last request.
const REST: Duration = Duration::from_secs(10);

/// What to verify, and with how much.
#[derive(Clone, Debug)]
pub struct VerifyConfig {
    /// The router's public API, without `/v1`: `http://127.0.0.1:8080`.
    pub api: String,
    /// The router's admin API.
    pub admin: String,
    /// The model to ask for; by default the first that the workers serve.
    pub model: Option<String>,
    /// The router's tokens per block.
    pub block_size: u32,
    /// Whether the router knows the engines' tokenizer, so that text is predicted in full too.
    pub has_tokenizer: bool,
    /// Requests of each phase.
    pub requests: usize,
    /// How many requests are in flight at a time: a phase for each number.
    pub concurrency: Vec<usize>,
    /// How long prompts and answers may be.
    pub lengths: Lengths,
    /// Share of answers, 0 to 1, that are streamed. Of the others nobody can see how far they are.
    pub stream_share: f64,
    /// Share of streams, 0 to 1, that the client leaves before their end, where several run.
    pub abort_share: f64,
    /// Time between two looks at the engines' metrics.
    pub sample_interval: Duration,
    /// Decides every prompt. Engines that have cached the prompts of an earlier run with the same
    /// seed would know more than the router can.
    pub seed: u64,
    /// The longest a request may take.
    pub timeout: Duration,
}

/// How far a verification has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests in flight at a time in this phase.
    pub concurrency: usize,
    /// Requests of this phase that have ended.
    pub ended: usize,
    /// Requests of this phase.
    pub total: usize,
}

/// Why nothing can be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The router does not answer as one.
    #[error("the router's admin API cannot be read: {0}")]
    Router(String),
    /// It has no workers, or not all of them answer.
    #[error("{0}")]
    Workers(String),
}

/// Runs all phases, and tells the progress after each request. Requests that fail are counted.
///
/// Must be called within a Tokio runtime that has I/O and time enabled.
///
/// # Errors
/// When the router cannot be asked, or its workers do not all come to serve.
pub async fn run(
    config: &VerifyConfig,
    progress: impl Fn(Progress),
) -> Result<Verification, VerifyError> {
    let reader = Arc::new(Reader::new(config.admin.clone(), config.block_size));
    let model = find_model(&reader, config.model.as_deref()).await?;
    let watch = Watch::start(Arc::clone(&reader), config.sample_interval);
    let mut phases = Vec::new();
    for (number, &concurrency) in config.concurrency.iter().enumerate() {
        let began = reader.seconds();
        let mut phase =
            run_phase(config, &model, number as u64, concurrency.max(1), &progress).await;
        phase.seconds = (began, reader.seconds());
        phases.push(phase);
    }
    drop(watch);
    rest(&reader).await.map_err(VerifyError::Router)?;
    let parity = Parity::read(&reader).await.map_err(VerifyError::Router)?;
    Ok(Verification::of(config, phases, parity, &reader.watched()))
}

/// Waits until all workers that are to serve the model do, or, without one, all that are to serve.
/// Returns the model, or the first that they serve.
async fn find_model(reader: &Reader, asked: Option<&str>) -> Result<String, VerifyError> {
    let began = Instant::now();
    loop {
        let mut workers = reader.workers().await.map_err(VerifyError::Router)?;
        workers.retain(|it| it.may_serve(asked));
        if workers.is_empty() {
            let none = "the router has no worker that could serve".to_owned();
            return Err(VerifyError::Workers(none));
        }
        let missing = workers.iter().filter(|it| !it.serves());
        let missing: Vec<&str> = missing.map(|it| it.name.as_str()).collect();
        let first = workers.iter().find_map(|it| it.models.first());
        if let (Some(first), true) = (first, missing.is_empty()) {
            return Ok(asked.unwrap_or(first).to_owned());
        }
        if began.elapsed() > PATIENCE {
            let missing = missing.join(", ");
            return Err(VerifyError::Workers(format!("no answer from {missing}")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn run_phase(
    config: &VerifyConfig,
    model: &str,
    number: u64,
    concurrency: usize,
    progress: &impl Fn(Progress),
) -> Phase {
    // One at a time, what a stream that was left has still made cached is not known exactly.
    let abort_share = if concurrency > 1 {
        config.abort_share
    } else {
        0.0
    };
    let script = Mutex::new(Script::new(
        config.seed.wrapping_add(number),
        model.to_owned(),
        config.block_size,
        config.lengths,
        config.stream_share,
        abort_share,
    ));
    let phase = Mutex::new(Phase::new(concurrency));
    let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let client = client();
    let user = async || {
        while begun.fetch_add(1, Ordering::Relaxed) < config.requests {
            let ask = script.lock().next();
            let done = exchange(&client, &config.api, &ask, config.timeout).await;
            if matches!(done.ending, Ending::Failed(_)) {
                tokio::time::sleep(AFTER_FAILURE).await;
            }
            let is_whole = done.ending == Ending::Answered;
            let prompt_tokens = done.usage.prompt_tokens.unwrap_or(0);
            let answer = is_whole.then(|| (done.text.clone(), prompt_tokens));
            script.lock().answered(&ask, answer);
            phase.lock().take(ask.kind, config.block_size, done);
            progress(Progress {
                concurrency,
                ended: ended.fetch_add(1, Ordering::Relaxed) + 1,
                total: config.requests,
            });
        }
    };
    futures_util::future::join_all((0..concurrency).map(|_| user())).await;
    phase.into_inner()
}

/// Waits until nothing runs any more, by both accounts, and leaves a last reading of that.
async fn rest(reader: &Reader) -> Result<(), String> {
    let waiting = async {
        loop {
            reader.read().await?;
            let watched = reader.watched();
            let last = watched.iter().filter_map(|it| it.readings.last());
            let frees = watched.iter().all(|it| it.worker.active_blocks == 0);
            if frees && last.clone().all(|it| it.held == 0.0) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    // If it is never so, the last reading tells.
    tokio::time::timeout(REST, waiting).await.unwrap_or(Ok(()))
}
