//! Estimated contents of a worker's prefix cache: the engine's own eviction rule, run on the
//! requests that were routed to the worker.
//!
//! A worker without KV events depends on this estimate. For a worker with events the estimate
//! predicts evictions that its events have not reported yet: see
//! [`pending_evictions`](crate::pending_evictions). This module describes vLLM's rule; [`sglang`]
//! describes how SGLang's rule differs.
//!
//! vLLM's rule (`BlockPool` and `FreeKVCacheBlockQueue`): a full block without references goes to
//! the end of one free queue. The blocks of a freed request are queued tail first. A partial block
//! goes to the front of the queue, so it is taken next and evicts nothing. New blocks are taken
//! from the front, and only then does a cached block lose its content. A hit removes a block from
//! the queue. vLLM does not merge equal blocks: where a request computes a block that is cached
//! already, both physical blocks stay.
//!
//! One queue entry per freed request is therefore enough here: the blocks of a request lie on one
//! path of the [`PrefixTree`] and leave the cache from the tail upwards.

use std::collections::VecDeque;

use smallvec::SmallVec;

use crate::active_tree::{EvictChange, NodeId, PrefixTree, ReusedRun, UnpinChange, WorkerIndex};
use crate::capacity::{Capacity, CapacitySource};
use crate::counter::Counter;
use crate::hit_audit::{AuditResult, ExpectedHit, ExpectedRun, HitAudit, ReportedHit};
use crate::pending_evictions::PendingEvictions;
use crate::sequence::SequenceHash;

mod sglang;

/// Rule by which an engine selects the blocks that it evicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionRule {
    /// vLLM's rule: single blocks, in the order in which their requests ended, the tail of a
    /// request first.
    #[default]
    VllmLru,
    /// SGLang's rule: whole leaves of its radix tree, the least recently used first.
    SglangRadix,
}

impl EvictionRule {
    /// Returns the name used in configuration and in the admin API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VllmLru => "queue",
            Self::SglangRadix => "radix",
        }
    }

    /// Returns whether the requests of one step of such an engine share the blocks that they compute.
    pub(crate) fn shares_within_step(self) -> bool {
        self == Self::VllmLru
    }
}

/// Maximum number of entries of the free queue from which one call of
/// [`EstimatedCache::evict_to_fit`] evicts blocks. A call takes part of a critical section. More are
/// evicted only for a prompt that displaces hundreds of others, or if the capacity shrinks.
const MAX_EVICTIONS_PER_CALL: usize = 64;

/// Number of evicted runs that are remembered, to detect that the engine still had one of them.
const MAX_GHOSTS: usize = 1024;

/// Blocks of one freed request in the free queue.
#[derive(Debug)]
struct FreedRequest {
    /// Full blocks of output whose tokens are unknown to the router. They were the tail of the
    /// request, so they are taken first.
    unknown_output: u32,
    /// Blocks of the request's path that no request has pinned since. A request can hit them.
    reusable: u32,
    /// Blocks of the request's path that a later request pinned and computed again. The old
    /// physical blocks stay in the queue, and no request can hit them. They are taken last: all
    /// other blocks of this entry lie below them.
    duplicates: u32,
    /// Deepest tree node with reusable blocks of this entry.
    node: NodeId,
    /// Free epoch under which the blocks were released.
    epoch: u64,
}

impl FreedRequest {
    /// Returns the number of blocks that this entry has in the free queue.
    fn blocks(&self) -> u64 {
        u64::from(self.unknown_output) + u64::from(self.reusable) + u64::from(self.duplicates)
    }

    /// Evicts up to `want` blocks of this entry, also from the tree, or with `whole_leaves` as many
    /// more as it takes to evict whole nodes: first unknown output, then the path from its end,
    /// then duplicates. Returns the number of all evicted blocks; the other fields of the result
    /// refer to the path only.
    fn evict(
        &mut self,
        want: u32,
        whole_leaves: bool,
        worker: WorkerIndex,
        tree: &mut PrefixTree,
    ) -> EvictChange {
        let output = match whole_leaves {
            true => self.unknown_output,
            false => self.unknown_output.min(want),
        };
        self.unknown_output -= output;
        let remaining = want.saturating_sub(output);
        let mut evicted = tree.evict(self.node, worker, self.epoch, remaining, whole_leaves);
        self.reusable.subtract(evicted.blocks);
        evicted.blocks += output;
        match evicted.resume_at {
            Some(node) => self.node = node,
            None => {
                debug_assert_eq!(self.reusable, 0, "a freed path is evicted completely");
                evicted.blocks += std::mem::take(&mut self.reusable);
                let duplicates = self.duplicates.min(want.saturating_sub(evicted.blocks));
                self.duplicates -= duplicates;
                evicted.blocks += duplicates;
            }
        }
        evicted
    }
}

/// Record of a freed path whose last reusable block was evicted.
#[derive(Clone, Copy, Debug)]
struct Ghost {
    /// Block of the run that is nearest to the root.
    shallowest: SequenceHash,
    /// Value of [`EstimatedCache::evicted_total`] right after the run was evicted.
    evicted_total: u64,
}

/// Estimate of what one worker's cache contains: the engine's free queue and its capacity.
#[derive(Debug)]
pub(crate) struct EstimatedCache {
    /// Eviction rule of the worker's engine.
    eviction: EvictionRule,
    /// KV blocks of the worker, and how they are known.
    capacity: Capacity,
    /// Whether KV events report what the worker caches. This estimate then only predicts evictions.
    is_event_tracked: bool,
    /// Dispatched bookings without a first token. The evictions that they cause may not have
    /// happened yet.
    pending_prefills: u32,
    /// Blocks that SGLang frees for its requests in addition to the blocks that they take. Always
    /// counted; used under [`EvictionRule::SglangRadix`] only.
    headroom: u64,
    /// Freed requests in ascending order of their free epochs. Entries up to the epoch `lost_until`
    /// are lost: they count in none of the totals, and wait for
    /// [`evict_lost`](Self::evict_lost).
    free_queue: VecDeque<FreedRequest>,
    /// Latest free epoch whose blocks the worker has lost.
    lost_until: u64,
    /// Blocks in the free queue that a request can hit.
    reusable_blocks: u64,
    /// All blocks in the free queue: reusable blocks, unknown output and duplicates.
    free_blocks: u64,
    /// Latest free epoch that was handed out.
    last_epoch: u64,
    /// Number of blocks evicted since the worker was added.
    evicted_total: u64,
    /// Latest evicted runs, in order of eviction. Kept only while the capacity is learned.
    ghosts: VecDeque<Ghost>,
    /// Comparison of the expected cache hits with the hits that responses report.
    hit_audit: HitAudit,
}

impl EstimatedCache {
    /// Returns an empty cache. `capacity` is the configured number of blocks; `None` means that it
    /// is learned.
    pub(crate) fn new(eviction: EvictionRule, capacity: Option<u32>) -> Self {
        Self {
            eviction,
            capacity: Capacity::new(capacity),
            is_event_tracked: false,
            pending_prefills: 0,
            headroom: 0,
            free_queue: VecDeque::new(),
            lost_until: 0,
            reusable_blocks: 0,
            free_blocks: 0,
            last_epoch: 0,
            evicted_total: 0,
            ghosts: VecDeque::new(),
            hit_audit: HitAudit::default(),
        }
    }

    /// Returns the capacity in blocks that is reported, configured, learned or assumed.
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity.blocks()
    }

    /// Returns the eviction rule of the worker's engine.
    pub(crate) fn eviction(&self) -> EvictionRule {
        self.eviction
    }

    /// Returns where the capacity comes from.
    pub(crate) fn capacity_source(&self) -> CapacitySource {
        self.capacity.source()
    }

    /// Sets the capacity to the number of blocks that the worker reports, which also replaces a
    /// configured one. Evicts nothing.
    pub(crate) fn set_capacity(&mut self, blocks: u32) {
        self.capacity = Capacity::reported(blocks);
        self.ghosts.clear();
    }

    /// Returns whether KV events report what the worker caches.
    pub(crate) fn is_event_tracked(&self) -> bool {
        self.is_event_tracked
    }

    /// Sets whether KV events report what the worker caches.
    pub(crate) fn set_event_tracked(&mut self, is_tracked: bool) {
        self.is_event_tracked = is_tracked;
    }

    /// Returns whether the estimate is off: KV events report what is cached, and without a known
    /// capacity the next evictions cannot be predicted. The next
    /// [`evict_to_fit`](Self::evict_to_fit) then empties the free queue.
    pub(crate) fn is_disabled(&self) -> bool {
        self.is_event_tracked && self.capacity.is_learned()
    }

    /// Counts a booking whose prefill is sent and not finished.
    pub(crate) fn begin_prefill(&mut self) {
        self.pending_prefills += 1;
    }

    /// Counts the end of a booking's prefill, which [`begin_prefill`](Self::begin_prefill) counted.
    /// Returns whether no other booking is in prefill.
    pub(crate) fn end_prefill(&mut self) -> bool {
        debug_assert!(
            self.pending_prefills > 0,
            "every booking that leaves prefill has entered it"
        );
        self.pending_prefills.subtract(1);
        self.pending_prefills == 0
    }

    /// Returns the number of unpinned blocks that are still cached.
    pub(crate) fn cached_blocks(&self) -> u64 {
        self.reusable_blocks
    }

    /// Empties the cache and forgets what was learned from hits and misses. The capacity, the
    /// headroom and the count of pending prefills stay. The caller records the loss in the tree with
    /// [`PrefixTree::lose_cached`], and then calls [`evict_lost`](Self::evict_lost).
    pub(crate) fn clear(&mut self) {
        self.lost_until = self.last_epoch;
        self.reusable_blocks = 0;
        self.free_blocks = 0;
        self.ghosts.clear();
        self.hit_audit = HitAudit::default();
    }

    /// Removes lost blocks from the free queue and from the tree, of at most `max_entries` entries
    /// of the queue. Returns whether some are left.
    pub(crate) fn evict_lost(
        &mut self,
        max_entries: usize,
        worker: WorkerIndex,
        tree: &mut PrefixTree,
    ) -> bool {
        for _ in 0..max_entries {
            let Some(front) = self.lost_front() else {
                return false;
            };
            let evicted = tree.evict(front.node, worker, front.epoch, u32::MAX, true);
            match evicted.resume_at {
                Some(node) => front.node = node,
                None => {
                    self.free_queue.pop_front();
                }
            }
        }
        self.lost_front().is_some()
    }

    /// Returns the first entry of the free queue, if it is lost.
    fn lost_front(&mut self) -> Option<&mut FreedRequest> {
        let lost_until = self.lost_until;
        self.free_queue
            .front_mut()
            .filter(|front| front.epoch <= lost_until)
    }

    /// Returns the latest free epoch.
    pub(crate) fn last_epoch(&self) -> u64 {
        self.last_epoch
    }

    /// Returns a new free epoch, which identifies one release of blocks and is never reused.
    pub(crate) fn next_epoch(&mut self) -> u64 {
        self.last_epoch += 1;
        self.last_epoch
    }

    /// Removes reused blocks from the free queue: cached blocks that a new request pins again.
    /// `runs` are those of the [`PinChange`](crate::active_tree::PinChange), deepest first.
    ///
    /// The deepest `recomputed` of them are computed again instead of hit (engines always compute
    /// the last token of a prompt, and so its block). Under vLLM the old physical blocks of those
    /// stay in the free queue as duplicates that no request can hit. Under SGLang `recomputed` is
    /// ignored.
    pub(crate) fn reuse(&mut self, runs: &[ReusedRun], recomputed: u32) {
        let mut recomputed = if self.keeps_duplicates() {
            recomputed
        } else {
            0
        };
        for run in runs {
            self.reusable_blocks.subtract(run.blocks.into());
            let Some(entry) = self.freed_at_mut(run.freed_epoch) else {
                debug_assert!(
                    false,
                    "an unpinned cached block has an entry in the free queue"
                );
                continue;
            };
            let duplicates = recomputed.min(run.blocks);
            recomputed -= duplicates;
            entry.reusable.subtract(run.blocks);
            entry.duplicates += duplicates;
            self.free_blocks.subtract((run.blocks - duplicates).into());
        }
    }

    /// Returns the queue entry of the free epoch `epoch`, unless it has left the queue.
    fn freed_at_mut(&mut self, epoch: u64) -> Option<&mut FreedRequest> {
        let index = self
            .free_queue
            .binary_search_by_key(&epoch, |freed| freed.epoch);
        self.free_queue.get_mut(index.ok()?)
    }

    /// Appends the blocks of a request that was released under `epoch`, with `unknown_output`
    /// blocks of unknown output at its tail. `epoch` must be later than that of every entry. Evicts
    /// nothing, even if the free queue exceeds the capacity. No effect if there are no blocks.
    pub(crate) fn push_freed(&mut self, unpinned: UnpinChange, unknown_output: u32, epoch: u64) {
        let freed = FreedRequest {
            unknown_output,
            reusable: unpinned.still_cached,
            duplicates: 0,
            node: unpinned.deepest_cached,
            epoch,
        };
        self.reusable_blocks += u64::from(freed.reusable);
        self.free_blocks += freed.blocks();
        if freed.blocks() > 0 {
            self.free_queue.push_back(freed);
        }
    }

    /// Evicts blocks, also from the tree, until `active_blocks`, the headroom (under SGLang) and
    /// the free queue fit the capacity. Active blocks are never evicted: if they alone exceed the
    /// capacity, the free queue is emptied. A [disabled](Self::is_disabled) estimate evicts
    /// everything.
    ///
    /// Evictions that the worker's events have not reported yet are added to `pending_evictions`,
    /// if any prefill is pending and the estimate is not disabled.
    ///
    /// Returns whether everything fits. If not, the next call continues: one call evicts blocks of
    /// at most [`MAX_EVICTIONS_PER_CALL`] entries of the free queue.
    pub(crate) fn evict_to_fit(
        &mut self,
        active_blocks: u64,
        worker: WorkerIndex,
        tree: &mut PrefixTree,
        pending_evictions: &mut PendingEvictions,
    ) -> bool {
        let is_disabled = self.is_disabled();
        let capacity = if is_disabled {
            0
        } else {
            self.capacity.blocks()
        };
        let records_evictions = self.is_event_tracked && !is_disabled && self.pending_prefills > 0;
        let whole_leaves = self.eviction == EvictionRule::SglangRadix;
        let headroom = if whole_leaves { self.headroom } else { 0 };
        let max_free_blocks = u64::from(capacity).saturating_sub(active_blocks + headroom);
        let mut evictions = 0;
        while self.free_blocks > max_free_blocks {
            evictions += 1;
            if evictions > MAX_EVICTIONS_PER_CALL {
                return false;
            }
            if self.lost_front().is_some() {
                self.evict_lost(1, worker, tree);
                continue;
            }
            let Some(front) = self.free_queue.front_mut() else {
                break;
            };
            let want = u32::try_from(self.free_blocks - max_free_blocks).unwrap_or(u32::MAX);
            let reusable_before = front.reusable;
            let evicted = front.evict(want, whole_leaves, worker, tree);
            let reusable_after = front.reusable;
            self.reusable_blocks
                .subtract(reusable_before.saturating_sub(reusable_after).into());
            self.free_blocks.subtract(evicted.blocks.into());
            self.evicted_total += u64::from(evicted.blocks);
            if let Some(shallowest) = evicted.shallowest
                && records_evictions
            {
                pending_evictions.push(worker, shallowest);
            }
            if front.reusable == 0 {
                let is_spent = front.blocks() == 0;
                self.push_ghost(evicted.shallowest);
                if is_spent {
                    self.free_queue.pop_front();
                }
            }
        }
        self.compact();
        true
    }

    /// Remembers an evicted run that begins with `shallowest`; no effect if that is `None` or the
    /// capacity is not learned. Forgets the oldest run beyond [`MAX_GHOSTS`].
    fn push_ghost(&mut self, shallowest: Option<SequenceHash>) {
        let Some(shallowest) = shallowest.filter(|_| self.capacity.is_learned()) else {
            return;
        };
        if self.ghosts.len() == MAX_GHOSTS {
            self.ghosts.pop_front();
        }
        self.ghosts.push_back(Ghost {
            shallowest,
            evicted_total: self.evicted_total,
        });
    }

    /// Removes empty entries if the free queue has grown much longer than the capacity. An entry
    /// whose blocks were all pinned again stays until it reaches the front. Every other entry has
    /// at least one block, so most entries of an overlong queue are empty.
    fn compact(&mut self) {
        let max_len = 2 * self.capacity.blocks() as usize + 64;
        if self.free_queue.len() > max_len && self.lost_front().is_none() {
            self.free_queue.retain(|entry| entry.blocks() > 0);
        }
    }

    /// Returns what a new booking expects the worker to find in its cache. Reuse distances are
    /// included only while the capacity is learned and the worker has no events.
    ///
    /// `cached_blocks` is the prefix match of its prompt, of which other requests pin the first
    /// `active_blocks`. `runs` are the blocks that the booking takes out of the free queue, deepest
    /// first; call this before [`reuse`](Self::reuse), as the free queue must still contain them.
    /// `blocks_in_use` is how many blocks the worker's requests pinned before this booking.
    pub(crate) fn expected_hit(
        &self,
        cached_blocks: u32,
        active_blocks: u32,
        runs: &[ReusedRun],
        blocks_in_use: u64,
    ) -> ExpectedHit {
        let mut expected = ExpectedHit {
            cached_blocks,
            active_blocks,
            epoch: self.last_epoch,
            oldest_epoch: runs.first().map_or(u64::MAX, |run| run.freed_epoch),
            runs: SmallVec::new(),
        };
        if self.is_event_tracked || !self.capacity.is_learned() {
            return expected;
        }
        let mut reuse_distance = blocks_in_use;
        let mut entries = self.free_queue.iter().rev().peekable();
        for run in runs.iter().rev() {
            let is_freed_later = |entry: &&FreedRequest| entry.epoch > run.freed_epoch;
            while let Some(entry) = entries.next_if(|entry| is_freed_later(entry)) {
                reuse_distance += entry.blocks();
            }
            expected.runs.push(ExpectedRun {
                start: run.start,
                reuse_distance,
            });
        }
        expected
    }

    /// Compares a reported cache hit with what the booking expected, and adjusts the learned
    /// capacity. `next_block` is the first block of the prompt that was not expected to be cached:
    /// if the worker found it although the estimate has evicted it, the capacity is larger.
    ///
    /// Removes no blocks. The caller applies the result with
    /// [`forget_freed_before`](Self::forget_freed_before), and the new capacity with
    /// [`evict_to_fit`](Self::evict_to_fit).
    pub(crate) fn audit_hit(
        &mut self,
        expected: &ExpectedHit,
        reported: ReportedHit,
        next_block: Option<SequenceHash>,
    ) -> AuditResult {
        let survived_evictions = match next_block {
            Some(block) if reported.blocks > expected.expected() => self.evicted_since(block),
            _ => None,
        };
        self.hit_audit
            .observe(expected, reported, survived_evictions, &mut self.capacity)
    }

    /// Returns how many blocks were evicted after the run that began with `shallowest`, if that run
    /// is remembered.
    fn evicted_since(&self, shallowest: SequenceHash) -> Option<u64> {
        let mut latest_first = self.ghosts.iter().rev();
        let ghost = latest_first.find(|ghost| ghost.shallowest == shallowest)?;
        Some(self.evicted_total - ghost.evicted_total)
    }

    /// Forgets what was freed before the free epoch `epoch`, because the worker has lost it. The
    /// caller records the loss in the tree with [`PrefixTree::lose_freed_before`], and then calls
    /// [`evict_lost`](Self::evict_lost). Adds up the entries of the free queue that are lost.
    pub(crate) fn forget_freed_before(&mut self, epoch: u64) {
        let lost_before = self.lost_until;
        let lost_entries = self
            .free_queue
            .iter()
            .skip_while(|entry| entry.epoch <= lost_before)
            .take_while(|entry| entry.epoch < epoch);
        let (mut reusable_blocks, mut free_blocks) = (0, 0);
        for entry in lost_entries {
            reusable_blocks += u64::from(entry.reusable);
            free_blocks += entry.blocks();
        }
        self.reusable_blocks.subtract(reusable_blocks);
        self.free_blocks.subtract(free_blocks);
        self.lost_until = lost_before.max(epoch.saturating_sub(1));
        self.ghosts.clear();
    }
}
