//! Errors of the router's forecasts: its learned worker speeds and output lengths, compared with
//! the true values of the simulation.

use std::time::Duration;

use foresee_core::OutputLengthAccuracy;
use foresee_core::workers::WorkerSnapshot;

use serde::Serialize;

use crate::step_time::{BatchLoad, StepTimeModel};

/// Errors of the router's forecasts, as means over the samples of a run.
///
/// An error is a fraction of the true value: 0.1 is off by 10 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ForecastErrors {
    /// Mean absolute error of the prefill time of a prompt of 1,000 tokens, over workers. The true
    /// time includes the worker's current decodes, and half a decode step before the prefill.
    pub prefill: f64,
    /// Mean absolute error of the duration of a worker's current decode step, over workers.
    pub decode_step: f64,
    /// Mean absolute error of the time to first token, over workers.
    pub time_to_first_token: f64,
    /// Mean absolute error of the number of output tokens, as a fraction of the mean output.
    pub output_length: f64,
    /// Ratio of generated to forecast output tokens; 1 is unbiased.
    pub output_length_bias: f64,
    /// Mean time from a change of a worker's speed until its decode step is known to 10 %, in
    /// seconds; 0 if no speed changed during the run.
    pub recovery: f64,
}

/// A change of a worker's speed that the router has not learned yet.
#[derive(Clone, Copy, Debug)]
struct SpeedChange {
    /// Index of the worker in the fleet.
    worker: usize,
    /// Time of the change.
    at: Duration,
}

/// Collects the errors of a run. The means become [`ForecastErrors`].
#[derive(Debug, Default)]
pub(crate) struct ForecastMonitor {
    prefill: Mean,
    decode_step: Mean,
    time_to_first_token: Mean,
    output_length: Mean,
    output_length_bias: Mean,
    recovery: Mean,
    /// Speed changes that the router has not learned yet.
    unlearned: Vec<SpeedChange>,
}

/// Running arithmetic mean.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    samples: u32,
}

impl Mean {
    fn add(&mut self, sample: f64) {
        self.sum += sample;
        self.samples += 1;
    }

    /// Returns the mean; 0 without samples.
    fn value(self) -> f64 {
        self.sum / f64::from(self.samples.max(1))
    }
}

/// Length of the prompt whose prefill time is compared.
const PROBE_PROMPT_TOKENS: u32 = 1000;
/// Number of outputs from which on their length is compared. Short outputs end first, so earlier
/// samples are biased.
const MIN_OUTPUTS: u64 = 100;
/// Error of a decode step up to which a new speed counts as learned.
const RECOVERED_WITHIN: f64 = 0.1;

impl ForecastMonitor {
    /// Records that the speed of `worker` changed at `now`. A change at time zero is ignored: the
    /// router has learned nothing before.
    pub(crate) fn note_speed_change(&mut self, worker: usize, now: Duration) {
        if now > Duration::ZERO {
            self.unlearned.push(SpeedChange { worker, at: now });
        }
    }

    /// Compares what the router knows about a worker at `now` with the truth: the step-time model
    /// of the engine, its speed relative to that, and the decodes that are in progress.
    ///
    /// Adds no error of a model that has not learned anything, and none of a decode step while
    /// nothing is decoded. A decode step known to [`RECOVERED_WITHIN`] ends the recovery from all
    /// earlier speed changes of the worker. The error of the time to first token is the router's
    /// own account.
    pub(crate) fn take(
        &mut self,
        now: Duration,
        worker: usize,
        known: &WorkerSnapshot,
        (step_time, speed): (&StepTimeModel, f64),
        decodes: &BatchLoad,
    ) {
        let seconds = |load: &BatchLoad| step_time.mean(load).as_secs_f64() / speed;
        let relative_error = |known: f64, truth: f64| (known / truth - 1.0).abs();
        let has_decodes = decodes.sequences > 0;
        if known.latency.prefill_accuracy.samples > 0 {
            let mut prefill_step = *decodes;
            prefill_step.add_prefill(PROBE_PROMPT_TOKENS, 0);
            let step_left = if has_decodes {
                seconds(decodes) / 2.0
            } else {
                0.0
            };
            let learned = f64::from(PROBE_PROMPT_TOKENS) / known.latency.prefill_speed();
            let truth = step_left + seconds(&prefill_step);
            self.prefill.add(relative_error(learned, truth));
        }
        let ttft = known.ttft_accuracy;
        if ttft.samples > 0 {
            self.time_to_first_token.add(ttft.mean_abs_relative_error);
        }
        if known.latency.decode_accuracy.samples > 0 && has_decodes {
            let learned = known.inter_token_latency.as_secs_f64();
            let error = relative_error(learned, seconds(decodes));
            self.decode_step.add(error);
            if error <= RECOVERED_WITHIN {
                let recovery = &mut self.recovery;
                self.unlearned.retain(|change| {
                    let is_learned = change.worker == worker;
                    if is_learned {
                        recovery.add((now - change.at).as_secs_f64());
                    }
                    !is_learned
                });
            }
        }
    }

    /// Adds the router's own account of its output length forecasts. Ignored before [`MIN_OUTPUTS`]
    /// outputs.
    pub(crate) fn take_lengths(&mut self, accuracy: OutputLengthAccuracy) {
        if accuracy.outputs >= MIN_OUTPUTS {
            self.output_length.add(accuracy.mean_abs_relative_error);
            self.output_length_bias.add(accuracy.bias);
        }
    }

    /// Returns the mean errors of the run. Speed changes that the router has not learned count
    /// until `end`. A mean without samples is 0.
    pub(crate) fn finish(&self, end: Duration) -> ForecastErrors {
        let mut recovery = self.recovery;
        for change in &self.unlearned {
            recovery.add(end.saturating_sub(change.at).as_secs_f64());
        }
        ForecastErrors {
            prefill: self.prefill.value(),
            decode_step: self.decode_step.value(),
            time_to_first_token: self.time_to_first_token.value(),
            output_length: self.output_length.value(),
            output_length_bias: self.output_length_bias.value(),
            recovery: recovery.value(),
        }
    }
}
