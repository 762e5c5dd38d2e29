//! How a router decides, as its owner sets it.

use std::num::NonZeroU32;

use crate::choose::Policy;
use crate::queue::Order;

/// vLLM's own, in tokens.
const DEFAULT_BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();

/// In replay of some twenty workloads, it makes first tokens and their slowest hundredth a few
/// hundredths earlier than 1 does, for less than a hundredth of the time to the end.
pub const DEFAULT_TTFT_WEIGHT: f64 = 3.0;

/// How a router decides.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// How a worker is chosen.
    pub policy: Policy,
    /// What reuse counts: in `kv`, what a block to compute costs in active blocks; in `delay`, how
    /// much dearer computing a prompt is than it is. 0 is pure load balancing.
    pub overlap_weight: f64,
    /// What a second until the first token counts, in seconds of anybody's delay.
    pub ttft_weight: f64,
    /// 0 takes the least cost; above, workers are sampled by softmax over costs.
    pub temperature: f64,
    /// Tokens per KV block, as the engines have it.
    pub block_size: NonZeroU32,
    /// In which order requests wait here for their worker to have room; `None` to send each at
    /// once.
    pub queue: Option<Order>,
    /// Fixes every random choice.
    pub seed: u64,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            overlap_weight: 1.0,
            ttft_weight: DEFAULT_TTFT_WEIGHT,
            temperature: 0.0,
            block_size: DEFAULT_BLOCK_SIZE,
            queue: None,
            seed: 0,
        }
    }
}

/// Far more than anybody needs, and little enough to keep every cost finite.
pub(crate) const MOST_WEIGHT: f64 = 1e6;

/// A setting outside its range.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` is {value}: it must be a number from 0 to {MOST_WEIGHT}")]
pub struct ConfigError {
    /// The setting, as the command line names it.
    pub field: &'static str,
    /// What it was set to.
    pub value: f64,
}
