//! Table of anchors: positions of the block hashes by which the index is entered.

use crate::event_index::probe_table::{OrderedHashTable, TableSlot};
use crate::event_index::runs::BlockPosition;
use crate::sequence::SequenceHash;

/// Position of each block that is an anchor or the first of a run.
#[derive(Debug)]
pub(super) struct AnchorTable {
    /// Shards by the leading bits of the hash. A shard is small enough to grow while the router is
    /// locked: with two million prefixes in all, one shard takes 41 KiB.
    shards: Box<[OrderedHashTable<Anchor>]>,
}

/// Number of leading bits of a hash that select its shard.
const SHARD_BITS: u32 = 7;

/// Entry of the table: a block hash and one of its positions.
#[derive(Clone, Copy, Debug)]
#[repr(Rust, packed(4))]
struct Anchor {
    /// Hash, rotated so that the bits that select the shard come last, because keys within a shard
    /// must be uniform from the leading bit on.
    key: u64,
    /// Position of the block; [`BlockPosition::NONE`] in an empty slot.
    position: BlockPosition,
}

const _: () = assert!(size_of::<Anchor>() == 12);

impl TableSlot for Anchor {
    const EMPTY: Self = Self {
        key: u64::MAX,
        position: BlockPosition::NONE,
    };

    fn key(&self) -> u64 {
        self.key
    }

    fn is_empty(&self) -> bool {
        self.position == BlockPosition::NONE
    }
}

/// Returns the index of the shard that holds `hash`.
fn shard_of(hash: SequenceHash) -> usize {
    (hash >> (u64::BITS - SHARD_BITS)) as usize
}

/// Returns the key of `hash` in its shard.
fn key_of(hash: SequenceHash) -> u64 {
    hash.rotate_left(SHARD_BITS)
}

impl AnchorTable {
    /// Returns an empty table.
    pub(super) fn new() -> Self {
        let shards = (0..1 << SHARD_BITS).map(|_| OrderedHashTable::default());
        Self {
            shards: shards.collect(),
        }
    }

    /// Returns a position of the block `hash` for which `is_match` holds. A block may have several
    /// positions, because a worker that lost the blocks before it may still cache it.
    pub(super) fn find(
        &self,
        hash: SequenceHash,
        is_match: impl Fn(BlockPosition) -> bool,
    ) -> Option<BlockPosition> {
        let shard = &self.shards[shard_of(hash)];
        let index = shard
            .find(key_of(hash), |anchor| is_match(anchor.position))
            .ok()?;
        shard.get(index).map(|anchor| anchor.position)
    }

    /// Reads the memory that [`find`](Self::find) of `hash` will need. Several look-ups are faster
    /// if all their hashes are prefetched first.
    pub(super) fn prefetch(&self, hash: SequenceHash) {
        self.shards[shard_of(hash)].prefetch(key_of(hash));
    }

    /// Adds `position` to the positions of the block `hash`, unless it is there.
    pub(super) fn insert(&mut self, hash: SequenceHash, position: BlockPosition) {
        let (shard, key) = (&mut self.shards[shard_of(hash)], key_of(hash));
        if let Err(index) = shard.find(key, |anchor| anchor.position == position) {
            shard.insert(index, Anchor { key, position });
        }
    }

    /// Removes `position` from the positions of the block `hash`.
    pub(super) fn remove(&mut self, hash: SequenceHash, position: BlockPosition) {
        let shard = &mut self.shards[shard_of(hash)];
        if let Ok(index) = shard.find(key_of(hash), |anchor| anchor.position == position) {
            shard.remove(index);
        }
    }

    /// Returns the number of positions in all shards.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(OrderedHashTable::len).sum()
    }
}
