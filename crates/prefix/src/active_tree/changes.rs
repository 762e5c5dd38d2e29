//! Results of tree operations, in blocks of the worker that they were made for.

use smallvec::SmallVec;

use crate::active_tree::NodeId;
use crate::sequence::SequenceHash;

/// Effect of pinning a path on one worker.
#[derive(Clone, Debug)]
pub(crate) struct PinChange {
    /// Node with which the path ends, to be passed to `unpin`;
    /// [`NO_NODE`](crate::active_tree::NO_NODE) if the prompt has no full block.
    pub(crate) node: NodeId,
    /// Blocks from the root to the end of `node`: the whole chain, unless a hash collision cut it
    /// short.
    pub(crate) path_blocks: u32,
    /// Leading blocks of the path that were cached or pinned before.
    pub(crate) already_held: u32,
    /// Blocks of the path that no booking pinned before.
    pub(crate) newly_pinned: u32,
    /// Newly pinned blocks that were cached, and that can no longer be evicted; deepest run first.
    pub(crate) reused: SmallVec<[ReusedRun; 2]>,
}

/// Run of cached blocks that was pinned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReusedRun {
    /// First block of the run, counted from the root.
    pub(crate) start: u32,
    /// Length of the run.
    pub(crate) blocks: u32,
    /// Free epoch of the unpin that had last released the run.
    pub(crate) freed_epoch: u64,
}

impl PinChange {
    /// Adds a run of `blocks` blocks from `start` on, last released under `free_epoch`; no effect
    /// if `blocks` is 0. The run lies above all runs added before. It extends the last of them if
    /// both have the same epoch.
    pub(super) fn push_reused(&mut self, start: u32, blocks: u32, free_epoch: u64) {
        match self.reused.last_mut() {
            _ if blocks == 0 => {}
            Some(deeper) if deeper.freed_epoch == free_epoch => {
                deeper.start = start;
                deeper.blocks += blocks;
            }
            _ => self.reused.push(ReusedRun {
                start,
                blocks,
                freed_epoch: free_epoch,
            }),
        }
    }
}

/// Effect of unpinning a path on one worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnpinChange {
    /// Blocks that no booking pins any longer.
    pub(crate) unpinned: u32,
    /// Number of those blocks that stay cached.
    pub(crate) still_cached: u32,
    /// Deepest node with cached blocks that this unpin released, or
    /// [`NO_NODE`](crate::active_tree::NO_NODE).
    pub(crate) deepest_cached: NodeId,
}

/// Effect of an eviction on one worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EvictChange {
    /// Number of evicted blocks.
    pub(crate) blocks: u32,
    /// Evicted block that is nearest to the root, if any block was evicted.
    pub(crate) shallowest: Option<SequenceHash>,
    /// Node at which to continue the eviction, if blocks of the same free epoch are left.
    pub(crate) resume_at: Option<NodeId>,
}
