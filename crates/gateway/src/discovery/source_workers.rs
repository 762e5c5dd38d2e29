//! The workers of one source of discovery: applies what the source lists, and reports how that went.

use std::sync::Arc;

use crate::clock::since_epoch;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::workers::reconcile::{Reconciler, Source};
use crate::workers::worker_config::WorkerConfig;

/// Workers of one source.
#[derive(Debug)]
pub(super) struct SourceWorkers {
    source: Source,
    reconciler: Arc<Reconciler>,
    metrics: Arc<Metrics>,
}

impl SourceWorkers {
    /// Creates the series of a source that has listed nothing yet.
    pub(super) fn new(source: Source, reconciler: Arc<Reconciler>, metrics: Arc<Metrics>) -> Self {
        let workers = Self {
            source,
            reconciler,
            metrics,
        };
        let (metrics, label) = (&workers.metrics, workers.label());
        metrics.discovery_workers.get_or_create(&label).set(0);
        drop(metrics.discovery_errors.get_or_create(&label));
        let success = &metrics.discovery_last_success_timestamp_seconds;
        success.get_or_create(&label).set(0.0);
        workers
    }

    /// Returns the label of the source's series.
    fn label(&self) -> Vec<(&'static str, String)> {
        vec![("source", self.source.to_string())]
    }

    /// Makes the workers of the source these. Returns whether all of them are in use.
    pub(super) fn apply(&self, engines: Vec<WorkerConfig>) -> bool {
        let source = &self.source;
        let (changes, errors) = self.reconciler.reconcile_each(source, engines);
        for error in &errors {
            self.fail(&error.to_string());
        }
        if !changes.is_empty() {
            tracing::info!(
                %source, added = changes.added.len(), replaced = changes.replaced.len(),
                removed = changes.removed.len(), "list of workers changed"
            );
        }
        let engine_count = i64::try_from(self.reconciler.engine_count(source)).unwrap_or(i64::MAX);
        let gauge = &self.metrics.discovery_workers;
        gauge.get_or_create(&self.label()).set(engine_count);
        if errors.is_empty() {
            self.succeed();
        }
        errors.is_empty()
    }

    /// Counts and logs a list that was not read or used, or not as a whole.
    pub(super) fn fail(&self, error: &str) {
        let source = &self.source;
        let errors = &self.metrics.discovery_errors;
        errors.get_or_create(&self.label()).inc();
        let key = source.to_string();
        warn_limited!(
            key: &key, %source, error,
            "cannot use a list of workers; keeping the workers of the last one"
        );
    }

    /// Notes that the list of the source is in force.
    pub(super) fn succeed(&self) {
        let success = &self.metrics.discovery_last_success_timestamp_seconds;
        let success = success.get_or_create(&self.label());
        success.set(since_epoch().as_secs_f64());
    }
}
