//! One engine's prefix cache, followed event by event.

use std::num::NonZeroU32;

use crate::cache::blocks::{Blocks, Gone, Id, NONE};
use crate::cache::parked::Parked;
use crate::cache::way::Way;
use crate::cache::{Changes, Paths, StoredBlocks};
use crate::sequence::{SequenceHash, extend};

/// Finding what lies behind a hole looks at every block. So that no stream can make that the
/// whole work, looks are earned by blocks told, and saved up to a limit.
const LOOKS_PER_BLOCK: u64 = 64;
const MOST_LOOKS: u64 = 1 << 24;

/// Prefixes that lead to the first that is told of, mostly.
const ROOM_FOR_WAY: usize = 16;

/// One engine's prefix cache, followed event by event.
#[derive(Debug)]
pub struct CacheView {
    block_size: NonZeroU32,
    /// The engine's block size over the router's; 0 until it is known.
    stride: u32,
    blocks: Blocks,
    /// Blocks that are stored.
    len: usize,
    /// How often, taken together.
    stored: u64,
    parked: Parked,
    way: Way,
    /// A hole opened or closed, and what is behind it is still told as it was. Rare: engines
    /// evict tails first.
    unsettled: bool,
    /// Blocks that may be looked at.
    looks: u64,
    exact: bool,
}

impl CacheView {
    /// An empty cache. `block_size` is the router's; an engine's must be a multiple of it.
    #[must_use]
    pub fn new(block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            stride: 0,
            blocks: Blocks::new(),
            len: 0,
            stored: 0,
            parked: Parked::default(),
            way: Way::default(),
            unsettled: false,
            looks: MOST_LOOKS,
            exact: true,
        }
    }

    /// Whether everything said so far could be followed. What could not is missing: a view
    /// promises too little, never too much, unless so many holes open that some have to wait.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.exact && !self.unsettled && self.parked.is_empty()
    }

    /// Blocks that are cached, reachable or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
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
        let id = self.blocks.find_stored(name);
        id.map_or(0, |id| self.blocks.copies(id))
    }

    /// What an index that knows nothing must be told.
    #[must_use]
    pub fn contents(&self) -> Changes {
        Changes {
            added: self.all_reachable(),
            ..self.no_changes()
        }
    }

    /// All that can be hit, none before what it continues.
    fn all_reachable(&self) -> Paths {
        let (mut paths, mut way) = (Paths::default(), Way::default());
        let mut is_left = vec![false; self.blocks.ids()];
        for id in self.blocks.reachable() {
            is_left[id as usize] = true;
        }
        // From the last, which is likely to be behind many.
        for id in (0..self.blocks.ids() as Id).rev() {
            let back = std::iter::successors(Some(id), |&id| self.blocks.parent(id));
            let path = back.take_while(|&id| std::mem::take(&mut is_left[id as usize]));
            let path: Vec<Id> = path.collect();
            let path = path.iter().map(|&id| (id, self.blocks.hash(id)));
            way.tell_back(path, &self.blocks, &mut paths);
        }
        paths
    }

    fn no_changes(&self) -> Changes {
        Changes {
            stride: self.stride,
            ..Changes::default()
        }
    }

    /// Blocks came to be cached.
    pub fn store(&mut self, stored: &StoredBlocks<'_>) -> Changes {
        if !self.fits(stored) {
            self.exact = false;
            return self.no_changes();
        }
        let mut changes = self.no_changes();
        changes.added.reserve(stored.hashes.len() + ROOM_FOR_WAY);
        match stored.parent {
            None => {
                let start = (NONE, stored.salt, true);
                self.append(start, stored.hashes, stored.tokens, &mut changes);
                self.unpark(&mut changes);
            }
            Some(parent) => match self.blocks.find_stored(parent) {
                Some(id) => {
                    let start = self.behind(id);
                    self.append(start, stored.hashes, stored.tokens, &mut changes);
                    self.unpark(&mut changes);
                }
                None => self.exact &= self.parked.push(parent, stored.hashes, stored.tokens),
            },
        }
        self.settle(stored.hashes.len(), &mut changes);
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

    /// Blocks are no longer cached, each once.
    pub fn remove(&mut self, hashes: &[u64]) -> Changes {
        let mut changes = self.no_changes();
        self.touch(hashes);
        for &name in hashes {
            let found = self.blocks.find(name);
            let id = found.id;
            if id == NONE || !self.blocks.is_stored(id) {
                let size = self.block_size.get() as usize * self.stride as usize;
                self.parked.forget(name, size);
                continue;
            }
            let has_children = self.blocks.has_children(id);
            self.stored -= 1;
            if self.blocks.count_removal(found) {
                self.len -= 1;
                self.unsettled |= has_children;
            }
        }
        self.tell_gone(&mut changes.removed);
        self.settle(hashes.len(), &mut changes);
        changes
    }

    fn tell_gone(&mut self, removed: &mut Paths) {
        let gone = self.blocks.gone();
        removed.reserve(gone.len() + ROOM_FOR_WAY);
        // Mostly one path, from its end.
        let follow = |behind: &Gone, it: &Gone| {
            behind.parent == it.id && behind.was_reachable == it.was_reachable
        };
        for path in gone.chunk_by(follow) {
            if path[0].was_reachable {
                let path = path.iter().map(|it| (it.id, it.hash));
                self.way.tell_back(path, &self.blocks, removed);
            } else {
                self.way.forget();
            }
        }
        self.blocks.free_gone();
    }

    /// Nothing is cached any more.
    pub fn clear(&mut self) -> Changes {
        let changes = Changes {
            removed: self.all_reachable(),
            ..self.no_changes()
        };
        *self = Self {
            stride: self.stride,
            looks: self.looks,
            ..Self::new(self.block_size)
        };
        changes
    }

    /// Makes finding several blocks faster.
    fn touch(&self, names: &[u64]) {
        if names.len() > 1 {
            names.iter().for_each(|&name| self.blocks.touch(name));
        }
    }

    /// What a block that follows `id` must know.
    fn behind(&self, id: Id) -> (Id, SequenceHash, bool) {
        (id, self.blocks.hash(id), self.blocks.is_reachable(id))
    }

    /// Counts a run of blocks behind a parent, its prefix's hash, and whether it is reachable.
    fn append(
        &mut self,
        (mut parent, mut previous, mut reachable): (Id, SequenceHash, bool),
        names: &[u64],
        tokens: &[u32],
        changes: &mut Changes,
    ) {
        let ours = self.block_size.get() as usize;
        let theirs = ours * self.stride as usize;
        self.touch(names);
        // The block whose prefix was the last to be told of.
        let mut told = None;
        for (&name, tokens) in names.iter().zip(tokens.chunks_exact(theirs)) {
            let found = self.blocks.find(name);
            let is_known = found.id != NONE;
            if is_known && self.blocks.is_stored(found.id) {
                self.blocks.count_store(found.id);
                (parent, previous, reachable) = self.behind(found.id);
            } else {
                previous = tokens.chunks_exact(ours).fold(previous, extend);
                let mut is_told = false;
                let id = if is_known {
                    // It came back in front of blocks that stayed.
                    self.unsettled = true;
                    let was = self.blocks.hash(found.id);
                    if self.blocks.is_reachable(found.id) && !(reachable && was == previous) {
                        self.blocks.set_reachable(found.id, false);
                        let it = std::iter::once((found.id, was));
                        self.way.tell_back(it, &self.blocks, &mut changes.removed);
                    }
                    self.way.forget();
                    told = None;
                    self.blocks.fill(found.id, parent, previous);
                    is_told = self.blocks.is_reachable(found.id);
                    self.blocks.set_reachable(found.id, reachable);
                    found.id
                } else if let Some(id) = self.blocks.insert(found, parent, previous, reachable) {
                    id
                } else {
                    self.exact = false;
                    return;
                };
                self.len += 1;
                if reachable && !is_told {
                    if told != Some(parent) {
                        let added = &mut changes.added;
                        self.way.begin(parent, id, &self.blocks, added);
                    }
                    changes.added.push(previous);
                    told = Some(id);
                }
                parent = id;
            }
            self.stored += 1;
        }
        if let Some(last) = told {
            self.way.end(last, &changes.added);
        }
    }

    /// Appends every parked run whose parent has come to be known.
    fn unpark(&mut self, changes: &mut Changes) {
        while let Some((parent, run)) = self.parked.take(&self.blocks) {
            let start = self.behind(parent);
            self.append(start, &run.names, &run.tokens, changes);
        }
    }

    /// Tells what holes have made unreachable, or no longer do, if looking for it is earned.
    fn settle(&mut self, told: usize, changes: &mut Changes) {
        self.looks = (self.looks + LOOKS_PER_BLOCK * told as u64).min(MOST_LOOKS);
        if !self.unsettled || self.looks < self.blocks.len() as u64 {
            return;
        }
        self.looks -= self.blocks.len() as u64;
        self.unsettled = false;
        let is_reachable = self.blocks.find_reachable();
        self.tell_all(false, &is_reachable, &mut changes.removed);
        self.tell_all(true, &is_reachable, &mut changes.added);
    }

    /// Tells of all blocks that are reachable, or of all that are not, and were told otherwise.
    fn tell_all(&mut self, reachable: bool, is_reachable: &[bool], paths: &mut Paths) {
        for id in (0..is_reachable.len() as Id).rev() {
            let mut path = Vec::new();
            let mut next = Some(id);
            while let Some(id) = next
                && is_reachable[id as usize] == reachable
                && self.blocks.is_reachable(id) != reachable
            {
                self.blocks.set_reachable(id, reachable);
                path.push(id);
                next = self.blocks.parent(id);
            }
            let path = path.iter().map(|&id| (id, self.blocks.hash(id)));
            self.way.tell_back(path, &self.blocks, paths);
        }
    }
}
