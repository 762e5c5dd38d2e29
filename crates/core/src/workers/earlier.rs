//! Speeds that an earlier router has learned, for workers and models that have not come yet.

use std::collections::HashMap;
use std::time::Duration;

use foresee_forecast::{LatencyEstimator, SharedLatencyModel};

use crate::learned::{InvalidLearned, Learned, LearnedModel, LearnedSpeed};
use crate::workers::MAX_WORKERS;

/// Latency models by model, and speeds by worker.
#[derive(Debug, Default)]
pub(crate) struct Earlier {
    models: HashMap<String, SharedLatencyModel>,
    /// Speeds by the names of the worker and of its model.
    workers: HashMap<(String, String), LearnedSpeed>,
}

impl Earlier {
    /// Checks what an earlier router has learned. Entries beyond the maximum number of workers are
    /// left out.
    pub(crate) fn new(learned: &Learned) -> Result<Self, InvalidLearned> {
        let mut earlier = Self::default();
        for LearnedModel { model, latency } in learned.models.iter().take(MAX_WORKERS) {
            let latency = SharedLatencyModel::restore(latency)?;
            earlier.models.insert(model.clone(), latency);
        }
        for learned in learned.workers.iter().take(MAX_WORKERS) {
            LatencyEstimator::restore(&learned.speed, Duration::ZERO)?;
            let key = (learned.worker.clone(), learned.model.clone());
            earlier.workers.insert(key, learned.speed);
        }
        Ok(earlier)
    }

    /// Returns the latency model with which the workers of `model` start.
    pub(super) fn latency_model(&self, model: &str) -> SharedLatencyModel {
        self.models.get(model).cloned().unwrap_or_default()
    }

    /// Returns the latency estimator with which a worker that runs `model` starts, if its speed is
    /// known.
    pub(super) fn estimator(
        &self,
        worker: &str,
        model: &str,
        now: Duration,
    ) -> Option<LatencyEstimator> {
        let speed = self.workers.get(&(worker.to_owned(), model.to_owned()))?;
        LatencyEstimator::restore(speed, now).ok()
    }
}
