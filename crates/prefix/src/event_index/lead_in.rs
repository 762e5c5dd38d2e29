//! Lead-in of the block that was reported last.

use crate::event_index::blocks::{BlockId, EngineBlocks, NO_BLOCK};
use crate::event_index::delta::{PrefixRuns, is_anchor};
use crate::sequence::SequenceHash;

/// Prefixes from the last anchor up to the end of one block. Consecutive events mostly continue at
/// that block, forwards or backwards, and then need no walk from block to block.
#[derive(Debug, Default)]
pub(super) struct LeadIn {
    /// Block at which the lead-in ends; [`NO_BLOCK`] for the start of all sequences, `None` if the
    /// lead-in is unknown.
    to: Option<BlockId>,
    /// Sequence hashes of the lead-in, shortest prefix first.
    hashes: Vec<SequenceHash>,
}

impl LeadIn {
    /// Discards the lead-in, because blocks on it may have changed.
    pub(super) fn clear(&mut self) {
        self.to = None;
    }

    /// Starts a run in `runs` for changed blocks that follow `parent`, of which `id` is the first.
    /// The block `id` must be stored with that parent. The caller adds the changed blocks to
    /// `runs`, then calls [`end`](Self::end).
    pub(super) fn start_run(
        &mut self,
        parent: BlockId,
        id: BlockId,
        blocks: &EngineBlocks,
        runs: &mut PrefixRuns,
    ) {
        if self.to != Some(parent) {
            self.rebuild_for(id, blocks);
        }
        runs.start_run(&self.hashes);
    }

    /// Extends the lead-in by the current run of `runs`, which ends with block `id`.
    pub(super) fn end(&mut self, id: BlockId, runs: &PrefixRuns) {
        let changed = runs.current_run();
        let anchor = changed.iter().rposition(|&hash| is_anchor(hash));
        if anchor.is_some() {
            self.hashes.clear();
        }
        self.hashes
            .extend_from_slice(&changed[anchor.unwrap_or(0)..]);
        self.to = Some(id);
    }

    /// Adds a run to `runs` for consecutive blocks, which `reversed` lists from the last to the
    /// first; none if it is empty. The blocks may be removed, but not yet recycled, because the
    /// lead-in is found through their parents. Afterwards the lead-in ends with the block before
    /// them.
    pub(super) fn emit_reversed<I>(
        &mut self,
        reversed: I,
        blocks: &EngineBlocks,
        runs: &mut PrefixRuns,
    ) where
        I: DoubleEndedIterator<Item = (BlockId, SequenceHash)> + ExactSizeIterator + Clone,
    {
        let ends = (reversed.clone().next(), reversed.clone().next_back());
        let (Some((last, _)), Some((first, _))) = ends else {
            return;
        };
        match self.hashes.len().checked_sub(reversed.len()) {
            Some(left @ 1..) if self.to == Some(last) => {
                self.hashes.truncate(left);
                self.to = blocks.parent(first);
            }
            _ => self.rebuild_for(first, blocks),
        }
        runs.start_run(&self.hashes);
        runs.extend(reversed.rev().map(|(_, hash)| hash));
    }

    /// Collects the lead-in of block `id` by walking from parent to parent. The lead-in of a
    /// tombstone is the one that the tombstone stored; `to` is `None` afterwards, so it serves for
    /// one run only.
    fn rebuild_for(&mut self, id: BlockId, blocks: &EngineBlocks) {
        self.hashes.clear();
        blocks.collect_lead_in(id, &mut self.hashes);
        self.hashes.reverse();
        let starts_sequence = self.hashes.is_empty();
        self.to = blocks.parent(id).or(starts_sequence.then_some(NO_BLOCK));
    }
}
