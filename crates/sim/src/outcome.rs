//! Results of one replay: what happened to its requests, and distributions of their times.

use serde::Serialize;

use crate::forecast_error::ForecastErrors;
use crate::prediction::{Instant, PredictionError};

/// Results of one run of a workload under one policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// The router's seed. Runs with equal seeds have the same requests and the same noise in the
    /// engines.
    pub seed: u64,
    /// Requests of the workload; with a limit of duration, those that have arrived.
    pub requests: usize,
    /// Requests whose output is complete.
    pub finished: usize,
    /// Requests that do not fit into the KV cache of their engine.
    pub rejected: usize,
    /// Results of worker faults.
    pub faults: FaultOutcome,
    /// Requests that did not end. Any number other than 0 is a fault of the router or the
    /// simulator, unless the replay was stopped early.
    pub unfinished: usize,
    /// Time from the first arrival to the last token, in seconds.
    pub makespan: f64,
    /// Time from arrival to the first token, over requests.
    pub time_to_first_token: Latency,
    /// Time from one token to the next, over all tokens but the first of each request.
    pub inter_token_latency: Latency,
    /// Mean time from one token to the next within a request (TPOT), over requests with more than
    /// one output token.
    pub time_per_output_token: Latency,
    /// Time from arrival to the last token, over finished requests.
    pub end_to_end: Latency,
    /// Requests within the [`Slo`](crate::slo::Slo).
    pub goodput: Goodput,
    /// Output tokens of all workers divided by the makespan.
    pub output_tokens_per_second: f64,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Prompt tokens that engines found in their caches.
    pub cached_tokens: u64,
    /// `cached_tokens` divided by `prompt_tokens`.
    pub hit_fraction: f64,
    /// Number of preemptions: a request lost its blocks to another one and was computed again.
    pub preemptions: u64,
    /// Computed prompt tokens: the maximum over workers, divided by the mean.
    pub computed_imbalance: f64,
    /// Requests: the maximum over workers, divided by the mean.
    pub request_imbalance: f64,
    /// Active blocks of router and engines after the end. Any number other than 0 is a leak, unless
    /// the replay was stopped early.
    pub leaked_blocks: u64,
    /// Error of the router's active blocks.
    pub prediction: PredictionError,
    /// Errors of the router's forecasts of time and output length.
    pub forecast_errors: ForecastErrors,
    /// Active blocks over time; empty if they were not kept.
    #[serde(skip)]
    pub active_blocks: Vec<Instant>,
}

/// Failed requests of one run, and the recovery of workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FaultOutcome {
    /// Requests that failed and were not retried with success: all attempts failed, or the retry
    /// budget was spent.
    pub lost: usize,
    /// Of these, the ones later than 10 s after the start of the first fault.
    pub lost_late: usize,
    /// Requests sent to workers, retries included.
    pub sent_to_workers: u64,
    /// Requests sent to a worker from 60 s to 120 s after the end of its fault, divided by the mean
    /// over workers: the smallest such share of any fault. `None` if no fault ends early enough.
    pub recovered_share: Option<f64>,
    /// Workers that are ejected when the last request ends.
    pub ejected_at_end: usize,
}

/// Requests within an [`Slo`](crate::slo::Slo).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Goodput {
    /// Fraction of all requests. Requests that were rejected or did not end are not within the SLO.
    pub fraction: f64,
    /// Requests within the SLO per second of the makespan.
    pub per_second: f64,
}

/// A distribution of times, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean: f64,
    /// 25th percentile.
    pub p25: f64,
    /// Median.
    pub p50: f64,
    /// 75th percentile.
    pub p75: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Latency {
    /// Returns the distribution of `samples`, in seconds; zeros without samples. Percentiles are
    /// nearest-rank. The order of `samples` changes.
    #[must_use]
    pub fn of(samples: &mut [f32]) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        let sum: f64 = samples.iter().map(|&sample| f64::from(sample)).sum();
        Self {
            mean: sum / samples.len() as f64,
            p25: percentile(samples, 0.25),
            p50: percentile(samples, 0.50),
            p75: percentile(samples, 0.75),
            p90: percentile(samples, 0.90),
            p95: percentile(samples, 0.95),
            p99: percentile(samples, 0.99),
        }
    }
}

fn percentile(samples: &mut [f32], fraction: f64) -> f64 {
    let rank = (fraction * samples.len() as f64).ceil() as usize;
    let index = rank.saturating_sub(1).min(samples.len() - 1);
    let (_, sample, _) = samples.select_nth_unstable_by(index, f32::total_cmp);
    f64::from(*sample)
}

/// Returns the maximum over workers, divided by the mean; 1 is even. Also 1 if no worker has
/// anything.
#[must_use]
pub fn imbalance(by_worker: impl ExactSizeIterator<Item = u64> + Clone) -> f64 {
    let workers = by_worker.len().max(1) as f64;
    let max = by_worker.clone().max().unwrap_or(0) as f64;
    let mean = by_worker.sum::<u64>() as f64 / workers;
    if mean > 0.0 { max / mean } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut samples: Vec<f32> = (1..=200).rev().map(|sample| sample as f32).collect();
        let latency = Latency::of(&mut samples);
        assert_eq!(
            (latency.mean, latency.p50, latency.p99),
            (100.5, 100.0, 198.0)
        );
        assert_eq!(Latency::of(&mut [3.0]).p99, 3.0);
        assert_eq!(Latency::of(&mut []), Latency::default());
    }
}
