//! HTTP client for the collector.

use async_trait::async_trait;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};

use crate::traces::config::{TraceConfig, TraceError};
use crate::workers::worker_tls::WorkerTlsConfig;

/// Maximum size of a response, in bytes.
const MAX_RESPONSE_BYTES: usize = 1 << 20;

/// HTTP client for the collector, on the runtime that sends the spans.
#[derive(Debug)]
pub(super) struct CollectorClient(Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

impl CollectorClient {
    /// Creates a client that opens connections when it needs them.
    ///
    /// # Errors
    /// Fails if the file of authorities cannot be used.
    pub(super) fn new(config: &TraceConfig) -> Result<Self, TraceError> {
        let tls = WorkerTlsConfig {
            ca: config.ca.clone(),
            ..WorkerTlsConfig::default()
        };
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(config.timeout));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls.client_config()?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        Ok(Self(Client::builder(TokioExecutor::new()).build(connector)))
    }
}

#[async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.0.request(request.map(Full::new)).await;
        let response = sent.inspect_err(|error| {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::debug!(%error, cause, "cannot reach the OTLP collector");
        })?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_RESPONSE_BYTES).collect().await?;
        Ok(Response::from_parts(head, body.to_bytes()))
    }
}
