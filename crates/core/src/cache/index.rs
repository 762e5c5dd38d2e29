//! Which workers hold which prefix.

use smallvec::SmallVec;

use crate::cache::Changes;
use crate::cache::marks::Marks;
use crate::cache::paths::{Path, is_mark};
use crate::cache::runs::{Position, RunId, Runs};
use crate::sequence::SequenceHash;
use crate::tree::{Depth, Slot};

/// Which workers hold which prefix.
///
/// Prefixes that continue each other are blocks of a run. A table tells where some of them are, the
/// marks; others are found by walking from there. How much of a prompt anybody holds is found by
/// bisection over its marks. From there up it is a few runs, each up to some block, and every
/// worker's depth is where it stops in the last of them that it holds.
#[derive(Debug, Default)]
pub struct CacheIndex {
    /// Engines of one block size share a table; most fleets have one.
    tables: SmallVec<[Table; 1]>,
}

#[derive(Debug)]
struct Table {
    stride: u32,
    marks: Marks,
    runs: Runs,
}

impl CacheIndex {
    /// Applies one worker's changes, and keeps count of the router's blocks it holds. Workers are
    /// numbered from 0, closely.
    pub fn update(&mut self, worker: Slot, changes: &Changes, held: &mut u64) {
        for path in changes.removed.iter() {
            self.remove(worker, changes.stride, path, held);
        }
        for path in changes.added.iter() {
            self.add(worker, changes.stride, path, held);
        }
    }

    pub(crate) fn remove(&mut self, worker: Slot, stride: u32, path: Path<'_>, held: &mut u64) {
        if let Some(table) = self.tables.iter_mut().find(|it| it.stride == stride) {
            *held -= table.remove(worker, path) * u64::from(stride);
        }
    }

    pub(crate) fn add(&mut self, worker: Slot, stride: u32, path: Path<'_>, held: &mut u64) {
        if stride == 0 || path.told().is_empty() {
            return;
        }
        let known = self.tables.iter().position(|it| it.stride == stride);
        let index = known.unwrap_or_else(|| {
            self.tables.push(Table::new(stride));
            self.tables.len() - 1
        });
        *held += self.tables[index].add(worker, path) * u64::from(stride);
    }

    /// Forgets a worker. Visits every run: for when one leaves.
    pub fn forget_worker(&mut self, worker: Slot) {
        for table in &mut self.tables {
            for run in table.runs.ids() {
                table.lose(Position::new(run, 0), worker);
            }
        }
        self.tables.retain(|table| table.runs.len() > 0);
    }

    /// Prefixes that some worker holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.iter().map(|table| table.runs.len()).sum()
    }

    /// Whether nobody holds anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raises the cached depth of every holder of a prefix of `chain`, by its number. Returns the
    /// largest.
    pub fn descend(&self, chain: &[SequenceHash], depths: &mut [Depth]) -> u32 {
        let descents = self.tables.iter().map(|it| it.descend(chain, depths));
        descents.max().unwrap_or(0)
    }
}

/// What a prompt and a run have in common.
struct Stretch {
    run: RunId,
    /// Where the run begins, in the engine's blocks from the prompt's beginning.
    start: usize,
    /// Where it ends, or the prompt leaves it.
    end: usize,
}

impl Table {
    fn new(stride: u32) -> Self {
        Self {
            stride,
            marks: Marks::new(),
            runs: Runs::default(),
        }
    }

    /// Returns how many of them the worker did not hold.
    fn add(&mut self, worker: Slot, path: Path<'_>) -> u64 {
        let (way, mut told) = path.hashes().split_at(path.told_from());
        for &hash in told.iter().filter(|&&it| is_mark(it)) {
            self.marks.touch(hash);
        }
        let mut last = self.last_held(worker, way);
        if last.is_none() && !way.is_empty() {
            return 0;
        }
        let mut added = 0;
        while let Some(&first) = told.first() {
            let (at, blocks) = if let Some(at) = self.next(last, first) {
                let blocks = common(self.runs.from(at), told);
                added += self.runs.hold(at, blocks, worker);
                (at, blocks)
            } else if let Some((at, blocks)) = self.runs.append(last, told, worker) {
                for (index, &hash) in told[..blocks].iter().enumerate() {
                    if is_listed(at.plus(index), hash) {
                        self.marks.insert(hash, at.plus(index));
                    }
                }
                added += blocks;
                (at, blocks)
            } else {
                break;
            };
            last = Some(at.plus(blocks - 1));
            told = &told[blocks..];
        }
        added as u64
    }

    /// Where a path ends, if the worker holds it.
    fn last_held(&self, worker: Slot, path: &[SequenceHash]) -> Option<Position> {
        let (mut rest, mut last) = (path, None);
        while let Some(&hash) = rest.first() {
            let held = self.held_from(hash, worker);
            let blocks = held.map_or(1, |(_, held)| common(held, rest));
            last = held.map(|(at, _)| at.plus(blocks - 1));
            rest = &rest[blocks..];
        }
        last
    }

    /// A prefix that the worker holds, and what it holds of the run from there.
    fn held_from(&self, hash: SequenceHash, worker: Slot) -> Option<(Position, &[SequenceHash])> {
        let held = |at| self.runs.held_from(at, worker);
        let found = self.marks.find(hash, |at| !held(at).is_empty());
        found.map(|at| (at, held(at)))
    }

    /// What continues a block, or begins a sequence.
    fn next(&self, last: Option<Position>, hash: SequenceHash) -> Option<Position> {
        if let Some(last) = last
            && self.runs.from(last).get(1) == Some(&hash)
        {
            return Some(last.plus(1));
        }
        let continues = |at: Position| self.runs.get(at.run()).previous() == last;
        let is_next = |at: Position| at.block() == 0 && continues(at);
        self.marks.find(hash, is_next)
    }

    /// Returns how many blocks the worker no longer holds.
    fn remove(&mut self, worker: Slot, path: Path<'_>) -> u64 {
        let (hashes, told_from) = (path.hashes(), path.told_from());
        let (mut removed, mut index) = (0, 0);
        while let Some(&hash) = hashes.get(index) {
            let Some((at, held)) = self.held_from(hash, worker) else {
                index += 1;
                continue;
            };
            let blocks = common(held, &hashes[index..]);
            if index + blocks > told_from {
                removed += self.lose(at.plus(told_from.saturating_sub(index)), worker);
            }
            index += blocks;
        }
        removed
    }

    /// A worker lost a block, and with it what it holds of the run behind. Returns how many blocks
    /// that are.
    fn lose(&mut self, at: Position, worker: Slot) -> u64 {
        let (lost, left) = self.runs.lose(at, worker);
        let run = at.run();
        let gone = self.runs.behind(run, left);
        for &hash in gone.iter().filter(|&&it| is_mark(it)) {
            self.marks.touch(hash);
        }
        for (block, &hash) in (left..).zip(gone) {
            let at = Position::new(run, block);
            if is_listed(at, hash) {
                self.marks.remove(hash, at);
            }
        }
        self.runs.cut(run, left);
        lost as u64
    }

    fn descend(&self, chain: &[SequenceHash], depths: &mut [Depth]) -> u32 {
        let stretches = self.stretches(chain);
        let mut holders_below = 0;
        for stretch in &stretches {
            let holders = self.runs.get(stretch.run).holders();
            // Those who hold what is below hold this too. If they are as many, they are the same.
            if holders.len() == holders_below {
                continue;
            }
            holders_below = holders.len();
            let (start, end) = (stretch.start as u32, stretch.end as u32);
            for holder in holders {
                let blocks = end.min(start + u32::from(holder.blocks));
                if let Some(depth) = depths.get_mut(holder.worker as usize) {
                    depth.cached = depth.cached.max(blocks * self.stride);
                }
            }
        }
        stretches
            .first()
            .map_or(0, |it| it.end as u32 * self.stride)
    }

    /// What the prompt has in common with each run on its way, from the deepest that anybody holds
    /// up to its beginning.
    fn stretches(&self, chain: &[SequenceHash]) -> SmallVec<[Stretch; 8]> {
        let mut stretches = SmallVec::new();
        let mut deepest = self.deepest(chain, chain.len() / self.stride as usize);
        while let Some((mut last, mut at)) = deepest {
            stretches.clear();
            let start = loop {
                let start = last.saturating_sub(at.block());
                let (run, end) = (at.run(), last + 1);
                stretches.push(Stretch { run, start, end });
                if start == 0 {
                    return stretches;
                }
                last = start - 1;
                let expected = self.block(chain, last);
                match self.runs.get(run).previous() {
                    Some(previous) if self.runs.from(previous).first() == Some(&expected) => {
                        at = previous;
                    }
                    _ => break start,
                }
            };
            // Somebody lost a block and has not yet said that it lost those behind.
            deepest = self.deepest(chain, start);
        }
        stretches
    }

    /// The last of the first `blocks` blocks of a prompt that somebody holds.
    fn deepest(&self, chain: &[SequenceHash], blocks: usize) -> Option<(usize, Position)> {
        let mut deepest = None;
        // Between these the last mark is that somebody holds.
        let (mut low, mut high) = (0, blocks);
        // Often somebody holds all, or nobody any.
        let mut guess = blocks.checked_sub(1)?;
        while low < high {
            let mut marks = (low..=guess).rev();
            let mark = marks.find(|&it| it == 0 || is_mark(self.block(chain, it)));
            let found = mark.map(|it| (it, self.marks.find(self.block(chain, it), |_| true)));
            match found {
                Some((mark, None)) => high = mark,
                Some((mark, Some(at))) => {
                    deepest = Some((mark, at));
                    low = guess + 1;
                }
                None => low = guess + 1,
            }
            guess = match deepest {
                None if guess == blocks - 1 => 0,
                _ => low.midpoint(high),
            };
        }
        let (mut last, mut at) = deepest?;
        while last + 1 < blocks {
            let next = self.block(chain, last + 1);
            let Some(next) = self.next(Some(at), next) else {
                break;
            };
            (last, at) = (last + 1, next);
        }
        Some((last, at))
    }

    /// What ends a block of a prompt.
    fn block(&self, chain: &[SequenceHash], block: usize) -> SequenceHash {
        chain[(block + 1) * self.stride as usize - 1]
    }
}

/// How many blocks are the same.
fn common(ours: &[SequenceHash], theirs: &[SequenceHash]) -> usize {
    let pairs = ours.iter().zip(theirs);
    pairs.take_while(|(ours, theirs)| ours == theirs).count()
}

/// Whether the table tells where a block is.
fn is_listed(at: Position, hash: SequenceHash) -> bool {
    at.block() == 0 || is_mark(hash)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::cache::Paths;
    use crate::sequence::extend;

    fn hashes(prompt: &[u32]) -> Vec<SequenceHash> {
        let blocks = prompt.chunks(1);
        let hashes = blocks.scan(7, |previous, block| {
            *previous = extend(*previous, block);
            Some(*previous)
        });
        hashes.collect()
    }

    fn prompt() -> impl Strategy<Value = Vec<u32>> {
        // Longer than a run may be, here, and often the same.
        let tail = prop::collection::vec(0..2_u32, 0..4);
        (0..20_usize, tail).prop_map(|(zeros, tail)| [vec![0; zeros], tail].concat())
    }

    #[derive(Clone, Debug)]
    enum Order {
        Down,
        Up,
        Paths,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(Vec<u32>),
        /// And all that continues it, block by block in one order or the other, or path by path.
        Remove(Vec<u32>, Order),
        Forget,
    }

    fn order() -> impl Strategy<Value = Order> {
        prop_oneof![Just(Order::Down), Just(Order::Up), Just(Order::Paths)]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => prompt().prop_map(Step::Add),
            8 => (prompt(), order()).prop_map(|(prompt, order)| Step::Remove(prompt, order)),
            1 => Just(Step::Forget),
        ]
    }

    const WORKERS: usize = 4;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn depths_are_those_of_sets_of_prefixes(
            steps in prop::collection::vec((0..WORKERS, step(), prompt()), 1..40),
            most in 1..30_usize,
        ) {
            let mut index = CacheIndex::default();
            let mut models: [BTreeSet<Vec<u32>>; WORKERS] = Default::default();
            let mut held = [0; WORKERS];
            for (worker, step, probe) in steps {
                let (slot, model) = (worker as Slot, &mut models[worker]);
                match step {
                    Step::Add(prompt) => {
                        let added = Paths::whole(&hashes(&prompt));
                        model.extend((1..=prompt.len()).map(|end| prompt[..end].to_vec()));
                        for piece in added.iter().flat_map(|it| it.pieces(most)) {
                            index.add(slot, 1, piece, &mut held[worker]);
                        }
                    }
                    Step::Remove(prompt, order) => {
                        let gone = model.iter().filter(|it| it.starts_with(&prompt));
                        let mut gone: Vec<&Vec<u32>> = gone.filter(|it| !it.is_empty()).collect();
                        if matches!(order, Order::Up) {
                            gone.reverse();
                        }
                        let mut removed = Paths::default();
                        for it in gone {
                            let before = match order {
                                // What it has in common with others is told again.
                                Order::Paths => prompt.len().saturating_sub(1),
                                Order::Down | Order::Up => it.len() - 1,
                            };
                            removed.push_behind(&hashes(it), before);
                        }
                        model.retain(|it| !it.starts_with(&prompt));
                        for piece in removed.iter().flat_map(|it| it.pieces(most).rev()) {
                            index.remove(slot, 1, piece, &mut held[worker]);
                        }
                    }
                    Step::Forget => {
                        model.clear();
                        index.forget_worker(slot);
                        held[worker] = 0;
                    }
                }
                let mut depths = [Depth::default(); WORKERS];
                let deepest = index.descend(&hashes(&probe), &mut depths);
                let mut most = 0;
                for (worker, model) in models.iter().enumerate() {
                    let is_held = |end: &usize| model.contains(&probe[..*end]);
                    let depth = (1..=probe.len()).take_while(is_held).count();
                    prop_assert_eq!(depths[worker].cached as usize, depth);
                    prop_assert_eq!(held[worker] as usize, model.len());
                    most = most.max(depth);
                }
                prop_assert_eq!(deepest as usize, most);
                let prefixes: BTreeSet<&Vec<u32>> = models.iter().flatten().collect();
                prop_assert_eq!(index.len(), prefixes.len());
                for table in &index.tables {
                    let listed = table.runs.ids().map(|run| {
                        let blocks = table.runs.from(Position::new(run, 0)).iter();
                        let blocks = blocks.enumerate();
                        blocks
                            .filter(|&(block, &hash)| is_listed(Position::new(run, block), hash))
                            .count()
                    });
                    prop_assert_eq!(table.marks.len(), listed.sum::<usize>());
                }
            }
        }
    }
}
