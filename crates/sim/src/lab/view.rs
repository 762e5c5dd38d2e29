//! What a rule sees when it chooses.

use foresee_core::delay::Delay;
use foresee_core::sequence::SequenceHash;
use rand::Rng;
use rand::rngs::SmallRng;
use std::time::Duration;

use crate::engine::Engine;

/// A way to choose a worker.
pub(crate) trait Rule {
    /// The index of one of `view.workers`, of which there is at least one.
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize;

    /// How often it asks engines for [`Metrics`]; `None` for never.
    fn scrapes_every(&self) -> Option<Duration> {
        None
    }
}

/// One request, and the workers that may have it.
#[derive(Debug)]
pub(crate) struct View<'a> {
    /// Its index in the workload.
    pub(crate) request: usize,
    /// One for each full block of the prompt.
    pub(crate) prompt: &'a [SequenceHash],
    /// Prompt length.
    pub(crate) tokens: u32,
    /// Tokens of a block.
    pub(crate) block_size: u32,
    /// Answer length: nobody but the oracle may look.
    pub(crate) output_tokens: u32,
    /// Counts how often engines were asked for their metrics.
    pub(crate) scrape: u64,
    /// What a second until the first token counts in the router's cost.
    pub(crate) ttft_weight: f64,
    pub(crate) workers: &'a [Seen<'a>],
}

impl View<'_> {
    /// Blocks of the prompt, the partial last one included.
    pub(crate) fn blocks(&self) -> u32 {
        self.tokens.div_ceil(self.block_size)
    }
}

/// One worker, as the router and as its engine know it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen<'a> {
    /// Its place in the fleet, the same for every request.
    pub(crate) worker: usize,
    /// Requests booked there.
    pub(crate) requests: u32,
    /// Blocks they pin, shared ones once.
    pub(crate) active_blocks: u64,
    /// Leading blocks of the prompt that are computed and cached there, which KV events tell.
    pub(crate) cached: u32,
    /// Leading blocks of the prompt that requests there pin, computed or not.
    pub(crate) active: u32,
    /// The larger of the two, which whoever remembers what it sent knows. Of these three, at
    /// least one token of the prompt is always left to compute.
    pub(crate) overlap: u32,
    /// Prompt tokens of requests that have no first token yet, as far as they were not cached
    /// when they were placed.
    pub(crate) pending_tokens: u64,
    /// Time their prefills still take, without decodes beside them.
    pub(crate) pending_seconds: f64,
    /// Time this prompt's prefill takes there, as fast as its engine is now.
    pub(crate) prefill_seconds: f64,
    /// What placing the request there costs, as the router has it.
    pub(crate) delay: Delay,
    /// What its engine last reported.
    pub(crate) metrics: Metrics,
    /// The engine itself: nobody but the oracle may look.
    pub(crate) standing: Option<Standing<'a>>,
}

/// A worker and its engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing<'a> {
    /// Its place in the fleet.
    pub(crate) worker: usize,
    pub(crate) engine: &'a Engine,
    /// The router's blocks in one of the engine's.
    pub(crate) stride: u32,
    /// How many times as fast as its law it is.
    pub(crate) speed: f64,
    /// How long its step still takes.
    pub(crate) step_left: Duration,
}

/// What an engine reports when it is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Metrics {
    /// Requests that hold no blocks.
    pub(crate) waiting: u32,
    /// Blocks that running requests hold, in the router's.
    pub(crate) used_blocks: u32,
    /// Blocks there are, in the router's.
    pub(crate) blocks: u32,
}

impl Metrics {
    /// Share of the blocks in use.
    pub(crate) fn usage(&self) -> f64 {
        f64::from(self.used_blocks) / f64::from(self.blocks.max(1))
    }
}

/// The index of the least cost; each of several equal ones is as likely.
pub(crate) fn least<T>(
    candidates: &[T],
    rng: &mut SmallRng,
    mut cost: impl FnMut(&T) -> f64,
) -> usize {
    let mut chosen = 0;
    let mut best = f64::INFINITY;
    let mut equal = 0;
    for (index, candidate) in candidates.iter().enumerate() {
        let cost = cost(candidate);
        if cost < best {
            (chosen, best, equal) = (index, cost, 1);
        } else if cost == best {
            equal += 1;
            if rng.random_range(0..equal) == 0 {
                chosen = index;
            }
        }
    }
    chosen
}
