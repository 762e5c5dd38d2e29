//! HTTP client for workers: sends one request to one worker, with the headers that a proxy may pass on.

mod body;
mod pool;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body_util::Full;
use hyper_util::client::legacy::connect::HttpConnector;

use crate::tcp_timeouts::{KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, USER_TIMEOUT};
pub(crate) use crate::upstream::body::UpstreamBody;
use crate::upstream::pool::{ConnectionPool, Destination};
use crate::workers::worker::{RANK_HEADER, Worker};

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
///
/// Also removes `Content-Length` if `Transfer-Encoding` is present, because the latter decides how
/// long the body is (RFC 9112, section 6.3).
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
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
    /// Whether the result is the body of the response, so that a success without one is a failure.
    pub(crate) expects_result: bool,
    /// Whether the worker's key is sent although clients do not share it otherwise, because the
    /// gateway has checked the client's own key.
    pub(crate) needs_worker_key: bool,
}

impl UpstreamRequest {
    /// Converts a client's request: removes the hop-by-hop headers, `Expect` and `Host`, and sets
    /// the path `/` if it has none. `request_id` is added unless the client sent one.
    /// `is_computation` says that the request computes a result and changes nothing else, so that
    /// it can be repeated whatever its method. The caller sets `full_report_mode`
    /// and `expects_result`.
    pub(crate) fn new(
        head: http::request::Parts,
        body: Bytes,
        request_id: HeaderValue,
        is_computation: bool,
    ) -> Self {
        let mut headers = head.headers;
        strip_hop_by_hop(&mut headers);
        // The whole body has arrived, and the client library sets `Host` from the worker's address.
        headers.remove(header::EXPECT);
        headers.remove(header::HOST);
        headers.entry("x-request-id").or_insert(request_id);
        let path = head.uri.into_parts().path_and_query;
        Self {
            is_repeatable: is_computation || head.method.is_idempotent(),
            method: head.method,
            path: path.unwrap_or(PathAndQuery::from_static("/")),
            headers,
            body,
            full_report_mode: false,
            expects_result: false,
            needs_worker_key: false,
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
    /// Nothing was sent: no process listens at the worker's address, so its cache is gone.
    #[error("cannot connect: {0}")]
    ConnectionRefused(String),
    /// Nothing was sent: the name could not be resolved, there is no route, or no connection was
    /// established in time. The process and its cache may well exist.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// Nothing was sent: this machine has no free file descriptor. Not the worker's fault. A lack of ports
    /// is one for connections to this worker alone, so it counts as unreachable.
    #[error("this machine cannot open a connection: {0}")]
    LocalExhaustion(String),
    /// The connection was lost before the first byte of a response.
    #[error("connection lost: {0}")]
    ConnectionLost(String),
    /// The first byte of a response did not arrive in time.
    #[error("no response within {0:?}")]
    TimedOut(Duration),
    /// A response that had begun was not continued in time.
    #[error("no data for {0:?}")]
    Silent(Duration),
    /// The worker responded with success, but not with a response to this request: an empty body,
    /// a body of another type, or a transfer coding that the gateway cannot decode.
    #[error("unusable response: {0}")]
    UnusableResponse(&'static str),
    /// The request cannot be written as HTTP.
    #[error("cannot be forwarded: {0}")]
    Unsendable(#[from] http::Error),
}

impl UpstreamError {
    /// Returns one word for the kind of error.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::ConnectionRefused(_) => "connection_refused",
            Self::Unreachable(_) => "unreachable",
            Self::LocalExhaustion(_) => "local_exhaustion",
            Self::ConnectionLost(_) => "connection_lost",
            Self::TimedOut(_) => "timeout",
            Self::Silent(_) => "silent",
            Self::UnusableResponse(_) => "unusable_response",
            Self::Unsendable(_) => "unsendable",
        }
    }

    /// Classifies an error of establishing a connection, by the I/O error that caused it. Without
    /// one, the worker counts as unreachable.
    fn connect(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return Self::from_io(error);
            }
            cause = error.source();
        }
        Self::Unreachable(root_cause(error))
    }

    /// Classifies the I/O error of a connection attempt. Only a refused connection says that no
    /// process listens. A host name that cannot be resolved, an unreachable network, a timeout and a
    /// reset do not: the worker may still run, with its cache.
    pub(crate) fn from_io(error: &io::Error) -> Self {
        // These numbers are the same on Linux, macOS and the BSDs. `io::ErrorKind` does not have
        // these errors.
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        match (error.kind(), error.raw_os_error()) {
            (_, Some(ENFILE | EMFILE)) => Self::LocalExhaustion(error.to_string()),
            (io::ErrorKind::ConnectionRefused, _) => Self::ConnectionRefused(error.to_string()),
            _ => Self::Unreachable(error.to_string()),
        }
    }

    /// Returns the error of a connection that was lost because of `error`.
    pub(crate) fn connection_lost(error: &dyn std::error::Error) -> Self {
        Self::ConnectionLost(root_cause(error))
    }
}

/// HTTP client for all workers, which reuses connections.
#[derive(Clone, Debug)]
pub(crate) struct UpstreamClient {
    connections: Arc<ConnectionPool>,
}

/// Connection that a request may be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionChoice {
    /// An idle connection if there is one. The worker may be closing it.
    IdleOrNew,
    /// A new connection, which the worker cannot be closing as idle.
    New,
}

impl UpstreamClient {
    /// Creates a client that waits at most `connect_timeout` for a connection. The time until a
    /// response is not limited. Must run inside a tokio runtime.
    pub(crate) fn new(connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect_timeout));
        connector.set_keepalive(Some(KEEPALIVE_INTERVAL));
        connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        connector.set_keepalive_retries(Some(KEEPALIVE_PROBES));
        #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
        connector.set_tcp_user_timeout(Some(USER_TIMEOUT));
        Self {
            connections: ConnectionPool::start(connector, connect_timeout),
        }
    }

    /// Sends the request and waits for the head of the response. Dropping the future, or later the
    /// body, closes the connection, which tells the engine to stop generating. A response with any
    /// status is a success; every error after the connection was made is
    /// [`UpstreamError::ConnectionLost`]. The caller sets the time limit.
    ///
    /// `traceparent` replaces the header of this name, if the request is sampled.
    ///
    /// If an idle connection turns out to be closed before any of the request was sent, another one
    /// is used.
    pub(crate) async fn send(
        &self,
        worker: &Worker,
        upstream_request: &UpstreamRequest,
        choice: ConnectionChoice,
        traceparent: Option<HeaderValue>,
    ) -> Result<Response<UpstreamBody>, UpstreamError> {
        let destination = Destination {
            authority: worker.address.authority(),
            tls: worker.tls().map_err(UpstreamError::Unreachable)?,
        };
        let mut request = request_to(worker, upstream_request)?;
        if let Some(traceparent) = traceparent {
            request.headers_mut().insert("traceparent", traceparent);
        }
        loop {
            let idle = match choice {
                ConnectionChoice::IdleOrNew => self.connections.take_idle(&destination),
                ConnectionChoice::New => None,
            };
            let is_reused = idle.is_some();
            let connection = match idle {
                Some(idle) => idle,
                None => self
                    .connections
                    .connect(&destination)
                    .await
                    .map_err(|error| UpstreamError::connect(&*error))?,
            };
            let mut error = match connection.send(request).await {
                Ok((response, _)) if has_unknown_coding(response.headers()) => {
                    return Err(UpstreamError::UnusableResponse(
                        "it has a transfer coding other than chunked",
                    ));
                }
                Ok((response, lease)) => {
                    return Ok(response.map(|incoming| UpstreamBody::new(incoming, lease)));
                }
                Err(error) => error,
            };
            request = match error.take_message() {
                Some(unsent) if is_reused => unsent,
                _ => return Err(UpstreamError::connection_lost(error.error())),
            };
        }
    }
}

/// Returns the request as it is sent to `worker`. Adds the header that pins it to the worker's rank,
/// unless the client named a rank.
fn request_to(
    worker: &Worker,
    upstream_request: &UpstreamRequest,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let mut request = Request::new(Full::new(upstream_request.body.clone()));
    *request.method_mut() = upstream_request.method.clone();
    *request.uri_mut() = worker.uri(&upstream_request.path)?;
    *request.headers_mut() = upstream_request.headers.clone();
    let headers = request.headers_mut();
    if let Some(host) = worker.address.host_header() {
        // The connection's host is the address that the host name was resolved to.
        headers.insert(header::HOST, host.clone());
    }
    let is_shared = upstream_request.needs_worker_key;
    if let Some(authorization) = worker.authorization_for_clients(is_shared) {
        headers
            .entry(header::AUTHORIZATION)
            .or_insert(authorization);
    }
    if let Some(rank) = &worker.rank_header {
        // A request whose client named a rank was routed to that rank.
        headers.entry(RANK_HEADER).or_insert_with(|| rank.clone());
    }
    Ok(request)
}

/// Returns whether a message has a transfer coding other than `chunked`, which the gateway does not
/// decode.
pub(crate) fn has_unknown_coding(headers: &HeaderMap) -> bool {
    let codings = headers.get_all(header::TRANSFER_ENCODING);
    let mut codings = codings
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    codings.any(|coding| !coding.trim_ascii().eq_ignore_ascii_case(b"chunked"))
}

/// Returns the text of the innermost error. The outer errors say only that something failed.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Headers as a client or an engine may send them. A hop-by-hop header or a listed one never
        /// remains, and all others keep their values and their order.
        #[test]
        fn only_headers_of_the_message_are_passed_on(
            lines in prop::collection::vec(
                (
                    "(connection|te|trailer|transfer-encoding|content-length|upgrade|keep-alive|x-a|x-b)",
                    prop_oneof![
                        "((chunked|gzip|close|x-a|X-B|content-length|5|;q=1)?[ ,]{0,2}){0,4}",
                        "[ -~]{0,12}",
                    ],
                ),
                0..8,
            ),
        ) {
            let lines: Vec<(HeaderName, HeaderValue)> = lines
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect();
            let mut all = HeaderMap::new();
            for (name, value) in lines {
                all.append(name, value);
            }
            let mut after = all.clone();
            strip_hop_by_hop(&mut after);
            let connection = all.get_all(header::CONNECTION).iter();
            let connection: Vec<String> = connection
                .map(|value| value.to_str().unwrap().to_ascii_lowercase())
                .collect();
            let is_listed = |name: &HeaderName| {
                let mut listed = connection.iter().flat_map(|value| value.split(','));
                listed.any(|listed| listed.trim() == name.as_str())
            };
            for name in all.keys() {
                let is_length = name == header::CONTENT_LENGTH;
                let is_removed = HOP_BY_HOP.contains(name)
                    || is_listed(name)
                    || is_length && all.contains_key(header::TRANSFER_ENCODING);
                let left: Vec<_> = after.get_all(name).iter().collect();
                let expected: Vec<_> = match is_removed {
                    true => Vec::new(),
                    false => all.get_all(name).iter().collect(),
                };
                prop_assert_eq!(left, expected, "{}", name);
            }
            prop_assert!(!has_unknown_coding(&after));
            let mut again = after.clone();
            strip_hop_by_hop(&mut again);
            prop_assert_eq!(again, after);
        }

        #[test]
        fn any_coding_beside_chunked_is_unknown(codings in "((chunked|Chunked|gzip|x)[ ]?[,]?[ ]?){0,4}") {
            let headers = HeaderMap::from_iter([(header::TRANSFER_ENCODING, codings.parse().unwrap())]);
            let is_known = codings
                .split(',')
                .all(|coding| coding.trim().eq_ignore_ascii_case("chunked"));
            prop_assert_eq!(has_unknown_coding(&headers), !is_known);
        }
    }

    #[test]
    fn only_a_refused_connection_says_that_the_process_is_gone() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let refused = UpstreamError::from_io(&refused);
        assert!(matches!(refused, UpstreamError::ConnectionRefused(_)));
        for kind in [
            io::ErrorKind::HostUnreachable,
            io::ErrorKind::NetworkUnreachable,
            io::ErrorKind::TimedOut,
            io::ErrorKind::ConnectionReset,
            io::ErrorKind::NotFound,
            io::ErrorKind::Other,
        ] {
            let error = UpstreamError::from_io(&io::Error::from(kind));
            assert!(matches!(error, UpstreamError::Unreachable(_)), "{kind:?}");
        }
        let unknown = std::fmt::Error;
        let unknown = UpstreamError::connect(&unknown);
        assert!(matches!(unknown, UpstreamError::Unreachable(_)));
    }

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

    #[test]
    fn content_length_is_dropped_beside_a_transfer_coding_and_other_codings_are_found() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("5"));
        strip_hop_by_hop(&mut headers);
        assert!(headers.contains_key(header::CONTENT_LENGTH));
        let coding = |value: &'static str| {
            let value = HeaderValue::from_static(value);
            HeaderMap::from_iter([(header::TRANSFER_ENCODING, value)])
        };
        headers.extend(coding("chunked"));
        strip_hop_by_hop(&mut headers);
        assert!(headers.is_empty());
        assert!(!has_unknown_coding(&coding("Chunked")));
        for unknown in ["gzip", "gzip, chunked", "chunked, identity", "xchunked", ""] {
            assert!(has_unknown_coding(&coding(unknown)), "{unknown}");
        }
    }
}
