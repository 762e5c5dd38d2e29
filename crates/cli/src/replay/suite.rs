//! `foresee replay suite`: a fixed list of scenarios, one row for each.

use std::path::PathBuf;

use clap::Args;
use foresee_core::policy::NamedPolicy;
use foresee_sim::baselines::{self, PolicySpec};
use foresee_sim::suite::{SCENARIOS, Scenario, Settings, Traces};

use super::arguments::{ComparisonArgs, ReportArgs, SignalArgs, list_policies, threads};
use super::grid::{NamedCase, replay};
use crate::flags::RouterArgs;
use crate::trace_file::read_trace;
use crate::values::Choice;

#[derive(Args, Debug)]
#[command(after_long_help = list_policies())]
pub(crate) struct SuiteArgs {
    /// Selects the scenarios, separated by commas [default: all]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SCENARIO",
        value_parser = scenario(),
        help_heading = "Scenarios"
    )]
    only: Vec<&'static Scenario>,
    /// Names Mooncake's conversation trace, for the scenarios that replay it
    #[arg(long, value_name = "FILE", help_heading = "Scenarios")]
    conversation: Option<PathBuf>,
    /// Names Azure's conversation trace of 2023, for the scenario that replays it
    #[arg(long, value_name = "FILE", help_heading = "Scenarios")]
    azure: Option<PathBuf>,
    #[command(flatten)]
    comparison: ComparisonArgs,
    #[command(flatten)]
    signal: SignalArgs,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    report: ReportArgs,
}

/// Returns the parser of `--only`.
fn scenario() -> Choice<&'static Scenario> {
    let scenarios = SCENARIOS.iter();
    Choice::new(scenarios.map(|scenario| (scenario, scenario.name, scenario.description)))
}

/// Returns the default policies of the suite: the router's own policies with the usual queue
/// orders, and all baselines except `oracle:ttft`, the second of two oracles.
fn default_policies() -> Vec<PolicySpec> {
    let names = [
        "marginal-delay+shortest",
        "marginal-delay",
        "marginal-delay+fcfs",
        "kv",
        "kv:100",
        "round-robin",
        "least-requests",
        "consistent-hash",
    ];
    let baselines = baselines::BASELINES.iter().map(|baseline| baseline.name);
    let baselines = baselines.filter(|name| *name != "oracle:ttft");
    let names = names.into_iter().chain(baselines);
    names.filter_map(|name| name.parse().ok()).collect()
}

/// Replays the selected scenarios whose traces are given, and writes the reports, which list the
/// other scenarios as left out.
///
/// # Errors
/// If a trace cannot be read, a replay fails, or a file cannot be written.
pub(super) fn suite(args: &SuiteArgs) -> anyhow::Result<()> {
    let settings = Settings {
        router: args.router.config(NamedPolicy::default()),
        cache_signal: args.signal.cache_signal(),
        slo: args.comparison.slo,
        seeds: args.comparison.seeds,
    };
    let selected = args.comparison.policy.clone();
    let policies = if selected.is_empty() {
        default_policies()
    } else {
        selected
    };
    let traces = Traces {
        conversation: args.conversation.as_deref().map(read_trace).transpose()?,
        azure: args.azure.as_deref().map(read_trace).transpose()?,
    };
    let mut cases = Vec::new();
    let mut left_out = Vec::new();
    let scenarios = if args.only.is_empty() {
        SCENARIOS.iter().collect()
    } else {
        args.only.clone()
    };
    for scenario in scenarios {
        match scenario.case(&traces, &settings)? {
            Some(case) => cases.push(NamedCase {
                name: scenario.name.to_owned(),
                description: scenario.description.to_owned(),
                rate: None,
                case,
            }),
            None => left_out.push(format!(
                "{}, whose trace is not given (--conversation FILE, --azure FILE)",
                scenario.name
            )),
        }
    }
    let grid = replay(cases, &policies, left_out, threads())?;
    args.report.write_grid(&grid)
}
