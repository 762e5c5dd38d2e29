//! Flags of the discovery of workers.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use foresee_gateway::{DiscoveryConfig, Uri};

use crate::flags::{DEFAULTS, Switch};
use crate::values::positive_duration;

/// Lists of workers.
#[derive(Args, Debug)]
#[command(next_help_heading = "Discovery")]
pub(super) struct DiscoveryArgs {
    /// Names a file that lists workers, in the form of Prometheus's file_sd or of llm-d's endpoints
    ///
    /// The file is JSON or YAML and is read again when it changes: workers that it adds are added,
    /// and workers that it no longer lists are drained and removed. Labels that begin with foresee_
    /// are options of --worker: foresee_kv_events for kv-events.
    #[arg(
        long,
        value_name = "FILE",
        value_delimiter = ',',
        env = "FORESEE_DISCOVERY_FILE"
    )]
    discovery_file: Vec<PathBuf>,
    /// Names an http:// URL that lists workers, in the same forms
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        value_parser = list_url,
        env = "FORESEE_DISCOVERY_URL"
    )]
    discovery_url: Vec<Uri>,
    /// Sets the time between two requests to --discovery-url
    #[arg(
        long,
        default_value_t = DEFAULTS.discovery.refresh.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_DISCOVERY_REFRESH"
    )]
    discovery_refresh: humantime::Duration,
    /// Selects whether an empty list removes all workers of its source
    #[arg(
        long,
        default_value_t = Switch::Off,
        default_missing_value = "on",
        num_args = 0..=1,
        require_equals = true,
        value_name = "SWITCH",
        env = "FORESEE_DISCOVERY_ALLOW_EMPTY"
    )]
    discovery_allow_empty: Switch,
}

impl DiscoveryArgs {
    /// Returns the lists of workers.
    pub(super) fn config(self) -> DiscoveryConfig {
        DiscoveryConfig {
            files: self.discovery_file,
            urls: self.discovery_url,
            refresh: self.discovery_refresh.into(),
            allows_empty: self.discovery_allow_empty == Switch::On,
        }
    }
}

/// Parses the URL of a list.
fn list_url(text: &str) -> Result<Uri, String> {
    let url = Uri::from_str(text).ok();
    let is_http = |url: &Uri| url.scheme_str() == Some("http") && url.host().is_some();
    url.filter(is_http)
        .ok_or_else(|| format!("`{text}` is not an http:// URL, such as http://host:8000/targets"))
}
