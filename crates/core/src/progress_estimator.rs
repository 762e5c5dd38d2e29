//! Which requests have an estimated progress, when each estimate is due, and which block each
//! request fills next. The estimates themselves are made in [`progress`](crate::progress).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::BuildHasherDefault;
use std::time::Duration;

use foresee_prefix::WorkerIndex;
use foresee_prefix::sequence::{IdentityHasher, SequenceHash};

use crate::booking_id::BookingId;

/// Requests whose progress is estimated.
#[derive(Debug, Default)]
pub(crate) struct ProgressEstimator {
    /// Time of the next update of each request, earliest first. May contain requests that have
    /// ended.
    next_updates: BinaryHeap<Reverse<(Duration, BookingId)>>,
    /// Requests by [`worker_block_key`] of their tail block: the last full block that the request
    /// is known to have computed or, at first, the last full block of its prompt.
    by_tail_block: HashMap<u64, TailBlock, BuildHasherDefault<IdentityHasher>>,
}

/// Tail block of a request, after which KV events are expected to report the next one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TailBlock {
    pub(crate) booking: BookingId,
    /// Blocks of the request up to the end of this one, in router blocks.
    pub(crate) blocks: u32,
}

/// Returns a key that identifies a block on one worker.
fn worker_block_key(worker: WorkerIndex, hash: SequenceHash) -> u64 {
    hash.rotate_left(worker % u64::BITS) ^ u64::from(worker)
}

impl ProgressEstimator {
    /// Schedules an update of the estimate for a request.
    pub(crate) fn schedule(&mut self, id: BookingId, at: Duration) {
        self.next_updates.push(Reverse((at, id)));
    }

    /// Takes out a request whose update is due at `now`, the earliest first. It has no further
    /// update unless one is [scheduled](Self::schedule).
    pub(crate) fn take_due(&mut self, now: Duration) -> Option<BookingId> {
        let &Reverse((due, id)) = self.next_updates.peek()?;
        if due > now {
            return None;
        }
        self.next_updates.pop();
        Some(id)
    }

    /// Sets the tail block of a request. If several requests have the same tail block on one
    /// worker, KV events correct only the latest one.
    pub(crate) fn set_tail(&mut self, worker: WorkerIndex, hash: SequenceHash, tail: TailBlock) {
        self.by_tail_block
            .insert(worker_block_key(worker, hash), tail);
    }

    /// Returns the request whose tail block this is on the worker.
    pub(crate) fn with_tail(&self, worker: WorkerIndex, hash: SequenceHash) -> Option<BookingId> {
        let tail = self.by_tail_block.get(&worker_block_key(worker, hash));
        tail.map(|tail| tail.booking)
    }

    /// Removes a tail block and returns it.
    pub(crate) fn take_tail(
        &mut self,
        worker: WorkerIndex,
        hash: SequenceHash,
    ) -> Option<TailBlock> {
        self.by_tail_block.remove(&worker_block_key(worker, hash))
    }

    /// Returns whether no request has a tail block.
    pub(crate) fn has_no_tails(&self) -> bool {
        self.by_tail_block.is_empty()
    }

    /// Drops the updates and tail blocks of requests that are no longer in progress, once there are
    /// many for the number of bookings: a request that is aborted leaves an update that may be due
    /// much later.
    pub(crate) fn prune(&mut self, bookings: usize, is_in_progress: impl Fn(BookingId) -> bool) {
        let max_len = 2 * bookings + 64;
        if self.next_updates.len() > max_len {
            self.next_updates
                .retain(|Reverse((_, id))| is_in_progress(*id));
        }
        if self.by_tail_block.len() > max_len {
            self.by_tail_block
                .retain(|_, tail| is_in_progress(tail.booking));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::booking::Booking;
    use crate::router::{Request, Router, RouterConfig};
    use crate::workers::WorkerSpec;
    use foresee_prefix::sequence::Sequence;

    /// With a long backlog, updates are due long after their requests were aborted.
    #[test]
    fn updates_of_ended_requests_do_not_accumulate() {
        let config = RouterConfig {
            queue_order: None,
            ..RouterConfig::default()
        };
        let sequence = Sequence::unhashed(1_000_000, config.block_size);
        let router = Router::new(config).unwrap();
        let worker = router.add_worker(WorkerSpec::default()).unwrap();
        router.set_healthy(worker, true);
        let request = Request {
            is_streaming: false,
            ..Request::new(&sequence)
        };
        let book = || router.route(&request, Duration::ZERO).unwrap();
        let live: Vec<Booking> = (0..10).map(|_| book()).collect();
        for _ in 0..1_000 {
            drop(book());
        }
        let updates = router.shared().lock().progress.next_updates.len();
        assert!(
            updates <= 2 * live.len() + 64 + 2,
            "{updates} updates are scheduled"
        );
    }
}
