//! The scheduling rule of the simulated engine: which requests the next step computes, and how many
//! tokens of each.
//!
//! The rule is that of vLLM's V1 scheduler. It exists once: [`Engine`](super::Engine) applies it to
//! a paged KV cache, and the oracle's lookahead to counts of blocks. What differs is the
//! [`KvMemory`].

use std::collections::VecDeque;

use crate::step_time::BatchLoad;

/// KV memory of an engine, as far as scheduling depends on it.
pub(crate) trait KvMemory {
    /// Blocks of one request, and what is needed to find or allocate more.
    type Blocks;

    /// Returns how many of the first `tokens` tokens of a waiting request are cached. At least one
    /// token is left to compute.
    fn cached_tokens(&self, blocks: &Self::Blocks, tokens: u32) -> u32;

    /// Returns whether there is memory for the first `tokens` tokens of a request, besides the
    /// blocks that it has. `reused` are the cached tokens with which a waiting request would be
    /// admitted; 0 for a running request.
    fn fits(&self, blocks: &Self::Blocks, reused: u32, tokens: u32) -> bool;

    /// Gives the blocks of the first `reused` tokens, which are cached, to a request that is being
    /// admitted.
    fn reuse(&mut self, blocks: &mut Self::Blocks, reused: u32);

    /// Allocates the missing blocks for the first `tokens` tokens of the running request `id`. They
    /// must fit.
    fn allocate(&mut self, id: u64, blocks: &mut Self::Blocks, tokens: u32);

    /// Frees all blocks of a request.
    fn release(&mut self, blocks: &mut Self::Blocks);
}

/// Limits of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepLimits {
    /// Maximum number of tokens computed.
    pub(crate) max_num_batched_tokens: u32,
    /// Maximum number of running requests.
    pub(crate) max_num_seqs: u32,
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

/// A request in an engine, and its progress.
#[derive(Clone, Debug)]
pub(crate) struct RequestProgress<B> {
    /// Id of the request.
    pub(crate) id: u64,
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: u32,
    /// Tokens to generate.
    pub(crate) output_tokens: u32,
    /// Output tokens generated so far. A preemption does not change it.
    pub(crate) generated: u32,
    /// Tokens of prompt and output whose KV is in `blocks`; 0 while the request waits.
    pub(crate) computed: u32,
    /// Tokens that the current step adds to `computed`.
    pub(crate) scheduled: u32,
    /// Prompt tokens found in the cache at the first admission; `None` before.
    pub(crate) cached_tokens: Option<u32>,
    /// Blocks of the request.
    pub(crate) blocks: B,
}

impl<B> RequestProgress<B> {
    /// Creates a request that has just arrived.
    pub(crate) fn new(id: u64, prompt_tokens: u32, output_tokens: u32, blocks: B) -> Self {
        Self {
            id,
            prompt_tokens,
            output_tokens,
            generated: 0,
            computed: 0,
            scheduled: 0,
            cached_tokens: None,
            blocks,
        }
    }

    /// Returns a request with the same progress and these `blocks`.
    pub(crate) fn with_blocks<C>(&self, blocks: C) -> RequestProgress<C> {
        RequestProgress {
            id: self.id,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            generated: self.generated,
            computed: self.computed,
            scheduled: self.scheduled,
            cached_tokens: self.cached_tokens,
            blocks,
        }
    }

    /// Returns the tokens of the prompt and the output tokens generated so far.
    pub(crate) fn known(&self) -> u32 {
        self.prompt_tokens + self.generated
    }

    /// Returns the number of known tokens whose KV is not computed.
    pub(crate) fn remaining(&self) -> u32 {
        self.known() - self.computed
    }

    /// Returns whether all output tokens are generated.
    pub(crate) fn is_finished(&self) -> bool {
        self.generated == self.output_tokens
    }
}

/// Admission of a waiting request.
pub(crate) struct Admission {
    /// Tokens that are reused from the cache.
    reused: u32,
    /// Tokens to compute in the first step.
    chunk: u32,
}

/// The requests of an engine, and the rule that schedules them.
#[derive(Clone, Debug)]
pub(crate) struct Scheduler<M: KvMemory> {
    limits: StepLimits,
    /// KV memory for which the requests compete.
    pub(crate) memory: M,
    /// Running requests in the order of admission.
    pub(crate) running: Vec<RequestProgress<M::Blocks>>,
    /// Waiting requests in the order of service.
    pub(crate) waiting: VecDeque<RequestProgress<M::Blocks>>,
    /// Counters since the scheduler was created.
    pub(crate) totals: Totals,
}

impl<M: KvMemory> Scheduler<M> {
    /// Creates a scheduler without requests.
    pub(crate) fn new(limits: StepLimits, memory: M) -> Self {
        Self {
            limits,
            memory,
            running: Vec::new(),
            waiting: VecDeque::new(),
            totals: Totals::default(),
        }
    }

    /// Returns the limits of a step.
    pub(crate) fn limits(&self) -> StepLimits {
        self.limits
    }

    /// Iterates over all requests, each with whether it is running: running requests in the order
    /// of admission, then waiting requests in the order of service.
    pub(crate) fn requests(&self) -> impl Iterator<Item = (&RequestProgress<M::Blocks>, bool)> {
        let running = self.running.iter().map(|progress| (progress, true));
        let waiting = self.waiting.iter().map(|progress| (progress, false));
        running.chain(waiting)
    }

    /// Removes a running or waiting request, and frees its blocks. Returns whether there was a
    /// request with this id.
    pub(crate) fn remove(&mut self, id: u64) -> bool {
        let has_id = |progress: &RequestProgress<M::Blocks>| progress.id == id;
        if let Some(index) = self.running.iter().position(has_id) {
            let mut removed = self.running.remove(index);
            self.memory.release(&mut removed.blocks);
            return true;
        }
        let waiting = self.waiting.iter().position(has_id);
        waiting.is_some_and(|index| self.waiting.remove(index).is_some())
    }

    /// Schedules a step: preempts and admits requests, and allocates the blocks of the step.
    /// Returns what the step computes, which is nothing if no request could be scheduled.
    pub(crate) fn begin_step(&mut self) -> BatchLoad {
        let mut load = BatchLoad::default();
        let mut budget = self.limits.max_num_batched_tokens;
        let preemptions_before = self.totals.preemptions;
        self.schedule_running(&mut budget, &mut load);
        // Blocks that a preemption freed are for the running requests.
        if self.totals.preemptions == preemptions_before {
            self.schedule_waiting(&mut budget, &mut load);
        }
        load
    }

    /// Ends a step: each scheduled request whose known tokens are all computed generates one token,
    /// and `on_token` is called for it, in the order of admission. A request that has generated all
    /// its tokens is removed afterwards.
    pub(crate) fn end_step(&mut self, mut on_token: impl FnMut(&RequestProgress<M::Blocks>)) {
        let (memory, totals) = (&mut self.memory, &mut self.totals);
        totals.steps += 1;
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
            totals.output_tokens += 1;
            on_token(progress);
            let is_finished = progress.is_finished();
            if is_finished {
                memory.release(&mut progress.blocks);
            }
            !is_finished
        });
    }

    /// Schedules running requests until `budget` tokens are spent. Preempts requests if blocks run
    /// out. Subtracts the scheduled tokens from `budget` and adds them to `load`.
    fn schedule_running(&mut self, budget: &mut u32, load: &mut BatchLoad) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let progress = &self.running[index];
            let chunk = progress.remaining().min(*budget);
            let tokens = progress.computed + chunk;
            if !self.memory.fits(&progress.blocks, 0, tokens) {
                // The request at `index` may be the last one, and then waits itself.
                self.preempt_last();
                continue;
            }
            self.schedule(index, chunk, load);
            *budget -= chunk;
            index += 1;
        }
    }

    /// Frees the blocks of the running request that was admitted last, and returns it to the front
    /// of the waiting queue. The request keeps its generated tokens but no computed ones.
    fn preempt_last(&mut self) {
        let Some(mut preempted) = self.running.pop() else {
            return;
        };
        // Requests are scheduled in the order of admission, so this one is not scheduled yet.
        debug_assert_eq!(preempted.scheduled, 0);
        self.memory.release(&mut preempted.blocks);
        preempted.computed = 0;
        self.waiting.push_front(preempted);
        self.totals.preemptions += 1;
    }

    /// Admits and schedules waiting requests while they fit into `budget`, the maximum number of
    /// running requests and free memory. Stops at the first request that does not fit, so that no
    /// request overtakes another. Counts a request and its cached tokens only at its first
    /// admission.
    fn schedule_waiting(&mut self, budget: &mut u32, load: &mut BatchLoad) {
        while let Some(Admission { reused, chunk }) = self.admission(*budget) {
            let Some(mut admitted) = self.waiting.pop_front() else {
                return;
            };
            self.memory.reuse(&mut admitted.blocks, reused);
            admitted.computed = reused;
            if admitted.cached_tokens.is_none() {
                admitted.cached_tokens = Some(reused);
                self.totals.admitted += 1;
                self.totals.prompt_tokens += u64::from(admitted.prompt_tokens);
                self.totals.cached_tokens += u64::from(reused);
            }
            self.running.push(admitted);
            self.schedule(self.running.len() - 1, chunk, load);
            *budget -= chunk;
        }
    }

    /// Returns how the first waiting request would be admitted to a step with `budget` tokens left.
    /// `None` if it cannot be admitted, or if there is none.
    pub(crate) fn admission(&self, budget: u32) -> Option<Admission> {
        if budget == 0 || self.running.len() >= self.limits.max_num_seqs as usize {
            return None;
        }
        let first = self.waiting.front()?;
        let reused = self.memory.cached_tokens(&first.blocks, first.known());
        let chunk = (first.known() - reused).min(budget);
        let fits = self.memory.fits(&first.blocks, reused, reused + chunk);
        fits.then_some(Admission { reused, chunk })
    }

    /// Schedules `chunk` tokens of the running request at `index`, whose blocks must fit. A single
    /// token counts in `load` as a decode step once the request has generated a token.
    fn schedule(&mut self, index: usize, chunk: u32, load: &mut BatchLoad) {
        debug_assert!(chunk > 0, "a running request has at least one token left");
        let progress = &mut self.running[index];
        progress.scheduled = chunk;
        if progress.generated > 0 && chunk == 1 {
            load.add_decode(progress.computed);
        } else {
            load.add_prefill(chunk, progress.computed);
        }
        let tokens = progress.computed + chunk;
        self.memory
            .allocate(progress.id, &mut progress.blocks, tokens);
    }
}
