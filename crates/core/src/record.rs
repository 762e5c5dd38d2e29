//! The router's side of a booking.

use std::task::Waker;
use std::time::Duration;

use crate::admission::Promised;
use crate::fleet::WorkerId;
use crate::forecast::lengths::Kind;
use crate::outlook::Share;
use crate::queue::{Rank, Standing};
use crate::reports::Claim;
use crate::tree::NodeId;

/// Finds a booking's record, and never another's: slab keys are used again, serials are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BookingKey {
    pub(crate) serial: u64,
    pub(crate) index: usize,
}

/// What is known of a request in line.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// Its place in its worker's line.
    pub(crate) rank: Rank,
    /// It may choose anew.
    pub(crate) is_invited: bool,
    /// It is not asked to before.
    pub(crate) thinks_until: Duration,
    /// Whoever carries it.
    pub(crate) waker: Option<Waker>,
}

/// The router's side of a booking.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) serial: u64,
    pub(crate) worker: WorkerId,
    /// End of its path in the prefix tree, or in that of those in line.
    pub(crate) node: NodeId,
    /// Blocks of the prompt booked through the tree; the others are its own.
    pub(crate) hashed_blocks: u32,
    pub(crate) block_size: u32,
    /// How many blocks its engine takes at a time.
    pub(crate) stride: u32,
    pub(crate) prompt_tokens: u32,
    pub(crate) generated_tokens: u32,
    /// What it adds to its worker's outlook.
    pub(crate) share: Share,
    pub(crate) kind: Kind,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) ignores_eos: bool,
    /// What its client expects of the whole answer.
    pub(crate) said_tokens: Option<u32>,
    /// The worker has computed the prompt; said by its first token, not by a forecast.
    pub(crate) computed: bool,
    /// The worker said how many tokens it generated; otherwise their number is a forecast.
    pub(crate) counted: bool,
    /// Its output is watched; otherwise it is forecast.
    pub(crate) streams: bool,
    pub(crate) expected_tokens: u32,
    /// Unless it is in line, its worker was to get it then.
    pub(crate) booked_at: Duration,
    pub(crate) standing: Standing,
    /// Seconds that its prompt takes to compute, by the forecast when it was booked.
    pub(crate) prefill: f64,
    /// None once its worker gets it. Boxed, because few wait.
    pub(crate) waiting: Option<Box<Waiting>>,
    /// Its worker had more booked than it has memory for.
    pub(crate) waited_for_memory: bool,
    /// When its first token was forecast to come.
    pub(crate) first_token_due: Duration,
    /// When its latest token came or, while unwatched, its first should have come.
    pub(crate) token_at: Duration,
    /// While unwatched: when it was last known or, for the first, taken to have so many tokens.
    pub(crate) known: (Duration, u32),
    /// What of the prompt it expected to be cached, until the worker has said what was.
    pub(crate) claim: Option<Claim>,
}

impl Record {
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks_after(self.generated_tokens)
    }

    /// What its engine holds once so many output tokens are generated.
    fn blocks_after(&self, generated: u32) -> u32 {
        let tokens = u64::from(self.prompt_tokens) + u64::from(generated);
        let blocks = tokens.div_ceil(u64::from(self.block_size));
        let whole = blocks.next_multiple_of(u64::from(self.stride));
        u32::try_from(whole).unwrap_or(u32::MAX)
    }

    /// Blocks that no other request can share: the partial one and those of the output.
    pub(crate) fn unshared_blocks(&self) -> u32 {
        self.blocks() - self.hashed_blocks
    }

    /// How long its answer may become: what has not ended goes on, however much shorter it was
    /// expected to be.
    pub(crate) fn longest_answer(&self) -> u32 {
        self.max_tokens.unwrap_or(self.expected_tokens)
    }

    /// What an SGLang sets aside for the rest of its answer.
    pub(crate) fn promised(&self) -> Promised {
        Promised::new(self.max_tokens, self.ignores_eos, self.generated_tokens)
    }

    /// Full blocks of output it has filled. Its engine keeps them like any full block, whether or
    /// not their tokens are known here. The last token is not stored: nothing
    /// followed it.
    pub(crate) fn output_blocks(&self) -> u32 {
        let stored = u64::from(self.generated_tokens).saturating_sub(1);
        let full = (u64::from(self.prompt_tokens) + stored) / u64::from(self.block_size);
        let full = u32::try_from(full).unwrap_or(u32::MAX);
        (full - full % self.stride).saturating_sub(self.hashed_blocks)
    }

    /// Blocks that an SGLang frees for it beyond those it takes: one, but not yet where its last
    /// two tokens began a block. The last was not stored, and the one before needed no more than
    /// there was when it was asked for.
    pub(crate) fn headroom(&self) -> u32 {
        let asked_for = self.blocks_after(self.generated_tokens.saturating_sub(2));
        asked_for
            .saturating_add(self.stride)
            .saturating_sub(self.blocks())
    }

    pub(crate) fn context_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.generated_tokens)
    }
}
