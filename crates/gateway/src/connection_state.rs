//! State of one connection of a client: the progress of its request, shared by the connection's socket,
//! requests and responses; and the limits of connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::Duration;

use http::{Request, Version};
use hyper::body::{Body as _, Incoming};
use tokio::net::TcpStream;

use crate::shutdown::{ShutdownPhase, ShutdownSignal};

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
    pub(crate) fn new(shutdown: Arc<ShutdownSignal>) -> Self {
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
    pub(crate) fn set_stage(&self, stage: RequestStage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }
}

/// A request's access to its connection, in the extensions of the request.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionHandle {
    pub(crate) state: Arc<ConnectionState>,
    /// Version of the request.
    pub(crate) version: Version,
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

/// The client's end of a connection, as an extension of each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Whether the connection is one of TLS.
    pub(crate) is_encrypted: bool,
}

impl Peer {
    /// Returns the client at the other end of a connection; `None` if it has closed the connection.
    pub(crate) fn of(connection: &TcpStream, is_encrypted: bool) -> Option<Self> {
        let address = connection.peer_addr().ok()?;
        Some(Self {
            address,
            is_encrypted,
        })
    }
}

/// Records the start of a request, and adds its [`ConnectionHandle`] to it.
pub(crate) fn begin_request(
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
