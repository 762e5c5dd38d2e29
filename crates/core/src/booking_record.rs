//! The router's internal side of a booking.

use std::task::Waker;
use std::time::Duration;

use foresee_forecast::LengthClass;
use foresee_prefix::{ExpectedHit, NodeId, Occupancy};

use crate::outlier::ReportedResult;
use crate::pending_work::RequestWork;
use crate::queue::{QueueKey, QueueTicket};
use crate::sglang_admission::OutputReservation;
use crate::worker_id::WorkerId;

/// State of a booking whose request is queued at the router.
#[derive(Debug)]
pub(crate) struct QueuedState {
    /// Sort key in the worker's queue.
    pub(crate) key: QueueKey,
    /// Whether the request may choose a worker again when it is polled next. Set when its worker
    /// accepts no more requests, or when another worker has slack.
    pub(crate) rebalance_offered: bool,
    /// Time before which slack of other workers does not lead to an offer.
    pub(crate) rebalance_not_before: Duration,
    /// Wakes the task that waits for the dispatch of the request.
    pub(crate) waker: Option<Waker>,
}

/// Output that a request whose response is not streamed is known to have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KnownProgress {
    /// Time at which the request had this output.
    pub(crate) at: Duration,
    /// Output tokens at that time. 0 until the request is taken to have its first token.
    pub(crate) output_tokens: u32,
}

/// Limits of a request's output, and its expected length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpectedOutput {
    /// Length class of the output.
    pub(crate) length_class: LengthClass,
    /// Maximum number of output tokens, if the client sets one.
    pub(crate) max_tokens: Option<u32>,
    /// Whether the engine generates `max_tokens` tokens whatever the model predicts.
    pub(crate) ignore_eos: bool,
    /// Number of output tokens that the client expects.
    pub(crate) client_expected_tokens: Option<u32>,
    /// Number of output tokens that was forecast at the booking.
    pub(crate) expected_tokens: u32,
}

/// Prefill of a request, as forecast at its booking.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrefillForecast {
    /// Prefill time of the prompt, in seconds.
    pub(crate) prefill_seconds: f64,
    /// Time of the first token.
    pub(crate) first_token_at: Duration,
    /// Whether the bookings of the worker exceed its capacity with this one. The first token then
    /// says little about prefill time, because the request may wait for memory.
    pub(crate) waits_for_memory: bool,
}

/// The router's internal side of a booking: all that the booking added to the numbers of its
/// worker, so that its release subtracts exactly that.
///
/// It has many fields because each contribution is stored where it was made: a sum of contributions
/// could not be taken back exactly.
#[derive(Debug)]
pub(crate) struct BookingRecord {
    /// Number of the booking; see [`BookingId`].
    pub(crate) serial: u64,
    pub(crate) worker: WorkerId,
    /// End of the request's path in the active tree, to be unpinned as dispatched or as queued.
    pub(crate) node: NodeId,
    /// Blocks of the prompt that are pinned through the tree. No other request shares the rest of
    /// the request's blocks.
    pub(crate) hashed_blocks: u32,
    /// Tokens per block of the router.
    pub(crate) block_size: u32,
    /// Engine block size ÷ router block size.
    pub(crate) engine_block_ratio: u32,
    pub(crate) prompt_tokens: u32,
    /// Output tokens generated so far, as reported or estimated.
    pub(crate) output_tokens: u32,
    /// Contribution to the worker's pending work.
    pub(crate) work: RequestWork,
    /// Limits of the output, and its expected length.
    pub(crate) output: ExpectedOutput,
    /// Whether the worker is known to have computed the prompt. A report of its output shows that;
    /// a forecast does not.
    pub(crate) prefill_confirmed: bool,
    /// Whether `output_tokens` was reported. Otherwise it is an estimate.
    pub(crate) output_count_reported: bool,
    /// Time of this booking. Unless the request is queued, it was sent to its worker then.
    pub(crate) booked_at: Duration,
    /// Queue ticket, kept when the request is booked again.
    pub(crate) ticket: QueueTicket,
    /// Prefill, as forecast at the booking.
    pub(crate) forecast: PrefillForecast,
    /// Queue state; `None` once the request is dispatched. Boxed, because few bookings are queued.
    pub(crate) queued: Option<Box<QueuedState>>,
    /// Time of the latest output token. If the response is not streamed: the assumed time of the
    /// first token.
    pub(crate) last_token_at: Duration,
    /// Latest known output of a request whose response is not streamed, from which its progress is
    /// extrapolated.
    pub(crate) last_known: KnownProgress,
    /// Cache hit that was expected at the booking; `None` once the worker has reported its hit.
    pub(crate) expected_hit: Option<ExpectedHit>,
    /// Result that the caller has reported of the exchange with the worker.
    pub(crate) reported: ReportedResult,
}

impl BookingRecord {
    /// Returns the blocks that the request occupies now, in whole engine blocks.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks_after(self.output_tokens)
    }

    /// Returns the blocks that the request occupies once it has generated `output_tokens` tokens.
    fn blocks_after(&self, output_tokens: u32) -> u32 {
        let tokens = u64::from(self.prompt_tokens) + u64::from(output_tokens);
        let blocks = tokens.div_ceil(u64::from(self.block_size));
        let whole = blocks.next_multiple_of(u64::from(self.engine_block_ratio));
        u32::try_from(whole).unwrap_or(u32::MAX)
    }

    /// Returns what the request occupies on its worker now.
    pub(crate) fn occupancy(&self) -> Occupancy {
        Occupancy {
            blocks: self.blocks(),
            headroom: self.headroom(),
        }
    }

    /// Returns the largest number of output tokens that an estimate may assume. A request that has
    /// not ended may generate up to its limit, however much shorter it was expected to be.
    pub(crate) fn max_output_tokens(&self) -> u32 {
        self.output
            .max_tokens
            .unwrap_or(self.output.expected_tokens)
    }

    /// Returns the output that the request may still generate, for which SGLang reserves memory.
    pub(crate) fn output_reservation(&self) -> OutputReservation {
        let ExpectedOutput {
            max_tokens,
            ignore_eos,
            ..
        } = self.output;
        OutputReservation::new(max_tokens, ignore_eos, self.output_tokens)
    }

    /// Returns the full blocks that the output has filled, in whole engine blocks. The engine
    /// caches them like any full block, whether or not the router knows their tokens. The last
    /// token does not count: its KV is stored when the token after it is computed.
    pub(crate) fn output_blocks(&self) -> u32 {
        let stored = u64::from(self.output_tokens).saturating_sub(1);
        let full = (u64::from(self.prompt_tokens) + stored) / u64::from(self.block_size);
        let full = u32::try_from(full).unwrap_or(u32::MAX);
        (full - full % self.engine_block_ratio).saturating_sub(self.hashed_blocks)
    }

    /// Returns the blocks that SGLang frees for the request in addition to [`blocks`](Self::blocks).
    ///
    /// Before each decode step SGLang makes sure that one engine block per request is free. The
    /// latest such check was before the step that generated the last token. At that time the KV of
    /// all but the last two output tokens was stored. So the result is one engine block, or none
    /// if one of the last two tokens started a block.
    fn headroom(&self) -> u32 {
        let blocks_at_check = self.blocks_after(self.output_tokens.saturating_sub(2));
        blocks_at_check
            .saturating_add(self.engine_block_ratio)
            .saturating_sub(self.blocks())
    }

    /// Returns the prompt and output tokens of the request.
    pub(crate) fn context_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.output_tokens)
    }
}
