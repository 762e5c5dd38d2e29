//! Eviction of a worker's blocks from the tree, in the order of its engine's eviction rule.

use std::mem;

use super::{EvictChange, NodeId, PrefixTree, UnpinChange, WorkerIndex};

/// Maximum number of nodes that one call of [`PrefixTree::evict`] visits.
const MAX_NODES_PER_EVICTION: u32 = 64;

impl PrefixTree {
    /// Evicts up to `wanted` blocks that were released on `worker` under `free_epoch`, from the end
    /// of `node` towards the root. Stops at the first node that the worker pins, does not hold, or
    /// released under another epoch, or after [`MAX_NODES_PER_EVICTION`] nodes. With `whole_nodes`,
    /// for engines that evict whole nodes, a node of the engine is always evicted completely, so
    /// the result may exceed `wanted`.
    pub(crate) fn evict(
        &mut self,
        node: NodeId,
        worker: WorkerIndex,
        free_epoch: u64,
        wanted: u32,
        whole_nodes: bool,
    ) -> EvictChange {
        let mut change = EvictChange {
            blocks: 0,
            shallowest: None,
            resume_at: None,
        };
        let mut id = node;
        let mut visited_nodes = 0;
        while let Some(node) = self.nodes.get_mut(id.index())
            && let Some(holder) = node.holder_freed_at(worker, free_epoch)
        {
            if visited_nodes == MAX_NODES_PER_EVICTION {
                change.resume_at = Some(id);
                return change;
            }
            visited_nodes += 1;
            if whole_nodes && holder.is_engine_boundary && change.blocks >= wanted {
                change.resume_at = Some(id);
                return change;
            }
            let taken = match whole_nodes {
                true => holder.cached_blocks,
                false => holder.cached_blocks.min(wanted - change.blocks),
            };
            holder.cached_blocks -= taken;
            change.blocks += taken;
            let remaining = holder.cached_blocks;
            if taken > 0 {
                change.shallowest = node.edge().get(remaining as usize).copied();
            }
            if remaining > 0 {
                change.resume_at = Some(id);
                return change;
            }
            node.remove_blocks(worker);
            let parent = node.parent;
            self.prune(id);
            id = parent;
        }
        change
    }

    /// Records that a node of the radix tree of `worker`'s engine ends `depth` blocks down the path
    /// to `node`, and splits the edge there if needed. `depth` must not exceed the length of the
    /// path. Returns the node that ends there if this boundary is new. Returns `None` if it was
    /// known, if `depth` is 0, or if the worker does not hold that part of the path.
    pub(crate) fn mark_engine_boundary(
        &mut self,
        node: NodeId,
        worker: WorkerIndex,
        depth: u32,
    ) -> Option<NodeId> {
        let mut id = node;
        while let Some(node) = self.nodes.get(id.index())
            && node.start >= depth
        {
            id = node.parent;
        }
        let node = self.nodes.get(id.index())?;
        if node.holder_index(worker).is_err() {
            return None;
        }
        if depth < node.end {
            id = self.split(id, depth - node.start);
        }
        let holder = self.nodes[id.index()].holder_mut(worker)?;
        (!mem::replace(&mut holder.is_engine_boundary, true)).then_some(id)
    }

    /// Moves the lower part of a split engine node from `free_epoch` to `new_epoch`. SGLang treats
    /// the lower part of a node that it splits as just used, although no request uses it.
    ///
    /// `above` is the node with which the upper part now ends. `deepest` is the deepest node
    /// released under `free_epoch`; engine nodes below the split one keep their epoch. Returns the
    /// blocks that were moved and the deepest node of them. Returns `None`, and moves nothing,
    /// unless every node between `deepest` and `above` was last released under `free_epoch`.
    pub(crate) fn refresh_split_tail(
        &mut self,
        above: NodeId,
        deepest: NodeId,
        worker: WorkerIndex,
        free_epoch: u64,
        new_epoch: u64,
    ) -> Option<UnpinChange> {
        let mut tail = UnpinChange {
            unpinned: 0,
            still_cached: 0,
            deepest_cached: deepest,
        };
        let mut id = deepest;
        while id != above {
            let node = self.nodes.get_mut(id.index())?;
            let parent = node.parent;
            let holder = node.holder_freed_at(worker, free_epoch)?;
            if holder.is_engine_boundary {
                tail.deepest_cached = id;
                tail.still_cached = 0;
            }
            tail.still_cached += holder.cached_blocks;
            id = parent;
        }
        let mut id = tail.deepest_cached;
        while id != above {
            let node = &mut self.nodes[id.index()];
            if let Some(holder) = node.holder_mut(worker) {
                holder.serial_or_epoch = new_epoch;
            }
            id = node.parent;
        }
        Some(tail)
    }
}
