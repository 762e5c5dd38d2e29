//! Reads what a worker reports about itself: its models, its engine, its cache capacity, and where
//! it publishes KV events.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use foresee_core::EvictionRule;
use foresee_core::router::Router;
use foresee_engine::server_info::{KvEventEndpoint, ServerInfo, parse_event_sources};
use foresee_engine::worker_metrics::CacheConfig;
use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use crate::kv_events::source::{EventSource, KvEvents};
use crate::log_limit::warn_limited;
use crate::workers::query::{QueryError, WorkerQueries};
use crate::workers::registry::WorkerRegistry;
use crate::workers::worker::Worker;

/// Reader of what workers report about themselves.
#[derive(Debug)]
pub(crate) struct WorkerInfoReader {
    pub(crate) router: Router,
    pub(crate) registry: Arc<WorkerRegistry>,
    pub(crate) queries: WorkerQueries,
    /// The router's block size.
    pub(crate) block_size: NonZeroU32,
    /// Maximum time of a look-up of a host name.
    pub(crate) look_up_timeout: Duration,
}

impl WorkerInfoReader {
    /// Asks a worker for its models. Called before the worker becomes healthy, so that the first request
    /// is routed with them. A failed request is ignored: the known models stay as they are. A worker
    /// owned by `sglang` gets the radix eviction rule, unless a rule is configured.
    pub(crate) async fn learn_models(&self, worker: &Worker) {
        let body = match self.queries.get(worker, "/v1/models").await {
            Ok(body) => body,
            Err(error) => {
                if let Some(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) =
                    error.status()
                {
                    warn_limited!(
                        key: &worker.config.name, worker = %worker.config.name,
                        status = status.as_u16(),
                        "worker refuses the request for its models; set --worker-api-key-file, or \
                         api-key=file:PATH of the worker, to a file with the engine's API key"
                    );
                }
                worker.models.set_unknown();
                return;
            }
        };
        let models = read_models(&body);
        let names = models.iter().map(|(name, _)| name.clone()).collect();
        self.router.set_models(worker.id, names);
        self.registry.set_models(worker, models);
        if worker.config.eviction.is_none() && worker.models.is_owned_by("sglang") {
            self.router
                .set_eviction(worker.id, EvictionRule::SglangRadix);
        }
    }

    /// Asks a worker for its cache capacity, unless it is configured. The capacity stays as it is if the
    /// request fails, or if a rank that the worker stands for does not report it.
    pub(crate) async fn learn_capacity(&self, worker: &Worker) {
        if worker.config.blocks.is_some() {
            return;
        }
        let Ok(body) = self.queries.get(worker, "/metrics").await else {
            return;
        };
        let ranks = CacheConfig::parse(&String::from_utf8_lossy(&body));
        if ranks.is_empty() {
            return;
        }
        compare_ranks(worker, ranks.len());
        let engine_block_size = ranks.iter().find_map(|(_, cache)| cache.block_size);
        let is_ours = |rank: u32| worker.config.rank.is_none_or(|ours| ours == rank);
        let ours = ranks.iter().filter(|(rank, _)| is_ours(*rank));
        let blocks: Option<Vec<u32>> = ours.map(|(_, cache)| cache.blocks).collect();
        if let Some(blocks) = blocks.filter(|blocks| !blocks.is_empty()) {
            let total = blocks.into_iter().fold(0, u32::saturating_add);
            self.set_capacity(worker, total, engine_block_size);
        }
        self.compare_block_size(worker, engine_block_size);
    }

    /// Asks a worker where it publishes KV events, if its configuration leaves that to discovery.
    /// Returns whether the result is final: the worker responded, even if with an error, or was not
    /// asked. Stores a successful result, even `None`, in `worker.event_source`, which restarts the
    /// subscription if the source is new; an error leaves it unchanged. Which request is sent depends
    /// on the owner of the models, so they must be known before.
    pub(crate) async fn discover_event_source(&self, worker: &Worker) -> bool {
        if worker.config.kv_events != KvEvents::Discovered {
            return true;
        }
        // vLLM also has a `/server_info`, in its development mode; it takes seconds and does not contain
        // the event source.
        let discovered = if worker.models.is_owned_by("vllm") {
            self.discover_vllm_events(worker).await
        } else {
            self.discover_sglang_events(worker).await
        };
        match discovered {
            Ok(source) => {
                worker.event_source.send_if_modified(|known| {
                    let is_new = *known != source;
                    *known = source;
                    is_new
                });
                true
            }
            Err(QueryError::Status(_) | QueryError::Failed(_)) => true,
            Err(QueryError::NoResponse(_) | QueryError::ConnectionRefused(_)) => false,
        }
    }

    /// Returns the event source that a vLLM reports for this worker's rank. Without a configured rank,
    /// returns it only if the engine reports exactly one source. Fails if the engine does not respond
    /// with 2xx and a readable body.
    async fn discover_vllm_events(
        &self,
        worker: &Worker,
    ) -> Result<Option<EventSource>, QueryError> {
        let body = self.queries.get(worker, "/kv_event_sources").await?;
        let own_hosts = self.hosts_of(worker).await;
        let is_own = |host: &str| own_hosts.iter().any(|own| own == host);
        let mut sources = parse_event_sources(&body, is_own).ok_or_else(unreadable_body)?;
        let endpoint = match worker.config.rank {
            Some(rank) => sources.remove(&rank),
            // The only rank of this server, whose number need not be 0: it may be one of several servers
            // of one engine.
            None if sources.len() == 1 => sources.pop_first().map(|(_, endpoint)| endpoint),
            None => None,
        };
        Ok(endpoint.and_then(|endpoint| source_of(worker, endpoint)))
    }

    /// Returns the host of the worker's URL and the addresses that it resolves to. Returns only the
    /// host if it cannot be resolved in time.
    async fn hosts_of(&self, worker: &Worker) -> Vec<String> {
        let host = worker.config.authority.host().to_owned();
        if let Some(address) = worker.address.resolved_ip() {
            return vec![host, address.to_string()];
        }
        let look_up = tokio::net::lookup_host((worker.config.host(), 0));
        let resolved = timeout(self.look_up_timeout, look_up).await;
        let resolved = resolved.into_iter().flatten().flatten();
        let addresses = resolved.map(|address| address.ip().to_string());
        addresses.chain([host]).collect()
    }

    /// Returns the event source that an SGLang reports, and applies the capacity that it reports unless
    /// one is configured. `None` if the engine publishes no events, or has several ranks and the worker
    /// stands for all of them. Fails if the engine does not respond with 2xx and a readable body. Logs
    /// a warning if the block size or the number of ranks does not fit.
    async fn discover_sglang_events(
        &self,
        worker: &Worker,
    ) -> Result<Option<EventSource>, QueryError> {
        let config = &worker.config;
        let mut response = self.queries.get(worker, "/server_info").await;
        if matches!(response, Err(QueryError::Status(_) | QueryError::Failed(_))) {
            response = self.queries.get(worker, "/get_server_info").await;
        }
        let info = ServerInfo::parse(&response?).ok_or_else(unreadable_body)?;
        if let (None, Some(pages)) = (config.blocks, info.pages) {
            self.set_capacity(worker, pages, info.page_size);
        }
        self.compare_block_size(worker, info.page_size);
        compare_ranks(worker, info.ranks as usize);
        // The events of one rank would be applied as if they were of all.
        if info.ranks > 1 && config.rank.is_none() {
            return Ok(None);
        }
        let source = source_of(worker, info.kv_events);
        Ok(source.and_then(|source| source.for_rank(config.rank.unwrap_or(0))))
    }

    /// Sets the capacity of a worker: `blocks` engine blocks of `engine_block_size` tokens. An unknown
    /// block size, or one that is not a multiple of the router's, counts as equal to the router's. Also
    /// sets the engine block ratio in the router.
    fn set_capacity(&self, worker: &Worker, blocks: u32, engine_block_size: Option<u32>) {
        worker.reports.set_capacity_blocks(blocks);
        let block_size = self.block_size;
        let ratio = engine_block_size
            .filter(|&engine_block_size| engine_block_size % block_size == 0)
            .and_then(|engine_block_size| NonZeroU32::new(engine_block_size / block_size))
            .unwrap_or(NonZeroU32::MIN);
        let router = &self.router;
        router.set_engine_block_ratio(worker.id, ratio);
        router.set_capacity(worker.id, blocks.saturating_mul(ratio.get()));
    }

    /// Warns, once per worker, if the engine's block size is not a multiple of the router's. An unknown
    /// block size is ignored.
    fn compare_block_size(&self, worker: &Worker, engine_block_size: Option<u32>) {
        let block_size = self.block_size.get();
        let Some(engine_block_size) = engine_block_size.filter(|&size| size % block_size != 0)
        else {
            return;
        };
        if !worker
            .reports
            .block_size_warning_logged
            .swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                worker = %worker.config.name, engine_block_size, block_size,
                "engine block size is not a multiple of --block-size; set --block-size to \
                 {engine_block_size}"
            );
        }
    }
}

/// Returns the error for a response that is not in the expected format.
fn unreadable_body() -> QueryError {
    QueryError::Failed("unexpected response body".to_owned())
}

/// Returns the address at which the gateway can receive events published at `endpoint`: a wildcard
/// or loopback host is replaced by the host of the worker's URL. `None` if the engine publishes
/// none, or connects to an address instead of binding one; the latter is logged.
fn source_of(worker: &Worker, endpoint: KvEventEndpoint) -> Option<EventSource> {
    let config = &worker.config;
    match endpoint {
        KvEventEndpoint::None => None,
        KvEventEndpoint::Connect(endpoint) => {
            let port = endpoint
                .strip_prefix("tcp://")
                .and_then(|address| address.rsplit_once(':'))
                .map_or("PORT", |(_, port)| port);
            tracing::info!(
                worker = %config.name, endpoint,
                "engine publishes KV events by connecting to an endpoint; if that address is this \
                 host, add kv-events=bind:tcp://*:{port} to this worker"
            );
            None
        }
        KvEventEndpoint::Bind {
            host,
            port,
            replay_port,
            topic,
        } => {
            // Addresses that mean the engine's own host; from here, that is the host of its API.
            let local_hosts = [
                "*",
                "0.0.0.0",
                "::",
                "[::]",
                "127.0.0.1",
                "localhost",
                "[::1]",
            ];
            let host = if local_hosts.contains(&host.as_str()) {
                worker.address.url_host()
            } else {
                host
            };
            Some(EventSource {
                endpoint: format!("tcp://{host}:{port}"),
                binds: false,
                replay: replay_port.map(|port| format!("tcp://{host}:{port}")),
                topic,
            })
        }
    }
}

/// Warns, once per worker, if the engine has another number of ranks than its configuration.
/// `reported` is the engine's number; a configuration without ranks counts as one rank.
fn compare_ranks(worker: &Worker, reported: usize) {
    let configured = worker.config.ranks.map_or(1, |ranks| ranks.get() as usize);
    if reported != configured
        && !worker
            .reports
            .rank_warning_logged
            .swap(true, Ordering::Relaxed)
    {
        tracing::warn!(
            worker = %worker.config.name, reported, configured,
            "engine reports {reported} data-parallel ranks but the configuration has {configured}; use \
             --worker {},ranks={reported} so that each rank is routed separately",
            worker.config.url()
        );
    }
}

/// Parses a response of `/v1/models` into names and entries, each entry as the worker wrote it.
/// Entries without an `id` are left out; an unreadable list is empty.
fn read_models(body: &[u8]) -> Vec<(String, Box<RawValue>)> {
    #[derive(Deserialize)]
    struct ModelList {
        #[serde(default)]
        data: Vec<Box<RawValue>>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let list: ModelList = serde_json::from_slice(body).unwrap_or(ModelList { data: Vec::new() });
    let read = |raw: Box<RawValue>| {
        let model: Model = serde_json::from_str(raw.get()).ok()?;
        Some((model.id, raw))
    };
    list.data.into_iter().filter_map(read).collect()
}
