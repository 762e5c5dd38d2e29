//! Snapshots: the state of every worker at one instant, for the admin API and metrics.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use foresee_forecast::{LatencyAccuracy, LatencyModel};
use foresee_prefix::{CacheSource, CapacitySource, EvictionRule, PrefixState};

use super::{WorkerId, WorkerState, Workers};
use crate::outlier::OutlierSnapshot;
use crate::time::duration_from_secs_saturating;

/// State of one worker at one instant.
#[derive(Clone, Debug)]
pub struct WorkerSnapshot {
    /// Worker id.
    pub id: WorkerId,
    /// Worker name.
    pub name: Arc<str>,
    /// Whether the worker can be chosen.
    pub state: WorkerState,
    /// Models that the worker serves, each once; empty while they are unknown.
    pub models: Arc<[String]>,
    /// Number of requests booked on the worker, queued ones included.
    pub requests: u32,
    /// Number of those requests that are queued at the router.
    pub queued_requests: u32,
    /// KV blocks pinned by the requests that were sent to the worker; shared ones count once.
    pub active_blocks: u64,
    /// KV blocks that the queued requests will pin in addition.
    pub queued_blocks: u64,
    /// Prompt and output tokens of all booked requests; shared ones count each time.
    pub context_tokens: u64,
    /// Booked prompt tokens that the worker has not computed yet, as predicted. Tokens of queued
    /// requests are included, cached tokens are not.
    pub prefill_tokens: u64,
    /// KV blocks in the worker's prefix cache, pinned or not, according to its cache source.
    pub cached_blocks: u64,
    /// Source of the worker's cache contents.
    pub cache_source: CacheSource,
    /// Number of KV blocks of the worker.
    pub capacity_blocks: u32,
    /// Source of that number.
    pub capacity_source: CapacitySource,
    /// Rule by which the engine selects the blocks that it evicts.
    pub eviction: EvictionRule,
    /// Latency model of the worker, as learned.
    pub latency: LatencyModel,
    /// Predicted time until all booked prompts are computed, queued ones included.
    pub prefill_backlog: Duration,
    /// Predicted time between two output tokens of one request, with the present decode batch.
    pub inter_token_latency: Duration,
    /// Accuracy of the predicted times to first token: the number of predictions that were compared
    /// with the observed time, and their mean absolute relative error.
    pub ttft_accuracy: LatencyAccuracy,
    /// Failures, ejection, backpressure and warm-up.
    pub outlier: OutlierSnapshot,
}

impl Workers {
    /// Adds a snapshot of every worker whose index is in `indices` to `snapshots`, by ascending
    /// index. `prefixes` has the caches of the workers. Forecasts are made for `now`, a time of the
    /// router's clock.
    pub(crate) fn snapshot(
        &self,
        indices: Range<usize>,
        prefixes: &PrefixState,
        now: Duration,
        snapshots: &mut Vec<WorkerSnapshot>,
    ) {
        let end = indices.end.min(self.workers.len());
        let workers = self.workers.get(indices.start..end).unwrap_or_default();
        snapshots.extend(workers.iter().flatten().map(|worker| {
            let load = self.loads[worker.id.index as usize];
            let pending_work = &self.pending_work[worker.id.index as usize];
            let latency_model = self.latency_now(pending_work, now);
            let cache = prefixes.status(worker.id.index);
            let step_seconds = pending_work.decode_step_seconds(&latency_model);
            WorkerSnapshot {
                id: worker.id,
                name: Arc::clone(&worker.name),
                state: worker.state(),
                models: Arc::clone(&worker.models),
                requests: load.requests,
                queued_requests: pending_work.queue.totals().requests,
                active_blocks: load.active_blocks,
                queued_blocks: load.queued_blocks,
                context_tokens: load.context_tokens,
                prefill_tokens: pending_work.prefill_backlog_tokens(&latency_model, now),
                cached_blocks: cache.cached_blocks,
                cache_source: cache.source,
                capacity_blocks: cache.capacity_blocks,
                capacity_source: cache.capacity_source,
                eviction: cache.eviction,
                prefill_backlog: duration_from_secs_saturating(
                    pending_work.prefill_backlog_seconds(&latency_model, now),
                ),
                inter_token_latency: duration_from_secs_saturating(step_seconds),
                ttft_accuracy: pending_work.latency.ttft_accuracy(),
                latency: latency_model,
                outlier: self
                    .outliers
                    .record(worker.id.index)
                    .map(|record| record.snapshot(&self.outliers.config, now))
                    .unwrap_or_default(),
            }
        }));
    }
}
