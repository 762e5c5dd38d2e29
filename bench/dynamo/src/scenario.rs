//! The traffic and the fleet that both routers get.
//!
//! Prompts are those of the bench `decision` of `foresee-core`: the first half is one of ten
//! prefixes, the second half is unique.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Length of every prompt in tokens.
pub(crate) const PROMPT_TOKENS: usize = 4096;
/// Tokens per block.
pub(crate) const BLOCK_SIZE: u32 = 16;
/// Blocks of every prompt.
pub(crate) const PROMPT_BLOCKS: usize = PROMPT_TOKENS / BLOCK_SIZE as usize;
/// KV blocks of every worker.
pub(crate) const CAPACITY_BLOCKS: u32 = 27_312;
/// Requests that every worker has served before the measurement. Their prompts are cached.
pub(crate) const SERVED_PER_WORKER: usize = 8;
/// Requests that run on every worker during the measurement. Their prompts are cached too.
pub(crate) const RUNNING_PER_WORKER: usize = 4;

const PREFIXES: u32 = 10;

/// Calls `use_tokens` with the prompt of a request, whose first half is one of ten prefixes.
pub(crate) fn with_prompt<T>(request: u64, use_tokens: impl FnOnce(&[u32]) -> T) -> T {
    with_tokens(request as u32 % PREFIXES, request as u32, use_tokens)
}

/// Calls `use_tokens` with a prompt that has no block in common with any other prompt.
pub(crate) fn with_unique_prompt<T>(number: u64, use_tokens: impl FnOnce(&[u32]) -> T) -> T {
    with_tokens(PREFIXES + number as u32, 0, use_tokens)
}

/// Calls `use_tokens` with a prompt whose halves begin with these tokens.
fn with_tokens<T>(first: u32, middle: u32, use_tokens: impl FnOnce(&[u32]) -> T) -> T {
    thread_local! {
        static TOKENS: RefCell<Vec<u32>> = RefCell::new((0..PROMPT_TOKENS as u32).collect());
    }
    TOKENS.with_borrow_mut(|tokens| {
        tokens[0] = first;
        tokens[PROMPT_TOKENS / 2] = middle;
        use_tokens(black_box(tokens))
    })
}

/// A request from before the measurement.
pub(crate) struct EarlierRequest {
    /// Number of the request, which determines its prompt.
    pub(crate) number: u64,
    /// Worker that serves it.
    pub(crate) worker: usize,
    /// Whether it runs throughout the measurement.
    pub(crate) is_running: bool,
}

/// Returns the requests that the workers have served or are running, oldest first.
pub(crate) fn earlier_requests(workers: usize) -> impl Iterator<Item = EarlierRequest> {
    (0..workers * (SERVED_PER_WORKER + RUNNING_PER_WORKER)).map(move |number| EarlierRequest {
        number: number as u64,
        worker: number % workers,
        is_running: number >= workers * SERVED_PER_WORKER,
    })
}

/// Number of the first request of the measurement.
pub(crate) fn first_measured_request(workers: usize) -> u64 {
    (workers * (SERVED_PER_WORKER + RUNNING_PER_WORKER)) as u64
}

/// Number of slices of a measurement.
const SLICES: usize = 20;
const SLICE: Duration = Duration::from_millis(100);
const WARM_UP: Duration = Duration::from_millis(300);

/// What one thread or task has done in the measured time.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Routed and released requests in each slice.
    decisions: [u64; SLICES],
    /// Cached blocks of these requests on their workers, according to the router.
    cached_blocks: u64,
}

impl Tally {
    /// Counts a decision, unless it belongs to the warm-up.
    pub(crate) fn count(&mut self, slice: Slice, cached_blocks: u64) {
        if let Slice::Measured(slice) = slice {
            self.decisions[slice] += 1;
            self.cached_blocks += cached_blocks;
        }
    }

    /// Returns the measurement to which the tallies of all threads add up.
    ///
    /// The rate is that of the slice with the most decisions, because other work on the machine
    /// only ever slows a slice down.
    pub(crate) fn measurement(tallies: impl IntoIterator<Item = Self>) -> Measurement {
        let mut sum = Self::default();
        for tally in tallies {
            for (sum, decisions) in sum.decisions.iter_mut().zip(tally.decisions) {
                *sum += decisions;
            }
            sum.cached_blocks += tally.cached_blocks;
        }
        let best = sum.decisions.into_iter().max().unwrap_or_default();
        let total: u64 = sum.decisions.iter().sum();
        Measurement {
            per_second: best as f64 / SLICE.as_secs_f64(),
            cached_blocks: Some(sum.cached_blocks as f64 / total as f64),
        }
    }
}

/// Part of a measurement in which a decision begins.
#[derive(Clone, Copy)]
pub(crate) enum Slice {
    /// Before the measured time.
    WarmUp,
    /// Index of a slice of the measured time.
    Measured(usize),
}

/// Time of a measurement.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    /// End of the warm-up.
    start: Instant,
}

impl Window {
    /// Returns a measurement whose warm-up begins now.
    pub(crate) fn from_now() -> Self {
        Self {
            start: Instant::now() + WARM_UP,
        }
    }

    /// Returns the present slice; `None` once the measurement is over.
    pub(crate) fn slice(&self) -> Option<Slice> {
        let Some(elapsed) = Instant::now().checked_duration_since(self.start) else {
            return Some(Slice::WarmUp);
        };
        let slice = (elapsed.as_nanos() / SLICE.as_nanos()) as usize;
        (slice < SLICES).then_some(Slice::Measured(slice))
    }
}

/// Result of one measurement.
#[derive(Clone, Copy)]
pub(crate) struct Measurement {
    /// Decisions or events per second, of all threads together.
    pub(crate) per_second: f64,
    /// Mean number of cached blocks that the router found for a request on its worker. `None` if no
    /// requests were routed.
    pub(crate) cached_blocks: Option<f64>,
}

/// Decisions of a measurement that leaves hashing out, in batches.
pub(crate) struct Batches {
    /// Time of each complete batch, and of the present one, without hashing.
    elapsed: Vec<Duration>,
    cached_blocks: u64,
}

impl Batches {
    const COUNT: usize = 30;
    const DECISIONS: usize = 1_000;

    /// Returns an empty measurement.
    pub(crate) fn new() -> Self {
        Self {
            elapsed: Vec::new(),
            cached_blocks: 0,
        }
    }

    /// Returns the decisions to be made.
    pub(crate) fn decisions() -> impl Iterator<Item = usize> {
        0..Self::COUNT * Self::DECISIONS
    }

    /// Adds a decision and its time.
    pub(crate) fn add(&mut self, decision: usize, elapsed: Duration, cached_blocks: u64) {
        if decision.is_multiple_of(Self::DECISIONS) {
            self.elapsed.push(Duration::ZERO);
        }
        if let Some(batch) = self.elapsed.last_mut() {
            *batch += elapsed;
        }
        self.cached_blocks += cached_blocks;
    }

    /// Returns the measurement, whose rate is that of the fastest batch.
    pub(crate) fn measurement(&self) -> Measurement {
        let fastest = self.elapsed.iter().min().copied().unwrap_or_default();
        let decisions = self.elapsed.len() * Self::DECISIONS;
        Measurement {
            per_second: Self::DECISIONS as f64 / fastest.as_secs_f64(),
            cached_blocks: Some(self.cached_blocks as f64 / decisions as f64),
        }
    }
}
