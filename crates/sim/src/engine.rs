//! One engine replica, which schedules its steps as vLLM's V1 scheduler does.
//!
//! A step serves running requests first, in the order of their admission. It then admits waiting
//! requests first come, first served, with chunked prefill, until the token budget is spent. When
//! blocks run out, the request that was admitted last is preempted: it loses its blocks, returns to
//! the front of the waiting queue, and later computes its prompt and the tokens generated so far
//! again.
//!
//! The engine has no clock. Its driver calls [`Engine::begin_step`], lets the duration of the step
//! pass, and calls [`Engine::end_step`]. Blocks are allocated at the beginning of a step. At its
//! end tokens are generated, and finished requests free their blocks. Requests may be submitted and
//! aborted at any time, also during a step.

mod paged_memory;
pub(crate) mod scheduler;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::sequence::SequenceHash;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::step_time::{BatchLoad, Preset, StepTimeModel};
pub use paged_memory::CacheEvent;
use paged_memory::{PagedBlocks, PagedMemory};
pub use scheduler::Totals;
use scheduler::{RequestProgress, Scheduler, StepLimits};

/// Configuration of an engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens per block.
    pub block_size: NonZeroU32,
    /// Blocks of KV cache.
    pub blocks: u32,
    /// Maximum number of tokens computed in one step; at least 1.
    pub max_num_batched_tokens: u32,
    /// Maximum number of running requests; at least 1.
    pub max_num_seqs: u32,
    /// Whether requests reuse the cached blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Whether changes of the prefix cache are recorded for [`Engine::take_cache_events`].
    pub cache_events: bool,
    /// Durations of steps.
    pub step_time: StepTimeModel,
    /// Seed of the noise in the durations of steps.
    pub seed: u64,
}

impl EngineConfig {
    /// Returns the configuration of an engine with the step times, memory and token budget of
    /// `preset`, and vLLM's defaults otherwise. The engine reuses cached prefixes, records no cache
    /// events, and has noise seed 0. Memory that does not fill a block is not used.
    #[must_use]
    pub fn from_preset(preset: &Preset, block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            blocks: preset.kv_tokens / block_size,
            max_num_batched_tokens: preset.max_num_batched_tokens,
            max_num_seqs: 256,
            prefix_caching: true,
            cache_events: false,
            step_time: preset.step_time,
            seed: 0,
        }
    }
}

/// A request to an engine: its lengths, and the hashes by which its prefixes are found.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    /// Identifies the request in events and in [`Engine::abort`]. Unique among the requests in the
    /// engine.
    pub id: u64,
    /// Sequence hashes of the full blocks of prompt and output, as far as their content is known.
    /// Blocks after these are never shared.
    pub hashes: Arc<[SequenceHash]>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens to generate.
    pub output_tokens: u32,
}

/// Reason why an engine rejects a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The prompt or the output is empty.
    #[error("prompt and output must each have at least one token")]
    Empty,
    /// The request needs more blocks than the engine has.
    #[error("prompt and output need {needed} KV blocks, but the engine has {capacity}")]
    NeverFits {
        /// Blocks for prompt and output.
        needed: u32,
        /// Blocks of the engine.
        capacity: u32,
    },
}

/// A step in progress. It is passed to [`Engine::end_step`] when its duration has passed.
#[derive(Debug, PartialEq)]
#[must_use = "a step that is not ended stops the engine"]
pub struct Step {
    /// Duration of the step.
    pub duration: Duration,
    /// Tokens and sequences that the step computes.
    pub load: BatchLoad,
}

/// An output token generated for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// Id of the request.
    pub id: u64,
    /// Whether this is the first token of the request.
    pub first: bool,
    /// Whether this is the last token of the request, which has left the engine.
    pub finished: bool,
    /// Prompt tokens that were found in the cache when the request was first admitted.
    pub cached_tokens: u32,
}

/// Blocks of a request in an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Id of the request.
    pub id: u64,
    /// `true` if the request is running, `false` if it waits for admission.
    pub running: bool,
    /// Blocks allocated for the request; 0 while it waits.
    pub blocks: u32,
}

/// An engine replica. See the [module](self).
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    scheduler: Scheduler<PagedMemory>,
    /// Whether a step is in progress.
    stepping: bool,
    /// Generator of the noise in the durations of steps.
    noise: SmallRng,
}

impl Engine {
    /// Creates an engine without requests and with an empty cache.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        let limits = StepLimits {
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_num_seqs: config.max_num_seqs,
        };
        Self {
            scheduler: Scheduler::new(limits, PagedMemory::new(&config)),
            stepping: false,
            noise: SmallRng::seed_from_u64(config.seed),
            config,
        }
    }

    /// Adds a request to the end of the waiting queue. A later [`begin_step`](Self::begin_step)
    /// admits it. The uniqueness of its id is not checked.
    ///
    /// # Errors
    /// If the prompt or the output is empty, or if both together need more blocks than the engine
    /// has, free or not. The engine is then unchanged.
    pub fn submit(&mut self, request: EngineRequest) -> Result<(), SubmitError> {
        let EngineRequest {
            id,
            hashes,
            prompt_tokens,
            output_tokens,
        } = request;
        if prompt_tokens == 0 || output_tokens == 0 {
            return Err(SubmitError::Empty);
        }
        let tokens = prompt_tokens.saturating_add(output_tokens);
        let needed = self.scheduler.memory.blocks_for(tokens);
        let capacity = self.capacity();
        if needed > capacity {
            return Err(SubmitError::NeverFits { needed, capacity });
        }
        let blocks = PagedBlocks::new(hashes);
        let progress = RequestProgress::new(id, prompt_tokens, output_tokens, blocks);
        self.scheduler.waiting.push_back(progress);
        Ok(())
    }

    /// Removes a running or waiting request, and frees its blocks at once. Returns whether there
    /// was a request with this id. The request's full blocks stay in the cache. During a step, the
    /// step keeps its duration, but [`end_step`](Self::end_step) reports no token of the request.
    pub fn abort(&mut self, id: u64) -> bool {
        self.scheduler.remove(id)
    }

    /// Returns whether the engine has requests, running or waiting.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.running() > 0 || self.waiting() > 0
    }

    /// Schedules a step: preempts and admits requests, allocates the blocks of the step, and adds
    /// the blocks that it fills to the cache. `None` if the engine has no requests. A call while a
    /// step is in progress is an error of the caller: it panics in debug builds and otherwise
    /// returns `None`.
    pub fn begin_step(&mut self) -> Option<Step> {
        debug_assert!(!self.stepping, "the previous step has ended");
        if self.stepping || !self.has_work() {
            return None;
        }
        let load = self.scheduler.begin_step();
        debug_assert!(
            load.sequences > 0,
            "the first request can always be scheduled"
        );
        self.stepping = true;
        Some(Step {
            duration: self.config.step_time.sample(&load, &mut self.noise),
            load,
        })
    }

    /// Ends a step: each scheduled request whose known tokens are all computed generates one token.
    /// Returns the tokens in the order of the requests' admission. A request that has generated all
    /// its tokens leaves the engine, and its full blocks stay in the cache. `_step` must be the
    /// step in progress; its contents are not used.
    pub fn end_step(&mut self, _step: Step) -> Vec<TokenEvent> {
        self.stepping = false;
        let mut events = Vec::new();
        self.scheduler.end_step(|progress| {
            events.push(TokenEvent {
                id: progress.id,
                first: progress.generated == 1,
                finished: progress.is_finished(),
                cached_tokens: progress.cached_tokens.unwrap_or(0),
            });
        });
        events
    }

    /// Returns the changes of the prefix cache since the last call, in order. Empty unless
    /// [`EngineConfig::cache_events`] is set.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.scheduler.memory.take_cache_events()
    }

    /// Returns the number of blocks that running requests pin, shared blocks counted once. It is
    /// the true value with which a router's active blocks are compared.
    #[must_use]
    pub fn pinned_blocks(&self) -> u32 {
        self.scheduler.memory.pool.pinned()
    }

    /// Returns the number of blocks of the KV cache.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.scheduler.memory.pool.capacity()
    }

    /// Returns the number of distinct sequence hashes in the prefix cache.
    #[must_use]
    pub fn cached_hashes(&self) -> usize {
        self.scheduler.memory.pool.cached_hashes()
    }

    /// Returns how many of the `tokens` tokens of a sequence with these hashes are cached. At least
    /// one token is left to compute. `hashes` are those of the engine's blocks. 0 without prefix
    /// caching.
    #[must_use]
    pub fn cached_tokens(&self, hashes: &[SequenceHash], tokens: u32) -> u32 {
        self.scheduler.memory.cached_tokens_of(hashes, tokens)
    }

    /// Returns the number of running requests: admitted, and not finished.
    #[must_use]
    pub fn running(&self) -> usize {
        self.scheduler.running.len()
    }

    /// Returns the number of waiting requests: not admitted yet, or preempted.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.scheduler.waiting.len()
    }

    /// Returns the counters since the engine was created.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.scheduler.totals
    }

    /// Returns the configuration of the engine.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Iterates over all requests in the engine: running requests in the order of admission, then
    /// waiting requests in the order of service.
    pub fn in_flight(&self) -> impl Iterator<Item = InFlight> {
        let requests = self.scheduler.requests();
        requests.map(|(progress, running)| InFlight {
            id: progress.id,
            running,
            blocks: progress.blocks.ids.len() as u32,
        })
    }

    /// Returns the requests of the engine and the rule that schedules them.
    pub(crate) fn scheduler(&self) -> &Scheduler<PagedMemory> {
        &self.scheduler
    }
}
