//! Which worker has which blocks: one façade over all stores of prefixes.

mod pinning;

use std::num::NonZeroU32;

use smallvec::SmallVec;

use crate::active_tree::{HashChain, PrefixMatch, PrefixTree, TreePosition, WorkerIndex};
use crate::cache_source::CacheSource;
use crate::capacity::CapacitySource;
use crate::estimated_cache::{EstimatedCache, EvictionRule};
use crate::event_index::{EventIndex, PrefixRun, RemovalCursor, RemovalStep};
use crate::hit_audit::{AuditResult, ExpectedHit, ReportedHit};
use crate::pending_evictions::PendingEvictions;
use crate::prefix_matches::PrefixMatches;
use crate::sequence::{Sequence, SequenceHash};

pub use pinning::{Occupancy, PinRequest, Pinned, UnpinRequest};

/// Which worker has which blocks of a prompt.
///
/// A block of a prompt is on a worker because a running request pins it, or because the engine still
/// caches it. Three stores know a part of that:
///
/// | store | knows |
/// |---|---|
/// | active tree | blocks that dispatched requests pin, that queued requests will pin, and that the estimated caches keep |
/// | event index | blocks that workers cache according to their KV events |
/// | pending evictions | blocks of these that bookings will evict, and that events still list |
///
/// [`match_prefix`](Self::match_prefix) is the only place that combines them. Active blocks, the
/// cache that an engine has left for other blocks, and evictions follow from the same operations:
/// [`pin`](Self::pin), [`grow`](Self::grow), [`unpin`](Self::unpin). Each of them evicts what no
/// longer fits the worker.
///
/// Workers are named by their index. The caller makes sure that the worker
/// [was added](Self::add_worker) and not [retired](Self::retire_worker), unless a method says
/// otherwise. Bookings have serials, which ascend from 1 over all workers.
///
/// # Panics
/// A method panics if no worker with this index, or a larger one, was ever added.
#[derive(Debug, Default)]
pub struct PrefixState {
    /// Active tree: prefixes that dispatched requests pin or queued ones will pin, and prefixes that
    /// workers still cache according to their estimated caches.
    tree: PrefixTree,
    /// Prefixes that workers cache according to their KV events.
    event_index: EventIndex,
    /// Evictions that bookings will cause and that events have not confirmed.
    pending_evictions: PendingEvictions,
    /// Cache of each worker, apart from the prefixes in it, by worker index.
    caches: Vec<WorkerCache>,
    /// Engine block ratios above 1. A list, because most fleets have none.
    engine_block_ratios: Vec<(WorkerIndex, NonZeroU32)>,
}

/// Cache of one worker, apart from the prefixes in it.
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

    /// Returns the entry of an index that no worker has.
    fn unused() -> Self {
        Self::new(false, EstimatedCache::new(EvictionRule::default(), None))
    }

    /// Returns the blocks that running requests pin; shared ones count once.
    #[inline]
    fn active_blocks(&self) -> u64 {
        self.pinned_blocks + self.unshared_blocks
    }
}

/// A worker's cache, as snapshots show it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CacheStatus {
    /// Blocks in the cache, according to its source.
    pub cached_blocks: u64,
    /// Where the cache contents come from.
    pub source: CacheSource,
    /// Capacity in blocks.
    pub capacity_blocks: u32,
    /// Where the capacity comes from.
    pub capacity_source: CapacitySource,
    /// Rule by which the worker's engine evicts.
    pub eviction: EvictionRule,
}

/// Change of the source of a worker's cache contents: see [`PrefixState::set_source`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SourceChange {
    /// Where the removal of the worker's blocks from the event index begins; `None` if it has none
    /// there. The caller [removes](PrefixState::remove_lost_events) them.
    pub lost_events: Option<RemovalCursor>,
}

/// Blocks that are left of a removed worker: see [`PrefixState::retire_worker`].
#[derive(Debug)]
pub struct RetiredWorker {
    /// Index of the worker.
    worker: WorkerIndex,
    /// Estimated cache, all of whose blocks are lost.
    estimated: EstimatedCache,
    /// Where the removal of the worker's blocks from the event index begins.
    lost_events: Option<RemovalCursor>,
}

impl RetiredWorker {
    /// Returns where the removal of the worker's blocks from the event index begins; `None` if it
    /// has none there.
    #[must_use]
    pub fn lost_events(&self) -> Option<RemovalCursor> {
        self.lost_events
    }
}

/// Hash chains that nothing uses any longer. Each may be the last reference to a large allocation,
/// so they are dropped without the lock.
#[derive(Debug)]
pub struct UnusedChains(#[expect(dead_code, reason = "only dropped")] SmallVec<[HashChain; 4]>);

impl PrefixState {
    /// Adds a worker without requests at `index`, which no other worker has. Indices should be dense
    /// from 0, because every index below the largest takes memory.
    pub fn add_worker(
        &mut self,
        index: WorkerIndex,
        has_prefix_cache: bool,
        eviction: EvictionRule,
        capacity_blocks: Option<u32>,
    ) {
        let estimated = EstimatedCache::new(eviction, capacity_blocks);
        let cache = WorkerCache::new(has_prefix_cache, estimated);
        let worker_count = self.caches.len().max(index as usize + 1);
        self.caches.resize_with(worker_count, WorkerCache::unused);
        self.caches[index as usize] = cache;
        self.tree
            .set_intra_step_sharing(index, eviction.shares_within_step());
    }

    /// Returns how many leading blocks of the prompt every worker has, and the position at which the
    /// prompt leaves the active tree, with the largest overlap of any worker.
    ///
    /// The stores correct each other in this order. The tree has pinned and estimated blocks; with
    /// `with_queued`, blocks that queued requests will pin count as active. The event index adds the
    /// blocks that events report. Pending evictions take some of these away. Workers with larger
    /// engine blocks share only whole ones.
    #[must_use]
    pub fn match_prefix(
        &self,
        prompt: &Sequence,
        with_queued: bool,
    ) -> (PrefixMatches, TreePosition) {
        let hashes = prompt.hashes();
        let mut matches = PrefixMatches::new(self.caches.len());
        let mut position = self.tree.match_prefix(hashes, with_queued, &mut matches);
        let in_index = self.event_index.match_prefix(hashes, &mut matches);
        position.best_overlap = position.best_overlap.max(in_index);
        let is_clamped = self
            .pending_evictions
            .clamp(hashes, &self.tree, &mut matches);
        let is_rounded =
            self.round_down_to_engine_blocks(prompt.max_reusable_blocks(), &mut matches);
        if is_clamped || is_rounded {
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

    // Reports of engines about their caches.

    /// Compares the hit that a worker has reported with the expected one, and corrects the estimated
    /// cache. Has no effect if the cache source is events. Returns whether the worker has lost
    /// blocks, which the caller [evicts](Self::evict_lost).
    pub fn observe_hit(
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

    /// Sets the capacity to the number of blocks that the worker reports. The caller
    /// [evicts](Self::evict_some_to_fit) what no longer fits.
    pub fn set_capacity(&mut self, worker: WorkerIndex, blocks: u32) {
        self.caches[worker as usize].estimated.set_capacity(blocks);
    }

    /// Sets the rule by which the worker's engine evicts.
    pub fn set_eviction(&mut self, worker: WorkerIndex, eviction: EvictionRule) {
        self.caches[worker as usize]
            .estimated
            .set_eviction(eviction);
        self.tree
            .set_intra_step_sharing(worker, eviction.shares_within_step());
    }

    /// Empties the estimated cache of the worker. The caller then [evicts](Self::evict_lost) its
    /// blocks.
    pub fn clear(&mut self, worker: WorkerIndex) {
        self.caches[worker as usize].estimated.clear();
        self.tree.lose_cached(worker);
        self.pending_evictions.clear(worker);
    }

    /// Selects where the worker's cache contents come from. A change discards the contents that the
    /// previous source knew: the caller removes the [lost events](SourceChange::lost_events), and
    /// [evicts](Self::evict_lost) the blocks of the estimated cache. Returns `None` if the source
    /// stays as it is.
    #[must_use = "the blocks that the previous source knew are to be removed"]
    pub fn set_source(&mut self, worker: WorkerIndex, source: CacheSource) -> Option<SourceChange> {
        if self.source(worker) == source {
            return None;
        }
        self.clear(worker);
        let cache = &mut self.caches[worker as usize];
        cache
            .estimated
            .set_event_tracked(source == CacheSource::Events);
        cache.event_cached_blocks = 0;
        let lost_events = match source {
            CacheSource::Events => {
                let epoch = cache.estimated.last_epoch();
                self.tree.acknowledge(worker, epoch);
                None
            }
            CacheSource::Estimated => {
                self.tree.acknowledge(worker, 0);
                Some(self.event_index.lose_worker(worker))
            }
        };
        Some(SourceChange { lost_events })
    }

    /// Applies blocks that the worker's events report as stored. `ratio` is engine block size ÷
    /// router block size. The source must be events.
    pub fn apply_stored(&mut self, worker: WorkerIndex, ratio: u32, run: PrefixRun<'_>) {
        self.acknowledge(worker, run);
        let cached_blocks = &mut self.caches[worker as usize].event_cached_blocks;
        self.event_index.add(worker, ratio, run, cached_blocks);
    }

    /// As [`apply_stored`](Self::apply_stored), for blocks that events report as removed.
    pub fn apply_removed(&mut self, worker: WorkerIndex, ratio: u32, run: PrefixRun<'_>) {
        self.acknowledge(worker, run);
        let cached_blocks = &mut self.caches[worker as usize].event_cached_blocks;
        self.event_index.remove(worker, ratio, run, cached_blocks);
    }

    /// Records that the events of the worker are as recent as its latest free, and are right about
    /// the changed blocks of `run`.
    fn acknowledge(&mut self, worker: WorkerIndex, run: PrefixRun<'_>) {
        let epoch = self.caches[worker as usize].estimated.last_epoch();
        self.tree.acknowledge(worker, epoch);
        let hashes = run.changed().iter().copied();
        self.pending_evictions.acknowledge(worker, hashes);
    }

    /// Records that events of the worker have arrived which change nothing.
    pub fn acknowledge_events(&mut self, worker: WorkerIndex) {
        self.pending_evictions
            .acknowledge(worker, std::iter::empty());
    }

    /// Sets engine block size ÷ router block size of the worker.
    pub fn set_engine_block_ratio(&mut self, worker: WorkerIndex, ratio: NonZeroU32) {
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
        let active_blocks = cache.active_blocks();
        cache.estimated.evict_to_fit(
            active_blocks + transient_blocks,
            worker,
            &mut self.tree,
            &mut self.pending_evictions,
        )
    }

    /// Evicts some blocks that do not fit the worker's capacity. Returns whether more are left.
    pub fn evict_some_to_fit(&mut self, worker: WorkerIndex) -> bool {
        !self.evict_to_fit(worker, 0)
    }

    /// Removes lost blocks of the worker, of at most `max_entries` requests. Returns whether more
    /// may be left.
    pub fn evict_lost(&mut self, worker: WorkerIndex, max_entries: usize) -> bool {
        let cache = &mut self.caches[worker as usize].estimated;
        cache.evict_lost(max_entries, worker, &mut self.tree)
    }

    /// Removes blocks of a worker that was removed from its estimated cache, of at most
    /// `max_entries` requests. Returns whether more may be left.
    pub fn evict_retired(&mut self, retired: &mut RetiredWorker, max_entries: usize) -> bool {
        let RetiredWorker {
            worker, estimated, ..
        } = retired;
        estimated.evict_lost(max_entries, *worker, &mut self.tree)
    }

    /// Removes some of the blocks that the worker has lost from the event index. Also accepts the
    /// index of a worker that was removed.
    pub fn remove_lost_events(
        &mut self,
        worker: WorkerIndex,
        cursor: RemovalCursor,
    ) -> RemovalStep {
        self.event_index.remove_lost(worker, cursor)
    }

    /// Forgets the worker, except for blocks that the caller removes in parts, before it reuses the
    /// index: those of its [estimated cache](Self::evict_retired), its
    /// [lost events](Self::remove_lost_events), and those of its bookings
    /// ([`unpin_from_removed`](Self::unpin_from_removed), [`unpin_queued`](Self::unpin_queued)).
    #[must_use = "the blocks that are left of the worker are to be removed"]
    pub fn retire_worker(&mut self, worker: WorkerIndex) -> RetiredWorker {
        let has_events = self.source(worker) == CacheSource::Events;
        let cache = &mut self.caches[worker as usize];
        let mut estimated = std::mem::replace(cache, WorkerCache::unused()).estimated;
        estimated.clear();
        self.tree.retire_worker(worker);
        self.pending_evictions.clear(worker);
        self.engine_block_ratios
            .retain(|(known, _)| *known != worker);
        RetiredWorker {
            worker,
            estimated,
            lost_events: has_events.then(|| self.event_index.lose_worker(worker)),
        }
    }

    /// Takes out the hash chains that are no longer used, to be dropped without the lock. They use
    /// memory until then, so every critical section should end with this.
    #[inline]
    #[must_use = "the chains are to be dropped after unlocking"]
    pub fn take_deferred_drops(&mut self) -> UnusedChains {
        UnusedChains(std::mem::take(&mut self.tree.deferred_drops))
    }

    // Reading.

    /// Returns the blocks that running requests on the worker pin; shared ones count once.
    #[inline]
    #[must_use]
    pub fn active_blocks(&self, worker: WorkerIndex) -> u64 {
        self.caches[worker as usize].active_blocks()
    }

    /// Returns whether the worker's engine has a prefix cache.
    #[inline]
    #[must_use]
    pub fn has_prefix_cache(&self, worker: WorkerIndex) -> bool {
        self.caches[worker as usize].has_prefix_cache
    }

    /// Returns where the worker's cache contents come from.
    #[inline]
    #[must_use]
    pub fn source(&self, worker: WorkerIndex) -> CacheSource {
        match self.caches[worker as usize].estimated.is_event_tracked() {
            true => CacheSource::Events,
            false => CacheSource::Estimated,
        }
    }

    /// Returns the rule by which the worker's engine evicts.
    #[inline]
    #[must_use]
    pub fn eviction(&self, worker: WorkerIndex) -> EvictionRule {
        self.caches[worker as usize].estimated.eviction()
    }

    /// Returns the worker's capacity in blocks, unless it is only assumed.
    #[inline]
    #[must_use]
    pub fn estimated_capacity(&self, worker: WorkerIndex) -> Option<u32> {
        let cache = &self.caches[worker as usize].estimated;
        let is_assumed = cache.capacity_source() == CapacitySource::Assumed;
        (!is_assumed).then(|| cache.capacity())
    }

    /// Returns the worker's capacity in blocks if it is configured or reported, and so certain.
    #[inline]
    #[must_use]
    pub fn reported_capacity(&self, worker: WorkerIndex) -> Option<u32> {
        let cache = &self.caches[worker as usize].estimated;
        match cache.capacity_source() {
            CapacitySource::Configured | CapacitySource::Reported => Some(cache.capacity()),
            CapacitySource::Learned | CapacitySource::Assumed => None,
        }
    }

    /// Returns engine block size ÷ router block size of the worker. 1 if no other ratio was set.
    #[inline]
    #[must_use]
    pub fn engine_block_ratio(&self, worker: WorkerIndex) -> NonZeroU32 {
        let mut ratios = self.engine_block_ratios.iter();
        let entry = ratios.find(|(known, _)| *known == worker);
        entry.map_or(NonZeroU32::MIN, |(_, ratio)| *ratio)
    }

    /// Returns what snapshots show of the worker's cache.
    #[must_use]
    pub fn status(&self, worker: WorkerIndex) -> CacheStatus {
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
    #[must_use]
    pub fn indexed_blocks(&self) -> usize {
        self.event_index.len()
    }

    /// Returns the number of nodes of the active tree, to which its memory is proportional.
    #[must_use]
    pub fn tree_nodes(&self) -> usize {
        self.tree.len()
    }
}
