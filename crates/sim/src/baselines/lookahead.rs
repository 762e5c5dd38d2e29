//! Forward simulation of an engine to its end: when each of its requests would end if no further
//! request arrived.
//!
//! The simulation has no noise in its step times. It schedules by the same rule as
//! [`Engine`](crate::engine::Engine), the [`Scheduler`], over a reduced memory: how many tokens
//! each request finds in the cache, and how many blocks are free. Consecutive steps that only
//! decode are computed at once, up to the next end of a request or until memory is full.
//!
//! Two simplifications make the result approximate; it is exact if requests share no blocks and
//! nothing is cached:
//! - Blocks that several requests share count for the first of them, and are freed with it,
//!   although others may still pin them.
//! - A preempted request finds its whole prompt cached when it is admitted again, although other
//!   requests may have evicted some of it.

use std::num::NonZeroU32;

use super::view::EngineState;
use crate::engine::EngineConfig;
use crate::engine::scheduler::{KvMemory, RequestProgress, Scheduler};
use crate::step_time::BatchLoad;

/// KV memory of which only the number of free blocks is known.
#[derive(Clone, Debug)]
pub(super) struct CountedMemory {
    /// Tokens per block.
    block_size: NonZeroU32,
    /// Free blocks.
    free: u32,
}

/// Numbers of blocks of one request.
#[derive(Clone, Debug)]
pub(super) struct CountedBlocks {
    /// Blocks allocated for the request, without the `shared` ones.
    allocated: u32,
    /// Tokens that the request finds cached when it is admitted, or admitted again.
    cached: u32,
    /// Blocks of the request that count for other requests.
    shared: u32,
}

impl CountedMemory {
    /// Returns the number of blocks to allocate for a request so that it has KV for `tokens`
    /// tokens.
    fn missing_blocks(&self, blocks: &CountedBlocks, tokens: u32) -> u32 {
        let needed = tokens.div_ceil(self.block_size.get());
        needed.saturating_sub(blocks.shared + blocks.allocated)
    }
}

impl KvMemory for CountedMemory {
    type Blocks = CountedBlocks;

    fn cached_tokens(&self, blocks: &CountedBlocks, _tokens: u32) -> u32 {
        blocks.cached
    }

    fn fits(&self, blocks: &CountedBlocks, _reused: u32, tokens: u32) -> bool {
        self.missing_blocks(blocks, tokens) <= self.free
    }

    /// Does nothing: [`allocate`](Self::allocate) counts the reused blocks too.
    fn reuse(&mut self, _blocks: &mut CountedBlocks, _reused: u32) {}

    fn allocate(&mut self, _id: u64, blocks: &mut CountedBlocks, tokens: u32) {
        let new_blocks = self.missing_blocks(blocks, tokens);
        blocks.allocated += new_blocks;
        self.free -= new_blocks;
    }

    fn release(&mut self, blocks: &mut CountedBlocks) {
        self.free += std::mem::take(&mut blocks.allocated);
    }
}

/// A request in the simulated engine, and its progress.
pub(super) type ScheduledRequest = RequestProgress<CountedBlocks>;

impl ScheduledRequest {
    /// Creates a request that has just arrived. `cached` are the tokens of its prompt that it will
    /// find cached, and `shared` is the number of their blocks that other requests in the engine
    /// pin.
    pub(super) fn arriving(
        id: u64,
        prompt_tokens: u32,
        output_tokens: u32,
        cached: u32,
        shared: u32,
    ) -> Self {
        let blocks = CountedBlocks {
            allocated: 0,
            cached,
            shared,
        };
        Self::new(id, prompt_tokens, output_tokens, blocks)
    }

    /// Returns whether the next step of the request is a decode step.
    fn is_decoding(&self) -> bool {
        self.generated > 0 && self.remaining() == 1
    }
}

/// Token of a request that the simulation reports.
pub(super) enum Milestone {
    /// First output token.
    FirstToken,
    /// Last output token. The request leaves the engine.
    LastToken,
}

/// Simulated copy of an engine.
#[derive(Clone, Debug)]
pub(super) struct Lookahead<'a> {
    config: &'a EngineConfig,
    /// Speed relative to the step-time model: at 2, steps take half as long.
    speed: f64,
    /// Requests of the engine.
    scheduler: Scheduler<CountedMemory>,
    /// Time since the start of the simulation, in seconds.
    now: f64,
    /// End of the step that was in progress at the start of the simulation, in seconds.
    step_end: f64,
}

impl<'a> Lookahead<'a> {
    /// Copies the current state of an engine. `shared` returns, for a request id, the number of the
    /// request's blocks that counted for other requests when it was placed. The speed stays
    /// constant during the simulation.
    pub(super) fn new(state: &EngineState<'a>, shared: impl Fn(u64) -> u32) -> Self {
        let engine = state.engine;
        let config = engine.config();
        let block_size = config.block_size;
        let memory = CountedMemory {
            block_size,
            free: engine.capacity() - engine.pinned_blocks(),
        };
        let source = engine.scheduler();
        let mut scheduler = Scheduler::new(source.limits(), memory);
        scheduler.running.reserve(source.running.len());
        // Besides the copied requests, one more may be submitted.
        scheduler.waiting.reserve(source.waiting.len() + 1);
        for (progress, is_running) in source.requests() {
            let shared = shared(progress.id);
            let cached = if !is_running {
                // Shared blocks are cached by the time of admission: requests that are served
                // earlier compute them.
                let cached = source
                    .memory
                    .cached_tokens(&progress.blocks, progress.known());
                cached.max(shared * block_size.get())
            } else if config.prefix_caching {
                // At least one token is always computed.
                (progress.prompt_tokens - 1) / block_size * block_size.get()
            } else {
                0
            };
            let copy = progress.with_blocks(CountedBlocks {
                allocated: (progress.blocks.ids.len() as u32).saturating_sub(shared),
                cached,
                shared,
            });
            if is_running {
                scheduler.running.push(copy);
            } else {
                scheduler.waiting.push_back(copy);
            }
        }
        Self {
            config,
            speed: state.speed,
            scheduler,
            now: 0.0,
            step_end: state.step_left.as_secs_f64(),
        }
    }

    /// Adds a request to the end of the waiting queue.
    pub(super) fn submit(&mut self, request: ScheduledRequest) {
        self.scheduler.waiting.push_back(request);
    }

    /// Simulates until no request is left, or none fits. Calls `on_milestone` for the first and the
    /// last token of each request, with the time since the start in seconds. A request that never
    /// fits reaches no further milestone.
    pub(super) fn run(mut self, mut on_milestone: impl FnMut(&ScheduledRequest, Milestone, f64)) {
        let mut running = self.scheduler.running.iter();
        if running.any(|request| request.scheduled > 0) {
            self.now = self.step_end;
            self.end_step(&mut on_milestone);
        }
        while self.skip_decode_steps(&mut on_milestone) || self.step(&mut on_milestone) {}
    }

    /// Simulates one step. Returns `false` if no request could be scheduled. If no request is
    /// running, the whole memory counts as free.
    fn step(&mut self, on_milestone: &mut impl FnMut(&ScheduledRequest, Milestone, f64)) -> bool {
        if self.scheduler.running.is_empty() {
            self.scheduler.memory.free = self.config.blocks;
        }
        let load = self.scheduler.begin_step();
        if load.sequences == 0 {
            return false;
        }
        self.now += self.config.step_time.mean(&load).as_secs_f64() / self.speed;
        self.end_step(on_milestone);
        true
    }

    /// Ends the current step at the current time. Calls `on_milestone` for first and last tokens.
    fn end_step(&mut self, on_milestone: &mut impl FnMut(&ScheduledRequest, Milestone, f64)) {
        let now = self.now;
        self.scheduler.end_step(|request| {
            if request.generated == 1 {
                on_milestone(request, Milestone::FirstToken, now);
            }
            if request.is_finished() {
                on_milestone(request, Milestone::LastToken, now);
            }
        });
    }

    /// Simulates all steps until the next end of a request at once, or as many as fit into memory.
    /// Returns `false`, and changes nothing, unless at least one request is running, all running
    /// requests decode within the token budget, no waiting request can be admitted, and at least
    /// one step fits into memory.
    fn skip_decode_steps(
        &mut self,
        on_milestone: &mut impl FnMut(&ScheduledRequest, Milestone, f64),
    ) -> bool {
        let running = &self.scheduler.running;
        let sequences = running.len() as u32;
        let budget = self.config.max_num_batched_tokens;
        let remaining_outputs = running
            .iter()
            .map(|request| request.output_tokens - request.generated);
        let until_next_end = remaining_outputs.min();
        let Some(max_steps) = until_next_end.filter(|_| sequences <= budget) else {
            return false;
        };
        if !running.iter().all(ScheduledRequest::is_decoding)
            || self.scheduler.admission(budget - sequences).is_some()
        {
            return false;
        }
        let steps = self.steps_that_fit(max_steps);
        if steps == 0 {
            return false;
        }
        let mut load = BatchLoad::default();
        let Scheduler {
            running, memory, ..
        } = &mut self.scheduler;
        for request in running {
            load.add_decode(request.computed);
            memory.allocate(request.id, &mut request.blocks, request.computed + steps);
            request.computed += steps - 1;
            request.generated += steps - 1;
            request.scheduled = 1;
        }
        let step_time = &self.config.step_time;
        let steps = f64::from(steps);
        // Each step reads one token of context more than the step before, for every sequence.
        let growth =
            step_time.per_context_token * f64::from(sequences) * steps * (steps - 1.0) / 2.0;
        self.now += (steps * step_time.mean(&load).as_secs_f64() + growth) / self.speed;
        self.end_step(on_milestone);
        true
    }

    /// Returns the number of decode steps, up to `max_steps`, that fit into free memory. 0 if not
    /// even one fits.
    fn steps_that_fit(&self, max_steps: u32) -> u32 {
        let Scheduler {
            running, memory, ..
        } = &self.scheduler;
        let fits = |steps: u32| {
            let new_blocks = running
                .iter()
                .map(|request| memory.missing_blocks(&request.blocks, request.computed + steps));
            new_blocks.sum::<u32>() <= memory.free
        };
        if fits(max_steps) {
            return max_steps;
        }
        let (mut fitting, mut too_many) = (0, max_steps);
        while too_many - fitting > 1 {
            let middle = fitting.midpoint(too_many);
            if fits(middle) {
                fitting = middle;
            } else {
                too_many = middle;
            }
        }
        fitting
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::num::NonZeroU32;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use std::time::Duration;

    use crate::engine::{Engine, EngineRequest};
    use crate::step_time::L40S_8B;

    /// Prompt and output tokens of a request, and the number of the step before which it arrives.
    type Submission = (u32, u32, u32);

    fn engine(blocks: u32, max_num_seqs: u32, prefix_caching: bool) -> Engine {
        let block_size = NonZeroU32::new(16).unwrap();
        let mut config = EngineConfig::from_preset(&L40S_8B, block_size);
        config.step_time.noise = 0.0;
        config.blocks = blocks;
        config.max_num_seqs = max_num_seqs;
        config.max_num_batched_tokens = 512;
        config.prefix_caching = prefix_caching;
        Engine::new(config)
    }

    fn engine_state(engine: &Engine, step_left: Duration) -> EngineState<'_> {
        EngineState {
            worker: 0,
            engine,
            engine_block_ratio: 1,
            speed: 1.0,
            step_left,
        }
    }

    /// By request id: times of the first and the last token, in seconds.
    type Times = BTreeMap<u64, (f64, f64)>;

    /// Runs `engine` for `steps` steps while requests arrive, and then for `fraction` of a step.
    /// Asserts that a lookahead from there predicts all tokens at the times at which the engine
    /// generates them.
    fn assert_prediction_is_exact(
        mut engine: Engine,
        speed: f64,
        submissions: &[Submission],
        steps: u32,
        fraction: f64,
    ) {
        let submit = |engine: &mut Engine, step: u32| {
            for (id, &(prompt_tokens, output_tokens, arrival)) in (0..).zip(submissions) {
                if arrival != step {
                    continue;
                }
                let blocks = 0..u64::from(prompt_tokens / 16);
                let hashes = blocks.map(|block| (id << 32) + block);
                // A request that can never fit is rejected.
                let _ = engine.submit(EngineRequest {
                    id,
                    hashes: hashes.collect(),
                    prompt_tokens,
                    output_tokens,
                });
            }
        };
        for number in 0..steps {
            submit(&mut engine, number);
            if let Some(step) = engine.begin_step() {
                engine.end_step(step);
            }
        }
        submit(&mut engine, steps);
        let current_step = (fraction > 0.0).then(|| engine.begin_step()).flatten();
        let step_left = current_step.as_ref().map_or(0.0, |step| {
            step.duration.as_secs_f64() / speed * (1.0 - fraction)
        });

        let state = EngineState {
            speed,
            ..engine_state(&engine, Duration::from_secs_f64(step_left))
        };
        let mut predicted = Times::new();
        let lookahead = Lookahead::new(&state, |_| 0);
        lookahead.run(|request, milestone, time| {
            let times = predicted.entry(request.id).or_insert((0.0, 0.0));
            match milestone {
                Milestone::FirstToken => times.0 = time,
                Milestone::LastToken => times.1 = time,
            }
        });

        let mut actual = Times::new();
        let mut now = 0.0;
        let mut next = current_step.map(|step| (step_left, step));
        loop {
            let begin_step = |engine: &mut Engine| {
                let step = engine.begin_step()?;
                Some((step.duration.as_secs_f64() / speed, step))
            };
            let Some((seconds, step)) = next.take().or_else(|| begin_step(&mut engine)) else {
                break;
            };
            now += seconds;
            for event in engine.end_step(step) {
                let times = actual.entry(event.id).or_insert((0.0, 0.0));
                if event.first {
                    times.0 = now;
                }
                if event.finished {
                    times.1 = now;
                }
            }
        }
        assert_eq!(predicted.len(), actual.len());
        for (id, actual) in actual {
            let predicted = predicted[&id];
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.max(1.0);
            assert!(
                near(predicted.0, actual.0) && near(predicted.1, actual.1),
                "request {id}: predicted {predicted:?}, actual {actual:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_lookahead_predicts_the_engine_exactly(
            submissions in prop::collection::vec((1..900_u32, 1..120_u32, 0..30_u32), 1..25),
            blocks in prop_oneof![60..130_u32, Just(5_000)],
            max_num_seqs in prop_oneof![2..8_u32, Just(256)],
            speed in prop_oneof![Just(1.0), 0.2..5.0],
            steps in 0..40_u32,
            fraction in prop_oneof![Just(0.0), 0.1..0.9],
        ) {
            // With few blocks and no prefix caching, requests are preempted, and none share
            // blocks. With memory for all requests, prefix caching evicts nothing.
            let prefix_caching = blocks == 5_000;
            let engine = engine(blocks, max_num_seqs, prefix_caching);
            assert_prediction_is_exact(engine, speed, &submissions, steps, fraction);
        }
    }

    #[test]
    fn cached_tokens_are_not_computed_and_shared_blocks_not_allocated_again() {
        let run = |cached, shared| {
            let engine = engine(100, 256, true);
            let mut lookahead = Lookahead::new(&engine_state(&engine, Duration::ZERO), |_| 0);
            lookahead.submit(ScheduledRequest::arriving(0, 1600, 1, 0, 0));
            lookahead.submit(ScheduledRequest::arriving(1, 1600, 1, cached, shared));
            let mut first = [0.0; 2];
            lookahead.run(|request, _, time| first[request.id as usize] = time);
            first
        };
        let [first, alone] = run(0, 0);
        let [_, cached] = run(1584, 0);
        let [_, shared] = run(1584, 99);
        assert!(cached < alone, "a cached prompt needs memory, but no time");
        assert!(shared <= cached && shared - first < 0.03 && cached > first);
    }

    #[test]
    fn a_lookahead_with_preemption_and_prefix_caching_ends() {
        let mut engine = engine(60, 256, true);
        for id in 0..8 {
            let hashes = (0..30).map(|block| (id << 32) + block).collect();
            engine
                .submit(EngineRequest {
                    id,
                    hashes,
                    prompt_tokens: 160,
                    output_tokens: 300,
                })
                .unwrap();
        }
        for _ in 0..40 {
            let step = engine.begin_step().unwrap();
            let lookahead = Lookahead::new(&engine_state(&engine, step.duration), |_| 0);
            let mut ended = 0;
            lookahead.run(|_, milestone, _| {
                ended += u32::from(matches!(milestone, Milestone::LastToken));
            });
            assert_eq!(ended, 8);
            engine.end_step(step);
        }
    }

    #[test]
    fn a_request_that_never_fits_ends_the_lookahead() {
        let engine = engine(10, 256, true);
        let mut lookahead = Lookahead::new(&engine_state(&engine, Duration::ZERO), |_| 0);
        lookahead.submit(ScheduledRequest::arriving(0, 1600, 1, 0, 0));
        lookahead.run(|_, _, _| panic!("the request must not run"));
        let hashes = Arc::from([]);
        assert_eq!(engine.cached_tokens(&hashes, 0), 0);
    }
}
