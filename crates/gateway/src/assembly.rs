//! Assembly of a gateway: builds its parts from its configuration, and gives each front end the parts
//! that it uses.

use std::sync::Arc;

use arc_swap::ArcSwap;
use foresee_core::queue::QueueOrder;
use foresee_core::retry_budget::RetryBudget;
use foresee_core::router::Router;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use crate::accept::ConnectionSettings;
use crate::access_log::AccessLog;
use crate::admin::{
    AdminApi, AdminConfig, AdminListen, AdminParts, Dashboard, DashboardFeed, DashboardParts,
};
use crate::client_headers::ClientHeaders;
use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::connection_limit::ConnectionLimit;
use crate::discovery;
use crate::failover::{FailoverContext, new_retry_budget};
use crate::fleet_demand::FleetDemand;
use crate::keys::KeyRing;
use crate::listen::default_max_connections;
use crate::metrics::Metrics;
use crate::own_responses::OwnResponses;
use crate::parse_pool::ParsePool;
use crate::placement::tokenization::PromptTokenizer;
use crate::placement::{Placement, PlacementConfig};
use crate::program::ProgramParts;
use crate::proxy::Proxy;
use crate::recorder::Recorder;
use crate::reload::{ConfigSource, ReloadParts, Reloader};
use crate::request_body::RequestBodies;
use crate::request_ids::RequestIds;
use crate::shutdown::ShutdownSignal;
use crate::state_file::StateFile;
use crate::tls::TlsTermination;
use crate::traces::Traces;
use crate::tracked_body::ResponseLimits;
use crate::workers::model_names::ModelNames;
use crate::workers::reconcile::Reconciler;
use crate::workers::removals::Removals;
use crate::workers::{Workers, WorkersConfig};

/// Writers of what happens to each request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writers {
    /// Writer of the recording.
    pub(crate) recorder: Option<Arc<Recorder>>,
    /// Writer of the access log.
    pub(crate) access_log: Option<Arc<AccessLog>>,
    /// Source of spans.
    pub(crate) traces: Option<Arc<Traces>>,
}

/// Parts of a gateway that stay the same while it runs.
#[derive(Clone, Debug)]
pub(crate) struct GatewayParts {
    pub(crate) router: Router,
    pub(crate) workers: Arc<Workers>,
    /// Names of models that clients can use.
    names: Arc<ModelNames>,
    placement: Arc<Placement>,
    metrics: Arc<Metrics>,
    /// Clock of all times that are passed to the router.
    pub(crate) clock: Clock,
    /// Drained workers that are to be removed.
    removals: Arc<Removals>,
    /// Writer of the access log.
    access_log: Option<Arc<AccessLog>>,
    /// Source of spans, if there is a collector.
    traces: Option<Arc<Traces>>,
    /// TLS of the listeners.
    pub(crate) tls: Arc<TlsTermination>,
    /// Keys of clients.
    keys: Arc<KeyRing>,
    bodies: Arc<RequestBodies>,
    parse_pool: Arc<ParsePool>,
    /// Limits how many requests are sent again after a worker failed them.
    retry_budget: Arc<Mutex<RetryBudget>>,
    request_ids: Arc<RequestIds>,
    /// Feed of requests to the dashboard; `None` without a dashboard.
    dashboard_feed: Option<DashboardFeed>,
    /// Shutdown of the API's listener.
    pub(crate) shutdown: Arc<ShutdownSignal>,
}

impl GatewayParts {
    /// Builds the parts on `router`, and starts the clock. The workers of the configuration are not
    /// added yet.
    pub(crate) fn new(
        config: &GatewayConfig,
        router: Router,
        metrics: Arc<Metrics>,
        tokenizer: Option<PromptTokenizer>,
        writers: Writers,
        tls: Arc<TlsTermination>,
    ) -> Self {
        let clock = Clock::start();
        let workers = Workers::new(
            workers_config(config),
            router.clone(),
            Arc::clone(&metrics),
            clock,
        );
        let workers = Arc::new(workers);
        let removals = Removals::new(Arc::clone(&workers), router.clone(), clock);
        let parse_pool = Arc::new(ParsePool::new());
        let names = ModelNames::new(Arc::clone(workers.registry()), &config.model_aliases);
        let names = Arc::new(names);
        let has_dashboard = config.admin.dashboard && config.admin_listen != AdminListen::Off;
        let dashboard_feed = has_dashboard.then(DashboardFeed::default);
        let placement = Placement::new(
            placement_config(config, tokenizer, writers.recorder, dashboard_feed.as_ref()),
            router.clone(),
            Arc::clone(workers.registry()),
            Arc::clone(&names),
            Arc::clone(&parse_pool),
            Arc::clone(&metrics),
            clock,
        );
        Self {
            access_log: writers.access_log,
            traces: writers.traces,
            tls,
            keys: Arc::new(KeyRing::new(
                config.keys.as_deref(),
                clock,
                Arc::clone(&metrics),
            )),
            router,
            workers,
            removals: Arc::new(removals),
            names,
            placement: Arc::new(placement),
            metrics,
            clock,
            bodies: Arc::new(RequestBodies::new(config.max_body_bytes, config.bodies)),
            parse_pool,
            retry_budget: Arc::new(Mutex::new(new_retry_budget())),
            request_ids: Arc::new(RequestIds::new()),
            dashboard_feed,
            shutdown: Arc::new(ShutdownSignal::new()),
        }
    }

    /// Returns the file of learned values, if there is one, after it was read. Must be called before
    /// workers are added.
    pub(crate) fn state_file(&self, config: &GatewayConfig) -> Option<Arc<StateFile>> {
        let path = config.state.clone()?;
        let (router, placement) = (self.router.clone(), Arc::clone(&self.placement));
        Some(Arc::new(StateFile::open(path, router, placement)))
    }

    /// Returns the proxy.
    pub(crate) fn proxy(&self, config: &GatewayConfig) -> Proxy {
        let is_fair = config.router.queue_order == Some(QueueOrder::FairByTenant);
        let registry = self.workers.registry();
        Proxy {
            placement: Arc::clone(&self.placement),
            metrics: Arc::clone(&self.metrics),
            clock: self.clock,
            own_responses: OwnResponses {
                router: self.router.clone(),
                names: Arc::clone(&self.names),
                shutdown: Arc::clone(&self.shutdown),
            },
            client_headers: ClientHeaders {
                trust: config.client_trust.clone(),
                tenant_header: is_fair.then(|| config.tenant_header.clone()),
                registry: Arc::clone(registry),
            },
            failover: FailoverContext {
                placement: Arc::clone(&self.placement),
                registry: Arc::clone(registry),
                router: self.router.clone(),
                metrics: Arc::clone(&self.metrics),
                clock: self.clock,
                retry_budget: Arc::clone(&self.retry_budget),
                first_byte_timeout: config.first_byte_timeout,
                min_first_byte_timeout: config.min_first_byte_timeout,
                exposes_workers: config.expose_worker_header,
            },
            keys: Arc::clone(&self.keys),
            access_log: self.access_log.clone(),
            traces: self.traces.clone(),
            policy: config.router.policy.to_string().into(),
            bodies: Arc::clone(&self.bodies),
            request_ids: Arc::clone(&self.request_ids),
            limits: Arc::new(ResponseLimits {
                idle_timeout: config.stream_idle_timeout,
                shutdown: Arc::clone(&self.shutdown),
            }),
            pass_through: config.pass_through.clone(),
            connect_timeout: config.connect_timeout,
            exposes_workers: config.expose_worker_header,
        }
    }

    /// Returns the reconciler of workers, and starts the tasks that follow the lists of workers.
    pub(crate) fn discovery(
        &self,
        config: &GatewayConfig,
    ) -> (Arc<Reconciler>, Vec<JoinHandle<()>>) {
        let (workers, removals) = (Arc::clone(&self.workers), Arc::clone(&self.removals));
        let reconciler = Reconciler::new(workers, removals, config.workers.clone());
        let reconciler = Arc::new(reconciler);
        let tasks = discovery::start(&config.discovery, &reconciler, &self.metrics);
        (reconciler, tasks)
    }

    /// Returns the reloader, which swaps `proxy` and `admin` for ones with the settings of another
    /// configuration.
    pub(crate) fn reloader(
        &self,
        config: GatewayConfig,
        source: Option<ConfigSource>,
        reconciler: Arc<Reconciler>,
        proxy: &Arc<ArcSwap<Proxy>>,
        admin: &Arc<ArcSwap<AdminConfig>>,
    ) -> Reloader {
        let (parts, proxy, admin) = (self.clone(), Arc::clone(proxy), Arc::clone(admin));
        let parts = ReloadParts {
            reconciler,
            router: self.router.clone(),
            metrics: Arc::clone(&self.metrics),
            tls: Arc::clone(&self.tls),
            access_log: self.access_log.clone(),
            apply_settings: Box::new(move |config| {
                parts.keys.replace(config.keys.as_deref());
                parts.names.set_aliases(&config.model_aliases);
                proxy.store(Arc::new(parts.proxy(config)));
                admin.store(Arc::new(config.admin.clone()));
            }),
        };
        Reloader::new(source, parts, config)
    }

    /// Returns the front ends of the admin listener, which accept requests by `admin`.
    pub(crate) fn admin_api(
        &self,
        config: &GatewayConfig,
        admin: Arc<ArcSwap<AdminConfig>>,
        reloader: Arc<Reloader>,
        program: ProgramParts,
        dashboard: Option<Arc<Dashboard>>,
    ) -> AdminApi {
        let parts = AdminParts {
            router: self.router.clone(),
            workers: Arc::clone(&self.workers),
            removals: Arc::clone(&self.removals),
            reloader,
            program,
            placement: Arc::clone(&self.placement),
            metrics: Arc::clone(&self.metrics),
            metrics_compat: config.metrics_compat,
            clock: self.clock,
            keys: Arc::clone(&self.keys),
            bodies: Arc::clone(&self.bodies),
            parse_pool: Arc::clone(&self.parse_pool),
            shutdown: Arc::clone(&self.shutdown),
        };
        let listen = config.admin_listen.clone();
        AdminApi::new(parts, admin, listen, config.max_body_bytes, dashboard)
    }

    /// Returns the dashboard, if there is one.
    pub(crate) fn dashboard(&self, reloader: &Arc<Reloader>) -> Option<Arc<Dashboard>> {
        let feed = self.dashboard_feed.clone()?;
        let parts = DashboardParts {
            router: self.router.clone(),
            workers: Arc::clone(&self.workers),
            metrics: Arc::clone(&self.metrics),
            reloader: Arc::clone(reloader),
            shutdown: Arc::clone(&self.shutdown),
            clock: self.clock,
        };
        Some(Arc::new(Dashboard::new(parts, feed)))
    }

    /// Returns the limits and the shutdown of the API's connections.
    pub(crate) fn connections(&self, config: &GatewayConfig) -> ConnectionSettings {
        let limit = ConnectionLimit::new(
            config
                .connections
                .max_connections
                .unwrap_or_else(default_max_connections),
            self.metrics.client_connections.clone(),
            self.metrics.refused_connections.clone(),
        );
        ConnectionSettings {
            config: config.connections,
            limit: Arc::new(limit),
            tls: Arc::clone(&self.tls),
            shutdown: Arc::clone(&self.shutdown),
        }
    }
}

/// Returns the settings of the workers.
fn workers_config(config: &GatewayConfig) -> WorkersConfig {
    WorkersConfig {
        block_size: config.router.block_size,
        prefix_caching: config.prefix_caching,
        key: config.worker_key.clone(),
        tls: config.worker_tls.clone(),
        health: config.health.clone(),
        probe_interval: config.probe_interval,
        dns: config.dns.clone(),
        events_grace: config.events_grace,
        engine_metrics_interval: config.engine_metrics_interval,
        connect_timeout: config.connect_timeout,
    }
}

/// Returns the settings of placement.
fn placement_config(
    config: &GatewayConfig,
    tokenizer: Option<PromptTokenizer>,
    recorder: Option<Arc<Recorder>>,
    dashboard: Option<&DashboardFeed>,
) -> PlacementConfig {
    PlacementConfig {
        block_size: config.router.block_size,
        has_queue: config.router.queue_order.is_some(),
        max_body_bytes: config.max_body_bytes,
        prefix_caching: config.prefix_caching,
        exposes_workers: config.expose_worker_header,
        probe_interval: config.probe_interval,
        dry_run: config.dry_run,
        tokenizer,
        recorder,
        demand: Arc::new(FleetDemand::new(
            config.autoscaling,
            config.router.block_size,
        )),
        decision_log: dashboard.map(|feed| Arc::clone(&feed.decisions)),
        ended_requests: dashboard.map(|feed| Arc::clone(&feed.ended)),
    }
}
