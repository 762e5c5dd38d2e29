//! Which workers hold which prefix.

use smallvec::SmallVec;

use crate::cache::Changes;
use crate::cache::holders::{HOLDER_BITS, HolderSets, Holders, MOST_HOLDERS};
use crate::cache::sparse::{Entry, Sparse};
use crate::sequence::SequenceHash;
use crate::tree::{Depth, Slot};

/// Which workers hold which prefix.
///
/// Caches are closed under prefixes, so along a prompt the sets of holders are nested: if the same
/// hold two of its prefixes, they hold all between. Every worker's depth is found by bisection for
/// the places where the set changes.
#[derive(Debug, Default)]
pub struct CacheIndex {
    /// Engines of one block size share a table; most fleets have one.
    tables: SmallVec<[Table; 1]>,
    sets: HolderSets,
}

#[derive(Debug)]
struct Table {
    stride: u32,
    /// By the hash's leading bits. One is small enough to grow under the router's lock: of two
    /// million prefixes, each takes 26 KiB.
    shards: Box<[Sparse<Prefix>]>,
}

const SHARD_BITS: u32 = 10;

/// The key within the shard, and the holders: together ten bytes.
#[derive(Clone, Copy, Debug)]
#[repr(Rust, packed(2))]
struct Prefix {
    /// The low bits are the holders'.
    key: u64,
    holders: u16,
}

const _: () = assert!(
    size_of::<Prefix>() == 10
        && HOLDER_BITS == SHARD_BITS + u16::BITS
        && MOST_HOLDERS >> SHARD_BITS < u16::MAX as u32
);

impl Prefix {
    fn new(key: u64, holders: Holders) -> Self {
        let holders = holders.bits();
        Self {
            key: key | u64::from(holders) & LOW_BITS,
            holders: (holders >> SHARD_BITS) as u16,
        }
    }

    fn holders(&self) -> Holders {
        let low = self.key & LOW_BITS;
        Holders::from_bits(u32::from(self.holders) << SHARD_BITS | low as u32)
    }
}

impl Entry for Prefix {
    const GAP: Self = Self {
        key: u64::MAX,
        holders: u16::MAX,
    };

    fn key(&self) -> u64 {
        self.key & !LOW_BITS
    }

    fn is_gap(&self) -> bool {
        // Holders' numbers end below those that begin like that.
        self.holders == u16::MAX
    }
}

fn shard_of(hash: SequenceHash) -> usize {
    (hash >> (u64::BITS - SHARD_BITS)) as usize
}

/// What is left of the hash beside the number of its shard. Its low bits are zero.
fn key_in_shard(hash: SequenceHash) -> u64 {
    hash << SHARD_BITS
}

const LOW_BITS: u64 = (1 << SHARD_BITS) - 1;

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
            let sets = &mut self.sets;
            let removed = table.change(hashes, |holders| sets.without(holders, worker));
            *held -= removed * u64::from(stride);
        }
    }

    pub(crate) fn add(
        &mut self,
        worker: Slot,
        stride: u32,
        hashes: &[SequenceHash],
        held: &mut u64,
    ) {
        if stride == 0 || hashes.is_empty() {
            return;
        }
        let known = self.tables.iter().position(|it| it.stride == stride);
        let index = known.unwrap_or_else(|| {
            self.tables.push(Table::new(stride));
            self.tables.len() - 1
        });
        let sets = &mut self.sets;
        let added = self.tables[index].change(hashes, |holders| sets.with(holders, worker));
        *held += added * u64::from(stride);
    }

    /// Forgets a worker. Visits every prefix: for when one leaves.
    pub fn forget_worker(&mut self, worker: Slot) {
        for table in &mut self.tables {
            for shard in &mut table.shards {
                shard.change_all(|it| {
                    *it = Prefix::new(it.key(), self.sets.without(it.holders(), worker));
                });
            }
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
        let mut deepest = 0;
        for table in &self.tables {
            let blocks = chain.len() / table.stride as usize;
            let mut descent = Descent {
                table,
                sets: &self.sets,
                chain,
                depths,
                deepest: 0,
            };
            if blocks > 0 {
                let (first, last) = (descent.holders(0), descent.holders(blocks - 1));
                descent.narrow((0, first), (blocks - 1, last));
                descent.ends_at(blocks, last, Holders::NOBODY);
            }
            deepest = deepest.max(descent.deepest);
        }
        deepest
    }
}

impl Table {
    fn new(stride: u32) -> Self {
        Self {
            stride,
            shards: (0..1 << SHARD_BITS).map(|_| Sparse::default()).collect(),
        }
    }

    fn holders(&self, hash: SequenceHash) -> Holders {
        let (shard, key) = (&self.shards[shard_of(hash)], key_in_shard(hash));
        let prefix = shard.get(shard.seek(key)).filter(|it| it.key() == key);
        prefix.map_or(Holders::NOBODY, |it| it.holders())
    }

    /// Changes who holds each of some prefixes. Returns for how many that made a difference.
    fn change(
        &mut self,
        hashes: &[SequenceHash],
        mut change: impl FnMut(Holders) -> Holders,
    ) -> u64 {
        let mut changed = 0;
        for hashes in hashes.chunks(TOGETHER) {
            for &hash in hashes {
                self.shards[shard_of(hash)].touch(key_in_shard(hash));
            }
            for &hash in hashes {
                let (shard, key) = (&mut self.shards[shard_of(hash)], key_in_shard(hash));
                let at = shard.seek(key);
                let prefix = shard.get_mut(at).filter(|it| it.key() == key);
                let before = prefix.as_ref().map_or(Holders::NOBODY, |it| it.holders());
                let after = change(before);
                changed += u64::from(after != before);
                match prefix {
                    Some(_) if after == Holders::NOBODY => shard.remove(at),
                    Some(prefix) => *prefix = Prefix::new(key, after),
                    None if after == Holders::NOBODY => {}
                    None => shard.insert(at, Prefix::new(key, after)),
                }
            }
        }
        changed
    }

    fn len(&self) -> usize {
        self.shards.iter().map(Sparse::len).sum()
    }
}

/// One prompt's way down one table.
struct Descent<'a> {
    table: &'a Table,
    sets: &'a HolderSets,
    chain: &'a [SequenceHash],
    depths: &'a mut [Depth],
    deepest: u32,
}

impl Descent<'_> {
    /// Who holds the prompt up to the end of the engine's block number `block`.
    fn holders(&self, block: usize) -> Holders {
        let hash = self.chain[(block + 1) * self.table.stride as usize - 1];
        self.table.holders(hash)
    }

    /// Finds where between two blocks the holders change.
    fn narrow(&mut self, upper: (usize, Holders), lower: (usize, Holders)) {
        if upper.1 == lower.1 {
            return;
        }
        if lower.0 - upper.0 == 1 {
            self.ends_at(lower.0, upper.1, lower.1);
            return;
        }
        let block = upper.0.midpoint(lower.0);
        let middle = (block, self.holders(block));
        self.narrow(upper, middle);
        self.narrow(middle, lower);
    }

    /// Those of `holders` that are not among `deeper` have the prompt's first `blocks` blocks.
    fn ends_at(&mut self, blocks: usize, holders: Holders, deeper: Holders) {
        let depth = blocks as u32 * self.table.stride;
        if holders != Holders::NOBODY {
            self.deepest = self.deepest.max(depth);
        }
        let depths = &mut *self.depths;
        self.sets.for_each_beyond(holders, deeper, |worker| {
            if let Some(it) = depths.get_mut(worker as usize) {
                it.cached = it.cached.max(depth);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_keeps_its_key_and_its_holders() {
        for hash in [0, 1, 0x0123_4567_89AB_CDEF, u64::MAX] {
            let key = key_in_shard(hash);
            for bits in [0, 1, 1023, 1024, 1 << 25, MOST_HOLDERS] {
                let prefix = Prefix::new(key, Holders::from_bits(bits));
                assert_eq!((prefix.key(), prefix.holders().bits()), (key, bits));
                assert!(!prefix.is_gap());
            }
            let nobodys = Prefix::new(key, Holders::NOBODY);
            assert_eq!(nobodys.holders(), Holders::NOBODY);
            assert!(nobodys.is_gap());
        }
    }
}
