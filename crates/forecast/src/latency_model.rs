//! Coefficients of one worker's latency, the work that they apply to, and their accuracy.

/// Latency model of one worker. All coefficients are in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LatencyModel {
    /// Base time of one prefill batch.
    pub prefill_base: f64,
    /// Prefill time for each prompt token to compute.
    pub prefill_per_token: f64,
    /// Prefill time for each attention pair: a prompt token to compute and a token before it that
    /// it attends to.
    pub prefill_per_attention_pair: f64,
    /// Base time of one decode step.
    pub decode_base: f64,
    /// Decode step time for each request of the batch.
    pub decode_per_request: f64,
    /// Decode step time for each context token: prompts and outputs so far of the batch.
    pub decode_per_context_token: f64,
    /// Accuracy of the prefill model, over the samples of all similar workers.
    pub prefill_accuracy: LatencyAccuracy,
    /// Accuracy of the decode model, over the samples of all similar workers.
    pub decode_accuracy: LatencyAccuracy,
}

/// How well forecasts of a duration agreed with the observed durations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct LatencyAccuracy {
    /// Number of durations that were compared with their forecast.
    pub samples: u64,
    /// Mean absolute error of the forecasts, as a fraction of the observed duration.
    pub mean_abs_relative_error: f64,
}

impl LatencyAccuracy {
    /// Accuracy before the first sample.
    pub const NONE: Self = Self {
        samples: 0,
        mean_abs_relative_error: 0.0,
    };
}

impl LatencyModel {
    /// Returns the prefill speed for a prompt of a thousand tokens, in tokens per second.
    #[must_use]
    pub fn prefill_speed(&self) -> f64 {
        1000.0 / self.prefill_seconds(1.0, PrefillWork::new(1000, 1000))
    }

    /// Returns the seconds of prefill for `work`, computed in `batches` prefill batches.
    #[inline]
    #[must_use]
    pub fn prefill_seconds(&self, batches: f64, work: PrefillWork) -> f64 {
        batches * self.prefill_base
            + work.new_tokens as f64 * self.prefill_per_token
            + work.attention_pairs as f64 * self.prefill_per_attention_pair
    }

    /// Returns the seconds of one decode step.
    #[inline]
    #[must_use]
    pub fn decode_step_seconds(&self, requests: f64, context_tokens: f64) -> f64 {
        self.decode_base
            + self.decode_per_request * requests
            + self.decode_per_context_token * context_tokens
    }
}

/// Largest number of prompt tokens that attention pairs are counted for. No real prompt is longer,
/// whatever a request claims.
pub const MAX_ATTENTION_TOKENS: u64 = 1 << 24;

/// Amount of prefill work of one or several prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillWork {
    /// Prompt tokens to compute, without the cached prefix.
    pub new_tokens: u64,
    /// Attention pairs: tokens to compute, each with every token that it attends to.
    pub attention_pairs: u64,
}

impl PrefillWork {
    /// Returns the work to compute the last `new_tokens` tokens of a prompt of `prompt_tokens`,
    /// which must not be fewer. Attention pairs are counted for at most [`MAX_ATTENTION_TOKENS`]
    /// tokens.
    #[inline]
    #[must_use]
    pub fn new(new_tokens: u32, prompt_tokens: u32) -> Self {
        let (new_tokens, prompt_tokens) = (u64::from(new_tokens), u64::from(prompt_tokens));
        let querying = new_tokens.min(MAX_ATTENTION_TOKENS);
        let attended_doubled =
            (2 * prompt_tokens.min(MAX_ATTENTION_TOKENS)).saturating_sub(querying);
        Self {
            new_tokens,
            attention_pairs: querying * attended_doubled / 2,
        }
    }
}

impl std::ops::AddAssign for PrefillWork {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.new_tokens += other.new_tokens;
        // Wrapping, so that subtracting everything that was added gives zero even after an
        // overflow.
        self.attention_pairs = self.attention_pairs.wrapping_add(other.attention_pairs);
    }
}

impl std::ops::SubAssign for PrefillWork {
    /// Subtracts work that was added before. If it has more tokens, which only a defect of the
    /// accounting causes, the tokens become 0 in a release build.
    #[inline]
    fn sub_assign(&mut self, other: Self) {
        debug_assert!(
            self.new_tokens >= other.new_tokens,
            "{} tokens are subtracted from {}",
            other.new_tokens,
            self.new_tokens
        );
        self.new_tokens = self.new_tokens.saturating_sub(other.new_tokens);
        self.attention_pairs = self.attention_pairs.wrapping_sub(other.attention_pairs);
    }
}
