//! Batches: the bookings of one request body with several prompts, all on one worker.
//!
//! The engine treats each prompt as a request of its own, so each has a booking of its own. The
//! worker is the one where the sum of their costs is least; a prefix that several prompts share
//! counts once. Choosing the worker and booking all prompts there is one step.

use std::task::{Context, Poll};
use std::time::Duration;

use smallvec::SmallVec;

use crate::active_tree::{PrefixMatch, PrefixTree, WorkerIndex};
use crate::booking::Booking;
use crate::booking_record::BookingId;
use crate::kv_cost::KvCost;
use crate::marginal_delay::MarginalDelay;
use crate::policy::{CostSource, Decision, Load};
use crate::request::{Request, RouteError};
use crate::sequence::Sequence;
use crate::state::{State, unlock};
use crate::workers::WorkerId;

/// Maximum number of prompts that are booked in one step. The step takes as long as routing that
/// many single requests, and holds the router's lock all the time. A caller with more prompts books
/// the rest as one prompt of [unknown content](Sequence::unhashed).
pub const MAX_BATCH_PROMPTS: usize = 64;

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

    /// Returns the number of prompts in the body, including the ones that have ended.
    #[must_use]
    pub fn prompt_count(&self) -> usize {
        self.bookings.len()
    }

    /// Returns the booking of the prompt with this index, unless it has ended.
    pub fn booking(&mut self, prompt: usize) -> Option<&mut Booking> {
        self.bookings.get_mut(prompt)?.as_mut()
    }

    /// Polls for the dispatch of the batch: see [`Booking::poll_dispatch`]. Always `Ready` for
    /// several prompts. They are never queued, because they would have to fit the worker's memory
    /// together.
    pub fn poll_dispatch(
        &mut self,
        context: &mut Context<'_>,
        excluded: &[WorkerId],
        now: Duration,
    ) -> Poll<()> {
        let [Some(booking)] = self.bookings.as_mut_slice() else {
            return Poll::Ready(());
        };
        let poll = booking.poll_dispatch(context, excluded, now);
        (self.worker, self.decision) = (booking.worker(), *booking.decision());
        poll
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
    /// among all that are not in `excluded`, in one step: see [`Booking::reroute`]. Prompts that
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
        let batch = BatchRequest::new(requests.collect());
        let mut state = shared.lock();
        state.advance_to(now);
        let costs = state.batch_costs(&batch);
        self.worker = state.select_for_batch(&batch, &costs)?;
        for booking in &bookings {
            state.release_for_rebooking(booking.id());
        }
        // Computed again: the blocks that the bookings themselves pinned no longer count as overlap.
        let costs = state.batch_costs(&batch);
        self.decision = costs.decision(self.worker);
        let booked = state.book_batch(self.worker, &batch);
        unlock(state);
        for (booking, (id, decision)) in bookings.iter_mut().zip(booked) {
            booking.rebind(id, self.worker, decision);
        }
        Ok(())
    }
}

/// Requests that one worker must take together, with the prefixes that they share.
#[derive(Debug)]
pub(crate) struct BatchRequest<'a> {
    /// One request for each prompt. Only their prompts differ.
    requests: Vec<Request<'a>>,
    /// For each request, the number of leading blocks that an earlier request has as well.
    shared_with_earlier: Vec<u32>,
}

impl<'a> BatchRequest<'a> {
    /// Returns `request` and a copy of it for each of the `further` prompts.
    pub(crate) fn from_request(request: &Request<'a>, further: &'a [Sequence]) -> Self {
        debug_assert!(
            further.len() < MAX_BATCH_PROMPTS,
            "a batch has at most MAX_BATCH_PROMPTS prompts"
        );
        let further = further.iter().map(|sequence| Request {
            prompt: sequence,
            ..*request
        });
        Self::new(std::iter::once(*request).chain(further).collect())
    }

    /// Computes the prefixes that the requests share. Does not need the router's lock.
    fn new(requests: Vec<Request<'a>>) -> Self {
        // Pins the prompts one after the other on a single worker that starts empty.
        let mut tree = PrefixTree::default();
        let shared_with_earlier = requests.iter().map(|request| {
            let mut prefix_matches = [PrefixMatch::default()];
            let chain = request.prompt.hash_chain();
            let position = tree.match_prefix(chain, &mut prefix_matches);
            tree.pin(position, chain, 0, 0);
            prefix_matches[0].active_blocks
        });
        Self {
            shared_with_earlier: shared_with_earlier.collect(),
            requests,
        }
    }

    /// Returns one request for each prompt.
    pub(crate) fn requests(&self) -> &[Request<'a>] {
        &self.requests
    }
}

/// Costs of a batch on each worker, by worker index.
#[derive(Debug)]
pub(crate) struct BatchCosts {
    /// Costs in blocks, summed over the prompts.
    pub(crate) costs: Vec<KvCost>,
    /// Costs in seconds, summed over the prompts.
    pub(crate) delays: Vec<MarginalDelay>,
    /// Weighted sums of `delays`: the numbers that the marginal-delay policy minimises.
    pub(crate) objective: Vec<f64>,
    /// Prefix matches, summed over the prompts.
    pub(crate) prefix_matches: Vec<PrefixMatch>,
}

impl BatchCosts {
    /// Returns the decision to place the batch on `worker`.
    pub(crate) fn decision(&self, worker: WorkerId) -> Decision {
        let best = self.costs.iter().map(|cost| cost.overlap_blocks).max();
        Decision {
            cost: self.costs[worker.index as usize],
            prefix_match: self.prefix_matches[worker.index as usize],
            best_overlap_blocks: best.unwrap_or(0),
        }
    }
}

impl State {
    /// Returns the costs of the batch on every worker, with its prompts booked one after the other.
    /// Each prompt waits for the prefills of the prompts before it. Workers that cannot be chosen
    /// have entries too. Books nothing.
    pub(crate) fn batch_costs(&self, batch: &BatchRequest<'_>) -> BatchCosts {
        let idle_cost = |load: &Load| KvCost::idle(load.projected_blocks());
        let mut batch_costs = BatchCosts {
            costs: self.workers.loads.iter().map(idle_cost).collect(),
            delays: vec![MarginalDelay::default(); self.workers.index_len()],
            objective: vec![0.0; self.workers.index_len()],
            prefix_matches: vec![PrefixMatch::default(); self.workers.index_len()],
        };
        for (request, &shared) in batch.requests.iter().zip(&batch.shared_with_earlier) {
            let assessment = self.assess(request);
            let cost_input = self.kv_cost_input(request);
            let profile = self.request_profile(request, &assessment);
            for (index, &own_match) in assessment.prefix_matches().iter().enumerate() {
                let worker = self.workers.by_index(index as WorkerIndex);
                let mut prefix_match = own_match;
                if worker.is_some_and(|worker| worker.prefix_caching) {
                    prefix_match.active_blocks = prefix_match.active_blocks.max(shared);
                }
                batch_costs.costs[index].add(cost_input, prefix_match);
                let mut delay =
                    self.workers
                        .marginal_delay(&profile, index as WorkerIndex, prefix_match);
                // Each prompt also waits for the prefills of the prompts before it.
                delay.queue_wait += batch_costs.delays[index].prefill;
                batch_costs.objective[index] += profile.total(&delay);
                batch_costs.delays[index] += delay;
                let sum = &mut batch_costs.prefix_matches[index];
                sum.cached_blocks = sum.cached_blocks.saturating_add(prefix_match.cached_blocks);
                sum.active_blocks = sum.active_blocks.saturating_add(prefix_match.active_blocks);
            }
        }
        batch_costs
    }

    /// Chooses the worker for the whole batch. Books nothing.
    ///
    /// # Errors
    /// As [`select_with_costs`](Self::select_with_costs).
    pub(crate) fn select_for_batch(
        &mut self,
        batch: &BatchRequest<'_>,
        batch_costs: &BatchCosts,
    ) -> Result<WorkerId, RouteError> {
        // The model and the exclusions are equal for all prompts. Consistent hashing uses the first
        // prompt.
        self.select_with_costs(
            &batch.requests[0],
            CostSource::Precomputed(&batch_costs.costs, &batch_costs.objective),
        )
    }

    /// Books all prompts of the batch on `worker`, as dispatched. Returns an entry per prompt, in
    /// their order. Does not count the arrival in the queue's state: see
    /// [`record_batch_arrival`](Self::record_batch_arrival).
    pub(crate) fn book_batch(
        &mut self,
        worker: WorkerId,
        batch: &BatchRequest<'_>,
    ) -> Vec<(BookingId, Decision)> {
        let book = |request| {
            // Assessed one by one, so that each prompt matches the blocks of those before it.
            let ticket = self.ticket(request);
            let assessment = self.assess_ignoring_queue(request, ticket);
            self.book(worker, &assessment, request)
        };
        batch.requests.iter().map(book).collect()
    }
}
