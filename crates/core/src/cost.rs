//! What placing a request on a worker costs, in blocks.
//!
//! The cost of NVIDIA Dynamo's KV router (issue 1723, PR 1731):
//!
//! `overlap_weight × blocks to compute there + active blocks if placed there`
//!
//! The first term is prefill work, the second memory held and read by every decode step. Both
//! fall with overlap: a block that a running request already pins is resident once. A weight of
//! 0 ignores overlap in both, which leaves pure load balancing: otherwise a thousand equal
//! prompts would still gather on one worker.

use crate::tree::Depth;

/// One worker's cost for one request, part by part, in blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Leading blocks of the prompt that need not be computed there.
    pub overlap_blocks: u32,
    /// Blocks of the prompt that must be computed there.
    pub prefill_blocks: u32,
    /// Active blocks of the worker with this request placed on it.
    pub active_blocks: u64,
    /// `overlap_weight × prefill_blocks + active_blocks`.
    pub total: f64,
}

impl Cost {
    /// A worker with `active` blocks and nothing placed on it yet.
    pub(crate) fn of_nothing(active: u64) -> Self {
        Self {
            overlap_blocks: 0,
            prefill_blocks: 0,
            active_blocks: active,
            total: active as i64 as f64,
        }
    }

    /// Places one more request there, whose prompt reaches as deep as `depth`.
    pub(crate) fn add(&mut self, demand: Demand, depth: Depth) {
        let one = demand.cost(self.active_blocks, depth);
        self.overlap_blocks = self.overlap_blocks.saturating_add(one.overlap_blocks);
        self.prefill_blocks = self.prefill_blocks.saturating_add(one.prefill_blocks);
        self.active_blocks = one.active_blocks;
        self.total = demand.overlap_weight * f64::from(self.prefill_blocks)
            + self.active_blocks as i64 as f64;
    }
}

/// What of a request the cost depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    /// Blocks of the prompt, the partial last one included.
    pub(crate) blocks: u32,
    /// The most blocks a cache can spare: at least one token is computed.
    pub(crate) reusable_blocks: u32,
    pub(crate) overlap_weight: f64,
}

impl Demand {
    /// `active` is what the worker's running requests pin, in blocks; `depth` is how deep the
    /// prompt reaches there.
    #[inline]
    pub(crate) fn cost(self, active: u64, depth: Depth) -> Cost {
        let overlap_blocks = depth.overlap().min(self.reusable_blocks);
        let prefill_blocks = self.blocks - overlap_blocks;
        let resident = if self.overlap_weight > 0.0 {
            depth.active
        } else {
            0
        };
        let active_blocks = active + u64::from(self.blocks - resident.min(self.blocks));
        Cost {
            overlap_blocks,
            prefill_blocks,
            active_blocks,
            // By way of i64, which the processor converts in one instruction.
            total: self.overlap_weight * f64::from(prefill_blocks) + active_blocks as i64 as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 blocks, the last one partial.
    fn demand(overlap_weight: f64) -> Demand {
        Demand {
            blocks: 100,
            reusable_blocks: 99,
            overlap_weight,
        }
    }

    #[test]
    fn nothing_is_known_of_an_empty_worker() {
        let cost = demand(1.0).cost(0, Depth::default());
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (0, 100));
        assert_eq!((cost.active_blocks, cost.total), (100, 200.0));
    }

    #[test]
    fn cached_blocks_spare_computing_but_take_room() {
        let depth = Depth {
            cached: 60,
            active: 0,
        };
        let cost = demand(1.0).cost(500, depth);
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (60, 40));
        assert_eq!((cost.active_blocks, cost.total), (600, 640.0));
    }

    #[test]
    fn active_blocks_spare_both() {
        let depth = Depth {
            cached: 20,
            active: 60,
        };
        let cost = demand(2.0).cost(500, depth);
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (60, 40));
        assert_eq!((cost.active_blocks, cost.total), (540, 620.0));
    }

    #[test]
    fn the_last_token_is_always_computed() {
        let depth = Depth {
            cached: 100,
            active: 100,
        };
        let cost = demand(1.0).cost(100, depth);
        assert_eq!((cost.overlap_blocks, cost.prefill_blocks), (99, 1));
        assert_eq!((cost.active_blocks, cost.total), (100, 101.0));
    }

    #[test]
    fn weight_zero_is_load_alone() {
        let depth = Depth {
            cached: 99,
            active: 99,
        };
        let near = demand(0.0).cost(10, depth);
        let far = demand(0.0).cost(10, Depth::default());
        assert_eq!((near.total, far.total), (110.0, 110.0));
        assert_eq!(near.prefill_blocks, 1, "still told, for who looks");
    }
}
