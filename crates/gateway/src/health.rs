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

use crate::forward::{ForwardError, Message};
use crate::shared::Shared;
use crate::workers::Worker;

/// Probes in a row that must fail before a worker is taken out, so that one slow answer is not
/// an outage. A refused connection takes it out at once, by the request that meets it.
const FAILURES_UNTIL_OUT: u32 = 2;

/// Every so many probes the models are asked for again: adapters come and go.
const PROBES_PER_LOOK_AT_MODELS: u32 = 10;

/// Least time between two probes, however many requests ask for one: failures in a row shall be
/// more than one moment.
const PROBE_GAP: Duration = Duration::from_millis(10);

const MAX_PROBE_BYTES: usize = 4 << 20;

/// Probes `worker` until it is removed.
pub(crate) async fn watch_worker(shared: Arc<Shared>, worker: Arc<Worker>) {
    let mut failures = 0;
    let mut successes = 0;
    loop {
        tokio::time::sleep(PROBE_GAP).await;
        let asked_at = shared.clock.now();
        let answer = get(&shared, &worker, "/health").await;
        let name = &worker.config.name;
        if answer.is_ok() {
            if worker.is_back() {
                tracing::info!(worker = %name, "worker was away: its cache counts as empty");
                shared.router.forget_cache(worker.id);
                worker.resubscribe.notify_one();
            } else if failures >= FAILURES_UNTIL_OUT {
                // Its connections may be gone without anybody having said so.
                worker.resubscribe.notify_one();
            }
            if successes % PROBES_PER_LOOK_AT_MODELS == 0 {
                learn_what_it_serves(&shared, &worker).await;
            }
            shared.router.set_healthy(worker.id, true);
            if successes == 0 {
                tracing::info!(worker = %name, "worker is healthy");
            }
            (failures, successes) = (0, successes + 1);
        } else if answer == Err(NoAnswer::Late) && worker.heard_at() > asked_at {
            // Too busy to answer a probe, and not too busy to serve.
            tracing::debug!(worker = %name, "probe is late, but streams come through");
        } else {
            if answer == Err(NoAnswer::Absent) {
                worker.is_absent();
            }
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
            () = worker.until_removed() => return,
            () = worker.suspect.notified() => {}
            () = tokio::time::sleep(shared.config.probe_interval) => {}
        }
    }
}

/// Asks for models and cache size before the first request, so that it is routed right.
async fn learn_what_it_serves(shared: &Shared, worker: &Worker) {
    if let Ok(body) = get(shared, worker, "/v1/models").await {
        let models = read_models(&body);
        let names = models.iter().map(|(id, _)| id.clone()).collect();
        shared.router.set_models(worker.id, names);
        shared.workers.set_models(worker, models);
    }
    if worker.config.blocks.is_none()
        && let Ok(body) = get(shared, worker, "/metrics").await
    {
        let engines = CacheConfig::parse(&String::from_utf8_lossy(&body));
        let blocks: Option<Vec<u32>> = engines.iter().map(|(_, cache)| cache.blocks).collect();
        if let Some(blocks) = blocks.filter(|blocks| !blocks.is_empty()) {
            let all = blocks.into_iter().fold(0, u32::saturating_add);
            shared.router.set_capacity(worker.id, all);
            worker.set_capacity_blocks(all);
        }
        let ours = shared.config.router.block_size.get();
        let theirs = engines.iter().find_map(|(_, cache)| cache.block_size);
        if let Some(theirs) = theirs.filter(|&theirs| theirs != ours) {
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

/// Why a probe has no answer to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// None came in time.
    Late,
    /// Nobody listens there.
    Absent,
    /// The connection failed, or the answer was no success.
    Bad,
}

/// The body of a successful answer in time; nothing else counts.
pub(crate) async fn get(
    shared: &Shared,
    worker: &Worker,
    path: &'static str,
) -> Result<Bytes, NoAnswer> {
    let message = Message {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        may_repeat: true,
        lists_cached: false,
    };
    let answered = async {
        let sent = shared.probes.send(worker, &message).await;
        let response = sent.map_err(|error| match error {
            ForwardError::Unreached(_) | ForwardError::Exhausted(_) => NoAnswer::Late,
            ForwardError::Absent(_) => NoAnswer::Absent,
            _ => NoAnswer::Bad,
        })?;
        if !response.status().is_success() {
            return Err(NoAnswer::Bad);
        }
        let body = Limited::new(response.into_body(), MAX_PROBE_BYTES).collect();
        Ok(body.await.map_err(|_| NoAnswer::Bad)?.to_bytes())
    };
    let limit = shared
        .config
        .connect_timeout
        .max(Duration::from_millis(100));
    let in_time = tokio::time::timeout(limit, answered).await;
    in_time.unwrap_or(Err(NoAnswer::Late))
}
