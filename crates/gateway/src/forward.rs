//! One request to one worker, as a proxy sends it.

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

/// Engines close idle connections (vLLM after 5 s). Letting go of them first avoids sending a
/// request into a connection that is being closed.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(4);

/// Time without traffic after which a connection is asked whether its other end still lives.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(30);

/// Idle connections kept per worker: as many as a burst leaves behind.
const IDLE_CONNECTIONS: usize = 1024;

/// Headers that belong to one connection, not to the message (RFC 9110, section 7.6.1).
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

/// Removes what must not pass a proxy, the headers that `Connection` names included.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// What is sent to a worker, and again to another if that one fails.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Sending it twice does no harm: a worker that broke off may have acted on the first.
    pub(crate) may_repeat: bool,
    /// It asks the worker to list what it finds cached among its KV events.
    pub(crate) lists_cached: bool,
}

impl Message {
    /// Takes a client's request. `request_id` is added unless the client sent one. `generates`:
    /// it asks for an answer and changes nothing.
    pub(crate) fn new(
        head: http::request::Parts,
        body: Bytes,
        request_id: HeaderValue,
        generates: bool,
    ) -> Self {
        let mut headers = head.headers;
        strip_hop_by_hop(&mut headers);
        // The body is in hand, whole; both follow from it and from the worker's address.
        headers.remove(header::EXPECT);
        headers.remove(header::HOST);
        headers.entry("x-request-id").or_insert(request_id);
        let path = head.uri.into_parts().path_and_query;
        Self {
            may_repeat: generates || head.method.is_idempotent(),
            method: head.method,
            path: path.unwrap_or(PathAndQuery::from_static("/")),
            headers,
            body,
            lists_cached: false,
        }
    }

    /// What the request is called, by its client or by us.
    pub(crate) fn request_id(&self) -> HeaderValue {
        let id = self.headers.get("x-request-id").cloned();
        id.unwrap_or(HeaderValue::from_static(""))
    }
}

/// Why a worker gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    /// Nothing was sent: nobody listens at the worker's address.
    #[error("cannot connect: {0}")]
    Absent(String),
    /// Nothing was sent: the connection did not come about in time.
    #[error("cannot connect: {0}")]
    Unreached(String),
    /// Nothing was sent: this machine has no file descriptor or port left. No worker's fault.
    #[error("no connection can be opened here: {0}")]
    Exhausted(String),
    /// The connection broke before the first byte of an answer.
    #[error("connection broke: {0}")]
    Broken(String),
    /// No first byte in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The request cannot be written as HTTP.
    #[error("cannot be forwarded: {0}")]
    Malformed(#[from] http::Error),
}

impl ForwardError {
    fn connect(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return Self::from_io(error);
            }
            cause = error.source();
        }
        Self::Absent(root_cause(error))
    }

    fn from_io(error: &io::Error) -> Self {
        // The same on Linux, macOS and the BSDs; `io::ErrorKind` has no name for them.
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        match (error.kind(), error.raw_os_error()) {
            (_, Some(ENFILE | EMFILE)) | (io::ErrorKind::AddrNotAvailable, _) => {
                Self::Exhausted(error.to_string())
            }
            (io::ErrorKind::TimedOut, _) => Self::Unreached(error.to_string()),
            _ => Self::Absent(error.to_string()),
        }
    }

    pub(crate) fn broken(error: &dyn std::error::Error) -> Self {
        Self::Broken(root_cause(error))
    }
}

/// Sends messages over pooled connections.
#[derive(Clone, Debug)]
pub(crate) struct Forwarder {
    pooled: Client<HttpConnector, Full<Bytes>>,
    unpooled: Client<HttpConnector, Full<Bytes>>,
}

impl Forwarder {
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

    /// Sends the message and waits for the head of the answer. Dropping the future, or later the
    /// body, closes the connection, which is how an engine learns that nobody listens.
    pub(crate) async fn send(
        &self,
        worker: &Worker,
        message: &Message,
    ) -> Result<Response<Incoming>, ForwardError> {
        send_by(&self.pooled, worker, message).await
    }

    /// As [`send`](Self::send), over a connection that nothing was sent on before.
    pub(crate) async fn send_apart(
        &self,
        worker: &Worker,
        message: &Message,
    ) -> Result<Response<Incoming>, ForwardError> {
        send_by(&self.unpooled, worker, message).await
    }
}

async fn send_by(
    client: &Client<HttpConnector, Full<Bytes>>,
    worker: &Worker,
    message: &Message,
) -> Result<Response<Incoming>, ForwardError> {
    let mut request = Request::new(Full::new(message.body.clone()));
    *request.method_mut() = message.method.clone();
    *request.uri_mut() = worker.uri(&message.path)?;
    *request.headers_mut() = message.headers.clone();
    if let Some(rank) = &worker.rank_header {
        // A client that names a rank was routed by it.
        let header = request.headers_mut().entry(RANK_HEADER);
        header.or_insert_with(|| rank.clone());
    }
    match client.request(request).await {
        Ok(response) => Ok(response),
        Err(error) if error.is_connect() => Err(ForwardError::connect(&error)),
        Err(error) => Err(ForwardError::broken(&error)),
    }
}

/// The innermost error: the outer ones say only that something failed.
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
    fn headers_of_the_connection_stay_behind() {
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
