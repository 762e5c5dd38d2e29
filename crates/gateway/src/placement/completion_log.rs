//! Records how each response ended: in the metrics, the recording, the trust in KV events and the log.
//!
//! The log line compares the predicted cache hit with the one that the engine reports. Its level is
//! debug and its target is `foresee::completion`, so that it costs nothing unless enabled with
//! `FORESEE_LOG=info,foresee::completion=debug`.

use crate::completion::Completion;
use crate::kv_events::event_trust::HitCheck;
use crate::metrics::{Outcome, ResponseTokens};
use crate::placement::ended_requests::EndedRequest;
use crate::placement::request_context::RequestContext;
use crate::traces::request_trace::ResponseEnd;

impl RequestContext {
    /// Records the end of a response, once: adds it to the recording, counts it, compares the
    /// predictions with the reported usage, and logs the result. Must be called before the bookings
    /// are released. Cached tokens of several prompts or outputs are not compared.
    pub(crate) fn record_completion(&mut self, completion: &Completion) {
        let Completion { outcome, usage, .. } = completion;
        let now = self.shared.clock.now();
        let lasted = now.saturating_sub(self.arrived_at);
        let ttft = completion.first_token;
        let ttft = ttft.map(|at| at.saturating_sub(self.arrived_at));
        let tokens = ResponseTokens {
            prompt: usage.prompt_tokens.unwrap_or(self.prompt_tokens),
            cached: usage.cached_tokens,
            output: usage.completion_tokens.unwrap_or(completion.output_tokens),
        };
        if let (Some(recorder), Some(sequences)) = (&self.shared.recorder, self.recorded.take()) {
            recorder.record(self.arrived_at, &self.model, sequences, completion);
        }
        if let Some(key) = &mut self.key {
            key.settle(f64::from(tokens.prompt) + f64::from(tokens.output));
        }
        if let Some(access) = &mut self.access {
            access.complete(completion, self.prompt_tokens, ttft);
        }
        let metrics = &self.shared.metrics;
        metrics.observe_response(lasted, tokens, self.exemplar());
        metrics.record_outcome(*outcome);
        let decision = self.batch.decision();
        let block_size = self.shared.block_size.get();
        let predicted = decision.cost.overlap_blocks;
        if *outcome == Outcome::Ok {
            let predicted_tokens = predicted.saturating_mul(block_size);
            let cached = tokens.cached.unwrap_or(predicted_tokens);
            let demand = &self.shared.demand;
            demand.observe_lengths(tokens.prompt, cached, tokens.output);
        }
        // For several outputs, engines report the cached tokens of only one of them.
        let has_one_prompt = self.batch.prompt_count() == 1;
        let cached_tokens = usage.cached_tokens.filter(|_| has_one_prompt);
        let actual = cached_tokens.map(|tokens| tokens / block_size);
        if let Some(actual) = actual {
            metrics.add_overlap_blocks("actual", actual);
            if self.is_single {
                metrics.record_overlap_prediction(predicted, actual);
            }
        }
        if let (Some(predicted), true) = (self.predicted_tokens, self.is_single) {
            let events = &self.worker.events;
            if let Some(actual) = usage.cached_tokens {
                events.record_hit_check(HitCheck { predicted, actual }, now);
            } else if *outcome == Outcome::Ok {
                let uncached_tokens = tokens.prompt.saturating_sub(predicted);
                let computed = uncached_tokens.saturating_add(completion.output_tokens);
                events.record_computed(computed, block_size, now);
            }
        }
        if let Some(trace) = &mut self.trace {
            trace.complete(&ResponseEnd {
                completion,
                prompt_tokens: self.prompt_tokens,
                ttft,
            });
        }
        if let Some(ended) = &self.shared.ended_requests {
            let decoded_for = completion.first_token.map(|at| now.saturating_sub(at));
            let intervals = completion.output_tokens.saturating_sub(1);
            ended.add(EndedRequest {
                worker: self.worker.id,
                ttft,
                token_interval: decoded_for
                    .filter(|_| has_one_prompt)
                    .and_then(|time| time.checked_div(intervals)),
                prompt_blocks: tokens.prompt.div_ceil(block_size),
                predicted_blocks: predicted,
                actual_blocks: actual,
            });
        }
        if let Some(ticket) = self.decision.take() {
            let worker = &self.worker.config.name;
            ticket.complete(completion, worker, cached_tokens, now);
        }
        tracing::debug!(
            target: "foresee::completion",
            request = ?self.request_id,
            worker = %self.worker.config.name,
            model = %self.model,
            outcome = outcome.as_str(),
            prompt_tokens = tokens.prompt,
            output_tokens = completion.output_tokens,
            predicted_blocks = predicted,
            best_blocks = decision.best_overlap_blocks,
            actual_blocks = actual,
            ttft_seconds = ttft.map(|ttft| ttft.as_secs_f64()),
            seconds = lasted.as_secs_f64(),
            "response ended"
        );
    }
}
