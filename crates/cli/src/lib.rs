//! The command line of Foresee: reads flags, environment and configuration file, and calls the
//! other crates.

mod admin_address;
mod check_config;
mod config_file;
mod demo;
mod exit;
mod flags;
mod key_file;
mod key_new;
mod load;
mod logging;
mod mock_engine;
mod output;
mod progress;
pub mod reference;
mod replay;
mod serve;
mod shell;
mod trace_file;
mod value_kind;
mod values;
mod verify;

use std::ffi::OsString;
use std::fmt;
use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config_file::FileTables;
pub use crate::config_file::config_file_flags;
use crate::logging::LogArgs;

/// Exit code of a failure.
const FAILURE: u8 = 1;
/// Exit code of wrong usage and of an invalid configuration.
const INVALID: u8 = 2;

/// End of the program's long help.
const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  failure; for `verify`, the predictions do not hold; for `load`, some requests failed
  2  wrong usage or invalid configuration
  3  `verify` or `load` could not be carried out";

/// A router for LLM engines that predicts each worker's load and cache instead of polling.
#[derive(Debug, Parser)]
#[command(
    name = "foresee",
    version = env!("FORESEE_VERSION"),
    args_override_self = true,
    allow_negative_numbers = true,
    after_long_help = EXIT_CODES
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves many workers behind one OpenAI-compatible address
    ///
    /// Example: foresee serve --worker http://gpu1:8000 --worker http://gpu2:8000
    ///
    /// Each setting is a flag, an environment variable, or a key of the file that --config names.
    /// A flag overrides the variable, and the variable overrides the file.
    Serve(serve::ServeArgs),
    /// Runs mock engines, the router and a client, and compares policies over HTTP
    Demo(demo::DemoArgs),
    /// Compares the router's predictions with the reports of running engines
    ///
    /// Starts a router, or uses a running one (--router), sends requests through it and compares
    /// its predictions with the engines' reports. Other clients should not use the engines during
    /// the run.
    ///
    /// Example: foresee verify --worker http://gpu1:8000,kv-events=tcp://gpu1:5557 --html report.html
    Verify(verify::VerifyArgs),
    /// Sends a workload to an OpenAI-compatible address and measures latency and throughput
    ///
    /// Example: foresee load http://127.0.0.1:8080 --workload chat --rps 20 --seed 7
    Load(load::LoadArgs),
    /// Serves one mock engine over HTTP, in place of vLLM on a GPU
    MockEngine(mock_engine::MockEngineArgs),
    /// Replays traffic through mock engines on a virtual clock
    #[command(subcommand)]
    Replay(replay::ReplayCommand),
    /// Checks the configuration of `serve` and prints all settings as TOML
    ///
    /// The output is a file for `serve --config`. The exit code is 2 if the configuration is
    /// invalid, and 1 if a worker is not healthy with --check-workers.
    CheckConfig(check_config::CheckConfigArgs),
    /// Creates keys of clients
    #[command(subcommand)]
    Key(key_new::KeyCommand),
    /// Prints shell completions
    ///
    /// Example: foresee completions bash > /etc/bash_completion.d/foresee
    Completions(shell::CompletionsArgs),
    /// Prints the manual page of the program or of a subcommand
    ///
    /// Example: foresee man serve | man -l -
    Man(shell::ManArgs),
}

impl Command {
    /// Returns the default of `--log-level`: `info` for subcommands that serve, `error` for
    /// subcommands that print a report.
    fn default_log_level(&self) -> &'static str {
        match self {
            Self::Serve(_) | Self::MockEngine(_) => "info",
            _ => "error",
        }
    }
}

/// Subcommands whose settings can come from environment variables and a configuration file.
const CONFIGURED: [&str; 2] = ["serve", "check-config"];

/// Returns the complete command line, from which help, completions, manual pages and the reference
/// are generated. Of the flags of subcommands, only those of `serve`, `check-config` and `verify`
/// read environment variables.
#[must_use]
pub fn command() -> clap::Command {
    // `verify` starts a router like `serve` and reads the same variables.
    let has_variables = |name: &str| CONFIGURED.contains(&name) || name == "verify";
    let command = Cli::command().mut_args(|argument| argument.hide_env_values(true));
    command.mut_subcommands(move |subcommand| {
        // A negative weight is then refused for its value, not as an unknown flag.
        let subcommand = subcommand.allow_negative_numbers(true);
        if has_variables(subcommand.get_name()) {
            subcommand.mut_args(|argument| argument.hide_env_values(true))
        } else {
            without_variables(subcommand)
        }
    })
}

/// Removes the environment variables from all flags of a command and its subcommands.
fn without_variables(command: clap::Command) -> clap::Command {
    command
        .mut_args(|argument| argument.env(None::<&'static str>))
        .mut_subcommands(without_variables)
}

/// Context that marks an error as one of the configuration: the program then ends with [`INVALID`].
#[derive(Debug)]
pub(crate) struct InvalidConfiguration;

impl fmt::Display for InvalidConfiguration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid configuration")
    }
}

/// Runs the program with the arguments of the process. Returns its exit code.
#[must_use]
pub fn run() -> ExitCode {
    execute(std::env::args_os().collect()).unwrap_or_else(|error| fail(&error))
}

/// [Reads](parse) the arguments, the variables and the configuration file, starts logging, and runs the
/// subcommand. `arguments` start with the name of the program.
///
/// # Errors
/// If the subcommand fails. Invalid usage, `--help` and `--version` are returned as
/// [`clap::Error`], and an invalid configuration has the context [`InvalidConfiguration`].
fn execute(arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let (cli, matches, tables) = parse(arguments.clone())?;
    let log = cli.log.init(cli.command.default_log_level())?;
    let empty = ArgMatches::default();
    let matches = matches.subcommand().map_or(&empty, |(_, matches)| matches);
    match cli.command {
        Command::Serve(args) => {
            serve::serve(args.resolve(matches, tables)?, arguments, log)?;
        }
        Command::CheckConfig(args) => {
            let text = tables.to_toml()?;
            let checks_workers = args.checks_workers();
            let args = args.serve.resolve(matches, tables)?;
            return check_config::check_config(args, matches, &text, checks_workers);
        }
        Command::Demo(args) => demo::demo(args)?,
        Command::Verify(args) => return Ok(verify::verify(args.resolve(matches))),
        Command::Load(args) => return Ok(load::load(&args)),
        Command::MockEngine(args) => mock_engine::mock_engine(args)?,
        Command::Replay(command) => replay::replay(command)?,
        Command::Completions(args) => shell::completions(&args)?,
        Command::Man(args) => shell::man(&args)?,
        Command::Key(command) => key_new::run(&command)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the arguments, the variables and the configuration file, whose tables without a flag are
/// returned beside the matches. `arguments` start with the name of the program.
///
/// # Errors
/// As [`execute`], apart from failures of the subcommand.
fn parse(arguments: Vec<OsString>) -> anyhow::Result<(Cli, ArgMatches, FileTables)> {
    let matches = command().try_get_matches_from(&arguments)?;
    let (matches, tables) = config_file::merge(arguments, matches)?;
    Ok((Cli::from_arg_matches(&matches)?, matches, tables))
}

/// Prints an error, or the text of `--help` or `--version`. Returns the exit code: success for
/// these two texts, [`INVALID`] for wrong usage and an invalid configuration, otherwise
/// [`FAILURE`].
fn fail(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        // clap returns the texts of --help and --version as errors, too. A closed pipe is ignored.
        let _ = usage.print();
        return ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(INVALID));
    }
    eprintln!("foresee: {error:#}");
    let is_invalid = error.downcast_ref::<InvalidConfiguration>().is_some();
    ExitCode::from(if is_invalid { INVALID } else { FAILURE })
}
