//! Where the workers are: what the router knows by id, with an address.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use foresee_core::fleet::{WorkerError, WorkerId, WorkerSpec};
use foresee_core::router::Router;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Uri};
use parking_lot::{Mutex, RwLock};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::sync::{Notify, watch};

use crate::config::WorkerConfig;
use crate::health::watch_worker;
use crate::sampler::sample_engine;
use crate::shared::Shared;
use crate::subscribe::{Board, EventSource, KvEvents, follow_events};

/// Pins a request to one of an engine's data-parallel ranks, for vLLM and SGLang alike.
pub(crate) const RANK_HEADER: &str = "x-data-parallel-rank";

/// One worker, as requests reach it.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) config: WorkerConfig,
    /// Its name, ready for the response header.
    pub(crate) header: HeaderValue,
    /// Its rank, ready for the header that pins a request to it; `None` if it is all there is at
    /// its address.
    pub(crate) rank_header: Option<HeaderValue>,
    /// The entries of its `/v1/models`, as it wrote them.
    pub(crate) models: RwLock<Vec<(String, Box<RawValue>)>>,
    /// The same by name, each with the name that its blocks are hashed with.
    hashed_as: RwLock<Vec<(String, String)>>,
    /// Asks for a probe now rather than at the next interval.
    pub(crate) suspect: Notify,
    /// How its KV events stand.
    pub(crate) events: Board,
    /// Where they are, by its configuration or by its own word.
    pub(crate) event_source: watch::Sender<Option<EventSource>>,
    /// It was said in the log that its ranks are others than configured.
    pub(crate) told_of_ranks: AtomicBool,
    /// Blocks that running requests pin by its own account, if it is asked and says so.
    pub(crate) engine_active_blocks: Mutex<Option<u64>>,
    /// Asks for its KV events to be subscribed to anew: it was away.
    pub(crate) resubscribe: Notify,
    /// Whether it has said which models it serves; `None` until it was asked.
    knows_models: watch::Sender<Option<bool>>,
    /// Tells what watches it to end.
    removed: watch::Sender<bool>,
    /// How many blocks of its engine's size its cache has, if it said so; 0 if not.
    capacity_blocks: AtomicU32,
    /// When something last came from it, in milliseconds of the gateway's clock.
    heard_at: AtomicU64,
    /// Nobody listened at its address: when somebody does again, its cache is gone.
    absent: AtomicBool,
    /// It came back after being absent, and whoever follows its events does not know yet.
    lost_its_cache: AtomicBool,
}

impl Worker {
    /// Something came from it.
    pub(crate) fn heard(&self, now: Duration) {
        self.heard_at
            .store(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// When something last came from it.
    pub(crate) fn heard_at(&self) -> Duration {
        Duration::from_millis(self.heard_at.load(Ordering::Relaxed))
    }

    /// It said how many blocks its cache has.
    pub(crate) fn set_capacity_blocks(&self, blocks: u32) {
        self.capacity_blocks.store(blocks, Ordering::Relaxed);
    }

    /// How many blocks its cache has, if that is known.
    pub(crate) fn capacity_blocks(&self) -> Option<u32> {
        let said = self.capacity_blocks.load(Ordering::Relaxed);
        self.config.blocks.or((said > 0).then_some(said))
    }

    /// Nobody listens at its address.
    pub(crate) fn is_absent(&self) {
        self.absent.store(true, Ordering::Relaxed);
    }

    /// It answers. Returns whether it was absent since this was last asked.
    pub(crate) fn is_back(&self) -> bool {
        let was_absent = self.absent.swap(false, Ordering::Relaxed);
        self.lost_its_cache.fetch_or(was_absent, Ordering::Relaxed);
        was_absent
    }

    /// Whether it came back after being absent since this was last asked.
    pub(crate) fn lost_its_cache(&self) -> bool {
        self.lost_its_cache.swap(false, Ordering::Relaxed)
    }

    /// Returns whether they are others than before.
    fn set_models(&self, models: Vec<(String, Box<RawValue>)>) -> bool {
        let known = !models.is_empty();
        let hashed_as = names_to_hash_with(&models);
        let before = std::mem::replace(&mut *self.hashed_as.write(), hashed_as);
        let has_changed = before != *self.hashed_as.read();
        *self.models.write() = models;
        self.knows_models.send_replace(Some(known));
        has_changed
    }

    /// It was asked which models it serves, and does not say.
    pub(crate) fn says_no_models(&self) {
        self.knows_models.send_if_modified(|known| {
            let is_news = known.is_none();
            known.get_or_insert(false);
            is_news
        });
    }

    /// Waits until it was asked which models it serves.
    pub(crate) async fn until_asked_for_models(&self) {
        let mut known = self.knows_models.subscribe();
        // The sender is as old as this worker, so waiting does not fail.
        let _ = known.wait_for(Option::is_some).await;
    }

    /// Whether it says that it is a `vllm`, or an `sglang`.
    pub(crate) fn says_it_is(&self, engine: &str) -> bool {
        #[derive(Deserialize)]
        struct Model<'m> {
            #[serde(borrow)]
            owned_by: Cow<'m, str>,
        }
        let models = self.models.read();
        let owner = |(_, model): &(String, Box<RawValue>)| {
            serde_json::from_str(model.get()).is_ok_and(|it: Model<'_>| it.owned_by == engine)
        };
        models.iter().any(owner)
    }

    /// The first model it serves, once it has said so.
    pub(crate) async fn first_model(&self) -> String {
        let mut known = self.knows_models.subscribe();
        loop {
            // The sender is as old as this worker, so waiting does not fail.
            let _ = known.wait_for(|known| *known == Some(true)).await;
            if let Some(model) = self.tells_first_model() {
                return model;
            }
            let _ = known.changed().await;
        }
    }

    pub(crate) fn tells_first_model(&self) -> Option<String> {
        self.models.read().first().map(|(model, _)| model.clone())
    }

    /// Tells what watches it to end.
    pub(crate) fn remove(&self) {
        self.removed.send_replace(true);
    }

    /// Waits until it is removed.
    pub(crate) async fn until_removed(&self) {
        let mut removed = self.removed.subscribe();
        // The sender is as old as this worker, so waiting does not fail.
        let _ = removed.wait_for(|removed| *removed).await;
    }

    /// The worker's URL for a path and query of the gateway's.
    pub(crate) fn uri(&self, path: &PathAndQuery) -> Result<Uri, http::Error> {
        let path = if self.config.base_path.is_empty() {
            path.clone()
        } else {
            format!("{}{path}", self.config.base_path).parse()?
        };
        Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(self.config.authority.clone())
            .path_and_query(path)
            .build()
    }
}

/// Each model with the name that its blocks are hashed with: its own, but for other names of the
/// first model, whose blocks bear no name. Those have its `root` and no `parent`, as adapters have.
fn names_to_hash_with(models: &[(String, Box<RawValue>)]) -> Vec<(String, String)> {
    #[derive(Deserialize)]
    struct Card {
        root: String,
        parent: Option<IgnoredAny>,
    }
    let root = |model: &RawValue| {
        let card: Card = serde_json::from_str(model.get()).ok()?;
        card.parent.is_none().then_some(card.root)
    };
    let first = models.first();
    let first = first.and_then(|(name, model)| Some((name, root(model)?)));
    let hashed_as = |(name, model): &(String, Box<RawValue>)| match &first {
        Some((first, theirs)) if root(model).as_ref() == Some(theirs) => (*first).clone(),
        _ => name.clone(),
    };
    let pair = |it: &(String, Box<RawValue>)| (it.0.clone(), hashed_as(it));
    models.iter().map(pair).collect()
}

/// All workers. The router decides who may serve; this says where they are.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    by_id: RwLock<HashMap<WorkerId, Arc<Worker>>>,
    only_model: RwLock<Option<String>>,
    /// The names that other names of models are hashed as.
    aliases: RwLock<HashMap<String, String>>,
}

impl Workers {
    /// Adds an engine to the router and to this list, rank by rank: all or none. They serve once
    /// a probe has found them.
    pub(crate) fn add(
        &self,
        router: &Router,
        engine: &WorkerConfig,
        prefix_caching: bool,
    ) -> Result<Vec<Arc<Worker>>, WorkerError> {
        let same_name = |worker: &Arc<Worker>| worker.config.engine_name() == engine.engine_name();
        if self.by_id.read().values().any(same_name) {
            return Err(WorkerError::NameTaken(engine.engine_name().to_owned()));
        }
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
            config,
            told_of_ranks: AtomicBool::new(false),
            models: RwLock::default(),
            hashed_as: RwLock::default(),
            suspect: Notify::new(),
            events: Board::default(),
            engine_active_blocks: Mutex::default(),
            resubscribe: Notify::new(),
            knows_models: watch::Sender::new(None),
            removed: watch::Sender::new(false),
            capacity_blocks: AtomicU32::new(0),
            heard_at: AtomicU64::new(0),
            absent: AtomicBool::new(false),
            lost_its_cache: AtomicBool::new(false),
        });
        self.by_id.write().insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    pub(crate) fn remove(&self, router: &Router, id: WorkerId) {
        let removed = self.by_id.write().remove(&id);
        if let Some(worker) = removed {
            router.remove_worker(id);
            worker.remove();
            self.compare_models();
        }
    }

    /// A worker said which models it serves.
    pub(crate) fn set_models(&self, worker: &Worker, models: Vec<(String, Box<RawValue>)>) {
        if worker.set_models(models) {
            self.compare_models();
        }
    }

    /// The model that a request without a name is for: the first of every worker that has told
    /// which it serves. Where they differ it depends on the worker, which is not chosen yet, so
    /// there is no answer, and such a request matches only others like it.
    pub(crate) fn only_model(&self) -> Option<String> {
        self.only_model.read().clone()
    }

    /// The name that blocks of a model are hashed with, if that is another: a worker's events do
    /// not say by which of its names it was asked for. Where workers differ, it is its own.
    pub(crate) fn alias_of(&self, model: &str) -> Option<String> {
        self.aliases.read().get(model).cloned()
    }

    /// Kept, because it changes a million times less often than it is asked.
    fn compare_models(&self) {
        // Held throughout: of two that look at once, the later one sees more.
        let mut only_model = self.only_model.write();
        let workers = self.by_id.read();
        *self.aliases.write() = find_aliases(workers.values());
        let mut models = workers
            .values()
            .filter_map(|worker| worker.tells_first_model());
        let first = models.next();
        *only_model = first.filter(|first| models.all(|model| model == *first));
    }

    pub(crate) fn get(&self, id: WorkerId) -> Option<Arc<Worker>> {
        self.by_id.read().get(&id).cloned()
    }

    /// The workers that a client's headers rule out, by naming a rank that they are not. None, if
    /// that would be all: then the engine says what is wrong with it.
    pub(crate) fn ruled_out(&self, headers: &HeaderMap) -> Vec<WorkerId> {
        let named = headers.get(RANK_HEADER).and_then(|rank| rank.to_str().ok());
        let Some(named) = named.and_then(|rank| rank.trim().parse::<u32>().ok()) else {
            return Vec::new();
        };
        let by_id = self.by_id.read();
        let is_other = |worker: &&Arc<Worker>| worker.config.rank.is_some_and(|it| it != named);
        let others: Vec<_> = by_id.values().filter(is_other).map(|it| it.id).collect();
        if others.len() == by_id.len() {
            return Vec::new();
        }
        others
    }

    /// Every worker, in the order they joined.
    pub(crate) fn all(&self) -> Vec<Arc<Worker>> {
        let mut all: Vec<_> = self.by_id.read().values().cloned().collect();
        all.sort_by_key(|worker| worker.id);
        all
    }
}

/// The names that other names of models are hashed as, by all workers that serve them.
fn find_aliases<'w>(workers: impl Iterator<Item = &'w Arc<Worker>>) -> HashMap<String, String> {
    let mut aliases = HashMap::<String, String>::new();
    let mut own = HashSet::new();
    for worker in workers {
        for (name, hashed_as) in worker.hashed_as.read().iter() {
            let known = aliases.entry(name.clone());
            if known.or_insert_with(|| hashed_as.clone()) != hashed_as {
                own.insert(name.clone());
            }
        }
    }
    aliases.retain(|name, hashed_as| name != hashed_as && !own.contains(name));
    aliases
}

/// Starts what watches a worker until it is removed.
pub(crate) fn start_watching(shared: &Arc<Shared>, worker: Arc<Worker>) {
    tokio::spawn(watch_worker(Arc::clone(shared), Arc::clone(&worker)));
    tokio::spawn(follow_events(Arc::clone(shared), Arc::clone(&worker)));
    tokio::spawn(sample_engine(Arc::clone(shared), worker));
}
