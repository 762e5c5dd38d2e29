//! Removal of what a worker held, in many short critical sections.
//!
//! A worker may cache a million blocks, run hundreds of requests and have a thousand queued. One
//! critical section makes all of that invalid at once: lost blocks are recognised by their age, and
//! the index of a removed worker is not reused. The calling thread then removes it part by part, and
//! passes the lock on after each part. Decisions in between see nothing of what is being removed.

use foresee_prefix::counter::Counter;
use foresee_prefix::event_index::{RemovalCursor, RemovalStep};
use foresee_prefix::{NO_NODE, RetiredWorker, WorkerIndex};

use crate::booking_id::BookingId;
use crate::booking_record::BookingRecord;
use crate::critical_section::SharedState;
use crate::pending_work::PendingWork;
use crate::queue::QueueKey;
use crate::state::State;
use crate::worker_id::WorkerId;
use crate::workers::Worker;

/// Number of freed requests, or of queued ones, that one critical section handles.
const MAX_REQUESTS_PER_LOCK: usize = 32;
/// Number of ids of bookings that one critical section visits.
const MAX_BOOKING_IDS_PER_LOCK: usize = 64;

impl SharedState {
    /// Evicts the blocks that a worker has lost according to its estimated cache.
    pub(crate) fn evict_lost_blocks(&self, id: WorkerId) {
        self.repeat_while(|state| {
            state.workers.get(id).is_some()
                && state.prefixes.evict_lost(id.index, MAX_REQUESTS_PER_LOCK)
        });
    }

    /// Evicts blocks from the estimated cache of a worker until they fit its capacity.
    pub(crate) fn evict_to_fit(&self, id: WorkerId) {
        self.repeat_while(|state| {
            state.workers.get(id).is_some() && state.prefixes.evict_some_to_fit(id.index)
        });
    }

    /// Removes the blocks that a worker has lost from the event index.
    pub(crate) fn remove_lost_events(&self, worker: WorkerIndex, mut cursor: RemovalCursor) {
        loop {
            let mut state = self.lock();
            let step = state.prefixes.remove_lost_events(worker, cursor);
            state.unlock_fair();
            match step {
                RemovalStep::Continue(next) => cursor = next,
                RemovalStep::Done(unused) => return drop(unused),
            }
        }
    }

    /// Offers a new choice to all requests in the queue of a worker that accepts no more requests.
    /// Has no effect if the worker was removed.
    pub(crate) fn offer_queue_to_others(&self, id: WorkerId) {
        let mut last = None;
        self.repeat_while(|state| {
            last = state.offer_rebalance_after(id, last, MAX_REQUESTS_PER_LOCK);
            last.is_some()
        });
    }

    /// Offers a new choice to all requests that are queued for workers which accept no requests,
    /// because another worker does from now on.
    pub(crate) fn offer_stranded_requests(&self) {
        let stranded = self.lock().workers_with_stranded_requests();
        for worker in stranded {
            self.offer_queue_to_others(worker);
        }
    }

    /// Removes a worker with all its bookings, and offers a new choice to the requests in its queue.
    /// Returns whether it existed.
    pub(crate) fn remove_worker(&self, id: WorkerId) -> bool {
        let mut state = self.lock();
        let Some((pending_work, mut retired)) = state.retire_worker(id) else {
            return false;
        };
        let booking_ids = state.bookings.index_end();
        drop(state);
        let queued: Vec<BookingId> = pending_work.queue.bookings().collect();
        for part in queued.chunks(MAX_REQUESTS_PER_LOCK) {
            let mut state = self.lock();
            part.iter().for_each(|&id| state.offer_rebalance(id));
            state.unlock_fair();
        }
        let mut from = 0;
        self.repeat_while(|state| {
            state.detach_bookings(id, from..from + MAX_BOOKING_IDS_PER_LOCK);
            from += MAX_BOOKING_IDS_PER_LOCK;
            from < booking_ids
        });
        self.repeat_while(|state| {
            let prefixes = &mut state.prefixes;
            prefixes.evict_retired(&mut retired, MAX_REQUESTS_PER_LOCK)
        });
        if let Some(cursor) = retired.lost_events() {
            self.remove_lost_events(id.index, cursor);
        }
        self.lock().workers.free_index(id.index);
        true
    }

    /// Calls `part` in one critical section after the other while it returns true.
    fn repeat_while(&self, mut part: impl FnMut(&mut State) -> bool) {
        loop {
            let mut state = self.lock();
            let is_left = part(&mut state);
            // A loop without pauses would otherwise take the lock again before a waiting thread
            // wakes up.
            state.unlock_fair();
            if !is_left {
                return;
            }
        }
    }
}

impl State {
    /// Removes a worker so that nothing refers to it any longer, except by an index that is not
    /// reused yet. Returns its pending work and the blocks that are left of it; `None` if it was
    /// removed before.
    fn retire_worker(&mut self, id: WorkerId) -> Option<(PendingWork, RetiredWorker)> {
        let pending_work = self.workers.remove(id)?;
        let now = self.now;
        self.workers.enforce_ejection_limit(now);
        let queued = pending_work.queue.waiting();
        self.dispatcher.queued_total.subtract(queued);
        Some((pending_work, self.prefixes.retire_worker(id.index)))
    }

    /// Unpins the blocks of the bookings on a removed worker at `indices`.
    fn detach_bookings(&mut self, worker: WorkerId, indices: std::ops::Range<usize>) {
        for index in indices {
            let id = self.bookings.id_at(index);
            let record = id.and_then(|id| self.bookings.get_mut(id));
            let Some(record) = record.filter(|record| record.worker == worker) else {
                continue;
            };
            let (node, is_queued) = (record.node, record.queued.is_some());
            record.node = NO_NODE;
            match is_queued {
                true => self.prefixes.unpin_queued(node, worker.index),
                false => self.prefixes.unpin_from_removed(node, worker.index),
            }
        }
    }

    /// Unpins the blocks of a booking whose worker was removed. Has no effect once
    /// [`SharedState::remove_worker`] has done so.
    pub(crate) fn unpin_from_removed_worker(&mut self, record: &BookingRecord) {
        let (node, index) = (record.node, record.worker.index);
        match record.queued {
            Some(_) => self.prefixes.unpin_queued(node, index),
            None => self.prefixes.unpin_from_removed(node, index),
        }
    }

    /// Offers a new choice to the next requests in the queue of a worker, at most `max` of them,
    /// after the one with the key `after`. Returns the key of the last; `None` if no request is
    /// left, or the worker was removed.
    fn offer_rebalance_after(
        &mut self,
        worker: WorkerId,
        after: Option<QueueKey>,
        max: usize,
    ) -> Option<QueueKey> {
        let queue = &self.workers.pending_work(worker)?.queue;
        let next: Vec<(QueueKey, BookingId)> = queue.after(after).take(max).collect();
        for (_, id) in &next {
            self.offer_rebalance(*id);
        }
        next.last().map(|(key, _)| *key)
    }

    /// Returns the workers that accept no requests and have some in their queues.
    fn workers_with_stranded_requests(&self) -> Vec<WorkerId> {
        let is_stranded = |worker: &&Worker| {
            !worker.is_accepting()
                && self
                    .workers
                    .pending_work(worker.id)
                    .is_some_and(|pending_work| !pending_work.queue.is_empty())
        };
        let stranded = self.workers.iter().filter(is_stranded);
        stranded.map(|worker| worker.id).collect()
    }
}
