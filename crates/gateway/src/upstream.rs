//! HTTP client for workers: sends one request to one worker, with the headers that a proxy may pass on.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::workers::{RANK_HEADER, Worker};

/// Time after which the gateway closes an idle connection. Engines close idle connections too (vLLM
/// after 5 s); closing them first avoids sending a request on a connection that the engine is about
/// to close.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(4);

/// Time without traffic after which TCP checks whether the other end of a connection still exists.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(30);

/// Maximum number of idle connections per worker: about as many as a burst leaves open.
const IDLE_CONNECTIONS: usize = 1024;

/// Headers that apply to one connection and not to the message (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Removes the headers that a proxy must not pass on: the hop-by-hop headers and all headers that
/// `Connection` lists. Parts of `Connection` that are not header names are ignored.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in listed.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Request to a worker. It can be sent again, to the same worker or to another.
#[derive(Debug)]
pub(crate) struct UpstreamRequest {
    pub(crate) method: Method,
    /// Path and query as the client sent them.
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Whether the request may be sent again after a connection was lost, although the worker may have
    /// processed it.
    pub(crate) is_repeatable: bool,
    /// Whether the request asks the engine to list the cached blocks that it finds in its KV events
    /// (full report mode).
    pub(crate) full_report_mode: bool,
}

impl UpstreamRequest {
    /// Converts a client's request: removes the hop-by-hop headers, `Expect` and `Host`, and sets
    /// the path `/` if it has none. `request_id` is added unless the client sent one. `generates`
    /// says that the request produces output and changes nothing else, so that it can be repeated
    /// whatever its method. The caller sets `full_report_mode`.
    pub(crate) fn new(
        head: http::request::Parts,
        body: Bytes,
        request_id: HeaderValue,
        generates: bool,
    ) -> Self {
        let mut headers = head.headers;
        strip_hop_by_hop(&mut headers);
        // The whole body has arrived, and the client library sets `Host` from the worker's address.
        headers.remove(header::EXPECT);
        headers.remove(header::HOST);
        headers.entry("x-request-id").or_insert(request_id);
        let path = head.uri.into_parts().path_and_query;
        Self {
            is_repeatable: generates || head.method.is_idempotent(),
            method: head.method,
            path: path.unwrap_or(PathAndQuery::from_static("/")),
            headers,
            body,
            full_report_mode: false,
        }
    }

    /// Returns the request id: the client's or the gateway's.
    pub(crate) fn request_id(&self) -> HeaderValue {
        let id = self.headers.get("x-request-id").cloned();
        id.unwrap_or(HeaderValue::from_static(""))
    }
}

/// Why a worker did not respond.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// Nothing was sent: no process listens at the worker's address.
    #[error("cannot connect: {0}")]
    ConnectionRefused(String),
    /// Nothing was sent: no connection was established in time.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// Nothing was sent: this machine has no free file descriptor or port. Not the worker's fault.
    #[error("this machine cannot open a connection: {0}")]
    LocalExhaustion(String),
    /// The connection was lost before the first byte of a response.
    #[error("connection lost: {0}")]
    ConnectionLost(String),
    /// The first byte of a response did not arrive in time.
    #[error("no response within {0:?}")]
    TimedOut(Duration),
    /// The request cannot be written as HTTP.
    #[error("cannot be forwarded: {0}")]
    Unsendable(#[from] http::Error),
}

impl UpstreamError {
    /// Classifies an error of establishing a connection, by the I/O error that caused it. Without
    /// one, the connection counts as refused.
    fn connect(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return Self::from_io(error);
            }
            cause = error.source();
        }
        Self::ConnectionRefused(root_cause(error))
    }

    /// Classifies the I/O error of a connection attempt. Every error that is neither a lack of
    /// local resources nor a timeout counts as a refused connection.
    fn from_io(error: &io::Error) -> Self {
        // These numbers are the same on Linux, macOS and the BSDs. `io::ErrorKind` does not have
        // these errors.
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        match (error.kind(), error.raw_os_error()) {
            (_, Some(ENFILE | EMFILE)) | (io::ErrorKind::AddrNotAvailable, _) => {
                Self::LocalExhaustion(error.to_string())
            }
            (io::ErrorKind::TimedOut, _) => Self::Unreachable(error.to_string()),
            _ => Self::ConnectionRefused(error.to_string()),
        }
    }

    /// Returns the error of a connection that was lost because of `error`.
    pub(crate) fn connection_lost(error: &dyn std::error::Error) -> Self {
        Self::ConnectionLost(root_cause(error))
    }
}

/// HTTP client with a connection pool per worker.
#[derive(Clone, Debug)]
pub(crate) struct UpstreamClient {
    /// Client that reuses connections.
    pooled: Client<HttpConnector, Full<Bytes>>,
    /// Client that opens a connection for each request.
    unpooled: Client<HttpConnector, Full<Bytes>>,
}

impl UpstreamClient {
    /// Creates a client that waits at most `connect_timeout` for a connection. The time until a
    /// response is not limited.
    pub(crate) fn new(connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect_timeout));
        connector.set_keepalive(Some(KEEPALIVE));
        let client = |idle_connections| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT)
                .pool_max_idle_per_host(idle_connections)
                .build(connector.clone())
        };
        Self {
            pooled: client(IDLE_CONNECTIONS),
            unpooled: client(0),
        }
    }

    /// Sends the request and waits for the head of the response. Dropping the future, or later the
    /// body, closes the connection, which tells the engine to stop generating. A response with any
    /// status is a success. The caller sets the time limit.
    pub(crate) async fn send(
        &self,
        worker: &Worker,
        request: &UpstreamRequest,
    ) -> Result<Response<Incoming>, UpstreamError> {
        send_with(&self.pooled, worker, request).await
    }

    /// Sends the request on a new connection and waits for the head of the response. No other request
    /// was sent on that connection, so the worker cannot be closing it as idle.
    pub(crate) async fn send_on_fresh_connection(
        &self,
        worker: &Worker,
        request: &UpstreamRequest,
    ) -> Result<Response<Incoming>, UpstreamError> {
        send_with(&self.unpooled, worker, request).await
    }
}

/// Sends the request with `client` and waits for the head of the response. Adds the header that
/// pins the request to the worker's rank, unless the client named a rank. A response with any
/// status is a success; every error after the connection was made is
/// [`UpstreamError::ConnectionLost`].
async fn send_with(
    client: &Client<HttpConnector, Full<Bytes>>,
    worker: &Worker,
    upstream_request: &UpstreamRequest,
) -> Result<Response<Incoming>, UpstreamError> {
    let mut request = Request::new(Full::new(upstream_request.body.clone()));
    *request.method_mut() = upstream_request.method.clone();
    *request.uri_mut() = worker.uri(&upstream_request.path)?;
    *request.headers_mut() = upstream_request.headers.clone();
    if let Some(rank) = &worker.rank_header {
        // A request whose client named a rank was routed to that rank.
        let header = request.headers_mut().entry(RANK_HEADER);
        header.or_insert_with(|| rank.clone());
    }
    match client.request(request).await {
        Ok(response) => Ok(response),
        Err(error) if error.is_connect() => Err(UpstreamError::connect(&error)),
        Err(error) => Err(UpstreamError::connection_lost(&error)),
    }
}

/// Returns the text of the innermost error. The outer errors say only that something failed.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_headers_are_not_passed_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("x-custom", "kept"),
            ("authorization", "Bearer kept"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "x-custom"]);
    }
}
