//! The flags of `serve`, in groups.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory};
use foresee_core::router::RouterConfig;
use foresee_gateway::{GatewayConfig, HeaderName, KeyConfig, WorkerConfig};

use super::admin_args::AdminArgs;
use super::client_args::ClientArgs;
use super::connections::ConnectionArgs;
use super::discovery_args::DiscoveryArgs;
use super::observability::ObservabilityArgs;
use super::outlier::OutlierArgs;
use super::tls_args::TlsArgs;
use crate::config_file::FileTables;
use crate::flags::{DEFAULTS, RoutingArgs, Switch};
use crate::key_file::{KeyTable, keys, read};
use crate::serve::health_args::{HealthArgs, WorkerAccessArgs};
use crate::values::{
    Size, Workers, address, host_address, positive_duration, worker_urls, workers,
};

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// Reads settings from a TOML file, whose keys are the names of flags
    #[arg(long, value_name = "FILE", env = "FORESEE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Selects whether the router reloads the configuration when the file of --config changes
    ///
    /// SIGHUP and POST /admin/reload reload it in any case.
    #[arg(
        long,
        default_value_t = Switch::Off,
        value_name = "SWITCH",
        env = "FORESEE_WATCH_CONFIG",
        num_args = 0..=1,
        default_missing_value = "on"
    )]
    watch_config: Switch,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    workers: WorkerArgs,
    #[command(flatten)]
    discovery: DiscoveryArgs,
    #[command(flatten)]
    worker_access: WorkerAccessArgs,
    #[command(flatten)]
    health: HealthArgs,
    #[command(flatten)]
    prompts: PromptArgs,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    outlier: OutlierArgs,
    #[command(flatten)]
    queue_limits: QueueLimitArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    keys: KeyArgs,
    #[command(flatten)]
    clients: ClientArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    connections: ConnectionArgs,
    #[command(flatten)]
    observability: ObservabilityArgs,
}

/// Addresses that the router listens on.
#[derive(Args, Debug)]
#[command(next_help_heading = "Listen")]
struct ListenArgs {
    /// Sets the address of the OpenAI-compatible API: HOST:PORT, or :PORT for all IPv4 interfaces
    #[arg(
        long,
        default_value_t = DEFAULTS.listen,
        value_name = "HOST:PORT",
        value_parser = address,
        env = "FORESEE_LISTEN"
    )]
    listen: SocketAddr,
    // --host and --port have no variables, because Kubernetes sets FORESEE_PORT to a URL if a
    // service is named `foresee`.
    /// Sets the host of --listen alone
    #[arg(long)]
    host: Option<String>,
    /// Sets the port of --listen alone
    #[arg(long)]
    port: Option<u16>,
}

impl ListenArgs {
    /// Replaces the address by `--host` and `--port` if one of them is given; the other one has the
    /// default of `--listen`. As flags, they override the variable and the file. `matches` must be
    /// those of the subcommand, as for [`ServeArgs::resolve`].
    ///
    /// # Errors
    /// If `--listen` is also on the command line, or the host has no address.
    fn resolve(mut self, matches: &ArgMatches) -> Result<Self, clap::Error> {
        if self.host.is_none() && self.port.is_none() {
            return Ok(self);
        }
        let mut command = crate::Cli::command();
        if matches.value_source("listen") == Some(ValueSource::CommandLine) {
            let message = "--listen cannot be used with --host or --port: it sets both";
            return Err(command.error(ErrorKind::ArgumentConflict, message));
        }
        let port = self.port.unwrap_or(DEFAULTS.listen.port());
        self.listen = match &self.host {
            Some(host) => host_address(host, port)
                .map_err(|error| command.error(ErrorKind::InvalidValue, error))?,
            None => SocketAddr::new(DEFAULTS.listen.ip(), port),
        };
        Ok(self)
    }
}

/// The engines behind the router.
#[derive(Args, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct WorkerArgs {
    /// Adds a worker by its URL, with options after commas; repeat it for more workers
    ///
    /// Options: name=NAME, ranks=N, blocks=N, prefix-caching=on|off, eviction=queue|radix,
    /// kv-events=tcp://HOST:PORT|off, replay=tcp://HOST:PORT, topic=TOPIC, health-path=PATH|none,
    /// api-key=env:NAME|file:FILE, resolve=on|off; with an https:// URL also tls-ca=FILE, tls-certificate=FILE,
    /// tls-key=FILE, tls-server-name=NAME, tls-verify=on|off.
    ///
    /// ranks=N makes N workers of an engine with N data-parallel ranks, named NAME/0 and so on;
    /// rank r publishes and replays at PORT + r. Without kv-events, the router follows the events
    /// of an engine that reports their address (SGLang; vLLM from 0.32 on). Use
    /// kv-events=bind:tcp://*:PORT if the engine connects to the router. eviction=radix is for
    /// engines that evict as SGLang does; an engine whose models are owned by `sglang` has it by
    /// default.
    ///
    /// The router looks up a host name in intervals; each of its addresses is a worker. With
    /// resolve=off, the name is one worker and is looked up for each connection.
    ///
    /// In FORESEE_WORKER, white space separates workers.
    #[arg(
        long,
        value_name = "URL[,OPTION=VALUE...]",
        env = "FORESEE_WORKER",
        value_parser = workers
    )]
    worker: Vec<Workers>,
    /// Adds workers by their URLs alone, separated by spaces or commas
    #[arg(
        long,
        value_name = "URL",
        num_args = 1..,
        env = "FORESEE_WORKER_URLS",
        value_parser = worker_urls
    )]
    worker_urls: Vec<Workers>,
}

impl WorkerArgs {
    /// Drops the workers of the environment if the command line has workers, because `--worker` and
    /// `--worker-urls` are one setting. If both flags are on the command line, the workers of both
    /// are kept. `matches` must be those of the subcommand.
    pub(crate) fn resolve(mut self, matches: &ArgMatches) -> Self {
        let is_flag = |id| matches.value_source(id) == Some(ValueSource::CommandLine);
        match (is_flag("worker"), is_flag("worker_urls")) {
            (true, false) => self.worker_urls.clear(),
            (false, true) => self.worker.clear(),
            _ => {}
        }
        self
    }

    /// Returns the workers of both flags.
    pub(crate) fn workers(self) -> Vec<WorkerConfig> {
        let lists = self.worker.into_iter().chain(self.worker_urls);
        lists.flat_map(|Workers(workers)| workers).collect()
    }
}

/// Keys of clients.
#[derive(Args, Debug)]
#[command(next_help_heading = "Keys")]
struct KeyArgs {
    /// Names a file with [[key]] tables: the keys of clients, and what each opens
    ///
    /// `foresee key new` creates a key and its table. Without a key file and without [[key]] tables in
    /// the configuration file, clients need no key.
    #[arg(long, value_name = "FILE", env = "FORESEE_KEY_FILE")]
    key_file: Option<PathBuf>,
    /// Keys of the file and of the tables, read by [`resolve`](Self::resolve).
    #[arg(skip)]
    keys: Option<Vec<KeyConfig>>,
}

impl KeyArgs {
    /// Reads the key file, and adds the tables of the configuration file.
    ///
    /// # Errors
    /// If the file cannot be read, or a table is invalid.
    fn resolve(mut self, tables: Vec<KeyTable>) -> Result<Self, clap::Error> {
        if self.key_file.is_none() && tables.is_empty() {
            return Ok(self);
        }
        let from_file = self.key_file.as_deref().map_or(Ok(Vec::new()), read);
        let keys = from_file.and_then(|mut all| {
            all.extend(tables);
            keys(all)
        });
        let keys = keys.map_err(|problem| {
            let mut command = crate::Cli::command();
            command.error(ErrorKind::InvalidValue, format!("{problem:#}"))
        });
        self.keys = Some(keys?);
        Ok(self)
    }
}

/// Settings of prefix matching.
#[derive(Args, Debug)]
#[command(next_help_heading = "Prompts")]
pub(crate) struct PromptArgs {
    /// Names the model's folder or its tokenizer.json, to match prompts by the engines' own tokens
    ///
    /// The chat template of the folder is used, too. Without a tokenizer, the router estimates
    /// token counts and matches prefixes of the text. If an engine's token counts differ, the
    /// router matches the text of its model's prompts.
    #[arg(
        long,
        aliases = ["tokenizer-path", "model-path"],
        value_name = "PATH",
        env = "FORESEE_TOKENIZER"
    )]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Selects whether requests share cached blocks, on workers without an option of their own
    #[arg(
        long,
        default_value_t = Switch::from(DEFAULTS.prefix_caching),
        value_name = "SWITCH",
        env = "FORESEE_PREFIX_CACHING"
    )]
    pub(crate) prefix_caching: Switch,
}

/// Comparison of the policy with the least predicted delay.
#[derive(Args, Debug)]
#[command(next_help_heading = "Routing")]
struct DryRunArgs {
    /// Compares each decision with the one of the least predicted delay, without following it
    ///
    /// The metrics foresee_dry_run_* report the comparison. Use it with the --policy of another
    /// router, to see what the default would change.
    #[arg(
        long,
        default_value_t = Switch::Off,
        default_missing_value = "on",
        num_args = 0..=1,
        require_equals = true,
        value_name = "SWITCH",
        env = "FORESEE_DRY_RUN"
    )]
    dry_run: Switch,
}

/// Limits of the queue, and its tenants.
#[derive(Args, Debug)]
#[command(next_help_heading = "Queue")]
struct QueueLimitArgs {
    /// Sets the maximum number of queued requests; further requests are refused [default: no limit]
    ///
    /// At the limit, a request of a higher priority takes the place of one of the lowest, and with
    /// --queue fair a request of a tenant with less service takes that of the one with the most.
    #[arg(long, value_name = "REQUESTS", env = "FORESEE_QUEUE_LIMIT")]
    queue_limit: Option<usize>,
    /// Names the request header that identifies a tenant, for --queue fair
    #[arg(
        long,
        default_value_t = DEFAULTS.tenant_header.clone(),
        value_name = "NAME",
        env = "FORESEE_TENANT_HEADER"
    )]
    tenant_header: HeaderName,
}

/// Limits of size, time and threads.
#[derive(Args, Debug)]
#[command(next_help_heading = "Limits and timeouts")]
struct LimitArgs {
    /// Sets the maximum size of a request body, such as 32MiB; larger bodies are refused
    #[arg(
        long,
        default_value_t = Size(DEFAULTS.max_body_bytes),
        value_name = "SIZE",
        env = "FORESEE_MAX_BODY_SIZE"
    )]
    max_body_size: Size,
    /// Sets the time between two health checks of a worker, such as 250ms
    #[arg(
        long,
        default_value_t = DEFAULTS.probe_interval.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_PROBE_INTERVAL"
    )]
    probe_interval: humantime::Duration,
    /// Sets how long a worker may take to accept a connection
    #[arg(
        long,
        default_value_t = DEFAULTS.connect_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_CONNECT_TIMEOUT"
    )]
    connect_timeout: humantime::Duration,
    /// Sets how long a request may take until the first byte of its response, queueing included
    #[arg(
        long,
        default_value_t = DEFAULTS.first_byte_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_FIRST_BYTE_TIMEOUT"
    )]
    first_byte_timeout: humantime::Duration,
    /// Sets the least time until the first byte after which a worker counts as hanging
    ///
    /// A worker gets ten times the predicted time if that is longer. The request is then sent to
    /// another worker.
    #[arg(
        long,
        default_value_t = DEFAULTS.min_first_byte_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_MIN_FIRST_BYTE_TIMEOUT"
    )]
    min_first_byte_timeout: humantime::Duration,
    /// Sets how long a worker may be silent in the middle of its response
    #[arg(
        long,
        default_value_t = DEFAULTS.stream_idle_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_STREAM_IDLE_TIMEOUT"
    )]
    stream_idle_timeout: humantime::Duration,
    /// Sets how long running responses may take to end at shutdown
    #[arg(
        long,
        default_value_t = DEFAULTS.shutdown_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_SHUTDOWN_TIMEOUT"
    )]
    shutdown_timeout: humantime::Duration,
    // A `default_value_t` would put the processor count of one machine into the reference.
    /// Sets the number of threads that serve the API [default: half of the processors]
    #[arg(long, value_name = "THREADS", env = "FORESEE_IO_THREADS")]
    io_threads: Option<NonZeroUsize>,
}

impl ServeArgs {
    /// Resolves settings that several flags can set, the listen address and the workers, and reads
    /// the keys of clients and of the admin listener. `matches` must be those of the subcommand, and
    /// `tables` those of its configuration file.
    ///
    /// # Errors
    /// If flags contradict each other, a host has no address, or a key cannot be read.
    pub(crate) fn resolve(
        mut self,
        matches: &ArgMatches,
        tables: FileTables,
    ) -> Result<Self, clap::Error> {
        self.keys = self.keys.resolve(tables.keys)?;
        self.listen = self.listen.resolve(matches)?;
        self.admin = self.admin.resolve()?;
        self.observability = self.observability.resolve()?;
        self.workers = self.workers.resolve(matches);
        self.tls.check()?;
        self.worker_access.check()?;
        Ok(self)
    }

    /// Returns the configuration file, if the router is to watch it.
    pub(crate) fn watched_file(&self) -> Option<PathBuf> {
        let is_watched = self.watch_config == Switch::On;
        self.config.clone().filter(|_| is_watched)
    }

    /// Returns the settings as the configuration of a gateway, without checking them. Call
    /// [`resolve`](Self::resolve) first: `--host` and `--port` have no effect here. Without
    /// `--queue`, the policy decides the queue order.
    pub(crate) fn gateway(self) -> GatewayConfig {
        let connections = self.connections;
        let mut config = GatewayConfig {
            listen: self.listen.listen,
            admin_listen: self.admin.listen(),
            admin: self.admin.config(),
            keys: self.keys.keys,
            workers: self.workers.workers(),
            discovery: self.discovery.config(),
            router: RouterConfig {
                outlier: self.outlier.config(),
                ..self.routing.config()
            },
            dry_run: self.dry_run.dry_run == Switch::On,
            queue_limit: self.queue_limits.queue_limit,
            tenant_header: self.queue_limits.tenant_header,
            prefix_caching: self.prompts.prefix_caching == Switch::On,
            tokenizer: self.prompts.tokenizer,
            max_body_bytes: self.limits.max_body_size.0,
            probe_interval: self.limits.probe_interval.into(),
            health: self.health.config(),
            worker_key: self.worker_access.key_config(),
            dns: self.worker_access.dns_config(),
            worker_tls: self.worker_access.tls_config(),
            connect_timeout: self.limits.connect_timeout.into(),
            first_byte_timeout: self.limits.first_byte_timeout.into(),
            min_first_byte_timeout: self.limits.min_first_byte_timeout.into(),
            stream_idle_timeout: self.limits.stream_idle_timeout.into(),
            shutdown_timeout: self.limits.shutdown_timeout.into(),
            io_threads: self.limits.io_threads.unwrap_or(DEFAULTS.io_threads),
            ..GatewayConfig::default()
        };
        self.tls.apply(&mut config);
        self.clients.apply(&mut config);
        self.observability.apply(&mut config);
        connections.apply_to(config)
    }
}
