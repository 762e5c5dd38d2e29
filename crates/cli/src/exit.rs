//! Exit codes of the subcommands that measure: 0 for a good result, 1 for a bad one, 2 for wrong
//! usage (from clap), and 3 if there is no result.

use std::fmt;
use std::process::ExitCode;

use crate::{InvalidConfiguration, fail};

/// Exit code of a measurement that could not be carried out.
const NOT_CARRIED_OUT: u8 = 3;

/// Returns an error with the exit code of wrong usage, if a condition does not hold.
pub(crate) fn ensure_usage(
    holds: bool,
    problem: impl fmt::Display + fmt::Debug + Send + Sync + 'static,
) -> anyhow::Result<()> {
    if holds {
        return Ok(());
    }
    Err(anyhow::Error::msg(problem).context(InvalidConfiguration))
}

/// Prints the error that prevented a measurement. Returns the exit code for it: that of wrong usage, or
/// [`NOT_CARRIED_OUT`].
pub(crate) fn not_carried_out(error: &anyhow::Error) -> ExitCode {
    if error.is::<InvalidConfiguration>() {
        return fail(error);
    }
    eprintln!("foresee: {error:#}");
    ExitCode::from(NOT_CARRIED_OUT)
}
