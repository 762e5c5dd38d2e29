//! `foresee completions` and `foresee man`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;

use crate::output::print;
use crate::{InvalidConfiguration, command};

#[derive(Args, Debug)]
pub(crate) struct CompletionsArgs {
    /// Selects the shell that the completions are for
    shell: Shell,
}

#[derive(Args, Debug)]
pub(crate) struct ManArgs {
    /// Selects a subcommand by its name or names, such as `replay run`
    #[arg(value_name = "SUBCOMMAND")]
    path: Vec<String>,
    /// Writes the pages of the program and of all subcommands to files in a folder, which must exist
    #[arg(long, value_name = "FOLDER", conflicts_with = "path")]
    all: Option<PathBuf>,
}

/// Prints the completion script for a shell.
pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "foresee", &mut script);
    print(String::from_utf8_lossy(&script))
}

/// Prints the manual page of the program or of a subcommand, in roff, or writes all of them to files.
///
/// # Errors
/// If there is no such subcommand, which counts as an invalid configuration, or standard output or a
/// file cannot be written.
pub(crate) fn man(args: &ManArgs) -> anyhow::Result<()> {
    let mut page = command();
    page.build();
    if let Some(folder) = &args.all {
        return write_pages(&page, folder);
    }
    for name in &args.path {
        let found = page.find_subcommand(name).cloned();
        page = found
            .with_context(|| format!("there is no subcommand `{name}`"))
            .context(InvalidConfiguration)?;
    }
    print(String::from_utf8_lossy(&manual_page(&page)?))
}

/// Writes the pages of a built command and of its subcommands, apart from `help`, as
/// `FOLDER/NAME.1`.
fn write_pages(command: &Command, folder: &Path) -> anyhow::Result<()> {
    let path = folder.join(format!("{}.1", page_name(command)));
    std::fs::write(&path, manual_page(command)?)
        .with_context(|| format!("cannot write to {}", path.display()))?;
    command
        .get_subcommands()
        .filter(|subcommand| subcommand.get_name() != "help")
        .try_for_each(|subcommand| write_pages(subcommand, folder))
}

/// Returns the manual page of a built command, in roff.
fn manual_page(command: &Command) -> anyhow::Result<Vec<u8>> {
    let name = page_name(command);
    let page = command.clone().display_name(name.clone()).name(name);
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    Ok(text)
}

/// Returns the name of a command's manual page. Names of pages have hyphens, as in `git-log`.
fn page_name(command: &Command) -> String {
    command
        .get_bin_name()
        .unwrap_or("foresee")
        .replace(' ', "-")
}
