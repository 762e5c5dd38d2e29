//! Input of a baseline that knows more than a router: one request, the workers that may take it, and
//! their engines.

use foresee_core::sequence::SequenceHash;
use rand::Rng;
use rand::rngs::SmallRng;
use std::time::Duration;

use crate::engine::Engine;

/// A policy that chooses a worker for each request, and sees the engines.
pub(crate) trait InformedPolicy {
    /// Returns the index of the chosen worker in `view.workers`, which is not empty. `rng` breaks
    /// ties.
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize;

    /// Returns the interval at which the engines' [`Metrics`] are scraped; `None` if they are not
    /// used.
    fn scrape_interval(&self) -> Option<Duration> {
        None
    }
}

/// One request, and the workers that may take it.
#[derive(Debug)]
pub(crate) struct DecisionView<'a> {
    /// Index of the request in the workload.
    pub(crate) request: usize,
    /// Sequence hashes of the full blocks of the prompt.
    pub(crate) prompt: &'a [SequenceHash],
    /// Tokens of the prompt.
    pub(crate) tokens: u32,
    /// Tokens per block of the router.
    pub(crate) block_size: u32,
    /// Output tokens of the request. Only the oracle may read it: no router knows it.
    pub(crate) output_tokens: u32,
    /// Number of the latest scrape of the engines' metrics. A new number means new metrics.
    pub(crate) scrape: u64,
    /// Eligible workers.
    pub(crate) workers: &'a [EngineView<'a>],
}

impl DecisionView<'_> {
    /// Returns the number of blocks of the prompt, the partial last one included.
    pub(crate) fn blocks(&self) -> u32 {
        self.tokens.div_ceil(self.block_size)
    }

    /// Returns the prompt tokens that the worker does not cache, according to its KV events.
    pub(crate) fn uncached_tokens(&self, worker: &EngineView<'_>) -> u32 {
        self.tokens - worker.cached_blocks * self.block_size
    }
}

/// One worker: what the router has booked there, what the engine reported, and the engine itself.
///
/// All blocks are blocks of the router. The three prefix lengths leave at least one token of the
/// prompt to compute.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EngineView<'a> {
    /// Index of the worker in the fleet, independent of the workers that are eligible.
    pub(crate) worker: usize,
    /// Number of requests booked on the worker.
    pub(crate) requests: u32,
    /// Leading blocks of the prompt that the worker has computed and caches, according to its KV
    /// events.
    pub(crate) cached_blocks: u32,
    /// Leading blocks of the prompt that requests on the worker pin, computed or not.
    pub(crate) active_blocks_matched: u32,
    /// The larger of `cached_blocks` and `active_blocks_matched`. A router that remembers which
    /// prompts it sent where knows this number.
    pub(crate) overlap_blocks: u32,
    /// Prompt tokens of the requests without a first token that were not cached when the worker was
    /// chosen, according to its KV events.
    pub(crate) pending_tokens: u64,
    /// Remaining prefill time of the requests without a first token, in seconds, if nothing is
    /// decoded concurrently.
    pub(crate) pending_seconds: f64,
    /// Prefill time of this prompt at the current speed of the engine, in seconds.
    pub(crate) prefill_seconds: f64,
    /// Metrics of the engine at the latest scrape.
    pub(crate) metrics: Metrics,
    /// True state of the engine. Only the oracle may read it: no router knows it.
    pub(crate) engine: Option<EngineState<'a>>,
}

/// True state of one worker's engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EngineState<'a> {
    /// Index of the worker in the fleet.
    pub(crate) worker: usize,
    /// The engine.
    pub(crate) engine: &'a Engine,
    /// Engine block size ÷ router block size.
    pub(crate) engine_block_ratio: u32,
    /// Speed relative to the engine's step-time model: at 2, steps take half as long.
    pub(crate) speed: f64,
    /// Time until the current step ends; zero between steps.
    pub(crate) step_left: Duration,
}

/// Metrics that an engine reports when it is scraped.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Metrics {
    /// Requests that are not admitted, and have no blocks.
    pub(crate) waiting: u32,
    /// Blocks of running requests, in blocks of the router.
    pub(crate) used_blocks: u32,
    /// KV blocks of the engine, in blocks of the router.
    pub(crate) blocks: u32,
}

impl Metrics {
    /// Returns the fraction of the blocks that are in use.
    pub(crate) fn usage(&self) -> f64 {
        f64::from(self.used_blocks) / f64::from(self.blocks.max(1))
    }
}

/// Returns the index of the candidate with the smallest cost. Ties are broken evenly at random.
/// Returns 0 if there are no candidates. A cost of NaN never wins against a number.
pub(crate) fn argmin<T>(
    candidates: &[T],
    rng: &mut SmallRng,
    mut cost_of: impl FnMut(&T) -> f64,
) -> usize {
    let mut chosen = 0;
    let mut smallest = f64::INFINITY;
    let mut ties = 0;
    for (index, candidate) in candidates.iter().enumerate() {
        let cost = cost_of(candidate);
        if cost < smallest {
            (chosen, smallest, ties) = (index, cost, 1);
        } else if cost == smallest {
            ties += 1;
            if rng.random_range(0..ties) == 0 {
                chosen = index;
            }
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn ties_are_broken_evenly() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[argmin(&[1.0, 0.0, 0.0, 0.0], &mut rng, |&cost| cost)] += 1;
        }
        assert_eq!(counts[0], 0);
        let is_even = |count: &u32| (1200..1470).contains(count);
        assert!(counts[1..].iter().all(is_even));
    }
}
