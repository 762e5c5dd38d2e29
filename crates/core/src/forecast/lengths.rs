//! How long answers are: what remains of one, given how much of it has come.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::sequence::AlreadyHashed;

/// Tokens that an answer is expected to have left before any has ended.
const PRIOR_REMAINING: f64 = 128.0;
/// How many answers the prior counts as.
const PRIOR_ANSWERS: f64 = 1.0;
/// How many answers of its kind what is assumed counts as: by the client, or by all answers.
const ASSUMED_ANSWERS: f64 = 10.0;
/// How many of the latest answers are remembered, about.
const REMEMBERED: f64 = 2000.0;
/// Kinds of requests told apart at most. Of more, the rarest is forgotten.
const MOST_KINDS: usize = 64;
/// What a kind's next answer weighs more for each kind forgotten.
const EVICTION_AGES: f32 = 1.02;

/// Lengths of two neighbouring bins differ by a fifth.
const BINS_PER_OCTAVE: f64 = 4.0;
const BINS: usize = 81;

fn bin(length: u32) -> usize {
    let octaves = f64::from(length.max(1)).log2();
    ((octaves * BINS_PER_OCTAVE) as usize).min(BINS - 1)
}

/// Lengths of answers, old ones forgotten little by little.
#[derive(Clone, Debug)]
struct Lengths {
    answers: [f32; BINS],
    tokens: [f32; BINS],
    /// What the next answer weighs. Growing it makes all others lighter.
    weight: f32,
}

impl Default for Lengths {
    fn default() -> Self {
        Self {
            answers: [0.0; BINS],
            tokens: [0.0; BINS],
            weight: 1.0,
        }
    }
}

impl Lengths {
    fn observe(&mut self, length: u32) {
        let bin = bin(length);
        self.answers[bin] += self.weight;
        self.tokens[bin] += self.weight * length as f32;
        self.weight *= 1.0 + 1.0 / REMEMBERED as f32;
        if self.weight > 1e6 {
            let all = self.answers.iter_mut().chain(&mut self.tokens);
            all.for_each(|it| *it /= 1e6);
            self.weight /= 1e6;
        }
    }

    /// What was longer than `generated`: how many answers, and how many tokens they had beyond it
    /// within `limit`.
    fn beyond(&self, generated: u32, limit: f64) -> (f64, f64) {
        let done = f64::from(generated);
        let (mut answers, mut left) = (0.0, 0.0);
        for bin in bin(generated)..BINS {
            let count = f64::from(self.answers[bin]);
            if count == 0.0 {
                continue;
            }
            let mean = f64::from(self.tokens[bin]) / count;
            // In the first bin, those that are longer; some have no token at all.
            if mean > done || generated == 0 {
                answers += count;
                left += count * (mean.min(limit) - done).max(0.0);
            }
        }
        let weight = f64::from(self.weight);
        (answers / weight, left / weight)
    }

    fn all(&self) -> f32 {
        self.answers.iter().sum()
    }
}

/// What tells kinds of requests apart, hashed.
pub(crate) type Kind = u64;

/// How well lengths of answers are forecast when their requests come.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LengthForecast {
    /// Answers that ended.
    pub answers: u64,
    /// What the next one is expected to have, in tokens, if nothing is known of its request.
    pub expected: f64,
    /// What they had over what was forecast, all of the latest together: 1 is right on average.
    pub bias: f64,
    /// Mean absolute error, as a share of what they had on average.
    pub error: f64,
}

/// Share of a mean that one more answer makes up.
const MEAN_GAIN: f64 = 0.02;

/// Means over the latest answers, in tokens.
#[derive(Clone, Debug, Default)]
struct Checks {
    answers: u64,
    forecast: f64,
    seen: f64,
    off: f64,
}

impl Checks {
    fn add(&mut self, forecast: u32, seen: u32) {
        self.answers += 1;
        let gain = MEAN_GAIN.max(1.0 / self.answers as f64);
        let (forecast, seen) = (f64::from(forecast), f64::from(seen));
        self.forecast += gain * (forecast - self.forecast);
        self.seen += gain * (seen - self.seen);
        self.off += gain * ((forecast - seen).abs() - self.off);
    }
}

/// The lengths of answers to all requests, and to each kind.
#[derive(Clone, Debug, Default)]
pub(crate) struct OutputLength {
    all: Lengths,
    checks: Checks,
    kinds: HashMap<Kind, Box<Lengths>, BuildHasherDefault<AlreadyHashed>>,
}

impl OutputLength {
    /// How well it forecasts.
    pub(crate) fn forecast(&self) -> LengthForecast {
        let Checks {
            answers,
            forecast,
            seen,
            off,
        } = self.checks;
        LengthForecast {
            answers,
            expected: f64::from(self.remaining(0, 0, None)),
            bias: if forecast > 0.0 { seen / forecast } else { 1.0 },
            error: if seen > 0.0 { off / seen } else { 0.0 },
        }
    }

    /// An answer that was expected to have `forecast` tokens ended after so many.
    pub(crate) fn check(&mut self, forecast: u32, tokens: u32) {
        self.checks.add(forecast, tokens);
    }

    /// An answer ended after so many tokens. One that was `cut` there would have gone on, as far
    /// as those did that became longer.
    pub(crate) fn observe(&mut self, kind: Kind, tokens: u32, cut: bool) {
        let left = if cut {
            self.remaining(kind, tokens, None)
        } else {
            0
        };
        let tokens = tokens.saturating_add(left);
        self.all.observe(tokens);
        if self.kinds.len() == MOST_KINDS && !self.kinds.contains_key(&kind) {
            let weigh = |lengths: &Lengths| lengths.all() / lengths.weight;
            let rarest = self
                .kinds
                .iter()
                .min_by(|(_, one), (_, other)| weigh(one).total_cmp(&weigh(other)));
            if let Some((&rarest, _)) = rarest {
                self.kinds.remove(&rarest);
            }
            // Those of which nothing more comes become the rarest.
            for lengths in self.kinds.values_mut() {
                lengths.weight *= EVICTION_AGES;
            }
        }
        self.kinds.entry(kind).or_default().observe(tokens);
    }

    /// Tokens that are still to come of an answer of which `generated` have come, on average, if it
    /// ends by itself or at `limit`.
    pub(crate) fn remaining(&self, kind: Kind, generated: u32, limit: Option<u32>) -> u32 {
        self.remaining_of(kind, generated, limit, None)
    }

    /// The same if the client expects so many of the whole answer.
    pub(crate) fn remaining_of(
        &self,
        kind: Kind,
        generated: u32,
        limit: Option<u32>,
        expected: Option<u32>,
    ) -> u32 {
        let limit = limit.map_or(f64::INFINITY, f64::from);
        let most = (limit - f64::from(generated)).max(0.0);
        let (answers, left) = self.all.beyond(generated, limit);
        let of_all = (left + PRIOR_ANSWERS * PRIOR_REMAINING.min(most)) / (answers + PRIOR_ANSWERS);
        // An answer longer than expected says that the client was wrong.
        let expected = expected.filter(|&it| it > generated);
        let assumed = expected.map_or(of_all, |it| f64::from(it - generated).min(most));
        let of_kind = self.kinds.get(&kind);
        let (answers, left) = of_kind.map_or((0.0, 0.0), |it| it.beyond(generated, limit));
        let remaining = (left + ASSUMED_ANSWERS * assumed) / (answers + ASSUMED_ANSWERS);
        remaining.round() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    fn close(one: u32, other: f64) -> bool {
        (f64::from(one) / other - 1.0).abs() < 0.12
    }

    #[test]
    fn nothing_known_is_the_prior() {
        let lengths = OutputLength::default();
        assert_eq!(lengths.remaining(1, 0, None), 128);
        assert_eq!(lengths.remaining(1, 5000, None), 128);
        assert_eq!(lengths.remaining(1, 0, Some(16)), 16);
        assert_eq!(lengths.remaining(1, 16, Some(16)), 0);
        assert_eq!(lengths.remaining(1, 17, Some(16)), 0);
    }

    /// Uniform lengths, whose mean residual is half of what is left of the range.
    #[test]
    fn what_remains_follows_from_what_has_come() {
        let mut lengths = OutputLength::default();
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..4000 {
            lengths.observe(1, rng.random_range(1..=1000), false);
        }
        for generated in [0, 100, 300, 500, 700] {
            let expected = (1000.0 - f64::from(generated)) / 2.0;
            let remaining = lengths.remaining(1, generated, None);
            assert!(close(remaining, expected), "{remaining} of {expected}");
        }
        // Of those up to a limit of 500, half reach it.
        let limited = lengths.remaining(1, 0, Some(500));
        assert!(close(limited, 375.0), "{limited}");
    }

    #[test]
    fn kinds_differ_and_the_unknown_one_is_like_all() {
        let mut lengths = OutputLength::default();
        for _ in 0..500 {
            lengths.observe(1, 10, false);
            lengths.observe(2, 1000, false);
        }
        assert!(lengths.remaining(1, 0, None) < 25);
        assert!(close(lengths.remaining(2, 0, None), 1000.0));
        assert!(close(lengths.remaining(3, 0, None), 505.0));
    }

    #[test]
    fn forecasts_are_held_against_what_came() {
        let mut lengths = OutputLength::default();
        let mut rng = SmallRng::seed_from_u64(2);
        for _ in 0..2000 {
            let (forecast, tokens) = (lengths.remaining(1, 0, None), rng.random_range(1..=1000));
            lengths.check(forecast, tokens);
            lengths.observe(1, tokens, false);
        }
        let LengthForecast {
            answers,
            expected,
            bias,
            error,
        } = lengths.forecast();
        assert_eq!(answers, 2000);
        assert!((expected / 500.0 - 1.0).abs() < 0.1, "{expected}");
        assert!((bias - 1.0).abs() < 0.2, "{bias}");
        // A uniform length is off its mean by half of that, on average.
        assert!((error - 0.5).abs() < 0.1, "{error}");
    }

    #[test]
    fn old_answers_are_forgotten() {
        let mut lengths = OutputLength::default();
        for _ in 0..5000 {
            lengths.observe(1, 1000, false);
        }
        for _ in 0..10_000 {
            lengths.observe(1, 10, false);
        }
        assert!(lengths.remaining(1, 0, None) < 20);
    }

    #[test]
    fn kinds_are_bounded_and_numbers_stay_numbers() {
        let mut lengths = OutputLength::default();
        for kind in 0..100_000 {
            lengths.observe(kind % 1000, u32::MAX, false);
        }
        assert!(lengths.kinds.len() <= MOST_KINDS);
        assert!(lengths.remaining(0, u32::MAX, None) <= 128);
        assert!(lengths.remaining(0, 0, None) > 1 << 20);
    }

    #[test]
    fn new_kinds_get_the_place_of_those_that_come_no_more() {
        let mut lengths = OutputLength::default();
        for kind in 0..MOST_KINDS as Kind {
            (0..20).for_each(|_| lengths.observe(kind, 1000, false));
        }
        let (one, other) = (1000, 2000);
        for _ in 0..500 {
            lengths.observe(one, 10, false);
            lengths.observe(other, 4000, false);
        }
        assert!(lengths.remaining(one, 0, None) < 100);
        assert!(close(lengths.remaining(other, 0, None), 4000.0));
    }

    #[test]
    fn answers_without_a_token_are_learned_too() {
        let mut lengths = OutputLength::default();
        (0..500).for_each(|_| lengths.observe(1, 1000, false));
        (0..500).for_each(|_| lengths.observe(2, 0, false));
        assert!(lengths.remaining(2, 0, None) < 20);
        assert!(close(lengths.remaining(1, 0, None), 1000.0));
    }

    #[test]
    fn what_a_client_expects_is_believed_until_it_is_known_better() {
        let mut lengths = OutputLength::default();
        let (right, wrong) = (1, 2);
        (0..100).for_each(|_| lengths.observe(0, 100, false));
        let expects =
            |lengths: &OutputLength, kind| lengths.remaining_of(kind, 0, None, Some(1000));
        assert_eq!(expects(&lengths, right), 1000);
        assert_eq!(lengths.remaining_of(right, 0, Some(600), Some(1000)), 600);
        assert_eq!(lengths.remaining_of(right, 400, None, Some(1000)), 600);
        for _ in 0..200 {
            lengths.observe(right, 1000, false);
            lengths.observe(wrong, 20, false);
        }
        assert_eq!(expects(&lengths, right), 1000);
        assert!(
            expects(&lengths, wrong) < 80,
            "{}",
            expects(&lengths, wrong)
        );
        // Longer than was said: as long as others are that came so far.
        let of_all = lengths.remaining(3, 1500, None);
        assert_eq!(lengths.remaining_of(3, 1500, None, Some(1000)), of_all);
    }

    #[test]
    fn what_was_cut_would_have_gone_on() {
        let mut lengths = OutputLength::default();
        for _ in 0..100 {
            lengths.observe(1, 300, true);
        }
        assert_eq!(lengths.remaining(1, 0, Some(300)), 300);
        assert_eq!(lengths.remaining(1, 299, Some(300)), 1);
        // Half of the answers end by themselves, after 100 tokens.
        let mut lengths = OutputLength::default();
        for _ in 0..1000 {
            lengths.observe(1, 100, false);
            lengths.observe(1, 200, true);
        }
        assert!(close(lengths.remaining(1, 0, Some(200)), 150.0));
        assert!(close(lengths.remaining(1, 120, Some(200)), 80.0));
    }
}
