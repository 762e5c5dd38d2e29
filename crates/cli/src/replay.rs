//! `foresee replay`: compares policies on a virtual clock.

mod arguments;
mod capacity;
mod grid;
mod run;
mod suite;
mod sweep;

use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum ReplayCommand {
    /// Replays one workload or trace under several policies
    ///
    /// Example: foresee replay run --workload chat --policy marginal-delay+shortest,round-robin
    Run(run::RunArgs),
    /// Replays one workload or trace at several arrival rates
    ///
    /// Example: foresee replay sweep --workload agent --rates 0.5,1,1.5 --html sweep.html
    Sweep(sweep::SweepArgs),
    /// Replays a fixed list of scenarios with 8 workers
    Suite(suite::SuiteArgs),
    /// Searches for the highest arrival rate, or the fewest workers, within latency limits
    ///
    /// Example: foresee replay capacity --workload rag --slo ttft=2s,itl=60ms
    Capacity(capacity::CapacityArgs),
}

/// Runs a subcommand of `replay`.
pub(crate) fn replay(command: ReplayCommand) -> anyhow::Result<()> {
    match command {
        ReplayCommand::Run(args) => run::run(&args),
        ReplayCommand::Sweep(args) => sweep::sweep(&args),
        ReplayCommand::Suite(args) => suite::suite(&args),
        ReplayCommand::Capacity(args) => capacity::capacity(&args),
    }
}
