//! What workers cache, as their own events tell it.
//!
//! [`CacheView`] follows one engine's events and turns them into changes in terms of sequence
//! hashes; it belongs to whoever listens to that engine, outside the router's lock. `CacheIndex`
//! is the router's side: which workers hold which prefix.
//!
//! Engines' own hashes are opaque names here. Blocks are hashed anew from their token ids, so
//! that neither the engine's algorithm nor what it mixes in needs to be known, and parents are
//! found by the engine's name for them.
//!
//! Engines may store one block several times and then remove it as often (vLLM does not merge
//! physical blocks with equal content), so stores are counted: a view that kept a set was wrong
//! about half of all block-aligned repeats.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::num::NonZeroU32;

use smallvec::SmallVec;

use crate::sequence::{SequenceHash, extend};
use crate::tree::{AlreadyHashed, Depth, Slot};

type ByHash<V> = HashMap<u64, V, BuildHasherDefault<AlreadyHashed>>;

/// Runs of blocks with unknown parents that are kept, waiting for them.
const MAX_PARKED: usize = 256;

/// Token ids of all of those together, but for the last.
const MAX_PARKED_TOKENS: usize = 1 << 20;

/// Blocks one view follows at most. A stream that loses removals must not grow it for ever.
const MAX_BLOCKS: usize = 1 << 22;

/// A run of blocks of one sequence that came to be cached.
#[derive(Clone, Copy, Debug)]
pub struct StoredBlocks<'a> {
    /// The engine's name of the block before the first; `None` if the first begins its sequence.
    pub parent: Option<u64>,
    /// The engine's names of the blocks, in order.
    pub hashes: &'a [u64],
    /// Their token ids, `block_size` for each.
    pub tokens: &'a [u32],
    /// The engine's tokens per block.
    pub block_size: u32,
    /// The [`salt`](crate::sequence::salt) of the sequence; looked at if there is no parent.
    pub salt: u64,
}

/// What an event changes in the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Prefixes that are cached and were not.
    pub added: Vec<SequenceHash>,
    /// Prefixes that are no longer cached.
    pub removed: Vec<SequenceHash>,
    /// The engine's blocks are so many times the router's: only the prefixes that end with one of
    /// its blocks are told of. 0 while nothing was stored.
    pub stride: u32,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// The sequence hash of its end.
    hash: SequenceHash,
    /// The engine's name of the block before; [`NO_PARENT`] if there is none.
    parent: u64,
    stores: u32,
    /// Blocks that name this one as parent.
    children: u32,
    /// All blocks before it are cached, so that it can be hit.
    reachable: bool,
}

/// Names are 64-bit digests; that one is this very number is as unlikely as any collision.
const NO_PARENT: u64 = 0;

/// A run that cannot be hashed before its parent is known.
#[derive(Debug)]
struct Parked {
    parent: u64,
    hashes: Vec<u64>,
    tokens: Vec<u32>,
}

/// One engine's prefix cache, followed event by event.
#[derive(Debug)]
pub struct CacheView {
    block_size: NonZeroU32,
    /// The engine's block size over the router's; 0 until it is known.
    stride: u32,
    blocks: ByHash<Block>,
    /// The sum of all blocks' stores.
    stored: u64,
    parked: VecDeque<Parked>,
    /// Blocks that went before their children did, and how many of those are left. Rare: engines
    /// evict tails first.
    holes: ByHash<u32>,
    exact: bool,
}

impl CacheView {
    /// An empty cache. `block_size` is the router's; an engine's must be a multiple of it.
    #[must_use]
    pub fn new(block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            stride: 0,
            blocks: ByHash::default(),
            stored: 0,
            parked: VecDeque::new(),
            holes: ByHash::default(),
            exact: true,
        }
    }

    /// Whether everything said so far could be followed. What could not is missing: a view
    /// promises too little, never too much.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.exact && self.parked.is_empty()
    }

    /// Blocks that are cached, reachable or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is cached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks of the engine's memory that its cache takes: each as often as it was stored and not
    /// yet removed. If that is more than the engine has, removals were lost. Runs that wait for
    /// their parents are not counted.
    #[must_use]
    pub fn stored_blocks(&self) -> u64 {
        self.stored
    }

    /// How often the engine has stored the block of this name and not removed it.
    #[must_use]
    pub fn copies(&self, name: u64) -> u32 {
        self.blocks.get(&name).map_or(0, |block| block.stores)
    }

    /// What an index that knows nothing must be told.
    #[must_use]
    pub fn contents(&self) -> Changes {
        let reachable = self.blocks.values().filter(|it| it.reachable);
        Changes {
            added: reachable.map(|it| it.hash).collect(),
            ..self.no_changes()
        }
    }

    /// Blocks came to be cached.
    pub fn store(&mut self, stored: &StoredBlocks<'_>) -> Changes {
        let mut changes = self.no_changes();
        if !self.fits(stored) || self.blocks.len() >= MAX_BLOCKS {
            self.exact = false;
            return changes;
        }
        changes.stride = self.stride;
        let previous = match stored.parent {
            None => Some((stored.salt, true)),
            Some(parent) => self.blocks.get(&parent).map(|it| (it.hash, it.reachable)),
        };
        match previous {
            Some(previous) => {
                let parent = stored.parent.unwrap_or(NO_PARENT);
                self.append(parent, previous, stored.hashes, stored.tokens, &mut changes);
                self.unpark(&mut changes);
            }
            None => self.park(stored),
        }
        changes
    }

    /// Whether names, tokens and block size go together, and with what was stored before.
    fn fits(&mut self, stored: &StoredBlocks<'_>) -> bool {
        let size = stored.block_size;
        let stride = size / self.block_size;
        if stride == 0 || size % self.block_size != 0 || (self.stride != 0 && self.stride != stride)
        {
            return false;
        }
        self.stride = stride;
        stored.hashes.len().checked_mul(size as usize) == Some(stored.tokens.len())
    }

    fn no_changes(&self) -> Changes {
        Changes {
            stride: self.stride,
            ..Changes::default()
        }
    }

    /// Blocks are no longer cached, each once.
    pub fn remove(&mut self, hashes: &[u64]) -> Changes {
        let mut changes = self.no_changes();
        for name in hashes {
            let Some(block) = self.blocks.get_mut(name) else {
                self.forget_parked(*name);
                continue;
            };
            block.stores -= 1;
            self.stored -= 1;
            if block.stores > 0 {
                continue;
            }
            let block = *block;
            self.blocks.remove(name);
            self.lose_child(block.parent);
            if block.children > 0 {
                self.holes.insert(*name, block.children);
            }
            if block.reachable {
                changes.removed.push(block.hash);
                if block.children > 0 {
                    self.set_reachable_behind(*name, false, &mut changes);
                }
            }
        }
        changes
    }

    /// Nothing is cached any more.
    pub fn clear(&mut self) -> Changes {
        self.parked.clear();
        self.holes.clear();
        self.exact = true;
        self.stored = 0;
        let blocks = std::mem::take(&mut self.blocks);
        let reachable = blocks.into_values().filter(|it| it.reachable);
        Changes {
            removed: reachable.map(|it| it.hash).collect(),
            ..self.no_changes()
        }
    }

    /// Counts a run of blocks behind `parent`: its prefix's hash, and whether it is reachable.
    fn append(
        &mut self,
        mut parent: u64,
        (mut previous, mut reachable): (SequenceHash, bool),
        hashes: &[u64],
        tokens: &[u32],
        changes: &mut Changes,
    ) {
        let ours = self.block_size.get() as usize;
        let theirs = ours * self.stride as usize;
        for (&name, tokens) in hashes.iter().zip(tokens.chunks_exact(theirs)) {
            self.stored += 1;
            if let Some(block) = self.blocks.get_mut(&name) {
                block.stores += 1;
                (previous, reachable) = (block.hash, block.reachable);
            } else {
                previous = tokens.chunks_exact(ours).fold(previous, extend);
                // Zero, unless it comes back in front of blocks that stayed.
                let children = self.holes.remove(&name).unwrap_or(0);
                let block = Block {
                    hash: previous,
                    parent,
                    stores: 1,
                    children,
                    reachable,
                };
                self.blocks.insert(name, block);
                if let Some(parent) = self.blocks.get_mut(&parent) {
                    parent.children += 1;
                }
                if reachable {
                    changes.added.push(previous);
                    if children > 0 {
                        self.set_reachable_behind(name, true, changes);
                    }
                }
            }
            parent = name;
        }
    }

    /// A block whose parent is `name` went.
    fn lose_child(&mut self, name: u64) {
        if let Some(parent) = self.blocks.get_mut(&name) {
            parent.children = parent.children.saturating_sub(1);
        } else if let Some(children) = self.holes.get_mut(&name) {
            *children = children.saturating_sub(1);
            if *children == 0 {
                self.holes.remove(&name);
            }
        }
    }

    /// Marks everything behind a block. Looks at every block once: for holes, which are rare.
    fn set_reachable_behind(&mut self, name: u64, reachable: bool, changes: &mut Changes) {
        let mut children: ByHash<Vec<u64>> = ByHash::default();
        for (&child, block) in &self.blocks {
            if block.reachable != reachable {
                children.entry(block.parent).or_default().push(child);
            }
        }
        let mut behind = children.remove(&name).unwrap_or_default();
        while let Some(name) = behind.pop() {
            if let Some(block) = self.blocks.get_mut(&name) {
                block.reachable = reachable;
                let changed = if reachable {
                    &mut changes.added
                } else {
                    &mut changes.removed
                };
                changed.push(block.hash);
            }
            behind.extend(children.remove(&name).unwrap_or_default());
        }
    }

    fn park(&mut self, stored: &StoredBlocks<'_>) {
        let Some(parent) = stored.parent else {
            return;
        };
        let tokens: usize = self.parked.iter().map(|run| run.tokens.len()).sum();
        if self.parked.len() == MAX_PARKED || tokens > MAX_PARKED_TOKENS {
            self.parked.pop_front();
            self.exact = false;
        }
        self.parked.push_back(Parked {
            parent,
            hashes: stored.hashes.to_vec(),
            tokens: stored.tokens.to_vec(),
        });
    }

    /// Appends every parked run whose parent has come to be known.
    fn unpark(&mut self, changes: &mut Changes) {
        while let Some(index) = self
            .parked
            .iter()
            .position(|run| self.blocks.contains_key(&run.parent))
        {
            let Some(run) = self.parked.remove(index) else {
                return;
            };
            if let Some(&Block {
                hash, reachable, ..
            }) = self.blocks.get(&run.parent)
            {
                let previous = (hash, reachable);
                self.append(run.parent, previous, &run.hashes, &run.tokens, changes);
            }
        }
    }

    /// A block was removed while it was parked: what is behind it in its run goes too.
    fn forget_parked(&mut self, name: u64) {
        let size = (self.block_size.get() * self.stride) as usize;
        for run in &mut self.parked {
            if let Some(index) = run.hashes.iter().position(|&hash| hash == name) {
                run.hashes.truncate(index);
                run.tokens.truncate(index * size);
            }
        }
        self.parked.retain(|run| !run.hashes.is_empty());
    }
}

/// Which workers hold which prefix.
///
/// Caches are closed under prefixes, so along a prompt the sets of holders are nested, and equal
/// size means equal set: every worker's depth is found by bisection for the places where the
/// size changes.
#[derive(Debug, Default)]
pub(crate) struct CacheIndex {
    /// Engines of one block size share a table; most fleets have one.
    tables: SmallVec<[Table; 1]>,
}

#[derive(Debug)]
struct Table {
    stride: usize,
    holders: ByHash<SmallVec<[Slot; 2]>>,
}

impl CacheIndex {
    /// Applies one worker's changes, and keeps count of the router's blocks it holds.
    pub(crate) fn update(&mut self, worker: Slot, changes: &Changes, held: &mut u64) {
        let stride = changes.stride as usize;
        if stride == 0 {
            return;
        }
        let table = match self.tables.iter().position(|it| it.stride == stride) {
            Some(index) => &mut self.tables[index],
            None => {
                self.tables.push(Table {
                    stride,
                    holders: ByHash::default(),
                });
                let last = self.tables.len() - 1;
                &mut self.tables[last]
            }
        };
        for hash in &changes.removed {
            if let Some(holders) = table.holders.get_mut(hash)
                && let Some(index) = holders.iter().position(|holder| *holder == worker)
            {
                holders.swap_remove(index);
                *held -= stride as u64;
                if holders.is_empty() {
                    table.holders.remove(hash);
                }
            }
        }
        for &hash in &changes.added {
            let holders = table.holders.entry(hash).or_default();
            if !holders.contains(&worker) {
                holders.push(worker);
                *held += stride as u64;
            }
        }
    }

    /// Forgets a worker. Visits every prefix: for when one leaves.
    pub(crate) fn forget_worker(&mut self, worker: Slot) {
        for table in &mut self.tables {
            table.holders.retain(|_, holders| {
                holders.retain(|holder| *holder != worker);
                !holders.is_empty()
            });
        }
        self.tables.retain(|table| !table.holders.is_empty());
    }

    /// Prefixes that some worker holds.
    pub(crate) fn len(&self) -> usize {
        self.tables.iter().map(|table| table.holders.len()).sum()
    }

    /// Raises the cached depth of every holder of a prefix of `chain`. Returns the largest.
    pub(crate) fn descend(&self, chain: &[SequenceHash], depths: &mut [Depth]) -> u32 {
        let reached = self.tables.iter().map(|table| table.descend(chain, depths));
        reached.max().unwrap_or(0)
    }
}

impl Table {
    /// Who holds the engine's block number `index` of `chain`.
    fn holders(&self, chain: &[SequenceHash], index: usize) -> &[Slot] {
        let hash = chain.get((index + 1) * self.stride - 1);
        let holders = hash.and_then(|hash| self.holders.get(hash));
        holders.map_or(&[], |holders| holders.as_slice())
    }

    fn descend(&self, chain: &[SequenceHash], depths: &mut [Depth]) -> u32 {
        let blocks = chain.len() / self.stride;
        let mut begin = 0;
        loop {
            let here = self.holders(chain, begin);
            if here.is_empty() {
                return (begin * self.stride) as u32;
            }
            // Where the run of blocks ends that exactly these workers hold.
            let (mut held, mut not_held) = (begin, blocks);
            while not_held - held > 1 {
                let middle = held.midpoint(not_held);
                if self.holders(chain, middle).len() == here.len() {
                    held = middle;
                } else {
                    not_held = middle;
                }
            }
            for &worker in here {
                if let Some(depth) = depths.get_mut(worker as usize) {
                    depth.cached = depth.cached.max((not_held * self.stride) as u32);
                }
            }
            begin = not_held;
        }
    }
}
