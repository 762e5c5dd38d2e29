//! What a change of the tree did on the worker it was made for, in blocks.

use smallvec::SmallVec;

use crate::sequence::SequenceHash;
use crate::tree::NodeId;

/// What pinning a path changed.
#[derive(Clone, Debug)]
pub(crate) struct Pinned {
    pub(crate) node: NodeId,
    /// Blocks from the root to the end of `node`: all of the chain, but for hash collisions.
    pub(crate) path: u32,
    /// How many of them from the root were cached or pinned before.
    pub(crate) held: u32,
    /// Blocks that no booking pinned before.
    pub(crate) blocks: u32,
    /// Those of them that were cached and are no longer up for eviction, deepest first.
    pub(crate) revived: SmallVec<[Revived; 2]>,
}

/// A run of cached blocks that was pinned again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Revived {
    /// Its first block, as counted from the root.
    pub(crate) start: u32,
    pub(crate) blocks: u32,
    /// The freeing that had last unpinned it.
    pub(crate) freed_by: u64,
}

impl Pinned {
    /// Adds `blocks` from `start` on, which lie above all that was added so far.
    pub(super) fn revive(&mut self, start: u32, blocks: u32, freed_by: u64) {
        match self.revived.last_mut() {
            _ if blocks == 0 => {}
            Some(below) if below.freed_by == freed_by => {
                below.start = start;
                below.blocks += blocks;
            }
            _ => self.revived.push(Revived {
                start,
                blocks,
                freed_by,
            }),
        }
    }
}

/// What unpinning a path changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpinned {
    /// Blocks that no booking pins any longer.
    pub(crate) blocks: u32,
    /// How many of those stay cached.
    pub(crate) cached: u32,
    /// The deepest node with cached blocks that this unpinning freed, or
    /// [`NO_NODE`](crate::tree::NO_NODE).
    pub(crate) deepest: NodeId,
}

/// What an eviction took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evicted {
    pub(crate) blocks: u32,
    /// The block nearest to the root that went.
    pub(crate) uppermost: Option<SequenceHash>,
    /// Where to go on, if any blocks of that freeing are left.
    pub(crate) next: Option<NodeId>,
}
