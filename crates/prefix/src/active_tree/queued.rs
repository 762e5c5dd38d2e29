//! Paths of requests that are queued at the router for a worker.
//!
//! The engine does not know of these requests yet, so their blocks are neither active nor computed,
//! and cause no eviction. But a request that arrives now will find the blocks that they share with it,
//! because it is queued behind them. Each node therefore counts the queued bookings apart from the
//! dispatched ones.

use super::{HashChain, NO_NODE, NodeId, PrefixTree, TreePosition, WorkerIndex};

impl PrefixTree {
    /// Counts a queued booking of `worker` on the path of `chain`, adding the part that the tree
    /// lacks. `position` is as for [`pin`](Self::pin). Returns the end of the path, which stays valid
    /// until [`unpin_queued`](Self::unpin_queued), and its length in blocks.
    pub(crate) fn pin_queued(
        &mut self,
        position: TreePosition,
        chain: &HashChain,
        worker: WorkerIndex,
    ) -> (NodeId, u32) {
        let (end, path_blocks) = self.extend_path(position, chain);
        let generation = self.worker_sync(worker).generation;
        let mut id = end;
        while id != NO_NODE {
            let node = &mut self.nodes[id.index()];
            node.holder_or_new(worker, generation).queued_count += 1;
            id = node.parent;
        }
        (end, path_blocks)
    }

    /// Reverses one [`pin_queued`](Self::pin_queued) of the path to `node` on `worker`. The tree may
    /// remove or merge nodes, so positions become invalid. No effect for [`NO_NODE`].
    pub(crate) fn unpin_queued(&mut self, node: NodeId, worker: WorkerIndex) {
        let mut id = node;
        while id != NO_NODE {
            let node = &mut self.nodes[id.index()];
            node.remove_queued(worker);
            id = node.parent;
        }
        self.prune_path(node);
        self.trim_leaf(node);
    }
}
