//! The measures by which policies are compared, and their means over seeds.

use serde::Serialize;

use crate::outcome::Outcome;
use crate::significance::{Difference, difference};

/// Direction in which a measure improves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    Lower,
    Higher,
    Neither,
}

/// Unit in which tables show a measure. Its values are in seconds, fractions or counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    /// Seconds, of a value in seconds.
    Seconds,
    /// Milliseconds, of a value in seconds.
    Milliseconds,
    /// Percent, of a fraction.
    Percent,
    /// A number without a unit, such as a ratio.
    #[default]
    Ratio,
    /// A number of things.
    Count,
}

/// A quantity by which policies are compared.
struct Measure {
    name: &'static str,
    better: Better,
    unit: Unit,
    value: fn(&Outcome) -> f64,
}

/// Creates a measure. `value` reads it from one run.
const fn measure(
    name: &'static str,
    better: Better,
    unit: Unit,
    value: fn(&Outcome) -> f64,
) -> Measure {
    Measure {
        name,
        better,
        unit,
        value,
    }
}

#[rustfmt::skip]
const MEASURES: [Measure; 37] = {
    use Better::{Higher, Lower, Neither};
    use Unit::{Count, Milliseconds, Percent, Ratio, Seconds};
    [
        measure("TTFT mean, s", Lower, Seconds, |run| run.time_to_first_token.mean),
        measure("TTFT p50, s", Lower, Seconds, |run| run.time_to_first_token.p50),
        measure("TTFT p95, s", Lower, Seconds, |run| run.time_to_first_token.p95),
        measure("TTFT p99, s", Lower, Seconds, |run| run.time_to_first_token.p99),
        measure("ITL mean, ms", Lower, Milliseconds, |run| run.inter_token_latency.mean),
        measure("ITL p95, ms", Lower, Milliseconds, |run| run.inter_token_latency.p95),
        measure("ITL p99, ms", Lower, Milliseconds, |run| run.inter_token_latency.p99),
        measure("mean ITL per request: mean, ms", Lower, Milliseconds, |run| run.time_per_output_token.mean),
        measure("  p95, ms", Lower, Milliseconds, |run| run.time_per_output_token.p95),
        measure("  p99, ms", Lower, Milliseconds, |run| run.time_per_output_token.p99),
        measure("end to end mean, s", Lower, Seconds, |run| run.end_to_end.mean),
        measure("end to end p50, s", Lower, Seconds, |run| run.end_to_end.p50),
        measure("end to end p95, s", Lower, Seconds, |run| run.end_to_end.p95),
        measure("end to end p99, s", Lower, Seconds, |run| run.end_to_end.p99),
        measure("within SLO, %", Higher, Percent, |run| run.goodput.fraction),
        measure("within SLO, requests/s", Higher, Ratio, |run| run.goodput.per_second),
        measure("output tokens/s", Higher, Count, |run| run.output_tokens_per_second),
        measure("makespan, s", Lower, Ratio, |run| run.makespan),
        measure("prefix hits, % of tokens", Higher, Percent, |run| run.hit_fraction),
        measure("preemptions", Lower, Count, |run| run.preemptions as f64),
        measure("rejected", Neither, Count, |run| run.rejected as f64),
        measure("lost", Neither, Count, |run| run.faults.lost as f64),
        measure("sent to workers", Neither, Count, |run| run.faults.sent_to_workers as f64),
        measure("unfinished", Neither, Count, |run| run.unfinished as f64),
        measure("worst/mean computed tokens", Neither, Ratio, |run| run.computed_imbalance),
        measure("worst/mean requests", Neither, Ratio, |run| run.request_imbalance),
        measure("active blocks error, % of peak", Neither, Percent, |run| run.prediction.raw),
        measure("  of admitted requests", Neither, Percent, |run| run.prediction.admitted),
        measure("  and allocated blocks", Neither, Percent, |run| run.prediction.allocated),
        measure("peak blocks of an engine", Neither, Count, |run| f64::from(run.prediction.peak_blocks)),
        measure("prefill model, error %", Neither, Percent, |run| run.forecast_errors.prefill),
        measure("decode step model, error %", Neither, Percent, |run| run.forecast_errors.decode_step),
        measure("  within 10 % after a change, s", Neither, Ratio, |run| run.forecast_errors.recovery),
        measure("TTFT forecast, error %", Neither, Percent, |run| run.forecast_errors.time_to_first_token),
        measure("output length forecast, error %", Neither, Percent, |run| run.forecast_errors.output_length),
        measure("  actual over forecast, sum", Neither, Ratio, |run| run.forecast_errors.output_length_bias),
        measure("leaked blocks", Neither, Count, |run| run.leaked_blocks as f64),
    ]
};

/// One measure of one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Name of the measure, as in the table.
    pub measure: &'static str,
    /// Unit in which tables show the measure.
    #[serde(skip)]
    pub unit: Unit,
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

impl Summary {
    /// Returns whether no policy is better, or the difference from the best is within chance.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.is_best
            || self
                .against_best
                .is_some_and(|difference| difference.is_tie)
    }
}

/// Returns every measure of every policy. `outcomes` has `seeds` outcomes of each policy, in the
/// same order of seeds, so that runs can be compared in pairs. Policies with equal best means are
/// all the best. The differences are `None` with a single seed.
#[must_use]
pub fn summarise(outcomes: &[Outcome], seeds: usize) -> Vec<Summary> {
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
                unit: measure.unit,
                policy: outcome.policy.clone(),
                mean,
                against_best: compared.and_then(|best| difference(values, best)),
                is_best,
            });
        }
    }
    summary
}
