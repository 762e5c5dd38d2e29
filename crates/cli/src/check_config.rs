//! `foresee check-config`: checks the settings of `serve` and prints all of them as TOML.

use std::fmt::Write as _;

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches};
use foresee_gateway::{GatewayConfig, WorkerConfig};
use toml::Value;

use crate::config_file::{from_flag, keys};
use crate::flags::Queue;
use crate::output::print;
use crate::serve::{ServeArgs, check_settings};
use crate::value_kind::Kind;
use crate::{InvalidConfiguration, command};

/// Checks all settings and prints them as a file for `--config`. No socket is opened and no worker
/// is contacted. `args` must be [resolved](ServeArgs::resolve), and `matches` must be those of the
/// subcommand. `tables` are the tables of the file that have no flag, as text.
///
/// # Errors
/// If a setting is invalid, or the tokenizer cannot be loaded.
pub(crate) fn check_config(
    args: ServeArgs,
    matches: &ArgMatches,
    tables: &str,
) -> anyhow::Result<()> {
    let config = args.gateway();
    check_settings(&config)?;
    config.check_tokenizer().context(InvalidConfiguration)?;
    print(format!("{}\n{tables}", effective(&config, matches)?).trim_end())?;
    print("\n")?;
    eprintln!("Configuration is valid.");
    Ok(())
}

/// Returns all settings as a file for `--config`: a comment for each setting without a value, and a
/// `[[worker]]` table for each worker of `config`.
fn effective(config: &GatewayConfig, matches: &ArgMatches) -> anyhow::Result<String> {
    let mut program = command();
    program.build();
    let serve = program
        .find_subcommand("serve")
        .context("`serve` has no settings")?;
    let mut text = String::new();
    let mut heading = None;
    for (argument, name) in keys(serve).filter(|(_, name)| !is_worker(name)) {
        if argument.get_help_heading() != heading {
            heading = argument.get_help_heading();
            let separator = if text.is_empty() { "" } else { "\n" };
            writeln!(text, "{separator}# {}", heading.unwrap_or("Settings"))?;
        }
        // The defaults of these keys depend on other settings or on the machine.
        let value = match name {
            "listen" => Some(config.listen.to_string()),
            "queue" => Some(Queue(config.router.queue_order).to_string()),
            "io-threads" => Some(config.io_threads.to_string()),
            _ => raw(argument, matches).into_iter().next(),
        };
        match value {
            Some(_) if matches!(argument.get_action(), ArgAction::Append) => {
                let values = raw(argument, matches).into_iter();
                let values: Vec<_> = values.map(|value| in_toml(argument, value)).collect();
                writeln!(text, "{name} = [{}]", values.join(", "))?;
            }
            Some(value) => writeln!(text, "{name} = {}", in_toml(argument, value))?,
            None => writeln!(text, "# {name} is not set")?,
        }
    }
    let flags = keys(serve).filter(|(_, name)| is_worker(name));
    let flags = flags.flat_map(|(argument, _)| {
        let values = matches.get_raw(argument.get_id().as_str());
        let values = values
            .into_iter()
            .flatten()
            .map(|value| value.to_string_lossy());
        let separators: &[char] = match argument.get_long() {
            Some("worker") => &[' ', '\t', '\n'],
            _ => &[' ', '\t', '\n', ','],
        };
        let lists = values.map(|list| list.split(separators).map(str::to_owned).collect());
        lists.collect::<Vec<Vec<String>>>()
    });
    for flag in flags.flatten() {
        // `matches` also has workers of a variable that a flag overrides; `config` does not.
        let Ok(worker) = flag.parse::<WorkerConfig>() else {
            continue;
        };
        if config.workers.contains(&worker) {
            write!(text, "\n{}", from_flag(&flag, &worker.name))?;
        }
    }
    Ok(text)
}

/// Returns whether a key sets workers.
fn is_worker(name: &str) -> bool {
    ["worker", "worker-urls"].contains(&name)
}

/// Returns the texts of a flag's values, or of its default.
fn raw(argument: &Arg, matches: &ArgMatches) -> Vec<String> {
    let values = matches.get_raw(argument.get_id().as_str());
    let values = values.into_iter().flatten();
    values
        .map(|value| value.to_string_lossy().into_owned())
        .collect()
}

/// Returns a value in the syntax of TOML.
fn in_toml(argument: &Arg, text: String) -> String {
    match (Kind::of(argument), text.as_str()) {
        (kind, _) if kind.is_numeric() => text,
        (Kind::Switch, "on") => true.to_string(),
        (Kind::Switch, "off") => false.to_string(),
        _ => Value::String(text).to_string(),
    }
}
