//! Confirmed progress of each worker, which decides the blocks of the tree that a request can hit.

use super::node::NodeHolder;
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
    /// Blocks that were freed under this epoch or before are lost: they are not cached, although
    /// the tree may still list them.
    pub(super) lost_until: u64,
    /// Number of times that the worker lost all its cached blocks, modulo 2¹⁶. The cached blocks of
    /// a holder with another number are lost.
    pub(super) generation: u16,
    /// Whether the worker is removed: then no queued request counts.
    pub(super) is_retired: bool,
}

impl WorkerSync {
    /// Returns the number of leading blocks that the worker still caches of the edge of `holder`,
    /// which must be that of this worker.
    #[inline]
    pub(super) fn cached_blocks(self, holder: &NodeHolder) -> u32 {
        let is_lost = holder.generation != self.generation
            || (holder.pin_count == 0 && holder.serial_or_epoch <= self.lost_until);
        if is_lost { 0 } else { holder.cached_blocks }
    }

    /// Removes lost blocks from `holder`, so that all its fields are true again.
    #[inline]
    pub(super) fn forget_lost(self, holder: &mut NodeHolder) {
        holder.cached_blocks = self.cached_blocks(holder);
        holder.generation = self.generation;
    }
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
            lost_until: 0,
            generation: 0,
            is_retired: false,
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
    /// started booking. A worker that is added at the index of a retired one begins with this.
    pub(crate) fn set_intra_step_sharing(&mut self, worker: WorkerIndex, is_shared: bool) {
        let sync = self.worker_sync_mut(worker);
        sync.last_started = if is_shared { SHARES_WITHIN_STEP } else { 0 };
        sync.is_retired = false;
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

    /// Records that `worker` has lost all cached blocks, pinned or not. None of them matches any
    /// more. Pins stay. The caller evicts the unpinned blocks from the tree afterwards, in parts:
    /// see [`EstimatedCache::evict_lost`](crate::estimated_cache::EstimatedCache::evict_lost).
    pub(crate) fn lose_cached(&mut self, worker: WorkerIndex) {
        let sync = self.worker_sync_mut(worker);
        sync.generation = sync.generation.wrapping_add(1);
    }

    /// Records that `worker` has lost the unpinned blocks that were freed before the free epoch
    /// `epoch`. None of them matches any more; the caller evicts them afterwards, in parts.
    pub(crate) fn lose_freed_before(&mut self, worker: WorkerIndex, epoch: u64) {
        let sync = self.worker_sync_mut(worker);
        sync.lost_until = sync.lost_until.max(epoch.saturating_sub(1));
    }

    /// Records that `worker` is removed: nothing that it holds matches any more. The caller
    /// afterwards releases its pins and evicts its unpinned blocks, in parts, and only then reuses
    /// its index, beginning with [`set_intra_step_sharing`](Self::set_intra_step_sharing).
    pub(crate) fn retire_worker(&mut self, worker: WorkerIndex) {
        self.lose_cached(worker);
        let sync = self.worker_sync_mut(worker);
        (sync.acknowledged_epoch, sync.lost_until) = (0, 0);
        // No booking has this serial or a smaller one, so no pinned block counts as active.
        sync.last_started = 0;
        sync.is_retired = true;
    }
}
