//! Runs of blocks that follow each other, and how far into each which worker holds it.
//!
//! A run begins where a prompt leaves what is known, and goes on for as long as blocks are added
//! behind its last. Blocks that are added behind another begin a run of their own, so a block keeps
//! its position for as long as somebody holds it. Caches are closed under prefixes: who holds a
//! block of a run holds all before it there, and a number of blocks says which.

use smallvec::SmallVec;

use crate::sequence::SequenceHash;
use crate::tree::Slot;

pub(super) type RunId = u32;

const BLOCK_BITS: u32 = 9;

/// Runs that are kept at most. What would need more is not known.
const MOST_RUNS: usize = if cfg!(test) { 256 } else { 1 << 22 };
/// Blocks of a run, at most.
const MOST_BLOCKS: usize = if cfg!(test) { 8 } else { 1 << BLOCK_BITS };

const PAGE_BITS: u32 = 9;
const PAGE: usize = 1 << PAGE_BITS;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position(u32);

impl Position {
    pub(super) const NONE: Self = Self(u32::MAX);

    pub(super) fn new(run: RunId, block: usize) -> Self {
        debug_assert!(block < 1 << BLOCK_BITS);
        Self(run << BLOCK_BITS | block as u32)
    }

    pub(super) fn run(self) -> RunId {
        self.0 >> BLOCK_BITS
    }

    pub(super) fn block(self) -> usize {
        self.0 as usize % (1 << BLOCK_BITS)
    }

    /// So many blocks further in the run.
    pub(super) fn plus(self, blocks: usize) -> Self {
        Self::new(self.run(), self.block() + blocks)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    pub(super) worker: Slot,
    /// Leading blocks of the run that it holds; at least one.
    pub(super) blocks: u16,
}

#[derive(Debug)]
pub(super) struct Run {
    /// Of the blocks that some worker holds.
    hashes: Vec<SequenceHash>,
    /// Sorted by worker.
    holders: SmallVec<[Holder; 2]>,
    /// What it continues; [`Position::NONE`] if it begins a sequence.
    previous: Position,
}

impl Run {
    /// The block before its first, which somebody may have lost who still holds this.
    pub(super) fn previous(&self) -> Option<Position> {
        (self.previous != Position::NONE).then_some(self.previous)
    }

    pub(super) fn holders(&self) -> &[Holder] {
        &self.holders
    }

    fn held_by(&self, worker: Slot) -> usize {
        let found = self.search(worker);
        found.map_or(0, |index| usize::from(self.holders[index].blocks))
    }

    fn search(&self, worker: Slot) -> Result<usize, usize> {
        self.holders.binary_search_by_key(&worker, |it| it.worker)
    }

    fn set_held(&mut self, worker: Slot, blocks: usize) {
        let blocks = blocks as u16;
        match (self.search(worker), blocks) {
            (Ok(index), 0) => {
                self.holders.remove(index);
                if self.holders.is_empty() {
                    // Whoever comes next finds no memory of a crowd.
                    self.holders = SmallVec::new();
                }
            }
            (Ok(index), _) => self.holders[index].blocks = blocks,
            (Err(_), 0) => {}
            (Err(index), _) => self.holders.insert(index, Holder { worker, blocks }),
        }
    }

    /// Adds blocks behind the last, and not much memory beyond.
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
    /// They do not move, so that no decision waits for them to.
    pages: Vec<Vec<Run>>,
    free: Vec<RunId>,
    /// Blocks of all.
    len: usize,
}

impl Runs {
    /// Blocks that some worker holds.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Every number that a run has, or had.
    pub(super) fn ids(&self) -> std::ops::Range<RunId> {
        let last = self.pages.last().map_or(0, Vec::len);
        0..(self.pages.len().saturating_sub(1) * PAGE + last) as RunId
    }

    pub(super) fn get(&self, id: RunId) -> &Run {
        &self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    fn get_mut(&mut self, id: RunId) -> &mut Run {
        &mut self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    /// The blocks of a run from one on. None if it does not go so far.
    pub(super) fn from(&self, at: Position) -> &[SequenceHash] {
        self.behind(at.run(), at.block())
    }

    /// The blocks of a run but for the first.
    pub(super) fn behind(&self, id: RunId, first: usize) -> &[SequenceHash] {
        self.get(id).hashes.get(first..).unwrap_or_default()
    }

    /// Those of them that a worker holds.
    pub(super) fn held_from(&self, at: Position, worker: Slot) -> &[SequenceHash] {
        let run = self.get(at.run());
        let held = at.block()..run.held_by(worker);
        run.hashes.get(held).unwrap_or_default()
    }

    /// A worker came to hold some blocks of a run. Returns how many of them are new to it; without
    /// those before them it holds none.
    pub(super) fn hold(&mut self, at: Position, blocks: usize, worker: Slot) -> usize {
        let run = self.get_mut(at.run());
        let (held, end) = (run.held_by(worker), at.block() + blocks);
        if held < at.block() || held >= end {
            return 0;
        }
        run.set_held(worker, end);
        end - held
    }

    /// A worker came to hold blocks that are not known, behind another or nothing that is. Returns
    /// where the first is, and how many there was room for. `None` if there are too many runs.
    pub(super) fn append(
        &mut self,
        previous: Option<Position>,
        hashes: &[SequenceHash],
        worker: Slot,
    ) -> Option<(Position, usize)> {
        if let Some(previous) = previous {
            let run = self.get_mut(previous.run());
            let len = run.hashes.len();
            if previous.block() + 1 == len && len < MOST_BLOCKS && run.held_by(worker) == len {
                let blocks = hashes.len().min(MOST_BLOCKS - len);
                run.extend(&hashes[..blocks]);
                run.set_held(worker, len + blocks);
                self.len += blocks;
                return Some((previous.plus(1), blocks));
            }
        }
        let blocks = hashes.len().min(MOST_BLOCKS);
        let holder = Holder {
            worker,
            blocks: blocks as u16,
        };
        let id = self.begin(Run {
            hashes: hashes[..blocks].to_vec(),
            holders: SmallVec::from_iter([holder]),
            previous: previous.unwrap_or(Position::NONE),
        })?;
        self.len += blocks;
        Some((Position::new(id, 0), blocks))
    }

    fn begin(&mut self, run: Run) -> Option<RunId> {
        if let Some(id) = self.free.pop() {
            *self.get_mut(id) = run;
            return Some(id);
        }
        let id = self.ids().end;
        if id as usize == MOST_RUNS {
            return None;
        }
        if (id as usize).is_multiple_of(PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        self.pages.last_mut()?.push(run);
        Some(id)
    }

    /// A worker lost a block, and with it what it holds behind. Returns how many it held, and how
    /// many are left that anybody holds: [`cut`](Self::cut) must follow.
    pub(super) fn lose(&mut self, at: Position, worker: Slot) -> (usize, usize) {
        let run = self.get_mut(at.run());
        let lost = run.held_by(worker).saturating_sub(at.block());
        if lost > 0 {
            run.set_held(worker, at.block());
        }
        let left = run.holders.iter().map(|it| usize::from(it.blocks)).max();
        (lost, left.unwrap_or(0))
    }

    /// Forgets all blocks of a run but the first.
    pub(super) fn cut(&mut self, id: RunId, left: usize) {
        let run = self.get_mut(id);
        let before = run.hashes.len();
        if left == before {
            return;
        }
        run.hashes.truncate(left);
        if left < run.hashes.capacity() / 2 {
            run.hashes.shrink_to(left + left / 8);
        }
        self.len -= before - left;
        if left == 0 {
            self.free.push(id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Appends one block of that hash.
    fn append(
        runs: &mut Runs,
        previous: Option<Position>,
        hash: SequenceHash,
        worker: Slot,
    ) -> Option<Position> {
        let (at, blocks) = runs.append(previous, &[hash], worker)?;
        assert_eq!((runs.from(at), blocks), (&[hash][..], 1));
        Some(at)
    }

    fn lose(runs: &mut Runs, at: Position, worker: Slot) -> usize {
        let (lost, left) = runs.lose(at, worker);
        runs.cut(at.run(), left);
        lost
    }

    #[test]
    fn a_run_ends_where_it_is_left() {
        let mut runs = Runs::default();
        let first = append(&mut runs, None, 10, 1).unwrap();
        let second = append(&mut runs, Some(first), 20, 1).unwrap();
        assert_eq!(second, first.plus(1));
        // The second of those that continue the first, and one behind what another holds.
        let beside = append(&mut runs, Some(first), 21, 1).unwrap();
        assert_eq!(runs.get(beside.run()).previous(), Some(first));
        assert_eq!(runs.from(first), [10, 20]);
        assert_eq!(runs.hold(first, 1, 2), 1);
        let behind = append(&mut runs, Some(second), 30, 2).unwrap();
        assert_ne!(behind.run(), first.run());
        assert_eq!(runs.len(), 4);
        // Who lost a block holds none behind it until it holds that again.
        assert_eq!(lose(&mut runs, first, 1), 2);
        assert_eq!(
            (runs.from(first), runs.held_from(first, 2)),
            (&[10][..], &[10][..])
        );
        assert!(runs.from(second).is_empty() && runs.held_from(first, 1).is_empty());
        assert_eq!(lose(&mut runs, second, 1), 0);
        assert_eq!(append(&mut runs, Some(first), 22, 2).unwrap(), second);
        assert_eq!(runs.hold(second, 1, 1), 0);
        assert_eq!(runs.hold(first, 2, 1), 2);
        assert_eq!(runs.len(), 4);
    }

    #[test]
    fn runs_are_bounded() {
        let mut runs = Runs::default();
        let begun = |runs: &mut Runs| append(runs, None, 7, 1);
        let all: Vec<Position> = std::iter::from_fn(|| begun(&mut runs)).collect();
        assert_eq!(all.len(), MOST_RUNS);
        assert_eq!(lose(&mut runs, all[3], 1), 1);
        assert_eq!(begun(&mut runs), Some(all[3]));
        assert_eq!(begun(&mut runs), None);
        for &it in &all {
            lose(&mut runs, it, 1);
        }
        assert_eq!(runs.len(), 0);
        assert!(begun(&mut runs).is_some());
        // One that is full is continued by another.
        let hashes = [7; MOST_BLOCKS + 3];
        let (at, blocks) = runs.append(None, &hashes, 1).unwrap();
        assert_eq!(blocks, MOST_BLOCKS);
        let next = append(&mut runs, Some(at.plus(blocks - 1)), 8, 1).unwrap();
        assert_ne!(next.run(), at.run());
    }
}
