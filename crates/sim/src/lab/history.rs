//! A rule over what was sent where.

use std::collections::{HashMap, HashSet};

use foresee_core::sequence::SequenceHash;
use rand::rngs::SmallRng;

use super::rules::are_uneven;
use super::view::{self, Rule, View};
use crate::prompt::mix;

/// SGLang's router (`cache_aware`; today SMG), with its defaults: if the most requests on a worker
/// exceed the least by more than 64 and by more than 1.5 times, the worker with the least. Else
/// the one that was sent the longest prefix of the prompt, if that is more than 0.3 of it; else
/// the one that was sent the fewest different characters so far.
///
/// Here in blocks rather than characters, and the history is never cut (the original drops the
/// least recently used text when a worker has too much of it). Of several workers that were sent
/// the longest prefix it takes one without regard to load: here, the last.
#[derive(Default)]
pub(super) struct CacheAware {
    /// Who was last sent a prefix.
    last: HashMap<SequenceHash, usize>,
    /// Who was sent what: prefix and worker, mixed into one number.
    sent: HashSet<u64>,
    /// By worker: how many prefixes it was sent.
    sizes: Vec<usize>,
}

const CACHE_THRESHOLD: f64 = 0.3;
const BALANCE_ABSOLUTE: u32 = 64;
const BALANCE_RELATIVE: f64 = 1.5;

impl CacheAware {
    fn record(&mut self, prompt: &[SequenceHash], worker: usize) {
        for &prefix in prompt {
            self.last.insert(prefix, worker);
            if self.sent.insert(mix(prefix ^ mix(worker as u64))) {
                self.sizes[worker] += 1;
            }
        }
    }
}

impl Rule for CacheAware {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        let workers = view.workers;
        let most = workers.iter().map(|it| it.worker).max().unwrap_or(0);
        self.sizes.resize(self.sizes.len().max(most + 1), 0);
        let chosen = if are_uneven(workers, BALANCE_ABSOLUTE, BALANCE_RELATIVE) {
            view::least(workers, rng, |it| f64::from(it.requests))
        } else {
            // Whoever was sent a prefix was sent every shorter one.
            let matched = view
                .prompt
                .partition_point(|prefix| self.last.contains_key(prefix));
            let is_long = matched as f64 > CACHE_THRESHOLD * f64::from(view.blocks());
            let holder = matched
                .checked_sub(1)
                .filter(|_| is_long)
                .and_then(|deepest| self.last.get(&view.prompt[deepest]))
                .and_then(|holder| workers.iter().position(|it| it.worker == *holder));
            holder.unwrap_or_else(|| {
                let sizes = &self.sizes;
                view::least(workers, rng, |it| sizes[it.worker] as f64)
            })
        };
        self.record(view.prompt, workers[chosen].worker);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::view::Seen;
    use super::*;

    fn choose(rule: &mut CacheAware, prompt: &[SequenceHash], requests: [u32; 3]) -> usize {
        let workers: Vec<Seen<'_>> = (0..3)
            .map(|worker| Seen {
                worker,
                requests: requests[worker],
                ..Seen::default()
            })
            .collect();
        let view = View {
            request: 0,
            scrape: 0,
            ttft_weight: 1.0,
            prompt,
            tokens: prompt.len() as u32 * 16,
            block_size: 16,
            output_tokens: 1,
            workers: &workers,
        };
        rule.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    /// `shared` blocks that all such prompts begin with, then some of its own.
    fn prompt(shared: u64, own: u64, stream: u64) -> Vec<SequenceHash> {
        (0..shared)
            .chain((0..own).map(|block| (stream << 32) + block))
            .collect()
    }

    #[test]
    fn a_prompt_goes_where_most_of_its_beginning_went() {
        let mut rule = CacheAware::default();
        let first = choose(&mut rule, &prompt(4, 6, 1), [0, 0, 0]);
        for stream in 2..9 {
            let loads = [64, 64, 64].map(|it| it * u32::from(stream > 4));
            assert_eq!(choose(&mut rule, &prompt(4, 6, stream), loads), first);
        }
    }

    #[test]
    fn a_short_match_goes_where_least_was_sent() {
        let mut rule = CacheAware::default();
        let mut chosen: Vec<usize> = (1..4)
            .map(|stream| choose(&mut rule, &prompt(3, 7, stream), [0, 0, 0]))
            .collect();
        chosen.sort_unstable();
        assert_eq!(
            chosen,
            [0, 1, 2],
            "three of ten blocks are not more than 0.3"
        );
    }

    #[test]
    fn load_comes_first_when_it_is_uneven() {
        let mut rule = CacheAware::default();
        let first = choose(&mut rule, &prompt(9, 1, 1), [0, 0, 0]);
        let loaded = |by, others| {
            let mut loads = [others; 3];
            loads[first] = others + by;
            loads
        };
        assert_eq!(choose(&mut rule, &prompt(9, 1, 2), loaded(64, 0)), first);
        assert_eq!(choose(&mut rule, &prompt(9, 1, 3), loaded(65, 200)), first);
        assert_ne!(choose(&mut rule, &prompt(9, 1, 4), loaded(65, 100)), first);
    }
}
