//! `foresee serve` and `foresee check-config`.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use foresee_core::choose::Policy;
use foresee_core::router::{Router, RouterConfig};
use foresee_gateway::{
    Gateway, GatewayConfig, HeaderName, KvEvents, WorkerConfig, default_io_threads,
    raise_open_file_limit,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::flags::{Queue, QueueArgs, RouterArgs, Switch};

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// A TOML file with any of these settings, by the flags' names
    #[arg(long, value_name = "FILE", env = "FORESEE_CONFIG")]
    config: Option<PathBuf>,
    /// Where the OpenAI-compatible API listens
    #[arg(long, default_value = "127.0.0.1:8080", env = "FORESEE_LISTEN")]
    listen: SocketAddr,
    /// Where metrics, health and admin listen: not for the public
    #[arg(long, default_value = "127.0.0.1:8081", env = "FORESEE_ADMIN_LISTEN")]
    admin_listen: SocketAddr,
    /// A worker's URL and its options, by commas: name=NAME, ranks=N, blocks=N,
    /// prefix-caching=on|off, eviction=queue|radix, kv-events=tcp://HOST:PORT|off,
    /// replay=tcp://HOST:PORT, topic=TOPIC; repeat for more
    ///
    /// ranks=N: an engine with N data-parallel ranks is N workers, NAME/0 and so on; rank r
    /// publishes and replays at PORT + r. Without kv-events, an engine that tells where its events
    /// are (SGLang; vLLM from 0.32 on) is followed there. Write kv-events=bind:tcp://*:PORT if
    /// the engine dials the router. eviction=radix: it evicts as SGLang does; so says an engine
    /// whose models are owned by `sglang`.
    ///
    /// In FORESEE_WORKER they are separated by white space.
    #[arg(
        long = "worker",
        value_name = "URL",
        env = "FORESEE_WORKER",
        value_delimiter = ' '
    )]
    workers: Vec<WorkerConfig>,
    /// kv, round-robin, random, least-requests, power-of-two or consistent-hash
    #[arg(long, default_value_t = Policy::default(), env = "FORESEE_POLICY")]
    policy: Policy,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    queue: QueueArgs,
    /// Most requests that wait (with --queue); further ones are refused with 503. No limit by
    /// default
    #[arg(long, value_name = "N", env = "FORESEE_QUEUE_LIMIT")]
    queue_limit: Option<usize>,
    /// The header that tells tenants apart, for --queue fair
    #[arg(
        long,
        default_value = "authorization",
        value_name = "NAME",
        env = "FORESEE_TENANT_HEADER"
    )]
    tenant_header: HeaderName,
    /// `off`: no two requests share a block, on any worker that does not say otherwise
    #[arg(long, default_value = "on", env = "FORESEE_PREFIX_CACHING")]
    prefix_caching: Switch,
    /// The model's folder or tokenizer.json, to match prompts by the engine's own tokens
    ///
    /// The folder's chat template is used too. Without it, token counts are estimated and
    /// prefixes matched on text. If an engine's token counts differ, its model falls back to text.
    #[arg(long, value_name = "PATH", env = "FORESEE_TOKENIZER")]
    tokenizer: Option<PathBuf>,
    /// Longest request body, in bytes
    #[arg(long, default_value_t = 32 << 20, env = "FORESEE_MAX_BODY_BYTES")]
    max_body_bytes: usize,
    /// Seconds between two health probes of a worker
    #[arg(long, default_value = "1", value_parser = seconds, value_name = "SECONDS", env = "FORESEE_PROBE_INTERVAL")]
    probe_interval: Duration,
    /// Seconds between two looks at each engine's own metrics, shown beside what is predicted and
    /// never routed by; not at all by default
    #[arg(long, value_parser = seconds, value_name = "SECONDS", env = "FORESEE_SAMPLE_ENGINES")]
    sample_engines: Option<Duration>,
    /// Adds a line for each answered request to this file, for `foresee replay --trace`: times,
    /// lengths, and of prompts only the hashes of their blocks, no text
    #[arg(long, value_name = "FILE", env = "FORESEE_RECORD")]
    record: Option<PathBuf>,
    /// Seconds a worker may take to accept a connection, or to answer a probe
    #[arg(long, default_value = "2", value_parser = seconds, value_name = "SECONDS", env = "FORESEE_CONNECT_TIMEOUT")]
    connect_timeout: Duration,
    /// Seconds a worker may take until the first byte of its answer
    #[arg(long, default_value = "600", value_parser = seconds, value_name = "SECONDS", env = "FORESEE_FIRST_BYTE_TIMEOUT")]
    first_byte_timeout: Duration,
    /// Seconds running streams may take to end at shutdown
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS", env = "FORESEE_SHUTDOWN_TIMEOUT")]
    shutdown_timeout: Duration,
    /// Threads that serve the API; half of the processors by default
    #[arg(long, value_name = "N", env = "FORESEE_IO_THREADS")]
    io_threads: Option<NonZeroUsize>,
}

impl ServeArgs {
    pub(crate) fn gateway(self) -> GatewayConfig {
        GatewayConfig {
            listen: self.listen,
            admin_listen: self.admin_listen,
            workers: self.workers,
            router: RouterConfig {
                queue: self.queue.order(self.policy),
                ..self.router.config(self.policy)
            },
            queue_limit: self.queue_limit,
            tenant_header: self.tenant_header,
            prefix_caching: self.prefix_caching == Switch::On,
            tokenizer: self.tokenizer,
            max_body_bytes: self.max_body_bytes,
            probe_interval: self.probe_interval,
            sample_engines: self.sample_engines,
            record: self.record,
            connect_timeout: self.connect_timeout,
            first_byte_timeout: self.first_byte_timeout,
            shutdown_timeout: self.shutdown_timeout,
            io_threads: self.io_threads.unwrap_or_else(default_io_threads),
            ..GatewayConfig::default()
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    let duration = Duration::try_from_secs_f64(seconds).ok();
    duration
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "must be more than 0 seconds".to_owned())
}

pub(crate) fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.gateway();
    let open_files = raise_open_file_limit().context("cannot raise the limit of open files")?;
    runtime()?.block_on(async {
        // Before anything listens, so that no signal meets the default of dying at once.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        if config.workers.is_empty() {
            tracing::warn!("no --worker yet: add some by POST /admin/workers");
        }
        let (workers, policy) = (config.workers.len(), config.router.policy);
        let gateway = Gateway::start(config)?;
        tracing::info!(
            api = %gateway.address(), admin = %gateway.admin_address(),
            workers, %policy, open_files, "listening"
        );
        if !gateway.admin_address().ip().is_loopback() {
            tracing::warn!("the admin API has no password and listens beyond this machine");
        }
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: no new requests, running ones may end");
        tokio::select! {
            () = gateway.shut_down() => {}
            _ = interrupt.recv() => tracing::warn!("stopped at once"),
        }
        Ok(())
    })
}

pub(crate) fn check_config(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.gateway();
    // Weights and names are checked where they are used.
    let router = Router::new(config.router.clone())?;
    let workers: Vec<_> = config
        .workers
        .iter()
        .flat_map(WorkerConfig::workers)
        .collect();
    for worker in &workers {
        let spec = foresee_core::fleet::WorkerSpec {
            name: worker.name.clone(),
            ..Default::default()
        };
        router.add_worker(spec)?;
    }
    config.check_tokenizer()?;
    println!("listen           {}", config.listen);
    println!("admin-listen     {}", config.admin_listen);
    println!("policy           {}", config.router.policy);
    println!("overlap-weight   {}", config.router.overlap_weight);
    println!("ttft-weight      {}", config.router.ttft_weight);
    println!("temperature      {}", config.router.temperature);
    println!("queue            {}", Queue(config.router.queue));
    println!("block-size       {}", config.router.block_size);
    if let Some(tokenizer) = &config.tokenizer {
        println!("tokenizer        {}", tokenizer.display());
    }
    for worker in &workers {
        print!("worker           {} at {}", worker.name, worker.url());
        if let Some(rank) = worker.rank {
            print!(", rank {rank}");
        }
        match &worker.kv_events {
            KvEvents::Discovered => {}
            KvEvents::Off => print!(", no KV events"),
            KvEvents::At(source) => {
                print!(", KV events at {source}");
                if let Some(replay) = &source.replay {
                    print!(", replay at {replay}");
                }
                if !source.topic.is_empty() {
                    print!(", topic {}", source.topic);
                }
            }
        }
        println!();
    }
    println!("The configuration is good.");
    Ok(())
}

/// The runtime of everything that serves.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}
