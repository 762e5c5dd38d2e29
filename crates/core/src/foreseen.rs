//! Evictions that events will tell of: requests that wait in an engine take blocks when it starts
//! them, and what they take is no longer there for those behind them.
//!
//! The [`shadow`](crate::shadow) of a worker evicts at the booking. Of every run that it evicts
//! its block nearest to the root is noted here, until events speak of that block or nothing waits.
//! A path loses its tail first, so a prompt whose blocks the shadow holds down to a noted one will
//! not be found deeper, whatever events still say.

use std::collections::{BTreeMap, HashSet};
use std::hash::BuildHasherDefault;

use crate::depths::Depths;
use crate::sequence::{AlreadyHashed, SequenceHash};
use crate::tree::{Depth, PrefixTree, Slot};

/// Runs noted of one worker. Those that events never speak of would else pile up for as long as
/// something waits.
const MOST_RUNS: usize = 4096;

type Runs = HashSet<SequenceHash, BuildHasherDefault<AlreadyHashed>>;

/// The evictions foreseen on each worker, if there are any.
#[derive(Debug, Default)]
pub(crate) struct Foreseen {
    by_worker: BTreeMap<Slot, Runs>,
}

impl Foreseen {
    /// A run that begins with `uppermost` will be evicted.
    pub(crate) fn add(&mut self, worker: Slot, uppermost: SequenceHash) {
        let runs = self.by_worker.entry(worker).or_default();
        if runs.len() == MOST_RUNS {
            runs.clear();
        }
        runs.insert(uppermost);
    }

    /// Events have told of these.
    pub(crate) fn settle(&mut self, worker: Slot, hashes: impl Iterator<Item = SequenceHash>) {
        let Some(runs) = self.by_worker.get_mut(&worker) else {
            return;
        };
        for hash in hashes {
            runs.remove(&hash);
        }
        if runs.is_empty() {
            self.by_worker.remove(&worker);
        }
    }

    /// All that could be foreseen has happened.
    pub(crate) fn forget(&mut self, worker: Slot) {
        self.by_worker.remove(&worker);
    }

    /// Lowers what events say of `chain` to what will be left. Returns whether it lowered any.
    pub(crate) fn cap(
        &self,
        chain: &[SequenceHash],
        tree: &PrefixTree,
        depths: &mut [Depth],
    ) -> bool {
        if self.by_worker.is_empty() {
            return false;
        }
        let mut shadows = Depths::zero(depths.len());
        tree.descend_shadows(chain, &mut shadows);
        let mut is_capped = false;
        for (&worker, runs) in &self.by_worker {
            let (told, left) = (&mut depths[worker as usize], shadows[worker as usize]);
            if left.cached < told.cached && runs.contains(&chain[left.cached as usize]) {
                told.cached = left.cached;
                is_capped = true;
            }
        }
        is_capped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_events_never_speak_of_is_bounded() {
        let mut foreseen = Foreseen::default();
        for hash in 0..3 * MOST_RUNS as u64 {
            foreseen.add(7, hash);
            assert!(foreseen.by_worker[&7].len() <= MOST_RUNS);
            assert!(foreseen.by_worker[&7].contains(&hash));
        }
        foreseen.settle(7, 0..3 * MOST_RUNS as u64);
        assert!(foreseen.by_worker.is_empty());
    }
}
