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

mod work;

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::sequence::SequenceHash;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::block_pool::{Allocated, BlockId, BlockPool};
use crate::prompt::mix;
use crate::step_time::{BatchLoad, Preset, StepTimeModel};
pub use work::RequestState;

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

/// A change of the prefix cache, as engines publish it.
///
/// Blocks with equal content are not merged, so a hash can be stored several times. It is no longer
/// cached when it has been removed as many times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks of a request were added to the cache.
    Stored {
        /// Id of the request.
        request: u64,
        /// Indices of the blocks in [`EngineRequest::hashes`].
        blocks: Range<usize>,
    },
    /// A block was removed from the cache.
    Removed {
        /// Hash of the block.
        hash: SequenceHash,
    },
}

/// Counters since the engine was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Admitted requests. A request that is admitted again after a preemption is not counted again.
    pub admitted: u64,
    /// Prompt tokens of the admitted requests.
    pub prompt_tokens: u64,
    /// Prompt tokens that were found in the cache at the first admission.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub output_tokens: u64,
    /// Preemptions of requests.
    pub preemptions: u64,
    /// Steps that ended.
    pub steps: u64,
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
    pool: BlockPool,
    /// Running requests in the order of admission.
    running: Vec<RequestProgress>,
    /// Waiting requests in the order of service.
    waiting: VecDeque<RequestProgress>,
    /// Whether a step is in progress.
    stepping: bool,
    totals: Totals,
    /// Changes of the cache that [`take_cache_events`](Engine::take_cache_events) has not returned.
    cache_events: Vec<CacheEvent>,
    /// Generator of the noise in the durations of steps.
    noise: SmallRng,
}

/// A request in an engine, and its progress.
#[derive(Debug)]
struct RequestProgress {
    request: EngineRequest,
    /// Output tokens generated so far. A preemption does not change it.
    generated: u32,
    /// Tokens of prompt and output whose KV is in `blocks`.
    computed: u32,
    /// Tokens that the current step adds to `computed`.
    scheduled: u32,
    /// Blocks allocated for the request, in the order of its tokens.
    blocks: Vec<BlockId>,
    /// Number of leading blocks that are in the cache under the request's hashes.
    stored: usize,
    /// Prompt tokens found in the cache at the first admission; `None` before.
    cached_tokens: Option<u32>,
}

impl RequestProgress {
    /// Returns the tokens of the prompt and the output tokens generated so far.
    fn known(&self) -> u32 {
        self.request.prompt_tokens + self.generated
    }

    /// Returns the number of known tokens whose KV is not computed.
    fn remaining(&self) -> u32 {
        self.known() - self.computed
    }
}

/// Admission of a waiting request.
struct Admission {
    /// Number of leading blocks to reuse from the cache.
    hits: usize,
    /// Tokens to compute in the first step.
    chunk: u32,
}

impl Engine {
    /// Creates an engine without requests and with an empty cache.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        Self {
            pool: BlockPool::new(config.blocks),
            running: Vec::new(),
            waiting: VecDeque::new(),
            stepping: false,
            totals: Totals::default(),
            cache_events: Vec::new(),
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
        if request.prompt_tokens == 0 || request.output_tokens == 0 {
            return Err(SubmitError::Empty);
        }
        let tokens = request.prompt_tokens.saturating_add(request.output_tokens);
        let needed = self.blocks_for(tokens);
        let capacity = self.pool.capacity();
        if needed > capacity {
            return Err(SubmitError::NeverFits { needed, capacity });
        }
        self.waiting.push_back(RequestProgress {
            request,
            generated: 0,
            computed: 0,
            scheduled: 0,
            blocks: Vec::new(),
            stored: 0,
            cached_tokens: None,
        });
        Ok(())
    }

    /// Removes a running or waiting request, and frees its blocks at once. Returns whether there
    /// was a request with this id. The request's full blocks stay in the cache. During a step, the
    /// step keeps its duration, but [`end_step`](Self::end_step) reports no token of the request.
    pub fn abort(&mut self, id: u64) -> bool {
        let has_id = |progress: &RequestProgress| progress.request.id == id;
        if let Some(index) = self.running.iter().position(has_id) {
            let aborted = self.running.remove(index);
            self.pool.release(&aborted.blocks);
            return true;
        }
        let waiting = self.waiting.iter().position(has_id);
        waiting.is_some_and(|index| self.waiting.remove(index).is_some())
    }

    /// Returns whether the engine has requests, running or waiting.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
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
        let mut load = BatchLoad::default();
        let mut budget = self.config.max_num_batched_tokens;
        let preemptions_before = self.totals.preemptions;
        self.schedule_running(&mut budget, &mut load);
        // Blocks that a preemption freed are for the running requests.
        if self.totals.preemptions == preemptions_before {
            self.schedule_waiting(&mut budget, &mut load);
        }
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
        self.totals.steps += 1;
        let mut events = Vec::new();
        let pool = &mut self.pool;
        self.running.retain_mut(|progress| {
            if progress.scheduled == 0 {
                return true;
            }
            progress.computed += progress.scheduled;
            progress.scheduled = 0;
            if progress.remaining() > 0 {
                return true;
            }
            progress.generated += 1;
            let finished = progress.generated == progress.request.output_tokens;
            events.push(TokenEvent {
                id: progress.request.id,
                first: progress.generated == 1,
                finished,
                cached_tokens: progress.cached_tokens.unwrap_or(0),
            });
            if finished {
                pool.release(&progress.blocks);
            }
            !finished
        });
        self.totals.output_tokens += events.len() as u64;
        events
    }

    /// Returns the changes of the prefix cache since the last call, in order. Empty unless
    /// [`EngineConfig::cache_events`] is set.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.cache_events)
    }

    /// Returns the number of blocks that running requests pin, shared blocks counted once. It is
    /// the true value with which a router's active blocks are compared.
    #[must_use]
    pub fn pinned_blocks(&self) -> u32 {
        self.pool.pinned()
    }

    /// Returns the number of blocks of the KV cache.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.pool.capacity()
    }

    /// Returns the number of distinct sequence hashes in the prefix cache.
    #[must_use]
    pub fn cached_hashes(&self) -> usize {
        self.pool.cached_hashes()
    }

    /// Returns the number of running requests: admitted, and not finished.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Returns the number of waiting requests: not admitted yet, or preempted.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns the counters since the engine was created.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Returns the configuration of the engine.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Iterates over all requests in the engine: running requests in the order of admission, then
    /// waiting requests in the order of service.
    pub fn in_flight(&self) -> impl Iterator<Item = InFlight> {
        let running = self.running.iter().map(|progress| (progress, true));
        let waiting = self.waiting.iter().map(|progress| (progress, false));
        running.chain(waiting).map(|(progress, running)| InFlight {
            id: progress.request.id,
            running,
            blocks: progress.blocks.len() as u32,
        })
    }

    /// Schedules running requests until `budget` tokens are spent. Preempts requests if blocks run
    /// out. Subtracts the scheduled tokens from `budget` and adds them to `load`.
    fn schedule_running(&mut self, budget: &mut u32, load: &mut BatchLoad) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let chunk = self.running[index].remaining().min(*budget);
            if !self.preempt_until_fits(index, chunk) {
                break;
            }
            self.schedule(index, chunk, load);
            *budget -= chunk;
            index += 1;
        }
    }

    /// Preempts the running requests that were admitted last until `chunk` tokens of the running
    /// request at `index` fit. Returns whether that request is still running itself. If not, it was
    /// preempted too.
    fn preempt_until_fits(&mut self, index: usize, chunk: u32) -> bool {
        loop {
            let progress = &self.running[index];
            let blocks = self.blocks_for(progress.computed + chunk);
            if blocks - progress.blocks.len() as u32 <= self.pool.free() {
                return true;
            }
            self.preempt_last();
            if self.running.len() <= index {
                return false;
            }
        }
    }

    /// Frees the blocks of the running request that was admitted last, and returns it to the front
    /// of the waiting queue. The request keeps its generated tokens but no computed ones. Its full
    /// blocks stay in the cache, where it may find them again.
    fn preempt_last(&mut self) {
        let Some(mut preempted) = self.running.pop() else {
            return;
        };
        // Requests are scheduled in the order of admission, so this one is not scheduled yet.
        debug_assert_eq!(preempted.scheduled, 0);
        self.pool.release(&preempted.blocks);
        preempted.blocks.clear();
        preempted.stored = 0;
        preempted.computed = 0;
        self.waiting.push_front(preempted);
        self.totals.preemptions += 1;
    }

    /// Admits and schedules waiting requests while they fit into `budget`, the maximum number of
    /// running requests and free memory. Stops at the first request that does not fit, so that no
    /// request overtakes another. Counts a request and its cached tokens only at its first
    /// admission.
    fn schedule_waiting(&mut self, budget: &mut u32, load: &mut BatchLoad) {
        while *budget > 0 && self.running.len() < self.config.max_num_seqs as usize {
            let Some(first) = self.waiting.front() else {
                return;
            };
            let Some(Admission { hits, chunk }) = self.admission(first, *budget) else {
                return;
            };
            let Some(mut admitted) = self.waiting.pop_front() else {
                return;
            };
            for &hash in &admitted.request.hashes[..hits] {
                let Some(block) = self.pool.find(hash) else {
                    break;
                };
                self.pool.pin(block);
                admitted.blocks.push(block);
            }
            debug_assert_eq!(admitted.blocks.len(), hits, "a cached prefix has no gaps");
            admitted.stored = hits;
            admitted.computed = hits as u32 * self.config.block_size.get();
            if admitted.cached_tokens.is_none() {
                admitted.cached_tokens = Some(admitted.computed);
                self.totals.admitted += 1;
                self.totals.prompt_tokens += u64::from(admitted.request.prompt_tokens);
                self.totals.cached_tokens += u64::from(admitted.computed);
            }
            self.running.push(admitted);
            self.schedule(self.running.len() - 1, chunk, load);
            *budget -= chunk;
        }
    }

    /// Returns the cache hits and the first chunk of a waiting request; `None` if there are not
    /// enough free blocks for both. The maximum number of running requests is not checked.
    fn admission(&self, candidate: &RequestProgress, budget: u32) -> Option<Admission> {
        let known = candidate.known();
        let hits = self.cached_blocks(&candidate.request.hashes, known);
        let hit_tokens = hits as u32 * self.config.block_size.get();
        let chunk = (known - hit_tokens).min(budget);
        let blocks = self.blocks_for(hit_tokens + chunk);
        let free = self.pool.free();
        // A hit takes a free block unless a running request pins it already. The pinned hits are
        // counted only if the decision depends on them.
        if blocks > free {
            if blocks - hits as u32 > free {
                return None;
            }
            let hashes = candidate.request.hashes[..hits].iter();
            let pinned = hashes
                .filter_map(|&hash| self.pool.find(hash))
                .filter(|&block| self.pool.is_pinned(block))
                .count();
            if blocks - pinned as u32 > free {
                return None;
            }
        }
        Some(Admission { hits, chunk })
    }

    /// Returns the number of leading blocks of a sequence of `tokens` tokens with these hashes that
    /// are cached. At least one token is left to compute. 0 without prefix caching.
    fn cached_blocks(&self, hashes: &[SequenceHash], tokens: u32) -> usize {
        if !self.config.prefix_caching {
            return 0;
        }
        let reusable = tokens.saturating_sub(1) / self.config.block_size;
        let hashes = &hashes[..hashes.len().min(reusable as usize)];
        // The end of a sequence is evicted first, so all blocks before a cached one are cached.
        hashes.partition_point(|&hash| self.pool.find(hash).is_some())
    }

    /// Schedules `chunk` tokens of the running request at `index`: allocates the missing blocks,
    /// which must be free, and adds the blocks that the step fills to the cache. A single token
    /// counts in `load` as a decode step once the request has generated a token. Blocks of unknown
    /// content are cached too, under keys that no other request finds.
    fn schedule(&mut self, index: usize, chunk: u32, load: &mut BatchLoad) {
        let recording = self.config.cache_events;
        let progress = &mut self.running[index];
        progress.scheduled = chunk;
        if progress.generated > 0 && chunk == 1 {
            load.add_decode(progress.computed);
        } else {
            load.add_prefill(chunk, progress.computed);
        }

        let tokens = progress.computed + chunk;
        let needed = tokens.div_ceil(self.config.block_size.get()) as usize;
        while progress.blocks.len() < needed {
            let Some(Allocated { block, evicted }) = self.pool.allocate() else {
                debug_assert!(false, "enough blocks are free");
                return;
            };
            progress.blocks.push(block);
            if let Some(hash) = evicted.filter(|_| recording) {
                self.cache_events.push(CacheEvent::Removed { hash });
            }
        }
        if !self.config.prefix_caching {
            return;
        }
        let full = (tokens / self.config.block_size) as usize;
        for block in progress.stored..full {
            let hashes = &progress.request.hashes;
            let hash = hashes.get(block).copied();
            let hash = hash.unwrap_or_else(|| unhashed_block_key(progress.request.id, block));
            self.pool.store(progress.blocks[block], hash);
        }
        // Blocks of unknown content are not published.
        let known = full.min(progress.request.hashes.len());
        let entering = progress.stored.min(known)..known;
        progress.stored = progress.stored.max(full);
        if recording && !entering.is_empty() {
            self.cache_events.push(CacheEvent::Stored {
                request: progress.request.id,
                blocks: entering,
            });
        }
    }

    /// Returns the number of blocks for `tokens` tokens.
    fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.config.block_size.get())
    }
}

/// Returns the hash under which the engine caches a full block of unknown content. It is unique to
/// the request, so no other request finds the block.
fn unhashed_block_key(request: u64, block: usize) -> SequenceHash {
    mix(mix(request) ^ block as u64)
}
