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
use http::header::HOST;
use http::{HeaderValue, Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_rustls::server::TlsStream;

use crate::connection_state::{ConnectionConfig, ConnectionState, Peer, begin_request};
use crate::reply::Body;
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
/// Maximum number of bytes of one response that wait for the client.
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
/// The connection ends if it has no request for the idle timeout, or if the client takes nothing of
/// a response that is ready for the write timeout.
pub(crate) async fn serve_http2<H, F>(
    stream: Box<TlsStream<TcpStream>>,
    config: ConnectionConfig,
    shutdown: Arc<ShutdownSignal>,
    handle: H,
) where
    H: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let peer = Peer::of(stream.tcp(), true);
    let streams = Arc::new(Streams::new());
    let mut phases = shutdown.subscribe();
    let service = service_fn({
        let (streams, shutdown) = (Arc::clone(&streams), Arc::clone(&shutdown));
        move |mut request: Request<Incoming>| {
            let stream = streams.open();
            // A request of its own connection, as far as the requests' parts can tell.
            let state = Arc::new(ConnectionState::new(Arc::clone(&shutdown)));
            begin_request(&state, &mut request);
            if let Some(peer) = peer {
                request.extensions_mut().insert(peer);
            }
            name_host(&mut request);
            let (response, shutdown) = (handle(request), Arc::clone(&shutdown));
            Box::pin(async move {
                let response = polled_when_aborting(response, &shutdown).await;
                let body = |inner| StreamBody::new(inner, stream, shutdown);
                Ok::<_, Infallible>(response.map(body))
            })
        }
    });
    let tasks = StreamTasks::default();
    let mut http = http2::Builder::new(tasks.clone());
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
        if streams.longest_unread() > config.write_timeout {
            tracing::debug!("an HTTP/2 client does not read its response");
            return;
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

/// Tasks of the streams of one connection. They are aborted when the last clone is dropped.
#[derive(Clone, Debug, Default)]
struct StreamTasks(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for StreamTasks {
    fn execute(&self, stream: F) {
        let mut tasks = self.0.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(stream);
    }
}

/// Streams of one connection, from the head of each request to the end of its response.
#[derive(Debug)]
struct Streams {
    start: Instant,
    state: Mutex<StreamStates>,
}

#[derive(Debug, Default)]
struct StreamStates {
    /// For each stream, when the gateway had data for it that the client has not taken yet, as
    /// microseconds after the start and at least 1; 0 if there are none.
    unread_since: HashMap<u64, Arc<AtomicU64>>,
    next_id: u64,
    /// When the last stream ended, after the start.
    idle_since: Duration,
}

impl Streams {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            state: Mutex::default(),
        }
    }

    /// Adds a stream, which ends with the returned guard.
    fn open(self: &Arc<Self>) -> OpenStream {
        let unread_since = Arc::<AtomicU64>::default();
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.unread_since.insert(id, Arc::clone(&unread_since));
        OpenStream {
            streams: Arc::clone(self),
            id,
            unread_since,
        }
    }

    /// Returns the time since the last stream ended; zero if there are streams.
    fn idle_for(&self) -> Duration {
        let state = self.state.lock();
        match state.unread_since.is_empty() {
            true => self.start.elapsed().saturating_sub(state.idle_since),
            false => Duration::ZERO,
        }
    }

    /// Returns the longest time for which a client has not taken data that is ready.
    fn longest_unread(&self) -> Duration {
        let now = self.start.elapsed();
        let state = self.state.lock();
        let since = state.unread_since.values();
        let since = since.map(|since| since.load(Ordering::Relaxed));
        let unread = since.filter(|since| *since > 0);
        let unread = unread.map(|since| now.saturating_sub(Duration::from_micros(since)));
        unread.max().unwrap_or_default()
    }
}

/// A stream of a connection. Dropping it removes the stream.
#[derive(Debug)]
struct OpenStream {
    streams: Arc<Streams>,
    id: u64,
    unread_since: Arc<AtomicU64>,
}

impl OpenStream {
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
        state.unread_since.remove(&self.id);
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

    /// Is polled only once the client has room for more data.
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
