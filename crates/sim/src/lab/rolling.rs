//! An engine rolled forward to its end, without noise: when each request in it would end if
//! nothing more came.
//!
//! It schedules as [`Engine`](crate::engine::Engine) does (running requests first, chunked
//! prefill within the token budget, first come, first served, the last admitted preempted), over
//! plain numbers: of its cache it knows how many tokens each request finds there, of its memory
//! how many blocks are free. A stretch of steps that only decode is taken in one jump, up to the
//! next end or the next full memory.
//!
//! Blocks that requests share count for the first of them, and are freed with it, though others
//! may hold them still. A preempted request finds its whole prompt cached when it comes back,
//! though others may have taken some of it. Of nothing shared and nothing cached, both are exact.

use std::collections::VecDeque;

use super::view::Standing;
use crate::engine::{EngineConfig, Work};
use crate::law::StepLoad;

/// A request and how far it has come.
#[derive(Clone, Debug)]
pub(super) struct Task {
    pub(super) id: u64,
    /// Tokens of prompt and output known so far.
    pub(super) known: u32,
    /// Output tokens to come; at least 1.
    pub(super) left: u32,
    /// Whether it has its first token.
    pub(super) begun: bool,
    computed: u32,
    scheduled: u32,
    /// Blocks it holds, but for `shared`.
    blocks: u32,
    /// Tokens it will find cached when it is admitted (again).
    pub(super) cached: u32,
    /// Blocks that count for others.
    pub(super) shared: u32,
}

impl Task {
    /// A request that has just come: prompt and answer length, what it will find cached, and
    /// blocks of that that others in the engine hold.
    pub(super) fn new(id: u64, prompt: u32, output: u32, cached: u32, shared: u32) -> Self {
        Self {
            id,
            known: prompt,
            left: output,
            begun: false,
            computed: 0,
            scheduled: 0,
            blocks: 0,
            cached,
            shared,
        }
    }

    fn of(work: &Work, shared: u32, block_size: u32, prefix_caching: bool) -> Self {
        // But for one token, which is always computed.
        let whole_prompt = if prefix_caching {
            (work.prompt_tokens - 1) / block_size * block_size
        } else {
            0
        };
        Self {
            id: work.id,
            known: work.prompt_tokens + work.generated,
            left: work.left,
            begun: work.generated > 0,
            computed: if work.running { work.computed } else { 0 },
            scheduled: work.scheduled,
            blocks: work.blocks.saturating_sub(shared),
            cached: if work.running {
                whole_prompt
            } else {
                // What others ahead of it compute is cached by then.
                work.computed.max(shared * block_size)
            },
            shared,
        }
    }

    fn remaining(&self) -> u32 {
        self.known - self.computed
    }

    fn is_decoding(&self) -> bool {
        self.begun && self.remaining() == 1
    }
}

/// What a rolled engine tells of one token.
pub(super) enum Told {
    First,
    Last,
}

/// An engine on its way to its end.
#[derive(Clone, Debug)]
pub(super) struct Rolling<'a> {
    config: &'a EngineConfig,
    /// How many times as fast as its law it is.
    speed: f64,
    /// In the order of admission.
    running: Vec<Task>,
    waiting: VecDeque<Task>,
    free: u32,
    /// Since the beginning, in seconds.
    now: f64,
    /// When the step under way at the beginning ends.
    step_end: f64,
}

impl<'a> Rolling<'a> {
    /// The engine as it stands. `shared` tells, of a request, the blocks that counted for others
    /// when it came.
    pub(super) fn new(standing: &Standing<'a>, shared: impl Fn(u64) -> u32) -> Self {
        let engine = standing.engine;
        let config = engine.config();
        let block_size = config.block_size.get();
        let mut rolling = Self {
            config,
            speed: standing.speed,
            running: Vec::with_capacity(engine.running()),
            waiting: VecDeque::with_capacity(engine.waiting() + 1),
            free: engine.capacity() - engine.pinned_blocks(),
            now: 0.0,
            step_end: standing.step_left.as_secs_f64(),
        };
        for work in engine.work() {
            let task = Task::of(&work, shared(work.id), block_size, config.prefix_caching);
            if work.running {
                rolling.running.push(task);
            } else {
                rolling.waiting.push_back(task);
            }
        }
        rolling
    }

    /// Adds a request to the end of the waiting queue.
    pub(super) fn submit(&mut self, task: Task) {
        self.waiting.push_back(task);
    }

    /// Rolls on until nothing is left, or nothing fits, and tells first and last tokens with
    /// their times.
    pub(super) fn run(mut self, mut tell: impl FnMut(&Task, Told, f64)) {
        if self.running.iter().any(|task| task.scheduled > 0) {
            self.now = self.step_end;
            self.end_step(&mut tell);
        }
        while self.skip_decodes(&mut tell) || self.step(&mut tell) {}
    }

    /// One step. Returns whether there was something to do.
    fn step(&mut self, tell: &mut impl FnMut(&Task, Told, f64)) -> bool {
        if self.running.is_empty() {
            self.free = self.config.blocks;
        }
        let mut load = StepLoad::default();
        let mut budget = self.config.max_num_batched_tokens;
        let has_preempted = self.schedule_running(&mut budget, &mut load);
        // What a preemption freed is for those who run already.
        if !has_preempted {
            self.schedule_waiting(&mut budget, &mut load);
        }
        if load.sequences == 0 {
            return false;
        }
        self.now += self.config.law.mean(&load).as_secs_f64() / self.speed;
        self.end_step(tell);
        true
    }

    fn schedule_running(&mut self, budget: &mut u32, load: &mut StepLoad) -> bool {
        let mut has_preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let task = &self.running[index];
            let chunk = task.remaining().min(*budget);
            let more = self.more_blocks(task, task.computed + chunk);
            if more > self.free {
                has_preempted = true;
                self.preempt_last();
                continue;
            }
            self.schedule(index, chunk, more, load);
            *budget -= chunk;
            index += 1;
        }
        has_preempted
    }

    fn preempt_last(&mut self) {
        let Some(mut preempted) = self.running.pop() else {
            return;
        };
        self.free += preempted.blocks;
        preempted.blocks = 0;
        preempted.computed = 0;
        self.waiting.push_front(preempted);
    }

    fn schedule_waiting(&mut self, budget: &mut u32, load: &mut StepLoad) {
        while let Some((chunk, more)) = self.admission(*budget) {
            let Some(mut admitted) = self.waiting.pop_front() else {
                return;
            };
            admitted.computed = admitted.cached;
            self.running.push(admitted);
            self.schedule(self.running.len() - 1, chunk, more, load);
            *budget -= chunk;
        }
    }

    /// The first waiting request's first chunk and the blocks that takes, if it can be admitted.
    fn admission(&self, budget: u32) -> Option<(u32, u32)> {
        let first = self.waiting.front()?;
        if budget == 0 || self.running.len() >= self.config.max_num_seqs as usize {
            return None;
        }
        let chunk = (first.known - first.cached).min(budget);
        let more = self.more_blocks(first, first.cached + chunk);
        (more <= self.free).then_some((chunk, more))
    }

    /// Blocks a task must be given to hold so many tokens.
    fn more_blocks(&self, task: &Task, tokens: u32) -> u32 {
        let needed = tokens.div_ceil(self.config.block_size.get());
        needed.saturating_sub(task.shared + task.blocks)
    }

    fn schedule(&mut self, index: usize, chunk: u32, more: u32, load: &mut StepLoad) {
        debug_assert!(chunk > 0, "a task always has something to compute");
        let task = &mut self.running[index];
        task.scheduled = chunk;
        task.blocks += more;
        self.free -= more;
        if task.begun && chunk == 1 {
            load.add_decode(task.computed);
        } else {
            load.add_prefill(chunk, task.computed);
        }
    }

    fn end_step(&mut self, tell: &mut impl FnMut(&Task, Told, f64)) {
        let (now, free) = (self.now, &mut self.free);
        self.running.retain_mut(|task| {
            if task.scheduled == 0 {
                return true;
            }
            task.computed += task.scheduled;
            task.scheduled = 0;
            if task.remaining() > 0 {
                return true;
            }
            task.known += 1;
            task.left -= 1;
            if !task.begun {
                task.begun = true;
                tell(task, Told::First, now);
            }
            if task.left == 0 {
                tell(task, Told::Last, now);
                *free += task.blocks;
            }
            task.left > 0
        });
    }

    /// Jumps over all steps until the next end, if all that happens is that everybody decodes
    /// and the memory lasts. Returns whether it did.
    fn skip_decodes(&mut self, tell: &mut impl FnMut(&Task, Told, f64)) -> bool {
        let sequences = self.running.len() as u32;
        let budget = self.config.max_num_batched_tokens;
        let until_next_end = self.running.iter().map(|task| task.left).min();
        let Some(most) = until_next_end.filter(|_| sequences <= budget) else {
            return false;
        };
        if !self.running.iter().all(Task::is_decoding)
            || self.admission(budget - sequences).is_some()
        {
            return false;
        }
        let steps = self.steps_that_fit(most);
        if steps == 0 {
            return false;
        }
        let mut load = StepLoad::default();
        for index in 0..self.running.len() {
            load.add_decode(self.running[index].computed);
            let task = &self.running[index];
            let more = self.more_blocks(task, task.computed + steps);
            let task = &mut self.running[index];
            task.blocks += more;
            self.free -= more;
            task.computed += steps - 1;
            task.known += steps - 1;
            task.left -= steps - 1;
            task.scheduled = 1;
        }
        let law = &self.config.law;
        let steps = f64::from(steps);
        // Each step reads one more token of every sequence than the one before.
        let growth = law.per_context_token * f64::from(sequences) * steps * (steps - 1.0) / 2.0;
        self.now += (steps * law.mean(&load).as_secs_f64() + growth) / self.speed;
        self.end_step(tell);
        true
    }

    /// Of `most` steps that only decode, those for which there are blocks.
    fn steps_that_fit(&self, most: u32) -> u32 {
        let fits = |steps: u32| {
            let tasks = self.running.iter();
            let more = tasks.map(|it| self.more_blocks(it, it.computed + steps));
            more.sum::<u32>() <= self.free
        };
        if fits(most) {
            return most;
        }
        let (mut fitting, mut too_many) = (0, most);
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
    use crate::law::L40S_8B;

    /// Prompt and answer length of a request, and the step before which it comes.
    type Sent = (u32, u32, u32);

    fn engine(blocks: u32, max_num_seqs: u32, prefix_caching: bool) -> Engine {
        let block_size = NonZeroU32::new(16).unwrap();
        let mut config = EngineConfig::from_preset(&L40S_8B, block_size);
        config.law.noise = 0.0;
        config.blocks = blocks;
        config.max_num_seqs = max_num_seqs;
        config.max_num_batched_tokens = 512;
        config.prefix_caching = prefix_caching;
        Engine::new(config)
    }

    fn standing(engine: &Engine, step_left: Duration) -> Standing<'_> {
        Standing {
            worker: 0,
            engine,
            stride: 1,
            speed: 1.0,
            step_left,
        }
    }

    /// First and last token of each request, by id.
    type Times = BTreeMap<u64, (f64, f64)>;

    /// Lets `begun` steps pass while requests come. Then looks `share` into the next step at what
    /// the roll says, and holds it against what the engine does.
    fn assert_rolls_as_it_runs(
        mut engine: Engine,
        speed: f64,
        sent: &[Sent],
        begun: u32,
        share: f64,
    ) {
        let submit = |engine: &mut Engine, step: u32| {
            for (id, &(prompt_tokens, output_tokens, _)) in
                (0..).zip(sent).filter(|(_, it)| it.2 == step)
            {
                let hashes = (0..u64::from(prompt_tokens / 16)).map(|it| (id << 32) + it);
                // One that never fits is refused.
                let _ = engine.submit(EngineRequest {
                    id,
                    hashes: hashes.collect(),
                    prompt_tokens,
                    output_tokens,
                });
            }
        };
        for number in 0..begun {
            submit(&mut engine, number);
            if let Some(step) = engine.begin_step() {
                engine.end_step(step);
            }
        }
        submit(&mut engine, begun);
        let under_way = (share > 0.0).then(|| engine.begin_step()).flatten();
        let left = under_way.as_ref().map_or(0.0, |step| {
            step.duration.as_secs_f64() / speed * (1.0 - share)
        });

        let at_speed = Standing {
            speed,
            ..standing(&engine, Duration::from_secs_f64(left))
        };
        let mut told = Times::new();
        let rolling = Rolling::new(&at_speed, |_| 0);
        rolling.run(|task, event, time| {
            let times = told.entry(task.id).or_insert((0.0, 0.0));
            match event {
                Told::First => times.0 = time,
                Told::Last => times.1 = time,
            }
        });

        let mut seen = Times::new();
        let mut now = 0.0;
        let mut next = under_way.map(|step| (left, step));
        loop {
            let again = |engine: &mut Engine| {
                let step = engine.begin_step()?;
                Some((step.duration.as_secs_f64() / speed, step))
            };
            let Some((seconds, step)) = next.take().or_else(|| again(&mut engine)) else {
                break;
            };
            now += seconds;
            for event in engine.end_step(step) {
                let times = seen.entry(event.id).or_insert((0.0, 0.0));
                if event.first {
                    times.0 = now;
                }
                if event.finished {
                    times.1 = now;
                }
            }
        }
        assert_eq!(told.len(), seen.len());
        for (id, seen) in seen {
            let told = told[&id];
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.max(1.0);
            assert!(
                near(told.0, seen.0) && near(told.1, seen.1),
                "request {id}: told {told:?}, seen {seen:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn an_engine_rolls_as_it_runs(
            sent in prop::collection::vec((1..900_u32, 1..120_u32, 0..30_u32), 1..25),
            blocks in prop_oneof![60..130_u32, Just(5_000)],
            max_num_seqs in prop_oneof![2..8_u32, Just(256)],
            speed in prop_oneof![Just(1.0), 0.2..5.0],
            begun in 0..40_u32,
            share in prop_oneof![Just(0.0), 0.1..0.9],
        ) {
            // Without prefix caching it preempts, and nothing is shared. With it, and room for
            // all, nothing is evicted.
            let prefix_caching = blocks == 5_000;
            let engine = engine(blocks, max_num_seqs, prefix_caching);
            assert_rolls_as_it_runs(engine, speed, &sent, begun, share);
        }
    }

    #[test]
    fn what_is_cached_and_shared_is_neither_computed_nor_held_again() {
        let run = |cached, shared| {
            let engine = engine(100, 256, true);
            let mut rolling = Rolling::new(&standing(&engine, Duration::ZERO), |_| 0);
            rolling.submit(Task::new(0, 1600, 1, 0, 0));
            rolling.submit(Task::new(1, 1600, 1, cached, shared));
            let mut first = [0.0; 2];
            rolling.run(|task, _, time| first[task.id as usize] = time);
            first
        };
        let [first, alone] = run(0, 0);
        let [_, cached] = run(1584, 0);
        let [_, shared] = run(1584, 99);
        assert!(cached < alone, "a cached prompt needs no time, but room");
        assert!(shared <= cached && shared - first < 0.03 && cached > first);
    }

    #[test]
    fn it_ends_though_it_preempts_what_it_caches() {
        let mut engine = engine(60, 256, true);
        for id in 0..8 {
            let hashes = (0..30).map(|it| (id << 32) + it).collect();
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
            let rolling = Rolling::new(&standing(&engine, step.duration), |_| 0);
            let mut ended = 0;
            rolling.run(|_, told, _| ended += u32::from(matches!(told, Told::Last)));
            assert_eq!(ended, 8);
            engine.end_step(step);
        }
    }

    #[test]
    fn what_never_fits_stops_the_roll() {
        let engine = engine(10, 256, true);
        let mut rolling = Rolling::new(&standing(&engine, Duration::ZERO), |_| 0);
        rolling.submit(Task::new(0, 1600, 1, 0, 0));
        rolling.run(|_, _, _| panic!("it cannot run"));
        let hashes = Arc::from([]);
        assert_eq!(engine.cached_tokens(&hashes, 0), 0);
    }
}
