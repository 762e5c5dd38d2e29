//! Where the prefixes are that others are found by.

use crate::cache::runs::Position;
use crate::cache::sparse::{Entry, Sparse};
use crate::sequence::SequenceHash;

/// The position of each prefix that is a mark or begins a run.
#[derive(Debug)]
pub(super) struct Marks {
    /// By the hash's leading bits. One is small enough to grow under the router's lock: of two
    /// million prefixes, each takes 41 KiB.
    shards: Box<[Sparse<Mark>]>,
}

const SHARD_BITS: u32 = 7;

#[derive(Clone, Copy, Debug)]
#[repr(Rust, packed(4))]
struct Mark {
    /// The hash, but for that the bits of the shard come last.
    key: u64,
    position: Position,
}

const _: () = assert!(size_of::<Mark>() == 12);

impl Entry for Mark {
    const GAP: Self = Self {
        key: u64::MAX,
        position: Position::NONE,
    };

    fn key(&self) -> u64 {
        self.key
    }

    fn is_gap(&self) -> bool {
        self.position == Position::NONE
    }
}

fn shard_of(hash: SequenceHash) -> usize {
    (hash >> (u64::BITS - SHARD_BITS)) as usize
}

fn key_of(hash: SequenceHash) -> u64 {
    hash.rotate_left(SHARD_BITS)
}

impl Marks {
    pub(super) fn new() -> Self {
        let shards = (0..1 << SHARD_BITS).map(|_| Sparse::default());
        Self {
            shards: shards.collect(),
        }
    }

    /// Where a prefix is. Somebody may hold it who lost what is before it, so it may be in several
    /// places.
    pub(super) fn find(
        &self,
        hash: SequenceHash,
        is_it: impl Fn(Position) -> bool,
    ) -> Option<Position> {
        let shard = &self.shards[shard_of(hash)];
        let at = shard.find(key_of(hash), |it| is_it(it.position)).ok()?;
        shard.get(at).map(|mark| mark.position)
    }

    /// Makes [finding](Self::find) several faster.
    pub(super) fn touch(&self, hash: SequenceHash) {
        self.shards[shard_of(hash)].touch(key_of(hash));
    }

    pub(super) fn insert(&mut self, hash: SequenceHash, position: Position) {
        let (shard, key) = (&mut self.shards[shard_of(hash)], key_of(hash));
        if let Err(at) = shard.find(key, |it| it.position == position) {
            shard.insert(at, Mark { key, position });
        }
    }

    pub(super) fn remove(&mut self, hash: SequenceHash, position: Position) {
        let shard = &mut self.shards[shard_of(hash)];
        if let Ok(at) = shard.find(key_of(hash), |it| it.position == position) {
            shard.remove(at);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(Sparse::len).sum()
    }
}
