//! What a worker's cache must still contain when nobody tells: the engine's own replacement
//! rule, run on what was sent to it.
//!
//! vLLM's rule (`BlockPool` and `FreeKVCacheBlockQueue`): a full block without references goes to
//! the end of one free queue, a freed request's blocks tail first, and a partial block to its
//! front, so that it is taken next and evicts nothing. New blocks are taken from the front, and
//! only then does a cached block lose its content; a hit takes it out of the queue. So one entry per freed request is enough here: its blocks lie on one path of the
//! [`PrefixTree`] and leave from the tail upwards.

use std::collections::VecDeque;

use crate::tree::{NO_NODE, NodeId, PrefixTree, Slot, Unpinned};

/// Blocks assumed where nobody says how many a worker has: 8B weights on a 48 GB card leave
/// about this much. It bounds the router's memory for that worker.
pub const DEFAULT_CAPACITY_BLOCKS: u32 = 12_288;

/// One freed request in the free queue.
#[derive(Debug)]
struct Freed {
    /// Full blocks of output whose tokens are not known here. They were the request's tail, so
    /// they are taken first.
    output: u32,
    /// Where the blocks that this freeing unpinned begin, deepest first.
    node: NodeId,
    stamp: u64,
}

/// The free queue of one worker.
#[derive(Debug)]
pub(crate) struct Shadow {
    capacity: u32,
    /// Events tell what is cached, so that nothing is kept here.
    is_idle: bool,
    queue: VecDeque<Freed>,
    /// Unpinned blocks that are still cached.
    cached: u64,
    output: u64,
    last_stamp: u64,
}

impl Shadow {
    pub(crate) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            is_idle: false,
            queue: VecDeque::new(),
            cached: 0,
            output: 0,
            last_stamp: 0,
        }
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(crate) fn set_capacity(&mut self, blocks: u32) {
        self.capacity = blocks;
    }

    /// Whether somebody else tells what is cached.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_idle
    }

    pub(crate) fn set_idle(&mut self, is_idle: bool) {
        self.is_idle = is_idle;
    }

    /// Unpinned blocks that are still cached.
    pub(crate) fn cached_blocks(&self) -> u64 {
        self.cached
    }

    /// The worker has lost its cache.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.cached = 0;
        self.output = 0;
    }

    /// A number that marks one freeing; none is used twice.
    pub(crate) fn next_stamp(&mut self) -> u64 {
        self.last_stamp += 1;
        self.last_stamp
    }

    /// Cached blocks were pinned again.
    pub(crate) fn revived(&mut self, blocks: u32) {
        self.cached -= u64::from(blocks);
    }

    /// A request's blocks were freed under `stamp`, with `output` blocks of output at its tail.
    pub(crate) fn freed(&mut self, unpinned: Unpinned, output: u32, stamp: u64) {
        self.cached += u64::from(unpinned.cached);
        self.output += u64::from(output);
        if unpinned.deepest != NO_NODE || output > 0 {
            self.queue.push_back(Freed {
                output,
                node: unpinned.deepest,
                stamp,
            });
        }
    }

    /// Evicts until the worker's `active` blocks and what is left here fit its capacity.
    pub(crate) fn make_room(&mut self, active: u64, worker: Slot, tree: &mut PrefixTree) {
        let capacity = if self.is_idle { 0 } else { self.capacity };
        let fits = u64::from(capacity).saturating_sub(active);
        while self.cached + self.output > fits
            && let Some(front) = self.queue.front_mut()
        {
            let excess = self.cached + self.output - fits;
            let want = u32::try_from(excess).unwrap_or(u32::MAX);
            let taken = front.output.min(want);
            front.output -= taken;
            self.output -= u64::from(taken);
            if front.output > 0 {
                break;
            }
            let (evicted, next) = tree.evict(front.node, worker, front.stamp, want - taken);
            self.cached -= u64::from(evicted);
            match next {
                Some(node) => front.node = node,
                None => {
                    self.queue.pop_front();
                }
            }
        }
        self.drop_stale(worker, tree);
    }

    /// Entries whose blocks were pinned again are found only when they reach the front. Live
    /// ones hold at least a block each, so a queue much longer than the capacity is mostly stale.
    fn drop_stale(&mut self, worker: Slot, tree: &mut PrefixTree) {
        if self.queue.len() > 2 * self.capacity as usize + 64 {
            self.queue.retain_mut(|entry| {
                let (_, left) = tree.evict(entry.node, worker, entry.stamp, 0);
                entry.node = left.unwrap_or(NO_NODE);
                left.is_some() || entry.output > 0
            });
        }
    }
}
