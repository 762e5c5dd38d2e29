//! Orphans: runs of stored blocks that cannot be hashed before their parent is known.

use std::collections::VecDeque;

use crate::event_index::blocks::{BlockId, EngineBlocks};

/// Maximum number of orphan runs that are kept.
const MAX_ORPHAN_RUNS: usize = 256;

/// Maximum number of token ids in all kept runs together, the latest run excepted.
const MAX_ORPHAN_TOKENS: usize = 1 << 20;

/// Run of blocks whose parent is unknown.
#[derive(Debug)]
pub(super) struct OrphanRun {
    /// Engine hash of the block before the first.
    parent: u64,
    /// Engine hashes of the blocks, in order.
    pub(super) engine_hashes: Vec<u64>,
    /// Token ids of the blocks.
    pub(super) tokens: Vec<u32>,
}

/// Orphan runs, oldest first.
#[derive(Debug, Default)]
pub(super) struct OrphanRuns {
    runs: VecDeque<OrphanRun>,
    /// Token ids in all runs.
    tokens: usize,
}

impl OrphanRuns {
    /// Returns whether there are no orphan runs.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Keeps a run until its parent, the block with engine hash `parent`, is known. Returns false
    /// if the oldest run was dropped for it.
    pub(super) fn push(&mut self, parent: u64, engine_hashes: &[u64], tokens: &[u32]) -> bool {
        let is_full = self.runs.len() == MAX_ORPHAN_RUNS || self.tokens > MAX_ORPHAN_TOKENS;
        if is_full && let Some(oldest) = self.runs.pop_front() {
            self.tokens -= oldest.tokens.len();
        }
        self.tokens += tokens.len();
        self.runs.push_back(OrphanRun {
            parent,
            engine_hashes: engine_hashes.to_vec(),
            tokens: tokens.to_vec(),
        });
        !is_full
    }

    /// Removes and returns the oldest run whose parent is now stored, with the id of the parent.
    /// `None` if no run has such a parent.
    pub(super) fn take(&mut self, blocks: &EngineBlocks) -> Option<(BlockId, OrphanRun)> {
        let parents = self.runs.iter().map(|run| blocks.find_stored(run.parent));
        let mut parents = parents.enumerate();
        let (index, parent) = parents.find_map(|(index, id)| Some((index, id?)))?;
        let run = self.runs.remove(index)?;
        self.tokens -= run.tokens.len();
        Some((parent, run))
    }

    /// Removes a block from the orphans, with all blocks after it in its run; no effect if no run
    /// contains the block. `block_size` is in tokens per engine block.
    pub(super) fn remove(&mut self, engine_hash: u64, block_size: usize) {
        for run in &mut self.runs {
            if let Some(index) = run
                .engine_hashes
                .iter()
                .position(|&hash| hash == engine_hash)
            {
                self.tokens -= run.tokens.len() - index * block_size;
                run.engine_hashes.truncate(index);
                run.tokens.truncate(index * block_size);
            }
        }
        self.runs.retain(|run| !run.engine_hashes.is_empty());
    }
}
