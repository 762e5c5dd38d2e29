//! The flags of `serve` about clients: which paths they reach, what their headers may say, and what
//! they see of the workers.

use clap::Args;
use foresee_gateway::{ClientTrust, GatewayConfig, IpNet, ModelAlias, PassThroughPath};

use crate::flags::Switch;

/// Rights of clients: paths, control headers, and the names of workers.
#[derive(Args, Debug)]
#[command(next_help_heading = "Clients")]
pub(crate) struct ClientArgs {
    /// Adds a path that reaches a worker, besides the inference paths; a `*` at its end adds a prefix
    ///
    /// Requests to such a path are routed by load alone and are not sent again after a failure. Never
    /// add control paths of engines to a listener that clients can reach.
    #[arg(
        long,
        value_name = "PATH",
        env = "FORESEE_PASS_THROUGH",
        value_delimiter = ','
    )]
    pass_through: Vec<PassThroughPath>,
    /// Adds a name under which clients can request a model, or one of several by weight; may be repeated
    ///
    /// The request is sent with the model's name, and the response names the alias. In
    /// `fast=llama-3:90,llama-4:10`, one of ten requests goes to the second model; all requests of a
    /// session go to the same one. A model that no worker lists gets none. An alias may have the name
    /// of a model. In FORESEE_MODEL_ALIAS, semicolons separate aliases.
    #[arg(
        long,
        value_name = "NAME=MODEL[:WEIGHT,MODEL:WEIGHT...]",
        env = "FORESEE_MODEL_ALIAS",
        value_delimiter = ';'
    )]
    model_alias: Vec<ModelAlias>,
    /// Names the networks of proxies whose X-Forwarded-* headers are kept, such as 10.0.0.0/8
    #[arg(
        long,
        value_name = "NETWORK",
        env = "FORESEE_TRUSTED_PROXIES",
        value_delimiter = ','
    )]
    trusted_proxies: Vec<IpNet>,
    /// Selects whether headers of clients may raise a priority, name a rank or predict an output
    ///
    /// If off, `x-foresee-priority` can only lower a priority, and the other control headers are
    /// ignored and removed. Switch it on only if all clients are trusted.
    #[arg(
        long,
        default_value_t = Switch::Off,
        value_name = "SWITCH",
        env = "FORESEE_TRUST_CLIENT_HEADERS"
    )]
    trust_client_headers: Switch,
    /// Selects whether clients see worker names: in x-foresee-worker, and in error messages
    ///
    /// The name of a worker is its address unless the worker has a name= of its own.
    #[arg(
        long,
        default_value_t = Switch::Off,
        value_name = "SWITCH",
        env = "FORESEE_EXPOSE_WORKER_HEADER",
        num_args = 0..=1,
        default_missing_value = "on"
    )]
    expose_worker_header: Switch,
}

impl ClientArgs {
    /// Sets the fields of a gateway's configuration that these flags are about.
    pub(crate) fn apply(self, config: &mut GatewayConfig) {
        config.pass_through = self.pass_through;
        config.model_aliases = self.model_alias;
        config.client_trust = ClientTrust {
            control_headers: self.trust_client_headers == Switch::On,
            proxies: self.trusted_proxies,
        };
        config.expose_worker_header = self.expose_worker_header == Switch::On;
    }
}
