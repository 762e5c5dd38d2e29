//! Dispatch: requests are sent to their workers, queued, or moved to another worker.
//!
//! The [dispatcher](crate::dispatcher) says which request is sent next. Its task is then woken and
//! polls, which books it as sent.
//!
//! A request that is offered a new choice chooses with the loads and caches of that time. It moves
//! only if that halves its cost. A late choice knows more than an early one, but a forecast that is
//! wrong moves the request in vain.
//!
//! Queued requests count in every routing decision, as running ones do. They do not count in a
//! worker's active blocks and cause no evictions there, because the worker does not know of them
//! yet.

use std::task::{Context, Poll};
use std::time::Duration;

use foresee_prefix::WorkerIndex;
use foresee_prefix::counter::Counter;

use crate::assessment::RequestAssessment;
use crate::booking_id::BookingId;
use crate::dispatcher::{NewRequest, NextStep};
use crate::policy::Decision;
use crate::queue::QueueTicket;
use crate::request::{PreparedRequest, SelectError};
use crate::sglang_admission::OutputReservation;
use crate::state::State;
use crate::worker_id::WorkerId;
use crate::workers::{Worker, WorkerState};

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
    /// [`SelectError::QueueFull`] if it would have to be queued, the queue limit is reached, and no
    /// queued request has a weaker claim to its place.
    pub(crate) fn book_on_arrival(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> Result<(BookingId, Decision), SelectError> {
        let can_dispatch = self.can_dispatch_now(worker, assessment, request);
        if !can_dispatch {
            self.make_room(&assessment.ticket)?;
        }
        let (id, decision) = match can_dispatch {
            true => self.book_dispatched(worker, assessment, request),
            false => self.enqueue(worker, assessment, request, self.now),
        };
        self.try_dispatch_next(worker.index);
        self.record_arrival(&assessment.ticket, std::iter::once(id));
        Ok((id, decision))
    }

    /// Makes room in the queue for a request that arrives with this ticket. If the queue is full, the
    /// queued request with the weakest [claim](QueueTicket::claim) loses its place: its task is woken,
    /// and fails with the same error when it polls.
    ///
    /// # Errors
    /// [`SelectError::QueueFull`] if the queue is full and no claim is weaker than the new one.
    fn make_room(&mut self, ticket: &QueueTicket) -> Result<(), SelectError> {
        let Err(full) = self.dispatcher.check_limit() else {
            return Ok(());
        };
        let queues = self.workers.pending_work.iter().map(|work| &work.queue);
        let lasts = queues.enumerate().filter_map(|(index, queue)| {
            let (key, id) = queue.last()?;
            Some((self.bookings.get(id)?.ticket.claim(), index, key, id))
        });
        let weakest = lasts.max_by_key(|(claim, ..)| *claim);
        let weaker = weakest.filter(|(claim, ..)| *claim > ticket.claim());
        let (_, index, key, id) = weaker.ok_or(full)?;
        self.workers.pending_work[index].queue.displace(key);
        self.dispatcher.queued_total.subtract(1);
        if let Some(record) = self.bookings.get(id) {
            let service_time = record.service_time(&self.workers, self.now);
            self.dispatcher.on_displaced(&record.ticket, service_time);
        }
        let waker = self.bookings.queued_mut(id);
        let waker = waker.and_then(|queued| queued.waker.take());
        self.dispatcher.pending_wakers.extend(waker);
        Ok(())
    }

    /// Returns the error of a queued request that has lost its place; `None` for any other.
    pub(crate) fn displacement(&self, id: BookingId) -> Option<SelectError> {
        let record = self.bookings.get(id)?;
        let key = record.queued.as_ref()?.key;
        let queue = &self.workers.pending_work(record.worker)?.queue;
        let is_displaced = queue.is_displaced(key);
        is_displaced.then(|| self.dispatcher.full())
    }

    /// Books a request on `worker` as sent to it now, and counts the dispatch.
    fn book_dispatched(
        &mut self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> (BookingId, Decision) {
        self.dispatcher.on_dispatch(&assessment.ticket);
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
        self.dispatcher.on_dispatch(&ticket);
        self.record_arrival(&ticket, bookings);
    }

    /// Counts an arrival, with the service time of all its bookings if the dispatcher needs it.
    fn record_arrival(&mut self, ticket: &QueueTicket, bookings: impl Iterator<Item = BookingId>) {
        let service_time = match self.dispatcher.needs_service_time() {
            true => bookings
                .filter_map(|id| {
                    let record = self.bookings.get(id)?;
                    Some(record.service_time(&self.workers, self.now))
                })
                .sum(),
            false => Duration::ZERO,
        };
        self.dispatcher.on_arrival(ticket, service_time);
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

    /// Returns whether a new request can be sent to the worker at once. Trials always are.
    fn can_dispatch_now(
        &self,
        worker: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> bool {
        let index = worker.index;
        let (prompt, prefix_match) = (request.prompt, assessment.prefix_matches[index as usize]);
        let reusable_blocks = prompt.max_reusable_blocks();
        let new_request = NewRequest {
            new_blocks: prompt.blocks().saturating_sub(prefix_match.active_blocks),
            reservation: OutputReservation::new(request.max_tokens, request.ignore_eos, 0),
            has_whole_prefix: reusable_blocks > 0 && prefix_match.overlap() >= reusable_blocks,
        };
        assessment.is_trial
            || self
                .dispatcher
                .can_send_now(self.fleet(), index, new_request)
    }

    /// Sends the next queued request of the worker at `index`, if the worker can take one. If its
    /// queue is empty, offers it to a request that is queued for another worker.
    ///
    /// Must be called after every change that may free prefill slack or memory. The task of the
    /// request is woken when the lock is released.
    pub(crate) fn try_dispatch_next(&mut self, index: WorkerIndex) {
        match self.dispatcher.next_step(self.fleet(), index) {
            None => {}
            Some(NextStep::Send(key, id)) => {
                if let Some(queued) = self.bookings.queued_mut(id) {
                    let waker = queued.waker.take();
                    self.dispatcher.pending_wakers.extend(waker);
                    self.workers.pending_work[index as usize].queue.dispatching = Some(key);
                }
            }
            Some(NextStep::OfferRebalance(id)) => {
                let queued = self.bookings.queued_mut(id);
                if queued.is_some_and(|queued| queued.rebalance_not_before <= self.now) {
                    self.offer_rebalance(id);
                }
            }
        }
    }

    /// Lets a queued request choose a worker again when it is polled next, and wakes its task.
    pub(crate) fn offer_rebalance(&mut self, id: BookingId) {
        if let Some(queued) = self.bookings.queued_mut(id) {
            queued.rebalance_offered = true;
            let waker = queued.waker.take();
            self.dispatcher.pending_wakers.extend(waker);
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
        self.bookings.queued_mut(id)?;
        let (worker, ticket) = self.remove_booking(id)?;
        let assessment = self.assess_ignoring_queue(request, ticket);
        self.dispatcher.on_dispatch(&ticket);
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
        let arrival = (record.booked_at, record.forecast.prefill_seconds);
        self.workers.undo_arrival(worker, arrival, now);
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
