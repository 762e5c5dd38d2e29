//! `foresee demo`: mock engines, the router and a client in one process, over TCP.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use foresee_client::load::{
    self, LiveOutcome, LiveReport, LoadConfig, NamedOutcome, OutputRequest,
};
use foresee_core::policy::{self, NamedPolicy};
use foresee_core::router::RouterConfig;
use foresee_core::workers::{WorkerSnapshot, WorkerState};
use foresee_gateway::{
    AdminConfig, Gateway, GatewayConfig, ShutdownConfig, WorkerConfig, raise_open_file_limit,
};
use foresee_mock::{MockEngineConfig, bind, serve};
use foresee_sim::workload::Workload;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin_address::AdminAddress;
use crate::flags::{EngineArgs, QueueArgs, RouterArgs, WorkloadArgs, policy, workload};
use crate::output::{print, write_json};
use crate::progress;
use crate::serve::runtime;
use crate::values::{Fraction, address};

/// Name of the model that the mock engines serve.
const MODEL: &str = "model";
/// `max_tokens` of each request, more than the length of any output by default.
const MAX_TOKENS: u32 = 4096;
/// Address with a port that the system chooses.
const ANY_PORT: &str = "127.0.0.1:0";

/// Time limit for all workers to become healthy at the start, and for all bookings to be released
/// at the end.
const STATE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(crate) struct DemoArgs {
    /// Selects the requests to send, by the name of a workload
    #[arg(long, default_value = "agent", value_parser = workload())]
    workload: String,
    /// Selects the policies to compare, separated by commas; each starts with empty caches
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [policy::ROUND_ROBIN, NamedPolicy::default()],
        value_parser = policy()
    )]
    policy: Vec<NamedPolicy>,
    /// Sets the number of mock engines
    #[arg(long, value_name = "N", default_value_t = 8)]
    workers: u32,
    /// Sets the speed of the engines in multiples of real time; reports are in the engines' time
    #[arg(long, value_name = "FACTOR", default_value_t = 8.0)]
    speedup: f64,
    /// Sets the fraction of streams that the client closes at a random point
    #[arg(long, value_name = "FRACTION", default_value_t = Fraction(0.0))]
    abort_fraction: Fraction,
    /// Keeps the router and the engines running after the comparison, under the last policy
    #[arg(long)]
    keep: bool,
    /// Sets the address of the router's API
    #[arg(long, value_name = "HOST:PORT", default_value = ANY_PORT, value_parser = address)]
    listen: SocketAddr,
    /// Sets the address of the router's metrics and admin API
    #[arg(long, value_name = "HOST:PORT|unix:PATH|off", default_value = ANY_PORT)]
    admin_listen: AdminAddress,
    /// Accepts an admin API that other hosts can use without a key
    #[arg(long)]
    admin_open: bool,
    /// Writes the report as JSON to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    queue: QueueArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    shape: WorkloadArgs,
}

/// Runs the subcommand, and returns when the comparison or, with `--keep`, the interrupt has ended
/// it.
///
/// # Errors
/// If a setting is invalid, a socket or file cannot be opened, or the fleet does not reach the
/// expected state in time. Failed requests are not errors.
pub(crate) fn demo(args: DemoArgs) -> anyhow::Result<()> {
    raise_open_file_limit().context("cannot raise the limit of open files")?;
    let workload = args.shape.make(&args.workload, args.router.seed)?;
    runtime()?.block_on(compare(&args, &workload))
}

/// Sends the workload once under each policy, each with new engines and a new router, and prints
/// the report. With `--keep`, then serves under the last policy until an interrupt.
///
/// # Errors
/// The errors of [`demo`]. Failed requests are counted in the report.
async fn compare(args: &DemoArgs, workload: &Workload) -> anyhow::Result<()> {
    print(format_args!(
        "{} mock engines ({}) at {} times their real speed, behind one router, over TCP.\n",
        args.workers, args.engine.preset.description, args.speedup
    ))?;
    let mut report = LiveReport {
        workload: workload.name.clone(),
        workers: args.workers as usize,
        outcomes: Vec::new(),
    };
    let mut last = None;
    for &policy in &args.policy {
        if let Some(fleet) = last.take() {
            DemoFleet::shut_down(fleet).await;
        }
        let fleet = DemoFleet::start(args, policy).await?;
        let outcome = fleet.send(args, workload, policy).await?;
        fleet.wait_until_empty().await?;
        report.outcomes.push(NamedOutcome {
            name: policy.to_string(),
            outcome,
        });
        last = Some(fleet);
    }
    print(&report)?;
    print("All bookings are released: no worker has an active block left.\n")?;
    write_json(args.json.as_deref(), &report)?;
    let Some(fleet) = last else {
        return Ok(());
    };
    if args.keep {
        fleet.print_addresses()?;
        tokio::signal::ctrl_c().await?;
    } else {
        print(
            "\nWith --keep, the router stays up for your own requests. For your own engines:\n  \
             foresee serve --worker http://HOST:8000 --worker http://HOST2:8000\n",
        )?;
    }
    fleet.shut_down().await;
    Ok(())
}

/// The mock engines and the gateway for the run of one policy.
struct DemoFleet {
    gateway: Gateway,
    /// Servers of the mock engines.
    engines: JoinSet<std::io::Result<()>>,
    /// Becomes true to stop the mock engines.
    stop_engines: watch::Sender<bool>,
}

impl DemoFleet {
    /// Starts the engines and the gateway, and waits until all workers are healthy.
    ///
    /// # Errors
    /// If an address cannot be bound, a setting is out of range, or a worker is not healthy after
    /// [`STATE_TIMEOUT`].
    async fn start(args: &DemoArgs, policy: NamedPolicy) -> anyhow::Result<Self> {
        let (stop_engines, stopped) = watch::channel(false);
        let mut engines = JoinSet::new();
        let mut workers = Vec::new();
        for number in 1..=args.workers {
            let seed = args.router.seed.wrapping_add(number.into());
            let engine = args.engine.config(args.router.block_size, seed);
            let config = MockEngineConfig {
                speedup: args.speedup,
                ..MockEngineConfig::new(MODEL, engine)
            };
            config.check().map_err(anyhow::Error::msg)?;
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
            admin_listen: args.admin_listen.listen.clone(),
            admin: AdminConfig {
                open: args.admin_open,
                ..AdminConfig::default()
            },
            workers,
            // The report has the requests of each worker.
            expose_worker_header: true,
            router: RouterConfig {
                queue_order: args.queue.order(policy),
                ..args.router.config(policy)
            },
            shutdown: ShutdownConfig {
                delay: Duration::ZERO,
            },
            shutdown_timeout: Duration::from_secs(1),
            ..GatewayConfig::default()
        })?;
        let fleet = Self {
            gateway,
            engines,
            stop_engines,
        };
        let all_healthy = || {
            let workers = fleet.gateway.router().workers(Duration::ZERO);
            workers
                .iter()
                .all(|worker| worker.state == WorkerState::Healthy)
        };
        if !becomes_true(all_healthy).await {
            bail!("the mock engines did not become healthy within {STATE_TIMEOUT:?}");
        }
        Ok(fleet)
    }

    /// Sends the workload to the gateway and waits until every response has ended. Returns the
    /// client's measurements, in the engines' time. `policy` only names the progress bar; the
    /// gateway's policy is set by [`start`](Self::start).
    ///
    /// # Errors
    /// If `--speedup` is out of range. Failed requests are counted in the outcome.
    async fn send(
        &self,
        args: &DemoArgs,
        workload: &Workload,
        policy: NamedPolicy,
    ) -> anyhow::Result<LiveOutcome> {
        let bar = progress::bar(policy, workload.requests.len())?;
        let config = LoadConfig {
            workers: args.workers as usize,
            speedup: args.speedup,
            abort_fraction: args.abort_fraction.0,
            seed: args.router.seed,
            // As in production, the router cannot read the length of an output from its request.
            output_request: OutputRequest::AtLeast {
                max_tokens: MAX_TOKENS,
            },
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

    /// Waits until the router has released all bookings.
    ///
    /// # Errors
    /// If a booking is left after [`STATE_TIMEOUT`].
    async fn wait_until_empty(&self) -> anyhow::Result<()> {
        let router = self.gateway.router();
        let is_empty = || {
            let workers = router.workers(Duration::ZERO);
            let occupied = |worker: &WorkerSnapshot| {
                worker.active_blocks
                    + worker.prefill_tokens
                    + worker.context_tokens
                    + u64::from(worker.requests)
            };
            router.booking_count() == 0 && workers.iter().map(occupied).sum::<u64>() == 0
        };
        if !becomes_true(is_empty).await {
            bail!(
                "bookings were not released within {STATE_TIMEOUT:?}: {:#?}",
                router.workers(Duration::ZERO)
            );
        }
        Ok(())
    }

    /// Prints the addresses, with commands to try.
    fn print_addresses(&self) -> anyhow::Result<()> {
        let api = self.gateway.address();
        print(format_args!(
            "\nPoint a client at http://{api}/v1, or try:\n  \
             curl http://{api}/v1/chat/completions -H 'content-type: application/json' \\\n    \
             -d '{{\"model\": \"{MODEL}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \
             \"content\": \"Hello\"}}]}}'\n"
        ))?;
        if let Some(admin) = self.gateway.admin_address() {
            print(format_args!(
                "  http://{admin}/dashboard in a browser\n  curl http://{admin}/admin/workers\n  \
                 curl http://{admin}/metrics\n"
            ))?;
        }
        print("Press Ctrl-C to stop.\n")
    }

    /// Stops the gateway, then the engines.
    async fn shut_down(self) {
        self.gateway.shut_down().await;
        self.stop_engines.send_replace(true);
        self.engines.join_all().await;
    }
}

/// Waits until a condition is true. Returns false if that takes longer than [`STATE_TIMEOUT`].
async fn becomes_true(condition: impl Fn() -> bool) -> bool {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(STATE_TIMEOUT, wait).await.is_ok()
}
