//! The state of the chosen worker.

use foresee_prefix::PrefixMatch;

use super::kv_cost::KvCost;

/// State of the chosen worker when it was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Cost of the request on the worker, in blocks.
    pub cost: KvCost,
    /// Prefix match of the prompt on the worker.
    pub prefix_match: PrefixMatch,
    /// Largest overlap of any worker, in blocks.
    pub best_overlap_blocks: u32,
}
