//! Flags and reports that the subcommands of `replay` share.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use foresee_core::policy::{self, NamedPolicy};
use foresee_report::grid::Grid;
use foresee_sim::baselines::{self, PolicySpec};
use foresee_sim::cache_signal::CacheSignal;
use foresee_sim::faults::{InvalidFault, WorkerFault};
use foresee_sim::fleet_changes::{FleetChange, InvalidFleetChange};
use foresee_sim::hashed_workload::HashedWorkload;
use foresee_sim::replay::ReplayConfig;
use foresee_sim::slo::{InvalidSlo, Slo};
use foresee_sim::trace;
use foresee_sim::workload::{NAMED, Workload};

use crate::exit::ensure_usage;
use crate::flags::{EngineArgs, RouterArgs, WorkloadArgs, workload};
use crate::output::{print, write_file, write_json};
use crate::trace_file::read_trace;
use crate::values::{Fraction, duration, positive_duration};

/// The traffic to replay.
#[derive(Args, Debug)]
pub(super) struct SourceArgs {
    /// Names a trace: Mooncake's format, a recording of `serve --record`, or Azure's tables
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "workload",
        help_heading = "Traffic"
    )]
    trace: Option<PathBuf>,
    /// Sets how long requests are sent, such as 60s or 10m [default: until the traffic ends]
    ///
    /// As under `load`, no request of a workload is sent later than this after the first, at any
    /// rate. A trace is cut before its rate is scaled.
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = positive_duration,
        help_heading = "Traffic"
    )]
    duration: Option<humantime::Duration>,
    /// Selects the workload to replay
    #[arg(
        long,
        default_value = NAMED[0].0,
        value_parser = workload(),
        help_heading = "Traffic"
    )]
    workload: String,
    /// Tells the router the length of each output when its request arrives, for its own policies
    ///
    /// Without this flag, the router forecasts it. The difference is the most that better forecasts
    /// of output lengths can gain.
    #[arg(long, help_heading = "Traffic")]
    known_output_lengths: bool,
    #[command(flatten)]
    shape: WorkloadArgs,
}

/// The workers, and changes of them during a replay.
#[derive(Args, Debug)]
#[command(next_help_heading = "Fleet")]
pub(super) struct FleetArgs {
    /// Sets the number of mock engines
    #[arg(long, value_name = "N", default_value_t = 8)]
    workers: u32,
    /// Changes one worker's speed, or the time when it joins; repeat it for more changes
    ///
    /// 0:speed=0.5 halves the speed of worker 0; 1:speed=0.5@60s halves it after 60 s; 7:join@60s
    /// adds worker 7 to the fleet after 60 s.
    #[arg(long, value_name = "WORKER:CHANGE[@TIME]", value_parser = change)]
    fleet_change: Vec<FleetChange>,
    /// Lets one worker fail or hang for a while; repeat it for more faults
    ///
    /// 3:fail-fast@60s-300s fails every request that is sent to worker 3 between 60 s and 300 s.
    /// fail-half fails every second one, fail-slow fails each after 20 s, and hang never responds.
    /// Without an end the fault stays. The router retries as `serve` does; only its own policies
    /// can be replayed with faults.
    #[arg(long, value_name = "WORKER:KIND@START[-END]", value_parser = fault)]
    fault: Vec<WorkerFault>,
    /// Sets the tokens per block of the engines, a multiple of --block-size [default: --block-size]
    #[arg(long, value_name = "TOKENS")]
    engine_block_size: Option<NonZeroU32>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Settings of the cache signal, by which the router learns of cached blocks.
#[derive(Args, Debug)]
#[command(next_help_heading = "Cache signal")]
pub(super) struct SignalArgs {
    /// Selects how the router learns which blocks the engines have in cache
    #[arg(long, value_name = "SOURCE", default_value = "events")]
    cache_signal: SignalName,
    /// Delays KV events, such as 200ms
    #[arg(
        long,
        default_value = "0s",
        value_name = "DURATION",
        value_parser = duration
    )]
    event_lag: humantime::Duration,
    /// Sets the fraction of KV event batches that are lost
    #[arg(long, default_value_t = Fraction(0.0), value_name = "FRACTION")]
    event_loss_fraction: Fraction,
}

/// A source of the cache signal.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum SignalName {
    /// The engines' KV events
    Events,
    /// An estimate from the requests sent and from the cached tokens that responses report
    Estimated,
}

/// The policies to compare, and the number of runs of each.
#[derive(Args, Debug)]
#[command(next_help_heading = "Comparison")]
pub(super) struct ComparisonArgs {
    /// Selects the policies to compare, separated by commas; --help lists them
    ///
    /// POLICY+shortest, POLICY+fcfs and POLICY+fair add a queue at the router, as `serve --queue`
    /// does. A policy without such a suffix has no queue. Without this flag, all policies of `serve`
    /// are compared, with the queue that each has there.
    #[arg(long, value_delimiter = ',')]
    pub(super) policy: Vec<PolicySpec>,
    /// Sets the number of runs of each policy, with different requests (of a workload) and noise
    #[arg(long, default_value = "1", value_name = "N")]
    pub(super) seeds: NonZeroU32,
    /// Sets the limits for a request's time to first token and its mean time between tokens
    #[arg(long, value_name = "LIMITS", default_value_t = Slo::default(), value_parser = slo)]
    pub(super) slo: Slo,
}

impl ComparisonArgs {
    /// Returns the policies of the flag. Without the flag, all policies of `serve`, each with its
    /// default queue, the default policy first.
    pub(super) fn policies(&self) -> Vec<PolicySpec> {
        if self.policy.is_empty() {
            return policy::ALL.map(PolicySpec::from).to_vec();
        }
        self.policy.clone()
    }
}

/// Files for the report.
#[derive(Args, Debug)]
#[command(next_help_heading = "Report")]
pub(super) struct ReportArgs {
    /// Writes the report as JSON to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the report as a self-contained HTML page with charts to a file
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
}

impl ReportArgs {
    /// Prints a table of many cases, and writes the files.
    pub(super) fn write_grid(&self, grid: &Grid) -> anyhow::Result<()> {
        print(grid)?;
        self.write_html(grid)?;
        write_json(self.json.as_deref(), grid)
    }

    /// Writes the HTML page, if the flag is given.
    pub(super) fn write_html(&self, grid: &Grid) -> anyhow::Result<()> {
        let Some(path) = &self.html else {
            return Ok(());
        };
        write_file(path, &grid.html())
    }

    /// Writes the JSON report, if the flag is given.
    pub(super) fn write_json(&self, report: &impl serde::Serialize) -> anyhow::Result<()> {
        write_json(self.json.as_deref(), report)
    }
}

impl SourceArgs {
    /// Returns the traffic of each seed, with arrivals at `rate` times the traffic's own rate.
    /// Without a rate, arrivals do not change. Of `router`, only the first seed and the block size
    /// are used.
    ///
    /// # Errors
    /// If the trace cannot be read or is combined with `--rps`, if the workload is invalid, or if
    /// `rate` is given and the workload has no arrival rate.
    pub(super) fn traffic(
        &self,
        router: &RouterArgs,
        seeds: NonZeroU32,
        rate: Option<f64>,
    ) -> anyhow::Result<Vec<Arc<HashedWorkload>>> {
        match &self.trace {
            Some(path) => self.trace_traffic(path, router, seeds, rate.unwrap_or(1.0)),
            None => self.workload_traffic(router, seeds, rate),
        }
    }

    /// Returns for how long requests are sent. `None` for no limit, and for a trace, which
    /// [`traffic`](Self::traffic) has cut.
    fn send_duration(&self) -> Option<Duration> {
        let duration = self.duration.map(Into::into);
        duration.filter(|_| self.trace.is_none())
    }

    /// Returns the requests of a trace, which are the same for all seeds.
    ///
    /// # Errors
    /// If `--rps` is given, or the trace cannot be read.
    fn trace_traffic(
        &self,
        path: &Path,
        router: &RouterArgs,
        seeds: NonZeroU32,
        rate: f64,
    ) -> anyhow::Result<Vec<Arc<HashedWorkload>>> {
        let problem = "a trace has its own arrival times: scale its rate in place of --rps";
        ensure_usage(self.shape.rps.is_none(), problem)?;
        let mut requests = read_trace(path)?;
        let max_requests = self.shape.requests.map(|count| count as usize);
        trace::truncate(&mut requests, max_requests, self.duration.map(Into::into));
        let workload = Workload::from_trace(&requests, rate)?;
        let traffic = Arc::new(HashedWorkload::new(workload, router.block_size));
        Ok(vec![traffic; seeds.get() as usize])
    }

    /// Generates a workload for each of `seeds` consecutive seeds from the router's seed on.
    ///
    /// # Errors
    /// If the workload is invalid, or `rate` is given and the workload has no arrival rate.
    fn workload_traffic(
        &self,
        router: &RouterArgs,
        seeds: NonZeroU32,
        rate: Option<f64>,
    ) -> anyhow::Result<Vec<Arc<HashedWorkload>>> {
        let seeds = 0..u64::from(seeds.get());
        let traffic = seeds.map(|seed| {
            let seed = router.seed.wrapping_add(seed);
            let workload = self.shape.make(&self.workload, seed)?;
            ensure!(
                rate.is_none() || workload.has_rate(),
                "{} has no arrival rate to scale: set one with --rps",
                workload.name
            );
            let workload = workload.at_rate(rate.unwrap_or(1.0))?;
            Ok(Arc::new(HashedWorkload::new(workload, router.block_size)))
        });
        traffic.collect()
    }
}

impl FleetArgs {
    /// Returns the configuration of a replay of `source` with identical engines and the changes of
    /// the fleet.
    /// The policy in it is a placeholder: a comparison replaces it.
    pub(super) fn config(
        &self,
        source: &SourceArgs,
        router: &RouterArgs,
        signal: &SignalArgs,
        slo: Slo,
    ) -> ReplayConfig {
        let settings = router.config(NamedPolicy::default());
        let block_size = self.engine_block_size.unwrap_or(settings.block_size);
        let engine = self.engine.config(block_size, router.seed);
        let mut config = ReplayConfig::uniform(settings, &engine, self.workers);
        config.duration = source.send_duration();
        config.known_output_lengths = source.known_output_lengths;
        config.slo = slo;
        config.changes.clone_from(&self.fleet_change);
        config.faults.clone_from(&self.fault);
        config.cache_signal = signal.cache_signal();
        config
    }
}

impl SignalArgs {
    /// Returns the cache signal that the flags describe.
    pub(super) fn cache_signal(&self) -> CacheSignal {
        match self.cache_signal {
            SignalName::Estimated => CacheSignal::Estimated,
            SignalName::Events => CacheSignal::Events {
                lag: self.event_lag.into(),
                loss_fraction: self.event_loss_fraction.0,
            },
        }
    }
}

/// Returns the number of replays that run at a time.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Parses `--slo`.
fn slo(text: &str) -> Result<Slo, InvalidSlo> {
    text.parse()
}

/// Parses `--fleet-change`.
fn change(text: &str) -> Result<FleetChange, InvalidFleetChange> {
    text.parse()
}

/// Parses `--fault`.
fn fault(text: &str) -> Result<WorkerFault, InvalidFault> {
    text.parse()
}

/// Returns a list of all policies for `--help`, one line for each.
pub(super) fn list_policies() -> String {
    let own = policy::ALL.map(|policy| (policy.name, policy.description));
    let weighted = [
        ("kv:WEIGHT", "kv with this --overlap-weight"),
        (
            "marginal-delay:ttft=WEIGHT",
            "marginal-delay with this --ttft-weight",
        ),
        (
            "dynamo-pr1731",
            "Dynamo's formula of PR 1731, equal to kv:1",
        ),
    ];
    let simulated = baselines::BASELINES.iter().chain(&baselines::ABLATIONS);
    let simulated = simulated.map(|baseline| (baseline.name, baseline.description));
    let all = own.into_iter().chain(weighted).chain(simulated);
    let lines = all.map(|(name, description)| format!("  {name:<41} {description}\n"));
    format!("Policies:\n{}", lines.collect::<String>().trim_end())
}
