//! The flags of `serve` for health checks and for requests to workers.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;
use foresee_gateway::{
    ApiKeySource, DnsConfig, HealthConfig, HealthMethod, HealthPath, WorkerKeyConfig,
    WorkerTlsConfig,
};

use super::tls_args::require_both;
use crate::flags::{DEFAULTS, Switch};
use crate::values::{Choice, positive_duration};

/// Environment variable with the API key of workers. There is no flag for the key, because other
/// users of a machine can read the arguments of a process.
const KEY_VARIABLE: &str = "FORESEE_WORKER_API_KEY";

/// Request, thresholds and time limit of health checks.
#[derive(Args, Debug)]
#[command(next_help_heading = "Health checks")]
pub(super) struct HealthArgs {
    /// Sets the path that health checks request, or none for servers without a health check
    ///
    /// With none, a worker counts as healthy until a request cannot connect to it, and again once
    /// it accepts a connection.
    #[arg(
        long,
        default_value_t = DEFAULTS.health.path.clone(),
        value_name = "PATH",
        env = "FORESEE_HEALTH_PATH"
    )]
    health_path: HealthPath,
    /// Selects the method of health checks
    #[arg(
        long,
        default_value_t = DEFAULTS.health.method,
        value_name = "METHOD",
        value_parser = Choice::new(HealthMethod::ALL.map(|(method, name)| (method, name, ""))),
        env = "FORESEE_HEALTH_METHOD"
    )]
    health_method: HealthMethod,
    /// Sets how many successful health checks in a row make a worker healthy again
    #[arg(
        long,
        default_value_t = DEFAULTS.health.healthy_threshold,
        value_name = "CHECKS",
        env = "FORESEE_HEALTHY_THRESHOLD"
    )]
    healthy_threshold: NonZeroU32,
    /// Sets how many failed health checks in a row make a worker unhealthy
    ///
    /// A refused connection of a request makes the worker unhealthy at once.
    #[arg(
        long,
        default_value_t = DEFAULTS.health.unhealthy_threshold,
        value_name = "CHECKS",
        env = "FORESEE_UNHEALTHY_THRESHOLD"
    )]
    unhealthy_threshold: NonZeroU32,
    /// Sets how long a worker may take to respond to a health check, such as 2s
    ///
    /// The same limit applies to each query of models, metrics and event sources.
    #[arg(
        long,
        default_value_t = DEFAULTS.health.timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_HEALTH_TIMEOUT"
    )]
    health_timeout: humantime::Duration,
}

impl HealthArgs {
    /// Returns the settings of health checks.
    pub(super) fn config(&self) -> HealthConfig {
        HealthConfig {
            path: self.health_path.clone(),
            method: self.health_method,
            healthy_threshold: self.healthy_threshold,
            unhealthy_threshold: self.unhealthy_threshold,
            timeout: self.health_timeout.into(),
        }
    }
}

/// API key and look-ups of workers.
#[derive(Args, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct WorkerAccessArgs {
    /// Names a file whose first line is the API key of the workers [default: no key]
    ///
    /// Health checks and queries of models, metrics and event sources carry the key. The file is
    /// read again while the router runs. A worker's option api-key overrides it for that
    /// worker. Without the file, the variable FORESEE_WORKER_API_KEY may contain the key itself.
    #[arg(long, value_name = "FILE", env = "FORESEE_WORKER_API_KEY_FILE")]
    worker_api_key_file: Option<PathBuf>,
    /// Selects whether requests of clients without an authorization header get the workers' key
    ///
    /// Every client then has access to the engines.
    #[arg(
        long,
        default_value_t = Switch::from(DEFAULTS.worker_key.for_clients),
        value_name = "SWITCH",
        env = "FORESEE_WORKER_API_KEY_FOR_CLIENTS"
    )]
    worker_api_key_for_clients: Switch,
    /// Names the file with the authorities that sign the certificates of https:// workers in PEM
    /// [default: the authorities of the system]
    #[arg(long, value_name = "FILE", env = "FORESEE_WORKER_TLS_CA")]
    worker_tls_ca: Option<PathBuf>,
    /// Names the file with the certificate chain in PEM that the router shows to https:// workers
    #[arg(long, value_name = "FILE", env = "FORESEE_WORKER_TLS_CERTIFICATE")]
    worker_tls_certificate: Option<PathBuf>,
    /// Names the file with the private key of --worker-tls-certificate in PEM
    #[arg(long, value_name = "FILE", env = "FORESEE_WORKER_TLS_KEY")]
    worker_tls_key: Option<PathBuf>,
    /// Sets the time between two look-ups of a worker's host name, such as 30s
    ///
    /// Each address of a name becomes a worker. If a look-up fails, the last addresses stay in use.
    #[arg(
        long,
        default_value_t = DEFAULTS.dns.refresh.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_DNS_REFRESH"
    )]
    dns_refresh: humantime::Duration,
}

impl WorkerAccessArgs {
    /// Returns the settings of the workers' API key. Without a file, the key is that of the variable
    /// [`KEY_VARIABLE`], if it is set and not empty.
    pub(crate) fn key_config(&self) -> WorkerKeyConfig {
        let file = self.worker_api_key_file.clone().map(ApiKeySource::File);
        let value = || {
            let key = std::env::var(KEY_VARIABLE).ok();
            key.filter(|key| !key.is_empty()).map(ApiKeySource::Value)
        };
        WorkerKeyConfig {
            source: file.or_else(value),
            for_clients: self.worker_api_key_for_clients == Switch::On,
        }
    }

    /// Checks that the certificate and its key are named together.
    ///
    /// # Errors
    /// If one of them is missing.
    pub(crate) fn check(&self) -> Result<(), clap::Error> {
        let certificate = self.worker_tls_certificate.is_some();
        let key = self.worker_tls_key.is_some();
        require_both(
            ("--worker-tls-certificate", certificate),
            ("--worker-tls-key", key),
        )
    }

    /// Returns the files of TLS of workers that name none.
    pub(crate) fn tls_config(&self) -> WorkerTlsConfig {
        let certificate = self.worker_tls_certificate.clone();
        WorkerTlsConfig {
            ca: self.worker_tls_ca.clone(),
            identity: certificate.zip(self.worker_tls_key.clone()),
            ..WorkerTlsConfig::default()
        }
    }

    /// Returns the settings of look-ups of host names.
    pub(crate) fn dns_config(&self) -> DnsConfig {
        DnsConfig {
            refresh: self.dns_refresh.into(),
            ..DEFAULTS.dns.clone()
        }
    }
}
