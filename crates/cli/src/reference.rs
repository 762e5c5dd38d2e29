//! `docs/configuration.md`, the reference of all settings, generated from the command line.

use std::fmt::Write as _;

use clap::builder::PossibleValue;
use clap::{Arg, ArgAction, Command};

use crate::command;
use crate::config_file::is_key;
use crate::value_kind::Kind;

/// The hand-written part of the page, with a marker where each generated part belongs.
const TEMPLATE: &str = include_str!("../../../docs/configuration.in.md");
const SETTINGS_MARKER: &str = "<!-- settings of serve -->";
const SUBCOMMANDS_MARKER: &str = "<!-- other subcommands -->";

/// Subcommands that get no section: they have the settings of `serve`, or none.
const NOT_LISTED: [&str; 3] = ["serve", "check-config", "help"];

/// Returns the text of `docs/configuration.md`.
#[must_use]
pub fn configuration() -> String {
    let mut program = command();
    program.build();
    let serve = program.find_subcommand("serve");
    let settings = serve.map_or_else(String::new, settings);
    let mut others = String::new();
    subcommands(&mut others, &program);
    TEMPLATE
        .replace(SETTINGS_MARKER, settings.trim())
        .replace(SUBCOMMANDS_MARKER, others.trim())
}

/// Returns the tables of the settings of `serve`, one table for each help heading.
fn settings(serve: &Command) -> String {
    let mut text = String::new();
    let mut headings: Vec<Option<&str>> = Vec::new();
    for argument in shown(serve) {
        if !headings.contains(&argument.get_help_heading()) {
            headings.push(argument.get_help_heading());
        }
    }
    for heading in headings {
        let title = heading.unwrap_or("File");
        let columns = "| Flag | Environment | TOML key | Type | Default | Meaning |";
        let _ = writeln!(
            text,
            "\n### {title}\n\n{columns}\n|---|---|---|---|---|---|"
        );
        for argument in shown(serve).filter(|argument| argument.get_help_heading() == heading) {
            let variable = argument.get_env().map(|name| name.to_string_lossy());
            let variable = variable.map_or_else(String::new, |name| format!("`{name}`"));
            let key = argument.get_long().filter(|_| is_key(argument));
            let key = key.map_or_else(String::new, |key| format!("`{key}`"));
            let (meaning, default) = meaning_and_default(argument, true);
            let _ = writeln!(
                text,
                "| {} | {variable} | {key} | {} | {default} | {meaning} |",
                flag(argument),
                type_of(argument)
            );
        }
    }
    text
}

/// Appends a section for each subcommand that has no subcommands of its own, recursively. The
/// subcommands in [`NOT_LISTED`] and global arguments are left out. `command` must be built, so
/// that the names are complete.
fn subcommands(text: &mut String, command: &Command) {
    for subcommand in command.get_subcommands() {
        if NOT_LISTED.contains(&subcommand.get_name()) {
            continue;
        }
        if subcommand.has_subcommands() {
            subcommands(text, subcommand);
            continue;
        }
        let name = subcommand.get_bin_name().unwrap_or(subcommand.get_name());
        let about = subcommand.get_about().map(ToString::to_string);
        let _ = writeln!(
            text,
            "\n### {name}\n\n{}.\n\n| Argument | Type | Default | Meaning |\n|---|---|---|---|",
            about.unwrap_or_default()
        );
        for argument in shown(subcommand).filter(|argument| !argument.is_global_set()) {
            let (meaning, default) = meaning_and_default(argument, false);
            let (flag, kind) = (flag(argument), type_of(argument));
            let _ = writeln!(text, "| {flag} | {kind} | {default} | {meaning} |");
        }
    }
}

/// Returns the arguments of `command` that the reference lists: all except hidden arguments, help
/// and version. Global arguments are included; [`subcommands`] leaves them out.
fn shown(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|argument| {
        let is_help = matches!(
            argument.get_action(),
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
        );
        !is_help && !argument.is_hide_set()
    })
}

/// Returns the flag, or the value names of a positional argument, as code.
fn flag(argument: &Arg) -> String {
    match argument.get_long() {
        Some(long) => format!("`--{long}`"),
        None => {
            let names = argument.get_value_names().unwrap_or_default();
            format!("`{}`", names.join(" "))
        }
    }
}

/// Returns the cell of the type: the kind of value, or the possible values.
fn type_of(argument: &Arg) -> String {
    let kind = Kind::of(argument);
    if kind != Kind::Choice {
        return kind.name().to_owned();
    }
    let values = argument.get_value_parser().possible_values();
    let values = values.into_iter().flatten();
    let names = values.map(|value: PossibleValue| format!("`{}`", value.get_name()));
    names.collect::<Vec<_>>().join(", ")
}

/// Returns the help text and the default value as cells of a table.
///
/// A default that depends on the machine or on other settings is part of the help text, as
/// `[default: …]`. `is_long` adds the further paragraphs of the long help.
fn meaning_and_default(argument: &Arg, is_long: bool) -> (String, String) {
    let short = argument.get_help().map(ToString::to_string);
    let short = short.unwrap_or_default();
    let (first, described) = match short.split_once(" [default: ") {
        Some((first, default)) => (first.to_owned(), default.trim_end_matches(']').to_owned()),
        None => (short.clone(), String::new()),
    };
    let mut meaning = format!("{first}.");
    let long = argument.get_long_help().map(ToString::to_string);
    if let Some(rest) = long.as_deref().and_then(|long| long.strip_prefix(&short))
        && is_long
    {
        for paragraph in rest
            .split("\n\n")
            .map(str::trim)
            .filter(|text| !text.is_empty())
        {
            let _ = write!(meaning, " {paragraph}");
        }
    }
    let values = argument.get_default_values().iter();
    let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
    let has_value = argument.get_action().takes_values() && !values.is_empty();
    let default = match values.join(",") {
        value if has_value && !value.is_empty() => format!("`{value}`"),
        _ => described,
    };
    (cell(&meaning), cell(&default))
}

/// Escapes text for a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}
