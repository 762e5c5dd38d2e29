//! Baselines that look at what the router has booked: requests, blocks and pending prefill.
//!
//! Each formula is a cost: the worker with the smallest one is chosen, and ties are broken at
//! random.

use rand::rngs::SmallRng;

use super::view::{self, BaselinePolicy, DecisionView, WorkerView};

/// Policy that chooses the worker with the smallest cost.
struct ArgminBy {
    cost: fn(&DecisionView<'_>, &WorkerView<'_>) -> f64,
}

impl BaselinePolicy for ArgminBy {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        view::argmin(view.workers, rng, |worker| (self.cost)(view, worker))
    }
}

/// Creates the policy that chooses the worker with the smallest `cost`.
pub(super) fn argmin_by(
    cost: fn(&DecisionView<'_>, &WorkerView<'_>) -> f64,
) -> Box<dyn BaselinePolicy> {
    Box::new(ArgminBy { cost })
}

/// Returns the cost of NVIDIA Dynamo's router, in blocks.
///
/// Formula: `max(0, prefill) + active blocks with this request`, where `prefill` is
/// `(pending tokens + prompt tokens) / block size − cached blocks`.
///
/// Source: `DefaultWorkerScorer` of Dynamo's `kv-router`, with its defaults: overlap credit 1
/// without decay, prefill load scale 1, no weight on the number of requests. A prompt's pending
/// tokens are subtracted at its first token and do not decay (`router-prefill-load-model none`).
/// Cached blocks are those reported by KV events.
pub(super) fn dynamo(view: &DecisionView<'_>, worker: &WorkerView<'_>) -> f64 {
    let backlog = (worker.pending_tokens + u64::from(view.tokens)) as f64;
    let prefill = backlog / f64::from(view.block_size) - f64::from(worker.cached_blocks);
    let new_blocks = u64::from(view.blocks() - worker.active_blocks_matched);
    prefill.max(0.0) + (worker.active_blocks + new_blocks) as f64
}

/// Returns the cost of LMetric, in tokens × requests.
///
/// Formula: `(pending tokens + uncached tokens of this prompt) × (requests + 1)`. It has no
/// parameter.
///
/// Source: Zhang et al., 2026, arXiv 2603.15202. LMetric's router knows the caches of its instances
/// from the prompts that it sends to them, so prefixes in flight count as cached.
pub(super) fn lmetric(view: &DecisionView<'_>, worker: &WorkerView<'_>) -> f64 {
    let uncached = u64::from(view.tokens - worker.overlap_blocks * view.block_size);
    (worker.pending_tokens + uncached) as f64 * f64::from(worker.requests + 1)
}

/// Returns the negated score of the `loadaware` routing of vLLM's production-stack.
///
/// Score: `matched tokens / prompt tokens − β × (load − mean load) / max(1, mean load)`, where the
/// load is the number of requests in flight and β is 1 by default.
///
/// Source: vLLM production-stack. Where no prefix matches, the original hashes a session id. A
/// replay has no sessions, so the load alone decides.
pub(super) fn production_stack(view: &DecisionView<'_>, worker: &WorkerView<'_>) -> f64 {
    const BETA: f64 = 1.0;
    let loads = view.workers.iter().map(|worker| f64::from(worker.requests));
    let mean = loads.sum::<f64>() / view.workers.len() as f64;
    let above_mean = (f64::from(worker.requests) - mean) / mean.max(1.0);
    let matched = f64::from(worker.cached_blocks * view.block_size) / f64::from(view.tokens);
    BETA * above_mean - matched
}

/// Returns the predicted time to first token, in seconds, as Mooncake minimises it.
///
/// Formula: `time of the pending prefills + time of this prefill`.
///
/// Source: Qin et al., 2024 (Mooncake), algorithm 1. The original takes prefill times from a
/// profile that is measured in advance. Here they come from the engine's own step-time model,
/// without concurrent decodes. The time since the current prefill started is subtracted, which the
/// paper does not specify.
pub(super) fn time_to_first_token(_: &DecisionView<'_>, worker: &WorkerView<'_>) -> f64 {
    worker.pending_seconds + worker.prefill_seconds
}

/// Dynamo's two-tier policy.
///
/// Rule: if the numbers of requests are [imbalanced](is_imbalanced) by more than 32 and by more
/// than 1.1 times, the worker with the fewest requests. Otherwise, of the workers with the longest
/// cached prefix, the one with the fewest requests, if that prefix is more than half of the prompt.
/// Otherwise the worker with the fewest requests.
///
/// Source: Dynamo's `dynamo-two-tier-cost-fn` (PR 14498) with its defaults, ported by Dynamo from
/// sglang-router's `cache_aware_zmq`.
pub(super) struct TwoTier;

impl BaselinePolicy for TwoTier {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        const CACHE_THRESHOLD: f64 = 0.5;
        const BALANCE_ABSOLUTE: u32 = 32;
        const BALANCE_RELATIVE: f64 = 1.1;
        let longest = view
            .workers
            .iter()
            .map(|worker| worker.cached_blocks)
            .max()
            .unwrap_or(0);
        let is_long = f64::from(longest) > CACHE_THRESHOLD * f64::from(view.blocks());
        let use_cache = is_long && !is_imbalanced(view.workers, BALANCE_ABSOLUTE, BALANCE_RELATIVE);
        view::argmin(view.workers, rng, |worker| {
            if use_cache && worker.cached_blocks < longest {
                return f64::INFINITY;
            }
            f64::from(worker.requests)
        })
    }
}

/// Returns whether the largest number of requests on a worker exceeds the smallest by more than
/// `absolute` requests and by more than the factor `relative`.
pub(super) fn is_imbalanced(workers: &[WorkerView<'_>], absolute: u32, relative: f64) -> bool {
    let requests = || workers.iter().map(|worker| worker.requests);
    let largest = requests().max().unwrap_or(0);
    let smallest = requests().min().unwrap_or(0);
    largest - smallest > absolute && f64::from(largest) > relative * f64::from(smallest)
}

/// llm-d's optimized baseline.
///
/// Rule: `prefix-cache-affinity-filter`, then `token-load-scorer`.
/// - The filter keeps the workers that have at least 0.8 of the prompt. It keeps all workers if
///   there is no such worker, or if the least loaded of them has over 286,720 tokens more in flight
///   than the least loaded of the other workers.
/// - Of the kept workers, the one with the fewest tokens in flight is chosen: the uncached prompt
///   tokens of its requests without a first token, and those of this prompt. Above 4 Mi tokens all
///   workers count as equal.
///
/// Source: the guide of llm-d. 286,720 is its `maxTokensInFlightPenalty`: 18 s at 15,928 tokens/s,
/// measured for Qwen3-32B on two H100. By default there is no exploration, and the approximate
/// index records the prompts that were sent, so prefixes in flight count.
pub(super) struct LlmdAffinity;

impl BaselinePolicy for LlmdAffinity {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        const AFFINITY_THRESHOLD: f64 = 0.8;
        const MAX_TOKENS_IN_FLIGHT_PENALTY: u64 = 286_720;
        const MAX_TOKENS: u64 = 4 << 20;
        let is_sticky = |worker: &WorkerView<'_>| {
            f64::from(worker.overlap_blocks) >= AFFINITY_THRESHOLD * f64::from(view.blocks())
        };
        let fewest_in_flight = |sticky: bool| {
            let group = view.workers.iter();
            let group = group.filter(|worker| is_sticky(worker) == sticky);
            group.map(|worker| worker.pending_tokens).min()
        };
        let keeps_sticky_only = match (fewest_in_flight(true), fewest_in_flight(false)) {
            (Some(sticky), Some(other)) => sticky <= other + MAX_TOKENS_IN_FLIGHT_PENALTY,
            _ => false,
        };
        view::argmin(view.workers, rng, |worker| {
            if keeps_sticky_only && !is_sticky(worker) {
                return f64::INFINITY;
            }
            let uncached = u64::from(view.tokens - worker.overlap_blocks * view.block_size);
            (worker.pending_tokens + uncached).min(MAX_TOKENS) as f64
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const BLOCK: u32 = 16;

    /// Returns the index of the worker that gets a prompt of 100 blocks.
    fn chosen(policy: &mut dyn BaselinePolicy, workers: &[WorkerView<'_>]) -> usize {
        let view = DecisionView {
            request: 0,
            scrape: 0,
            prompt: &[],
            tokens: 100 * BLOCK,
            block_size: BLOCK,
            output_tokens: 1,
            ttft_weight: 1.0,
            workers,
        };
        policy.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    fn idle() -> WorkerView<'static> {
        WorkerView::default()
    }

    fn busy(requests: u32) -> WorkerView<'static> {
        WorkerView { requests, ..idle() }
    }

    fn cached(blocks: u32) -> WorkerView<'static> {
        WorkerView {
            cached_blocks: blocks,
            overlap_blocks: blocks,
            ..idle()
        }
    }

    fn pending(tokens: u64) -> WorkerView<'static> {
        WorkerView {
            pending_tokens: tokens,
            ..idle()
        }
    }

    /// Returns a worker whose requests pin `blocks` leading blocks that are not computed yet.
    fn in_flight(blocks: u32) -> WorkerView<'static> {
        WorkerView {
            active_blocks_matched: blocks,
            overlap_blocks: blocks,
            active_blocks: u64::from(blocks),
            ..idle()
        }
    }

    #[test]
    fn each_baseline_weighs_its_inputs_as_its_source_does() {
        type Case<'a> = (&'a str, Box<dyn BaselinePolicy>, [WorkerView<'a>; 2], usize);
        let dynamo = || argmin_by(super::dynamo);
        let lmetric = || argmin_by(super::lmetric);
        let stack = || argmin_by(production_stack);
        let ttft = || argmin_by(time_to_first_token);
        let with_requests = |requests, worker| WorkerView { requests, ..worker };
        let with_active = |active_blocks, worker| WorkerView {
            active_blocks,
            ..worker
        };
        let with_seconds = |pending_seconds, prefill_seconds| WorkerView {
            pending_seconds,
            prefill_seconds,
            ..idle()
        };
        let cases: [Case<'_>; 22] = [
            (
                "dynamo: a cached block is worth an active one",
                dynamo(),
                [idle(), with_active(49, cached(50))],
                1,
            ),
            (
                "dynamo: a cached block is worth no more than an active one",
                dynamo(),
                [idle(), with_active(51, cached(50))],
                0,
            ),
            (
                "dynamo: pending tokens count in blocks",
                dynamo(),
                [pending(51 * 16), with_active(50, idle())],
                1,
            ),
            (
                "dynamo: a prefix in flight adds no active blocks",
                dynamo(),
                [with_active(1, idle()), in_flight(50)],
                1,
            ),
            (
                "dynamo: a prefix in flight counts as prefill",
                dynamo(),
                [with_active(49, cached(50)), in_flight(50)],
                0,
            ),
            (
                "lmetric: tokens times requests",
                lmetric(),
                [with_requests(3, cached(50)), with_requests(1, idle())],
                1,
            ),
            (
                "lmetric: half the tokens win at equal requests",
                lmetric(),
                [with_requests(2, cached(50)), with_requests(2, idle())],
                0,
            ),
            (
                "lmetric: pending tokens count",
                lmetric(),
                [pending(801), cached(0)],
                1,
            ),
            (
                "lmetric: prefixes in flight count",
                lmetric(),
                [cached(50), in_flight(51)],
                1,
            ),
            (
                "production-stack: a full hit outweighs 9 requests against 4",
                stack(),
                [with_requests(9, cached(99)), busy(4)],
                0,
            ),
            (
                "production-stack: half a hit does not outweigh 9 requests against 3",
                stack(),
                [with_requests(9, cached(50)), busy(3)],
                1,
            ),
            (
                "production-stack: one request outweighs a full hit in an idle fleet",
                stack(),
                [with_requests(1, cached(99)), idle()],
                1,
            ),
            (
                "min-ttft: wait and prefill add up",
                ttft(),
                [with_seconds(1.0, 0.1), with_seconds(0.5, 0.7)],
                0,
            ),
            (
                "two-tier: a long prefix wins in a balanced fleet",
                Box::new(TwoTier),
                [with_requests(32, cached(51)), idle()],
                0,
            ),
            (
                "two-tier: the fewest requests win in an imbalanced fleet",
                Box::new(TwoTier),
                [with_requests(33, cached(51)), idle()],
                1,
            ),
            (
                "two-tier: a fleet within the relative bound is balanced",
                Box::new(TwoTier),
                [with_requests(403, cached(51)), busy(370)],
                0,
            ),
            (
                "two-tier: half a prompt is not enough",
                Box::new(TwoTier),
                [with_requests(2, cached(50)), busy(1)],
                1,
            ),
            (
                "llm-d-affinity: a cached prefix wins up to the penalty",
                Box::new(LlmdAffinity),
                [
                    WorkerView {
                        pending_tokens: 286_720,
                        ..cached(80)
                    },
                    idle(),
                ],
                0,
            ),
            (
                "llm-d-affinity: a cached prefix loses above the penalty",
                Box::new(LlmdAffinity),
                [
                    WorkerView {
                        pending_tokens: 286_721,
                        ..cached(80)
                    },
                    idle(),
                ],
                1,
            ),
            (
                "llm-d-affinity: a prefix below the threshold counts as fewer tokens",
                Box::new(LlmdAffinity),
                [
                    WorkerView {
                        pending_tokens: 79 * 16,
                        ..cached(79)
                    },
                    idle(),
                ],
                1,
            ),
            (
                "llm-d-affinity: fewer tokens win",
                Box::new(LlmdAffinity),
                [
                    WorkerView {
                        pending_tokens: 78 * 16,
                        ..cached(79)
                    },
                    idle(),
                ],
                0,
            ),
            (
                "llm-d-affinity: prefixes in flight are sticky",
                Box::new(LlmdAffinity),
                [
                    pending(0),
                    WorkerView {
                        pending_tokens: 9_999,
                        ..in_flight(99)
                    },
                ],
                1,
            ),
        ];
        for (case, mut policy, workers, expected) in cases {
            assert_eq!(chosen(policy.as_mut(), &workers), expected, "{case}");
        }
    }

    #[test]
    fn ties_are_broken_evenly() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[view::argmin(&[1.0, 0.0, 0.0, 0.0], &mut rng, |&cost| cost)] += 1;
        }
        assert_eq!(counts[0], 0);
        let is_even = |count: &u32| (1200..1470).contains(count);
        assert!(counts[1..].iter().all(is_even));
    }
}
