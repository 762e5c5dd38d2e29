//! Which worker has which blocks: one façade over all that is known about prefixes.
//!
//! A block of a prompt is on a worker because a running request pins it, or because the engine still
//! caches it. Four stores know a part of that:
//!
//! | store | knows |
//! |---|---|
//! | active tree | blocks that dispatched requests pin, and blocks that the estimated caches keep |
//! | tree of queued prefixes | blocks that queued requests will pin |
//! | event index | blocks that workers cache according to their KV events |
//! | pending evictions | blocks of these that bookings will evict, and that events still list |
//!
//! [`PrefixState::match_prefix`] is the only place that combines them. Active blocks, the cache that
//! an engine has left for other blocks, and evictions follow from the same operations:
//! [`pin`](PrefixState::pin), [`grow`](PrefixState::grow), [`unpin`](PrefixState::unpin). Each of
//! them evicts what no longer fits the worker.
//!
//! Workers are named by their index. The caller makes sure that the worker exists, unless a method
//! says otherwise.

use std::num::NonZeroU32;

use smallvec::SmallVec;

use crate::active_tree::{
    HashChain, NO_NODE, NodeId, PrefixMatch, PrefixTree, TreePosition, WorkerIndex,
};
use crate::cache_source::CacheSource;
use crate::capacity::CapacitySource;
use crate::counter::Counter;
use crate::estimated_cache::{EstimatedCache, EvictionRule};
use crate::event_index::{EventIndex, PrefixRun, RemovalCursor, RemovalStep};
use crate::hit_audit::{AuditResult, ExpectedHit, ReportedHit};
use crate::pending_evictions::PendingEvictions;
use crate::prefix_matches::PrefixMatches;
use crate::sequence::{Sequence, SequenceHash};

/// Prefixes of all workers.
#[derive(Debug, Default)]
pub(crate) struct PrefixState {
    /// Active tree: prefixes that dispatched requests pin, and prefixes that workers still cache
    /// according to their estimated caches.
    tree: PrefixTree,
    /// Prefixes that queued requests will pin.
    queued: PrefixTree,
    /// Prefixes that workers cache according to their KV events.
    event_index: EventIndex,
    /// Evictions that bookings will cause and that events have not confirmed.
    pending_evictions: PendingEvictions,
    /// What is known about each worker's cache, by worker index.
    caches: Vec<WorkerCache>,
    /// Engine block ratios above 1. A list, because most fleets have none.
    engine_block_ratios: Vec<(WorkerIndex, NonZeroU32)>,
}

/// What is known about the cache of one worker, apart from the prefixes in it.
#[derive(Debug)]
struct WorkerCache {
    /// Whether the engine has a prefix cache.
    has_prefix_cache: bool,
    /// Estimate of the cache, which also contains its capacity and its eviction rule.
    estimated: EstimatedCache,
    /// Blocks pinned through the active tree; shared ones count once.
    pinned_blocks: u64,
    /// Blocks of running requests that no other request can share.
    unshared_blocks: u64,
    /// Cached blocks according to the worker's KV events.
    event_cached_blocks: u64,
}

impl WorkerCache {
    /// Returns the cache of a worker that has no requests.
    fn new(has_prefix_cache: bool, estimated: EstimatedCache) -> Self {
        Self {
            has_prefix_cache,
            estimated,
            pinned_blocks: 0,
            unshared_blocks: 0,
            event_cached_blocks: 0,
        }
    }

    /// Returns the blocks that running requests pin; shared ones count once.
    fn active_blocks(&self) -> u64 {
        self.pinned_blocks + self.unshared_blocks
    }
}

/// A worker's cache, as snapshots show it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheStatus {
    pub(crate) cached_blocks: u64,
    pub(crate) source: CacheSource,
    pub(crate) capacity_blocks: u32,
    pub(crate) capacity_source: CapacitySource,
    pub(crate) eviction: EvictionRule,
}

/// The blocks that a running request occupies on its worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Occupancy {
    /// All blocks of the request, in whole engine blocks.
    pub(crate) blocks: u32,
    /// Blocks that the engine frees for the request in addition.
    pub(crate) headroom: u32,
}

/// Request to be [pinned](PrefixState::pin).
#[derive(Debug)]
pub(crate) struct PinRequest<'a> {
    pub(crate) prompt: &'a Sequence,
    /// Result of [`PrefixState::match_prefix`] for the prompt. The state must not have changed
    /// since.
    pub(crate) position: TreePosition,
    /// Prefix match on the worker, from the same call.
    pub(crate) prefix_match: PrefixMatch,
    /// Serial of the booking.
    pub(crate) serial: u64,
    /// Blocks that the request occupies at first.
    pub(crate) occupancy: Occupancy,
}

/// Result of a [pin](PrefixState::pin).
#[derive(Debug)]
pub(crate) struct Pinned {
    /// End of the request's path in the tree, to be passed to [`PrefixState::unpin`].
    pub(crate) node: NodeId,
    /// Leading blocks of the prompt that other requests can share.
    pub(crate) hashed_blocks: u32,
    /// Cache hit that the worker should report; `None` if it has no prefix cache.
    pub(crate) expected_hit: Option<ExpectedHit>,
    /// Whether the worker had no active blocks before.
    pub(crate) was_idle: bool,
}

/// Request to be [unpinned](PrefixState::unpin).
#[derive(Debug)]
pub(crate) struct UnpinRequest<'a> {
    /// End of the request's path, from [`Pinned`].
    pub(crate) node: NodeId,
    /// Shareable blocks, from [`Pinned`].
    pub(crate) hashed_blocks: u32,
    /// Blocks that the request occupies.
    pub(crate) occupancy: Occupancy,
    /// Whether the end of the request's prefill was not reported to
    /// [`end_prefill`](PrefixState::end_prefill) yet.
    pub(crate) is_in_prefill: bool,
    /// Full blocks of the output that the engine caches, whether or not their tokens are known.
    pub(crate) output_blocks: u32,
    /// The prompt followed by output, if it is known and the worker has computed it.
    pub(crate) output_chain: Option<&'a HashChain>,
    /// Serial of the latest booking of all workers.
    pub(crate) latest_serial: u64,
}

impl PrefixState {
    /// Adds a worker without requests at `index`, which no other worker has.
    pub(crate) fn add_worker(
        &mut self,
        index: WorkerIndex,
        has_prefix_cache: bool,
        eviction: EvictionRule,
        capacity_blocks: Option<u32>,
    ) {
        let estimated = EstimatedCache::new(eviction, capacity_blocks);
        let cache = WorkerCache::new(has_prefix_cache, estimated);
        match self.caches.get_mut(index as usize) {
            Some(place) => *place = cache,
            None => self.caches.push(cache),
        }
        let shares_within_step = eviction == EvictionRule::VllmLru;
        self.tree.set_intra_step_sharing(index, shares_within_step);
        self.queued.set_intra_step_sharing(index, true);
    }

    /// Returns how many leading blocks of the prompt every worker has, and the position at which the
    /// prompt leaves the active tree, with the largest overlap of any worker.
    ///
    /// The stores correct each other in this order. The tree has pinned and estimated blocks. The
    /// event index adds the blocks that events report. Pending evictions take some of these away.
    /// Workers with larger engine blocks share only whole ones. With `with_queued`, blocks that
    /// queued requests will pin count as active.
    pub(crate) fn match_prefix(
        &self,
        prompt: &Sequence,
        with_queued: bool,
    ) -> (PrefixMatches, TreePosition) {
        let hashes = prompt.hashes();
        let mut matches = PrefixMatches::new(self.caches.len());
        let mut position = self.tree.match_prefix(hashes, &mut matches);
        let in_index = self.event_index.match_prefix(hashes, &mut matches);
        position.best_overlap = position.best_overlap.max(in_index);
        let is_clamped = self
            .pending_evictions
            .clamp(hashes, &self.tree, &mut matches);
        let is_rounded =
            self.round_down_to_engine_blocks(prompt.max_reusable_blocks(), &mut matches);
        if with_queued {
            let mut queued = PrefixMatches::new(self.caches.len());
            self.queued.match_prefix(hashes, &mut queued);
            for (prefix_match, queued) in matches.iter_mut().zip(queued.iter()) {
                prefix_match.active_blocks = prefix_match.active_blocks.max(queued.active_blocks);
            }
        }
        if is_clamped || is_rounded || with_queued {
            position.best_overlap = matches.best_overlap();
        }
        (matches, position)
    }

    /// Rounds prefix matches down to whole engine blocks, on workers whose engine blocks are larger
    /// than router blocks. At most `max_reusable_blocks` blocks of the prompt can be reused.
    /// Returns whether there are such workers. Matches on all other workers stay unchanged, even
    /// above `max_reusable_blocks`.
    fn round_down_to_engine_blocks(
        &self,
        max_reusable_blocks: u32,
        prefix_matches: &mut [PrefixMatch],
    ) -> bool {
        for &(worker, ratio) in &self.engine_block_ratios {
            let round_down = |blocks: u32| {
                let blocks = blocks.min(max_reusable_blocks);
                blocks - blocks % ratio
            };
            if let Some(prefix_match) = prefix_matches.get_mut(worker as usize) {
                prefix_match.cached_blocks = round_down(prefix_match.cached_blocks);
                prefix_match.active_blocks = round_down(prefix_match.active_blocks);
            }
        }
        !self.engine_block_ratios.is_empty()
    }

    // The life of a request.

    /// Pins the blocks of a request that is sent to the worker, counts its prefill, and evicts what
    /// no longer fits.
    pub(crate) fn pin(&mut self, worker: WorkerIndex, request: &PinRequest<'_>) -> Pinned {
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
                false => self.tree.match_prefix(chain, &mut []),
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
    pub(crate) fn grow(&mut self, worker: WorkerIndex, before: Occupancy, after: Occupancy) {
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
    pub(crate) fn mark_cached(&mut self, node: NodeId, worker: WorkerIndex) {
        self.tree.mark_cached(node, worker);
    }

    /// Counts the end of a request's prefill. The worker has therefore started the booking with this
    /// serial and all that were sent to it before. Must be called once for each pinned request,
    /// unless it is unpinned in prefill.
    pub(crate) fn end_prefill(&mut self, worker: WorkerIndex, serial: u64) {
        match self.caches[worker as usize].estimated.end_prefill() {
            true => self.pending_evictions.mark_all_started(worker),
            false => self.pending_evictions.mark_started(worker, serial),
        }
    }

    /// Records that the worker has started all bookings up to this serial.
    pub(crate) fn mark_started(&mut self, worker: WorkerIndex, last_started: u64) {
        self.tree.mark_started(worker, last_started);
    }

    /// Returns how many requests on the worker pin the first `depth` blocks of the path to `node`.
    pub(crate) fn pin_count_at(&self, node: NodeId, worker: WorkerIndex, depth: u32) -> u32 {
        self.tree.pin_count_at(node, worker, depth)
    }

    /// Returns whether the worker still caches all blocks up to the end of `node`, so that output
    /// after them can be found.
    pub(crate) fn can_cache_output(&self, node: NodeId, worker: WorkerIndex) -> bool {
        !self.caches[worker as usize].estimated.is_disabled() && self.tree.is_cached(node, worker)
    }

    /// Unpins the blocks of a request that has ended. The blocks that the worker has computed stay
    /// in its estimated cache, those of `output_chain` included. Evicts what does not fit.
    pub(crate) fn unpin(&mut self, worker: WorkerIndex, request: &UnpinRequest<'_>) {
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
            let position = self.tree.match_prefix(chain, &mut []);
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

    /// Pins the blocks of a request that is queued for the worker. They are not active, and nothing
    /// is evicted. Returns the end of the request's path and its shareable blocks: none if the
    /// worker has no prefix cache.
    pub(crate) fn pin_queued(
        &mut self,
        worker: WorkerIndex,
        prompt: &Sequence,
        serial: u64,
    ) -> (NodeId, u32) {
        if !self.caches[worker as usize].has_prefix_cache {
            return (NO_NODE, 0);
        }
        let chain = prompt.hash_chain();
        let position = self.queued.match_prefix(chain, &mut []);
        let pinned = self.queued.pin(position, chain, worker, serial);
        (pinned.node, pinned.path_blocks)
    }

    /// Reverses a [`pin_queued`](Self::pin_queued), also on a worker that was removed.
    pub(crate) fn unpin_queued(&mut self, node: NodeId, worker: WorkerIndex) {
        self.queued.unpin(node, worker, 0);
    }

    /// Reverses a [`pin`](Self::pin) on a worker that was removed.
    pub(crate) fn unpin_from_removed(&mut self, node: NodeId, worker: WorkerIndex) {
        self.tree.unpin(node, worker, 0);
    }

    /// Compares the hit that a worker has reported with the expected one, and corrects the estimated
    /// cache. Has no effect if the cache source is events. Returns whether the worker has lost
    /// blocks, which the caller [evicts](Self::evict_lost).
    pub(crate) fn observe_hit(
        &mut self,
        worker: WorkerIndex,
        prompt: &Sequence,
        expected: &ExpectedHit,
        reported_blocks: u32,
    ) -> bool {
        let cache = &mut self.caches[worker as usize].estimated;
        if cache.is_event_tracked() {
            return false;
        }
        let next_block: Option<SequenceHash> =
            prompt.hashes().get(expected.expected() as usize).copied();
        let reported = ReportedHit {
            blocks: reported_blocks,
            is_estimate: prompt.is_text_based(),
        };
        let has_lost_blocks = match cache.audit_hit(expected, reported, next_block) {
            AuditResult::Consistent => false,
            AuditResult::CacheLostBefore(epoch) => {
                cache.forget_freed_before(epoch);
                self.tree.lose_freed_before(worker, epoch);
                true
            }
        };
        self.evict_to_fit(worker, 0);
        has_lost_blocks
    }

    // What engines report about their caches.

    /// Sets the capacity to the number of blocks that the worker reports. The caller
    /// [evicts](Self::evict_some_to_fit) what no longer fits.
    pub(crate) fn set_capacity(&mut self, worker: WorkerIndex, blocks: u32) {
        self.caches[worker as usize].estimated.set_capacity(blocks);
    }

    /// Sets the rule by which the worker's engine evicts.
    pub(crate) fn set_eviction(&mut self, worker: WorkerIndex, eviction: EvictionRule) {
        self.caches[worker as usize]
            .estimated
            .set_eviction(eviction);
        let shares_within_step = eviction == EvictionRule::VllmLru;
        self.tree.set_intra_step_sharing(worker, shares_within_step);
    }

    /// Empties the estimated cache of the worker. The caller then [evicts](Self::evict_lost) its
    /// blocks.
    pub(crate) fn clear(&mut self, worker: WorkerIndex) {
        self.caches[worker as usize].estimated.clear();
        self.tree.lose_cached(worker);
        self.pending_evictions.clear(worker);
    }

    /// Selects where the worker's cache contents come from. A change discards the contents that the
    /// previous source knew. Returns whether the source has changed, and where the removal of the
    /// worker's blocks from the event index begins, if it has any there. The caller removes them,
    /// and [evicts](Self::evict_lost) the blocks of the estimated cache.
    pub(crate) fn set_source(
        &mut self,
        worker: WorkerIndex,
        source: CacheSource,
    ) -> (bool, Option<RemovalCursor>) {
        if self.source(worker) == source {
            return (false, None);
        }
        self.clear(worker);
        let cache = &mut self.caches[worker as usize];
        cache
            .estimated
            .set_event_tracked(source == CacheSource::Events);
        cache.event_cached_blocks = 0;
        match source {
            CacheSource::Events => {
                let epoch = cache.estimated.last_epoch();
                self.tree.acknowledge(worker, epoch);
                (true, None)
            }
            CacheSource::Estimated => {
                self.tree.acknowledge(worker, 0);
                (true, Some(self.event_index.lose_worker(worker)))
            }
        }
    }

    /// Applies blocks that the worker's events report as stored. `ratio` is engine block size ÷
    /// router block size. The source must be events.
    pub(crate) fn apply_stored(&mut self, worker: WorkerIndex, ratio: u32, run: PrefixRun<'_>) {
        let cache = &mut self.caches[worker as usize];
        self.tree.acknowledge(worker, cache.estimated.last_epoch());
        self.event_index
            .add(worker, ratio, run, &mut cache.event_cached_blocks);
        let hashes = run.changed().iter().copied();
        self.pending_evictions.acknowledge(worker, hashes);
    }

    /// As [`apply_stored`](Self::apply_stored), for blocks that events report as removed.
    pub(crate) fn apply_removed(&mut self, worker: WorkerIndex, ratio: u32, run: PrefixRun<'_>) {
        let cache = &mut self.caches[worker as usize];
        self.tree.acknowledge(worker, cache.estimated.last_epoch());
        self.event_index
            .remove(worker, ratio, run, &mut cache.event_cached_blocks);
        let hashes = run.changed().iter().copied();
        self.pending_evictions.acknowledge(worker, hashes);
    }

    /// Notes that events of the worker have arrived which change nothing. Also accepts the index of
    /// a worker that was removed.
    pub(crate) fn acknowledge_events(&mut self, worker: WorkerIndex) {
        self.pending_evictions
            .acknowledge(worker, std::iter::empty());
    }

    /// Sets engine block size ÷ router block size of the worker.
    pub(crate) fn set_engine_block_ratio(&mut self, worker: WorkerIndex, ratio: NonZeroU32) {
        if self.engine_block_ratio(worker) == ratio {
            return;
        }
        self.engine_block_ratios
            .retain(|(known, _)| *known != worker);
        if ratio > NonZeroU32::MIN {
            self.engine_block_ratios.push((worker, ratio));
        }
    }

    // Eviction and removal, in parts.

    /// Evicts blocks from the worker's estimated cache until its active blocks fit its capacity,
    /// with `transient_blocks` more for a moment. Returns whether all fit; if not, the next call
    /// continues.
    fn evict_to_fit(&mut self, worker: WorkerIndex, transient_blocks: u64) -> bool {
        let cache = &mut self.caches[worker as usize];
        cache.estimated.evict_to_fit(
            cache.pinned_blocks + cache.unshared_blocks + transient_blocks,
            worker,
            &mut self.tree,
            &mut self.pending_evictions,
        )
    }

    /// Evicts some blocks that do not fit the worker's capacity. Returns whether more are left.
    pub(crate) fn evict_some_to_fit(&mut self, worker: WorkerIndex) -> bool {
        !self.evict_to_fit(worker, 0)
    }

    /// Removes lost blocks of the worker, of at most `max_entries` requests. Returns whether more
    /// may be left.
    pub(crate) fn evict_lost(&mut self, worker: WorkerIndex, max_entries: usize) -> bool {
        let cache = &mut self.caches[worker as usize].estimated;
        cache.evict_lost(max_entries, worker, &mut self.tree)
    }

    /// As [`evict_lost`](Self::evict_lost), for the cache of a worker that was removed.
    pub(crate) fn evict_lost_of_removed(
        &mut self,
        cache: &mut EstimatedCache,
        worker: WorkerIndex,
        max_entries: usize,
    ) -> bool {
        cache.evict_lost(max_entries, worker, &mut self.tree)
    }

    /// Removes some of the blocks that the worker has lost from the event index. Also accepts the
    /// index of a worker that was removed.
    pub(crate) fn remove_lost_events(
        &mut self,
        worker: WorkerIndex,
        cursor: RemovalCursor,
    ) -> RemovalStep {
        self.event_index.remove_lost(worker, cursor)
    }

    /// Forgets the worker, except for blocks that are removed in parts: those of the returned
    /// estimated cache, those of the event index from the returned cursor on, and those of its
    /// bookings.
    pub(crate) fn retire_worker(
        &mut self,
        worker: WorkerIndex,
    ) -> (EstimatedCache, Option<RemovalCursor>) {
        let has_events = self.source(worker) == CacheSource::Events;
        let unused = EstimatedCache::new(EvictionRule::default(), None);
        let cache = &mut self.caches[worker as usize];
        let mut removed = std::mem::replace(cache, WorkerCache::new(false, unused)).estimated;
        removed.clear();
        self.tree.retire_worker(worker);
        self.queued.retire_worker(worker);
        self.pending_evictions.clear(worker);
        self.engine_block_ratios
            .retain(|(known, _)| *known != worker);
        let cursor = has_events.then(|| self.event_index.lose_worker(worker));
        (removed, cursor)
    }

    /// Takes out the hash chains that are no longer used, to be dropped without the lock.
    pub(crate) fn take_deferred_drops(&mut self) -> [SmallVec<[HashChain; 4]>; 2] {
        [&mut self.tree, &mut self.queued].map(|tree| std::mem::take(&mut tree.deferred_drops))
    }

    // What is known.

    /// Returns the blocks that running requests on the worker pin; shared ones count once.
    pub(crate) fn active_blocks(&self, worker: WorkerIndex) -> u64 {
        self.caches[worker as usize].active_blocks()
    }

    /// Returns whether the worker's engine has a prefix cache.
    pub(crate) fn has_prefix_cache(&self, worker: WorkerIndex) -> bool {
        self.caches[worker as usize].has_prefix_cache
    }

    /// Returns where the worker's cache contents come from.
    pub(crate) fn source(&self, worker: WorkerIndex) -> CacheSource {
        match self.caches[worker as usize].estimated.is_event_tracked() {
            true => CacheSource::Events,
            false => CacheSource::Estimated,
        }
    }

    /// Returns the rule by which the worker's engine evicts.
    pub(crate) fn eviction(&self, worker: WorkerIndex) -> EvictionRule {
        self.caches[worker as usize].estimated.eviction()
    }

    /// Returns the worker's capacity in blocks, unless it is only assumed.
    pub(crate) fn estimated_capacity(&self, worker: WorkerIndex) -> Option<u32> {
        let cache = &self.caches[worker as usize].estimated;
        let is_assumed = cache.capacity_source() == CapacitySource::Assumed;
        (!is_assumed).then(|| cache.capacity())
    }

    /// Returns the worker's capacity in blocks if it is configured or reported, and so certain.
    pub(crate) fn reported_capacity(&self, worker: WorkerIndex) -> Option<u32> {
        let cache = &self.caches[worker as usize].estimated;
        match cache.capacity_source() {
            CapacitySource::Configured | CapacitySource::Reported => Some(cache.capacity()),
            CapacitySource::Learned | CapacitySource::Assumed => None,
        }
    }

    /// Returns engine block size ÷ router block size of the worker. 1 if no other ratio was set.
    pub(crate) fn engine_block_ratio(&self, worker: WorkerIndex) -> NonZeroU32 {
        let mut ratios = self.engine_block_ratios.iter();
        let entry = ratios.find(|(known, _)| *known == worker);
        entry.map_or(NonZeroU32::MIN, |(_, ratio)| *ratio)
    }

    /// Returns what snapshots show of the worker's cache.
    pub(crate) fn status(&self, worker: WorkerIndex) -> CacheStatus {
        let cache = &self.caches[worker as usize];
        let source = self.source(worker);
        CacheStatus {
            cached_blocks: match source {
                CacheSource::Events => cache.event_cached_blocks,
                CacheSource::Estimated => cache.pinned_blocks + cache.estimated.cached_blocks(),
            },
            source,
            capacity_blocks: cache.estimated.capacity(),
            capacity_source: cache.estimated.capacity_source(),
            eviction: cache.estimated.eviction(),
        }
    }

    /// Returns the number of distinct blocks that KV events report as cached by some worker.
    pub(crate) fn indexed_blocks(&self) -> usize {
        self.event_index.len()
    }

    /// Returns the number of nodes of both trees, to which their memory is proportional.
    pub(crate) fn tree_nodes(&self) -> usize {
        self.tree.len() + self.queued.len()
    }
}
