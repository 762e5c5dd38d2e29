//! Polls the load that engines report in their own `/metrics`.
//!
//! The figures are shown next to the router's predictions and are never used for routing: they are
//! outdated by the time a burst of requests arrives.

use std::sync::Arc;

use foresee_engine::worker_metrics::EngineLoad;

use crate::gateway_state::GatewayState;
use crate::workers::Worker;
use crate::workers::query::get;

/// Polls a worker's `/metrics` until the worker is removed. Returns immediately if the
/// configuration sets no interval. A failed read removes the last value.
pub(crate) async fn watch_engine_metrics(shared: Arc<GatewayState>, worker: Arc<Worker>) {
    let Some(interval) = shared.config.engine_metrics_interval else {
        return;
    };
    let polling = async {
        loop {
            let text = get(&shared, &worker, "/metrics").await.ok();
            let blocks = text.and_then(|text| {
                active_blocks(&String::from_utf8_lossy(&text), worker.config.rank)
            });
            // Without a new value the old one is removed, because it no longer describes the engine.
            shared
                .metrics
                .set_engine_active_blocks(&worker.config.name, blocks);
            *worker.engine_active_blocks.lock() = blocks;
            tokio::time::sleep(interval).await;
        }
    };
    tokio::select! {
        () = worker.until_removed() => {}
        () = polling => {}
    }
    shared
        .metrics
        .set_engine_active_blocks(&worker.config.name, None);
}

/// Returns the number of blocks that running requests pin, from an engine's `metrics` text: of
/// rank `rank`, or the sum over all ranks if that is `None`. `None` if the text has no such metric.
fn active_blocks(metrics: &str, rank: Option<u32>) -> Option<u64> {
    let mut loads = EngineLoad::parse(metrics);
    loads.retain(|(found, _)| rank.is_none_or(|rank| rank == *found));
    let blocks: f64 = loads.iter().map(|(_, load)| load.active_blocks).sum();
    // Engines report a fraction of their blocks; its product with the capacity is not an integer.
    (!loads.is_empty()).then(|| blocks.round() as u64)
}
