//! Evictions that events will tell of: requests that wait in an engine take blocks when it starts
//! them, and what they take is no longer there for those behind them.
//!
//! The [`shadow`](crate::shadow) of a worker evicts at the booking. Of every run that it evicts
//! its block nearest to the root is noted here, until events speak of that block. When the worker
//! has started all that was booked by then, the next events are the last that may.
//! A path loses its tail first, so a prompt whose blocks the shadow holds down to a noted one will
//! not be found deeper, whatever events still say.
//!
//! An SGLang locks what all requests of a step find cached before it makes room for any of them. So
//! what those will evict that it has not [begun](PrefixTree::begin) with is still there for a request
//! that is sent now.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::ops::Range;

use crate::depths::Depths;
use crate::sequence::{AlreadyHashed, SequenceHash};
use crate::tree::{Depth, PrefixTree, Slot};

/// Runs noted of one worker. Those that events never speak of would else pile up for as long as
/// something waits.
const MOST_RUNS: usize = 4096;

/// The evictions foreseen on one worker.
#[derive(Debug, Default)]
struct Runs {
    /// Of each, the latest booking that may be what evicts it.
    because_of: HashMap<SequenceHash, u64, BuildHasherDefault<AlreadyHashed>>,
    /// In the order of those bookings; some are settled.
    order: VecDeque<(u64, SequenceHash)>,
    /// The latest booking that the worker has started.
    started: u64,
}

impl Runs {
    /// How deep a path will be found that the shadow holds to the beginning of `gone` and events
    /// tell of to its end, if that is less, where the worker has `begun` with bookings up to this.
    fn kept(&self, chain: &[SequenceHash], mut gone: Range<u32>, begun: u64) -> Option<u32> {
        let because_of = |depth: u32| self.because_of.get(&chain[depth as usize]);
        if gone.is_empty() || because_of(gone.start).is_none() {
            return None;
        }
        gone.find(|&depth| because_of(depth).is_some_and(|&serial| serial <= begun))
    }
}

/// The evictions foreseen on each worker, if there are any.
#[derive(Debug, Default)]
pub(crate) struct Foreseen {
    by_worker: BTreeMap<Slot, Runs>,
    latest_booking: u64,
}

impl Foreseen {
    /// What is foreseen from now on may be because of this booking.
    pub(crate) fn booked(&mut self, serial: u64) {
        self.latest_booking = serial;
    }

    /// A run that begins with `uppermost` will be evicted.
    pub(crate) fn add(&mut self, worker: Slot, uppermost: SequenceHash) {
        let runs = self.by_worker.entry(worker).or_default();
        if runs.order.len() == MOST_RUNS {
            *runs = Runs::default();
        }
        runs.because_of.insert(uppermost, self.latest_booking);
        runs.order.push_back((self.latest_booking, uppermost));
    }

    /// Events have told of these, and of all that was evicted before.
    pub(crate) fn settle(&mut self, worker: Slot, hashes: impl Iterator<Item = SequenceHash>) {
        let Some(runs) = self.by_worker.get_mut(&worker) else {
            return;
        };
        for hash in hashes {
            runs.because_of.remove(&hash);
        }
        while let Some(&(because_of, run)) = runs.order.front()
            && because_of <= runs.started
        {
            runs.order.pop_front();
            if runs.because_of.get(&run) == Some(&because_of) {
                runs.because_of.remove(&run);
            }
        }
        if runs.because_of.is_empty() {
            self.by_worker.remove(&worker);
        }
    }

    /// The worker has started a booking, and those before it: what they were to evict is evicted.
    pub(crate) fn started(&mut self, worker: Slot, serial: u64) {
        if let Some(runs) = self.by_worker.get_mut(&worker) {
            runs.started = runs.started.max(serial);
        }
    }

    /// It has started all that was booked.
    pub(crate) fn started_all(&mut self, worker: Slot) {
        self.started(worker, self.latest_booking);
    }

    /// Nothing of what was foreseen matters any longer.
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
            if let Some(kept) = runs.kept(chain, left.cached..told.cached, tree.begun(worker)) {
                told.cached = kept;
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
            assert!(foreseen.by_worker[&7].order.len() <= MOST_RUNS);
            assert!(foreseen.by_worker[&7].because_of.contains_key(&hash));
        }
        foreseen.settle(7, 0..3 * MOST_RUNS as u64);
        assert!(foreseen.by_worker.is_empty());
    }

    #[test]
    fn what_a_started_booking_did_not_evict_stays() {
        let mut foreseen = Foreseen::default();
        let is_noted = |foreseen: &Foreseen, hash| {
            let runs = foreseen.by_worker.get(&7);
            runs.is_some_and(|runs| runs.because_of.contains_key(&hash))
        };
        for (serial, hash) in [(1, 10), (2, 20), (3, 10), (4, 40)] {
            foreseen.booked(serial);
            foreseen.add(7, hash);
        }
        foreseen.started(7, 2);
        assert!(is_noted(&foreseen, 20), "events lag");
        foreseen.settle(7, std::iter::empty());
        assert!(!is_noted(&foreseen, 20));
        assert!(is_noted(&foreseen, 10) && is_noted(&foreseen, 40));
        foreseen.started_all(7);
        foreseen.settle(7, std::iter::empty());
        assert!(foreseen.by_worker.is_empty());
    }
}
