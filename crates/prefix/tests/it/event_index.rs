//! Views of engines' caches and the event index: many workers, contradictory streams, and bounds.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;

use foresee_prefix::PrefixMatch;
use foresee_prefix::event_index::{CacheDelta, CacheView, EventIndex, PrefixRuns, StoredBlocks};
use foresee_prefix::sequence::Sequence;
use proptest::prelude::*;

const ROUTER_BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(2).unwrap();
const SALT: u64 = 7;

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
