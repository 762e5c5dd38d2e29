//! Reconciliation: makes the workers of a gateway those that a source lists.
//!
//! Each source owns the workers that it has listed, and no other source changes them. Workers that
//! were added over HTTP belong to no source.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use foresee_core::workers::WorkerError;
use parking_lot::Mutex;

use crate::workers::Workers;
use crate::workers::removals::{DEFAULT_DRAIN_TIMEOUT, Removals};
use crate::workers::worker_config::WorkerConfig;

/// Where descriptions of workers come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// The configuration.
    Config,
    /// A file that lists workers.
    File(PathBuf),
    /// A URL that lists workers.
    Url(String),
    /// A name in DNS whose records are workers.
    Dns(String),
    /// Pods of Kubernetes, by their selector or pool.
    #[cfg_attr(not(feature = "kubernetes"), expect(dead_code))]
    Kubernetes(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config => f.write_str("the configuration"),
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => f.write_str(url),
            Self::Dns(name) => write!(f, "dns:{name}"),
            Self::Kubernetes(pods) => write!(f, "kubernetes:{pods}"),
        }
    }
}

/// A worker cannot be added.
#[derive(Debug, thiserror::Error)]
#[error("cannot add worker `{name}`: {error}")]
pub struct AddError {
    /// Name of the worker.
    pub name: String,
    /// Why it cannot be added.
    pub error: WorkerError,
}

/// Differences between the engines of two lists, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkerChanges {
    pub(crate) added: Vec<WorkerConfig>,
    /// Engines with another description: the old one and the new one.
    pub(crate) replaced: Vec<(WorkerConfig, WorkerConfig)>,
    pub(crate) removed: Vec<WorkerConfig>,
}

impl WorkerChanges {
    /// Compares the engines of two lists. Names are unique in each.
    fn between(old: &[WorkerConfig], new: &[WorkerConfig]) -> Self {
        let by_name = |engines: &[WorkerConfig]| -> HashMap<String, WorkerConfig> {
            let engines = engines.iter();
            engines
                .map(|engine| (engine.name.clone(), engine.clone()))
                .collect()
        };
        let (old_by_name, new_by_name) = (by_name(old), by_name(new));
        let mut changes = Self::default();
        for engine in new {
            match old_by_name.get(&engine.name) {
                None => changes.added.push(engine.clone()),
                Some(old) if old != engine => changes.replaced.push((old.clone(), engine.clone())),
                Some(_) => {}
            }
        }
        let is_removed = |engine: &&WorkerConfig| !new_by_name.contains_key(&engine.name);
        changes.removed = old.iter().filter(is_removed).cloned().collect();
        changes
    }

    /// Returns whether nothing differs.
    pub(crate) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.replaced.is_empty() && self.removed.is_empty()
    }
}

/// Changes the workers of a gateway to those that its sources list.
#[derive(Debug)]
pub(crate) struct Reconciler {
    workers: Arc<Workers>,
    removals: Arc<Removals>,
    /// Engines of each source. Locked during a reconciliation.
    by_source: Mutex<BySource>,
}

/// Engines of each source.
type BySource = HashMap<Source, Vec<WorkerConfig>>;

impl Reconciler {
    /// Creates the reconciler of a gateway that starts with the engines of its configuration.
    pub(crate) fn new(
        workers: Arc<Workers>,
        removals: Arc<Removals>,
        configured: Vec<WorkerConfig>,
    ) -> Self {
        Self {
            workers,
            removals,
            by_source: Mutex::new(HashMap::from([(Source::Config, configured)])),
        }
    }

    /// Makes the engines of a source these: adds and replaces workers, and drains those that the
    /// source no longer lists. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// Fails if a worker cannot be added. What was changed before it is changed back, and nothing else
    /// is changed.
    pub(crate) fn reconcile(
        &self,
        source: &Source,
        engines: Vec<WorkerConfig>,
    ) -> Result<WorkerChanges, AddError> {
        let mut by_source = self.by_source.lock();
        let old = by_source.remove(source).unwrap_or_default();
        let changes = WorkerChanges::between(&old, &engines);
        let mut done = Vec::new();
        let result = self.add_and_replace(&by_source, &changes, &mut done);
        if result.is_err() {
            self.undo(&done);
        } else {
            self.drain(&changes.removed);
        }
        let engines = if result.is_ok() { engines } else { old };
        by_source.insert(source.clone(), engines);
        result.map(|()| changes)
    }

    /// As [`reconcile`](Self::reconcile), but leaves out workers that cannot be added, and returns why.
    /// They are tried again the next time. Other workers are changed at most once.
    pub(crate) fn reconcile_each(
        &self,
        source: &Source,
        mut engines: Vec<WorkerConfig>,
    ) -> (WorkerChanges, Vec<AddError>) {
        let mut by_source = self.by_source.lock();
        let old = by_source.remove(source).unwrap_or_default();
        let mut changes = WorkerChanges::between(&old, &engines);
        let mut errors: HashMap<String, AddError> = HashMap::new();
        for engine in &changes.added {
            if let Err(error) = self.add_unowned(&by_source, engine) {
                errors.insert(engine.name.clone(), error);
            }
        }
        for (present, new) in &changes.replaced {
            if let Err(error) = self.replace(present, new) {
                errors.insert(new.name.clone(), error);
            }
        }
        self.drain(&changes.removed);
        self.remove_displaced(&changes.added);
        let failed = |name: &String| errors.contains_key(name);
        engines.retain(|engine| !failed(&engine.name));
        let unreplaced = changes.replaced.iter().filter(|(_, new)| failed(&new.name));
        engines.extend(unreplaced.map(|(present, _)| present.clone()));
        changes.added.retain(|engine| !failed(&engine.name));
        changes.replaced.retain(|(_, new)| !failed(&new.name));
        by_source.insert(source.clone(), engines);
        (changes, errors.into_values().collect())
    }

    /// Returns the number of engines of a source.
    pub(crate) fn engine_count(&self, source: &Source) -> usize {
        self.by_source.lock().get(source).map_or(0, Vec::len)
    }

    /// Adds and replaces workers until one cannot be added. Writes what was done to `done`.
    fn add_and_replace<'a>(
        &self,
        others: &BySource,
        changes: &'a WorkerChanges,
        done: &mut Vec<Step<'a>>,
    ) -> Result<(), AddError> {
        for engine in &changes.added {
            done.push(match self.add_unowned(others, engine)? {
                Addition::New => Step::Added(engine),
                Addition::Kept => Step::Kept,
                Addition::Undrained => Step::Undrained(engine),
            });
        }
        for (old, new) in &changes.replaced {
            self.replace(old, new)?;
            done.push(Step::Replaced(old, new));
        }
        Ok(())
    }

    /// Takes steps back, the last one first.
    fn undo(&self, done: &[Step<'_>]) {
        for step in done.iter().rev() {
            match step {
                Step::Added(engine) => self.removals.remove_now(&engine.name),
                Step::Kept => {}
                Step::Undrained(engine) => self.drain(std::slice::from_ref(*engine)),
                Step::Replaced(old, new) => {
                    self.removals.remove_now(&new.name);
                    // The old one fits where it was.
                    let _ = self.add(old);
                }
            }
        }
    }

    /// Removes an engine and adds another one of its name. The old one stays if that fails.
    fn replace(&self, old: &WorkerConfig, new: &WorkerConfig) -> Result<(), AddError> {
        self.removals.remove_now(&old.name);
        self.add(new).map(|_| ()).inspect_err(|_| {
            // The old one fits where it was.
            let _ = self.add(old);
        })
    }

    /// Drains engines, and removes them when they have no requests.
    fn drain(&self, engines: &[WorkerConfig]) {
        for engine in engines {
            let removals = &self.removals;
            removals.remove_when_drained(&engine.name, DEFAULT_DRAIN_TIMEOUT);
        }
    }

    /// Removes at once the workers that are being drained and whose address another process has now:
    /// their own is gone, and so are its responses.
    fn remove_displaced(&self, added: &[WorkerConfig]) {
        let added = added.iter().filter(|engine| engine.instance.is_some());
        let owners: HashMap<_, _> = added
            .map(|engine| (&engine.authority, &engine.instance))
            .collect();
        if owners.is_empty() {
            return;
        }
        for worker in self.workers.registry().all() {
            let config = &worker.config;
            let owner = owners.get(&config.authority);
            let is_displaced =
                config.instance.is_some() && owner.is_some_and(|owner| **owner != config.instance);
            if is_displaced && self.removals.is_pending(worker.id) {
                self.removals.remove_now(&config.name);
            }
        }
    }

    /// As [`add`](Self::add), but fails if one of the `others`, the engines of the other sources, has
    /// the name, even with the same description: that source alone removes it.
    fn add_unowned(&self, others: &BySource, engine: &WorkerConfig) -> Result<Addition, AddError> {
        let mut owned = others.values().flatten();
        if owned.any(|owned| owned.name == engine.name) {
            return Err(AddError {
                name: engine.name.clone(),
                error: WorkerError::NameTaken(engine.name.clone()),
            });
        }
        self.add(engine)
    }

    /// Adds an engine and starts its tasks. An engine of this name that is being removed stays, if it
    /// has the same description, and is otherwise removed at once. Has no effect if the engine is
    /// present with the same description.
    fn add(&self, engine: &WorkerConfig) -> Result<Addition, AddError> {
        if let Some(present) = self.workers.registry().first_of_engine(&engine.name) {
            let is_same = engine.workers().contains(&present.config);
            let is_leaving = self.removals.is_pending(present.id);
            match (is_same, is_leaving) {
                (true, true) => {
                    self.removals.set_draining(&engine.name, false);
                    return Ok(Addition::Undrained);
                }
                (true, false) => return Ok(Addition::Kept),
                (false, true) => self.removals.remove_now(&engine.name),
                (false, false) => {}
            }
        }
        let added = self.workers.add(engine).map_err(|error| AddError {
            name: engine.name.clone(),
            error,
        })?;
        self.workers.start(added);
        Ok(Addition::New)
    }
}

/// How an engine came to be present.
enum Addition {
    /// Its workers are new.
    New,
    /// It was present with the same description.
    Kept,
    /// It was being removed, with the same description, and stays.
    Undrained,
}

/// A change that can be taken back.
enum Step<'a> {
    Added(&'a WorkerConfig),
    Kept,
    Undrained(&'a WorkerConfig),
    Replaced(&'a WorkerConfig, &'a WorkerConfig),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engines(descriptions: &[&str]) -> Vec<WorkerConfig> {
        let parsed = descriptions.iter().map(|text| text.parse().unwrap());
        parsed.collect()
    }

    #[test]
    fn engines_are_compared_by_name() {
        let old = engines(&["a:1", "b:1", "c:1,name=c"]);
        let new = engines(&["a:1", "c:2,name=c", "d:1"]);
        let changes = WorkerChanges::between(&old, &new);
        assert_eq!(changes.added, engines(&["d:1"]));
        assert_eq!(changes.removed, engines(&["b:1"]));
        assert_eq!(changes.replaced, [(old[2].clone(), new[1].clone())]);
        assert!(WorkerChanges::between(&old, &old).is_empty());
    }
}
