//! When a queued request is sent, and which one is next.
//!
//! A worker has prefill slack when its prefill backlog is empty or shorter than
//! [`DISPATCH_AHEAD_SECONDS`]. The first queued request that fits its free KV blocks is then sent.
//! Memory is checked here because engines handle its lack badly. vLLM starts a prompt that fits only
//! in part, blocks all others behind it, and preempts running requests when outputs grow. SGLang
//! delays prompts until their [whole reservation](crate::sglang_admission) fits.
//!
//! If the worker's own queue is empty, the first request of the longest queue of the same model is
//! offered a new choice.

use std::num::NonZeroU32;
use std::task::Waker;
use std::time::Duration;

use foresee_prefix::{EvictionRule, PrefixState, WorkerIndex};
use smallvec::SmallVec;

use crate::booking_id::BookingId;
use crate::config::RouterConfig;
use crate::queue::{QueueKey, QueueOrder, QueueTicket, QueueTickets};
use crate::request::SelectError;
use crate::sglang_admission::OutputReservation;
use crate::workers::{WorkerState, Workers};

/// Largest prefill backlog, in seconds, with which a worker has prefill slack. It must exceed the
/// time that a request takes to reach the worker, so that the worker does not run idle.
const DISPATCH_AHEAD_SECONDS: f64 = 0.1;

/// Workers and their caches at one time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FleetView<'a> {
    pub(crate) workers: &'a Workers,
    pub(crate) prefixes: &'a PrefixState,
    pub(crate) now: Duration,
}

impl FleetView<'_> {
    /// Returns whether the worker at `index` exists, is not unhealthy, has no backpressure, and has a
    /// prefill backlog shorter than [`DISPATCH_AHEAD_SECONDS`].
    fn has_prefill_slack(self, index: WorkerIndex) -> bool {
        let Some(worker) = self.workers.by_index(index) else {
            return false;
        };
        if worker.state() == WorkerState::Unhealthy
            || self.workers.has_backpressure(index, self.now)
        {
            return false;
        }
        let pending_work = &self.workers.pending_work[index as usize];
        let latency_model = self.workers.latency_now(pending_work, self.now);
        pending_work.sent_totals().requests == 0
            || pending_work.sent_prefill_seconds(&latency_model, self.now) < DISPATCH_AHEAD_SECONDS
    }

    /// Returns whether the engine of the worker at `index` reserves memory for outputs, and makes
    /// prompts wait until their reservation fits. SGLang does.
    fn engine_reserves_output_memory(self, index: WorkerIndex) -> bool {
        self.prefixes.eviction(index) == EvictionRule::SglangRadix
    }
}

/// Properties of a new request by which it can be sent to a worker at once, or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewRequest {
    /// Active blocks that the request adds.
    pub(crate) new_blocks: u32,
    /// Output that it may generate.
    pub(crate) reservation: OutputReservation,
    /// Whether the worker has every block of the prompt that can be reused, or is about to compute
    /// it for a request that was sent before. The engine then starts the request in the step in which
    /// it starts that one, and a wait at the router would only delay it.
    pub(crate) has_whole_prefix: bool,
}

/// Step that follows when a worker may take a request: see [`Dispatcher::next_step`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum NextStep {
    /// The request of this booking is sent to the worker in whose queue it is.
    Send(QueueKey, BookingId),
    /// The request of this booking, queued for another worker, is offered a new choice.
    OfferRebalance(BookingId),
}

/// The rule of dispatch, and what the queues of all workers share. The queues themselves are in
/// [`Workers::pending_work`].
#[derive(Debug)]
pub(crate) struct Dispatcher {
    /// Order of the queues. `None` dispatches every request on arrival.
    order: Option<QueueOrder>,
    /// Maximum number of queued requests.
    limit: Option<usize>,
    /// Tokens per KV block.
    block_size: NonZeroU32,
    /// Source of the queue tickets.
    tickets: QueueTickets,
    /// Number of requests in all worker queues.
    pub(crate) queued_total: usize,
    /// Tasks to wake when the router's lock is released.
    pub(crate) pending_wakers: SmallVec<[Waker; 2]>,
}

impl Dispatcher {
    /// Returns the dispatcher of a router with this configuration.
    pub(crate) fn new(config: &RouterConfig) -> Self {
        Self {
            order: config.queue_order,
            limit: config.queue_limit,
            block_size: config.block_size,
            tickets: QueueTickets::default(),
            queued_total: 0,
            pending_wakers: SmallVec::new(),
        }
    }

    /// Sets the maximum number of queued requests.
    pub(crate) fn set_limit(&mut self, limit: Option<usize>) {
        self.limit = limit;
    }

    /// Returns the queue ticket of a request that arrives `now`.
    pub(crate) fn ticket(&self, priority: i32, tenant: u64, now: Duration) -> QueueTicket {
        let order = self.order.unwrap_or_default();
        self.tickets.ticket(order, priority, tenant, now)
    }

    /// Returns whether arrivals are counted with their service time.
    pub(crate) fn needs_service_time(&self) -> bool {
        self.order == Some(QueueOrder::FairByTenant)
    }

    /// Counts an arrival: see [`QueueTickets::on_arrival`].
    pub(crate) fn on_arrival(&mut self, ticket: &QueueTicket, service_time: Duration) {
        self.tickets.on_arrival(ticket, service_time);
    }

    /// Counts a dispatch: see [`QueueTickets::on_dispatch`].
    pub(crate) fn on_dispatch(&mut self, ticket: &QueueTicket) {
        self.tickets.on_dispatch(ticket);
    }

    /// Checks that one more request can be queued.
    ///
    /// # Errors
    /// [`SelectError::QueueFull`] at the limit.
    pub(crate) fn check_limit(&self) -> Result<(), SelectError> {
        match self.limit {
            Some(limit) if self.queued_total >= limit => Err(self.full()),
            _ => Ok(()),
        }
    }

    /// Returns the error of a request that has no place in the queue.
    pub(crate) fn full(&self) -> SelectError {
        SelectError::QueueFull {
            limit: self.limit.unwrap_or(usize::MAX),
        }
    }

    /// Takes back the service of a request that lost its place: see [`QueueTickets::on_displaced`].
    pub(crate) fn on_displaced(&mut self, ticket: &QueueTicket, service_time: Duration) {
        self.tickets.on_displaced(ticket, service_time);
    }

    /// Returns whether a new request can be sent to the worker at once: no other request is queued
    /// for it, it has prefill slack or the request needs none, and the request fits its memory.
    /// Always true if the router has no queue.
    pub(crate) fn can_send_now(
        &self,
        fleet: FleetView<'_>,
        index: WorkerIndex,
        request: NewRequest,
    ) -> bool {
        if self.order.is_none() {
            return true;
        }
        let Some(pending_work) = fleet.workers.pending_work.get(index as usize) else {
            return true;
        };
        pending_work.queue.is_empty()
            && (request.has_whole_prefix || fleet.has_prefill_slack(index))
            && self.fits_memory(fleet, index, request.new_blocks.into(), request.reservation)
    }

    /// Returns the step that follows when prefill slack or memory of the worker may have become
    /// free. `None` if the worker can take no request, if none is queued that it could take, or while
    /// an earlier request of its queue was woken and has not polled.
    pub(crate) fn next_step(&self, fleet: FleetView<'_>, index: WorkerIndex) -> Option<NextStep> {
        if self.queued_total == 0 || !fleet.has_prefill_slack(index) {
            return None;
        }
        let workers = fleet.workers;
        let queue = &workers.pending_work[index as usize].queue;
        if queue.is_empty() {
            let accepts_requests = workers.restriction(index, fleet.now).is_none();
            let first = accepts_requests.then(|| workers.first_of_longest_queue(index));
            return first.flatten().map(NextStep::OfferRebalance);
        }
        if queue.dispatching.is_some() {
            return None;
        }
        let (key, id, fits) = queue.next_dispatchable(fleet.now, |new_blocks, reservation| {
            self.fits_memory(fleet, index, new_blocks, reservation)
        })?;
        // A request that does not fit is sent once its backfill window has passed, except to an
        // engine that reserves memory: there it would only wait.
        let may_exceed_memory = !fleet.engine_reserves_output_memory(index);
        (fits || may_exceed_memory).then_some(NextStep::Send(key, id))
    }

    /// Returns whether the memory of the worker at `index` suffices to start a request at once that
    /// adds `new_blocks` active blocks and may generate the output of `reservation`.
    ///
    /// True if the capacity is not configured or reported, or if no block is active there; false if
    /// the worker does not exist. For an engine that reserves no memory for outputs, this is
    /// checked only if the queue order is `shortest`.
    fn fits_memory(
        &self,
        fleet: FleetView<'_>,
        index: WorkerIndex,
        new_blocks: u64,
        reservation: OutputReservation,
    ) -> bool {
        if fleet.workers.by_index(index).is_none() {
            return false;
        }
        // A learned or assumed capacity that is too small would delay requests that do fit.
        let Some(capacity) = fleet.prefixes.reported_capacity(index) else {
            return true;
        };
        let (capacity, load) = (u64::from(capacity), fleet.workers.loads[index as usize]);
        // A request that is alone on the worker gets no more memory by waiting.
        if load.active_blocks == 0 {
            return true;
        }
        if !fleet.engine_reserves_output_memory(index) {
            return self.order != Some(QueueOrder::ShortestPrefillFirst)
                || load.active_blocks + new_blocks <= capacity;
        }
        let block_size = u64::from(self.block_size.get());
        let engine_block = u64::from(fleet.prefixes.engine_block_ratio(index).get());
        let reserve = &fleet.workers.pending_work[index as usize].output_reserve;
        let output_tokens = reserve.tokens() + reservation.tokens();
        let needed_tokens =
            (load.active_blocks + new_blocks + engine_block) * block_size + output_tokens;
        needed_tokens < capacity * block_size
    }
}
