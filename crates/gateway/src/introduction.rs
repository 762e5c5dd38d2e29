//! What a worker says of itself: the models it serves, which engine it is, how large its cache is,
//! and where it publishes what it caches.

use std::num::NonZeroU32;
use std::sync::atomic::Ordering;

use foresee_core::Eviction;
use foresee_engine::server_info::{Published, ServerInfo, parse_event_sources};
use foresee_engine::worker_metrics::CacheConfig;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::health::{NoAnswer, get};
use crate::shared::Shared;
use crate::subscribe::{EventSource, KvEvents};
use crate::workers::Worker;

/// Asks for models and cache size before the first request, so that it is routed right.
pub(crate) async fn learn_what_it_serves(shared: &Shared, worker: &Worker) {
    if let Ok(body) = get(shared, worker, "/v1/models").await {
        let models = read_models(&body);
        let names = models.iter().map(|(id, _)| id.clone()).collect();
        shared.router.set_models(worker.id, names);
        shared.workers.set_models(worker, models);
        if worker.config.eviction.is_none() && worker.says_it_is("sglang") {
            shared.router.set_eviction(worker.id, Eviction::Radix);
        }
    } else {
        worker.says_no_models();
    }
    if worker.config.blocks.is_none()
        && let Ok(body) = get(shared, worker, "/metrics").await
    {
        let engines = CacheConfig::parse(&String::from_utf8_lossy(&body));
        if engines.is_empty() {
            return;
        }
        compare_ranks(worker, engines.len());
        let theirs = engines.iter().find_map(|(_, cache)| cache.block_size);
        let is_ours = |rank: u32| worker.config.rank.is_none_or(|ours| ours == rank);
        let ours = engines.iter().filter(|(rank, _)| is_ours(*rank));
        let blocks: Option<Vec<u32>> = ours.map(|(_, cache)| cache.blocks).collect();
        if let Some(blocks) = blocks.filter(|blocks| !blocks.is_empty()) {
            let all = blocks.into_iter().fold(0, u32::saturating_add);
            set_capacity(shared, worker, all, theirs);
        }
        compare_block_size(shared, worker, theirs);
    }
}

/// Asks where its events are, if that is to be found out. Returns whether it has said so, or
/// cannot.
pub(crate) async fn learn_where_its_events_are(shared: &Shared, worker: &Worker) -> bool {
    if worker.config.kv_events != KvEvents::Discovered {
        return true;
    }
    // vLLM's development mode has a `/server_info` too, which takes seconds and tells nothing.
    let found = if worker.says_it_is("vllm") {
        ask_vllm(shared, worker).await
    } else {
        ask_sglang(shared, worker).await
    };
    match found {
        Ok(source) => {
            worker.event_source.send_if_modified(|known| {
                let is_new = *known != source;
                *known = source;
                is_new
            });
            true
        }
        Err(NoAnswer::Bad) => true,
        Err(NoAnswer::Late | NoAnswer::Absent) => false,
    }
}

async fn ask_vllm(shared: &Shared, worker: &Worker) -> Result<Option<EventSource>, NoAnswer> {
    let body = get(shared, worker, "/kv_event_sources").await?;
    let own = hosts_of(worker).await;
    let is_own = |host: &str| own.iter().any(|it| it == host);
    let mut sources = parse_event_sources(&body, is_own).ok_or(NoAnswer::Bad)?;
    let published = match worker.config.rank {
        Some(rank) => sources.remove(&rank),
        // A server of one rank may be any of a larger whole.
        None if sources.len() == 1 => sources.pop_first().map(|(_, published)| published),
        None => None,
    };
    Ok(published.and_then(|published| source_of(worker, published)))
}

/// Its host as its address is written, and what that stands for.
async fn hosts_of(worker: &Worker) -> Vec<String> {
    let host = worker.config.authority.host();
    let found = tokio::net::lookup_host((host.trim_matches(['[', ']']), 0)).await;
    let addresses = found.into_iter().flatten().map(|it| it.ip().to_string());
    addresses.chain([host.to_owned()]).collect()
}

async fn ask_sglang(shared: &Shared, worker: &Worker) -> Result<Option<EventSource>, NoAnswer> {
    let config = &worker.config;
    let mut answer = get(shared, worker, "/server_info").await;
    if answer == Err(NoAnswer::Bad) {
        answer = get(shared, worker, "/get_server_info").await;
    }
    let info = ServerInfo::parse(&answer?).ok_or(NoAnswer::Bad)?;
    if let (None, Some(pages)) = (config.blocks, info.pages) {
        set_capacity(shared, worker, pages, info.page_size);
    }
    compare_block_size(shared, worker, info.page_size);
    compare_ranks(worker, info.ranks as usize);
    // The events of one rank would be taken for those of all.
    if info.ranks > 1 && config.rank.is_none() {
        return Ok(None);
    }
    let source = source_of(worker, info.kv_events);
    Ok(source.and_then(|source| source.of_rank(config.rank.unwrap_or(0))))
}

/// Where what was published is to be had from here.
fn source_of(worker: &Worker, published: Published) -> Option<EventSource> {
    let config = &worker.config;
    match published {
        Published::Nowhere => None,
        Published::Dials(endpoint) => {
            tracing::info!(
                worker = %config.name, endpoint,
                "it sends its KV events there: write kv-events=bind:tcp://*:PORT if that is here"
            );
            None
        }
        Published::Listens {
            host,
            port,
            replay_port,
            topic,
        } => {
            // As seen from the worker; from here, it is where its API is.
            let its_own = [
                "*",
                "0.0.0.0",
                "::",
                "[::]",
                "127.0.0.1",
                "localhost",
                "[::1]",
            ];
            let host = if its_own.contains(&host.as_str()) {
                config.authority.host()
            } else {
                &host
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

/// It has so many blocks, of `theirs` tokens each if that is known.
fn set_capacity(shared: &Shared, worker: &Worker, blocks: u32, theirs: Option<u32>) {
    worker.set_capacity_blocks(blocks);
    let ours = shared.config.router.block_size;
    let stride = theirs.filter(|&theirs| theirs % ours == 0);
    let stride = stride.and_then(|theirs| NonZeroU32::new(theirs / ours));
    let stride = stride.unwrap_or(NonZeroU32::MIN);
    let router = &shared.router;
    router.set_stride(worker.id, stride);
    router.set_capacity(worker.id, blocks.saturating_mul(stride.get()));
}

fn compare_block_size(shared: &Shared, worker: &Worker, theirs: Option<u32>) {
    let ours = shared.config.router.block_size.get();
    if let Some(theirs) = theirs.filter(|&theirs| theirs % ours != 0) {
        tracing::warn!(
            worker = %worker.config.name, theirs, ours,
            "the engine's blocks are no multiple of ours: set --block-size to its own"
        );
    }
}

/// Ranks are told apart only if it is written that they are there.
fn compare_ranks(worker: &Worker, theirs: usize) {
    let ours = worker.config.ranks.map_or(1, |ranks| ranks.get() as usize);
    if theirs != ours && !worker.told_of_ranks.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            worker = %worker.config.name, theirs, ours,
            "the engine has other data-parallel ranks: write --worker {},ranks={theirs}",
            worker.config.url()
        );
    }
}

fn read_models(body: &[u8]) -> Vec<(String, Box<RawValue>)> {
    #[derive(Deserialize)]
    struct List {
        #[serde(default)]
        data: Vec<Box<RawValue>>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let list: List = serde_json::from_slice(body).unwrap_or(List { data: Vec::new() });
    let read = |raw: Box<RawValue>| {
        let model: Model = serde_json::from_str(raw.get()).ok()?;
        Some((model.id, raw))
    };
    list.data.into_iter().filter_map(read).collect()
}
