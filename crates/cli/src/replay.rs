//! `foresee replay`: policies side by side on a virtual clock.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use foresee_core::choose::Policy;
use foresee_sim::replay::{ReplayConfig, compare};
use foresee_sim::trace;
use foresee_sim::workload::Workload;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::flags::{ModelEngineArgs, RouterArgs, WorkloadArgs, list_workloads};

#[derive(Args, Debug)]
#[command(after_help = list_workloads())]
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
    /// Policies to compare, separated by commas; all of them by default
    #[arg(long, value_delimiter = ',', value_name = "POLICY")]
    policy: Vec<Policy>,
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
        Policy::ALL.map(|(policy, _)| policy).to_vec()
    } else {
        args.policy
    };
    let engine = args.model_engine.config(args.router.block_size, seed);
    let config = ReplayConfig::uniform(args.router.config(Policy::Kv), &engine, args.workers);

    let bars = MultiProgress::new();
    let style = ProgressStyle::with_template("{prefix:16} {bar:40} {pos}/{len} {eta}")?;
    let by_policy: HashMap<Policy, ProgressBar> = policies
        .iter()
        .map(|&policy| {
            let bar = ProgressBar::new(workload.requests.len() as u64).with_style(style.clone());
            (policy, bars.add(bar.with_prefix(policy.to_string())))
        })
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let report = compare(
        &config,
        &policies,
        &workload,
        threads,
        &|policy, progress| {
            if let Some(bar) = by_policy.get(&policy) {
                bar.set_position(progress.ended as u64);
            }
        },
    )?;
    by_policy.values().for_each(ProgressBar::finish_and_clear);

    print!("{report}");
    if let Some(path) = args.json {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
