//! The number of workers that a load needs so that its requests keep within limits of latency.
//!
//! A worker is taken as a server that shares its time among its requests. Of a request with `p` tokens
//! to compute in a prompt of `s` tokens, and `o` tokens of output, the prefill takes `P` seconds, and
//! decoding takes `D = o × (decode_per_request + decode_per_context_token × (s + o/2))` seconds of
//! steps that it shares. At `x` requests per second the worker is utilised to `u = x (P + D)`, and
//! everything takes `1 / (1 - u)` times as long as on an idle worker:
//!
//! - the mean time between tokens is `decode_base / (1 - u)`;
//! - the time to first token of 95 % of the requests is `P + decode_base + P × ln(u / 0.05) / (1 - u)`.
//!   The last term is the 95th percentile of the waiting time in an M/M/1 queue, which is 0 below
//!   `u = 0.05`;
//! - by Little's law, `x (P + o × decode_base) / (1 - u)` requests run at the same time, and each
//!   occupies memory for `s + o/2` tokens.
//!
//! The largest `x` within the limits is what a worker sustains.

use crate::{LatencyModel, PrefillWork};

/// Largest utilisation of a worker, whatever the limits allow. Queues grow without bound towards 1.
const MAX_UTILISATION: f64 = 0.9;

/// Fraction of a worker's memory that running requests may occupy. Engines preempt requests when they
/// need more.
const MAX_MEMORY_FRACTION: f64 = 0.9;

/// Fraction of the requests that may exceed the limit of the time to first token.
const MISSED_FRACTION: f64 = 0.05;

/// Mean lengths of the requests of a load, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MeanLengths {
    /// Prompt tokens.
    pub prompt_tokens: f64,
    /// Prompt tokens that are not found in a cache.
    pub new_tokens: f64,
    /// Output tokens.
    pub output_tokens: f64,
}

/// Limits of latency, in seconds; `None` for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LatencyLimits {
    /// Limit for the time to first token of 95 % of the requests.
    pub ttft: Option<f64>,
    /// Limit for the mean time between two output tokens.
    pub itl: Option<f64>,
}

/// Returns how many requests per second a worker sustains within the limits. `capacity_tokens` is the
/// size of its KV cache.
///
/// A limit that an idle worker would not meet either is ignored, because further workers do not help.
/// Infinite if the latency model says that the requests take no time.
#[must_use]
pub fn sustainable_rate(
    latency: &LatencyModel,
    capacity_tokens: f64,
    lengths: &MeanLengths,
    limits: &LatencyLimits,
) -> f64 {
    let MeanLengths {
        prompt_tokens,
        new_tokens,
        output_tokens,
    } = *lengths;
    let work = PrefillWork::new(new_tokens.min(prompt_tokens) as u32, prompt_tokens as u32);
    let prefill = latency.prefill_seconds(1.0, work);
    let context = prompt_tokens + output_tokens / 2.0;
    let decode_step = latency.decode_per_request + latency.decode_per_context_token * context;
    let shared = prefill + output_tokens * decode_step;
    if shared <= 0.0 {
        return f64::INFINITY;
    }
    let base = latency.decode_base;
    let mut utilisation = MAX_UTILISATION;
    if let Some(itl) = limits.itl.filter(|itl| *itl > base) {
        utilisation = utilisation.min(1.0 - base / itl);
    }
    if let Some(ttft) = limits.ttft.filter(|ttft| *ttft > prefill + base) {
        let spare = (ttft - prefill - base) / prefill;
        utilisation = utilisation.min(utilisation_with_wait(spare));
    }
    let by_time = utilisation / shared;
    // x (P + o × base) / (1 - x × shared) × context <= memory
    let memory = capacity_tokens * MAX_MEMORY_FRACTION;
    let alone = (prefill + output_tokens * base) * context;
    let by_memory = memory / (alone + memory * shared);
    by_time.min(by_memory)
}

/// Returns the utilisation at which the 95th percentile of the waiting time in an M/M/1 queue is
/// `wait` service times.
fn utilisation_with_wait(wait: f64) -> f64 {
    let waiting_time =
        |utilisation: f64| (utilisation / MISSED_FRACTION).ln() / (1.0 - utilisation);
    let (mut low, mut high) = (MISSED_FRACTION, MAX_UTILISATION);
    // Each step halves the interval; the last one is far below the accuracy of the model.
    for _ in 0..30 {
        let middle = f64::midpoint(low, high);
        if waiting_time(middle) <= wait {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: LatencyModel = LatencyModel {
        prefill_base: 0.01,
        prefill_per_token: 1e-4,
        prefill_per_attention_pair: 0.0,
        decode_base: 0.02,
        decode_per_request: 1e-4,
        decode_per_context_token: 1e-7,
        prefill_accuracy: crate::LatencyAccuracy::NONE,
        decode_accuracy: crate::LatencyAccuracy::NONE,
    };

    const LENGTHS: MeanLengths = MeanLengths {
        prompt_tokens: 1000.0,
        new_tokens: 900.0,
        output_tokens: 100.0,
    };

    /// Large enough that memory is no limit.
    const MEMORY: f64 = 1e9;

    fn rate(ttft: Option<f64>, itl: Option<f64>) -> f64 {
        sustainable_rate(&LATENCY, MEMORY, &LENGTHS, &LatencyLimits { ttft, itl })
    }

    #[test]
    fn the_limits_hold_at_the_sustained_rate_and_not_above_it() {
        // 0.1 s of prefill, and 100 steps of 0.205 ms each.
        let (prefill, shared) = (0.1, 0.1 + 100.0 * 2.05e-4);
        let unlimited = rate(None, None);
        assert!((unlimited * shared - MAX_UTILISATION).abs() < 1e-9);
        let utilisation = rate(None, Some(0.05)) * shared;
        assert!((0.02 / (1.0 - utilisation) - 0.05).abs() < 1e-9);
        let utilisation = rate(Some(0.5), None) * shared;
        let wait = prefill * (utilisation / 0.05).ln() / (1.0 - utilisation);
        assert!((prefill + 0.02 + wait - 0.5).abs() < 1e-6);
        assert!(rate(Some(0.5), Some(0.05)) <= rate(Some(0.5), None));
    }

    #[test]
    fn a_limit_that_no_number_of_workers_meets_is_ignored() {
        let unlimited = rate(None, None);
        assert!((rate(Some(0.01), Some(0.001)) - unlimited).abs() < 1e-9);
    }

    #[test]
    fn memory_bounds_the_requests_that_run_at_once() {
        let limits = LatencyLimits::default();
        let memory = 5_000.0;
        let rate = sustainable_rate(&LATENCY, memory, &LENGTHS, &limits);
        let shared = 0.1 + 100.0 * 2.05e-4;
        let running = rate * (0.1 + 100.0 * 0.02) / (1.0 - rate * shared);
        assert!((running * 1050.0 - 0.9 * memory).abs() < 1e-6);
    }

    #[test]
    fn requests_that_take_no_time_need_no_worker() {
        let idle = LatencyModel::default();
        let limits = LatencyLimits::default();
        let rate = sustainable_rate(&idle, MEMORY, &LENGTHS, &limits);
        assert!(rate.is_infinite());
    }
}
