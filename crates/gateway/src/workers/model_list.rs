//! The models that one worker serves, as it lists them.

use std::borrow::Cow;

use parking_lot::{RwLock, RwLockReadGuard};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::sync::watch;

/// Name of a model, with its entry of `/v1/models`, as the worker wrote it.
pub(crate) type ListedModel = (String, Box<RawValue>);

/// Models that a worker serves.
#[derive(Debug)]
pub(crate) struct ModelList {
    listed: RwLock<Vec<ListedModel>>,
    /// Name of each model, with the name that is part of its blocks' hashes.
    hash_names: RwLock<Vec<(String, String)>>,
    /// Name of each model, with the longest context that the worker reports for it.
    context_limits: RwLock<Vec<(String, Option<u32>)>>,
    /// Whether the worker has listed its models; `None` until it was asked.
    known: watch::Sender<Option<bool>>,
}

impl Default for ModelList {
    fn default() -> Self {
        Self {
            listed: RwLock::default(),
            hash_names: RwLock::default(),
            context_limits: RwLock::default(),
            known: watch::Sender::new(None),
        }
    }
}

impl ModelList {
    /// Returns the models in the worker's order; none if they are unknown.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Vec<ListedModel>> {
        self.listed.read()
    }

    /// Returns the name of each model, with the name that is part of its blocks' hashes.
    pub(super) fn hash_names(&self) -> RwLockReadGuard<'_, Vec<(String, String)>> {
        self.hash_names.read()
    }

    /// Returns the name of each model, with the longest context that the worker reports for it.
    pub(super) fn context_limits(&self) -> RwLockReadGuard<'_, Vec<(String, Option<u32>)>> {
        self.context_limits.read()
    }

    /// Sets the worker's models. Returns whether their names, hash names or longest contexts changed.
    /// An empty list means that the models are unknown. Wakes the tasks that wait for the models.
    pub(super) fn set(&self, models: Vec<ListedModel>) -> bool {
        let known = !models.is_empty();
        let hash_names = hash_names(&models);
        let before = std::mem::replace(&mut *self.hash_names.write(), hash_names);
        let mut has_changed = before != *self.hash_names.read();
        let limits = context_limits(&models);
        let before = std::mem::replace(&mut *self.context_limits.write(), limits);
        has_changed |= before != *self.context_limits.read();
        *self.listed.write() = models;
        self.known.send_replace(Some(known));
        has_changed
    }

    /// Records that the worker was asked for its models and did not list them. Has no effect after
    /// the first request for them, so models that were listed before remain known.
    pub(crate) fn set_unknown(&self) {
        self.known.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(false);
            is_first
        });
    }

    /// Waits until the worker was asked for its models. Whether it listed any does not matter.
    /// There is no time limit.
    pub(crate) async fn until_asked(&self) {
        let mut known = self.known.subscribe();
        // The worker owns the sender, so waiting does not fail.
        let _ = known.wait_for(Option::is_some).await;
    }

    /// Returns whether a model of the worker names `engine` as its owner: `vllm` or `sglang`.
    /// Returns `false` while no models are known.
    pub(crate) fn is_owned_by(&self, engine: &str) -> bool {
        #[derive(Deserialize)]
        struct Model<'m> {
            #[serde(borrow)]
            owned_by: Cow<'m, str>,
        }
        let models = self.listed.read();
        let is_owner = |(_, entry): &ListedModel| {
            serde_json::from_str(entry.get()).is_ok_and(|model: Model<'_>| model.owned_by == engine)
        };
        models.iter().any(is_owner)
    }

    /// Waits until the worker has listed at least one model, and returns the name of the first.
    /// Sends no request itself: health checks read the list. There is no time limit.
    pub(crate) async fn first(&self) -> String {
        let mut known = self.known.subscribe();
        loop {
            // The worker owns the sender, so waiting does not fail.
            let _ = known.wait_for(|known| *known == Some(true)).await;
            if let Some(model) = self.known_first() {
                return model;
            }
            let _ = known.changed().await;
        }
    }

    /// Returns the name of the first model, if the worker has listed any.
    pub(crate) fn known_first(&self) -> Option<String> {
        self.listed.read().first().map(|(model, _)| model.clone())
    }
}

/// Returns the name of each model with its hash name: the name that is part of its blocks' hashes.
///
/// A model's hash name is its own name, except for further names of the first model: events do not
/// contain the name of the base model, so all its names share the first one. Such a name has the
/// same `root` as the first model and no `parent`; adapters have a `parent`.
///
/// If the first model has no `root`, or has a `parent`, every hash name is the model's own name.
fn hash_names(models: &[ListedModel]) -> Vec<(String, String)> {
    #[derive(Deserialize)]
    struct ModelCard {
        root: String,
        parent: Option<IgnoredAny>,
    }
    let root_of = |entry: &RawValue| {
        let card: ModelCard = serde_json::from_str(entry.get()).ok()?;
        card.parent.is_none().then_some(card.root)
    };
    let first = models.first();
    let first = first.and_then(|(name, entry)| Some((name, root_of(entry)?)));
    let hash_name = |name: &String, entry: &RawValue| match &first {
        Some((first_name, root)) if root_of(entry).as_ref() == Some(root) => (*first_name).clone(),
        _ => name.clone(),
    };
    models
        .iter()
        .map(|(name, entry)| (name.clone(), hash_name(name, entry)))
        .collect()
}

/// Returns the name of each model with its `max_model_len`: the longest context, in tokens, that the
/// engine accepts. `None` if the entry has none, as those of adapters.
fn context_limits(models: &[ListedModel]) -> Vec<(String, Option<u32>)> {
    #[derive(Deserialize)]
    struct ModelCard {
        max_model_len: Option<u32>,
    }
    let limit_of = |entry: &RawValue| {
        let card: ModelCard = serde_json::from_str(entry.get()).ok()?;
        card.max_model_len.filter(|limit| *limit > 0)
    };
    models
        .iter()
        .map(|(name, entry)| (name.clone(), limit_of(entry)))
        .collect()
}
