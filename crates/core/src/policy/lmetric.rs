//! LMetric: new tokens times requests.
//!
//! **Cost:** `(pending tokens + new tokens of this prompt) × (requests + 1)`. Pending tokens
//! are the prompt tokens of earlier requests that the worker has yet to compute.
//!
//! **Source:** Zhang et al., 2026, arXiv 2603.15202. Prefixes of requests in flight count as cached.
//!
//! **Trade-off:** no parameter, and no forecast: the product grows with the stalls that a prefill
//! causes. It does not know how long outputs last, how fast a worker is, or how full its memory is.
//! [The marginal delay](super::marginal_delay) contains the product as one of its terms.

use super::candidates::Candidates;
use super::interface::{BatchRule, NamedPolicy, Policy};
use super::request_profile::RequestProfile;

/// LMetric.
pub const LMETRIC: NamedPolicy = NamedPolicy {
    name: "lmetric",
    description: "least (pending + new prefill tokens) × (requests + 1)",
    default_queue: None,
    create: || Box::new(Lmetric),
};

#[derive(Debug)]
struct Lmetric;

impl Policy for Lmetric {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(candidates.iter().map(|worker| {
            let tokens = worker.pending_tokens + u64::from(worker.new_tokens(request));
            tokens as f64 * (worker.charged_requests() + 1.0)
        }));
    }

    fn batch_rule(&self) -> BatchRule {
        BatchRule::Sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::WorkerView;

    #[test]
    fn new_tokens_are_multiplied_by_requests() {
        let with = |requests, pending_tokens, active_blocks| {
            let mut worker = WorkerView::idle(0);
            worker.requests = requests;
            worker.pending_tokens = pending_tokens;
            worker.prefix_match.active_blocks = active_blocks;
            worker
        };
        let request = RequestProfile::of_tokens(1600, 16);
        let views = [
            with(0, 0, 0),
            with(1, 0, 50),
            with(3, 100, 0),
            with(0, 0, 100),
        ];
        let mut costs = Vec::new();
        Lmetric.costs(&request, &Candidates::from(&views[..]), &mut costs);
        // The last token is always computed: at most 99 blocks count.
        assert_eq!(costs, [1600.0, 1600.0, 6800.0, 16.0]);
    }
}
