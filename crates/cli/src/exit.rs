//! Exit codes of the subcommands that measure: 0 for a good result, 1 for a bad one, 2 for wrong
//! usage (from clap), and 3 if there is no result.

use std::process::ExitCode;

/// Exit code of a measurement that could not be carried out.
const NOT_CARRIED_OUT: u8 = 3;

/// Prints the error that prevented a measurement. Returns the exit code for it.
pub(crate) fn not_carried_out(error: &anyhow::Error) -> ExitCode {
    eprintln!("foresee: {error:#}");
    ExitCode::from(NOT_CARRIED_OUT)
}
