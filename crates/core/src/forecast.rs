//! What is learned of a worker's pace from watching its streams, and what follows from it for
//! prompts that wait there.

use std::time::Duration;

/// Tokens per second assumed until a worker has shown its own prefill speed; published profiles
/// of 8B and 70B models lie between 10,000 and 15,000.
const PRIOR_PREFILL_SPEED: f64 = 10_000.0;
/// How much the prior weighs, in seconds of observed prefill.
const PRIOR_SECONDS: f64 = 0.2;
const PRIOR_INTER_TOKEN_LATENCY: f64 = 0.03;
const PRIOR_OUTPUT_TOKENS: f64 = 128.0;

/// Share of the past that remains after one more sample.
const FORGETTING: f64 = 0.98;

/// Prompt tokens booked on a worker and not yet computed.
///
/// What is booked and unsettled is an exact integer. Between first tokens, the part of it that
/// the worker must have computed by now is estimated from its learned speed; each first token
/// replaces estimate by fact.
#[derive(Clone, Debug)]
pub(crate) struct Prefill {
    unsettled: u64,
    /// Estimated tokens of `unsettled` that are computed as of `estimated_at`.
    computed: f64,
    estimated_at: Duration,
    last_settled_at: Duration,
    /// Exponentially forgotten sums; their ratio is the speed. Summing before dividing weighs
    /// first tokens that come together, with no time between them, rightly.
    settled_tokens: f64,
    busy_seconds: f64,
}

impl Default for Prefill {
    fn default() -> Self {
        Self {
            unsettled: 0,
            computed: 0.0,
            estimated_at: Duration::ZERO,
            last_settled_at: Duration::ZERO,
            settled_tokens: PRIOR_PREFILL_SPEED * PRIOR_SECONDS,
            busy_seconds: PRIOR_SECONDS,
        }
    }
}

impl Prefill {
    /// Learned speed, in tokens per second.
    pub(crate) fn speed(&self) -> f64 {
        self.settled_tokens / self.busy_seconds
    }

    /// Tokens still to be computed at `now`, as far as can be told.
    pub(crate) fn backlog(&self, now: Duration) -> u64 {
        let left = self.unsettled as f64 - self.computed_by(now);
        left.max(0.0).round() as u64
    }

    /// How long a prompt of `tokens` uncached tokens booked now waits and computes.
    pub(crate) fn time_to_first_token(&self, tokens: u32, now: Duration) -> Duration {
        let ahead = self.backlog(now) as f64 + f64::from(tokens);
        seconds(ahead / self.speed())
    }

    pub(crate) fn book(&mut self, tokens: u32, now: Duration) {
        self.advance(now);
        self.unsettled += u64::from(tokens);
    }

    /// A prompt of `tokens` uncached tokens, booked at `booked_at`, got its first token.
    pub(crate) fn settle(&mut self, tokens: u32, booked_at: Duration, now: Duration) {
        if tokens == 0 {
            // Nothing was computed, or nothing is known of what was: no sample of the speed.
            return;
        }
        // The worker was busy with it from when it was booked, or from the end of the one before.
        let busy = now.saturating_sub(self.last_settled_at.max(booked_at));
        self.settled_tokens = self.settled_tokens * FORGETTING + f64::from(tokens);
        // A millisecond keeps the speed finite when all prompts are cache hits.
        self.busy_seconds = (self.busy_seconds * FORGETTING + busy.as_secs_f64()).max(1e-3);
        self.last_settled_at = now.max(self.last_settled_at);
        self.release(tokens, now);
    }

    /// `tokens` left the backlog without a first token to learn from.
    pub(crate) fn release(&mut self, tokens: u32, now: Duration) {
        self.advance(now);
        self.unsettled -= u64::from(tokens);
        self.computed = (self.computed - f64::from(tokens)).max(0.0);
    }

    fn computed_by(&self, now: Duration) -> f64 {
        let elapsed = now.saturating_sub(self.estimated_at).as_secs_f64();
        (self.computed + elapsed * self.speed()).min(self.unsettled as f64)
    }

    fn advance(&mut self, now: Duration) {
        self.computed = self.computed_by(now);
        self.estimated_at = now.max(self.estimated_at);
    }
}

/// How fast a worker's running requests produce tokens.
#[derive(Clone, Debug)]
pub(crate) struct Decode {
    inter_token_seconds: f64,
}

impl Default for Decode {
    fn default() -> Self {
        Self {
            inter_token_seconds: PRIOR_INTER_TOKEN_LATENCY,
        }
    }
}

impl Decode {
    pub(crate) fn inter_token_latency(&self) -> Duration {
        seconds(self.inter_token_seconds)
    }

    /// One request produced `tokens` within `elapsed`.
    pub(crate) fn observe(&mut self, tokens: u32, elapsed: Duration) {
        if tokens > 0 && !elapsed.is_zero() {
            let sample = elapsed.as_secs_f64() / f64::from(tokens);
            self.inter_token_seconds += (1.0 - FORGETTING) * (sample - self.inter_token_seconds);
        }
    }

    /// Tokens a request has produced this long after its first.
    pub(crate) fn tokens_after(&self, elapsed: Duration) -> u32 {
        (elapsed.as_secs_f64() / self.inter_token_seconds) as u32
    }
}

/// However long a forecast is, it is a duration.
fn seconds(forecast: f64) -> Duration {
    Duration::try_from_secs_f64(forecast).unwrap_or(Duration::MAX)
}

/// How long answers are, over all workers.
#[derive(Clone, Debug)]
pub(crate) struct OutputLength {
    mean: f64,
}

impl Default for OutputLength {
    fn default() -> Self {
        Self {
            mean: PRIOR_OUTPUT_TOKENS,
        }
    }
}

impl OutputLength {
    pub(crate) fn observe(&mut self, tokens: u32) {
        self.mean += (1.0 - FORGETTING) * (f64::from(tokens) - self.mean);
    }

    /// Expected output tokens of a request that asked for at most `max_tokens`.
    pub(crate) fn expect(&self, max_tokens: Option<u32>) -> u32 {
        let mean = self.mean.round() as u32;
        max_tokens.map_or(mean, |limit| limit.min(mean))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn speed_is_learned_within_a_quarter_from_fifty_prompts() {
        for true_speed in [1_500.0, 40_000.0] {
            let mut prefill = Prefill::default();
            let mut now = 0.0;
            for prompt in 0..50 {
                let tokens = 500 + 300 * (prompt % 7);
                prefill.book(tokens, at(now));
                let booked = at(now);
                now += f64::from(tokens) / true_speed;
                prefill.settle(tokens, booked, at(now));
                now += 0.5; // idle
            }
            let ratio = prefill.speed() / true_speed;
            assert!((0.75..1.25).contains(&ratio), "{ratio} of {true_speed}");
        }
    }

    #[test]
    fn speed_is_learned_from_prompts_that_wait_for_each_other() {
        let mut prefill = Prefill::default();
        for _ in 0..100 {
            prefill.book(2_000, at(0.0));
        }
        for prompt in 1..=100 {
            prefill.settle(2_000, at(0.0), at(f64::from(prompt) * 0.1));
        }
        assert!((prefill.speed() / 20_000.0 - 1.0).abs() < 0.25);
        assert_eq!(prefill.backlog(at(10.0)), 0);
    }

    #[test]
    fn backlog_decays_with_time_and_a_first_token_settles_it() {
        let mut prefill = Prefill::default();
        prefill.book(10_000, at(0.0));
        prefill.book(5_000, at(0.0));
        assert_eq!(prefill.backlog(at(0.0)), 15_000);
        assert_eq!(prefill.backlog(at(0.5)), 10_000);
        assert_eq!(prefill.backlog(at(9.0)), 0);
        prefill.settle(10_000, at(0.0), at(0.2));
        assert_eq!(prefill.backlog(at(0.2)), 5_000, "faster than was thought");
        prefill.release(5_000, at(0.2));
        assert_eq!(prefill.backlog(at(0.2)), 0);
    }

    #[test]
    fn time_that_goes_back_changes_nothing() {
        let mut prefill = Prefill::default();
        prefill.book(10_000, at(5.0));
        let before = prefill.backlog(at(5.0));
        prefill.book(100, at(1.0));
        assert_eq!(prefill.backlog(at(2.0)), before + 100);
        prefill.settle(100, at(5.0), at(3.0));
        prefill.release(10_000, at(0.0));
        assert_eq!(prefill.backlog(at(0.0)), 0);
        assert!(prefill.speed().is_finite());
    }

    #[test]
    fn requests_without_a_prompt_say_nothing_of_speed() {
        let mut prefill = Prefill::default();
        for call in 0..100_000 {
            prefill.book(0, at(f64::from(call)));
            prefill.settle(0, at(f64::from(call)), at(f64::from(call) + 1.0));
        }
        assert_eq!(prefill.speed(), PRIOR_PREFILL_SPEED);
    }

    #[test]
    fn inter_token_latency_is_learned() {
        let mut decode = Decode::default();
        for _ in 0..300 {
            decode.observe(4, at(0.04));
        }
        let learned = decode.inter_token_latency().as_secs_f64();
        assert!((learned / 0.01 - 1.0).abs() < 0.01, "{learned}");
        let tokens = decode.tokens_after(at(1.0));
        assert!((99..=101).contains(&tokens), "{tokens}");
        decode.observe(0, at(1000.0));
        decode.observe(5, at(0.0));
        assert_eq!(decode.inter_token_latency().as_secs_f64(), learned);
    }

    #[test]
    fn no_forecast_is_beyond_words() {
        let mut decode = Decode::default();
        let mut prefill = Prefill::default();
        prefill.book(u32::MAX, Duration::ZERO);
        prefill.settle(1, Duration::ZERO, Duration::MAX);
        assert!(prefill.time_to_first_token(u32::MAX, Duration::ZERO) > at(1e9));
        for _ in 0..1_000 {
            decode.observe(1, Duration::MAX);
        }
        assert!(decode.inter_token_latency() > at(1e9));
        for _ in 0..100_000 {
            decode.observe(u32::MAX, Duration::from_nanos(1));
        }
        assert_eq!(decode.tokens_after(Duration::MAX), u32::MAX);
    }

    #[test]
    fn outputs_are_expected_to_be_as_long_as_they_were() {
        let mut lengths = OutputLength::default();
        assert_eq!(lengths.expect(None), 128);
        assert_eq!(lengths.expect(Some(0)), 0);
        for _ in 0..500 {
            lengths.observe(1_000);
        }
        assert!((990..=1_000).contains(&lengths.expect(None)));
        assert_eq!(lengths.expect(Some(16)), 16);
    }
}
