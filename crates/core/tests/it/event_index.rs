//! Caches according to KV events, compared with a model that stores every block separately.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::PrefixMatch;
use foresee_core::event_index::{CacheDelta, CacheView, EventIndex, PrefixRuns, StoredBlocks};
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Each worker stores some leading blocks of one prompt, and then removes some of their tail.
    #[test]
    fn prefix_matches_of_many_workers_are_separate(
        lengths in prop::collection::vec((0..60usize, 0..60usize), 1..200),
        ratios in prop::collection::vec(1..4u32, 1..3),
    ) {
        let prompt = Sequence::from_tokens(&[0; 120], ROUTER_BLOCK_SIZE, SALT);
        let mut index = EventIndex::default();
        let mut cached_blocks = vec![0; lengths.len()];
        // The ratio of the worker, and the hashes at the ends of its engine blocks among the first
        // blocks of the prompt.
        let engine_blocks = |worker: usize, blocks: usize| {
            let ratio = ratios[worker % ratios.len()];
            let ends = (1..=blocks).filter(|end| end.is_multiple_of(ratio as usize));
            let hashes: Vec<u64> = ends.map(|end| prompt.hashes()[end - 1]).collect();
            (ratio, hashes)
        };
        for (worker, &(stored, _)) in lengths.iter().enumerate() {
            let (ratio, hashes) = engine_blocks(worker, stored);
            let stored = PrefixRuns::from_sequence(&hashes);
            let delta = CacheDelta { stored, engine_block_ratio: ratio, ..CacheDelta::default() };
            index.update(worker as u32, &delta, &mut cached_blocks[worker]);
        }
        for (worker, &(stored, kept)) in lengths.iter().enumerate() {
            let (ratio, kept) = engine_blocks(worker, kept.min(stored));
            let (_, all) = engine_blocks(worker, stored);
            let mut removed = PrefixRuns::default();
            removed.push_suffix(&all, kept.len());
            let delta = CacheDelta { removed, engine_block_ratio: ratio, ..CacheDelta::default() };
            index.update(worker as u32, &delta, &mut cached_blocks[worker]);
        }
        let mut matches = vec![PrefixMatch::default(); lengths.len()];
        let best_overlap = index.match_prefix(prompt.hashes(), &mut matches);
        for (worker, &(stored, kept)) in lengths.iter().enumerate() {
            let ratio = ratios[worker % ratios.len()] as usize;
            let blocks = kept.min(stored) / ratio * ratio;
            prop_assert_eq!(matches[worker].cached_blocks as usize, blocks);
            prop_assert_eq!(cached_blocks[worker] as usize, blocks);
        }
        let largest = matches.iter().map(|prefix_match| prefix_match.cached_blocks).max();
        prop_assert_eq!(largest, Some(best_overlap));
    }
}

/// The prompt is longer than a run of the index.
#[test]
fn a_prompt_longer_than_a_run_is_cached_by_several_workers() {
    const BLOCKS: usize = 1300;
    let tokens: Vec<u32> = (0..BLOCKS as u32).collect();
    let prompt = Sequence::from_tokens(&tokens, NonZeroU32::MIN, SALT);
    let mut index = EventIndex::default();
    let mut cached_blocks = [0; 3];
    let mut update = |index: &mut EventIndex, worker: usize, delta: CacheDelta| {
        let delta = CacheDelta {
            engine_block_ratio: 1,
            ..delta
        };
        index.update(worker as u32, &delta, &mut cached_blocks[worker]);
    };
    let suffix = |prefix_blocks: usize| {
        let mut runs = PrefixRuns::default();
        runs.push_suffix(prompt.hashes(), prefix_blocks);
        runs
    };
    for worker in 0..3 {
        let delta = CacheDelta {
            stored: suffix(0),
            ..CacheDelta::default()
        };
        update(&mut index, worker, delta);
    }
    for (worker, kept) in [(0, 1000), (0, 512), (1, 1)] {
        let delta = CacheDelta {
            removed: suffix(kept),
            ..CacheDelta::default()
        };
        update(&mut index, worker, delta);
    }
    let mut matches = [PrefixMatch::default(); 3];
    let best_overlap = index.match_prefix(prompt.hashes(), &mut matches);
    assert_eq!((best_overlap, index.len()), (BLOCKS as u32, BLOCKS));
    assert_eq!(
        matches.map(|prefix_match| prefix_match.cached_blocks),
        [512, 1, BLOCKS as u32]
    );
    assert_eq!(cached_blocks, [512, 1, BLOCKS as u64]);
    for worker in 0..3 {
        index.remove_worker(worker);
    }
    assert!(index.is_empty());
}

#[test]
fn store_counts_are_not_limited() {
    let mut view = CacheView::new(NonZeroU32::MIN);
    let root = StoredBlocks {
        parent: None,
        engine_hashes: &[1],
        tokens: &[1],
        block_size: 1,
        salt: SALT,
    };
    for _ in 0..5000 {
        view.store(&root);
    }
    let hashes: Vec<u64> = (2..3002).collect();
    for &hash in &hashes {
        view.store(&StoredBlocks {
            parent: Some(1),
            engine_hashes: &[hash],
            tokens: &[hash as u32],
            ..root
        });
    }
    assert_eq!((view.len(), view.stored_blocks()), (3001, 8000));
    for _ in 1..5000 {
        assert!(view.remove(&[1]).removed.is_empty());
    }
    // All blocks after it become unreachable with it, and reachable again with it.
    assert_eq!(view.remove(&[1]).removed.len(), 3001);
    assert_eq!((view.len(), view.stored_blocks()), (3000, 3000));
    assert_eq!(view.store(&root).stored.len(), 3001);
    assert_eq!(view.remove(&hashes).removed.len(), 3000);
    assert_eq!(view.remove(&[1]).removed.len(), 1);
    assert!(view.is_empty() && view.is_complete() && view.stored_blocks() == 0);
}

/// A hole before many blocks makes the view scan all of them. The scan budget limits that work in
/// proportion to the length of the stream.
#[test]
fn holes_that_exceed_the_scan_budget_are_applied_later() {
    const BLOCKS: u64 = 50_000;
    let hashes: Vec<u64> = (1..=BLOCKS).collect();
    let tokens: Vec<u32> = (1..=BLOCKS as u32).collect();
    let whole = StoredBlocks {
        parent: None,
        engine_hashes: &hashes,
        tokens: &tokens,
        block_size: 1,
        salt: SALT,
    };
    let first = StoredBlocks {
        engine_hashes: &hashes[..1],
        tokens: &tokens[..1],
        ..whole
    };
    let mut view = CacheView::new(NonZeroU32::MIN);
    let mut cached = view.store(&whole).stored.len();
    let mut rounds = 0;
    let mut index = EventIndex::default();
    let mut cached_blocks = 0;
    while view.is_complete() {
        for removes in [true, false] {
            let delta = if removes {
                view.remove(&[1])
            } else {
                view.store(&first)
            };
            cached = cached + delta.stored.len() - delta.removed.len();
            if rounds > 150 {
                index.update(0, &delta, &mut cached_blocks);
            }
        }
        rounds += 1;
        if rounds == 151 {
            index.update(0, &view.snapshot(), &mut cached_blocks);
        }
        assert!(rounds < 10_000, "the scan budget is never exceeded");
    }
    assert!(rounds > 160);
    // Further events earn the budget to catch up.
    let mut events = 0;
    while !view.is_complete() {
        let delta = view.store(&first);
        index.update(0, &delta, &mut cached_blocks);
        cached = cached + delta.stored.len() - delta.removed.len();
        events += 1;
        assert!(events < BLOCKS, "the view never catches up");
    }
    assert_eq!(cached, view.snapshot().stored.len());
    assert_eq!(cached, BLOCKS as usize);
    // The index has followed too. No delta contained a block without the blocks before it.
    let prompt = Sequence::from_tokens(&tokens, NonZeroU32::MIN, SALT);
    let mut matches = [PrefixMatch::default()];
    assert_eq!(
        index.match_prefix(prompt.hashes(), &mut matches),
        BLOCKS as u32
    );
    assert_eq!(cached_blocks, BLOCKS);
}

#[test]
fn the_number_of_orphans_is_bounded() {
    let mut view = CacheView::new(NonZeroU32::MIN);
    let store_orphan = |parent: u64| {
        move |view: &mut CacheView| {
            view.store(&StoredBlocks {
                parent: Some(parent),
                engine_hashes: &[parent + 1],
                tokens: &[1],
                block_size: 1,
                salt: SALT,
            })
        }
    };
    for parent in (0..600).step_by(2) {
        store_orphan(parent + 10)(&mut view);
    }
    let mut blocks_stored_with = |parent: u64| {
        let root = StoredBlocks {
            parent: None,
            engine_hashes: &[parent],
            tokens: &[2],
            block_size: 1,
            salt: SALT,
        };
        view.store(&root).stored.len()
    };
    // The oldest orphans were dropped, the latest were not.
    assert_eq!(blocks_stored_with(10), 1);
    assert_eq!(blocks_stored_with(10 + 598), 2);
}

#[test]
fn the_number_of_blocks_of_a_view_is_bounded() {
    let mut view = CacheView::new(NonZeroU32::MIN);
    let run = 1 << 16;
    let tokens = vec![0; run];
    for start in 0..=64 {
        let hashes: Vec<u64> = (0..run as u64)
            .map(|block| ((1 + start) << 32) | block)
            .collect();
        view.store(&StoredBlocks {
            parent: None,
            engine_hashes: &hashes,
            tokens: &tokens,
            block_size: 1,
            salt: SALT,
        });
        assert_eq!(view.is_complete(), start < 63);
    }
    assert_eq!(view.len(), (1 << 22) - 1);
    assert_eq!(view.stored_blocks(), view.len() as u64);
}

#[test]
fn blocks_that_cannot_be_indexed_make_the_view_incomplete() {
    let mut view = CacheView::new(ROUTER_BLOCK_SIZE);
    let orphan = StoredBlocks {
        parent: Some(99),
        engine_hashes: &[100],
        tokens: &[1, 2],
        block_size: 2,
        salt: SALT,
    };
    assert!(view.store(&orphan).stored.is_empty());
    assert!(!view.is_complete());
    // Removing the orphan makes the view complete again.
    assert!(view.remove(&[100]).removed.is_empty());
    assert!(view.is_complete());

    let wrong_size = StoredBlocks {
        parent: None,
        block_size: 3,
        tokens: &[1, 2, 3],
        ..orphan
    };
    assert!(view.store(&wrong_size).stored.is_empty());
    assert!(!view.is_complete());
}

#[derive(Clone, Debug)]
enum RandomEvent {
    Store(Option<u64>, Vec<u64>, u32),
    Remove(Vec<u64>),
}

fn random_event() -> impl Strategy<Value = RandomEvent> {
    let hash = || 0..10_u64;
    let parent = prop::option::weighted(0.7, hash());
    prop_oneof![
        3 => (parent, prop::collection::vec(hash(), 1..6), 0..2_u32)
            .prop_map(|(parent, hashes, tokens)| RandomEvent::Store(parent, hashes, tokens)),
        2 => prop::collection::vec(hash(), 1..4).prop_map(RandomEvent::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Covers streams that no engine sends: one engine hash stands for several blocks, or is its own
    /// parent.
    #[test]
    fn contradictory_streams_leave_nothing_behind(
        steps in prop::collection::vec((0..2_usize, random_event()), 1..60),
    ) {
        let mut index = EventIndex::default();
        let mut views = [CacheView::new(NonZeroU32::MIN), CacheView::new(NonZeroU32::MIN)];
        let mut cached_blocks = [0; 2];
        for (worker, step) in steps {
            let view = &mut views[worker];
            let delta = match step {
                RandomEvent::Store(parent, hashes, token) => view.store(&StoredBlocks {
                    parent,
                    engine_hashes: &hashes,
                    tokens: &vec![token; hashes.len()],
                    block_size: 1,
                    salt: SALT,
                }),
                RandomEvent::Remove(hashes) => view.remove(&hashes),
            };
            index.update(worker as u32, &delta, &mut cached_blocks[worker]);
        }
        for (worker, view) in views.iter_mut().enumerate() {
            index.update(worker as u32, &view.clear(), &mut cached_blocks[worker]);
            prop_assert_eq!(cached_blocks[worker], 0);
        }
        prop_assert!(index.is_empty());
    }
}
