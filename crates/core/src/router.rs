//! The router: assess, choose and book a request in one step under one lock.
//!
//! [`Router`] owns everything that a decision reads, so a decision sees every booking that any
//! thread made before it.
//!
//! The router reads no clock. Every `now` is the time since an epoch of the caller's choice, and
//! should not go backwards.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_forecast::{OutputLengthAccuracy, OutputLengthModel};
use foresee_prefix::event_index::{CacheDelta, PrefixRun};
use foresee_prefix::sequence::Sequence;
use foresee_prefix::{EvictionRule, WorkerIndex};

use crate::batch::{Batch, BatchRequest};
use crate::booking::Booking;
pub use crate::config::{ConfigError, RouterConfig, RouterTuning};
pub use crate::critical_section::LockObserver;
use crate::critical_section::SharedState;
use crate::learned::{InvalidLearned, Learned};
use crate::model_name::ModelName;
pub use crate::observed::Observed;
pub use crate::request::{Candidate, Explanation, MAX_MODEL_NAME_BYTES, Request, RouteError};
use crate::request::{PreparedRequest, SelectError};
use crate::state::State;
use crate::worker_id::WorkerId;
use crate::workers::{
    Earlier, Worker, WorkerError, WorkerSnapshot, WorkerSpec, WorkerState, Workers, distinct_models,
};
pub use foresee_prefix::CacheSource;

/// Hashes of a cache delta that are applied in one critical section. 64 take about two
/// microseconds, so a waiting thread acquires the lock by spinning and does not go to sleep.
const MAX_HASHES_PER_LOCK: usize = 64;

/// Number of workers that one critical section visits when all are to be visited.
const MAX_WORKERS_PER_LOCK: usize = 32;

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
    /// [`ConfigError`] if a weight or the temperature is negative, not a number, or above 10⁶, or if
    /// a failure rate or a fraction of workers is not from 0 to 1.
    pub fn new(config: RouterConfig) -> Result<Self, ConfigError> {
        Self::with_observer(config, None)
    }

    /// Returns a router like [`new`](Self::new) whose lock is observed, for measurements.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[doc(hidden)]
    pub fn with_lock_observer(
        config: RouterConfig,
        observer: Arc<dyn LockObserver>,
    ) -> Result<Self, ConfigError> {
        Self::with_observer(config, Some(observer))
    }

    /// Checks `config`, and returns a router without workers.
    fn with_observer(
        config: RouterConfig,
        observer: Option<Arc<dyn LockObserver>>,
    ) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            state: SharedState::new(State::new(config), observer),
        })
    }

    /// Changes the settings that can change while the router runs. They apply from the next decision
    /// on.
    ///
    /// # Errors
    /// [`ConfigError`] if a weight or the temperature is negative, not a number, or above 10⁶. Then
    /// nothing changes.
    pub fn set_tuning(&self, tuning: RouterTuning) -> Result<(), ConfigError> {
        tuning.check()?;
        self.state.lock().set_tuning(tuning);
        Ok(())
    }

    /// Returns what the router has learned. Models without a sample are left out.
    #[must_use]
    pub fn learned(&self) -> Learned {
        let state = self.state.lock();
        let (models, workers) = state.workers.learned(state.now);
        Learned {
            models,
            workers,
            output_lengths: state.output_length.learned(),
        }
    }

    /// Lets the router start with what an earlier router has learned. Applies to workers and models
    /// with the same names that are added afterwards.
    ///
    /// # Errors
    /// Fails if a number is not finite or out of range. Then nothing changes.
    pub fn restore(&self, learned: &Learned) -> Result<(), InvalidLearned> {
        let earlier = Earlier::new(learned)?;
        let lengths = OutputLengthModel::restore(&learned.output_lengths)?;
        let mut state = self.state.lock();
        state.workers.set_earlier(earlier);
        state.output_length = lengths;
        Ok(())
    }

    /// Returns the state that all handles of this router share.
    pub(crate) fn shared(&self) -> &SharedState {
        &self.state
    }

    /// Adds a worker. It is unhealthy until [`set_healthy`](Self::set_healthy) changes that.
    ///
    /// # Errors
    /// If the name is taken or the router has [`MAX_WORKERS`](crate::workers::MAX_WORKERS)
    /// workers.
    pub fn add_worker(&self, spec: WorkerSpec) -> Result<WorkerId, WorkerError> {
        let models = distinct_models(spec.models.clone());
        let mut state = self.state.lock();
        let now = state.now;
        let id = state.workers.add(&spec, models, now)?;
        // An ejected worker of unknown models may be the only one for a model of the new one.
        state.workers.enforce_ejection_limit(now);
        let WorkerSpec {
            prefix_caching,
            eviction,
            capacity_blocks,
            ..
        } = spec;
        state
            .prefixes
            .add_worker(id.index, prefix_caching, eviction, capacity_blocks);
        Ok(id)
    }

    /// Removes a worker with all its bookings and returns whether it existed. A [`Booking`] that
    /// outlives its worker releases nothing. Requests in its queue choose another worker when they
    /// are polled next. `false` means that it was removed before.
    ///
    /// The worker disappears at once. Its blocks and bookings are then removed in many critical
    /// sections, so that no decision waits for the whole of it.
    pub fn remove_worker(&self, id: WorkerId) -> bool {
        self.state.remove_worker(id)
    }

    /// Sets whether a worker can be chosen.
    pub fn set_healthy(&self, id: WorkerId, healthy: bool) {
        self.update_worker(id, |workers| workers.set_healthy(id, healthy));
    }

    /// Sets whether a worker only finishes its present requests and receives no new ones.
    pub fn set_draining(&self, id: WorkerId, draining: bool) {
        self.update_worker(id, |workers| workers.set_draining(id, draining));
    }

    /// Applies a state change, then revisits queues. A healthy worker is sent its next request. If
    /// the state has changed, requests queued for workers that accept none choose again: those of
    /// this worker if it accepts none any more, and those of all others if it does from now on. Has
    /// no effect if the worker was removed.
    fn update_worker(&self, id: WorkerId, change: impl FnOnce(&mut Workers)) {
        let mut state = self.state.lock();
        let now = state.now;
        let before = state.workers.get(id).map(Worker::state);
        change(&mut state.workers);
        state.workers.enforce_ejection_limit(now);
        let after = state.workers.get(id).map(Worker::state);
        if matches!(after, Some(WorkerState::Healthy | WorkerState::Ejected)) {
            state.try_dispatch_next(id.index);
        }
        drop(state);
        match after {
            Some(_) if before == after => {}
            Some(WorkerState::Healthy | WorkerState::Ejected) => {
                self.state.offer_stranded_requests();
            }
            Some(_) => self.state.offer_queue_to_others(id),
            None => {}
        }
    }

    /// Sets the models that a worker serves. An empty list means that they are unknown.
    pub fn set_models(&self, id: WorkerId, models: Vec<String>) {
        let models = distinct_models(models);
        let mut state = self.state.lock();
        let now = state.now;
        state.workers.set_models(id, models, now);
        state.workers.enforce_ejection_limit(now);
    }

    /// Sets a worker's cache capacity, in the router's blocks, as reported by its engine. Replaces
    /// a configured or learned capacity, and evicts what no longer fits from the estimated cache,
    /// if that is much, in several critical sections. Has no effect if the worker was removed.
    pub fn set_capacity(&self, id: WorkerId, blocks: u32) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some((pending_work, _)) = state.workers.pending_work_mut(id) {
            state.prefixes.set_capacity(id.index, blocks);
            pending_work.capacity = state.prefixes.estimated_capacity(id.index);
        }
        drop(guard);
        self.state.evict_to_fit(id);
    }

    /// Sets how many router blocks one block of the worker's engine holds. Has no effect if the
    /// worker was removed.
    pub fn set_engine_block_ratio(&self, id: WorkerId, ratio: NonZeroU32) {
        let mut state = self.state.lock();
        if state.workers.get(id).is_some() {
            state.prefixes.set_engine_block_ratio(id.index, ratio);
        }
    }

    /// Sets the rule by which a worker's engine chooses the blocks that it evicts. Affects later
    /// evictions, and whether requests of one engine step share blocks. Has no effect if the worker
    /// was removed.
    pub fn set_eviction(&self, id: WorkerId, eviction: EvictionRule) {
        let mut state = self.state.lock();
        if state.workers.get(id).is_some() {
            state.prefixes.set_eviction(id.index, eviction);
        }
    }

    /// Clears the estimate of a worker's cache, because its engine restarted or dropped its cache.
    /// Bookings stay. Blocks that KV events reported stay too, until
    /// [`apply_cache_delta`](Self::apply_cache_delta) removes them. Has no effect if the worker was
    /// removed.
    pub fn clear_cache(&self, id: WorkerId) {
        let mut state = self.state.lock();
        if state.workers.get(id).is_some() {
            state.prefixes.clear(id.index);
        }
        drop(state);
        self.state.evict_lost_blocks(id);
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
        if state.workers.get(id).is_none() {
            return;
        }
        let change = state.prefixes.set_source(id.index, source);
        drop(state);
        let Some(change) = change else {
            return;
        };
        self.state.evict_lost_blocks(id);
        if let Some(cursor) = change.lost_events {
            self.state.remove_lost_events(id.index, cursor);
        }
    }

    /// Applies a change of a worker's cache that its KV events reported. Has no effect on a worker
    /// whose [cache source](Self::set_cache_source) is the estimate, or that was removed. Sets the
    /// worker's engine block ratio to that of the delta, unless that is 0. A live change advances
    /// the router's time in any case.
    ///
    /// A large delta is applied in several critical sections, so that no decision waits for the
    /// whole of it. A decision in between sees the cache partly updated.
    ///
    /// Pass an empty delta for events that change nothing, such as repeated stores: they show that
    /// the engine has not evicted what earlier bookings were expected to evict.
    pub fn apply_cache_delta(&self, id: WorkerId, delta: &CacheDelta, observed: Observed) {
        let ratio = delta.engine_block_ratio;
        if delta.removed.is_empty() && delta.stored.is_empty() {
            let mut state = self.state.lock();
            if state.workers.get(id).is_some() {
                state.prefixes.acknowledge_events(id.index);
            }
        }
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
        let is_event_tracked = state.workers.get(id).is_some()
            && state.prefixes.source(id.index) == CacheSource::Events;
        if is_event_tracked {
            if let Some(ratio) = NonZeroU32::new(ratio) {
                state.prefixes.set_engine_block_ratio(id.index, ratio);
            }
            match chunk {
                DeltaChunk::Removed(run) => state.prefixes.apply_removed(id.index, ratio, run),
                DeltaChunk::Stored(run) => {
                    state.prefixes.apply_stored(id.index, ratio, run);
                    if matches!(observed, Observed::Live(_)) {
                        state.on_blocks_stored(id, run);
                    }
                }
            }
        }
        // An event stream without pauses would otherwise take the lock again before a waiting
        // thread wakes up.
        guard.unlock_fair();
    }

    /// Returns the number of distinct blocks that KV events reported as cached by some worker.
    #[must_use]
    pub fn indexed_blocks(&self) -> usize {
        self.state.lock().prefixes.indexed_blocks()
    }

    /// Returns the number of output tokens that are expected of the request; 0 if it is invalid.
    #[must_use]
    pub fn expected_output_tokens(&self, request: &Request<'_>) -> u32 {
        let prepared = PreparedRequest::new(request, self.state.block_size());
        prepared.map_or(0, |request| {
            self.state.lock().expected_output_tokens(&request)
        })
    }

    /// Chooses a worker for the request and books it there, in one step. If the router has a
    /// [queue](crate::queue), the request may be sent only after [`Booking::poll_dispatch`] returns
    /// `Ready`.
    ///
    /// # Errors
    /// [`RouteError::UnknownModel`] if the models of all workers are known and none serves this
    /// one, or if its name is too long. [`RouteError::Backpressure`] if workers could be chosen were
    /// it not for their backpressure. [`RouteError::NoWorker`] if every worker that may serve it is
    /// unhealthy, draining or excluded, or if the router has no workers.
    /// [`RouteError::QueueFull`] if the request would have to be queued and the
    /// [queue limit](RouterConfig::queue_limit) is reached. [`RouteError::BlockSizeMismatch`] if the
    /// prompt has another block size than the router.
    pub fn route(&self, request: &Request<'_>, now: Duration) -> Result<Booking, RouteError> {
        let request = PreparedRequest::new(request, self.state.block_size())?;
        self.book_on_arrival(&request, now)
            .map_err(|error| error.for_model(request.model))
    }

    /// Chooses a worker for the request and books it there, in one critical section.
    fn book_on_arrival(
        &self,
        request: &PreparedRequest<'_>,
        now: Duration,
    ) -> Result<Booking, SelectError> {
        let mut state = self.state.lock();
        state.advance_to(now);
        let (worker, assessment) = state.choose(request)?;
        let (id, decision) = state.book_on_arrival(worker, &assessment, request)?;
        // Cloned under the lock, because the reference count shares a cache line with it.
        let shared = self.state.clone();
        drop(state);
        Ok(Booking::new(shared, id, worker, decision, request))
    }

    /// Chooses one worker for a request with several prompts and books every prompt there.
    ///
    /// `request` has the first prompt, `further` the others: fewer than
    /// [`MAX_BATCH_PROMPTS`](crate::batch::MAX_BATCH_PROMPTS). With several prompts, all are booked
    /// as sent at once. Without `further` prompts, the request may be queued, as by
    /// [`route`](Self::route).
    ///
    /// A few prompts are chosen for and booked in one critical section. Many take several of them,
    /// and decisions in between see a part of the batch.
    ///
    /// # Errors
    /// As [`route`](Self::route). [`RouteError::TooManyPrompts`] if there are more prompts than
    /// [`MAX_BATCH_PROMPTS`](crate::batch::MAX_BATCH_PROMPTS).
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
        let request = PreparedRequest::new(request, self.state.block_size())?;
        let batch = BatchRequest::new(request, further, self.state.block_size())?;
        self.state
            .route_batch(&batch, now)
            .map_err(|error| error.for_model(request.model))
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
        let request = PreparedRequest::new(request, self.state.block_size())?;
        let batch = BatchRequest::new(request, further, self.state.block_size())?;
        self.state
            .explain_batch(&batch, now)
            .map_err(|error| error.for_model(request.model))
    }

    /// Returns a snapshot of every worker. Many workers are read in several critical sections, so
    /// requests may be booked in between.
    #[must_use]
    pub fn workers(&self, now: Duration) -> Vec<WorkerSnapshot> {
        let worker_count = self.state.lock().workers.index_len();
        // Allocated without the lock.
        let mut snapshots = Vec::with_capacity(worker_count);
        let mut next = 0;
        loop {
            let mut state = self.state.lock();
            state.advance_to(now);
            let part = next..next + MAX_WORKERS_PER_LOCK;
            next = part.end;
            state
                .workers
                .snapshot(part, &state.prefixes, state.now, &mut snapshots);
            if next >= state.workers.index_len() {
                return snapshots;
            }
            state.unlock_fair();
        }
    }

    /// Returns whether a worker is ejected: see [`outlier`](crate::outlier). `false` if it was
    /// removed.
    #[must_use]
    pub fn is_ejected(&self, id: WorkerId) -> bool {
        let state = self.state.lock();
        state.workers.get(id).is_some_and(Worker::is_ejected)
    }

    /// Returns whether at least one worker can be chosen.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let state = self.state.lock();
        state
            .workers
            .eligible(ModelName::ANY)
            .is_some_and(|eligible| !eligible.is_empty())
    }

    /// Returns the number of requests that are queued at the router.
    #[must_use]
    pub fn queued_requests(&self) -> usize {
        self.state.lock().dispatcher.queued_total
    }

    /// Dispatches queued requests whose worker can take them at `now`.
    ///
    /// Must be called every few milliseconds if requests are [queued](crate::queue): the router
    /// does not observe every event that frees a worker. The end of a prefill whose response does
    /// not stream, for instance, is only forecast. Without queued requests the call has no effect,
    /// and `now` is ignored.
    pub fn tick(&self, now: Duration) {
        let mut next = 0;
        loop {
            let mut state = self.state.lock();
            if state.dispatcher.queued_total == 0 {
                return;
            }
            state.advance_to(now);
            let end = state.workers.index_len();
            let part = next..end.min(next + MAX_WORKERS_PER_LOCK);
            next = part.end;
            for worker in part {
                state.try_dispatch_next(worker as WorkerIndex);
            }
            if next == end {
                return;
            }
            state.unlock_fair();
        }
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

    /// Returns the number of nodes in the tree of active and queued prefixes. The router's
    /// memory is proportional to it.
    #[must_use]
    pub fn prefix_tree_nodes(&self) -> usize {
        self.state.lock().prefixes.tree_nodes()
    }
}
