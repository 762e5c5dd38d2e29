//! Predicted evictions that KV events have not confirmed yet.
//!
//! The [`estimated_cache`](crate::estimated_cache) of a worker evicts blocks as soon as a request
//! is booked. The engine evicts them when it starts the request, and reports that later still.
//! Until then the event index lists blocks that will be gone when a newly routed request runs.
//!
//! For each evicted run this module stores the block nearest to the root and the booking that
//! caused the eviction. A path loses its tail first. So a prompt whose path the estimate keeps down
//! to a stored block will not be matched deeper, even while events still list more of it.
//!
//! An entry is removed when an event mentions its block. It is also removed with the first event
//! after the engine has started every booking that may cause the eviction: the eviction is then
//! taken not to happen.
//!
//! SGLang locks what all requests of a scheduling step find cached before it evicts for any of
//! them. An eviction caused by a booking that has not [started](PrefixTree::mark_started) therefore
//! does not hide blocks from a request that is sent now.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::ops::Range;

use crate::active_tree::{PrefixMatch, PrefixTree, WorkerIndex};
use crate::prefix_matches::PrefixMatches;
use crate::sequence::{IdentityHasher, SequenceHash};

/// Maximum number of pending runs of one worker. Runs that events never mention would otherwise
/// accumulate as long as requests wait on the engine.
const MAX_PENDING_RUNS: usize = 4096;

/// Pending evictions of one worker.
#[derive(Debug, Default)]
struct WorkerEvictions {
    /// For the block nearest to the root of each evicted run: the serial of the latest booking that
    /// may cause the eviction.
    caused_by: HashMap<SequenceHash, u64, BuildHasherDefault<IdentityHasher>>,
    /// Serial and block of each run, in booking order. An entry without a counterpart in
    /// `caused_by` is confirmed already, or replaced by a later one.
    fifo: VecDeque<(u64, SequenceHash)>,
    /// Serial of the latest booking that the worker has started.
    last_started: u64,
}

impl WorkerEvictions {
    /// Removes the run of the earliest booking.
    fn drop_oldest(&mut self) {
        if let Some((serial, hash)) = self.fifo.pop_front()
            && self.caused_by.get(&hash) == Some(&serial)
        {
            self.caused_by.remove(&hash);
        }
    }

    /// Returns how many leading blocks of `chain` will survive the pending evictions. `None` means
    /// that no pending eviction lowers the number that events list.
    ///
    /// `unreliable` are the positions of the blocks that events list and the estimate has evicted.
    /// Unless the first of them is the start of a pending run, the result is `None`. `last_started`
    /// is the latest booking whose evictions count (see [`PrefixTree::last_started`]).
    fn surviving_depth(
        &self,
        chain: &[SequenceHash],
        mut unreliable: Range<u32>,
        last_started: u64,
    ) -> Option<u32> {
        let caused_by = |depth: u32| self.caused_by.get(&chain[depth as usize]);
        if unreliable.is_empty() || caused_by(unreliable.start).is_none() {
            return None;
        }
        unreliable.find(|&depth| caused_by(depth).is_some_and(|&serial| serial <= last_started))
    }
}

/// Pending evictions of all workers.
#[derive(Debug, Default)]
pub(crate) struct PendingEvictions {
    /// Workers with pending evictions.
    by_worker: BTreeMap<WorkerIndex, WorkerEvictions>,
    /// Serial of the latest booking, to which new evictions are attributed.
    latest_booking: u64,
}

impl PendingEvictions {
    /// Attributes the evictions that are added from now on to the booking `serial`.
    pub(crate) fn note_booking(&mut self, serial: u64) {
        self.latest_booking = serial;
    }

    /// Adds the eviction of a run that begins with `shallowest`, caused by the booking that was
    /// [noted](Self::note_booking) last. If the worker has too many pending runs, the oldest is
    /// dropped first.
    pub(crate) fn push(&mut self, worker: WorkerIndex, shallowest: SequenceHash) {
        let runs = self.by_worker.entry(worker).or_default();
        if runs.fifo.len() == MAX_PENDING_RUNS {
            runs.drop_oldest();
        }
        runs.caused_by.insert(shallowest, self.latest_booking);
        runs.fifo.push_back((self.latest_booking, shallowest));
    }

    /// Removes the entries of the blocks in `hashes`, which new events of the worker report as
    /// stored or removed. Also removes the entry of every run whose booking has started: the new
    /// events are right about it. Call for every batch of events, even if `hashes` is empty.
    pub(crate) fn acknowledge(
        &mut self,
        worker: WorkerIndex,
        hashes: impl Iterator<Item = SequenceHash>,
    ) {
        let Some(runs) = self.by_worker.get_mut(&worker) else {
            return;
        };
        for hash in hashes {
            runs.caused_by.remove(&hash);
        }
        while let Some(&(serial, _)) = runs.fifo.front()
            && serial <= runs.last_started
        {
            runs.drop_oldest();
        }
        if runs.caused_by.is_empty() {
            self.by_worker.remove(&worker);
        }
    }

    /// Records that the worker has started the booking `serial` and all bookings before it. What
    /// they had to evict is evicted by now, so the next [`acknowledge`](Self::acknowledge) removes
    /// their entries. No effect on a worker without pending evictions.
    pub(crate) fn mark_started(&mut self, worker: WorkerIndex, serial: u64) {
        if let Some(runs) = self.by_worker.get_mut(&worker) {
            runs.last_started = runs.last_started.max(serial);
        }
    }

    /// Records that the worker has started all its bookings.
    pub(crate) fn mark_all_started(&mut self, worker: WorkerIndex) {
        self.mark_started(worker, self.latest_booking);
    }

    /// Removes the pending evictions of a worker.
    pub(crate) fn clear(&mut self, worker: WorkerIndex) {
        self.by_worker.remove(&worker);
    }

    /// Lowers `cached_blocks` of each worker, as events report it for `chain`, to the blocks that
    /// will survive pending evictions. `active_blocks` is neither read nor changed.
    /// `prefix_matches` is indexed by worker and must contain every worker. Returns whether any
    /// prefix match became smaller.
    pub(crate) fn clamp(
        &self,
        chain: &[SequenceHash],
        tree: &PrefixTree,
        prefix_matches: &mut [PrefixMatch],
    ) -> bool {
        if self.by_worker.is_empty() {
            return false;
        }
        let mut estimated = PrefixMatches::new(prefix_matches.len());
        tree.match_estimated(chain, &mut estimated);
        let mut is_lowered = false;
        for (&worker, runs) in &self.by_worker {
            let (reported, estimate) = (
                &mut prefix_matches[worker as usize],
                estimated[worker as usize],
            );
            if let Some(surviving) = runs.surviving_depth(
                chain,
                estimate.cached_blocks..reported.cached_blocks,
                tree.last_started(worker),
            ) {
                reported.cached_blocks = surviving;
                is_lowered = true;
            }
        }
        is_lowered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_runs_that_events_never_mention_are_bounded() {
        let mut pending = PendingEvictions::default();
        for hash in 0..3 * MAX_PENDING_RUNS as u64 {
            pending.push(7, hash);
            assert!(pending.by_worker[&7].fifo.len() <= MAX_PENDING_RUNS);
            assert!(pending.by_worker[&7].caused_by.contains_key(&hash));
            let oldest = hash.saturating_sub(MAX_PENDING_RUNS as u64 - 1);
            assert!(
                pending.by_worker[&7].caused_by.contains_key(&oldest),
                "only the oldest runs are dropped"
            );
        }
        pending.acknowledge(7, 0..3 * MAX_PENDING_RUNS as u64);
        assert!(pending.by_worker.is_empty());
    }

    #[test]
    fn entries_of_started_bookings_are_dropped_by_the_next_events() {
        let mut pending = PendingEvictions::default();
        let is_pending = |pending: &PendingEvictions, hash| {
            let runs = pending.by_worker.get(&7);
            runs.is_some_and(|runs| runs.caused_by.contains_key(&hash))
        };
        for (serial, hash) in [(1, 10), (2, 20), (3, 10), (4, 40)] {
            pending.note_booking(serial);
            pending.push(7, hash);
        }
        pending.mark_started(7, 2);
        assert!(
            is_pending(&pending, 20),
            "a start alone confirms nothing: events lag behind it"
        );
        pending.acknowledge(7, std::iter::empty());
        assert!(!is_pending(&pending, 20));
        assert!(is_pending(&pending, 10) && is_pending(&pending, 40));
        pending.mark_all_started(7);
        pending.acknowledge(7, std::iter::empty());
        assert!(pending.by_worker.is_empty());
    }
}
