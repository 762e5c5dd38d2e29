//! Confirmed progress of each worker, which decides the blocks of the tree that a request can hit.

use super::{PrefixTree, WorkerIndex};

/// Confirmed progress of one worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkerSync {
    /// Free epochs up to this one are reflected in the worker's events, so the event index lists
    /// the blocks that they left cached. Blocks that were freed later count as cached because the
    /// estimated cache contains them. Stays 0 for a worker without events: then the estimated
    /// cache decides for all blocks.
    pub(super) acknowledged_epoch: u64,
    /// Bookings up to this serial have started on the engine, so a new request can reuse their
    /// blocks. [`SHARES_WITHIN_STEP`] for an engine that shares blocks between the requests that it
    /// starts in one step.
    pub(super) last_started: u64,
}

/// Value of `last_started` for an engine that shares blocks within a scheduling step (vLLM): a
/// request can reuse the blocks of every booking before it.
const SHARES_WITHIN_STEP: u64 = u64::MAX;

/// Number of free epochs by which events may lag. A stream that does not mention more frees than
/// this is not late: its engine reports nothing for them.
const MAX_UNACKNOWLEDGED: u64 = 8;

impl Default for WorkerSync {
    fn default() -> Self {
        Self {
            acknowledged_epoch: 0,
            last_started: SHARES_WITHIN_STEP,
        }
    }
}

impl PrefixTree {
    /// Returns the progress of `worker`, or the default if nothing was recorded.
    pub(super) fn worker_sync(&self, worker: WorkerIndex) -> WorkerSync {
        let sync = self.worker_sync.get(worker as usize);
        sync.copied().unwrap_or_default()
    }

    /// Returns the progress of `worker` for writing, and grows the table if needed.
    fn worker_sync_mut(&mut self, worker: WorkerIndex) -> &mut WorkerSync {
        let len = self.worker_sync.len().max(worker as usize + 1);
        self.worker_sync.resize_with(len, WorkerSync::default);
        &mut self.worker_sync[worker as usize]
    }

    /// Records that the events of `worker` reflect every free up to `epoch`; 0 for a worker without
    /// events.
    pub(crate) fn acknowledge(&mut self, worker: WorkerIndex, epoch: u64) {
        self.worker_sync_mut(worker).acknowledged_epoch = epoch;
    }

    /// Bounds how far the events of `worker` may lag after a free under `epoch`: epochs that are
    /// [`MAX_UNACKNOWLEDGED`] or more before it count as acknowledged.
    pub(crate) fn limit_unacknowledged(&mut self, worker: WorkerIndex, epoch: u64) {
        let acknowledged = &mut self.worker_sync_mut(worker).acknowledged_epoch;
        *acknowledged = (*acknowledged).max(epoch.saturating_sub(MAX_UNACKNOWLEDGED));
    }

    /// Sets whether the engine of `worker` shares blocks within a scheduling step: a request then
    /// hits blocks that another request of the same step is about to compute. Resets the last
    /// started booking.
    pub(crate) fn set_intra_step_sharing(&mut self, worker: WorkerIndex, is_shared: bool) {
        let last_started = if is_shared { SHARES_WITHIN_STEP } else { 0 };
        self.worker_sync_mut(worker).last_started = last_started;
    }

    /// Records that `worker` has started its bookings up to `serial`. A smaller serial than the
    /// recorded one has no effect: a booking that reaches an idle engine waits for no step and is
    /// recorded at once. No effect either for an engine that shares blocks within a step.
    pub(crate) fn mark_started(&mut self, worker: WorkerIndex, serial: u64) {
        let last_started = &mut self.worker_sync_mut(worker).last_started;
        if *last_started != SHARES_WITHIN_STEP {
            *last_started = serial.max(*last_started);
        }
    }

    /// Returns the serial of the latest booking that `worker` has started; `u64::MAX` for an engine
    /// that shares blocks within a step.
    pub(crate) fn last_started(&self, worker: WorkerIndex) -> u64 {
        self.worker_sync(worker).last_started
    }

    /// Resets the progress of `worker`, because another worker may reuse its index.
    pub(super) fn remove_worker_sync(&mut self, worker: WorkerIndex) {
        *self.worker_sync_mut(worker) = WorkerSync::default();
    }
}
