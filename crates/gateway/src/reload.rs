//! Reload: applies a new configuration to a running gateway, all of it or nothing.
//!
//! Workers of the configuration are added, replaced and drained, and settings of requests apply to the
//! requests that arrive afterwards. Workers that were added over HTTP stay. Settings that only a
//! restart applies are named in the report, and keep their values. [`changes`] compares two
//! configurations and shows the one in force.

pub(crate) mod changes;
mod shown_setting;

use std::fmt;
use std::sync::Arc;

use foresee_api::admin::Reload;
use foresee_core::router::Router;
use parking_lot::Mutex;

use crate::access_log::AccessLog;
use crate::clock::since_epoch;
use crate::config::GatewayConfig;
use crate::metrics::Metrics;
use crate::tls::{TlsError, TlsTermination};
use crate::workers::reconcile::{AddError, Reconciler, Source};
use crate::workers::worker_config::WorkerConfig;
use changes::SettingChanges;

/// Reads the configuration anew, from the same flags, variables and files as at the start. The error
/// is a text for the operator.
pub type ConfigSource = Arc<dyn Fn() -> Result<GatewayConfig, String> + Send + Sync>;

/// Why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The gateway was started without a [`ConfigSource`].
    #[error("the router was started without a configuration that can be read again")]
    NoSource,
    /// The configuration cannot be read or is invalid.
    #[error("{0}")]
    Invalid(String),
    /// A worker cannot be added.
    #[error(transparent)]
    Worker(#[from] AddError),
}

/// Applies the settings of requests and of the admin listener.
pub(crate) type ApplySettings = Box<dyn Fn(&GatewayConfig) + Send + Sync>;

/// Parts of a gateway that a reload changes.
pub(crate) struct ReloadParts {
    pub(crate) reconciler: Arc<Reconciler>,
    pub(crate) router: Router,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tls: Arc<TlsTermination>,
    pub(crate) access_log: Option<Arc<AccessLog>>,
    pub(crate) apply_settings: ApplySettings,
}

/// Applies new configurations, one at a time.
pub(crate) struct Reloader {
    source: Option<ConfigSource>,
    parts: ReloadParts,
    /// Locked during a reload.
    reloading: Mutex<()>,
    /// The configuration in force. Never locked while a file is read.
    in_force: Mutex<GatewayConfig>,
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloader").finish_non_exhaustive()
    }
}

impl Reloader {
    /// Creates the reloader of a gateway that started with `config`.
    pub(crate) fn new(
        source: Option<ConfigSource>,
        parts: ReloadParts,
        config: GatewayConfig,
    ) -> Self {
        record_success(&parts.metrics);
        Self {
            source,
            parts,
            reloading: Mutex::default(),
            in_force: Mutex::new(config),
        }
    }

    /// Returns a value of the configuration in force.
    pub(crate) fn in_force<T>(&self, read: impl FnOnce(&GatewayConfig) -> T) -> T {
        read(&self.in_force.lock())
    }

    /// Reads the configuration and applies it. The result is logged. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// Fails if the configuration cannot be read or is invalid, or if a worker cannot be added. Then
    /// nothing changes.
    pub(crate) async fn reload(self: &Arc<Self>) -> Result<Reload, ReloadError> {
        // Reads files, and waits for another reload.
        let reloader = Arc::clone(self);
        let reload = tokio::task::spawn_blocking(move || reloader.reload_blocking());
        let result = reload.await;
        result.unwrap_or_else(|error| Err(ReloadError::Invalid(error.to_string())))
    }

    /// As [`reload`](Self::reload), on the present thread.
    fn reload_blocking(&self) -> Result<Reload, ReloadError> {
        let _reloading = self.reloading.lock();
        // A program that rotates the log asks for it by a reload, whatever the configuration is.
        if let Some(log) = &self.parts.access_log {
            log.reopen();
        }
        let source = self.source.as_ref().ok_or(ReloadError::NoSource)?;
        let mut config = self.in_force.lock().clone();
        let new = source().map_err(ReloadError::Invalid);
        let result = new.and_then(|new| self.apply(&mut config, new));
        if result.is_ok() {
            *self.in_force.lock() = config;
        }
        match &result {
            Ok(reload) => {
                record_success(&self.parts.metrics);
                tracing::info!(
                    changed = %reload.changed.join(","),
                    needs_restart = %reload.needs_restart.join(","),
                    workers_added = reload.workers_added.len(),
                    workers_replaced = reload.workers_replaced.len(),
                    workers_removed = reload.workers_removed.len(),
                    "reloaded the configuration"
                );
            }
            Err(error) => {
                self.parts.metrics.config_last_reload_successful.set(0);
                tracing::error!(%error, "cannot reload the configuration; nothing changed");
            }
        }
        result
    }

    /// Applies `new` and makes it the configuration in force, apart from the settings that need a
    /// restart.
    fn apply(
        &self,
        in_force: &mut GatewayConfig,
        new: GatewayConfig,
    ) -> Result<Reload, ReloadError> {
        let invalid = |error: &dyn fmt::Display| ReloadError::Invalid(error.to_string());
        new.check_api_keys().map_err(|error| invalid(&error))?;
        let protection = new.admin.check(&in_force.admin_listen, new.keys.as_deref());
        protection.map_err(|error| invalid(&error))?;
        // Whether the admin listener has TLS is not reloaded, but its certificate is.
        if in_force.admin_tls && new.tls.is_none() {
            return Err(invalid(&TlsError::NoAdminCertificate));
        }
        let tuning = new.router_tuning();
        tuning.check().map_err(|error| invalid(&error))?;

        let loaded_tls = new.load_tls().map_err(|error| invalid(&error))?;

        let reconciler = &self.parts.reconciler;
        let workers = reconciler.reconcile(&Source::Config, new.workers.clone())?;
        let settings = SettingChanges::between(in_force, &new);
        // The ranges are checked above.
        let _ = self.parts.router.set_tuning(tuning);
        self.parts.tls.install(new.tls.clone(), loaded_tls);
        (self.parts.apply_settings)(&new);
        in_force.take_live_settings(&new);
        Ok(Reload {
            changed: settings.live,
            needs_restart: settings.fixed,
            workers_added: names(&workers.added),
            workers_replaced: names(workers.replaced.iter().map(|(_, new)| new)),
            workers_removed: names(&workers.removed),
        })
    }
}

/// Returns the names of engines.
fn names<'a>(engines: impl IntoIterator<Item = &'a WorkerConfig>) -> Vec<String> {
    let engines = engines.into_iter();
    engines.map(|engine| engine.name.clone()).collect()
}

/// Records that the configuration in force is the one that was read last.
fn record_success(metrics: &Metrics) {
    metrics.config_last_reload_successful.set(1);
    metrics
        .config_last_reload_success_timestamp_seconds
        .set(since_epoch().as_secs_f64());
}
