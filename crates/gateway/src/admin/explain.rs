//! `POST /admin/explain`: how a request would be routed now.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::Explanation;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use http::{HeaderMap, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::body;
use crate::placement::Placement;
use crate::placement::parsed_request::BodyForm;
use crate::reply::{self, Body};

/// Maximum number of explanations at a time. Each holds a whole body, and tokenises it.
const MAX_CONCURRENT_EXPLANATIONS: usize = 4;

/// Explains decisions.
#[derive(Debug)]
pub(super) struct Explainer {
    placement: Arc<Placement>,
    /// Permits of concurrent explanations.
    permits: Semaphore,
    /// Maximum size of a request that is explained.
    max_body_bytes: usize,
}

impl Explainer {
    /// Creates an explainer of the decisions of `placement`.
    pub(super) fn new(placement: Arc<Placement>, max_body_bytes: usize) -> Self {
        Self {
            placement,
            permits: Semaphore::new(MAX_CONCURRENT_EXPLANATIONS),
            max_body_bytes,
        }
    }

    /// Explains the decision for the request in `body`. Nothing is booked or sent. With a tokenizer,
    /// the prompts count as tokenised.
    ///
    /// The limit of the body is that of the public API, because every request that a client can
    /// send can be explained, and long prompts are the ones worth explaining. The number of
    /// concurrent explanations bounds their memory.
    ///
    /// # Errors
    /// Fails with a 429 if too many explanations are running, and otherwise with the errors of the
    /// public API.
    pub(super) async fn explain(
        &self,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<Response<Body>, ApiError> {
        let Ok(_permit) = self.permits.try_acquire() else {
            let message = "Too many explanations are running. Repeat the request.";
            return Err(ApiError::overloaded(message, Duration::from_secs(1)));
        };
        let body = body::read(headers, body, self.max_body_bytes).await?;
        // Reading a long body would delay other requests to the admin listener.
        let long_body = body.clone();
        let endpoint = tokio::task::spawn_blocking(move || endpoint_of(&long_body)).await;
        let endpoint = endpoint.unwrap_or(Endpoint::ChatCompletions);
        // Headers are not considered, so the request has the default hints.
        let form = BodyForm::plain_json();
        let parsed = self.placement.read(endpoint, form, body, None).await?;
        let explanation = self.placement.explain(&parsed)?;
        let body = explanation_json(&explanation).to_string();
        Ok(reply::json(StatusCode::OK, body))
    }
}

/// Returns the endpoint that a body is for: embeddings if it has `input`, completions if it has no
/// `messages`, and otherwise chat completions. An unreadable body counts as a chat completion.
fn endpoint_of(body: &[u8]) -> Endpoint {
    #[derive(Deserialize)]
    struct Fields {
        messages: Option<serde::de::IgnoredAny>,
        input: Option<serde::de::IgnoredAny>,
    }
    match serde_json::from_slice(body) {
        Ok(Fields { input: Some(_), .. }) => Endpoint::Embeddings,
        Ok(Fields { messages: None, .. }) => Endpoint::Completions,
        _ => Endpoint::ChatCompletions,
    }
}

/// Returns a routing decision with the costs of all candidates. `choice` is the expected choice, as
/// the actual one can be random.
pub(super) fn explanation_json(explanation: &Explanation) -> Value {
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
