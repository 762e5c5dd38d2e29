//! The workers of a router, by name.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use foresee_core::EvictionRule;
use foresee_core::router::Router;
use foresee_core::workers::{WorkerId, WorkerSpec};
use parking_lot::{Mutex, RwLock};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::errors::Error;
use crate::events::EventStream;

/// The eviction rules, by the names of [`EvictionRule::as_str`].
const EVICTION_RULES: [EvictionRule; 2] = [EvictionRule::VllmLru, EvictionRule::SglangRadix];

/// A worker as Python describes it: the fields of `foresee_router.Worker`.
#[derive(Debug, FromPyObject)]
pub(crate) struct WorkerDescription {
    name: String,
    models: Vec<String>,
    capacity_blocks: Option<u32>,
    prefix_caching: bool,
    eviction: String,
    rank: Option<u32>,
}

impl WorkerDescription {
    /// Reads a name, or a `foresee_router.Worker`.
    ///
    /// # Errors
    /// If `worker` is neither.
    pub(crate) fn read(worker: &Bound<'_, PyAny>) -> PyResult<Self> {
        if !worker.is_instance_of::<PyString>() {
            return worker.extract();
        }
        Ok(Self {
            name: worker.extract()?,
            models: Vec::new(),
            capacity_blocks: None,
            prefix_caching: true,
            eviction: EvictionRule::default().as_str().to_owned(),
            rank: None,
        })
    }
}

/// A worker of the router.
#[derive(Debug)]
pub(crate) struct FleetWorker {
    pub(crate) id: WorkerId,
    pub(crate) name: String,
    /// The first of its models, which is the base model of its engine.
    model: Option<String>,
    rank: Option<u32>,
    /// Its stream of KV events; `None` before the first.
    pub(crate) events: Mutex<Option<EventStream>>,
}

impl FleetWorker {
    /// Returns a stream of KV events of which nothing was received.
    ///
    /// # Errors
    /// If the model of the worker is not known.
    pub(crate) fn new_events(&self, block_size: NonZeroU32) -> Result<EventStream, Error> {
        let model = self.model.clone();
        let model = model.ok_or_else(|| Error::EventsWithoutModel(self.name.clone()))?;
        Ok(EventStream::new(block_size, model, self.rank))
    }
}

/// The workers of a router.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    workers: RwLock<Workers>,
}

/// The workers, by both of their keys.
#[derive(Debug, Default)]
struct Workers {
    by_name: HashMap<String, Arc<FleetWorker>>,
    by_id: HashMap<WorkerId, Arc<FleetWorker>>,
    /// First model of all workers, if they agree.
    only_model: Option<String>,
}

impl Workers {
    /// Compares the models of the workers again.
    fn update_only_model(&mut self) {
        let mut models = self.by_name.values().map(|worker| worker.model.as_ref());
        let first = models.next().flatten();
        let agree = models.all(|model| model == first);
        self.only_model = first.filter(|_| agree).cloned();
    }
}

impl Fleet {
    /// Adds a worker to `router`, which may be chosen at once.
    ///
    /// # Errors
    /// If the name is taken, there are too many workers, or the eviction rule is unknown.
    pub(crate) fn add(&self, router: &Router, worker: WorkerDescription) -> Result<(), Error> {
        let eviction = EVICTION_RULES
            .into_iter()
            .find(|rule| rule.as_str() == worker.eviction)
            .ok_or_else(|| Error::Choice {
                field: "eviction",
                value: worker.eviction.clone(),
                allowed: "queue, radix",
            })?;
        let mut workers = self.workers.write();
        let id = router.add_worker(WorkerSpec {
            name: worker.name.clone(),
            models: worker.models.clone(),
            capacity_blocks: worker.capacity_blocks,
            prefix_caching: worker.prefix_caching,
            eviction,
        })?;
        let added = Arc::new(FleetWorker {
            id,
            name: worker.name,
            model: worker.models.into_iter().next(),
            rank: worker.rank,
            events: Mutex::new(None),
        });
        workers.by_id.insert(id, Arc::clone(&added));
        workers.by_name.insert(added.name.clone(), added);
        workers.update_only_model();
        // Known by name before it can be chosen.
        router.set_healthy(id, true);
        Ok(())
    }

    /// Removes a worker from `router`.
    ///
    /// # Errors
    /// If no worker has the name.
    pub(crate) fn remove(&self, router: &Router, name: &str) -> Result<(), Error> {
        let removed = self.get(name)?;
        // Known by id for as long as it can be chosen.
        router.remove_worker(removed.id);
        let mut workers = self.workers.write();
        // Another worker may have been added under the name meanwhile.
        workers.by_name.retain(|_, worker| worker.id != removed.id);
        workers.by_id.remove(&removed.id);
        workers.update_only_model();
        Ok(())
    }

    /// Returns the worker with a name.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<FleetWorker>, Error> {
        let worker = self.workers.read().by_name.get(name).cloned();
        worker.ok_or_else(|| Error::UnknownWorker(name.to_owned()))
    }

    /// Returns the worker with an id, unless it was removed.
    pub(crate) fn by_id(&self, id: WorkerId) -> Option<Arc<FleetWorker>> {
        self.workers.read().by_id.get(&id).cloned()
    }

    /// Returns the ids of the workers with these names.
    ///
    /// # Errors
    /// If a name is unknown.
    pub(crate) fn ids(&self, names: &[String]) -> Result<Vec<WorkerId>, Error> {
        let ids = names
            .iter()
            .map(|name| self.get(name).map(|worker| worker.id));
        ids.collect()
    }

    /// Returns the model of requests that name none: the first model of every worker. `None` if the
    /// workers differ, or the models of one are not known.
    pub(crate) fn only_model(&self) -> Option<String> {
        self.workers.read().only_model.clone()
    }

    /// Returns whether there are no workers.
    pub(crate) fn is_empty(&self) -> bool {
        self.workers.read().by_name.is_empty()
    }
}
