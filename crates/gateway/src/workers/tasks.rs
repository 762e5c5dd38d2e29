//! Tasks of workers: they start with a worker and end with it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::Router;
use foresee_core::workers::{WorkerId, WorkerState};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::clock::Clock;
use crate::engine_metrics::EngineMetricsReader;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::subscribe::EventSubscriber;
use crate::workers::health::HealthChecks;
use crate::workers::registry::WorkerRegistry;
use crate::workers::resolve::{
    DnsConfig, MAX_ADDRESSES, MemberChange, Members, NameLookUp, of_one_family,
};
use crate::workers::worker::Worker;
use crate::workers::worker_config::WorkerConfig;

/// Maximum time for the requests of a worker whose address has left its host name. After that, the
/// worker is removed; its running responses are still passed on.
const MAX_DRAIN_TIME: Duration = Duration::from_secs(600);

/// Maximum time between two look-ups of a name with IPv4 and IPv6 addresses while none of its workers
/// is healthy: the other family may be the one that connects.
const FAMILY_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Time between two checks of a worker that is drained.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Starts the tasks of workers, with what the tasks use.
#[derive(Debug)]
pub(super) struct WorkerTasks {
    pub(super) router: Router,
    pub(super) registry: Arc<WorkerRegistry>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Clock,
    pub(super) health: Arc<HealthChecks>,
    pub(super) events: Arc<EventSubscriber>,
    pub(super) engine_metrics: Arc<EngineMetricsReader>,
    /// How host names of workers are resolved.
    pub(super) dns: DnsConfig,
    /// Maximum time of a connection that tests whether an address can be reached.
    pub(super) connect_timeout: Duration,
    /// Whether workers share cached blocks between requests, unless their descriptions say otherwise.
    pub(super) prefix_caching: bool,
}

impl WorkerTasks {
    /// Starts the tasks of a worker, which run until the worker is removed: health checks, KV events,
    /// the engine's own metrics and, once for each engine, look-ups of its host name. Returns
    /// immediately. Must be called once per worker, inside a tokio runtime.
    ///
    /// Removes the worker's metrics after the last of them has ended, unless another worker has the
    /// name by then.
    pub(super) fn start(self: &Arc<Self>, worker: Arc<Worker>) {
        let config = &worker.config;
        let is_first_of_engine = config.member.is_none() && config.rank.unwrap_or(0) == 0;
        if config.is_resolved_in_background() && is_first_of_engine {
            let engine = EngineName::new(self, config);
            tokio::spawn(engine.follow());
        }
        self.metrics.add_worker(&config.name);
        let (health, events) = (Arc::clone(&self.health), Arc::clone(&self.events));
        let engine_metrics = Arc::clone(&self.engine_metrics);
        let tasks = [
            tokio::spawn(health.watch(Arc::clone(&worker))),
            tokio::spawn(events.follow(Arc::clone(&worker))),
            tokio::spawn(engine_metrics.watch(Arc::clone(&worker))),
        ];
        if let Some(files) = worker.tls_files.clone() {
            let worker = Arc::clone(&worker);
            tokio::spawn(async move {
                tokio::select! {
                    () = files.watch(worker.config.name.clone()) => {}
                    () = worker.until_removed() => {}
                }
            });
        }
        let (registry, metrics) = (Arc::clone(&self.registry), Arc::clone(&self.metrics));
        tokio::spawn(async move {
            for task in tasks {
                // A task that panicked has ended too.
                let _ = task.await;
            }
            let name = &worker.config.name;
            let workers = registry.all();
            if !workers.iter().any(|other| other.config.name == *name) {
                metrics.remove_worker(name);
            }
        });
    }
}

/// The host name of an engine, whose addresses are the engine's workers.
struct EngineName {
    tasks: Arc<WorkerTasks>,
    /// Description of the engine, for workers at further addresses.
    engine: WorkerConfig,
    look_up: NameLookUp,
    members: Members,
    /// Workers of the engine that are not removed: one for each address and rank.
    workers: Vec<Arc<Worker>>,
    /// Whether the addresses in use are IPv4 addresses; `None` before the first look-up.
    uses_ipv4: Option<bool>,
}

impl EngineName {
    /// Prepares the look-ups for an engine, given the description of one of its workers. The router
    /// has all of its workers.
    fn new(tasks: &Arc<WorkerTasks>, worker: &WorkerConfig) -> Self {
        let mut engine = worker.clone();
        engine.name = worker.engine_name().to_owned();
        engine.rank = None;
        let mut workers = tasks.registry.all();
        workers.retain(|worker| worker.config.engine_name() == engine.name);
        Self {
            look_up: NameLookUp::new(worker.host(), &tasks.dns),
            tasks: Arc::clone(tasks),
            engine,
            members: Members::default(),
            workers,
            uses_ipv4: None,
        }
    }

    /// Looks the name up in intervals, and adds and drains workers as its addresses change. Ends when
    /// all workers of the engine are removed.
    async fn follow(mut self) {
        loop {
            let found = self.look_up.look_up().await;
            self.workers.retain(|worker| !worker.is_removed());
            if self.workers.is_empty() {
                return;
            }
            let delay = match found {
                Ok(addresses) => self.on_found(addresses).await,
                Err(error) => self.on_failed(&error),
            };
            let removed = async {
                for worker in &self.workers {
                    worker.until_removed().await;
                }
            };
            tokio::select! {
                () = removed => {}
                () = sleep(delay) => {}
            }
        }
    }

    /// Records a failed look-up for all workers of the engine, which keep their addresses. Returns
    /// the time until the next look-up.
    fn on_failed(&self, error: &str) -> Duration {
        let (host, name) = (self.engine.host(), &self.engine.name);
        for worker in &self.workers {
            worker.address.fail_look_up(error);
            let label = [("worker", worker.config.name.clone())];
            self.tasks.metrics.dns_failures.get_or_create(&label).inc();
        }
        if self.look_up.failures() == 1 {
            warn_limited!(
                key: name, worker = %name, host, error,
                "cannot resolve a worker's host name; keeping its last addresses, if any, and \
                 trying again"
            );
        } else {
            tracing::debug!(worker = %name, host, error, "cannot resolve a worker's host name");
        }
        let mut workers = self.workers.iter();
        let has_no_address = workers.any(|worker| worker.address.unresolved_error().is_some());
        self.look_up.next_delay(has_no_address)
    }

    /// Adds, moves and drains workers so that there is one for each of `addresses`, of one address
    /// family. Has no effect while an administrator drains the engine. Returns the time until the
    /// next look-up.
    async fn on_found(&mut self, mut addresses: BTreeSet<IpAddr>) -> Duration {
        let delay = self.look_up.next_delay(false);
        let states = self.states();
        if states.iter().all(|state| *state == WorkerState::Draining) {
            return delay;
        }
        let has_healthy = states.contains(&WorkerState::Healthy);
        let has_both_families =
            addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6);
        if has_both_families && has_healthy {
            // The family in use works.
            let uses_ipv4 = self.uses_ipv4.unwrap_or(true);
            addresses.retain(|address| address.is_ipv4() == uses_ipv4);
        }
        let (port, time_limit) = (self.engine.port(), self.tasks.connect_timeout);
        let mut addresses = of_one_family(addresses, move |address| async move {
            let connected = timeout(time_limit, TcpStream::connect((address, port))).await;
            matches!(connected, Ok(Ok(_)))
        })
        .await;
        if addresses.len() > MAX_ADDRESSES {
            warn_limited!(
                key: &self.engine.name, worker = %self.engine.name, addresses = addresses.len(),
                "host name of a worker has too many addresses; using the first {MAX_ADDRESSES}"
            );
            addresses = addresses.into_iter().take(MAX_ADDRESSES).collect();
        }
        self.uses_ipv4 = addresses.first().map(IpAddr::is_ipv4);
        for change in self.members.update(&addresses) {
            match change {
                MemberChange::First(address) => self.set_first(address),
                MemberChange::Moved(address) => self.move_to(address),
                MemberChange::Joined(address) => self.add(address),
                MemberChange::Left(address) => self.drain(address),
            }
        }
        if has_both_families && !has_healthy {
            delay.min(FAMILY_RETRY_DELAY)
        } else {
            delay
        }
    }

    /// Returns the states of the engine's workers in the router. A worker that is being removed
    /// counts as draining.
    fn states(&self) -> Vec<WorkerState> {
        let snapshots = self.tasks.router.workers(self.tasks.clock.now());
        let state = |worker: &Arc<Worker>| {
            let mut snapshots = snapshots.iter();
            let snapshot = snapshots.find(|snapshot| snapshot.id == worker.id);
            snapshot.map_or(WorkerState::Draining, |snapshot| snapshot.state)
        };
        self.workers.iter().map(state).collect()
    }

    /// Returns the engine's workers at an address.
    fn workers_at(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Worker>> {
        let workers = self.workers.iter();
        workers.filter(move |worker| worker.address.resolved_ip() == Some(address))
    }

    /// Sets the first address of the engine's own workers.
    fn set_first(&self, address: IpAddr) {
        tracing::info!(
            worker = %self.engine.name, host = self.engine.host(), %address,
            "resolved a worker's host name"
        );
        for worker in &self.workers {
            worker.resolve_to(address);
        }
    }

    /// Moves the engine's own workers to the address that replaced their only one. Another process
    /// listens there, with an empty cache.
    fn move_to(&self, address: IpAddr) {
        tracing::info!(
            worker = %self.engine.name, host = self.engine.host(), %address,
            "host name of a worker has another address; assuming another engine process there"
        );
        let workers = self.workers.iter();
        for worker in workers.filter(|worker| worker.config.member.is_none()) {
            worker.resolve_to(address);
            worker.liveness.mark_gone();
            worker.probe_now.notify_one();
        }
    }

    /// Adds the workers at a further address. If that fails, the next look-up tries again.
    fn add(&mut self, address: IpAddr) {
        let config = self.engine.at_address(address);
        let tasks = &self.tasks;
        let added = tasks
            .registry
            .add_ranks(&tasks.router, &config, tasks.prefix_caching);
        match added {
            Ok(added) => {
                tracing::info!(
                    worker = %config.name, host = self.engine.host(), %address,
                    "host name of a worker has a further address; adding a worker for it"
                );
                for worker in added {
                    worker.resolve_to(address);
                    self.workers.push(Arc::clone(&worker));
                    tasks.start(worker);
                }
            }
            Err(error) => {
                warn_limited!(
                    key: &config.name, worker = %config.name, %error,
                    "cannot add a worker for a further address of a host name; trying again later"
                );
                self.members.forget(address);
            }
        }
    }

    /// Drains the workers at an address that the name no longer has, and removes them when they have
    /// no requests. Has no effect if they were removed before.
    fn drain(&self, address: IpAddr) {
        for worker in self.workers_at(address) {
            tracing::info!(
                worker = %worker.config.name, host = self.engine.host(), %address,
                "host name of a worker no longer has this address; draining the worker"
            );
            self.tasks.router.set_draining(worker.id, true);
            tokio::spawn(remove_when_idle(Arc::clone(&self.tasks), worker.id));
        }
    }
}

/// Removes a draining worker when it has no requests, or after [`MAX_DRAIN_TIME`].
async fn remove_when_idle(tasks: Arc<WorkerTasks>, id: WorkerId) {
    let has_requests = || {
        let workers = tasks.router.workers(tasks.clock.now());
        let mut workers = workers.iter();
        workers.any(|worker| worker.id == id && worker.requests > 0)
    };
    let idle = async {
        while has_requests() {
            sleep(DRAIN_POLL_INTERVAL).await;
        }
    };
    // After the time limit the worker is removed all the same.
    let _ = timeout(MAX_DRAIN_TIME, idle).await;
    tasks.registry.remove(&tasks.router, id);
}
