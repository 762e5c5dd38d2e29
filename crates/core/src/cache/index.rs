//! Which workers hold which prefix.

use smallvec::SmallVec;

use crate::cache::runs::{MOST_POSITION_BITS, POSITION_BITS, Position, RunId, Runs};
use crate::cache::sparse::{Entry, Sparse};
use crate::cache::{Changes, Link};
use crate::sequence::SequenceHash;
use crate::tree::{Depth, Slot};

/// Which workers hold which prefix.
///
/// A table tells where every prefix ends: at which block of which run. How much of a prompt anybody
/// holds is found by bisection. From there up it is a few runs, each up to some block, and every
/// worker's depth is where it stops in the last of them that it holds.
#[derive(Debug, Default)]
pub struct CacheIndex {
    /// Engines of one block size share a table; most fleets have one.
    tables: SmallVec<[Table; 1]>,
}

#[derive(Debug)]
struct Table {
    stride: u32,
    /// By the hash's leading bits. One is small enough to grow under the router's lock: of two
    /// million prefixes, each takes 26 KiB.
    shards: Box<[Sparse<Prefix>]>,
    runs: Runs,
}

const SHARD_BITS: u32 = 10;

/// The key within the shard, and the position: together ten bytes. They hold all of the hash but
/// for five bits, so one look-up in 10^11 finds what it should not.
#[derive(Clone, Copy, Debug)]
#[repr(Rust, packed(2))]
struct Prefix {
    /// The low bits are the position's.
    key: u64,
    position: u16,
}

const LOW_BITS: u32 = POSITION_BITS - u16::BITS;
const LOW_MASK: u64 = (1 << LOW_BITS) - 1;

const _: () =
    assert!(size_of::<Prefix>() == 10 && MOST_POSITION_BITS >> LOW_BITS < u16::MAX as u32);

impl Prefix {
    fn new(key: u64, position: Position) -> Self {
        let bits = position.bits();
        Self {
            key: key | u64::from(bits) & LOW_MASK,
            position: (bits >> LOW_BITS) as u16,
        }
    }

    fn position(&self) -> Position {
        let low = self.key & LOW_MASK;
        Position::from_bits(u32::from(self.position) << LOW_BITS | low as u32)
    }
}

impl Entry for Prefix {
    const GAP: Self = Self {
        key: u64::MAX,
        position: u16::MAX,
    };

    fn key(&self) -> u64 {
        self.key & !LOW_MASK
    }

    fn is_gap(&self) -> bool {
        // The numbers of runs end below those that begin like that.
        self.position == u16::MAX
    }
}

fn shard_of(hash: SequenceHash) -> usize {
    (hash >> (u64::BITS - SHARD_BITS)) as usize
}

/// What is left of the hash beside the number of its shard, but for the last bits.
fn key_in_shard(hash: SequenceHash) -> u64 {
    hash << SHARD_BITS & !LOW_MASK
}

/// How many prefixes are looked for at the same time.
const TOGETHER: usize = 16;

impl CacheIndex {
    /// Applies one worker's changes, and keeps count of the router's blocks it holds. Workers are
    /// numbered from 0, closely.
    pub fn update(&mut self, worker: Slot, changes: &Changes, held: &mut u64) {
        self.remove(worker, changes.stride, &changes.removed, held);
        self.add(worker, changes.stride, &changes.added, held);
    }

    pub(crate) fn remove(
        &mut self,
        worker: Slot,
        stride: u32,
        hashes: &[SequenceHash],
        held: &mut u64,
    ) {
        if let Some(table) = self.tables.iter_mut().find(|it| it.stride == stride) {
            *held -= table.remove(worker, hashes) * u64::from(stride);
        }
    }

    pub(crate) fn add(&mut self, worker: Slot, stride: u32, links: &[Link], held: &mut u64) {
        if stride == 0 || links.is_empty() {
            return;
        }
        let known = self.tables.iter().position(|it| it.stride == stride);
        let index = known.unwrap_or_else(|| {
            self.tables.push(Table::new(stride));
            self.tables.len() - 1
        });
        *held += self.tables[index].add(worker, links) * u64::from(stride);
    }

    /// Forgets a worker. Visits every prefix: for when one leaves.
    pub fn forget_worker(&mut self, worker: Slot) {
        for table in &mut self.tables {
            table.forget_worker(worker);
        }
        self.tables.retain(|table| table.len() > 0);
    }

    /// Prefixes that some worker holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.iter().map(Table::len).sum()
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
            shards: (0..1 << SHARD_BITS).map(|_| Sparse::default()).collect(),
            runs: Runs::default(),
        }
    }

    fn len(&self) -> usize {
        self.shards.iter().map(Sparse::len).sum()
    }

    fn find(&self, hash: SequenceHash) -> Option<Position> {
        let (shard, key) = (&self.shards[shard_of(hash)], key_in_shard(hash));
        let prefix = shard.get(shard.seek(key)).filter(|it| it.key() == key);
        prefix.map(Prefix::position)
    }

    /// Makes [finding](Self::find) several prefixes faster.
    fn touch(&self, hash: SequenceHash) {
        self.shards[shard_of(hash)].touch(key_in_shard(hash));
    }

    /// Returns how many of them the worker did not hold.
    fn add(&mut self, worker: Slot, links: &[Link]) -> u64 {
        let mut added = 0;
        let mut last = None;
        for links in links.chunks(TOGETHER) {
            links.iter().for_each(|it| self.touch(it.hash));
            for link in links {
                let hash = link.hash;
                let (shard, key) = (&self.shards[shard_of(hash)], key_in_shard(hash));
                let at = shard.seek(key);
                let found = shard.get(at).filter(|it| it.key() == key);
                let position = if let Some(prefix) = found {
                    let position = prefix.position();
                    added += u64::from(self.runs.hold(position, worker));
                    position
                } else {
                    let previous = link.previous.and_then(|previous| match last {
                        Some((hash, position)) if hash == previous => Some(position),
                        _ => self.find(previous),
                    });
                    let Some(position) = self.runs.append(previous, worker) else {
                        continue;
                    };
                    added += 1;
                    self.shards[shard_of(hash)].insert(at, Prefix::new(key, position));
                    position
                };
                last = Some((hash, position));
            }
        }
        added
    }

    /// Returns how many blocks the worker no longer holds.
    fn remove(&mut self, worker: Slot, hashes: &[SequenceHash]) -> u64 {
        let mut removed = 0;
        for hashes in hashes.chunks(TOGETHER) {
            hashes.iter().for_each(|&hash| self.touch(hash));
            for &hash in hashes {
                let (shard, key) = (&mut self.shards[shard_of(hash)], key_in_shard(hash));
                let at = shard.seek(key);
                if let Some(prefix) = shard.get(at).filter(|it| it.key() == key) {
                    let position = prefix.position();
                    let (lost, is_gone) = self.runs.lose(position, worker);
                    removed += u64::from(lost);
                    if is_gone {
                        shard.remove(at);
                    }
                }
            }
        }
        removed
    }

    fn forget_worker(&mut self, worker: Slot) {
        self.runs.forget_worker(worker);
        for shard in &mut self.shards {
            shard.change_all(|it| {
                if self.runs.forget_unless_held(it.position()) {
                    *it = Prefix::GAP;
                }
            });
        }
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
                let block = usize::from(at.block);
                let start = last.saturating_sub(block);
                let (run, end) = (at.run, last + 1);
                stretches.push(Stretch { run, start, end });
                if start == 0 {
                    return stretches;
                }
                last = start - 1;
                match self.runs.get(run).previous() {
                    Some(previous) if self.held_at(chain, last) == Some(previous) => at = previous,
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
        let (mut held, mut missing) = (None, blocks);
        // Often somebody holds all, or nobody any.
        let mut guess = blocks.checked_sub(1)?;
        loop {
            match self.held_at(chain, guess) {
                Some(position) => held = Some((guess, position)),
                None => missing = guess,
            }
            guess = match held {
                Some((last, _)) if last + 1 == missing => return held,
                Some((last, _)) => last.midpoint(missing),
                None if missing == 0 => return None,
                None if missing == blocks - 1 => 0,
                None => missing / 2,
            };
        }
    }

    /// Where in a run a block of a prompt is, if somebody holds it.
    fn held_at(&self, chain: &[SequenceHash], block: usize) -> Option<Position> {
        let position = self.find(chain[(block + 1) * self.stride as usize - 1])?;
        self.runs.is_held(position).then_some(position)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
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
    enum Step {
        Add(Vec<u32>),
        /// And all that continues it, in one order or the other.
        Remove(Vec<u32>, bool),
        Forget,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => prompt().prop_map(Step::Add),
            8 => (prompt(), any::<bool>()).prop_map(|(prompt, up)| Step::Remove(prompt, up)),
            1 => Just(Step::Forget),
        ]
    }

    const WORKERS: usize = 4;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn depths_are_those_of_sets_of_prefixes(
            steps in prop::collection::vec((0..WORKERS, step(), prompt()), 1..40)
        ) {
            let mut index = CacheIndex::default();
            let mut models: [BTreeSet<Vec<u32>>; WORKERS] = Default::default();
            let mut held = [0; WORKERS];
            for (worker, step, probe) in steps {
                let (slot, model) = (worker as Slot, &mut models[worker]);
                match step {
                    Step::Add(prompt) => {
                        let added: Vec<Link> = Link::chain(&hashes(&prompt)).collect();
                        model.extend((1..=prompt.len()).map(|end| prompt[..end].to_vec()));
                        index.add(slot, 1, &added, &mut held[worker]);
                    }
                    Step::Remove(prompt, up) => {
                        let gone = model.iter().filter(|it| it.starts_with(&prompt));
                        let gone = gone.filter_map(|it| hashes(it).pop());
                        let mut gone: Vec<SequenceHash> = gone.collect();
                        if up {
                            gone.reverse();
                        }
                        model.retain(|it| !it.starts_with(&prompt));
                        index.remove(slot, 1, &gone, &mut held[worker]);
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
            }
        }
    }

    #[test]
    fn a_prefix_keeps_its_key_and_its_position() {
        for hash in [0, 1, 0x0123_4567_89AB_CDEF, u64::MAX] {
            let key = key_in_shard(hash);
            for run in [0, 1, 63, 64, (0xFFFF << 6) - 1] {
                for block in [0, 1, 511] {
                    let prefix = Prefix::new(key, Position { run, block });
                    assert_eq!(prefix.key(), key);
                    assert_eq!(prefix.position(), Position { run, block });
                    assert!(!prefix.is_gap());
                }
            }
        }
    }
}
