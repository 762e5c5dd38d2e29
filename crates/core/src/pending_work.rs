//! Pending work of one worker: its prefill backlog and its decode batch.
//!
//! Every booking and every token updates the totals in whole numbers. The release of a booking
//! therefore subtracts exactly its current contribution. Durations in seconds are not stored. They
//! are computed when they are needed, with the current latency model.

use std::collections::VecDeque;
use std::time::Duration;

use foresee_forecast::{ArrivalRate, LatencyEstimator, LatencyModel, PrefillWork};
use foresee_prefix::counter::Counter;

use crate::queue::{PrefillTotals, QueueTicket, WorkerQueue};
use crate::sglang_admission::OutputReserve;

/// Phase of a request on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The request waits at the router.
    Queued,
    /// The request was sent, and its prompt is not computed yet.
    Prefill {
        /// Serial of the booking. Serials are in the order in which the worker receives requests.
        sent_serial: u64,
    },
    /// The prompt is computed, and the output grows.
    Decode,
}

/// Contribution of one booking to its worker's [`PendingWork`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestWork {
    phase: Phase,
    /// Prefill work of the prompt. Counted until the prefill is done.
    pub(crate) work: PrefillWork,
    /// Output tokens that are expected to be still generated.
    pub(crate) remaining_tokens: u32,
    /// Prompt and output tokens so far.
    pub(crate) context_tokens: u64,
    /// Whether the response is streamed, so that its first token will be observed.
    pub(crate) is_streaming: bool,
}

impl RequestWork {
    /// Returns the contribution of a new request: queued, and streaming.
    /// `remaining_tokens` are the expected output tokens, `context_tokens` the tokens of the
    /// prompt.
    pub(crate) fn new(work: PrefillWork, remaining_tokens: u32, context_tokens: u64) -> Self {
        Self {
            phase: Phase::Queued,
            work,
            remaining_tokens,
            context_tokens,
            is_streaming: true,
        }
    }

    /// Returns whether the prompt is not computed yet.
    pub(crate) fn is_in_prefill(&self) -> bool {
        self.phase != Phase::Decode
    }

    /// Returns the serial under which the request was sent, if it was and its prompt is not computed
    /// yet.
    fn sent_serial(&self) -> Option<u64> {
        match self.phase {
            Phase::Prefill { sent_serial } => Some(sent_serial),
            Phase::Queued | Phase::Decode => None,
        }
    }
}

/// Totals of requests with similar remaining output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DecodeBucket {
    /// Number of requests.
    pub(crate) requests: u32,
    /// Expected remaining output tokens, summed over the requests.
    pub(crate) remaining_tokens: u64,
    /// Prompt and output tokens so far, summed over the requests.
    pub(crate) context_tokens: u64,
}

impl DecodeBucket {
    fn add(&mut self, work: &RequestWork) {
        self.requests += 1;
        self.remaining_tokens += u64::from(work.remaining_tokens);
        self.context_tokens += work.context_tokens;
    }

    fn subtract(&mut self, work: &RequestWork) {
        self.requests.subtract(1);
        self.remaining_tokens.subtract(work.remaining_tokens.into());
        self.context_tokens.subtract(work.context_tokens);
    }
}

/// Number of decode buckets. The first contains requests with fewer than eight remaining tokens,
/// each further one requests with up to twice as many as the bucket before it, and the last all
/// others.
pub(crate) const DECODE_BUCKETS: usize = 12;

/// Returns the index of the decode bucket for requests with this many remaining tokens.
fn bucket_of(remaining_tokens: u32) -> usize {
    let eights = remaining_tokens / 8;
    ((u32::BITS - eights.leading_zeros()) as usize).min(DECODE_BUCKETS - 1)
}

/// Assumed time from sending a request until the scheduler of its engine has it, and from a token
/// leaving the engine until it is observed. An observed token therefore describes the engine about
/// this long ago.
const TRANSIT_TIME: Duration = Duration::from_millis(5);

/// Prompt that was sent to the worker.
#[derive(Clone, Copy, Debug)]
struct SentPrompt {
    /// Serial of the booking.
    sent_serial: u64,
    work: PrefillWork,
    /// Time at which the prompt was sent.
    sent_at: Duration,
    /// Whether the prompt is computed or its request has ended. Such an entry stays until it
    /// reaches the front.
    is_done: bool,
    /// Whether the first token will be observed.
    is_streaming: bool,
}

/// Prefill backlog and decode batch of one worker, with the models that turn them into seconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct PendingWork {
    /// Decoding requests, by their expected remaining output.
    decode_buckets: [DecodeBucket; DECODE_BUCKETS],
    /// Bit set of the decode buckets that contain a request.
    nonempty_buckets: u16,
    /// Sum of all decode buckets.
    decode_totals: DecodeBucket,
    /// Requests in prefill: queued at the router, or sent and not computed yet.
    pub(crate) prefill_requests: DecodeBucket,
    /// Prefill work of those requests.
    pub(crate) prefill_work: PrefillWork,
    /// Requests that wait at the router for this worker.
    pub(crate) queue: WorkerQueue,
    /// Prompts that were sent and are not computed yet, in the order in which the worker computes
    /// them.
    prefill_queue: VecDeque<SentPrompt>,
    /// Serial of the latest booking whose prefill is known to have started, and when that became
    /// known.
    last_started: (u64, Duration),
    /// Speed of this worker relative to its latency model.
    pub(crate) latency: LatencyEstimator,
    /// Index of the group of workers with which this worker shares a
    /// [latency model](foresee_forecast::SharedLatencyModel).
    pub(crate) latency_group: usize,
    /// Recent arrivals of requests at this worker.
    pub(crate) arrival_rate: ArrivalRate,
    /// Memory that SGLang reserves for outputs.
    pub(crate) output_reserve: OutputReserve,
    /// KV blocks of the worker. `None` if the number is only assumed.
    pub(crate) capacity: Option<u32>,
}

impl PendingWork {
    /// Returns the pending work of an idle worker in the latency group with this index.
    pub(crate) fn new(latency_group: usize) -> Self {
        Self {
            latency_group,
            ..Self::default()
        }
    }

    /// Adds a request that waits for its prefill, at the router or at the worker. The caller adds
    /// it to [`queue`](Self::queue) if it waits at the router.
    pub(crate) fn add_prefill(&mut self, work: &RequestWork) {
        debug_assert!(
            work.is_in_prefill(),
            "a request enters with its prefill ahead"
        );
        self.prefill_requests.add(work);
        self.prefill_work += work.work;
    }

    /// Records that the request is sent to the worker `now`, as the booking `serial`, which is also
    /// stored in `work`. The request must have been [added](Self::add_prefill), and serials must
    /// ascend. All times in this module are since the epoch that the caller of the router chose.
    pub(crate) fn mark_sent(&mut self, work: &mut RequestWork, serial: u64, now: Duration) {
        work.phase = Phase::Prefill {
            sent_serial: serial,
        };
        self.prefill_queue.push_back(SentPrompt {
            sent_serial: serial,
            work: work.work,
            sent_at: now,
            is_done: false,
            is_streaming: work.is_streaming,
        });
    }

    /// Returns the prompts that were sent to the worker and are not computed yet.
    pub(crate) fn sent_totals(&self) -> PrefillTotals {
        let mut sent = self.prefill_totals();
        sent -= self.queue.totals();
        sent
    }

    /// Returns the prompts that were sent to the worker and are not computed yet, apart from the
    /// first of them.
    pub(crate) fn sent_after_first(&self) -> PrefillTotals {
        let mut sent = self.sent_totals();
        if let Some(first) = self.prefill_queue.front() {
            sent.requests = sent.requests.saturating_sub(1);
            sent.work.new_tokens = sent.work.new_tokens.saturating_sub(first.work.new_tokens);
            let pairs = &mut sent.work.attention_pairs;
            *pairs = pairs.saturating_sub(first.work.attention_pairs);
        }
        sent
    }

    /// Returns all prompts that are not computed yet, queued at the router or sent.
    fn prefill_totals(&self) -> PrefillTotals {
        PrefillTotals {
            requests: self.prefill_requests.requests,
            work: self.prefill_work,
        }
    }

    /// Moves a dispatched request from prefill to decode: its prompt leaves the prefill backlog,
    /// and the request joins the decode batch. `work` is marked as decoding. Returns whether the
    /// request was in prefill; if it was not, nothing changes.
    pub(crate) fn finish_prefill(&mut self, work: &mut RequestWork) -> bool {
        if !work.is_in_prefill() {
            return false;
        }
        self.remove(work);
        work.phase = Phase::Decode;
        self.add_to_bucket(work);
        true
    }

    /// Records that the worker has started the prefill of this request, and so of all that were
    /// sent before it. No effect if a later request is known to have started.
    pub(crate) fn mark_started(&mut self, work: &RequestWork, now: Duration) {
        if let Some(serial) = work.sent_serial()
            && serial > self.last_started.0
        {
            self.last_started = (serial, now);
        }
    }

    /// Returns the serial of the earliest booking that was sent so recently that an engine step
    /// which starts now may not include it. `None` if no prompt was sent so recently.
    pub(crate) fn oldest_in_transit(&self, now: Duration) -> Option<u64> {
        let latest = self.prefill_queue.iter().rev();
        let in_transit =
            latest.take_while(|prompt| now.saturating_sub(prompt.sent_at) < TRANSIT_TIME);
        in_transit.last().map(|prompt| prompt.sent_serial)
    }

    /// Returns when a request whose tokens are not observed got its first token, or `None` if it is
    /// not assumed to have one yet. The request must be dispatched. All times are since the epoch
    /// that the caller of the router chose.
    ///
    /// Engines start requests in the order in which they arrive. So the request has its first token
    /// if a later request is known to have started, at the time when that became known. Otherwise
    /// it is assumed to have it at the predicted time `due`, unless an earlier request whose tokens
    /// are observed still waits for its own.
    pub(crate) fn inferred_first_token_at(
        &self,
        work: &RequestWork,
        due: Duration,
        now: Duration,
    ) -> Option<Duration> {
        let serial = work.sent_serial()?;
        if serial <= self.last_started.0 {
            return Some(self.last_started.1);
        }
        let is_observed_and_earlier =
            |prompt: &SentPrompt| prompt.is_streaming && prompt.sent_serial < serial;
        let is_blocked = self
            .prefill_queue
            .front()
            .is_some_and(is_observed_and_earlier);
        (due <= now && !is_blocked).then_some(due)
    }

    /// Adds a decoding request to its bucket and to the totals.
    fn add_to_bucket(&mut self, work: &RequestWork) {
        let index = bucket_of(work.remaining_tokens);
        self.decode_buckets[index].add(work);
        self.nonempty_buckets |= 1 << index;
        self.decode_totals.add(work);
    }

    /// Removes a decoding request from its bucket and from the totals.
    fn remove_from_bucket(&mut self, work: &RequestWork) {
        let index = bucket_of(work.remaining_tokens);
        self.decode_buckets[index].subtract(work);
        if self.decode_buckets[index].requests == 0 {
            self.nonempty_buckets &= !(1 << index);
        }
        self.decode_totals.subtract(work);
    }

    /// Returns the decode buckets that contain a request.
    pub(crate) fn decode_buckets(&self) -> impl Iterator<Item = &DecodeBucket> {
        let mut remaining = self.nonempty_buckets;
        std::iter::from_fn(move || {
            let bucket = self
                .decode_buckets
                .get(remaining.trailing_zeros() as usize)?;
            remaining &= remaining - 1;
            Some(bucket)
        })
    }

    /// Updates the expected remaining output and the context tokens of a request, in either phase,
    /// in `work` and in the totals. The prefill work stays as it is.
    pub(crate) fn update_decode(
        &mut self,
        work: &mut RequestWork,
        remaining_tokens: u32,
        context_tokens: u64,
    ) {
        let is_in_prefill = work.is_in_prefill();
        if is_in_prefill {
            self.prefill_requests.subtract(work);
        } else {
            self.remove_from_bucket(work);
        }
        work.remaining_tokens = remaining_tokens;
        work.context_tokens = context_tokens;
        if is_in_prefill {
            self.prefill_requests.add(work);
        } else {
            self.add_to_bucket(work);
        }
    }

    /// Removes a request that has ended or moves to another worker, in either phase. `work` must be
    /// as it was last added or updated. The caller removes the request from [`queue`](Self::queue)
    /// if it waits there.
    pub(crate) fn remove(&mut self, work: &RequestWork) {
        if work.is_in_prefill() {
            self.prefill_requests.subtract(work);
            self.prefill_work -= work.work;
            if let Some(serial) = work.sent_serial() {
                self.leave_prefill_queue(serial);
            }
        } else {
            self.remove_from_bucket(work);
        }
    }

    /// Marks a sent prompt as done, and drops done prompts from the front. A serial without a sent
    /// prompt is ignored.
    fn leave_prefill_queue(&mut self, sent_serial: u64) {
        if let Ok(index) = self
            .prefill_queue
            .binary_search_by_key(&sent_serial, |prompt| prompt.sent_serial)
        {
            self.prefill_queue[index].is_done = true;
        }
        while self
            .prefill_queue
            .front()
            .is_some_and(|prompt| prompt.is_done)
        {
            self.prefill_queue.pop_front();
        }
        // A prompt that never finishes must not keep all done prompts behind it in memory.
        if self.prefill_queue.len() > 2 * self.prefill_requests.requests as usize + 64 {
            self.prefill_queue.retain(|prompt| !prompt.is_done);
        }
    }

    /// Returns the time of a decode step with the present decode batch, in seconds; with one request
    /// if the batch is empty.
    pub(crate) fn decode_step_seconds(&self, latency_model: &LatencyModel) -> f64 {
        let (requests, context_tokens) = self.decode_load();
        latency_model.decode_step_seconds(f64::from(requests.max(1)), context_tokens as f64)
    }

    /// Returns the number of decoding requests and their context tokens.
    pub(crate) fn decode_load(&self) -> (u32, u64) {
        (
            self.decode_totals.requests,
            self.decode_totals.context_tokens,
        )
    }

    /// Returns the seconds of prefill left of all prompts, queued at the router or sent.
    pub(crate) fn prefill_backlog_seconds(
        &self,
        latency_model: &LatencyModel,
        now: Duration,
    ) -> f64 {
        self.backlog_seconds(self.prefill_totals(), latency_model, now)
    }

    /// Returns the seconds of prefill left of the prompts that were sent to the worker.
    pub(crate) fn sent_prefill_seconds(&self, latency_model: &LatencyModel, now: Duration) -> f64 {
        self.backlog_seconds(self.sent_totals(), latency_model, now)
    }

    /// Returns how long a prompt with this queue ticket waits until its prefill starts, and which
    /// queued requests it overtakes. The prompt itself must not be part of the pending work yet.
    /// `prefill_seconds` is the prefill time of the prompt, which only decides its position in the
    /// router's queue.
    pub(crate) fn queue_wait(
        &self,
        ticket: &QueueTicket,
        prefill_seconds: f64,
        latency_model: &LatencyModel,
        now: Duration,
    ) -> QueueWait {
        if self.queue.is_empty() {
            return QueueWait {
                wait_seconds: self.prefill_backlog_seconds(latency_model, now),
                ..QueueWait::default()
            };
        }
        let before = self.queue.totals_before(ticket.queue_key(prefill_seconds));
        let (mut ahead, mut overtaken) = (self.sent_totals(), self.queue.totals());
        ahead += before;
        overtaken -= before;
        QueueWait {
            wait_seconds: self.backlog_seconds(ahead, latency_model, now),
            overtaken_requests: overtaken.requests,
            overtaken_prefill_seconds: latency_model
                .prefill_seconds(self.prefill_batches(overtaken), overtaken.work),
        }
    }

    /// Returns the expected number of prefill steps in which these prompts are computed.
    fn prefill_batches(&self, prompts: PrefillTotals) -> f64 {
        f64::from(prompts.requests) / self.latency.mean_prefill_batch()
    }

    /// Returns the seconds of prefill left of `prompts`, which are all that were sent and possibly
    /// some that are queued. Time that has passed since the first one started is subtracted, up to
    /// its forecast. An overdue first prompt is expected to take a fraction of its delay longer.
    fn backlog_seconds(
        &self,
        prompts: PrefillTotals,
        latency_model: &LatencyModel,
        now: Duration,
    ) -> f64 {
        let total = latency_model.prefill_seconds(self.prefill_batches(prompts), prompts.work);
        let Some(first) = self.prefill_queue.front() else {
            return total;
        };
        let first_seconds =
            latency_model.prefill_seconds(1.0 / self.latency.mean_prefill_batch(), first.work);
        let started_at = first.sent_at.max(self.latency.first_token_at());
        let elapsed = now.saturating_sub(started_at).as_secs_f64();
        let first_remaining = if elapsed < first_seconds {
            first_seconds - elapsed
        } else {
            // The prompt should be done. The longer it is overdue, the longer it may take.
            OVERDUE_FACTOR * (elapsed - first_seconds)
        };
        (total - first_seconds).max(0.0) + first_remaining
    }

    /// Returns the prefill backlog in tokens: the tokens of all uncomputed prompts, queued at the
    /// router or sent, less the progress of the first one. Returns 0 if the latency model forecasts
    /// no time for them.
    pub(crate) fn prefill_backlog_tokens(
        &self,
        latency_model: &LatencyModel,
        now: Duration,
    ) -> u64 {
        let total = latency_model.prefill_seconds(
            self.prefill_batches(self.prefill_totals()),
            self.prefill_work,
        );
        if total <= 0.0 {
            return 0;
        }
        let remaining_fraction =
            (self.prefill_backlog_seconds(latency_model, now) / total).min(1.0);
        (self.prefill_work.new_tokens as f64 * remaining_fraction).round() as u64
    }
}

/// Time that a prompt waits for its prefill, and the queued prompts that it overtakes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QueueWait {
    /// Seconds until the prefill starts.
    pub(crate) wait_seconds: f64,
    /// Number of queued prompts that are dispatched after this one.
    pub(crate) overtaken_requests: u32,
    /// Seconds of prefill of those prompts.
    pub(crate) overtaken_prefill_seconds: f64,
}

/// Expected remaining time of an overdue prompt, as a fraction of the time by which it is overdue.
const OVERDUE_FACTOR: f64 = 0.25;

#[cfg(test)]
mod tests {
    use super::*;
    use foresee_forecast::LatencyAccuracy;

    use proptest::prelude::*;

    const LATENCY_MODEL: LatencyModel = LatencyModel {
        prefill_base: 0.01,
        prefill_per_token: 1e-4,
        prefill_per_attention_pair: 0.0,
        decode_base: 0.02,
        decode_per_request: 0.0,
        decode_per_context_token: 0.0,
        prefill_accuracy: LatencyAccuracy::NONE,
        decode_accuracy: LatencyAccuracy::NONE,
    };

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn only_the_first_prompt_of_the_backlog_makes_progress() {
        let mut pending = PendingWork::default();
        let mut first = RequestWork::new(PrefillWork::new(9_900, 9_900), 10, 9_900);
        let mut second = RequestWork::new(PrefillWork::new(1_900, 1_900), 10, 1_900);
        for (serial, work) in [(1, &mut first), (2, &mut second)] {
            pending.add_prefill(work);
            pending.mark_sent(work, serial, at(5.0));
        }
        let backlog = |pending: &PendingWork, seconds| {
            pending.prefill_backlog_seconds(&LATENCY_MODEL, at(seconds))
        };
        assert!((backlog(&pending, 5.0) - 1.2).abs() < 1e-9);
        assert!((backlog(&pending, 5.4) - 0.8).abs() < 1e-9);
        assert!((backlog(&pending, 6.0) - 0.2).abs() < 1e-9);
        // A silent worker is not assumed to have finished its work.
        assert!(backlog(&pending, 10.0) > 1.0);
        pending.finish_prefill(&mut first);
        assert!(backlog(&pending, 5.0) - 0.2 < 1e-9);
        pending.remove(&second);
        pending.remove(&first);
        assert_eq!(backlog(&pending, 6.0), 0.0);
    }

    proptest! {
        /// Compares the totals with a plain list of requests.
        #[test]
        fn removing_requests_restores_the_totals(
            steps in prop::collection::vec((0..4u8, any::<prop::sample::Index>(), 0..20_000u32), 1..200)
        ) {
            let mut pending = PendingWork::default();
            let mut works: Vec<RequestWork> = Vec::new();
            for (serial, (operation, selector, tokens)) in (1..).zip(steps) {
                if operation == 0 || works.is_empty() {
                    let prefill = PrefillWork::new(tokens / 2, tokens);
                    let mut work = RequestWork::new(prefill, tokens % 777, tokens.into());
                    pending.add_prefill(&work);
                    pending.mark_sent(&mut work, serial, Duration::ZERO);
                    works.push(work);
                } else {
                    let index = selector.index(works.len());
                    match operation {
                        1 => drop(pending.finish_prefill(&mut works[index])),
                        2 => pending.update_decode(&mut works[index], tokens % 333, tokens.into()),
                        _ => pending.remove(&works.swap_remove(index)),
                    }
                }
                let in_phase = |is_in_prefill| {
                    works
                        .iter()
                        .filter(move |work| work.is_in_prefill() == is_in_prefill)
                };
                prop_assert_eq!(pending.prefill_requests.requests as usize, in_phase(true).count());
                prop_assert_eq!(pending.prefill_work.new_tokens, in_phase(true).map(|work| work.work.new_tokens).sum::<u64>());
                let attention = in_phase(true).map(|work| work.work.attention_pairs).sum::<u64>();
                prop_assert_eq!(pending.prefill_work.attention_pairs, attention);
                prop_assert_eq!(pending.decode_load().0 as usize, in_phase(false).count());
                let buckets = pending.decode_buckets.iter().filter(|bucket| bucket.requests > 0);
                prop_assert_eq!(pending.decode_buckets().collect::<Vec<_>>(), buckets.collect::<Vec<_>>());
                for (index, bucket) in pending.decode_buckets.iter().enumerate() {
                    let members = in_phase(false).filter(|work| bucket_of(work.remaining_tokens) == index);
                    let remaining = members.map(|work| u64::from(work.remaining_tokens)).sum::<u64>();
                    prop_assert_eq!(bucket.remaining_tokens, remaining);
                }
                let first = in_phase(true).filter_map(RequestWork::sent_serial).min();
                prop_assert_eq!(pending.prefill_queue.front().map(|work| work.sent_serial), first);
                prop_assert!(pending.prefill_queue.len() <= 2 * in_phase(true).count() + 64);
            }
        }
    }
}
