//! What users saw of a load, added up.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::load::flight::{End, Record};
use crate::report::{Latency, imbalance};

/// How many different messages are kept of each kind of failure.
const MOST_MESSAGES: usize = 3;

/// What users saw of a workload. Times are the engine's, in seconds, and requests' times begin
/// when they were due: if the client was late, that is part of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LiveOutcome {
    /// Requests sent: those that finished, failed and were broken off.
    pub sent: usize,
    /// Requests answered in full.
    pub finished: usize,
    /// Requests that were not, though the client waited, by kind.
    pub failed: BTreeMap<FailureKind, Failures>,
    /// Requests that the client broke off.
    pub aborted: usize,
    /// From the first arrival to the last end.
    pub makespan: f64,
    /// From arrival to first token, over requests that got one, finished or not.
    pub time_to_first_token: Latency,
    /// From one token to the next, over the tokens of these requests; tokens that come together
    /// are no time apart.
    pub inter_token_latency: Latency,
    /// From arrival to the end of the answer, over finished requests.
    pub end_to_end: Latency,
    /// From arrival until the client sent the request: how late the client itself was.
    pub client_delay: Latency,
    /// Tokens received, of finished answers and others.
    pub output_tokens: u64,
    /// `output_tokens` over `makespan`.
    pub output_tokens_per_second: f64,
    /// Prompt tokens of finished requests.
    pub prompt_tokens: u64,
    /// Those of them that engines said they had cached.
    pub cached_tokens: u64,
    /// `cached_tokens` over `prompt_tokens`.
    pub hit_share: f64,
    /// By the name a router gave in `x-foresee-worker`; empty without a router.
    pub workers: BTreeMap<String, WorkerShare>,
    /// Uncached prompt tokens: the worst worker's over the mean.
    pub computed_imbalance: f64,
    /// Requests: the worst worker's over the mean.
    pub request_imbalance: f64,
}

/// What one worker got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkerShare {
    /// Requests it began to answer.
    pub requests: u64,
    /// Prompt tokens of those that finished and that it did not say it had cached.
    pub uncached_prompt_tokens: u64,
}

/// What kept a request from being answered in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// No connection.
    Connect,
    /// The connection broke.
    Reset,
    /// An answer with a status that is no success.
    Status(u16),
    /// An error instead of further tokens.
    ErrorEvent,
    /// A stream that ended properly, but without its end mark.
    CutShort,
    /// It took too long.
    Timeout,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("connect"),
            Self::Reset => f.write_str("reset"),
            Self::Status(status) => write!(f, "status {status}"),
            Self::ErrorEvent => f.write_str("error event"),
            Self::CutShort => f.write_str("cut short"),
            Self::Timeout => f.write_str("timeout"),
        }
    }
}

/// As it is shown, so that it can be a key.
impl Serialize for FailureKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Failures of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Failures {
    /// How many.
    pub count: usize,
    /// The first three different messages.
    pub messages: Vec<String>,
}

impl LiveOutcome {
    /// Failures of all kinds.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.failed.values().map(|failures| failures.count).sum()
    }
}

/// Adds up requests that have ended.
#[derive(Debug, Default)]
pub(super) struct Tally {
    outcome: LiveOutcome,
    failed: usize,
    last_end: Duration,
    times_to_first_token: Vec<f32>,
    inter_token_latencies: Vec<f32>,
    end_to_end: Vec<f32>,
    client_delays: Vec<f32>,
}

impl Tally {
    pub(super) fn failed(&self) -> usize {
        self.failed
    }

    pub(super) fn take(&mut self, record: Record) {
        let due = record.flight.due;
        let since_due = |time: Duration| time.saturating_sub(due).as_secs_f32();
        self.last_end = self.last_end.max(record.ended);
        self.client_delays.push(since_due(record.sent));
        if let Some((first, _)) = record.tokens_came {
            self.times_to_first_token.push(since_due(first));
        }
        self.inter_token_latencies.extend(&record.gaps);

        let outcome = &mut self.outcome;
        outcome.sent += 1;
        outcome.output_tokens += u64::from(record.output_tokens);
        let mut unnamed = WorkerShare::default();
        let worker = match record.worker {
            Some(name) => outcome.workers.entry(name).or_default(),
            None => &mut unnamed,
        };
        worker.requests += 1;
        match record.end {
            End::Finished => {
                outcome.finished += 1;
                self.end_to_end.push(since_due(record.ended));
                let usage = record.usage.unwrap_or_default();
                let prompt_tokens = usage.prompt_tokens.unwrap_or(record.flight.prompt_tokens);
                let cached_tokens = usage.cached_tokens.unwrap_or(0).min(prompt_tokens);
                outcome.prompt_tokens += u64::from(prompt_tokens);
                outcome.cached_tokens += u64::from(cached_tokens);
                worker.uncached_prompt_tokens += u64::from(prompt_tokens - cached_tokens);
            }
            End::Aborted => outcome.aborted += 1,
            End::Failed(kind, message) => {
                self.failed += 1;
                let failures = outcome.failed.entry(kind).or_default();
                failures.count += 1;
                if failures.messages.len() < MOST_MESSAGES && !failures.messages.contains(&message)
                {
                    failures.messages.push(message);
                }
            }
        }
    }

    /// What all requests came to that began at `begin` or later and were sent to a fleet of
    /// `workers`.
    pub(super) fn outcome(mut self, begin: Duration, workers: usize) -> LiveOutcome {
        let mut outcome = self.outcome;
        let makespan = self.last_end.saturating_sub(begin).as_secs_f64();
        outcome.makespan = makespan;
        outcome.time_to_first_token = Latency::of(&mut self.times_to_first_token);
        outcome.inter_token_latency = Latency::of(&mut self.inter_token_latencies);
        outcome.end_to_end = Latency::of(&mut self.end_to_end);
        outcome.client_delay = Latency::of(&mut self.client_delays);
        outcome.output_tokens_per_second = outcome.output_tokens as f64 / makespan.max(1e-9);
        outcome.hit_share = outcome.cached_tokens as f64 / outcome.prompt_tokens.max(1) as f64;

        let mut shares: Vec<WorkerShare> = outcome.workers.values().copied().collect();
        shares.resize(workers.max(shares.len()), WorkerShare::default());
        let shares = shares.iter();
        outcome.computed_imbalance = imbalance(shares.clone().map(|it| it.uncached_prompt_tokens));
        outcome.request_imbalance = imbalance(shares.map(|it| it.requests));
        outcome
    }
}
