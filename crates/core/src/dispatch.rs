//! Dispatch: when a queued request is sent, and when it moves to another worker.
//!
//! A worker has prefill slack when its prefill backlog is empty or shorter than
//! [`DISPATCH_AHEAD_SECONDS`]. The first queued request that fits its free KV blocks is then woken.
//! Its task polls, which books it as sent. Memory is checked here because engines handle its lack
//! badly. vLLM starts a prompt that fits only in part, blocks all others behind it, and preempts
//! running requests when outputs grow. SGLang delays prompts until their
//! [whole reservation](crate::sglang_admission) fits.
//!
//! If the worker's own queue is empty, the first request of the longest queue of the same model is
//! offered a new choice, with the loads and caches of that time. It moves only if that halves its
//! cost. A late choice knows more than an early one, but a forecast that is wrong moves the request
//! in vain.
//!
//! Queued requests count in every routing decision, as running ones do. They do not count in a
//! worker's active blocks and cause no evictions there, because the worker does not know of them
//! yet.

use std::task::{Context, Poll};
use std::time::Duration;

use foresee_prefix::{EvictionRule, WorkerIndex};

use crate::assessment::RequestAssessment;
use crate::booking_id::BookingId;
use crate::policy::Decision;
use crate::queue::{QueueOrder, QueueTicket};
use crate::request::{PreparedRequest, SelectError};
use crate::sglang_admission::OutputReservation;
use crate::state::State;
use crate::time::duration_from_secs_saturating;
use crate::worker_id::WorkerId;
use crate::workers::{Worker, WorkerState};

/// Largest prefill backlog, in seconds, with which a worker has prefill slack. It must exceed the
/// time that a request takes to reach the worker, so that the worker does not run idle.
const DISPATCH_AHEAD_SECONDS: f64 = 0.1;

/// Largest cost of a queued request on another worker, relative to its cost on the present one, for
/// which the request moves.
const MAX_MIGRATION_COST_RATIO: f64 = 0.5;

/// Minimum time between two offers of a new choice to the same request.
const REBALANCE_INTERVAL: Duration = Duration::from_millis(25);

/// A queued request after a new choice.
pub(crate) struct Rebalanced {
    pub(crate) id: BookingId,
    pub(crate) worker: WorkerId,
    pub(crate) decision: Decision,
    /// Why no worker can be chosen, if the present one accepts no requests either. The request is
    /// then queued for the present worker.
    pub(crate) stranded: Option<SelectError>,
}

impl State {
    /// Books a request that has just arrived on `worker`: dispatched if the worker can take it now,
    /// and queued otherwise.
    ///
    /// # Errors
    /// [`SelectError::QueueFull`] if it would have to be queued and the queue limit is reached.
    pub(crate) fn book_on_arrival(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> Result<(BookingId, Decision), SelectError> {
        let can_dispatch = self.can_dispatch_now(worker, assessment, request);
        if let Some(limit) = self.config.queue_limit
            && !can_dispatch
            && self.queue.queued_total >= limit
        {
            return Err(SelectError::QueueFull { limit });
        }
        let (id, decision) = match can_dispatch {
            true => self.book_dispatched(worker, assessment, request),
            false => self.enqueue(worker, assessment, request, self.now),
        };
        self.try_dispatch_next(worker.index);
        self.record_arrival(&assessment.ticket, std::iter::once(id));
        Ok((id, decision))
    }

    /// Books a request on `worker` as sent to it now, and counts the dispatch.
    fn book_dispatched(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> (BookingId, Decision) {
        self.queue.on_dispatch(&assessment.ticket);
        self.book(worker, assessment, request)
    }

    /// Records the arrival of a batch that was dispatched at once. `first` is the request with its
    /// first prompt, `bookings` are those of all prompts. Must be called after
    /// [`book_batch`](Self::book_batch), under the same lock.
    pub(crate) fn record_batch_arrival(
        &mut self,
        first: &PreparedRequest<'_>,
        bookings: impl Iterator<Item = BookingId>,
    ) {
        let ticket = self.ticket(first);
        self.queue.on_dispatch(&ticket);
        self.record_arrival(&ticket, bookings);
    }

    /// Records an arrival with the service time of all its bookings. The service time is zero
    /// unless the queue order is [`QueueOrder::FairByTenant`].
    fn record_arrival(&mut self, ticket: &QueueTicket, bookings: impl Iterator<Item = BookingId>) {
        let service_time = match self.config.queue_order {
            Some(QueueOrder::FairByTenant) => {
                bookings.map(|id| self.predicted_service_time(id)).sum()
            }
            _ => Duration::ZERO,
        };
        self.queue.on_arrival(ticket, service_time);
    }

    /// Returns the predicted time that a request takes of its worker: its prefill, and what it adds
    /// to each decode step. Zero if the booking does not exist.
    fn predicted_service_time(&mut self, id: BookingId) -> Duration {
        let Some(record) = self.bookings.get(id) else {
            return Duration::ZERO;
        };
        let output_tokens = f64::from(record.output.expected_tokens);
        let mean_context = f64::from(record.prompt_tokens) + output_tokens / 2.0;
        let now = self.now;
        let seconds_per_step =
            self.workers
                .pending_work_mut(record.worker)
                .map(|(pending_work, shared_model)| {
                    let model = pending_work.latency.latency_model(shared_model, now);
                    model.decode_per_request + model.decode_per_context_token * mean_context
                });
        duration_from_secs_saturating(
            record.forecast.prefill_seconds + output_tokens * seconds_per_step.unwrap_or_default(),
        )
    }

    /// Books a request on `worker`: dispatched if the worker can take it now, and queued otherwise.
    /// Until `rebalance_not_before`, slack of other workers does not lead to a new choice for it.
    /// Afterwards dispatches the worker's next request if it can take one. Does not record an
    /// arrival: see [`book_on_arrival`](Self::book_on_arrival).
    pub(crate) fn book_or_enqueue(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
        rebalance_not_before: Duration,
    ) -> (BookingId, Decision) {
        let booked = if self.can_dispatch_now(worker, assessment, request) {
            self.book_dispatched(worker, assessment, request)
        } else {
            self.enqueue(worker, assessment, request, rebalance_not_before)
        };
        self.try_dispatch_next(worker.index);
        booked
    }

    /// Returns whether a new request can be sent to the worker at once: no other request is queued
    /// for it, it has prefill slack, and the request fits its memory. Always true if the router has
    /// no queue or the request is a trial, and otherwise false if the worker was removed.
    fn can_dispatch_now(
        &self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> bool {
        if self.config.queue_order.is_none() || assessment.is_trial {
            return true;
        }
        let Some(pending_work) = self.workers.pending_work.get(worker.index as usize) else {
            return true;
        };
        let reservation = OutputReservation::new(request.max_tokens, request.ignore_eos, 0);
        let active_match = assessment.prefix_matches[worker.index as usize].active_blocks;
        let new_blocks = request.prompt.blocks().saturating_sub(active_match);
        pending_work.queue.is_empty()
            && self.has_prefill_slack(worker.index)
            && self.fits_memory(worker.index, new_blocks.into(), reservation)
    }

    /// Dispatches the next queued request of the worker at `index`, if the worker can take one. If
    /// its queue is empty, offers it to a request that is queued for another worker.
    ///
    /// Must be called after every change that may free prefill slack or memory. The task of the
    /// request is woken when the lock is released. Has no effect while an earlier request of this
    /// queue was woken and has not polled.
    pub(crate) fn try_dispatch_next(&mut self, index: WorkerIndex) {
        if self.queue.queued_total == 0 || !self.has_prefill_slack(index) {
            return;
        }
        let queue = &self.workers.pending_work[index as usize].queue;
        if queue.is_empty() {
            if self.workers.restriction(index, self.now).is_none() {
                self.rebalance_from_longest_queue(index);
            }
            return;
        }
        if queue.dispatching.is_some() {
            return;
        }
        let next = queue.next_dispatchable(self.now, |new_blocks, reservation| {
            self.fits_memory(index, new_blocks, reservation)
        });
        // A request that does not fit is sent once its backfill window has passed, except to an
        // engine that reserves memory: there it would only wait.
        let may_exceed_memory = !self.engine_reserves_output_memory(index);
        let Some((key, id, _)) = next.filter(|(.., fits)| *fits || may_exceed_memory) else {
            return;
        };
        if let Some(queued) = self
            .bookings
            .get_mut(id)
            .and_then(|record| record.queued.as_mut())
        {
            let waker = queued.waker.take();
            self.queue.pending_wakers.extend(waker);
            self.workers.pending_work[index as usize].queue.dispatching = Some(key);
        }
    }

    /// Returns whether the worker at `index` exists, is not unhealthy, has no backpressure, and has a
    /// prefill backlog shorter than [`DISPATCH_AHEAD_SECONDS`].
    fn has_prefill_slack(&self, index: WorkerIndex) -> bool {
        let Some(worker) = self.workers.by_index(index) else {
            return false;
        };
        if worker.state() == WorkerState::Unhealthy
            || self.workers.has_backpressure(index, self.now)
        {
            return false;
        }
        let pending_work = &self.workers.pending_work[index as usize];
        let latency_model = pending_work
            .latency
            .latency_model(self.workers.latency_model(pending_work), self.now);
        pending_work.sent_totals().requests == 0
            || pending_work.sent_prefill_seconds(&latency_model, self.now) < DISPATCH_AHEAD_SECONDS
    }

    /// Returns whether the engine of the worker at `index` reserves memory for outputs, and makes
    /// prompts wait until their reservation fits. SGLang does.
    fn engine_reserves_output_memory(&self, index: WorkerIndex) -> bool {
        self.prefixes.eviction(index) == EvictionRule::SglangRadix
    }

    /// Returns whether the memory of the worker at `index` suffices to start a request at once that
    /// adds `new_blocks` active blocks and may generate the output of `reservation`.
    ///
    /// True if the capacity is not configured or reported, or if no block is active there; false if
    /// the worker does not exist. For an engine that reserves no memory for outputs, this is
    /// checked only if the queue order is `shortest`.
    fn fits_memory(
        &self,
        index: WorkerIndex,
        new_blocks: u64,
        reservation: OutputReservation,
    ) -> bool {
        if self.workers.by_index(index).is_none() {
            return false;
        }
        let load = &self.workers.loads[index as usize];
        // A learned or assumed capacity that is too small would delay requests that do fit.
        let Some(capacity) = self.prefixes.reported_capacity(index) else {
            return true;
        };
        // A request that is alone on the worker gets no more memory by waiting.
        if load.active_blocks == 0 {
            return true;
        }
        let capacity = u64::from(capacity);
        if !self.engine_reserves_output_memory(index) {
            return self.config.queue_order != Some(QueueOrder::ShortestPrefillFirst)
                || load.active_blocks + new_blocks <= capacity;
        }
        let block_size = u64::from(self.config.block_size.get());
        let engine_block = u64::from(self.prefixes.engine_block_ratio(index).get());
        let output_tokens = self.workers.pending_work[index as usize]
            .output_reserve
            .tokens()
            + reservation.tokens();
        let needed_tokens =
            (load.active_blocks + new_blocks + engine_block) * block_size + output_tokens;
        needed_tokens < capacity * block_size
    }

    /// Offers a new choice to the first request of the longest queue, because the worker at `index`
    /// has prefill slack and an empty queue. Considers only queues of workers with the same latency
    /// model: requests of other models could not move to it. Has no effect if no request is queued
    /// there, or before the `rebalance_not_before` of that request. The caller checks the slack.
    fn rebalance_from_longest_queue(&mut self, index: WorkerIndex) {
        let Some(id) = self.workers.first_of_longest_queue(index) else {
            return;
        };
        let now = self.now;
        let queued = self
            .bookings
            .get_mut(id)
            .and_then(|record| record.queued.as_ref());
        if queued.is_some_and(|queued| queued.rebalance_not_before <= now) {
            self.offer_rebalance(id);
        }
    }

    /// Lets a queued request choose a worker again when it is polled next, and wakes its task.
    pub(crate) fn offer_rebalance(&mut self, id: BookingId) {
        if let Some(queued) = self
            .bookings
            .get_mut(id)
            .and_then(|record| record.queued.as_mut())
        {
            queued.rebalance_offered = true;
            let waker = queued.waker.take();
            self.queue.pending_wakers.extend(waker);
        }
    }

    /// Returns `Ready` if the request is dispatched, its booking has ended, or its worker was
    /// removed, which the caller notices. Otherwise the task of `context`, which replaces the one
    /// of the previous poll, is woken when it must poll again.
    pub(crate) fn poll_dispatch(&mut self, id: BookingId, context: &mut Context<'_>) -> Poll<()> {
        let Some(record) = self.bookings.get_mut(id) else {
            return Poll::Ready(());
        };
        let worker = record.worker;
        let Some(queued) = &mut record.queued else {
            return Poll::Ready(());
        };
        queued.waker = Some(context.waker().clone());
        match self.workers.get(worker) {
            Some(_) => Poll::Pending,
            None => Poll::Ready(()),
        }
    }

    /// Returns whether the request is queued.
    pub(crate) fn is_queued(&self, id: BookingId) -> bool {
        self.bookings
            .get(id)
            .is_some_and(|record| record.queued.is_some())
    }

    /// Returns whether the request is queued and may choose a worker again, and withdraws the
    /// offer.
    pub(crate) fn take_rebalance_offer(&mut self, id: BookingId) -> bool {
        let queued = self
            .bookings
            .get_mut(id)
            .and_then(|record| record.queued.as_mut());
        queued.is_some_and(|queued| std::mem::take(&mut queued.rebalance_offered))
    }

    /// Returns whether the request is queued and its worker is ready to take it now.
    pub(crate) fn is_dispatching(&self, id: BookingId) -> bool {
        let Some(record) = self.bookings.get(id) else {
            return false;
        };
        let key = record.queued.as_ref().map(|queued| queued.key);
        let pending_work = self.workers.pending_work(record.worker);
        key.is_some() && pending_work.is_some_and(|work| work.queue.dispatching == key)
    }

    /// Books a queued request again: on the worker that the policy chooses now, if that is worth a
    /// move, and otherwise on its present worker. The request keeps its queue ticket. Returns
    /// `None` if the booking does not exist. The request must be queued, and `id` is invalid
    /// afterwards. The new booking may be dispatched at once.
    pub(crate) fn rebalance(
        &mut self,
        id: BookingId,
        request: &PreparedRequest<'_>,
    ) -> Option<Rebalanced> {
        // Does not dispatch the next request of the queue: this one may return to it.
        let (current, ticket) = self.remove_booking(id)?;
        let assessment = self.assess_with_ticket(request, ticket);
        let selected = self.select_worker(request, &assessment);
        let chosen = match selected {
            Ok(chosen) if self.is_worth_moving(current, chosen, &assessment, request) => chosen,
            _ => current,
        };
        let is_accepting = self.workers.get(current).is_some_and(Worker::is_accepting);
        let stranded = selected.err().filter(|_| !is_accepting);
        let rebalance_not_before = self.now.saturating_add(REBALANCE_INTERVAL);
        let (id, decision) =
            self.book_or_enqueue(chosen, &assessment, request, rebalance_not_before);
        if chosen != current {
            self.try_dispatch_next(current.index);
        }
        Some(Rebalanced {
            id,
            worker: chosen,
            decision,
            stranded,
        })
    }

    /// Books a queued request as sent to its worker, with the prefix match of this time. Returns
    /// `None` if the request is not queued. Does not check whether the worker has slack or memory,
    /// and ignores the excluded workers. `id` is invalid afterwards.
    pub(crate) fn dispatch(
        &mut self,
        id: BookingId,
        request: &PreparedRequest<'_>,
    ) -> Option<(BookingId, WorkerId, Decision)> {
        self.bookings
            .get_mut(id)
            .filter(|record| record.queued.is_some())?;
        let (worker, ticket) = self.remove_booking(id)?;
        let assessment = self.assess_ignoring_queue(request, ticket);
        self.queue.on_dispatch(&ticket);
        let (id, decision) = self.book(worker, &assessment, request);
        self.try_dispatch_next(worker.index);
        Some((id, worker, decision))
    }

    /// Removes a booking that is about to be made elsewhere, as if it had never been made, and
    /// dispatches the next request of its worker. Returns the worker and the queue ticket, or
    /// `None` if the booking has ended.
    pub(crate) fn release_for_rebooking(
        &mut self,
        id: BookingId,
    ) -> Option<(WorkerId, QueueTicket)> {
        let (worker, ticket) = self.remove_booking(id)?;
        self.try_dispatch_next(worker.index);
        Some((worker, ticket))
    }

    /// Removes a booking as if it had never been made: it no longer counts in the arrival rate of
    /// its worker either. Returns the worker and the queue ticket, or `None` if the booking has
    /// ended. Dispatches no other request.
    fn remove_booking(&mut self, id: BookingId) -> Option<(WorkerId, QueueTicket)> {
        let record = self.bookings.remove(id)?;
        let (worker, ticket, now) = (record.worker, record.ticket, self.now);
        if let Some((pending_work, _)) = self.workers.pending_work_mut(worker) {
            let arrival = (record.booked_at, record.forecast.prefill_seconds);
            pending_work.arrival_rate.undo(arrival, now);
        }
        self.undo(record, None);
        Some((worker, ticket))
    }

    /// Returns whether a queued request should move from `current` to `chosen`: if `current` is not
    /// healthy or has backpressure, or if the move reduces the marginal delay to [`MAX_MIGRATION_COST_RATIO`]
    /// of what it is. The request must not be booked at the time, or its own booking would count in
    /// the cost of `current`.
    fn is_worth_moving(
        &self,
        current: WorkerId,
        chosen: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> bool {
        let state = self.workers.get(current).map(Worker::state);
        if state != Some(WorkerState::Healthy)
            || self.workers.has_backpressure(current.index, self.now)
        {
            return true;
        }
        let profile = self.request_profile(request, assessment);
        let cost = |worker: WorkerId| {
            let prefix_match = assessment.prefix_matches[worker.index as usize];
            let delay = self
                .view(worker.index, prefix_match)
                .marginal_delay(&profile);
            delay.total(profile.ttft_weight)
        };
        cost(chosen) <= MAX_MIGRATION_COST_RATIO * cost(current)
    }
}
