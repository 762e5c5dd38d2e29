//! Recorded decisions as JSON.

use foresee_api::dashboard::{
    CandidateCost, Decision, DecisionOutcome, Decisions, PassedOver, Predicted,
};
use foresee_core::router::{Candidate, Explanation};

use crate::placement::decision_log::{DecisionLog, Entry, RecordedOutcome};

/// Maximum number of candidates in one response, unless one decision has more.
const MAX_CANDIDATES: usize = 2048;

/// Maximum number of decisions in one response.
const MAX_DECISIONS: usize = 100;

/// Returns the decisions with ids after `after`, with all candidates.
pub(super) fn decisions_after(log: &DecisionLog, after: u64) -> Decisions {
    let entries = log.after(after, MAX_DECISIONS + 1);
    let mut candidates = 0;
    let mut shown = 0;
    for entry in entries.iter().take(MAX_DECISIONS) {
        candidates += entry.decision.explanation.candidates.len();
        if shown > 0 && candidates > MAX_CANDIDATES {
            break;
        }
        shown += 1;
    }
    Decisions {
        has_more: shown < entries.len(),
        decisions: entries.iter().take(shown).map(with_candidates).collect(),
    }
}

/// Returns a decision with all candidates.
pub(super) fn with_candidates(entry: &Entry) -> Decision {
    let explanation = &entry.decision.explanation;
    let candidates = explanation.candidates.iter();
    let passed_over = explanation.passed_over.iter().map(|worker| PassedOver {
        worker: worker.name.to_string(),
        reason: worker.restriction.as_str().to_owned(),
    });
    Decision {
        candidates: candidates
            .map(|candidate| cost(candidate, explanation))
            .collect(),
        passed_over: passed_over.collect(),
        ..summary(entry)
    }
}

/// Returns a decision without its candidates.
pub(super) fn summary(entry: &Entry) -> Decision {
    let decision = &entry.decision;
    let explanation = &decision.explanation;
    let candidates = &explanation.candidates;
    let chosen = candidates
        .iter()
        .find(|candidate| candidate.id == decision.chosen);
    let others = candidates
        .iter()
        .filter(|candidate| candidate.id != decision.chosen);
    let runner_up = others.min_by(|a, b| a.policy_cost.total_cmp(&b.policy_cost));
    let passed_over = explanation.passed_over.iter();
    let passed_over_name = passed_over
        .filter(|worker| worker.id == decision.chosen)
        .map(|worker| worker.name.to_string())
        .next();
    let is_replication = explanation.replicates_prefix_to == Some(decision.chosen);
    let reason = match (
        is_replication,
        explanation.trial_on == Some(decision.chosen),
    ) {
        (true, _) => Some("replication"),
        (_, true) => Some("trial"),
        _ => None,
    };
    Decision {
        id: entry.id,
        time: decision.time,
        model: decision.model.clone(),
        prompts: decision.prompts,
        prompt_tokens: decision.prompt_tokens,
        prompt_blocks: decision.prompt_blocks,
        policy: explanation.policy.to_string(),
        ttft_weight: explanation.ttft_weight,
        chosen: chosen
            .map(|candidate| candidate.name.to_string())
            .or(passed_over_name)
            .unwrap_or_default(),
        reason: reason.map(str::to_owned),
        cost: chosen.and_then(|candidate| finite(candidate.policy_cost)),
        runner_up: runner_up.map(|candidate| candidate.name.to_string()),
        runner_up_cost: runner_up.and_then(|candidate| finite(candidate.policy_cost)),
        candidate_count: candidates.len(),
        predicted: predicted(entry, chosen),
        outcome: entry.outcome.as_ref().map(outcome),
        candidates: Vec::new(),
        passed_over: Vec::new(),
    }
}

/// Returns what was predicted for the chosen worker.
fn predicted(entry: &Entry, chosen: Option<&Candidate>) -> Predicted {
    let decision = &entry.decision;
    let ttft = decision.predicted_ttft.as_secs_f64();
    let decode = chosen.map(|candidate| candidate.delay.decode + candidate.delay.decode_slowdown);
    let overlap = chosen.map_or(0, |candidate| candidate.cost.overlap_blocks);
    Predicted {
        ttft_seconds: finite(ttft),
        total_seconds: decode.and_then(|decode| finite(ttft + decode)),
        cached_tokens: overlap.saturating_mul(decision.block_size),
        output_tokens: decision.predicted_output_tokens,
    }
}

fn outcome(outcome: &RecordedOutcome) -> DecisionOutcome {
    DecisionOutcome {
        outcome: outcome.outcome.to_owned(),
        worker: outcome.worker.clone(),
        ttft_seconds: outcome.ttft.map(|ttft| ttft.as_secs_f64()),
        total_seconds: outcome.total.as_secs_f64(),
        cached_tokens: outcome.cached_tokens,
        output_tokens: outcome.output_tokens,
    }
}

/// Returns the cost of a request on a candidate.
fn cost(candidate: &Candidate, explanation: &Explanation) -> CandidateCost {
    let weight = |name| match name {
        "queue_wait" | "prefill" => explanation.ttft_weight,
        _ => 1.0,
    };
    let terms = candidate.delay.terms().into_iter();
    let terms = terms.map(|(name, seconds)| (name.to_owned(), weight(name) * seconds));
    CandidateCost {
        worker: candidate.name.to_string(),
        requests: candidate.requests,
        policy_cost: finite(candidate.policy_cost),
        probability: candidate.probability,
        overlap_blocks: candidate.cost.overlap_blocks,
        prefill_blocks: candidate.cost.prefill_blocks,
        active_blocks: candidate.cost.active_blocks,
        terms: terms.collect(),
        delay: candidate.delay.total(explanation.ttft_weight),
    }
}

/// Returns a number that JSON can write.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}
