//! Progress of requests whose responses are not streamed: their prefill and their output tokens.
//!
//! Their progress is extrapolated by the latency model. If the worker publishes KV events, the
//! estimate is corrected by the blocks that the events report as stored.

use std::time::Duration;

use foresee_prefix::event_index::PrefixRun;
use foresee_prefix::sequence::{Sequence, SequenceHash};

use crate::booking_id::BookingId;
use crate::booking_record::KnownProgress;
use crate::progress_estimator::TailBlock;
use crate::state::State;
use crate::time::duration_from_secs_saturating;
use crate::worker_id::WorkerId;

/// Minimum time between two updates of the estimate for one request.
const MIN_UPDATE_INTERVAL: Duration = Duration::from_millis(1);

/// Maximum number of estimates that are updated at once. An update after a long pause covers all of
/// the pause, so no estimate falls behind for longer than a few calls.
const MAX_UPDATES_PER_CALL: usize = 64;

impl State {
    /// Starts to estimate the progress of a request that was just sent to `worker`. If several
    /// requests end in the same full block on one worker, KV events correct only the latest one.
    pub(crate) fn track_progress(&mut self, worker: WorkerId, prompt: &Sequence, id: BookingId) {
        let bookings = &self.bookings;
        self.progress.prune(bookings.len(), |id| {
            let record = bookings.get(id);
            record.is_some_and(|record| !record.prefill_confirmed)
        });
        self.progress.schedule(id, self.now);
        let full_blocks =
            prompt.hash_chain_aligned_to(self.prefixes.engine_block_ratio(worker.index).get());
        if let Some(&last) = full_blocks.last() {
            let tail = TailBlock {
                booking: id,
                blocks: full_blocks.len() as u32,
            };
            self.progress.set_tail(worker.index, last, tail);
        }
    }

    /// Corrects estimates by the blocks that a worker's events have just reported as stored. Must
    /// be called only for live events, because the present time counts as the time of the change.
    /// Requests that are not tracked are ignored.
    pub(crate) fn on_blocks_stored(&mut self, worker: WorkerId, run: PrefixRun<'_>) {
        if self.progress.has_no_tails() {
            return;
        }
        for &hash in run.changed() {
            if let Some(booking) = self.progress.with_tail(worker.index, hash) {
                self.on_prompt_stored(worker, booking);
            }
        }
        // An output fills one block after the other. Several blocks at once are part of a prompt.
        if let ([hash], Some(parent)) = (run.changed(), run.parent_of_changed()) {
            self.on_block_filled(worker, parent, *hash);
        }
    }

    /// Records that the prefill of a request has started, because an event reports one of its
    /// blocks as stored.
    fn on_prompt_stored(&mut self, worker: WorkerId, id: BookingId) {
        if let Some(record) = self.bookings.get_mut(id)
            && record.worker == worker
            && let Some((pending_work, _)) = self.workers.pending_work_mut(worker)
        {
            pending_work.mark_started(&record.work, self.now);
        }
    }

    /// Sets the output of the request whose tail block is `parent`, because an event reports the
    /// block `hash` after it: the request has generated output at least up to the end of the new
    /// block.
    ///
    /// Has no effect if no request has that tail block, if several requests have it in their
    /// prompt, or if the output would exceed its limit. In the latter two cases, later events do
    /// not correct the request either.
    fn on_block_filled(&mut self, worker: WorkerId, parent: SequenceHash, hash: SequenceHash) {
        let index = worker.index;
        let Some(tail) = self.progress.take_tail(index, parent) else {
            return;
        };
        let TailBlock {
            booking: id,
            blocks,
        } = tail;
        let ratio = self.prefixes.engine_block_ratio(index).get();
        let record = self.bookings.get(id).filter(|record| {
            // If several requests have this prompt, the block may belong to any of them.
            let pin_count = || self.prefixes.pin_count_at(record.node, index, blocks);
            record.worker == worker
                && !record.prefill_confirmed
                && (blocks > record.hashed_blocks || pin_count() == 1)
        });
        let Some(record) = record else {
            return;
        };
        let blocks = blocks.saturating_add(ratio);
        let Some(output_tokens) = record.output_with_stored_blocks(blocks) else {
            return;
        };
        let was_in_prefill = record.work.is_in_prefill();
        if was_in_prefill {
            self.on_prompt_stored(worker, id);
            self.update_estimate(id);
        }
        let now = self.now;
        let Some(record) = self.bookings.get_mut(id) else {
            return;
        };
        record.last_known = KnownProgress {
            at: now,
            output_tokens,
        };
        let max_output_tokens = record.max_output_tokens();
        // An estimate that has reached the maximum has no further update. If the output turns out to
        // be shorter, it needs one again.
        let has_no_update = !was_in_prefill && record.output_tokens >= max_output_tokens;
        if has_no_update && output_tokens < max_output_tokens {
            self.progress.schedule(id, now);
        }
        let tail = TailBlock {
            booking: id,
            blocks,
        };
        self.progress.set_tail(index, hash, tail);
        self.set_output_tokens(id, output_tokens);
    }

    /// Advances the state to `now`, unless it is at a later time already, and applies the updates of
    /// estimates that are due: at most [`MAX_UPDATES_PER_CALL`], the earliest first. The next call
    /// applies further ones.
    pub(crate) fn advance_to(&mut self, now: Duration) {
        self.now = self.now.max(now);
        for _ in 0..MAX_UPDATES_PER_CALL {
            let Some(id) = self.progress.take_due(self.now) else {
                return;
            };
            if let Some(next) = self.update_estimate(id) {
                self.progress.schedule(id, next);
            }
        }
    }

    /// Updates the phase and the output tokens of a request to the estimate for the present time.
    /// Returns when its next block should be full, or `None` if no further update is needed: the
    /// output has reached its maximum or was reported, the booking has ended, or the worker was
    /// removed.
    fn update_estimate(&mut self, id: BookingId) -> Option<Duration> {
        let now = self.now;
        let record = self
            .bookings
            .get_mut(id)
            .filter(|record| !record.prefill_confirmed)?;
        let (worker, serial) = (record.worker, record.serial);
        let step_seconds = self.workers.decode_step_seconds(worker, now)?;
        let (pending_work, _) = self.workers.pending_work_mut(worker)?;
        if record.work.is_in_prefill() {
            let predicted = record.forecast.first_token_at;
            let Some(first_token_at) =
                pending_work.inferred_first_token_at(&record.work, predicted, now)
            else {
                let pause = duration_from_secs_saturating(step_seconds).max(MIN_UPDATE_INTERVAL);
                return now.checked_add(pause);
            };
            record.begin_estimated_output(first_token_at);
        }
        let is_prefill_finished = pending_work.finish_prefill(&mut record.work);
        let estimate = record.estimated_output(step_seconds, now);
        if is_prefill_finished {
            self.on_prefill_finished(worker, serial);
        }
        self.set_output_tokens(id, estimate.tokens);
        // The lower bound keeps the updates of a fast worker apart.
        let pause = estimate.until_next_block?.max(MIN_UPDATE_INTERVAL);
        now.checked_add(pause)
    }
}
