//! Results of a replay: as JSON (serde) and as a table.

use std::fmt;

use serde::Serialize;

use crate::forecast_error::ForecastErrors;
use crate::prediction::{Instant, PredictionError};
use crate::significance::{Difference, difference};
use crate::slo::Slo;
use crate::table::{COUNT, MILLISECONDS, PERCENT, RATIO, SECONDS, write_cells};

/// Results of one workload under several policies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The workload's name.
    pub workload: String,
    /// Workers in the fleet.
    pub workers: usize,
    /// Limits that decide which requests count as goodput.
    pub slo: Slo,
    /// Runs of each policy. Each has its own seed.
    pub seeds: usize,
    /// Outcomes of all runs: those of the first policy in the order of their seeds, then those of
    /// the next policy.
    pub outcomes: Vec<Outcome>,
    /// Every measure of every policy: the mean over seeds, and its difference from the best policy.
    pub summary: Vec<Summary>,
    /// Virtual time of all runs together, in seconds.
    pub virtual_seconds: f64,
    /// Real time of all runs together, in seconds.
    pub real_seconds: f64,
}

/// One measure of one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Name of the measure, as in the table.
    pub measure: &'static str,
    /// The policy.
    pub policy: String,
    /// Mean over seeds.
    pub mean: f64,
    /// Difference from the policy with the best mean. `None` for that policy itself, for measures
    /// without a better direction, and with a single seed.
    pub against_best: Option<Difference>,
    /// Whether no policy has a better mean.
    pub is_best: bool,
}

/// Results of one run of a workload under one policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// The router's seed. Runs with equal seeds have the same requests and the same noise in the
    /// engines.
    pub seed: u64,
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
    /// Requests within the report's [`Slo`].
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

/// Requests within an [`Slo`].
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
pub(crate) fn imbalance(by_worker: impl ExactSizeIterator<Item = u64> + Clone) -> f64 {
    let workers = by_worker.len().max(1) as f64;
    let max = by_worker.clone().max().unwrap_or(0) as f64;
    let mean = by_worker.sum::<u64>() as f64 / workers;
    if mean > 0.0 { max / mean } else { 1.0 }
}

/// Direction in which a measure improves.
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

/// Creates a row of the table. `show` formats a mean, and `value` reads the measure from one run.
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
const MEASURES: [Measure; 37] = {
    use Better::{Higher, Lower, Neither};
    [
        measure("TTFT mean, s", Lower, SECONDS, |it| it.time_to_first_token.mean),
        measure("TTFT p50, s", Lower, SECONDS, |it| it.time_to_first_token.p50),
        measure("TTFT p95, s", Lower, SECONDS, |it| it.time_to_first_token.p95),
        measure("TTFT p99, s", Lower, SECONDS, |it| it.time_to_first_token.p99),
        measure("ITL mean, ms", Lower, MILLISECONDS, |it| it.inter_token_latency.mean),
        measure("ITL p95, ms", Lower, MILLISECONDS, |it| it.inter_token_latency.p95),
        measure("ITL p99, ms", Lower, MILLISECONDS, |it| it.inter_token_latency.p99),
        measure("mean ITL per request: mean, ms", Lower, MILLISECONDS, |it| it.time_per_output_token.mean),
        measure("  p95, ms", Lower, MILLISECONDS, |it| it.time_per_output_token.p95),
        measure("  p99, ms", Lower, MILLISECONDS, |it| it.time_per_output_token.p99),
        measure("end to end mean, s", Lower, SECONDS, |it| it.end_to_end.mean),
        measure("end to end p50, s", Lower, SECONDS, |it| it.end_to_end.p50),
        measure("end to end p95, s", Lower, SECONDS, |it| it.end_to_end.p95),
        measure("end to end p99, s", Lower, SECONDS, |it| it.end_to_end.p99),
        measure("within SLO, %", Higher, PERCENT, |it| it.goodput.fraction),
        measure("within SLO, requests/s", Higher, RATIO, |it| it.goodput.per_second),
        measure("output tokens/s", Higher, COUNT, |it| it.output_tokens_per_second),
        measure("makespan, s", Lower, RATIO, |it| it.makespan),
        measure("prefix hits, % of tokens", Higher, PERCENT, |it| it.hit_fraction),
        measure("preemptions", Lower, COUNT, |it| it.preemptions as f64),
        measure("rejected", Neither, COUNT, |it| it.rejected as f64),
        measure("lost", Neither, COUNT, |it| it.faults.lost as f64),
        measure("sent to workers", Neither, COUNT, |it| it.faults.sent_to_workers as f64),
        measure("unfinished", Neither, COUNT, |it| it.unfinished as f64),
        measure("worst/mean computed tokens", Neither, RATIO, |it| it.computed_imbalance),
        measure("worst/mean requests", Neither, RATIO, |it| it.request_imbalance),
        measure("active blocks error, % of peak", Neither, PERCENT, |it| it.prediction.raw),
        measure("  of admitted requests", Neither, PERCENT, |it| it.prediction.admitted),
        measure("  and allocated blocks", Neither, PERCENT, |it| it.prediction.allocated),
        measure("peak blocks of an engine", Neither, COUNT, |it| f64::from(it.prediction.peak_blocks)),
        measure("prefill model, error %", Neither, PERCENT, |it| it.forecast_errors.prefill),
        measure("decode step model, error %", Neither, PERCENT, |it| it.forecast_errors.decode_step),
        measure("  within 10 % after a change, s", Neither, RATIO, |it| it.forecast_errors.recovery),
        measure("TTFT forecast, error %", Neither, PERCENT, |it| it.forecast_errors.time_to_first_token),
        measure("output length forecast, error %", Neither, PERCENT, |it| it.forecast_errors.output_length),
        measure("  actual over forecast, sum", Neither, RATIO, |it| it.forecast_errors.output_length_bias),
        measure("leaked blocks", Neither, COUNT, |it| it.leaked_blocks as f64),
    ]
};

/// Returns every measure of every policy. `outcomes` has `seeds` outcomes of each policy, in the
/// same order of seeds, so that runs can be compared in pairs. Policies with equal best means are
/// all the best. The differences are `None` with a single seed.
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
    /// Returns whether no policy is better, or the difference from the best is within chance.
    pub(crate) fn is_first(&self) -> bool {
        self.is_best
            || self
                .against_best
                .is_some_and(|difference| difference.is_tie)
    }

    /// Returns the mean in the format of the table.
    pub(crate) fn shown(&self) -> String {
        let measure = MEASURES.iter().find(|measure| measure.name == self.measure);
        measure.map_or(String::new(), |measure| (measure.show)(self.mean))
    }
}

impl Report {
    /// Returns one measure of one policy; `None` if there is no such measure or policy.
    pub(crate) fn summary_of(&self, measure: &str, policy: &str) -> Option<&Summary> {
        let mut summary = self.summary.iter();
        summary.find(|row| row.measure == measure && row.policy == policy)
    }
}

/// Writes the table of measures with a column for each policy.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policies = self.outcomes.iter().step_by(self.seeds.max(1));
        let policies: Vec<&str> = policies.map(|outcome| outcome.policy.as_str()).collect();
        let rows = self.summary.chunks(policies.len().max(1));
        let rows = MEASURES.iter().zip(rows).map(|(measure, row)| {
            let cells = row.iter().map(|summary| self.cell(measure, summary));
            (measure.name, cells.collect())
        });
        let rows: Vec<(&str, Vec<String>)> = rows.collect();
        let title = format!("{}, {} workers", self.workload, self.workers);
        write_cells(f, &title, &policies, &rows)?;
        if self.seeds > 1 {
            writeln!(
                f,
                "Means over {} seeds. *: best. ±: 95 % confidence interval of the difference from \
                 the best (paired by seed). ≈: the interval contains zero.",
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
    /// Returns a cell of the table: the mean, and its comparison with the best policy. With a
    /// single seed, only the mean. `*` marks the best policy, and `≈` a difference within chance.
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
