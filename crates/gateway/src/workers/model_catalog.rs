//! What the workers' lists of models have in common: facts about models that a request needs before its
//! worker is chosen.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use foresee_engine::conversion::Dialect;
use parking_lot::RwLock;

use crate::workers::worker::Worker;

/// Facts about models. They are stored because models change rarely and every request reads them.
#[derive(Debug, Default)]
pub(crate) struct ModelCatalog {
    /// First model of all workers, if they agree; see [`only_model`](Self::only_model).
    only_model: RwLock<Option<String>>,
    /// Dialect of all workers; see [`dialect`](Self::dialect).
    dialect: RwLock<Dialect>,
    /// Hash name of each model whose hash name differs from its name.
    hash_names: RwLock<HashMap<String, String>>,
    /// Longest context of each model; see [`context_limit`](Self::context_limit).
    context_limits: RwLock<HashMap<String, u32>>,
}

impl ModelCatalog {
    /// Returns the model of requests that name none: the first model of every worker that has
    /// listed its models. `None` if no worker has listed any, or the workers' first models differ:
    /// then the model depends on the worker, which is not chosen yet, and such a request matches
    /// only others without a name.
    pub(crate) fn only_model(&self) -> Option<String> {
        self.only_model.read().clone()
    }

    /// Returns the hash name of `model` if it differs from the name: a worker's events do not contain
    /// the name under which the base model was requested. `None` if the name is its own hash name, or
    /// workers disagree.
    pub(crate) fn hash_name_of(&self, model: &str) -> Option<String> {
        self.hash_names.read().get(model).cloned()
    }

    /// Returns the longest context of `model`, in tokens, on any worker. Every engine refuses a longer
    /// prompt. `None` if a worker that serves the model reports no limit, or none serves it.
    pub(crate) fn context_limit(&self, model: &str) -> Option<u32> {
        self.context_limits.read().get(model).copied()
    }

    /// Returns the engine whose conversion of requests to chats is followed: SGLang's if all workers
    /// that list models are SGLang's.
    pub(crate) fn dialect(&self) -> Dialect {
        *self.dialect.read()
    }

    /// Compares the lists of models again. `workers` returns all workers.
    pub(super) fn update(&self, workers: impl FnOnce() -> Vec<Arc<Worker>>) {
        // Locked throughout: of two concurrent calls, the later one sees all changes.
        let mut only_model = self.only_model.write();
        let workers = workers();
        *self.hash_names.write() = find_hash_names(workers.iter());
        *self.context_limits.write() = find_context_limits(workers.iter());
        let mut known = workers
            .iter()
            .filter(|worker| worker.models.known_first().is_some())
            .peekable();
        let is_sglang =
            known.peek().is_some() && known.all(|worker| worker.models.is_owned_by("sglang"));
        *self.dialect.write() = if is_sglang {
            Dialect::Sglang
        } else {
            Dialect::Vllm
        };
        let mut models = workers
            .iter()
            .filter_map(|worker| worker.models.known_first());
        let first = models.next();
        *only_model = first.filter(|first| models.all(|model| model == *first));
    }
}

/// Returns the hash name of each model whose hash name differs from its name, if all workers that
/// serve the model agree.
fn find_hash_names<'w>(workers: impl Iterator<Item = &'w Arc<Worker>>) -> HashMap<String, String> {
    let mut hash_names = HashMap::<String, String>::new();
    let mut disputed = HashSet::new();
    for worker in workers {
        for (name, hash_name) in worker.models.hash_names().iter() {
            let known = hash_names.entry(name.clone());
            if known.or_insert_with(|| hash_name.clone()) != hash_name {
                disputed.insert(name.clone());
            }
        }
    }
    hash_names.retain(|name, hash_name| name != hash_name && !disputed.contains(name));
    hash_names
}

/// Returns the longest context of each model on any worker, if all workers that serve the model
/// report one.
fn find_context_limits<'w>(workers: impl Iterator<Item = &'w Arc<Worker>>) -> HashMap<String, u32> {
    let mut limits = HashMap::<String, Option<u32>>::new();
    for worker in workers {
        for (name, limit) in worker.models.context_limits().iter() {
            let known = limits.entry(name.clone()).or_insert(*limit);
            *known = known.zip(*limit).map(|(known, limit)| known.max(limit));
        }
    }
    limits
        .into_iter()
        .filter_map(|(name, limit)| Some((name, limit?)))
        .collect()
}
