//! Forward simulation of an engine to its end: when each of its requests would end if no further
//! request arrived.
//!
//! The simulation has no noise in its step times. It schedules as [`Engine`](crate::engine::Engine)
//! does: running requests first, chunked prefill within the token budget, admission first come,
//! first served, and preemption of the request that was admitted last. The state is reduced to
//! numbers: how many tokens each request finds in the cache, and how many blocks are free.
//! Consecutive steps that only decode are computed at once, up to the next end of a request or
//! until memory is full.
//!
//! Two simplifications make the result approximate; it is exact if requests share no blocks and
//! nothing is cached:
//! - Blocks that several requests share count for the first of them, and are freed with it,
//!   although others may still pin them.
//! - A preempted request finds its whole prompt cached when it is admitted again, although other
//!   requests may have evicted some of it.

use std::collections::VecDeque;

use super::view::EngineState;
use crate::engine::{EngineConfig, RequestState};
use crate::step_time::BatchLoad;

/// A request in the simulated engine, and its progress.
#[derive(Clone, Debug)]
pub(super) struct ScheduledRequest {
    /// Id of the request in the engine.
    pub(super) id: u64,
    /// Tokens of the prompt, and output tokens generated so far.
    pub(super) known_tokens: u32,
    /// Output tokens that are not generated yet; at least 1.
    pub(super) remaining_output: u32,
    /// Whether the first output token is generated.
    pub(super) is_started: bool,
    /// Tokens whose KV is computed; 0 while the request waits.
    computed: u32,
    /// Tokens that the current step computes.
    scheduled: u32,
    /// Blocks allocated for the request, without the `shared` ones.
    blocks: u32,
    /// Tokens that the request finds cached when it is admitted, or admitted again.
    pub(super) cached: u32,
    /// Blocks of the request that count for other requests.
    pub(super) shared: u32,
}

impl ScheduledRequest {
    /// Creates a request that has just arrived. `cached` are the tokens of its prompt that it will
    /// find cached, and `shared` is the number of their blocks that other requests in the engine
    /// pin.
    pub(super) fn new(
        id: u64,
        prompt_tokens: u32,
        output_tokens: u32,
        cached: u32,
        shared: u32,
    ) -> Self {
        Self {
            id,
            known_tokens: prompt_tokens,
            remaining_output: output_tokens,
            is_started: false,
            computed: 0,
            scheduled: 0,
            blocks: 0,
            cached,
            shared,
        }
    }

    /// Creates a request that is in an engine already. `shared` is the number of its blocks that
    /// count for other requests. Progress in the current step is kept.
    fn from_state(
        state: &RequestState,
        shared: u32,
        block_size: u32,
        prefix_caching: bool,
    ) -> Self {
        // At least one token is always computed.
        let max_cached = if prefix_caching {
            (state.prompt_tokens - 1) / block_size * block_size
        } else {
            0
        };
        Self {
            id: state.id,
            known_tokens: state.prompt_tokens + state.generated,
            remaining_output: state.remaining,
            is_started: state.generated > 0,
            computed: if state.running { state.computed } else { 0 },
            scheduled: state.scheduled,
            blocks: state.blocks.saturating_sub(shared),
            cached: if state.running {
                max_cached
            } else {
                // Shared blocks are cached by the time of admission: requests that are served
                // earlier compute them.
                state.computed.max(shared * block_size)
            },
            shared,
        }
    }

    /// Returns the number of known tokens whose KV is not computed.
    fn remaining(&self) -> u32 {
        self.known_tokens - self.computed
    }

    /// Returns whether the next step of the request is a decode step.
    fn is_decoding(&self) -> bool {
        self.is_started && self.remaining() == 1
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
    /// Running requests in the order of admission.
    running: Vec<ScheduledRequest>,
    /// Waiting requests in the order of service.
    waiting: VecDeque<ScheduledRequest>,
    /// Free blocks.
    free: u32,
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
        let block_size = config.block_size.get();
        let mut lookahead = Self {
            config,
            speed: state.speed,
            running: Vec::with_capacity(engine.running()),
            waiting: VecDeque::with_capacity(engine.waiting() + 1),
            free: engine.capacity() - engine.pinned_blocks(),
            now: 0.0,
            step_end: state.step_left.as_secs_f64(),
        };
        for request_state in engine.request_states() {
            let request = ScheduledRequest::from_state(
                &request_state,
                shared(request_state.id),
                block_size,
                config.prefix_caching,
            );
            if request_state.running {
                lookahead.running.push(request);
            } else {
                lookahead.waiting.push_back(request);
            }
        }
        lookahead
    }

    /// Adds a request to the end of the waiting queue.
    pub(super) fn submit(&mut self, request: ScheduledRequest) {
        self.waiting.push_back(request);
    }

    /// Simulates until no request is left, or none fits. Calls `on_milestone` for the first and the
    /// last token of each request, with the time since the start in seconds. A request that never
    /// fits reaches no further milestone.
    pub(super) fn run(mut self, mut on_milestone: impl FnMut(&ScheduledRequest, Milestone, f64)) {
        if self.running.iter().any(|request| request.scheduled > 0) {
            self.now = self.step_end;
            self.end_step(&mut on_milestone);
        }
        while self.skip_decode_steps(&mut on_milestone) || self.step(&mut on_milestone) {}
    }

    /// Simulates one step. Returns `false` if no request could be scheduled. If no request is
    /// running, the whole memory counts as free.
    fn step(&mut self, on_milestone: &mut impl FnMut(&ScheduledRequest, Milestone, f64)) -> bool {
        if self.running.is_empty() {
            self.free = self.config.blocks;
        }
        let mut load = BatchLoad::default();
        let mut budget = self.config.max_num_batched_tokens;
        let has_preempted = self.schedule_running(&mut budget, &mut load);
        // Blocks that a preemption freed are for the running requests.
        if !has_preempted {
            self.schedule_waiting(&mut budget, &mut load);
        }
        if load.sequences == 0 {
            return false;
        }
        self.now += self.config.step_time.mean(&load).as_secs_f64() / self.speed;
        self.end_step(on_milestone);
        true
    }

    /// Schedules running requests until `budget` tokens are spent. Returns whether a request was
    /// preempted. Adds the scheduled tokens to `load`.
    fn schedule_running(&mut self, budget: &mut u32, load: &mut BatchLoad) -> bool {
        let mut has_preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let request = &self.running[index];
            let chunk = request.remaining().min(*budget);
            let new_blocks = self.missing_blocks(request, request.computed + chunk);
            if new_blocks > self.free {
                has_preempted = true;
                self.preempt_last();
                continue;
            }
            self.schedule(index, chunk, new_blocks, load);
            *budget -= chunk;
            index += 1;
        }
        has_preempted
    }

    /// Returns the running request that was admitted last to the front of the waiting queue. The
    /// request frees its blocks and keeps its generated tokens.
    fn preempt_last(&mut self) {
        let Some(mut preempted) = self.running.pop() else {
            return;
        };
        self.free += preempted.blocks;
        preempted.blocks = 0;
        preempted.computed = 0;
        self.waiting.push_front(preempted);
    }

    /// Admits and schedules waiting requests while they fit into `budget` and free memory.
    fn schedule_waiting(&mut self, budget: &mut u32, load: &mut BatchLoad) {
        while let Some((chunk, new_blocks)) = self.admission(*budget) {
            let Some(mut admitted) = self.waiting.pop_front() else {
                return;
            };
            admitted.computed = admitted.cached;
            self.running.push(admitted);
            self.schedule(self.running.len() - 1, chunk, new_blocks, load);
            *budget -= chunk;
        }
    }

    /// Returns the tokens of the first waiting request's first chunk, and the blocks that must be
    /// allocated for it. `None` if the request cannot be admitted.
    fn admission(&self, budget: u32) -> Option<(u32, u32)> {
        let first = self.waiting.front()?;
        if budget == 0 || self.running.len() >= self.config.max_num_seqs as usize {
            return None;
        }
        let chunk = (first.known_tokens - first.cached).min(budget);
        let new_blocks = self.missing_blocks(first, first.cached + chunk);
        (new_blocks <= self.free).then_some((chunk, new_blocks))
    }

    /// Returns the number of blocks to allocate for `request` so that it has KV for `tokens`
    /// tokens.
    fn missing_blocks(&self, request: &ScheduledRequest, tokens: u32) -> u32 {
        let needed = tokens.div_ceil(self.config.block_size.get());
        needed.saturating_sub(request.shared + request.blocks)
    }

    /// Schedules `chunk` tokens of the running request at `index` and allocates `new_blocks`.
    fn schedule(&mut self, index: usize, chunk: u32, new_blocks: u32, load: &mut BatchLoad) {
        debug_assert!(chunk > 0, "a running request has at least one token left");
        let request = &mut self.running[index];
        request.scheduled = chunk;
        request.blocks += new_blocks;
        self.free -= new_blocks;
        if request.is_started && chunk == 1 {
            load.add_decode(request.computed);
        } else {
            load.add_prefill(chunk, request.computed);
        }
    }

    /// Ends the current step at the current time: a request with all known tokens computed
    /// generates one token, and leaves after its last. Calls `on_milestone` for first and last
    /// tokens.
    fn end_step(&mut self, on_milestone: &mut impl FnMut(&ScheduledRequest, Milestone, f64)) {
        let (now, free) = (self.now, &mut self.free);
        self.running.retain_mut(|request| {
            if request.scheduled == 0 {
                return true;
            }
            request.computed += request.scheduled;
            request.scheduled = 0;
            if request.remaining() > 0 {
                return true;
            }
            request.known_tokens += 1;
            request.remaining_output -= 1;
            if !request.is_started {
                request.is_started = true;
                on_milestone(request, Milestone::FirstToken, now);
            }
            if request.remaining_output == 0 {
                on_milestone(request, Milestone::LastToken, now);
                *free += request.blocks;
            }
            request.remaining_output > 0
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
        let sequences = self.running.len() as u32;
        let budget = self.config.max_num_batched_tokens;
        let remaining_outputs = self.running.iter().map(|request| request.remaining_output);
        let until_next_end = remaining_outputs.min();
        let Some(max_steps) = until_next_end.filter(|_| sequences <= budget) else {
            return false;
        };
        if !self.running.iter().all(ScheduledRequest::is_decoding)
            || self.admission(budget - sequences).is_some()
        {
            return false;
        }
        let steps = self.steps_that_fit(max_steps);
        if steps == 0 {
            return false;
        }
        let mut load = BatchLoad::default();
        for index in 0..self.running.len() {
            load.add_decode(self.running[index].computed);
            let request = &self.running[index];
            let new_blocks = self.missing_blocks(request, request.computed + steps);
            let request = &mut self.running[index];
            request.blocks += new_blocks;
            self.free -= new_blocks;
            request.computed += steps - 1;
            request.known_tokens += steps - 1;
            request.remaining_output -= steps - 1;
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
        let fits = |steps: u32| {
            let requests = self.running.iter();
            let new_blocks =
                requests.map(|request| self.missing_blocks(request, request.computed + steps));
            new_blocks.sum::<u32>() <= self.free
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
            lookahead.submit(ScheduledRequest::new(0, 1600, 1, 0, 0));
            lookahead.submit(ScheduledRequest::new(1, 1600, 1, cached, shared));
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
        lookahead.submit(ScheduledRequest::new(0, 1600, 1, 0, 0));
        lookahead.run(|_, _, _| panic!("the request must not run"));
        let hashes = Arc::from([]);
        assert_eq!(engine.cached_tokens(&hashes, 0), 0);
    }
}
