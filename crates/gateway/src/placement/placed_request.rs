//! A request that is booked on a worker, from its placement until a response begins.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::batch::Batch;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;

use crate::access_log::AccessEntry;
use crate::keys::KeyGuard;
use crate::placement::decision_log::DecisionTicket;
use crate::placement::parsed_request::ParsedRequest;
use crate::placement::request_context::{Observation, RequestContext};
use crate::traces::request_trace::RequestTrace;
use crate::workers::worker::Worker;

/// Longest time to retry after that a refusal names.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

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
    /// The request in the limits of its key, if it has one.
    pub(crate) key: Option<KeyGuard>,
    /// Line of the access log, if there is one.
    pub(crate) access: Option<Box<AccessEntry>>,
    /// Spans of the request, if it is sampled.
    pub(crate) trace: Option<Box<RequestTrace>>,
    /// Time that the decision took.
    pub(crate) decided_in: Duration,
    /// Time that the request was queued in the router.
    pub(crate) queued_for: Duration,
    /// Place of the outcome in the log of decisions, if this one was recorded.
    pub(crate) decision: Option<DecisionTicket>,
}

impl PlacedRequest {
    /// Checks that the first byte of the response is predicted to come within `time_left`. A response
    /// whose time cannot be predicted is given the chance.
    ///
    /// # Errors
    /// Fails with a 429 if it is predicted to come later.
    pub(crate) fn check_deadline(&self, time_left: Duration) -> Result<(), ApiError> {
        let Some(predicted) = self.batch.predicted_first_byte() else {
            return Ok(());
        };
        let late_by = predicted.saturating_sub(time_left);
        if late_by.is_zero() {
            return Ok(());
        }
        let message = format!(
            "The first byte of the response is predicted after {} ms, which is later than the deadline \
             of the request.",
            predicted.as_millis()
        );
        let retry_after = Some(late_by.min(MAX_RETRY_AFTER));
        Err(ApiError::deadline_unreachable(message, retry_after))
    }

    /// Returns the prompt tokens that are predicted to be cached on the chosen worker.
    pub(crate) fn overlap_tokens(&self) -> u32 {
        let overlap_blocks = self.batch.decision().cost.overlap_blocks;
        let block_size = self.parsed.sequences.first.block_size().get();
        overlap_blocks.saturating_mul(block_size)
    }

    /// Returns what the observation of the response of `worker` needs, and counts the predicted
    /// overlap. Remembers that the worker has been sent the session and the first medium of the
    /// request. `predicted_tokens` are the prompt tokens that the worker has cached according to
    /// its KV events; `request_id` is used only in log lines.
    pub(super) fn into_context(
        self,
        observation: &Arc<Observation>,
        worker: Arc<Worker>,
        predicted_tokens: Option<u32>,
        request_id: String,
    ) -> RequestContext {
        let Self {
            endpoint,
            arrived_at,
            parsed,
            batch,
            key,
            access,
            trace,
            decided_in: _,
            queued_for: _,
            decision: ticket,
        } = self;
        let now = observation.clock.now();
        observation
            .affinity
            .remember_request(&parsed, worker.id, now);
        let (decision, metrics) = (batch.decision(), &observation.metrics);
        metrics.add_overlap_blocks("predicted", decision.cost.overlap_blocks);
        metrics.add_overlap_blocks("best", decision.best_overlap_blocks);
        let is_recorded = observation.recorder.is_some();
        RequestContext {
            shared: Arc::clone(observation),
            worker,
            batch,
            key,
            access,
            trace,
            decision: ticket,
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
            recorded: is_recorded.then_some(parsed.sequences),
        }
    }
}
