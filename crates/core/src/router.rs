//! The router: read, choose and book in one step under one lock.
//!
//! [`Router`] owns everything the decision reads, so what a decision sees includes every booking
//! made before it, by any thread.
//!
//! The router reads no clock. Every `now` is the time since an epoch of the caller's choice, and
//! should not go backwards.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::batch::{Batch, Members};
use crate::booking::Booking;
use crate::cache::{Changes, Path};
use crate::config::MOST_WEIGHT;
pub use crate::config::{ConfigError, RouterConfig};
use crate::fleet::{Fleet, Worker, WorkerError, WorkerId, WorkerSnapshot, WorkerSpec, WorkerState};
use crate::forecast::lengths::LengthForecast;
pub use crate::request::{Candidate, Explanation, Request, RouteError};
use crate::sequence::Sequence;
use crate::shadow::Eviction;
use crate::state::{Locked, State, release, release_fair};
use crate::tree::Slot;

/// Prefixes that are told under one lock, at most. That takes some two microseconds: whoever
/// waits is better off spinning than asleep.
const MOST_TOLD_AT_ONCE: usize = 64;

/// What events say of one worker's cache.
enum Told<'a> {
    Removed(Path<'a>),
    Added(Path<'a>),
}

/// Predicts load and cache of a fleet and places requests on it. A handle: clones share one
/// state.
#[derive(Clone, Debug)]
pub struct Router {
    state: Locked,
}

impl Router {
    /// A router without workers.
    ///
    /// # Errors
    /// If the weight or the temperature is negative, not a number, or absurdly large.
    pub fn new(config: RouterConfig) -> Result<Self, ConfigError> {
        for (field, value) in [
            ("overlap-weight", config.overlap_weight),
            ("ttft-weight", config.ttft_weight),
            ("temperature", config.temperature),
        ] {
            if !(0.0..=MOST_WEIGHT).contains(&value) {
                return Err(ConfigError { field, value });
            }
        }
        Ok(Self {
            state: Locked::new(State::new(config)),
        })
    }

    /// Adds a worker. It is unhealthy until [`set_healthy`](Self::set_healthy) says otherwise.
    ///
    /// # Errors
    /// If the name is taken or there are [`MAX_WORKERS`](crate::fleet::MAX_WORKERS) already.
    pub fn add_worker(&self, spec: WorkerSpec) -> Result<WorkerId, WorkerError> {
        let shares = spec.eviction == Eviction::Queue;
        let mut state = self.state.lock();
        let id = state.fleet.add(spec)?;
        state.tree.set_shares(id.slot, shares);
        Ok(id)
    }

    /// Forgets a worker and all that was booked on it. Bookings that outlive it free nothing.
    /// Returns whether it was known.
    pub fn remove_worker(&self, id: WorkerId) -> bool {
        let mut state = self.state.lock();
        state.close_line(id);
        let known = state.fleet.remove(id);
        if known {
            state.tree.forget_worker(id.slot);
            state.lined_up.forget_worker(id.slot);
            state.cache.forget_worker(id.slot);
            state.foreseen.forget(id.slot);
        }
        release(state);
        known
    }

    /// Says whether a worker can be chosen.
    pub fn set_healthy(&self, id: WorkerId, healthy: bool) {
        self.change(id, |fleet| fleet.set_healthy(id, healthy));
    }

    /// Says whether a worker only finishes what it has.
    pub fn set_draining(&self, id: WorkerId, draining: bool) {
        self.change(id, |fleet| fleet.set_draining(id, draining));
    }

    /// Whoever waits for a worker is told what becomes of it.
    fn change(&self, id: WorkerId, change: impl FnOnce(&mut Fleet)) {
        let mut state = self.state.lock();
        change(&mut state.fleet);
        match state.fleet.get(id).map(Worker::state) {
            Some(WorkerState::Healthy) => state.let_go(id.slot),
            _ => state.invite_all(id),
        }
        release(state);
    }

    /// Says which models a worker serves; none means unknown.
    pub fn set_models(&self, id: WorkerId, models: Vec<String>) {
        self.state.lock().fleet.set_models(id, models);
    }

    /// Says how many KV blocks a worker has.
    pub fn set_capacity(&self, id: WorkerId, blocks: u32) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some((worker, load)) = state.fleet.get_mut(id) {
            worker.shadow.set_capacity(blocks);
            worker.shadow.make_room(
                load.active_blocks,
                id.slot,
                &mut state.tree,
                &mut state.foreseen,
            );
            let capacity = worker.known_capacity();
            if let Some((outlook, _)) = state.fleet.outlook_mut(id) {
                outlook.capacity = capacity;
            }
        }
        release(guard);
    }

    /// Says that one of the blocks of a worker's engine is `stride` of the router's.
    pub fn set_stride(&self, id: WorkerId, stride: NonZeroU32) {
        self.state.lock().fleet.set_stride(id, stride);
    }

    /// Says how a worker chooses what to evict.
    pub fn set_eviction(&self, id: WorkerId, eviction: Eviction) {
        let mut state = self.state.lock();
        if let Some((worker, _)) = state.fleet.get_mut(id) {
            worker.shadow.set_eviction(eviction);
            state.tree.set_shares(id.slot, eviction == Eviction::Queue);
        }
    }

    /// A worker lost its cache: it was restarted, or told to drop it. What is booked stays.
    pub fn forget_cache(&self, id: WorkerId) {
        let mut state = self.state.lock();
        if let Some((worker, _)) = state.fleet.get_mut(id) {
            worker.shadow.clear();
            state.tree.forget_computed(id.slot);
            state.foreseen.forget(id.slot);
        }
        release(state);
    }

    /// Says who tells what a worker caches from now on: its events
    /// ([`update_cache`](Self::update_cache)), or the shadow of what is sent to it. Either begins
    /// with an empty cache. Where the worker's capacity is known, blocks that its events still tell
    /// of are not counted on if requests booked before will take them.
    pub fn follow_events(&self, id: WorkerId, follows: bool) {
        let mut state = self.state.lock();
        if let Some((worker, _)) = state.fleet.get_mut(id)
            && worker.shadow.is_told() != follows
        {
            worker.shadow.clear();
            worker.shadow.set_told(follows);
            worker.told = 0;
            let told = if follows {
                worker.shadow.last_stamp()
            } else {
                0
            };
            state.tree.forget_computed(id.slot);
            state.tree.set_told(id.slot, told);
            state.cache.forget_worker(id.slot);
            state.foreseen.forget(id.slot);
        }
        release(state);
    }

    /// A worker's events said that its cache changed: by `now`, if it just did; else that is what
    /// they say it has held for some time, which tells nothing of how far requests are. Means
    /// nothing for a worker that does not [follow events](Self::follow_events).
    ///
    /// Of many changes, some are told at a time, so that no decision waits for all: meanwhile it
    /// may find the cache between what it was and what it is.
    pub fn update_cache(&self, id: WorkerId, changes: &Changes, now: Option<Duration>) {
        for path in changes.removed.iter() {
            // Tails first, so that what is left is a prefix.
            for piece in path.pieces(MOST_TOLD_AT_ONCE).rev() {
                self.tell(id, changes.stride, Told::Removed(piece), now);
            }
        }
        for path in changes.added.iter() {
            for piece in path.pieces(MOST_TOLD_AT_ONCE) {
                self.tell(id, changes.stride, Told::Added(piece), now);
            }
        }
    }

    fn tell(&self, id: WorkerId, stride: u32, told: Told<'_>, now: Option<Duration>) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(now) = now {
            state.advance(now);
        }
        let worker = state.fleet.get(id);
        let is_told = worker.is_some_and(|it| it.shadow.is_told());
        if let Some(stride) = NonZeroU32::new(stride).filter(|_| is_told) {
            state.fleet.set_stride(id, stride);
        }
        if let Some((worker, _)) = state.fleet.get_mut(id).filter(|_| is_told) {
            state.tree.set_told(id.slot, worker.shadow.last_stamp());
            match told {
                Told::Removed(path) => {
                    state.cache.remove(id.slot, stride, path, &mut worker.told);
                    let hashes = path.told().iter().copied();
                    state.foreseen.settle(id.slot, hashes);
                }
                Told::Added(path) => {
                    state.cache.add(id.slot, stride, path, &mut worker.told);
                    let hashes = path.told().iter().copied();
                    state.foreseen.settle(id.slot, hashes);
                    if now.is_some() {
                        state.stored(id, path);
                    }
                }
            }
        }
        // A stream of events that never pauses would else take the lock again and again before
        // whoever waits for it wakes.
        release_fair(guard);
    }

    /// Prefixes that some worker's events say it caches.
    #[must_use]
    pub fn cached_prefixes(&self) -> usize {
        self.state.lock().cache.len()
    }

    /// Chooses a worker for the request and books it there, in one step.
    ///
    /// # Errors
    /// If no worker serves the model, or none that does is available.
    pub fn route(&self, request: &Request<'_>, now: Duration) -> Result<Booking, RouteError> {
        let mut state = self.state.lock();
        state.advance(now);
        let (worker, reading) = state.choose(request)?;
        let (key, decision) = state.book_and_enter(worker, &reading, request);
        // Under the lock, whose cache line the reference count shares.
        let shared = self.state.clone();
        release(state);
        Ok(Booking::new(shared, key, worker, decision, request))
    }

    /// Chooses one worker for the request and for others like it with the `further` prompts, of
    /// which there are less than [`MOST_IN_BATCH`](crate::batch::MOST_IN_BATCH), and books each
    /// there, in one step.
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
        let members = Members::like(request, further);
        let mut state = self.state.lock();
        state.advance(now);
        let sums = state.sum(&members);
        let worker = state.choose_for_all(&members, &sums)?;
        let booked = state.book_all(worker, &members);
        state.came_and_was_sent(request, booked.iter().map(|(key, _)| *key));
        release(state);
        let bookings =
            booked
                .into_iter()
                .zip(members.requests())
                .map(|((key, decision), request)| {
                    Booking::new(self.state.clone(), key, worker, decision, request)
                });
        Ok(Batch::new(bookings, worker, sums.decision(worker)))
    }

    /// What [`route`](Self::route) would look at. Books nothing and draws no random number.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn explain(&self, request: &Request<'_>, now: Duration) -> Result<Explanation, RouteError> {
        self.explain_batch(request, &[], now)
    }

    /// What [`route_batch`](Self::route_batch) would look at. Depths and costs are sums over the
    /// prompts.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn explain_batch(
        &self,
        request: &Request<'_>,
        further: &[Sequence],
        now: Duration,
    ) -> Result<Explanation, RouteError> {
        let members = Members::like(request, further);
        let mut state = self.state.lock();
        state.advance(now);
        let explanation = state.explain(&members);
        release(state);
        explanation
    }

    /// Every worker as it stands.
    #[must_use]
    pub fn workers(&self, now: Duration) -> Vec<WorkerSnapshot> {
        let mut state = self.state.lock();
        state.advance(now);
        let snapshots = state.fleet.snapshot(state.now);
        release(state);
        snapshots
    }

    /// Whether some worker can be chosen.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let state = self.state.lock();
        state
            .fleet
            .eligible("")
            .is_some_and(|slots| !slots.is_empty())
    }

    /// Requests that wait here for their worker to have room.
    #[must_use]
    pub fn held_requests(&self) -> usize {
        self.state.lock().queue.held
    }

    /// Time has passed: sends those whose worker has room by now. To be called every few
    /// milliseconds if there is a [queue](crate::queue), because not everything that makes room is
    /// seen: a prompt whose answer does not stream is only forecast to be computed.
    pub fn tick(&self, now: Duration) {
        let mut state = self.state.lock();
        if state.queue.held > 0 {
            state.advance(now);
            for slot in 0..state.fleet.slots() as Slot {
                state.let_go(slot);
            }
        }
        release(state);
    }

    /// How well lengths of answers are forecast.
    #[must_use]
    pub fn length_forecast(&self) -> LengthForecast {
        self.state.lock().output_length.forecast()
    }

    /// Bookings that exist now, on whatever worker.
    #[must_use]
    pub fn bookings(&self) -> usize {
        self.state.lock().bookings.len()
    }

    /// Runs of blocks the router distinguishes: what its memory is proportional to.
    #[must_use]
    pub fn tracked_edges(&self) -> usize {
        let state = self.state.lock();
        state.tree.len() + state.lined_up.len()
    }
}
