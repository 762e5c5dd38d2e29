//! What an answer was predicted to find cached, and what its engine says it found: one line in the
//! log, and the count of right predictions.
//!
//! The line is written at level debug under a target of its own, so that it costs nothing unless
//! asked for: `FORESEE_LOG=info,foresee::answer=debug`.

use std::time::Duration;

use foresee_engine::usage::Usage;

use crate::metrics::Outcome;
use crate::subscribe::Finding;
use crate::watch::Watch;

/// How an answer ended.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) outcome: Outcome,
    /// What the engine reported; what it did not is `None`.
    pub(crate) usage: Usage,
    pub(crate) output_tokens: u32,
    /// The same for each choice, if there are several and they were told apart.
    pub(crate) apart: Vec<u32>,
    /// When its first token came, if that was seen.
    pub(crate) first_token: Option<Duration>,
}

impl Watch {
    /// Counts the answer, holds its prediction against the engine's report, and says both.
    pub(crate) fn has_ended(&mut self, ending: &Ending) {
        let Ending { outcome, usage, .. } = ending;
        if let (Some(recorder), Some(sequences)) = (&self.shared.recorder, self.recorded.take()) {
            recorder.record(self.arrived, &self.model, sequences, ending);
        }
        let metrics = &self.shared.metrics;
        metrics.ended(*outcome);
        let decision = self.batch.decision();
        let block_size = self.shared.config.router.block_size.get();
        let predicted = decision.cost.overlap_blocks;
        // Of several answers, engines report what one of them found in the cache.
        let alone = self.batch.prompts() == 1;
        let cached_tokens = usage.cached_tokens.filter(|_| alone);
        let actual = cached_tokens.map(|tokens| tokens / block_size);
        if let Some(actual) = actual {
            metrics.overlap("actual", actual);
            if self.is_single {
                metrics.prediction(predicted, actual);
            }
        }
        if let (Some(foretold), true) = (self.foretold, self.is_single) {
            let (events, now) = (&self.worker.events, self.shared.clock.now());
            if let Some(found) = usage.cached_tokens {
                events.weigh(Finding { foretold, found }, now);
            } else if *outcome == Outcome::Ok {
                let prompt_tokens = usage.prompt_tokens.unwrap_or(self.prompt_tokens);
                let not_foretold = prompt_tokens.saturating_sub(foretold);
                let computed = not_foretold.saturating_add(ending.output_tokens);
                events.computed(computed, block_size, now);
            }
        }
        let waited = |at: Duration| at.saturating_sub(self.arrived).as_secs_f64();
        tracing::debug!(
            target: "foresee::answer",
            request = ?self.request_id,
            worker = %self.worker.config.name,
            model = %self.model,
            outcome = outcome.as_str(),
            prompt_tokens = usage.prompt_tokens.unwrap_or(self.prompt_tokens),
            output_tokens = ending.output_tokens,
            predicted_blocks = predicted,
            best_blocks = decision.best_overlap_blocks,
            actual_blocks = actual,
            ttft_seconds = ending.first_token.map(waited),
            seconds = waited(self.shared.clock.now()),
            "answered"
        );
    }
}
