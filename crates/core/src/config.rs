//! Configuration of a router: the policy, its weights, and the queue order.

use std::num::NonZeroU32;

use crate::outlier::OutlierConfig;
use crate::policy::NamedPolicy;
use crate::queue::QueueOrder;

/// Default block size in tokens: that of vLLM.
const DEFAULT_BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();

/// Default of [`RouterConfig::ttft_weight`]: all delays weigh the same, so the cost is their sum. A
/// larger weight keeps prompts with the worker that has their prefix, and so loads workers unevenly.
pub const DEFAULT_TTFT_WEIGHT: f64 = 1.0;

/// Configuration of a router.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// Rule by which a worker is chosen.
    pub policy: NamedPolicy,
    /// Weight of computing a prompt, from 0 to 10⁶. 0 ignores which workers have the prompt's
    /// blocks, which leaves pure load balancing.
    ///
    /// [`KV`](crate::policy::KV): the cost of a block to compute, in active blocks.
    /// [`MARGINAL_DELAY`](crate::policy::MARGINAL_DELAY): a value above 1 multiplies the predicted
    /// prefill time of the request; a value below 1 is the fraction of its overlap that counts.
    pub overlap_weight: f64,
    /// Weight of one second of the request's time to first token, relative to one second of any
    /// other delay. From 0 to 10⁶. Used by [`MARGINAL_DELAY`](crate::policy::MARGINAL_DELAY).
    pub ttft_weight: f64,
    /// Temperature of the choice, from 0 to 10⁶. 0 chooses the worker of least cost. Larger values
    /// sample workers by a softmax over the costs of any policy.
    pub temperature: f64,
    /// Tokens per KV block. Should be the block size of the engines.
    pub block_size: NonZeroU32,
    /// Order in which requests wait at the router until their worker has prefill slack and memory
    /// for them. `None` dispatches every request on arrival.
    pub queue_order: Option<QueueOrder>,
    /// Outlier ejection, failure charge and warm-up limit.
    pub outlier: OutlierConfig,
    /// Maximum number of queued requests. A request that would have to be queued beyond it is
    /// refused, unless it takes the place of one with a lower priority or, under fair queueing, of a
    /// tenant with more service. `None` sets no limit. A request that was booked before, and is booked again or
    /// moved, may be queued in any case.
    pub queue_limit: Option<usize>,
    /// Seed of every random choice.
    pub seed: u64,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            policy: NamedPolicy::default(),
            overlap_weight: 1.0,
            ttft_weight: DEFAULT_TTFT_WEIGHT,
            temperature: 0.0,
            block_size: DEFAULT_BLOCK_SIZE,
            queue_order: NamedPolicy::default().default_queue,
            outlier: OutlierConfig::default(),
            queue_limit: None,
            seed: 0,
        }
    }
}

impl RouterConfig {
    /// Returns the settings that can change while the router runs.
    #[must_use]
    pub fn tuning(&self) -> RouterTuning {
        RouterTuning {
            overlap_weight: self.overlap_weight,
            ttft_weight: self.ttft_weight,
            temperature: self.temperature,
            queue_limit: self.queue_limit,
        }
    }

    /// Checks that every number is in its range.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.tuning().check()?;
        let outlier = &self.outlier;
        ConfigError::check("ejection-failure-rate", outlier.failure_rate, 1.0)?;
        ConfigError::check("max-ejected-fraction", outlier.max_ejected_fraction, 1.0)
    }

    /// Returns the default settings under another policy, with the queue order that suits it.
    #[must_use]
    pub fn for_policy(policy: NamedPolicy) -> Self {
        Self {
            policy,
            queue_order: policy.default_queue,
            ..Self::default()
        }
    }
}

/// Settings that can change while a router runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterTuning {
    /// As [`RouterConfig::overlap_weight`].
    pub overlap_weight: f64,
    /// As [`RouterConfig::ttft_weight`].
    pub ttft_weight: f64,
    /// As [`RouterConfig::temperature`].
    pub temperature: f64,
    /// As [`RouterConfig::queue_limit`]. Requests that are queued already stay queued.
    pub queue_limit: Option<usize>,
}

impl RouterTuning {
    /// Checks that the weights and the temperature are from 0 to 10⁶.
    ///
    /// # Errors
    /// [`ConfigError`] with the first one that is not.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("overlap-weight", self.overlap_weight),
            ("ttft-weight", self.ttft_weight),
            ("temperature", self.temperature),
        ] {
            ConfigError::check(field, value, MAX_WEIGHT)?;
        }
        Ok(())
    }
}

/// Largest weight and temperature. Far above any useful value, and small enough to keep every cost
/// finite.
const MAX_WEIGHT: f64 = 1e6;

/// Error for a setting that is outside its range.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` is {value}: it must be a number from 0 to {max}")]
pub struct ConfigError {
    /// Name of the setting on the command line.
    pub field: &'static str,
    /// Rejected value.
    pub value: f64,
    /// Largest value that is accepted.
    pub max: f64,
}

impl ConfigError {
    /// Checks that `value` is from 0 to `max`.
    fn check(field: &'static str, value: f64, max: f64) -> Result<(), Self> {
        if (0.0..=max).contains(&value) {
            return Ok(());
        }
        Err(Self { field, value, max })
    }
}
