//! Starting and stopping: two listeners, a probe per worker, and a shutdown that lets streams end.
//!
//! The API is served by threads that share nothing but the router and the counters: each accepts
//! from the same queue and runs its own event loop with its own connections to the workers. A
//! request stays on the thread that accepted it, so its events wake no other; for a stream of
//! small events, that is most of what they cost.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use foresee_core::fleet::WorkerError;
use foresee_core::router::{ConfigError, Router};
use foresee_engine::tokenizer::TokenizerError;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::forward::{Forwarder, KEEPALIVE};
use crate::listen::listen;
use crate::metrics::Metrics;
use crate::recorder::Recorder;
use crate::reply::Body;
use crate::shared::{RequestIds, Shared};
use crate::text::TextRatios;
use crate::tokens::Tokens;
use crate::workers::{Workers, start_watching};

/// How long a client may take to send the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// After a failed `accept` (no file descriptor left, mostly): time for some to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The system gives no thread or event loop.
    #[error("cannot start an I/O thread: {0}")]
    Thread(io::Error),
    /// The recording cannot be written.
    #[error("cannot record to {}: {error}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A worker cannot join.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
    address: SocketAddr,
    admin_address: SocketAddr,
    stop: watch::Sender<bool>,
    /// Ends when its thread does.
    io_threads: Vec<oneshot::Receiver<()>>,
    admin: JoinHandle<()>,
}

impl Gateway {
    /// Starts listening and probing. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// If an address cannot be bound, the tokenizer cannot be read, or the configuration
    /// contradicts itself.
    pub fn start(config: GatewayConfig) -> Result<Self, StartError> {
        // Takes seconds, in which nobody is to wait for an answer.
        let tokens = config.tokenizer.as_deref().map(Tokens::load).transpose()?;
        let bind = |address| listen(address).map_err(|error| StartError::Listen { address, error });
        let (api, admin) = (bind(config.listen)?, bind(config.admin_listen)?);
        let address = api.local_addr().unwrap_or(config.listen);
        let admin_address = admin.local_addr().unwrap_or(config.admin_listen);
        let metrics = Metrics::new();
        let record = config.record.as_deref();
        let recorder = record.map(|path| {
            Recorder::start(path, &metrics).map_err(|error| StartError::Record {
                path: path.to_owned(),
                error,
            })
        });
        let shared = Arc::new(Shared {
            router: Router::new(config.router.clone())?,
            workers: Workers::default(),
            probes: Forwarder::new(config.connect_timeout),
            metrics,
            clock: Clock::start(),
            text: TextRatios::default(),
            tokens,
            request_ids: RequestIds::new(),
            recorder: recorder.transpose()?,
            config,
        });
        let mut workers = Vec::new();
        for engine in &shared.config.workers {
            let prefix_caching = shared.config.prefix_caching;
            workers.extend(shared.workers.add(&shared.router, engine, prefix_caching)?);
        }
        let (stop, stopped) = watch::channel(false);
        let api = api.into_std().map_err(StartError::Thread)?;
        let io_threads = (0..shared.config.io_threads.get())
            .map(|number| {
                let api = api.try_clone()?;
                start_io_thread(number, api, Arc::clone(&shared), stopped.clone())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(StartError::Thread)?;
        for worker in workers {
            start_watching(&shared, worker);
        }
        if shared.config.router.queue.is_some() {
            tokio::spawn(tick(Arc::downgrade(&shared)));
        }
        let for_admin = Arc::clone(&shared);
        let timeout = shared.config.shutdown_timeout;
        let admin = tokio::spawn(serve(admin, stopped, timeout, move |request| {
            Arc::clone(&for_admin).answer_admin(request)
        }));
        Ok(Self {
            shared,
            address,
            admin_address,
            stop,
            io_threads,
            admin,
        })
    }

    /// Where the API listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the admin API listens.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The router, to look at.
    #[must_use]
    pub fn router(&self) -> &Router {
        &self.shared.router
    }

    /// Stops accepting, lets running requests end until the configured deadline, breaks off those
    /// that did not, and returns.
    pub async fn shut_down(self) {
        self.stop.send_replace(true);
        for thread in self.io_threads {
            // The error says that the thread has ended, which is what is waited for.
            let _ = thread.await;
        }
        if let Err(error) = self.admin.await {
            tracing::error!(%error, "the admin listener failed");
        }
        for worker in self.shared.workers.all() {
            worker.remove();
        }
        let shared = self.shared;
        let written = tokio::task::spawn_blocking(move || {
            if let Some(recorder) = &shared.recorder {
                recorder.finish();
            }
        });
        if let Err(error) = written.await {
            tracing::error!(%error, "the recording was not finished");
        }
    }
}

/// How often the queue is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// Tells the queue that time has passed, as long as there is a gateway.
async fn tick(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        shared.router.tick(shared.clock.now());
    }
}

/// Serves the API on a thread of its own until told to stop.
fn start_io_thread(
    number: usize,
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
) -> io::Result<oneshot::Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (running, ended) = oneshot::channel::<()>();
    let serve_api = async move {
        let listener = TcpListener::from_std(listener)?;
        let timeout = shared.config.shutdown_timeout;
        let forwarder = Arc::new(Forwarder::new(shared.config.connect_timeout));
        let answer = move |request| Arc::clone(&shared).answer(Arc::clone(&forwarder), request);
        serve(listener, stopped, timeout, answer).await;
        Ok::<(), io::Error>(())
    };
    std::thread::Builder::new()
        .name(format!("io-{number}"))
        .spawn(move || {
            if let Err(error) = runtime.block_on(serve_api) {
                tracing::error!(%error, "an I/O thread failed");
            }
            // With it go the connections to workers.
            drop(runtime);
            drop(running);
        })?;
    Ok(ended)
}

/// Accepts connections until told to stop, then waits for them to end. Those that are still open
/// at the deadline are closed, and what they hold on workers is freed.
async fn serve<A, F>(
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
    timeout: Duration,
    answer: A,
) where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT);
    loop {
        let stream = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            accepted = accept(&listener) => accepted,
        };
        let answer = answer.clone();
        let service = service_fn(move |request| {
            let response = answer(request);
            async move { Ok::<_, Infallible>(response.await) }
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended early");
            }
        });
        // Forgets those that have ended.
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    if tokio::time::timeout(timeout, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!("streams were still running at the shutdown deadline");
    }
    connections.shutdown().await;
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without the first, small events wait for each other. Without the second, a client
                // that vanished holds its booking until something is written to it.
                let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
                let socket = SockRef::from(&stream);
                let set = stream.set_nodelay(true);
                if let Err(error) = set.and_then(|()| socket.set_tcp_keepalive(&keepalive)) {
                    tracing::debug!(%error, "an option of a connection was refused");
                }
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
