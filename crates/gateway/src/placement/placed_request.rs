//! A request that is booked on a worker, from its placement until a response begins.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::batch::Batch;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;

use crate::gateway_state::GatewayState;
use crate::placement::parsed_request::ParsedRequest;
use crate::placement::response_observer::RequestContext;
use crate::workers::worker::Worker;

/// A request that is booked on a worker. Dropping it releases the bookings.
#[derive(Debug)]
pub(crate) struct PlacedRequest {
    /// API that the request calls.
    pub(crate) endpoint: Endpoint,
    /// When the request arrived, by the gateway's clock.
    pub(crate) arrived_at: Duration,
    pub(crate) parsed: ParsedRequest,
    /// One booking for each choice; the last one may stand for several.
    pub(crate) batch: Batch,
}

impl PlacedRequest {
    /// Returns the prompt tokens that are predicted to be cached on the chosen worker.
    pub(crate) fn overlap_tokens(&self) -> u32 {
        let overlap_blocks = self.batch.decision().cost.overlap_blocks;
        let block_size = self.parsed.sequences.first.block_size().get();
        overlap_blocks.saturating_mul(block_size)
    }
}

impl GatewayState {
    /// Chooses a worker and books the request there, all prompts and outputs as one batch. With a
    /// queue, the request is not dispatched yet: [`wait_in_queue`](Self::wait_in_queue) waits for
    /// that. Counts the prompt tokens and the duration of the decision. If no worker can be chosen,
    /// fails with the response for the client, and books and counts nothing. `arrived_at` is a time
    /// of the gateway's clock.
    pub(crate) fn place(
        &self,
        endpoint: Endpoint,
        parsed: ParsedRequest,
        arrived_at: Duration,
    ) -> Result<PlacedRequest, ApiError> {
        let started = self.clock.now();
        let batch = self
            .router
            .route_batch(&parsed.request(), &parsed.sequences.rest, started)
            .map_err(|error| self.refusal(&error))?;
        let duration = self.clock.now().saturating_sub(started);
        let metrics = &self.metrics;
        metrics
            .decision_duration_seconds
            .observe(duration.as_secs_f64());
        metrics
            .prompt_tokens
            .inc_by(parsed.sequences.prompt_tokens.into());
        Ok(PlacedRequest {
            endpoint,
            arrived_at,
            parsed,
            batch,
        })
    }

    /// Returns what the observation of the response of `worker` needs, and counts the predicted
    /// overlap. Remembers that the worker has been sent the session and the first medium of the
    /// request. `predicted_tokens` are the prompt tokens that the worker has cached according to
    /// its KV events; `request_id` is used only in log lines.
    pub(crate) fn begin_response(
        self: &Arc<Self>,
        placed: PlacedRequest,
        worker: Arc<Worker>,
        predicted_tokens: Option<u32>,
        request_id: String,
    ) -> RequestContext {
        let PlacedRequest {
            endpoint,
            arrived_at,
            parsed,
            batch,
        } = placed;
        self.remember_request(&parsed, worker.id);
        let decision = batch.decision();
        self.metrics
            .add_overlap_blocks("predicted", decision.cost.overlap_blocks);
        self.metrics
            .add_overlap_blocks("best", decision.best_overlap_blocks);
        RequestContext {
            shared: Arc::clone(self),
            worker,
            batch,
            endpoint,
            arrived_at,
            request_id,
            model: parsed.model,
            is_single: parsed.is_single,
            prompt_tokens: parsed.sequences.prompt_tokens,
            continuation: parsed.continuation,
            predicted_tokens,
            prompt_bytes: parsed.prompt_bytes,
            tokenizer_count: parsed.tokenizer_count,
            recorded: self.recorder.is_some().then_some(parsed.sequences),
        }
    }
}
