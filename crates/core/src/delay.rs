//! What placing a request on a worker costs everybody, in seconds.
//!
//! The sum of what the request itself waits, of what it makes others wait who are there, and of
//! what it makes those wait who will come. All are times, so nothing weighs them against each
//! other. For a request with `p` tokens to compute of a prompt of `s`, whose answer is expected to
//! have `O` tokens, on a worker whose backlog takes `V` seconds:
//!
//! | term | | what it is |
//! |---|---|---|
//! | wait | `V` | prompts before it are computed |
//! | prefill | `x` | its prompt is computed |
//! | decode | `O × step / (1 − ρ)` | its answer, if no other were there |
//! | slowed | `Σ (κn + κc s_j) both_j / (1 − ρ)` | by each answer that is there, while both last |
//! | stalls | `x Σ alive_j` | each answer there waits while the prompt is computed |
//! | slows | `(κn + κc (s + O/2)) Σ both_j / (1 − ρ)` | each answer there, while both last |
//! | future | `λ x (V + x/2) / (1 − ρ) + min(M, λ M²/2)` | requests that will come meanwhile (Hyytiä, Penttinen and Aalto, 2012: the size-aware value function of M/G/1) |
//!
//! `κn` and `κc` are what a request and a token of context add to a step ([`Pace`]), `λ` and `ρ`
//! how many requests come to the worker and which share of its time their prompts take, which is
//! time in which no answer goes on. `M` is how long it takes until enough answers have ended for its
//! blocks to fit, and to keep fitting while all grow, which whoever comes behind waits for. Its own
//! wait for that is not counted: in replay that was worse, with a [line](crate::queue), where who
//! fits goes by, and without. `alive_j` and `both_j` are how likely answer `j` is to be there
//! when the prompt's turn comes, and for how many tokens it goes on beside this one's; what answers
//! have left is taken to be exponential around what is expected. They are looked at in groups of
//! about equal remainders, so a worker costs the same to judge however many it runs.
//!
//! Where requests wait in [line](crate::queue), `V` counts those before this one only. Those it
//! overtakes wait for its prompt, which is among the stalls; and theirs stall its answer, if that
//! lasts so long, which is among what slows it.
//!
//! Where terms vanish, this is one of the rules known before:
//! - `κn` alone, answers alike: `κn O × requests`, least outstanding requests.
//! - `wait` and `prefill` alone: least time to first token.
//! - `prefill` and `stalls` alone: new tokens × (requests + 1), LMetric's product.
//! - `prefill` and `slowed`, answers that outlast this one: `κc O × block size` times
//!   `β / (κc O) × prefill blocks + active blocks`, with `β` what a token takes to compute:
//!   Dynamo's [cost](crate::cost), its weight derived.

use std::time::Duration;

use crate::choose::Load;
use crate::forecast::pace::{Pace, Work};
use crate::outlook::{Ahead, GROUPS, Group, Outlook};
use crate::queue::Standing;
use crate::tree::Depth;

/// What a placement costs, part by part, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Delay {
    /// Before its prompt is turned to.
    pub wait: f64,
    /// Computing its prompt.
    pub prefill: f64,
    /// Decoding its answer, alone.
    pub decode: f64,
    /// What others there add to that.
    pub slowed: f64,
    /// What its prompt makes answers there wait.
    pub stalls: f64,
    /// What its answer makes others there wait.
    pub slows: f64,
    /// What it makes requests wait that will come.
    pub future: f64,
}

impl Delay {
    /// Time to its first token.
    #[must_use]
    pub fn time_to_first_token(&self) -> f64 {
        self.wait + self.prefill
    }

    /// The cost to be minimised, if a second until the first token counts so much.
    #[must_use]
    pub fn total(&self, ttft_weight: f64) -> f64 {
        ttft_weight * self.time_to_first_token()
            + self.decode
            + self.slowed
            + self.stalls
            + self.slows
            + self.future
    }
}

impl std::ops::AddAssign for Delay {
    fn add_assign(&mut self, other: Self) {
        self.wait += other.wait;
        self.prefill += other.prefill;
        self.decode += other.decode;
        self.slowed += other.slowed;
        self.stalls += other.stalls;
        self.slows += other.slows;
        self.future += other.future;
    }
}

/// The share of a worker's time that is believed to go into prompts at most.
const MOST_UTILISATION: f64 = 0.7;

/// No step is shorter, in seconds.
const LEAST_STEP: f64 = 1e-6;

/// The share of answers with `z` times the steps behind them that they are expected to have left
/// which have not ended: `exp(-z)`, nearly, for a fraction of its price.
fn survival(z: f64) -> f64 {
    1.0 / (1.0 + z + z * z / 2.0)
}

/// How long the shorter of two answers is, if nothing but their means is known.
fn first_to_end(one: f64, other: f64) -> f64 {
    one * other / (one + other)
}

/// A request to be placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    pub(crate) prompt_tokens: u32,
    /// Blocks of the prompt, the partial last one included.
    pub(crate) blocks: u32,
    pub(crate) reusable_blocks: u32,
    pub(crate) block_size: u32,
    /// Tokens its answer is expected to have.
    pub(crate) output_tokens: f64,
    pub(crate) overlap_weight: f64,
    pub(crate) ttft_weight: f64,
    pub(crate) standing: Standing,
    pub(crate) now: Duration,
}

/// The terms that depend on no other answer, and what the others are made of.
struct Begun {
    delay: Delay,
    /// What an answer waits while the prompt is computed.
    stall: f64,
    /// What it adds to a step.
    own_step: f64,
    rate: f64,
    /// The share of the time in which answers go on.
    decodes: f64,
}

impl Placement {
    /// The cost to be minimised.
    pub(crate) fn total(&self, delay: &Delay) -> f64 {
        delay.total(self.ttft_weight)
    }

    /// What it would compute where it reaches so deep.
    fn work(&self, depth: Depth) -> Work {
        let overlap = depth.overlap().min(self.reusable_blocks);
        let credit = self.overlap_weight.min(1.0) * f64::from(overlap * self.block_size);
        let uncached = self.prompt_tokens.saturating_sub(credit as u32);
        Work::new(uncached.max(1), self.prompt_tokens)
    }

    /// `pace` is the worker's, and `depth` how deep the prompt reaches there.
    pub(crate) fn delay(&self, pace: &Pace, outlook: &Outlook, load: Load, depth: Depth) -> Delay {
        let begun = self.begin(pace, outlook, depth);
        self.complete(begun, pace, outlook, load, depth)
    }

    /// What it costs, unless that is no less than `most`: then something no less than that.
    pub(crate) fn total_below(
        &self,
        most: f64,
        pace: &Pace,
        outlook: &Outlook,
        load: Load,
        depth: Depth,
    ) -> f64 {
        let begun = self.begin(pace, outlook, depth);
        let least = self.total(&begun.delay);
        if least >= most {
            return least;
        }
        self.total(&self.complete(begun, pace, outlook, load, depth))
    }

    /// The terms that depend on no other answer.
    fn begin(&self, pace: &Pace, outlook: &Outlook, depth: Depth) -> Begun {
        let start = 1.0 / outlook.watch.prompts_together();
        let dearer = self.overlap_weight.max(1.0);
        let prefill = dearer * pace.prefill(start, self.work(depth));
        let Ahead {
            wait,
            overtaken,
            overtaken_take,
        } = outlook.ahead_of(&self.standing, prefill, pace, self.now);
        let output = self.output_tokens;

        // The rest of the time goes into prompts that will come, and stall every answer there.
        let (rate, utilisation) = outlook.inflow.rates(self.now);
        let decodes = 1.0 - utilisation.min(MOST_UTILISATION);
        let own_context = f64::from(self.prompt_tokens) + output / 2.0;
        let own_step = pace.sequence + pace.context * own_context;
        // Whom it overtakes it keeps waiting, and they stall its answer, if that lasts so long.
        let busy_step = outlook.watch.busy_step();
        let overtaken_stall = if busy_step > 0.0 && overtaken > 0 {
            first_to_end(overtaken_take, output * busy_step)
        } else {
            overtaken_take
        };
        Begun {
            delay: Delay {
                wait,
                prefill,
                decode: output * (pace.step + own_step) / decodes,
                slowed: overtaken_stall,
                stalls: f64::from(overtaken) * prefill,
                future: rate * prefill * (wait + prefill / 2.0) / decodes,
                ..Delay::default()
            },
            stall: (prefill - dearer * start * pace.start).max(0.0),
            own_step,
            rate,
            decodes,
        }
    }

    fn complete(
        &self,
        begun: Begun,
        pace: &Pace,
        outlook: &Outlook,
        load: Load,
        depth: Depth,
    ) -> Delay {
        let Begun {
            mut delay,
            stall,
            own_step,
            rate,
            decodes,
        } = begun;
        let output = self.output_tokens;
        let (requests, context) = outlook.decoding();
        let step = pace.step(f64::from(requests), context as f64);
        let busy_step = outlook.watch.busy_step().max(step).max(LEAST_STEP);
        let steps_until = delay.wait / busy_step;
        let steps_beside = (delay.wait + delay.prefill) / busy_step;

        let (mut stalls, mut slowed, mut shared) = (0.0, 0.0, 0.0);
        let mut meet = |group: &Group, until: f64, beside: f64| {
            if group.requests == 0 {
                return;
            }
            let requests = f64::from(group.requests);
            let left = (group.remaining as f64 / requests).max(1.0);
            stalls += requests * survival(until / left) * stall;
            let together = survival(beside / left) * first_to_end(left, output);
            slowed += (pace.sequence * requests + pace.context * group.context as f64) * together;
            shared += requests * together;
        };
        for group in outlook.running() {
            meet(group, steps_until, steps_beside);
        }
        // Those ahead begin one after the other while this one waits: on average, half-way.
        let half = steps_until / 2.0;
        meet(&outlook.ahead, half, steps_beside - half);

        delay.slowed += slowed / decodes;
        delay.stalls += stalls;
        delay.slows = own_step * shared / decodes;
        // Whoever comes behind waits for memory, or goes elsewhere, which costs no more.
        let memory =
            self.steps_until_it_fits(outlook, load, depth) * step.max(LEAST_STEP) / decodes;
        delay.future += memory * (rate * memory / 2.0).min(1.0);
        delay
    }

    /// Steps until its blocks fit, and keep fitting while all answers grow and end: memory is
    /// used most right before an answer ends, so it is looked at there, group by group (after
    /// Past-Future; Gong et al., 2025).
    fn steps_until_it_fits(&self, outlook: &Outlook, load: Load, depth: Depth) -> f64 {
        let Some(capacity) = outlook.capacity else {
            return 0.0;
        };
        let resident = depth.active.min(self.blocks);
        let used = load.booked_blocks() as f64 + f64::from(self.blocks - resident);
        let capacity = f64::from(capacity);
        let block = f64::from(self.block_size);
        let requests = f64::from(load.requests) + 1.0;
        // Nothing grows by more than this while the request is there.
        if used + requests * self.output_tokens / block <= capacity || load.requests == 0 {
            return 0.0;
        }
        // Blocks that requests share are held by each of them for a share.
        let blocks_per_token = load.booked_blocks() as f64 / (load.context_tokens as f64).max(1.0);
        let mut groups = [(0.0, 0.0, 0.0); GROUPS + 1];
        let present = outlook.running().chain([&outlook.ahead]);
        for (group, entry) in present.zip(&mut groups) {
            let requests = f64::from(group.requests);
            let mean = group.remaining as f64 / requests.max(1.0);
            *entry = (mean, requests, group.context as f64 * blocks_per_token);
        }
        // Those ahead are among the others by when they end.
        groups.sort_unstable_by(|one, other| one.0.total_cmp(&other.0));
        let (mut alive, mut freed, mut steps) = (requests, 0.0, 0.0);
        for (ends, requests, blocks) in groups {
            if requests == 0.0 {
                continue;
            }
            if used - freed + alive * ends.min(self.output_tokens) / block > capacity {
                steps = ends;
            }
            alive -= requests;
            freed += blocks;
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outlook::Share;
    use crate::queue::{Order, Queue};

    /// Nothing takes time; what does is said.
    const NOTHING: Pace = Pace {
        start: 0.0,
        token: 0.0,
        attention: 0.0,
        step: 0.0,
        sequence: 0.0,
        context: 0.0,
        samples: [0; 2],
        errors: [0.0; 2],
    };

    fn placement(prompt_tokens: u32, output_tokens: f64) -> Placement {
        Placement {
            prompt_tokens,
            blocks: prompt_tokens.div_ceil(16),
            reusable_blocks: (prompt_tokens - 1) / 16,
            block_size: 16,
            output_tokens,
            overlap_weight: 1.0,
            ttft_weight: 1.0,
            standing: Queue::default().standing(Order::Fcfs, 0, 0, Duration::ZERO),
            now: Duration::ZERO,
        }
    }

    fn cached(blocks: u32) -> Depth {
        Depth {
            cached: blocks,
            active: 0,
        }
    }

    /// A worker that runs so many answers with so many tokens to come and of context.
    fn running(requests: u32, remaining: u32, context: u64) -> Outlook {
        let mut outlook = Outlook::default();
        for _ in 0..requests {
            let work = Work::default();
            let mut share = Share::new(work, remaining, context);
            outlook.add(&share);
            outlook.compute(&mut share);
        }
        outlook
    }

    fn total(placement: Placement, pace: &Pace, outlook: &Outlook, depth: Depth) -> f64 {
        placement.total(&placement.delay(pace, outlook, Load::default(), depth))
    }

    fn assert_close(one: f64, other: f64) {
        assert!(
            (one - other).abs() <= 1e-5 * other.abs(),
            "{one} is not {other}"
        );
    }

    #[test]
    fn requests_alone_are_least_outstanding_requests() {
        let pace = Pace {
            sequence: 1e-4,
            ..NOTHING
        };
        let alone = total(placement(1000, 50.0), &pace, &running(0, 0, 0), cached(0));
        for requests in [1, 7, 40] {
            let cost = total(
                placement(1000, 50.0),
                &pace,
                &running(requests, 200, 9),
                cached(0),
            );
            // Of 50 and 200 tokens, 40 are expected to be beside each other.
            assert_close(cost - alone, 2.0 * 1e-4 * 40.0 * f64::from(requests));
        }
    }

    #[test]
    fn prefill_alone_is_least_time_to_first_token() {
        let pace = Pace {
            token: 1e-4,
            ..NOTHING
        };
        let mut outlook = Outlook::default();
        outlook.add(&Share::new(Work::new(3000, 3000), 10, 3000));
        let cost = total(placement(1600, 50.0), &pace, &outlook, cached(60));
        // Of the answer that begins before this nothing is left by then.
        assert_close(cost, 0.3 + 0.064);
    }

    #[test]
    fn stalls_are_new_tokens_times_requests() {
        let pace = Pace {
            token: 1e-4,
            ..NOTHING
        };
        let delay = |requests| {
            let outlook = running(requests, 200, 9);
            placement(1600, 50.0).delay(&pace, &outlook, Load::default(), cached(60))
        };
        assert_close(delay(10).stalls, 10.0 * 640.0 * 1e-4);
        assert_close(delay(10).prefill + delay(10).stalls, 11.0 * 640.0 * 1e-4);
    }

    /// With answers that outlast it: a weight on blocks to compute, plus active blocks.
    #[test]
    fn prefill_and_context_are_dynamos_cost() {
        let pace = Pace {
            token: 6.7e-5,
            context: 3.1e-8,
            ..NOTHING
        };
        let weight = 6.7e-5 / (3.1e-8 * 343.0);
        let parts = |requests: u32, depth| {
            let outlook = running(requests, u32::MAX, 1600);
            let placement = placement(16_000, 343.0);
            let delay = placement.delay(&pace, &outlook, Load::default(), depth);
            delay.prefill + delay.slowed
        };
        let blocks = |requests: u32, overlap: u32| {
            weight * f64::from(1000 - overlap) + f64::from(requests * 100)
        };
        let scale = 3.1e-8 * 343.0 * 16.0;
        for (requests, overlap) in [(0, 0), (3, 500), (20, 900)] {
            let expected = scale * blocks(requests, overlap);
            assert_close(parts(requests, cached(overlap)), expected);
        }
    }

    #[test]
    fn answers_that_end_first_do_not_count() {
        let pace = Pace {
            token: 1e-3,
            step: 0.01,
            sequence: 1e-4,
            ..NOTHING
        };
        // A backlog of 10 s, in which those with 100 tokens to come end.
        let mut outlook = running(5, 100, 9);
        outlook.add(&Share::new(Work::new(10_000, 10_000), 5000, 10_000));
        let delay = placement(1000, 50.0).delay(&pace, &outlook, Load::default(), cached(0));
        assert!((delay.stalls - 1.0).abs() < 0.01, "{}", delay.stalls);
        // Half of the one ahead's.
        assert!(
            (delay.slows / (1e-4 * 50.0) - 1.0).abs() < 0.1,
            "{}",
            delay.slows
        );
    }

    #[test]
    fn weight_zero_ignores_the_cache_and_others_scale_what_is_computed() {
        let pace = Pace {
            token: 1e-4,
            ..NOTHING
        };
        let prefill = |overlap_weight, depth| {
            let placement = Placement {
                overlap_weight,
                ..placement(1600, 50.0)
            };
            let outlook = Outlook::default();
            placement
                .delay(&pace, &outlook, Load::default(), depth)
                .prefill
        };
        assert_close(prefill(0.0, cached(90)), 0.16);
        assert_close(prefill(0.5, cached(50)), 0.12);
        assert_close(prefill(1.0, cached(50)), 0.08);
        assert_close(prefill(3.0, cached(50)), 0.24);
        assert_close(prefill(1.0, cached(100)), 0.0016);
    }

    #[test]
    fn memory_is_there_when_enough_answers_have_ended() {
        let mut outlook = running(4, 100, 1600);
        let mut last = Share::new(Work::default(), 1000, 1600);
        outlook.add(&last);
        outlook.compute(&mut last);
        let load = Load {
            active_blocks: 500,
            context_tokens: 8000,
            requests: 5,
            ..Load::default()
        };
        let mut steps = |capacity| {
            outlook.capacity = Some(capacity);
            placement(1600, 1.0).steps_until_it_fits(&outlook, load, cached(0))
        };
        assert_eq!(steps(10_000), 0.0);
        // The four end after a hundred steps.
        assert_close(steps(550), 100.0);
        // Only when all have ended.
        assert_close(steps(150), 1000.0);
    }
}
