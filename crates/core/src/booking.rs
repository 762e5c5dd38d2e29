//! Bookings: what one routed request occupies on one worker, from the choice of the worker until the
//! request ends.
//!
//! Only a [`Booking`] changes the load of a worker, and dropping it is the only way to release what
//! it occupies. No path (abort, retry, error, panic) can therefore forget the release.

use std::task::{Context, Poll};
use std::time::Duration;

use foresee_prefix::sequence::Sequence;

use crate::booking_id::BookingId;
use crate::critical_section::SharedState;
use crate::policy::Decision;
use crate::request::{PreparedRequest, Request, RouteError, SelectError};
use crate::state::State;
use crate::worker_id::WorkerId;

/// Everything that one routed request occupies on one worker. Dropping it releases all of that.
///
/// The booking keeps the request, so that it can be booked again on another worker.
#[derive(Debug)]
#[must_use = "dropping a booking releases it"]
pub struct Booking {
    /// State of the router that made the booking.
    state: SharedState,
    /// Key of the booking record.
    id: BookingId,
    worker: WorkerId,
    decision: Decision,
    model: Box<str>,
    model_hash: u64,
    prompt: Sequence,
    max_tokens: Option<u32>,
    ignore_eos: bool,
    expected_output_tokens: Option<u32>,
    has_tools: bool,
    is_streaming: bool,
    priority: i32,
    tenant: u64,
    only_worker: Option<WorkerId>,
    /// Prompt followed by output, once the caller has reported the content of the output.
    output_sequence: Option<Sequence>,
}

impl Booking {
    /// Returns the handle of the booking with this id.
    pub(crate) fn new(
        state: SharedState,
        id: BookingId,
        worker: WorkerId,
        decision: Decision,
        request: &PreparedRequest<'_>,
    ) -> Self {
        Self {
            state,
            id,
            worker,
            decision,
            model: request.model.into(),
            model_hash: request.model_hash(),
            prompt: request.prompt.clone(),
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            expected_output_tokens: request.expected_output_tokens,
            has_tools: request.has_tools,
            is_streaming: request.is_streaming,
            priority: request.priority,
            tenant: request.tenant,
            only_worker: request.only_worker,
            output_sequence: None,
        }
    }

    /// Returns the state of the router that made the booking.
    pub(crate) fn shared(&self) -> &SharedState {
        &self.state
    }

    /// Returns the key of the booking record.
    pub(crate) fn id(&self) -> BookingId {
        self.id
    }

    /// Returns the request that was booked, with these excluded workers.
    pub(crate) fn request<'a>(&'a self, excluded: &'a [WorkerId]) -> PreparedRequest<'a> {
        let request = Request {
            model: &self.model,
            prompt: &self.prompt,
            max_tokens: self.max_tokens,
            ignore_eos: self.ignore_eos,
            expected_output_tokens: self.expected_output_tokens,
            has_tools: self.has_tools,
            is_streaming: self.is_streaming,
            priority: self.priority,
            tenant: self.tenant,
            excluded_workers: excluded,
            only_worker: self.only_worker,
            // A request that is booked again has lost its reason to prefer a worker.
            preferred_worker: None,
        };
        PreparedRequest::with_model_hash(request, self.model_hash)
    }

    /// Points the handle at a new booking of the same request, after the old one was released.
    pub(crate) fn rebind(&mut self, id: BookingId, worker: WorkerId, decision: Decision) {
        // The new worker has stored none of the output that the previous one generated.
        self.output_sequence = None;
        (self.id, self.worker, self.decision) = (id, worker, decision);
    }

    /// Returns the worker on which the request is booked.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// Returns the cost and the prefix match for which that worker was chosen.
    #[must_use]
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// Returns the predicted time from the booking to the first byte of the response: to the first
    /// token of a stream, or to the end of an output that has a limit of tokens and reaches it.
    /// `None` for a response that is not streamed and has no limit: its length is not known well
    /// enough. Also `None` if the booking has ended.
    #[must_use]
    pub fn predicted_first_byte(&self) -> Option<Duration> {
        let state = self.state.lock();
        let record = state.bookings.get(self.id)?;
        record.predicted_first_byte(&state.workers, state.now)
    }

    /// Returns the time to first token that was predicted when the request was last booked: queued
    /// or, later, sent to its present worker. The prediction is not updated while the request runs.
    /// Zero if the worker was removed.
    #[must_use]
    pub fn predicted_ttft(&self) -> Duration {
        let state = self.state.lock();
        state
            .bookings
            .get(self.id)
            .map_or(Duration::ZERO, |record| {
                record
                    .forecast
                    .first_token_at
                    .saturating_sub(record.booked_at)
            })
    }

    /// Returns the prompt of the request.
    #[must_use]
    pub fn prompt(&self) -> &Sequence {
        &self.prompt
    }

    /// Returns `Ready` once the request is to be sent to [`worker`](Self::worker). Always `Ready`
    /// if the router has no [queue](crate::queue).
    ///
    /// The worker may have changed by then: a queued request moves if another worker becomes much
    /// cheaper, but never to a worker in `excluded`. `Ready` also means that the worker was removed
    /// and no other one can be chosen. While the result is `Pending`, the task of `context` is
    /// woken when it must poll again. Only the latest `context` is kept. `excluded` replaces the
    /// excluded workers of the routed request.
    ///
    /// # Errors
    /// Fails once the worker accepts no more requests and no other one can be chosen. The request
    /// stays queued, but a caller that polls again is not woken before another worker can be
    /// chosen. Fails with [`RouteError::QueueFull`] once the request has lost its place in a full
    /// queue to one of a higher priority or, under fair queueing, of a tenant with less service; it
    /// is never dispatched then, and is to be dropped.
    pub fn poll_dispatch(
        &mut self,
        context: &mut Context<'_>,
        excluded: &[WorkerId],
        now: Duration,
    ) -> Poll<Result<(), RouteError>> {
        let shared = self.state.clone();
        let mut state = shared.lock();
        state.advance_to(now);
        if let Some(error) = state.displacement(self.id) {
            drop(state);
            return Poll::Ready(Err(error.for_model(self.request(excluded).model)));
        }
        if state.bookings.take_rebalance_offer(self.id)
            && let Some(moved) = state.rebalance(self.id, &self.request(excluded))
        {
            self.rebind(moved.id, moved.worker, moved.decision);
            if let Some(error) = moved.stranded {
                drop(state);
                return Poll::Ready(Err(error.for_model(self.request(excluded).model)));
            }
        }
        if state.is_dispatching(self.id) {
            self.dispatch(&mut state);
        }
        state.poll_dispatch(self.id, context).map(Ok)
    }

    /// Marks the request as sent, if it is queued.
    fn dispatch(&mut self, state: &mut State) {
        if let Some((id, worker, decision)) = state.dispatch(self.id, &self.request(&[])) {
            self.rebind(id, worker, decision);
        }
    }

    /// Applies an observation of the response. Any such observation proves that the request reached
    /// its engine. If it is still queued here, it is marked as sent first.
    fn with_dispatched(&mut self, now: Duration, observe: impl FnOnce(&mut State, BookingId)) {
        let mut state = self.state.lock();
        state.advance_to(now);
        if state.bookings.is_queued(self.id) {
            drop(state);
            let shared = self.state.clone();
            self.dispatch(&mut shared.lock());
            state = self.state.lock();
        }
        observe(&mut state, self.id);
    }

    /// Marks a queued request as sent now to the worker for which it is queued, whether or not the
    /// worker has room. Has no effect on a request that was sent already.
    pub fn mark_sent(&mut self, now: Duration) {
        self.with_dispatched(now, |_, _| {});
    }

    /// Records that the worker generated the first output token, so the prompt is computed. Calls
    /// after the first have no effect.
    pub fn on_first_token(&mut self, now: Duration) {
        self.with_dispatched(now, |state, id| state.on_first_token(id, now));
    }

    /// Records that the worker generated `count` output tokens since the last report, the first
    /// token included. A `count` of 0 has no effect.
    pub fn on_tokens(&mut self, count: u32, now: Duration) {
        if count == 0 {
            return;
        }
        self.with_dispatched(now, |state, id| {
            state.on_first_token(id, now);
            state.on_tokens(id, count, now);
        });
    }

    /// Sets the number of output tokens so far to `total`, as reported by the worker. Replaces what
    /// was counted. A `total` of 0 does not count as a first token.
    pub fn set_output_tokens(&mut self, total: u32, now: Duration) {
        self.with_dispatched(now, |state, id| {
            if total > 0 {
                state.on_first_token(id, now);
            }
            state.set_reported_output(id, total);
        });
    }

    /// Sets the content that the worker has stored: `sequence` is the prompt followed by output.
    ///
    /// Once the booking is released, a later prompt that continues `sequence` matches the output's
    /// blocks too. Has no effect if `sequence` does not start with the prompt or has another block
    /// size. A later call replaces the sequence, and a move of the booking discards it. The
    /// sequence is not used if the booking is dropped before a first token was reported.
    pub fn set_output_sequence(&mut self, sequence: Sequence) {
        let prompt = self.prompt.hashes();
        // An equal hash means an equal prefix.
        let starts_with_prompt =
            prompt.is_empty() || sequence.hashes().get(prompt.len() - 1) == prompt.last();
        if starts_with_prompt && sequence.block_size() == self.prompt.block_size() {
            self.output_sequence = Some(sequence);
        }
    }

    /// Records that the worker took `tokens` tokens of the prompt from its cache, as its response
    /// reports.
    ///
    /// The number is compared with the hit that was expected at the booking. The difference shows
    /// how large the cache is, or that the worker has lost it. Calls after the first have no
    /// effect. Has no effect while the request is queued, or if the worker's cache source is
    /// events.
    pub fn on_cached_tokens(&mut self, tokens: u32) {
        let has_lost_blocks =
            self.state
                .lock()
                .observe_cached_tokens(self.id, &self.prompt, tokens);
        if has_lost_blocks {
            self.state.evict_lost_blocks(self.worker);
        }
    }

    /// Releases everything on the present worker and books the same request on `worker`, in one
    /// step. Output tokens counted so far are discarded, because the new worker starts from the
    /// prompt. `worker` may be unhealthy, draining or excluded by the request. The request may be
    /// queued on it: see [`poll_dispatch`](Self::poll_dispatch).
    ///
    /// # Errors
    /// [`RouteError::NoWorker`] if `worker` does not exist. The booking then stays where it is.
    pub fn move_to(&mut self, worker: WorkerId, now: Duration) -> Result<(), RouteError> {
        self.rebook(now, &[], Some(worker))
    }

    /// Moves the booking, as [`move_to`](Self::move_to) does, to the worker that the policy chooses
    /// among all that are not in `excluded`.
    ///
    /// # Errors
    /// As [`Router::route`](crate::router::Router::route). The booking then stays where it is.
    pub fn reroute(&mut self, excluded: &[WorkerId], now: Duration) -> Result<(), RouteError> {
        self.rebook(now, excluded, None)
    }

    /// Books the request again on `worker`, or on the policy's choice if that is `None`. Keeps the
    /// queue ticket; the request may be queued again.
    ///
    /// # Errors
    /// If `worker` does not exist, or the policy finds none. The booking then stays where it is.
    fn rebook(
        &mut self,
        now: Duration,
        excluded: &[WorkerId],
        worker: Option<WorkerId>,
    ) -> Result<(), RouteError> {
        let request = self.request(excluded);
        let (id, worker, decision) = self
            .book_again(&request, now, worker)
            .map_err(|error| error.for_model(request.model))?;
        self.rebind(id, worker, decision);
        Ok(())
    }

    /// Releases the booking and books `request`, the same request, again. See
    /// [`rebook`](Self::rebook).
    fn book_again(
        &self,
        request: &PreparedRequest<'_>,
        now: Duration,
        worker: Option<WorkerId>,
    ) -> Result<(BookingId, WorkerId, Decision), SelectError> {
        let mut state = self.state.lock();
        state.advance_to(now);
        let ticket = state.bookings.get(self.id).map(|record| record.ticket);
        let ticket = ticket.unwrap_or_else(|| state.ticket(request));
        let assessment = state.assess_with_ticket(request, ticket);
        let chosen = match worker {
            Some(worker) if state.workers.get(worker).is_some() => worker,
            Some(_) => return Err(SelectError::NoWorker),
            None => state.select_worker(request, &assessment)?,
        };
        state.release_for_rebooking(self.id);
        // Assessed again: the blocks that the booking itself pinned no longer count as overlap.
        let assessment = state.assess_with_ticket(request, ticket);
        let (id, decision) = state.book_or_enqueue(chosen, &assessment, request, now);
        Ok((id, chosen, decision))
    }

    /// Releases the booking of a request that ended normally. In contrast to a mere drop, the
    /// forecasts learn from the length of its output and from its duration. They learn nothing if
    /// no number of output tokens was reported.
    pub fn complete(mut self, now: Duration) {
        self.with_dispatched(now, |state, id| {
            state.on_first_token(id, now);
            state.learn_from_completion(id, now);
        });
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        state.release(self.id, self.output_sequence.as_ref());
    }
}
