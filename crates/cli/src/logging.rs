//! Logs on standard error: `--log-level`, `--log-format`, colour, and changes of the filter while the
//! program runs.

use std::io::IsTerminal;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use foresee_gateway::LogFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

/// Target of a line for each change over the admin API.
const AUDIT_TARGET: &str = "foresee::audit";

/// Flags of every subcommand for its logs.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logging")]
pub(crate) struct LogArgs {
    /// Sets which events are logged: a level, or TARGET=LEVEL for a part, separated by commas
    ///
    /// Levels are error, warn, info, debug, trace and off. The default is info for subcommands that
    /// serve, and error for subcommands that print a report. `info,foresee::completion=debug` adds
    /// a line for each response, with the predictions for the request and the measured values.
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "FORESEE_LOG",
        value_parser = filter
    )]
    log_level: Option<String>,
    /// Sets the form of log lines: text for people, json for log collectors
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        env = "FORESEE_LOG_FORMAT",
        default_value = "text"
    )]
    log_format: Format,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One line of text per event
    Text,
    /// One JSON object per line
    Json,
}

impl LogArgs {
    /// Starts logging to standard error for the whole process, and returns the filter. `default_level`
    /// is the filter if neither `--log-level` nor `FORESEE_LOG` is set.
    ///
    /// # Errors
    /// If the filter is invalid. The value of `--log-level` was checked when it was parsed.
    ///
    /// # Panics
    /// If logging was started before.
    pub(crate) fn init(&self, default_level: &str) -> anyhow::Result<ProcessLog> {
        let text = self.log_level.as_deref().unwrap_or(default_level);
        let has_colour = std::io::stderr().is_terminal() && !is_set("NO_COLOR");
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(has_colour);
        let (filter, handle) = reload::Layer::new(EnvFilter::try_new(text)?);
        let log = Registry::default().with(filter);
        match self.log_format {
            Format::Text => log.with(lines).init(),
            Format::Json => log.with(lines.json()).init(),
        }
        Ok(ProcessLog(handle))
    }
}

/// Filter of the log of this process.
pub(crate) struct ProcessLog(reload::Handle<EnvFilter, Registry>);

impl LogFilter for ProcessLog {
    fn current(&self) -> String {
        // Fails only after the log has ended.
        let text = self.0.with_current(EnvFilter::to_string);
        text.unwrap_or_default()
    }

    /// Replaces the filter. Lines about changes over the admin API are logged by any filter, so that
    /// no request can hide itself.
    fn replace(&self, text: &str) -> Result<(), String> {
        // Of two directives for a target, the last one counts.
        let whole = format!("{},{AUDIT_TARGET}=info", filter(text)?);
        let new = EnvFilter::try_new(whole).map_err(|error| error.to_string())?;
        self.0.reload(new).map_err(|error| error.to_string())
    }
}

/// Returns whether an environment variable exists and is not empty.
fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// Checks a filter and returns it unchanged, or returns a message that names the fault and the
/// valid form. `EnvFilter` alone takes a misspelt level for the name of a target.
fn filter(text: &str) -> Result<String, String> {
    let invalid = |problem: &str| format!("{problem}; write LEVEL or TARGET=LEVEL, such as info");
    for directive in text.split(',').map(str::trim) {
        let is_span = directive.contains(['[', ']', '{', '}']);
        // `LevelFilter` reads the empty text as the level error.
        let is_level = !directive.is_empty() && LevelFilter::from_str(directive).is_ok();
        if !is_span && !directive.contains('=') && !is_level {
            return Err(invalid(&format!("`{directive}` is not a level")));
        }
    }
    match EnvFilter::builder().parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(invalid(&error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_levels_are_refused() {
        for text in [
            "info",
            "warn,foresee::completion=debug",
            "off",
            "foresee[request]=debug",
        ] {
            assert_eq!(filter(text).as_deref(), Ok(text));
        }
        for text in ["inof", "", "info,foresee", "foresee=loud"] {
            assert!(filter(text).is_err(), "{text}");
        }
    }
}
