//! What a router has learned of its workers' speed and of answers' lengths, against the truth.

use std::time::Duration;

use foresee_core::LengthForecast;
use foresee_core::fleet::WorkerSnapshot;

use serde::Serialize;

use crate::law::{StepLaw, StepLoad};

/// How far what was learned is from the truth, as shares of that: means over the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Learning {
    /// What a prompt of a thousand tokens takes, beside what the worker decodes then and from
    /// somewhere in the step before on: mean absolute error, over workers.
    pub prefill: f64,
    /// What one more token takes of everybody who decodes then: the same.
    pub step: f64,
    /// When the first token would come: the same.
    pub time_to_first_token: f64,
    /// How long an answer would be: mean absolute error.
    pub length: f64,
    /// What answers had over what was forecast, all together.
    pub length_bias: f64,
    /// Seconds until a worker's step was known to a tenth after its speed had changed, on average;
    /// 0 if none changed in mid-run.
    pub recovery: f64,
}

/// A worker's speed has changed, and is not known yet.
#[derive(Clone, Copy, Debug)]
struct Changed {
    worker: usize,
    at: Duration,
}

/// Errors as they are met.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    prefill: Mean,
    step: Mean,
    time_to_first_token: Mean,
    length: Mean,
    length_bias: Mean,
    recovery: Mean,
    changed: Vec<Changed>,
}

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

    fn value(self) -> f64 {
        self.sum / f64::from(self.samples.max(1))
    }
}

const PROMPT: u32 = 1000;
/// The first answers to end are short ones, and say nothing of what the others had.
const FEW_ANSWERS: u64 = 100;
/// As near as this is known.
const NEAR: f64 = 0.1;

impl Watch {
    /// The worker has another speed from now on.
    pub(crate) fn changes(&mut self, worker: usize, now: Duration) {
        if now > Duration::ZERO {
            self.changed.push(Changed { worker, at: now });
        }
    }

    /// What is known `now` of a worker that follows `law`, so many times as fast, and decodes what
    /// `decodes` says.
    pub(crate) fn take(
        &mut self,
        now: Duration,
        worker: usize,
        known: &WorkerSnapshot,
        (law, speed): (&StepLaw, f64),
        decodes: &StepLoad,
    ) {
        let takes = |load: &StepLoad| law.mean(load).as_secs_f64() / speed;
        let off = |known: f64, truth: f64| (known / truth - 1.0).abs();
        let decodes_any = decodes.sequences > 0;
        if known.pace.samples[0] > 0 {
            let mut prompt = *decodes;
            prompt.add_prefill(PROMPT, 0);
            let step_left = if decodes_any {
                takes(decodes) / 2.0
            } else {
                0.0
            };
            let learned = f64::from(PROMPT) / known.pace.prefill_speed();
            self.prefill.add(off(learned, step_left + takes(&prompt)));
        }
        let (forecasts, error) = known.first_token_error;
        if forecasts > 0 {
            self.time_to_first_token.add(error);
        }
        if known.pace.samples[1] > 0 && decodes_any {
            let error = off(known.inter_token_latency.as_secs_f64(), takes(decodes));
            self.step.add(error);
            if error <= NEAR {
                let recovery = &mut self.recovery;
                self.changed.retain(|it| {
                    let is_its = it.worker == worker;
                    if is_its {
                        recovery.add((now - it.at).as_secs_f64());
                    }
                    !is_its
                });
            }
        }
    }

    /// How well lengths of answers are known.
    pub(crate) fn take_lengths(&mut self, known: LengthForecast) {
        if known.answers >= FEW_ANSWERS {
            self.length.add(known.error);
            self.length_bias.add(known.bias);
        }
    }

    pub(crate) fn finish(&self, end: Duration) -> Learning {
        let mut recovery = self.recovery;
        for changed in &self.changed {
            recovery.add(end.saturating_sub(changed.at).as_secs_f64());
        }
        Learning {
            prefill: self.prefill.value(),
            step: self.step.value(),
            time_to_first_token: self.time_to_first_token.value(),
            length: self.length.value(),
            length_bias: self.length_bias.value(),
            recovery: recovery.value(),
        }
    }
}
