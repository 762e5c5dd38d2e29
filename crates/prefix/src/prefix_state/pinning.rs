//! The blocks of a request: pinned when it is sent, grown with its output, unpinned at its end.

use super::PrefixState;
use crate::active_tree::{HashChain, NO_NODE, NodeId, PrefixMatch, TreePosition, WorkerIndex};
use crate::counter::Counter;
use crate::hit_audit::ExpectedHit;
use crate::sequence::Sequence;

/// The blocks that a running request occupies on its worker.
#[derive(Clone, Copy, Debug)]
pub struct Occupancy {
    /// All blocks of the request, in whole engine blocks.
    pub blocks: u32,
    /// Blocks that the engine frees for the request in addition.
    pub headroom: u32,
}

/// Request to be [pinned](PrefixState::pin).
#[derive(Debug)]
pub struct PinRequest<'a> {
    /// The prompt of the request.
    pub prompt: &'a Sequence,
    /// Result of [`PrefixState::match_prefix`] for the prompt. The state must not have changed
    /// since.
    pub position: TreePosition,
    /// Prefix match on the worker, from the same call.
    pub prefix_match: PrefixMatch,
    /// Serial of the booking.
    pub serial: u64,
    /// Blocks that the request occupies at first.
    pub occupancy: Occupancy,
}

/// Result of a [pin](PrefixState::pin).
#[derive(Debug)]
#[non_exhaustive]
pub struct Pinned {
    /// End of the request's path in the tree, to be passed to [`PrefixState::unpin`].
    pub node: NodeId,
    /// Leading blocks of the prompt that other requests can share.
    pub hashed_blocks: u32,
    /// Cache hit that the worker should report; `None` if it has no prefix cache.
    pub expected_hit: Option<ExpectedHit>,
    /// Whether the worker had no active blocks before.
    pub was_idle: bool,
}

/// Request to be [unpinned](PrefixState::unpin).
#[derive(Debug)]
pub struct UnpinRequest<'a> {
    /// End of the request's path, from [`Pinned`].
    pub node: NodeId,
    /// Shareable blocks, from [`Pinned`].
    pub hashed_blocks: u32,
    /// Blocks that the request occupies.
    pub occupancy: Occupancy,
    /// Whether the end of the request's prefill was not reported to
    /// [`end_prefill`](PrefixState::end_prefill) yet.
    pub is_in_prefill: bool,
    /// Full blocks of the output that the engine caches, whether or not their tokens are known.
    pub output_blocks: u32,
    /// The prompt followed by output, if it is known and the worker has computed it.
    pub output_chain: Option<&'a HashChain>,
    /// Serial of the latest booking of all workers.
    pub latest_serial: u64,
}

impl PrefixState {
    /// Pins the blocks of a request that is sent to the worker, counts its prefill, and evicts what
    /// no longer fits.
    pub fn pin(&mut self, worker: WorkerIndex, request: &PinRequest<'_>) -> Pinned {
        let ratio = self.engine_block_ratio(worker).get();
        let cache = &mut self.caches[worker as usize];
        let active_before = cache.active_blocks();
        let mut pinned = Pinned {
            node: NO_NODE,
            hashed_blocks: 0,
            expected_hit: None,
            was_idle: active_before == 0,
        };
        let mut duplicates = 0;
        if cache.has_prefix_cache {
            // An engine with larger blocks shares only full blocks of its own.
            let chain = &request.prompt.hash_chain_aligned_to(ratio);
            let position = match chain.len() == request.prompt.hashes().len() {
                true => request.position,
                false => self.tree.find(chain),
            };
            let change = self.tree.pin(position, chain, worker, request.serial);
            (pinned.node, pinned.hashed_blocks) = (change.node, change.path_blocks);
            cache.pinned_blocks += u64::from(change.newly_pinned);
            let max_reusable_blocks = request.prompt.max_reusable_blocks();
            let PrefixMatch {
                cached_blocks,
                active_blocks,
            } = request.prefix_match;
            pinned.expected_hit = Some(cache.estimated.expected_hit(
                cached_blocks.min(max_reusable_blocks),
                active_blocks,
                &change.reused,
                active_before,
            ));
            // If the whole prompt is cached, its last block is computed again.
            let reused_until = change
                .reused
                .first()
                .map_or(0, |run| run.start + run.blocks);
            let recomputed = reused_until.saturating_sub(max_reusable_blocks);
            cache.estimated.reuse(&change.reused, recomputed);
            duplicates = cache.estimated.mark_engine_boundary(
                &change,
                max_reusable_blocks,
                worker,
                &mut self.tree,
            );
        }
        cache.estimated.begin_prefill();
        self.pending_evictions.note_booking(request.serial);
        if pinned.was_idle {
            self.tree.mark_started(worker, request.serial);
        }
        let Occupancy { blocks, headroom } = request.occupancy;
        cache.estimated.change_headroom(0, headroom);
        cache.unshared_blocks += u64::from(blocks - pinned.hashed_blocks);
        let transient_blocks = cache.estimated.transient_duplicate_blocks(duplicates);
        self.evict_to_fit(worker, transient_blocks);
        pinned
    }

    /// Changes the blocks that a running request occupies, and evicts what no longer fits.
    pub fn grow(&mut self, worker: WorkerIndex, before: Occupancy, after: Occupancy) {
        let cache = &mut self.caches[worker as usize];
        cache
            .unshared_blocks
            .replace(before.blocks.into(), after.blocks.into());
        cache
            .estimated
            .change_headroom(before.headroom, after.headroom);
        if after.blocks > before.blocks || after.headroom > before.headroom {
            self.evict_to_fit(worker, 0);
        }
    }

    /// Records that the worker has computed the blocks of a request, whose path ends at `node`.
    pub fn mark_cached(&mut self, node: NodeId, worker: WorkerIndex) {
        self.tree.mark_cached(node, worker);
    }

    /// Counts the end of a request's prefill. The worker has therefore started the booking with this
    /// serial and all that were sent to it before. Must be called once for each pinned request,
    /// unless it is unpinned in prefill.
    pub fn end_prefill(&mut self, worker: WorkerIndex, serial: u64) {
        match self.caches[worker as usize].estimated.end_prefill() {
            true => self.pending_evictions.mark_all_started(worker),
            false => self.pending_evictions.mark_started(worker, serial),
        }
    }

    /// Records that the worker has started all bookings up to this serial.
    pub fn mark_started(&mut self, worker: WorkerIndex, last_started: u64) {
        self.tree.mark_started(worker, last_started);
    }

    /// Returns how many requests on the worker pin the first `depth` blocks of the path to `node`.
    #[must_use]
    pub fn pin_count_at(&self, node: NodeId, worker: WorkerIndex, depth: u32) -> u32 {
        self.tree.pin_count_at(node, worker, depth)
    }

    /// Returns whether the worker still caches all blocks up to the end of `node`, so that output
    /// after them can be found.
    #[must_use]
    pub fn can_cache_output(&self, node: NodeId, worker: WorkerIndex) -> bool {
        !self.caches[worker as usize].estimated.is_disabled() && self.tree.is_cached(node, worker)
    }

    /// Unpins the blocks of a request that has ended. The blocks that the worker has computed stay
    /// in its estimated cache, those of `output_chain` included. Evicts what does not fit.
    pub fn unpin(&mut self, worker: WorkerIndex, request: &UnpinRequest<'_>) {
        let cache = &mut self.caches[worker as usize];
        if request.is_in_prefill && cache.estimated.end_prefill() {
            self.pending_evictions.mark_all_started(worker);
        }
        let Occupancy { blocks, headroom } = request.occupancy;
        cache.estimated.change_headroom(headroom, 0);
        let unshared = blocks - request.hashed_blocks;
        cache.unshared_blocks.subtract(unshared.into());
        if !cache.has_prefix_cache {
            return;
        }
        let mut epoch = cache.estimated.next_epoch();
        let mut unknown_output_blocks = request.output_blocks;
        let mut node = request.node;
        if let Some(chain) = request.output_chain {
            let position = self.tree.find(chain);
            let pinned = self
                .tree
                .pin(position, chain, worker, request.latest_serial);
            self.tree.mark_cached(pinned.node, worker);
            cache.estimated.reuse(&pinned.reused, u32::MAX);
            cache
                .estimated
                .mark_engine_boundary(&pinned, u32::MAX, worker, &mut self.tree);
            let known_output_blocks = match cache.estimated.keeps_duplicates() {
                true => pinned.newly_pinned,
                false => pinned.path_blocks.saturating_sub(request.hashed_blocks),
            };
            unknown_output_blocks = unknown_output_blocks.saturating_sub(known_output_blocks);
            cache.pinned_blocks += u64::from(pinned.newly_pinned);
            // The new path includes that of the prompt, so this unpin releases nothing, unless
            // hashes collide.
            let unpinned = self.tree.unpin(node, worker, epoch);
            cache.pinned_blocks.subtract(unpinned.unpinned.into());
            cache.estimated.push_freed(unpinned, 0, epoch);
            epoch = cache.estimated.next_epoch();
            node = pinned.node;
        }
        let unpinned = self.tree.unpin(node, worker, epoch);
        cache.pinned_blocks.subtract(unpinned.unpinned.into());
        cache
            .estimated
            .push_freed(unpinned, unknown_output_blocks, epoch);
        if cache.estimated.is_event_tracked() {
            self.tree.limit_unacknowledged(worker, epoch);
        }
        self.evict_to_fit(worker, 0);
    }

    /// Counts the blocks of a request that is queued for the worker. They are not active, and nothing
    /// is evicted. `position` is the result of [`match_prefix`](Self::match_prefix) for the prompt;
    /// the state must not have changed since. Returns the end of the request's path and its shareable
    /// blocks: none if the worker has no prefix cache.
    pub fn pin_queued(
        &mut self,
        worker: WorkerIndex,
        prompt: &Sequence,
        position: TreePosition,
    ) -> (NodeId, u32) {
        match self.caches[worker as usize].has_prefix_cache {
            true => self.tree.pin_queued(position, prompt.hash_chain(), worker),
            false => (NO_NODE, 0),
        }
    }

    /// Reverses a [`pin_queued`](Self::pin_queued), also on a worker that was removed.
    pub fn unpin_queued(&mut self, node: NodeId, worker: WorkerIndex) {
        self.tree.unpin_queued(node, worker);
    }

    /// Reverses a [`pin`](Self::pin) on a worker that was removed.
    pub fn unpin_from_removed(&mut self, node: NodeId, worker: WorkerIndex) {
        self.tree.unpin(node, worker, 0);
    }
}
