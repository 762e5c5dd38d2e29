//! Rules over what engines report of themselves, as old as it is.

use std::time::Duration;

use rand::rngs::SmallRng;

use super::view::{self, Rule, Seen, View};

/// Dynamo's rule before PR 1731 (`DefaultWorkerSelector`): 2 × cached tokens / prompt tokens − KV
/// usage − waiting requests / the most waiting anywhere; the most wins, equals at random. Metrics come each second. In between, as there, each choice counts one waiting request
/// and its new blocks on the worker chosen, until the next report overwrites that.
///
/// The original counts at most one block of a prompt (`min(isl / block_size, 1)`), which was a
/// mistake; here, all that are not cached.
#[derive(Default)]
pub(super) struct Scraped {
    /// The scrape that `sent` counts from.
    scrape: u64,
    /// By worker: requests sent there since, and their new blocks.
    sent: Vec<(u32, u32)>,
}

impl Rule for Scraped {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        if self.scrape != view.scrape {
            self.scrape = view.scrape;
            self.sent.clear();
        }
        let workers = view.workers.iter().map(|it| it.worker + 1);
        let known = workers.max().unwrap_or(0).max(self.sent.len());
        self.sent.resize(known, (0, 0));
        let sent = &self.sent;
        let waiting = |it: &Seen<'_>| f64::from(it.metrics.waiting + sent[it.worker].0);
        let most_waiting = view.workers.iter().map(waiting).fold(1.0, f64::max);
        let chosen = view::least(view.workers, rng, |it| {
            let used = f64::from(it.metrics.used_blocks + sent[it.worker].1);
            let usage = used / f64::from(it.metrics.blocks.max(1));
            let cached = f64::from(it.cached * view.block_size) / f64::from(view.tokens);
            usage + waiting(it) / most_waiting - 2.0 * cached
        });
        let it = &view.workers[chosen];
        let (requests, blocks) = &mut self.sent[it.worker];
        *requests += 1;
        *blocks += view.blocks() - it.cached;
        chosen
    }

    fn scrapes_every(&self) -> Option<Duration> {
        Some(Duration::from_secs(1))
    }
}

/// llm-d's default profile (its router's `loadDefaultConfig`, as in the gateway API inference
/// extension): 3 × matched share of the prompt + 2 × how few requests wait, between the most and
/// the fewest of all workers + 2 × (1 − KV usage); the most wins. Metrics come each 50 ms. The
/// prefix index remembers what was sent, so prefixes in flight count.
pub(super) struct Scored;

impl Rule for Scored {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        const PREFIX: f64 = 3.0;
        const QUEUE: f64 = 2.0;
        const KV_USAGE: f64 = 2.0;
        let waiting = || view.workers.iter().map(|it| it.metrics.waiting);
        let most = waiting().max().unwrap_or(0);
        let fewest = waiting().min().unwrap_or(0);
        view::least(view.workers, rng, |it| {
            let matched = f64::from(it.overlap) / f64::from(view.blocks());
            let queue = if most > fewest {
                f64::from(most - it.metrics.waiting) / f64::from(most - fewest)
            } else {
                1.0
            };
            -(PREFIX * matched + QUEUE * queue + KV_USAGE * (1.0 - it.metrics.usage()))
        })
    }

    fn scrapes_every(&self) -> Option<Duration> {
        Some(Duration::from_millis(50))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::view::Metrics;
    use super::*;

    /// A worker that has so many leading blocks of the prompt, so many requests waiting, and so
    /// much of its memory in use, in percent.
    fn worker(worker: usize, cached: u32, waiting: u32, used_blocks: u32) -> Seen<'static> {
        Seen {
            worker,
            cached,
            overlap: cached,
            metrics: Metrics {
                waiting,
                used_blocks,
                blocks: 100,
            },
            ..Seen::default()
        }
    }

    /// A prompt of 20 blocks.
    fn choose(rule: &mut impl Rule, scrape: u64, workers: &[Seen<'_>]) -> usize {
        let view = View {
            request: 0,
            scrape,
            ttft_weight: 1.0,
            prompt: &[],
            tokens: 320,
            block_size: 16,
            output_tokens: 1,
            workers,
        };
        rule.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    #[test]
    fn scores_add_up_by_their_weights() {
        let cases = [
            // Three for the whole prompt, two for the whole queue.
            ([worker(0, 19, 5, 0), worker(1, 0, 0, 0)], 0),
            ([worker(0, 13, 5, 0), worker(1, 0, 0, 0)], 1),
            // Who waits alone is as far from the fewest as can be.
            ([worker(0, 13, 1, 0), worker(1, 0, 0, 0)], 1),
            ([worker(0, 13, 1, 0), worker(1, 0, 0, 3)], 0),
            // Two for the whole memory.
            ([worker(0, 10, 0, 74), worker(1, 0, 0, 0)], 0),
            ([worker(0, 10, 0, 76), worker(1, 0, 0, 0)], 1),
        ];
        for (workers, expected) in cases {
            assert_eq!(choose(&mut Scored, 1, &workers), expected, "{workers:?}");
        }
    }

    #[test]
    fn the_old_rule_weighs_overlap_twice() {
        let cases = [
            ([worker(0, 10, 0, 99), worker(1, 0, 0, 0)], 0),
            ([worker(0, 9, 0, 91), worker(1, 0, 0, 0)], 1),
            ([worker(0, 9, 1, 0), worker(1, 0, 0, 0)], 1),
            ([worker(0, 11, 1, 0), worker(1, 0, 0, 0)], 0),
        ];
        for (workers, expected) in cases {
            let mut rule = Scraped::default();
            assert_eq!(choose(&mut rule, 1, &workers), expected, "{workers:?}");
        }
    }

    #[test]
    fn between_reports_the_old_rule_counts_what_it_sent() {
        let mut rule = Scraped::default();
        let workers = [worker(0, 0, 0, 10), worker(1, 0, 0, 11)];
        assert_eq!(choose(&mut rule, 1, &workers), 0);
        assert_eq!(choose(&mut rule, 1, &workers), 1, "one waits on the first");
        assert_eq!(
            choose(&mut rule, 2, &workers),
            0,
            "a report says that none does"
        );
    }
}
