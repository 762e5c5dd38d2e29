//! Who is alive: a probe per worker, at an interval and whenever a request finds it failing.
//!
//! Probes are not requests: they are booked nowhere and never count as load.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_engine::worker_metrics::CacheConfig;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::forward::Message;
use crate::proxy::Shared;
use crate::workers::Worker;

/// Probes in a row that must fail before a worker is taken out, so that one slow answer is not
/// an outage. A refused connection takes it out at once, by the request that meets it.
const FAILURES_UNTIL_OUT: u32 = 2;

/// Every so many probes the models are asked for again: adapters come and go.
const PROBES_PER_LOOK_AT_MODELS: u32 = 10;

const MAX_PROBE_BYTES: usize = 4 << 20;

/// Probes `worker` until it is removed.
pub(crate) async fn watch_worker(shared: Arc<Shared>, worker: Arc<Worker>) {
    let mut failures = 0;
    let mut successes = 0;
    loop {
        let alive = get(&shared, &worker, "/health").await.is_some();
        let name = &worker.config.name;
        if alive {
            if successes % PROBES_PER_LOOK_AT_MODELS == 0 {
                learn_what_it_serves(&shared, &worker).await;
            }
            if successes == 0 {
                tracing::info!(worker = %name, "worker is healthy");
            }
            shared.router.set_healthy(worker.id, true);
            (failures, successes) = (0, successes + 1);
        } else {
            let label = [("worker", name.clone())];
            shared.metrics.probe_failures.get_or_create(&label).inc();
            (failures, successes) = (failures + 1, 0);
            if failures == FAILURES_UNTIL_OUT {
                tracing::warn!(worker = %name, "worker is unhealthy: its probe fails");
            }
            if failures >= FAILURES_UNTIL_OUT {
                shared.router.set_healthy(worker.id, false);
            }
        }
        tokio::select! {
            () = worker.removed.notified() => return,
            () = worker.suspect.notified() => {}
            () = tokio::time::sleep(shared.config.probe_interval) => {}
        }
    }
}

/// Asks for models and cache size before the first request, so that it is routed right.
async fn learn_what_it_serves(shared: &Shared, worker: &Worker) {
    if let Some(body) = get(shared, worker, "/v1/models").await {
        let models = read_models(&body);
        let names = models.iter().map(|(id, _)| id.clone()).collect();
        shared.router.set_models(worker.id, names);
        *worker.models.write() = models;
    }
    if worker.config.blocks.is_none()
        && let Some(body) = get(shared, worker, "/metrics").await
        && let Some(cache) = CacheConfig::parse(&String::from_utf8_lossy(&body))
    {
        if let Some(blocks) = cache.blocks {
            // vLLM keeps one block of each engine to itself.
            let usable = blocks.saturating_sub(cache.engines);
            shared.router.set_capacity(worker.id, usable);
        }
        let ours = shared.config.router.block_size.get();
        if let Some(theirs) = cache.block_size.filter(|&theirs| theirs != ours) {
            tracing::warn!(
                worker = %worker.config.name, theirs, ours,
                "block sizes differ: start with --block-size set to the engine's own"
            );
        }
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

/// The body of a successful answer in time; nothing else counts.
async fn get(shared: &Shared, worker: &Worker, path: &'static str) -> Option<Bytes> {
    let message = Message {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        headers: HeaderMap::new(),
        body: Bytes::new(),
    };
    let answered = async {
        let response = shared.probes.send(worker, &message).await.ok()?;
        if !response.status().is_success() {
            return None;
        }
        let body = Limited::new(response.into_body(), MAX_PROBE_BYTES);
        Some(body.collect().await.ok()?.to_bytes())
    };
    let limit = shared
        .config
        .connect_timeout
        .max(Duration::from_millis(100));
    tokio::time::timeout(limit, answered).await.ok()?
}
