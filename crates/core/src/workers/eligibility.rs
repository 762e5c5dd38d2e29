//! Which workers can be chosen, by model.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use foresee_prefix::WorkerIndex;
use foresee_prefix::sequence::IdentityHasher;
use smallvec::SmallVec;

use crate::model_name::ModelName;
use crate::model_name::hash_model_name;

/// Workers that can be chosen, by model. Stored, because decisions read it far more often than it
/// changes. A change costs a few steps for each model of the worker; a change of a worker whose
/// models are unknown costs them for each model of the fleet.
#[derive(Debug, Default)]
pub(super) struct Eligibility {
    /// All workers that can be chosen. Indices ascend, here and in the other lists.
    all: Vec<WorkerIndex>,
    /// Workers of each model that any worker, whether it can be chosen or not, is known to serve,
    /// by the hash of the name. A list, because two names may have one hash.
    by_model: HashMap<u64, SmallVec<[ModelWorkers; 1]>, BuildHasherDefault<IdentityHasher>>,
    /// Workers that can be chosen and whose models are unknown. They may serve any model.
    model_unknown: Vec<WorkerIndex>,
    /// Number of workers, whether they can be chosen or not.
    workers: usize,
    /// Number of those whose models are unknown.
    workers_without_models: usize,
}

/// Workers of one model.
#[derive(Debug)]
struct ModelWorkers {
    name: String,
    /// Number of workers that serve the model, whether they can be chosen or not.
    serving: usize,
    /// Workers that can be chosen for the model. Workers of unknown models are included.
    eligible: Vec<WorkerIndex>,
}

impl Eligibility {
    /// Adds a worker that cannot be chosen yet. `models` are distinct names; empty if they are
    /// unknown.
    pub(super) fn add_worker(&mut self, models: &[String]) {
        self.workers += 1;
        if models.is_empty() {
            self.workers_without_models += 1;
        }
        for name in models {
            let same_hash = self.by_model.entry(hash_model_name(name)).or_default();
            match same_hash.iter_mut().find(|model| model.name == *name) {
                Some(model) => model.serving += 1,
                None => same_hash.push(ModelWorkers {
                    name: name.clone(),
                    serving: 1,
                    eligible: self.model_unknown.clone(),
                }),
            }
        }
    }

    /// Removes a worker that was [added](Self::add_worker) with these models and cannot be chosen.
    pub(super) fn remove_worker(&mut self, models: &[String]) {
        self.workers = self.workers.saturating_sub(1);
        if models.is_empty() {
            self.workers_without_models = self.workers_without_models.saturating_sub(1);
        }
        for name in models {
            let hash = hash_model_name(name);
            let Some(same_hash) = self.by_model.get_mut(&hash) else {
                continue;
            };
            same_hash.retain(|model| {
                if model.name == *name {
                    model.serving = model.serving.saturating_sub(1);
                }
                model.serving > 0
            });
            if same_hash.is_empty() {
                self.by_model.remove(&hash);
            }
        }
    }

    /// Sets whether a worker with these models can be chosen.
    pub(super) fn set_eligible(
        &mut self,
        index: WorkerIndex,
        models: &[String],
        is_eligible: bool,
    ) {
        set_listed(&mut self.all, index, is_eligible);
        if models.is_empty() {
            set_listed(&mut self.model_unknown, index, is_eligible);
            for model in self.by_model.values_mut().flatten() {
                set_listed(&mut model.eligible, index, is_eligible);
            }
        }
        for name in models {
            let same_hash = self.by_model.get_mut(&hash_model_name(name));
            for model in same_hash.into_iter().flatten() {
                if model.name == *name {
                    set_listed(&mut model.eligible, index, is_eligible);
                }
            }
        }
    }

    /// Returns the models that any worker is known to serve.
    pub(super) fn models(&self) -> impl Iterator<Item = ModelName<'_>> {
        self.by_model.iter().flat_map(|(&hash, same_hash)| {
            let names = same_hash.iter().map(|model| model.name.as_str());
            names.map(move |name| ModelName { name, hash })
        })
    }

    /// Returns the indices of the workers that can be chosen for `model`; an empty name stands for
    /// any model. Returns `None` if there are workers, the models of all are known, and `model` is
    /// none of them. The slice is empty if every worker that may serve the model cannot be chosen,
    /// or if there are no workers. Indices ascend.
    pub(super) fn eligible(&self, model: ModelName<'_>) -> Option<&[WorkerIndex]> {
        if model.name.is_empty() {
            return Some(&self.all);
        }
        let same_hash = self.by_model.get(&model.hash).into_iter().flatten();
        match same_hash.into_iter().find(|known| known.name == model.name) {
            Some(known) => Some(&known.eligible),
            None => (self.workers_without_models > 0 || self.workers == 0)
                .then_some(self.model_unknown.as_slice()),
        }
    }
}

/// Adds `index` to a list of ascending indices, or removes it.
fn set_listed(indices: &mut Vec<WorkerIndex>, index: WorkerIndex, is_listed: bool) {
    match (indices.binary_search(&index), is_listed) {
        (Err(position), true) => indices.insert(position, index),
        (Ok(position), false) => {
            indices.remove(position);
        }
        _ => {}
    }
}
