//! Configuration of a gateway.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use foresee_core::router::{RouterConfig, RouterTuning};
use foresee_engine::tokenizer::TokenizerError;
use http::header::{AUTHORIZATION, HeaderName};

use crate::admin::settings::{AdminConfig, AdminListen};
use crate::client_headers::ClientTrust;
use crate::connection_state::ConnectionConfig;
use crate::discovery::config::DiscoveryConfig;
use crate::fleet_demand::AutoscalingConfig;
use crate::keys::key_config::KeyConfig;
use crate::metrics::MetricsCompat;
use crate::model_alias::ModelAlias;
use crate::pass_through::PassThroughPath;
use crate::placement::tokenization::PromptTokenizer;
use crate::request_body::RequestBodyConfig;
use crate::shutdown::ShutdownConfig;
use crate::tls::{LoadedTls, TlsConfig, TlsError};
use crate::traces::config::TraceConfig;
use crate::workers::api_key::{ApiKeyError, WorkerKeyConfig};
use crate::workers::health_config::HealthConfig;
use crate::workers::resolve::DnsConfig;
use crate::workers::worker_config::WorkerConfig;
use crate::workers::worker_tls::WorkerTlsConfig;

/// Settings of a gateway: where it listens, how it routes, and its timeouts. The defaults are those
/// of the command line.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Address of the OpenAI-compatible API.
    pub listen: SocketAddr,
    /// Where metrics, health checks and the admin API are served.
    pub admin_listen: AdminListen,
    /// Which requests the admin listener accepts.
    pub admin: AdminConfig,
    /// TLS of the API; `None` for plain HTTP.
    pub tls: Option<TlsConfig>,
    /// Whether the admin listener has the TLS of the API, too.
    pub admin_tls: bool,
    /// Keys of clients; `None` to need no keys.
    pub keys: Option<Vec<KeyConfig>>,
    /// Workers that the gateway starts with.
    pub workers: Vec<WorkerConfig>,
    /// Lists of further workers.
    pub discovery: DiscoveryConfig,
    /// How requests are routed and queued.
    pub router: RouterConfig,
    /// Whether decisions are compared with those of the least predicted delay, in the metrics.
    pub dry_run: bool,
    /// Maximum number of requests queued in the router; further requests are refused. `None` for no
    /// limit. Has no effect without a queue.
    pub queue_limit: Option<usize>,
    /// Header whose value identifies the tenant of a request, for the queue order `fair`.
    pub tenant_header: HeaderName,
    /// Whether workers share cached blocks between requests, unless a worker's description says
    /// otherwise.
    pub prefix_caching: bool,
    /// Model folder or `tokenizer.json`. Without it, prompts are matched as text.
    pub tokenizer: Option<PathBuf>,
    /// Maximum size of a request body, in bytes.
    pub max_body_bytes: usize,
    /// Time between two health checks of a worker, which varies by a tenth in both directions.
    pub probe_interval: Duration,
    /// Request, thresholds and time limit of health checks.
    pub health: HealthConfig,
    /// API key of the gateway's own requests to workers.
    pub worker_key: WorkerKeyConfig,
    /// Files of TLS of workers whose description names none.
    pub worker_tls: WorkerTlsConfig,
    /// How host names of workers are resolved.
    pub dns: DnsConfig,
    /// Time for which a worker's KV events may be unusable before its cache is estimated instead.
    pub events_grace: Duration,
    /// Time between two reads of each engine's own metrics, whose active blocks are exported next to
    /// the predicted ones. Not used for routing. `None` for never.
    pub engine_metrics_interval: Option<Duration>,
    /// File to which one line is appended for each completed request, so that the traffic can be
    /// replayed. It contains hashes of the prompts' blocks, and no text.
    pub record: Option<PathBuf>,
    /// File to which one line of JSON is appended for each request; `-` for the standard output.
    pub access_log: Option<PathBuf>,
    /// Fraction of the requests that succeed which the access log has a line of, from 0 to 1. All
    /// others have one.
    pub access_log_sample_ratio: f64,
    /// Names of another program that the page of metrics has as well.
    pub metrics_compat: Option<MetricsCompat>,
    /// Objectives that the forecast size of the fleet has to achieve.
    pub autoscaling: AutoscalingConfig,
    /// Where spans of sampled requests are sent to; `None` for no spans.
    pub traces: Option<TraceConfig>,
    /// File that keeps what the gateway has learned over a restart.
    pub state: Option<PathBuf>,
    /// Maximum time in which a worker accepts a connection.
    pub connect_timeout: Duration,
    /// Maximum time from the arrival of a request until the first byte of its response, in the queue
    /// and at all workers together.
    pub first_byte_timeout: Duration,
    /// Minimum time that one worker gets until the first byte, before it counts as hanging and the
    /// request is sent to another. A worker gets ten times the predicted time if that is longer.
    pub min_first_byte_timeout: Duration,
    /// Maximum time for which a worker may be silent in the middle of its response.
    pub stream_idle_timeout: Duration,
    /// Whether clients see the name of the worker: in the header `x-foresee-worker`, and in error
    /// messages. It is an address unless the worker has a configured name.
    pub expose_worker_header: bool,
    /// Trust in the headers of clients.
    pub client_trust: ClientTrust,
    /// Paths that reach a worker in addition to the inference paths.
    pub pass_through: Vec<PassThroughPath>,
    /// Further names of models.
    pub model_aliases: Vec<ModelAlias>,
    /// Limits of the clients' connections.
    pub connections: ConnectionConfig,
    /// Limits of request bodies, apart from `max_body_bytes`.
    pub bodies: RequestBodyConfig,
    /// How the gateway shuts down.
    pub shutdown: ShutdownConfig,
    /// Maximum time for running responses to end at shutdown.
    pub shutdown_timeout: Duration,
    /// Number of threads that serve the API.
    pub io_threads: NonZeroUsize,
}

impl GatewayConfig {
    /// Checks that the tokenizer can be loaded, if one is configured. A missing or invalid chat
    /// template is logged as a warning and is not an error.
    ///
    /// # Errors
    /// Fails if the tokenizer cannot be used; then a gateway would not start either.
    pub fn check_tokenizer(&self) -> Result<(), TokenizerError> {
        if let Some(path) = &self.tokenizer {
            PromptTokenizer::load(path)?;
        }
        Ok(())
    }

    /// Returns the settings of the router that a reload applies.
    pub(crate) fn router_tuning(&self) -> RouterTuning {
        RouterTuning {
            queue_limit: self.queue_limit,
            ..self.router.tuning()
        }
    }

    /// Checks that the files of TLS can be used, those of workers included.
    ///
    /// # Errors
    /// Fails if a file cannot be read, or a key does not belong to its certificate; then a gateway
    /// would not start either.
    pub fn check_tls(&self) -> Result<(), TlsError> {
        self.load_tls().map(|_| ())
    }

    /// Reads the files of the listeners' TLS, if there are any, and checks those of workers.
    ///
    /// # Errors
    /// As [`check_tls`](Self::check_tls).
    pub(crate) fn load_tls(&self) -> Result<Option<LoadedTls>, TlsError> {
        for worker in &self.workers {
            if let Some(tls) = &worker.tls {
                tls.or(&self.worker_tls).load(worker.host())?;
            }
        }
        if self.admin_tls && self.tls.is_none() {
            return Err(TlsError::NoAdminCertificate);
        }
        self.tls.as_ref().map(TlsConfig::load).transpose()
    }

    /// Checks that the API keys of workers can be read.
    ///
    /// # Errors
    /// Fails if a file with a key cannot be read, a variable is not set, or a key is empty or has a character other than
    /// visible ASCII; then a gateway would not start either.
    pub fn check_api_keys(&self) -> Result<(), ApiKeyError> {
        let sources = self.workers.iter();
        let sources = sources.filter_map(|worker| worker.api_key.clone());
        for source in sources.chain(self.worker_key.source.clone()) {
            source.load()?;
        }
        Ok(())
    }
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            admin_listen: AdminListen::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 8081))),
            admin: AdminConfig::default(),
            tls: None,
            admin_tls: false,
            keys: None,
            workers: Vec::new(),
            discovery: DiscoveryConfig::default(),
            router: RouterConfig::default(),
            dry_run: false,
            queue_limit: None,
            tenant_header: AUTHORIZATION,
            prefix_caching: true,
            tokenizer: None,
            max_body_bytes: 32 << 20,
            probe_interval: Duration::from_secs(1),
            health: HealthConfig::default(),
            worker_key: WorkerKeyConfig::default(),
            worker_tls: WorkerTlsConfig::default(),
            dns: DnsConfig::default(),
            events_grace: Duration::from_secs(5),
            engine_metrics_interval: None,
            record: None,
            access_log: None,
            access_log_sample_ratio: 1.0,
            metrics_compat: None,
            autoscaling: AutoscalingConfig::default(),
            traces: None,
            state: None,
            connect_timeout: Duration::from_secs(2),
            first_byte_timeout: Duration::from_secs(600),
            min_first_byte_timeout: Duration::from_secs(30),
            stream_idle_timeout: Duration::from_secs(120),
            expose_worker_header: false,
            client_trust: ClientTrust::default(),
            pass_through: Vec::new(),
            model_aliases: Vec::new(),
            connections: ConnectionConfig::default(),
            bodies: RequestBodyConfig::default(),
            shutdown: ShutdownConfig::default(),
            shutdown_timeout: Duration::from_secs(30),
            io_threads: default_io_threads(),
        }
    }
}

/// Returns half of the number of processors, and at least 1.
///
/// One I/O thread carries about ten thousand streams, and events of streams that share a thread also
/// share its wake-ups. The other processors parse and tokenise long prompts.
#[must_use]
pub fn default_io_threads() -> NonZeroUsize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::new(processors / 2).unwrap_or(NonZeroUsize::MIN)
}
