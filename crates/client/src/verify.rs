//! Compares a router's predictions with running engines: sends requests through the router, and
//! compares each prediction with the engine's report afterwards.
//!
//! The router makes two predictions. The overlap of a prompt with the cache of the chosen worker,
//! `x-foresee-overlap-tokens`, is compared with `cached_tokens` in the response's usage. The blocks
//! that running requests pin on a worker, `active_blocks` in the router's admin API, are compared
//! with the KV cache usage in the engine's metrics.
//!
//! Goals for proportions are judged with 95 % confidence intervals. A verdict is therefore one of
//! "holds", "fails", and "not shown": too few responses to decide.

mod check;
mod engine_observer;
mod exchange;
mod goals;
mod interval;
mod page;
mod prompt_mix;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::http::{ApiKey, client};
use engine_observer::{Poller, Reader, may_serve, serves};
use exchange::{Ending, exchange};
use prompt_mix::PromptMix;

pub use check::{Check, Evidence};
pub use interval::{Proportion, Verdict};
pub use prompt_mix::{Kind, Lengths};
pub use report::{ActiveBlocks, Difference, Hits, Parity, Phase, Verification, WorkerResult};

/// Limit for the time in which the router's workers become healthy.
const HEALTHY_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause of a client after a failure, so that a restart of the router does not fail all remaining
/// requests.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(500);

/// Limit for the time from the last response until the router and the engines are idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// The router to verify, and the requests to send.
#[derive(Clone, Debug)]
pub struct VerifyConfig {
    /// The router's public API, without `/v1`: `http://127.0.0.1:8080`.
    pub api: String,
    /// The router's admin API.
    pub admin: String,
    /// Key of the admin API, if it needs one.
    pub admin_key: Option<ApiKey>,
    /// The model to ask for. `None` means the first that the workers serve.
    pub model: Option<String>,
    /// The router's tokens per block.
    pub block_size: u32,
    /// Whether the router has the engines' tokenizer, so that text is predicted exactly too.
    pub has_tokenizer: bool,
    /// Requests of each phase.
    pub requests: usize,
    /// Requests in flight at a time, a number for each phase.
    pub concurrency: Vec<usize>,
    /// Limits for prompts and outputs.
    pub lengths: Lengths,
    /// Fraction of responses, 0 to 1, that are streamed. The progress of others is invisible to the
    /// router.
    pub stream_fraction: f64,
    /// Fraction of streams, 0 to 1, that the client closes early in phases of several at a time.
    pub abort_fraction: f64,
    /// Interval between readings of the engines' metrics.
    pub sample_interval: Duration,
    /// The seed of all prompts. A repeated seed repeats prompts that the engines may still have
    /// cached without the router's knowledge.
    pub seed: u64,
    /// Limit for the time of one request.
    pub timeout: Duration,
}

/// State of a running verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests in flight at a time in this phase.
    pub concurrency: usize,
    /// Requests of this phase that have ended.
    pub ended: usize,
    /// Requests of this phase.
    pub total: usize,
}

/// The reason why a verification cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The router's admin API cannot be read.
    #[error("cannot read the router's admin API: {0}")]
    Router(String),
    /// The router has no workers, or not all of them are healthy.
    #[error("{0}")]
    Workers(String),
}

/// Runs all phases, and reports the progress after each request. Failed requests are counted.
///
/// Waits for the workers to become healthy before the first phase, and for router and engines to
/// become idle after the last. Engines that stay busy are no error: the report shows their blocks.
///
/// Must be called within a Tokio runtime that has I/O and time enabled.
///
/// # Errors
/// If the router's admin API cannot be read, or if not all of its workers become healthy.
pub async fn run(
    config: &VerifyConfig,
    progress: impl Fn(Progress),
) -> Result<Verification, VerifyError> {
    let reader = Arc::new(Reader::new(config));
    let model = find_model(&reader, config.model.as_deref()).await?;
    let poller = Poller::start(Arc::clone(&reader), config.sample_interval);
    let mut phases = Vec::new();
    for (number, &concurrency) in config.concurrency.iter().enumerate() {
        let began = reader.seconds();
        let mut phase =
            run_phase(config, &model, number as u64, concurrency.max(1), &progress).await;
        phase.seconds = (began, reader.seconds());
        phases.push(phase);
    }
    drop(poller);
    wait_until_idle(&reader)
        .await
        .map_err(VerifyError::Router)?;
    let parity = Parity::read(&reader).await.map_err(VerifyError::Router)?;
    let mut verification = Verification::new(config, phases, parity, &reader.readings());
    verification.checks = goals::check(&verification);
    Ok(verification)
}

/// Waits until all workers that may serve the model are healthy. Returns the model, or the first
/// model of the workers if none is asked for. Draining workers are ignored.
///
/// # Errors
/// If the router's admin API cannot be read, if no worker may serve the model, or if a worker is
/// not healthy after [`HEALTHY_TIMEOUT`].
async fn find_model(reader: &Reader, asked: Option<&str>) -> Result<String, VerifyError> {
    let began = Instant::now();
    loop {
        let mut workers = reader.workers().await.map_err(VerifyError::Router)?;
        workers.retain(|worker| may_serve(worker, asked));
        if workers.is_empty() {
            let none = "the router has no worker for this model".to_owned();
            return Err(VerifyError::Workers(none));
        }
        let missing = workers.iter().filter(|worker| !serves(worker));
        let missing: Vec<&str> = missing.map(|worker| worker.name.as_str()).collect();
        let first = workers.iter().find_map(|worker| worker.models.first());
        if let (Some(first), true) = (first, missing.is_empty()) {
            return Ok(asked.unwrap_or(first).to_owned());
        }
        if began.elapsed() > HEALTHY_TIMEOUT {
            let missing = missing.join(", ");
            return Err(VerifyError::Workers(format!(
                "workers are not healthy: {missing}"
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends the requests of one phase, `concurrency` at a time, and returns the results. `number` is
/// the position of the phase; each phase has prompts of its own. A client pauses after a failure.
/// The caller sets [`Phase::seconds`].
async fn run_phase(
    config: &VerifyConfig,
    model: &str,
    number: u64,
    concurrency: usize,
    progress: &impl Fn(Progress),
) -> Phase {
    // With one request at a time, an aborted stream would leave the cache's contents uncertain.
    let abort_fraction = if concurrency > 1 {
        config.abort_fraction
    } else {
        0.0
    };
    let mix = Mutex::new(PromptMix::new(
        config.seed.wrapping_add(number),
        model.to_owned(),
        config.block_size,
        config.lengths,
        config.stream_fraction,
        abort_fraction,
    ));
    let phase = Mutex::new(Phase::new(concurrency));
    let (started, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let client = client();
    let user = async || {
        while started.fetch_add(1, Ordering::Relaxed) < config.requests {
            let ask = mix.lock().next();
            let done = exchange(&client, &config.api, &ask, config.timeout).await;
            if matches!(done.ending, Ending::Failed(_)) {
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
            let is_complete = done.ending == Ending::Completed;
            let prompt_tokens = done.usage.prompt_tokens.unwrap_or(0);
            let output = is_complete.then(|| (done.text.clone(), prompt_tokens));
            mix.lock().record_output(&ask, output);
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

/// Waits until router and engines report no active blocks, and records a last reading. Succeeds
/// also if some still do after [`IDLE_TIMEOUT`], or if an engine's metrics cannot be read.
///
/// # Errors
/// If the router's admin API cannot be read.
async fn wait_until_idle(reader: &Reader) -> Result<(), String> {
    let waiting = async {
        loop {
            reader.read().await?;
            let workers = reader.readings();
            let last = workers.iter().filter_map(|worker| worker.readings.last());
            let is_free = workers
                .iter()
                .all(|readings| readings.worker.active_blocks == 0);
            if is_free && last.clone().all(|reading| reading.active_blocks == 0.0) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    // After the time limit, the last reading shows the remaining blocks.
    tokio::time::timeout(IDLE_TIMEOUT, waiting)
        .await
        .unwrap_or(Ok(()))
}
