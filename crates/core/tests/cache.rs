//! The cache followed by events, against a model that keeps every stored block apart.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::cache::{CacheView, StoredBlocks};
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
        5 => (worker.clone(), prompt(), 0..4usize, prop::bool::weighted(0.2)).prop_map(
            |(worker, prompt, from, late_parent)| Step::Store { worker, prompt, from, late_parent }
        ),
        4 => (worker.clone(), prompt(), 0..8usize)
            .prop_map(|(worker, prompt, end)| Step::Remove { worker, prompt, end }),
        1 => worker.prop_map(|worker| Step::Clear { worker }),
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
        router.update_cache(self.id, &changes);
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
                router.update_cache(self.id, &changes);
            }
            Step::Clear { .. } => {
                self.stores.clear();
                let changes = self.view.clear();
                router.update_cache(self.id, &changes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Depth on every worker equals the model's, with blocks stored twice, holes that open and
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
            .map(|(worker, stride)| {
                let spec = WorkerSpec {
                    name: worker.to_string(),
                    prefix_caching: true,
                    ..WorkerSpec::default()
                };
                let id = router.add_worker(spec).unwrap();
                router.set_healthy(id, true);
                router.follow_events(id, true);
                Engine {
                    block_size: (OURS.get() * stride) as usize,
                    stores: HashMap::new(),
                    view: CacheView::new(OURS),
                    id,
                }
            })
            .collect();
        for (step, probe) in steps {
            let (Step::Store { worker, .. } | Step::Remove { worker, .. } | Step::Clear { worker }) =
                &step;
            engines[*worker].apply(&router, &step);
            for engine in &engines {
                prop_assert!(engine.view.is_exact());
                prop_assert_eq!(engine.view.len(), engine.stores.len());
                let stored: u32 = engine.stores.values().sum();
                prop_assert_eq!(engine.view.stored_blocks(), u64::from(stored));
            }
            let sequence = Sequence::from_tokens(&probe, OURS, SALT);
            let explained = router.explain(&Request::new(&sequence), Duration::ZERO).unwrap();
            for (candidate, engine) in explained.candidates.iter().zip(&engines) {
                prop_assert_eq!(
                    candidate.depth.cached as usize,
                    engine.depth(&probe) / OURS.get() as usize
                );
            }
        }
        for engine in &mut engines {
            router.update_cache(engine.id, &engine.view.clear());
        }
        prop_assert_eq!(router.cached_prefixes(), 0);
    }
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
