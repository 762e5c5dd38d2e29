//! `foresee serve`: runs the router.

mod admin_args;
mod client_args;
mod connections;
mod discovery_args;
mod health_args;
mod observability;
mod outlier;
mod service_manager;
mod settings;
mod tls_args;
mod watch;

use std::ffi::OsString;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use foresee_core::router::Router;
use foresee_core::workers::WorkerSpec;
use foresee_gateway::{
    ConfigSource, Gateway, GatewayConfig, InheritedListeners, ProgramParts, StartError,
    WorkerConfig, raise_open_file_limit,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(crate) use health_args::WorkerAccessArgs;
pub(crate) use settings::{PromptArgs, ServeArgs, WorkerArgs};

use crate::config_file::plain;
use crate::logging::ProcessLog;
use crate::{Command, InvalidConfiguration, parse};
use watch::FileWatch;

/// Checks the configuration and runs the router until a signal stops it. `args` must be
/// [resolved](ServeArgs::resolve), from `arguments`, which are parsed again at each reload. The admin API
/// can change the filter of `log`.
///
/// # Errors
/// If a setting is invalid, or the router cannot start.
pub(crate) fn serve(
    args: ServeArgs,
    arguments: Vec<OsString>,
    log: ProcessLog,
) -> anyhow::Result<()> {
    // Removes variables of the environment, so no other thread may run yet.
    let listeners = InheritedListeners::from_environment()
        .context("cannot use the sockets of LISTEN_FDS (socket activation)")?;
    let watch = args.watched_file().map(FileWatch::new);
    let config = args.gateway();
    check_settings(&config)?;
    let source: ConfigSource =
        Arc::new(move || read_config(arguments.clone()).map_err(|error| format!("{error:#}")));
    let program = ProgramParts {
        config_source: Some(source),
        log_filter: Some(Arc::new(log)),
    };
    let runtime = runtime()?;
    let result = runtime.block_on(run(listeners, config, program, watch));
    // A look-up of a host name that hangs occupies a thread, which must not delay the end.
    runtime.shutdown_background();
    result
}

/// Reads the configuration of `serve` from its arguments, the variables and the file, and checks it.
///
/// # Errors
/// If it cannot be read, or a setting is invalid.
fn read_config(arguments: Vec<OsString>) -> anyhow::Result<GatewayConfig> {
    let (cli, matches, tables) = parse(arguments)?;
    let (Command::Serve(args), Some((_, matches))) = (cli.command, matches.subcommand()) else {
        bail!("the arguments are not those of `serve`");
    };
    let args = args.resolve(matches, tables);
    let config = args
        .map_err(|error| anyhow!("{}", plain(&error)))?
        .gateway();
    check_settings(&config)?;
    Ok(config)
}

/// Checks settings that the parser of a single flag cannot check. The tokenizer, which takes long
/// to load, is not checked here.
///
/// # Errors
/// If a weight is out of range, the admin API would be open to other hosts, two workers have one
/// name, an API key of workers or a file of TLS cannot be used, or the program was built without a source
/// of workers.
pub(crate) fn check_settings(config: &GatewayConfig) -> anyhow::Result<()> {
    config.discovery.check().context(InvalidConfiguration)?;
    config.check_api_keys().context(InvalidConfiguration)?;
    config.check_tls().context(InvalidConfiguration)?;
    let router = Router::new(config.router.clone()).context(InvalidConfiguration)?;
    let admin = config
        .admin
        .check(&config.admin_listen, config.keys.as_deref());
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
/// process at once. SIGHUP and a change that `watch` notices reload the configuration.
/// Reports to the service manager, if there is one, that the gateway serves, reloads or stops.
///
/// # Errors
/// If the gateway cannot start. Errors of the tokenizer are marked as an invalid configuration.
async fn run(
    listeners: InheritedListeners,
    config: GatewayConfig,
    program: ProgramParts,
    mut watch: Option<FileWatch>,
) -> anyhow::Result<()> {
    let open_files = raise_open_file_limit().context("cannot raise the limit of open files")?;
    // A signal that arrives before its handler is installed ends the process, so the handlers are
    // installed before the router listens.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    if config.workers.is_empty() && !config.discovery.has_sources() {
        tracing::warn!("no worker is configured; add workers with POST /admin/workers");
    }
    let (workers, policy) = (config.workers.len(), config.router.policy);
    let (admin, keys) = (config.admin.clone(), config.keys.clone());
    let has_inherited_api = listeners.api.is_some();
    let gateway = Gateway::start_on(listeners, config, program).map_err(|error| match error {
        StartError::Tokenizer(_) => anyhow::Error::new(error).context(InvalidConfiguration),
        error => error.into(),
    })?;
    tracing::info!(
        api = %gateway.address(), admin = %gateway.admin_listen(),
        workers, %policy, open_files, socket_activation = has_inherited_api, "listening"
    );
    if admin.is_unprotected(gateway.admin_listen(), keys.as_deref()) {
        tracing::warn!(
            address = %gateway.admin_listen(),
            "admin API is open to other hosts without a key: every client that can connect can add \
             and remove workers; set --admin-key-file"
        );
    }
    service_manager::report_ready();
    loop {
        let changed = async {
            match &mut watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = either(&mut terminate, &mut interrupt) => break,
            _ = hang_up.recv() => {}
            () = changed => {}
        }
        service_manager::report_reloading();
        // The gateway logs the result.
        let _ = gateway.reload().await;
        service_manager::report_ready();
    }
    service_manager::report_stopping();
    tracing::info!("stopping; a second signal ends the router at once");
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
