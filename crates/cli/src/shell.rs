//! `foresee completions` and `foresee man`.

use anyhow::Context;
use clap::Args;
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
}

/// Prints the completion script for a shell.
pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "foresee", &mut script);
    print(String::from_utf8_lossy(&script))
}

/// Prints the manual page of the program or of a subcommand, in roff.
///
/// # Errors
/// If there is no such subcommand, which counts as an invalid configuration, or standard output
/// cannot be written.
pub(crate) fn man(args: &ManArgs) -> anyhow::Result<()> {
    let mut page = command();
    page.build();
    for name in &args.path {
        let found = page.find_subcommand(name).cloned();
        page = found
            .with_context(|| format!("there is no subcommand `{name}`"))
            .context(InvalidConfiguration)?;
    }
    // Names of manual pages have hyphens, as in `git-log`.
    let name = page.get_bin_name().unwrap_or("foresee").replace(' ', "-");
    let mut text = Vec::new();
    clap_mangen::Man::new(page.display_name(name.clone()).name(name)).render(&mut text)?;
    print(String::from_utf8_lossy(&text))
}
