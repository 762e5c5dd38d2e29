//! How far workers are with what was booked and freed: what of the tree can be hit depends on it.

use super::{PrefixTree, Slot};

/// How far a worker is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// Its events have told of freeings up to this one. What it had computed and nothing pins was
    /// the shadow's affair until then; without events it is for good, and this is 0.
    pub(super) told: u64,
    /// It has begun with bookings up to this one, if what it begins with together shares nothing.
    pub(super) begun: u64,
}

const ALL_SHARE: u64 = u64::MAX;

/// Events that do not speak of so many freeings do not lag, they are silent.
const MOST_UNTOLD: u64 = 8;

impl Default for Progress {
    fn default() -> Self {
        Self {
            told: 0,
            begun: ALL_SHARE,
        }
    }
}

impl PrefixTree {
    pub(super) fn progress(&self, worker: Slot) -> Progress {
        let progress = self.progress.get(worker as usize);
        progress.copied().unwrap_or_default()
    }

    fn progress_mut(&mut self, worker: Slot) -> &mut Progress {
        let slots = self.progress.len().max(worker as usize + 1);
        self.progress.resize_with(slots, Progress::default);
        &mut self.progress[worker as usize]
    }

    /// The events of `worker` have told of all freeings up to `stamp`; 0 if nobody tells.
    pub(crate) fn set_told(&mut self, worker: Slot, stamp: u64) {
        self.progress_mut(worker).told = stamp;
    }

    /// There is a freeing `stamp` that the events of `worker` are to tell of.
    pub(crate) fn awaits_told(&mut self, worker: Slot, stamp: u64) {
        let told = &mut self.progress_mut(worker).told;
        *told = (*told).max(stamp.saturating_sub(MOST_UNTOLD));
    }

    /// Says whether `worker` finds in its cache what others that it begins with together are to
    /// compute.
    pub(crate) fn set_shares(&mut self, worker: Slot, shares: bool) {
        self.progress_mut(worker).begun = if shares { ALL_SHARE } else { 0 };
    }

    /// `worker` begins with what was booked, up to `serial`. If it had nothing to do it has begun with
    /// more already: what is sent to it then waits for no step.
    pub(crate) fn begin(&mut self, worker: Slot, serial: u64) {
        let begun = &mut self.progress_mut(worker).begun;
        if *begun != ALL_SHARE {
            *begun = serial.max(*begun);
        }
    }

    /// The latest booking that `worker` has begun with; any, if it shares what it begins with
    /// together.
    pub(crate) fn begun(&self, worker: Slot) -> u64 {
        self.progress(worker).begun
    }

    /// Another worker may take its place.
    pub(super) fn forget_progress(&mut self, worker: Slot) {
        *self.progress_mut(worker) = Progress::default();
    }
}
