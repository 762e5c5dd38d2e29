//! Configuration of a mock engine.

use foresee_sim::engine::EngineConfig;

use crate::kv_publisher::KvEventsConfig;

/// Speed-ups whose steps have a duration that can be computed.
const SPEEDUPS: std::ops::RangeInclusive<f64> = 0.001..=1e6;

/// Configuration of a mock engine.
#[derive(Clone, Debug)]
pub struct MockEngineConfig {
    /// Name of the served model. Requests for another model get status 404.
    pub model: String,
    /// Configuration of the simulated engine.
    pub engine: EngineConfig,
    /// Seconds of engine time that pass in one second of real time; 0.001 to 1,000,000.
    pub speedup: f64,
    /// Maximum number of tokens of a prompt and its output together. At most the capacity of the KV
    /// cache.
    pub max_model_len: u32,
    /// Publication of KV events; `None` publishes none.
    pub kv_events: Option<KvEventsConfig>,
}

impl MockEngineConfig {
    /// Returns a configuration with speedup 1 and without KV events. The maximum model length is
    /// the capacity of the KV cache, up to 131,072 tokens.
    #[must_use]
    pub fn new(model: impl Into<String>, engine: EngineConfig) -> Self {
        let capacity = engine.blocks.saturating_mul(engine.block_size.get());
        Self {
            model: model.into(),
            engine,
            speedup: 1.0,
            max_model_len: capacity.min(131_072),
            kv_events: None,
        }
    }

    /// Checks the configuration.
    ///
    /// # Errors
    /// Names the first contradiction, or setting that is out of range.
    pub fn check(&self) -> Result<(), &'static str> {
        let engine = &self.engine;
        let capacity = engine.blocks.saturating_mul(engine.block_size.get());
        if !SPEEDUPS.contains(&self.speedup) {
            return Err("the speedup must be between 0.001 and 1000000");
        }
        if engine.max_num_batched_tokens == 0 || engine.max_num_seqs == 0 {
            return Err("max_num_batched_tokens and max_num_seqs must be at least 1");
        }
        if self.max_model_len < 2 || self.max_model_len > capacity {
            return Err(
                "max_model_len must be at least 2 and at most the capacity of the KV cache",
            );
        }
        Ok(())
    }
}
