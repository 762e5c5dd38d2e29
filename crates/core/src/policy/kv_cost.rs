//! KV cost: cost of placing a request on a worker, in blocks.
//!
//! This is the cost of NVIDIA Dynamo's KV router (issue 1723, PR 1731):
//!
//! `overlap_weight × blocks to compute there + active blocks there if placed there`
//!
//! The first term is prefill work. The second is memory, which every decode step reads. Both
//! decrease with overlap: a block that a running request already pins is resident once. A weight of
//! 0 ignores overlap in both terms, which leaves pure load balancing. Otherwise a thousand equal
//! prompts would still be sent to one worker.

use foresee_prefix::PrefixMatch;

use super::candidates::{Candidates, WorkerView};
use super::interface::{BatchRule, NamedPolicy, Policy};
use super::request_profile::RequestProfile;

/// Least [cost in blocks](self).
pub const KV: NamedPolicy = NamedPolicy {
    name: "kv",
    description: "least overlap-weight × blocks to compute + active blocks",
    default_queue: None,
    create: || Box::new(LeastBlocks),
};

#[derive(Debug)]
struct LeastBlocks;

impl Policy for LeastBlocks {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        let input = KvCostInput::from(request);
        if let Some(loads) = candidates.loads() {
            costs.extend(loads.map(|(load, prefix_match)| {
                input.cost(load.projected_blocks(), prefix_match).total
            }));
            return;
        }
        costs.extend(candidates.iter().map(|worker| {
            let cost = input.cost(worker.active_blocks, worker.prefix_match);
            cost.total + worker.failure_charge.blocks
        }));
    }

    fn tie_breaker(&self, request: &RequestProfile<'_>, worker: &WorkerView<'_>) -> f64 {
        let cost = KvCostInput::from(request).cost(worker.active_blocks, worker.prefix_match);
        f64::from(cost.prefill_blocks)
    }

    fn batch_rule(&self) -> BatchRule {
        BatchRule::Sum
    }

    fn standing_cost(&self, worker: &WorkerView<'_>) -> f64 {
        worker.active_blocks as f64 + worker.failure_charge.blocks
    }
}

/// Cost of one request on one worker, part by part, in blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvCost {
    /// Leading blocks of the prompt that need not be computed there.
    pub overlap_blocks: u32,
    /// Blocks of the prompt that must be computed there.
    pub prefill_blocks: u32,
    /// Active blocks of the worker with this request placed on it.
    pub active_blocks: u64,
    /// `overlap_weight × prefill_blocks + active_blocks`.
    pub total: f64,
}

impl KvCost {
    /// Returns the cost of no request on a worker with `active_blocks` active blocks: the start of
    /// a sum over several requests.
    pub(crate) fn idle(active_blocks: u64) -> Self {
        Self {
            overlap_blocks: 0,
            prefill_blocks: 0,
            active_blocks,
            total: active_blocks as i64 as f64,
        }
    }

    /// Adds one more request to the sum, whose prompt has this prefix match on the worker.
    pub(crate) fn add(&mut self, input: KvCostInput, prefix_match: PrefixMatch) {
        let cost = input.cost(self.active_blocks, prefix_match);
        self.overlap_blocks = self.overlap_blocks.saturating_add(cost.overlap_blocks);
        self.prefill_blocks = self.prefill_blocks.saturating_add(cost.prefill_blocks);
        self.active_blocks = cost.active_blocks;
        self.total = input.overlap_weight * f64::from(self.prefill_blocks)
            + self.active_blocks as i64 as f64;
    }
}

/// Properties of a request that its cost depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvCostInput {
    /// Blocks of the prompt, the partial last one included.
    pub(crate) blocks: u32,
    /// Largest number of blocks that a cache hit can cover: at least one token is always computed.
    pub(crate) max_reusable_blocks: u32,
    /// Weight of a block to compute, relative to an active block.
    pub(crate) overlap_weight: f64,
}

impl From<&RequestProfile<'_>> for KvCostInput {
    fn from(request: &RequestProfile<'_>) -> Self {
        Self {
            blocks: request.blocks,
            max_reusable_blocks: request.max_reusable_blocks,
            overlap_weight: request.overlap_weight,
        }
    }
}

impl KvCostInput {
    /// Returns the cost of the request on a worker. `active_blocks` is what the bookings of the
    /// worker pin, in blocks. `prefix_match` is the match of the prompt on the worker.
    #[inline]
    pub(crate) fn cost(self, active_blocks: u64, prefix_match: PrefixMatch) -> KvCost {
        let overlap_blocks = prefix_match.overlap().min(self.max_reusable_blocks);
        let prefill_blocks = self.blocks - overlap_blocks;
        let resident = if self.overlap_weight > 0.0 {
            prefix_match.active_blocks
        } else {
            0
        };
        let active_blocks = active_blocks + u64::from(self.blocks - resident.min(self.blocks));
        KvCost {
            overlap_blocks,
            prefill_blocks,
            active_blocks,
            // Through i64, which the processor converts in one instruction.
            total: self.overlap_weight * f64::from(prefill_blocks) + active_blocks as i64 as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt of 100 blocks, the last one partial.
    fn input(overlap_weight: f64) -> KvCostInput {
        KvCostInput {
            blocks: 100,
            max_reusable_blocks: 99,
            overlap_weight,
        }
    }

    #[test]
    fn a_worker_without_the_prefix_computes_the_whole_prompt() {
        let cost = input(1.0).cost(0, PrefixMatch::default());
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (0, 100));
        assert_eq!((cost.active_blocks, cost.total), (100, 200.0));
    }

    #[test]
    fn cached_blocks_save_prefill_but_become_active() {
        let prefix_match = PrefixMatch {
            cached_blocks: 60,
            active_blocks: 0,
        };
        let cost = input(1.0).cost(500, prefix_match);
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (60, 40));
        assert_eq!((cost.active_blocks, cost.total), (600, 640.0));
    }

    #[test]
    fn active_blocks_save_prefill_and_memory() {
        let prefix_match = PrefixMatch {
            cached_blocks: 20,
            active_blocks: 60,
        };
        let cost = input(2.0).cost(500, prefix_match);
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (60, 40));
        assert_eq!((cost.active_blocks, cost.total), (540, 620.0));
    }

    #[test]
    fn the_last_token_is_always_computed() {
        let prefix_match = PrefixMatch {
            cached_blocks: 100,
            active_blocks: 100,
        };
        let cost = input(1.0).cost(100, prefix_match);
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (99, 1));
        assert_eq!((cost.active_blocks, cost.total), (100, 101.0));
    }

    #[test]
    fn with_weight_zero_only_load_counts() {
        let prefix_match = PrefixMatch {
            cached_blocks: 99,
            active_blocks: 99,
        };
        let matching = input(0.0).cost(10, prefix_match);
        let empty = input(0.0).cost(10, PrefixMatch::default());
        assert_eq!((matching.total, empty.total), (110.0, 110.0));
        assert_eq!(matching.prefill_blocks, 1, "the overlap is still reported");
    }
}
