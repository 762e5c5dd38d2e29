//! What a verification found: in numbers for programs, in lines for people.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::report::Latency;
use crate::verify::VerifyConfig;
use crate::verify::exchange::{Ending, Exchange};
use crate::verify::judge::{Check, judge};
use crate::verify::script::Kind;
use crate::verify::truth::{Reader, Watched};

/// How many different wrong predictions are kept of each phase, and how many failures.
const MOST_KEPT: usize = 20;

/// All that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verification {
    /// The router's tokens per block.
    pub block_size: u32,
    /// Decides every prompt.
    pub seed: u64,
    /// Whether text was matched by the engines' own tokens.
    pub has_tokenizer: bool,
    /// One for each number of requests in flight.
    pub phases: Vec<Phase>,
    /// One for each worker.
    pub workers: Vec<WorkerResult>,
    /// Whether prompts were counted as the engines count them.
    pub parity: Parity,
    /// What it comes to.
    pub checks: Vec<Check>,
}

/// Requests with so many in flight at a time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// How many.
    pub concurrency: usize,
    /// When it began and ended, in seconds since the first began.
    pub seconds: (f64, f64),
    /// Requests answered in full.
    pub answered: usize,
    /// Streams that the client left.
    pub left: usize,
    /// Requests that failed.
    pub failed: usize,
    /// The first different reasons of failures.
    pub failures: Vec<String>,
    /// Answers that did not say how much of the prompt was cached.
    pub unreported: usize,
    /// Predictions against reports, by how the prompt came about.
    pub hits: BTreeMap<Kind, Hits>,
    /// The first wrong predictions.
    pub differences: Vec<Difference>,
}

/// Predicted and reported cache hits, added up. In blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hits {
    /// Requests compared.
    pub requests: usize,
    /// Of these, predicted to the block.
    pub equal: usize,
    /// More was predicted than was cached.
    pub over: usize,
    /// Less was predicted than was cached.
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
    /// How the prompt came about.
    pub kind: Kind,
    /// Which worker answered.
    pub worker: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Blocks predicted to be cached.
    pub predicted: u32,
    /// Blocks reported as cached.
    pub actual: u32,
}

/// How often the router counted as many prompt tokens as the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parity {
    /// Prompts counted alike.
    pub equal: u64,
    /// Prompts counted otherwise.
    pub different: u64,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkerResult {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// `events` or `shadow`: how the router knows its cache.
    pub cache_source: String,
    /// Whether its events were followed without loss; `None` if there are none.
    pub events_exact: Option<bool>,
    /// KV blocks it has, as the router believes.
    pub capacity_blocks: u32,
    /// Predicted active blocks against its own account.
    pub active: ActiveBlocks,
    /// From an event's making to its application; `None` without live events.
    pub event_lag: Option<Latency>,
    /// Why its metrics could not be read, if that happened.
    pub unread: Option<String>,
}

/// Predicted active blocks against an engine's own account.
///
/// The router counts a request from the instant it is chosen until its end has come back. An engine
/// tells of it when the first step with it is over, a vLLM counts it nowhere until then, and stops
/// with the last. Readings for which the two have different numbers of requests say how long that
/// takes; the others, whether the blocks are right.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ActiveBlocks {
    /// Readings compared.
    pub samples: usize,
    /// Mean absolute difference to what was predicted when the engine was asked, in blocks.
    pub mean_error: f64,
    /// The largest of those, in blocks.
    pub worst_error: f64,
    /// Those of the readings in which the engine counted as many requests as it had been sent,
    /// before and after.
    pub agreed: usize,
    /// Mean absolute difference in these, in blocks.
    pub agreed_error: f64,
    /// The most blocks the engine held.
    pub peak: f64,
    /// Predicted when all was over.
    pub predicted_at_rest: u64,
    /// Held when all was over.
    pub held_at_rest: f64,
    /// When a prediction changed, in seconds, and to what.
    pub predicted: Vec<(f64, u64)>,
    /// When the engine was asked, in seconds, and what it held.
    pub held: Vec<(f64, f64)>,
}

impl ActiveBlocks {
    /// Mean absolute error as a share of the peak.
    #[must_use]
    pub fn error_share(&self) -> f64 {
        self.mean_error / self.peak.max(1.0)
    }

    /// The same where engine and router count the same requests; `None` where they never do.
    #[must_use]
    pub fn agreed_error_share(&self) -> Option<f64> {
        (self.agreed > 0).then(|| self.agreed_error / self.peak.max(1.0))
    }

    fn of(watched: &Watched) -> Self {
        let readings = &watched.readings;
        let compared = readings.iter().map(|reading| {
            let predicted = watched.predicted_at(reading.at).blocks;
            let error = (predicted as f64 - reading.held).abs();
            (error, watched.agrees(reading))
        });
        let errors = compared.clone().map(|(error, _)| error);
        let agreed: Vec<f64> = compared
            .filter_map(|(error, is)| is.then_some(error))
            .collect();
        let held = readings.iter().map(|it| (it.at, it.held));
        let predicted = watched.predicted.iter().map(|it| (it.at, it.blocks));
        Self {
            samples: readings.len(),
            mean_error: errors.clone().sum::<f64>() / readings.len().max(1) as f64,
            worst_error: errors.fold(0.0, f64::max),
            agreed: agreed.len(),
            agreed_error: agreed.iter().sum::<f64>() / agreed.len().max(1) as f64,
            peak: readings.iter().map(|it| it.held).fold(0.0, f64::max),
            predicted_at_rest: watched.worker.active_blocks,
            held_at_rest: readings.last().map_or(0.0, |it| it.held),
            predicted: predicted.collect(),
            held: held.collect(),
        }
    }
}

impl Hits {
    /// Of the blocks predicted, the share that was cached.
    #[must_use]
    pub fn precision(&self) -> f64 {
        share(self.common, self.predicted)
    }

    /// Of the blocks cached, the share that was predicted.
    #[must_use]
    pub fn recall(&self) -> f64 {
        share(self.common, self.actual)
    }

    /// The share of requests predicted to the block.
    #[must_use]
    pub fn equal_share(&self) -> f64 {
        share(self.equal as u64, self.requests as u64)
    }

    fn take(&mut self, predicted: u32, actual: u32) {
        self.requests += 1;
        self.equal += usize::from(predicted == actual);
        self.over += usize::from(predicted > actual);
        self.under += usize::from(predicted < actual);
        self.predicted += u64::from(predicted);
        self.actual += u64::from(actual);
        self.common += u64::from(predicted.min(actual));
    }

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

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        1.0
    } else {
        part as f64 / whole as f64
    }
}

impl Phase {
    pub(super) fn new(concurrency: usize) -> Self {
        Self {
            concurrency,
            seconds: (0.0, 0.0),
            answered: 0,
            left: 0,
            failed: 0,
            failures: Vec::new(),
            unreported: 0,
            hits: BTreeMap::new(),
            differences: Vec::new(),
        }
    }

    pub(super) fn take(&mut self, kind: Kind, block_size: u32, done: Exchange) {
        match done.ending {
            Ending::Answered => self.answered += 1,
            Ending::Left => {
                self.left += 1;
                return;
            }
            Ending::Failed(why) => {
                self.failed += 1;
                if self.failures.len() < MOST_KEPT && !self.failures.contains(&why) {
                    self.failures.push(why);
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
        if predicted != actual && self.differences.len() < MOST_KEPT {
            self.differences.push(Difference {
                kind,
                worker: done.worker.unwrap_or_default(),
                prompt_tokens: done.usage.prompt_tokens.unwrap_or(0),
                predicted,
                actual,
            });
        }
    }

    /// The predictions of those kinds of prompts that can be predicted in full.
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
    pub(super) async fn read(reader: &Reader) -> Result<Self, String> {
        const COUNTER: &str = "foresee_token_parity_total";
        Ok(Self {
            equal: reader.counter(COUNTER, "\"equal\"").await?,
            different: reader.counter(COUNTER, "\"different\"").await?,
        })
    }
}

impl Verification {
    pub(super) fn of(
        config: &VerifyConfig,
        phases: Vec<Phase>,
        parity: Parity,
        watched: &[Watched],
    ) -> Self {
        let workers = watched.iter().map(|watched| {
            let worker = &watched.worker;
            let mut lags: Vec<f32> = watched.lags.iter().map(|&lag| lag as f32).collect();
            WorkerResult {
                name: worker.name.clone(),
                url: worker.url.clone(),
                cache_source: worker.cache_source.clone(),
                events_exact: worker.kv_events.as_ref().map(|events| events.exact),
                capacity_blocks: worker.capacity_blocks,
                active: ActiveBlocks::of(watched),
                event_lag: (!lags.is_empty()).then(|| Latency::of(&mut lags)),
                unread: watched.unread.clone(),
            }
        });
        let mut verification = Self {
            block_size: config.block_size,
            seed: config.seed,
            has_tokenizer: config.has_tokenizer,
            phases,
            workers: workers.collect(),
            parity,
            checks: Vec::new(),
        };
        verification.checks = judge(&verification);
        verification
    }

    /// Whether nothing that could be judged was found wanting.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed != Some(false))
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for phase in &self.phases {
            let Phase { concurrency, .. } = phase;
            writeln!(
                f,
                "{concurrency} at a time: {} answered, {} left by the client, {} failed",
                phase.answered, phase.left, phase.failed
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
                    hits.equal_share() * 100.0,
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
            let agreed = active.agreed_error_share();
            let agreed = agreed.map(|share| format!("{:.1}%", share * 100.0));
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
                active.error_share() * 100.0,
                active.worst_error,
                agreed.as_deref().unwrap_or("-"),
                lag.as_deref().unwrap_or("-"),
            )?;
        }
        writeln!(f)?;
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        let verdict = if self.passed() {
            "The predictions hold on these engines."
        } else {
            "The predictions do not hold on these engines as they are set up now."
        };
        writeln!(f, "\n{verdict}")
    }
}
