//! The life of a booking: booked or queued, prefill, decode, release.
//!
//! All that a booking adds to the numbers of its worker is in its [`BookingRecord`]. Its release
//! subtracts exactly that.

use std::time::Duration;

use foresee_prefix::counter::Counter;
use foresee_prefix::sequence::Sequence;
use foresee_prefix::{PinRequest, UnpinRequest, WorkerIndex};

use crate::assessment::RequestAssessment;
use crate::booking_id::BookingId;
use crate::booking_record::{BookingRecord, ExpectedOutput, QueuedState};
use crate::outlier::ExchangeResult;
use crate::policy::Decision;
use crate::request::PreparedRequest;
use crate::sglang_admission::OutputReservation;
use crate::state::State;
use crate::worker_id::WorkerId;

impl State {
    /// Books a request on `worker`, as sent to it now. The state must not have changed since
    /// `assessment` was made. If the worker was removed, the booking occupies nothing. Does not
    /// check slack, memory or health.
    pub(crate) fn book(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> (BookingId, Decision) {
        let (mut record, decision) = self.new_record(worker, assessment, request);
        let (prompt, now) = (request.prompt, self.now);
        let mut is_idle = false;
        if let Some((worker, load)) = self.workers.get_mut(worker) {
            let index = worker.id.index;
            let pinned = self.prefixes.pin(
                index,
                &PinRequest {
                    prompt,
                    position: assessment.tree_position,
                    prefix_match: assessment.prefix_matches[index as usize],
                    serial: record.serial,
                    occupancy: record.occupancy(),
                },
            );
            record.node = pinned.node;
            record.hashed_blocks = pinned.hashed_blocks;
            record.expected_hit = pinned.expected_hit;
            is_idle = pinned.was_idle;
            load.requests += 1;
            load.context_tokens += record.context_tokens();
            load.active_blocks = self.prefixes.active_blocks(index);
        }
        self.add_pending_work(&mut record);
        let mut is_prefill_finished = false;
        if let Some((pending_work, _)) = self.workers.pending_work_mut(worker) {
            pending_work.mark_sent(&mut record.work, record.serial, now);
            // An empty prompt has no prefill to wait for, and its output is not observed.
            is_prefill_finished =
                record.prompt_tokens == 0 && pending_work.finish_prefill(&mut record.work);
            let reserve = &mut pending_work.output_reserve;
            if is_idle {
                reserve.reset_ratio();
            }
            reserve.replace(OutputReservation::default(), record.output_reservation());
        }
        let is_streaming = record.work.is_streaming;
        let id = self.bookings.insert(record);
        if is_prefill_finished {
            self.on_prefill_finished(worker, id.serial);
        }
        if !is_streaming {
            self.track_progress(worker, prompt, id);
        }
        (id, decision)
    }

    /// Books a request in the queue of `worker`, to be sent later. The state must not have changed
    /// since `assessment` was made. Until `rebalance_not_before`, slack of other workers does not
    /// lead to a new choice for the request. The booking counts in the worker's queued blocks, not
    /// in its active ones, and causes no eviction. If the worker was removed, the booking is in no
    /// queue, and a poll for its dispatch returns `Ready`.
    pub(crate) fn enqueue(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
        rebalance_not_before: Duration,
    ) -> (BookingId, Decision) {
        let (mut record, decision) = self.new_record(worker, assessment, request);
        let mut new_blocks = 0;
        if let Some((worker, load)) = self.workers.get_mut(worker) {
            let index = worker.id.index;
            let (node, hashed_blocks) =
                self.prefixes
                    .pin_queued(index, request.prompt, assessment.tree_position);
            record.node = node;
            record.hashed_blocks = hashed_blocks;
            let active_blocks = assessment.prefix_matches[index as usize].active_blocks;
            let shared_blocks = active_blocks.min(hashed_blocks);
            new_blocks = u64::from(record.blocks() - shared_blocks);
            load.requests += 1;
            load.context_tokens += record.context_tokens();
            load.queued_blocks += new_blocks;
        }
        self.add_pending_work(&mut record);
        let key = record.ticket.queue_key(record.forecast.prefill_seconds);
        let work = record.work.work;
        let memory = (new_blocks, record.output_reservation());
        record.queued = Some(Box::new(QueuedState {
            key,
            rebalance_offered: false,
            rebalance_not_before,
            waker: None,
        }));
        let id = self.bookings.insert(record);
        if self.workers.enqueue(worker, key, id, work, memory) {
            self.dispatcher.queued_total += 1;
        }
        (id, decision)
    }

    /// Returns the record of a new booking with the next serial, and the decision that led to it. The
    /// record pins nothing and is not queued yet. The worker's index must be in the arrays, even if
    /// the worker was removed.
    fn new_record(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> (BookingRecord, Decision) {
        let decision = self.decision(worker.index, assessment, request);
        let serial = self.bookings.next_serial();
        let cached_blocks = decision.cost.overlap_blocks;
        let mut record =
            BookingRecord::new(serial, worker, request, assessment, cached_blocks, self.now);
        record.engine_block_ratio = self.prefixes.engine_block_ratio(worker.index).get();
        (record, decision)
    }

    /// Adds a booking, dispatched or queued, to the pending work of its worker: see
    /// [`BookingRecord::join`]. Has no effect if the worker was removed.
    fn add_pending_work(&mut self, record: &mut BookingRecord) {
        let Some((worker, load)) = self.workers.get_mut(record.worker) else {
            return;
        };
        let capacity = self.prefixes.estimated_capacity(worker.id.index);
        let projected_blocks = load.projected_blocks();
        if let Some((pending_work, shared_model)) = self.workers.pending_work_mut(record.worker) {
            pending_work.capacity = capacity;
            record.forecast.waits_for_memory =
                capacity.is_some_and(|capacity| projected_blocks > u64::from(capacity));
            let step_seconds = record.join(pending_work, shared_model, self.now);
            let prefill_seconds = record.forecast.prefill_seconds;
            self.workers
                .add_arrival(record.worker, prefill_seconds, step_seconds, self.now);
        }
    }

    /// Records that the worker has computed the prompt, because its output is reported. Learns from
    /// the time of the first token if the response is streamed, and reports a success. Calls after
    /// the first have no effect. The request must be dispatched. Dispatches the worker's next
    /// request if this ends the prefill. Has no effect if the booking has ended.
    pub(crate) fn on_first_token(&mut self, id: BookingId, now: Duration) {
        let record = self.bookings.get_mut(id);
        let Some(record) = record.filter(|record| !record.prefill_confirmed) else {
            return;
        };
        record.prefill_confirmed = true;
        let (node, serial) = (record.node, record.serial);
        let (mut is_prefill_finished, mut is_first_of_step) = (false, false);
        if let Some((pending_work, shared_model)) = self.workers.pending_work_mut(record.worker) {
            if record.work.is_streaming {
                is_first_of_step = record.observe_first_token(pending_work, shared_model, now);
            }
            // Without streaming this is the end of the whole output, whose time says nothing about
            // prefill.
            is_prefill_finished = pending_work.finish_prefill(&mut record.work);
        }
        let worker = record.worker;
        self.report(id, ExchangeResult::Success);
        if self.workers.get(worker).is_some() {
            self.prefixes.mark_cached(node, worker.index);
            if is_prefill_finished {
                self.on_prefill_finished(worker, serial);
            }
            if is_first_of_step {
                self.on_engine_step_started(worker.index, now);
            }
        }
    }

    /// Counts the end of a booking's prefill. The worker has therefore started this booking and all
    /// that were sent to it before. Dispatches the worker's next request. Must be called once per
    /// booking. Has no effect if the worker was removed.
    pub(crate) fn on_prefill_finished(&mut self, worker: WorkerId, serial: u64) {
        if self.workers.get(worker).is_some() {
            self.prefixes.end_prefill(worker.index, serial);
            self.try_dispatch_next(worker.index);
        }
    }

    /// Records that the engine of the worker at `index` has just started a step. It includes all
    /// requests that are not in transit any more.
    fn on_engine_step_started(&mut self, index: WorkerIndex, now: Duration) {
        let in_transit = self.workers.pending_work[index as usize].oldest_in_transit(now);
        let last_started = in_transit.map_or(self.bookings.latest_serial(), |oldest| oldest - 1);
        self.prefixes.mark_started(index, last_started);
    }

    /// Counts `count` further output tokens. Learns from the time since the token before them if
    /// the response is streamed. [`on_first_token`](Self::on_first_token) must be called before.
    /// The first report of a response is no sample. Has no effect if the booking has ended.
    pub(crate) fn on_tokens(&mut self, id: BookingId, count: u32, now: Duration) {
        let Some(record) = self.bookings.get_mut(id) else {
            return;
        };
        let elapsed = now.saturating_sub(record.last_token_at);
        let total = record.output_tokens.saturating_add(count);
        let is_decode_sample = record.work.is_streaming && record.output_tokens > 0;
        let (worker, last_token_at) = (record.worker, record.last_token_at);
        record.last_token_at = now.max(record.last_token_at);
        self.set_reported_output(id, total);
        if is_decode_sample
            && let Some((pending_work, shared_model)) = self.workers.pending_work_mut(worker)
        {
            let beside_prefill = pending_work.sent_totals().requests > 0
                || pending_work.latency.first_token_at() > last_token_at;
            let decode_load = pending_work.decode_load();
            let has_queue = !pending_work.queue.is_empty();
            let latency = &mut pending_work.latency;
            if latency.observe_step(
                shared_model,
                count,
                elapsed,
                beside_prefill,
                decode_load,
                now,
            ) {
                self.on_engine_step_started(worker.index, now);
            }
            if has_queue {
                // The prefill backlog shrinks with time, so the worker may have slack by now.
                self.try_dispatch_next(worker.index);
            }
        }
    }

    /// Sets the number of output tokens to `total`, as reported by the worker.
    pub(crate) fn set_reported_output(&mut self, id: BookingId, total: u32) {
        if let Some(record) = self.bookings.get_mut(id) {
            record.output_count_reported = true;
            self.set_output_tokens(id, total);
        }
    }

    /// Sets the number of output tokens to `total`, reported or estimated, and updates the load,
    /// the pending work and the estimated cache of the worker. The request must be dispatched;
    /// `total` may be lower than before. The remaining output is forecast again only if the number
    /// of blocks changes. Has no effect if the booking has ended.
    pub(crate) fn set_output_tokens(&mut self, id: BookingId, total: u32) {
        let Some(record) = self.bookings.get_mut(id) else {
            return;
        };
        let (before, context_before) = (record.occupancy(), record.context_tokens());
        let reservation_before = record.output_reservation();
        let count = total.saturating_sub(record.output_tokens);
        record.output_tokens = total;
        let (after, context_tokens) = (record.occupancy(), record.context_tokens());
        let worker = record.worker;
        if let Some((pending_work, _)) = self.workers.pending_work_mut(worker) {
            let (running_requests, _) = pending_work.decode_load();
            pending_work
                .output_reserve
                .on_decode_tokens(count, running_requests);
            pending_work
                .output_reserve
                .replace(reservation_before, record.output_reservation());
        }
        if after.blocks != before.blocks {
            // Within one block the forecast changes too little to be computed anew.
            let remaining_tokens = self.output_length.remaining_with_hint(
                record.output.length_class,
                total,
                record.output.max_tokens,
                record.output.client_expected_tokens,
            );
            if let Some((pending_work, _)) = self.workers.pending_work_mut(worker) {
                pending_work.update_decode(&mut record.work, remaining_tokens, context_tokens);
            }
        }
        if let Some((worker, load)) = self.workers.get_mut(worker) {
            load.context_tokens.replace(context_before, context_tokens);
            let index = worker.id.index;
            self.prefixes.grow(index, before, after);
            load.active_blocks = self.prefixes.active_blocks(index);
        }
    }

    /// Learns the length of an output that ended normally and, if the response was not streamed,
    /// the time of its decode steps. Learns nothing if the number of tokens was only estimated. An
    /// output of `max_tokens` tokens counts as truncated. Does not release the booking.
    pub(crate) fn learn_from_completion(&mut self, id: BookingId, now: Duration) {
        let Some(record) = self
            .bookings
            .get_mut(id)
            .filter(|record| record.output_count_reported)
        else {
            return;
        };
        let ExpectedOutput {
            length_class,
            expected_tokens,
            max_tokens,
            ..
        } = record.output;
        let output_tokens = record.output_tokens;
        let is_truncated = max_tokens.is_some_and(|max_tokens| output_tokens >= max_tokens);
        self.output_length
            .record_accuracy(expected_tokens, output_tokens);
        self.output_length
            .observe(length_class, output_tokens, is_truncated);
        if !record.work.is_streaming
            && let Some((pending_work, shared_model)) = self.workers.pending_work_mut(record.worker)
        {
            record.observe_whole_output(pending_work, shared_model, now);
        }
    }

    /// Compares the `tokens` tokens of the prompt that the worker found in its cache with the
    /// expected hit, and corrects the estimated cache. Has no effect if the cache source is events.
    /// Only the first call for a dispatched booking has an effect; `tokens` is rounded down to
    /// whole blocks. Returns whether the worker has lost blocks, which the caller evicts:
    /// see [`evict_lost_blocks`](crate::critical_section::SharedState::evict_lost_blocks).
    pub(crate) fn observe_cached_tokens(
        &mut self,
        id: BookingId,
        prompt: &Sequence,
        tokens: u32,
    ) -> bool {
        let Some(record) = self.bookings.get_mut(id) else {
            return false;
        };
        let (worker, block_size) = (record.worker, record.block_size);
        let Some(expected_hit) = record.expected_hit.take() else {
            return false;
        };
        self.workers.get(worker).is_some()
            && self
                .prefixes
                .observe_hit(worker.index, prompt, &expected_hit, tokens / block_size)
    }

    /// Releases a booking and dispatches the worker's next request. The blocks that the request
    /// computed stay in the estimated cache. `output_sequence`, the prompt followed by output,
    /// makes the blocks of the output findable too; it is ignored unless the prefill was confirmed.
    /// Has no effect if the booking has ended already.
    pub(crate) fn release(&mut self, id: BookingId, output_sequence: Option<&Sequence>) {
        let Some(record) = self.bookings.remove(id) else {
            return;
        };
        let index = record.worker.index;
        self.undo(record, output_sequence);
        self.try_dispatch_next(index);
    }

    /// Subtracts a removed booking from all numbers of its worker, and unpins its blocks. See
    /// [`release`](Self::release) for `output_sequence`. The caller has taken `record` out of
    /// [`State::bookings`].
    pub(crate) fn undo(&mut self, record: BookingRecord, output_sequence: Option<&Sequence>) {
        if let Some((pending_work, _)) = self.workers.pending_work_mut(record.worker) {
            pending_work.remove(&record.work);
        }
        if let Some(queued) = &record.queued {
            return self.dequeue(&record, queued);
        }
        if let Some((pending_work, _)) = self.workers.pending_work_mut(record.worker) {
            let reservation = record.output_reservation();
            pending_work
                .output_reserve
                .replace(reservation, OutputReservation::default());
        }
        let Some((worker, load)) = self.workers.get_mut(record.worker) else {
            return self.unpin_from_removed_worker(&record);
        };
        let index = worker.id.index;
        let is_output_known =
            record.prefill_confirmed && self.prefixes.can_cache_output(record.node, index);
        let output_chain = output_sequence
            .filter(|_| is_output_known)
            .map(|sequence| sequence.hash_chain_aligned_to(record.engine_block_ratio));
        self.prefixes.unpin(
            index,
            &UnpinRequest {
                node: record.node,
                hashed_blocks: record.hashed_blocks,
                occupancy: record.occupancy(),
                is_in_prefill: record.work.is_in_prefill(),
                output_blocks: match record.prefill_confirmed {
                    true => record.output_blocks(),
                    false => 0,
                },
                output_chain: output_chain.as_ref(),
                latest_serial: self.bookings.latest_serial(),
            },
        );
        load.requests.subtract(1);
        load.context_tokens.subtract(record.context_tokens());
        load.active_blocks = self.prefixes.active_blocks(index);
    }

    /// Removes a queued booking from the queue of its worker, from the worker's load and from the
    /// active tree. Has no effect if the worker was removed.
    fn dequeue(&mut self, record: &BookingRecord, queued: &QueuedState) {
        if self.workers.get(record.worker).is_none() {
            return self.unpin_from_removed_worker(record);
        }
        let mut queued_blocks = 0;
        if let Some(removed) = self.workers.dequeue(record.worker, queued.key) {
            let waiting = usize::from(!removed.was_displaced);
            self.dispatcher.queued_total.subtract(waiting);
            queued_blocks = removed.blocks;
        }
        if let Some((worker, load)) = self.workers.get_mut(record.worker) {
            load.requests.subtract(1);
            load.context_tokens.subtract(record.context_tokens());
            load.queued_blocks.subtract(queued_blocks);
            self.prefixes.unpin_queued(record.node, worker.id.index);
        }
    }
}
