//! Active blocks of all workers, and the blocks that each worker has computed.
//!
//! The active blocks of a worker are the KV blocks that running requests pin. As a plain map they
//! are, for each worker, a
//!
//! ```text
//! HashMap<SequenceHash, HashSet<RequestId>>
//! ```
//!
//! from each block to the requests that pin it, as in NVIDIA Dynamo's pull request 1731. The length
//! of the map is the number of active blocks. The module `naive` is that map, and the property tests
//! compare this module with it.
//!
//! The map costs one entry for each block of each request, and one look-up for each block and
//! worker. A prompt of 128,000 tokens has 8,000 blocks. This module stores the same knowledge as a
//! trie over sequence hashes, path-compressed and for all workers at once:
//!
//! | change | what it buys |
//! |---|---|
//! | An edge is a slice of the hash chain of a request. A node represents a run of blocks that no known request divides. | Booking and release touch branches, not blocks. The hashes are not copied. |
//! | A sequence hash identifies its whole prefix. Therefore one flat map from the first hash of an edge to its node replaces a child table per node, and bisection finds the block at which a prompt leaves an edge. | A prompt is matched by a few look-ups. |
//! | A node lists the workers that hold it, each with a count of bookings that *pin* it instead of their ids. | One walk matches the prompt on every worker. |
//! | A node also has the number of its blocks that each worker has *computed*. They stay cached after the last unpin, until the estimated cache evicts them. It also counts the queued bookings that will pin it. | Active, cached and queued blocks are one look-up. |
//!
//! Invariants, on which all operations rely: along a path from the root, the pin counts and the
//! queued counts of a worker never rise; and a worker that has computed blocks of a node has computed
//! every block above the node.
//!
//! Edges share the hash chains that they were made from, so most changes copy nothing. If a short
//! edge would keep a long chain alive, the edge gets a copy of its own, of bounded length. The
//! memory of the tree is therefore proportional to the blocks that workers hold, not to the length
//! of the prompts that contained them.

use std::mem;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::counter::Counter;
use crate::paged_slab::PagedSlab;
use crate::sequence::SequenceHash;

mod changes;
mod eviction;
mod first_hashes;
#[cfg(test)]
mod naive;
mod node;
mod queued;
mod worker_sync;

use first_hashes::FirstHashes;
use node::{Node, NodeHolder};
use worker_sync::WorkerSync;

pub(crate) use changes::{EvictChange, PinChange, ReusedRun, UnpinChange};

/// Sequence hashes of a request, shared between its booking and the edges made from it.
pub type HashChain = Arc<[SequenceHash]>;

/// Position of a worker in the router's arrays.
pub type WorkerIndex = u32;

/// Id of a node of the tree: the end of a path. A node keeps its id when its edge is split, so the
/// id of a pinned path stays valid until the path is unpinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// Returns the id of the node at this index of the list of nodes.
    #[inline]
    fn from_index(index: usize) -> Self {
        Self(index as u32)
    }

    /// Returns the index in the list of nodes, beyond its end for [`NO_NODE`].
    #[inline]
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// Maximum number of hashes copied at once under the router's lock: 8 KiB.
const MAX_COPIED_HASHES: u32 = 1024;
/// Length of a chain, as a multiple of the length of its edge, beyond which the edge gets a chain
/// of its own.
const MAX_CHAIN_TO_EDGE_RATIO: usize = 4;
/// Length in hashes up to which a chain is kept, however short its edge is.
const MIN_CHAIN_TO_TRIM: usize = 64;

/// Absence of a node: the parent of the first edge of a path, or the end of a path without full
/// blocks.
pub const NO_NODE: NodeId = NodeId(u32::MAX);

/// How many leading blocks of a prompt one worker has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixMatch {
    /// Leading blocks that the worker has computed and, as far as the router knows, will still
    /// cache when it starts the prompt.
    pub cached_blocks: u32,
    /// Leading blocks pinned by running requests.
    pub active_blocks: u32,
}

impl PrefixMatch {
    /// Returns the number of leading blocks that need not be computed again. Active blocks count,
    /// because an active block is cached by the time the engine starts a request that is queued
    /// after it.
    #[inline]
    #[must_use]
    pub fn overlap(self) -> u32 {
        self.cached_blocks.max(self.active_blocks)
    }
}

/// Position in the tree at which a hash chain stops matching.
#[derive(Clone, Copy, Debug)]
pub struct TreePosition {
    /// Last node on the path, or [`NO_NODE`].
    node: NodeId,
    /// Matching blocks of that node's edge; at least one if there is a node.
    edge_blocks: u32,
    /// Matching blocks, counted from the root.
    depth: u32,
    /// Largest overlap of any worker, in blocks.
    pub best_overlap: u32,
}

/// Path-compressed trie of the blocks that are pinned or cached, for all workers.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    /// All nodes, by id.
    nodes: PagedSlab<Node>,
    /// Node whose edge starts with a hash.
    by_first_hash: FirstHashes,
    /// Confirmed progress by worker index; shorter than the list of workers if nothing is known of
    /// the last ones.
    worker_sync: Vec<WorkerSync>,
    /// Chains that lost a node. Each may be the last reference to a large allocation, so the owner
    /// of the lock takes them and drops them after unlocking.
    pub(crate) deferred_drops: SmallVec<[HashChain; 4]>,
}

impl PrefixTree {
    /// Computes how many leading blocks of `chain` every worker has, and returns the position at
    /// which `chain` leaves the tree. For a worker with events, cached blocks that its events
    /// already reflect are left out unless they are pinned: the event index has them. With
    /// `with_queued`, blocks that queued bookings will pin count as active.
    ///
    /// `prefix_matches` is indexed by worker and must be zero on entry: only workers that have a
    /// block are written. Workers beyond its end are ignored, also in `best_overlap`.
    pub(crate) fn match_prefix(
        &self,
        chain: &[SequenceHash],
        with_queued: bool,
        prefix_matches: &mut [PrefixMatch],
    ) -> TreePosition {
        let mut best_overlap = 0;
        let reached = self.visit_path(chain, |node, edge_blocks| {
            for holder in &node.holders {
                let Some(prefix_match) = prefix_matches.get_mut(holder.worker as usize) else {
                    continue;
                };
                let sync = self.worker_sync(holder.worker);
                let cached_blocks = sync.cached_blocks(holder);
                if cached_blocks > 0
                    && (holder.pin_count > 0 || holder.serial_or_epoch > sync.acknowledged_epoch)
                {
                    prefix_match.cached_blocks = node.start + cached_blocks.min(edge_blocks);
                }
                let is_fully_cached = cached_blocks == node.len();
                let is_active = holder.pin_count > 0
                    && (is_fully_cached || holder.serial_or_epoch <= sync.last_started);
                let is_queued = with_queued && holder.queued_count > 0 && !sync.is_retired;
                if is_active || is_queued {
                    prefix_match.active_blocks = node.start + edge_blocks;
                }
                best_overlap = best_overlap.max(prefix_match.overlap());
            }
        });
        TreePosition {
            best_overlap,
            ..reached
        }
    }

    /// Returns the position at which `chain` leaves the tree.
    pub(crate) fn find(&self, chain: &[SequenceHash]) -> TreePosition {
        self.visit_path(chain, |_, _| ())
    }

    /// Writes how many leading blocks of `chain` every worker still caches according to its
    /// estimated cache, also for workers whose cache source is events. `prefix_matches` is indexed
    /// by worker and must be zero on entry. `active_blocks` is not written, and workers beyond the
    /// end are ignored.
    pub(crate) fn match_estimated(
        &self,
        chain: &[SequenceHash],
        prefix_matches: &mut [PrefixMatch],
    ) {
        self.visit_path(chain, |node, edge_blocks| {
            for holder in &node.holders {
                let cached_blocks = self.worker_sync(holder.worker).cached_blocks(holder);
                if cached_blocks > 0
                    && let Some(prefix_match) = prefix_matches.get_mut(holder.worker as usize)
                {
                    prefix_match.cached_blocks = node.start + cached_blocks.min(edge_blocks);
                }
            }
        });
    }

    /// Calls `visit` for every node on the path of `chain`, from the root on, with the number of
    /// matching blocks of its edge. Returns the position at which the path ends, with
    /// `best_overlap` 0. A collision of hashes ends the path.
    fn visit_path(
        &self,
        chain: &[SequenceHash],
        mut visit: impl FnMut(&Node, u32),
    ) -> TreePosition {
        let mut reached = TreePosition {
            node: NO_NODE,
            edge_blocks: 0,
            depth: 0,
            best_overlap: 0,
        };
        while let Some(&first) = chain.get(reached.depth as usize)
            && let Some(id) = self.by_first_hash.get(first)
        {
            let node = &self.nodes[id.index()];
            if node.start != reached.depth {
                // Two prefixes of different length share a 64-bit hash. Treat the prefix as
                // unknown.
                break;
            }
            let rest = &chain[reached.depth as usize..];
            let edge_blocks = common_prefix(rest, node.edge());
            visit(node, edge_blocks);
            reached.node = id;
            reached.edge_blocks = edge_blocks;
            reached.depth = node.start + edge_blocks;
            if edge_blocks < node.len() {
                break;
            }
        }
        reached
    }

    /// Pins all of `chain` on `worker` for the booking with serial `serial`, adding the part that
    /// the tree lacks. `position` is the result of [`match_prefix`](Self::match_prefix) for
    /// `chain`; the tree must not have changed since.
    ///
    /// The returned node is where the path ends. It stays valid until [`unpin`](Self::unpin): a
    /// later split of its edge gives the upper part a new id.
    pub(crate) fn pin(
        &mut self,
        position: TreePosition,
        chain: &HashChain,
        worker: WorkerIndex,
        serial: u64,
    ) -> PinChange {
        let (node, path_blocks) = self.extend_path(position, chain);
        let mut change = PinChange {
            node,
            path_blocks,
            already_held: 0,
            newly_pinned: 0,
            reused: SmallVec::new(),
        };
        let sync = self.worker_sync(worker);
        let mut ancestor = node;
        while ancestor != NO_NODE {
            let node = &mut self.nodes[ancestor.index()];
            let (start, length) = (node.start, node.len());
            ancestor = node.parent;
            let holder = node.holder_or_new(worker, sync.generation);
            sync.forget_lost(holder);
            let present_blocks = match holder.pin_count {
                0 => holder.cached_blocks,
                _ => length,
            };
            if present_blocks > 0 {
                change.already_held = change.already_held.max(start + present_blocks);
            }
            if holder.pin_count == 0 {
                change.newly_pinned += length;
                change.push_reused(start, holder.cached_blocks, holder.serial_or_epoch);
                holder.serial_or_epoch = serial;
            }
            holder.pin_count += 1;
        }
        change
    }

    /// Adds the part of `chain` that the tree lacks, and divides the edge at which `chain` leaves
    /// it. `position` is as for [`pin`](Self::pin). Returns the node with which the path ends, and
    /// the length of the path: that of `chain`, unless a hash collision cut it short.
    fn extend_path(&mut self, position: TreePosition, chain: &HashChain) -> (NodeId, u32) {
        let mut node = position.node;
        if node != NO_NODE && position.edge_blocks < self.nodes[node.index()].len() {
            node = self.split(node, position.edge_blocks);
        }
        if let Some(&first) = chain.get(position.depth as usize)
            // The hash is in use only after a collision of 64-bit hashes. Then the rest of the
            // chain is not tracked.
            && self.by_first_hash.get(first).is_none()
        {
            node = self.add_leaf(chain, position.depth, node);
        }
        let path_blocks = self.nodes.get(node.index()).map_or(0, |node| node.end);
        (node, path_blocks)
    }

    /// Records that `worker`, which pins `node`, has computed every block up to the end of `node`.
    /// No effect for [`NO_NODE`], or if the worker does not hold the node.
    pub(crate) fn mark_cached(&mut self, node: NodeId, worker: WorkerIndex) {
        let sync = self.worker_sync(worker);
        let mut id = node;
        while id != NO_NODE {
            let node = &mut self.nodes[id.index()];
            let length = node.len();
            let Some(holder) = node.holder_mut(worker) else {
                return;
            };
            if sync.cached_blocks(holder) == length {
                // A node that is computed completely has only computed nodes above it.
                return;
            }
            holder.cached_blocks = length;
            holder.generation = sync.generation;
            id = node.parent;
        }
    }

    /// Returns whether `worker`, which pins `node`, still caches all blocks up to the end of
    /// `node`. True for [`NO_NODE`], a path without blocks; false if the worker does not hold the
    /// node.
    pub(crate) fn is_cached(&self, node: NodeId, worker: WorkerIndex) -> bool {
        self.nodes.get(node.index()).is_none_or(|node| {
            let holder = node.holder_index(worker).map(|index| node.holders[index]);
            let sync = self.worker_sync(worker);
            holder.is_ok_and(|holder| sync.cached_blocks(&holder) == node.len())
        })
    }

    /// Returns how many bookings on `worker` pin the first `depth` blocks of the path to `node`.
    /// Returns 0 if the path is shorter or the worker does not hold those blocks.
    pub(crate) fn pin_count_at(&self, node: NodeId, worker: WorkerIndex, depth: u32) -> u32 {
        let path = std::iter::successors(self.nodes.get(node.index()), |node| {
            self.nodes.get(node.parent.index())
        });
        let end_node = path.take_while(|node| node.end >= depth).last();
        let holder = end_node.and_then(|node| Some(node.holders[node.holder_index(worker).ok()?]));
        holder.map_or(0, |holder| holder.pin_count)
    }

    /// Reverses one [`pin`](Self::pin) of the path to `node` on `worker`. Blocks that nothing pins
    /// any longer stay cached under `free_epoch` if the worker has computed them. Otherwise they
    /// are dropped. The tree may remove or merge nodes, so other positions become invalid. No
    /// effect for [`NO_NODE`].
    pub(crate) fn unpin(
        &mut self,
        node: NodeId,
        worker: WorkerIndex,
        free_epoch: u64,
    ) -> UnpinChange {
        let mut change = UnpinChange {
            unpinned: 0,
            still_cached: 0,
            deepest_cached: NO_NODE,
        };
        let sync = self.worker_sync(worker);
        let mut id = node;
        while id != NO_NODE {
            let node = &mut self.nodes[id.index()];
            let (length, parent) = (node.len(), node.parent);
            let Some(holder) = node.holder_mut(worker) else {
                debug_assert!(
                    false,
                    "every node on a pinned path lists the worker as a holder"
                );
                break;
            };
            sync.forget_lost(holder);
            holder.pin_count.subtract(1);
            if holder.pin_count == 0 {
                change.unpinned += length;
                change.still_cached += holder.cached_blocks;
                holder.serial_or_epoch = free_epoch;
                if holder.cached_blocks == 0 {
                    node.remove_blocks(worker);
                } else if change.deepest_cached == NO_NODE {
                    change.deepest_cached = id;
                }
            }
            id = parent;
        }
        self.prune_path(node);
        self.trim_leaf(node);
        change
    }

    /// Returns the number of nodes, to which the memory of the tree is proportional.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Splits an edge after `keep` blocks, at least one and fewer than its length, and returns the
    /// new upper node. The lower part keeps the id, because bookings whose path ends with the edge
    /// store that id. The holders of the edge hold both parts afterwards; an engine boundary stays
    /// with the lower part.
    fn split(&mut self, lower_id: NodeId, keep: u32) -> NodeId {
        let lower = &mut self.nodes[lower_id.index()];
        let cut = lower.start + keep;
        let mut upper = Node {
            chain: Arc::clone(&lower.chain),
            offset: lower.offset,
            start: lower.start,
            end: cut,
            parent: lower.parent,
            children: 1,
            children_xor: lower_id.0,
            holders: lower.holders.clone(),
        };
        for holder in &mut upper.holders {
            holder.cached_blocks = holder.cached_blocks.min(keep);
            holder.is_engine_boundary = false;
        }
        for holder in &mut lower.holders {
            // A holder without cached blocks stays: the free queue of the estimated cache finds the
            // upper part through this node.
            holder.cached_blocks = holder.cached_blocks.saturating_sub(keep);
        }
        lower.start = cut;
        let (upper_hash, lower_hash) = (upper.first_hash(), lower.first_hash());
        let parent = upper.parent;
        let upper_id = NodeId::from_index(self.nodes.insert(upper));
        self.nodes[lower_id.index()].parent = upper_id;
        self.by_first_hash.insert(upper_hash, upper_id);
        self.by_first_hash.insert(lower_hash, lower_id);
        self.replace_child(parent, lower_id, upper_id);
        upper_id
    }

    /// Adds a leaf without holders below `parent` for the blocks of `chain` from `start` on, of
    /// which there must be at least one, and returns its id. `parent` may be [`NO_NODE`].
    fn add_leaf(&mut self, chain: &HashChain, start: u32, parent: NodeId) -> NodeId {
        let leaf = NodeId::from_index(self.nodes.insert(Node {
            chain: Arc::clone(chain),
            offset: 0,
            start,
            end: chain.len() as u32,
            parent,
            children: 0,
            children_xor: 0,
            holders: SmallVec::new(),
        }));
        self.by_first_hash.insert(chain[start as usize], leaf);
        if let Some(parent) = self.nodes.get_mut(parent.index()) {
            parent.children += 1;
            parent.children_xor ^= leaf.0;
        }
        leaf
    }

    /// Prunes every node from `leaf` to the root.
    fn prune_path(&mut self, leaf: NodeId) {
        let mut id = leaf;
        while id != NO_NODE {
            id = self.prune(id);
        }
    }

    /// Removes the node `id` if it has neither holders nor children, then every ancestor that this
    /// leaves empty. Merges the lowest node that remains with its only child if they can merge.
    /// Returns the parent of that node, the next one to prune.
    fn prune(&mut self, mut id: NodeId) -> NodeId {
        let mut child_removed = false;
        while let Some(node) = self.nodes.get(id.index())
            && node.holders.is_empty()
            && node.children == 0
            && let Some(node) = self.nodes.remove(id.index())
        {
            let parent = node.parent;
            self.by_first_hash.remove(node.first_hash());
            self.deferred_drops.push(node.chain);
            if let Some(parent) = self.nodes.get_mut(parent.index()) {
                parent.children.subtract(1);
                parent.children_xor ^= id.0;
            }
            id = parent;
            child_removed = true;
        }
        let parent = self
            .nodes
            .get(id.index())
            .map_or(NO_NODE, |node| node.parent);
        self.merge_with_only_child(id);
        if child_removed {
            self.trim_leaf(id);
        }
        parent
    }

    /// Merges a node into its only child, if the states of all workers agree on both. The child
    /// keeps its id. Does nothing if the node does not exist, has several children or none, or if
    /// the merge would copy more than [`MAX_COPIED_HASHES`] hashes.
    fn merge_with_only_child(&mut self, upper_id: NodeId) {
        let Some(upper) = self.nodes.get(upper_id.index()) else {
            return;
        };
        let lower_id = NodeId(upper.children_xor);
        if upper.children != 1 || !upper.can_merge_with(&self.nodes[lower_id.index()]) {
            return;
        }
        let lower = &self.nodes[lower_id.index()];
        // The hash is compared as well, because after a collision of hashes the child's chain may
        // belong to another path.
        let covered = lower.offset <= upper.start
            && lower.chain[(upper.start - lower.offset) as usize] == upper.first_hash();
        if !covered && upper.len() + lower.len() > MAX_COPIED_HASHES {
            return;
        }
        let Some(upper) = self.nodes.remove(upper_id.index()) else {
            return;
        };
        let lower = &mut self.nodes[lower_id.index()];
        self.by_first_hash.remove(lower.first_hash());
        if !covered {
            let joined = [upper.edge(), lower.edge()].concat().into();
            self.deferred_drops
                .push(mem::replace(&mut lower.chain, joined));
            lower.offset = upper.start;
        }
        for (holder, above) in lower.holders.iter_mut().zip(&upper.holders) {
            holder.cached_blocks += above.cached_blocks;
        }
        lower.start = upper.start;
        lower.parent = upper.parent;
        self.by_first_hash.insert(upper.first_hash(), lower_id);
        self.replace_child(upper.parent, upper_id, lower_id);
        self.deferred_drops.push(upper.chain);
    }

    /// Removes the end of a leaf that no worker holds any longer, except that one block always
    /// stays. Then copies the edge of any node out of a chain that has become much longer than the
    /// edge, unless that would copy more than [`MAX_COPIED_HASHES`] hashes. No effect if the node
    /// does not exist.
    fn trim_leaf(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(id.index()) else {
            return;
        };
        let is_unpinned = |holder: &NodeHolder| holder.pin_count == 0 && holder.queued_count == 0;
        if node.children == 0 && node.holders.iter().all(is_unpinned) {
            let cached_blocks = node.holders.iter().map(|holder| holder.cached_blocks).max();
            node.end = node.start + cached_blocks.unwrap_or(0).max(1);
        }
        let max_chain_len = MIN_CHAIN_TO_TRIM.max(MAX_CHAIN_TO_EDGE_RATIO * node.len() as usize);
        if node.chain.len() > max_chain_len && node.len() <= MAX_COPIED_HASHES {
            let trimmed = Arc::from(node.edge());
            self.deferred_drops
                .push(mem::replace(&mut node.chain, trimmed));
            node.offset = node.start;
        }
    }

    /// Replaces the child `old` of `parent` with `new`; no effect if `parent` is [`NO_NODE`].
    fn replace_child(&mut self, parent: NodeId, old: NodeId, new: NodeId) {
        if let Some(parent) = self.nodes.get_mut(parent.index()) {
            parent.children_xor ^= old.0 ^ new.0;
        }
    }
}

/// Returns the length of the common prefix of two nonempty chains that agree in their first hash.
/// Equal hashes at `i` imply equal hashes before `i`, so bisection finds it.
fn common_prefix(a: &[SequenceHash], b: &[SequenceHash]) -> u32 {
    let shorter = a.len().min(b.len());
    debug_assert!(shorter > 0 && a[0] == b[0]);
    if a[shorter - 1] == b[shorter - 1] {
        return shorter as u32;
    }
    let (mut last_equal, mut first_different) = (0, shorter - 1);
    while first_different - last_equal > 1 {
        let middle = last_equal.midpoint(first_different);
        if a[middle] == b[middle] {
            last_equal = middle;
        } else {
            first_different = middle;
        }
    }
    first_different as u32
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
