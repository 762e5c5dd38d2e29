//! `foresee replay sweep`: one workload or trace at several arrival rates, one row for each.

use std::sync::Arc;

use clap::Args;
use foresee_sim::compare::Case;

use super::arguments::{
    ComparisonArgs, FleetArgs, ReportArgs, SignalArgs, SourceArgs, list_policies, threads,
};
use super::grid::{NamedCase, replay};
use crate::flags::RouterArgs;

#[derive(Args, Debug)]
#[command(after_long_help = list_policies())]
pub(crate) struct SweepArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Sets the arrival rates in multiples of the traffic's own, separated by commas
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "FACTOR",
        default_value = "0.5,0.75,1,1.25,1.5",
        help_heading = "Traffic"
    )]
    rates: Vec<f64>,
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

/// Replays the traffic at each rate under each policy, and writes the reports.
///
/// # Errors
/// If the traffic cannot be read or has no arrival rate to scale, or a rate is not a positive
/// number.
pub(super) fn sweep(args: &SweepArgs) -> anyhow::Result<()> {
    let comparison = &args.comparison;
    let config = args
        .fleet
        .config(&args.source, &args.router, &args.signal, comparison.slo);
    // A rate of 1 makes `traffic` fail if there is no arrival rate to scale.
    let source = &args.source;
    let traffic = source.traffic(&args.router, comparison.seeds, Some(1.0))?;
    let cases = args.rates.iter().map(|&rate| {
        let scaled = traffic
            .iter()
            .map(|traffic| Ok(Arc::new(traffic.at_rate(rate)?)));
        Ok(NamedCase {
            name: format!("rate {rate}"),
            description: format!("{rate} times the rate"),
            rate: Some(rate),
            case: Case {
                config: config.clone(),
                traffic: scaled.collect::<anyhow::Result<_>>()?,
            },
        })
    });
    let cases = cases.collect::<anyhow::Result<_>>()?;
    let grid = replay(cases, &comparison.policies(), Vec::new(), threads())?;
    args.report.write_grid(&grid)
}
