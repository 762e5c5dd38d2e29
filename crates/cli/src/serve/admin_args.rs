//! Flags of the admin listener.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, CommandFactory};
use foresee_gateway::{AdminConfig, AdminKey, AdminListen};

use crate::admin_address::AdminAddress;
use crate::flags::Switch;

/// Variable with the admin key. There is no flag for the key itself, because other users of the
/// machine can read command lines.
const KEY_VARIABLE: &str = "FORESEE_ADMIN_KEY";

/// Where the admin listener listens, and which requests it accepts.
#[derive(Args, Debug)]
#[command(next_help_heading = "Admin")]
pub(super) struct AdminArgs {
    /// Sets where metrics, health checks and the admin API are served; keep it private
    ///
    /// HOST:PORT is a TCP address, :PORT means all IPv4 interfaces, unix:PATH is a Unix socket that
    /// only the router's user can open, and `off` starts no admin listener. An address that other
    /// hosts can reach requires a key or --admin-open.
    #[arg(
        long,
        default_value_t = AdminAddress::default(),
        value_name = "HOST:PORT|unix:PATH|off",
        env = "FORESEE_ADMIN_LISTEN"
    )]
    admin_listen: AdminAddress,
    /// Adds host names by which clients may address the admin API, separated by commas
    ///
    /// IP addresses, `localhost` and the host of --admin-listen are always accepted. Health checks
    /// and metrics may be read under any name.
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        value_parser = host_name,
        env = "FORESEE_ADMIN_HOST"
    )]
    admin_host: Vec<String>,
    /// Names a file whose first line is the key that requests to the admin API need
    ///
    /// Clients send it as `Authorization: Bearer KEY`. Health checks need no key, and metrics only
    /// with --metrics-key-file. The variable FORESEE_ADMIN_KEY can contain the key in place of a
    /// file.
    #[arg(long, value_name = "FILE", env = "FORESEE_ADMIN_KEY_FILE")]
    admin_key_file: Option<PathBuf>,
    /// Names a file whose first line is a key that reading the metrics needs
    ///
    /// The admin key opens the metrics as well.
    #[arg(long, value_name = "FILE", env = "FORESEE_METRICS_KEY_FILE")]
    metrics_key_file: Option<PathBuf>,
    /// Accepts an admin API that other hosts can use without a key
    #[arg(
        long,
        default_value_t = Switch::Off,
        default_missing_value = "on",
        num_args = 0..=1,
        require_equals = true,
        value_name = "SWITCH",
        env = "FORESEE_ADMIN_OPEN"
    )]
    admin_open: Switch,
    /// Sets the maximum number of reservations of the selection API; further selections are refused
    #[arg(
        long,
        default_value_t = AdminConfig::default().max_reservations,
        value_name = "N",
        env = "FORESEE_MAX_RESERVATIONS"
    )]
    max_reservations: usize,
    /// Selects whether the admin listener has a dashboard, at /dashboard
    ///
    /// With a dashboard, the router keeps a history of the fleet and a log of some decisions, in a few
    /// megabytes. Neither contains text of prompts. The page itself needs no key, its data do.
    #[arg(
        long,
        default_value_t = Switch::On,
        value_name = "SWITCH",
        env = "FORESEE_DASHBOARD"
    )]
    dashboard: Switch,
    /// Admin key, read by [`resolve`](Self::resolve).
    #[arg(skip)]
    key: Option<AdminKey>,
    /// Metrics key, read by [`resolve`](Self::resolve).
    #[arg(skip)]
    metrics_key: Option<AdminKey>,
}

impl AdminArgs {
    /// Reads the keys from their files and the environment.
    ///
    /// # Errors
    /// If a key cannot be read or is invalid, or both a file and a variable set the admin key.
    pub(super) fn resolve(mut self) -> Result<Self, clap::Error> {
        let error = |message: String| {
            let mut command = crate::Cli::command();
            command.error(ErrorKind::InvalidValue, message)
        };
        let read = |flag: &str, path: &Path| {
            let key = AdminKey::from_file(path);
            key.map_err(|problem| error(format!("{flag}: {problem}")))
        };
        let from_file = self.admin_key_file.as_deref();
        self.key = match (from_file, std::env::var_os(KEY_VARIABLE)) {
            (None, None) => None,
            (Some(path), None) => Some(read("--admin-key-file", path)?),
            (None, Some(key)) => {
                let key = AdminKey::new(&key.to_string_lossy());
                Some(key.map_err(|problem| error(format!("{KEY_VARIABLE}: {problem}")))?)
            }
            (Some(_), Some(_)) => {
                return Err(error(format!(
                    "--admin-key-file and {KEY_VARIABLE} both set the admin key; remove one of them"
                )));
            }
        };
        let metrics_key_file = self.metrics_key_file.as_deref();
        let metrics_key = metrics_key_file.map(|path| read("--metrics-key-file", path));
        self.metrics_key = metrics_key.transpose()?;
        Ok(self)
    }

    /// Returns where the admin listener listens.
    pub(super) fn listen(&self) -> AdminListen {
        self.admin_listen.listen.clone()
    }

    /// Returns which requests the admin listener accepts. Without [`resolve`](Self::resolve), the
    /// keys are missing.
    pub(super) fn config(self) -> AdminConfig {
        let mut hosts = self.admin_host;
        hosts.extend(self.admin_listen.host);
        AdminConfig {
            hosts,
            key: self.key,
            metrics_key: self.metrics_key,
            open: self.admin_open == Switch::On,
            max_reservations: self.max_reservations,
            dashboard: self.dashboard == Switch::On,
        }
    }
}

/// Parses a host name without a scheme and without a port.
fn host_name(text: &str) -> Result<String, String> {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if text.is_empty() || !text.bytes().all(is_part) {
        return Err("write a host name without http:// and without a port".to_owned());
    }
    Ok(text.to_owned())
}
