//! Workers: their state, what they serve, their loads, and which of them are eligible for a model.

mod bound_columns;
mod earlier;
mod eligibility;
mod latency_groups;
mod snapshot;

use std::collections::HashSet;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use foresee_forecast::{ArrivalRate, LatencyModel, PrefillWork, SharedLatencyModel};
use foresee_prefix::{EvictionRule, WorkerIndex};
use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

use crate::booking_id::BookingId;
use crate::learned::{LearnedModel, LearnedWorker};
use crate::load::Load;
use crate::model_name::ModelName;
use crate::outlier::{OutlierConfig, Outliers};
use crate::pending_work::PendingWork;
use crate::queue::{QueueKey, Removed};
use crate::sglang_admission::OutputReservation;
pub(crate) use bound_columns::BoundColumns;
pub(crate) use earlier::Earlier;
use eligibility::Eligibility;
use latency_groups::{LatencyGroups, model_of};
pub use snapshot::WorkerSnapshot;

pub use crate::worker_id::WorkerId;

/// Description of a worker, for [`Router::add_worker`](crate::router::Router::add_worker).
#[derive(Clone, Debug, Default)]
pub struct WorkerSpec {
    /// Name, unique among the workers of a router.
    pub name: String,
    /// Models that the worker serves. Empty while they are unknown; the worker is then eligible for
    /// every model.
    pub models: Vec<String>,
    /// Number of KV blocks. `None` if it is unknown; it is then learned, starting from
    /// [`DEFAULT_CAPACITY_BLOCKS`](crate::DEFAULT_CAPACITY_BLOCKS).
    pub capacity_blocks: Option<u32>,
    /// Whether the engine has a prefix cache. Without one, no two requests share a block.
    pub prefix_caching: bool,
    /// Rule by which the engine selects the blocks that it evicts.
    pub eviction: EvictionRule,
}

/// Whether a worker can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    /// Can be chosen.
    Healthy,
    /// Cannot be chosen, because its health check fails. Requests that run there stay booked.
    Unhealthy,
    /// Gets no requests but trials, because it failed too often: see [`outlier`](crate::outlier).
    Ejected,
    /// Cannot be chosen. Finishes the requests that it has.
    Draining,
}

impl WorkerState {
    /// Returns the name used in the admin API and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Ejected => "ejected",
            Self::Draining => "draining",
        }
    }
}

/// Reason why a worker was not added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WorkerError {
    /// Another worker has the same name.
    #[error(
        "a worker named `{0}` exists already: give this one another name, or remove that one first"
    )]
    NameTaken(String),
    /// The router has [`MAX_WORKERS`] workers. The limit bounds all structures that are indexed by
    /// worker.
    #[error("there are {0} workers already, which is the limit")]
    TooMany(usize),
}

/// Maximum number of workers of one router.
pub const MAX_WORKERS: usize = 4096;

/// Worker, apart from its load and its pending work.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) name: Arc<str>,
    /// Models that the worker serves, each once; empty while they are unknown.
    models: Arc<[String]>,
    /// Whether its health check succeeds.
    healthy: bool,
    /// Whether it only finishes the requests that it has.
    draining: bool,
    /// Whether it is ejected: a copy of what its outlier record says.
    ejected: bool,
}

impl Worker {
    /// Returns the state of the worker. Draining takes precedence over the health check, which takes
    /// precedence over ejection.
    pub(crate) fn state(&self) -> WorkerState {
        match (self.draining, self.healthy, self.ejected) {
            (true, ..) => WorkerState::Draining,
            (false, false, _) => WorkerState::Unhealthy,
            (false, true, true) => WorkerState::Ejected,
            (false, true, false) => WorkerState::Healthy,
        }
    }

    /// Returns whether the worker is eligible, apart from the model: healthy and not draining.
    pub(crate) fn is_accepting(&self) -> bool {
        self.healthy && !self.draining
    }

    /// Returns whether the worker is ejected.
    pub(crate) fn is_ejected(&self) -> bool {
        self.ejected
    }

    /// Returns whether the worker may serve `model`. An empty name stands for any model.
    pub(crate) fn serves(&self, model: &str) -> bool {
        model.is_empty()
            || self.models.is_empty()
            || self.models.iter().any(|served| served == model)
    }

    /// Returns the models that the worker serves; empty while they are unknown.
    pub(crate) fn models(&self) -> &[String] {
        &self.models
    }
}

/// All workers, with their loads, their pending work, and the models that they are eligible for.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    /// Workers by index; `None` where a worker was removed.
    workers: Vec<Option<Worker>>,
    /// Loads by worker index. Apart from `workers`, so that a decision over hundreds of workers
    /// reads little memory.
    pub(crate) loads: Vec<Load>,
    /// Pending work by worker index. Apart from `workers`, so that a decision over hundreds of
    /// workers reads little memory.
    pub(crate) pending_work: Vec<PendingWork>,
    /// Numbers from which lower bounds of the marginal delay follow.
    bound_columns: BoundColumns,
    /// Latency models, each shared by the workers that run one model, and the longest of the queues
    /// of those workers.
    latency_groups: LatencyGroups,
    /// Workers that can be chosen, by model.
    eligibility: Eligibility,
    /// Indices of removed workers that are not free yet, because parts of the state still refer to
    /// them.
    retiring: Vec<WorkerIndex>,
    /// Recent failures, ejections and backpressure of each worker.
    pub(crate) outliers: Outliers,
    /// Speeds that an earlier router has learned.
    earlier: Earlier,
    /// Number of workers that were ever added.
    generations: u64,
}

/// Returns `models` without repeated names, in their order.
pub(crate) fn distinct_models(models: Vec<String>) -> Arc<[String]> {
    let mut known = HashSet::new();
    let is_first: Vec<bool> = models.iter().map(|model| known.insert(model)).collect();
    let distinct = models.iter().zip(is_first);
    distinct
        .filter(|(_, is_first)| *is_first)
        .map(|(model, _)| model.clone())
        .collect()
}

impl Workers {
    /// Returns an empty fleet with these settings of outlier ejection.
    pub(crate) fn new(config: OutlierConfig) -> Self {
        Self {
            outliers: Outliers::new(config),
            ..Self::default()
        }
    }

    /// Sets the speeds that an earlier router has learned, for workers that are added afterwards.
    pub(crate) fn set_earlier(&mut self, earlier: Earlier) {
        self.earlier = earlier;
    }

    /// Returns the latency models with samples, and the speeds of their workers as of `now`.
    pub(crate) fn learned(&self, now: Duration) -> (Vec<LearnedModel>, Vec<LearnedWorker>) {
        let workers = self.workers.iter().zip(&self.pending_work);
        let workers = workers.filter_map(|(worker, pending_work)| {
            let worker = worker.as_ref()?;
            Some(LearnedWorker {
                worker: worker.name.to_string(),
                model: self
                    .latency_groups
                    .model(pending_work.latency_group)?
                    .to_owned(),
                speed: pending_work.latency.learned(now),
            })
        });
        (self.latency_groups.learned(), workers.collect())
    }

    /// Adds a worker at `now`, unhealthy at first, at the smallest free index. An index, but not an
    /// id, may have belonged to a removed worker. `models` are the [distinct](distinct_models)
    /// models of `spec`.
    ///
    /// # Errors
    /// [`WorkerError::NameTaken`] if a present worker has the name, [`WorkerError::TooMany`] at
    /// [`MAX_WORKERS`].
    pub(crate) fn add(
        &mut self,
        spec: &WorkerSpec,
        models: Arc<[String]>,
        now: Duration,
    ) -> Result<WorkerId, WorkerError> {
        if self.iter().any(|worker| *worker.name == *spec.name) {
            return Err(WorkerError::NameTaken(spec.name.clone()));
        }
        let is_free = |index: usize, worker: &Option<Worker>| {
            worker.is_none() && !self.retiring.contains(&(index as WorkerIndex))
        };
        let mut indexed = self.workers.iter().enumerate();
        let index = match indexed.position(|(index, worker)| is_free(index, worker)) {
            Some(free) => free,
            None if self.workers.len() == MAX_WORKERS => {
                return Err(WorkerError::TooMany(MAX_WORKERS));
            }
            None => {
                self.workers.push(None);
                self.loads.push(Load::default());
                self.pending_work.push(PendingWork::default());
                self.workers.len() - 1
            }
        };
        self.generations += 1;
        let id = WorkerId {
            index: index as WorkerIndex,
            generation: self.generations,
        };
        self.loads[index] = Load {
            name_hash: rapidhash_v3_seeded(spec.name.as_bytes(), &DEFAULT_RAPID_SECRETS),
            ..Load::default()
        };
        let mut pending_work = PendingWork::new(self.latency_groups.join(&models, &self.earlier));
        let earlier = self.earlier.estimator(&spec.name, model_of(&models), now);
        if let Some(latency) = earlier {
            pending_work.latency = latency;
        }
        self.pending_work[index] = pending_work;
        self.bound_columns.mark_stale(id.index);
        self.eligibility.add_worker(&models);
        self.workers[index] = Some(Worker {
            id,
            name: spec.name.as_str().into(),
            models,
            healthy: false,
            draining: false,
            ejected: false,
        });
        self.outliers.start(id.index, now);
        Ok(id)
    }

    /// Removes a worker and returns its pending work, unless it was removed before. Clears its load.
    /// The caller removes everything else that refers to its index, and then calls
    /// [`free_index`](Self::free_index).
    pub(crate) fn remove(&mut self, id: WorkerId) -> Option<PendingWork> {
        self.get(id)?;
        let index = id.index as usize;
        let worker = self.workers[index].take()?;
        self.loads[index] = Load::default();
        let pending_work = mem::take(&mut self.pending_work[index]);
        self.bound_columns.mark_stale(id.index);
        self.outliers.forget(id.index);
        self.eligibility
            .set_eligible(id.index, &worker.models, false);
        self.eligibility.remove_worker(&worker.models);
        let queue_length = pending_work.queue.totals().requests;
        self.latency_groups
            .leave(pending_work.latency_group, id.index, queue_length);
        self.retiring.push(id.index);
        Some(pending_work)
    }

    /// Frees the index of a removed worker, to which nothing refers any longer.
    pub(crate) fn free_index(&mut self, index: WorkerIndex) {
        self.retiring.retain(|&retiring| retiring != index);
    }

    /// Returns the worker, unless it was removed.
    pub(crate) fn get(&self, id: WorkerId) -> Option<&Worker> {
        let worker = self.workers.get(id.index as usize)?.as_ref()?;
        (worker.id == id).then_some(worker)
    }

    /// Returns the worker and its load, unless it was removed.
    pub(crate) fn get_mut(&mut self, id: WorkerId) -> Option<(&mut Worker, &mut Load)> {
        let worker = self.workers.get_mut(id.index as usize)?.as_mut()?;
        let load = self.loads.get_mut(id.index as usize)?;
        (worker.id == id).then_some((worker, load))
    }

    /// Returns the pending work of a worker, unless the worker was removed.
    pub(crate) fn pending_work(&self, id: WorkerId) -> Option<&PendingWork> {
        self.get(id)?;
        self.pending_work.get(id.index as usize)
    }

    /// Returns the pending work of a worker and the latency model that it shares with similar
    /// workers, unless the worker was removed.
    pub(crate) fn pending_work_mut(
        &mut self,
        id: WorkerId,
    ) -> Option<(&mut PendingWork, &mut SharedLatencyModel)> {
        self.get(id)?;
        self.bound_columns.mark_stale(id.index);
        let pending_work = self.pending_work.get_mut(id.index as usize)?;
        let shared_model = self
            .latency_groups
            .latency_model_mut(pending_work.latency_group)?;
        Some((pending_work, shared_model))
    }

    /// Makes the [bound columns](Self::bound_columns) valid at `now`.
    pub(crate) fn refresh_bound_columns(&mut self, now: Duration) {
        self.bound_columns.refresh(&self.pending_work, now);
    }

    /// Returns the numbers from which lower bounds of the marginal delay follow, unless they are
    /// not valid at `now`: see [`refresh_bound_columns`](Self::refresh_bound_columns).
    pub(crate) fn bound_columns(&self, now: Duration) -> Option<&BoundColumns> {
        Some(&self.bound_columns).filter(|columns| columns.are_current(now))
    }

    /// Returns the shared latency model of the worker with this pending work.
    pub(crate) fn latency_model(&self, pending_work: &PendingWork) -> &SharedLatencyModel {
        self.latency_groups
            .latency_model(pending_work.latency_group)
    }

    /// Returns the latency model of the worker with this pending work at `now`.
    pub(crate) fn latency_now(&self, pending_work: &PendingWork, now: Duration) -> LatencyModel {
        let shared_model = self.latency_model(pending_work);
        pending_work.latency.latency_model(shared_model, now)
    }

    /// Counts an arrival in the rates of a worker and of its latency group: see [`ArrivalRate::add`].
    pub(crate) fn add_arrival(
        &mut self,
        id: WorkerId,
        prefill_seconds: f64,
        step_seconds: f64,
        now: Duration,
    ) {
        self.update_arrival_rates(id, |rate| rate.add(prefill_seconds, step_seconds, now));
    }

    /// Subtracts an arrival from the same rates: see [`ArrivalRate::undo`].
    pub(crate) fn undo_arrival(&mut self, id: WorkerId, arrival: (Duration, f64), now: Duration) {
        self.update_arrival_rates(id, |rate| rate.undo(arrival, now));
    }

    fn update_arrival_rates(&mut self, id: WorkerId, update: impl Fn(&mut ArrivalRate)) {
        let Some((pending_work, _)) = self.pending_work_mut(id) else {
            return;
        };
        update(&mut pending_work.arrival_rate);
        let group = pending_work.latency_group;
        if let Some(rate) = self.latency_groups.arrival_rate_mut(group) {
            update(rate);
        }
    }

    /// Returns the mean fraction of their time that prefills take on the workers that share the
    /// latency model of the worker at `index`; 0 without that worker.
    pub(crate) fn mean_prefill_utilisation(&self, index: WorkerIndex, now: Duration) -> f64 {
        self.pending_work
            .get(index as usize)
            .map_or(0.0, |pending_work| {
                self.latency_groups
                    .mean_prefill_utilisation(pending_work.latency_group, now)
            })
    }

    /// Returns the time of a decode step of a worker: see [`PendingWork::decode_step_seconds`].
    /// `None` if the worker was removed.
    pub(crate) fn decode_step_seconds(&self, id: WorkerId, now: Duration) -> Option<f64> {
        let pending_work = self.pending_work(id)?;
        Some(pending_work.decode_step_seconds(&self.latency_now(pending_work, now)))
    }

    /// Adds a booking to the queue of a worker: see
    /// [`WorkerQueue::insert`](crate::queue::WorkerQueue::insert). Returns whether the worker
    /// exists.
    pub(crate) fn enqueue(
        &mut self,
        id: WorkerId,
        key: QueueKey,
        booking: BookingId,
        work: PrefillWork,
        memory: (u64, OutputReservation),
    ) -> bool {
        let Some((pending_work, _)) = self.pending_work_mut(id) else {
            return false;
        };
        pending_work.queue.insert(key, booking, work, memory);
        let (group, length) = (
            pending_work.latency_group,
            pending_work.queue.totals().requests,
        );
        self.latency_groups
            .set_queue_length(group, id.index, length.saturating_sub(1), length);
        true
    }

    /// Removes the booking with this key from the queue of a worker: see
    /// [`WorkerQueue::remove`](crate::queue::WorkerQueue::remove). `None` if the worker does not
    /// exist or the key is not queued there.
    pub(crate) fn dequeue(&mut self, id: WorkerId, key: QueueKey) -> Option<Removed> {
        let (pending_work, _) = self.pending_work_mut(id)?;
        let removed = pending_work.queue.remove(key)?;
        let (group, length) = (
            pending_work.latency_group,
            pending_work.queue.totals().requests,
        );
        self.latency_groups
            .set_queue_length(group, id.index, length + 1, length);
        Some(removed)
    }

    /// Returns the first booking of the longest queue among the workers that share the latency
    /// model of the worker at `index`. `None` if no request is queued there.
    pub(crate) fn first_of_longest_queue(&self, index: WorkerIndex) -> Option<BookingId> {
        let group = self.pending_work.get(index as usize)?.latency_group;
        let longest = self.latency_groups.longest_queue(group)?;
        self.pending_work.get(longest as usize)?.queue.first()
    }

    /// Returns the worker at `index`, if there is one.
    pub(crate) fn by_index(&self, index: WorkerIndex) -> Option<&Worker> {
        self.workers.get(index as usize)?.as_ref()
    }

    /// Returns the length of all arrays that are indexed by worker. Indices of removed workers
    /// count.
    pub(crate) fn index_len(&self) -> usize {
        self.workers.len()
    }

    /// Returns all workers, by ascending index.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter().flatten()
    }

    /// Sets whether a worker's health check succeeds.
    pub(crate) fn set_healthy(&mut self, id: WorkerId, healthy: bool) {
        self.update(id, |worker| &mut worker.healthy, healthy);
    }

    /// Sets whether a worker only finishes the requests that it has.
    pub(crate) fn set_draining(&mut self, id: WorkerId, draining: bool) {
        self.update(id, |worker| &mut worker.draining, draining);
    }

    /// Sets whether the worker at `index` is ejected. Eligibility does not depend on it.
    pub(crate) fn set_ejected(&mut self, index: WorkerIndex, ejected: bool) {
        if let Some(Some(worker)) = self.workers.get_mut(index as usize) {
            worker.ejected = ejected;
        }
    }

    /// Sets the models that a worker serves, and the latency model that belongs to them. A change
    /// of the latency model resets the factors that the worker has learned relative to it. Has no
    /// effect if the worker was removed.
    pub(crate) fn set_models(&mut self, id: WorkerId, models: Arc<[String]>, now: Duration) {
        let Some((worker, _)) = self.get_mut(id) else {
            return;
        };
        if worker.models == models {
            return;
        }
        let is_eligible = worker.is_accepting();
        let old_models = mem::replace(&mut worker.models, Arc::clone(&models));
        let name = Arc::clone(&worker.name);
        self.eligibility.set_eligible(id.index, &old_models, false);
        self.eligibility.remove_worker(&old_models);
        self.eligibility.add_worker(&models);
        self.eligibility
            .set_eligible(id.index, &models, is_eligible);
        self.bound_columns.mark_stale(id.index);
        let pending_work = &mut self.pending_work[id.index as usize];
        let old_group = pending_work.latency_group;
        let queue_length = pending_work.queue.totals().requests;
        // Joins first, so that a group with this worker only is not replaced by its own.
        let group = self.latency_groups.join(&models, &self.earlier);
        self.latency_groups.leave(old_group, id.index, queue_length);
        self.latency_groups
            .set_queue_length(group, id.index, 0, queue_length);
        if group != old_group {
            pending_work.latency_group = group;
            match self.earlier.estimator(&name, model_of(&models), now) {
                Some(latency) => pending_work.latency = latency,
                None => pending_work.latency.reset_factors(),
            }
        }
    }

    /// Sets one field of a worker that decides whether it can be chosen.
    fn update<T>(&mut self, id: WorkerId, field: fn(&mut Worker) -> &mut T, new: T) {
        let Some((worker, _)) = self.get_mut(id) else {
            return;
        };
        let was_eligible = worker.is_accepting();
        *field(worker) = new;
        let is_eligible = worker.is_accepting();
        if was_eligible != is_eligible {
            let models = Arc::clone(&worker.models);
            self.eligibility
                .set_eligible(id.index, &models, is_eligible);
        }
    }

    /// Returns the indices of the workers that can be chosen for `model`, ejected ones included; an
    /// empty name stands for any model. Returns `None` if there are workers, the models of all are
    /// known, and `model` is none of them. The slice is empty if every worker that may serve the
    /// model is unhealthy or draining, or if there are no workers. Indices ascend.
    pub(crate) fn eligible(&self, model: ModelName<'_>) -> Option<&[WorkerIndex]> {
        self.eligibility.eligible(model)
    }

    /// Returns the models that a worker may serve: all known ones if its own are unknown.
    pub(crate) fn models_of<'a>(
        &'a self,
        worker: &'a Worker,
    ) -> impl Iterator<Item = ModelName<'a>> {
        let known = worker.models.is_empty();
        let known = known.then(|| self.eligibility.models());
        let own = worker.models.iter().map(|model| ModelName::new(model));
        own.chain(known.into_iter().flatten())
    }
}
