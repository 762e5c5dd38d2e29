//! Whether an SGLang would begin with a prompt at once. It sets memory aside for answers to come,
//! and makes prompts wait for it in the order in which they came.
//!
//! Its rule (`PrefillAdder::add_one_req`): what a prompt takes, all that it may be answered and a
//! page more must fit beside what running requests hold and a share of what they may still be
//! answered. That share (`NewTokenRatioTracker`) is 0.7 after it was idle and falls by a thousandth
//! with every step, to 0.098; where an answer has all of its tokens, it is all of them. After it
//! had to take memory back it assumes more, which is not followed here.
//!
//! A prompt that waits there loses what it would have found, and nobody knows when it is admitted.
//! So it waits [here](crate::queue) instead.

/// SGLang sets no more aside for one answer.
const MOST_TOKENS: u32 = 4096;

const SHARE_AFTER_IDLENESS: f64 = 0.7;
const LEAST_SHARE: f64 = 0.098;
const STEPS_TO_LEAST: f64 = 600.0;

/// Tokens that answers may still have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Promised {
    /// Of answers that have all of them.
    certain: u64,
    possible: u64,
}

impl Promised {
    pub(crate) fn new(max_tokens: Option<u32>, ignores_eos: bool, generated: u32) -> Self {
        let left = max_tokens.map_or(u32::MAX, |it| it.saturating_sub(generated));
        let left = u64::from(left.min(MOST_TOKENS));
        match ignores_eos {
            true => Self {
                certain: left,
                possible: 0,
            },
            false => Self {
                certain: 0,
                possible: left,
            },
        }
    }

    /// All of them.
    pub(crate) fn tokens(self) -> u64 {
        self.certain + self.possible
    }
}

/// What one worker has set aside for the answers of what was sent to it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reserve {
    promised: Promised,
    /// Tokens that each running request has had, since there was none.
    steps: f64,
}

impl Reserve {
    /// What a request is promised was `before` and is `now`.
    pub(crate) fn change(&mut self, before: Promised, now: Promised) {
        let sum = &mut self.promised;
        sum.certain = sum.certain + now.certain - before.certain;
        sum.possible = sum.possible + now.possible - before.possible;
    }

    /// One of so many running requests had so many tokens.
    pub(crate) fn generates(&mut self, tokens: u32, running: u32) {
        self.steps += f64::from(tokens) / f64::from(running.max(1));
    }

    /// Nothing is running.
    pub(crate) fn idles(&mut self) {
        self.steps = 0.0;
    }

    /// How many tokens are set aside.
    pub(crate) fn tokens(&self) -> u64 {
        let passed = (self.steps / STEPS_TO_LEAST).min(1.0);
        let share = SHARE_AFTER_IDLENESS + passed * (LEAST_SHARE - SHARE_AFTER_IDLENESS);
        self.promised.certain + (self.promised.possible as f64 * share).round() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_is_set_aside_the_longer_it_runs() {
        let mut reserve = Reserve::default();
        reserve.change(Promised::default(), Promised::new(Some(1000), false, 0));
        reserve.change(Promised::default(), Promised::new(Some(200), true, 50));
        assert_eq!(reserve.tokens(), 150 + 700);
        reserve.generates(600, 2);
        assert_eq!(reserve.tokens(), 150 + 399);
        reserve.generates(6000, 2);
        assert_eq!(reserve.tokens(), 150 + 98);
        reserve.idles();
        reserve.change(Promised::new(Some(200), true, 50), Promised::default());
        reserve.change(
            Promised::new(Some(1000), false, 0),
            Promised::new(Some(1000), false, 900),
        );
        assert_eq!(reserve.tokens(), 70);
    }

    #[test]
    fn no_answer_is_promised_more_than_the_most() {
        assert_eq!(Promised::new(None, false, 10).tokens(), 4096);
        assert_eq!(Promised::new(Some(u32::MAX), true, 0).tokens(), 4096);
        assert_eq!(Promised::new(Some(5), true, 9).tokens(), 0);
    }
}
