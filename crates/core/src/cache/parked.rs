//! Runs of blocks that cannot be hashed before their parent is known.

use std::collections::VecDeque;

use crate::cache::blocks::{Blocks, Id};

/// Runs that are kept at most.
const MOST_RUNS: usize = 256;

/// Token ids of all of those together, but for the last.
const MOST_TOKENS: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Run {
    parent: u64,
    pub(super) names: Vec<u64>,
    pub(super) tokens: Vec<u32>,
}

/// Runs that wait for their parents, oldest first.
#[derive(Debug, Default)]
pub(super) struct Parked {
    runs: VecDeque<Run>,
    tokens: usize,
}

impl Parked {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Returns whether all others could be kept.
    pub(super) fn push(&mut self, parent: u64, names: &[u64], tokens: &[u32]) -> bool {
        let is_full = self.runs.len() == MOST_RUNS || self.tokens > MOST_TOKENS;
        if is_full && let Some(oldest) = self.runs.pop_front() {
            self.tokens -= oldest.tokens.len();
        }
        self.tokens += tokens.len();
        self.runs.push_back(Run {
            parent,
            names: names.to_vec(),
            tokens: tokens.to_vec(),
        });
        !is_full
    }

    /// Takes the first run whose parent is stored.
    pub(super) fn take(&mut self, blocks: &Blocks) -> Option<(Id, Run)> {
        let parents = self.runs.iter().map(|run| blocks.find_stored(run.parent));
        let mut parents = parents.enumerate();
        let (index, parent) = parents.find_map(|(index, id)| Some((index, id?)))?;
        let run = self.runs.remove(index)?;
        self.tokens -= run.tokens.len();
        Some((parent, run))
    }

    /// A block was removed while it waited: what is behind it in its run goes too.
    pub(super) fn forget(&mut self, name: u64, block_size: usize) {
        for run in &mut self.runs {
            if let Some(index) = run.names.iter().position(|&it| it == name) {
                self.tokens -= run.tokens.len() - index * block_size;
                run.names.truncate(index);
                run.tokens.truncate(index * block_size);
            }
        }
        self.runs.retain(|run| !run.names.is_empty());
    }
}
