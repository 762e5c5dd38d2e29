//! The list of all workers of a gateway, by id in the router.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::Router;
use foresee_core::workers::{WorkerError, WorkerId, WorkerSpec};
use parking_lot::RwLock;

use crate::workers::api_key::WorkerKeyConfig;
use crate::workers::model_catalog::ModelCatalog;
use crate::workers::model_list::ListedModel;
use crate::workers::worker::Worker;
use crate::workers::worker_config::WorkerConfig;
use crate::workers::worker_tls::WorkerTlsConfig;

/// All workers of a gateway, by id. The router decides which of them can be chosen.
#[derive(Debug, Default)]
pub(crate) struct WorkerRegistry {
    by_id: RwLock<HashMap<WorkerId, Arc<Worker>>>,
    /// What the workers' lists of models have in common.
    catalog: ModelCatalog,
    /// Key of workers whose description names none.
    default_key: WorkerKeyConfig,
    /// Files of TLS of workers whose description names none.
    default_tls: WorkerTlsConfig,
}

impl WorkerRegistry {
    /// Creates an empty list, for workers with this API key and these files of TLS unless their
    /// description names others.
    pub(crate) fn new(default_key: WorkerKeyConfig, default_tls: WorkerTlsConfig) -> Self {
        Self {
            default_key,
            default_tls,
            ..Self::default()
        }
    }

    /// Adds an engine to the router and to this list: one worker for each rank, all or none. A
    /// worker can be chosen after its first successful health check. `prefix_caching` applies to an
    /// engine whose configuration does not set it.
    /// Starts no tasks. Fails if another engine has the name or the router refuses a worker.
    pub(crate) fn add(
        &self,
        router: &Router,
        engine: &WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Vec<Arc<Worker>>, WorkerError> {
        let has_same_name =
            |worker: &Arc<Worker>| worker.config.engine_name() == engine.engine_name();
        if self.by_id.read().values().any(has_same_name) {
            return Err(WorkerError::NameTaken(engine.engine_name().to_owned()));
        }
        self.add_ranks(router, engine, prefix_caching)
    }

    /// Adds the workers of one address of an engine: one worker for each rank, all or none, as
    /// [`add`](Self::add) does. The engine may have workers at other addresses.
    pub(crate) fn add_ranks(
        &self,
        router: &Router,
        engine: &WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Vec<Arc<Worker>>, WorkerError> {
        let mut added = Vec::new();
        for config in engine.workers() {
            match self.add_one(router, config, prefix_caching) {
                Ok(worker) => added.push(worker),
                Err(error) => {
                    let ids = added.iter().map(|worker: &Arc<Worker>| worker.id);
                    ids.for_each(|id| self.remove(router, id));
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    /// Adds one worker to the router and to this list. The worker is unhealthy and has no models
    /// yet. `prefix_caching` applies if `config` does not set it.
    fn add_one(
        &self,
        router: &Router,
        config: WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Arc<Worker>, WorkerError> {
        let id = router.add_worker(WorkerSpec {
            name: config.name.clone(),
            models: Vec::new(),
            capacity_blocks: config.blocks,
            prefix_caching: config.prefix_caching.unwrap_or(prefix_caching),
            eviction: config.eviction.unwrap_or_default(),
        })?;
        let worker = Arc::new(Worker::new(
            id,
            config,
            &self.default_key,
            &self.default_tls,
        ));
        self.by_id.write().insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    /// Removes a worker from the router and from this list, and ends its tasks. Responses that it
    /// still sends are passed on. Has no effect for an unknown id.
    pub(crate) fn remove(&self, router: &Router, id: WorkerId) {
        let removed = self.by_id.write().remove(&id);
        if let Some(worker) = removed {
            router.remove_worker(id);
            worker.remove();
            self.compare_models();
        }
    }

    /// Sets the models that a worker has listed.
    pub(crate) fn set_models(&self, worker: &Worker, models: Vec<ListedModel>) {
        if worker.models.set(models) {
            self.compare_models();
        }
    }

    /// Returns what the workers' lists of models have in common.
    pub(crate) fn catalog(&self) -> &ModelCatalog {
        &self.catalog
    }

    /// Compares the workers' lists of models again.
    fn compare_models(&self) {
        self.catalog.update(|| self.all());
    }

    /// Returns the names of the models that any worker serves, healthy or not, each once.
    pub(crate) fn served_models(&self) -> Vec<String> {
        let mut names = Vec::new();
        for worker in self.all() {
            for (name, _) in worker.models.read().iter() {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
        }
        names
    }

    /// Returns the entry of a model as the first worker that serves it wrote it.
    pub(crate) fn model_entry(&self, model: &str) -> Option<String> {
        self.all().iter().find_map(|worker| {
            let models = worker.models.read();
            let (_, entry) = models.iter().find(|(name, _)| name == model)?;
            Some(entry.get().to_owned())
        })
    }

    /// Returns a worker by id.
    pub(crate) fn get(&self, id: WorkerId) -> Option<Arc<Worker>> {
        self.by_id.read().get(&id).cloned()
    }

    /// Returns the first worker of the engine of this name.
    pub(crate) fn first_of_engine(&self, name: &str) -> Option<Arc<Worker>> {
        let by_id = self.by_id.read();
        let workers = by_id.values();
        let workers = workers.filter(|worker| worker.config.engine_name() == name);
        workers.min_by_key(|worker| worker.id).cloned()
    }

    /// Returns the workers of other ranks than `named`. Returns none if that would be all workers:
    /// then the request is routed as usual, and the engine reports the error. Workers without a
    /// rank are never among them.
    pub(crate) fn workers_of_other_ranks(&self, named: u32) -> Vec<WorkerId> {
        let by_id = self.by_id.read();
        let has_other_rank =
            |worker: &&Arc<Worker>| worker.config.rank.is_some_and(|rank| rank != named);
        let others: Vec<_> = by_id
            .values()
            .filter(has_other_rank)
            .map(|worker| worker.id)
            .collect();
        if others.len() == by_id.len() {
            return Vec::new();
        }
        others
    }

    /// Returns the time until the next health check of any worker, after which a worker may be
    /// available again; `None` without workers.
    pub(crate) fn until_next_check(&self) -> Option<Duration> {
        let workers = self.all();
        workers.iter().map(|worker| worker.next_check_in()).min()
    }

    /// Returns all workers in the order in which they were added.
    pub(crate) fn all(&self) -> Vec<Arc<Worker>> {
        let mut all: Vec<_> = self.by_id.read().values().cloned().collect();
        all.sort_by_key(|worker| worker.id);
        all
    }
}
