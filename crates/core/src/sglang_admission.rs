//! SGLang's admission rule: how much memory SGLang reserves for outputs before it starts a prompt.
//!
//! SGLang starts prompts in order of arrival and makes them wait until their reservation fits
//! (`PrefillAdder::add_one_req`). A prompt needs memory for its own tokens, for all output that it
//! may generate, and for one page more. That must fit beside the memory of the running requests and
//! a fraction of the output that they may still generate. The fraction (`NewTokenRatioTracker`) is
//! 0.7 after the engine was idle and decreases by a thousandth with every step, to 0.098. A request
//! that ignores the end-of-sequence token reserves all of its output. After SGLang has retracted a
//! request it assumes a higher fraction; that is not modelled here.
//!
//! A prompt that waits inside SGLang may lose the cached blocks that it would have hit, and its
//! admission time is unknown. So it waits in the [router's queue](crate::queue) instead.

use foresee_prefix::counter::Counter;

/// Largest number of output tokens that SGLang reserves for one request.
const CLIP_MAX_NEW_TOKENS: u32 = 4096;

/// Fraction of the possible output that is reserved after the engine was idle.
const INIT_NEW_TOKEN_RATIO: f64 = 0.7;
/// Smallest fraction of the possible output that is reserved.
const MIN_NEW_TOKEN_RATIO: f64 = 0.098;
/// Number of decode steps until the fraction has decreased to its minimum.
const NEW_TOKEN_RATIO_DECAY_STEPS: f64 = 600.0;

/// Output tokens that one or several requests may still generate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OutputReservation {
    /// Tokens of requests that ignore the end-of-sequence token, and so generate all of them.
    exact: u64,
    /// Tokens of all other requests, at most. SGLang reserves a fraction of them.
    upper_bound: u64,
}

impl OutputReservation {
    /// Returns the output that a request may still generate, after `output_tokens` tokens. At most
    /// [`CLIP_MAX_NEW_TOKENS`].
    pub(crate) fn new(max_tokens: Option<u32>, ignore_eos: bool, output_tokens: u32) -> Self {
        let remaining = max_tokens.map_or(u32::MAX, |max_tokens| {
            max_tokens.saturating_sub(output_tokens)
        });
        let remaining = u64::from(remaining.min(CLIP_MAX_NEW_TOKENS));
        match ignore_eos {
            true => Self {
                exact: remaining,
                upper_bound: 0,
            },
            false => Self {
                exact: 0,
                upper_bound: remaining,
            },
        }
    }

    /// Returns the sum of both parts.
    pub(crate) fn tokens(self) -> u64 {
        self.exact + self.upper_bound
    }
}

/// Memory that one SGLang worker reserves for the outputs of its requests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OutputReserve {
    /// Sum over the requests that were sent to the worker.
    reserved: OutputReservation,
    /// Decode steps since the worker was last idle: mean output tokens of a running request.
    decode_steps: f64,
}

impl OutputReserve {
    /// Replaces the reservation of one request.
    pub(crate) fn replace(&mut self, old: OutputReservation, new: OutputReservation) {
        let total = &mut self.reserved;
        total.exact.replace(old.exact, new.exact);
        total.upper_bound.replace(old.upper_bound, new.upper_bound);
    }

    /// Counts `tokens` new output tokens of one of `running_requests` decoding requests.
    pub(crate) fn on_decode_tokens(&mut self, tokens: u32, running_requests: u32) {
        self.decode_steps += f64::from(tokens) / f64::from(running_requests.max(1));
    }

    /// Resets the fraction, because the worker is idle.
    pub(crate) fn reset_ratio(&mut self) {
        self.decode_steps = 0.0;
    }

    /// Returns the number of tokens that the worker reserves now.
    pub(crate) fn tokens(&self) -> u64 {
        let decay = (self.decode_steps / NEW_TOKEN_RATIO_DECAY_STEPS).min(1.0);
        let new_token_ratio =
            INIT_NEW_TOKEN_RATIO + decay * (MIN_NEW_TOKEN_RATIO - INIT_NEW_TOKEN_RATIO);
        self.reserved.exact + (self.reserved.upper_bound as f64 * new_token_ratio).round() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_shrinks_with_decode_steps() {
        let mut reserve = OutputReserve::default();
        reserve.replace(
            OutputReservation::default(),
            OutputReservation::new(Some(1000), false, 0),
        );
        reserve.replace(
            OutputReservation::default(),
            OutputReservation::new(Some(200), true, 50),
        );
        assert_eq!(reserve.tokens(), 150 + 700);
        reserve.on_decode_tokens(600, 2);
        assert_eq!(reserve.tokens(), 150 + 399);
        reserve.on_decode_tokens(6000, 2);
        assert_eq!(reserve.tokens(), 150 + 98);
        reserve.reset_ratio();
        reserve.replace(
            OutputReservation::new(Some(200), true, 50),
            OutputReservation::default(),
        );
        reserve.replace(
            OutputReservation::new(Some(1000), false, 0),
            OutputReservation::new(Some(1000), false, 900),
        );
        assert_eq!(reserve.tokens(), 70);
    }

    #[test]
    fn a_reservation_is_at_most_clip_max_new_tokens() {
        assert_eq!(OutputReservation::new(None, false, 10).tokens(), 4096);
        assert_eq!(
            OutputReservation::new(Some(u32::MAX), true, 0).tokens(),
            4096
        );
        assert_eq!(OutputReservation::new(Some(5), true, 9).tokens(), 0);
    }
}
