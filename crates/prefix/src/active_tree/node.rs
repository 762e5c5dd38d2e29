//! Nodes of the active tree and what each worker holds of them.

use smallvec::SmallVec;

use super::{HashChain, NodeId, WorkerIndex};
use crate::sequence::SequenceHash;

/// Pins and cached blocks of one worker on one node.
#[derive(Clone, Copy, Debug)]
pub(super) struct NodeHolder {
    pub(super) worker: WorkerIndex,
    /// Number of bookings on the worker whose path includes the node.
    pub(super) pin_count: u32,
    /// Leading blocks of the edge that the worker has computed and still caches.
    pub(super) cached_blocks: u32,
    /// While the node is pinned: serial of the booking that pinned it first. Afterwards: free epoch
    /// of the unpin that released it. One field for both, because every node has one of these per
    /// worker.
    pub(super) serial_or_epoch: u64,
    /// Value of [`WorkerSync::generation`](super::worker_sync::WorkerSync::generation) for which
    /// `cached_blocks` is true.
    pub(super) generation: u16,
    /// Whether a node of the engine's own radix tree ends with this edge. Relevant only for engines
    /// that evict whole nodes.
    pub(super) is_engine_boundary: bool,
}

/// Run of blocks that no known request divides, with the workers that hold it.
#[derive(Debug)]
pub(super) struct Node {
    /// Hashes of a request whose path includes this node, from block `offset` at least up to block
    /// `end`. Often longer than the edge: the allocation is shared.
    pub(super) chain: HashChain,
    /// Block, counted from the root, of the first hash in `chain`.
    pub(super) offset: u32,
    /// First block of the edge, counted from the root.
    pub(super) start: u32,
    /// End of the edge (exclusive), counted from the root.
    pub(super) end: u32,
    /// Node whose edge this one continues, or [`NO_NODE`](super::NO_NODE).
    pub(super) parent: NodeId,
    /// Number of child nodes.
    pub(super) children: u32,
    /// Exclusive or of the ids of all children. With one child this is the id of that child, which
    /// is all that merging needs, and it takes no list of children.
    pub(super) children_xor: u32,
    /// Workers that pin the node or cache blocks of it, sorted by worker. Most nodes have one.
    pub(super) holders: SmallVec<[NodeHolder; 1]>,
}

impl Node {
    /// Returns the length of the edge in blocks.
    pub(super) fn len(&self) -> u32 {
        self.end - self.start
    }

    /// Returns the sequence hashes of the edge.
    pub(super) fn edge(&self) -> &[SequenceHash] {
        &self.chain[(self.start - self.offset) as usize..(self.end - self.offset) as usize]
    }

    /// Returns the first sequence hash of the edge, by which the node is found.
    pub(super) fn first_hash(&self) -> SequenceHash {
        self.chain[(self.start - self.offset) as usize]
    }

    /// Returns the index of `worker` in `holders`, or the index at which to insert it.
    pub(super) fn holder_index(&self, worker: WorkerIndex) -> Result<usize, usize> {
        self.holders
            .binary_search_by_key(&worker, |holder| holder.worker)
    }

    /// Returns the entry of `worker`, if it holds the node.
    pub(super) fn holder_mut(&mut self, worker: WorkerIndex) -> Option<&mut NodeHolder> {
        let index = self.holder_index(worker).ok()?;
        self.holders.get_mut(index)
    }

    /// Returns the entry of `worker` if the node is unpinned and `free_epoch` is its last unpin.
    pub(super) fn holder_freed_at(
        &mut self,
        worker: WorkerIndex,
        free_epoch: u64,
    ) -> Option<&mut NodeHolder> {
        self.holder_mut(worker)
            .filter(|holder| holder.pin_count == 0 && holder.serial_or_epoch == free_epoch)
    }

    /// Removes `worker` from the holders.
    pub(super) fn remove_holder(&mut self, worker: WorkerIndex) {
        if let Ok(index) = self.holder_index(worker) {
            self.holders.remove(index);
        }
    }

    /// Returns whether every worker has the same state on this node and on its only child, so that
    /// the two can become one. A booking or an eviction that ends between them shows as a
    /// difference.
    pub(super) fn can_merge_with(&self, child: &Node) -> bool {
        self.holders.len() == child.holders.len()
            && self
                .holders
                .iter()
                .zip(&child.holders)
                .all(|(upper, lower)| {
                    upper.worker == lower.worker
                        && upper.generation == lower.generation
                        && upper.pin_count == lower.pin_count
                        && (upper.pin_count > 0 || upper.serial_or_epoch == lower.serial_or_epoch)
                        && (upper.cached_blocks == self.len() || lower.cached_blocks == 0)
                        && !upper.is_engine_boundary
                })
    }
}
