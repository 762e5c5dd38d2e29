//! `foresee replay capacity`: searches for the load that a fleet can carry within latency limits.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use foresee_report::CapacityTable;
use foresee_sim::capacity::{self, Target};
use indicatif::ProgressBar;

use super::arguments::{ComparisonArgs, FleetArgs, SignalArgs, SourceArgs, list_policies, threads};
use crate::flags::RouterArgs;
use crate::output::{print, write_json};
use crate::progress;
use crate::values::Fraction;

#[derive(Args, Debug)]
#[command(after_long_help = list_policies())]
pub(crate) struct CapacityArgs {
    /// Selects the quantity to search for
    #[arg(
        long,
        value_name = "QUANTITY",
        default_value = "rate",
        help_heading = "Search"
    )]
    find: Quantity,
    /// Sets the fraction of requests that must be within the limits of --slo
    #[arg(
        long,
        value_name = "FRACTION",
        default_value_t = Fraction(0.9),
        help_heading = "Search"
    )]
    slo_fraction: Fraction,
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
    /// Writes the report as JSON to a file
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    json: Option<PathBuf>,
}

/// The quantity to search for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Quantity {
    /// The highest arrival rate
    Rate,
    /// The fewest workers
    Workers,
}

/// Runs the search for each policy, and prints the report.
///
/// # Errors
/// If the traffic is invalid, the search cannot be run, or the file cannot be written.
pub(super) fn capacity(args: &CapacityArgs) -> anyhow::Result<()> {
    let comparison = &args.comparison;
    let policies = comparison.policies();
    let config = args
        .fleet
        .config(&args.source, &args.router, &args.signal, comparison.slo);
    let source = &args.source;
    let traffic = source.traffic(&args.router, comparison.seeds, args.rate)?;
    let target = match args.find {
        Quantity::Rate => Target::Rate,
        Quantity::Workers => Target::Workers,
    };
    let lines = progress::messages(&policies)?;
    let step = |policy: usize, tried: f64, is_enough: bool| {
        let verdict = if is_enough { "within" } else { "not within" };
        lines[policy].set_message(format!("{tried:.2}: {verdict} the limits"));
    };
    let fraction = args.slo_fraction.0;
    let report = capacity::find(
        &config,
        &policies,
        &traffic,
        target,
        fraction,
        threads(),
        &step,
    )?;
    lines.iter().for_each(ProgressBar::finish_and_clear);
    print(CapacityTable(&report))?;
    write_json(args.json.as_deref(), &report)
}
