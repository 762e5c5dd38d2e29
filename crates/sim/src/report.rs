//! What a replay measured, for programs (serde) and for people (a table).

use std::fmt;

use serde::Serialize;

use crate::learning::Learning;
use crate::prediction::{Instant, PredictionError};
use crate::slo::Slo;
use crate::spread::{Difference, difference};
use crate::table::{COUNT, MILLISECONDS, PERCENT, RATIO, SECONDS, write_cells};

/// Outcomes of one workload under several policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet.
    pub workers: usize,
    /// What counts as served well.
    pub slo: Slo,
    /// Runs of each policy, each with a seed of its own.
    pub seeds: usize,
    /// Those of the first policy asked for, in the order of their seeds, then of the next.
    pub outcomes: Vec<Outcome>,
    /// Every measure of every policy: the mean over seeds, and how sure it is.
    pub summary: Vec<Summary>,
    /// Time that passed on the virtual clocks of all runs, in seconds.
    pub virtual_seconds: f64,
    /// Time it took, in seconds.
    pub real_seconds: f64,
}

/// One measure of one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// What is measured, as the table names it.
    pub measure: &'static str,
    /// The policy.
    pub policy: String,
    /// Its mean over seeds.
    pub mean: f64,
    /// How it compares with the policy whose mean is best; `None` for that one, for measures
    /// that are neither better high nor low, and where there is but one seed.
    pub against_best: Option<Difference>,
    /// No policy's mean is better.
    pub is_best: bool,
}

/// What one policy made of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// The router's seed. Runs of equal seeds had the same requests, and engines of equal noise.
    pub seed: u64,
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
    /// Mean time from one token to the next within a request (TPOT), in seconds, over requests of
    /// more than one.
    pub time_per_output_token: Latency,
    /// From arrival to last token, in seconds, over requests.
    pub end_to_end: Latency,
    /// Requests served as the report's [`Slo`] says.
    pub goodput: Goodput,
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
    /// How well it knew what they take.
    pub learning: Learning,
    /// Active blocks over time, if they were kept.
    #[serde(skip)]
    pub active_blocks: Vec<Instant>,
}

/// Requests within an [`Slo`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Goodput {
    /// Of all requests; one that was rejected or did not end is not within it.
    pub share: f64,
    /// Over the makespan.
    pub per_second: f64,
}

/// A distribution of times, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean: f64,
    /// A quarter is at most this.
    pub p25: f64,
    /// Median.
    pub p50: f64,
    /// Three quarters are at most this.
    pub p75: f64,
    /// 95 of 100 are at most this.
    pub p95: f64,
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
            p25: percentile(samples, 0.25),
            p50: percentile(samples, 0.50),
            p75: percentile(samples, 0.75),
            p95: percentile(samples, 0.95),
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

/// Which of two values is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    Lower,
    Higher,
    Neither,
}

/// A row of the table.
struct Measure {
    name: &'static str,
    better: Better,
    show: fn(f64) -> String,
    value: fn(&Outcome) -> f64,
}

const fn measure(
    name: &'static str,
    better: Better,
    show: fn(f64) -> String,
    value: fn(&Outcome) -> f64,
) -> Measure {
    Measure {
        name,
        better,
        show,
        value,
    }
}

#[rustfmt::skip]
const MEASURES: [Measure; 35] = {
    use Better::{Higher, Lower, Neither};
    [
        measure("TTFT mean, s", Lower, SECONDS, |it| it.time_to_first_token.mean),
        measure("TTFT p50, s", Lower, SECONDS, |it| it.time_to_first_token.p50),
        measure("TTFT p95, s", Lower, SECONDS, |it| it.time_to_first_token.p95),
        measure("TTFT p99, s", Lower, SECONDS, |it| it.time_to_first_token.p99),
        measure("ITL mean, ms", Lower, MILLISECONDS, |it| it.inter_token_latency.mean),
        measure("ITL p95, ms", Lower, MILLISECONDS, |it| it.inter_token_latency.p95),
        measure("ITL p99, ms", Lower, MILLISECONDS, |it| it.inter_token_latency.p99),
        measure("request's mean ITL: mean, ms", Lower, MILLISECONDS, |it| it.time_per_output_token.mean),
        measure("  p95, ms", Lower, MILLISECONDS, |it| it.time_per_output_token.p95),
        measure("  p99, ms", Lower, MILLISECONDS, |it| it.time_per_output_token.p99),
        measure("end to end mean, s", Lower, SECONDS, |it| it.end_to_end.mean),
        measure("end to end p50, s", Lower, SECONDS, |it| it.end_to_end.p50),
        measure("end to end p95, s", Lower, SECONDS, |it| it.end_to_end.p95),
        measure("end to end p99, s", Lower, SECONDS, |it| it.end_to_end.p99),
        measure("within SLO, %", Higher, PERCENT, |it| it.goodput.share),
        measure("within SLO, requests/s", Higher, RATIO, |it| it.goodput.per_second),
        measure("output tokens/s", Higher, COUNT, |it| it.output_tokens_per_second),
        measure("makespan, s", Lower, RATIO, |it| it.makespan),
        measure("prefix hits, % of tokens", Higher, PERCENT, |it| it.hit_share),
        measure("preemptions", Lower, COUNT, |it| it.preemptions as f64),
        measure("rejected", Neither, COUNT, |it| it.rejected as f64),
        measure("unfinished", Neither, COUNT, |it| it.unfinished as f64),
        measure("worst/mean computed tokens", Neither, RATIO, |it| it.computed_imbalance),
        measure("worst/mean requests", Neither, RATIO, |it| it.request_imbalance),
        measure("active blocks off, % of peak", Neither, PERCENT, |it| it.prediction.raw),
        measure("  of admitted requests", Neither, PERCENT, |it| it.prediction.admitted),
        measure("  and allocated blocks", Neither, PERCENT, |it| it.prediction.allocated),
        measure("peak blocks of an engine", Neither, COUNT, |it| f64::from(it.prediction.peak_blocks)),
        measure("prefill learned, % off", Neither, PERCENT, |it| it.learning.prefill),
        measure("decode step learned, % off", Neither, PERCENT, |it| it.learning.step),
        measure("  known to a tenth after a change, s", Neither, RATIO, |it| it.learning.recovery),
        measure("TTFT forecast, % off", Neither, PERCENT, |it| it.learning.time_to_first_token),
        measure("answer length forecast, % off", Neither, PERCENT, |it| it.learning.length),
        measure("  had over forecast, all together", Neither, RATIO, |it| it.learning.length_bias),
        measure("blocks leaked", Neither, COUNT, |it| it.leaked_blocks as f64),
    ]
};

/// Every measure of every policy, given the outcomes of each, paired by seed.
pub(crate) fn summarise(outcomes: &[Outcome], seeds: usize) -> Vec<Summary> {
    let mut summary = Vec::new();
    for measure in &MEASURES {
        let runs: Vec<Vec<f64>> = outcomes
            .chunks(seeds.max(1))
            .map(|runs| runs.iter().map(measure.value).collect())
            .collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let means = runs.iter().map(|values| mean(values));
        let best = match measure.better {
            Better::Lower => means.clone().reduce(f64::min),
            Better::Higher => means.clone().reduce(f64::max),
            Better::Neither => None,
        };
        let best_runs = best.and_then(|best| runs.iter().find(|values| mean(values) == best));
        let policies = outcomes.iter().step_by(seeds.max(1));
        for ((values, mean), outcome) in runs.iter().zip(means).zip(policies) {
            let is_best = Some(mean) == best;
            let compared = best_runs.filter(|_| !is_best);
            summary.push(Summary {
                measure: measure.name,
                policy: outcome.policy.clone(),
                mean,
                against_best: compared.and_then(|best| difference(values, best)),
                is_best,
            });
        }
    }
    summary
}

impl Summary {
    /// No policy's mean is better, but for luck.
    pub(crate) fn is_first(&self) -> bool {
        self.is_best || self.against_best.is_some_and(|it| it.is_tie)
    }

    /// Its mean, as the table shows it.
    pub(crate) fn shown(&self) -> String {
        let measure = MEASURES.iter().find(|it| it.name == self.measure);
        measure.map_or(String::new(), |it| (it.show)(self.mean))
    }
}

impl Report {
    /// One measure of one policy.
    pub(crate) fn summary_of(&self, measure: &str, policy: &str) -> Option<&Summary> {
        let mut summary = self.summary.iter();
        summary.find(|it| it.measure == measure && it.policy == policy)
    }
}

/// The outcomes side by side, a column for each policy.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policies = self.outcomes.iter().step_by(self.seeds.max(1));
        let policies: Vec<&str> = policies.map(|it| it.policy.as_str()).collect();
        let rows = self.summary.chunks(policies.len().max(1));
        let rows = MEASURES.iter().zip(rows).map(|(measure, row)| {
            let cells = row.iter().map(|it| self.cell(measure, it));
            (measure.name, cells.collect())
        });
        let rows: Vec<(&str, Vec<String>)> = rows.collect();
        let title = format!("{}, {} workers", self.workload, self.workers);
        write_cells(f, &title, &policies, &rows)?;
        if self.seeds > 1 {
            writeln!(
                f,
                "Means over {} seeds. *: the best. ±: how far its distance from the best may be \
                 off (95 %, paired by seed). ≈: it may be none.",
                self.seeds
            )?;
        }
        writeln!(
            f,
            "SLO {}; {:.0} s of traffic in {:.1} s, {:.0} times real time",
            self.slo,
            self.virtual_seconds,
            self.real_seconds,
            self.virtual_seconds / self.real_seconds.max(1e-9)
        )
    }
}

impl Report {
    fn cell(&self, measure: &Measure, summary: &Summary) -> String {
        let mean = (measure.show)(summary.mean);
        match summary.against_best {
            _ if self.seeds == 1 => mean,
            Some(Difference { margin, is_tie, .. }) => {
                let sign = if is_tie { "≈" } else { " " };
                format!("{mean} ±{}{sign}", (measure.show)(margin))
            }
            None if summary.is_best => format!("{mean} *"),
            None => format!("{mean}  "),
        }
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
