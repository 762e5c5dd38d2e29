//! HTTP client for the collector.

use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};

use crate::https_client::{HttpsClient, https_client};
use crate::traces::config::{TraceConfig, TraceError};
use crate::upstream::root_cause;

/// Maximum size of a response, in bytes.
const MAX_RESPONSE_BYTES: usize = 1 << 20;

/// HTTP client for the collector, on the runtime that sends the spans.
#[derive(Debug)]
pub(super) struct CollectorClient(HttpsClient);

impl CollectorClient {
    /// Creates a client that opens connections when it needs them.
    ///
    /// # Errors
    /// Fails if the file of authorities cannot be used.
    pub(super) fn new(config: &TraceConfig) -> Result<Self, TraceError> {
        let client = https_client(config.ca.clone(), config.timeout);
        Ok(Self(client?))
    }
}

#[async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.0.request(request.map(Full::new)).await;
        let response = sent.inspect_err(|error| {
            tracing::debug!(%error, cause = root_cause(error), "cannot reach the OTLP collector");
        })?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_RESPONSE_BYTES).collect().await?;
        Ok(Response::from_parts(head, body.to_bytes()))
    }
}
