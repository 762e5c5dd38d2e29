//! Baseline after the default policy of SMG 1.13, the successor of SGLang's router.

use std::collections::HashMap;
use std::time::Duration;

use foresee_core::sequence::SequenceHash;
use rand::rngs::SmallRng;
use smallvec::SmallVec;

use super::view::{self, DecisionView, EngineView, InformedPolicy};

/// SMG's policy `cache_aware` over HTTP, as of version 1.13.
///
/// Rule: a prompt of which more than 0.3 was sent to some worker before goes to a worker that was
/// sent the longest prefix. A holder of that prefix is passed over if its number of requests exceeds
/// the mean both by more than 1.5 times and by more than a margin: 64 requests, but at most twice the
/// standard deviation of a Poisson variable with that mean, and at least 4. Of several holders, and of all workers if no
/// holder is left, the one with the least expected wait is chosen:
///
/// `(waiting requests + requests sent since the poll) × 1,024 / 2,000 + 0.15 × k / (1 − k)` seconds,
/// where `k` is the KV usage. Waiting requests and `k` are polled every 10 s. A worker that reported 8
/// waiting requests or a KV usage of 0.8 is overloaded: it is left out while another one is not. If all
/// are overloaded, the least expected wait decides.
///
/// Source: the rule of `cache_aware` and `least_load` in SMG's policies, with their defaults; 1.13
/// itself has no public snapshot. Differences to the original:
/// - The history is counted in blocks, not in characters, and is never trimmed.
/// - All holders of the prefix are compared, where the original caps their number.
/// - Equal waits are decided by the number of requests, then at random.
#[derive(Default)]
pub(super) struct SmgCacheAware {
    /// By prefix: the workers to which it was sent.
    holders: HashMap<SequenceHash, SmallVec<[usize; 2]>>,
    /// Poll since which `sent` counts.
    poll: u64,
    /// By worker: number of requests sent since the poll.
    sent: Vec<u32>,
}

/// Fraction of the prompt that a prefix must exceed to decide.
const CACHE_THRESHOLD: f64 = 0.3;
/// Ratio to the mean load above which a holder is passed over, if it exceeds the margin too.
const BALANCE_RELATIVE: f64 = 1.5;
/// Largest margin above the mean load, in requests.
const BALANCE_ABSOLUTE: f64 = 64.0;
/// Smallest margin above the mean load, in requests.
const MIN_BALANCE_ABSOLUTE: f64 = 4.0;
/// Prompt tokens that are assumed for a request.
const MEAN_PREFILL_TOKENS: f64 = 1024.0;
/// Tokens per second that are assumed for a worker.
const THROUGHPUT: f64 = 2000.0;
/// Seconds that a KV usage of one half adds to the expected wait.
const KV_USAGE_SECONDS: f64 = 0.15;
/// Largest KV usage that is assumed.
const MAX_KV_USAGE: f64 = 0.99;
/// Waiting requests from which on a worker is overloaded.
const OVERLOAD_WAITING: u32 = 8;
/// KV usage from which on a worker is overloaded.
const OVERLOAD_KV_USAGE: f64 = 0.8;

impl SmgCacheAware {
    /// Returns the seconds that a request is expected to wait on a worker.
    fn expected_wait(&self, worker: &EngineView<'_>) -> f64 {
        let sent = self.sent.get(worker.worker).copied().unwrap_or(0);
        let requests = f64::from(worker.metrics.waiting + sent);
        let usage = worker.metrics.usage().min(MAX_KV_USAGE);
        requests * MEAN_PREFILL_TOKENS / THROUGHPUT + KV_USAGE_SECONDS * usage / (1.0 - usage)
    }

    /// Returns the workers that were sent the longest prefix of the prompt, if it is long enough.
    fn holders(&self, view: &DecisionView<'_>) -> &[usize] {
        let matched = view
            .prompt
            .partition_point(|prefix| self.holders.contains_key(prefix));
        if matched as f64 <= CACHE_THRESHOLD * f64::from(view.blocks()) {
            return &[];
        }
        &self.holders[&view.prompt[matched - 1]]
    }
}

/// Returns whether a worker reported so much load that it is left out while another one is not.
fn is_overloaded(worker: &EngineView<'_>) -> bool {
    worker.metrics.waiting >= OVERLOAD_WAITING || worker.metrics.usage() >= OVERLOAD_KV_USAGE
}

/// Returns the number of requests above which a holder of the prefix is passed over.
fn load_bound(workers: &[EngineView<'_>]) -> f64 {
    let count = workers.len() as f64;
    let loads = workers.iter().map(|worker| f64::from(worker.requests));
    let mean = loads.sum::<f64>() / count;
    let margin = (2.0 * mean.sqrt()).clamp(MIN_BALANCE_ABSOLUTE, BALANCE_ABSOLUTE);
    (mean * BALANCE_RELATIVE).max(mean + margin)
}

impl InformedPolicy for SmgCacheAware {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        if self.poll != view.scrape {
            self.poll = view.scrape;
            self.sent.clear();
        }
        let are_all_overloaded = view.workers.iter().all(is_overloaded);
        let bound = load_bound(view.workers);
        let holders = self.holders(view);
        let is_holder = |worker: &EngineView<'_>| {
            !is_overloaded(worker)
                && holders.contains(&worker.worker)
                && f64::from(worker.requests) <= bound
        };
        let has_holder = view.workers.iter().any(is_holder);
        let waits = view.workers.iter().map(|worker| {
            let is_left_out = is_overloaded(worker) && !are_all_overloaded;
            if is_left_out || has_holder && !is_holder(worker) {
                return (f64::INFINITY, 0);
            }
            (self.expected_wait(worker), worker.requests)
        });
        let waits: Vec<(f64, u32)> = waits.collect();
        let least = waits
            .iter()
            .map(|(wait, _)| *wait)
            .fold(f64::INFINITY, f64::min);
        let chosen = view::argmin(&waits, rng, |&(wait, requests)| {
            if wait == least {
                f64::from(requests)
            } else {
                f64::INFINITY
            }
        });

        let worker = view.workers[chosen].worker;
        self.sent.resize(self.sent.len().max(worker + 1), 0);
        self.sent[worker] += 1;
        for &prefix in view.prompt {
            let holders = self.holders.entry(prefix).or_default();
            if !holders.contains(&worker) {
                holders.push(worker);
            }
        }
        chosen
    }

    fn scrape_interval(&self) -> Option<Duration> {
        Some(Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::view::Metrics;
    use super::*;

    fn choose(
        policy: &mut SmgCacheAware,
        prompt: &[SequenceHash],
        scrape: u64,
        requests: [u32; 3],
    ) -> usize {
        choose_with(policy, prompt, scrape, requests, [Metrics::default(); 3])
    }

    fn choose_with(
        policy: &mut SmgCacheAware,
        prompt: &[SequenceHash],
        scrape: u64,
        requests: [u32; 3],
        metrics: [Metrics; 3],
    ) -> usize {
        let workers = [0, 1, 2].map(|worker| EngineView {
            worker,
            requests: requests[worker],
            metrics: metrics[worker],
            ..EngineView::default()
        });
        let view = DecisionView {
            request: 0,
            prompt,
            tokens: prompt.len() as u32 * 16,
            block_size: 16,
            output_tokens: 1,
            scrape,
            workers: &workers,
        };
        policy.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    /// Returns a prompt of ten blocks, four of which all prompts have in common.
    fn prompt(stream: u64) -> Vec<SequenceHash> {
        (0..4)
            .chain((0..6).map(|block| (stream << 32) + block))
            .collect()
    }

    #[test]
    fn a_prompt_follows_its_prefix_up_to_the_load_bound() {
        let mut policy = SmgCacheAware::default();
        let first = choose(&mut policy, &prompt(1), 0, [0; 3]);
        let on_first = |requests| {
            let mut all = [0; 3];
            all[first] = requests;
            all
        };
        // With 5 requests on one of three workers the bound is 5.7, with 9 it is 7.
        assert_eq!(choose(&mut policy, &prompt(2), 0, on_first(5)), first);
        assert_ne!(choose(&mut policy, &prompt(3), 0, on_first(9)), first);
    }

    #[test]
    fn an_overloaded_holder_is_left_out() {
        let metrics = |waiting, used_blocks| Metrics {
            waiting,
            used_blocks,
            blocks: 100,
        };
        for (holder, others, follows) in [
            (metrics(7, 79), metrics(0, 0), true),
            (metrics(8, 0), metrics(0, 0), false),
            (metrics(0, 80), metrics(0, 0), false),
        ] {
            let mut policy = SmgCacheAware::default();
            let first = choose(&mut policy, &prompt(1), 0, [0; 3]);
            let mut reports = [others; 3];
            reports[first] = holder;
            let second = choose_with(&mut policy, &prompt(2), 0, [0; 3], reports);
            assert_eq!(second == first, follows, "{holder:?}");
        }
        // If all are overloaded, the least expected wait decides.
        let mut policy = SmgCacheAware::default();
        let reports = [metrics(9, 0), metrics(8, 0), metrics(10, 0)];
        assert_eq!(choose_with(&mut policy, &prompt(1), 0, [0; 3], reports), 1);
    }

    #[test]
    fn without_a_prefix_the_requests_sent_since_the_poll_decide() {
        let mut policy = SmgCacheAware::default();
        let own = |stream: u64| -> Vec<SequenceHash> {
            (0..10).map(|block| ((stream + 1) << 32) + block).collect()
        };
        let mut chosen: Vec<usize> = (0..3)
            .map(|stream| choose(&mut policy, &own(stream), 1, [0; 3]))
            .collect();
        chosen.sort_unstable();
        assert_eq!(chosen, [0, 1, 2]);
        // A poll without waiting requests forgets them; the number of requests then decides.
        assert_eq!(choose(&mut policy, &own(7), 2, [2, 1, 2]), 1);
    }
}
