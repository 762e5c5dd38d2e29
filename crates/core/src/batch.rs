//! Batches: the bookings of one request body with several prompts, all on one worker.
//!
//! The engine treats each prompt as a request of its own, so each has a booking of its own. The
//! worker is the one where the sum of their costs is least; a prefix that several prompts share
//! counts once. Choosing the worker and booking the prompts there is one critical section for a few
//! prompts, and several for many, so that no other decision waits for the whole of it.

mod costs;

use std::num::NonZeroU32;
use std::task::{Context, Poll};
use std::time::Duration;

use foresee_prefix::blocks_shared_with_earlier;
use foresee_prefix::sequence::Sequence;
use smallvec::SmallVec;

use crate::booking::Booking;
use crate::booking_id::BookingId;
use crate::critical_section::{CriticalSection, SharedState};
use crate::policy::Decision;
use crate::request::{Explanation, PreparedRequest, RouteError, SelectError, check_block_size};
use crate::worker_id::WorkerId;
use costs::Purpose;

/// Maximum number of prompts of a batch. Routing it takes as long as routing that many single
/// requests. A caller with more prompts books the rest as one prompt of
/// [unknown content](Sequence::unhashed).
pub const MAX_BATCH_PROMPTS: usize = 64;

/// Number of prompts that one critical section books or releases.
const MAX_BOOKED_PER_LOCK: usize = 8;

/// Bookings of one body with several prompts, all on one worker. Dropping it releases all of them.
#[derive(Debug)]
#[must_use = "dropping a batch releases it"]
pub struct Batch {
    /// Bookings in the order of the prompts; `None` for a prompt that has ended.
    bookings: SmallVec<[Option<Booking>; 1]>,
    worker: WorkerId,
    decision: Decision,
}

impl Batch {
    /// Returns a batch of these bookings, which are all on `worker`.
    pub(crate) fn new(
        bookings: impl Iterator<Item = Booking>,
        worker: WorkerId,
        decision: Decision,
    ) -> Self {
        Self {
            bookings: bookings.map(Some).collect(),
            worker,
            decision,
        }
    }

    /// Returns the worker on which all prompts are booked.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// Returns the cost and the prefix match for which that worker was chosen, summed over the
    /// prompts.
    #[must_use]
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// Returns the longest time to first token that was predicted for a prompt that has not ended:
    /// see [`Booking::predicted_ttft`].
    #[must_use]
    pub fn predicted_ttft(&self) -> Duration {
        let bookings = self.bookings.iter().flatten();
        let predicted = bookings.map(Booking::predicted_ttft);
        predicted.max().unwrap_or_default()
    }

    /// Returns the number of prompts in the body, including the ones that have ended.
    #[must_use]
    pub fn prompt_count(&self) -> usize {
        self.bookings.len()
    }

    /// Returns the bookings of the prompts that have not ended.
    pub(crate) fn active_bookings(&mut self) -> impl Iterator<Item = &mut Booking> {
        self.bookings.iter_mut().flatten()
    }

    /// Returns the booking of the prompt with this index, unless it has ended.
    pub fn booking(&mut self, prompt: usize) -> Option<&mut Booking> {
        self.bookings.get_mut(prompt)?.as_mut()
    }

    /// Returns the predicted time from the booking to the first byte of the response: see
    /// [`Booking::predicted_first_byte`]. `None` for several prompts.
    #[must_use]
    pub fn predicted_first_byte(&self) -> Option<Duration> {
        match self.bookings.as_slice() {
            [Some(booking)] => booking.predicted_first_byte(),
            _ => None,
        }
    }

    /// Polls for the dispatch of the batch: see [`Booking::poll_dispatch`]. Always `Ready` for
    /// several prompts. They are never queued, because they would have to fit the worker's memory
    /// together.
    pub fn poll_dispatch(
        &mut self,
        context: &mut Context<'_>,
        excluded: &[WorkerId],
        now: Duration,
    ) -> Poll<Result<(), RouteError>> {
        let [Some(booking)] = self.bookings.as_mut_slice() else {
            return Poll::Ready(Ok(()));
        };
        let poll = booking.poll_dispatch(context, excluded, now);
        (self.worker, self.decision) = (booking.worker(), *booking.decision());
        poll
    }

    /// Marks the batch as sent now, if it is queued: see [`Booking::mark_sent`]. Several prompts are
    /// never queued.
    pub fn mark_sent(&mut self, now: Duration) {
        if let [Some(booking)] = self.bookings.as_mut_slice() {
            booking.mark_sent(now);
            (self.worker, self.decision) = (booking.worker(), *booking.decision());
        }
    }

    /// Releases the booking of the prompt with this index, which ended normally: see
    /// [`Booking::complete`]. Has no effect if the prompt has ended already or there is none with
    /// this index.
    pub fn complete_prompt(&mut self, prompt: usize, now: Duration) {
        if let Some(booking) = self.bookings.get_mut(prompt).and_then(Option::take) {
            booking.complete(now);
        }
    }

    /// Releases the bookings of all prompts that have not ended yet, because they ended normally:
    /// see [`Booking::complete`].
    pub fn complete(self, now: Duration) {
        for booking in self.bookings.into_iter().flatten() {
            booking.complete(now);
        }
    }

    /// Releases all bookings and books the prompts again on the worker that the policy chooses
    /// among all that are not in `excluded`: see [`Booking::reroute`]. Prompts that
    /// have ended are left out; if all have, the call has no effect.
    ///
    /// The output tokens observed so far are discarded. A batch of one prompt may be queued again:
    /// wait for [`poll_dispatch`](Self::poll_dispatch) before it is sent.
    ///
    /// # Errors
    /// As [`Router::route`](crate::router::Router::route). All bookings then stay where they are.
    pub fn reroute(&mut self, excluded: &[WorkerId], now: Duration) -> Result<(), RouteError> {
        if let [Some(booking)] = self.bookings.as_mut_slice() {
            booking.reroute(excluded, now)?;
            (self.worker, self.decision) = (booking.worker(), *booking.decision());
            return Ok(());
        }
        let mut bookings: SmallVec<[&mut Booking; 1]> =
            self.bookings.iter_mut().flatten().collect();
        let Some(shared) = bookings.first().map(|booking| booking.shared().clone()) else {
            return Ok(());
        };
        let requests = bookings.iter().map(|booking| booking.request(excluded));
        let batch = BatchRequest::from_prepared(requests.collect());
        let ids: Vec<BookingId> = bookings.iter().map(|booking| booking.id()).collect();
        let (worker, decision, booked) = shared
            .rebook_batch(&batch, &ids, now)
            .map_err(|error| error.for_model(batch.requests[0].model))?;
        (self.worker, self.decision) = (worker, decision);
        for (booking, (id, decision)) in bookings.iter_mut().zip(booked) {
            booking.rebind(id, worker, decision);
        }
        Ok(())
    }
}

/// Booking and decision of each prompt of a batch, in the order of the prompts.
type BookedPrompts = Vec<(BookingId, Decision)>;

/// Requests that one worker must take together, with the prefixes that they share.
#[derive(Debug)]
pub(crate) struct BatchRequest<'a> {
    /// One request for each prompt. Only their prompts differ.
    requests: Vec<PreparedRequest<'a>>,
    /// For each request, the number of leading blocks that an earlier request has as well.
    shared_with_earlier: Vec<u32>,
}

impl<'a> BatchRequest<'a> {
    /// Returns `request` and a copy of it for each of the `further` prompts.
    ///
    /// # Errors
    /// [`RouteError::TooManyPrompts`] for more than [`MAX_BATCH_PROMPTS`] prompts,
    /// [`RouteError::BlockSizeMismatch`] if a prompt has another block size than `block_size`.
    pub(crate) fn new(
        request: PreparedRequest<'a>,
        further: &'a [Sequence],
        block_size: NonZeroU32,
    ) -> Result<Self, RouteError> {
        if further.len() >= MAX_BATCH_PROMPTS {
            return Err(RouteError::TooManyPrompts {
                prompts: further.len() + 1,
                limit: MAX_BATCH_PROMPTS,
            });
        }
        for prompt in further {
            check_block_size(prompt, block_size)?;
        }
        let further = further.iter().map(|prompt| request.with_prompt(prompt));
        Ok(Self::from_prepared(
            std::iter::once(request).chain(further).collect(),
        ))
    }

    /// Computes the prefixes that the requests share. Does not need the router's lock.
    fn from_prepared(requests: Vec<PreparedRequest<'a>>) -> Self {
        let prompts = requests.iter().map(|request| request.prompt);
        Self {
            shared_with_earlier: blocks_shared_with_earlier(prompts),
            requests,
        }
    }

    /// Returns one request for each prompt.
    pub(crate) fn requests(&self) -> &[PreparedRequest<'a>] {
        &self.requests
    }
}

impl SharedState {
    /// Chooses one worker for a batch that arrives now, and books every prompt there as sent.
    ///
    /// # Errors
    /// As [`State::select_worker`](crate::state::State::select_worker).
    pub(crate) fn route_batch(
        &self,
        batch: &BatchRequest<'_>,
        now: Duration,
    ) -> Result<Batch, SelectError> {
        let (costs, mut state) = self.batch_costs(batch, now, Purpose::Choice);
        let worker = state.select_for_batch(batch, &costs)?;
        let (booked, mut state) = self.book_batch(state, worker, batch);
        state.record_batch_arrival(&batch.requests[0], booked.iter().map(|(id, _)| *id));
        drop(state);
        let booked = booked.into_iter().zip(batch.requests());
        let bookings = booked.map(|((id, decision), request)| {
            Booking::new(self.clone(), id, worker, decision, request)
        });
        Ok(Batch::new(bookings, worker, costs.decision(worker)))
    }

    /// Books a batch again, whose bookings are `ids`, on the worker that the policy chooses now.
    /// Returns that worker, the decision, and an entry per prompt.
    ///
    /// # Errors
    /// As [`State::select_worker`](crate::state::State::select_worker). The bookings then
    /// stay where they are.
    fn rebook_batch(
        &self,
        batch: &BatchRequest<'_>,
        ids: &[BookingId],
        now: Duration,
    ) -> Result<(WorkerId, Decision, BookedPrompts), SelectError> {
        let (costs, mut state) = self.batch_costs(batch, now, Purpose::Choice);
        let worker = state.select_for_batch(batch, &costs)?;
        for (number, &id) in ids.iter().enumerate() {
            if number > 0 && number.is_multiple_of(MAX_BOOKED_PER_LOCK) {
                state.unlock_fair();
                state = self.lock();
            }
            state.release_for_rebooking(id);
        }
        drop(state);
        // Computed again: the blocks that the bookings themselves pinned no longer count as overlap.
        let (costs, state) = self.batch_costs(batch, now, Purpose::Decision);
        let (booked, state) = self.book_batch(state, worker, batch);
        drop(state);
        Ok((worker, costs.decision(worker), booked))
    }

    /// Returns the decision that would be made for the batch now, without making it.
    ///
    /// # Errors
    /// As [`State::select_worker`](crate::state::State::select_worker).
    pub(crate) fn explain_batch(
        &self,
        batch: &BatchRequest<'_>,
        now: Duration,
    ) -> Result<Explanation, SelectError> {
        let (costs, state) = self.batch_costs(batch, now, Purpose::Explanation);
        state.explain(batch.requests(), &costs)
    }

    /// Books all prompts of the batch on `worker`, as dispatched. Returns an entry per prompt, in
    /// their order. Many prompts are booked in several critical sections: the first is `state`, the
    /// last is returned. Does not count the arrival in the queue's state: see
    /// [`record_batch_arrival`](crate::state::State::record_batch_arrival).
    fn book_batch<'a>(
        &'a self,
        mut state: CriticalSection<'a>,
        worker: WorkerId,
        batch: &BatchRequest<'_>,
    ) -> (BookedPrompts, CriticalSection<'a>) {
        let mut booked = Vec::with_capacity(batch.requests.len());
        for (number, request) in batch.requests.iter().enumerate() {
            if number > 0 && number.is_multiple_of(MAX_BOOKED_PER_LOCK) {
                state.unlock_fair();
                state = self.lock();
            }
            // Assessed one by one, so that each prompt matches the blocks of those before it.
            let ticket = state.ticket(request);
            let assessment = state.assess_ignoring_queue(request, ticket);
            booked.push(state.book(worker, &assessment, request));
        }
        (booked, state)
    }
}
