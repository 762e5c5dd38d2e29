//! The slow, obviously right model of one worker: a `HashMap<SequenceHash, HashSet<RequestId>>`,
//! a list for the free queue, and no cleverness.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU32;

use foresee_core::sequence::{Sequence, SequenceHash};

pub(crate) const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();

/// One block in a worker's free queue; `None` is one whose content nobody can ask for.
type FreeBlock = Option<SequenceHash>;

#[derive(Clone, Debug, Default)]
pub(crate) struct NaiveWorker {
    prefix_caching: bool,
    capacity: usize,
    pinned: HashMap<SequenceHash, HashSet<u64>>,
    computed: HashSet<SequenceHash>,
    /// In the order in which the blocks will be taken.
    free: VecDeque<FreeBlock>,
    unshared: HashMap<u64, usize>,
    /// Full blocks of output of each request.
    output: HashMap<u64, usize>,
    /// Requests that have computed nothing yet.
    waiting: HashSet<u64>,
    /// Blocks evicted while any of those waited, and not all told of since.
    evicted: HashSet<SequenceHash>,
    /// Blocks freed since events last told of any.
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

    pub(crate) fn active(&self) -> usize {
        self.pinned.len() + self.unshared.values().sum::<usize>()
    }

    /// Blocks without a reference that a request could still hit.
    pub(crate) fn reusable(&self) -> usize {
        self.free.iter().flatten().count()
    }

    /// Blocks that somebody may still ask for, pinned or not.
    pub(crate) fn cached(&self) -> usize {
        self.pinned.len() + self.reusable()
    }

    pub(crate) fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.make_room();
    }

    pub(crate) fn forget_cache(&mut self) {
        self.computed.clear();
        self.free.clear();
        self.evicted.clear();
        self.freed.clear();
    }

    /// Events told of these blocks.
    pub(crate) fn told(&mut self, hashes: impl Iterator<Item = SequenceHash>) {
        let mut hashes = hashes.peekable();
        let has_any = hashes.peek().is_some();
        if has_any {
            self.freed.clear();
        }
        for hash in hashes {
            self.evicted.remove(&hash);
        }
        if has_any && self.waiting.is_empty() {
            self.evicted.clear();
        }
    }

    fn waits_no_longer(&mut self, request: u64) {
        self.waiting.remove(&request);
    }

    /// Whether the block was evicted for requests some of which wait.
    pub(crate) fn may_foresee(&self, hash: SequenceHash) -> bool {
        self.evicted.contains(&hash)
    }

    pub(crate) fn book(&mut self, request: u64, sequence: &Sequence) {
        self.waiting.insert(request);
        if self.prefix_caching {
            // Of a prompt that is cached whole the last block is computed again.
            if let Some(last) = sequence.hashes().get(sequence.reusable_blocks() as usize)
                && self.computed.contains(last)
            {
                self.leave_a_copy(*last);
            }
            for &hash in sequence.hashes() {
                self.pinned.entry(hash).or_default().insert(request);
                self.free.retain(|&free| free != Some(hash));
            }
        }
        self.grow(request, sequence, 0);
    }

    pub(crate) fn grow(&mut self, request: u64, sequence: &Sequence, generated: u32) {
        let blocks = (sequence.tokens() + generated).div_ceil(BLOCK_SIZE.get()) as usize;
        let shared = if self.prefix_caching {
            sequence.hashes().len()
        } else {
            0
        };
        self.unshared.insert(request, blocks - shared);
        let stored = sequence.tokens() + generated.saturating_sub(1);
        let full = (stored / BLOCK_SIZE.get()) as usize;
        self.output.insert(request, full.saturating_sub(shared));
        self.make_room();
    }

    pub(crate) fn computed(&mut self, request: u64, sequence: &Sequence) {
        self.waits_no_longer(request);
        if self.prefix_caching {
            self.computed.extend(sequence.hashes());
        }
    }

    /// A block that is computed again although it is cached: nobody can ask for the old one.
    fn leave_a_copy(&mut self, hash: SequenceHash) {
        for free in &mut self.free {
            if *free == Some(hash) {
                *free = None;
            }
        }
    }

    /// `computed`: the request had its first token, so the full blocks of its output are in the
    /// way of others' until they are taken. Those that `answered` tells can be asked for.
    pub(crate) fn free(
        &mut self,
        request: u64,
        sequence: &Sequence,
        computed: bool,
        answered: Option<&Sequence>,
    ) {
        self.waits_no_longer(request);
        self.unshared.remove(&request);
        let output = self.output.remove(&request).unwrap_or(0);
        if !self.prefix_caching {
            return;
        }
        if computed {
            let prompt = sequence.hashes().len();
            let lost = |hash| !self.computed.contains(hash);
            let known = match answered {
                Some(answered) if !sequence.hashes().iter().any(lost) => {
                    &answered.hashes()[prompt..]
                }
                _ => &[],
            };
            self.computed.extend(known);
            let mut known: Vec<SequenceHash> = known.to_vec();
            known.retain(|hash| !self.pinned.contains_key(hash));
            for &hash in &known {
                self.leave_a_copy(hash);
            }
            let anonymous = output.saturating_sub(known.len());
            self.free.extend(std::iter::repeat_n(None, anonymous));
            self.free.extend(known.iter().rev().map(|&hash| Some(hash)));
            self.freed.extend(known);
        }
        for hash in sequence.hashes().iter().rev() {
            let Some(by) = self.pinned.get_mut(hash) else {
                continue;
            };
            by.remove(&request);
            if by.is_empty() {
                self.pinned.remove(hash);
                if self.computed.contains(hash) {
                    self.free.push_back(Some(*hash));
                    self.freed.insert(*hash);
                }
            }
        }
        self.make_room();
    }

    fn make_room(&mut self) {
        if !self.prefix_caching {
            return;
        }
        while self.free.len() > self.capacity.saturating_sub(self.active()) {
            if let Some(Some(hash)) = self.free.pop_front() {
                self.computed.remove(&hash);
                if !self.waiting.is_empty() {
                    self.evicted.insert(hash);
                }
            }
        }
    }

    /// Leading blocks that are cached and that events may not have told of yet: pinned ones, and
    /// those freed since they last did.
    pub(crate) fn freed_since_told(&self, sequence: &Sequence) -> usize {
        let is_such = |hash: &&SequenceHash| {
            let is_pinned = self.pinned.contains_key(*hash);
            self.computed.contains(*hash) && (is_pinned || self.freed.contains(*hash))
        };
        sequence.hashes().iter().take_while(is_such).count()
    }

    /// Leading blocks that are (cached, active).
    pub(crate) fn depth(&self, sequence: &Sequence) -> (usize, usize) {
        let leading = |holds: &dyn Fn(&SequenceHash) -> bool| {
            sequence
                .hashes()
                .iter()
                .take_while(|hash| holds(hash))
                .count()
        };
        (
            leading(&|hash| self.computed.contains(hash)),
            leading(&|hash| self.pinned.contains_key(hash)),
        )
    }
}
