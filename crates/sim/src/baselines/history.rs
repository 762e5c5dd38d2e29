//! Baseline that looks at the history of routing: which prompts were sent to which worker.

use std::collections::{HashMap, HashSet};

use foresee_core::policy::{Candidates, Policy, RequestProfile};
use foresee_core::sequence::SequenceHash;

use super::booked::is_imbalanced;
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
#[derive(Debug, Default)]
pub(super) struct CacheAware {
    /// By prefix: the worker to which it was sent last.
    last_worker: HashMap<SequenceHash, u32>,
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

impl Policy for CacheAware {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        if is_imbalanced(candidates, BALANCE_ABSOLUTE, BALANCE_RELATIVE) {
            costs.extend(candidates.iter().map(|worker| f64::from(worker.requests)));
            return;
        }
        // A worker that was sent a prefix was sent every shorter one too.
        let is_known = |prefix: &SequenceHash| self.last_worker.contains_key(prefix);
        let matched = request.hashes.partition_point(is_known);
        let is_long = matched as f64 > CACHE_THRESHOLD * f64::from(request.blocks);
        let longest_match = matched
            .checked_sub(1)
            .filter(|_| is_long)
            .and_then(|deepest| self.last_worker.get(&request.hashes[deepest]))
            .filter(|&&index| candidates.iter().any(|worker| worker.index == index));
        costs.extend(candidates.iter().map(|worker| {
            match longest_match {
                Some(&index) => f64::from(u8::from(worker.index != index)),
                None => self
                    .sizes
                    .get(worker.index as usize)
                    .map_or(0.0, |&size| size as f64),
            }
        }));
    }

    fn on_placed(&mut self, request: &RequestProfile<'_>, worker: u32) {
        let length = self.sizes.len().max(worker as usize + 1);
        self.sizes.resize(length, 0);
        for &prefix in request.hashes {
            self.last_worker.insert(prefix, worker);
            if self.sent.insert(mix(prefix ^ mix(u64::from(worker)))) {
                self.sizes[worker as usize] += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use foresee_core::policy::WorkerView;

    use super::*;

    fn choose(policy: &mut CacheAware, prompt: &[SequenceHash], requests: [u32; 3]) -> u32 {
        let workers = [0, 1, 2].map(|index| {
            let mut worker = WorkerView::idle(index);
            worker.requests = requests[index as usize];
            worker
        });
        let mut request = RequestProfile::of_tokens(prompt.len() as u32 * 16, 16);
        request.hashes = prompt;
        let mut costs = Vec::new();
        policy.costs(&request, &Candidates::from(&workers[..]), &mut costs);
        let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
        let chosen = costs.iter().position(|&cost| cost == least).unwrap() as u32;
        policy.on_placed(&request, chosen);
        chosen
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
        let mut chosen: Vec<u32> = (1..4)
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
            requests[first as usize] = others + more;
            requests
        };
        let mut choose = |stream, requests| choose(&mut policy, &prompt(9, 1, stream), requests);
        assert_eq!(choose(2, requests(64, 0)), first);
        assert_eq!(choose(3, requests(65, 200)), first);
        assert_ne!(choose(4, requests(65, 100)), first);
    }
}
