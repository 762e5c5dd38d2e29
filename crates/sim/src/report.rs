//! What a replay measured, for programs (serde) and for people (a table).

use std::fmt;

use serde::Serialize;

use crate::prediction::PredictionError;
use crate::table::{COUNT, MILLISECONDS, PERCENT, RATIO, Row, SECONDS, write_table};

/// Outcomes of one workload under several policies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet.
    pub workers: usize,
    /// One for each policy, in the order asked for.
    pub outcomes: Vec<Outcome>,
}

/// What one policy made of a workload.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// Requests answered in full.
    pub finished: usize,
    /// Requests larger than their engine's KV cache.
    pub rejected: usize,
    /// Requests that never ended: 0, or something is wrong.
    pub unfinished: usize,
    /// From the first arrival to the last token, in seconds.
    pub makespan: f64,
    /// From arrival to first token, in seconds, over requests.
    pub time_to_first_token: Latency,
    /// From one token to the next, in seconds, over tokens.
    pub inter_token_latency: Latency,
    /// From arrival to last token, in seconds, over requests.
    pub end_to_end: Latency,
    /// Output tokens of all workers over the makespan.
    pub output_tokens_per_second: f64,
    /// Prompt tokens admitted.
    pub prompt_tokens: u64,
    /// Those of them that engines found in their caches.
    pub cached_tokens: u64,
    /// `cached_tokens` over `prompt_tokens`.
    pub hit_share: f64,
    /// Times a request lost its blocks to another and had to be computed again.
    pub preemptions: u64,
    /// Prompt tokens to compute: the worst worker's over the mean.
    pub computed_imbalance: f64,
    /// Requests: the worst worker's over the mean.
    pub request_imbalance: f64,
    /// Blocks that router or engines still count when all is over: 0, or something leaks.
    pub leaked_blocks: u64,
    /// How well the router knew what engines hold.
    pub prediction: PredictionError,
}

/// A distribution of times, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
}

impl Latency {
    /// Summarises `samples`, in seconds, and leaves them in another order. Percentiles are
    /// nearest-rank; zeros when there are no samples.
    pub(crate) fn of(samples: &mut [f32]) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        let sum: f64 = samples.iter().map(|&sample| f64::from(sample)).sum();
        Self {
            mean: sum / samples.len() as f64,
            p50: percentile(samples, 0.50),
            p99: percentile(samples, 0.99),
        }
    }
}

fn percentile(samples: &mut [f32], share: f64) -> f64 {
    let rank = (share * samples.len() as f64).ceil() as usize;
    let index = rank.saturating_sub(1).min(samples.len() - 1);
    let (_, sample, _) = samples.select_nth_unstable_by(index, f32::total_cmp);
    f64::from(*sample)
}

/// The worst worker's share over the mean; 1 is even.
pub(crate) fn imbalance(shares: impl ExactSizeIterator<Item = u64> + Clone) -> f64 {
    let workers = shares.len().max(1) as f64;
    let worst = shares.clone().max().unwrap_or(0) as f64;
    let mean = shares.sum::<u64>() as f64 / workers;
    if mean > 0.0 { worst / mean } else { 1.0 }
}

/// The outcomes side by side, a column for each policy.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ROWS: [Row<Outcome>; 19] = [
            ("TTFT mean, s", SECONDS, |it| it.time_to_first_token.mean),
            ("TTFT p50, s", SECONDS, |it| it.time_to_first_token.p50),
            ("TTFT p99, s", SECONDS, |it| it.time_to_first_token.p99),
            ("ITL mean, ms", MILLISECONDS, |it| {
                it.inter_token_latency.mean
            }),
            ("ITL p99, ms", MILLISECONDS, |it| it.inter_token_latency.p99),
            ("end to end mean, s", SECONDS, |it| it.end_to_end.mean),
            ("end to end p50, s", SECONDS, |it| it.end_to_end.p50),
            ("end to end p99, s", SECONDS, |it| it.end_to_end.p99),
            ("output tokens/s", COUNT, |it| it.output_tokens_per_second),
            ("makespan, s", RATIO, |it| it.makespan),
            ("prefix hits, % of tokens", PERCENT, |it| it.hit_share),
            ("preemptions", COUNT, |it| it.preemptions as f64),
            ("rejected", COUNT, |it| it.rejected as f64),
            ("worst/mean computed tokens", RATIO, |it| {
                it.computed_imbalance
            }),
            ("worst/mean requests", RATIO, |it| it.request_imbalance),
            ("active blocks off, % of peak", PERCENT, |it| {
                it.prediction.raw
            }),
            ("  of admitted requests", PERCENT, |it| {
                it.prediction.admitted
            }),
            ("  and allocated blocks", PERCENT, |it| {
                it.prediction.allocated
            }),
            ("blocks leaked", COUNT, |it| it.leaked_blocks as f64),
        ];
        let title = format!("{}, {} workers", self.workload, self.workers);
        let columns = self.outcomes.iter().map(|it| (it.policy.as_str(), it));
        write_table(f, &title, columns, &ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut samples: Vec<f32> = (1..=200).rev().map(|it| it as f32).collect();
        let latency = Latency::of(&mut samples);
        assert_eq!(
            (latency.mean, latency.p50, latency.p99),
            (100.5, 100.0, 198.0)
        );
        assert_eq!(Latency::of(&mut [3.0]).p99, 3.0);
        assert_eq!(Latency::of(&mut []), Latency::default());
    }
}
