//! Learned models as plain values, which can be stored and given to another process.

use serde::{Deserialize, Serialize};

/// Latency model of one group of similar workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearnedLatency {
    /// Prefill. Features: 1, tokens to compute, attention pairs.
    pub prefill: LearnedPhase,
    /// Decode steps. Features: 1, requests, context tokens.
    pub decode_step: LearnedPhase,
}

/// Latency model of one phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearnedPhase {
    /// Seconds for one unit of each feature.
    pub coefficients: [f64; 3],
    /// Covariance of the coefficients.
    pub covariance: [[f64; 3]; 3],
    /// Mean speed factor of the workers.
    pub mean_factor: f64,
    /// Mean absolute relative error of the forecasts.
    pub mean_abs_relative_error: f64,
    /// Number of samples.
    pub samples: u64,
}

/// Speed of one worker relative to its group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearnedSpeed {
    /// Ratio of the worker's prefill durations to the group's forecasts; 0 without samples.
    pub prefill_factor: f64,
    /// Ratio of the durations of its decode steps to the forecasts; 0 without samples.
    pub decode_factor: f64,
    /// Mean number of prompts whose first tokens come in one step.
    pub mean_prefill_batch: f64,
    /// Mean time of a decode step while prompts are computed, in seconds; 0 if unknown.
    pub mixed_step_seconds: f64,
}

/// Output lengths of all requests, and of each class.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LearnedLengths {
    /// Lengths of all outputs.
    pub all: Vec<LengthBin>,
    /// Lengths by class.
    pub by_class: Vec<(u64, Vec<LengthBin>)>,
}

/// Outputs of similar length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthBin {
    /// Number of outputs, older ones counted less.
    pub outputs: f32,
    /// Sum of their tokens, with the same weights.
    pub tokens: f32,
}

/// Error for a value that no model has learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidLearned {
    /// Name of the field.
    pub field: &'static str,
}

impl std::fmt::Display for InvalidLearned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` is out of range", self.field)
    }
}

impl std::error::Error for InvalidLearned {}

/// Checks that numbers are finite and from `min` to `max`.
pub(crate) fn check(
    field: &'static str,
    values: &[f64],
    min: f64,
    max: f64,
) -> Result<(), InvalidLearned> {
    let is_valid = values.iter().all(|value| (min..=max).contains(value));
    if is_valid {
        Ok(())
    } else {
        Err(InvalidLearned { field })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{LatencyEstimator, OutputLengthModel, PrefillWork, SharedLatencyModel};

    /// Returns a latency model, a worker that is twice as slow as another one, and the time.
    fn learned() -> (SharedLatencyModel, LatencyEstimator, Duration) {
        let mut shared = SharedLatencyModel::default();
        let mut workers = [LatencyEstimator::default(), LatencyEstimator::default()];
        let mut now = Duration::ZERO;
        for round in 0..400_u32 {
            for (worker, factor) in workers.iter_mut().zip([1.0, 2.0]) {
                let tokens = 500 + 37 * (round % 100);
                let sent_at = now;
                now += Duration::from_secs_f64(factor * (0.03 + 5e-5 * f64::from(tokens)));
                let work = PrefillWork::new(tokens, tokens);
                worker.observe_first_token(&mut shared, work, sent_at, false, now);
                for requests in 1..4 {
                    let step = factor * (0.01 + 1e-3 * f64::from(requests));
                    let elapsed = Duration::from_secs_f64(step);
                    now += elapsed;
                    let batch = (requests, 100);
                    worker.observe_step(&mut shared, 1, elapsed, false, batch, now);
                }
            }
        }
        let [_, slow] = workers;
        (shared, slow, now)
    }

    #[test]
    fn a_restored_model_forecasts_as_the_learned_one() {
        let (shared, worker, now) = learned();
        let (stored, speed) = (shared.learned(), worker.learned(now));
        let restored = SharedLatencyModel::restore(&stored).unwrap();
        assert_eq!(restored.learned(), stored);
        let restored_worker = LatencyEstimator::restore(&speed, now).unwrap();
        let model = restored_worker.latency_model(&restored, now);
        let seconds = model.prefill_seconds(1.0, PrefillWork::new(1000, 1000));
        let expected = 2.0 * (0.03 + 0.05);
        assert!((seconds / expected - 1.0).abs() < 0.1, "{seconds}");
        let step = model.decode_step_seconds(2.0, 100.0);
        assert!((step / 0.024 - 1.0).abs() < 0.1, "{step}");
    }

    #[test]
    fn a_restored_model_of_lengths_forecasts_as_the_learned_one() {
        let mut lengths = OutputLengthModel::default();
        for tokens in 0..1000 {
            lengths.observe(7, 20 + tokens % 50, false);
            lengths.observe(9, 900, false);
        }
        let restored = OutputLengthModel::restore(&lengths.learned()).unwrap();
        for (class, generated) in [(7, 0), (7, 30), (9, 0), (11, 0), (11, 400)] {
            assert_eq!(
                restored.remaining(class, generated, None),
                lengths.remaining(class, generated, None)
            );
        }
    }

    #[test]
    fn values_that_no_model_learns_are_refused() {
        let (shared, worker, _) = learned();
        let valid = shared.learned();
        for change in [
            |phase: &mut LearnedPhase| phase.coefficients[1] = -1.0,
            |phase: &mut LearnedPhase| phase.coefficients[0] = f64::NAN,
            |phase: &mut LearnedPhase| phase.covariance[2][2] = f64::INFINITY,
            |phase: &mut LearnedPhase| phase.mean_factor = 0.0,
            |phase: &mut LearnedPhase| phase.mean_abs_relative_error = -1.0,
        ] {
            let mut invalid = valid.clone();
            change(&mut invalid.decode_step);
            assert!(
                SharedLatencyModel::restore(&invalid).is_err(),
                "{invalid:?}"
            );
        }
        let mut speed = worker.learned(Duration::ZERO);
        speed.decode_factor = f64::NAN;
        assert!(LatencyEstimator::restore(&speed, Duration::ZERO).is_err());
        let bin = LengthBin {
            outputs: 1.0,
            tokens: f32::INFINITY,
        };
        let lengths = LearnedLengths {
            all: vec![bin],
            ..LearnedLengths::default()
        };
        assert!(OutputLengthModel::restore(&lengths).is_err());
    }
}
