//! The flags of `serve` for clients' connections, request bodies and the shutdown.

use clap::Args;
use foresee_gateway::{ConnectionConfig, GatewayConfig, RequestBodyConfig, ShutdownConfig};

use crate::flags::DEFAULTS;
use crate::values::{Size, duration, positive_duration};

/// Deadlines and bounds of clients' connections.
#[derive(Args, Debug)]
#[command(next_help_heading = "Client connections")]
pub(crate) struct ConnectionArgs {
    /// Sets the maximum number of client connections; further ones get a 503 [default: half of the
    /// open-file limit]
    ///
    /// The default is (limit - 256) / 2, because each connection may need one to a worker.
    #[arg(long, value_name = "CONNECTIONS", env = "FORESEE_MAX_CONNECTIONS")]
    max_connections: Option<usize>,
    /// Sets how long a client may take for the head of a request
    #[arg(
        long,
        default_value_t = DEFAULTS.connections.head_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_CLIENT_HEAD_TIMEOUT"
    )]
    client_head_timeout: humantime::Duration,
    /// Sets how long a client connection may be idle between requests
    ///
    /// Use more than the idle timeout of the load balancer in front, which must close idle
    /// connections first.
    #[arg(
        long,
        default_value_t = DEFAULTS.connections.idle_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_CLIENT_IDLE_TIMEOUT"
    )]
    client_idle_timeout: humantime::Duration,
    /// Sets how long a client may read nothing of a response that is ready for it
    #[arg(
        long,
        default_value_t = DEFAULTS.connections.write_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_CLIENT_WRITE_TIMEOUT"
    )]
    client_write_timeout: humantime::Duration,
    /// Sets how long a client may send nothing in the middle of a request body
    #[arg(
        long,
        default_value_t = DEFAULTS.bodies.idle_timeout.into(),
        value_name = "DURATION",
        value_parser = positive_duration,
        env = "FORESEE_BODY_IDLE_TIMEOUT"
    )]
    body_idle_timeout: humantime::Duration,
    /// Sets the maximum memory of all request bodies together, such as 2GiB; further requests get a
    /// 503
    #[arg(
        long,
        default_value_t = Size(DEFAULTS.bodies.max_bytes_in_flight),
        value_name = "SIZE",
        env = "FORESEE_MAX_BODY_BYTES_IN_FLIGHT"
    )]
    max_body_bytes_in_flight: Size,
    /// Sets how long the router accepts connections after SIGTERM, while its readiness checks fail
    ///
    /// Load balancers need this time to notice. Use 0s with socket activation.
    #[arg(
        long,
        default_value_t = DEFAULTS.shutdown.delay.into(),
        value_name = "DURATION",
        value_parser = duration,
        env = "FORESEE_SHUTDOWN_DELAY"
    )]
    shutdown_delay: humantime::Duration,
}

impl ConnectionArgs {
    /// Returns `config` with these settings.
    pub(crate) fn apply_to(self, config: GatewayConfig) -> GatewayConfig {
        GatewayConfig {
            connections: ConnectionConfig {
                head_timeout: self.client_head_timeout.into(),
                idle_timeout: self.client_idle_timeout.into(),
                write_timeout: self.client_write_timeout.into(),
                max_connections: self.max_connections,
            },
            bodies: RequestBodyConfig {
                idle_timeout: self.body_idle_timeout.into(),
                max_bytes_in_flight: self.max_body_bytes_in_flight.0,
            },
            shutdown: ShutdownConfig {
                delay: self.shutdown_delay.into(),
            },
            ..config
        }
    }
}
