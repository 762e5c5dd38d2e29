//! `--config FILE`: the same settings as the flags, in TOML.
//!
//! The file's settings become flags in front of those given, so there is one list of settings,
//! with one set of defaults. A flag beats the environment, which beats the file; workers of all
//! three are taken together.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};
use clap::CommandFactory;
use toml::{Table, Value};

use crate::Cli;

/// Puts the settings of the file that `--config` names in front of the other arguments.
pub(crate) fn expand(arguments: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let Some(path) = config_path(&arguments) else {
        return Ok(arguments);
    };
    let text = std::fs::read_to_string(Path::new(&path))
        .with_context(|| format!("cannot read {}", path.display()))?;
    let table: Table = text
        .parse()
        .with_context(|| format!("{} is not TOML", path.display()))?;
    let settings =
        flags_of(&table, arguments.get(1)).with_context(|| format!("in {}", path.display()))?;
    let mut expanded: Vec<OsString> = arguments.iter().take(2).cloned().collect();
    expanded.extend(settings);
    expanded.extend(arguments.into_iter().skip(2));
    Ok(expanded)
}

fn config_path(arguments: &[OsString]) -> Option<OsString> {
    let given = arguments.iter().enumerate().find_map(|(i, argument)| {
        let text = argument.to_str()?;
        match text.strip_prefix("--config") {
            Some("") => arguments.get(i + 1).cloned(),
            Some(rest) => rest.strip_prefix('=').map(OsString::from),
            None => None,
        }
    });
    given.or_else(|| std::env::var_os("FORESEE_CONFIG"))
}

fn flags_of(table: &Table, subcommand: Option<&OsString>) -> anyhow::Result<Vec<OsString>> {
    let cli = Cli::command();
    let command = subcommand
        .and_then(|name| name.to_str())
        .and_then(|name| cli.find_subcommand(name))
        .context("`--config` goes with a subcommand that takes it")?;
    let mut flags = Vec::new();
    for (key, value) in table {
        let known = command
            .get_arguments()
            .find(|argument| argument.get_long() == Some(key) && key != "config");
        let Some(argument) = known else {
            bail!("unknown setting `{key}`: `foresee serve --help` lists them");
        };
        let overridden = argument
            .get_env()
            .is_some_and(|variable| std::env::var_os(variable).is_some());
        if overridden {
            continue;
        }
        let values = match value {
            Value::Array(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Integer(number) => number.to_string(),
                Value::Float(number) => number.to_string(),
                Value::Boolean(true) => "on".to_owned(),
                Value::Boolean(false) => "off".to_owned(),
                _ => bail!("`{key}` is neither text, a number, on/off, nor a list of those"),
            };
            flags.push(format!("--{key}={text}").into());
        }
    }
    Ok(flags)
}
