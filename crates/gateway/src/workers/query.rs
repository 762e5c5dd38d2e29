//! The gateway's own requests to a worker: health checks, and queries of models, metrics and event
//! sources.
//!
//! They are booked nowhere and never count as load. They carry the worker's API key.

use std::time::Duration;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::upstream::{ConnectionChoice, UpstreamClient, UpstreamError, UpstreamRequest};
use crate::workers::worker::Worker;

/// Maximum size of a response, in bytes.
const MAX_RESPONSE_BYTES: usize = 4 << 20;

/// Why a worker did not respond to a request of the gateway with success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueryError {
    /// No response arrived in time, or no connection could be opened for a reason other than a
    /// refusal: the host name has no address, the network is unreachable, or this machine has no
    /// resources. Says nothing about the worker's process.
    #[error("{0}")]
    NoResponse(String),
    /// No process listens at the worker's address.
    #[error("{0}")]
    ConnectionRefused(String),
    /// The response has a status other than 2xx.
    #[error("HTTP status {0}")]
    Status(StatusCode),
    /// The connection was lost, or the body is too large or unreadable.
    #[error("{0}")]
    Failed(String),
}

impl QueryError {
    /// Returns the response's status code, if that is the error.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status(status) => Some(*status),
            _ => None,
        }
    }
}

impl From<UpstreamError> for QueryError {
    fn from(error: UpstreamError) -> Self {
        let text = error.to_string();
        match error {
            UpstreamError::ConnectionRefused(_) => Self::ConnectionRefused(text),
            UpstreamError::ConnectionLost(_) | UpstreamError::Unsendable(_) => Self::Failed(text),
            _ => Self::NoResponse(text),
        }
    }
}

/// Sender of the gateway's own requests to workers.
#[derive(Clone, Debug)]
pub(crate) struct WorkerQueries {
    /// Client of these requests alone. Clients' requests use the client of the I/O thread that they
    /// arrived on.
    client: UpstreamClient,
    /// Maximum time of one request.
    time_limit: Duration,
}

impl WorkerQueries {
    /// Creates a sender whose requests take at most `time_limit`, of which `connect_timeout` for a
    /// connection.
    pub(super) fn new(connect_timeout: Duration, time_limit: Duration) -> Self {
        Self {
            client: UpstreamClient::new(connect_timeout),
            time_limit,
        }
    }

    /// Sends `GET path` to a worker, as [`query`](Self::query) does, and returns the body.
    pub(crate) async fn get(
        &self,
        worker: &Worker,
        path: &'static str,
    ) -> Result<Bytes, QueryError> {
        let path = PathAndQuery::from_static(path);
        let (_, body) = self.query(worker, Method::GET, path).await?;
        Ok(body)
    }

    /// Sends a request without a body to a worker and returns the status and body of a 2xx response.
    /// The request has no headers of a client. The time limit, for the body too, is
    /// [`HealthConfig::timeout`](crate::HealthConfig::timeout). A body over [`MAX_RESPONSE_BYTES`]
    /// is an error, and so is a host name that was never resolved.
    pub(crate) async fn query(
        &self,
        worker: &Worker,
        method: Method,
        path: PathAndQuery,
    ) -> Result<(StatusCode, Bytes), QueryError> {
        if let Some(error) = worker.address.unresolved_error() {
            return Err(QueryError::NoResponse(error));
        }
        let mut headers = HeaderMap::new();
        if let Some(authorization) = worker.key.authorization() {
            headers.insert(AUTHORIZATION, authorization);
        }
        let request = UpstreamRequest {
            method,
            path,
            headers,
            body: Bytes::new(),
            is_repeatable: true,
            full_report_mode: false,
            expects_result: false,
            needs_worker_key: false,
        };
        let exchange = async {
            let connection = ConnectionChoice::IdleOrNew;
            let response = self.client.send(worker, &request, connection, None).await?;
            let status = response.status();
            if !status.is_success() {
                return Err(QueryError::Status(status));
            }
            let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect();
            let body = body
                .await
                .map_err(|error| QueryError::Failed(format!("cannot read the body: {error}")))?;
            Ok((status, body.to_bytes()))
        };
        let time_limit = self.time_limit;
        timeout(time_limit, exchange).await.unwrap_or_else(|_| {
            let error = format!("no response within {time_limit:?}");
            Err(QueryError::NoResponse(error))
        })
    }

    /// Opens a TCP connection to a worker and closes it. The time limit is that of
    /// [`query`](Self::query).
    pub(crate) async fn connect(&self, worker: &Worker) -> Result<(), QueryError> {
        if let Some(error) = worker.address.unresolved_error() {
            return Err(QueryError::NoResponse(error));
        }
        let connecting = TcpStream::connect(worker.address.host_and_port());
        match timeout(self.time_limit, connecting).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(UpstreamError::from_io(&error).into()),
            Err(_) => {
                let error = format!("no connection within {:?}", self.time_limit);
                Err(QueryError::NoResponse(error))
            }
        }
    }
}
