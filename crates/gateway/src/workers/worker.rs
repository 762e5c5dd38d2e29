//! The gateway's record of one worker: how requests reach it, and what it reported about itself.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use foresee_api::admin::Health;
use foresee_core::router::Router;
use foresee_core::workers::WorkerId;
use http::uri::PathAndQuery;
use http::{HeaderValue, Uri};
use tokio::sync::{Notify, watch};

use crate::kv_events::source::{EventSource, KvEvents};
use crate::kv_events::status::EventStatus;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::workers::address::WorkerAddress;
use crate::workers::api_key::{WorkerKey, WorkerKeyConfig};
use crate::workers::engine_reports::EngineReports;
use crate::workers::health_record::HealthRecord;
use crate::workers::liveness::Liveness;
use crate::workers::model_list::ModelList;
use crate::workers::worker_config::WorkerConfig;
use crate::workers::worker_tls::{WorkerTls, WorkerTlsConfig, WorkerTlsFiles};

/// Header that pins a request to one data-parallel rank of an engine, for vLLM and SGLang alike.
pub(crate) const RANK_HEADER: &str = "x-data-parallel-rank";

/// One worker: how requests reach it and what it reported about itself.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Id in the router.
    pub(crate) id: WorkerId,
    /// Configuration, with defaults filled in.
    pub(crate) config: WorkerConfig,
    /// Where connections go.
    pub(crate) address: WorkerAddress,
    /// API key of the gateway's own requests.
    pub(crate) key: WorkerKey,
    /// Results of the health checks.
    pub(crate) health: HealthRecord,
    /// Value of the response header that names this worker.
    pub(crate) header: HeaderValue,
    /// Value of [`RANK_HEADER`] for requests to this worker; `None` if its address has no ranks.
    pub(crate) rank_header: Option<HeaderValue>,
    /// Models that the worker serves.
    pub(crate) models: ModelList,
    /// Signs of life of the worker's process.
    pub(crate) liveness: Liveness,
    /// What the engine reports about its cache.
    pub(crate) reports: EngineReports,
    /// Requests a health check before the next interval.
    pub(crate) probe_now: Notify,
    /// Status of the worker's KV events.
    pub(crate) events: EventStatus,
    /// Where the worker publishes KV events, as configured or discovered.
    pub(crate) event_source: watch::Sender<Option<EventSource>>,
    /// Requests a new connection to the worker's KV events, because the worker was unreachable.
    pub(crate) resubscribe: Notify,
    /// TLS of connections to the worker; `None` for plain HTTP.
    pub(super) tls_files: Option<Arc<WorkerTlsFiles>>,
    /// Whether the router had ejected the worker when that was last noted.
    is_ejected: AtomicBool,
    /// Whether the worker was removed, which ends its tasks.
    removed: watch::Sender<bool>,
}

impl Worker {
    /// Returns a worker without models that was not heard of yet. `default_key` is its key unless
    /// `config` names one, and `default_tls` has the files of its TLS.
    pub(super) fn new(
        id: WorkerId,
        config: WorkerConfig,
        default_key: &WorkerKeyConfig,
        default_tls: &WorkerTlsConfig,
    ) -> Self {
        let tls_files = config.tls.as_ref().map(|tls| {
            if !tls.verifies {
                tracing::warn!(
                    worker = %config.name,
                    "the worker's certificate is not verified: another server can take its place"
                );
            }
            let files = WorkerTlsFiles::load(tls.or(default_tls), config.host());
            Arc::new(files)
        });
        Self {
            id,
            tls_files,
            header: config.header(),
            rank_header: config.rank.map(HeaderValue::from),
            event_source: watch::Sender::new(match &config.kv_events {
                KvEvents::At(source) => Some(source.clone()),
                KvEvents::Discovered | KvEvents::Off => None,
            }),
            address: WorkerAddress::new(&config),
            key: WorkerKey::load(config.api_key.clone(), default_key, &config.name),
            health: HealthRecord::default(),
            config,
            models: ModelList::default(),
            liveness: Liveness::default(),
            reports: EngineReports::default(),
            probe_now: Notify::new(),
            events: EventStatus::default(),
            resubscribe: Notify::new(),
            is_ejected: AtomicBool::new(false),
            removed: watch::Sender::new(false),
        }
    }

    /// Returns the TLS of connections to the worker; `None` for plain HTTP.
    ///
    /// # Errors
    /// Fails with a text if the files cannot be used.
    pub(crate) fn tls(&self) -> Result<Option<Arc<WorkerTls>>, String> {
        let files = self.tls_files.as_ref();
        files.map(|files| files.in_force()).transpose()
    }

    /// Returns the configured capacity or else the reported one, in engine blocks; `None` if neither
    /// is known.
    pub(crate) fn capacity_blocks(&self) -> Option<u32> {
        self.config.blocks.or(self.reports.capacity_blocks())
    }

    /// Returns the results of the health checks as the admin API shows them.
    pub(crate) fn health_status(&self) -> Health {
        self.health.status(Instant::now(), self.next_check_in())
    }

    /// Returns the time until the next health check; zero if one is running or overdue.
    pub(crate) fn next_check_in(&self) -> Duration {
        self.health.next_check_in(Instant::now())
    }

    /// Returns the `authorization` of a client's request that has none; `None` unless the
    /// configuration shares the worker's key with clients.
    pub(crate) fn authorization_for_clients(&self, is_shared: bool) -> Option<HeaderValue> {
        self.key.authorization_for_clients(is_shared)
    }

    /// Sends later connections to `ip`, one of the addresses of the worker's host name, those to
    /// KV events included if they have the same host.
    pub(crate) fn resolve_to(&self, ip: IpAddr) {
        self.address.resolve_to(ip);
        if let KvEvents::At(source) = &self.config.kv_events {
            let host = self.config.authority.host();
            let source = Some(source.with_host(host, &self.address.url_host()));
            self.event_source.send_if_modified(|known| {
                let is_new = *known != source;
                *known = source;
                is_new
            });
        }
    }

    /// Compares the worker's ejection in the router with the last one that was noted, and logs and
    /// counts a change.
    pub(crate) fn note_ejection(&self, router: &Router, metrics: &Metrics) {
        let is_ejected = router.is_ejected(self.id);
        if self.is_ejected.swap(is_ejected, Ordering::Relaxed) == is_ejected {
            return;
        }
        let name = &self.config.name;
        if is_ejected {
            let label = [("worker", name.clone())];
            metrics.worker_ejections.get_or_create(&label).inc();
            warn_limited!(
                key: name, worker = %name,
                "worker ejected: it fails more often than its peers; one request at a time is sent as \
                 a trial. Read the engine's log"
            );
        } else {
            tracing::info!(worker = %name, "worker is no longer ejected");
        }
    }

    /// Returns whether the worker was ejected when that was last noted.
    pub(crate) fn was_ejected(&self) -> bool {
        self.is_ejected.load(Ordering::Relaxed)
    }

    /// Marks the worker as removed, which ends its tasks.
    pub(crate) fn remove(&self) {
        self.removed.send_replace(true);
    }

    /// Returns whether the worker is removed.
    pub(crate) fn is_removed(&self) -> bool {
        *self.removed.borrow()
    }

    /// Waits until the worker is removed.
    pub(crate) async fn until_removed(&self) {
        let mut removed = self.removed.subscribe();
        // The worker owns the sender, so waiting does not fail.
        let _ = removed.wait_for(|removed| *removed).await;
    }

    /// Returns the URL of a request on a connection to the worker, for a path and query of a request
    /// to the gateway: the base path of the worker's URL is put before `path`. Fails if the result is
    /// not a valid URL.
    pub(crate) fn uri(&self, path: &PathAndQuery) -> Result<Uri, http::Error> {
        let base_path = &self.config.base_path;
        Ok(match base_path.is_empty() {
            true => path.clone().into(),
            false => format!("{base_path}{path}").parse()?,
        })
    }
}
