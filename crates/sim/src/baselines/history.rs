//! Baseline that looks at the history of routing: which prompts were sent to which worker.

use std::collections::{HashMap, HashSet};

use foresee_core::sequence::SequenceHash;
use rand::rngs::SmallRng;

use super::booked::is_imbalanced;
use super::view::{self, BaselinePolicy, DecisionView};
use crate::prompt::mix;

/// SGLang's router with its policy `cache_aware` (the router is now SMG).
///
/// Rule: if the numbers of requests are [imbalanced](is_imbalanced) by more than 64 and by more
/// than 1.5 times, the worker with the fewest requests. Otherwise the worker that was sent the
/// longest prefix of the prompt, if that is more than 0.3 of the prompt. Otherwise the worker with
/// the smallest history: the fewest distinct characters sent to it.
///
/// Source: `cache_aware` of sglang-router, with its defaults. Differences to the original:
/// - The history is counted in blocks, not in characters.
/// - The history is never trimmed. The original drops the least recently used text of a worker
///   whose history is too large.
/// - Of several workers that were sent the longest prefix, the latest is chosen. The original
///   chooses one of them independently of their load.
#[derive(Default)]
pub(super) struct CacheAware {
    /// By prefix: the worker to which it was sent last.
    last_worker: HashMap<SequenceHash, usize>,
    /// Pairs of prefix and worker that occurred, each mixed into one number.
    sent: HashSet<u64>,
    /// By worker: number of distinct prefixes that were sent to it.
    sizes: Vec<usize>,
}

/// Fraction of the prompt that a prefix must exceed to decide.
const CACHE_THRESHOLD: f64 = 0.3;
/// Difference in requests above which load decides, if [`BALANCE_RELATIVE`] is exceeded too.
const BALANCE_ABSOLUTE: u32 = 64;
/// Ratio of requests above which load decides, if [`BALANCE_ABSOLUTE`] is exceeded too.
const BALANCE_RELATIVE: f64 = 1.5;

impl CacheAware {
    /// Adds a prompt to the history of `worker`.
    fn record(&mut self, prompt: &[SequenceHash], worker: usize) {
        for &prefix in prompt {
            self.last_worker.insert(prefix, worker);
            if self.sent.insert(mix(prefix ^ mix(worker as u64))) {
                self.sizes[worker] += 1;
            }
        }
    }
}

impl BaselinePolicy for CacheAware {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        let workers = view.workers;
        let indices = workers.iter().map(|worker| worker.worker);
        let last_index = indices.max().unwrap_or(0);
        self.sizes.resize(self.sizes.len().max(last_index + 1), 0);
        let chosen = if is_imbalanced(workers, BALANCE_ABSOLUTE, BALANCE_RELATIVE) {
            view::argmin(workers, rng, |worker| f64::from(worker.requests))
        } else {
            // A worker that was sent a prefix was sent every shorter one too.
            let matched = view
                .prompt
                .partition_point(|prefix| self.last_worker.contains_key(prefix));
            let is_long = matched as f64 > CACHE_THRESHOLD * f64::from(view.blocks());
            let longest_match = matched
                .checked_sub(1)
                .filter(|_| is_long)
                .and_then(|deepest| self.last_worker.get(&view.prompt[deepest]))
                .and_then(|index| workers.iter().position(|worker| worker.worker == *index));
            longest_match.unwrap_or_else(|| {
                let sizes = &self.sizes;
                view::argmin(workers, rng, |worker| sizes[worker.worker] as f64)
            })
        };
        self.record(view.prompt, workers[chosen].worker);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::view::WorkerView;
    use super::*;

    fn choose(policy: &mut CacheAware, prompt: &[SequenceHash], requests: [u32; 3]) -> usize {
        let workers: Vec<WorkerView<'_>> = (0..3)
            .map(|worker| WorkerView {
                worker,
                requests: requests[worker],
                ..WorkerView::default()
            })
            .collect();
        let view = DecisionView {
            request: 0,
            scrape: 0,
            ttft_weight: 1.0,
            prompt,
            tokens: prompt.len() as u32 * 16,
            block_size: 16,
            output_tokens: 1,
            workers: &workers,
        };
        policy.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    /// Returns a prompt of `shared` blocks that all prompts have in common, followed by `own`
    /// blocks that only prompts of this `stream` have.
    fn prompt(shared: u64, own: u64, stream: u64) -> Vec<SequenceHash> {
        (0..shared)
            .chain((0..own).map(|block| (stream << 32) + block))
            .collect()
    }

    #[test]
    fn a_prompt_follows_its_longest_prefix() {
        let mut policy = CacheAware::default();
        let first = choose(&mut policy, &prompt(4, 6, 1), [0, 0, 0]);
        for stream in 2..9 {
            let requests = [64 * u32::from(stream > 4); 3];
            assert_eq!(choose(&mut policy, &prompt(4, 6, stream), requests), first);
        }
    }

    #[test]
    fn a_prompt_with_a_short_prefix_goes_to_the_smallest_history() {
        let mut policy = CacheAware::default();
        let mut chosen: Vec<usize> = (1..4)
            .map(|stream| choose(&mut policy, &prompt(3, 7, stream), [0, 0, 0]))
            .collect();
        chosen.sort_unstable();
        assert_eq!(
            chosen,
            [0, 1, 2],
            "three of ten blocks are not more than 0.3"
        );
    }

    #[test]
    fn an_imbalanced_load_decides() {
        let mut policy = CacheAware::default();
        let first = choose(&mut policy, &prompt(9, 1, 1), [0, 0, 0]);
        let requests = |more, others| {
            let mut requests = [others; 3];
            requests[first] = others + more;
            requests
        };
        let mut choose = |stream, requests| choose(&mut policy, &prompt(9, 1, stream), requests);
        assert_eq!(choose(2, requests(64, 0)), first);
        assert_eq!(choose(3, requests(65, 200)), first);
        assert_ne!(choose(4, requests(65, 100)), first);
    }
}
