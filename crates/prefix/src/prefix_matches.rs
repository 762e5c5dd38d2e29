//! Prefix matches of one prompt on every worker, in memory that a thread reuses for every decision.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use crate::active_tree::PrefixMatch;

thread_local! {
    // One buffer per thread. It is rewritten at every decision, so a shared buffer would move
    // between the caches of the processors together with the lock.
    static SCRATCH: Cell<Vec<PrefixMatch>> = const { Cell::new(Vec::new()) };
}

/// One [`PrefixMatch`] per worker index. Its memory is reused by the thread's next decision.
#[derive(Debug)]
pub struct PrefixMatches(Vec<PrefixMatch>);

impl PrefixMatches {
    /// Returns an empty prefix match for each of `worker_count` worker indices.
    pub(crate) fn new(worker_count: usize) -> Self {
        let mut matches = SCRATCH.take();
        matches.clear();
        matches.resize(worker_count, PrefixMatch::default());
        Self(matches)
    }

    /// Returns the largest overlap of any worker, in blocks.
    pub(crate) fn best_overlap(&self) -> u32 {
        let overlaps = self.0.iter().map(|prefix_match| prefix_match.overlap());
        overlaps.max().unwrap_or(0)
    }
}

impl Drop for PrefixMatches {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.0));
    }
}

impl Deref for PrefixMatches {
    type Target = [PrefixMatch];

    #[inline]
    fn deref(&self) -> &[PrefixMatch] {
        &self.0
    }
}

impl DerefMut for PrefixMatches {
    #[inline]
    fn deref_mut(&mut self) -> &mut [PrefixMatch] {
        &mut self.0
    }
}
