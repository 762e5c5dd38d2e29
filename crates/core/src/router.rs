//! The router: assess, choose and book a request in one step under one lock.
//!
//! [`Router`] owns everything that a decision reads, so a decision sees every booking that any
//! thread made before it.
//!
//! The router reads no clock. Every `now` is the time since an epoch of the caller's choice, and
//! should not go backwards.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::active_tree::WorkerIndex;
use crate::batch::{Batch, BatchRequest};
use crate::booking::Booking;
pub use crate::cache_source::{CacheSource, Observed};
use crate::config::MAX_WEIGHT;
pub use crate::config::{ConfigError, RouterConfig};
use crate::estimated_cache::EvictionRule;
use crate::event_index::{CacheDelta, PrefixRun};
use crate::forecast::output_length::OutputLengthAccuracy;
pub use crate::request::{Candidate, Explanation, Request, RouteError};
use crate::sequence::Sequence;
use crate::state::{SharedState, State, unlock, unlock_fair};
use crate::workers::{
    Worker, WorkerError, WorkerId, WorkerSnapshot, WorkerSpec, WorkerState, Workers,
};

/// Hashes of a cache delta that are applied in one critical section. 64 take about two
/// microseconds, so a waiting thread acquires the lock by spinning and does not go to sleep.
const MAX_HASHES_PER_LOCK: usize = 64;

/// A part of a cache delta that is small enough for one critical section.
enum DeltaChunk<'a> {
    Removed(PrefixRun<'a>),
    Stored(PrefixRun<'a>),
}

/// Predicts the load and the cache of a fleet of workers and places requests on it.
///
/// A `Router` is a handle: clones share one state.
#[derive(Clone, Debug)]
pub struct Router {
    state: SharedState,
}

impl Router {
    /// Returns a router without workers.
    ///
    /// # Errors
    /// [`ConfigError`] if a weight or the temperature is negative, not a number, or above 10⁶.
    pub fn new(config: RouterConfig) -> Result<Self, ConfigError> {
        for (field, value) in [
            ("overlap-weight", config.overlap_weight),
            ("ttft-weight", config.ttft_weight),
            ("temperature", config.temperature),
        ] {
            if !(0.0..=MAX_WEIGHT).contains(&value) {
                return Err(ConfigError { field, value });
            }
        }
        Ok(Self {
            state: SharedState::new(State::new(config)),
        })
    }

    /// Adds a worker. It is unhealthy until [`set_healthy`](Self::set_healthy) changes that.
    ///
    /// # Errors
    /// If the name is taken or the router has [`MAX_WORKERS`](crate::workers::MAX_WORKERS)
    /// workers.
    pub fn add_worker(&self, spec: WorkerSpec) -> Result<WorkerId, WorkerError> {
        let shares_within_step = spec.eviction == EvictionRule::VllmLru;
        let mut state = self.state.lock();
        let id = state.workers.add(spec)?;
        state
            .tree
            .set_intra_step_sharing(id.index, shares_within_step);
        Ok(id)
    }

    /// Removes a worker with all its bookings and returns whether it existed. A [`Booking`] that
    /// outlives its worker releases nothing. Requests in its queue choose another worker when they
    /// are polled next. `false` means that it was removed before.
    pub fn remove_worker(&self, id: WorkerId) -> bool {
        let mut state = self.state.lock();
        state.drop_worker_queue(id);
        let known = state.workers.remove(id);
        if known {
            state.tree.remove_worker(id.index);
            state.queued_prefixes.remove_worker(id.index);
            state.event_index.remove_worker(id.index);
            state.pending_evictions.clear(id.index);
        }
        unlock(state);
        known
    }

    /// Sets whether a worker can be chosen.
    pub fn set_healthy(&self, id: WorkerId, healthy: bool) {
        self.update_worker(id, |workers| workers.set_healthy(id, healthy));
    }

    /// Sets whether a worker only finishes its present requests and receives no new ones.
    pub fn set_draining(&self, id: WorkerId, draining: bool) {
        self.update_worker(id, |workers| workers.set_draining(id, draining));
    }

    /// Applies a state change, then revisits the worker's queue: a healthy worker is sent its next
    /// request; requests queued for a worker that accepts none are offered to other workers. Has no
    /// effect if the worker was removed.
    fn update_worker(&self, id: WorkerId, change: impl FnOnce(&mut Workers)) {
        let mut state = self.state.lock();
        change(&mut state.workers);
        match state.workers.get(id).map(Worker::state) {
            Some(WorkerState::Healthy) => state.try_dispatch_next(id.index),
            _ => state.offer_rebalance_to_all(id),
        }
        unlock(state);
    }

    /// Sets the models that a worker serves. An empty list means that they are unknown.
    pub fn set_models(&self, id: WorkerId, models: Vec<String>) {
        self.state.lock().workers.set_models(id, models);
    }

    /// Sets a worker's cache capacity, in the router's blocks, as reported by its engine. Replaces
    /// a configured or learned capacity, and evicts what no longer fits from the estimated cache.
    /// Has no effect if the worker was removed.
    pub fn set_capacity(&self, id: WorkerId, blocks: u32) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some((worker, load)) = state.workers.get_mut(id) {
            worker.estimated_cache.set_capacity(blocks);
            worker.estimated_cache.evict_to_fit(
                load.active_blocks,
                id.index,
                &mut state.tree,
                &mut state.pending_evictions,
            );
            let capacity = worker.estimated_capacity();
            if let Some((pending_work, _)) = state.workers.pending_work_mut(id) {
                pending_work.capacity = capacity;
            }
        }
        unlock(guard);
    }

    /// Sets how many router blocks one block of the worker's engine holds.
    pub fn set_engine_block_ratio(&self, id: WorkerId, ratio: NonZeroU32) {
        self.state.lock().workers.set_engine_block_ratio(id, ratio);
    }

    /// Sets the rule by which a worker's engine chooses the blocks that it evicts. Affects later
    /// evictions, and whether requests of one engine step share blocks. Has no effect if the worker
    /// was removed.
    pub fn set_eviction(&self, id: WorkerId, eviction: EvictionRule) {
        let mut state = self.state.lock();
        if let Some((worker, _)) = state.workers.get_mut(id) {
            worker.estimated_cache.set_eviction(eviction);
            state
                .tree
                .set_intra_step_sharing(id.index, eviction == EvictionRule::VllmLru);
        }
    }

    /// Clears the estimate of a worker's cache, because its engine restarted or dropped its cache.
    /// Bookings stay. Blocks that KV events reported stay too, until
    /// [`apply_cache_delta`](Self::apply_cache_delta) removes them. Has no effect if the worker was
    /// removed.
    pub fn clear_cache(&self, id: WorkerId) {
        let mut state = self.state.lock();
        if let Some((worker, _)) = state.workers.get_mut(id) {
            worker.estimated_cache.clear();
            state.tree.clear_cached(id.index);
            state.pending_evictions.clear(id.index);
        }
        unlock(state);
    }

    /// Selects where a worker's cache contents come from: its KV events, applied with
    /// [`apply_cache_delta`](Self::apply_cache_delta), or the estimated cache (the engine's
    /// eviction rule, run on the requests routed to it).
    ///
    /// A switch discards the contents that the previous source knew. With events and a known
    /// capacity, blocks that already booked requests will evict are not counted as cached, even
    /// while the events still list them. Has no effect if the worker was removed or has this source
    /// already.
    pub fn set_cache_source(&self, id: WorkerId, source: CacheSource) {
        let mut state = self.state.lock();
        if let Some((worker, _)) = state.workers.get_mut(id)
            && worker.cache_source() != source
        {
            let cache = &mut worker.estimated_cache;
            cache.clear();
            cache.set_event_tracked(source == CacheSource::Events);
            worker.event_cached_blocks = 0;
            let acknowledged_epoch = match source {
                CacheSource::Events => cache.last_epoch(),
                CacheSource::Estimated => 0,
            };
            state.tree.clear_cached(id.index);
            state.tree.acknowledge(id.index, acknowledged_epoch);
            state.event_index.remove_worker(id.index);
            state.pending_evictions.clear(id.index);
        }
        unlock(state);
    }

    /// Applies a change of a worker's cache that its KV events reported. Has no effect on a worker
    /// whose [cache source](Self::set_cache_source) is the estimate, or that was removed. Sets the
    /// worker's engine block ratio to that of the delta, unless that is 0. A live change advances
    /// the router's time in any case.
    ///
    /// A large delta is applied in several critical sections, so that no decision waits for the
    /// whole of it. A decision in between sees the cache partly updated.
    pub fn apply_cache_delta(&self, id: WorkerId, delta: &CacheDelta, observed: Observed) {
        let ratio = delta.engine_block_ratio;
        for run in delta.removed.iter() {
            // Tails first, so that the blocks that stay form a prefix.
            for chunk in run.chunks(MAX_HASHES_PER_LOCK).rev() {
                self.apply_delta_chunk(id, ratio, DeltaChunk::Removed(chunk), observed);
            }
        }
        for run in delta.stored.iter() {
            for chunk in run.chunks(MAX_HASHES_PER_LOCK) {
                self.apply_delta_chunk(id, ratio, DeltaChunk::Stored(chunk), observed);
            }
        }
    }

    /// Applies one part of a cache delta in one critical section. Sets the engine block ratio
    /// unless `ratio` is 0. Advances the router's time if the change is live, even if the worker
    /// does not use events.
    fn apply_delta_chunk(
        &self,
        id: WorkerId,
        ratio: u32,
        chunk: DeltaChunk<'_>,
        observed: Observed,
    ) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Observed::Live(now) = observed {
            state.advance_to(now);
        }
        let is_event_tracked = state
            .workers
            .get(id)
            .is_some_and(|worker| worker.cache_source() == CacheSource::Events);
        if let Some(ratio) = NonZeroU32::new(ratio).filter(|_| is_event_tracked) {
            state.workers.set_engine_block_ratio(id, ratio);
        }
        if let Some((worker, _)) = state.workers.get_mut(id).filter(|_| is_event_tracked) {
            state
                .tree
                .acknowledge(id.index, worker.estimated_cache.last_epoch());
            let cached_blocks = &mut worker.event_cached_blocks;
            match chunk {
                DeltaChunk::Removed(run) => {
                    state
                        .event_index
                        .remove(id.index, ratio, run, cached_blocks);
                    let hashes = run.changed().iter().copied();
                    state.pending_evictions.acknowledge(id.index, hashes);
                }
                DeltaChunk::Stored(run) => {
                    state.event_index.add(id.index, ratio, run, cached_blocks);
                    let hashes = run.changed().iter().copied();
                    state.pending_evictions.acknowledge(id.index, hashes);
                    if matches!(observed, Observed::Live(_)) {
                        state.on_blocks_stored(id, run);
                    }
                }
            }
        }
        // An event stream without pauses would otherwise take the lock again before a waiting
        // thread wakes up.
        unlock_fair(guard);
    }

    /// Returns the number of distinct blocks that KV events reported as cached by some worker.
    #[must_use]
    pub fn indexed_blocks(&self) -> usize {
        self.state.lock().event_index.len()
    }

    /// Chooses a worker for the request and books it there, in one step. If the router has a
    /// [queue](crate::queue), the request may be sent only after [`Booking::poll_dispatch`] returns
    /// `Ready`.
    ///
    /// # Errors
    /// [`RouteError::UnknownModel`] if the models of all workers are known and none serves this
    /// one. [`RouteError::NoWorker`] if every worker that may serve it is unhealthy, draining or
    /// excluded, or if the router has no workers.
    pub fn route(&self, request: &Request<'_>, now: Duration) -> Result<Booking, RouteError> {
        let mut state = self.state.lock();
        state.advance_to(now);
        let (worker, assessment) = state.choose(request)?;
        let (id, decision) = state.book_on_arrival(worker, &assessment, request);
        // Cloned under the lock, because the reference count shares a cache line with it.
        let shared = self.state.clone();
        unlock(state);
        Ok(Booking::new(shared, id, worker, decision, request))
    }

    /// Chooses one worker for a request with several prompts and books every prompt there, in one
    /// step.
    ///
    /// `request` has the first prompt, `further` the others: fewer than
    /// [`MAX_BATCH_PROMPTS`](crate::batch::MAX_BATCH_PROMPTS). With several prompts, all are booked
    /// as sent at once. Without `further` prompts, the request may be queued, as by
    /// [`route`](Self::route).
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn route_batch(
        &self,
        request: &Request<'_>,
        further: &[Sequence],
        now: Duration,
    ) -> Result<Batch, RouteError> {
        if further.is_empty() {
            let booking = self.route(request, now)?;
            let (worker, decision) = (booking.worker(), *booking.decision());
            return Ok(Batch::new(std::iter::once(booking), worker, decision));
        }
        let batch = BatchRequest::from_request(request, further);
        let mut state = self.state.lock();
        state.advance_to(now);
        let costs = state.batch_costs(&batch);
        let worker = state.select_for_batch(&batch, &costs)?;
        let booked = state.book_batch(worker, &batch);
        state.record_batch_arrival(request, booked.iter().map(|(id, _)| *id));
        unlock(state);
        let bookings = booked
            .into_iter()
            .zip(batch.requests())
            .map(|((id, decision), request)| {
                Booking::new(self.state.clone(), id, worker, decision, request)
            });
        Ok(Batch::new(bookings, worker, costs.decision(worker)))
    }

    /// Returns the costs that [`route`](Self::route) would compare. Books nothing and draws no
    /// random number.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn explain(&self, request: &Request<'_>, now: Duration) -> Result<Explanation, RouteError> {
        self.explain_batch(request, &[], now)
    }

    /// Returns the costs that [`route_batch`](Self::route_batch) would compare. Prefix matches and
    /// costs are sums over the prompts. Books nothing and draws no random number. With several
    /// prompts, replication is not considered.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn explain_batch(
        &self,
        request: &Request<'_>,
        further: &[Sequence],
        now: Duration,
    ) -> Result<Explanation, RouteError> {
        let batch = BatchRequest::from_request(request, further);
        let mut state = self.state.lock();
        state.advance_to(now);
        let explanation = state.explain(&batch);
        unlock(state);
        explanation
    }

    /// Returns a snapshot of every worker.
    #[must_use]
    pub fn workers(&self, now: Duration) -> Vec<WorkerSnapshot> {
        let mut state = self.state.lock();
        state.advance_to(now);
        let snapshots = state.workers.snapshot(state.now);
        unlock(state);
        snapshots
    }

    /// Returns whether at least one worker can be chosen.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let state = self.state.lock();
        state
            .workers
            .eligible("")
            .is_some_and(|eligible| !eligible.is_empty())
    }

    /// Returns the number of requests that are queued at the router.
    #[must_use]
    pub fn queued_requests(&self) -> usize {
        self.state.lock().queue.queued_total
    }

    /// Dispatches queued requests whose worker can take them at `now`.
    ///
    /// Must be called every few milliseconds if requests are [queued](crate::queue): the router
    /// does not observe every event that frees a worker. The end of a prefill whose response does
    /// not stream, for instance, is only forecast. Without queued requests the call has no effect,
    /// and `now` is ignored.
    pub fn tick(&self, now: Duration) {
        let mut state = self.state.lock();
        if state.queue.queued_total > 0 {
            state.advance_to(now);
            for worker in 0..state.workers.index_len() as WorkerIndex {
                state.try_dispatch_next(worker);
            }
        }
        unlock(state);
    }

    /// Returns how accurate the forecasts of output lengths were.
    #[must_use]
    pub fn output_length_accuracy(&self) -> OutputLengthAccuracy {
        self.state.lock().output_length.accuracy()
    }

    /// Returns the number of bookings on all workers.
    #[must_use]
    pub fn booking_count(&self) -> usize {
        self.state.lock().bookings.len()
    }

    /// Returns the number of nodes in the trees of active and of queued prefixes. The router's
    /// memory is proportional to it.
    #[must_use]
    pub fn prefix_tree_nodes(&self) -> usize {
        let state = self.state.lock();
        state.tree.len() + state.queued_prefixes.len()
    }
}
