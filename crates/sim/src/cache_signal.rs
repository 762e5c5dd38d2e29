//! Cache signal: what the router in a replay learns of the engines' caches.
//!
//! - With events, the KV events of one engine step form a batch. The batch arrives after a lag, or
//!   is lost, and passes through the same [`CacheView`] that the gateway uses.
//! - Without events, the router has its estimated cache: the engine's eviction rule, run on the
//!   requests that it sent, corrected by the cached tokens that responses report.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use foresee_core::event_index::{CacheDelta, CacheView, StoredBlocks};
use foresee_core::router::{Observed, Router};
use foresee_core::workers::WorkerId;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::engine::CacheEvent;
use crate::hashed_workload::HashedWorkload;

/// Source of the router's knowledge about the caches of its workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CacheSignal {
    /// No events: the cache contents are estimated from the requests that the router sent and from
    /// the cached tokens that responses report.
    Estimated,
    /// KV events of the engines.
    Events {
        /// Time from the end of a step until the router receives its events.
        lag: Duration,
        /// Fraction of the batches that are lost, from 0 to 1. A gateway would notice the gap and
        /// request a replay; the simulation does not.
        loss_fraction: f64,
    },
}

impl Default for CacheSignal {
    /// Returns events without lag and loss.
    fn default() -> Self {
        Self::Events {
            lag: Duration::ZERO,
            loss_fraction: 0.0,
        }
    }
}

/// Events of one engine step that have not arrived at the router.
#[derive(Debug)]
struct Batch {
    /// Time of arrival.
    due: Duration,
    /// Index of the worker in the fleet.
    worker: usize,
    events: Vec<CacheEvent>,
}

/// Transport of KV events from the engines to the router, with lag and loss.
#[derive(Debug)]
pub(crate) struct DelayedEvents {
    /// Time from the end of a step until its events arrive.
    lag: Duration,
    /// Probability that a batch is lost.
    loss_fraction: f64,
    /// Generator that decides which batches are lost.
    rng: SmallRng,
    /// By worker.
    views: Vec<WorkerView>,
    /// Batches in the order of their arrival.
    in_transit: VecDeque<Batch>,
}

/// Cache of one worker as its events describe it.
#[derive(Debug)]
struct WorkerView {
    /// Engine block size ÷ router block size.
    engine_block_ratio: u32,
    cache: CacheView,
}

impl DelayedEvents {
    /// Creates the transport for workers with these engine block ratios. `None` if the signal has
    /// no events. `seed` decides which batches are lost.
    pub(crate) fn new(
        signal: CacheSignal,
        traffic: &HashedWorkload,
        engine_block_ratios: impl Iterator<Item = u32>,
        seed: u64,
    ) -> Option<Self> {
        let CacheSignal::Events { lag, loss_fraction } = signal else {
            return None;
        };
        let view = |engine_block_ratio| WorkerView {
            engine_block_ratio,
            cache: CacheView::new(traffic.block_size()),
        };
        Some(Self {
            lag,
            loss_fraction,
            rng: SmallRng::seed_from_u64(seed),
            views: engine_block_ratios.map(view).collect(),
            in_transit: VecDeque::new(),
        })
    }

    /// Returns the time at which the next batch arrives; `None` if no batch is in transit.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.in_transit.front().map(|batch| batch.due)
    }

    /// Sends the events of a step that ended at `now`, unless the batch is lost. An empty list is
    /// not sent.
    pub(crate) fn send(&mut self, worker: usize, events: Vec<CacheEvent>, now: Duration) {
        let loss = self.loss_fraction;
        if events.is_empty() || (loss > 0.0 && self.rng.random::<f64>() < loss) {
            return;
        }
        self.in_transit.push_back(Batch {
            due: now + self.lag,
            worker,
            events,
        });
    }

    /// Applies all batches that have arrived by `now` to the router. `id` returns the id of a
    /// worker in the router, or `None` while the worker has not joined. Batches of a worker that
    /// has not joined are dropped.
    pub(crate) fn deliver(
        &mut self,
        now: Duration,
        traffic: &HashedWorkload,
        router: &Router,
        id: impl Fn(usize) -> Option<WorkerId>,
    ) {
        while self.next_due().is_some_and(|due| due <= now)
            && let Some(batch) = self.in_transit.pop_front()
        {
            let view = &mut self.views[batch.worker];
            let Some(id) = id(batch.worker) else { continue };
            for delta in view.apply(&batch.events, traffic) {
                router.apply_cache_delta(id, &delta, Observed::Live(now));
            }
        }
    }
}

impl WorkerView {
    /// Applies the events of a batch to the view, and returns the resulting deltas in order.
    /// Consecutive removals become one delta.
    fn apply(&mut self, events: &[CacheEvent], traffic: &HashedWorkload) -> Vec<CacheDelta> {
        let mut deltas = Vec::new();
        let mut removed = Vec::new();
        for event in events {
            match event {
                CacheEvent::Removed { hash } => removed.push(*hash),
                CacheEvent::Stored { request, blocks } => {
                    if !removed.is_empty() {
                        deltas.push(self.cache.remove(&removed));
                        removed.clear();
                    }
                    deltas.push(self.store(*request as usize, blocks.clone(), traffic));
                }
            }
        }
        if !removed.is_empty() {
            deltas.push(self.cache.remove(&removed));
        }
        deltas
    }

    /// Stores `blocks`, which are indices of engine blocks in the prompt and output of a request.
    fn store(
        &mut self,
        request: usize,
        blocks: Range<usize>,
        traffic: &HashedWorkload,
    ) -> CacheDelta {
        let hashes = traffic.longest_known(request).hashes();
        // An engine block ends with its last router block, and has the hash of that.
        let engine_hash = |block: usize| hashes[(block + 1) * self.engine_block_ratio as usize - 1];
        let Range { start, end } = blocks;
        let engine_hashes: Vec<u64> = blocks.map(engine_hash).collect();
        let block_size = traffic.block_size().get() * self.engine_block_ratio;
        let positions = start as u32 * block_size..end as u32 * block_size;
        self.cache.store(&StoredBlocks {
            parent: start.checked_sub(1).map(engine_hash),
            engine_hashes: &engine_hashes,
            tokens: &traffic.tokens(request, positions),
            block_size,
            salt: 0,
        })
    }
}
