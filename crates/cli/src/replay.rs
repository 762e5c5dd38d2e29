//! `foresee replay`: policies side by side on a virtual clock.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use foresee_core::choose::Policy;
use foresee_sim::lab::{self, Contender};
use foresee_sim::replay::{ReplayConfig, compare};
use foresee_sim::trace;
use foresee_sim::workload::Workload;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::flags::{ModelEngineArgs, RouterArgs, WorkloadArgs, list_workloads};

#[derive(Args, Debug)]
#[command(after_help = format!("{}\n\n{}", list_policies(), list_workloads()))]
pub(crate) struct ReplayArgs {
    /// A trace in Mooncake's JSON lines: timestamp, input_length, output_length, hash_ids
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    trace: Option<PathBuf>,
    /// A named workload
    #[arg(long, default_value = "seed")]
    workload: String,
    /// How many times faster than recorded a trace's requests arrive
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// Policies to compare, separated by commas; those of `serve` by default
    #[arg(long, value_delimiter = ',', value_name = "POLICY")]
    policy: Vec<Contender>,
    /// Model engines
    #[arg(long, default_value_t = 8)]
    workers: u32,
    /// Also writes the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    model_engine: ModelEngineArgs,
    #[command(flatten)]
    shape: WorkloadArgs,
}

pub(crate) fn replay(args: ReplayArgs) -> anyhow::Result<()> {
    let seed = args.router.seed;
    let workload = match &args.trace {
        Some(path) => {
            let file =
                File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            let requests = trace::read(BufReader::new(file))
                .with_context(|| format!("in {}", path.display()))?;
            Workload::from_trace(&requests, args.rate)?
        }
        None => args.shape.make(&args.workload, seed)?,
    };
    let policies = if args.policy.is_empty() {
        Policy::ALL.map(|(policy, _)| policy.into()).to_vec()
    } else {
        args.policy
    };
    let engine = args.model_engine.config(args.router.block_size, seed);
    let config = ReplayConfig::uniform(args.router.config(Policy::Kv), &engine, args.workers);

    let bars = MultiProgress::new();
    let style = ProgressStyle::with_template("{prefix:16} {bar:40} {pos}/{len} {eta}")?;
    let by_policy: Vec<ProgressBar> = policies
        .iter()
        .map(|policy| {
            let bar = ProgressBar::new(workload.requests.len() as u64).with_style(style.clone());
            bars.add(bar.with_prefix(policy.to_string()))
        })
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let report = compare(
        &config,
        &policies,
        &workload,
        threads,
        &|policy, progress| {
            if let Some(bar) = by_policy.get(policy) {
                bar.set_position(progress.ended as u64);
            }
        },
    )?;
    by_policy.iter().for_each(ProgressBar::finish_and_clear);

    print!("{report}");
    if let Some(path) = args.json {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
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
