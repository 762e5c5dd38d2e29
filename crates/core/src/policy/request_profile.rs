//! The request as policies see it.

use std::time::Duration;

use foresee_forecast::PrefillWork;
use foresee_prefix::PrefixMatch;
use foresee_prefix::sequence::SequenceHash;

use crate::queue::QueueTicket;

/// Properties of a request that its costs depend on, and the weights of the configuration.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RequestProfile<'a> {
    /// Sequence hashes of the full blocks of the prompt. Empty for a prompt of unknown content.
    pub hashes: &'a [SequenceHash],
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Blocks of the prompt, the partial last one included.
    pub blocks: u32,
    /// Largest number of blocks that a cache hit can cover: at least one token is always computed.
    pub max_reusable_blocks: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// Expected output tokens.
    pub output_tokens: f64,
    /// Weight of computing a prompt: see
    /// [`RouterConfig::overlap_weight`](crate::router::RouterConfig::overlap_weight).
    pub overlap_weight: f64,
    /// Weight of a second of time to first token: see
    /// [`RouterConfig::ttft_weight`](crate::router::RouterConfig::ttft_weight).
    pub ttft_weight: f64,
    /// Fraction of their time that prefills take, on average over the workers that the request may
    /// go to.
    pub mean_prefill_utilisation: f64,
    /// Number of choices that the router made before.
    pub choices: u64,
    /// Queue ticket, which decides how many queued requests this one overtakes.
    pub(crate) ticket: QueueTicket,
    /// Time of the decision, since the epoch that the caller of the router chose.
    pub now: Duration,
}

impl RequestProfile<'_> {
    /// Returns the profile of a prompt of `prompt_tokens` tokens and unknown content in blocks of
    /// `block_size` tokens, with one expected output token and weights of 1. For tests of policies.
    #[must_use]
    pub fn of_tokens(prompt_tokens: u32, block_size: u32) -> Self {
        Self {
            hashes: &[],
            prompt_tokens,
            blocks: prompt_tokens.div_ceil(block_size),
            max_reusable_blocks: prompt_tokens.saturating_sub(1) / block_size,
            block_size,
            output_tokens: 1.0,
            overlap_weight: 1.0,
            ttft_weight: 1.0,
            mean_prefill_utilisation: 0.0,
            choices: 0,
            ticket: QueueTicket::default(),
            now: Duration::ZERO,
        }
    }

    /// Returns the prefill work on a worker with this prefix match.
    pub(crate) fn prefill_work(&self, prefix_match: PrefixMatch) -> PrefillWork {
        let overlap = prefix_match.overlap().min(self.max_reusable_blocks);
        let credit = self.overlap_weight.min(1.0) * f64::from(overlap * self.block_size);
        let uncached = self.prompt_tokens.saturating_sub(credit as u32);
        PrefillWork::new(uncached.max(1), self.prompt_tokens)
    }
}
