//! JSON of an explained decision: the response to `POST /admin/explain`.

use foresee_core::router::Explanation;
use serde_json::{Value, json};

/// Returns a routing decision with the costs of all candidates. `choice` is the expected choice, as
/// the actual one can be random.
#[must_use]
pub fn explanation_json(explanation: &Explanation) -> Value {
    let candidates = explanation.candidates.iter().map(|candidate| {
        let terms = candidate.delay.terms().into_iter();
        let delay_seconds: serde_json::Map<String, Value> = terms
            .map(|(name, seconds)| (name.to_owned(), json!(seconds)))
            .collect();
        json!({
            "worker": *candidate.name,
            "requests": candidate.requests,
            "active_blocks": candidate.active_blocks,
            "overlap_blocks": candidate.cost.overlap_blocks,
            "overlap_cached_blocks": candidate.prefix_match.cached_blocks,
            "overlap_active_blocks": candidate.prefix_match.active_blocks,
            "prefill_blocks": candidate.cost.prefill_blocks,
            "active_blocks_if_placed": candidate.cost.active_blocks,
            "cost": candidate.cost.total,
            "delay_seconds": delay_seconds,
            "policy_cost": candidate.policy_cost,
            "probability": candidate.probability,
        })
    });
    let passed_over = explanation
        .passed_over
        .iter()
        .map(|worker| json!({ "worker": *worker.name, "reason": worker.restriction.as_str() }));
    let trial_on = explanation
        .passed_over
        .iter()
        .find(|worker| Some(worker.id) == explanation.trial_on);
    let choice = explanation.expected_choice();
    let choice = choice.map(|candidate| &*candidate.name);
    json!({
        "policy": explanation.policy.to_string(),
        "overlap_weight": explanation.overlap_weight,
        "ttft_weight": explanation.ttft_weight,
        "temperature": explanation.temperature,
        "choice": choice,
        "replicates_prefix_to": choice.filter(|_| explanation.replicates_prefix_to.is_some()),
        "trial_on": trial_on.map(|worker| &*worker.name),
        "candidates": candidates.collect::<Vec<_>>(),
        "passed_over": passed_over.collect::<Vec<_>>(),
    })
}
