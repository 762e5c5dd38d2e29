//! `foresee replay`: policies side by side on a virtual clock.

use std::fs::File;
use std::io::BufReader;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use foresee_core::choose::Policy;
use foresee_sim::capacity::{self, Sought};
use foresee_sim::compare::{Case, compare};
use foresee_sim::grid::{Grid, Row};
use foresee_sim::knowledge::Knowledge;
use foresee_sim::lab::{self, Contender};
use foresee_sim::replay::ReplayConfig;
use foresee_sim::schedule::{FleetChange, InvalidChange};
use foresee_sim::slo::{InvalidSlo, Slo};
use foresee_sim::span::{self, InvalidSpan};
use foresee_sim::suite::Settings;
use foresee_sim::trace;
use foresee_sim::traffic::Traffic;
use foresee_sim::workload::Workload;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::flags::{ModelEngineArgs, RouterArgs, WorkloadArgs, list_workloads};
use crate::suite::{self, NamedCase, SuiteArgs, list_scenarios};

#[derive(Args, Debug)]
#[command(after_help = format!("{}\n\n{}\n\n{}", list_policies(), list_workloads(), list_scenarios()))]
pub(crate) struct ReplayArgs {
    /// A trace: JSON lines as Mooncake's and those of `serve --record`, or a table as Azure's
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    trace: Option<PathBuf>,
    /// Only what came in the first so much of the trace, as in 10m
    #[arg(long, value_name = "TIME", requires = "trace", value_parser = time)]
    duration: Option<Duration>,
    /// A named workload
    #[arg(long, default_value = "seed")]
    workload: String,
    /// How many times faster requests arrive than the trace, the workload or --rps has it
    #[arg(long, value_name = "TIMES")]
    rate: Option<f64>,
    /// Such multiples, separated by commas: a row for each
    #[arg(long, value_delimiter = ',', value_name = "TIMES", conflicts_with_all = ["rate", "find_capacity"])]
    rates: Vec<f64>,
    /// Policies to compare, separated by commas; those of `serve` by default, and those of the field
    /// for --suite. POLICY+shortest, POLICY+fcfs and POLICY+fair: requests wait at the router, as
    /// with `serve --queue`
    #[arg(long, value_delimiter = ',', value_name = "POLICY")]
    policy: Vec<Contender>,
    /// Model engines
    #[arg(long, default_value_t = 8)]
    workers: u32,
    /// Runs of each policy, each with other requests (not of a trace) and other noise
    #[arg(long, default_value = "1", value_name = "N")]
    seeds: NonZeroU32,
    /// Limits for a request's time to first token and its mean time between tokens
    #[arg(long, default_value = "ttft=2s,itl=60ms", value_parser = slo)]
    slo: Slo,
    /// Looks for the highest rate, or the fewest workers, that keep the SLO
    #[arg(
        long,
        value_name = "WHAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "rate"
    )]
    find_capacity: Option<What>,
    /// Share of requests that are to be within the SLO, for --find-capacity
    #[arg(long, default_value_t = 0.9, value_name = "SHARE")]
    slo_share: f64,
    /// Also writes the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also draws it: a page that needs nothing else
    #[arg(long, value_name = "FILE", conflicts_with = "find_capacity")]
    html: Option<PathBuf>,
    #[command(flatten)]
    suite: SuiteArgs,
    #[command(flatten)]
    conditions: ConditionArgs,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    model_engine: ModelEngineArgs,
    #[command(flatten)]
    shape: WorkloadArgs,
}

/// What is not as it should be.
#[derive(Args, Debug)]
struct ConditionArgs {
    /// What tells the router what engines cache: their KV events, or only what it sent and what
    /// answers report
    #[arg(long, default_value = "events")]
    knowledge: Source,
    /// How long KV events take, as in 200ms
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = time)]
    event_lag: Duration,
    /// Share of the batches of KV events that never arrive
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    event_loss: f64,
    /// A worker that is not as the others (repeat): 0:speed=0.5 is half as fast, 1:speed=0.5@60s
    /// from then on, 7:join@60s is not there before
    #[arg(long, value_name = "WORKER:WHAT[@TIME]", value_parser = change)]
    fleet_change: Vec<FleetChange>,
    /// Tokens per block of the engines, if a multiple of --block-size
    #[arg(long, value_name = "TOKENS")]
    engine_block_size: Option<NonZeroU32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Source {
    Events,
    Shadow,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    Rate,
    Workers,
}

pub(crate) fn replay(args: ReplayArgs) -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let policies = if !args.policy.is_empty() {
        args.policy.clone()
    } else if args.suite.suite {
        suite::policies()
    } else {
        Policy::ALL.map(|(policy, _)| policy.into()).to_vec()
    };
    if args.suite.suite {
        let settings = Settings {
            router: args.router.config(Policy::default()),
            knowledge: args.conditions.knowledge(),
            slo: args.slo,
            seeds: args.seeds,
        };
        let grid = args.suite.run(&settings, &policies, threads)?;
        return write_grid(&args, &grid);
    }
    let config = config(&args);
    let traffic = traffic(&args)?;
    if !args.rates.is_empty() {
        let cases = args.rates.iter().map(|&rate| {
            let traffic = traffic.iter().map(|it| Ok(Arc::new(it.at_rate(rate)?)));
            Ok(NamedCase {
                name: format!("rate {rate}"),
                what: format!("{rate} times the rate"),
                rate: Some(rate),
                case: Case {
                    config: config.clone(),
                    traffic: traffic.collect::<anyhow::Result<_>>()?,
                },
            })
        });
        let cases = cases.collect::<anyhow::Result<_>>()?;
        let grid = suite::replay(cases, &policies, Vec::new(), threads)?;
        return write_grid(&args, &grid);
    }
    if let Some(what) = args.find_capacity {
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template("{prefix:16} {msg}")?;
        let bar_of = |policy: &Contender| {
            let bar = ProgressBar::no_length().with_style(style.clone());
            bars.add(bar.with_prefix(policy.to_string()))
        };
        let by_policy: Vec<ProgressBar> = policies.iter().map(bar_of).collect();
        let sought = match what {
            What::Rate => Sought::Rate,
            What::Workers => Sought::Workers,
        };
        let step = |policy: usize, tried: f64, carried: bool| {
            let verdict = if carried { "enough" } else { "not enough" };
            by_policy[policy].set_message(format!("{tried:.2}: {verdict} within the SLO"));
        };
        let share = args.slo_share;
        let found = capacity::find(&config, &policies, &traffic, sought, share, threads, &step)?;
        by_policy.iter().for_each(ProgressBar::finish_and_clear);
        print!("{found}");
        return write_json(args.json.as_deref(), || {
            serde_json::to_string_pretty(&found)
        });
    }

    let bars = MultiProgress::new();
    let style = ProgressStyle::with_template("{prefix:16} {bar:40} {pos}/{len} {eta}")?;
    let bar_of = |policy: &Contender| {
        let requests = traffic.iter().map(|it| it.workload().requests.len());
        let bar = ProgressBar::new(requests.sum::<usize>() as u64).with_style(style.clone());
        bars.add(bar.with_prefix(policy.to_string()))
    };
    let by_policy: Vec<ProgressBar> = policies.iter().map(bar_of).collect();
    let report = compare(&config, &policies, &traffic, threads, &|which, progress| {
        let before = traffic[..which.seed].iter();
        let before: usize = before.map(|it| it.workload().requests.len()).sum();
        by_policy[which.policy].set_position((before + progress.ended) as u64);
    })?;
    by_policy.iter().for_each(ProgressBar::finish_and_clear);
    print!("{report}");
    if let Some(path) = &args.html {
        let row = Row {
            name: report.workload.clone(),
            what: String::new(),
            rate: None,
            report: report.clone(),
        };
        let policies = policies.iter().map(ToString::to_string).collect();
        let grid = Grid::new(policies, vec![row], Vec::new(), report.real_seconds);
        write_html(Some(path), &grid)?;
    }
    write_json(args.json.as_deref(), || {
        serde_json::to_string_pretty(&report)
    })
}

/// What is sent with each seed.
fn traffic(args: &ReplayArgs) -> anyhow::Result<Vec<Arc<Traffic>>> {
    let block_size = args.router.block_size;
    let rate = args.rate.unwrap_or(1.0);
    if let Some(path) = &args.trace {
        ensure!(
            args.shape.rps.is_none(),
            "a trace has its own times: --rate scales them, --rps is for named workloads"
        );
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut requests =
            trace::read(BufReader::new(file)).with_context(|| format!("in {}", path.display()))?;
        let most = args.shape.requests.map(|most| most as usize);
        trace::shorten(&mut requests, most, args.duration);
        let workload = Workload::from_trace(&requests, rate)?;
        let traffic = Arc::new(Traffic::new(workload, block_size));
        return Ok(vec![traffic; args.seeds.get() as usize]);
    }
    let seeds = 0..u64::from(args.seeds.get());
    let traffic = seeds.map(|seed| {
        let seed = args.router.seed.wrapping_add(seed);
        let workload = args.shape.make(&args.workload, seed)?;
        ensure!(
            (args.rate.is_none() && args.rates.is_empty()) || workload.has_rate(),
            "{} has no rate of arrival to scale: give it one with --rps",
            workload.name
        );
        Ok(Arc::new(Traffic::new(workload.at_rate(rate)?, block_size)))
    });
    traffic.collect()
}

fn config(args: &ReplayArgs) -> ReplayConfig {
    let conditions = &args.conditions;
    let router = args.router.config(Policy::default());
    let block_size = conditions.engine_block_size.unwrap_or(router.block_size);
    let engine = args.model_engine.config(block_size, args.router.seed);
    let mut config = ReplayConfig::uniform(router, &engine, args.workers);
    config.slo = args.slo;
    config.changes.clone_from(&conditions.fleet_change);
    config.knowledge = conditions.knowledge();
    config.keep_active_blocks = args.html.is_some() && args.rates.is_empty();
    config
}

impl ConditionArgs {
    fn knowledge(&self) -> Knowledge {
        match self.knowledge {
            Source::Shadow => Knowledge::Shadow,
            Source::Events => Knowledge::Events {
                lag: self.event_lag,
                loss: self.event_loss,
            },
        }
    }
}

fn write_grid(args: &ReplayArgs, grid: &Grid) -> anyhow::Result<()> {
    print!("{grid}");
    write_html(args.html.as_deref(), grid)?;
    write_json(args.json.as_deref(), || serde_json::to_string_pretty(grid))
}

fn write_html(path: Option<&Path>, grid: &Grid) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, grid.html()).with_context(|| format!("cannot write {}", path.display()))
}

fn write_json(
    path: Option<&Path>,
    json: impl FnOnce() -> serde_json::Result<String>,
) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, json()?).with_context(|| format!("cannot write {}", path.display()))
}

fn time(text: &str) -> Result<Duration, InvalidSpan> {
    span::parse(text)
}

fn slo(text: &str) -> Result<Slo, InvalidSlo> {
    text.parse()
}

fn change(text: &str) -> Result<FleetChange, InvalidChange> {
    text.parse()
}

/// The policies there are, for `--help`.
fn list_policies() -> String {
    let router = [
        (
            "kv",
            "what serves by default: --overlap-weight × blocks to compute + active blocks",
        ),
        ("kv:WEIGHT", "the same with this weight"),
        ("round-robin", "each worker in turn"),
        ("random", "any worker"),
        ("least-requests", "the fewest requests"),
        ("power-of-two", "the fewer requests of two drawn at random"),
        (
            "consistent-hash",
            "by the first 1,024 tokens, with bounded load",
        ),
        (
            "dynamo-pr1731",
            "Dynamo's formula as of PR 1731, which is kv:1",
        ),
    ];
    let rules = lab::RULES.iter().map(|rule| (rule.name, rule.what));
    let all = router.into_iter().chain(rules);
    let lines = all.map(|(name, what)| format!("  {name:<18} {what}\n"));
    format!("Policies:\n{}", lines.collect::<String>().trim_end())
}
