//! Numbers of each worker from which a lower bound of its marginal delay follows, as columns that a
//! vectorised loop reads.
//!
//! A column has one entry per worker index. Entries are single precision: a bound needs no more, and
//! four of them fit into a vector register of any x86-64. The entries of a worker are stale while its
//! pending work changes, and are written again before the next decision.

use std::time::Duration;

use foresee_prefix::WorkerIndex;

use crate::pending_work::PendingWork;

/// Time for which entries are valid. The weight of a speed factor changes little meanwhile.
const VALID_FOR: Duration = Duration::from_secs(5);

/// Columns with the numbers of every worker.
#[derive(Debug, Default)]
pub(crate) struct BoundColumns {
    /// Index of the latency group.
    pub(crate) group: Vec<usize>,
    /// Speed factor of prefill, and its weight relative to the mean of the group at the start and at
    /// the end of the interval for which the entries are valid.
    pub(crate) prefill_factor: [Vec<f32>; 3],
    /// Speed factor of decode, and its weights.
    pub(crate) decode_factor: [Vec<f32>; 3],
    /// Prefill steps for each prompt.
    pub(crate) steps_per_prompt: Vec<f32>,
    /// Dispatched prompts that are not computed yet, apart from the first: prefill steps, tokens
    /// and attention pairs.
    pub(crate) backlog: [Vec<f32>; 3],
    /// Decoding requests and their context tokens; 0 unless a new prompt would start at once.
    pub(crate) decoding: [Vec<f32>; 2],
    /// Smallest mean of the remaining output tokens of a decode bucket.
    pub(crate) min_remaining: Vec<f32>,
    /// Mean time of a decode step while prompts are computed, in seconds.
    pub(crate) mixed_step: Vec<f32>,
    /// Arrivals per second, the fraction of the time that their prefills take, as of `arrivals_at`,
    /// and the mean time for which an arrival counts, in seconds.
    pub(crate) arrivals: [Vec<f32>; 3],
    /// Time of `arrivals`, in seconds.
    pub(crate) arrivals_at: Vec<f64>,
    /// Interval for which the entries are valid.
    valid: [Duration; 2],
    /// Workers whose entries are to be written again.
    stale: Vec<WorkerIndex>,
    /// Whether a worker is in `stale`.
    is_stale: Vec<bool>,
}

impl BoundColumns {
    /// Records that the pending work of a worker may change.
    pub(crate) fn mark_stale(&mut self, index: WorkerIndex) {
        let position = index as usize;
        if position >= self.is_stale.len() {
            self.extend(position + 1);
        }
        if !std::mem::replace(&mut self.is_stale[position], true) {
            self.stale.push(index);
        }
    }

    /// Returns whether every entry is valid at `now`.
    pub(crate) fn are_current(&self, now: Duration) -> bool {
        self.stale.is_empty() && now <= self.valid[1]
    }

    /// Makes every entry valid at `now`, which never goes back: writes the stale ones again.
    pub(crate) fn refresh(&mut self, pending_work: &[PendingWork], now: Duration) {
        if now > self.valid[1] {
            self.valid = [now, now.saturating_add(VALID_FOR)];
            for index in 0..pending_work.len() {
                self.mark_stale(index as WorkerIndex);
            }
        }
        while let Some(index) = self.stale.pop() {
            self.is_stale[index as usize] = false;
            if let Some(pending) = pending_work.get(index as usize) {
                self.write(index as usize, pending);
            }
        }
    }

    /// Extends every column to `length` entries.
    fn extend(&mut self, length: usize) {
        let Self {
            group,
            prefill_factor: [prefill, prefill_start, prefill_end],
            decode_factor: [decode, decode_start, decode_end],
            steps_per_prompt,
            backlog: [steps, tokens, pairs],
            decoding: [requests, context],
            min_remaining,
            mixed_step,
            arrivals: [arrivals, utilisations, memories],
            arrivals_at,
            is_stale,
            stale: _,
            valid: _,
        } = self;
        for column in [
            prefill,
            prefill_start,
            prefill_end,
            decode,
            decode_start,
            decode_end,
            steps_per_prompt,
            steps,
            tokens,
            pairs,
            requests,
            context,
            min_remaining,
            mixed_step,
            arrivals,
            utilisations,
            memories,
        ] {
            column.resize(length, 0.0);
        }
        group.resize(length, 0);
        arrivals_at.resize(length, 0.0);
        is_stale.resize(length, false);
    }

    /// Writes the entries of one worker.
    fn write(&mut self, index: usize, pending: &PendingWork) {
        let factors = pending.latency.speed_factors(self.valid);
        for (columns, factor) in [
            (&mut self.prefill_factor, factors.prefill),
            (&mut self.decode_factor, factors.decode),
        ] {
            let [start, end] = factor.weights;
            for (column, value) in columns.iter_mut().zip([factor.value, start, end]) {
                column[index] = value as f32;
            }
        }
        let steps_per_prompt = 1.0 / pending.latency.mean_prefill_batch();
        let backlog = pending.sent_after_first();
        self.group[index] = pending.latency_group;
        self.steps_per_prompt[index] = steps_per_prompt as f32;
        self.backlog[0][index] = (f64::from(backlog.requests) * steps_per_prompt) as f32;
        self.backlog[1][index] = backlog.work.new_tokens as f32;
        self.backlog[2][index] = backlog.work.attention_pairs as f32;
        let starts_at_once = pending.prefill_requests.requests == 0;
        let (requests, context) = if starts_at_once {
            pending.decode_load()
        } else {
            (0, 0)
        };
        self.decoding[0][index] = requests as f32;
        self.decoding[1][index] = context as f32;
        let means = pending
            .decode_buckets()
            .map(|bucket| bucket.remaining_tokens as f32 / bucket.requests as f32);
        self.min_remaining[index] = means.fold(f32::INFINITY, f32::min).clamp(1.0, 1e9);
        self.mixed_step[index] = pending.latency.mixed_step_seconds() as f32;
        let arrivals = pending.arrival_rate.rates_at_last_update();
        self.arrivals[0][index] = arrivals.requests as f32;
        self.arrivals[1][index] = arrivals.prefill_utilisation as f32;
        self.arrivals[2][index] = arrivals.memory_seconds as f32;
        self.arrivals_at[index] = arrivals.updated_at.as_secs_f64();
    }
}
