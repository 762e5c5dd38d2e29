//! `--dry-run`: compares each decision with the one that the least predicted delay would have made,
//! without following it.

use std::sync::Arc;

use foresee_core::router::{Candidate, Explanation};
use foresee_core::workers::WorkerId;

use crate::metrics::Metrics;

/// Comparison of decisions with those of the least predicted delay.
#[derive(Debug)]
pub(super) struct DryRun {
    pub(super) metrics: Arc<Metrics>,
}

impl DryRun {
    /// Counts whether the `chosen` worker is the one of the least predicted delay, by how much its
    /// delay is longer, and the overlap of both. `explanation` is the one just before the decision.
    pub(super) fn compare(&self, explanation: &Explanation, chosen: WorkerId) {
        let delay = |candidate: &Candidate| candidate.delay.total(explanation.ttft_weight);
        let candidates = explanation.candidates.iter();
        let least = candidates.min_by(|a, b| delay(a).total_cmp(&delay(b)));
        let mut candidates = explanation.candidates.iter();
        // A worker that has just become a candidate was not compared.
        let chosen = candidates.find(|candidate| candidate.id == chosen);
        let (Some(least), Some(chosen)) = (least, chosen) else {
            return;
        };
        let is_same = least.id == chosen.id;
        let longer_by = (delay(chosen) - delay(least)).max(0.0);
        let overlaps = [chosen, least].map(|candidate| candidate.prefix_match.overlap());
        self.metrics.record_dry_run(is_same, longer_by, overlaps);
    }
}
