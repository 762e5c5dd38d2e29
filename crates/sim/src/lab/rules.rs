//! Rules over what the router has booked.

use rand::rngs::SmallRng;

use super::view::{self, Rule, Seen, View};

/// Takes the worker of least cost.
struct Least(fn(&View<'_>, &Seen<'_>) -> f64);

impl Rule for Least {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        view::least(view.workers, rng, |worker| (self.0)(view, worker))
    }
}

/// Takes the worker of least `cost`.
pub(super) fn least(cost: fn(&View<'_>, &Seen<'_>) -> f64) -> Box<dyn Rule> {
    Box::new(Least(cost))
}

/// Dynamo today (`DefaultWorkerScorer` of its `kv-router`): all prompt tokens pending there and
/// this prompt's, in blocks, less the blocks of it that are cached + blocks active there with it.
/// Its defaults: overlap credit 1 without decay, prefill load scale 1, no weight on requests.
/// Pending tokens leave at the first token and do not decay (`router-prefill-load-model none`);
/// cached is what KV events say.
pub(super) fn dynamo(view: &View<'_>, worker: &Seen<'_>) -> f64 {
    let backlog = (worker.pending_tokens + u64::from(view.tokens)) as f64;
    let prefill = backlog / f64::from(view.block_size) - f64::from(worker.cached);
    let new = u64::from(view.blocks() - worker.active);
    prefill.max(0.0) + (worker.active_blocks + new) as f64
}

/// LMetric (Zhang et al., 2026, arXiv 2603.15202): prefill tokens pending there with this
/// prompt's uncached ones × requests there with this one. No parameter. Its instances' caches
/// are known to whoever sends to them, so prefixes in flight count.
pub(super) fn lmetric(view: &View<'_>, worker: &Seen<'_>) -> f64 {
    let new = u64::from(view.tokens - worker.overlap * view.block_size);
    (worker.pending_tokens + new) as f64 * f64::from(worker.requests + 1)
}

/// vLLM production-stack's `loadaware` routing: matched tokens / prompt tokens − β × (load −
/// mean) / max(1, mean), the most wins; load is requests in flight, β is 1 by default. Where
/// nothing matches it hashes a session id, which a replay has none of: here, load alone decides.
pub(super) fn production_stack(view: &View<'_>, worker: &Seen<'_>) -> f64 {
    const BETA: f64 = 1.0;
    let loads = view.workers.iter().map(|it| f64::from(it.requests));
    let mean = loads.sum::<f64>() / view.workers.len() as f64;
    let above = (f64::from(worker.requests) - mean) / mean.max(1.0);
    let matched = f64::from(worker.cached * view.block_size) / f64::from(view.tokens);
    BETA * above - matched
}

/// Mooncake's (Qin et al., 2024, algorithm 1): time of the prefills queued there + time of this
/// one, from a profile made beforehand: here, the engine's own step law, without decodes beside.
/// Of the prefill at work, the time since it began is taken off, which the paper leaves open.
pub(super) fn time_to_first_token(_: &View<'_>, worker: &Seen<'_>) -> f64 {
    worker.pending_seconds + worker.prefill_seconds
}

/// Dynamo's `dynamo-two-tier-cost-fn` (PR 14498), ported there from sglang-router's
/// `cache_aware_zmq`, with its defaults: requests first, if they are unevenly spread; else the
/// longest cached prefix, if it is more than half of the prompt; else requests again.
pub(super) struct TwoTier;

impl Rule for TwoTier {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        const CACHE_THRESHOLD: f64 = 0.5;
        const BALANCE_ABSOLUTE: u32 = 32;
        const BALANCE_RELATIVE: f64 = 1.1;
        let longest = view.workers.iter().map(|it| it.cached).max().unwrap_or(0);
        let is_long = f64::from(longest) > CACHE_THRESHOLD * f64::from(view.blocks());
        let affine = is_long && !are_uneven(view.workers, BALANCE_ABSOLUTE, BALANCE_RELATIVE);
        view::least(view.workers, rng, |worker| {
            if affine && worker.cached < longest {
                return f64::INFINITY;
            }
            f64::from(worker.requests)
        })
    }
}

/// Whether the most requests on a worker are more than the least by both measures.
pub(super) fn are_uneven(workers: &[Seen<'_>], absolute: u32, relative: f64) -> bool {
    let requests = || workers.iter().map(|it| it.requests);
    let most = requests().max().unwrap_or(0);
    let least = requests().min().unwrap_or(0);
    most - least > absolute && f64::from(most) > relative * f64::from(least)
}

/// llm-d's optimized baseline: its `prefix-cache-affinity-filter`, then `token-load-scorer`.
///
/// Workers that have at least 0.8 of the prompt are kept, unless the least loaded of them has
/// 286,720 tokens more in flight than the least loaded of the others (the guide's
/// `maxTokensInFlightPenalty`: 18 s at 15,928 tokens/s, measured for Qwen3-32B on two H100); then,
/// or if there are none, all are. Of those kept, the least tokens in flight win: uncached prompt
/// tokens without a first token, and this prompt's. No exploration, and its approximate index
/// remembers what it sent, so prefixes in flight count: all by default. Above 4 Mi tokens it does
/// not tell workers apart.
pub(super) struct Affinity;

impl Rule for Affinity {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        const AFFINITY: f64 = 0.8;
        const MOST_PENALTY: u64 = 286_720;
        const MOST_TOKENS: u64 = 4 << 20;
        let is_sticky =
            |it: &Seen<'_>| f64::from(it.overlap) >= AFFINITY * f64::from(view.blocks());
        let least_in_flight = |sticky: bool| {
            let group = view.workers.iter().filter(|it| is_sticky(it) == sticky);
            group.map(|it| it.pending_tokens).min()
        };
        let sticks = match (least_in_flight(true), least_in_flight(false)) {
            (Some(warm), Some(cold)) => warm <= cold + MOST_PENALTY,
            _ => false,
        };
        view::least(view.workers, rng, |worker| {
            if sticks && !is_sticky(worker) {
                return f64::INFINITY;
            }
            let new = u64::from(view.tokens - worker.overlap * view.block_size);
            (worker.pending_tokens + new).min(MOST_TOKENS) as f64
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const BLOCK: u32 = 16;

    /// Which of these workers gets a prompt of 100 blocks.
    fn chosen(rule: &mut dyn Rule, workers: &[Seen<'_>]) -> usize {
        let view = View {
            request: 0,
            scrape: 0,
            prompt: &[],
            tokens: 100 * BLOCK,
            block_size: BLOCK,
            output_tokens: 1,
            ttft_weight: 1.0,
            workers,
        };
        rule.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    fn idle() -> Seen<'static> {
        Seen::default()
    }

    fn busy(requests: u32) -> Seen<'static> {
        Seen { requests, ..idle() }
    }

    fn cached(blocks: u32) -> Seen<'static> {
        Seen {
            cached: blocks,
            overlap: blocks,
            ..idle()
        }
    }

    fn pending(tokens: u64) -> Seen<'static> {
        Seen {
            pending_tokens: tokens,
            ..idle()
        }
    }

    /// A prefix that others there are about to compute.
    fn in_flight(blocks: u32) -> Seen<'static> {
        Seen {
            active: blocks,
            overlap: blocks,
            active_blocks: u64::from(blocks),
            ..idle()
        }
    }

    #[test]
    fn each_rule_weighs_as_its_source_does() {
        type Case<'a> = (&'a str, Box<dyn Rule>, [Seen<'a>; 2], usize);
        let dynamo = || least(super::dynamo);
        let lmetric = || least(super::lmetric);
        let stack = || least(production_stack);
        let ttft = || least(time_to_first_token);
        let with_requests = |requests, it| Seen { requests, ..it };
        let with_active = |active_blocks, it| Seen {
            active_blocks,
            ..it
        };
        let with_seconds = |pending_seconds, prefill_seconds| Seen {
            pending_seconds,
            prefill_seconds,
            ..idle()
        };
        let cases: [Case<'_>; 22] = [
            (
                "a cached block is worth an active one",
                dynamo(),
                [idle(), with_active(49, cached(50))],
                1,
            ),
            (
                "and no more",
                dynamo(),
                [idle(), with_active(51, cached(50))],
                0,
            ),
            (
                "backlog counts in blocks",
                dynamo(),
                [pending(51 * 16), with_active(50, idle())],
                1,
            ),
            (
                "a prefix in flight takes no room",
                dynamo(),
                [with_active(1, idle()), in_flight(50)],
                1,
            ),
            (
                "but is computed again",
                dynamo(),
                [with_active(49, cached(50)), in_flight(50)],
                0,
            ),
            (
                "tokens times requests",
                lmetric(),
                [with_requests(3, cached(50)), with_requests(1, idle())],
                1,
            ),
            (
                "half the tokens, less than twice the requests",
                lmetric(),
                [with_requests(2, cached(50)), with_requests(2, idle())],
                0,
            ),
            (
                "pending tokens count",
                lmetric(),
                [pending(801), cached(0)],
                1,
            ),
            (
                "prefixes in flight count",
                lmetric(),
                [cached(50), in_flight(51)],
                1,
            ),
            (
                "a full hit outweighs less than twice the mean",
                stack(),
                [with_requests(9, cached(99)), busy(4)],
                0,
            ),
            (
                "and not more",
                stack(),
                [with_requests(9, cached(50)), busy(3)],
                1,
            ),
            (
                "an idle fleet knows no load",
                stack(),
                [with_requests(1, cached(99)), idle()],
                1,
            ),
            (
                "wait and prefill add up",
                ttft(),
                [with_seconds(1.0, 0.1), with_seconds(0.5, 0.7)],
                0,
            ),
            (
                "overlap wins in an even fleet",
                Box::new(TwoTier),
                [with_requests(32, cached(51)), idle()],
                0,
            ),
            (
                "not in an uneven one",
                Box::new(TwoTier),
                [with_requests(33, cached(51)), idle()],
                1,
            ),
            (
                "even, relatively",
                Box::new(TwoTier),
                [with_requests(403, cached(51)), busy(370)],
                0,
            ),
            (
                "half a prompt is too little",
                Box::new(TwoTier),
                [with_requests(2, cached(50)), busy(1)],
                1,
            ),
            (
                "it sticks to what is cached",
                Box::new(Affinity),
                [
                    Seen {
                        pending_tokens: 286_720,
                        ..cached(80)
                    },
                    idle(),
                ],
                0,
            ),
            (
                "until it is saturated",
                Box::new(Affinity),
                [
                    Seen {
                        pending_tokens: 286_721,
                        ..cached(80)
                    },
                    idle(),
                ],
                1,
            ),
            (
                "a shorter prefix is only less to do",
                Box::new(Affinity),
                [
                    Seen {
                        pending_tokens: 79 * 16,
                        ..cached(79)
                    },
                    idle(),
                ],
                1,
            ),
            (
                "but it is less",
                Box::new(Affinity),
                [
                    Seen {
                        pending_tokens: 78 * 16,
                        ..cached(79)
                    },
                    idle(),
                ],
                0,
            ),
            (
                "prefixes in flight are sticky",
                Box::new(Affinity),
                [
                    pending(0),
                    Seen {
                        pending_tokens: 9_999,
                        ..in_flight(99)
                    },
                ],
                1,
            ),
        ];
        for (what, mut rule, workers, expected) in cases {
            assert_eq!(chosen(rule.as_mut(), &workers), expected, "{what}");
        }
    }

    #[test]
    fn equals_share_the_work() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[view::least(&[1.0, 0.0, 0.0, 0.0], &mut rng, |&cost| cost)] += 1;
        }
        assert_eq!(counts[0], 0);
        assert!(counts[1..].iter().all(|&it| (1200..1470).contains(&it)));
    }
}
