//! Flags of TLS on the listeners.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use foresee_gateway::{ClientAuth, GatewayConfig, TlsConfig};

use crate::flags::Switch;

/// A flag, and whether it has a value.
type Given = (&'static str, bool);

/// Checks that a flag has a value if another one has.
///
/// # Errors
/// If only the first one has.
fn require(given: Given, needed: Given) -> Result<(), clap::Error> {
    if !given.1 || needed.1 {
        return Ok(());
    }
    let message = format!("{} needs {}", given.0, needed.0);
    let mut command = crate::Cli::command();
    Err(command.error(ErrorKind::MissingRequiredArgument, message))
}

/// Checks that two flags have values together.
///
/// # Errors
/// If only one of them has.
pub(super) fn require_both(first: Given, second: Given) -> Result<(), clap::Error> {
    require(first, second).and_then(|()| require(second, first))
}

/// Which clients need a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ClientAuthName {
    /// A client may have a certificate
    Optional,
    /// Every client needs a certificate
    Required,
}

/// TLS of the listeners.
#[derive(Args, Debug)]
#[command(next_help_heading = "TLS")]
pub(super) struct TlsArgs {
    /// Names the file with the certificate chain of the API in PEM; needs --tls-key
    ///
    /// The files of TLS are read again when they change. New ones apply to new connections, if the
    /// key belongs to the certificate.
    #[arg(long, value_name = "FILE", env = "FORESEE_TLS_CERTIFICATE")]
    tls_certificate: Option<PathBuf>,
    /// Names the file with the private key of the certificate in PEM
    #[arg(long, value_name = "FILE", env = "FORESEE_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Names the file with the authorities that sign clients' certificates in PEM
    #[arg(long, value_name = "FILE", env = "FORESEE_TLS_CLIENT_CA")]
    tls_client_ca: Option<PathBuf>,
    /// Selects whether clients need a certificate, with --tls-client-ca
    #[arg(
        long,
        value_name = "MODE",
        default_value = "required",
        env = "FORESEE_TLS_CLIENT_AUTH"
    )]
    tls_client_auth: ClientAuthName,
    /// Selects whether the admin listener has the TLS of the API, too
    #[arg(
        long,
        default_value_t = Switch::Off,
        default_missing_value = "on",
        num_args = 0..=1,
        require_equals = true,
        value_name = "SWITCH",
        env = "FORESEE_ADMIN_TLS"
    )]
    admin_tls: Switch,
}

impl TlsArgs {
    /// Checks that files which belong together are named together. Flags, variables and the
    /// configuration file may each name some of them, so the parser of the flags cannot check it.
    ///
    /// # Errors
    /// If one of them is missing.
    pub(super) fn check(&self) -> Result<(), clap::Error> {
        let certificate = ("--tls-certificate", self.tls_certificate.is_some());
        let key = ("--tls-key", self.tls_key.is_some());
        require_both(certificate, key)?;
        match self.tls_client_ca.is_some() {
            true => require(("--tls-client-ca", true), certificate),
            false => Ok(()),
        }
    }

    /// Sets the fields of a gateway's configuration that these flags are about.
    pub(super) fn apply(self, config: &mut GatewayConfig) {
        let files = self.tls_certificate.zip(self.tls_key);
        config.tls = files.map(|(certificate, key)| TlsConfig {
            certificate,
            key,
            client_ca: self.tls_client_ca,
            client_auth: match self.tls_client_auth {
                ClientAuthName::Optional => ClientAuth::Optional,
                ClientAuthName::Required => ClientAuth::Required,
            },
        });
        config.admin_tls = self.admin_tls == Switch::On;
    }
}
