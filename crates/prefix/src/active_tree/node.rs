//! Nodes of the active tree and what each worker holds of them.

use smallvec::SmallVec;

use super::{HashChain, NodeId, WorkerIndex};
use crate::counter::Counter;
use crate::sequence::SequenceHash;

/// Pins and cached blocks of one worker on one node.
#[derive(Clone, Copy, Debug)]
pub(super) struct NodeHolder {
    pub(super) worker: WorkerIndex,
    /// Number of dispatched bookings on the worker whose path includes the node.
    pub(super) pin_count: u32,
    /// Number of queued bookings of the worker whose path includes the node.
    pub(super) queued_count: u32,
    /// Leading blocks of the edge that the worker has computed and still caches.
    pub(super) cached_blocks: u32,
    /// While the node is pinned: serial of the booking that pinned it first. Afterwards: free epoch
    /// of the unpin that released it, or [`NEVER_FREED`]. One field for both, because every node has
    /// one of these per worker.
    pub(super) serial_or_epoch: u64,
    /// Value of [`WorkerSync::generation`](super::worker_sync::WorkerSync::generation) for which
    /// `cached_blocks` is true.
    pub(super) generation: u16,
    /// Whether a node of the engine's own radix tree ends with this edge. Relevant only for engines
    /// that evict whole nodes.
    pub(super) is_engine_boundary: bool,
}

/// Free epoch of a holder that has no blocks, and only marks a queued request's path.
const NEVER_FREED: u64 = 0;

impl NodeHolder {
    /// Returns a holder without pins and cached blocks.
    fn new(worker: WorkerIndex, generation: u16) -> Self {
        Self {
            worker,
            pin_count: 0,
            queued_count: 0,
            cached_blocks: 0,
            serial_or_epoch: NEVER_FREED,
            generation,
            is_engine_boundary: false,
        }
    }
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
    /// Workers that pin the node, cache blocks of it or have a request queued that will pin it,
    /// sorted by worker. Most nodes have one.
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

    /// Returns the entry of `worker`, which is added without pins and cached blocks if it does not
    /// hold the node.
    pub(super) fn holder_or_new(
        &mut self,
        worker: WorkerIndex,
        generation: u16,
    ) -> &mut NodeHolder {
        let index = match self.holder_index(worker) {
            Ok(index) => index,
            Err(index) => {
                let holder = NodeHolder::new(worker, generation);
                self.holders.insert(index, holder);
                index
            }
        };
        &mut self.holders[index]
    }

    /// Removes `worker` from the holders, or only its blocks if it has a request queued that will
    /// pin the node. The worker must not pin the node.
    pub(super) fn remove_blocks(&mut self, worker: WorkerIndex) {
        if let Ok(index) = self.holder_index(worker) {
            let holder = &mut self.holders[index];
            let queued_count = holder.queued_count;
            *holder = NodeHolder::new(worker, holder.generation);
            holder.queued_count = queued_count;
            self.remove_if_unused(index);
        }
    }

    /// Counts one queued booking of `worker` less, and removes the worker from the holders if it
    /// has no other use of the node. No effect if the worker does not hold the node.
    pub(super) fn remove_queued(&mut self, worker: WorkerIndex) {
        if let Ok(index) = self.holder_index(worker) {
            self.holders[index].queued_count.subtract(1);
            self.remove_if_unused(index);
        }
    }

    /// Removes the holder at `index` if nothing refers to it. One that was freed stays, even without
    /// cached blocks: the free queue of the estimated cache may begin with it.
    fn remove_if_unused(&mut self, index: usize) {
        let holder = self.holders[index];
        let is_freed = holder.serial_or_epoch != NEVER_FREED;
        if holder.pin_count == 0 && holder.queued_count == 0 && !is_freed {
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
                        && upper.queued_count == lower.queued_count
                        && (upper.pin_count > 0 || upper.serial_or_epoch == lower.serial_or_epoch)
                        && (upper.cached_blocks == self.len() || lower.cached_blocks == 0)
                        && !upper.is_engine_boundary
                })
    }
}
