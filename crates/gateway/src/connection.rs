//! One connection of a client: serves its requests over HTTP/1.1, and follows the phases of a
//! shutdown.
//!
//! The connection's state is shared by three parts that all run in the connection's task: the socket
//! with its deadlines ([`ClientSocket`]), the requests, and the bodies of their responses.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::client_headers::PeerAddress;
use crate::client_socket::ClientSocket;
use crate::reply::Body;
use crate::shutdown::{ShutdownPhase, ShutdownSignal};

/// Maximum size of a request's head. It also bounds what is buffered of a response for a client that
/// reads slowly. A head has at most 100 headers, which is the HTTP library's default.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Limits of the connections of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionConfig {
    /// Maximum time from the first byte of a request's head to its last.
    pub head_timeout: Duration,
    /// Maximum time without a request on an open connection. Longer than the idle timeouts of load
    /// balancers, which must not send a request on a connection that is being closed.
    pub idle_timeout: Duration,
    /// Maximum time in which a client may take no byte of a response that is ready for it.
    pub write_timeout: Duration,
    /// Maximum number of connections to the API; `None` to derive it from the limit of open files.
    pub max_connections: Option<usize>,
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(90),
            write_timeout: Duration::from_secs(60),
            max_connections: None,
        }
    }
}

/// Progress of the request on a connection, which decides the meaning of a silent or closing client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum RequestStage {
    /// The connection has no request, or the head of the request is incomplete.
    Idle,
    /// The body of a request is incomplete, or is not read.
    Receiving,
    /// The request is complete, and its response has not begun. The client accepts interim
    /// responses.
    Waiting,
    /// As `Waiting`, but the client speaks HTTP/1.0, which has no interim responses.
    WaitingOverHttp10,
    /// The response has begun; it is sent in chunks.
    SendingChunks,
    /// The response has begun; it has a known length or ends with the connection.
    Sending,
}

impl RequestStage {
    /// All stages, by their number.
    const ALL: [Self; 6] = [
        Self::Idle,
        Self::Receiving,
        Self::Waiting,
        Self::WaitingOverHttp10,
        Self::SendingChunks,
        Self::Sending,
    ];
}

/// State of one connection.
#[derive(Debug)]
pub(crate) struct ConnectionState {
    /// A [`RequestStage`], as a number.
    stage: AtomicU8,
    /// Number of requests so far. Wraps around.
    requests: AtomicU32,
    /// Phase of the listener's shutdown.
    pub(crate) shutdown: Arc<ShutdownSignal>,
}

impl ConnectionState {
    /// Creates the state of a connection without requests.
    fn new(shutdown: Arc<ShutdownSignal>) -> Self {
        Self {
            stage: AtomicU8::new(RequestStage::Idle as u8),
            requests: AtomicU32::new(0),
            shutdown,
        }
    }

    /// Returns the stage of the present request.
    pub(crate) fn stage(&self) -> RequestStage {
        let number = usize::from(self.stage.load(Ordering::Relaxed));
        RequestStage::ALL
            .get(number)
            .copied()
            .unwrap_or(RequestStage::Idle)
    }

    /// Returns the number of requests so far.
    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Sets the stage.
    fn set_stage(&self, stage: RequestStage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }
}

/// A request's access to its connection, in the extensions of the request.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionHandle {
    state: Arc<ConnectionState>,
    /// Version of the request.
    version: Version,
    /// Whether the request is the first one of its connection.
    is_first: bool,
}

impl ConnectionHandle {
    /// Records that the body of the request has arrived whole.
    pub(crate) fn note_body_received(&self) {
        self.state.set_stage(if self.version < Version::HTTP_11 {
            RequestStage::WaitingOverHttp10
        } else {
            RequestStage::Waiting
        });
    }

    /// Returns whether the request came too late to be served before the shutdown. The first
    /// request of a connection never does, because its client could not know of the shutdown.
    pub(crate) fn is_too_late(&self) -> bool {
        !self.is_first && self.state.shutdown.phase() >= ShutdownPhase::Draining
    }
}

/// Body of a response on a connection. The connection is idle again when the body is dropped.
#[derive(Debug)]
struct ConnectionBody {
    inner: Body,
    state: Arc<ConnectionState>,
}

impl Drop for ConnectionBody {
    fn drop(&mut self) {
        self.state.set_stage(RequestStage::Idle);
    }
}

impl hyper::body::Body for ConnectionBody {
    type Data = Bytes;
    type Error = <Body as hyper::body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Serves the requests of one connection with `handle` until the client or the shutdown closes it.
/// Each request has a [`ConnectionHandle`] among its extensions. `place` is dropped at the end.
pub(crate) async fn serve_connection<H, F, P>(
    stream: TcpStream,
    config: ConnectionConfig,
    shutdown: Arc<ShutdownSignal>,
    handle: H,
    place: P,
) where
    H: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let _place = place;
    let peer = stream.peer_addr().ok().map(PeerAddress);
    let mut phases = shutdown.subscribe();
    let state = Arc::new(ConnectionState::new(shutdown));
    let socket = ClientSocket::new(stream, config, Arc::clone(&state));
    let service = service_fn(move |mut request| {
        let connection = begin_request(&state, &mut request);
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        let method = request.method().clone();
        let response = handle(request);
        // The HTTP library keeps a place for this future as long as the connection lasts, so the
        // future is boxed: its memory is free once the response has begun.
        Box::pin(
            async move { Ok::<_, Infallible>(connection.begin_response(&method, response.await)) },
        )
    });
    let mut http = http1::Builder::new();
    http.max_buf_size(MAX_HEAD_BYTES);
    let mut connection = pin!(http.serve_connection(TokioIo::new(socket), service));
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection to a client ended early");
                }
                return;
            }
            // Polls the connection again, whose parts read the phase.
            Ok(()) = phases.changed() => {}
        }
    }
}

/// Records the start of a request, and adds its [`ConnectionHandle`] to it.
fn begin_request(
    state: &Arc<ConnectionState>,
    request: &mut Request<Incoming>,
) -> ConnectionHandle {
    let earlier = state.requests.fetch_add(1, Ordering::Relaxed);
    let connection = ConnectionHandle {
        state: Arc::clone(state),
        version: request.version(),
        is_first: earlier == 0,
    };
    if request.body().is_end_stream() {
        connection.note_body_received();
    } else {
        state.set_stage(RequestStage::Receiving);
    }
    request.extensions_mut().insert(connection.clone());
    connection
}

impl ConnectionHandle {
    /// Records the start of the response to a request with this `method`. Adds `Connection: close` if
    /// the request's body was not read, or the gateway shuts down.
    fn begin_response(self, method: &Method, response: Response<Body>) -> Response<ConnectionBody> {
        let mut response = response;
        let is_unread = self.state.stage() == RequestStage::Receiving;
        if is_unread || self.state.shutdown.has_begun() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        let has_body = *method != Method::HEAD
            && !matches!(
                response.status(),
                StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
            );
        let has_length = response.headers().contains_key(CONTENT_LENGTH)
            || response.body().size_hint().exact().is_some();
        let is_chunked = self.version == Version::HTTP_11 && has_body && !has_length;
        self.state.set_stage(if is_chunked {
            RequestStage::SendingChunks
        } else {
            RequestStage::Sending
        });
        let state = self.state;
        response.map(|inner| ConnectionBody { inner, state })
    }
}
