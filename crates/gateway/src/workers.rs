//! The gateway's record of each worker: its address, its models and its state, by the worker's id in
//! the router.

pub(crate) mod address;
pub(crate) mod api_key;
pub(crate) mod health;
pub(crate) mod health_config;
mod health_record;
mod health_state;
pub(crate) mod query;
pub(crate) mod resolve;
pub(crate) mod tasks;
pub(crate) mod worker_config;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use foresee_api::admin::Health;
use foresee_core::router::Router;
use foresee_core::workers::{WorkerError, WorkerId, WorkerSpec};
use foresee_engine::conversion::Dialect;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Uri};
use parking_lot::{Mutex, RwLock};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::sync::{Notify, watch};

use crate::kv_events::source::{EventSource, KvEvents};
use crate::kv_events::status::EventStatus;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::workers::address::WorkerAddress;
use crate::workers::api_key::{WorkerKey, WorkerKeyConfig};
use crate::workers::health_record::HealthRecord;
use crate::workers::worker_config::WorkerConfig;

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
    /// Models that the worker serves: name and entry of `/v1/models`, as the worker wrote it.
    pub(crate) models: RwLock<Vec<(String, Box<RawValue>)>>,
    /// Name of each model, with the name that is part of its blocks' hashes.
    hash_names: RwLock<Vec<(String, String)>>,
    /// Name of each model, with the longest context that the worker reports for it.
    context_limits: RwLock<Vec<(String, Option<u32>)>>,
    /// Requests a health check before the next interval.
    pub(crate) probe_now: Notify,
    /// Status of the worker's KV events.
    pub(crate) events: EventStatus,
    /// Where the worker publishes KV events, as configured or discovered.
    pub(crate) event_source: watch::Sender<Option<EventSource>>,
    /// Whether a warning was logged that the engine has another number of ranks than configured.
    pub(crate) rank_warning_logged: AtomicBool,
    /// Whether a warning was logged that the engine's block size is not a multiple of the router's.
    pub(crate) block_size_warning_logged: AtomicBool,
    /// Blocks that running requests pin, as the engine reports; `None` if it is not asked or does
    /// not report it.
    pub(crate) engine_active_blocks: Mutex<Option<u64>>,
    /// Requests a new connection to the worker's KV events, because the worker was unreachable.
    pub(crate) resubscribe: Notify,
    /// Whether the worker has listed its models; `None` until it was asked.
    models_known: watch::Sender<Option<bool>>,
    /// Whether the router had ejected the worker when that was last noted.
    is_ejected: AtomicBool,
    /// Whether the worker was removed, which ends its tasks.
    removed: watch::Sender<bool>,
    /// Capacity that the engine reported, in engine blocks; 0 if it reported none.
    capacity_blocks: AtomicU32,
    /// When data last arrived from the worker, in milliseconds of the gateway's clock.
    last_activity: AtomicU64,
    /// Whether the worker refused a connection and has not responded since. When it responds again,
    /// its cache is empty.
    gone: AtomicBool,
    /// Whether the worker has returned after refusing connections, and its event subscription has
    /// not taken that yet.
    cache_lost: AtomicBool,
}

impl Worker {
    /// Records that data arrived from the worker at `now`.
    pub(crate) fn note_activity(&self, now: Duration) {
        self.last_activity
            .store(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns when data last arrived from the worker, by the gateway's clock.
    pub(crate) fn last_activity(&self) -> Duration {
        Duration::from_millis(self.last_activity.load(Ordering::Relaxed))
    }

    /// Sets the capacity that the engine reported, in engine blocks.
    pub(crate) fn set_capacity_blocks(&self, blocks: u32) {
        self.capacity_blocks.store(blocks, Ordering::Relaxed);
    }

    /// Returns the configured capacity or else the reported one, in engine blocks; `None` if neither
    /// is known.
    pub(crate) fn capacity_blocks(&self) -> Option<u32> {
        let reported = self.capacity_blocks.load(Ordering::Relaxed);
        self.config.blocks.or((reported > 0).then_some(reported))
    }

    /// Records that the worker refused a connection: no process listens at its address.
    pub(crate) fn mark_gone(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Returns whether the worker refused a connection and has not responded since.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
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
    pub(crate) fn authorization_for_clients(&self) -> Option<HeaderValue> {
        self.key.authorization_for_clients()
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

    /// Records that the worker responded. Returns whether it had refused a connection since the last
    /// call.
    pub(crate) fn note_reachable(&self) -> bool {
        let was_gone = self.gone.swap(false, Ordering::Relaxed);
        self.cache_lost.fetch_or(was_gone, Ordering::Relaxed);
        was_gone
    }

    /// Returns whether the worker has returned after refusing connections since the last call.
    pub(crate) fn take_cache_lost(&self) -> bool {
        self.cache_lost.swap(false, Ordering::Relaxed)
    }

    /// Sets the worker's models. Returns whether their names, hash names or longest contexts changed.
    /// An empty list means that the models are unknown. Wakes the tasks that wait for the models.
    fn set_models(&self, models: Vec<(String, Box<RawValue>)>) -> bool {
        let known = !models.is_empty();
        let hash_names = hash_names(&models);
        let before = std::mem::replace(&mut *self.hash_names.write(), hash_names);
        let mut has_changed = before != *self.hash_names.read();
        let limits = context_limits(&models);
        let before = std::mem::replace(&mut *self.context_limits.write(), limits);
        has_changed |= before != *self.context_limits.read();
        *self.models.write() = models;
        self.models_known.send_replace(Some(known));
        has_changed
    }

    /// Records that the worker was asked for its models and did not list them. Has no effect after
    /// the first request for them, so models that were listed before remain known.
    pub(crate) fn set_models_unknown(&self) {
        self.models_known.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(false);
            is_first
        });
    }

    /// Waits until the worker was asked for its models. Whether it listed any does not matter.
    /// There is no time limit.
    pub(crate) async fn until_asked_for_models(&self) {
        let mut known = self.models_known.subscribe();
        // The worker owns the sender, so waiting does not fail.
        let _ = known.wait_for(Option::is_some).await;
    }

    /// Returns whether a model of the worker names `engine` as its owner: `vllm` or `sglang`.
    /// Returns `false` while no models are known.
    pub(crate) fn is_owned_by(&self, engine: &str) -> bool {
        #[derive(Deserialize)]
        struct Model<'m> {
            #[serde(borrow)]
            owned_by: Cow<'m, str>,
        }
        let models = self.models.read();
        let is_owner = |(_, entry): &(String, Box<RawValue>)| {
            serde_json::from_str(entry.get()).is_ok_and(|model: Model<'_>| model.owned_by == engine)
        };
        models.iter().any(is_owner)
    }

    /// Waits until the worker has listed at least one model, and returns the name of the first.
    /// Sends no request itself: health checks read the list. There is no time limit.
    pub(crate) async fn first_model(&self) -> String {
        let mut known = self.models_known.subscribe();
        loop {
            // The worker owns the sender, so waiting does not fail.
            let _ = known.wait_for(|known| *known == Some(true)).await;
            if let Some(model) = self.known_first_model() {
                return model;
            }
            let _ = known.changed().await;
        }
    }

    /// Returns the name of the first model, if the worker has listed any.
    pub(crate) fn known_first_model(&self) -> Option<String> {
        self.models.read().first().map(|(model, _)| model.clone())
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

    /// Returns the URL of a connection to the worker, for a path and query of a request to the
    /// gateway. Its host is the resolved address, if the gateway resolves the worker's host name; the
    /// base path of the worker's URL is put before `path`. Fails if the result is not a valid URL.
    pub(crate) fn uri(&self, path: &PathAndQuery) -> Result<Uri, http::Error> {
        let path = if self.config.base_path.is_empty() {
            path.clone()
        } else {
            format!("{}{path}", self.config.base_path).parse()?
        };
        Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(self.address.authority())
            .path_and_query(path)
            .build()
    }
}

/// Returns the name of each model with its hash name: the name that is part of its blocks' hashes.
///
/// A model's hash name is its own name, except for further names of the first model: events do not
/// contain the name of the base model, so all its names share the first one. Such a name has the
/// same `root` as the first model and no `parent`; adapters have a `parent`.
///
/// If the first model has no `root`, or has a `parent`, every hash name is the model's own name.
fn hash_names(models: &[(String, Box<RawValue>)]) -> Vec<(String, String)> {
    #[derive(Deserialize)]
    struct ModelCard {
        root: String,
        parent: Option<IgnoredAny>,
    }
    let root_of = |entry: &RawValue| {
        let card: ModelCard = serde_json::from_str(entry.get()).ok()?;
        card.parent.is_none().then_some(card.root)
    };
    let first = models.first();
    let first = first.and_then(|(name, entry)| Some((name, root_of(entry)?)));
    let hash_name = |name: &String, entry: &RawValue| match &first {
        Some((first_name, root)) if root_of(entry).as_ref() == Some(root) => (*first_name).clone(),
        _ => name.clone(),
    };
    models
        .iter()
        .map(|(name, entry)| (name.clone(), hash_name(name, entry)))
        .collect()
}

/// Returns the name of each model with its `max_model_len`: the longest context, in tokens, that the
/// engine accepts. `None` if the entry has none, as those of adapters.
fn context_limits(models: &[(String, Box<RawValue>)]) -> Vec<(String, Option<u32>)> {
    #[derive(Deserialize)]
    struct ModelCard {
        max_model_len: Option<u32>,
    }
    let limit_of = |entry: &RawValue| {
        let card: ModelCard = serde_json::from_str(entry.get()).ok()?;
        card.max_model_len.filter(|limit| *limit > 0)
    };
    models
        .iter()
        .map(|(name, entry)| (name.clone(), limit_of(entry)))
        .collect()
}

/// All workers of a gateway, by id. The router decides which of them can be chosen.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    by_id: RwLock<HashMap<WorkerId, Arc<Worker>>>,
    /// First model of all workers, if they agree; see [`only_model`](Self::only_model).
    only_model: RwLock<Option<String>>,
    /// Dialect of all workers; see [`dialect`](Self::dialect).
    dialect: RwLock<Dialect>,
    /// Hash name of each model whose hash name differs from its name.
    aliases: RwLock<HashMap<String, String>>,
    /// Longest context of each model; see [`context_limit`](Self::context_limit).
    context_limits: RwLock<HashMap<String, u32>>,
    /// Key of workers whose description names none.
    default_key: WorkerKeyConfig,
}

impl Workers {
    /// Creates an empty list, for workers with this API key unless their description names one.
    pub(crate) fn new(default_key: WorkerKeyConfig) -> Self {
        Self {
            default_key,
            ..Self::default()
        }
    }

    /// Adds an engine to the router and to this list: one worker for each rank, all or none. A
    /// worker can be chosen after its first successful health check. `prefix_caching` applies to an
    /// engine whose configuration does not set it. Starts no tasks: [`start_worker_tasks`] does.
    /// Fails if another engine has the name or the router refuses a worker.
    pub(crate) fn add(
        &self,
        router: &Router,
        engine: &WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Vec<Arc<Worker>>, WorkerError> {
        let has_same_name =
            |worker: &Arc<Worker>| worker.config.engine_name() == engine.engine_name();
        if self.by_id.read().values().any(has_same_name) {
            return Err(WorkerError::NameTaken(engine.engine_name().to_owned()));
        }
        self.add_ranks(router, engine, prefix_caching)
    }

    /// Adds the workers of one address of an engine: one worker for each rank, all or none, as
    /// [`add`](Self::add) does. The engine may have workers at other addresses.
    pub(crate) fn add_ranks(
        &self,
        router: &Router,
        engine: &WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Vec<Arc<Worker>>, WorkerError> {
        let mut added = Vec::new();
        for config in engine.workers() {
            match self.add_one(router, config, prefix_caching) {
                Ok(worker) => added.push(worker),
                Err(error) => {
                    let ids = added.iter().map(|worker: &Arc<Worker>| worker.id);
                    ids.for_each(|id| self.remove(router, id));
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    /// Adds one worker to the router and to this list. The worker is unhealthy and has no models
    /// yet. `prefix_caching` applies if `config` does not set it.
    fn add_one(
        &self,
        router: &Router,
        config: WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Arc<Worker>, WorkerError> {
        let id = router.add_worker(WorkerSpec {
            name: config.name.clone(),
            models: Vec::new(),
            capacity_blocks: config.blocks,
            prefix_caching: config.prefix_caching.unwrap_or(prefix_caching),
            eviction: config.eviction.unwrap_or_default(),
        })?;
        let worker = Arc::new(Worker {
            id,
            header: config.header(),
            rank_header: config.rank.map(HeaderValue::from),
            event_source: watch::Sender::new(match &config.kv_events {
                KvEvents::At(source) => Some(source.clone()),
                KvEvents::Discovered | KvEvents::Off => None,
            }),
            address: WorkerAddress::new(&config),
            key: WorkerKey::load(
                config.api_key_file.as_deref(),
                &self.default_key,
                &config.name,
            ),
            health: HealthRecord::default(),
            config,
            rank_warning_logged: AtomicBool::new(false),
            block_size_warning_logged: AtomicBool::new(false),
            models: RwLock::default(),
            hash_names: RwLock::default(),
            context_limits: RwLock::default(),
            probe_now: Notify::new(),
            events: EventStatus::default(),
            engine_active_blocks: Mutex::default(),
            resubscribe: Notify::new(),
            models_known: watch::Sender::new(None),
            is_ejected: AtomicBool::new(false),
            removed: watch::Sender::new(false),
            capacity_blocks: AtomicU32::new(0),
            last_activity: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            cache_lost: AtomicBool::new(false),
        });
        self.by_id.write().insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    /// Removes a worker from the router and from this list, and ends its tasks. Responses that it
    /// still sends are passed on. Has no effect for an unknown id.
    pub(crate) fn remove(&self, router: &Router, id: WorkerId) {
        let removed = self.by_id.write().remove(&id);
        if let Some(worker) = removed {
            router.remove_worker(id);
            worker.remove();
            self.compare_models();
        }
    }

    /// Sets the models that a worker has listed.
    pub(crate) fn set_models(&self, worker: &Worker, models: Vec<(String, Box<RawValue>)>) {
        if worker.set_models(models) {
            self.compare_models();
        }
    }

    /// Returns the model of requests that name none: the first model of every worker that has
    /// listed its models. `None` if no worker has listed any, or the workers' first models differ:
    /// then the model depends on the worker, which is not chosen yet, and such a request matches
    /// only others without a name.
    pub(crate) fn only_model(&self) -> Option<String> {
        self.only_model.read().clone()
    }

    /// Returns the hash name of `model` if it differs from the name: a worker's events do not contain
    /// the name under which the base model was requested. `None` if the name is its own hash name, or
    /// workers disagree.
    pub(crate) fn alias_of(&self, model: &str) -> Option<String> {
        self.aliases.read().get(model).cloned()
    }

    /// Returns the longest context of `model`, in tokens, on any worker. Every engine refuses a longer
    /// prompt. `None` if a worker that serves the model reports no limit, or none serves it.
    pub(crate) fn context_limit(&self, model: &str) -> Option<u32> {
        self.context_limits.read().get(model).copied()
    }

    /// Computes `only_model`, `dialect`, `aliases` and `context_limits` again. They are stored because models change rarely and
    /// every request reads them.
    fn compare_models(&self) {
        // Locked throughout: of two concurrent calls, the later one sees all changes.
        let mut only_model = self.only_model.write();
        let workers = self.by_id.read();
        *self.aliases.write() = find_aliases(workers.values());
        *self.context_limits.write() = find_context_limits(workers.values());
        let mut known = workers
            .values()
            .filter(|worker| worker.known_first_model().is_some())
            .peekable();
        let is_sglang = known.peek().is_some() && known.all(|worker| worker.is_owned_by("sglang"));
        *self.dialect.write() = if is_sglang {
            Dialect::Sglang
        } else {
            Dialect::Vllm
        };
        let mut models = workers
            .values()
            .filter_map(|worker| worker.known_first_model());
        let first = models.next();
        *only_model = first.filter(|first| models.all(|model| model == *first));
    }

    /// Returns the engine whose conversion of requests to chats is followed: SGLang's if all workers
    /// that list models are SGLang's.
    pub(crate) fn dialect(&self) -> Dialect {
        *self.dialect.read()
    }

    /// Returns the names of the models that any worker serves, healthy or not, each once.
    pub(crate) fn served_models(&self) -> Vec<String> {
        let mut names = Vec::new();
        for worker in self.all() {
            for (name, _) in worker.models.read().iter() {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
        }
        names
    }

    /// Returns the entry of a model as the first worker that serves it wrote it.
    pub(crate) fn model_entry(&self, model: &str) -> Option<String> {
        self.all().iter().find_map(|worker| {
            let models = worker.models.read();
            let (_, entry) = models.iter().find(|(name, _)| name == model)?;
            Some(entry.get().to_owned())
        })
    }

    /// Returns a worker by id.
    pub(crate) fn get(&self, id: WorkerId) -> Option<Arc<Worker>> {
        self.by_id.read().get(&id).cloned()
    }

    /// Returns the workers of other ranks than the one that a client's [`RANK_HEADER`] names.
    /// Returns none if that would be all workers: then the request is routed as usual, and the
    /// engine reports the error. Also returns none if the header is absent or is not a number.
    /// Workers without a rank are never excluded.
    pub(crate) fn workers_excluded_by_rank(&self, headers: &HeaderMap) -> Vec<WorkerId> {
        let named = headers.get(RANK_HEADER).and_then(|rank| rank.to_str().ok());
        let Some(named) = named.and_then(|rank| rank.trim().parse::<u32>().ok()) else {
            return Vec::new();
        };
        let by_id = self.by_id.read();
        let has_other_rank =
            |worker: &&Arc<Worker>| worker.config.rank.is_some_and(|rank| rank != named);
        let excluded: Vec<_> = by_id
            .values()
            .filter(has_other_rank)
            .map(|worker| worker.id)
            .collect();
        if excluded.len() == by_id.len() {
            return Vec::new();
        }
        excluded
    }

    /// Returns all workers in the order in which they were added.
    pub(crate) fn all(&self) -> Vec<Arc<Worker>> {
        let mut all: Vec<_> = self.by_id.read().values().cloned().collect();
        all.sort_by_key(|worker| worker.id);
        all
    }
}

/// Returns the hash name of each model whose hash name differs from its name, if all workers that
/// serve the model agree.
fn find_aliases<'w>(workers: impl Iterator<Item = &'w Arc<Worker>>) -> HashMap<String, String> {
    let mut aliases = HashMap::<String, String>::new();
    let mut disputed = HashSet::new();
    for worker in workers {
        for (name, hash_name) in worker.hash_names.read().iter() {
            let known = aliases.entry(name.clone());
            if known.or_insert_with(|| hash_name.clone()) != hash_name {
                disputed.insert(name.clone());
            }
        }
    }
    aliases.retain(|name, hash_name| name != hash_name && !disputed.contains(name));
    aliases
}

/// Returns the longest context of each model on any worker, if all workers that serve the model
/// report one.
fn find_context_limits<'w>(workers: impl Iterator<Item = &'w Arc<Worker>>) -> HashMap<String, u32> {
    let mut limits = HashMap::<String, Option<u32>>::new();
    for worker in workers {
        for (name, limit) in worker.context_limits.read().iter() {
            let known = limits.entry(name.clone()).or_insert(*limit);
            *known = known.zip(*limit).map(|(known, limit)| known.max(limit));
        }
    }
    limits
        .into_iter()
        .filter_map(|(name, limit)| Some((name, limit?)))
        .collect()
}
