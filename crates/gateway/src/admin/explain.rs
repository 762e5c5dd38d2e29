//! `POST /admin/explain`: how a request would be routed now.

use std::sync::Arc;
use std::time::Duration;

use foresee_api::explanation::explanation_json;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use http::{HeaderMap, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
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
