//! Slow and obviously correct model of one worker: a `HashMap<SequenceHash, HashSet<RequestId>>`,
//! and a list for the free queue.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU32;

use foresee_core::sequence::{Sequence, SequenceHash};

pub(crate) const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();

/// Block in a worker's free queue; `None` for a block that no request can hit.
type FreeBlock = Option<SequenceHash>;

/// Model of one worker.
#[derive(Clone, Debug, Default)]
pub(crate) struct NaiveWorker {
    prefix_caching: bool,
    /// Number of blocks.
    capacity: usize,
    /// Requests that pin each block.
    pinned: HashMap<SequenceHash, HashSet<u64>>,
    /// Blocks that were computed and not evicted since.
    computed: HashSet<SequenceHash>,
    /// Blocks without a reference, in the order in which they are evicted.
    free: VecDeque<FreeBlock>,
    /// Number of unshared blocks of each request.
    unshared: HashMap<u64, usize>,
    /// Full blocks of output of each request.
    output: HashMap<u64, usize>,
    /// Requests in prefill.
    in_prefill: HashSet<u64>,
    /// Blocks that were evicted while any request was in prefill, and that events have not reported
    /// since.
    evicted: HashSet<SequenceHash>,
    /// Blocks that were released since the latest event.
    freed: HashSet<SequenceHash>,
}

impl NaiveWorker {
    pub(crate) fn new(capacity: usize, prefix_caching: bool) -> Self {
        Self {
            prefix_caching,
            capacity,
            ..Self::default()
        }
    }

    /// Returns the number of active blocks.
    pub(crate) fn active(&self) -> usize {
        self.pinned.len() + self.unshared.values().sum::<usize>()
    }

    /// Returns the number of blocks without a reference that a request could still hit.
    pub(crate) fn reusable(&self) -> usize {
        self.free.iter().flatten().count()
    }

    /// Returns the number of blocks that a request could hit, pinned or not.
    pub(crate) fn cached(&self) -> usize {
        self.pinned.len() + self.reusable()
    }

    /// Sets the number of blocks, and evicts what does not fit.
    pub(crate) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.evict_to_fit();
    }

    /// Empties the cache; pins stay.
    pub(crate) fn clear_cache(&mut self) {
        self.computed.clear();
        self.free.clear();
        self.evicted.clear();
        self.freed.clear();
    }

    /// Records that events reported these blocks as stored or removed.
    pub(crate) fn on_events(&mut self, hashes: impl Iterator<Item = SequenceHash>) {
        let mut hashes = hashes.peekable();
        let has_any = hashes.peek().is_some();
        if has_any {
            self.freed.clear();
        }
        for hash in hashes {
            self.evicted.remove(&hash);
        }
        if has_any && self.in_prefill.is_empty() {
            self.evicted.clear();
        }
    }

    /// Returns whether the eviction of the block may be pending: it was evicted for requests some of
    /// which are still in prefill.
    pub(crate) fn may_be_pending_eviction(&self, hash: SequenceHash) -> bool {
        self.evicted.contains(&hash)
    }

    /// Books a request with this prompt.
    pub(crate) fn book(&mut self, request: u64, sequence: &Sequence) {
        self.in_prefill.insert(request);
        if self.prefix_caching {
            // If the whole prompt is cached, its last block is computed again.
            if let Some(last) = sequence
                .hashes()
                .get(sequence.max_reusable_blocks() as usize)
                && self.computed.contains(last)
            {
                self.make_duplicate(*last);
            }
            for &hash in sequence.hashes() {
                self.pinned.entry(hash).or_default().insert(request);
                self.free.retain(|&free| free != Some(hash));
            }
        }
        self.grow(request, sequence, 0);
    }

    /// Sets the number of output tokens of a request.
    pub(crate) fn grow(&mut self, request: u64, sequence: &Sequence, output_tokens: u32) {
        let blocks = (sequence.tokens() + output_tokens).div_ceil(BLOCK_SIZE.get()) as usize;
        let shared = if self.prefix_caching {
            sequence.hashes().len()
        } else {
            0
        };
        self.unshared.insert(request, blocks - shared);
        let stored = sequence.tokens() + output_tokens.saturating_sub(1);
        let full = (stored / BLOCK_SIZE.get()) as usize;
        self.output.insert(request, full.saturating_sub(shared));
        self.evict_to_fit();
    }

    /// Records that the prompt of a request is computed.
    pub(crate) fn mark_computed(&mut self, request: u64, sequence: &Sequence) {
        self.in_prefill.remove(&request);
        if self.prefix_caching {
            self.computed.extend(sequence.hashes());
        }
    }

    /// Makes the old physical block a duplicate that no request can hit, because a cached block is
    /// computed again.
    fn make_duplicate(&mut self, hash: SequenceHash) {
        for free in &mut self.free {
            if *free == Some(hash) {
                *free = None;
            }
        }
    }

    /// Releases a request. `is_computed` means that it had its first token, so the full blocks of its
    /// output stay in the free queue until they are evicted. Requests can hit the blocks of
    /// `output_sequence`, the prompt followed by output.
    pub(crate) fn release(
        &mut self,
        request: u64,
        sequence: &Sequence,
        is_computed: bool,
        output_sequence: Option<&Sequence>,
    ) {
        self.in_prefill.remove(&request);
        self.unshared.remove(&request);
        let output = self.output.remove(&request).unwrap_or(0);
        if !self.prefix_caching {
            return;
        }
        if is_computed {
            let prompt_blocks = sequence.hashes().len();
            let is_lost = |hash| !self.computed.contains(hash);
            let known = match output_sequence {
                Some(output_sequence) if !sequence.hashes().iter().any(is_lost) => {
                    &output_sequence.hashes()[prompt_blocks..]
                }
                _ => &[],
            };
            self.computed.extend(known);
            let mut known: Vec<SequenceHash> = known.to_vec();
            known.retain(|hash| !self.pinned.contains_key(hash));
            for &hash in &known {
                self.make_duplicate(hash);
            }
            let unknown = output.saturating_sub(known.len());
            self.free.extend(std::iter::repeat_n(None, unknown));
            self.free.extend(known.iter().rev().map(|&hash| Some(hash)));
            self.freed.extend(known);
        }
        for hash in sequence.hashes().iter().rev() {
            let Some(requests) = self.pinned.get_mut(hash) else {
                continue;
            };
            requests.remove(&request);
            if requests.is_empty() {
                self.pinned.remove(hash);
                if self.computed.contains(hash) {
                    self.free.push_back(Some(*hash));
                    self.freed.insert(*hash);
                }
            }
        }
        self.evict_to_fit();
    }

    fn evict_to_fit(&mut self) {
        if !self.prefix_caching {
            return;
        }
        while self.free.len() > self.capacity.saturating_sub(self.active()) {
            if let Some(Some(hash)) = self.free.pop_front() {
                self.computed.remove(&hash);
                if !self.in_prefill.is_empty() {
                    self.evicted.insert(hash);
                }
            }
        }
    }

    /// Returns the number of leading blocks that are cached and that events may not have reported
    /// yet: pinned blocks, and blocks released since the latest event.
    pub(crate) fn unreported_prefix(&self, sequence: &Sequence) -> usize {
        let may_be_unreported = |hash: &&SequenceHash| {
            let is_pinned = self.pinned.contains_key(*hash);
            self.computed.contains(*hash) && (is_pinned || self.freed.contains(*hash))
        };
        sequence
            .hashes()
            .iter()
            .take_while(may_be_unreported)
            .count()
    }

    /// Returns the number of leading cached blocks, and the number of leading active blocks.
    pub(crate) fn prefix_match(&self, sequence: &Sequence) -> (usize, usize) {
        let leading = |has_block: &dyn Fn(&SequenceHash) -> bool| {
            sequence
                .hashes()
                .iter()
                .take_while(|hash| has_block(hash))
                .count()
        };
        (
            leading(&|hash| self.computed.contains(hash)),
            leading(&|hash| self.pinned.contains_key(hash)),
        )
    }
}
