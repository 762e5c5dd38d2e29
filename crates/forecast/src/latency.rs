//! Latency model: how long a worker takes to compute prompts, and how long one decode step takes.
//!
//! Similar workers share one latency model, and two speed factors set each worker apart: one for
//! prefill and one for decode. The shared model has the coefficients, which need samples of many
//! kinds. A speed factor follows the speed of one worker, within some hundred samples. Where the
//! shared model is wrong for all workers, the factors compensate. So a worker with few samples, or
//! with none lately, is given the mean factor of its peers. It would otherwise look slower than
//! they are and would never be tried (again).
//!
//! - Prefill: the first token of a prompt comes `prefill_base + prefill_per_token × p +
//!   prefill_per_attention_pair × p (s − p/2)` seconds after its worker has started the prompt: `p`
//!   tokens to compute of a prompt of `s`, each of which attends to all tokens before it. Prompts
//!   whose first tokens come in one step are one sample.
//! - Decode: a step that only decodes takes `decode_base + decode_per_request × n +
//!   decode_per_context_token × c` seconds: `n` requests whose prompts and outputs so far have `c`
//!   tokens.

use std::time::Duration;

use crate::latency_model::{LatencyAccuracy, LatencyModel, PrefillWork};
use crate::learned::{InvalidLearned, LearnedLatency, LearnedPhase, LearnedSpeed, check};
use crate::regression::Regression;

/// Initial prefill coefficients: roughly an 8B model on a small GPU. They no longer matter after
/// thirty samples.
const INITIAL_PREFILL: [f64; 3] = [0.02, 1e-4, 5e-9];
/// Initial decode coefficients, for the same model and GPU.
const INITIAL_DECODE_STEP: [f64; 3] = [0.02, 1e-4, 1e-7];

/// Weight of one more sample in a worker's speed factor.
const FACTOR_GAIN: f64 = 0.03;
/// Largest error of one sample that moves a speed factor, as a natural logarithm of a ratio.
const MAX_LOG_ERROR: f64 = 0.7;
/// Largest distance between first tokens of one step, as a fraction of the duration of the step.
const SAME_STEP_TOLERANCE_RATIO: f64 = 0.05;
/// Distance between first tokens that is always within one step.
const SAME_STEP_TOLERANCE: Duration = Duration::from_millis(1);
/// Weight of one more sample in a mean.
const MEAN_GAIN: f64 = 0.05;
/// Weight of one more sample in the mean speed factor of all similar workers.
const MEAN_FACTOR_GAIN: f64 = 0.01;
/// Number of samples after which a worker's own speed factor has full weight.
const FULL_WEIGHT_SAMPLES: f64 = 30.0;
/// Seconds without a sample after which a worker's own speed factor has half of its weight.
const STALENESS_HALF_LIFE_SECONDS: f64 = 60.0;

/// Latency model that similar workers share: coefficients for prefill and for decode.
#[derive(Clone, Debug)]
pub struct SharedLatencyModel {
    /// Features: 1, tokens to compute, attention pairs.
    prefill: PhaseModel,
    /// Features: 1, requests, context tokens.
    decode_step: PhaseModel,
}

impl Default for SharedLatencyModel {
    fn default() -> Self {
        Self {
            prefill: PhaseModel::new(INITIAL_PREFILL),
            decode_step: PhaseModel::new(INITIAL_DECODE_STEP),
        }
    }
}

/// Model of one phase, prefill or decode.
#[derive(Clone, Debug)]
struct PhaseModel {
    /// Seconds for one unit of each feature, for a worker with speed factor 1.
    regression: Regression<3>,
    /// Mean speed factor of the workers that it was learned from.
    mean_factor: f64,
}

impl PhaseModel {
    /// Returns a model with initial coefficients.
    fn new(initial: [f64; 3]) -> Self {
        Self {
            regression: Regression::new(initial),
            mean_factor: 1.0,
        }
    }

    /// Returns the coefficients for a worker with this speed factor, in seconds. A factor with few
    /// samples, or without any shortly before `now`, is replaced, in part, by the mean factor of
    /// all workers.
    #[inline]
    fn coefficients_for(&self, factor: &SpeedFactor, now: Duration) -> [f64; 3] {
        let blended = self.mean_factor + factor.weight(now) * (factor.value - self.mean_factor);
        self.regression
            .coefficients()
            .map(|coefficient| coefficient * blended)
    }

    /// Learns from work that took a worker `seconds` and ended at `now`: its speed factor first,
    /// then the shared coefficients. A factor without samples starts at the mean factor.
    fn observe(
        &mut self,
        factor: &mut SpeedFactor,
        features: &[f64; 3],
        seconds: f64,
        now: Duration,
    ) {
        factor.updated_at = now;
        if factor.samples == 0 {
            factor.value = self.mean_factor;
        }
        factor.samples = factor.samples.saturating_add(1);
        nudge_towards(
            &mut factor.value,
            seconds / self.regression.forecast(features),
        );
        self.regression.observe(features, seconds / factor.value);
        self.mean_factor += MEAN_FACTOR_GAIN * (factor.value - self.mean_factor);
    }

    /// Returns the accuracy of the forecasts of this phase.
    #[inline]
    fn accuracy(&self) -> LatencyAccuracy {
        LatencyAccuracy {
            samples: self.regression.samples(),
            mean_abs_relative_error: self.regression.mean_abs_relative_error(),
        }
    }
}

impl PhaseModel {
    /// Returns what was learned.
    fn learned(&self) -> LearnedPhase {
        LearnedPhase {
            coefficients: self.regression.coefficients(),
            covariance: self.regression.covariance(),
            mean_factor: self.mean_factor,
            mean_abs_relative_error: self.regression.mean_abs_relative_error(),
            samples: self.regression.samples(),
        }
    }

    /// Returns the model that learned `learned`, and otherwise starts with `initial` coefficients.
    fn restore(initial: [f64; 3], learned: &LearnedPhase) -> Result<Self, InvalidLearned> {
        let &LearnedPhase {
            coefficients,
            covariance,
            mean_factor,
            mean_abs_relative_error,
            samples,
        } = learned;
        check("coefficients", &coefficients, 0.0, MAX_SECONDS)?;
        check(
            "covariance",
            covariance.as_flattened(),
            -MAX_SECONDS,
            MAX_SECONDS,
        )?;
        let variances = [0, 1, 2].map(|index| covariance[index][index]);
        check("covariance", &variances, 0.0, MAX_SECONDS)?;
        check("mean_factor", &[mean_factor], MIN_FACTOR, 1.0 / MIN_FACTOR)?;
        check(
            "mean_abs_relative_error",
            &[mean_abs_relative_error],
            0.0,
            1e3,
        )?;
        let mut model = Self::new(initial);
        model.mean_factor = mean_factor;
        let regression = &mut model.regression;
        regression.restore(coefficients, covariance, mean_abs_relative_error, samples);
        Ok(model)
    }
}

/// Largest coefficient and variance that is restored, in seconds.
const MAX_SECONDS: f64 = 1e3;

/// Smallest speed factor that is restored. The largest is its inverse.
const MIN_FACTOR: f64 = 1e-3;

/// Speed of one worker relative to the shared model.
#[derive(Clone, Copy, Debug, Default)]
struct SpeedFactor {
    /// Ratio of the worker's durations to the shared forecast; above 1 is slower.
    value: f64,
    /// Number of samples.
    samples: u32,
    /// Time of the latest sample.
    updated_at: Duration,
}

/// Speed of one worker relative to the shared model, in both phases.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SpeedFactors {
    /// Speed factor of prefill.
    pub prefill: WeightedFactor,
    /// Speed factor of decode.
    pub decode: WeightedFactor,
}

/// Speed factor of one phase, and how much it counts.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WeightedFactor {
    /// Ratio of the worker's durations to the shared forecast; above 1 is slower.
    pub value: f64,
    /// Weight of `value` at the two requested times, from 0 to 1. The mean factor of all workers has
    /// the rest of the weight.
    pub weights: [f64; 2],
}

/// Prompts whose first tokens came in one engine step.
#[derive(Clone, Copy, Debug)]
struct PrefillStep {
    /// When the step started: when its first prompt was sent, or at the first token of the step
    /// before, whichever is later.
    started_at: Duration,
    /// When its first tokens came.
    first_token_at: Duration,
    /// Prefill work of its prompts.
    work: PrefillWork,
    /// Number of its prompts.
    prompts: u32,
    /// Whether a prompt had to wait for memory, so that the duration says nothing about computing.
    is_unreliable: bool,
}

/// Learns one worker's latency from the times at which its tokens arrive.
#[derive(Clone, Debug)]
pub struct LatencyEstimator {
    /// Speed factor of prefill.
    prefill_factor: SpeedFactor,
    /// Speed factor of decode.
    decode_factor: SpeedFactor,
    /// Latest step with first tokens. It is learned from when the next one begins.
    prefill_step: Option<PrefillStep>,
    /// Mean number of prompts whose first tokens come in one step.
    mean_prefill_batch: f64,
    /// Mean time of a decode step while prompts are computed, in seconds; 0 if unknown.
    mixed_step_seconds: f64,
    /// When the latest decode step was observed.
    last_step_at: Duration,
    /// Accuracy of the forecasts of the time to first token.
    ttft_accuracy: LatencyAccuracy,
}

impl Default for LatencyEstimator {
    fn default() -> Self {
        Self {
            prefill_factor: SpeedFactor::default(),
            decode_factor: SpeedFactor::default(),
            prefill_step: None,
            mean_prefill_batch: 1.0,
            mixed_step_seconds: 0.0,
            last_step_at: Duration::ZERO,
            ttft_accuracy: LatencyAccuracy::NONE,
        }
    }
}

impl SpeedFactor {
    /// Returns how much the factor counts at `now`, relative to the mean factor of all workers.
    #[inline]
    fn weight(&self, now: Duration) -> f64 {
        let age = now.saturating_sub(self.updated_at).as_secs_f64();
        let freshness = 1.0 / (1.0 + (age / STALENESS_HALF_LIFE_SECONDS).powi(2));
        (f64::from(self.samples) / FULL_WEIGHT_SAMPLES).min(1.0) * freshness
    }
}

impl SharedLatencyModel {
    /// Returns what was learned.
    #[must_use]
    pub fn learned(&self) -> LearnedLatency {
        LearnedLatency {
            prefill: self.prefill.learned(),
            decode_step: self.decode_step.learned(),
        }
    }

    /// Returns the model that has learned this.
    ///
    /// # Errors
    /// Fails if a number is not finite or out of range.
    pub fn restore(learned: &LearnedLatency) -> Result<Self, InvalidLearned> {
        Ok(Self {
            prefill: PhaseModel::restore(INITIAL_PREFILL, &learned.prefill)?,
            decode_step: PhaseModel::restore(INITIAL_DECODE_STEP, &learned.decode_step)?,
        })
    }

    /// Returns the mean speed factor and the coefficients of prefill, and those of decode steps.
    #[inline]
    #[must_use]
    pub fn mean_factors_and_coefficients(&self) -> [(f64, [f64; 3]); 2] {
        [&self.prefill, &self.decode_step]
            .map(|phase| (phase.mean_factor, phase.regression.coefficients()))
    }
}

impl LatencyEstimator {
    /// Returns the speed factors of prefill and of decode, each with its weight at the given times,
    /// relative to the mean factor of all workers.
    #[inline]
    #[must_use]
    pub fn speed_factors(&self, at: [Duration; 2]) -> SpeedFactors {
        let weighted = |factor: &SpeedFactor| WeightedFactor {
            value: factor.value,
            weights: at.map(|now| factor.weight(now)),
        };
        SpeedFactors {
            prefill: weighted(&self.prefill_factor),
            decode: weighted(&self.decode_factor),
        }
    }

    /// Returns the speed of this worker as of `now`. A factor counts as 0 without samples, or if the
    /// latest one is old.
    #[must_use]
    pub fn learned(&self, now: Duration) -> LearnedSpeed {
        let factor = |factor: &SpeedFactor| match factor.weight(now) {
            weight if weight > 0.5 => factor.value,
            _ => 0.0,
        };
        LearnedSpeed {
            prefill_factor: factor(&self.prefill_factor),
            decode_factor: factor(&self.decode_factor),
            mean_prefill_batch: self.mean_prefill_batch,
            mixed_step_seconds: self.mixed_step_seconds,
        }
    }

    /// Returns the estimator of a worker that had this speed just before `now`.
    ///
    /// # Errors
    /// Fails if a number is not finite or out of range.
    pub fn restore(learned: &LearnedSpeed, now: Duration) -> Result<Self, InvalidLearned> {
        let &LearnedSpeed {
            prefill_factor,
            decode_factor,
            mean_prefill_batch,
            mixed_step_seconds,
        } = learned;
        let factor = |field, value: f64| {
            if value == 0.0 {
                return Ok(SpeedFactor::default());
            }
            check(field, &[value], MIN_FACTOR, 1.0 / MIN_FACTOR)?;
            Ok(SpeedFactor {
                value,
                samples: FULL_WEIGHT_SAMPLES as u32,
                updated_at: now,
            })
        };
        check("mean_prefill_batch", &[mean_prefill_batch], 1.0, 1e6)?;
        check(
            "mixed_step_seconds",
            &[mixed_step_seconds],
            0.0,
            MAX_SECONDS,
        )?;
        Ok(Self {
            prefill_factor: factor("prefill_factor", prefill_factor)?,
            decode_factor: factor("decode_factor", decode_factor)?,
            mean_prefill_batch,
            mixed_step_seconds,
            ..Self::default()
        })
    }

    /// Forgets the speed factors, which are relative to a shared latency model, because the worker
    /// now uses another one.
    pub fn reset_factors(&mut self) {
        self.prefill_factor = SpeedFactor::default();
        self.decode_factor = SpeedFactor::default();
    }

    /// Compares the forecast of a time to first token with the observed time, both since the
    /// booking. Changes only [`ttft_accuracy`](Self::ttft_accuracy), to which an error of more than
    /// ten times the observed time counts as ten times.
    pub fn record_ttft_error(&mut self, forecast: Duration, observed: Duration) {
        let error = forecast.as_secs_f64() / observed.as_secs_f64().max(1e-6) - 1.0;
        let accuracy = &mut self.ttft_accuracy;
        accuracy.samples += 1;
        let gain = MEAN_GAIN.max(1.0 / accuracy.samples as f64);
        let change = error.abs().min(10.0) - accuracy.mean_abs_relative_error;
        accuracy.mean_abs_relative_error += gain * change;
    }

    /// Returns the accuracy of the forecasts of the time to first token.
    #[inline]
    #[must_use]
    pub fn ttft_accuracy(&self) -> LatencyAccuracy {
        self.ttft_accuracy
    }

    /// Returns the latency model of this worker: the shared coefficients, scaled by its speed
    /// factors. `now` decides how much an old speed factor counts. All times in this module are
    /// since the epoch that the caller chose.
    #[inline]
    #[must_use]
    pub fn latency_model(&self, shared: &SharedLatencyModel, now: Duration) -> LatencyModel {
        let [prefill_base, prefill_per_token, prefill_per_attention_pair] =
            shared.prefill.coefficients_for(&self.prefill_factor, now);
        let [decode_base, decode_per_request, decode_per_context_token] = shared
            .decode_step
            .coefficients_for(&self.decode_factor, now);
        LatencyModel {
            prefill_base,
            prefill_per_token,
            prefill_per_attention_pair,
            decode_base,
            decode_per_request,
            decode_per_context_token,
            prefill_accuracy: shared.prefill.accuracy(),
            decode_accuracy: shared.decode_step.accuracy(),
        }
    }

    /// Returns the mean number of prompts whose first tokens come in one step.
    #[inline]
    #[must_use]
    pub fn mean_prefill_batch(&self) -> f64 {
        self.mean_prefill_batch
    }

    /// Returns the mean time of a decode step while prompts are computed, in seconds; 0 if none was
    /// observed.
    #[inline]
    #[must_use]
    pub fn mixed_step_seconds(&self) -> f64 {
        self.mixed_step_seconds
    }

    /// Returns when the latest prefill step had its first tokens, since the epoch that the caller
    /// chose; zero if none was observed.
    #[inline]
    #[must_use]
    pub fn first_token_at(&self) -> Duration {
        self.prefill_step
            .map_or(Duration::ZERO, |step| step.first_token_at)
    }

    /// Learns from the first token, at `now`, of a prompt that was sent at `sent_at`, with `work`
    /// to compute. `is_unreliable` means that the prompt may have waited for memory: its step is
    /// then not learned from. Returns whether the token is the first of its step. The engine has
    /// then just started the next step.
    ///
    /// A step is learned from, into this estimator and into `shared`, only when the first token of
    /// the next step comes.
    pub fn observe_first_token(
        &mut self,
        shared: &mut SharedLatencyModel,
        work: PrefillWork,
        sent_at: Duration,
        is_unreliable: bool,
        now: Duration,
    ) -> bool {
        if let Some(prefill_step) = &mut self.prefill_step {
            let duration = prefill_step
                .first_token_at
                .saturating_sub(prefill_step.started_at);
            let tolerance = duration
                .mul_f64(SAME_STEP_TOLERANCE_RATIO)
                .max(SAME_STEP_TOLERANCE);
            if now.saturating_sub(prefill_step.first_token_at) <= tolerance {
                prefill_step.work += work;
                prefill_step.prompts += 1;
                prefill_step.is_unreliable |= is_unreliable;
                return false;
            }
        }
        let previous = self.prefill_step.take();
        if let Some(previous) = previous {
            self.fit_prefill(shared, previous);
        }
        let idle_from = previous.map_or(Duration::ZERO, |step| step.first_token_at);
        self.prefill_step = Some(PrefillStep {
            started_at: sent_at.max(idle_from),
            first_token_at: now,
            work,
            prompts: 1,
            is_unreliable,
        });
        true
    }

    /// Learns from a finished prefill step: batch size, speed factor and shared coefficients. No
    /// effect if the step is unreliable or computed no token.
    fn fit_prefill(&mut self, shared: &mut SharedLatencyModel, prefill_step: PrefillStep) {
        if prefill_step.is_unreliable || prefill_step.work.new_tokens == 0 {
            return;
        }
        self.mean_prefill_batch +=
            MEAN_GAIN * (f64::from(prefill_step.prompts) - self.mean_prefill_batch);
        let seconds = prefill_step
            .first_token_at
            .saturating_sub(prefill_step.started_at)
            .as_secs_f64();
        let PrefillWork {
            new_tokens,
            attention_pairs,
        } = prefill_step.work;
        let features = [1.0, new_tokens as f64, attention_pairs as f64];
        shared.prefill.observe(
            &mut self.prefill_factor,
            &features,
            seconds,
            prefill_step.first_token_at,
        );
    }

    /// Learns from `tokens` further tokens of a request, the token before them `elapsed` ago. The
    /// decode batch has `requests` requests with `context_tokens` tokens. `beside_prefill` means
    /// that the worker computed prompts meanwhile: the step then counts only in
    /// [`mixed_step_seconds`](Self::mixed_step_seconds).
    ///
    /// Returns whether this is the first observation of its step. Further ones of the same step are
    /// ignored, and so are calls without tokens or elapsed time: they return false.
    pub fn observe_step(
        &mut self,
        shared: &mut SharedLatencyModel,
        tokens: u32,
        elapsed: Duration,
        beside_prefill: bool,
        (requests, context_tokens): (u32, u64),
        now: Duration,
    ) -> bool {
        if tokens == 0 || elapsed.is_zero() || now.saturating_sub(self.last_step_at) < elapsed / 2 {
            // Another request of the batch reported this step already.
            return false;
        }
        self.last_step_at = now;
        let seconds = elapsed.as_secs_f64() / f64::from(tokens);
        if beside_prefill {
            let mean = if self.mixed_step_seconds > 0.0 {
                self.mixed_step_seconds
            } else {
                seconds
            };
            self.mixed_step_seconds = mean + MEAN_GAIN * (seconds - mean);
            return true;
        }
        let features = [1.0, f64::from(requests), context_tokens as f64];
        shared
            .decode_step
            .observe(&mut self.decode_factor, &features, seconds, now);
        true
    }
}

/// Moves a speed factor towards the ratio of one sample, by a small and limited step. A ratio that
/// is not positive and finite is ignored.
fn nudge_towards(factor: &mut f64, sampled: f64) {
    let log_error = (sampled / *factor).ln();
    if log_error.is_finite() {
        let limited = log_error.clamp(-MAX_LOG_ERROR, MAX_LOG_ERROR);
        *factor = (*factor * (FACTOR_GAIN * limited).exp()).clamp(1e-6, 1e6);
    }
}

#[cfg(test)]
mod tests;
