//! The step-time model of the simulated engine: a parametrised roofline, and presets for models on
//! accelerators.

use std::time::Duration;

use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// The work of one engine step, summed over the sequences scheduled in it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BatchLoad {
    /// Tokens computed: one for each decode, a chunk for each prefill.
    pub scheduled_tokens: u32,
    /// Σ new tokens × their mean context, over prefill chunks: the work of prefill attention.
    pub prefill_attention: f64,
    /// Σ context tokens over decodes: what decode attention reads from the KV cache.
    pub decode_context: u64,
    /// Sequences scheduled.
    pub sequences: u32,
}

impl BatchLoad {
    /// Adds a decode: one token computed on top of `context` tokens.
    pub fn add_decode(&mut self, context: u32) {
        self.scheduled_tokens += 1;
        self.decode_context += u64::from(context);
        self.sequences += 1;
    }

    /// Adds a prefill chunk of `new` tokens on top of `context` tokens.
    pub fn add_prefill(&mut self, new: u32, context: u32) {
        self.scheduled_tokens += new;
        let mean_context = f64::from(context) + f64::from(new) / 2.0;
        self.prefill_attention += f64::from(new) * mean_context;
        self.sequences += 1;
    }
}

/// The time a step takes, in seconds:
///
/// `overhead + max(floor, per_token × tokens) + per_prefill_attention × Σ new·context
/// + per_context_token × Σ decode context + per_sequence × sequences`,
///
/// times log-normal noise of mean 1. The `max` is the roofline: below it a step waits for the
/// weights to be read, above it for arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTimeModel {
    /// Scheduling and launch, paid by every step.
    pub overhead: f64,
    /// Reading the weights once: no step is shorter, however few tokens it computes.
    pub floor: f64,
    /// Arithmetic per scheduled token.
    pub per_token: f64,
    /// Attention per pair of a new prefill token and a token of its context.
    pub per_prefill_attention: f64,
    /// Reading the KV cache, per context token of a decode.
    pub per_context_token: f64,
    /// Sampling and bookkeeping per sequence.
    pub per_sequence: f64,
    /// Standard deviation of the logarithm of the noise; 0 for none.
    pub noise: f64,
}

impl StepTimeModel {
    /// Returns the duration of a step without noise.
    #[must_use]
    pub fn mean(&self, load: &BatchLoad) -> Duration {
        Duration::from_secs_f64(self.mean_seconds(load))
    }

    /// Returns the duration of a step with noise drawn from `rng`, which is not used if `noise` is
    /// 0.
    pub fn sample(&self, load: &BatchLoad, rng: &mut impl Rng) -> Duration {
        let mut seconds = self.mean_seconds(load);
        if self.noise > 0.0 {
            let normal: f64 = StandardNormal.sample(rng);
            // Subtracting half the variance makes the mean of the factor 1.
            seconds *= (self.noise * normal - self.noise * self.noise / 2.0).exp();
        }
        Duration::from_secs_f64(seconds)
    }

    fn mean_seconds(&self, load: &BatchLoad) -> f64 {
        self.overhead
            + self
                .floor
                .max(self.per_token * f64::from(load.scheduled_tokens))
            + self.per_prefill_attention * load.prefill_attention
            + self.per_context_token * load.decode_context as f64
            + self.per_sequence * f64::from(load.sequences)
    }
}

/// A model on an accelerator: its step-time model and its sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preset {
    /// Name in `--engine-preset`.
    pub name: &'static str,
    /// Model and accelerator, for `--help`.
    pub description: &'static str,
    /// Coefficients of the duration of a step.
    pub step_time: StepTimeModel,
    /// Capacity of the KV cache, in tokens.
    pub kv_tokens: u32,
    /// Maximum number of tokens computed in one step (vLLM's `max_num_batched_tokens`).
    pub max_num_batched_tokens: u32,
}

/// Standard deviation of the logarithm of the noise in all presets.
const NOISE: f64 = 0.05;

/// An 8B model on one L40S.
///
/// Floor: 16 GB of bf16 weights at 864 GB/s, plus the losses of kernels. Per token: interpolated by
/// arithmetic rate between Vidur's `mlp.csv` profiles of Llama-3-8B on A100 (67 µs a token, 9.7 ms
/// floor) and Llama-2-7B on A40 (127 µs, 23.9 ms). Per context token: Preble's fit on A6000
/// (1.86e-7 s at 768 GB/s). Prefill attention: about 35 % of peak arithmetic.
pub const L40S_8B: Preset = Preset {
    name: "l40s-8b",
    description: "8B model on one L40S",
    step_time: StepTimeModel {
        overhead: 1.5e-3,
        floor: 20.5e-3,
        per_token: 85e-6,
        per_prefill_attention: 4.1e-9,
        per_context_token: 1.9e-7,
        per_sequence: 30e-6,
        noise: NOISE,
    },
    kv_tokens: 190_000,
    max_num_batched_tokens: 2048,
};

/// A 70B model on four H100 with tensor parallelism.
///
/// Vidur's profile of Llama-2-70b on H100 TP4 (54 µs a token, 14.3 ms floor) plus all-reduce:
/// 0.167 ms per 33 MB, 160 times a step, is 13 µs a token. Preble measured 80 µs and 18.7 ms on
/// H100 TP2. Prefill attention: about 35 % of peak arithmetic.
pub const H100_70B_TP4: Preset = Preset {
    name: "h100-70b-tp4",
    description: "70B model on four H100, tensor parallel",
    step_time: StepTimeModel {
        overhead: 1.5e-3,
        floor: 17.5e-3,
        per_token: 67e-6,
        per_prefill_attention: 1.9e-9,
        per_context_token: 3.1e-8,
        per_sequence: 30e-6,
        noise: NOISE,
    },
    kv_tokens: 437_000,
    max_num_batched_tokens: 8192,
};

/// All presets, in the order to list them.
pub const PRESETS: [&Preset; 2] = [&L40S_8B, &H100_70B_TP4];

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn a_lone_decode_takes_the_floor() {
        let mut load = BatchLoad::default();
        load.add_decode(1000);
        let expected = 0.0015 + 0.0205 + 1000.0 * 1.9e-7 + 30e-6;
        assert!((L40S_8B.step_time.mean(&load).as_secs_f64() - expected).abs() < 1e-9);
    }

    #[test]
    fn a_full_chunk_is_bound_by_arithmetic() {
        let mut load = BatchLoad::default();
        load.add_prefill(8192, 0);
        let expected = 0.0015 + 8192.0 * 67e-6 + 8192.0 * 4096.0 * 1.9e-9 + 30e-6;
        assert!((H100_70B_TP4.step_time.mean(&load).as_secs_f64() - expected).abs() < 1e-9);
    }

    #[test]
    fn noise_has_mean_one_and_repeats_with_its_seed() {
        let mut load = BatchLoad::default();
        load.add_decode(1000);
        let draw = |seed| {
            let mut rng = SmallRng::seed_from_u64(seed);
            (0..4000)
                .map(|_| L40S_8B.step_time.sample(&load, &mut rng).as_secs_f64())
                .collect::<Vec<_>>()
        };
        let samples = draw(1);
        assert_eq!(samples, draw(1));
        assert_ne!(samples, draw(2));
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let without = L40S_8B.step_time.mean(&load).as_secs_f64();
        assert!((mean / without - 1.0).abs() < 0.005);
    }
}
