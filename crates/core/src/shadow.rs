//! What a worker's cache must still contain when nobody tells: the engine's own replacement
//! rule, run on what was sent to it. Where events tell, it runs ahead of them: see
//! [`foreseen`](crate::foreseen). SGLang's rule is told as what it does otherwise: see
//! [`radix`].
//!
//! vLLM's rule (`BlockPool` and `FreeKVCacheBlockQueue`): a full block without references goes to
//! the end of one free queue, a freed request's blocks tail first, and a partial block to its
//! front, so that it is taken next and evicts nothing. New blocks are taken from the front, and
//! only then does a cached block lose its content; a hit takes it out of the queue. Equal blocks
//! are not made one: where a request computes what is cached already, both copies stay.
//!
//! So one entry per freed request is enough here: its blocks lie on one path of the
//! [`PrefixTree`] and leave from the tail upwards.

use std::collections::VecDeque;

use smallvec::SmallVec;

use crate::capacity::{Capacity, CapacitySource};
use crate::foreseen::Foreseen;
use crate::reports::{Claim, Hits, Reports, Run, Verdict};
use crate::sequence::SequenceHash;
use crate::tree::{Evicted, NodeId, PrefixTree, Revived, Slot, Unpinned};

mod radix;

/// How an engine chooses what to evict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eviction {
    /// As vLLM does: single blocks, those of the request that ended first, tail first.
    #[default]
    Queue,
    /// As SGLang does: whole leaves of its radix tree, the least recently used first.
    Radix,
}

impl Eviction {
    /// The name used in configuration and in the admin API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Radix => "radix",
        }
    }
}

/// Runs of blocks whose eviction is remembered, to see whether the engine still had them.
const MOST_GHOSTS: usize = 1024;

/// One freed request in the free queue.
#[derive(Debug)]
struct Freed {
    /// Full blocks of output whose tokens are not known here. They were the request's tail, so
    /// they are taken first.
    output: u32,
    /// Blocks of its path that nothing has pinned since.
    cached: u32,
    /// Blocks of its path that a request pinned and computed again. What lies below them is taken
    /// before.
    copies: u32,
    /// Where those begin, deepest first.
    node: NodeId,
    stamp: u64,
}

impl Freed {
    fn blocks(&self) -> u64 {
        u64::from(self.output) + u64::from(self.cached) + u64::from(self.copies)
    }

    /// Takes up to `want` blocks, or what more it takes to evict `whole` nodes, and returns how
    /// many.
    fn take(&mut self, want: u32, whole: bool, worker: Slot, tree: &mut PrefixTree) -> Evicted {
        let output = match whole {
            true => self.output,
            false => self.output.min(want),
        };
        self.output -= output;
        let left = want.saturating_sub(output);
        let mut taken = tree.evict(self.node, worker, self.stamp, left, whole);
        self.cached -= taken.blocks;
        taken.blocks += output;
        match taken.next {
            Some(node) => self.node = node,
            None => {
                debug_assert_eq!(self.cached, 0, "a freed path is evicted whole");
                taken.blocks += std::mem::take(&mut self.cached);
                let copies = self.copies.min(want.saturating_sub(taken.blocks));
                self.copies -= copies;
                taken.blocks += copies;
            }
        }
        taken
    }
}

/// A run of blocks that was evicted whole.
#[derive(Clone, Copy, Debug)]
struct Ghost {
    /// Its block nearest to the root.
    uppermost: SequenceHash,
    /// How many blocks had been evicted before, ever.
    evicted: u64,
}

/// The free queue of one worker.
#[derive(Debug)]
pub(crate) struct Shadow {
    eviction: Eviction,
    capacity: Capacity,
    /// Events tell what is cached, and this what will be evicted.
    is_told: bool,
    /// Bookings without a first token, whose evictions may be yet to come.
    waiting: u32,
    /// Blocks that a radix cache frees for its requests beyond those they take.
    headroom: u64,
    /// In the order of their stamps.
    queue: VecDeque<Freed>,
    /// Sums over the queue: blocks that a request could hit, and all.
    cached: u64,
    free: u64,
    last_stamp: u64,
    /// Blocks evicted, ever.
    evicted: u64,
    /// The latest runs evicted, while the capacity is being learned.
    ghosts: VecDeque<Ghost>,
    reports: Reports,
}

impl Shadow {
    /// `capacity` in blocks, if it is known.
    pub(crate) fn new(eviction: Eviction, capacity: Option<u32>) -> Self {
        Self {
            eviction,
            capacity: Capacity::new(capacity),
            is_told: false,
            waiting: 0,
            headroom: 0,
            queue: VecDeque::new(),
            cached: 0,
            free: 0,
            last_stamp: 0,
            evicted: 0,
            ghosts: VecDeque::new(),
            reports: Reports::default(),
        }
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity.blocks()
    }

    pub(crate) fn eviction(&self) -> Eviction {
        self.eviction
    }

    pub(crate) fn capacity_source(&self) -> CapacitySource {
        self.capacity.source()
    }

    /// The worker has said how many blocks it has.
    pub(crate) fn set_capacity(&mut self, blocks: u32) {
        self.capacity = Capacity::reported(blocks);
        self.ghosts.clear();
    }

    /// Whether events tell what is cached.
    pub(crate) fn is_told(&self) -> bool {
        self.is_told
    }

    pub(crate) fn set_told(&mut self, is_told: bool) {
        self.is_told = is_told;
    }

    /// Whether nothing is kept here: events tell what is cached, and what they will tell cannot be
    /// foreseen from a guess at the capacity.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_told && self.capacity.is_learned()
    }

    /// A booking waits for its first token.
    pub(crate) fn waits(&mut self) {
        self.waiting += 1;
    }

    /// A booking waits no longer. Returns whether none does.
    pub(crate) fn waits_no_longer(&mut self) -> bool {
        debug_assert!(self.waiting > 0, "it has waited");
        self.waiting -= 1;
        self.waiting == 0
    }

    /// Unpinned blocks that are still cached.
    pub(crate) fn cached_blocks(&self) -> u64 {
        self.cached
    }

    /// The worker has lost its cache.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.cached = 0;
        self.free = 0;
        self.ghosts.clear();
        self.reports = Reports::default();
    }

    /// The latest freeing.
    pub(crate) fn last_stamp(&self) -> u64 {
        self.last_stamp
    }

    /// A number that marks one freeing; none is used twice.
    pub(crate) fn next_stamp(&mut self) -> u64 {
        self.last_stamp += 1;
        self.last_stamp
    }

    /// Cached blocks were pinned again. The deepest `copied` of them the worker computes once
    /// more, so that their earlier copies stay where they are, of use to nobody.
    pub(crate) fn revived(&mut self, runs: &[Revived], copied: u32) {
        let mut copied = if self.keeps_copies() { copied } else { 0 };
        for run in runs {
            self.cached -= u64::from(run.blocks);
            let Some(entry) = self.entry_mut(run.freed_by) else {
                debug_assert!(false, "an unpinned block is in the queue");
                continue;
            };
            let copies = copied.min(run.blocks);
            copied -= copies;
            entry.cached -= run.blocks;
            entry.copies += copies;
            self.free -= u64::from(run.blocks - copies);
        }
    }

    fn entry_mut(&mut self, stamp: u64) -> Option<&mut Freed> {
        let index = self.queue.binary_search_by_key(&stamp, |freed| freed.stamp);
        self.queue.get_mut(index.ok()?)
    }

    /// A request's blocks were freed under `stamp`, with `output` blocks of unknown output at its
    /// tail.
    pub(crate) fn freed(&mut self, unpinned: Unpinned, output: u32, stamp: u64) {
        let freed = Freed {
            output,
            cached: unpinned.cached,
            copies: 0,
            node: unpinned.deepest,
            stamp,
        };
        self.cached += u64::from(freed.cached);
        self.free += freed.blocks();
        if freed.blocks() > 0 {
            self.queue.push_back(freed);
        }
    }

    /// Evicts until the worker's `active` blocks and what is left here fit its capacity. What
    /// events are yet to tell of that is `foreseen`.
    pub(crate) fn make_room(
        &mut self,
        active: u64,
        worker: Slot,
        tree: &mut PrefixTree,
        foreseen: &mut Foreseen,
    ) {
        let is_idle = self.is_idle();
        let capacity = if is_idle { 0 } else { self.capacity.blocks() };
        let foresees = self.is_told && !is_idle && self.waiting > 0;
        let whole = self.eviction == Eviction::Radix;
        let headroom = if whole { self.headroom } else { 0 };
        let fits = u64::from(capacity).saturating_sub(active + headroom);
        while self.free > fits
            && let Some(front) = self.queue.front_mut()
        {
            let want = u32::try_from(self.free - fits).unwrap_or(u32::MAX);
            let cached = front.cached;
            let taken = front.take(want, whole, worker, tree);
            self.cached -= u64::from(cached - front.cached);
            self.free -= u64::from(taken.blocks);
            self.evicted += u64::from(taken.blocks);
            if let Some(uppermost) = taken.uppermost
                && foresees
            {
                foreseen.add(worker, uppermost);
            }
            if front.cached == 0 {
                let is_empty = front.blocks() == 0;
                self.remember(taken.uppermost);
                if is_empty {
                    self.queue.pop_front();
                }
            }
        }
        self.drop_empty();
    }

    fn remember(&mut self, uppermost: Option<SequenceHash>) {
        let Some(uppermost) = uppermost.filter(|_| self.capacity.is_learned()) else {
            return;
        };
        if self.ghosts.len() == MOST_GHOSTS {
            self.ghosts.pop_front();
        }
        self.ghosts.push_back(Ghost {
            uppermost,
            evicted: self.evicted,
        });
    }

    /// Entries whose blocks were pinned again would go when they reach the front. Others hold at
    /// least a block each, so a queue much longer than the capacity is mostly empty ones.
    fn drop_empty(&mut self) {
        if self.queue.len() > 2 * self.capacity.blocks() as usize + 64 {
            self.queue.retain(|entry| entry.blocks() > 0);
        }
    }

    /// What a new booking takes to be cached: it reaches `cached` blocks deep, the first `active`
    /// of them pinned by others, and took these `runs` out of the queue, where they still are.
    /// `in_use` is how many blocks the worker's requests pinned before.
    pub(crate) fn claim(&self, cached: u32, active: u32, runs: &[Revived], in_use: u64) -> Claim {
        let mut claim = Claim {
            cached,
            active,
            made_at: self.last_stamp,
            oldest: runs.first().map_or(u64::MAX, |run| run.freed_by),
            runs: SmallVec::new(),
        };
        if self.is_told || !self.capacity.is_learned() {
            return claim;
        }
        let mut behind = in_use;
        let mut entries = self.queue.iter().rev().peekable();
        for run in runs.iter().rev() {
            let is_behind = |entry: &&Freed| entry.stamp > run.freed_by;
            while let Some(entry) = entries.next_if(|entry| is_behind(entry)) {
                behind += entry.blocks();
            }
            claim.runs.push(Run {
                start: run.start,
                behind,
            });
        }
        claim
    }

    /// The worker reports `hits` of a prompt of which `claim` was made.
    /// `next` is the first block that the claim did not expect.
    pub(crate) fn observe(
        &mut self,
        claim: &Claim,
        hits: Hits,
        next: Option<SequenceHash>,
    ) -> Verdict {
        let spared = match next {
            Some(next) if hits.blocks > claim.expected() => self.evicted_since(next),
            _ => None,
        };
        self.reports
            .observe(claim, hits, spared, &mut self.capacity)
    }

    /// How many blocks were evicted after the run that began with `uppermost`.
    fn evicted_since(&self, uppermost: SequenceHash) -> Option<u64> {
        let mut latest_first = self.ghosts.iter().rev();
        let ghost = latest_first.find(|ghost| ghost.uppermost == uppermost)?;
        Some(self.evicted - ghost.evicted)
    }

    /// What was freed before `stamp` is not cached any longer.
    pub(crate) fn forget_freed_before(&mut self, stamp: u64) {
        self.queue.retain(|entry| entry.stamp >= stamp);
        let cached = self.queue.iter().map(|entry| u64::from(entry.cached));
        self.cached = cached.sum();
        self.free = self.queue.iter().map(Freed::blocks).sum();
        self.ghosts.clear();
    }
}
