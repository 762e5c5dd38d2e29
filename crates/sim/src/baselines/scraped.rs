//! Baselines that look at metrics of the engines, as old as the last scrape.

use std::time::Duration;

use rand::rngs::SmallRng;

use super::view::{self, DecisionView, EngineView, InformedPolicy};

/// NVIDIA Dynamo's router before PR 1731.
///
/// Score: `2 × cached tokens / prompt tokens − KV usage − waiting requests / largest number of
/// waiting requests on any worker`. The worker with the largest score is chosen; ties are broken at
/// random.
///
/// Metrics are scraped every second. Between two scrapes, each decision adds one waiting request
/// and its uncached blocks to the chosen worker, and the next scrape replaces them, as in the
/// original.
///
/// Source: Dynamo's `DefaultWorkerSelector`. The original counts at most one new block of a prompt
/// (`min(isl / block_size, 1)`) by mistake. Here all uncached blocks count.
#[derive(Default)]
pub(super) struct DynamoScraped {
    /// Scrape since which `sent` counts.
    scrape: u64,
    /// By worker: number of requests sent since the scrape, and their uncached blocks.
    sent: Vec<(u32, u32)>,
}

impl InformedPolicy for DynamoScraped {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        if self.scrape != view.scrape {
            self.scrape = view.scrape;
            self.sent.clear();
        }
        let lengths = view.workers.iter().map(|worker| worker.worker + 1);
        let length = lengths.max().unwrap_or(0).max(self.sent.len());
        self.sent.resize(length, (0, 0));
        let sent = &self.sent;
        let waiting = |worker: &EngineView<'_>| {
            let (sent_requests, _) = sent[worker.worker];
            f64::from(worker.metrics.waiting + sent_requests)
        };
        let max_waiting = view.workers.iter().map(waiting).fold(1.0, f64::max);
        let chosen = view::argmin(view.workers, rng, |worker| {
            let (_, sent_blocks) = sent[worker.worker];
            let used = f64::from(worker.metrics.used_blocks + sent_blocks);
            let usage = used / f64::from(worker.metrics.blocks.max(1));
            let cached_tokens = f64::from(worker.cached_blocks * view.block_size);
            let cached = cached_tokens / f64::from(view.tokens);
            usage + waiting(worker) / max_waiting - 2.0 * cached
        });
        let worker = &view.workers[chosen];
        let (requests, blocks) = &mut self.sent[worker.worker];
        *requests += 1;
        *blocks += view.blocks() - worker.cached_blocks;
        chosen
    }

    fn scrape_interval(&self) -> Option<Duration> {
        Some(Duration::from_secs(1))
    }
}

/// llm-d's router with its default profile.
///
/// Score: `3 × matched fraction of the prompt + 2 × queue score + 2 × (1 − KV usage)`. The queue
/// score is 1 for the fewest waiting requests of all workers and 0 for the most, linear in between,
/// and 1 if they are equal. The worker with the largest score is chosen; ties are broken at random.
/// Metrics are scraped every 50 ms.
///
/// Source: `loadDefaultConfig` of llm-d's router, as in the Gateway API inference extension. Its
/// prefix index records the prompts that were sent, so prefixes in flight count.
pub(super) struct LlmdScorers;

impl InformedPolicy for LlmdScorers {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        const PREFIX_WEIGHT: f64 = 3.0;
        const QUEUE_WEIGHT: f64 = 2.0;
        const KV_USAGE_WEIGHT: f64 = 2.0;
        let waiting = || view.workers.iter().map(|worker| worker.metrics.waiting);
        let max_waiting = waiting().max().unwrap_or(0);
        let min_waiting = waiting().min().unwrap_or(0);
        view::argmin(view.workers, rng, |worker| {
            let metrics = worker.metrics;
            let matched = f64::from(worker.overlap_blocks) / f64::from(view.blocks());
            let queue = if max_waiting > min_waiting {
                f64::from(max_waiting - metrics.waiting) / f64::from(max_waiting - min_waiting)
            } else {
                1.0
            };
            -(PREFIX_WEIGHT * matched
                + QUEUE_WEIGHT * queue
                + KV_USAGE_WEIGHT * (1.0 - metrics.usage()))
        })
    }

    fn scrape_interval(&self) -> Option<Duration> {
        Some(Duration::from_millis(50))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::view::Metrics;
    use super::*;

    /// Returns a worker with `cached` leading blocks of the prompt, `waiting` waiting requests, and
    /// `used_blocks` of its 100 blocks in use.
    fn worker(worker: usize, cached: u32, waiting: u32, used_blocks: u32) -> EngineView<'static> {
        EngineView {
            worker,
            cached_blocks: cached,
            overlap_blocks: cached,
            metrics: Metrics {
                waiting,
                used_blocks,
                blocks: 100,
            },
            ..EngineView::default()
        }
    }

    /// Chooses a worker for a prompt of 20 blocks.
    fn choose(policy: &mut impl InformedPolicy, scrape: u64, workers: &[EngineView<'_>]) -> usize {
        let view = DecisionView {
            request: 0,
            scrape,
            prompt: &[],
            tokens: 320,
            block_size: 16,
            output_tokens: 1,
            workers,
        };
        policy.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    #[test]
    fn llm_d_adds_scores_by_their_weights() {
        let cases = [
            // 3 for the whole prompt against 2 for the queue.
            ([worker(0, 19, 5, 0), worker(1, 0, 0, 0)], 0),
            ([worker(0, 13, 5, 0), worker(1, 0, 0, 0)], 1),
            // The queue score is relative: one waiting request against none counts in full.
            ([worker(0, 13, 1, 0), worker(1, 0, 0, 0)], 1),
            ([worker(0, 13, 1, 0), worker(1, 0, 0, 3)], 0),
            // 2 for free memory.
            ([worker(0, 10, 0, 74), worker(1, 0, 0, 0)], 0),
            ([worker(0, 10, 0, 76), worker(1, 0, 0, 0)], 1),
        ];
        for (workers, expected) in cases {
            let chosen = choose(&mut LlmdScorers, 1, &workers);
            assert_eq!(chosen, expected, "{workers:?}");
        }
    }

    #[test]
    fn dynamo_weighs_cached_tokens_twice() {
        let cases = [
            ([worker(0, 10, 0, 99), worker(1, 0, 0, 0)], 0),
            ([worker(0, 9, 0, 91), worker(1, 0, 0, 0)], 1),
            ([worker(0, 9, 1, 0), worker(1, 0, 0, 0)], 1),
            ([worker(0, 11, 1, 0), worker(1, 0, 0, 0)], 0),
        ];
        for (workers, expected) in cases {
            let mut policy = DynamoScraped::default();
            assert_eq!(choose(&mut policy, 1, &workers), expected, "{workers:?}");
        }
    }

    #[test]
    fn dynamo_counts_its_own_decisions_until_the_next_scrape() {
        let mut policy = DynamoScraped::default();
        let workers = [worker(0, 0, 0, 10), worker(1, 0, 0, 11)];
        assert_eq!(choose(&mut policy, 1, &workers), 0);
        assert_eq!(choose(&mut policy, 1, &workers), 1, "0 has a waiting one");
        assert_eq!(choose(&mut policy, 2, &workers), 0, "0 has none any more");
    }
}
