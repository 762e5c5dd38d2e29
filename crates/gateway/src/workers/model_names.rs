//! Names of models that clients can use: those that workers list, and aliases of the operator.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use foresee_core::workers::WorkerId;
use foresee_engine::error::ApiError;
use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};
use serde_json::Value;

use crate::model_alias::{ModelAlias, Target};
use crate::workers::registry::WorkerRegistry;

/// Names of models that clients can use.
#[derive(Debug)]
pub(crate) struct ModelNames {
    registry: Arc<WorkerRegistry>,
    aliases: ArcSwap<Vec<ModelAlias>>,
    /// Number of choices without a session, each of which is a session of its own.
    choices: AtomicU64,
}

/// What the requests of one conversation have in common.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Conversation<'c> {
    /// Session that the client named.
    pub(crate) session: Option<&'c [u8]>,
    /// Worker that stored the response which the request continues.
    pub(crate) worker: Option<WorkerId>,
}

impl ModelNames {
    /// Creates the names of the models that the workers of `registry` list, and these aliases.
    pub(crate) fn new(registry: Arc<WorkerRegistry>, aliases: &[ModelAlias]) -> Self {
        Self {
            registry,
            aliases: ArcSwap::from_pointee(aliases.to_vec()),
            choices: AtomicU64::new(0),
        }
    }

    /// Replaces all aliases.
    pub(crate) fn set_aliases(&self, aliases: &[ModelAlias]) {
        self.aliases.store(Arc::new(aliases.to_vec()));
    }

    /// Returns whether there are aliases.
    pub(crate) fn has_aliases(&self) -> bool {
        !self.aliases.load().is_empty()
    }

    /// Returns the model that a request for `name` is sent to; `None` if `name` is not an alias.
    ///
    /// Models that no worker lists are left out. All requests of a session get the same model while
    /// the same models are listed, and a continued response stays on its worker. Without a session,
    /// the choice is random. The shares of the models are as their weights.
    ///
    /// # Errors
    /// Fails with a 404 if no worker lists one of the alias's models.
    pub(crate) fn resolve(
        &self,
        name: &str,
        conversation: Conversation<'_>,
    ) -> Result<Option<String>, ApiError> {
        let aliases = self.aliases.load();
        let Some(alias) = aliases.iter().find(|alias| alias.name == name) else {
            return Ok(None);
        };
        let worker = conversation.worker.and_then(|id| self.registry.get(id));
        let is_on_worker = |target: &&Target| {
            let models = worker.as_ref().map(|worker| worker.models.read());
            models.is_some_and(|models| models.iter().any(|(model, _)| *model == target.model))
        };
        let is_listed = |target: &&Target| self.registry.model_entry(&target.model).is_some();
        let mut candidates: Vec<&Target> = alias.targets.iter().filter(is_on_worker).collect();
        if candidates.is_empty() {
            candidates = alias.targets.iter().filter(is_listed).collect();
        }
        let choice = self.choices.fetch_add(1, Ordering::Relaxed).to_le_bytes();
        let session = conversation.session.unwrap_or(&choice);
        let score = |target: &Target| weighted_score(session, &target.model, target.weight);
        let best = candidates
            .into_iter()
            .max_by(|a, b| score(a).total_cmp(&score(b)));
        match best {
            Some(target) => Ok(Some(target.model.clone())),
            None => Err(ApiError::model_not_found(name, &self.all())),
        }
    }

    /// Returns all names: the aliases of which a model is listed, and the models that workers list,
    /// each once.
    pub(crate) fn all(&self) -> Vec<String> {
        let listed = self.registry.served_models();
        let mut names = Vec::new();
        for alias in self.aliases.load().iter() {
            let mut targets = alias.targets.iter();
            if targets.any(|target| listed.contains(&target.model)) {
                names.push(alias.name.clone());
            }
        }
        let others: Vec<String> = listed
            .into_iter()
            .filter(|model| !names.contains(model))
            .collect();
        names.extend(others);
        names
    }

    /// Returns the entry of `name` in the list of models, as the first worker that serves the model
    /// wrote it. The entry of an alias is that of its first model that is listed, under the name of
    /// the alias. `None` if nothing has the name.
    pub(crate) fn entry(&self, name: &str) -> Option<String> {
        let aliases = self.aliases.load();
        let Some(alias) = aliases.iter().find(|alias| alias.name == name) else {
            return self.registry.model_entry(name);
        };
        let mut targets = alias.targets.iter();
        let entry = targets.find_map(|target| self.registry.model_entry(&target.model))?;
        let mut entry: Value = serde_json::from_str(&entry).ok()?;
        *entry.get_mut("id")? = Value::from(name);
        Some(entry.to_string())
    }
}

/// Returns the score of a model for a session. The model with the largest score is each one with a
/// probability in proportion to its weight, and another set of models changes it only if it has to
/// (weighted rendezvous hashing). The score is the same in all processes.
fn weighted_score(session: &[u8], model: &str, weight: u32) -> f64 {
    let hash = |bytes| rapidhash_v3_seeded(bytes, &DEFAULT_RAPID_SECRETS);
    let parts = [hash(session), hash(model.as_bytes())];
    let hash = hash(&parts.map(u64::to_le_bytes).concat());
    // Above 0 and below 1, so that the logarithm is finite.
    let uniform = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -f64::from(weight) / uniform.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_as_the_weights_and_a_choice_moves_only_if_it_has_to() {
        let best = |session: u32, weights: &[(&'static str, u32)]| {
            let score = |(model, weight): &(&str, u32)| {
                weighted_score(&session.to_le_bytes(), model, *weight)
            };
            let best = weights.iter().max_by(|a, b| score(a).total_cmp(&score(b)));
            best.unwrap().0
        };
        let all = [("a", 80), ("b", 15), ("c", 5)];
        let choices: Vec<&str> = (0..20_000).map(|session| best(session, &all)).collect();
        for (model, weight) in all {
            let chosen = choices.iter().filter(|choice| **choice == model);
            let share = chosen.count() as f64 / 20_000.0;
            // Six standard deviations of the widest share.
            assert!(
                (share - f64::from(weight) / 100.0).abs() < 0.017,
                "{model} {share}"
            );
        }
        let without_c = &all[..2];
        for (session, choice) in (0..).zip(choices).filter(|(_, choice)| *choice != "c") {
            assert_eq!(best(session, without_c), choice);
        }
    }
}
