//! Caches of a router according to KV events, compared with a model that stores every block separately.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::event_index::{CacheView, StoredBlocks};
use foresee_core::router::{CacheSource, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};
use proptest::prelude::*;

const ROUTER_BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();
const SALT: u64 = 7;

#[derive(Clone, Debug)]
enum Step {
    /// The engine computes a prompt. The event omits the first `from` blocks, which the engine had.
    /// With `late_parent`, the event that stores those follows.
    Store {
        worker: usize,
        prompt: Vec<u32>,
        from: usize,
        late_parent: bool,
    },
    /// The engine evicts one block of a prompt, at any position.
    Remove {
        worker: usize,
        prompt: Vec<u32>,
        end: usize,
    },
    Clear {
        worker: usize,
    },
    /// Events are unusable for a while. Then the whole cache is reported again.
    Resync {
        worker: usize,
    },
    /// The worker is removed, and another one is added.
    Replace {
        worker: usize,
    },
}

impl Step {
    fn worker(&self) -> usize {
        match self {
            Self::Store { worker, .. }
            | Self::Remove { worker, .. }
            | Self::Clear { worker }
            | Self::Resync { worker }
            | Self::Replace { worker } => *worker,
        }
    }
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    let tail = prop::collection::vec(0..2u32, 0..10);
    (0..14usize, tail).prop_map(|(zeros, tail)| {
        let mut prompt = vec![0; zeros];
        prompt.extend(tail);
        prompt
    })
}

fn step() -> impl Strategy<Value = Step> {
    let worker = 0..3usize;
    prop_oneof![
        10 => (worker.clone(), prompt(), 0..4usize, prop::bool::weighted(0.2)).prop_map(
            |(worker, prompt, from, late_parent)| Step::Store { worker, prompt, from, late_parent }
        ),
        8 => (worker.clone(), prompt(), 0..8usize)
            .prop_map(|(worker, prompt, end)| Step::Remove { worker, prompt, end }),
        1 => worker.clone().prop_map(|worker| Step::Clear { worker }),
        1 => worker.clone().prop_map(|worker| Step::Resync { worker }),
        1 => worker.prop_map(|worker| Step::Replace { worker }),
    ]
}

/// Returns the engine hash of the block that ends a prefix. Any injective function will do.
fn engine_hash(prefix: &[u32]) -> u64 {
    let digits = prefix
        .iter()
        .fold(1, |number: u64, &token| number * 3 + u64::from(token) + 1);
    digits.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Model of one engine, and the view that follows its events.
struct Engine {
    block_size: usize,
    /// Store count of each block, by the prefix that it ends.
    stores: HashMap<Vec<u32>, u32>,
    view: CacheView,
    id: WorkerId,
}

impl Engine {
    fn new(router: &Router, worker: usize, block_size: usize) -> Self {
        let spec = WorkerSpec {
            name: worker.to_string(),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
        router.set_cache_source(id, CacheSource::Events);
        Self {
            block_size,
            stores: HashMap::new(),
            view: CacheView::new(ROUTER_BLOCK_SIZE),
            id,
        }
    }

    /// Returns the positions in a prompt at which a block ends, in tokens.
    fn block_ends(&self, prompt: &[u32]) -> Vec<usize> {
        (1..=prompt.len() / self.block_size)
            .map(|block| block * self.block_size)
            .collect()
    }

    /// Returns the number of leading tokens of a prompt in cached blocks.
    fn cached_tokens(&self, prompt: &[u32]) -> usize {
        let ends = self.block_ends(prompt).into_iter();
        let cached = ends.take_while(|&end| self.stores.contains_key(&prompt[..end]));
        cached.last().unwrap_or(0)
    }

    /// Stores the blocks of a prompt between two token positions, and reports them to the router.
    fn store(&mut self, router: &Router, prompt: &[u32], from: usize, to: usize) {
        let hashes: Vec<u64> = (from / self.block_size + 1..=to / self.block_size)
            .map(|block| engine_hash(&prompt[..block * self.block_size]))
            .collect();
        for end in self.block_ends(&prompt[..to]) {
            if end > from {
                *self.stores.entry(prompt[..end].to_vec()).or_default() += 1;
            }
        }
        let delta = self.view.store(&StoredBlocks {
            parent: (from > 0).then(|| engine_hash(&prompt[..from])),
            engine_hashes: &hashes,
            tokens: &prompt[from..to],
            block_size: self.block_size as u32,
            salt: SALT,
        });
        router.apply_cache_delta(self.id, &delta, Observed::Live(Duration::ZERO));
    }

    fn apply(&mut self, router: &Router, step: &Step) {
        match step {
            Step::Store {
                prompt,
                from,
                late_parent,
                ..
            } => {
                let end = self.block_ends(prompt).last().copied().unwrap_or(0);
                let from = (from * self.block_size).min(end);
                let parent_known = from == 0 || self.stores.contains_key(&prompt[..from]);
                if end == from || (!parent_known && !late_parent) {
                    return;
                }
                self.store(router, prompt, from, end);
                if !parent_known {
                    // The batch that stored the blocks before these arrives late.
                    self.store(router, prompt, 0, from);
                }
            }
            Step::Remove { prompt, end, .. } => {
                let ends = self.block_ends(prompt);
                let Some(&end) = ends.get(end % ends.len().max(1)) else {
                    return;
                };
                let Some(stores) = self.stores.get_mut(&prompt[..end]) else {
                    return;
                };
                *stores -= 1;
                if *stores == 0 {
                    self.stores.remove(&prompt[..end]);
                }
                let delta = self.view.remove(&[engine_hash(&prompt[..end])]);
                router.apply_cache_delta(self.id, &delta, Observed::Live(Duration::ZERO));
            }
            Step::Clear { .. } => {
                self.stores.clear();
                let delta = self.view.clear();
                router.apply_cache_delta(self.id, &delta, Observed::Live(Duration::ZERO));
            }
            Step::Resync { .. } => {
                router.set_cache_source(self.id, CacheSource::Estimated);
                router.set_cache_source(self.id, CacheSource::Events);
                router.apply_cache_delta(
                    self.id,
                    &self.view.snapshot(),
                    Observed::Live(Duration::ZERO),
                );
            }
            Step::Replace { worker } => {
                assert!(router.remove_worker(self.id));
                // Has no effect: the worker was removed.
                router.apply_cache_delta(
                    self.id,
                    &self.view.snapshot(),
                    Observed::Live(Duration::ZERO),
                );
                *self = Self::new(router, *worker, self.block_size);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Covers blocks that are stored twice, holes that open and close, parents that arrive late, and
    /// engines whose blocks are larger than the router's.
    #[test]
    fn prefix_matches_equal_the_model(
        steps in prop::collection::vec((step(), prompt()), 1..80),
        ratios in prop::collection::vec(1..3u32, 3),
    ) {
        let router = Router::new(RouterConfig { block_size: ROUTER_BLOCK_SIZE, queue_order: None, ..RouterConfig::default() });
        let router = router.unwrap();
        let mut engines: Vec<Engine> = ratios
            .iter()
            .enumerate()
            .map(|(worker, ratio)| Engine::new(&router, worker, (ROUTER_BLOCK_SIZE.get() * ratio) as usize))
            .collect();
        for (step, probe) in steps {
            engines[step.worker()].apply(&router, &step);
            for engine in &engines {
                prop_assert!(engine.view.is_complete());
                prop_assert_eq!(engine.view.len(), engine.stores.len());
                let stored: u32 = engine.stores.values().sum();
                prop_assert_eq!(engine.view.stored_blocks(), u64::from(stored));
            }
            let sequence = Sequence::from_tokens(&probe, ROUTER_BLOCK_SIZE, SALT);
            let explained = router.explain(&Request::new(&sequence), Duration::ZERO).unwrap();
            for engine in &engines {
                let candidate = explained
                    .candidates
                    .iter()
                    .find(|candidate| candidate.id == engine.id)
                    .unwrap();
                // Only whole engine blocks are reused, and never the last token.
                let max_tokens = probe.len().saturating_sub(1) / engine.block_size * engine.block_size;
                let hit = engine.cached_tokens(&probe).min(max_tokens) / ROUTER_BLOCK_SIZE.get() as usize;
                prop_assert_eq!(candidate.cost.overlap_blocks as usize, hit);
            }
            let snapshots = router.workers(Duration::ZERO);
            for engine in &engines {
                let snapshot = snapshots.iter().find(|worker| worker.id == engine.id).unwrap();
                let reachable = engine.view.snapshot().stored.len() * engine.block_size;
                prop_assert_eq!(snapshot.cached_blocks as usize, reachable / ROUTER_BLOCK_SIZE.get() as usize);
            }
        }
        for engine in &mut engines {
            router.apply_cache_delta(engine.id, &engine.view.clear(), Observed::Live(Duration::ZERO));
        }
        prop_assert_eq!(router.indexed_blocks(), 0);
    }
}
