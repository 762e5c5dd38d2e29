//! Runs of consecutive blocks, and how many blocks of each run every worker caches.
//!
//! The parent of new blocks is the block before the first of them. The new blocks extend the run of
//! their parent if the parent is its last block, the worker that stores them caches the whole run,
//! and the run is below its maximum length. Otherwise they start a run of their own. Runs are never
//! split or joined, so the position of a block does not change while some worker caches the block.
//!
//! Caches are closed under prefixes: a worker that caches a block of a run caches all blocks of the
//! run before it. One number per worker and run is therefore enough.

use smallvec::SmallVec;

use crate::active_tree::WorkerIndex;
use crate::sequence::SequenceHash;

/// Index of a run. Reused after the run is empty.
pub(super) type RunId = u32;

/// Bits of a [`BlockPosition`] that give the block within its run.
const BLOCK_BITS: u32 = 9;

/// Maximum number of runs. Blocks that would need another run are not recorded.
const MAX_RUNS: usize = if cfg!(test) { 256 } else { 1 << 22 };
/// Maximum number of blocks in a run.
const MAX_RUN_BLOCKS: usize = if cfg!(test) { 8 } else { 1 << BLOCK_BITS };

const PAGE_BITS: u32 = 9;
/// Runs per page.
const PAGE: usize = 1 << PAGE_BITS;

/// Position of a block: its run, and its index in the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockPosition(u32);

impl BlockPosition {
    /// Absence of a block.
    pub(super) const NONE: Self = Self(u32::MAX);

    /// Returns the position of block `block` of a run.
    pub(super) fn new(run: RunId, block: usize) -> Self {
        debug_assert!(block < 1 << BLOCK_BITS);
        Self(run << BLOCK_BITS | block as u32)
    }

    /// Returns the run of the block.
    pub(super) fn run(self) -> RunId {
        self.0 >> BLOCK_BITS
    }

    /// Returns the index of the block in its run.
    pub(super) fn block(self) -> usize {
        self.0 as usize % (1 << BLOCK_BITS)
    }

    /// Returns the position `blocks` blocks further in the run.
    pub(super) fn plus(self, blocks: usize) -> Self {
        Self::new(self.run(), self.block() + blocks)
    }
}

/// Worker that caches blocks of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    pub(super) worker: WorkerIndex,
    /// Number of leading blocks of the run that the worker caches; at least one.
    pub(super) blocks: u16,
    /// Generation of the worker: see [`Runs::lose_worker`].
    generation: u16,
}

/// Run of consecutive blocks.
#[derive(Debug)]
pub(super) struct Run {
    /// Sequence hashes of the blocks that some worker caches.
    hashes: Vec<SequenceHash>,
    /// Workers that cache blocks of the run, sorted by worker.
    holders: SmallVec<[Holder; 2]>,
    /// Block that the first block continues; [`BlockPosition::NONE`] if it starts a sequence.
    parent: BlockPosition,
}

impl Run {
    /// Returns the block before the first of the run; `None` if the run starts a sequence. A worker
    /// that caches blocks of this run may have lost that block.
    pub(super) fn parent(&self) -> Option<BlockPosition> {
        (self.parent != BlockPosition::NONE).then_some(self.parent)
    }

    /// Returns the workers that cache blocks of the run, sorted by worker.
    pub(super) fn holders(&self) -> &[Holder] {
        &self.holders
    }

    /// Returns the number of leading blocks that `worker`, in this generation, caches.
    fn cached_by(&self, worker: WorkerIndex, generation: u16) -> usize {
        let found = self.search(worker).map(|index| self.holders[index]);
        found
            .ok()
            .filter(|holder| holder.generation == generation)
            .map_or(0, |holder| usize::from(holder.blocks))
    }

    /// Returns the index of `worker` in `holders`, or the index at which to insert it.
    fn search(&self, worker: WorkerIndex) -> Result<usize, usize> {
        self.holders
            .binary_search_by_key(&worker, |holder| holder.worker)
    }

    /// Sets the number of leading blocks that `worker`, in this generation, caches; 0 removes the
    /// worker.
    fn set_cached(&mut self, worker: WorkerIndex, blocks: usize, generation: u16) {
        let holder = Holder {
            worker,
            blocks: blocks as u16,
            generation,
        };
        match (self.search(worker), holder.blocks) {
            (Ok(index), 0) => {
                self.holders.remove(index);
                if self.holders.is_empty() {
                    // Frees the memory of a large set of holders. The id of the run will be reused.
                    self.holders = SmallVec::new();
                }
            }
            (Ok(index), _) => self.holders[index] = holder,
            (Err(_), 0) => {}
            (Err(index), _) => self.holders.insert(index, holder),
        }
    }

    /// Appends blocks, and reserves little memory beyond them.
    fn extend(&mut self, hashes: &[SequenceHash]) {
        let len = self.hashes.len();
        if len + hashes.len() > self.hashes.capacity() {
            self.hashes.reserve_exact(hashes.len().max(len / 8));
        }
        self.hashes.extend_from_slice(hashes);
    }
}

/// All runs of one index.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Runs by id. Pages are never moved, so that no decision waits for a large copy.
    pages: Vec<Vec<Run>>,
    /// Ids of empty runs.
    free: Vec<RunId>,
    /// Number of blocks in all runs.
    len: usize,
    /// Number of times that each worker has [lost](Self::lose_worker) all its blocks, modulo 2¹⁶,
    /// by worker index; 0 beyond the end. A holder with another number caches nothing.
    generations: Vec<u16>,
}

impl Runs {
    /// Returns the number of blocks that some worker caches.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the present generation of a worker.
    fn generation(&self, worker: WorkerIndex) -> u16 {
        self.generations
            .get(worker as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Makes a worker lose all its blocks at once. They are still listed in their runs, as those of
    /// an earlier generation, until [`remove_lost`](Self::remove_lost) of each run.
    pub(super) fn lose_worker(&mut self, worker: WorkerIndex) {
        let len = self.generations.len().max(worker as usize + 1);
        self.generations.resize(len, 0);
        let generation = &mut self.generations[worker as usize];
        *generation = generation.wrapping_add(1);
    }

    /// Returns whether the worker of `holder` has not lost the blocks since.
    pub(super) fn is_current(&self, holder: &Holder) -> bool {
        holder.generation == self.generation(holder.worker)
    }

    /// Returns whether a worker that has not lost its blocks caches the block at `position`.
    pub(super) fn is_cached(&self, position: BlockPosition) -> bool {
        let holders = self.get(position.run()).holders.iter();
        let mut current = holders.filter(|holder| self.is_current(holder));
        current.any(|holder| usize::from(holder.blocks) > position.block())
    }

    /// Removes a worker from the holders of a run, unless it has stored blocks of the run again since
    /// it lost them. Returns whether it was a holder: the run may then have blocks at its end that
    /// no worker caches.
    pub(super) fn remove_lost(&mut self, id: RunId, worker: WorkerIndex) -> bool {
        let generation = self.generation(worker);
        let run = self.get_mut(id);
        let Ok(index) = run.search(worker) else {
            return false;
        };
        if run.holders[index].generation != generation {
            run.set_cached(worker, 0, generation);
        }
        true
    }

    /// Returns how many leading blocks of a run any worker caches, lost ones included.
    pub(super) fn max_cached(&self, id: RunId) -> usize {
        let holders = self.get(id).holders.iter();
        let cached = holders.map(|holder| usize::from(holder.blocks));
        cached.max().unwrap_or(0)
    }

    /// Returns all ids that have been used, those of empty runs included.
    pub(super) fn ids(&self) -> std::ops::Range<RunId> {
        let last = self.pages.last().map_or(0, Vec::len);
        0..(self.pages.len().saturating_sub(1) * PAGE + last) as RunId
    }

    /// Returns the run with this id.
    pub(super) fn get(&self, id: RunId) -> &Run {
        &self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    /// Returns the run with this id, for writing.
    fn get_mut(&mut self, id: RunId) -> &mut Run {
        &mut self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    /// Returns the blocks of a run from `position` on; empty if the run is shorter.
    pub(super) fn tail_at(&self, position: BlockPosition) -> &[SequenceHash] {
        self.tail(position.run(), position.block())
    }

    /// Returns the blocks of a run from index `first` on; empty if the run is shorter.
    pub(super) fn tail(&self, id: RunId, first: usize) -> &[SequenceHash] {
        self.get(id).hashes.get(first..).unwrap_or_default()
    }

    /// Returns the blocks from `position` on that `worker` caches of their run.
    pub(super) fn cached_from(
        &self,
        position: BlockPosition,
        worker: WorkerIndex,
    ) -> &[SequenceHash] {
        let run = self.get(position.run());
        let cached = position.block()..run.cached_by(worker, self.generation(worker));
        run.hashes.get(cached).unwrap_or_default()
    }

    /// Records that `worker` caches `blocks` known blocks from `position` on. Returns how many of
    /// them it did not cache before. A worker that does not cache all blocks of the run before
    /// `position` is not changed.
    pub(super) fn extend_holder(
        &mut self,
        position: BlockPosition,
        blocks: usize,
        worker: WorkerIndex,
    ) -> usize {
        let generation = self.generation(worker);
        let run = self.get_mut(position.run());
        let (cached, end) = (run.cached_by(worker, generation), position.block() + blocks);
        if cached < position.block() || cached >= end {
            return 0;
        }
        run.set_cached(worker, end, generation);
        end - cached
    }

    /// Adds blocks that the index does not know yet, after `parent` or, if that is `None`, at the
    /// start of a sequence. They count as cached by `worker`. `hashes` must not be empty. The
    /// caller adds their anchors.
    ///
    /// Extends the run of `parent` or starts a run, and adds only the blocks that fit into this one
    /// run. Returns the position of the first block and the number of added blocks, at least one.
    /// The caller adds the remaining blocks by further calls, after the last added one. Returns
    /// `None` and adds nothing if a new run is needed and [`MAX_RUNS`] runs are in use.
    pub(super) fn append(
        &mut self,
        parent: Option<BlockPosition>,
        hashes: &[SequenceHash],
        worker: WorkerIndex,
    ) -> Option<(BlockPosition, usize)> {
        let generation = self.generation(worker);
        if let Some(parent) = parent {
            let run = self.get_mut(parent.run());
            let len = run.hashes.len();
            if parent.block() + 1 == len
                && len < MAX_RUN_BLOCKS
                && run.cached_by(worker, generation) == len
            {
                let blocks = hashes.len().min(MAX_RUN_BLOCKS - len);
                run.extend(&hashes[..blocks]);
                run.set_cached(worker, len + blocks, generation);
                self.len += blocks;
                return Some((parent.plus(1), blocks));
            }
        }
        let blocks = hashes.len().min(MAX_RUN_BLOCKS);
        let holder = Holder {
            worker,
            blocks: blocks as u16,
            generation,
        };
        let id = self.insert(Run {
            hashes: hashes[..blocks].to_vec(),
            holders: SmallVec::from_iter([holder]),
            parent: parent.unwrap_or(BlockPosition::NONE),
        })?;
        self.len += blocks;
        Some((BlockPosition::new(id, 0), blocks))
    }

    /// Adds a run and returns its id, reusing that of an empty run if there is one; `None` if there
    /// are [`MAX_RUNS`]. Its blocks are not added to [`len`](Self::len).
    fn insert(&mut self, run: Run) -> Option<RunId> {
        if let Some(id) = self.free.pop() {
            *self.get_mut(id) = run;
            return Some(id);
        }
        let id = self.ids().end;
        if id as usize == MAX_RUNS {
            return None;
        }
        if (id as usize).is_multiple_of(PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        self.pages.last_mut()?.push(run);
        Some(id)
    }

    /// Removes the block at `position`, and all blocks after it in the run, from what `worker`
    /// caches. Returns how many blocks the worker lost, and how many leading blocks of the run any
    /// worker still caches. The caller must pass the latter to [`truncate`](Self::truncate).
    pub(super) fn truncate_holder(
        &mut self,
        position: BlockPosition,
        worker: WorkerIndex,
    ) -> (usize, usize) {
        let generation = self.generation(worker);
        let run = self.get_mut(position.run());
        let lost = run
            .cached_by(worker, generation)
            .saturating_sub(position.block());
        if lost > 0 {
            run.set_cached(worker, position.block(), generation);
        }
        (lost, self.max_cached(position.run()))
    }

    /// Removes all blocks of a run except the first `left`, which must include every block that a
    /// worker caches. An empty run is free for reuse. The caller removes the anchors of the removed
    /// blocks before.
    pub(super) fn truncate(&mut self, id: RunId, left: usize) {
        let run = self.get_mut(id);
        let old_len = run.hashes.len();
        if left == old_len {
            return;
        }
        run.hashes.truncate(left);
        if left < run.hashes.capacity() / 2 {
            run.hashes.shrink_to(left + left / 8);
        }
        self.len -= old_len - left;
        if left == 0 {
            self.free.push(id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Appends one block with this hash and returns its position.
    fn append(
        runs: &mut Runs,
        previous: Option<BlockPosition>,
        hash: SequenceHash,
        worker: WorkerIndex,
    ) -> Option<BlockPosition> {
        let (at, blocks) = runs.append(previous, &[hash], worker)?;
        assert_eq!((runs.tail_at(at), blocks), (&[hash][..], 1));
        Some(at)
    }

    fn remove_from(runs: &mut Runs, position: BlockPosition, worker: WorkerIndex) -> usize {
        let (lost, left) = runs.truncate_holder(position, worker);
        runs.truncate(position.run(), left);
        lost
    }

    #[test]
    fn a_block_that_cannot_extend_a_run_starts_its_own() {
        let mut runs = Runs::default();
        let first = append(&mut runs, None, 10, 1).unwrap();
        let second = append(&mut runs, Some(first), 20, 1).unwrap();
        assert_eq!(second, first.plus(1));
        // A second continuation of the first block starts a run.
        let branch = append(&mut runs, Some(first), 21, 1).unwrap();
        assert_eq!(runs.get(branch.run()).parent(), Some(first));
        assert_eq!(runs.tail_at(first), [10, 20]);
        assert_eq!(runs.extend_holder(first, 1, 2), 1);
        // So does a block after the last one, if its worker does not cache the whole run.
        let later = append(&mut runs, Some(second), 30, 2).unwrap();
        assert_ne!(later.run(), first.run());
        assert_eq!(runs.len(), 4);
        // A worker that lost a block has lost the blocks after it, until it caches that block
        // again.
        assert_eq!(remove_from(&mut runs, first, 1), 2);
        assert_eq!(
            (runs.tail_at(first), runs.cached_from(first, 2)),
            (&[10][..], &[10][..])
        );
        assert!(runs.tail_at(second).is_empty() && runs.cached_from(first, 1).is_empty());
        assert_eq!(remove_from(&mut runs, second, 1), 0);
        assert_eq!(append(&mut runs, Some(first), 22, 2).unwrap(), second);
        assert_eq!(runs.extend_holder(second, 1, 1), 0);
        assert_eq!(runs.extend_holder(first, 2, 1), 2);
        assert_eq!(runs.len(), 4);
    }

    #[test]
    fn runs_are_bounded() {
        let mut runs = Runs::default();
        let start_run = |runs: &mut Runs| append(runs, None, 7, 1);
        let all: Vec<BlockPosition> = std::iter::from_fn(|| start_run(&mut runs)).collect();
        assert_eq!(all.len(), MAX_RUNS);
        assert_eq!(remove_from(&mut runs, all[3], 1), 1);
        assert_eq!(start_run(&mut runs), Some(all[3]));
        assert_eq!(start_run(&mut runs), None);
        for &position in &all {
            remove_from(&mut runs, position, 1);
        }
        assert_eq!(runs.len(), 0);
        assert!(start_run(&mut runs).is_some());
        // A run that is full is continued by another.
        let hashes = [7; MAX_RUN_BLOCKS + 3];
        let (first, blocks) = runs.append(None, &hashes, 1).unwrap();
        assert_eq!(blocks, MAX_RUN_BLOCKS);
        let next = append(&mut runs, Some(first.plus(blocks - 1)), 8, 1).unwrap();
        assert_ne!(next.run(), first.run());
    }
}
