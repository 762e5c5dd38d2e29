//! Costs of a request with several prompts, on each worker.

use foresee_prefix::{PrefixMatch, WorkerIndex};

use crate::load::Load;
use crate::policy::kv_cost::{KvCost, KvCostInput};
use crate::policy::marginal_delay::MarginalDelay;
use crate::policy::{Decision, EarlierPrompts, RequestProfile};
use crate::queue::PrefillTotals;
use crate::worker_id::WorkerId;

/// Costs of a batch on each worker, by worker index.
#[derive(Debug)]
pub(crate) struct BatchCosts {
    /// Costs in blocks, summed over the prompts.
    pub(crate) costs: Vec<KvCost>,
    /// Costs in seconds, summed over the prompts. Zero for workers that are not evaluated, and if
    /// no explanation is wanted.
    pub(crate) delays: Vec<MarginalDelay>,
    /// Sums of the policy's costs. Infinite for workers that are not evaluated.
    pub(crate) objective: Vec<f64>,
    /// Sums of the policy's tie breakers.
    pub(crate) tie_breakers: Vec<f64>,
    /// Prefix matches, summed over the prompts.
    pub(crate) prefix_matches: Vec<PrefixMatch>,
    /// Prompts added so far.
    pub(crate) earlier: Vec<EarlierPrompts>,
}

impl BatchCosts {
    /// Returns the costs of no prompt on the workers with these loads, with an infinite objective.
    pub(crate) fn new(loads: &[Load]) -> Self {
        let mut batch_costs = Self {
            costs: Vec::new(),
            delays: Vec::new(),
            objective: Vec::new(),
            tie_breakers: Vec::new(),
            prefix_matches: Vec::new(),
            earlier: Vec::new(),
        };
        batch_costs.extend(loads);
        batch_costs
    }

    /// Adds entries for the workers that were added since, given the loads of all workers.
    pub(crate) fn extend(&mut self, loads: &[Load]) {
        let workers = loads.len();
        let idle_cost = |load: &Load| KvCost::idle(load.projected_blocks());
        let added = loads.iter().skip(self.costs.len());
        self.costs.extend(added.map(idle_cost));
        self.delays.resize(workers, MarginalDelay::default());
        self.objective.resize(workers, f64::INFINITY);
        self.tie_breakers.resize(workers, 0.0);
        self.prefix_matches.resize(workers, PrefixMatch::default());
        self.earlier.resize(workers, EarlierPrompts::default());
    }

    /// Starts a sum of the policy's costs over all prompts on the `evaluated` workers.
    pub(crate) fn start_objective(&mut self, evaluated: &[WorkerIndex]) {
        self.earlier.fill(EarlierPrompts::default());
        for &index in evaluated {
            self.objective[index as usize] = 0.0;
        }
    }

    /// Adds the costs of the next prompt in blocks, and its prefix matches, on all workers.
    pub(crate) fn add_blocks(
        &mut self,
        profile: &RequestProfile<'_>,
        prefix_matches: &[PrefixMatch],
    ) {
        let sums = self.costs.iter_mut().zip(&mut self.prefix_matches);
        for ((cost, sum), &prefix_match) in sums.zip(prefix_matches) {
            cost.add(KvCostInput::from(profile), prefix_match);
            sum.cached_blocks = sum.cached_blocks.saturating_add(prefix_match.cached_blocks);
            sum.active_blocks = sum.active_blocks.saturating_add(prefix_match.active_blocks);
        }
    }

    /// Adds the next prompt to the earlier prompts of the ones that follow it, on all workers.
    pub(crate) fn add_earlier(
        &mut self,
        profile: &RequestProfile<'_>,
        prefix_matches: &[PrefixMatch],
    ) {
        for (earlier, &prefix_match) in self.earlier.iter_mut().zip(prefix_matches) {
            let added = KvCostInput::from(profile).cost(0, prefix_match);
            earlier.active_blocks += added.active_blocks;
            earlier.prefill += PrefillTotals {
                requests: 1,
                work: profile.prefill_work(prefix_match),
            };
        }
    }

    /// Returns the decision to place the batch on `worker`.
    pub(crate) fn decision(&self, worker: WorkerId) -> Decision {
        let best = self.costs.iter().map(|cost| cost.overlap_blocks).max();
        Decision {
            cost: self.costs[worker.index as usize],
            prefix_match: self.prefix_matches[worker.index as usize],
            best_overlap_blocks: best.unwrap_or(0),
        }
    }
}
