//! `foresee replay run`: one workload or trace under several policies.

use clap::Args;
use foresee_report::ComparisonTable;
use foresee_report::grid::{Grid, Row};
use foresee_sim::compare::compare;
use indicatif::ProgressBar;

use super::arguments::{
    ComparisonArgs, FleetArgs, ReportArgs, SignalArgs, SourceArgs, list_policies, threads,
};
use crate::flags::RouterArgs;
use crate::output::print;
use crate::progress;

#[derive(Args, Debug)]
#[command(after_long_help = list_policies())]
pub(crate) struct RunArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Sets the arrival rate in multiples of the trace's, the workload's or --rps
    #[arg(long, value_name = "FACTOR", help_heading = "Traffic")]
    rate: Option<f64>,
    #[command(flatten)]
    comparison: ComparisonArgs,
    #[command(flatten)]
    fleet: FleetArgs,
    #[command(flatten)]
    signal: SignalArgs,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    report: ReportArgs,
}

/// Replays the traffic under each policy, and writes the reports. The time series of active blocks
/// is kept only for the HTML page.
///
/// # Errors
/// If the traffic is invalid, a replay fails, or a file cannot be written.
pub(super) fn run(args: &RunArgs) -> anyhow::Result<()> {
    let comparison = &args.comparison;
    let policies = comparison.policies();
    let mut config = args
        .fleet
        .config(&args.source, &args.router, &args.signal, comparison.slo);
    config.keep_active_blocks = args.report.html.is_some();
    let source = &args.source;
    let traffic = source.traffic(&args.router, comparison.seeds, args.rate)?;
    let lengths: Vec<usize> = traffic
        .iter()
        .map(|traffic| traffic.workload().requests.len())
        .collect();
    let bars = progress::bars(&policies, lengths.iter().sum())?;
    let report = compare(
        &config,
        &policies,
        &traffic,
        threads(),
        &|position, progress| {
            let before: usize = lengths[..position.seed].iter().sum();
            bars[position.policy].set_position((before + progress.ended) as u64);
        },
    )?;
    bars.iter().for_each(ProgressBar::finish_and_clear);
    print(ComparisonTable(&report))?;
    let row = Row {
        name: report.workload.clone(),
        description: String::new(),
        rate: None,
        report: report.clone(),
    };
    let policies = policies.iter().map(ToString::to_string).collect();
    let grid = Grid::new(policies, vec![row], Vec::new(), report.real_seconds);
    args.report.write_html(&grid)?;
    args.report.write_json(&report)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use foresee_core::policy::NamedPolicy;
    use foresee_core::router::RouterConfig;

    use crate::replay::ReplayCommand;
    use crate::{Cli, Command};

    /// Returns the settings of the router without the queue limit, which protects the memory of the
    /// gateway's process: a replay has no clients that keep connections open.
    fn shown(config: RouterConfig) -> String {
        let config = RouterConfig {
            queue_limit: None,
            ..config
        };
        format!("{config:#?}")
    }

    #[test]
    fn serve_the_library_and_the_first_policy_of_a_replay_have_the_same_defaults() {
        let serve = ["foresee", "serve", "--worker", "http://gpu1:8000"];
        let Command::Serve(serve) = Cli::parse_from(serve).command else {
            panic!("another subcommand");
        };
        let replay = ["foresee", "replay", "run", "--workload", "chat"];
        let Command::Replay(ReplayCommand::Run(replay)) = Cli::parse_from(replay).command else {
            panic!("another subcommand");
        };
        let library = shown(RouterConfig::default());
        assert_eq!(shown(serve.gateway().router), library);
        let first = &replay.comparison.policies()[0];
        let replayed = first.settings(&replay.router.config(NamedPolicy::default()));
        assert_eq!(shown(replayed), library);
    }
}
