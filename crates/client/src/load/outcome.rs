//! Results of a load: counts, latencies and throughput over all requests.

use std::collections::BTreeMap;
use std::time::Duration;

use foresee_sim::outcome::{Goodput, Latency, imbalance};
use foresee_sim::slo::Slo;
use serde::Serialize;

use crate::http::FailureKind;
use crate::load::client_request::{End, Record};

/// Limit for the different messages that are kept of each kind of failure.
const MAX_MESSAGES: usize = 3;

/// Results of a load as clients see them. Times are the engine's, in seconds. A request's times
/// begin when the request was due, so a delay of the client is part of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LiveOutcome {
    /// Requests sent: finished, failed and closed early.
    pub sent: usize,
    /// Requests whose response arrived complete.
    pub finished: usize,
    /// Failed requests by the cause of the failure.
    pub failed: BTreeMap<FailureKind, Failures>,
    /// Requests that the client closed early, as planned.
    pub aborted: usize,
    /// From the first arrival to the last end of a response.
    pub makespan: f64,
    /// From arrival to first token, over all requests that received one.
    pub time_to_first_token: Latency,
    /// From one token to the next, over all tokens of these requests. Tokens that arrive together
    /// are zero seconds apart.
    pub inter_token_latency: Latency,
    /// From arrival to the end of the response, over finished requests.
    pub end_to_end: Latency,
    /// From arrival until the client sent the request: the client's own delay.
    pub client_delay: Latency,
    /// Limits that decide which requests count as goodput.
    pub slo: Slo,
    /// Finished requests within `slo`: as a fraction of the requests that the client did not close
    /// early, and per second of the makespan.
    pub goodput: Goodput,
    /// `finished` over `makespan`.
    pub requests_per_second: f64,
    /// Tokens received, including those of failed and aborted requests.
    pub output_tokens: u64,
    /// `output_tokens` over `makespan`.
    pub output_tokens_per_second: f64,
    /// Prompt tokens of finished requests.
    pub prompt_tokens: u64,
    /// Prompt tokens of finished requests that engines reported as cached.
    pub cached_tokens: u64,
    /// Finished requests whose usage has `cached_tokens`; 0 if the engines do not report it.
    pub cached_tokens_reports: usize,
    /// `cached_tokens` over `prompt_tokens`.
    pub hit_fraction: f64,
    /// By the worker's name in `x-foresee-worker`; empty without a Foresee router.
    pub workers: BTreeMap<String, WorkerTotals>,
    /// Uncached prompt tokens: the maximum over workers, divided by the mean; `None` if no response
    /// named its worker.
    pub computed_imbalance: Option<f64>,
    /// Requests: the maximum over workers, divided by the mean; `None` as above.
    pub request_imbalance: Option<f64>,
}

/// Counts of one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkerTotals {
    /// Requests whose response named the worker.
    pub requests: u64,
    /// Prompt tokens of its finished requests, without those reported as cached.
    pub uncached_prompt_tokens: u64,
}

/// Failures of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Failures {
    /// Number of failures.
    pub count: usize,
    /// The first three different messages.
    pub messages: Vec<String>,
}

impl LiveOutcome {
    /// Returns the number of failures of all kinds.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.failed.values().map(|failures| failures.count).sum()
    }
}

/// Collects the records of requests that have ended.
#[derive(Debug, Default)]
pub(super) struct Tally {
    outcome: LiveOutcome,
    failed: usize,
    /// Finished requests within the SLO of `outcome`.
    within_slo: usize,
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

    /// Adds a request that has ended. Times count from the time at which it was due.
    ///
    /// The engine's count of prompt tokens takes precedence over the workload's. Tokens and cache
    /// hits of the prompt are counted for finished requests only. A request whose response named no
    /// worker is not counted for any worker.
    pub(super) fn add(&mut self, record: Record) {
        let due = record.request.due;
        let since_due = |time: Duration| time.saturating_sub(due).as_secs_f32();
        self.last_end = self.last_end.max(record.ended);
        self.client_delays.push(since_due(record.sent));
        if let Some((first, _)) = record.token_times {
            self.times_to_first_token.push(since_due(first));
        }
        self.inter_token_latencies.extend(&record.gaps);

        let outcome = &mut self.outcome;
        outcome.sent += 1;
        outcome.output_tokens += u64::from(record.output_tokens);
        let mut unnamed = WorkerTotals::default();
        let worker = match record.worker {
            Some(name) => outcome.workers.entry(name).or_default(),
            None => &mut unnamed,
        };
        worker.requests += 1;
        match record.end {
            End::Finished => {
                outcome.finished += 1;
                let first_token = record
                    .token_times
                    .map_or(0.0, |(first, _)| since_due(first));
                let gaps_sum: f64 = record.gaps.iter().map(|&gap| f64::from(gap)).sum();
                let mean_gap = gaps_sum / record.gaps.len().max(1) as f64;
                let is_within_slo = outcome.slo.allows_first_token(f64::from(first_token))
                    && outcome.slo.allows_mean_gap(mean_gap);
                self.within_slo += usize::from(is_within_slo);
                self.end_to_end.push(since_due(record.ended));
                let usage = record.usage.unwrap_or_default();
                let prompt_tokens = usage.prompt_tokens.unwrap_or(record.request.prompt_tokens);
                outcome.cached_tokens_reports += usize::from(usage.cached_tokens.is_some());
                let cached_tokens = usage.cached_tokens.unwrap_or(0).min(prompt_tokens);
                outcome.prompt_tokens += u64::from(prompt_tokens);
                outcome.cached_tokens += u64::from(cached_tokens);
                worker.uncached_prompt_tokens += u64::from(prompt_tokens - cached_tokens);
            }
            End::Aborted => outcome.aborted += 1,
            End::Failed(failure) => {
                self.failed += 1;
                let failures = outcome.failed.entry(failure.kind).or_default();
                failures.count += 1;
                let messages = &mut failures.messages;
                if messages.len() < MAX_MESSAGES && !messages.contains(&failure.message) {
                    messages.push(failure.message);
                }
            }
        }
    }

    /// Returns the results of requests sent since `begin`, the due time of the first request on the
    /// engine's clock. `workers` is only used for the imbalances: workers of the fleet that no
    /// response named count as idle.
    pub(super) fn outcome(mut self, begin: Duration, workers: usize) -> LiveOutcome {
        let mut outcome = self.outcome;
        let makespan = self.last_end.saturating_sub(begin).as_secs_f64();
        outcome.makespan = makespan;
        outcome.time_to_first_token = Latency::of(&mut self.times_to_first_token);
        outcome.inter_token_latency = Latency::of(&mut self.inter_token_latencies);
        outcome.end_to_end = Latency::of(&mut self.end_to_end);
        outcome.client_delay = Latency::of(&mut self.client_delays);
        let not_aborted = outcome.sent - outcome.aborted;
        outcome.goodput = Goodput {
            fraction: self.within_slo as f64 / not_aborted.max(1) as f64,
            per_second: self.within_slo as f64 / makespan.max(1e-9),
        };
        outcome.requests_per_second = outcome.finished as f64 / makespan.max(1e-9);
        outcome.output_tokens_per_second = outcome.output_tokens as f64 / makespan.max(1e-9);
        outcome.hit_fraction = outcome.cached_tokens as f64 / outcome.prompt_tokens.max(1) as f64;

        let mut workers_and_idle: Vec<WorkerTotals> = outcome.workers.values().copied().collect();
        workers_and_idle.resize(workers.max(workers_and_idle.len()), WorkerTotals::default());
        let totals = workers_and_idle.iter();
        if !outcome.workers.is_empty() {
            let computed = totals.clone().map(|worker| worker.uncached_prompt_tokens);
            outcome.computed_imbalance = Some(imbalance(computed));
            outcome.request_imbalance = Some(imbalance(totals.map(|worker| worker.requests)));
        }
        outcome
    }
}
