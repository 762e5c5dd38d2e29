//! One request of a trace, in Mooncake's format with two fields of our own. The gateway records
//! traffic in this format; the simulator and the load generator send it again.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

/// One line of a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// Arrival time in milliseconds, possibly with a fraction. The gateway counts from 1970, so that
    /// one file can contain several runs; other traces count from their start.
    pub timestamp: f64,
    /// Prompt tokens.
    pub input_length: u32,
    /// Output tokens.
    pub output_length: u32,
    /// Content of the prompt: each id stands for `tokens_per_hash_id` tokens and all tokens before
    /// them, so that equal ids mean equal prefixes.
    pub hash_ids: Vec<u64>,
    /// Tokens of each id; `None` means 512, as in Mooncake's traces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_hash_id: Option<NonZeroU32>,
    /// Name of the model, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}
