//! SGLang's eviction rule (`UnifiedRadixCache`, and `RadixCache` before it): how it differs from
//! vLLM's.
//!
//! SGLang's cache is a radix tree. It evicts whole leaves, the least recently used first. A node
//! ends where a prompt left the tree, where a prompt ended, and where an output ended. A request
//! that uses a node also uses all nodes above it. So the blocks that one request used last lie on
//! one path, as under vLLM's rule, and the free queue is in the order of use. A prompt that leaves
//! the tree in the middle of a node splits the node. The split renews the last use of the lower
//! part, although the prompt does not use it.
//!
//! Where a request computes a block that is cached already, its duplicate is dropped when the
//! request ends. Before SGLang takes blocks, it frees one block more for each request that will
//! take some: for a prompt before it is computed, for a running request before each of its tokens.
//!
//! The estimate counts a path as used from the booking on. SGLang locks the path only when it
//! admits the request. A request that waits for memory may therefore lose more blocks than
//! estimated. Prompts with a common prefix that are admitted in the same step each compute all of
//! it.

use crate::active_tree::{PinChange, PrefixTree, WorkerIndex};
use crate::counter::Counter;
use crate::estimated_cache::{EstimatedCache, EvictionRule};

impl EstimatedCache {
    /// Sets the eviction rule of the worker's engine. Blocks in the free queue stay.
    pub(crate) fn set_eviction(&mut self, eviction: EvictionRule) {
        self.eviction = eviction;
    }

    /// Returns whether the engine keeps both physical blocks when it computes a cached block again.
    pub(crate) fn keeps_duplicates(&self) -> bool {
        self.eviction == EvictionRule::VllmLru
    }

    /// Replaces what a request contributes to the headroom: the blocks that SGLang frees for it in
    /// addition to the blocks that it takes.
    pub(crate) fn change_headroom(&mut self, old: u32, new: u32) {
        self.headroom.replace(old.into(), new.into());
    }

    /// Returns how many blocks SGLang frees in addition to the headroom for a prompt with
    /// `duplicates` blocks that are cached and computed again. Both physical blocks exist until the
    /// prompt is computed.
    ///
    /// SGLang asks for those blocks and one more. Free blocks of the headroom that belong to other
    /// requests count, so the whole headroom is subtracted; the one block more is the prompt's own
    /// part of it.
    pub(crate) fn transient_duplicate_blocks(&self, duplicates: u32) -> u64 {
        let blocks = if duplicates > 0 { duplicates + 1 } else { 0 };
        u64::from(blocks).saturating_sub(self.headroom)
    }

    /// Marks where SGLang's tree nodes end after a booking pinned a path: at the end of the path,
    /// and where the path left what was cached or pinned before. A split of a cached node renews
    /// the last use of its lower part in the free queue. The request takes at most the first
    /// `reusable` blocks from the cache.
    ///
    /// Call after [`reuse`](Self::reuse) of the same pinned runs. Returns how many blocks exist
    /// twice until the request is computed. Does nothing and returns 0 under vLLM's rule.
    pub(crate) fn mark_engine_boundary(
        &mut self,
        pinned: &PinChange,
        reusable: u32,
        worker: WorkerIndex,
        tree: &mut PrefixTree,
    ) -> u32 {
        if self.eviction != EvictionRule::SglangRadix {
            return 0;
        }
        let split_edge = tree.mark_engine_boundary(pinned.node, worker, pinned.already_held);
        if let (Some(upper_edge), Some(run)) = (split_edge, pinned.reused.first()) {
            let new_epoch = self.next_epoch();
            if let Some(entry) = self.freed_at_mut(run.freed_epoch)
                && let Some(tail) =
                    tree.refresh_split_tail(upper_edge, entry.node, worker, entry.epoch, new_epoch)
            {
                entry.reusable.subtract(tail.still_cached);
                self.reusable_blocks.subtract(tail.still_cached.into());
                self.free_blocks.subtract(tail.still_cached.into());
                self.push_freed(tail, 0, new_epoch);
            }
        }
        tree.mark_engine_boundary(pinned.node, worker, pinned.already_held.min(reusable));
        tree.mark_engine_boundary(pinned.node, worker, pinned.path_blocks);
        pinned.already_held.saturating_sub(reusable)
    }
}
