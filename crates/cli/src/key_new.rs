//! `foresee key new`: creates a key for clients.

use clap::{Args, Subcommand};
use foresee_gateway::{KeyHash, Scope, new_key};

use crate::key_file::{NewKey, check_id, table_text};
use crate::output::print;

/// Subcommands for keys of clients.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Creates a key, and prints its table for the key file
    ///
    /// The key is shown once, on the standard error. The table, with the key's hash, is printed on the
    /// standard output.
    ///
    /// Example: foresee key new --id team-a >> keys.toml
    New(NewKeyArgs),
}

/// Properties of the new key.
#[derive(Args, Debug)]
pub(crate) struct NewKeyArgs {
    /// Names the key in logs
    #[arg(long, value_name = "ID", value_parser = id)]
    id: String,
    /// Names the tenant of the key's requests [default: the id]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Sets what the key opens: api, metrics, admin-read or admin; repeat it for several [default: api]
    #[arg(long = "scope", value_name = "SCOPE", value_parser = scope)]
    scopes: Vec<String>,
}

/// Checks the id of a key.
fn id(text: &str) -> Result<String, &'static str> {
    check_id(text).map(|()| text.to_owned())
}

/// Checks the name of a scope.
fn scope(text: &str) -> Result<String, String> {
    text.parse::<Scope>().map(|_| text.to_owned())
}

/// Runs the subcommand.
///
/// # Errors
/// If there are no random numbers, or the output cannot be written.
pub(crate) fn run(command: &KeyCommand) -> anyhow::Result<()> {
    let KeyCommand::New(args) = command;
    let key = new_key()?;
    let table = table_text(&NewKey {
        id: &args.id,
        hash: KeyHash::of(key.as_bytes()).to_string(),
        tenant: args.tenant.as_deref(),
        scopes: &args.scopes,
    });
    print(format!("{table}\n"))?;
    eprintln!("The key, which is not shown again: {key}");
    Ok(())
}
