//! What engines themselves say they carry, asked for now and then and shown beside what is
//! predicted. Nothing is ever routed by it: it is stale by the time a burst comes.

use std::sync::Arc;

use foresee_engine::worker_metrics::EngineLoad;

use crate::health::get;
use crate::shared::Shared;
use crate::workers::Worker;

/// Asks a worker until it is removed, if the gateway is told to.
pub(crate) async fn sample_engine(shared: Arc<Shared>, worker: Arc<Worker>) {
    let Some(interval) = shared.config.sample_engines else {
        return;
    };
    let sampling = async {
        loop {
            let text = get(&shared, &worker, "/metrics").await.ok();
            let blocks = text.and_then(|text| {
                active_blocks(&String::from_utf8_lossy(&text), worker.config.rank)
            });
            // What was read before is no longer so, and is not shown if nothing is known now.
            shared.metrics.engine_active(&worker.config.name, blocks);
            *worker.engine_active_blocks.lock() = blocks;
            tokio::time::sleep(interval).await;
        }
    };
    tokio::select! {
        () = worker.until_removed() => {}
        () = sampling => {}
    }
    shared.metrics.engine_active(&worker.config.name, None);
}

/// Blocks pinned by running requests, of that rank or else of all engines behind the address;
/// `None` if none says.
fn active_blocks(metrics: &str, rank: Option<u32>) -> Option<u64> {
    let mut loads = EngineLoad::parse(metrics);
    loads.retain(|(found, _)| rank.is_none_or(|rank| rank == *found));
    let blocks: f64 = loads.iter().map(|(_, load)| load.active_blocks).sum();
    // A share times a number of blocks is not quite whole.
    (!loads.is_empty()).then(|| blocks.round() as u64)
}
