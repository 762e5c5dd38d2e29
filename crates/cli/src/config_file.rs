//! `--config FILE`: the settings of `serve` in TOML.
//!
//! The keys are the names of the flags. A flag overrides the environment, which overrides the file.
//! A setting comes from one of the three as a whole. The settings of the file are appended to the
//! arguments as flags, and the command line is parsed again, so that flags and file have one syntax
//! and one set of checks.

mod lines;
mod worker_table;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches};
use serde::Serialize;
use toml::{Table, Value};

pub(crate) use worker_table::from_flag;

use crate::key_file::KeyTable;
use crate::value_kind::Kind;
use crate::values::nearest;
use crate::{CONFIGURED, InvalidConfiguration, command};
use lines::Lines;

/// Flags that the file does not accept as keys.
const NOT_KEYS: [&str; 6] = ["config", "watch-config", "help", "version", "host", "port"];

/// Name of the tables with keys of clients.
const KEY_TABLES: &str = "key";

/// Groups of flags that set one setting. A flag or a variable of a group overrides all keys of that
/// group in the file.
const GROUPS: [&[&str]; 2] = [&["listen", "host", "port"], &["worker", "worker-urls"]];

/// Tables of a file that have no flag.
#[derive(Debug, Default, Serialize)]
pub(crate) struct FileTables {
    /// `[[key]]`: keys of clients.
    #[serde(rename = "key", skip_serializing_if = "Vec::is_empty")]
    pub(crate) keys: Vec<KeyTable>,
}

impl FileTables {
    /// Returns the tables as the text of a file.
    ///
    /// # Errors
    /// If a value has no form in TOML, which does not happen.
    pub(crate) fn to_toml(&self) -> anyhow::Result<String> {
        Ok(toml::to_string(self)?)
    }
}

/// Returns the matches of the command line with the settings of the file, and the tables of the file
/// that have no flag. Without `--config`, returns `matches` unchanged and no tables. `matches` must be
/// those of `arguments`, which start with the name of the program.
///
/// # Errors
/// If the file cannot be read, or a setting in it is unknown or invalid.
pub(crate) fn merge(
    arguments: Vec<OsString>,
    matches: ArgMatches,
) -> anyhow::Result<(ArgMatches, FileTables)> {
    let path = match matches.subcommand() {
        Some((name, settings)) if CONFIGURED.contains(&name) => {
            let path = settings.get_one::<PathBuf>("config").cloned();
            path.map(|path| (name, settings, path))
        }
        _ => None,
    };
    let Some((name, settings, path)) = path else {
        return Ok((matches, FileTables::default()));
    };
    let from_file = || format!("in {}", path.display());
    let mut expanded = arguments;
    let (flags, tables) = std::fs::read_to_string(&path)
        .context("cannot read the file")
        .and_then(|text| flags(&text, name, settings))
        .with_context(from_file)
        .context(InvalidConfiguration)?;
    expanded.extend(flags.iter().map(|flag| OsString::from(&flag.text)));
    let merged = command().try_get_matches_from(expanded).map_err(|error| {
        // The arguments without the file were valid, so the error is in the file.
        let cause = anyhow!("{}", plain(&error));
        let cause = match line_of(&error, &flags) {
            Some(line) => cause.context(format!("line {line}")),
            None => cause,
        };
        cause.context(from_file()).context(InvalidConfiguration)
    })?;
    Ok((merged, tables))
}

/// Returns the text of an error of the command line, without the advice to read the help.
pub(crate) fn plain(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.trim_start_matches("error: ");
    let text = text.split("\n\nFor more information").next();
    text.unwrap_or_default().trim_end().to_owned()
}

/// A setting of the file as a flag.
#[derive(Debug)]
struct FileFlag {
    /// `--NAME=VALUE`.
    text: String,
    /// Line of the setting.
    line: Option<usize>,
}

/// Returns the line of the setting that caused an error of the parser.
fn line_of(error: &clap::Error, flags: &[FileFlag]) -> Option<usize> {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    // Such as `--queue-limit <REQUESTS>`.
    let name = context(ContextKind::InvalidArg)?.split([' ', '=']).next()?;
    let value = context(ContextKind::InvalidValue).unwrap_or("");
    let text = format!("{name}={value}");
    let exact = flags.iter().find(|flag| flag.text == text);
    let of_name = || {
        flags
            .iter()
            .find(|flag| flag.text.split('=').next() == Some(name))
    };
    exact.or_else(of_name)?.line
}

/// Returns the settings in the text of a file as flags, and the tables without a flag. A setting that a
/// flag or a variable sets is checked for its key and type, and left out. `settings` are the matches
/// of `subcommand`.
///
/// # Errors
/// If the text is not TOML, a key is unknown or given twice, or a value has the wrong type.
fn flags(
    text: &str,
    subcommand: &str,
    settings: &ArgMatches,
) -> anyhow::Result<(Vec<FileFlag>, FileTables)> {
    let table: Table = text.parse().context("the file is not valid TOML")?;
    let lines = Lines::of(text);
    let mut program = command();
    program.build();
    let serve = program
        .find_subcommand(subcommand)
        .context("the subcommand has no settings")?;
    let mut tables = FileTables::default();
    let mut flags = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    for (key, value) in &table {
        let name = key.replace('_', "-");
        if name == KEY_TABLES {
            let keys = value.clone().try_into();
            tables.keys = keys.with_context(|| format!("in a [[{KEY_TABLES}]] table"))?;
            continue;
        }
        let values = find(serve, key, &name).and_then(|argument| {
            if seen.contains(&name) {
                bail!("key `{key}` is given twice, with a hyphen and with an underscore");
            }
            values(key, argument, value)
        });
        let values = values.with_context(|| match lines.line(key, 0) {
            Some(line) => format!("line {line}"),
            None => format!("key `{key}`"),
        })?;
        if !is_overridden(&name, serve, settings) {
            flags.extend(values.iter().enumerate().map(|(index, value)| FileFlag {
                text: format!("--{name}={value}"),
                line: lines.line(key, index),
            }));
        }
        seen.push(name);
    }
    Ok((flags, tables))
}

/// Returns the settings of `serve` in the text of a configuration file as flags. Leaves out settings
/// of environment variables, which override the file. The values of the flags are not checked.
///
/// # Errors
/// If the text is not TOML, a key is unknown or given twice, or a value has the wrong type.
pub fn config_file_flags(text: &str) -> anyhow::Result<Vec<OsString>> {
    let settings = command().try_get_matches_from(["foresee", "serve"])?;
    let (name, settings) = settings.subcommand().context("`serve` is missing")?;
    let (flags, _) = flags(text, name, settings)?;
    Ok(flags.into_iter().map(|flag| flag.text.into()).collect())
}

/// Returns the flags of a subcommand that the file accepts as keys, with their names.
pub(crate) fn keys(serve: &clap::Command) -> impl Iterator<Item = (&Arg, &str)> {
    let settings = serve.get_arguments().filter(|argument| is_key(argument));
    settings.filter_map(|argument| Some((argument, argument.get_long()?)))
}

/// Returns whether the file accepts a flag of `serve` as a key.
pub(crate) fn is_key(argument: &Arg) -> bool {
    argument
        .get_long()
        .is_some_and(|name| !NOT_KEYS.contains(&name))
}

/// Returns the flag of a key. The error for an unknown key suggests the most similar one.
fn find<'a>(serve: &'a clap::Command, key: &str, name: &str) -> anyhow::Result<&'a Arg> {
    let found = keys(serve).find(|(_, known)| *known == name);
    if let Some((argument, _)) = found {
        return Ok(argument);
    }
    match nearest(name, keys(serve).map(|(_, name)| name)) {
        Some(similar) => bail!("unknown key `{key}`; did you mean `{similar}`?"),
        None => bail!("unknown key `{key}`; `foresee serve --help` lists the settings"),
    }
}

/// Returns whether a flag or a variable sets this setting, or another flag of its group. `settings`
/// are the matches of the subcommand without the file.
fn is_overridden(name: &str, serve: &clap::Command, settings: &ArgMatches) -> bool {
    let group = GROUPS.into_iter().find(|group| group.contains(&name));
    let single = [name];
    let names = group.unwrap_or(&single);
    let arguments = serve.get_arguments().filter(|argument| {
        let long = argument.get_long();
        long.is_some_and(|long| names.contains(&long))
    });
    let mut sources = arguments.map(|argument| settings.value_source(argument.get_id().as_str()));
    sources.any(|source| {
        matches!(
            source,
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        )
    })
}

/// Returns a value of the file, or the values of a list, as texts for the command line. `key` is
/// used only in errors.
///
/// # Errors
/// If a list is given for a single value, or the type does not fit the flag.
fn values(key: &str, argument: &Arg, value: &Value) -> anyhow::Result<Vec<String>> {
    let kind = Kind::of(argument);
    let is_list = matches!(argument.get_action(), ArgAction::Append);
    let values = match value {
        Value::Array(values) if is_list => values.as_slice(),
        Value::Array(_) => bail!("key `{key}` takes one value, not a list"),
        value => std::slice::from_ref(value),
    };
    let texts = values.iter().map(|value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(is_on) if kind == Kind::Switch => {
            Ok(if *is_on { "on" } else { "off" }.to_owned())
        }
        Value::Table(table) if argument.get_long() == Some("worker") => {
            worker_table::to_flag(table).with_context(|| format!("in a [[{key}]] table"))
        }
        other => bail!("key `{key}` cannot be a {}", other.type_str()),
    });
    texts.collect()
}
