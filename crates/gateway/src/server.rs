//! Start and stop of a gateway: two listeners, the tasks of each worker, and a shutdown that lets
//! running responses end.
//!
//! The API is served by I/O threads that share only the router and the counters. Each accepts
//! connections from the same listener and has an event loop and connections to the workers of its
//! own. A request stays on the thread that accepted it, so its events wake no other thread. For a
//! stream of small events, wake-ups would be most of the cost.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use foresee_core::router::{ConfigError, Router};
use foresee_core::workers::WorkerError;
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

use crate::bytes_per_token::TextRatios;
use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::gateway_state::{GatewayState, RequestIds};
use crate::listen::listen;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::recorder::Recorder;
use crate::reply::Body;
use crate::tokenization::PromptTokenizer;
use crate::upstream::{KEEPALIVE, UpstreamClient};
use crate::workers::{Workers, start_worker_tasks};

/// Maximum time in which a client may send the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Time to wait after a failed `accept`. The usual cause is that no file descriptor is left; some may
/// be closed in that time.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(10);

/// Time between two calls of the router's [`tick`](Router::tick), which dispatches queued requests.
const TICK_INTERVAL: Duration = Duration::from_millis(10);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is in use, or does not belong to this machine.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Error of the operating system.
        error: io::Error,
    },
    /// The operating system provides no thread or event loop.
    #[error("cannot start an I/O thread: {0}")]
    Thread(io::Error),
    /// The recording cannot be written.
    #[error("cannot record to {}: {error}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        error: io::Error,
    },
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A worker cannot be added.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<GatewayState>,
    /// Address of the API's listener.
    address: SocketAddr,
    /// Address of the admin listener.
    admin_address: SocketAddr,
    /// Set to `true` to stop all listeners.
    stop: watch::Sender<bool>,
    /// Receivers that are closed when their I/O threads end.
    io_threads: Vec<oneshot::Receiver<()>>,
    /// Task that serves the admin listener.
    admin: JoinHandle<()>,
}

impl Gateway {
    /// Starts the listeners and the tasks of the workers. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// Fails if an address cannot be bound, the tokenizer cannot be loaded, the recording cannot be
    /// written, a setting is out of range, or two workers have the same name.
    pub fn start(config: GatewayConfig) -> Result<Self, StartError> {
        // Loading takes seconds, so it happens before the first connection is accepted.
        let tokenizer = config
            .tokenizer
            .as_deref()
            .map(PromptTokenizer::load)
            .transpose()?;
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
        let shared = Arc::new(GatewayState {
            router: Router::new(config.router.clone())?,
            workers: Workers::default(),
            probe_client: UpstreamClient::new(config.connect_timeout),
            metrics,
            clock: Clock::start(),
            text_ratios: TextRatios::default(),
            tokenizer,
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
            start_worker_tasks(&shared, worker);
        }
        if shared.config.router.queue_order.is_some() {
            tokio::spawn(tick_queue(Arc::downgrade(&shared)));
        }
        let admin_state = Arc::clone(&shared);
        let timeout = shared.config.shutdown_timeout;
        let admin = tokio::spawn(serve(admin, stopped, timeout, move |request| {
            Arc::clone(&admin_state).handle_admin(request)
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

    /// Returns the address that the API listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the address that the admin API listens on.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Returns the router, for inspection.
    #[must_use]
    pub fn router(&self) -> &Router {
        &self.shared.router
    }

    /// Stops accepting connections, waits for running responses to end, and aborts the responses
    /// that still run after `shutdown_timeout`. Then ends the tasks of the workers and finishes the
    /// recording.
    pub async fn shut_down(self) {
        self.stop.send_replace(true);
        for thread in self.io_threads {
            // Nothing is ever sent. The error says that the thread has ended.
            let _ = thread.await;
        }
        if let Err(error) = self.admin.await {
            tracing::error!(%error, "the admin listener panicked");
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
            tracing::error!(%error, "finishing the recording failed; its last entries may be missing");
        }
    }
}

/// Calls the router's `tick` in intervals for as long as the gateway exists.
async fn tick_queue(shared: Weak<GatewayState>) {
    let mut ticks = tokio::time::interval(TICK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        shared.router.tick(shared.clock.now());
    }
}

/// Starts a thread that serves the API until `stopped` is true. The returned receiver is closed
/// when the thread ends. Fails if the operating system provides no event loop or thread. A later
/// error is logged and ends the thread.
fn start_io_thread(
    number: usize,
    listener: std::net::TcpListener,
    shared: Arc<GatewayState>,
    stopped: watch::Receiver<bool>,
) -> io::Result<oneshot::Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (running, ended) = oneshot::channel::<()>();
    let serve_api = async move {
        let listener = TcpListener::from_std(listener)?;
        let timeout = shared.config.shutdown_timeout;
        let client = Arc::new(UpstreamClient::new(shared.config.connect_timeout));
        let handle = move |request| Arc::clone(&shared).handle_api(Arc::clone(&client), request);
        serve(listener, stopped, timeout, handle).await;
        Ok::<(), io::Error>(())
    };
    std::thread::Builder::new()
        .name(format!("io-{number}"))
        .spawn(move || {
            if let Err(error) = runtime.block_on(serve_api) {
                tracing::error!(%error, "cannot serve on an I/O thread");
            }
            // Closes the connections to the workers.
            drop(runtime);
            drop(running);
        })?;
    Ok(ended)
}

/// Accepts connections and serves their requests with `handle` until `stopped` is true, then waits
/// at most `timeout` for the connections to end. The remaining connections are closed, which
/// releases their bookings. Closes the listener first.
async fn serve<H, F>(
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
    timeout: Duration,
    handle: H,
) where
    H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
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
        let handle = handle.clone();
        let service = service_fn(move |request| {
            let response = handle(request);
            async move { Ok::<_, Infallible>(response.await) }
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to a client ended early");
            }
        });
        // Removes the tasks of connections that have ended.
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    if tokio::time::timeout(timeout, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!(
            ?timeout,
            "closing connections that still run after the shutdown timeout"
        );
    }
    connections.shutdown().await;
}

/// Accepts one connection. Retries until that succeeds; errors are logged, at a limited rate.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without TCP_NODELAY, small events would wait for the acknowledgement of earlier
                // ones. Without keepalive, a client that vanished would keep its booking until the
                // gateway writes to it.
                let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
                let socket = SockRef::from(&stream);
                let set = stream.set_nodelay(true);
                if let Err(error) = set.and_then(|()| socket.set_tcp_keepalive(&keepalive)) {
                    tracing::debug!(%error, "cannot set a TCP option");
                }
                return stream;
            }
            Err(error) => {
                warn_limited!(
                    key: "", %error,
                    "cannot accept a connection; if files are the limit, raise `ulimit -n`"
                );
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}
