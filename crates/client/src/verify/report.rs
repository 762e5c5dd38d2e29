//! The findings of a verification: as JSON (serde) and as text.

use std::collections::BTreeMap;
use std::fmt;

use foresee_api::metrics::TOKEN_PARITY;
use foresee_sim::outcome::Latency;
use serde::Serialize;

use crate::verify::VerifyConfig;
use crate::verify::check::{Check, grouped};
use crate::verify::engine_observer::{Reader, WorkerReadings};
use crate::verify::exchange::{Ending, Exchange};
use crate::verify::interval::Verdict;
use crate::verify::prompt_mix::Kind;

/// Limit for the wrong predictions that are kept of each phase, and for the reasons of failures.
const MAX_KEPT: usize = 20;

/// The findings of a verification.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verification {
    /// The router's tokens per block.
    pub block_size: u32,
    /// The seed of all prompts.
    pub seed: u64,
    /// Whether the router matched text by the engines' tokens.
    pub has_tokenizer: bool,
    /// One for each concurrency that was asked for.
    pub phases: Vec<Phase>,
    /// One for each worker.
    pub workers: Vec<WorkerResult>,
    /// Comparison of the router's token counts with the engines'.
    pub parity: Parity,
    /// The verdict on each goal.
    pub checks: Vec<Check>,
}

/// Requests of one concurrency.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// Requests in flight at a time.
    pub concurrency: usize,
    /// Beginning and end, in seconds since the verification started.
    pub seconds: (f64, f64),
    /// Requests whose response arrived complete.
    pub completed: usize,
    /// Streams that the client closed early, as planned.
    pub aborted: usize,
    /// Requests that failed.
    pub failed: usize,
    /// The first different reasons of failures.
    pub failures: Vec<String>,
    /// Responses without `cached_tokens`.
    pub unreported: usize,
    /// Predicted and reported hits by the kind of the prompt.
    pub hits: BTreeMap<Kind, Hits>,
    /// The first wrong predictions.
    pub differences: Vec<Difference>,
}

/// Predicted and reported cache hits, added up. In blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hits {
    /// Requests compared.
    pub requests: usize,
    /// Requests for which the prediction was exact.
    pub equal: usize,
    /// Requests with more blocks predicted than cached.
    pub over: usize,
    /// Requests with fewer blocks predicted than cached.
    pub under: usize,
    /// Blocks predicted to be cached.
    pub predicted: u64,
    /// Blocks reported as cached.
    pub actual: u64,
    /// Blocks both predicted and cached.
    pub common: u64,
}

/// One wrong prediction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The kind of the prompt.
    pub kind: Kind,
    /// The worker that responded.
    pub worker: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Blocks predicted to be cached.
    pub predicted: u32,
    /// Blocks reported as cached.
    pub actual: u32,
}

/// Comparison of the router's counts of prompt tokens with the engines'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parity {
    /// Prompts with the same count.
    pub equal: u64,
    /// Prompts with different counts.
    pub different: u64,
}

/// The findings about one worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkerResult {
    /// Name in the router's configuration.
    pub name: String,
    /// Base URL.
    pub url: String,
    /// The router's source of knowledge about the worker's cache: `events` or `estimated`.
    pub cache_source: String,
    /// Whether the router received all KV events; `None` without events.
    pub events_exact: Option<bool>,
    /// Size of the KV cache in blocks, as the router assumes it.
    pub capacity_blocks: u32,
    /// Predicted active blocks compared with the engine's count.
    pub active: ActiveBlocks,
    /// Time from an event's creation to its application; `None` without live events.
    pub event_lag: Option<Latency>,
    /// The reason if its metrics could not be read.
    pub metrics_error: Option<String>,
}

/// Predicted active blocks compared with an engine's own count.
///
/// The router counts a request from the instant of its decision until the end of the response has
/// arrived. The engine reports the request after its first step, and no longer after its last.
/// Readings with different numbers of requests measure this delay. Readings with equal numbers
/// measure whether the predicted blocks are right.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ActiveBlocks {
    /// Readings compared.
    pub samples: usize,
    /// Mean absolute difference to the prediction at the time of the reading, in blocks.
    pub mean_error: f64,
    /// Maximum absolute difference, in blocks.
    pub worst_error: f64,
    /// Readings for which router and engine had the same number of requests, from the time the
    /// engine was asked until its response.
    pub agreed: usize,
    /// Mean absolute difference in these, in blocks.
    pub agreed_error: f64,
    /// Maximum of the engine's count.
    pub peak: f64,
    /// Prediction after the last response.
    pub predicted_at_rest: u64,
    /// The engine's count after the last response.
    pub reported_at_rest: f64,
    /// Times of changed predictions, in seconds since the verification started, with the new value.
    pub predicted: Vec<(f64, u64)>,
    /// Times of readings, in seconds since the verification started, with the engine's count.
    pub reported: Vec<(f64, f64)>,
}

impl ActiveBlocks {
    /// Returns the mean absolute error as a fraction of the peak.
    #[must_use]
    pub fn error_fraction(&self) -> f64 {
        self.mean_error / self.peak.max(1.0)
    }

    /// Returns the mean absolute error as a fraction of the peak, over readings for which engine
    /// and router had the same number of requests; `None` without any.
    #[must_use]
    pub fn agreed_error_fraction(&self) -> Option<f64> {
        (self.agreed > 0).then(|| self.agreed_error / self.peak.max(1.0))
    }

    /// Compares each reading with the prediction at the time of its request. Without readings, all
    /// errors are 0. The last reading must have been taken at rest.
    fn from_readings(worker: &WorkerReadings) -> Self {
        let readings = &worker.readings;
        let compared = readings.iter().map(|reading| {
            let predicted = worker.predicted_at(reading.at).blocks;
            let error = (predicted as f64 - reading.active_blocks).abs();
            (error, worker.agrees(reading))
        });
        let errors = compared.clone().map(|(error, _)| error);
        let agreed: Vec<f64> = compared
            .filter_map(|(error, has_same_requests)| has_same_requests.then_some(error))
            .collect();
        let reported = readings
            .iter()
            .map(|reading| (reading.at, reading.active_blocks));
        let predicted = worker
            .predicted
            .iter()
            .map(|prediction| (prediction.at, prediction.blocks));
        Self {
            samples: readings.len(),
            mean_error: errors.clone().sum::<f64>() / readings.len().max(1) as f64,
            worst_error: errors.fold(0.0, f64::max),
            agreed: agreed.len(),
            agreed_error: agreed.iter().sum::<f64>() / agreed.len().max(1) as f64,
            peak: readings
                .iter()
                .map(|reading| reading.active_blocks)
                .fold(0.0, f64::max),
            predicted_at_rest: worker.worker.active_blocks,
            reported_at_rest: readings.last().map_or(0.0, |reading| reading.active_blocks),
            predicted: predicted.collect(),
            reported: reported.collect(),
        }
    }
}

impl Hits {
    /// Returns the fraction of predicted blocks that was cached.
    #[must_use]
    pub fn precision(&self) -> f64 {
        fraction(self.common, self.predicted)
    }

    /// Returns the fraction of cached blocks that was predicted.
    #[must_use]
    pub fn recall(&self) -> f64 {
        fraction(self.common, self.actual)
    }

    /// Returns the fraction of requests that was predicted exactly.
    #[must_use]
    pub fn equal_fraction(&self) -> f64 {
        fraction(self.equal as u64, self.requests as u64)
    }

    /// Adds one response with its predicted and reported hits, in blocks.
    fn take(&mut self, predicted: u32, actual: u32) {
        self.requests += 1;
        self.equal += usize::from(predicted == actual);
        self.over += usize::from(predicted > actual);
        self.under += usize::from(predicted < actual);
        self.predicted += u64::from(predicted);
        self.actual += u64::from(actual);
        self.common += u64::from(predicted.min(actual));
    }

    /// Adds all counts of `other`.
    pub(super) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.equal += other.equal;
        self.over += other.over;
        self.under += other.under;
        self.predicted += other.predicted;
        self.actual += other.actual;
        self.common += other.common;
    }
}

/// Returns `part / whole`; 1 if `whole` is 0, because nothing was wrong.
fn fraction(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        1.0
    } else {
        part as f64 / whole as f64
    }
}

impl Phase {
    /// Returns a phase without requests. The caller sets `seconds` at its end.
    pub(super) fn new(concurrency: usize) -> Self {
        Self {
            concurrency,
            seconds: (0.0, 0.0),
            completed: 0,
            aborted: 0,
            failed: 0,
            failures: Vec::new(),
            unreported: 0,
            hits: BTreeMap::new(),
            differences: Vec::new(),
        }
    }

    /// Adds an exchange. Only a completed one is compared: tokens are divided by `block_size`,
    /// rounded down. One without a prediction or without `cached_tokens` counts as unreported.
    pub(super) fn take(&mut self, kind: Kind, block_size: u32, done: Exchange) {
        match done.ending {
            Ending::Completed => self.completed += 1,
            Ending::Aborted => {
                self.aborted += 1;
                return;
            }
            Ending::Failed(reason) => {
                self.failed += 1;
                if self.failures.len() < MAX_KEPT && !self.failures.contains(&reason) {
                    self.failures.push(reason);
                }
                return;
            }
        }
        let (Some(predicted), Some(actual)) = (done.predicted_tokens, done.usage.cached_tokens)
        else {
            self.unreported += 1;
            return;
        };
        let (predicted, actual) = (predicted / block_size, actual / block_size);
        self.hits.entry(kind).or_default().take(predicted, actual);
        if predicted != actual && self.differences.len() < MAX_KEPT {
            self.differences.push(Difference {
                kind,
                worker: done.worker.unwrap_or_default(),
                prompt_tokens: done.usage.prompt_tokens.unwrap_or(0),
                predicted,
                actual,
            });
        }
    }

    /// Returns the predictions for the kinds of prompts that the router can predict exactly.
    #[must_use]
    pub fn predictable(&self, has_tokenizer: bool) -> Hits {
        let mut sum = Hits::default();
        for (kind, hits) in &self.hits {
            if has_tokenizer || !kind.needs_tokenizer() {
                sum.add(hits);
            }
        }
        sum
    }
}

impl Parity {
    /// Reads the router's counters, which include all requests since its start.
    ///
    /// # Errors
    /// If the router's metrics cannot be read.
    pub(super) async fn read(reader: &Reader) -> Result<Self, String> {
        Ok(Self {
            equal: reader.counter(TOKEN_PARITY, "\"equal\"").await?,
            different: reader.counter(TOKEN_PARITY, "\"different\"").await?,
        })
    }
}

impl Verification {
    /// Builds the report without the verdicts on the goals. `readings` has one element for each worker, the last
    /// reading taken at rest. Of `config`, only values that the report repeats are used.
    pub(super) fn new(
        config: &VerifyConfig,
        phases: Vec<Phase>,
        parity: Parity,
        readings: &[WorkerReadings],
    ) -> Self {
        let workers = readings.iter().map(|readings| {
            let worker = &readings.worker;
            let mut lags: Vec<f32> = readings.lags.iter().map(|&lag| lag as f32).collect();
            WorkerResult {
                name: worker.name.clone(),
                url: worker.url.clone().unwrap_or_default(),
                cache_source: worker.cache_source.clone(),
                events_exact: worker.kv_events.as_ref().map(|events| events.exact),
                capacity_blocks: worker.capacity_blocks,
                active: ActiveBlocks::from_readings(readings),
                event_lag: (!lags.is_empty()).then(|| Latency::of(&mut lags)),
                metrics_error: readings.metrics_error.clone(),
            }
        });
        Self {
            block_size: config.block_size,
            seed: config.seed,
            has_tokenizer: config.has_tokenizer,
            phases,
            workers: workers.collect(),
            parity,
            checks: Vec::new(),
        }
    }

    /// Returns the verdict over all goals: `NotMeasured` if no response allowed a comparison of
    /// predicted and cached blocks, otherwise `Fails` if any goal fails, `Holds` if all goals hold,
    /// and `NotShown` in other cases.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let has = |verdict| self.checks.iter().any(|check| check.verdict == verdict);
        if self.compared() == 0 {
            Verdict::NotMeasured
        } else if has(Verdict::Fails) {
            Verdict::Fails
        } else if has(Verdict::NotShown) || has(Verdict::NotMeasured) {
            Verdict::NotShown
        } else {
            Verdict::Holds
        }
    }

    /// Returns the number of responses for which predicted and cached blocks were compared.
    fn compared(&self) -> usize {
        let hits = self.phases.iter().flat_map(|phase| phase.hits.values());
        hits.map(|hits| hits.requests).sum()
    }

    /// Returns the verdict as sentences, with the evidence for it.
    #[must_use]
    pub fn summary(&self) -> String {
        let of = |verdict| {
            let checks = self
                .checks
                .iter()
                .filter(move |check| check.verdict == verdict);
            checks.map(|check| check.name.as_str()).collect::<Vec<_>>()
        };
        let compared = grouped(self.compared() as u64);
        let (failed, unmeasured) = (of(Verdict::Fails), of(Verdict::NotMeasured));
        let mut sentences = vec![match self.verdict() {
            Verdict::Holds => format!(
                "The predictions hold on these engines: all goals are shown, with {compared} \
                 responses compared."
            ),
            Verdict::NotShown => format!(
                "No goal fails on these engines, with {compared} responses compared. Goals that \
                 are shown: {} of {}.",
                of(Verdict::Holds).len(),
                self.checks.len()
            ),
            Verdict::Fails => format!(
                "The predictions do not hold on these engines as they are configured now. Goals \
                 that fail: {}.",
                failed.join("; ")
            ),
            Verdict::NotMeasured => "The verification could not be carried out: no response \
                 reported both a prediction and cached_tokens."
                .to_owned(),
        }];
        let not_shown = self.checks.iter();
        let not_shown = not_shown.filter(|check| check.verdict == Verdict::NotShown);
        for check in not_shown {
            let conclusion = check.conclusion().unwrap_or_default();
            let Check { name, found, .. } = check;
            sentences.push(format!("Not shown: {name}: {found}: {conclusion}."));
        }
        if !unmeasured.is_empty() && self.compared() > 0 {
            sentences.push(format!("Not measured: {}.", unmeasured.join("; ")));
        }
        sentences.join("\n")
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for phase in &self.phases {
            let Phase { concurrency, .. } = phase;
            writeln!(
                f,
                "{concurrency} at a time: {} completed, {} aborted by the client, {} failed",
                phase.completed, phase.aborted, phase.failed
            )?;
            writeln!(
                f,
                "  {:<20}{:>9}{:>9}{:>7}{:>7}{:>11}{:>9}",
                "predicted cache hits", "requests", "equal", "over", "under", "precision", "recall"
            )?;
            for (kind, hits) in &phase.hits {
                writeln!(
                    f,
                    "  {:<20}{:>9}{:>8.1}%{:>7}{:>7}{:>10.1}%{:>8.1}%",
                    kind.name(),
                    hits.requests,
                    hits.equal_fraction() * 100.0,
                    hits.over,
                    hits.under,
                    hits.precision() * 100.0,
                    hits.recall() * 100.0,
                )?;
            }
            for failure in &phase.failures {
                writeln!(f, "  failed: {failure}")?;
            }
        }
        writeln!(
            f,
            "{:<22}{:>8}{:>8}{:>12}{:>13}{:>8}{:>15}{:>15}",
            "active blocks",
            "cache",
            "peak",
            "mean error",
            "of the peak",
            "worst",
            "same requests",
            "event lag p99"
        )?;
        for worker in &self.workers {
            let active = &worker.active;
            let agreed = active.agreed_error_fraction();
            let agreed = agreed.map(|fraction| format!("{:.1}%", fraction * 100.0));
            let lag = worker
                .event_lag
                .map(|lag| format!("{:.1} ms", lag.p99 * 1e3));
            writeln!(
                f,
                "{:<22}{:>8}{:>8.0}{:>12.2}{:>12.1}%{:>8.0}{:>15}{:>15}",
                worker.name,
                worker.cache_source,
                active.peak,
                active.mean_error,
                active.error_fraction() * 100.0,
                active.worst_error,
                agreed.as_deref().unwrap_or("-"),
                lag.as_deref().unwrap_or("-"),
            )?;
        }
        writeln!(f)?;
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        writeln!(f, "\n{}", self.summary())
    }
}
