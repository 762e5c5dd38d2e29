//! The decision that the router would make now, and the costs that lead to it.

use std::sync::Arc;

use foresee_prefix::WorkerIndex;

use crate::assessment::RequestAssessment;
use crate::batch_costs::BatchCosts;
use crate::policy::{BatchRule, Candidates};
use crate::request::{Candidate, Explanation, PassedOver, PreparedRequest, SelectError};
use crate::state::State;

impl State {
    /// Returns the decision that would be made now for the batch with these costs, without making
    /// it. Replication is considered for a single prompt only.
    ///
    /// # Errors
    /// As [`select_worker`](Self::select_worker).
    pub(crate) fn explain(
        &self,
        requests: &[PreparedRequest<'_>],
        batch_costs: &BatchCosts,
    ) -> Result<Explanation, SelectError> {
        let request = requests.first().ok_or(SelectError::NoWorker)?;
        let excluded = self.excluded(request);
        let eligible = self.workers.selectable(request, &excluded, self.now)?;
        let assessment = self.assess(request);
        let (mut costs, tie_breakers) =
            self.policy_costs(request, &assessment, &eligible, batch_costs);
        let probabilities = self.selector.probabilities(&mut costs, &tie_breakers);
        let mut candidates: Vec<Candidate> = eligible
            .iter()
            .zip(costs.iter().zip(probabilities))
            .filter_map(|(&index, (&policy_cost, probability))| {
                let worker = self.workers.by_index(index)?;
                let load = self.workers.loads[index as usize];
                Some(Candidate {
                    id: worker.id,
                    name: Arc::clone(&worker.name),
                    requests: load.requests,
                    active_blocks: load.projected_blocks(),
                    prefix_match: batch_costs.prefix_matches[index as usize],
                    cost: batch_costs.costs[index as usize],
                    delay: batch_costs.delays[index as usize],
                    policy_cost,
                    probability,
                })
            })
            .collect();
        if candidates.is_empty() {
            return Err(SelectError::NoWorker);
        }
        candidates.sort_unstable_by_key(|candidate| candidate.id);
        let mut explanation = Explanation {
            policy: self.config.policy,
            overlap_weight: self.config.overlap_weight,
            ttft_weight: self.config.ttft_weight,
            temperature: self.config.temperature,
            replicates_prefix_to: None,
            trial_on: self.workers.due_trial(request, self.now),
            passed_over: self.passed_over(request, &candidates),
            candidates,
        };
        if let ([request], Some(chosen)) = (requests, explanation.expected_choice()) {
            let chosen = chosen.id;
            explanation.replicates_prefix_to =
                self.with_placed(chosen, &assessment, request, |placed| {
                    self.replication_regret.peek(placed)
                });
        }
        Ok(explanation)
    }

    /// Returns the costs that the policy compares on the `eligible` workers, and the tie breakers:
    /// those of the batch, or those of its first request if the policy looks at nothing else.
    fn policy_costs(
        &self,
        request: &PreparedRequest<'_>,
        assessment: &RequestAssessment,
        eligible: &[WorkerIndex],
        batch_costs: &BatchCosts,
    ) -> (Vec<f64>, Vec<f64>) {
        let policy = self.selector.policy();
        if policy.batch_rule() != BatchRule::FirstPrompt {
            let of_eligible = |sums: &[f64]| {
                let sums = eligible.iter().map(|&index| sums[index as usize]);
                sums.collect()
            };
            return (
                of_eligible(&batch_costs.objective),
                of_eligible(&batch_costs.tie_breakers),
            );
        }
        let profile = self.request_profile(request, assessment);
        let prefix_matches = &assessment.prefix_matches;
        let candidates = Candidates::new(&self.workers, eligible, prefix_matches, self.now);
        let mut costs = Vec::new();
        policy.costs(&profile, &candidates, &mut costs);
        let views = candidates.iter();
        let tie_breakers = views.map(|view| policy.tie_breaker(&profile, &view));
        (costs, tie_breakers.collect())
    }

    /// Returns the eligible workers that are neither excluded nor candidates, with the reason.
    fn passed_over(
        &self,
        request: &PreparedRequest<'_>,
        candidates: &[Candidate],
    ) -> Vec<PassedOver> {
        let excluded = self.excluded(request);
        let is_candidate = |id| {
            let known = candidates.binary_search_by_key(&id, |candidate| candidate.id);
            known.is_ok()
        };
        let eligible = self
            .workers
            .eligible(request.model_name())
            .unwrap_or_default();
        let mut passed_over: Vec<PassedOver> = eligible
            .iter()
            .filter(|index| !excluded.contains(index))
            .filter_map(|&index| {
                let worker = self.workers.by_index(index)?;
                Some(PassedOver {
                    id: worker.id,
                    name: worker.name.clone(),
                    restriction: self.workers.restriction(index, self.now)?,
                })
            })
            .filter(|worker| !is_candidate(worker.id))
            .collect();
        passed_over.sort_unstable_by_key(|worker| worker.id);
        passed_over
    }
}
