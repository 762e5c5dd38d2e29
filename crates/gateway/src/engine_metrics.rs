//! Polls the load that engines report in their own `/metrics`.
//!
//! The figures are shown next to the router's predictions and are never used for routing: they are
//! outdated by the time a burst of requests arrives.

use std::sync::Arc;
use std::time::Duration;

use foresee_engine::worker_metrics::EngineLoad;

use crate::metrics::Metrics;
use crate::workers::query::WorkerQueries;
use crate::workers::worker::Worker;

/// Reader of the load that engines report.
#[derive(Debug)]
pub(crate) struct EngineMetricsReader {
    pub(crate) queries: WorkerQueries,
    pub(crate) metrics: Arc<Metrics>,
    /// Time between two reads of one engine; `None` for never.
    pub(crate) interval: Option<Duration>,
}

impl EngineMetricsReader {
    /// Polls a worker's `/metrics` until the worker is removed. Returns immediately without an
    /// interval. A failed read removes the last value.
    pub(crate) async fn watch(self: Arc<Self>, worker: Arc<Worker>) {
        let Some(interval) = self.interval else {
            return;
        };
        let polling = async {
            loop {
                let text = self.queries.get(&worker, "/metrics").await.ok();
                let blocks = text.and_then(|text| {
                    active_blocks(&String::from_utf8_lossy(&text), worker.config.rank)
                });
                // Without a new value the old one is removed, because it no longer describes the
                // engine.
                self.metrics
                    .set_engine_active_blocks(&worker.config.name, blocks);
                *worker.reports.active_blocks.lock() = blocks;
                tokio::time::sleep(interval).await;
            }
        };
        tokio::select! {
            () = worker.until_removed() => {}
            () = polling => {}
        }
        self.metrics
            .set_engine_active_blocks(&worker.config.name, None);
    }
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
