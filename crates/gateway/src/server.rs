//! Start and stop of a gateway: two listeners, the tasks of each worker, and a shutdown that lets
//! running responses end.
//!
//! The API is served by I/O threads that share only the router and the counters. Each accepts
//! connections from the same listener and has an event loop and connections to the workers of its
//! own. A request stays on the thread that accepted it, so its events wake no other thread. For a
//! stream of small events, wake-ups would be most of the cost.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use foresee_api::admin::Reload;
use foresee_core::router::{ConfigError, Router, RouterConfig};
use foresee_core::workers::{WorkerError, WorkerState};
use foresee_engine::tokenizer::TokenizerError;
use futures_util::future::join_all;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, timeout};

use crate::accept::{ConnectionSettings, serve};
use crate::access_log::AccessLog;
use crate::admin::{AdminApi, AdminListen, AdminListener, UnprotectedAdmin};
use crate::assembly::{GatewayParts, Writers};
use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::discovery::UnsupportedSource;
use crate::listen::{InheritedListeners, Listener};
use crate::metrics::Metrics;
use crate::placement::tokenization::PromptTokenizer;
use crate::program::ProgramParts;
use crate::proxy::Proxy;
use crate::recorder::Recorder;
use crate::reload::{ReloadError, Reloader};
use crate::shutdown::{ShutdownPhase, ShutdownSignal};
use crate::state_file::StateFile;
use crate::tls::{TlsError, TlsTermination};
use crate::traces::Traces;
use crate::traces::config::TraceError;
use crate::workers::Workers;
use crate::workers::api_key::ApiKeyError;

/// Time between two calls of the router's [`tick`](Router::tick), which dispatches queued requests.
const TICK_INTERVAL: Duration = Duration::from_millis(10);

/// Maximum time in which aborted responses, and the admin listener, may end before their connections
/// are closed.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time at shutdown in which the collector may take the last spans.
const LAST_SPANS_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum time at shutdown in which the state file may be written, and then the last lines of the access
/// log and the recording.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// The admin listener cannot be opened.
    #[error("cannot listen on {listen} for the admin API: {error}")]
    ListenAdmin {
        /// The address.
        listen: AdminListen,
        /// Error of the operating system.
        error: io::Error,
    },
    /// The admin listener would accept requests of other hosts without a key.
    #[error(transparent)]
    UnprotectedAdmin(#[from] UnprotectedAdmin),
    /// A source of workers needs a feature that the program was built without.
    #[error(transparent)]
    UnsupportedSource(#[from] UnsupportedSource),
    /// The operating system provides no thread or event loop.
    #[error("cannot start an I/O thread: {0}")]
    Thread(io::Error),
    /// The recording or the access log cannot be written.
    #[error("cannot write to {}: {error}", path.display())]
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
    /// A file of TLS cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An API key of workers cannot be used.
    #[error(transparent)]
    ApiKey(#[from] ApiKeyError),
    /// Traces cannot be sent.
    #[error(transparent)]
    Traces(#[from] TraceError),
    /// A worker cannot be added.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// Result of a worker's health checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerCheck {
    /// Name of the worker.
    pub name: String,
    /// URL of the worker.
    pub url: String,
    /// Whether the worker can be chosen.
    pub is_healthy: bool,
    /// Models that the worker lists.
    pub models: Vec<String>,
    /// Error of the last check, if it failed.
    pub problem: Option<String>,
}

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    router: Router,
    workers: Arc<Workers>,
    admin_api: Arc<AdminApi>,
    /// Shutdown of the API's listener.
    shutdown: Arc<ShutdownSignal>,
    reloader: Arc<Reloader>,
    /// Writers of what happens to each request.
    writers: Writers,
    /// File of learned values, if there is one.
    state_file: Option<Arc<StateFile>>,
    /// Tasks that run in intervals: one dispatches queued requests, if there is a queue, one writes
    /// the state file, if there is one, and one looks at the files of TLS.
    tasks: Vec<JoinHandle<()>>,
    /// Address of the API's listener.
    address: SocketAddr,
    /// Where the admin listener listens.
    admin_listen: AdminListen,
    /// Connections of the API.
    connections: ConnectionSettings,
    /// Receivers that are closed when their I/O threads end.
    io_threads: Vec<oneshot::Receiver<()>>,
    /// Set to `true` to stop the admin listener, after the API's.
    stop_admin: watch::Sender<bool>,
    /// Task that serves the admin listener, if there is one.
    admin: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Starts the listeners and the tasks of the workers. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// Fails if an address cannot be bound, the admin API would be open to other hosts, the tokenizer
    /// cannot be loaded, the recording cannot be written, an API key of workers cannot be read, a
    /// setting is out of range, or two workers have the same name.
    pub fn start(config: GatewayConfig) -> Result<Self, StartError> {
        Self::start_on(
            InheritedListeners::default(),
            config,
            ProgramParts::default(),
        )
    }

    /// Starts the listeners, with `inherited` sockets where there are any, and the tasks of the
    /// workers. Must run inside a tokio runtime. The admin API uses the parts of the `program`.
    ///
    /// # Errors
    /// As [`start`](Self::start). Also fails if an inherited socket cannot be used.
    pub fn start_on(
        inherited: InheritedListeners,
        config: GatewayConfig,
        program: ProgramParts,
    ) -> Result<Self, StartError> {
        config.discovery.check()?;
        config.check_api_keys()?;
        let loaded_tls = config.load_tls()?;
        // Loading takes seconds, so it happens before the first connection is accepted.
        let tokenizer = config
            .tokenizer
            .as_deref()
            .map(PromptTokenizer::load)
            .transpose()?;
        let api = Listener::open(inherited.api, config.listen);
        let api = api.map_err(|error| StartError::Listen {
            address: config.listen,
            error,
        })?;
        let address = api.socket.local_addr().unwrap_or(config.listen);
        let admin = AdminListener::open(inherited.admin, &config.admin_listen);
        let admin = admin.map_err(|error| StartError::ListenAdmin {
            listen: config.admin_listen.clone(),
            error,
        })?;
        let admin_listen = admin.as_ref().and_then(|admin| admin.address().ok());
        let admin_listen = admin_listen.unwrap_or(AdminListen::Off);
        config.admin.check(&admin_listen, config.keys.as_deref())?;
        let metrics = Arc::new(Metrics::new());
        let record = config.record.as_deref();
        let recorder = record.map(|path| {
            let recorder = Recorder::start(path, &metrics);
            recorder.map(Arc::new).map_err(cannot_write(path))
        });
        let recorder = recorder.transpose()?;
        let access_log = config.access_log.as_deref().map(|path| {
            let log = AccessLog::start(path, config.access_log_sample_ratio, &metrics);
            log.map(Arc::new).map_err(cannot_write(path))
        });
        let access_log = access_log.transpose()?;
        let traces = config.traces.as_ref();
        let traces = traces.map(|config| Traces::start(config, &metrics).map(Arc::new));
        let writers = Writers {
            recorder,
            access_log,
            traces: traces.transpose()?,
        };
        let router = Router::new(RouterConfig {
            queue_limit: config.queue_limit,
            ..config.router.clone()
        })?;
        let tls = TlsTermination::new(config.tls.clone(), loaded_tls, Arc::clone(&metrics));
        let tls = Arc::new(tls);
        let parts = GatewayParts::new(&config, router, metrics, tokenizer, writers.clone(), tls);
        let proxy = Arc::new(ArcSwap::from_pointee(parts.proxy(&config)));
        let connections = parts.connections(&config);
        let workers = Arc::clone(&parts.workers);
        let state_file = parts.state_file(&config);
        let mut added = Vec::new();
        for engine in &config.workers {
            added.extend(workers.add(engine)?);
        }
        let io_threads =
            start_io_threads(api, &config, &proxy, &connections).map_err(StartError::Thread)?;
        workers.start(added);
        let mut tasks = Vec::new();
        if config.router.queue_order.is_some() {
            tasks.push(tokio::spawn(tick_queue(parts.router.clone(), parts.clock)));
        }
        tasks.push(tokio::spawn(Arc::clone(&parts.tls).watch()));
        if let Some(file) = &state_file {
            tasks.push(tokio::spawn(Arc::clone(file).save_in_intervals()));
        }
        let admin_config = Arc::new(ArcSwap::from_pointee(config.admin.clone()));
        let (reconciler, lists) = parts.discovery(&config);
        tasks.extend(lists);
        let source = program.config_source.clone();
        let reloader = parts.reloader(config.clone(), source, reconciler, &proxy, &admin_config);
        let reloader = Arc::new(reloader);
        let dashboard = parts.dashboard(&reloader);
        let admin_api = parts.admin_api(
            &config,
            admin_config,
            Arc::clone(&reloader),
            program,
            dashboard.clone(),
        );
        let admin_api = Arc::new(admin_api);
        let (stop_admin, stopped) = watch::channel(false);
        if let Some(dashboard) = dashboard {
            tasks.push(tokio::spawn(dashboard.sample_in_intervals(stopped.clone())));
        }
        let admin = admin.map(|admin| {
            tokio::spawn(admin_api.expire_reservations());
            let api = Arc::clone(&admin_api);
            let handle = move |request| Arc::clone(&api).handle(request);
            let tls = config.admin_tls.then(|| Arc::clone(&parts.tls));
            tokio::spawn(admin.serve(stopped, ABORT_TIMEOUT, tls, handle))
        });
        Ok(Self {
            router: parts.router,
            workers,
            admin_api,
            shutdown: parts.shutdown,
            reloader,
            writers,
            state_file,
            tasks,
            address,
            admin_listen,
            connections,
            io_threads,
            stop_admin,
            admin,
        })
    }

    /// Returns the address that the API listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the TCP address that the admin listener listens on; `None` if it is off or listens
    /// on a Unix socket.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        match self.admin_listen {
            AdminListen::Tcp(address) => Some(address),
            AdminListen::Off | AdminListen::Unix(_) => None,
        }
    }

    /// Returns where the admin listener listens, with the port that the operating system chose.
    #[must_use]
    pub fn admin_listen(&self) -> &AdminListen {
        &self.admin_listen
    }

    /// Returns the router, for inspection.
    #[must_use]
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Returns the result of each worker's health checks so far.
    #[must_use]
    pub fn worker_checks(&self) -> Vec<WorkerCheck> {
        let snapshots = self.router.workers(Duration::ZERO);
        let checks = self.workers.registry().all().into_iter().map(|worker| {
            let snapshot = snapshots.iter().find(|snapshot| snapshot.id == worker.id);
            let health = worker.health_status();
            let is_healthy =
                snapshot.is_some_and(|snapshot| snapshot.state == WorkerState::Healthy);
            WorkerCheck {
                name: worker.config.name.clone(),
                url: worker.config.url(),
                is_healthy,
                models: snapshot.map_or_else(Vec::new, |snapshot| snapshot.models.to_vec()),
                problem: health.last_error.filter(|_| !is_healthy),
            }
        });
        checks.collect()
    }

    /// Reads the configuration from the source of [`start_on`](Self::start_on), and applies it. The
    /// result is logged, and returned as the admin API reports it.
    ///
    /// # Errors
    /// Fails if there is no source, if the configuration cannot be read or is invalid, or if a worker
    /// cannot be added. Then nothing changes.
    pub async fn reload(&self) -> Result<Reload, ReloadError> {
        self.reloader.reload().await
    }

    /// Shuts down in the order of [`ShutdownPhase`]: makes the readiness checks fail, accepts no
    /// connection after `shutdown.delay`, and ends the responses that still run after
    /// `shutdown_timeout`, streams with an error event. The admin listener ends last. Then ends the
    /// tasks of the workers and finishes the recording.
    ///
    /// Dropping the future stops the shutdown where it is.
    pub async fn shut_down(self) {
        let shutdown = &self.shutdown;
        shutdown.advance(ShutdownPhase::Announced);
        let reloader = &self.reloader;
        let (delay, limit) =
            reloader.in_force(|config| (config.shutdown.delay, config.shutdown_timeout));
        tracing::info!(
            accepting_for = ?delay, waiting_for = ?limit,
            "shutting down: readiness checks fail now"
        );
        tokio::time::sleep(delay).await;
        shutdown.advance(ShutdownPhase::Draining);
        // Nothing is ever sent. An error says that the thread has ended.
        let mut io_threads = join_all(self.io_threads);
        if timeout(limit, &mut io_threads).await.is_err() {
            tracing::warn!(
                timeout = ?limit, connections = self.connections.limit.open(),
                "ending responses that still run after the shutdown timeout"
            );
            shutdown.advance(ShutdownPhase::Aborting);
            if timeout(ABORT_TIMEOUT, &mut io_threads).await.is_err() {
                shutdown.advance(ShutdownPhase::Closed);
                io_threads.await;
            }
        }
        self.stop_admin.send_replace(true);
        if let Some(admin) = self.admin
            && let Err(error) = admin.await
        {
            tracing::error!(%error, "the admin listener panicked");
        }
        self.admin_api.close();
        self.workers.stop();
        self.tasks.iter().for_each(JoinHandle::abort);
        if let Some(file) = &self.state_file
            && timeout(LAST_LINES_TIMEOUT, file.save()).await.is_err()
        {
            tracing::warn!(
                timeout = ?LAST_LINES_TIMEOUT,
                "the state file could not be written in time"
            );
        }
        let Writers {
            recorder,
            access_log,
            traces,
        } = self.writers;
        if let Some(traces) = traces {
            traces.finish(LAST_SPANS_TIMEOUT).await;
        }
        let written = tokio::task::spawn_blocking(move || {
            if let Some(log) = access_log {
                log.finish();
            }
            if let Some(recorder) = recorder {
                recorder.finish();
            }
        });
        match timeout(LAST_LINES_TIMEOUT, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(
                %error,
                "finishing the recording failed; its last entries may be missing"
            ),
            Err(_) => tracing::warn!(
                timeout = ?LAST_LINES_TIMEOUT,
                "the last lines of the access log or the recording could not be written in time"
            ),
        }
    }
}

/// Returns the error of starting a writer of the file at `path`.
fn cannot_write(path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    move |error| StartError::Record { path, error }
}

/// Calls the router's `tick` in intervals. Never returns.
async fn tick_queue(router: Router, clock: Clock) {
    let mut ticks = tokio::time::interval(TICK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        router.tick(clock.now());
    }
}

/// Starts the threads that serve the API. Each returned receiver is closed when its thread ends. Fails
/// if the operating system provides no event loop or thread.
fn start_io_threads(
    listener: Listener,
    config: &GatewayConfig,
    proxy: &Arc<ArcSwap<Proxy>>,
    connections: &ConnectionSettings,
) -> io::Result<Vec<oneshot::Receiver<()>>> {
    let socket = listener.socket.into_std()?;
    let start = |number| {
        let (socket, is_inherited) = (socket.try_clone()?, listener.is_inherited);
        start_io_thread(
            number,
            socket,
            is_inherited,
            Arc::clone(proxy),
            connections.clone(),
        )
    };
    (0..config.io_threads.get()).map(start).collect()
}

/// Starts a thread that serves the API until its shutdown. The returned receiver is closed when the
/// thread ends. Fails if the operating system provides no event loop or thread. A later error is
/// logged and ends the thread.
fn start_io_thread(
    number: usize,
    socket: std::net::TcpListener,
    is_inherited: bool,
    proxy: Arc<ArcSwap<Proxy>>,
    connections: ConnectionSettings,
) -> io::Result<oneshot::Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (running, ended) = oneshot::channel::<()>();
    let serve_api = async move {
        let socket = TcpListener::from_std(socket)?;
        let listener = Listener {
            socket,
            is_inherited,
        };
        let client = Arc::new(proxy.load().new_client());
        let handle = move |request| proxy.load_full().handle(Arc::clone(&client), request);
        serve(listener, connections, handle).await;
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
