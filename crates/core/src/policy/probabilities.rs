//! How likely each worker is to be chosen, for explanations.

use super::{CandidateSet, Policy};
use crate::active_tree::WorkerIndex;

impl CandidateSet<'_> {
    /// Returns each eligible worker with the probability that [`select`](Self::select) chooses it.
    ///
    /// The probabilities sum to 1 unless no worker is eligible. Arguments are those of `select`,
    /// which uses the random numbers that this function integrates over.
    pub(crate) fn selection_probabilities(
        &self,
        policy: Policy,
        temperature: f64,
        block_size: usize,
        round_robin_cursor: u64,
    ) -> Vec<(WorkerIndex, f64)> {
        match policy {
            Policy::Kv | Policy::MarginalDelay if temperature > 0.0 => {
                normalized(self.softmax_weights(policy, temperature).collect())
            }
            Policy::Kv => self.uniform_over_minimum(|worker| {
                let cost = self.charged_kv_cost(worker);
                (cost.total, f64::from(cost.prefill_blocks))
            }),
            Policy::MarginalDelay => self.uniform_over_minimum(|worker| {
                let delay = self.policy_cost(policy, worker);
                // As `select` does, treats a cost that is not a number as infinite.
                (if delay.is_nan() { f64::INFINITY } else { delay }, 0.0)
            }),
            Policy::Random => self.uniform_over_minimum(|_| (0.0, 0.0)),
            Policy::LeastRequests => {
                self.uniform_over_minimum(|worker| (self.requests(worker), 0.0))
            }
            Policy::PowerOfTwo => self.power_of_two_probabilities(),
            Policy::RoundRobin => self.certainly(self.round_robin(round_robin_cursor)),
            Policy::ConsistentHash => match self.consistent_hash_key(block_size) {
                Some(key) => self.certainly(self.bounded_consistent_hash(key)),
                None => self.uniform_over_minimum(|worker| (self.requests(worker), 0.0)),
            },
        }
    }

    /// Returns probability 1 for `chosen` and 0 for every other worker.
    fn certainly(&self, chosen: Option<WorkerIndex>) -> Vec<(WorkerIndex, f64)> {
        self.worker_indices()
            .map(|worker| (worker, f64::from(u8::from(Some(worker) == chosen))))
            .collect()
    }

    /// Returns equal probabilities for the workers of the least `measure`, and 0 for the others.
    fn uniform_over_minimum(
        &self,
        measure: impl Fn(WorkerIndex) -> (f64, f64),
    ) -> Vec<(WorkerIndex, f64)> {
        let measured: Vec<_> = self
            .worker_indices()
            .map(|worker| (worker, measure(worker)))
            .collect();
        let minimum = measured
            .iter()
            .map(|(_, value)| *value)
            .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let weights = measured
            .into_iter()
            .map(|(worker, value)| (worker, f64::from(u8::from(Some(value) == minimum))))
            .collect();
        normalized(weights)
    }

    /// Returns the probabilities of choosing the less loaded of two distinct workers drawn at
    /// random, the first drawn if both have equally many requests.
    fn power_of_two_probabilities(&self) -> Vec<(WorkerIndex, f64)> {
        let workers: Vec<_> = self.worker_indices().collect();
        let mut sorted: Vec<_> = workers
            .iter()
            .map(|&worker| self.requests(worker))
            .collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let pairs = (workers.len() * workers.len().saturating_sub(1)).max(1) as f64;
        let probability = |worker: WorkerIndex| {
            if workers.len() == 1 {
                return 1.0;
            }
            let requests = self.requests(worker);
            let more = sorted.len() - sorted.partition_point(|&other| other <= requests);
            // Without the worker itself, which is no pair with itself.
            let at_least = sorted.len() - sorted.partition_point(|&other| other < requests) - 1;
            // Drawn first it beats workers with at least as many requests; drawn second, those
            // with more.
            (at_least + more) as f64 / pairs
        };
        workers
            .iter()
            .map(|&worker| (worker, probability(worker)))
            .collect()
    }
}

/// Returns the weights divided by their sum.
fn normalized(mut weights: Vec<(WorkerIndex, f64)>) -> Vec<(WorkerIndex, f64)> {
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    weights.iter_mut().for_each(|(_, weight)| *weight /= total);
    weights
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::kv_cost::KvCost;
    use crate::policy::CostSource;
    use crate::workers::{WorkerSpec, Workers};

    fn with_delays<T>(delays: &[f64], check: impl FnOnce(&CandidateSet<'_>) -> T) -> T {
        let mut workers = Workers::default();
        let mut eligible = Vec::new();
        for index in 0..delays.len() {
            let spec = WorkerSpec {
                name: index.to_string(),
                ..WorkerSpec::default()
            };
            eligible.push(workers.add(&spec, [].into(), Duration::ZERO).unwrap().index);
        }
        let costs = vec![KvCost::idle(0); delays.len()];
        check(&CandidateSet {
            eligible: &eligible,
            excluded: &[],
            workers: &workers,
            costs: CostSource::Precomputed(&costs, delays),
            hashes: &[],
            now: Duration::ZERO,
        })
    }

    #[test]
    fn a_cost_that_is_not_a_number_is_never_sampled_and_spoils_no_other() {
        with_delays(&[f64::NAN, 1.0, f64::INFINITY, 1.0], |candidates| {
            let policy = Policy::MarginalDelay;
            let probabilities = candidates.selection_probabilities(policy, 0.5, 16, 0);
            let values: Vec<f64> = probabilities.iter().map(|(_, value)| *value).collect();
            assert_eq!(values, [0.0, 0.5, 0.0, 0.5]);
            let mut rng = SmallRng::seed_from_u64(7);
            for _ in 0..100 {
                let chosen = candidates.select(policy, 0.5, 16, 0, &mut rng).unwrap();
                assert!(chosen == 1 || chosen == 3);
            }
        });
    }

    #[test]
    fn without_any_finite_cost_every_worker_is_equally_likely() {
        with_delays(&[f64::NAN, f64::INFINITY], |candidates| {
            let mut rng = SmallRng::seed_from_u64(7);
            for temperature in [0.0, 0.5] {
                let probabilities =
                    candidates.selection_probabilities(Policy::MarginalDelay, temperature, 16, 0);
                let total: f64 = probabilities.iter().map(|(_, value)| value).sum();
                assert!((total - 1.0).abs() < 1e-9);
                let chosen = candidates.select(Policy::MarginalDelay, temperature, 16, 0, &mut rng);
                assert!(chosen.is_some());
            }
        });
    }
}
