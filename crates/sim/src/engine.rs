//! One engine replica: what it schedules in each step, as vLLM's V1 scheduler would.
//!
//! A step serves running requests first, in the order they were admitted, then admits waiting
//! ones first come, first served, with chunked prefill, until the token budget is spent. When
//! blocks run out, the request admitted last is preempted: it loses its blocks, goes to the
//! front of the waiting queue, and later computes its prompt and the tokens generated so far
//! again.
//!
//! The engine has no clock. Its driver calls [`Engine::begin_step`], lets the step's duration
//! pass, and calls [`Engine::end_step`]. Blocks are taken at the beginning; tokens come, and
//! finished requests free their blocks, at the end. Requests may be submitted and aborted at any
//! time in between.

mod work;

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::sequence::SequenceHash;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::blocks::{Allocated, BlockId, BlockPool};
use crate::law::{Preset, StepLaw, StepLoad};
use crate::prompt::mix;
pub use work::Work;

/// What an engine is, fixed for its life.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens per block.
    pub block_size: NonZeroU32,
    /// Blocks of KV cache.
    pub blocks: u32,
    /// Most tokens computed in one step; at least 1.
    pub max_num_batched_tokens: u32,
    /// Most requests running at once; at least 1.
    pub max_num_seqs: u32,
    /// Whether requests share the blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Whether to keep what enters and leaves the cache for [`Engine::take_cache_events`].
    pub cache_events: bool,
    /// How long steps take.
    pub law: StepLaw,
    /// Seed of the noise of step times.
    pub seed: u64,
}

impl EngineConfig {
    /// An engine with a preset's step times and memory, and vLLM's defaults for the rest.
    #[must_use]
    pub fn from_preset(preset: &Preset, block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            blocks: preset.kv_tokens / block_size,
            max_num_batched_tokens: preset.max_num_batched_tokens,
            max_num_seqs: 256,
            prefix_caching: true,
            cache_events: false,
            law: preset.law,
            seed: 0,
        }
    }
}

/// A request as an engine sees it: lengths, and the hashes that prefixes are found by.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    /// Names the request in events and for [`Engine::abort`]. Unique among requests in flight.
    pub id: u64,
    /// One for each full block of prompt and output, as far as their content is known. Blocks
    /// behind are never shared.
    pub hashes: Arc<[SequenceHash]>,
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Tokens it generates.
    pub output_tokens: u32,
}

/// Why an engine does not take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to compute.
    #[error("prompt and output must each have at least one token")]
    Empty,
    /// It would never fit, even alone.
    #[error("prompt and output need {needed} blocks, the KV cache has {capacity}")]
    NeverFits {
        /// Blocks for prompt and output.
        needed: u32,
        /// Blocks the engine has.
        capacity: u32,
    },
}

/// A step under way. Hand it back to [`Engine::end_step`] when its time has passed.
#[derive(Debug, PartialEq)]
#[must_use = "a step that is not ended stops the engine"]
pub struct Step {
    /// How long it takes.
    pub duration: Duration,
    /// What it computes.
    pub load: StepLoad,
}

/// A token generated for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// The request's id.
    pub id: u64,
    /// Whether this is its first.
    pub first: bool,
    /// Whether this is its last. The request is gone from the engine.
    pub finished: bool,
    /// Prompt tokens that were found in the cache when it was first admitted.
    pub cached_tokens: u32,
}

/// A change of the prefix cache, as engines publish it. Physical blocks are not merged, so a
/// hash can be stored and removed several times; it is gone when each has been removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks of a request entered the cache.
    Stored {
        /// The request's id.
        request: u64,
        /// Which of its hashes: indices into [`EngineRequest::hashes`].
        blocks: Range<usize>,
    },
    /// A block was taken out.
    Removed {
        /// What it held.
        hash: SequenceHash,
    },
}

/// Sums since the engine began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests admitted, each counted once.
    pub admitted: u64,
    /// Their prompt tokens.
    pub prompt_tokens: u64,
    /// Those of them found in the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Times a request lost its blocks to another.
    pub preemptions: u64,
    /// Steps ended.
    pub steps: u64,
}

/// A request in an engine, for observers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// The request's id.
    pub id: u64,
    /// Whether it runs, rather than waits.
    pub running: bool,
    /// Blocks it holds; 0 while it waits.
    pub blocks: u32,
}

/// An engine replica; see the module's documentation.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    pool: BlockPool,
    /// In the order of admission.
    running: Vec<Progress>,
    waiting: VecDeque<Progress>,
    stepping: bool,
    totals: Totals,
    cache_events: Vec<CacheEvent>,
    noise: SmallRng,
}

/// A request and how far it has come.
#[derive(Debug)]
struct Progress {
    request: EngineRequest,
    /// Output tokens generated. They stay known through preemption.
    generated: u32,
    /// Tokens of prompt and output whose KV is in `blocks`.
    computed: u32,
    /// Tokens the step under way adds to `computed`.
    scheduled: u32,
    blocks: Vec<BlockId>,
    /// Leading blocks that are in the cache under the request's hashes.
    stored: usize,
    /// Prompt tokens found in the cache at first admission.
    cached_tokens: Option<u32>,
}

impl Progress {
    /// Tokens of prompt and output known so far.
    fn known(&self) -> u32 {
        self.request.prompt_tokens + self.generated
    }

    fn remaining(&self) -> u32 {
        self.known() - self.computed
    }
}

/// How a waiting request can be admitted.
struct Admission {
    /// Leading blocks to take from the cache.
    hits: usize,
    /// Tokens to compute in the first step.
    chunk: u32,
}

impl Engine {
    /// An idle engine with an empty cache.
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

    /// Adds a request to the end of the waiting queue.
    ///
    /// # Errors
    /// When the request is empty, or larger than the whole KV cache.
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
        self.waiting.push_back(Progress {
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

    /// Forgets a request, waiting or running, and frees its blocks at once. Returns whether
    /// there was one.
    pub fn abort(&mut self, id: u64) -> bool {
        if let Some(index) = self.running.iter().position(|it| it.request.id == id) {
            let aborted = self.running.remove(index);
            self.pool.release(&aborted.blocks);
            return true;
        }
        let waiting = self.waiting.iter().position(|it| it.request.id == id);
        waiting.is_some_and(|index| self.waiting.remove(index).is_some())
    }

    /// Whether a step would do something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Schedules a step and takes the blocks it needs. `None` when there is nothing to do, or
    /// a step is under way.
    pub fn begin_step(&mut self) -> Option<Step> {
        debug_assert!(!self.stepping, "the previous step has not ended");
        if self.stepping || !self.has_work() {
            return None;
        }
        let mut load = StepLoad::default();
        let mut budget = self.config.max_num_batched_tokens;
        let preemptions_before = self.totals.preemptions;
        self.schedule_running(&mut budget, &mut load);
        // What a preemption freed is for those who run already.
        if self.totals.preemptions == preemptions_before {
            self.schedule_waiting(&mut budget, &mut load);
        }
        debug_assert!(
            load.sequences > 0,
            "the first in line can always be scheduled"
        );
        self.stepping = true;
        Some(Step {
            duration: self.config.law.sample(&load, &mut self.noise),
            load,
        })
    }

    /// Completes a step: one token for every request whose known tokens are all computed.
    /// Events are in the order of admission.
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

    /// What entered and left the cache since the last call, in order. Empty unless
    /// [`EngineConfig::cache_events`] is on.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.cache_events)
    }

    /// Blocks that running requests refer to, a shared one counted once: the truth that a
    /// router's active blocks are compared with.
    #[must_use]
    pub fn pinned_blocks(&self) -> u32 {
        self.pool.pinned()
    }

    /// Blocks of KV cache.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.pool.capacity()
    }

    /// Distinct sequence hashes in the prefix cache.
    #[must_use]
    pub fn cached_hashes(&self) -> usize {
        self.pool.cached_hashes()
    }

    /// Requests admitted and not finished.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that hold no blocks yet, or lost them.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sums since the engine began.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// What the engine was made with.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Every request in the engine: the running in order of admission, then the waiting in
    /// order of service.
    pub fn in_flight(&self) -> impl Iterator<Item = InFlight> {
        let running = self.running.iter().map(|progress| (progress, true));
        let waiting = self.waiting.iter().map(|progress| (progress, false));
        running.chain(waiting).map(|(progress, running)| InFlight {
            id: progress.request.id,
            running,
            blocks: progress.blocks.len() as u32,
        })
    }

    fn schedule_running(&mut self, budget: &mut u32, load: &mut StepLoad) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let chunk = self.running[index].remaining().min(*budget);
            if !self.make_room(index, chunk) {
                break;
            }
            self.schedule(index, chunk, load);
            *budget -= chunk;
            index += 1;
        }
    }

    /// Preempts from the end of `running` until `chunk` tokens of the request at `index` fit.
    /// Returns whether it is still running itself.
    fn make_room(&mut self, index: usize, chunk: u32) -> bool {
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

    fn preempt_last(&mut self) {
        let Some(mut preempted) = self.running.pop() else {
            return;
        };
        // Requests are scheduled front to back, so the last one never is before another's turn.
        debug_assert_eq!(preempted.scheduled, 0);
        self.pool.release(&preempted.blocks);
        preempted.blocks.clear();
        preempted.stored = 0;
        preempted.computed = 0;
        self.waiting.push_front(preempted);
        self.totals.preemptions += 1;
    }

    fn schedule_waiting(&mut self, budget: &mut u32, load: &mut StepLoad) {
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
            debug_assert_eq!(admitted.blocks.len(), hits, "a cached prefix has no holes");
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

    /// Whether the blocks for a waiting request's hits and first chunk are there.
    fn admission(&self, candidate: &Progress, budget: u32) -> Option<Admission> {
        let known = candidate.known();
        let hits = self.cached_depth(&candidate.request.hashes, known);
        let hit_tokens = hits as u32 * self.config.block_size.get();
        let chunk = (known - hit_tokens).min(budget);
        let blocks = self.blocks_for(hit_tokens + chunk);
        let free = self.pool.free();
        // A hit costs a free block unless somebody pins it already. Most candidates are decided
        // without counting those.
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

    /// Leading blocks of `tokens` tokens with these hashes that are in the cache, at most so many
    /// that one token is left to compute.
    fn cached_depth(&self, hashes: &[SequenceHash], tokens: u32) -> usize {
        if !self.config.prefix_caching {
            return 0;
        }
        let reusable = tokens.saturating_sub(1) / self.config.block_size;
        let hashes = &hashes[..hashes.len().min(reusable as usize)];
        // Tails are evicted first, so whoever is cached has its whole prefix cached.
        hashes.partition_point(|&hash| self.pool.find(hash).is_some())
    }

    /// Gives the running request at `index` the blocks for `chunk` more tokens, which are free,
    /// and lets others find those that will be full.
    fn schedule(&mut self, index: usize, chunk: u32, load: &mut StepLoad) {
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
                debug_assert!(false, "room was made before");
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
            let hash = hash.unwrap_or_else(|| unasked_hash(progress.request.id, block));
            self.pool.store(progress.blocks[block], hash);
        }
        // Nobody can be told of blocks whose content is not known.
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

    fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.config.block_size.get())
    }
}
/// The hash of a full block whose content is not known: an engine stores it like any other, and no
/// request can ask for it.
fn unasked_hash(request: u64, block: usize) -> SequenceHash {
    mix(mix(request) ^ block as u64)
}
