//! Workers: their state, what they serve, their loads, and which of them are eligible for a model.

use std::collections::HashMap;
use std::mem;
use std::num::NonZeroU32;
use std::time::Duration;

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

use crate::active_tree::{PrefixMatch, WorkerIndex};
use crate::cache_source::CacheSource;
use crate::capacity::CapacitySource;
use crate::estimated_cache::{EstimatedCache, EvictionRule};
use crate::forecast::latency::{LatencyAccuracy, LatencyModel, SharedLatencyModel};
use crate::marginal_delay::{MarginalDelay, RequestProfile};
use crate::pending_work::PendingWork;
use crate::policy::Load;

/// Identity of one worker. Never reused: a worker that is removed and added again, even under the
/// same name, gets another id. Ids are ordered by when the workers were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId {
    /// Number of the worker, counted over all that were ever added.
    pub(crate) generation: u64,
    /// Position in the router's arrays, reused after removal.
    pub(crate) index: WorkerIndex,
}

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
            Self::Draining => "draining",
        }
    }
}

/// State of one worker at one instant.
#[derive(Clone, Debug)]
pub struct WorkerSnapshot {
    /// Worker id.
    pub id: WorkerId,
    /// Worker name.
    pub name: String,
    /// Whether the worker can be chosen.
    pub state: WorkerState,
    /// Models that the worker serves; empty while they are unknown.
    pub models: Vec<String>,
    /// Number of requests booked on the worker, queued ones included.
    pub requests: u32,
    /// Number of those requests that are queued at the router.
    pub queued_requests: u32,
    /// KV blocks pinned by the requests that were sent to the worker; shared ones count once.
    pub active_blocks: u64,
    /// KV blocks that the queued requests will pin in addition.
    pub queued_blocks: u64,
    /// Prompt and output tokens of all booked requests; shared ones count each time.
    pub context_tokens: u64,
    /// Booked prompt tokens that the worker has not computed yet, as predicted. Tokens of queued
    /// requests are included, cached tokens are not.
    pub prefill_tokens: u64,
    /// KV blocks in the worker's prefix cache, pinned or not, according to its cache source.
    pub cached_blocks: u64,
    /// Source of the worker's cache contents.
    pub cache_source: CacheSource,
    /// Number of KV blocks of the worker.
    pub capacity_blocks: u32,
    /// Source of that number.
    pub capacity_source: CapacitySource,
    /// Rule by which the engine selects the blocks that it evicts.
    pub eviction: EvictionRule,
    /// Latency model of the worker, as learned.
    pub latency: LatencyModel,
    /// Predicted time until all booked prompts are computed, queued ones included.
    pub prefill_backlog: Duration,
    /// Predicted time between two output tokens of one request, with the present decode batch.
    pub inter_token_latency: Duration,
    /// Accuracy of the predicted times to first token: the number of predictions that were compared
    /// with the observed time, and their mean absolute relative error.
    pub ttft_accuracy: LatencyAccuracy,
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

/// Maximum number of shared latency models.
const MAX_LATENCY_MODELS: usize = 256;

/// Worker, apart from its load and its pending work.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) name: String,
    /// Models that the worker serves; empty while they are unknown.
    models: Vec<String>,
    /// Whether its health check succeeds.
    healthy: bool,
    /// Whether it only finishes the requests that it has.
    draining: bool,
    /// Whether its engine has a prefix cache.
    pub(crate) prefix_caching: bool,
    /// Estimate of its prefix cache, which also contains its capacity and its eviction rule.
    pub(crate) estimated_cache: EstimatedCache,
    /// Blocks pinned through the active tree: the active blocks without the unshared ones.
    pub(crate) pinned_blocks: u64,
    /// Cached blocks according to its KV events.
    pub(crate) event_cached_blocks: u64,
}

/// Engine block ratio of one worker, above 1. Engines share only whole blocks of their own size.
#[derive(Clone, Copy, Debug)]
struct EngineBlockRatio {
    worker: WorkerIndex,
    /// Engine block size ÷ router block size.
    ratio: NonZeroU32,
}

impl Worker {
    /// Returns where the worker's cache contents come from.
    pub(crate) fn cache_source(&self) -> CacheSource {
        if self.estimated_cache.is_event_tracked() {
            CacheSource::Events
        } else {
            CacheSource::Estimated
        }
    }

    /// Returns the capacity in blocks, unless it is only assumed.
    pub(crate) fn estimated_capacity(&self) -> Option<u32> {
        let is_assumed = self.estimated_cache.capacity_source() == CapacitySource::Assumed;
        (!is_assumed).then(|| self.estimated_cache.capacity())
    }

    /// Returns the capacity in blocks if it is configured or reported, and so certain.
    pub(crate) fn reported_capacity(&self) -> Option<u32> {
        match self.estimated_cache.capacity_source() {
            CapacitySource::Configured | CapacitySource::Reported => {
                Some(self.estimated_cache.capacity())
            }
            CapacitySource::Learned | CapacitySource::Assumed => None,
        }
    }

    /// Returns the state of the worker. Draining takes precedence over the health check.
    pub(crate) fn state(&self) -> WorkerState {
        match (self.draining, self.healthy) {
            (true, _) => WorkerState::Draining,
            (false, true) => WorkerState::Healthy,
            (false, false) => WorkerState::Unhealthy,
        }
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
    /// Latency models, each with the model name for which it is learned and shared by all workers
    /// whose first model has that name. Never shrinks; bounded by [`MAX_LATENCY_MODELS`], after
    /// which workers of further models share the first entry.
    latency_models: Vec<(String, SharedLatencyModel)>,
    /// Workers that can be chosen, by model.
    eligible: Eligible,
    /// Engine block ratios above 1. A list, because most fleets have none.
    engine_block_ratios: Vec<EngineBlockRatio>,
    /// Number of workers that were ever added.
    generations: u64,
}

/// Workers that can be chosen, by model.
#[derive(Debug, Default)]
struct Eligible {
    /// All workers that can be chosen.
    all: Vec<WorkerIndex>,
    /// Workers that can be chosen for each model that any worker, healthy or not, is known to
    /// serve. Workers of unknown models are included.
    by_model: HashMap<String, Vec<WorkerIndex>>,
    /// Workers that can be chosen and whose models are unknown. They may serve any model.
    model_unknown: Vec<WorkerIndex>,
}

impl Workers {
    /// Adds a worker, unhealthy at first, at the smallest free index. An index, but not an id, may
    /// have belonged to a removed worker.
    ///
    /// # Errors
    /// [`WorkerError::NameTaken`] if a present worker has the name, [`WorkerError::TooMany`] at
    /// [`MAX_WORKERS`].
    pub(crate) fn add(&mut self, spec: WorkerSpec) -> Result<WorkerId, WorkerError> {
        if self.iter().any(|worker| worker.name == spec.name) {
            return Err(WorkerError::NameTaken(spec.name));
        }
        let index = match self.workers.iter().position(Option::is_none) {
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
        self.pending_work[index] = PendingWork::new(self.latency_model_for(&spec.models));
        self.workers[index] = Some(Worker {
            id,
            name: spec.name,
            models: spec.models,
            healthy: false,
            draining: false,
            prefix_caching: spec.prefix_caching,
            estimated_cache: EstimatedCache::new(spec.eviction, spec.capacity_blocks),
            pinned_blocks: 0,
            event_cached_blocks: 0,
        });
        self.rebuild_eligibility();
        Ok(id)
    }

    /// Removes a worker and returns whether it existed. Clears its load and its pending work. The
    /// caller removes it from the trees and indexes of cached blocks.
    pub(crate) fn remove(&mut self, id: WorkerId) -> bool {
        if self.get(id).is_none() {
            return false;
        }
        self.workers[id.index as usize] = None;
        self.loads[id.index as usize] = Load::default();
        self.pending_work[id.index as usize] = PendingWork::default();
        self.engine_block_ratios
            .retain(|entry| entry.worker != id.index);
        self.rebuild_eligibility();
        true
    }

    /// Rounds prefix matches down to whole engine blocks, on workers whose engine blocks are larger
    /// than router blocks. At most `max_reusable_blocks` blocks of the prompt can be reused.
    /// Returns whether there are such workers. Matches on all other workers stay unchanged, even
    /// above `max_reusable_blocks`.
    pub(crate) fn round_down_to_engine_blocks(
        &self,
        max_reusable_blocks: u32,
        prefix_matches: &mut [PrefixMatch],
    ) -> bool {
        for &EngineBlockRatio { worker, ratio } in &self.engine_block_ratios {
            let round_down = |blocks: u32| {
                let blocks = blocks.min(max_reusable_blocks);
                blocks - blocks % ratio
            };
            if let Some(prefix_match) = prefix_matches.get_mut(worker as usize) {
                prefix_match.cached_blocks = round_down(prefix_match.cached_blocks);
                prefix_match.active_blocks = round_down(prefix_match.active_blocks);
            }
        }
        !self.engine_block_ratios.is_empty()
    }

    /// Returns engine block size ÷ router block size of the worker at `index`. 1 if no other ratio
    /// was set.
    pub(crate) fn engine_block_ratio(&self, index: WorkerIndex) -> NonZeroU32 {
        let entry = self
            .engine_block_ratios
            .iter()
            .find(|entry| entry.worker == index);
        entry.map_or(NonZeroU32::MIN, |entry| entry.ratio)
    }

    /// Sets engine block size ÷ router block size of a worker. Has no effect if the worker was
    /// removed.
    pub(crate) fn set_engine_block_ratio(&mut self, id: WorkerId, ratio: NonZeroU32) {
        let index = id.index;
        if self.get(id).is_none()
            || self
                .engine_block_ratios
                .iter()
                .any(|entry| (entry.worker, entry.ratio) == (index, ratio))
        {
            return;
        }
        self.engine_block_ratios
            .retain(|entry| entry.worker != index);
        if ratio > NonZeroU32::MIN {
            self.engine_block_ratios.push(EngineBlockRatio {
                worker: index,
                ratio,
            });
        }
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
        let pending_work = self.pending_work.get_mut(id.index as usize)?;
        let (_, shared_model) = self.latency_models.get_mut(pending_work.latency_model)?;
        Some((pending_work, shared_model))
    }

    /// Returns the shared latency model of the worker with this pending work.
    pub(crate) fn latency_model(&self, pending_work: &PendingWork) -> &SharedLatencyModel {
        &self.latency_models[pending_work.latency_model].1
    }

    /// Returns the marginal delay of a request on the worker at `index`, where its prompt has this
    /// prefix match. The delay on the index of a removed worker is that on an empty one. Panics if
    /// no worker ever had the index.
    pub(crate) fn marginal_delay(
        &self,
        profile: &RequestProfile,
        index: WorkerIndex,
        prefix_match: PrefixMatch,
    ) -> MarginalDelay {
        let pending_work = &self.pending_work[index as usize];
        let load = self.loads[index as usize];
        let latency_model = pending_work
            .latency
            .latency_model(self.latency_model(pending_work), profile.now);
        profile.marginal_delay(&latency_model, pending_work, load, prefix_match)
    }

    /// Returns the total marginal delay of a request on the worker at `index` if it is below
    /// `cutoff`, and otherwise a number that is at least `cutoff`, which is cheaper to compute.
    /// Both are in seconds, weighted as by [`RequestProfile::total`]. The result may not be a
    /// number.
    pub(crate) fn marginal_delay_or_bound(
        &self,
        cutoff: f64,
        profile: &RequestProfile,
        index: WorkerIndex,
        prefix_match: PrefixMatch,
    ) -> f64 {
        let pending_work = &self.pending_work[index as usize];
        let load = self.loads[index as usize];
        let latency_model = pending_work
            .latency
            .latency_model(self.latency_model(pending_work), profile.now);
        profile.total_or_lower_bound(cutoff, &latency_model, pending_work, load, prefix_match)
    }

    /// Returns the index of the latency model for workers that serve these models. Only the first
    /// name counts: engines list the model that they run before its LoRA adapters, which come and
    /// go. Adds a latency model for an unknown name, or returns the first one at
    /// [`MAX_LATENCY_MODELS`]. Workers of unknown models share one.
    fn latency_model_for(&mut self, models: &[String]) -> usize {
        let model = models.first().map(String::as_str).unwrap_or_default();
        let known = self
            .latency_models
            .iter()
            .position(|(name, _)| name == model);
        match known {
            Some(index) => index,
            None if self.latency_models.len() < MAX_LATENCY_MODELS => {
                self.latency_models
                    .push((model.to_owned(), SharedLatencyModel::default()));
                self.latency_models.len() - 1
            }
            None => 0,
        }
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

    /// Sets the models that a worker serves, and the latency model that belongs to them. A change
    /// of the latency model resets the factors that the worker has learned relative to it. Has no
    /// effect if the worker was removed.
    pub(crate) fn set_models(&mut self, id: WorkerId, models: Vec<String>) {
        let latency_model = self.latency_model_for(&models);
        if let Some((pending_work, _)) = self.pending_work_mut(id)
            && pending_work.latency_model != latency_model
        {
            pending_work.latency_model = latency_model;
            pending_work.latency.reset_factors();
        }
        self.update(id, |worker| &mut worker.models, models);
    }

    /// Sets one field of a worker. Rebuilds eligibility only if the value changed, because health
    /// checks mostly repeat what is known.
    fn update<T: PartialEq>(&mut self, id: WorkerId, field: fn(&mut Worker) -> &mut T, new: T) {
        if let Some((worker, _)) = self.get_mut(id)
            && mem::replace(field(worker), new) != *field(worker)
        {
            self.rebuild_eligibility();
        }
    }

    /// Returns the indices of the workers that can be chosen for `model`; an empty name stands for
    /// any model. Returns `None` if there are workers, the models of all are known, and `model` is
    /// none of them. The slice is empty if every worker that may serve the model is unhealthy or
    /// draining, or if there are no workers. Indices ascend.
    pub(crate) fn eligible(&self, model: &str) -> Option<&[WorkerIndex]> {
        if model.is_empty() {
            return Some(&self.eligible.all);
        }
        match self.eligible.by_model.get(model) {
            Some(indices) => Some(indices),
            None => {
                let unknown = self.iter().any(|worker| worker.models.is_empty());
                (unknown || self.iter().next().is_none())
                    .then_some(self.eligible.model_unknown.as_slice())
            }
        }
    }

    /// Computes which workers can be chosen for which model. The result is stored, because
    /// decisions read it far more often than it changes. Must be called after every change of a
    /// worker's state or models.
    fn rebuild_eligibility(&mut self) {
        let mut eligible = Eligible::default();
        for worker in self.iter() {
            for model in &worker.models {
                eligible.by_model.entry(model.clone()).or_default();
            }
        }
        for worker in self.iter() {
            if worker.state() != WorkerState::Healthy {
                continue;
            }
            let index = worker.id.index;
            eligible.all.push(index);
            for model in &worker.models {
                // A worker may list one model twice.
                if let Some(indices) = eligible.by_model.get_mut(model)
                    && indices.last() != Some(&index)
                {
                    indices.push(index);
                }
            }
            if worker.models.is_empty() {
                eligible.model_unknown.push(index);
                eligible
                    .by_model
                    .values_mut()
                    .for_each(|indices| indices.push(index));
            }
        }
        self.eligible = eligible;
    }

    /// Returns a snapshot of every worker, by ascending index. Forecasts are made for `now`, a time
    /// of the router's clock.
    pub(crate) fn snapshot(&self, now: Duration) -> Vec<WorkerSnapshot> {
        self.iter()
            .map(|worker| {
                let load = self.loads[worker.id.index as usize];
                let pending_work = &self.pending_work[worker.id.index as usize];
                let latency_model = pending_work
                    .latency
                    .latency_model(self.latency_model(pending_work), now);
                let (requests, context_tokens) = pending_work.decode_load();
                let step_seconds = latency_model
                    .decode_step_seconds(f64::from(requests.max(1)), context_tokens as f64);
                WorkerSnapshot {
                    id: worker.id,
                    name: worker.name.clone(),
                    state: worker.state(),
                    models: worker.models.clone(),
                    requests: load.requests,
                    queued_requests: pending_work.queue.totals().requests,
                    active_blocks: load.active_blocks,
                    queued_blocks: load.queued_blocks,
                    context_tokens: load.context_tokens,
                    prefill_tokens: pending_work.prefill_backlog_tokens(&latency_model, now),
                    cached_blocks: if worker.estimated_cache.is_event_tracked() {
                        worker.event_cached_blocks
                    } else {
                        worker.pinned_blocks + worker.estimated_cache.cached_blocks()
                    },
                    cache_source: worker.cache_source(),
                    capacity_blocks: worker.estimated_cache.capacity(),
                    capacity_source: worker.estimated_cache.capacity_source(),
                    eviction: worker.estimated_cache.eviction(),
                    prefill_backlog: duration_from_secs_saturating(
                        pending_work.prefill_backlog_seconds(&latency_model, now),
                    ),
                    inter_token_latency: duration_from_secs_saturating(step_seconds),
                    ttft_accuracy: pending_work.latency.ttft_accuracy(),
                    latency: latency_model,
                }
            })
            .collect()
    }
}

/// Converts a forecast in seconds. Returns `Duration::MAX` if it is too long for a duration, and
/// also if it is negative or not a number.
pub(crate) fn duration_from_secs_saturating(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
