//! Runs of blocks that follow each other, and how far into each which worker holds it.
//!
//! A run begins where a prompt leaves what is known, and goes on for as long as blocks are added
//! behind its last. Blocks that are added behind another begin a run of their own, so a block keeps
//! its position for as long as it is known. Caches are closed under prefixes: who holds a block of
//! a run holds all before it there, and a number of blocks says which.

use smallvec::SmallVec;

use crate::tree::Slot;

pub(super) type RunId = u32;

/// Bits of a block's position, which is stored with its hash.
pub(super) const POSITION_BITS: u32 = RUN_BITS + BLOCK_BITS;
const RUN_BITS: u32 = 22;
const BLOCK_BITS: u32 = 9;

/// Runs that are kept at most. What would need more is not known.
const MOST_RUNS: usize = if cfg!(test) { 256 } else { 0xFFFF << 6 };
/// Blocks of a run, at most.
const MOST_BLOCKS: u16 = if cfg!(test) { 8 } else { 1 << BLOCK_BITS };

/// The largest [`Position::bits`].
pub(super) const MOST_POSITION_BITS: u32 = ((MOST_RUNS as u32) << BLOCK_BITS) - 1;

const PAGE_BITS: u32 = 9;
const PAGE: usize = 1 << PAGE_BITS;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) run: RunId,
    pub(super) block: u16,
}

impl Position {
    pub(super) fn bits(self) -> u32 {
        self.run << BLOCK_BITS | u32::from(self.block)
    }

    pub(super) fn from_bits(bits: u32) -> Self {
        let block = bits & ((1 << BLOCK_BITS) - 1);
        Self {
            run: bits >> BLOCK_BITS,
            block: block as u16,
        }
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
    /// Sorted by worker.
    holders: SmallVec<[Holder; 2]>,
    /// The bits of what it continues; more than any, if it begins a sequence.
    previous: u32,
    /// Blocks that some worker holds.
    len: u16,
    /// Blocks that are known. Where a worker lost a block before it lost those behind, and nobody
    /// else holds them, there are more than are held, until it says that it lost them too.
    known: u16,
}

impl Run {
    /// The block before its first, which may no longer be known.
    pub(super) fn previous(&self) -> Option<Position> {
        (self.previous <= MOST_POSITION_BITS).then(|| Position::from_bits(self.previous))
    }

    pub(super) fn holders(&self) -> &[Holder] {
        &self.holders
    }

    fn held_by(&self, worker: Slot) -> u16 {
        let found = self.search(worker);
        found.map_or(0, |index| self.holders[index].blocks)
    }

    fn search(&self, worker: Slot) -> Result<usize, usize> {
        self.holders.binary_search_by_key(&worker, |it| it.worker)
    }

    fn set_held(&mut self, worker: Slot, blocks: u16) {
        if blocks > 0
            && let [only] = &mut self.holders[..]
            && only.worker == worker
        {
            only.blocks = blocks;
            self.len = blocks;
            return;
        }
        let before = match (self.search(worker), blocks) {
            (Ok(index), 0) => self.holders.remove(index).blocks,
            (Ok(index), _) => std::mem::replace(&mut self.holders[index].blocks, blocks),
            (Err(_), 0) => return,
            (Err(index), _) => {
                self.holders.insert(index, Holder { worker, blocks });
                0
            }
        };
        if blocks > before {
            self.len = self.len.max(blocks);
        } else if before == self.len {
            let held = self.holders.iter().map(|it| it.blocks);
            self.len = held.max().unwrap_or(0);
        }
        if self.holders.is_empty() {
            // Whoever comes next finds no memory of a crowd.
            self.holders = SmallVec::new();
        }
    }
}

/// All runs of one index.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// They do not move, so that no decision waits for them to.
    pages: Vec<Vec<Run>>,
    free: Vec<RunId>,
}

impl Runs {
    pub(super) fn get(&self, id: RunId) -> &Run {
        &self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    fn get_mut(&mut self, id: RunId) -> &mut Run {
        &mut self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    pub(super) fn is_held(&self, at: Position) -> bool {
        at.block < self.get(at.run).len
    }

    /// A worker came to hold a block that is known. Returns whether that is new, and follows what
    /// it holds.
    pub(super) fn hold(&mut self, at: Position, worker: Slot) -> bool {
        let run = self.get_mut(at.run);
        let is_next = run.held_by(worker) == at.block;
        if is_next {
            run.set_held(worker, at.block + 1);
        }
        is_next
    }

    /// A worker came to hold a block that is not known, behind another or nothing that is. `None`
    /// if there are too many runs.
    pub(super) fn append(&mut self, previous: Option<Position>, worker: Slot) -> Option<Position> {
        if let Some(previous) = previous {
            let run = self.get_mut(previous.run);
            let block = previous.block + 1;
            let is_end = block == run.len && block == run.known;
            if is_end && block < MOST_BLOCKS && run.held_by(worker) == block {
                run.known += 1;
                run.set_held(worker, block + 1);
                let run = previous.run;
                return Some(Position { run, block });
            }
        }
        let run = self.begin(Run {
            holders: SmallVec::from_iter([Holder { worker, blocks: 1 }]),
            previous: previous.map_or(u32::MAX, Position::bits),
            len: 1,
            known: 1,
        })?;
        Some(Position { run, block: 0 })
    }

    fn begin(&mut self, run: Run) -> Option<RunId> {
        if let Some(id) = self.free.pop() {
            *self.get_mut(id) = run;
            return Some(id);
        }
        let is_full = self.pages.last().is_none_or(|page| page.len() == PAGE);
        if is_full {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        let before = (self.pages.len() - 1) * PAGE;
        let page = self.pages.last_mut()?;
        let id = before + page.len();
        if id == MOST_RUNS {
            return None;
        }
        page.push(run);
        Some(id as RunId)
    }

    /// A worker lost a block, and with it what it holds behind. Returns how many it held, and
    /// whether the block is no longer known.
    pub(super) fn lose(&mut self, at: Position, worker: Slot) -> (u16, bool) {
        let run = self.get_mut(at.run);
        let lost = run.held_by(worker).saturating_sub(at.block);
        if lost > 0 {
            run.set_held(worker, at.block);
        }
        (lost, self.forget_unless_held(at))
    }

    /// Returns whether the block, which is known, no longer is.
    pub(super) fn forget_unless_held(&mut self, at: Position) -> bool {
        let run = self.get_mut(at.run);
        if at.block < run.len {
            return false;
        }
        run.known -= 1;
        if run.known == 0 {
            self.free.push(at.run);
        }
        true
    }

    /// A worker lost everything.
    pub(super) fn forget_worker(&mut self, worker: Slot) {
        for run in self.pages.iter_mut().flatten() {
            run.set_held(worker, 0);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_where_it_is_left() {
        let mut runs = Runs::default();
        let first = runs.append(None, 1).unwrap();
        let second = runs.append(Some(first), 1).unwrap();
        assert_eq!((second.run, second.block), (first.run, 1));
        // The second of those that continue the first, and one behind what another holds.
        let beside = runs.append(Some(first), 1).unwrap();
        assert_eq!(runs.get(beside.run).previous(), Some(first));
        assert!(runs.hold(first, 2));
        assert_ne!(runs.append(Some(second), 2).unwrap().run, first.run);
        // What was lost out of order is known until it is lost, and nothing goes on behind it.
        assert_eq!(runs.lose(first, 1), (2, false));
        assert!(runs.is_held(first) && !runs.is_held(second));
        assert!(!runs.hold(second, 1));
        assert_ne!(runs.append(Some(first), 2).unwrap().run, first.run);
        assert_eq!(runs.lose(second, 1), (0, true));
        assert_eq!(runs.append(Some(first), 2).unwrap(), second);
    }

    #[test]
    fn runs_are_bounded() {
        let mut runs = Runs::default();
        let begun = |runs: &mut Runs| runs.append(None, 1);
        let all: Vec<Position> = std::iter::from_fn(|| begun(&mut runs)).collect();
        assert_eq!(all.len(), MOST_RUNS);
        assert_eq!(runs.lose(all[3], 1), (1, true));
        assert_eq!(begun(&mut runs), Some(all[3]));
        assert_eq!(begun(&mut runs), None);
        runs.forget_worker(1);
        assert!(all.iter().all(|&it| runs.forget_unless_held(it)));
        assert!(begun(&mut runs).is_some());
    }
}
