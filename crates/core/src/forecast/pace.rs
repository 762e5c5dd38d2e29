//! How long a worker takes: to compute prompts, and for one more token of everybody.
//!
//! Two laws, of which alike workers share one pair, and two factors that tell each worker from
//! the others. A law has the shape, which needs samples of many kinds; a factor follows the one
//! worker's speed, within some hundred samples. Where a law is wrong for all, factors make up for
//! it, so a worker of which little has been heard, or nothing lately, has that of the others: it
//! would else look slower than they are, and never be tried (again).
//!
//! - A prompt's first token comes `start + token × p + attention × p (s − p/2)` seconds after its
//!   worker turned to it: `p` tokens to compute of a prompt of `s`, each of which looks at those
//!   before it. Prompts whose first tokens come in one step are one sample.
//! - A step that only decodes takes `step + sequence × n + context × c` seconds: `n` requests
//!   whose prompts and answers so far have `c` tokens.

use std::time::Duration;

use crate::forecast::regression::Regression;

/// An 8B model on a small GPU, roughly. Thirty samples later it does not matter.
const FIRST_PREFILL: [f64; 3] = [0.02, 1e-4, 5e-9];
const FIRST_STEP: [f64; 3] = [0.02, 1e-4, 1e-7];

/// Share of a worker's factor that one more sample makes up.
const FACTOR_GAIN: f64 = 0.03;
/// How far one sample is believed to be off, as a logarithm.
const MOST_SURPRISE: f64 = 0.7;
/// First tokens so close, as a share of the time before them, are one step's.
const SAME_STEP_SHARE: f64 = 0.05;
const SAME_STEP: Duration = Duration::from_millis(1);
/// Share of the mean that one more sample makes up.
const MEAN_GAIN: f64 = 0.05;
/// The same of the factors of all.
const TYPICAL_GAIN: f64 = 0.01;
/// Samples until a worker's own factor counts alone.
const KNOWN_AFTER: f64 = 30.0;
/// After so long without one, in seconds, it counts half.
const HALF_FORGOTTEN: f64 = 60.0;

/// What alike workers have in common.
#[derive(Clone, Debug)]
pub(crate) struct Law {
    prefill: Time,
    step: Time,
}

impl Default for Law {
    fn default() -> Self {
        Self {
            prefill: Time::new(FIRST_PREFILL),
            step: Time::new(FIRST_STEP),
        }
    }
}

/// What one kind of work takes.
#[derive(Clone, Debug)]
struct Time {
    shape: Regression<3>,
    /// Mean of the factors of those whom it was learned from.
    typical: f64,
}

impl Time {
    fn new(first: [f64; 3]) -> Self {
        Self {
            shape: Regression::new(first),
            typical: 1.0,
        }
    }

    /// For a worker with this factor.
    fn of(&self, factor: &Factor, now: Duration) -> [f64; 3] {
        let silence = now.saturating_sub(factor.heard_at).as_secs_f64();
        let recent = 1.0 / (1.0 + (silence / HALF_FORGOTTEN).powi(2));
        let known = (f64::from(factor.samples) / KNOWN_AFTER).min(1.0) * recent;
        let believed = self.typical + known * (factor.own - self.typical);
        self.shape.coefficients().map(|it| it * believed)
    }

    /// It took a worker so long, up to `now`.
    fn observe(&mut self, factor: &mut Factor, features: &[f64; 3], seconds: f64, now: Duration) {
        factor.heard_at = now;
        if factor.samples == 0 {
            factor.own = self.typical;
        }
        factor.samples = factor.samples.saturating_add(1);
        follow(&mut factor.own, seconds / self.shape.forecast(features));
        self.shape.observe(features, seconds / factor.own);
        self.typical += TYPICAL_GAIN * (factor.own - self.typical);
    }
}

/// How many times as long one worker takes.
#[derive(Clone, Copy, Debug, Default)]
struct Factor {
    own: f64,
    samples: u32,
    /// When the last of them came.
    heard_at: Duration,
}

/// One worker's times, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// For prompts computed together, beside what each token takes.
    pub start: f64,
    /// For a prompt token to compute.
    pub token: f64,
    /// For a prompt token and one before it, which it looks at.
    pub attention: f64,
    /// For a step that decodes, whatever it decodes.
    pub step: f64,
    /// For each request in it.
    pub sequence: f64,
    /// For each token of their prompts and answers.
    pub context: f64,
    /// Samples that the laws of prefill and decode were learned from, on all alike workers.
    pub samples: [u64; 2],
    /// Mean absolute errors of their forecasts, as shares.
    pub errors: [f64; 2],
}

impl Pace {
    /// Tokens a second of a prompt of a thousand.
    #[must_use]
    pub fn prefill_speed(&self) -> f64 {
        1000.0 / self.prefill(1.0, Work::new(1000, 1000))
    }

    /// Prompts with so much to compute in all, computed in so many goes.
    pub(crate) fn prefill(&self, goes: f64, work: Work) -> f64 {
        goes * self.start + work.tokens as f64 * self.token + work.attention as f64 * self.attention
    }

    /// A step that decodes.
    pub(crate) fn step(&self, requests: f64, context: f64) -> f64 {
        self.step + self.sequence * requests + self.context * context
    }
}

/// No prompt has more tokens than this, whatever is said of it.
const MOST_LOOKED_AT: u64 = 1 << 24;

/// What prompts take to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Tokens to compute.
    pub(crate) tokens: u64,
    /// Pairs of those and tokens that they look at.
    pub(crate) attention: u64,
}

impl Work {
    /// `uncached` tokens at the end of a prompt of `prompt`.
    pub(crate) fn new(uncached: u32, prompt: u32) -> Self {
        let (uncached, prompt) = (u64::from(uncached), u64::from(prompt));
        let looking = uncached.min(MOST_LOOKED_AT);
        let looked_at = (2 * prompt.min(MOST_LOOKED_AT)).saturating_sub(looking);
        Self {
            tokens: uncached,
            attention: looking * looked_at / 2,
        }
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        // Whatever the sum, taking back what was added leaves nothing.
        self.attention = self.attention.wrapping_add(other.attention);
    }
}

impl std::ops::SubAssign for Work {
    fn sub_assign(&mut self, other: Self) {
        self.tokens -= other.tokens;
        self.attention = self.attention.wrapping_sub(other.attention);
    }
}

/// Prompts whose first tokens came in one step.
#[derive(Clone, Copy, Debug)]
struct Together {
    began: Duration,
    at: Duration,
    work: Work,
    prompts: u32,
    /// Something else than computing held it up.
    is_disturbed: bool,
}

/// What one worker's stream of tokens tells.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    prefill_factor: Factor,
    step_factor: Factor,
    together: Option<Together>,
    /// Prompts whose first tokens come in one step, on average.
    prompts_together: f64,
    /// What a token takes while prompts are computed beside, on average; 0 if unknown.
    busy_step: f64,
    stepped_at: Duration,
    /// Forecasts of times to first token that came to be checked, and their mean relative error.
    forecasts: (u64, f64),
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            prefill_factor: Factor::default(),
            step_factor: Factor::default(),
            together: None,
            prompts_together: 1.0,
            busy_step: 0.0,
            stepped_at: Duration::ZERO,
            forecasts: (0, 0.0),
        }
    }
}

impl Watch {
    /// A factor is one of its law.
    pub(crate) fn follows_another_law(&mut self) {
        self.prefill_factor = Factor::default();
        self.step_factor = Factor::default();
    }

    /// The first token of a request came so long after it was booked, and was forecast.
    pub(crate) fn check(&mut self, forecast: Duration, seen: Duration) {
        let error = forecast.as_secs_f64() / seen.as_secs_f64().max(1e-6) - 1.0;
        let (checked, mean) = &mut self.forecasts;
        *checked += 1;
        *mean += MEAN_GAIN.max(1.0 / *checked as f64) * (error.abs().min(10.0) - *mean);
    }

    /// How often that was, and the mean error as a share of the time.
    pub(crate) fn first_token_error(&self) -> (u64, f64) {
        self.forecasts
    }

    pub(crate) fn pace(&self, law: &Law, now: Duration) -> Pace {
        let [start, token, attention] = law.prefill.of(&self.prefill_factor, now);
        let [step, sequence, context] = law.step.of(&self.step_factor, now);
        Pace {
            start,
            token,
            attention,
            step,
            sequence,
            context,
            samples: [law.prefill.shape.samples(), law.step.shape.samples()],
            errors: [law.prefill.shape.deviation(), law.step.shape.deviation()],
        }
    }

    pub(crate) fn prompts_together(&self) -> f64 {
        self.prompts_together
    }

    /// What a token takes while prompts are computed beside it; 0 if that was never seen.
    pub(crate) fn busy_step(&self) -> f64 {
        self.busy_step
    }

    /// When the latest first token came.
    pub(crate) fn first_token_at(&self) -> Duration {
        self.together.map_or(Duration::ZERO, |it| it.at)
    }

    /// A prompt sent at `sent_at` got its first token. Returns whether that is the first of its
    /// step, so that the next has just begun.
    pub(crate) fn first_token(
        &mut self,
        law: &mut Law,
        work: Work,
        sent_at: Duration,
        is_disturbed: bool,
        now: Duration,
    ) -> bool {
        if let Some(together) = &mut self.together {
            let took = together.at.saturating_sub(together.began);
            let near = took.mul_f64(SAME_STEP_SHARE).max(SAME_STEP);
            if now.saturating_sub(together.at) <= near {
                together.work += work;
                together.prompts += 1;
                together.is_disturbed |= is_disturbed;
                return false;
            }
        }
        let before = self.together.take();
        if let Some(before) = before {
            self.learn_prefill(law, before);
        }
        let idle_from = before.map_or(Duration::ZERO, |it| it.at);
        self.together = Some(Together {
            began: sent_at.max(idle_from),
            at: now,
            work,
            prompts: 1,
            is_disturbed,
        });
        true
    }

    fn learn_prefill(&mut self, law: &mut Law, together: Together) {
        if together.is_disturbed || together.work.tokens == 0 {
            return;
        }
        self.prompts_together += MEAN_GAIN * (f64::from(together.prompts) - self.prompts_together);
        let seconds = together.at.saturating_sub(together.began).as_secs_f64();
        let Work { tokens, attention } = together.work;
        let features = [1.0, tokens as f64, attention as f64];
        law.prefill
            .observe(&mut self.prefill_factor, &features, seconds, together.at);
    }

    /// A request got `tokens` more tokens, the one before them `elapsed` ago. `requests` decode
    /// there, whose prompts and answers have `context` tokens. Returns whether this is the first
    /// that is told of its step.
    pub(crate) fn tokens(
        &mut self,
        law: &mut Law,
        tokens: u32,
        elapsed: Duration,
        beside_prefill: bool,
        (requests, context): (u32, u64),
        now: Duration,
    ) -> bool {
        if tokens == 0 || elapsed.is_zero() || now.saturating_sub(self.stepped_at) < elapsed / 2 {
            // Another request told of this step already.
            return false;
        }
        self.stepped_at = now;
        let seconds = elapsed.as_secs_f64() / f64::from(tokens);
        if beside_prefill {
            let known = if self.busy_step > 0.0 {
                self.busy_step
            } else {
                seconds
            };
            self.busy_step = known + MEAN_GAIN * (seconds - known);
            return true;
        }
        let features = [1.0, f64::from(requests), context as f64];
        law.step
            .observe(&mut self.step_factor, &features, seconds, now);
        true
    }
}

/// Moves a factor towards what one sample says it is.
fn follow(factor: &mut f64, sampled: f64) {
    let surprise = (sampled / *factor).ln();
    if surprise.is_finite() {
        let believed = surprise.clamp(-MOST_SURPRISE, MOST_SURPRISE);
        *factor = (*factor * (FACTOR_GAIN * believed).exp()).clamp(1e-6, 1e6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    const TRUTH: Pace = Pace {
        start: 0.05,
        token: 6e-5,
        attention: 2e-9,
        step: 0.015,
        sequence: 5e-5,
        context: 3e-8,
        samples: [0; 2],
        errors: [0.0; 2],
    };

    /// A worker so many times as slow as [`TRUTH`], which computes prompts one by one.
    fn prefills(
        watch: &mut Watch,
        law: &mut Law,
        slow: f64,
        prompts: usize,
        now: &mut f64,
        rng: &mut SmallRng,
    ) {
        for _ in 0..prompts {
            let prompt = rng.random_range(100..20_000);
            let work = Work::new(rng.random_range(50..=prompt), prompt);
            let booked_at = *now;
            *now += slow * TRUTH.prefill(1.0, work) * rng.random_range(0.9..1.1);
            watch.first_token(law, work, at(booked_at), false, at(*now));
            *now += rng.random_range(0.0..0.5);
        }
    }

    fn error(pace: &Pace, slow: f64) -> f64 {
        let errors = [(100, 100), (1000, 5000), (8000, 8000), (500, 20_000)].map(|(p, s)| {
            let work = Work::new(p, s);
            (pace.prefill(1.0, work) / (slow * TRUTH.prefill(1.0, work)) - 1.0).abs()
        });
        errors.iter().sum::<f64>() / 4.0
    }

    #[test]
    fn prefill_is_learned_and_a_change_followed_within_a_hundred_prompts() {
        let mut rng = SmallRng::seed_from_u64(1);
        let (mut watch, mut law, mut now) = (Watch::default(), Law::default(), 1.0);
        prefills(&mut watch, &mut law, 1.0, 40, &mut now, &mut rng);
        let first = error(&watch.pace(&law, at(now)), 1.0);
        assert!(first < 0.15, "{first}");
        prefills(&mut watch, &mut law, 2.0, 100, &mut now, &mut rng);
        let slowed = error(&watch.pace(&law, at(now)), 2.0);
        assert!(slowed < 0.15, "{slowed}");
    }

    #[test]
    fn workers_share_a_law_and_differ_by_a_factor() {
        let mut rng = SmallRng::seed_from_u64(2);
        let (mut law, mut now) = (Law::default(), 1.0);
        let mut watches = [Watch::default(), Watch::default()];
        for _ in 0..100 {
            for (watch, slow) in watches.iter_mut().zip([1.0, 2.0]) {
                prefills(watch, &mut law, slow, 2, &mut now, &mut rng);
            }
        }
        for (watch, slow) in watches.iter().zip([1.0, 2.0]) {
            let error = error(&watch.pace(&law, at(now)), slow);
            assert!(error < 0.1, "{error} at {slow}");
        }
    }

    #[test]
    fn who_was_not_heard_of_is_like_the_others() {
        let mut rng = SmallRng::seed_from_u64(5);
        let (mut law, mut now) = (Law::default(), 1.0);
        let mut watches = [Watch::default(), Watch::default(), Watch::default()];
        // The second only while nothing is known yet, the third never.
        prefills(&mut watches[1], &mut law, 0.2, 2, &mut now, &mut rng);
        prefills(&mut watches[0], &mut law, 0.2, 500, &mut now, &mut rng);
        // All get faster.
        prefills(&mut watches[0], &mut law, 0.1, 500, &mut now, &mut rng);
        for watch in &watches {
            let error = error(&watch.pace(&law, at(now)), 0.1);
            assert!(error < 0.1, "{error}");
        }
    }

    #[test]
    fn who_was_slow_is_tried_again() {
        let mut rng = SmallRng::seed_from_u64(6);
        let (mut law, mut now) = (Law::default(), 1.0);
        let mut watches = [Watch::default(), Watch::default()];
        for _ in 0..100 {
            for (watch, slow) in watches.iter_mut().zip([1.0, 4.0]) {
                prefills(watch, &mut law, slow, 1, &mut now, &mut rng);
            }
        }
        let forecast = |watches: &[Watch; 2], law: &Law, now: f64| {
            let [one, other] = [0, 1].map(|it: usize| {
                let pace = watches[it].pace(law, at(now));
                pace.prefill(1.0, Work::new(1000, 1000))
            });
            other / one
        };
        let ratio = forecast(&watches, &law, now);
        assert!((2.8..4.5).contains(&ratio), "{ratio}");
        // It is not chosen for ten minutes.
        let until = now + 600.0;
        while now < until {
            prefills(&mut watches[0], &mut law, 1.0, 1, &mut now, &mut rng);
        }
        let ratio = forecast(&watches, &law, now);
        assert!((0.9..1.6).contains(&ratio), "{ratio}");
        // It is as slow as ever, which two prompts tell.
        prefills(&mut watches[1], &mut law, 4.0, 2, &mut now, &mut rng);
        let ratio = forecast(&watches, &law, now);
        assert!((2.5..4.5).contains(&ratio), "{ratio}");
    }

    #[test]
    fn steps_are_learned_once_each_and_apart_from_prefill() {
        let mut rng = SmallRng::seed_from_u64(3);
        let (mut watch, mut law, mut now) = (Watch::default(), Law::default(), 1.0);
        for step in 0..600 {
            let requests = rng.random_range(1..60);
            let context = u64::from(requests) * rng.random_range(100..4000_u64);
            let is_busy = step % 5 == 0;
            let mut seconds = TRUTH.step(f64::from(requests), context as f64);
            if is_busy {
                seconds += 0.2;
            }
            now += seconds;
            for _ in 0..requests {
                watch.tokens(
                    &mut law,
                    1,
                    at(seconds),
                    is_busy,
                    (requests, context),
                    at(now),
                );
            }
        }
        let pace = watch.pace(&law, at(now));
        assert!(pace.samples[1] <= 480, "{:?}", pace.samples);
        for (requests, context) in [(1.0, 1000.0), (50.0, 100_000.0)] {
            let ratio = pace.step(requests, context) / TRUTH.step(requests, context);
            assert!((0.97..1.03).contains(&ratio), "{ratio}");
        }
        assert!(
            (0.2..0.3).contains(&watch.busy_step()),
            "{}",
            watch.busy_step()
        );
    }

    #[test]
    fn prompts_of_one_step_are_one_sample() {
        let (mut watch, mut law) = (Watch::default(), Law::default());
        let work = Work::new(1000, 1000);
        for round in 1..=200 {
            let booked_at = at(f64::from(round));
            for _ in 0..4 {
                watch.first_token(&mut law, work, booked_at, false, booked_at + at(0.4));
            }
        }
        assert!((watch.prompts_together() - 4.0).abs() < 0.1);
        let mut all = Work::default();
        (0..4).for_each(|_| all += work);
        let forecast = watch.pace(&law, at(201.0)).prefill(1.0, all);
        assert!((forecast / 0.4 - 1.0).abs() < 0.02, "{forecast}");
    }
}
