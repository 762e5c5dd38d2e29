//! Index of the tree's nodes by the first hash of their edges.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use super::NodeId;
use crate::sequence::{IdentityHasher, SequenceHash};

/// Number of bits of a hash that select its shard.
const SHARD_BITS: u32 = 8;
/// Position of those bits. A hash map uses the lowest and the highest bits itself.
const SHARD_SHIFT: u32 = 40;

/// Node whose edge starts with a hash. A sequence hash identifies its whole prefix, so one index
/// serves all levels of the tree.
///
/// The index is divided into shards, because a hash map moves all its entries when it grows, while
/// the router is locked.
#[derive(Debug, Default)]
pub(super) struct FirstHashes {
    /// Empty until the first node is added.
    shards: Box<[HashMap<SequenceHash, NodeId, BuildHasherDefault<IdentityHasher>>]>,
}

/// Returns the index of the shard of `hash`.
#[inline]
fn shard_of(hash: SequenceHash) -> usize {
    (hash >> SHARD_SHIFT) as usize % (1 << SHARD_BITS)
}

impl FirstHashes {
    /// Returns the node whose edge starts with `hash`.
    #[inline]
    pub(super) fn get(&self, hash: SequenceHash) -> Option<NodeId> {
        self.shards.get(shard_of(hash))?.get(&hash).copied()
    }

    /// Sets the node whose edge starts with `hash`.
    pub(super) fn insert(&mut self, hash: SequenceHash, node: NodeId) {
        if self.shards.is_empty() {
            self.shards = (0..1 << SHARD_BITS).map(|_| HashMap::default()).collect();
        }
        self.shards[shard_of(hash)].insert(hash, node);
    }

    /// Removes the entry of `hash`.
    pub(super) fn remove(&mut self, hash: SequenceHash) {
        if let Some(shard) = self.shards.get_mut(shard_of(hash)) {
            shard.remove(&hash);
        }
    }

    /// Returns all entries.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (&SequenceHash, &NodeId)> {
        self.shards.iter().flatten()
    }
}
