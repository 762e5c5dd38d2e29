//! Workers: which there are, whether they are alive, and what they report about themselves.
//!
//! [`Workers`] is the façade for front ends, which add and remove workers; all other parts take the
//! [registry](registry::WorkerRegistry), the list of workers. From a worker's start to its removal,
//! `tasks` check its health (`health`), resolve its host name (`resolve`), read what its engine
//! reports ([`worker_info`](crate::worker_info), [`engine_metrics`](crate::engine_metrics)) and
//! follow its KV events ([`subscribe`](crate::subscribe)). They tell the router what they find. They
//! use no part of the gateway that serves requests.

pub(crate) mod address;
pub(crate) mod api_key;
mod engine_reports;
pub(crate) mod health;
pub(crate) mod health_config;
mod health_record;
mod health_state;
mod liveness;
pub(crate) mod model_catalog;
mod model_list;
pub(crate) mod model_names;
pub(crate) mod query;
pub(crate) mod reconcile;
pub(crate) mod registry;
pub(crate) mod removals;
pub(crate) mod resolve;
mod tasks;
pub(crate) mod worker;
pub(crate) mod worker_config;
pub(crate) mod worker_tls;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::Router;
use foresee_core::workers::{WorkerError, WorkerId};

use crate::clock::Clock;
use crate::engine_metrics::EngineMetricsReader;
use crate::metrics::Metrics;
use crate::subscribe::EventSubscriber;
use crate::worker_info::WorkerInfoReader;
use api_key::WorkerKeyConfig;
use health::HealthChecks;
use health_config::HealthConfig;
use query::WorkerQueries;
use registry::WorkerRegistry;
use resolve::DnsConfig;
use tasks::WorkerTasks;
use worker::Worker;
use worker_config::WorkerConfig;
use worker_tls::WorkerTlsConfig;

/// Settings of the workers of a gateway.
#[derive(Debug)]
pub(crate) struct WorkersConfig {
    /// The router's block size.
    pub(crate) block_size: NonZeroU32,
    /// Whether workers share cached blocks between requests, unless their descriptions say otherwise.
    pub(crate) prefix_caching: bool,
    /// Key of workers whose description names none.
    pub(crate) key: WorkerKeyConfig,
    /// Files of TLS of workers whose description names none.
    pub(crate) tls: WorkerTlsConfig,
    pub(crate) health: HealthConfig,
    /// Time between two health checks of a worker.
    pub(crate) probe_interval: Duration,
    pub(crate) dns: DnsConfig,
    /// Time for which KV events may be unusable before the cache is estimated instead.
    pub(crate) events_grace: Duration,
    /// Time between two reads of each engine's own metrics; `None` for never.
    pub(crate) engine_metrics_interval: Option<Duration>,
    /// Maximum time in which a worker accepts a connection of the gateway's own.
    pub(crate) connect_timeout: Duration,
}

/// The workers of a gateway, with the tasks that follow them.
#[derive(Debug)]
pub(crate) struct Workers {
    router: Router,
    registry: Arc<WorkerRegistry>,
    tasks: Arc<WorkerTasks>,
    prefix_caching: bool,
}

impl Workers {
    /// Creates an empty fleet. Its workers are added to `router`, whose clock is `clock`; what happens
    /// to them is counted in `metrics`.
    pub(crate) fn new(
        config: WorkersConfig,
        router: Router,
        metrics: Arc<Metrics>,
        clock: Clock,
    ) -> Self {
        let registry = Arc::new(WorkerRegistry::new(config.key, config.tls));
        let queries = WorkerQueries::new(config.connect_timeout, config.health.timeout);
        let tasks = WorkerTasks {
            router: router.clone(),
            registry: Arc::clone(&registry),
            metrics: Arc::clone(&metrics),
            clock,
            events: Arc::new(EventSubscriber {
                router: router.clone(),
                metrics: Arc::clone(&metrics),
                clock,
                block_size: config.block_size,
                grace: config.events_grace,
            }),
            engine_metrics: Arc::new(EngineMetricsReader {
                queries: queries.clone(),
                metrics: Arc::clone(&metrics),
                interval: config.engine_metrics_interval,
            }),
            connect_timeout: config.health.timeout,
            health: Arc::new(HealthChecks {
                router: router.clone(),
                info: WorkerInfoReader {
                    router: router.clone(),
                    registry: Arc::clone(&registry),
                    queries: queries.clone(),
                    block_size: config.block_size,
                    look_up_timeout: config.dns.timeout,
                },
                queries,
                metrics,
                clock,
                config: config.health,
                interval: config.probe_interval,
            }),
            dns: config.dns,
            prefix_caching: config.prefix_caching,
        };
        Self {
            router,
            registry,
            tasks: Arc::new(tasks),
            prefix_caching: config.prefix_caching,
        }
    }

    /// Returns the list of workers.
    pub(crate) fn registry(&self) -> &Arc<WorkerRegistry> {
        &self.registry
    }

    /// Adds an engine: one worker for each rank, all or none. A worker can be chosen after its first
    /// successful health check; [`start`](Self::start) begins to check it.
    ///
    /// # Errors
    /// Fails if another engine has the name or the router refuses a worker.
    pub(crate) fn add(&self, engine: &WorkerConfig) -> Result<Vec<Arc<Worker>>, WorkerError> {
        self.registry.add(&self.router, engine, self.prefix_caching)
    }

    /// Starts the tasks of workers that were added. Must be called once per worker, inside a tokio
    /// runtime.
    pub(crate) fn start(&self, added: Vec<Arc<Worker>>) {
        for worker in added {
            self.tasks.start(worker);
        }
    }

    /// Removes a worker from the router and from the list, and ends its tasks. Responses that it still
    /// sends are passed on. Has no effect for an unknown id.
    pub(crate) fn remove(&self, id: WorkerId) {
        self.registry.remove(&self.router, id);
    }

    /// Ends the tasks of all workers, because the gateway ends.
    pub(crate) fn stop(&self) {
        for worker in self.registry.all() {
            worker.remove();
        }
    }
}
