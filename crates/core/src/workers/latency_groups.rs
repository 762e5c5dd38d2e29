//! Groups of workers that run the same model: their shared latency model, and the longest of their
//! queues.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use foresee_forecast::{ArrivalRate, SharedLatencyModel};
use foresee_prefix::WorkerIndex;
use foresee_prefix::counter::Counter;

use crate::learned::{LearnedLatency, LearnedModel};
use crate::workers::MAX_WORKERS;
use crate::workers::earlier::Earlier;

/// Maximum number of groups. Each worker is in one group, and one group must be free for a worker
/// that changes its group, so the limit is reached only while some groups have no worker. Those are
/// then reused.
const MAX_GROUPS: usize = MAX_WORKERS + 1;

/// All groups. A group without workers keeps its latency model, for a worker that comes back.
#[derive(Debug, Default)]
pub(super) struct LatencyGroups {
    groups: Vec<LatencyGroup>,
    /// Index of each group by the name of its model.
    by_model: HashMap<Arc<str>, usize>,
    /// Number of times that a group lost its last worker.
    departures: u64,
}

/// Workers whose first model has one name.
#[derive(Debug)]
struct LatencyGroup {
    /// Name of the model; empty for workers of unknown models.
    model: Arc<str>,
    latency_model: SharedLatencyModel,
    /// Number of workers in the group.
    workers: usize,
    /// Arrival rate of all of them together.
    arrival_rate: ArrivalRate,
    /// Value of [`LatencyGroups::departures`] when the group lost its last worker.
    departed_at: u64,
    /// Lengths of the worker queues in the group that are not empty, with their workers.
    queue_lengths: BTreeSet<(u32, WorkerIndex)>,
}

/// Returns the model that decides the group of a worker with these models; empty if they are unknown.
/// Only the first name counts: engines list the model that they run before its LoRA adapters, which
/// come and go.
pub(super) fn model_of(models: &[String]) -> &str {
    models.first().map(String::as_str).unwrap_or_default()
}

impl LatencyGroups {
    /// Adds a worker that serves these models to its group, and returns the index of the group.
    /// Workers of unknown models share a group. A new group beyond
    /// [`MAX_GROUPS`] replaces the one that has been without a worker for longest, and starts with
    /// what an earlier router has learned.
    pub(super) fn join(&mut self, models: &[String], earlier: &Earlier) -> usize {
        let model = model_of(models);
        let index = match self.by_model.get(model) {
            Some(&index) => index,
            None => self.create(model, earlier.latency_model(model)),
        };
        if let Some(group) = self.groups.get_mut(index) {
            group.workers += 1;
        }
        index
    }

    /// Creates a group without workers for a model that has none, which starts with this latency
    /// model, and returns its index.
    fn create(&mut self, model: &str, latency_model: SharedLatencyModel) -> usize {
        let group = LatencyGroup {
            model: model.into(),
            latency_model,
            workers: 0,
            arrival_rate: ArrivalRate::default(),
            departed_at: 0,
            queue_lengths: BTreeSet::new(),
        };
        let index = match self.longest_without_workers() {
            Some(index) if self.groups.len() >= MAX_GROUPS => {
                self.by_model.remove(&self.groups[index].model);
                index
            }
            _ => self.groups.len(),
        };
        self.by_model.insert(Arc::clone(&group.model), index);
        match self.groups.get_mut(index) {
            Some(replaced) => *replaced = group,
            None => self.groups.push(group),
        }
        index
    }

    /// Returns the index of the group that has been without a worker for longest.
    fn longest_without_workers(&self) -> Option<usize> {
        let is_full = self.groups.len() >= MAX_GROUPS;
        let without_workers = self
            .groups
            .iter()
            .enumerate()
            .filter(|(_, group)| is_full && group.workers == 0);
        let longest = without_workers.min_by_key(|(_, group)| group.departed_at);
        longest.map(|(index, _)| index)
    }

    /// Removes a worker, whose queue has this length, from the group at `index`.
    pub(super) fn leave(&mut self, index: usize, worker: WorkerIndex, queue_length: u32) {
        self.set_queue_length(index, worker, queue_length, 0);
        if let Some(group) = self.groups.get_mut(index) {
            group.workers.subtract(1);
            if group.workers == 0 {
                self.departures += 1;
                group.departed_at = self.departures;
            }
        }
    }

    /// Records that the queue of a worker in the group at `index` has another length.
    pub(super) fn set_queue_length(
        &mut self,
        index: usize,
        worker: WorkerIndex,
        old: u32,
        new: u32,
    ) {
        if let Some(group) = self.groups.get_mut(index) {
            group.queue_lengths.remove(&(old, worker));
            if new > 0 {
                group.queue_lengths.insert((new, worker));
            }
        }
    }

    /// Returns the worker with the longest queue in the group at `index`; of several, that with the
    /// largest index. `None` if all queues are empty.
    pub(super) fn longest_queue(&self, index: usize) -> Option<WorkerIndex> {
        let longest = self.groups.get(index)?.queue_lengths.last();
        longest.map(|&(_, worker)| worker)
    }

    /// Returns the model of the group at `index`; empty for workers of unknown models.
    pub(super) fn model(&self, index: usize) -> Option<&str> {
        self.groups.get(index).map(|group| &*group.model)
    }

    /// Returns the latency models with samples.
    pub(super) fn learned(&self) -> Vec<LearnedModel> {
        let groups = self.groups.iter().map(|group| LearnedModel {
            model: group.model.to_string(),
            latency: group.latency_model.learned(),
        });
        let has_samples = |learned: &LearnedModel| {
            let LearnedLatency {
                prefill,
                decode_step,
            } = &learned.latency;
            prefill.samples + decode_step.samples > 0
        };
        groups.filter(has_samples).collect()
    }

    /// Returns the arrival rate of the group at `index`, for writing.
    pub(super) fn arrival_rate_mut(&mut self, index: usize) -> Option<&mut ArrivalRate> {
        let group = self.groups.get_mut(index)?;
        Some(&mut group.arrival_rate)
    }

    /// Returns the mean fraction of their time that prefills take on the workers of the group at
    /// `index`; 0 without workers.
    pub(super) fn mean_prefill_utilisation(&self, index: usize, now: Duration) -> f64 {
        let Some(group) = self.groups.get(index).filter(|group| group.workers > 0) else {
            return 0.0;
        };
        let (_, utilisation) = group.arrival_rate.rates(now);
        utilisation / group.workers as f64
    }

    /// Returns the latency model of the group at `index`, which must exist.
    #[inline]
    pub(super) fn latency_model(&self, index: usize) -> &SharedLatencyModel {
        &self.groups[index].latency_model
    }

    /// Returns the latency model of the group at `index`, for writing.
    pub(super) fn latency_model_mut(&mut self, index: usize) -> Option<&mut SharedLatencyModel> {
        let group = self.groups.get_mut(index)?;
        Some(&mut group.latency_model)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_utilisation_is_that_of_all_workers_of_the_group() {
        let mut groups = LatencyGroups::default();
        let (models, now) = (["a".to_owned()], Duration::ZERO);
        let index = groups.join(&models, &Earlier::default());
        assert_eq!(groups.mean_prefill_utilisation(index, now), 0.0);
        // An arrival counts for ten seconds, at steps of 10 ms.
        let rate = groups.arrival_rate_mut(index).unwrap();
        rate.add(2.0, 0.01, now);
        rate.add(4.0, 0.01, now);
        assert!((groups.mean_prefill_utilisation(index, now) - 0.6).abs() < 1e-9);
        groups.join(&models, &Earlier::default());
        assert!((groups.mean_prefill_utilisation(index, now) - 0.3).abs() < 1e-9);
        let other = groups.join(&["b".to_owned()], &Earlier::default());
        assert_eq!(groups.mean_prefill_utilisation(other, now), 0.0);
        groups.leave(other, 2, 0);
        assert_eq!(groups.mean_prefill_utilisation(other, now), 0.0);
    }

    #[test]
    fn a_group_without_workers_is_replaced_at_the_limit() {
        let mut groups = LatencyGroups::default();
        let model = |number: usize| [format!("model {number}")];
        let first = groups.join(&model(0), &Earlier::default());
        for number in 1..MAX_GROUPS {
            let index = groups.join(&model(number), &Earlier::default());
            if number == 7 || number == 5 {
                groups.leave(index, number as WorkerIndex, 0);
            }
        }
        assert_eq!(
            groups.join(&model(MAX_GROUPS), &Earlier::default()),
            5,
            "the first that departed"
        );
        assert_eq!(
            groups.join(&model(0), &Earlier::default()),
            first,
            "a known model keeps its group"
        );
        assert_eq!(
            groups.join(&model(7), &Earlier::default()),
            7,
            "so does one without workers"
        );
        assert_eq!(groups.groups.len(), MAX_GROUPS);
    }

    #[test]
    fn the_longest_queue_is_that_of_the_group() {
        let mut groups = LatencyGroups::default();
        let index = groups.join(&["a".to_owned()], &Earlier::default());
        assert_eq!(groups.longest_queue(index), None);
        groups.set_queue_length(index, 3, 0, 2);
        groups.set_queue_length(index, 9, 0, 1);
        assert_eq!(groups.longest_queue(index), Some(3));
        groups.set_queue_length(index, 9, 1, 2);
        assert_eq!(groups.longest_queue(index), Some(9));
        groups.leave(index, 9, 2);
        groups.set_queue_length(index, 3, 2, 0);
        assert_eq!(groups.longest_queue(index), None);
    }
}
