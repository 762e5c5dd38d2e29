//! Read, choose, book: one decision is one step under one lock.
//!
//! [`Router`] owns everything the decision reads, so what a decision sees includes every booking
//! made before it, by any thread. Work proportional to a prompt (hashing, tokenising, allocating)
//! is done before the lock is taken, freeing after it is released.
//!
//! The router reads no clock. Every `now` is the time since an epoch of the caller's choice, and
//! should not go backwards.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use slab::Slab;
use smallvec::SmallVec;

use crate::booking::{Booking, BookingKey, Record};
use crate::choose::{Decision, Field, Policy};
use crate::cost::{Cost, Demand};
use crate::fleet::{Fleet, WorkerError, WorkerId, WorkerSnapshot, WorkerSpec};
use crate::forecast::OutputLength;
use crate::sequence::Sequence;
use crate::tree::{Chain, Depth, Match, PrefixTree, Slot};

/// vLLM's own, in tokens.
const DEFAULT_BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();

/// How a router decides.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// How a worker is chosen.
    pub policy: Policy,
    /// What a block to compute costs, in active blocks; 0 is pure load balancing.
    pub overlap_weight: f64,
    /// 0 takes the least cost; above, workers are sampled by softmax over costs.
    pub temperature: f64,
    /// Tokens per KV block, as the engines have it.
    pub block_size: NonZeroU32,
    /// Fixes every random choice.
    pub seed: u64,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            policy: Policy::Kv,
            overlap_weight: 1.0,
            temperature: 0.0,
            block_size: DEFAULT_BLOCK_SIZE,
            seed: 0,
        }
    }
}

/// Far more than anybody needs, and little enough to keep every cost finite.
const MOST_WEIGHT: f64 = 1e6;

/// A setting outside its range.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{field}` is {value}: it must be a number from 0 to {MOST_WEIGHT}")]
pub struct ConfigError {
    /// The setting, as the command line names it.
    pub field: &'static str,
    /// What it was set to.
    pub value: f64,
}

/// Why no worker was chosen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RouteError {
    /// Workers are known, and none of them serves this model.
    #[error("no worker serves the model `{0}`")]
    UnknownModel(String),
    /// Every worker that serves the model is unhealthy, draining, or was excluded.
    #[error("no worker is available for the model `{0}`")]
    NoWorker(String),
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Model name; empty accepts any worker.
    pub model: &'a str,
    /// The prompt.
    pub sequence: &'a Sequence,
    /// The most output tokens it may produce.
    pub max_tokens: Option<u32>,
    /// Whether its output will be watched. If not, its progress is forecast.
    pub streams: bool,
    /// Workers not to choose: those that failed it already.
    pub excluded: &'a [WorkerId],
}

impl<'a> Request<'a> {
    /// A streamed request for any model, with no other wish.
    #[must_use]
    pub fn new(sequence: &'a Sequence) -> Self {
        Self {
            model: "",
            sequence,
            max_tokens: None,
            streams: true,
            excluded: &[],
        }
    }
}

/// One worker in an [`Explanation`].
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The worker.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// Requests booked on it.
    pub requests: u32,
    /// Its active blocks before this request.
    pub active_blocks: u64,
    /// How deep the prompt reaches there.
    pub depth: Depth,
    /// The parts of its cost.
    pub cost: Cost,
    /// How likely `kv` is to choose it, as things stand.
    pub probability: f64,
}

/// How a request would be decided now.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The policy that decides. Costs and probabilities are those of `kv`.
    pub policy: Policy,
    /// Weight of the prefill blocks in the cost.
    pub overlap_weight: f64,
    /// Temperature of the choice.
    pub temperature: f64,
    /// Every eligible worker, in the order they joined.
    pub candidates: Vec<Candidate>,
}

/// Predicts load and cache of a fleet and places requests on it. A handle: clones share one
/// state.
#[derive(Clone, Debug)]
pub struct Router {
    state: Arc<Mutex<State>>,
}

/// Everything behind the lock.
#[derive(Debug)]
pub(crate) struct State {
    config: RouterConfig,
    pub(crate) fleet: Fleet,
    pub(crate) tree: PrefixTree,
    pub(crate) bookings: Slab<Record>,
    pub(crate) output_length: OutputLength,
    /// When the next forecast event of each unwatched request is due.
    pub(crate) due: BinaryHeap<Reverse<(Duration, BookingKey)>>,
    pub(crate) serial: u64,
    rng: SmallRng,
    turn: u64,
    /// Scratch for [`Self::read`], indexed by slot.
    depths: Vec<Depth>,
    /// The latest time anybody told.
    pub(crate) now: Duration,
}

impl Router {
    /// A router without workers.
    ///
    /// # Errors
    /// If the weight or the temperature is negative, not a number, or absurdly large.
    pub fn new(config: RouterConfig) -> Result<Self, ConfigError> {
        for (field, value) in [
            ("overlap-weight", config.overlap_weight),
            ("temperature", config.temperature),
        ] {
            if !(0.0..=MOST_WEIGHT).contains(&value) {
                return Err(ConfigError { field, value });
            }
        }
        Ok(Self {
            state: Arc::new(Mutex::new(State {
                rng: SmallRng::seed_from_u64(config.seed),
                config,
                fleet: Fleet::default(),
                tree: PrefixTree::default(),
                bookings: Slab::new(),
                output_length: OutputLength::default(),
                due: BinaryHeap::new(),
                serial: 0,
                turn: 0,
                depths: Vec::new(),
                now: Duration::ZERO,
            })),
        })
    }

    /// Adds a worker. It is unhealthy until [`set_healthy`](Self::set_healthy) says otherwise.
    ///
    /// # Errors
    /// If the name is taken or there are [`MAX_WORKERS`](crate::fleet::MAX_WORKERS) already.
    pub fn add_worker(&self, spec: WorkerSpec) -> Result<WorkerId, WorkerError> {
        self.lock().fleet.add(spec)
    }

    /// Forgets a worker and all that was booked on it. Bookings that outlive it free nothing.
    /// Returns whether it was known.
    pub fn remove_worker(&self, id: WorkerId) -> bool {
        let mut state = self.lock();
        let known = state.fleet.remove(id);
        if known {
            state.tree.forget_worker(id.slot);
        }
        release(state);
        known
    }

    /// Says whether a worker can be chosen.
    pub fn set_healthy(&self, id: WorkerId, healthy: bool) {
        self.lock().fleet.set_healthy(id, healthy);
    }

    /// Says whether a worker only finishes what it has.
    pub fn set_draining(&self, id: WorkerId, draining: bool) {
        self.lock().fleet.set_draining(id, draining);
    }

    /// Says which models a worker serves; none means unknown.
    pub fn set_models(&self, id: WorkerId, models: Vec<String>) {
        self.lock().fleet.set_models(id, models);
    }

    /// Says how many KV blocks a worker has.
    pub fn set_capacity(&self, id: WorkerId, blocks: u32) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some((worker, load)) = state.fleet.get_mut(id) {
            worker.shadow.set_capacity(blocks);
            worker
                .shadow
                .make_room(load.active_blocks, id.slot, &mut state.tree);
        }
        release(guard);
    }

    /// A worker lost its cache: it was restarted, or told to drop it. What is booked stays.
    pub fn forget_cache(&self, id: WorkerId) {
        let mut state = self.lock();
        if let Some((worker, _)) = state.fleet.get_mut(id) {
            worker.shadow.clear();
            state.tree.forget_computed(id.slot);
        }
        release(state);
    }

    /// Chooses a worker for the request and books it there, in one step.
    ///
    /// # Errors
    /// If no worker serves the model, or none that does is available.
    pub fn route(&self, request: &Request<'_>, now: Duration) -> Result<Booking, RouteError> {
        let mut state = self.lock();
        state.advance(now);
        let (worker, at) = state.choose(request)?;
        let (key, decision) = state.book(worker, at, request);
        release(state);
        Ok(Booking::new(self.clone(), key, worker, decision, request))
    }

    /// What [`route`](Self::route) would look at. Books nothing and draws no random number.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn explain(&self, request: &Request<'_>, now: Duration) -> Result<Explanation, RouteError> {
        let mut state = self.lock();
        state.advance(now);
        let explanation = state.explain(request);
        release(state);
        explanation
    }

    /// Every worker as it stands.
    #[must_use]
    pub fn workers(&self, now: Duration) -> Vec<WorkerSnapshot> {
        let mut state = self.lock();
        state.advance(now);
        let snapshots = state.fleet.snapshot(state.now);
        release(state);
        snapshots
    }

    /// Whether some worker can be chosen.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let state = self.lock();
        state
            .fleet
            .eligible("")
            .is_some_and(|slots| !slots.is_empty())
    }

    /// Bookings that exist now, on whatever worker.
    #[must_use]
    pub fn bookings(&self) -> usize {
        self.lock().bookings.len()
    }

    /// Runs of blocks the router distinguishes: what its memory is proportional to.
    #[must_use]
    pub fn tracked_edges(&self) -> usize {
        self.lock().tree.len()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// Ends a critical section. Hash chains that lost their last node may be long allocations, so
/// they are freed after the lock.
pub(crate) fn release(mut state: MutexGuard<'_, State>) {
    let garbage: SmallVec<[Chain; 4]> = std::mem::take(&mut state.tree.garbage);
    drop(state);
    drop(garbage);
}

impl State {
    /// Reads every worker's depth for the request into `self.depths`.
    pub(crate) fn read(&mut self, request: &Request<'_>) -> Match {
        self.depths.clear();
        self.depths.resize(self.fleet.slots(), Depth::default());
        self.tree
            .descend(request.sequence.hashes(), &mut self.depths)
    }

    fn field<'a>(
        &'a self,
        request: &Request<'a>,
        excluded: &'a [Slot],
    ) -> Result<Field<'a>, RouteError> {
        let eligible = self
            .fleet
            .eligible(request.model)
            .ok_or_else(|| RouteError::UnknownModel(request.model.to_owned()))?;
        Ok(Field {
            eligible,
            excluded,
            loads: &self.fleet.loads,
            depths: &self.depths,
            demand: self.demand(request),
            hashes: request.sequence.hashes(),
        })
    }

    fn demand(&self, request: &Request<'_>) -> Demand {
        Demand {
            blocks: request.sequence.blocks(),
            reusable_blocks: request.sequence.reusable_blocks(),
            overlap_weight: self.config.overlap_weight,
        }
    }

    /// What speaks for placing the request at `slot`, as last [read](Self::read).
    pub(crate) fn decision(&self, slot: Slot, at: Match, request: &Request<'_>) -> Decision {
        let demand = self.demand(request);
        let active = self.fleet.loads[slot as usize].active_blocks;
        Decision {
            cost: demand.cost(active, self.depths[slot as usize]),
            best_overlap_blocks: at.best_overlap.min(demand.reusable_blocks),
        }
    }

    /// Slots of those excluded workers that still exist.
    fn excluded(&self, request: &Request<'_>) -> SmallVec<[Slot; 4]> {
        let known = request.excluded.iter();
        known
            .filter_map(|&id| self.fleet.get(id).map(|_| id.slot))
            .collect()
    }

    /// Reads, then chooses a worker. Also tells where the prompt leaves the tree.
    pub(crate) fn choose(
        &mut self,
        request: &Request<'_>,
    ) -> Result<(WorkerId, Match), RouteError> {
        let at = self.read(request);
        let excluded = self.excluded(request);
        // A copy: a decision that fails draws nothing, and the field borrows the rest.
        let mut rng = self.rng.clone();
        let worker = self
            .field(request, &excluded)?
            .choose(
                self.config.policy,
                self.config.temperature,
                self.config.block_size.get() as usize,
                self.turn,
                &mut rng,
            )
            .and_then(|slot| self.fleet.at(slot))
            .map(|worker| worker.id)
            .ok_or_else(|| RouteError::NoWorker(request.model.to_owned()))?;
        self.rng = rng;
        self.turn += 1;
        Ok((worker, at))
    }

    fn explain(&mut self, request: &Request<'_>) -> Result<Explanation, RouteError> {
        self.read(request);
        let excluded = self.excluded(request);
        let field = self.field(request, &excluded)?;
        let weights = self.probabilities(&field);
        let mut candidates: Vec<Candidate> = weights
            .into_iter()
            .filter_map(|(slot, probability)| {
                let worker = self.fleet.at(slot)?;
                let load = self.fleet.loads[slot as usize];
                let depth = self.depths[slot as usize];
                Some(Candidate {
                    id: worker.id,
                    name: worker.name.clone(),
                    requests: load.requests,
                    active_blocks: load.active_blocks,
                    depth,
                    cost: field.cost_of(slot),
                    probability,
                })
            })
            .collect();
        if candidates.is_empty() {
            return Err(RouteError::NoWorker(request.model.to_owned()));
        }
        candidates.sort_unstable_by_key(|candidate| candidate.id);
        Ok(Explanation {
            policy: self.config.policy,
            overlap_weight: self.config.overlap_weight,
            temperature: self.config.temperature,
            candidates,
        })
    }

    /// How likely `kv` is to choose each eligible worker.
    fn probabilities(&self, field: &Field<'_>) -> Vec<(Slot, f64)> {
        let weights = field.softmax_weights(self.config.temperature);
        let mut weights: Vec<(Slot, f64)> = weights.collect();
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        weights.iter_mut().for_each(|(_, weight)| *weight /= total);
        weights
    }
}
