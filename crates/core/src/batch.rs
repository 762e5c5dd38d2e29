//! Several prompts that one worker must take together, because they came in one body.
//!
//! To the engine each is a request of its own, so each has a booking of its own. The worker is
//! the one where they cost least in sum, a prefix that several share counted once, and all are
//! booked there in the step that chooses it.

use std::task::{Context, Poll};
use std::time::Duration;

use smallvec::SmallVec;

use crate::booking::Booking;
use crate::choose::{Decision, Load, Prices};
use crate::cost::Cost;
use crate::delay::Delay;
use crate::fleet::WorkerId;
use crate::record::BookingKey;
use crate::request::{Request, RouteError};
use crate::sequence::Sequence;
use crate::state::{State, release};
use crate::tree::{Depth, PrefixTree, Slot};

/// The most prompts to book in one step: it takes as long as so many single ones, and nobody else
/// can be routed meanwhile. Whoever has more books the rest as one, of
/// [unknown content](Sequence::opaque).
pub const MOST_IN_BATCH: usize = 64;

/// The bookings of prompts that one worker takes. Dropping it frees all of them.
#[derive(Debug)]
#[must_use = "dropping a batch frees it"]
pub struct Batch {
    /// In the order of the prompts; none where one has ended.
    bookings: SmallVec<[Option<Booking>; 1]>,
    worker: WorkerId,
    decision: Decision,
}

impl Batch {
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

    /// The worker all are booked on.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// What spoke for that worker, summed over the prompts.
    #[must_use]
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// How many prompts there were, those that have ended among them.
    #[must_use]
    pub fn prompts(&self) -> usize {
        self.bookings.len()
    }

    /// The booking of one prompt, unless it has ended.
    pub fn booking(&mut self, prompt: usize) -> Option<&mut Booking> {
        self.bookings.get_mut(prompt)?.as_mut()
    }

    /// As [`Booking::poll_sent`]. Several prompts are never kept waiting: they would have to find
    /// room together.
    pub fn poll_sent(
        &mut self,
        context: &mut Context<'_>,
        excluded: &[WorkerId],
        now: Duration,
    ) -> Poll<()> {
        let [Some(booking)] = self.bookings.as_mut_slice() else {
            return Poll::Ready(());
        };
        let poll = booking.poll_sent(context, excluded, now);
        (self.worker, self.decision) = (booking.worker(), *booking.decision());
        poll
    }

    /// One prompt was answered as it should, and what it held is free: see [`Booking::finish`].
    pub fn finish_one(&mut self, prompt: usize, now: Duration) {
        if let Some(booking) = self.bookings.get_mut(prompt).and_then(Option::take) {
            booking.finish(now);
        }
    }

    /// All prompts that are left were answered as they should: see [`Booking::finish`].
    pub fn finish(self, now: Duration) {
        for booking in self.bookings.into_iter().flatten() {
            booking.finish(now);
        }
    }

    /// Frees all and books all on the worker that the policy prefers among those not excluded, in
    /// one step: see [`Booking::reroute`].
    ///
    /// # Errors
    /// As [`Router::route`](crate::router::Router::route); all bookings stay where they are.
    pub fn reroute(&mut self, excluded: &[WorkerId], now: Duration) -> Result<(), RouteError> {
        if let [Some(booking)] = self.bookings.as_mut_slice() {
            booking.reroute(excluded, now)?;
            (self.worker, self.decision) = (booking.worker(), *booking.decision());
            return Ok(());
        }
        let mut bookings: SmallVec<[&mut Booking; 1]> =
            self.bookings.iter_mut().flatten().collect();
        let Some(router) = bookings.first().map(|booking| booking.router().clone()) else {
            return Ok(());
        };
        let requests = bookings.iter().map(|booking| booking.request(excluded));
        let members = Members::new(requests.collect());
        let mut state = router.lock();
        state.advance(now);
        let sums = state.sum(&members);
        self.worker = state.choose_for_all(&members, &sums)?;
        for booking in &bookings {
            state.withdraw(booking.key());
        }
        // Again, because their own blocks are no overlap any longer.
        let sums = state.sum(&members);
        self.decision = sums.decision(self.worker);
        let booked = state.book_all(self.worker, &members);
        release(state);
        for (booking, (key, decision)) in bookings.iter_mut().zip(booked) {
            booking.is_now(key, self.worker, decision);
        }
        Ok(())
    }
}

/// Requests for one worker, and what each repeats of those before it.
#[derive(Debug)]
pub(crate) struct Members<'a> {
    requests: Vec<Request<'a>>,
    /// Leading blocks of each request that one before it has as well.
    repeated: Vec<u32>,
}

impl<'a> Members<'a> {
    /// The request, and others like it with the `further` prompts.
    pub(crate) fn like(request: &Request<'a>, further: &'a [Sequence]) -> Self {
        debug_assert!(further.len() < MOST_IN_BATCH);
        let further = further.iter().map(|sequence| Request {
            sequence,
            ..*request
        });
        Self::new(std::iter::once(*request).chain(further).collect())
    }

    /// Needs the lock for nothing.
    fn new(requests: Vec<Request<'a>>) -> Self {
        // What the requests before have booked on some worker that had nothing.
        let mut tree = PrefixTree::default();
        let repeated = requests.iter().map(|request| {
            let mut depths = [Depth::default()];
            let chain = request.sequence.shared_hashes();
            let at = tree.descend(chain, &mut depths);
            tree.pin(at, chain, 0, 0);
            depths[0].active
        });
        Self {
            repeated: repeated.collect(),
            requests,
        }
    }

    pub(crate) fn requests(&self) -> &[Request<'a>] {
        &self.requests
    }
}

/// What a batch would cost on each worker, by slot.
#[derive(Debug)]
pub(crate) struct Sums {
    pub(crate) costs: Vec<Cost>,
    pub(crate) delays: Vec<Delay>,
    /// What of those is to be minimised.
    pub(crate) totals: Vec<f64>,
    pub(crate) depths: Vec<Depth>,
}

impl Sums {
    /// What speaks for `worker`.
    pub(crate) fn decision(&self, worker: WorkerId) -> Decision {
        let best = self.costs.iter().map(|cost| cost.overlap_blocks).max();
        Decision {
            cost: self.costs[worker.slot as usize],
            depth: self.depths[worker.slot as usize],
            best_overlap_blocks: best.unwrap_or(0),
        }
    }
}

impl State {
    /// What the members would cost on every worker if they were booked there one after the other.
    pub(crate) fn sum(&self, members: &Members<'_>) -> Sums {
        let unplaced = |load: &Load| Cost::of_nothing(load.booked_blocks());
        let mut sums = Sums {
            costs: self.fleet.loads.iter().map(unplaced).collect(),
            delays: vec![Delay::default(); self.fleet.slots()],
            totals: vec![0.0; self.fleet.slots()],
            depths: vec![Depth::default(); self.fleet.slots()],
        };
        for (request, &repeated) in members.requests.iter().zip(&members.repeated) {
            let reading = self.read(request);
            let (demand, placement) = (self.demand(request), self.placement(request, &reading));
            for (slot, &alone) in reading.depths().iter().enumerate() {
                let worker = self.fleet.at(slot as u32);
                let mut depth = alone;
                if worker.is_some_and(|worker| worker.prefix_caching) {
                    depth.active = depth.active.max(repeated);
                }
                sums.costs[slot].add(demand, depth);
                let mut delay = self.fleet.delay(&placement, slot as Slot, depth);
                // Each waits for those before it, too.
                delay.wait += sums.delays[slot].prefill;
                sums.totals[slot] += placement.total(&delay);
                sums.delays[slot] += delay;
                let sum = &mut sums.depths[slot];
                sum.cached = sum.cached.saturating_add(depth.cached);
                sum.active = sum.active.saturating_add(depth.active);
            }
        }
        sums
    }

    /// Chooses the worker for all members.
    pub(crate) fn choose_for_all(
        &mut self,
        members: &Members<'_>,
        sums: &Sums,
    ) -> Result<WorkerId, RouteError> {
        // A model, exclusions and a wish to stay close to a prefix are the first one's.
        self.pick(
            &members.requests[0],
            Prices::Summed(&sums.costs, &sums.totals),
        )
    }

    /// Books all members on `worker`.
    pub(crate) fn book_all(
        &mut self,
        worker: WorkerId,
        members: &Members<'_>,
    ) -> Vec<(BookingKey, Decision)> {
        let book = |request| {
            // Each sees those before it.
            let standing = self.standing(request);
            let reading = self.read_as_sent(request, standing);
            self.book(worker, &reading, request)
        };
        members.requests.iter().map(book).collect()
    }
}
