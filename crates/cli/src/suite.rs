//! `foresee replay --suite` and `--rates`: policies on many cases, a row each.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use foresee_sim::compare::{Case, compare_all};
use foresee_sim::grid::{Grid, Row};
use foresee_sim::lab::{self, Contender};
use foresee_sim::suite::{self, SCENARIOS, Settings, Traces};
use foresee_sim::trace::{self, TraceRequest};
use indicatif::{ProgressBar, ProgressStyle};

/// Which scenarios, and what they need.
#[derive(Args, Debug)]
pub(crate) struct SuiteArgs {
    /// Replays the fixed list of scenarios, with 8 workers, instead of one workload
    #[arg(
        long,
        conflicts_with_all = ["trace", "workload", "rate", "rates", "find_capacity", "workers",
            "fleet_change", "engine_block_size", "engine", "blocks", "rps", "requests"]
    )]
    pub(crate) suite: bool,
    /// Only these scenarios, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "NAME", requires = "suite")]
    only: Vec<String>,
    /// Mooncake's conversation trace, for the scenarios that replay it
    #[arg(long, value_name = "FILE", requires = "suite")]
    conversation: Option<PathBuf>,
    /// Azure's conversation trace of 2023, likewise
    #[arg(long, value_name = "FILE", requires = "suite")]
    azure: Option<PathBuf>,
}

/// The suite's policies if none are asked for: the router's that anybody would use, and all rules
/// of the lab that know no more than they could.
pub(crate) fn policies() -> Vec<Contender> {
    let names = [
        "delay+shortest",
        "delay",
        "delay+fcfs",
        "kv",
        "kv:100",
        "round-robin",
        "least-requests",
        "consistent-hash",
    ];
    let rules = lab::RULES.iter().map(|rule| rule.name);
    let names = names
        .into_iter()
        .chain(rules)
        .filter(|name| *name != "oracle:ttft");
    names.filter_map(|name| name.parse().ok()).collect()
}

impl SuiteArgs {
    /// Replays what is asked for.
    pub(crate) fn run(
        &self,
        settings: &Settings,
        policies: &[Contender],
        threads: usize,
    ) -> anyhow::Result<Grid> {
        let traces = Traces {
            conversation: self.conversation.as_deref().map(read).transpose()?,
            azure: self.azure.as_deref().map(read).transpose()?,
        };
        let mut named = Vec::new();
        let mut left_out = Vec::new();
        for scenario in suite::named(&self.only)? {
            match scenario.case(&traces, settings)? {
                Some(case) => named.push(NamedCase {
                    name: scenario.name.to_owned(),
                    what: scenario.what.to_owned(),
                    rate: None,
                    case,
                }),
                None => left_out.push(format!(
                    "{}, whose trace is not given (--conversation FILE, --azure FILE)",
                    scenario.name
                )),
            }
        }
        replay(named, policies, left_out, threads)
    }
}

/// A case and how its row is called.
pub(crate) struct NamedCase {
    pub(crate) name: String,
    pub(crate) what: String,
    pub(crate) rate: Option<f64>,
    pub(crate) case: Case,
}

/// Replays all cases under all policies, with one progress bar.
pub(crate) fn replay(
    named: Vec<NamedCase>,
    policies: &[Contender],
    left_out: Vec<String>,
    threads: usize,
) -> anyhow::Result<Grid> {
    let began = Instant::now();
    let cases: Vec<Case> = named.iter().map(|it| it.case.clone()).collect();
    let traffic = cases.iter().flat_map(|case| &case.traffic);
    let requests: usize = traffic.map(|it| it.workload().requests.len()).sum();
    let style =
        ProgressStyle::with_template("{bar:40} {pos}/{len} requests {elapsed}, {eta} left")?;
    let bar = ProgressBar::new((requests * policies.len()) as u64).with_style(style);
    let most_seeds = cases
        .iter()
        .map(|case| case.traffic.len())
        .max()
        .unwrap_or(0);
    let ended: Vec<AtomicU64> = (0..cases.len() * policies.len() * most_seeds)
        .map(|_| AtomicU64::new(0))
        .collect();
    let reports = compare_all(&cases, policies, threads, &|which, progress| {
        let run = (which.case * policies.len() + which.policy) * most_seeds + which.seed;
        let now = progress.ended as u64;
        bar.inc(now - ended[run].swap(now, Ordering::Relaxed));
    })?;
    bar.finish_and_clear();
    let rows = named.into_iter().zip(reports).map(|(it, report)| Row {
        name: it.name,
        what: it.what,
        rate: it.rate,
        report,
    });
    Ok(Grid::new(
        policies.iter().map(ToString::to_string).collect(),
        rows.collect(),
        left_out,
        began.elapsed().as_secs_f64(),
    ))
}

fn read(path: &Path) -> anyhow::Result<Vec<TraceRequest>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    trace::read(BufReader::new(file)).with_context(|| format!("in {}", path.display()))
}

/// The scenarios there are, for `--help`.
pub(crate) fn list_scenarios() -> String {
    let lines = SCENARIOS
        .iter()
        .map(|it| format!("  {:<18} {}", it.name, it.what));
    format!(
        "Scenarios of --suite:\n{}",
        lines.collect::<Vec<_>>().join("\n")
    )
}
