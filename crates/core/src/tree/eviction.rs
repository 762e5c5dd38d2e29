//! What an engine's replacement rule does to the tree, for one worker.

use std::mem;

use super::{Evicted, NodeId, PrefixTree, Slot, Unpinned};

impl PrefixTree {
    /// Evicts up to `want` blocks that `freed_by` unpinned on `worker`, from the tail of `node`
    /// upwards. An engine that evicts `whole` nodes goes on to the end of one.
    pub(crate) fn evict(
        &mut self,
        node: NodeId,
        worker: Slot,
        freed_by: u64,
        want: u32,
        whole: bool,
    ) -> Evicted {
        let mut evicted = Evicted {
            blocks: 0,
            uppermost: None,
            next: None,
        };
        let mut id = node;
        while let Some(node) = self.nodes.get_mut(id as usize)
            && let Some(hold) = node.hold_freed_by(worker, freed_by)
        {
            if whole && hold.ends && evicted.blocks >= want {
                evicted.next = Some(id);
                return evicted;
            }
            let taken = match whole {
                true => hold.computed,
                false => hold.computed.min(want - evicted.blocks),
            };
            hold.computed -= taken;
            evicted.blocks += taken;
            let left = hold.computed;
            if taken > 0 {
                evicted.uppermost = node.edge().get(left as usize).copied();
            }
            if left > 0 {
                evicted.next = Some(id);
                return evicted;
            }
            node.remove_hold(worker);
            let parent = node.parent;
            self.tidy(id);
            id = parent;
        }
        evicted
    }

    /// Says that to the engine of `worker` a node ends `depth` blocks down the path to `node`.
    /// Returns the edge that ends there, if one that the worker holds did not end so before.
    pub(crate) fn divide(&mut self, node: NodeId, worker: Slot, depth: u32) -> Option<NodeId> {
        let mut id = node;
        while let Some(node) = self.nodes.get(id as usize)
            && node.start >= depth
        {
            id = node.parent;
        }
        let node = self.nodes.get(id as usize)?;
        if node.hold_index(worker).is_err() {
            return None;
        }
        if depth < node.end {
            id = self.split(id, depth - node.start);
        }
        let hold = self.nodes[id as usize].hold_mut(worker)?;
        (!mem::replace(&mut hold.ends, true)).then_some(id)
    }

    /// Stamps anew what is left of the engine's node that ended at `above` until it was divided
    /// there, if `freed_by` unpinned it. `deepest` is where the blocks of that freeing begin.
    pub(crate) fn renew_below(
        &mut self,
        above: NodeId,
        deepest: NodeId,
        worker: Slot,
        freed_by: u64,
        stamp: u64,
    ) -> Option<Unpinned> {
        let mut rest = Unpinned {
            blocks: 0,
            cached: 0,
            deepest,
        };
        let mut id = deepest;
        while id != above {
            let node = self.nodes.get_mut(id as usize)?;
            let parent = node.parent;
            let hold = node.hold_freed_by(worker, freed_by)?;
            if hold.ends {
                rest.deepest = id;
                rest.cached = 0;
            }
            rest.cached += hold.computed;
            id = parent;
        }
        let mut id = rest.deepest;
        while id != above {
            let node = &mut self.nodes[id as usize];
            if let Some(hold) = node.hold_mut(worker) {
                hold.stamp = stamp;
            }
            id = node.parent;
        }
        Some(rest)
    }
}
