//! The cache followed by events, against a model that keeps every stored block apart.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::Depth;
use foresee_core::cache::{CacheIndex, CacheView, Changes, Paths, StoredBlocks};
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use proptest::prelude::*;

const OURS: NonZeroU32 = NonZeroU32::new(2).unwrap();
const SALT: u64 = 7;

#[derive(Clone, Debug)]
enum Step {
    /// The engine computes a prompt, some blocks of which it had: those come in no event.
    Store {
        worker: usize,
        prompt: Vec<u32>,
        from: usize,
        late_parent: bool,
    },
    /// It evicts the block that ends a prompt's prefix, wherever that lies.
    Remove {
        worker: usize,
        prompt: Vec<u32>,
        end: usize,
    },
    Clear {
        worker: usize,
    },
    /// Events are not usable for a while; then the index is told all anew.
    Retell {
        worker: usize,
    },
    /// Another engine takes its place.
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
            | Self::Retell { worker }
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
        1 => worker.clone().prop_map(|worker| Step::Retell { worker }),
        1 => worker.prop_map(|worker| Step::Replace { worker }),
    ]
}

/// An engine's name for the block that ends a prefix: any injective map will do.
fn name(prefix: &[u32]) -> u64 {
    let digits = prefix
        .iter()
        .fold(1, |name: u64, &token| name * 3 + u64::from(token) + 1);
    digits.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

struct Engine {
    block_size: usize,
    /// How often each prefix that ends with a block is stored.
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
        router.follow_events(id, true);
        Self {
            block_size,
            stores: HashMap::new(),
            view: CacheView::new(OURS),
            id,
        }
    }

    fn ends(&self, prompt: &[u32]) -> Vec<usize> {
        (1..=prompt.len() / self.block_size)
            .map(|it| it * self.block_size)
            .collect()
    }

    fn depth(&self, prompt: &[u32]) -> usize {
        let mut ends = self.ends(prompt).into_iter();
        let held = ends
            .by_ref()
            .take_while(|&end| self.stores.contains_key(&prompt[..end]));
        held.last().unwrap_or(0)
    }

    fn store(&mut self, router: &Router, prompt: &[u32], from: usize, to: usize) {
        let names: Vec<u64> = (from / self.block_size + 1..=to / self.block_size)
            .map(|it| name(&prompt[..it * self.block_size]))
            .collect();
        for end in self.ends(&prompt[..to]) {
            if end > from {
                *self.stores.entry(prompt[..end].to_vec()).or_default() += 1;
            }
        }
        let changes = self.view.store(&StoredBlocks {
            parent: (from > 0).then(|| name(&prompt[..from])),
            hashes: &names,
            tokens: &prompt[from..to],
            block_size: self.block_size as u32,
            salt: SALT,
        });
        router.update_cache(self.id, &changes, Some(Duration::ZERO));
    }

    fn apply(&mut self, router: &Router, step: &Step) {
        match step {
            Step::Store {
                prompt,
                from,
                late_parent,
                ..
            } => {
                let end = self.ends(prompt).last().copied().unwrap_or(0);
                let from = (from * self.block_size).min(end);
                let parent_known = from == 0 || self.stores.contains_key(&prompt[..from]);
                if end == from || (!parent_known && !late_parent) {
                    return;
                }
                self.store(router, prompt, from, end);
                if !parent_known {
                    // The batch that stored what is before it arrives after it.
                    self.store(router, prompt, 0, from);
                }
            }
            Step::Remove { prompt, end, .. } => {
                let ends = self.ends(prompt);
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
                let changes = self.view.remove(&[name(&prompt[..end])]);
                router.update_cache(self.id, &changes, Some(Duration::ZERO));
            }
            Step::Clear { .. } => {
                self.stores.clear();
                let changes = self.view.clear();
                router.update_cache(self.id, &changes, Some(Duration::ZERO));
            }
            Step::Retell { .. } => {
                router.follow_events(self.id, false);
                router.follow_events(self.id, true);
                router.update_cache(self.id, &self.view.contents(), Some(Duration::ZERO));
            }
            Step::Replace { worker } => {
                assert!(router.remove_worker(self.id));
                // What it still says means nothing.
                router.update_cache(self.id, &self.view.contents(), Some(Duration::ZERO));
                *self = Self::new(router, *worker, self.block_size);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What every worker would spare equals the model's, with blocks stored twice, holes that open and
    /// close, parents that come late, and engines whose blocks are larger than ours.
    #[test]
    fn depths_equal_the_model(
        steps in prop::collection::vec((step(), prompt()), 1..80),
        strides in prop::collection::vec(1..3u32, 3),
    ) {
        let router = Router::new(RouterConfig { block_size: OURS, ..RouterConfig::default() });
        let router = router.unwrap();
        let mut engines: Vec<Engine> = strides
            .iter()
            .enumerate()
            .map(|(worker, stride)| Engine::new(&router, worker, (OURS.get() * stride) as usize))
            .collect();
        for (step, probe) in steps {
            engines[step.worker()].apply(&router, &step);
            for engine in &engines {
                prop_assert!(engine.view.is_exact());
                prop_assert_eq!(engine.view.len(), engine.stores.len());
                let stored: u32 = engine.stores.values().sum();
                prop_assert_eq!(engine.view.stored_blocks(), u64::from(stored));
            }
            let sequence = Sequence::from_tokens(&probe, OURS, SALT);
            let explained = router.explain(&Request::new(&sequence), Duration::ZERO).unwrap();
            for engine in &engines {
                let candidate = explained.candidates.iter().find(|it| it.id == engine.id).unwrap();
                // In whole blocks of the engine's, of which the last token is in none.
                let most = probe.len().saturating_sub(1) / engine.block_size * engine.block_size;
                let hit = engine.depth(&probe).min(most) / OURS.get() as usize;
                prop_assert_eq!(candidate.cost.overlap_blocks as usize, hit);
            }
            let told = router.workers(Duration::ZERO);
            for engine in &engines {
                let told = told.iter().find(|it| it.id == engine.id).unwrap();
                let reachable = engine.view.contents().added.len() * engine.block_size;
                prop_assert_eq!(told.cached_blocks as usize, reachable / OURS.get() as usize);
            }
        }
        for engine in &mut engines {
            router.update_cache(engine.id, &engine.view.clear(), Some(Duration::ZERO));
        }
        prop_assert_eq!(router.cached_prefixes(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Many workers hold a prompt, each to another depth, and lose some of it.
    #[test]
    fn depths_of_many_workers_are_told_apart(
        depths in prop::collection::vec((0..60usize, 0..60usize), 1..200),
        strides in prop::collection::vec(1..4u32, 1..3),
    ) {
        let prompt = Sequence::from_tokens(&[0; 120], OURS, SALT);
        let mut index = CacheIndex::default();
        let mut held = vec![0; depths.len()];
        // The engine's blocks that end within a part of the prompt.
        let ends = |worker: usize, from: usize, to: usize| {
            let stride = strides[worker % strides.len()];
            let ends = (from + 1..=to).filter(|end| end.is_multiple_of(stride as usize));
            let hashes: Vec<u64> = ends.map(|end| prompt.hashes()[end - 1]).collect();
            (stride, hashes)
        };
        for (worker, &(most, _)) in depths.iter().enumerate() {
            let (stride, added) = ends(worker, 0, most);
            let added = Paths::whole(&added);
            let changes = Changes { added, stride, ..Changes::default() };
            index.update(worker as u32, &changes, &mut held[worker]);
        }
        for (worker, &(most, left)) in depths.iter().enumerate() {
            let (stride, left) = ends(worker, 0, left.min(most));
            let (_, all) = ends(worker, 0, most);
            let mut removed = Paths::default();
            removed.push_behind(&all, left.len());
            let changes = Changes { removed, stride, ..Changes::default() };
            index.update(worker as u32, &changes, &mut held[worker]);
        }
        let mut found = vec![Depth::default(); depths.len()];
        let deepest = index.descend(prompt.hashes(), &mut found);
        for (worker, &(most, left)) in depths.iter().enumerate() {
            let stride = strides[worker % strides.len()] as usize;
            let blocks = left.min(most) / stride * stride;
            prop_assert_eq!(found[worker].cached as usize, blocks);
            prop_assert_eq!(held[worker] as usize, blocks);
        }
        prop_assert_eq!(found.iter().map(|it| it.cached).max(), Some(deepest));
    }
}

/// Longer than what the index keeps together.
#[test]
fn long_prompts_are_held_by_several() {
    const BLOCKS: usize = 1300;
    let tokens: Vec<u32> = (0..BLOCKS as u32).collect();
    let prompt = Sequence::from_tokens(&tokens, NonZeroU32::MIN, SALT);
    let mut index = CacheIndex::default();
    let mut held = [0; 3];
    let tell = |index: &mut CacheIndex, worker: usize, changes: Changes, held: &mut [u64; 3]| {
        let stride = 1;
        let changes = Changes { stride, ..changes };
        index.update(worker as u32, &changes, &mut held[worker]);
    };
    let behind = |blocks: usize| {
        let mut paths = Paths::default();
        paths.push_behind(prompt.hashes(), blocks);
        paths
    };
    for worker in 0..3 {
        let added = behind(0);
        tell(
            &mut index,
            worker,
            Changes {
                added,
                ..Changes::default()
            },
            &mut held,
        );
    }
    for (worker, left) in [(0, 1000), (0, 512), (1, 1)] {
        let removed = behind(left);
        tell(
            &mut index,
            worker,
            Changes {
                removed,
                ..Changes::default()
            },
            &mut held,
        );
    }
    let mut depths = [Depth::default(); 3];
    let deepest = index.descend(prompt.hashes(), &mut depths);
    assert_eq!((deepest, index.len()), (BLOCKS as u32, BLOCKS));
    assert_eq!(depths.map(|it| it.cached), [512, 1, BLOCKS as u32]);
    assert_eq!(held, [512, 1, BLOCKS as u64]);
    for worker in 0..3 {
        index.forget_worker(worker);
    }
    assert!(index.is_empty());
}

#[test]
fn counts_have_no_end() {
    let mut view = CacheView::new(NonZeroU32::MIN);
    let root = StoredBlocks {
        parent: None,
        hashes: &[1],
        tokens: &[1],
        block_size: 1,
        salt: SALT,
    };
    for _ in 0..5000 {
        view.store(&root);
    }
    let names: Vec<u64> = (2..3002).collect();
    for &name in &names {
        view.store(&StoredBlocks {
            parent: Some(1),
            hashes: &[name],
            tokens: &[name as u32],
            ..root
        });
    }
    assert_eq!((view.len(), view.stored_blocks()), (3001, 8000));
    for _ in 1..5000 {
        assert!(view.remove(&[1]).removed.is_empty());
    }
    // All that is behind it goes with it, and comes back with it.
    assert_eq!(view.remove(&[1]).removed.len(), 3001);
    assert_eq!((view.len(), view.stored_blocks()), (3000, 3000));
    assert_eq!(view.store(&root).added.len(), 3001);
    assert_eq!(view.remove(&names).removed.len(), 3000);
    assert_eq!(view.remove(&[1]).removed.len(), 1);
    assert!(view.is_empty() && view.is_exact() && view.stored_blocks() == 0);
}

/// Each hole in front of much has all of that looked at: work that a stream must earn.
#[test]
fn holes_that_come_too_fast_have_to_wait() {
    const BLOCKS: u64 = 50_000;
    let names: Vec<u64> = (1..=BLOCKS).collect();
    let tokens: Vec<u32> = (1..=BLOCKS as u32).collect();
    let whole = StoredBlocks {
        parent: None,
        hashes: &names,
        tokens: &tokens,
        block_size: 1,
        salt: SALT,
    };
    let first = StoredBlocks {
        hashes: &names[..1],
        tokens: &tokens[..1],
        ..whole
    };
    let mut view = CacheView::new(NonZeroU32::MIN);
    let mut cached = view.store(&whole).added.len();
    let mut rounds = 0;
    let mut index = CacheIndex::default();
    let mut held = 0;
    while view.is_exact() {
        for removes in [true, false] {
            let changes = if removes {
                view.remove(&[1])
            } else {
                view.store(&first)
            };
            cached = cached + changes.added.len() - changes.removed.len();
            if rounds > 150 {
                index.update(0, &changes, &mut held);
            }
        }
        rounds += 1;
        if rounds == 151 {
            index.update(0, &view.contents(), &mut held);
        }
        assert!(rounds < 10_000, "nothing has to wait");
    }
    assert!(rounds > 160);
    // What is told follows, when enough has been heard.
    let mut heard = 0;
    while !view.is_exact() {
        let changes = view.store(&first);
        index.update(0, &changes, &mut held);
        cached = cached + changes.added.len() - changes.removed.len();
        heard += 1;
        assert!(heard < BLOCKS, "it waits for ever");
    }
    assert_eq!(cached, view.contents().added.len());
    assert_eq!(cached, BLOCKS as usize);
    // An index has followed, which was never told of blocks without those before them.
    let prompt = Sequence::from_tokens(&tokens, NonZeroU32::MIN, SALT);
    let mut depths = [Depth::default()];
    assert_eq!(index.descend(prompt.hashes(), &mut depths), BLOCKS as u32);
    assert_eq!(held, BLOCKS);
}

#[test]
fn what_waits_for_a_parent_is_bounded() {
    let mut view = CacheView::new(NonZeroU32::MIN);
    let orphan = |parent: u64| {
        move |view: &mut CacheView| {
            view.store(&StoredBlocks {
                parent: Some(parent),
                hashes: &[parent + 1],
                tokens: &[1],
                block_size: 1,
                salt: SALT,
            })
        }
    };
    for parent in (0..600).step_by(2) {
        orphan(parent + 10)(&mut view);
    }
    let mut found = |name: u64| {
        let root = StoredBlocks {
            parent: None,
            hashes: &[name],
            tokens: &[2],
            block_size: 1,
            salt: SALT,
        };
        view.store(&root).added.len()
    };
    // The oldest were given up, the latest not.
    assert_eq!(found(10), 1);
    assert_eq!(found(10 + 598), 2);
}

#[test]
fn blocks_are_bounded() {
    let mut view = CacheView::new(NonZeroU32::MIN);
    let run = 1 << 16;
    let tokens = vec![0; run];
    for start in 0..=64 {
        let names: Vec<u64> = (0..run as u64).map(|it| ((1 + start) << 32) | it).collect();
        view.store(&StoredBlocks {
            parent: None,
            hashes: &names,
            tokens: &tokens,
            block_size: 1,
            salt: SALT,
        });
        assert_eq!(view.is_exact(), start < 63);
    }
    assert_eq!(view.len(), (1 << 22) - 1);
    assert_eq!(view.stored_blocks(), view.len() as u64);
}

#[test]
fn what_cannot_be_followed_is_missing_and_said() {
    let mut view = CacheView::new(OURS);
    let orphan = StoredBlocks {
        parent: Some(99),
        hashes: &[100],
        tokens: &[1, 2],
        block_size: 2,
        salt: SALT,
    };
    assert!(view.store(&orphan).added.is_empty());
    assert!(!view.is_exact());
    // Its removal settles the matter.
    assert!(view.remove(&[100]).removed.is_empty());
    assert!(view.is_exact());

    let odd = StoredBlocks {
        parent: None,
        block_size: 3,
        tokens: &[1, 2, 3],
        ..orphan
    };
    assert!(view.store(&odd).added.is_empty());
    assert!(!view.is_exact());
}

#[derive(Clone, Debug)]
enum Noise {
    Store(Option<u64>, Vec<u64>, u32),
    Remove(Vec<u64>),
}

fn noise() -> impl Strategy<Value = Noise> {
    let name = || 0..10_u64;
    let parent = prop::option::weighted(0.7, name());
    prop_oneof![
        3 => (parent, prop::collection::vec(name(), 1..6), 0..2_u32)
            .prop_map(|(parent, names, tokens)| Noise::Store(parent, names, tokens)),
        2 => prop::collection::vec(name(), 1..4).prop_map(Noise::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Streams that no engine sends, where one name stands for several blocks, or follows itself.
    #[test]
    fn nothing_is_left_of_nonsense(
        steps in prop::collection::vec((0..2_usize, noise()), 1..60),
    ) {
        let mut index = CacheIndex::default();
        let mut views = [CacheView::new(NonZeroU32::MIN), CacheView::new(NonZeroU32::MIN)];
        let mut held = [0; 2];
        for (worker, step) in steps {
            let view = &mut views[worker];
            let changes = match step {
                Noise::Store(parent, names, token) => view.store(&StoredBlocks {
                    parent,
                    hashes: &names,
                    tokens: &vec![token; names.len()],
                    block_size: 1,
                    salt: SALT,
                }),
                Noise::Remove(names) => view.remove(&names),
            };
            index.update(worker as u32, &changes, &mut held[worker]);
        }
        for (worker, view) in views.iter_mut().enumerate() {
            index.update(worker as u32, &view.clear(), &mut held[worker]);
            prop_assert_eq!(held[worker], 0);
        }
        prop_assert!(index.is_empty());
    }
}
