//! Tests of the event index.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::event_index::PrefixRuns;
use crate::sequence::extend_hash;

fn hashes(prompt: &[u32]) -> Vec<SequenceHash> {
    let blocks = prompt.chunks(1);
    let hashes = blocks.scan(7, |previous, block| {
        *previous = extend_hash(*previous, block);
        Some(*previous)
    });
    hashes.collect()
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    // Prompts are often equal, and some are longer than a run of a test build can be.
    let tail = prop::collection::vec(0..2_u32, 0..4);
    (0..20_usize, tail).prop_map(|(zeros, tail)| [vec![0; zeros], tail].concat())
}

#[derive(Clone, Debug)]
enum Order {
    ShortestFirst,
    LongestFirst,
    WholeSequences,
}

#[derive(Clone, Debug)]
enum Step {
    Add(Vec<u32>),
    /// Removes a prefix and everything that continues it, in the given order.
    Remove(Vec<u32>, Order),
    RemoveWorker,
    /// Makes the worker lose all blocks, whose removal begins.
    LoseWorker,
    /// Continues each removal by one run.
    RemoveLost,
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::ShortestFirst),
        Just(Order::LongestFirst),
        Just(Order::WholeSequences)
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => prompt().prop_map(Step::Add),
        8 => (prompt(), order()).prop_map(|(prompt, order)| Step::Remove(prompt, order)),
        1 => Just(Step::RemoveWorker),
        1 => Just(Step::LoseWorker),
        4 => Just(Step::RemoveLost),
    ]
}

const WORKERS: usize = 4;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn prefix_matches_equal_those_of_plain_sets_of_prefixes(
        steps in prop::collection::vec((0..WORKERS, step(), prompt()), 1..40),
        max_len in 1..30_usize,
    ) {
        let mut index = EventIndex::default();
        let mut models: [BTreeSet<Vec<u32>>; WORKERS] = Default::default();
        let mut cached_blocks = [0; WORKERS];
        let mut removals: Vec<(WorkerIndex, RemovalCursor)> = Vec::new();
        for (worker, step, probe) in steps {
            let (worker_index, model) = (worker as WorkerIndex, &mut models[worker]);
            match step {
                Step::Add(prompt) => {
                    let added = PrefixRuns::from_sequence(&hashes(&prompt));
                    model.extend((1..=prompt.len()).map(|end| prompt[..end].to_vec()));
                    for chunk in added.iter().flat_map(|run| run.chunks(max_len)) {
                        index.add(worker_index, 1, chunk, &mut cached_blocks[worker]);
                    }
                }
                Step::Remove(prompt, order) => {
                    let continues = |prefix: &&Vec<u32>| prefix.starts_with(&prompt) && !prefix.is_empty();
                    let mut removed_prefixes: Vec<&Vec<u32>> = model.iter().filter(continues).collect();
                    if matches!(order, Order::LongestFirst) {
                        removed_prefixes.reverse();
                    }
                    let mut removed = PrefixRuns::default();
                    for prefix in removed_prefixes {
                        let prefix_len = match order {
                            // Blocks that several removed sequences share are listed again.
                            Order::WholeSequences => prompt.len().saturating_sub(1),
                            Order::ShortestFirst | Order::LongestFirst => prefix.len() - 1,
                        };
                        removed.push_suffix(&hashes(prefix), prefix_len);
                    }
                    model.retain(|prefix| !prefix.starts_with(&prompt));
                    for chunk in removed.iter().flat_map(|run| run.chunks(max_len).rev()) {
                        index.remove(worker_index, 1, chunk, &mut cached_blocks[worker]);
                    }
                }
                Step::RemoveWorker => {
                    model.clear();
                    index.remove_worker(worker_index);
                    cached_blocks[worker] = 0;
                }
                Step::LoseWorker => {
                    model.clear();
                    removals.push((worker_index, index.lose_worker(worker_index)));
                    cached_blocks[worker] = 0;
                }
                Step::RemoveLost => {
                    removals.retain_mut(|(worker, cursor)| match index.remove_lost(*worker, *cursor) {
                        RemovalStep::Continue(next) => {
                            *cursor = next;
                            true
                        }
                        RemovalStep::Done(_) => false,
                    });
                }
            }
            let mut prefix_matches = [PrefixMatch::default(); WORKERS];
            let deepest = index.match_prefix(&hashes(&probe), &mut prefix_matches);
            let mut expected_deepest = 0;
            for (worker, model) in models.iter().enumerate() {
                let is_cached = |end: &usize| model.contains(&probe[..*end]);
                let expected = (1..=probe.len()).take_while(is_cached).count();
                prop_assert_eq!(prefix_matches[worker].cached_blocks as usize, expected);
                prop_assert_eq!(cached_blocks[worker] as usize, model.len());
                expected_deepest = expected_deepest.max(expected);
            }
            prop_assert_eq!(deepest as usize, expected_deepest);
            let prefixes: BTreeSet<&Vec<u32>> = models.iter().flatten().collect();
            // Blocks that are lost and not removed yet are still counted.
            prop_assert!(index.len() == prefixes.len() || !removals.is_empty());
            prop_assert!(index.len() >= prefixes.len());
            for table in &index.by_ratio {
                let anchored = table.runs.ids().map(|run| {
                    let blocks = table.runs.tail_at(BlockPosition::new(run, 0)).iter();
                    let blocks = blocks.enumerate();
                    blocks
                        .filter(|&(block, &hash)| is_anchored(BlockPosition::new(run, block), hash))
                        .count()
                });
                prop_assert_eq!(table.anchors.len(), anchored.sum::<usize>());
            }
        }
    }
}
