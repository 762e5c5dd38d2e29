//! How a router in a replay comes to know what engines cache.
//!
//! By their events, as a gateway that follows them: each engine's events of one step are a batch,
//! which arrives later, or never, and goes through the view that a gateway keeps. Or not at all:
//! then it has the shadow of what it sent, and what answers report of their prompts.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use foresee_core::cache::{CacheView, Changes, StoredBlocks};
use foresee_core::fleet::WorkerId;
use foresee_core::router::Router;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::engine::CacheEvent;
use crate::traffic::Traffic;

/// What tells a router what its workers cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Knowledge {
    /// Nothing but what it sent, and what answers report.
    Shadow,
    /// The engines' KV events.
    Events {
        /// From the end of a step to the router's hearing of it.
        lag: Duration,
        /// Share of the batches that never come. (A gateway would notice, and ask again.)
        loss: f64,
    },
}

impl Default for Knowledge {
    /// Events at once.
    fn default() -> Self {
        Self::Events {
            lag: Duration::ZERO,
            loss: 0.0,
        }
    }
}

/// A batch on its way.
#[derive(Debug)]
struct Batch {
    due: Duration,
    worker: usize,
    events: Vec<CacheEvent>,
}

/// Carries events from engines to the router.
#[derive(Debug)]
pub(crate) struct Follower {
    lag: Duration,
    loss: f64,
    losses: SmallRng,
    /// One for each worker.
    views: Vec<View>,
    /// In the order they are due.
    on_the_way: VecDeque<Batch>,
}

#[derive(Debug)]
struct View {
    /// The router's blocks in one of the engine's.
    stride: u32,
    cache: CacheView,
}

impl Follower {
    /// Of engines whose blocks are so many times the router's; `None` if there are no events.
    pub(crate) fn new(
        knowledge: Knowledge,
        traffic: &Traffic,
        strides: impl Iterator<Item = u32>,
        seed: u64,
    ) -> Option<Self> {
        let Knowledge::Events { lag, loss } = knowledge else {
            return None;
        };
        let view = |stride| View {
            stride,
            cache: CacheView::new(traffic.block_size()),
        };
        Some(Self {
            lag,
            loss,
            losses: SmallRng::seed_from_u64(seed),
            views: strides.map(view).collect(),
            on_the_way: VecDeque::new(),
        })
    }

    /// When the next batch arrives.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.on_the_way.front().map(|batch| batch.due)
    }

    /// An engine sends the events of a step.
    pub(crate) fn send(&mut self, worker: usize, events: Vec<CacheEvent>, now: Duration) {
        if events.is_empty() || (self.loss > 0.0 && self.losses.random::<f64>() < self.loss) {
            return;
        }
        self.on_the_way.push_back(Batch {
            due: now + self.lag,
            worker,
            events,
        });
    }

    /// Tells the router what has arrived by `now`.
    pub(crate) fn deliver(
        &mut self,
        now: Duration,
        traffic: &Traffic,
        router: &Router,
        id: impl Fn(usize) -> Option<WorkerId>,
    ) {
        while self.next_due().is_some_and(|due| due <= now)
            && let Some(batch) = self.on_the_way.pop_front()
        {
            let view = &mut self.views[batch.worker];
            let Some(id) = id(batch.worker) else { continue };
            for changes in view.follow(&batch.events, traffic) {
                router.update_cache(id, &changes, Some(now));
            }
        }
    }
}

impl View {
    /// What a batch changes, in order.
    fn follow(&mut self, events: &[CacheEvent], traffic: &Traffic) -> Vec<Changes> {
        let mut all = Vec::new();
        let mut removed = Vec::new();
        for event in events {
            match event {
                CacheEvent::Removed { hash } => removed.push(*hash),
                CacheEvent::Stored { request, blocks } => {
                    if !removed.is_empty() {
                        all.push(self.cache.remove(&removed));
                        removed.clear();
                    }
                    all.push(self.store(*request as usize, blocks.clone(), traffic));
                }
            }
        }
        if !removed.is_empty() {
            all.push(self.cache.remove(&removed));
        }
        all
    }

    fn store(&mut self, request: usize, blocks: Range<usize>, traffic: &Traffic) -> Changes {
        let hashes = traffic.known(request).hashes();
        // An engine's block has the prefix of the last of ours in it.
        let name = |block: usize| hashes[(block + 1) * self.stride as usize - 1];
        let Range { start, end } = blocks;
        let names: Vec<u64> = blocks.map(name).collect();
        let block_size = traffic.block_size().get() * self.stride;
        let positions = start as u32 * block_size..end as u32 * block_size;
        self.cache.store(&StoredBlocks {
            parent: start.checked_sub(1).map(name),
            hashes: &names,
            tokens: &traffic.tokens(request, positions),
            block_size,
            salt: 0,
        })
    }
}
