//! The router's internal side of a booking.

use std::task::Waker;
use std::time::Duration;

use foresee_forecast::{LengthClass, PrefillWork, SharedLatencyModel};
use foresee_prefix::{ExpectedHit, NO_NODE, NodeId, Occupancy};

use crate::assessment::RequestAssessment;
use crate::outlier::{ExchangeResult, FailureCharge, ReportedResult};
use crate::pending_work::{PendingWork, RequestWork};
use crate::queue::{QueueKey, QueueTicket};
use crate::request::PreparedRequest;
use crate::sglang_admission::OutputReservation;
use crate::time::duration_from_secs_saturating;
use crate::worker_id::WorkerId;
use crate::workers::Workers;

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

/// Estimated output of a request whose response is not streamed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EstimatedOutput {
    /// Output tokens so far.
    pub(crate) tokens: u32,
    /// Time until the next block should be full; `None` if the output has reached its maximum.
    pub(crate) until_next_block: Option<Duration>,
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

/// Minimum number of decode steps for which the total time of a response that is not streamed is a
/// sample of decode time. With fewer steps, prefill is too large a part of it.
const MIN_STEPS_FOR_LATENCY_SAMPLE: u32 = 16;

/// Part of the charge of a failure that a soft failure adds.
const SOFT_FAILURE_CHARGE: f64 = 0.5;

impl BookingRecord {
    /// Returns the record of a request that is booked on `worker` now, where `cached_blocks` blocks
    /// of its prompt need not be computed. It pins nothing and is not queued.
    pub(crate) fn new(
        serial: u64,
        worker: WorkerId,
        request: &PreparedRequest<'_>,
        assessment: &RequestAssessment,
        cached_blocks: u32,
        now: Duration,
    ) -> Self {
        let prompt = request.prompt;
        let block_size = prompt.block_size().get();
        let uncached_tokens = prompt.tokens().saturating_sub(cached_blocks * block_size);
        let mut work = RequestWork::new(
            PrefillWork::new(uncached_tokens, prompt.tokens()),
            assessment.expected_output_tokens,
            prompt.tokens().into(),
        );
        work.is_streaming = request.is_streaming;
        Self {
            serial,
            worker,
            node: NO_NODE,
            hashed_blocks: 0,
            block_size,
            engine_block_ratio: 1,
            prompt_tokens: prompt.tokens(),
            output_tokens: 0,
            work,
            output: ExpectedOutput {
                length_class: assessment.length_class,
                max_tokens: request.max_tokens,
                ignore_eos: request.ignore_eos,
                client_expected_tokens: request.expected_output_tokens,
                expected_tokens: assessment.expected_output_tokens,
            },
            prefill_confirmed: false,
            output_count_reported: false,
            booked_at: now,
            forecast: PrefillForecast {
                prefill_seconds: 0.0,
                first_token_at: now,
                waits_for_memory: false,
            },
            last_token_at: now,
            last_known: KnownProgress {
                at: now,
                output_tokens: 0,
            },
            ticket: assessment.ticket,
            queued: None,
            expected_hit: None,
            reported: ReportedResult::Unknown,
        }
    }

    /// Adds the booking to the pending work of its worker, and predicts its prefill time and the time
    /// of its first token. Returns the time of a decode step of the worker without load, in seconds.
    pub(crate) fn join(
        &mut self,
        pending_work: &mut PendingWork,
        shared_model: &SharedLatencyModel,
        now: Duration,
    ) -> f64 {
        let latency_model = pending_work.latency.latency_model(shared_model, now);
        let batch_share = 1.0 / pending_work.latency.mean_prefill_batch();
        let prefill_seconds = latency_model.prefill_seconds(batch_share, self.work.work);
        let queue_wait =
            pending_work.queue_wait(&self.ticket, prefill_seconds, &latency_model, now);
        let ttft = duration_from_secs_saturating(queue_wait.wait_seconds + prefill_seconds);
        self.forecast.prefill_seconds = prefill_seconds;
        self.forecast.first_token_at = now.saturating_add(ttft);
        pending_work.add_prefill(&self.work);
        latency_model.decode_base
    }

    /// Learns from the time of the first token of a streamed response. Returns whether it is the
    /// first token of a new step of the engine.
    pub(crate) fn observe_first_token(
        &mut self,
        pending_work: &mut PendingWork,
        shared_model: &mut SharedLatencyModel,
        now: Duration,
    ) -> bool {
        self.last_token_at = now;
        if self.work.work.new_tokens == 0 {
            return false;
        }
        pending_work
            .latency
            .record_ttft_error(self.predicted_ttft(), now.saturating_sub(self.booked_at));
        pending_work.mark_started(&self.work, now);
        pending_work.latency.observe_first_token(
            shared_model,
            self.work.work,
            self.booked_at,
            self.forecast.waits_for_memory,
            now,
        )
    }

    /// Learns the time of decode steps from the whole output of a response that was not streamed.
    /// The time of its first token was at best forecast. The error, a part of the prefill time, is
    /// small only over many steps.
    pub(crate) fn observe_whole_output(
        &self,
        pending_work: &mut PendingWork,
        shared_model: &mut SharedLatencyModel,
        now: Duration,
    ) {
        let steps = self.output_tokens.saturating_sub(1);
        let has_first_token = self.last_known.output_tokens > 0;
        if !has_first_token || steps < MIN_STEPS_FOR_LATENCY_SAMPLE {
            return;
        }
        let beside_prefill = pending_work.sent_totals().requests > 0;
        let decode_load = pending_work.decode_load();
        pending_work.latency.observe_step(
            shared_model,
            steps,
            now.saturating_sub(self.last_token_at),
            beside_prefill,
            decode_load,
            now,
        );
    }

    /// Returns the time from the booking to the first token, as predicted at the booking.
    fn predicted_ttft(&self) -> Duration {
        self.forecast.first_token_at.saturating_sub(self.booked_at)
    }

    /// Returns the predicted time from the booking to the first byte of the response: see
    /// [`Booking::predicted_first_byte`](crate::booking::Booking::predicted_first_byte). The decode
    /// steps are predicted for the present decode batch.
    pub(crate) fn predicted_first_byte(
        &self,
        workers: &Workers,
        now: Duration,
    ) -> Option<Duration> {
        if self.work.is_streaming {
            return Some(self.predicted_ttft());
        }
        let step_seconds = workers.decode_step_seconds(self.worker, now)?;
        let output_seconds = step_seconds * f64::from(self.output.max_tokens?);
        let output = duration_from_secs_saturating(output_seconds);
        Some(self.predicted_ttft().saturating_add(output))
    }

    /// Returns the predicted time that the request takes of its worker: its prefill, and what it
    /// adds to each decode step.
    pub(crate) fn service_time(&self, workers: &Workers, now: Duration) -> Duration {
        let output_tokens = f64::from(self.output.expected_tokens);
        let mean_context = f64::from(self.prompt_tokens) + output_tokens / 2.0;
        let seconds_per_step = workers.pending_work(self.worker).map(|pending_work| {
            let model = workers.latency_now(pending_work, now);
            model.decode_per_request + model.decode_per_context_token * mean_context
        });
        duration_from_secs_saturating(
            self.forecast.prefill_seconds + output_tokens * seconds_per_step.unwrap_or_default(),
        )
    }

    /// Returns the charge that a failure of the request adds to the cost of its worker: the time to
    /// first token that was predicted for it and the decode of its output, or the time that the
    /// failure took if that is longer; the blocks that it would have occupied and computed, the
    /// latter with `overlap_weight`; and one request. Zero if the result is no failure.
    pub(crate) fn failure_charge(
        &self,
        result: ExchangeResult,
        workers: &Workers,
        overlap_weight: f64,
        now: Duration,
    ) -> FailureCharge {
        let factor = match result {
            ExchangeResult::Failure => 1.0,
            ExchangeResult::SoftFailure => SOFT_FAILURE_CHARGE,
            ExchangeResult::Success | ExchangeResult::Backpressure { .. } => {
                return FailureCharge::default();
            }
        };
        let step_seconds = workers.decode_step_seconds(self.worker, now);
        let decode = f64::from(self.output.expected_tokens) * step_seconds.unwrap_or_default();
        let elapsed = now.saturating_sub(self.booked_at);
        let uncached_blocks = self.work.work.new_tokens as f64 / f64::from(self.block_size);
        FailureCharge {
            seconds: (self.predicted_ttft().as_secs_f64() + decode).max(elapsed.as_secs_f64()),
            blocks: overlap_weight * uncached_blocks + f64::from(self.blocks()),
            requests: 1.0,
        }
        .scaled(factor)
    }

    /// Records that the first token of a response that is not streamed is taken to have been
    /// generated at this time.
    pub(crate) fn begin_estimated_output(&mut self, first_token_at: Duration) {
        self.last_token_at = first_token_at;
        self.last_known = KnownProgress {
            at: first_token_at,
            output_tokens: self.output.expected_tokens.min(1),
        };
    }

    /// Returns the output that the request should have now, extrapolated from its latest known
    /// output with decode steps of `step_seconds`.
    pub(crate) fn estimated_output(&self, step_seconds: f64, now: Duration) -> EstimatedOutput {
        let KnownProgress { at, output_tokens } = self.last_known;
        let steps = now.saturating_sub(at).as_secs_f64() / step_seconds;
        let max_tokens = self.max_output_tokens().max(output_tokens);
        let tokens = output_tokens.saturating_add(steps as u32).min(max_tokens);
        let context_tokens = self.prompt_tokens.saturating_add(tokens);
        let tokens_to_next_block =
            self.block_size - context_tokens.saturating_sub(1) % self.block_size;
        let until_next_block =
            duration_from_secs_saturating(step_seconds).saturating_mul(tokens_to_next_block);
        EstimatedOutput {
            tokens,
            until_next_block: (tokens < max_tokens).then_some(until_next_block),
        }
    }

    /// Returns the least output with which the request fills `blocks` blocks. The token after the
    /// last stored one is generated too. `None` if that exceeds the limit of the output.
    pub(crate) fn output_with_stored_blocks(&self, blocks: u32) -> Option<u32> {
        let stored_tokens = blocks.saturating_mul(self.block_size);
        let output_tokens = stored_tokens
            .saturating_sub(self.prompt_tokens)
            .saturating_add(1);
        let exceeds = |max_tokens| output_tokens > max_tokens;
        (!self.output.max_tokens.is_some_and(exceeds)).then_some(output_tokens)
    }

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
