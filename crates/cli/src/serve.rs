//! `foresee serve`: runs the router.

mod settings;

use anyhow::Context;
use foresee_gateway::{Gateway, GatewayConfig, StartError, raise_open_file_limit};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use settings::{PromptArgs, ServeArgs, WorkerArgs};

use crate::InvalidConfiguration;
use crate::check_config::check;

/// Checks the configuration and runs the router until a signal stops it. `args` must be
/// [resolved](ServeArgs::resolve).
///
/// # Errors
/// If a setting is invalid, or the router cannot start.
pub(crate) fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.gateway();
    check(&config)?;
    runtime()?.block_on(run(config))
}

/// Starts the gateway and waits for SIGTERM or SIGINT, then for running requests. A later SIGINT
/// ends that wait and aborts the requests.
///
/// # Errors
/// If the gateway cannot start. Errors of the tokenizer are marked as an invalid configuration.
async fn run(config: GatewayConfig) -> anyhow::Result<()> {
    let open_files = raise_open_file_limit().context("cannot raise the limit of open files")?;
    // A signal that arrives before its handler is installed ends the process, so the handlers are
    // installed before the router listens.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    if config.workers.is_empty() {
        tracing::warn!("no worker is configured; add workers with POST /admin/workers");
    }
    let (workers, policy) = (config.workers.len(), config.router.policy);
    let gateway = Gateway::start(config).map_err(|error| match error {
        StartError::Tokenizer(_) => anyhow::Error::new(error).context(InvalidConfiguration),
        error => error.into(),
    })?;
    tracing::info!(
        api = %gateway.address(), admin = %gateway.admin_address(),
        workers, %policy, open_files, "listening"
    );
    if !gateway.admin_address().ip().is_loopback() {
        tracing::warn!(
            address = %gateway.admin_address(),
            "admin API is reachable without authentication: anyone who can connect can add or \
             remove workers"
        );
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: accepting no new requests, waiting for running requests");
    tokio::select! {
        () = gateway.shut_down() => {}
        _ = interrupt.recv() => tracing::warn!("interrupted while stopping: aborting running requests"),
    }
    Ok(())
}

/// Returns the async runtime of a subcommand that serves or sends requests.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}
