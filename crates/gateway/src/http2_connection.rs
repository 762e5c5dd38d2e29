//! One HTTP/2 connection of a client: serves its requests, which run at the same time, and follows
//! the phases of a shutdown.
//!
//! Each request is a stream with a task of its own. A stream that the client resets is dropped, which
//! releases its bookings; the others go on. TLS selects HTTP/2; without TLS, clients speak HTTP/1.1
//! ([`connection`](crate::connection)).

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use foresee_engine::request::Endpoint;
use http::header::HOST;
use http::{HeaderValue, Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_rustls::server::TlsStream;

use crate::connection_limit::{ConnectionLimit, Place, too_many_connections};
use crate::connection_state::{ConnectionConfig, ConnectionState, Peer, begin_request};
use crate::reply::{self, Body};
use crate::shutdown::{ShutdownPhase, ShutdownSignal};
use crate::tls::ClientStream;

/// Maximum number of requests at a time on one connection.
const MAX_STREAMS: u32 = 256;
/// Maximum size of a request's headers, as over HTTP/1.1.
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// Maximum number of bytes of one request's body, and of all bodies of a connection, that the client
/// sends before the gateway has read them.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;
/// Number of bytes of one response that wait for the client, above which no further ones are taken from
/// the worker.
const MAX_SEND_BYTES: usize = 64 << 10;
/// Time between two pings, and maximum time for the response to one.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time between two looks at the streams of a connection.
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Serves the requests of one connection with `handle` until the client or the shutdown closes it.
/// Each request has a [`ConnectionHandle`](crate::connection_state::ConnectionHandle) of its own and
/// the [`Peer`] among its extensions.
///
/// The connection ends if it has no request for the idle timeout. A stream is reset if the client takes
/// nothing of its response, which is ready, for the write timeout; the others go on. `limit` bounds the
/// requests that run at the same time, on all connections together.
pub(crate) async fn serve_http2<H, F>(
    stream: Box<TlsStream<TcpStream>>,
    config: ConnectionConfig,
    limit: Arc<ConnectionLimit>,
    shutdown: Arc<ShutdownSignal>,
    handle: H,
) where
    H: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let peer = Peer::of(stream.tcp(), true);
    let streams = Arc::new(Streams::new(limit));
    let mut phases = shutdown.subscribe();
    let service = service_fn({
        let (streams, shutdown) = (Arc::clone(&streams), Arc::clone(&shutdown));
        move |mut request: Request<Incoming>| {
            let stream = streams.open();
            let is_admitted = stream.is_admitted();
            // A request of its own connection, as far as the requests' parts can tell.
            let state = Arc::new(ConnectionState::new(Arc::clone(&shutdown)));
            begin_request(&state, &mut request);
            if let Some(peer) = peer {
                request.extensions_mut().insert(peer);
            }
            name_host(&mut request);
            let response = is_admitted.then(|| handle(request));
            let shutdown = Arc::clone(&shutdown);
            Box::pin(async move {
                let response = match response {
                    Some(response) => polled_when_aborting(response, &shutdown).await,
                    None => reply::error(Endpoint::Other, &too_many_connections()),
                };
                let body = |inner| StreamBody::new(inner, stream, shutdown);
                Ok::<_, Infallible>(response.map(body))
            })
        }
    });
    let mut http = http2::Builder::new(StreamTasks(Arc::clone(&streams)));
    http.timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(MAX_SEND_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let shortest = config.write_timeout.min(config.idle_timeout);
    let mut checks = interval((shortest / 4).clamp(Duration::from_millis(1), MAX_CHECK_INTERVAL));
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // When the gateway asked the client to open no further streams.
    let mut closing_since = None;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "HTTP/2 connection to a client ended early");
                }
                return;
            }
            Ok(()) = phases.changed() => {}
            _ = checks.tick() => {}
        }
        if streams.reset_unread(config.write_timeout) > 0 {
            tracing::debug!("an HTTP/2 client does not read a response");
        }
        let idle = streams.idle_for();
        let is_draining = shutdown.phase() >= ShutdownPhase::Draining;
        if closing_since.is_none() && (is_draining || idle > config.idle_timeout) {
            connection.as_mut().graceful_shutdown();
            closing_since = Some(Instant::now());
        }
        // The client may not take the end of its last response, or not close its side.
        let is_overdue = |since: Instant| since.elapsed() > config.write_timeout;
        if closing_since.is_some_and(is_overdue) && idle > config.write_timeout {
            return;
        }
    }
}

/// Adds the `Host` that the request names as `:authority`, unless it has one.
fn name_host(request: &mut Request<Incoming>) {
    let authority = request.uri().authority();
    let host = authority.and_then(|host| HeaderValue::from_str(host.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().entry(HOST).or_insert(host);
    }
}

/// Runs `future`, and polls it when the shutdown reaches the phase in which running requests end.
async fn polled_when_aborting<F: Future>(future: F, shutdown: &ShutdownSignal) -> F::Output {
    let mut future = pin!(future);
    let mut aborting = pin!(shutdown.reached(ShutdownPhase::Aborting));
    let mut is_aborting = false;
    poll_fn(|context| {
        is_aborting = is_aborting || aborting.as_mut().poll(context).is_ready();
        future.as_mut().poll(context)
    })
    .await
}

/// Starts the task of each stream, right after its request was handled. The tasks end with their
/// connection, which wakes them.
#[derive(Clone, Debug)]
struct StreamTasks(Arc<Streams>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for StreamTasks {
    fn execute(&self, stream: F) {
        let task = tokio::spawn(stream);
        self.0.set_task(task.abort_handle());
    }
}

/// Streams of one connection, from the head of each request to the end of its response.
#[derive(Debug)]
struct Streams {
    start: Instant,
    /// Limit of the requests on all connections.
    limit: Arc<ConnectionLimit>,
    state: Mutex<StreamStates>,
}

#[derive(Debug, Default)]
struct StreamStates {
    streams: HashMap<u64, StreamEntry>,
    next_id: u64,
    /// When the last stream ended, after the start.
    idle_since: Duration,
}

/// An open stream.
#[derive(Debug, Default)]
struct StreamEntry {
    /// When the gateway had data for the stream that the client has not taken yet, as microseconds
    /// after the start and at least 1; 0 if there are none.
    unread_since: Arc<AtomicU64>,
    /// The task of the stream, once it was started.
    task: Option<AbortHandle>,
}

impl Streams {
    fn new(limit: Arc<ConnectionLimit>) -> Self {
        Self {
            start: Instant::now(),
            limit,
            state: Mutex::default(),
        }
    }

    /// Adds a stream, which ends with the returned guard.
    fn open(self: &Arc<Self>) -> OpenStream {
        let entry = StreamEntry::default();
        let unread_since = Arc::clone(&entry.unread_since);
        let mut state = self.state.lock();
        let place = match state.streams.is_empty() {
            true => StreamPlace::OfConnection,
            false => match self.limit.take_stream() {
                Some(place) => StreamPlace::Own { _place: place },
                None => StreamPlace::Missing,
            },
        };
        let id = state.next_id;
        state.next_id += 1;
        state.streams.insert(id, entry);
        drop(state);
        OpenStream {
            streams: Arc::clone(self),
            id,
            unread_since,
            place,
        }
    }

    /// Notes the task of the stream that was added last.
    fn set_task(&self, task: AbortHandle) {
        let mut state = self.state.lock();
        let last = state.next_id.wrapping_sub(1);
        if let Some(entry) = state.streams.get_mut(&last) {
            entry.task.get_or_insert(task);
        }
    }

    /// Returns the time since the last stream ended; zero if there are streams.
    fn idle_for(&self) -> Duration {
        let state = self.state.lock();
        match state.streams.is_empty() {
            true => self.start.elapsed().saturating_sub(state.idle_since),
            false => Duration::ZERO,
        }
    }

    /// Resets the streams whose client has not taken data that is ready for longer than `limit`.
    /// Returns their number.
    fn reset_unread(&self, limit: Duration) -> usize {
        let now = self.start.elapsed();
        let state = self.state.lock();
        let is_stalled = |entry: &&StreamEntry| {
            let since = entry.unread_since.load(Ordering::Relaxed);
            since > 0 && now.saturating_sub(Duration::from_micros(since)) > limit
        };
        let tasks = state.streams.values().filter(is_stalled);
        let tasks: Vec<_> = tasks.filter_map(|entry| entry.task.clone()).collect();
        drop(state);
        tasks.iter().for_each(AbortHandle::abort);
        tasks.len()
    }
}

/// The place of a stream among all requests.
#[derive(Debug)]
enum StreamPlace {
    /// The place of its connection: no other stream was open.
    OfConnection,
    /// A place of its own.
    Own { _place: Place },
    /// None was free.
    Missing,
}

/// A stream of a connection. Dropping it removes the stream.
#[derive(Debug)]
struct OpenStream {
    streams: Arc<Streams>,
    id: u64,
    unread_since: Arc<AtomicU64>,
    place: StreamPlace,
}

impl OpenStream {
    /// Returns whether there was a place for the request.
    fn is_admitted(&self) -> bool {
        !matches!(self.place, StreamPlace::Missing)
    }

    /// Records that data are ready, or that the client has taken them.
    fn set_unread(&self, is_unread: bool) {
        let now = || self.streams.start.elapsed().as_micros() as u64;
        let since = if is_unread { now().max(1) } else { 0 };
        self.unread_since.store(since, Ordering::Relaxed);
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut state = self.streams.state.lock();
        state.streams.remove(&self.id);
        state.idle_since = self.streams.start.elapsed();
    }
}

/// Body of a response on a stream.
struct StreamBody {
    inner: Body,
    stream: OpenStream,
    /// Wakes the task in the phase in which running responses end; `None` afterwards.
    aborting: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl StreamBody {
    fn new(inner: Body, stream: OpenStream, shutdown: Arc<ShutdownSignal>) -> Self {
        let aborting = async move { shutdown.reached(ShutdownPhase::Aborting).await };
        Self {
            inner,
            stream,
            aborting: Some(Box::pin(aborting)),
        }
    }
}

impl hyper::body::Body for StreamBody {
    type Data = Bytes;
    type Error = <Body as hyper::body::Body>::Error;

    /// A frame is polled before the client has room for it, and the next one once it has taken this
    /// one.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let aborting = self.aborting.as_mut();
        if aborting.is_some_and(|aborting| aborting.as_mut().poll(context).is_ready()) {
            self.aborting = None;
        }
        let frame = Pin::new(&mut self.inner).poll_frame(context);
        self.stream
            .set_unread(matches!(frame, Poll::Ready(Some(_))));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
