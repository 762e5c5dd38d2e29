//! `foresee serve`: runs the router.

mod admin_args;
mod client_args;
mod connections;
mod health_args;
mod outlier;
mod settings;

use anyhow::Context;
use foresee_core::router::Router;
use foresee_core::workers::WorkerSpec;
use foresee_gateway::{
    Gateway, GatewayConfig, InheritedListeners, StartError, WorkerConfig, raise_open_file_limit,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(crate) use health_args::WorkerAccessArgs;
pub(crate) use settings::{PromptArgs, ServeArgs, WorkerArgs};

use crate::InvalidConfiguration;

/// Checks the configuration and runs the router until a signal stops it. `args` must be
/// [resolved](ServeArgs::resolve).
///
/// # Errors
/// If a setting is invalid, or the router cannot start.
pub(crate) fn serve(args: ServeArgs) -> anyhow::Result<()> {
    // Removes variables of the environment, so no other thread may run yet.
    let listeners = InheritedListeners::from_environment()
        .context("cannot use the sockets of LISTEN_FDS (socket activation)")?;
    let config = args.gateway();
    check_settings(&config)?;
    let runtime = runtime()?;
    let result = runtime.block_on(run(listeners, config));
    // A look-up of a host name that hangs occupies a thread, which must not delay the end.
    runtime.shutdown_background();
    result
}

/// Checks settings that the parser of a single flag cannot check. The tokenizer, which takes long
/// to load, is not checked here.
///
/// # Errors
/// If a weight is out of range, the admin API would be open to other hosts, two workers have one
/// name, or an API key of workers cannot be read.
pub(crate) fn check_settings(config: &GatewayConfig) -> anyhow::Result<()> {
    config.check_api_keys().context(InvalidConfiguration)?;
    let router = Router::new(config.router.clone()).context(InvalidConfiguration)?;
    let admin = config.admin.check(&config.admin_listen);
    admin.context(InvalidConfiguration)?;
    for worker in config.workers.iter().flat_map(WorkerConfig::workers) {
        let spec = WorkerSpec {
            name: worker.name,
            ..WorkerSpec::default()
        };
        router.add_worker(spec).context(InvalidConfiguration)?;
    }
    Ok(())
}

/// Starts the gateway and waits for SIGTERM or SIGINT, then for the shutdown. A second signal ends the
/// process at once.
///
/// # Errors
/// If the gateway cannot start. Errors of the tokenizer are marked as an invalid configuration.
async fn run(listeners: InheritedListeners, config: GatewayConfig) -> anyhow::Result<()> {
    let open_files = raise_open_file_limit().context("cannot raise the limit of open files")?;
    // A signal that arrives before its handler is installed ends the process, so the handlers are
    // installed before the router listens.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    if config.workers.is_empty() {
        tracing::warn!("no worker is configured; add workers with POST /admin/workers");
    }
    let (workers, policy) = (config.workers.len(), config.router.policy);
    let admin = config.admin.clone();
    let has_inherited_api = listeners.api.is_some();
    let (delay, limit) = (config.shutdown.delay, config.shutdown_timeout);
    let gateway = Gateway::start_on(listeners, config).map_err(|error| match error {
        StartError::Tokenizer(_) => anyhow::Error::new(error).context(InvalidConfiguration),
        error => error.into(),
    })?;
    tracing::info!(
        api = %gateway.address(), admin = %gateway.admin_listen(),
        workers, %policy, open_files, socket_activation = has_inherited_api, "listening"
    );
    if admin.is_unprotected(gateway.admin_listen()) {
        tracing::warn!(
            address = %gateway.admin_listen(),
            "admin API is open to other hosts without a key: every client that can connect can add \
             and remove workers; set --admin-key-file"
        );
    }
    either(&mut terminate, &mut interrupt).await;
    tracing::info!(
        accepting_for = ?delay, waiting_for = ?limit,
        "stopping: readiness checks fail now; a second signal ends the router at once"
    );
    tokio::select! {
        () = gateway.shut_down() => {}
        () = either(&mut terminate, &mut interrupt) => {
            tracing::warn!("second signal while stopping: aborting running requests");
        }
    }
    Ok(())
}

/// Waits for one of two signals.
async fn either(first: &mut Signal, second: &mut Signal) {
    tokio::select! {
        _ = first.recv() => {}
        _ = second.recv() => {}
    }
}

/// Returns the async runtime of a subcommand that serves or sends requests.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}
