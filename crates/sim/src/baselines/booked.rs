//! Baselines that look at what the router has booked: requests, blocks and pending prefill.

use foresee_core::policy::{Candidates, Policy, RequestProfile, WorkerView};

/// Returns the leading blocks of the prompt that the worker caches, according to its KV events, and
/// that a cache hit can cover.
fn cached_blocks(request: &RequestProfile<'_>, worker: &WorkerView<'_>) -> u32 {
    let cached = worker.prefix_match.cached_blocks;
    cached.min(request.max_reusable_blocks)
}

/// NVIDIA Dynamo's router.
///
/// Cost, in blocks: `max(0, prefill) + active blocks with this request`, where `prefill` is
/// `(pending tokens + prompt tokens) / block size − cached blocks`.
///
/// Source: `DefaultWorkerScorer` of Dynamo's `kv-router`, with its defaults: overlap credit 1
/// without decay, prefill load scale 1, no weight on the number of requests. A prompt's pending
/// tokens are subtracted at its first token and do not decay (`router-prefill-load-model none`).
/// Cached blocks are those reported by KV events.
#[derive(Debug)]
pub(super) struct Dynamo;

impl Policy for Dynamo {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(candidates.iter().map(|worker| {
            let backlog = (worker.pending_tokens + u64::from(request.prompt_tokens)) as f64;
            let cached = f64::from(cached_blocks(request, &worker));
            let prefill = backlog / f64::from(request.block_size) - cached;
            let active = worker.prefix_match.active_blocks;
            let new_blocks = request.blocks - active.min(request.max_reusable_blocks);
            prefill.max(0.0) + (worker.active_blocks + u64::from(new_blocks)) as f64
        }));
    }
}

/// The `loadaware` routing of vLLM's production-stack.
///
/// Cost: `β × (load − mean load) / max(1, mean load) − matched tokens / prompt tokens`, where the
/// load is the number of requests in flight and β is 1 by default.
///
/// Source: vLLM production-stack. Where no prefix matches, the original hashes a session id. A
/// replay has no sessions, so the load alone decides.
#[derive(Debug)]
pub(super) struct ProductionStack;

impl Policy for ProductionStack {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        const BETA: f64 = 1.0;
        let loads = candidates.iter().map(|worker| f64::from(worker.requests));
        let mean = loads.sum::<f64>() / candidates.len() as f64;
        costs.extend(candidates.iter().map(|worker| {
            let above_mean = (f64::from(worker.requests) - mean) / mean.max(1.0);
            let matched = cached_blocks(request, &worker) * request.block_size;
            BETA * above_mean - f64::from(matched) / f64::from(request.prompt_tokens)
        }));
    }
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
#[derive(Debug)]
pub(super) struct TwoTier;

impl Policy for TwoTier {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        const CACHE_THRESHOLD: f64 = 0.5;
        const BALANCE_ABSOLUTE: u32 = 32;
        const BALANCE_RELATIVE: f64 = 1.1;
        let cached = |worker: &WorkerView<'_>| cached_blocks(request, worker);
        let longest = candidates.iter().map(|worker| cached(&worker)).max();
        let longest = longest.unwrap_or(0);
        let is_long = f64::from(longest) > CACHE_THRESHOLD * f64::from(request.blocks);
        let use_cache = is_long && !is_imbalanced(candidates, BALANCE_ABSOLUTE, BALANCE_RELATIVE);
        costs.extend(candidates.iter().map(|worker| {
            if use_cache && cached(&worker) < longest {
                return f64::INFINITY;
            }
            f64::from(worker.requests)
        }));
    }
}

/// Returns whether the largest number of requests on a worker exceeds the smallest by more than
/// `absolute` requests and by more than the factor `relative`.
pub(super) fn is_imbalanced(candidates: &Candidates<'_>, absolute: u32, relative: f64) -> bool {
    let requests = || candidates.iter().map(|worker| worker.requests);
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
#[derive(Debug)]
pub(super) struct LlmdAffinity;

impl Policy for LlmdAffinity {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        const AFFINITY_THRESHOLD: f64 = 0.8;
        const MAX_TOKENS_IN_FLIGHT_PENALTY: u64 = 286_720;
        const MAX_TOKENS: u64 = 4 << 20;
        let is_sticky = |worker: &WorkerView<'_>| {
            let overlap = f64::from(worker.overlap_blocks(request));
            overlap >= AFFINITY_THRESHOLD * f64::from(request.blocks)
        };
        let fewest_in_flight = |sticky: bool| {
            let group = candidates
                .iter()
                .filter(|worker| is_sticky(worker) == sticky);
            group.map(|worker| worker.pending_tokens).min()
        };
        let keeps_sticky_only = match (fewest_in_flight(true), fewest_in_flight(false)) {
            (Some(sticky), Some(other)) => sticky <= other + MAX_TOKENS_IN_FLIGHT_PENALTY,
            _ => false,
        };
        costs.extend(candidates.iter().map(|worker| {
            if keeps_sticky_only && !is_sticky(&worker) {
                return f64::INFINITY;
            }
            let tokens = worker.pending_tokens + u64::from(worker.new_tokens(request));
            tokens.min(MAX_TOKENS) as f64
        }));
    }
}

#[cfg(test)]
mod tests {
    use foresee_core::PrefixMatch;
    use foresee_core::policy::LMETRIC;

    use super::*;

    const BLOCK: u32 = 16;

    /// Returns the index of the worker that gets a prompt of 100 blocks.
    fn chosen(policy: &dyn Policy, workers: &[WorkerView<'_>]) -> usize {
        let request = RequestProfile::of_tokens(100 * BLOCK, BLOCK);
        let mut costs = Vec::new();
        policy.costs(&request, &Candidates::from(workers), &mut costs);
        usize::from(costs[1] < costs[0])
    }

    fn idle() -> WorkerView<'static> {
        WorkerView::idle(0)
    }

    fn busy(requests: u32) -> WorkerView<'static> {
        with_requests(requests, idle())
    }

    fn with_requests(requests: u32, mut worker: WorkerView<'static>) -> WorkerView<'static> {
        worker.requests = requests;
        worker
    }

    fn with_active(active_blocks: u64, mut worker: WorkerView<'static>) -> WorkerView<'static> {
        worker.active_blocks = active_blocks;
        worker
    }

    fn with_pending(tokens: u64, mut worker: WorkerView<'static>) -> WorkerView<'static> {
        worker.pending_tokens = tokens;
        worker
    }

    fn pending(tokens: u64) -> WorkerView<'static> {
        with_pending(tokens, idle())
    }

    fn cached(blocks: u32) -> WorkerView<'static> {
        let mut worker = idle();
        worker.prefix_match.cached_blocks = blocks;
        worker
    }

    /// Returns a worker whose requests pin `blocks` leading blocks that are not computed yet.
    fn in_flight(blocks: u32) -> WorkerView<'static> {
        let mut worker = with_active(u64::from(blocks), idle());
        worker.prefix_match = PrefixMatch {
            cached_blocks: 0,
            active_blocks: blocks,
        };
        worker
    }

    #[test]
    fn each_baseline_weighs_its_inputs_as_its_source_does() {
        type Case = (
            &'static str,
            Box<dyn Policy>,
            [WorkerView<'static>; 2],
            usize,
        );
        let dynamo = || Box::new(Dynamo) as Box<dyn Policy>;
        let lmetric = LMETRIC.create;
        let stack = || Box::new(ProductionStack) as Box<dyn Policy>;
        let cases: [Case; 21] = [
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
                [with_requests(3, cached(49)), with_requests(1, idle())],
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
                [with_pending(286_720, cached(80)), idle()],
                0,
            ),
            (
                "llm-d-affinity: a cached prefix loses above the penalty",
                Box::new(LlmdAffinity),
                [with_pending(286_721, cached(80)), idle()],
                1,
            ),
            (
                "llm-d-affinity: a prefix below the threshold counts as fewer tokens",
                Box::new(LlmdAffinity),
                [with_pending(80 * 16, cached(79)), idle()],
                1,
            ),
            (
                "llm-d-affinity: fewer tokens win",
                Box::new(LlmdAffinity),
                [with_pending(78 * 16, cached(79)), idle()],
                0,
            ),
            (
                "llm-d-affinity: prefixes in flight are sticky",
                Box::new(LlmdAffinity),
                [pending(0), with_pending(9_999, in_flight(99))],
                1,
            ),
        ];
        for (case, policy, workers, expected) in cases {
            assert_eq!(chosen(&*policy, &workers), expected, "{case}");
        }
    }
}
