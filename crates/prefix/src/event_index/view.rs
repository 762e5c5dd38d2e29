//! View of one engine's prefix cache, kept up to date event by event.

use std::num::NonZeroU32;

use crate::event_index::blocks::{BlockId, EngineBlocks, NO_BLOCK, RemovedBlock};
use crate::event_index::lead_in::LeadIn;
use crate::event_index::orphans::OrphanRuns;
use crate::event_index::{CacheDelta, PrefixRuns, StoredBlocks};
use crate::sequence::{SequenceHash, extend_hash};

/// Blocks that may be scanned per block of an event. Finding the blocks below a tombstone scans all
/// blocks. The budget grows with the events, so that no event stream can make scanning the main
/// part of the work.
const SCAN_BUDGET_PER_BLOCK: u64 = 64;
/// Maximum scan budget that can be saved up, in blocks.
const MAX_SCAN_BUDGET: u64 = 1 << 24;

/// Prefixes for which a delta reserves memory in addition to the changed ones: enough for most
/// lead-ins.
const LEAD_IN_RESERVE: usize = 16;

/// View of one engine's prefix cache, kept up to date event by event.
///
/// Converts stored and removed blocks, which events name by engine hash, into [`CacheDelta`]s of
/// sequence hashes. A delta lists only *reachable* blocks: those with all blocks before them
/// stored, which are the blocks that a request can hit.
#[derive(Debug)]
pub struct CacheView {
    /// Tokens per block of the router.
    block_size: NonZeroU32,
    /// Engine block size ÷ router block size; 0 until it is known.
    engine_block_ratio: u32,
    /// Blocks of the engine, by engine hash.
    blocks: EngineBlocks,
    /// Number of blocks that are stored.
    len: usize,
    /// Sum of the store counts of all blocks.
    stored: u64,
    /// Stored runs whose parent is unknown.
    orphans: OrphanRuns,
    /// Lead-in of the block that was reported last.
    lead_in: LeadIn,
    /// Whether a tombstone was created or stored again, and the blocks below it still have their
    /// previous reachability. Rare, because engines evict the ends of sequences first.
    reachability_stale: bool,
    /// Number of blocks that may be scanned to update reachability.
    scan_budget: u64,
    /// Whether every event was valid and no block was dropped for a limit.
    complete: bool,
}

impl CacheView {
    /// Returns a view of an empty cache. `block_size` is that of the router, in tokens. The block
    /// size of the engine must be a multiple of it; otherwise its store events are ignored and the
    /// view is incomplete.
    #[must_use]
    pub fn new(block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            engine_block_ratio: 0,
            blocks: EngineBlocks::new(),
            len: 0,
            stored: 0,
            orphans: OrphanRuns::default(),
            lead_in: LeadIn::default(),
            reachability_stale: false,
            scan_budget: MAX_SCAN_BUDGET,
            complete: true,
        }
    }

    /// Returns whether the view reflects all events so far. Blocks of events that it could not
    /// follow are missing.
    ///
    /// An incomplete view never lists blocks that the engine does not have, with one exception:
    /// when blocks become unreachable faster than the scan budget allows, their removal is reported
    /// late.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete && !self.reachability_stale && self.orphans.is_empty()
    }

    /// Returns the number of cached engine blocks, reachable or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether nothing is cached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the number of blocks of engine memory that the cache occupies: each block counts as
    /// often as it was stored and not yet removed. If the number exceeds the engine's capacity,
    /// removals were lost. Orphan runs are not counted.
    #[must_use]
    pub fn stored_blocks(&self) -> u64 {
        self.stored
    }

    /// Returns how many more times the engine has stored than removed the block with this engine
    /// hash.
    #[must_use]
    pub fn store_count(&self, engine_hash: u64) -> u32 {
        let id = self.blocks.find_stored(engine_hash);
        id.map_or(0, |id| self.blocks.store_count(id))
    }

    /// Returns the delta that brings an empty index to the state of this view.
    #[must_use]
    pub fn snapshot(&self) -> CacheDelta {
        CacheDelta {
            stored: self.reachable_runs(),
            ..self.empty_delta()
        }
    }

    /// Returns all blocks that are recorded as reachable. No prefix comes before the prefix that it
    /// extends.
    fn reachable_runs(&self) -> PrefixRuns {
        let (mut runs, mut lead_in) = (PrefixRuns::default(), LeadIn::default());
        let mut is_pending = vec![false; self.blocks.ids()];
        for id in self.blocks.reachable() {
            is_pending[id as usize] = true;
        }
        // In descending order of ids, because the last block is likely to have many ancestors.
        for id in (0..self.blocks.ids() as BlockId).rev() {
            let ancestors = std::iter::successors(Some(id), |&id| self.blocks.parent(id));
            let run = ancestors.take_while(|&id| std::mem::take(&mut is_pending[id as usize]));
            let run: Vec<BlockId> = run.collect();
            let run = run.iter().map(|&id| (id, self.blocks.hash(id)));
            lead_in.emit_reversed(run, &self.blocks, &mut runs);
        }
        runs
    }

    /// Returns a delta without changes.
    fn empty_delta(&self) -> CacheDelta {
        CacheDelta {
            engine_block_ratio: self.engine_block_ratio,
            ..CacheDelta::default()
        }
    }

    /// Adds the blocks of a store event. Returns the blocks that became reachable or unreachable. A
    /// block that is stored already counts one more store.
    ///
    /// Blocks after an unknown parent are kept as orphans, up to a limit, and added when their
    /// parent is stored. An event with inconsistent lengths or another block size than earlier
    /// events is ignored, and the view is incomplete from then on.
    pub fn store(&mut self, event: &StoredBlocks<'_>) -> CacheDelta {
        if !self.validate(event) {
            self.complete = false;
            return self.empty_delta();
        }
        let mut delta = self.empty_delta();
        delta
            .stored
            .reserve(event.engine_hashes.len() + LEAD_IN_RESERVE);
        match event.parent {
            None => {
                let start = (NO_BLOCK, event.salt, true);
                self.append(start, event.engine_hashes, event.tokens, &mut delta);
                self.adopt_orphans(&mut delta);
            }
            Some(parent) => match self.blocks.find_stored(parent) {
                Some(id) => {
                    let start = self.append_point(id);
                    self.append(start, event.engine_hashes, event.tokens, &mut delta);
                    self.adopt_orphans(&mut delta);
                }
                None => {
                    self.complete &= self.orphans.push(parent, event.engine_hashes, event.tokens)
                }
            },
        }
        self.refresh_reachability(event.engine_hashes.len(), &mut delta);
        delta
    }

    /// Returns whether hashes, tokens and block size of an event are consistent, and the block size
    /// is that of earlier events. Sets the engine block ratio if it was unknown and the block size
    /// is valid, even if hashes and tokens disagree.
    fn validate(&mut self, event: &StoredBlocks<'_>) -> bool {
        let size = event.block_size;
        let engine_block_ratio = size / self.block_size;
        if engine_block_ratio == 0
            || size % self.block_size != 0
            || (self.engine_block_ratio != 0 && self.engine_block_ratio != engine_block_ratio)
        {
            return false;
        }
        self.engine_block_ratio = engine_block_ratio;
        event.engine_hashes.len().checked_mul(size as usize) == Some(event.tokens.len())
    }

    /// Counts one removal for each of these blocks. Returns the blocks that became unreachable. If
    /// the scan budget allows it, this includes blocks below a removed one. A block that is not
    /// stored is removed from the orphans, or ignored.
    pub fn remove(&mut self, engine_hashes: &[u64]) -> CacheDelta {
        let mut delta = self.empty_delta();
        self.prefetch(engine_hashes);
        for &engine_hash in engine_hashes {
            let lookup = self.blocks.find(engine_hash);
            let id = lookup.id;
            if id == NO_BLOCK || !self.blocks.is_stored(id) {
                let block_size = self.block_size.get() as usize * self.engine_block_ratio as usize;
                self.orphans.remove(engine_hash, block_size);
                continue;
            }
            let has_children = self.blocks.has_children(id);
            self.stored -= 1;
            if self.blocks.decrement_stores(lookup) {
                self.len -= 1;
                self.reachability_stale |= has_children;
            }
        }
        self.emit_removed(&mut delta.removed);
        self.refresh_reachability(engine_hashes.len(), &mut delta);
        delta
    }

    /// Adds the blocks that were just removed to `removed`, if they were reachable, and recycles
    /// the ids of all of them.
    fn emit_removed(&mut self, removed: &mut PrefixRuns) {
        let removed_blocks = self.blocks.removed();
        removed.reserve(removed_blocks.len() + LEAD_IN_RESERVE);
        // Most removals are one run, listed from its end.
        let is_continued_by = |later: &RemovedBlock, block: &RemovedBlock| {
            later.parent == block.id && later.was_reachable == block.was_reachable
        };
        for run in removed_blocks.chunk_by(is_continued_by) {
            if run[0].was_reachable {
                let run = run.iter().map(|block| (block.id, block.hash));
                self.lead_in.emit_reversed(run, &self.blocks, removed);
            } else {
                self.lead_in.clear();
            }
        }
        self.blocks.recycle_removed();
    }

    /// Removes all blocks and orphans, and returns the blocks that were reachable. The view is
    /// complete afterwards. Block size and engine block ratio stay.
    pub fn clear(&mut self) -> CacheDelta {
        let delta = CacheDelta {
            removed: self.reachable_runs(),
            ..self.empty_delta()
        };
        *self = Self {
            engine_block_ratio: self.engine_block_ratio,
            scan_budget: self.scan_budget,
            ..Self::new(self.block_size)
        };
        delta
    }

    /// Reads the memory that looking up these blocks will need. A single look-up gains nothing from
    /// that.
    fn prefetch(&self, engine_hashes: &[u64]) {
        if engine_hashes.len() > 1 {
            engine_hashes
                .iter()
                .for_each(|&engine_hash| self.blocks.prefetch(engine_hash));
        }
    }

    /// Returns the state from which [`append`](Self::append) continues after block `id`: the block,
    /// its sequence hash, and whether it is reachable.
    fn append_point(&self, id: BlockId) -> (BlockId, SequenceHash, bool) {
        (id, self.blocks.hash(id), self.blocks.is_reachable(id))
    }

    /// Stores a run of blocks after a parent, which is given with its sequence hash and its
    /// reachability, and adds the changes to `delta`. Blocks that are stored already count one more
    /// store, and the run continues after them. The block size must be [validated](Self::validate).
    /// When the maximum number of blocks is reached, the rest is dropped and the view is
    /// incomplete.
    fn append(
        &mut self,
        (mut parent, mut prefix_hash, mut is_reachable): (BlockId, SequenceHash, bool),
        engine_hashes: &[u64],
        tokens: &[u32],
        delta: &mut CacheDelta,
    ) {
        let tokens_per_block = self.block_size.get() as usize;
        let tokens_per_engine_block = tokens_per_block * self.engine_block_ratio as usize;
        self.prefetch(engine_hashes);
        // Block that ends the current run of `delta.stored`.
        let mut last_emitted = None;
        for (&engine_hash, tokens) in engine_hashes
            .iter()
            .zip(tokens.chunks_exact(tokens_per_engine_block))
        {
            let lookup = self.blocks.find(engine_hash);
            let is_known = lookup.id != NO_BLOCK;
            if is_known && self.blocks.is_stored(lookup.id) {
                self.blocks.increment_stores(lookup.id);
                (parent, prefix_hash, is_reachable) = self.append_point(lookup.id);
            } else {
                prefix_hash = tokens
                    .chunks_exact(tokens_per_block)
                    .fold(prefix_hash, extend_hash);
                let mut is_listed = false;
                let id = if is_known {
                    // A tombstone is stored again, and its children are still stored.
                    self.reachability_stale = true;
                    let old_hash = self.blocks.hash(lookup.id);
                    if self.blocks.is_reachable(lookup.id)
                        && !(is_reachable && old_hash == prefix_hash)
                    {
                        self.blocks.set_reachable(lookup.id, false);
                        let block = std::iter::once((lookup.id, old_hash));
                        self.lead_in
                            .emit_reversed(block, &self.blocks, &mut delta.removed);
                    }
                    self.lead_in.clear();
                    last_emitted = None;
                    self.blocks.restore(lookup.id, parent, prefix_hash);
                    is_listed = self.blocks.is_reachable(lookup.id);
                    self.blocks.set_reachable(lookup.id, is_reachable);
                    lookup.id
                } else if let Some(id) =
                    self.blocks
                        .insert(lookup, parent, prefix_hash, is_reachable)
                {
                    id
                } else {
                    self.complete = false;
                    return;
                };
                self.len += 1;
                if is_reachable && !is_listed {
                    if last_emitted != Some(parent) {
                        let stored = &mut delta.stored;
                        self.lead_in.start_run(parent, id, &self.blocks, stored);
                    }
                    delta.stored.push(prefix_hash);
                    last_emitted = Some(id);
                }
                parent = id;
            }
            self.stored += 1;
        }
        if let Some(last) = last_emitted {
            self.lead_in.end(last, &delta.stored);
        }
    }

    /// Appends every orphan run whose parent is now stored.
    fn adopt_orphans(&mut self, delta: &mut CacheDelta) {
        while let Some((parent, run)) = self.orphans.take(&self.blocks) {
            let start = self.append_point(parent);
            self.append(start, &run.engine_hashes, &run.tokens, delta);
        }
    }

    /// Updates the reachability of blocks below tombstones, if it is out of date and the scan
    /// budget allows it. `event_blocks` is the number of blocks of the event, which increases the
    /// budget.
    fn refresh_reachability(&mut self, event_blocks: usize, delta: &mut CacheDelta) {
        self.scan_budget =
            (self.scan_budget + SCAN_BUDGET_PER_BLOCK * event_blocks as u64).min(MAX_SCAN_BUDGET);
        if !self.reachability_stale || self.scan_budget < self.blocks.len() as u64 {
            return;
        }
        self.scan_budget -= self.blocks.len() as u64;
        self.reachability_stale = false;
        let is_reachable = self.blocks.find_reachable();
        self.emit_reachability(false, &is_reachable, &mut delta.removed);
        self.emit_reachability(true, &is_reachable, &mut delta.stored);
    }

    /// Adds to `runs` all blocks whose new reachability is `wanted` and whose recorded one is not,
    /// and records it. `is_reachable` is the new reachability by block id, for all ids.
    fn emit_reachability(&mut self, wanted: bool, is_reachable: &[bool], runs: &mut PrefixRuns) {
        for id in (0..is_reachable.len() as BlockId).rev() {
            let mut run = Vec::new();
            let mut next = Some(id);
            while let Some(id) = next
                && is_reachable[id as usize] == wanted
                && self.blocks.is_reachable(id) != wanted
            {
                self.blocks.set_reachable(id, wanted);
                run.push(id);
                next = self.blocks.parent(id);
            }
            let run = run.iter().map(|&id| (id, self.blocks.hash(id)));
            self.lead_in.emit_reversed(run, &self.blocks, runs);
        }
    }
}
