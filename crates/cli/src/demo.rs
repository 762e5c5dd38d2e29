//! `foresee demo`: eight model engines, the gateway and a client in one process, over TCP.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use foresee_core::choose::Policy;
use foresee_core::fleet::WorkerState;
use foresee_core::router::RouterConfig;
use foresee_gateway::{Gateway, GatewayConfig, WorkerConfig, raise_open_file_limit};
use foresee_sim::load::{self, LiveOutcome, LiveReport, LoadConfig, NamedOutcome};
use foresee_sim::server::{ServerConfig, bind, serve};
use foresee_sim::workload::Workload;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::flags::{ModelEngineArgs, QueueArgs, RouterArgs, WorkloadArgs, list_workloads};
use crate::serve::runtime;

const MODEL: &str = "model";
const ANY_PORT: &str = "127.0.0.1:0";

/// Time for engines to be found at the start, and for the last bookings to be freed at the end.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
#[command(after_help = list_workloads())]
pub(crate) struct DemoArgs {
    /// A named workload
    #[arg(long, default_value = "agent")]
    workload: String,
    /// Policies to compare, separated by commas; each meets engines with empty caches
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "POLICY",
        default_value = "round-robin,delay"
    )]
    policy: Vec<Policy>,
    /// Model engines
    #[arg(long, default_value_t = 8)]
    workers: u32,
    /// How many times faster than real the engines run; reports speak in the engines' seconds
    #[arg(long, default_value_t = 8.0)]
    time_scale: f64,
    /// Share of streams that the client leaves at a random point
    #[arg(long, default_value_t = 0.0)]
    abort_share: f64,
    /// Stay up after the comparison, with the last policy
    #[arg(long)]
    keep: bool,
    /// Where the gateway listens
    #[arg(long, default_value = ANY_PORT)]
    listen: SocketAddr,
    /// Where the gateway's metrics and admin listen
    #[arg(long, default_value = ANY_PORT)]
    admin_listen: SocketAddr,
    /// Also writes the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    queue: QueueArgs,
    #[command(flatten)]
    model_engine: ModelEngineArgs,
    #[command(flatten)]
    shape: WorkloadArgs,
}

pub(crate) fn demo(args: DemoArgs) -> anyhow::Result<()> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    let workload = args.shape.make(&args.workload, args.router.seed)?;
    runtime()?.block_on(compare(&args, &workload))
}

async fn compare(args: &DemoArgs, workload: &Workload) -> anyhow::Result<()> {
    println!(
        "{} model engines ({}) at {} times their real speed, behind one gateway, over TCP.",
        args.workers, args.model_engine.engine.description, args.time_scale
    );
    let mut report = LiveReport {
        workload: workload.name.clone(),
        workers: args.workers as usize,
        outcomes: Vec::new(),
    };
    let mut last = None;
    for &policy in &args.policy {
        if let Some(stage) = last.take() {
            Stage::take_down(stage).await;
        }
        let stage = Stage::set_up(args, policy).await?;
        let outcome = stage.play(args, workload, policy).await?;
        stage.wait_until_empty().await?;
        report.outcomes.push(NamedOutcome {
            name: policy.to_string(),
            outcome,
        });
        last = Some(stage);
    }
    print!("{report}");
    println!("Every booking was freed: no active block is left on any worker.");
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let Some(stage) = last else {
        return Ok(());
    };
    if args.keep {
        stage.say_where();
        tokio::signal::ctrl_c().await?;
    } else {
        println!("\nWith --keep it stays up for you to send requests. Your own engines:");
        println!("  foresee serve --worker http://HOST:8000 --worker http://HOST2:8000");
    }
    stage.take_down().await;
    Ok(())
}

/// The engines and the gateway of one run.
struct Stage {
    gateway: Gateway,
    engines: JoinSet<std::io::Result<()>>,
    stop_engines: watch::Sender<bool>,
}

impl Stage {
    async fn set_up(args: &DemoArgs, policy: Policy) -> anyhow::Result<Self> {
        let (stop_engines, stopped) = watch::channel(false);
        let mut engines = JoinSet::new();
        let mut workers = Vec::new();
        for number in 1..=args.workers {
            let seed = args.router.seed.wrapping_add(number.into());
            let engine = args.model_engine.config(args.router.block_size, seed);
            let config = ServerConfig {
                time_scale: args.time_scale,
                ..ServerConfig::new(MODEL, engine)
            };
            let listener = bind(ANY_PORT.parse()?)?;
            let url = format!("http://{},name=engine-{number}", listener.local_addr()?);
            workers.push(url.parse::<WorkerConfig>()?);
            let mut stopped = stopped.clone();
            engines.spawn(async move {
                let stop = async move {
                    let _ = stopped.wait_for(|stopped| *stopped).await;
                };
                serve(config, listener, stop).await
            });
        }
        let gateway = Gateway::start(GatewayConfig {
            listen: args.listen,
            admin_listen: args.admin_listen,
            workers,
            router: RouterConfig {
                queue: args.queue.order(policy),
                ..args.router.config(policy)
            },
            shutdown_timeout: Duration::from_secs(1),
            ..GatewayConfig::default()
        })?;
        let stage = Self {
            gateway,
            engines,
            stop_engines,
        };
        let all_healthy = || {
            let workers = stage.gateway.router().workers(Duration::ZERO);
            workers.iter().all(|it| it.state == WorkerState::Healthy)
        };
        if !comes_true(all_healthy).await {
            bail!("the model engines did not come up");
        }
        Ok(stage)
    }

    async fn play(
        &self,
        args: &DemoArgs,
        workload: &Workload,
        policy: Policy,
    ) -> anyhow::Result<LiveOutcome> {
        let style = ProgressStyle::with_template("{prefix:16} {bar:40} {pos}/{len} {msg} {eta}")?;
        let bar = ProgressBar::new(workload.requests.len() as u64).with_style(style);
        bar.set_prefix(policy.to_string());
        let config = LoadConfig {
            workers: args.workers as usize,
            time_scale: args.time_scale,
            abort_share: args.abort_share,
            seed: args.router.seed,
            ..LoadConfig::new(format!("http://{}", self.gateway.address()), MODEL)
        };
        let outcome = load::run(&config, workload, |progress| {
            bar.set_position(progress.ended as u64);
            bar.set_message(format!("{} in flight", progress.sent - progress.ended));
        })
        .await?;
        bar.finish_and_clear();
        Ok(outcome)
    }

    /// What was booked must be free a moment after the last stream ended.
    async fn wait_until_empty(&self) -> anyhow::Result<()> {
        let router = self.gateway.router();
        let is_empty = || {
            let workers = router.workers(Duration::ZERO);
            let held = |it: &foresee_core::fleet::WorkerSnapshot| {
                it.active_blocks + it.prefill_tokens + it.context_tokens + u64::from(it.requests)
            };
            router.bookings() == 0 && workers.iter().map(held).sum::<u64>() == 0
        };
        if !comes_true(is_empty).await {
            bail!(
                "bookings were not freed: {:#?}",
                router.workers(Duration::ZERO)
            );
        }
        Ok(())
    }

    fn say_where(&self) {
        let (api, admin) = (self.gateway.address(), self.gateway.admin_address());
        println!("\nPoint a client at http://{api}/v1, or try:");
        println!(
            "  curl http://{api}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{MODEL}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'"
        );
        println!("  curl http://{admin}/admin/workers");
        println!("  curl http://{admin}/metrics");
        println!("Ctrl-C ends it.");
    }

    async fn take_down(self) {
        self.gateway.shut_down().await;
        self.stop_engines.send_replace(true);
        self.engines.join_all().await;
    }
}

/// Whether `condition` becomes true before patience runs out.
async fn comes_true(condition: impl Fn() -> bool) -> bool {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.is_ok()
}
