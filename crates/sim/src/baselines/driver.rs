//! Driver of an informed baseline: shows it the engines, asks it for a worker for each request, and
//! books the request there.
//!
//! The baseline replaces the router's policy only; bookings and queue are those of the router. The
//! driver books by excluding all other workers from the router's choice.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::router::{Request, RouteError, Router};
use foresee_core::sequence::Sequence;
use foresee_core::workers::WorkerId;
use rand::SeedableRng;
use rand::rngs::SmallRng;

pub(crate) use super::view::EngineState;
use super::view::{DecisionView, EngineView, InformedPolicy, Metrics};
use crate::engine::{Engine, EngineConfig};
use crate::step_time::BatchLoad;

/// A request for which a worker is to be chosen.
pub(crate) struct ArrivingRequest<'a> {
    /// Index of the request in the workload.
    pub(crate) request: usize,
    /// Prompt of the request.
    pub(crate) prompt: &'a Sequence,
    /// Output tokens of the request, for the oracle.
    pub(crate) output_tokens: u32,
}

/// A baseline, and the inputs that are tracked for it between requests.
pub(crate) struct PolicyDriver {
    policy: Box<dyn InformedPolicy>,
    rng: SmallRng,
    /// By worker: metrics at the latest scrape.
    metrics: Vec<Metrics>,
    /// Number of scrape times that have passed. Scrapes are due at multiples of the interval, from
    /// zero on.
    scrapes: u64,
    /// By worker: unfinished prefills.
    prefills: Vec<PendingPrefills>,
}

impl fmt::Debug for PolicyDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyDriver").finish_non_exhaustive()
    }
}

impl PolicyDriver {
    /// Creates the driver of `policy`, which breaks ties at random by `seed`.
    pub(crate) fn new(policy: Box<dyn InformedPolicy>, seed: u64) -> Self {
        Self {
            policy,
            rng: SmallRng::seed_from_u64(seed),
            metrics: Vec::new(),
            scrapes: 0,
            prefills: Vec::new(),
        }
    }

    /// Scrapes the metrics of the engines if a scrape is due before `now`. Nothing may have changed
    /// between that time and `now`. Each engine comes with its engine block ratio. Does nothing if
    /// the baseline uses no metrics. `now` is the time since the start of the replay.
    pub(crate) fn scrape_before<'a>(
        &mut self,
        now: Duration,
        engines: impl Iterator<Item = (&'a Engine, u32)>,
    ) {
        let Some(interval) = self.policy.scrape_interval() else {
            return;
        };
        let due = now.as_nanos().div_ceil(interval.as_nanos()) as u64;
        if due > self.scrapes {
            self.scrapes = due;
            self.metrics.clear();
            self.metrics
                .extend(engines.map(|(engine, engine_block_ratio)| Metrics {
                    waiting: engine.waiting() as u32,
                    used_blocks: engine.pinned_blocks().saturating_mul(engine_block_ratio),
                    blocks: engine.capacity().saturating_mul(engine_block_ratio),
                }));
        }
    }

    /// Chooses a worker by the baseline and books the request there. The request counts as a
    /// pending prefill of the worker until [`prefilled`](Self::prefilled). `engine_state` returns
    /// the true state of a worker's engine.
    ///
    /// # Errors
    /// If no worker is available.
    pub(crate) fn route<'a>(
        &mut self,
        arriving: &ArrivingRequest<'_>,
        router: &Router,
        now: Duration,
        engine_state: impl Fn(WorkerId) -> EngineState<'a>,
    ) -> Result<Booking, RouteError> {
        let prompt = arriving.prompt;
        let request = Request::new(prompt);
        let block_size = prompt.block_size().get();
        let max_reusable_blocks = prompt.max_reusable_blocks();
        let explanation = router.explain(&request, now)?;
        let candidates = explanation.candidates;
        let workers: Vec<EngineView<'_>> = candidates
            .iter()
            .map(|candidate| {
                let state = engine_state(candidate.id);
                let worker = state.worker;
                if self.prefills.len() <= worker {
                    self.prefills
                        .resize_with(worker + 1, PendingPrefills::default);
                }
                let prefills = &self.prefills[worker];
                let prefix_match = candidate.prefix_match;
                let overlap = prefix_match.overlap().min(max_reusable_blocks);
                let new_tokens = prompt.tokens() - overlap * block_size;
                EngineView {
                    worker,
                    requests: candidate.requests,
                    cached_blocks: prefix_match.cached_blocks.min(max_reusable_blocks),
                    active_blocks_matched: prefix_match.active_blocks.min(max_reusable_blocks),
                    overlap_blocks: overlap,
                    pending_tokens: prefills.uncached_tokens(),
                    pending_seconds: prefills.seconds(now),
                    prefill_seconds: prefill_seconds(
                        state.engine.config(),
                        new_tokens,
                        overlap * block_size,
                    ) / state.speed,
                    metrics: self.metrics.get(worker).copied().unwrap_or_default(),
                    engine: Some(state),
                }
            })
            .collect();
        let view = DecisionView {
            request: arriving.request,
            prompt: prompt.hashes(),
            tokens: prompt.tokens(),
            block_size,
            output_tokens: arriving.output_tokens,
            scrape: self.scrapes,
            workers: &workers,
        };
        let chosen = self.policy.choose(&view, &mut self.rng);
        let worker = &workers[chosen];
        self.prefills[worker.worker].add(
            Prefill {
                request: arriving.request,
                uncached_tokens: view.uncached_tokens(worker),
                seconds: worker.prefill_seconds,
            },
            now,
        );
        let ids = candidates.iter().map(|candidate| candidate.id);
        let others: Vec<WorkerId> = ids.filter(|&id| id != candidates[chosen].id).collect();
        let request = Request {
            excluded_workers: &others,
            ..request
        };
        router.route(&request, now)
    }

    /// Records that a request's prefill on `worker` is over: the request has its first token, or
    /// was rejected. Ignored if `worker` has no such prefill.
    pub(crate) fn prefilled(&mut self, request: usize, worker: usize, now: Duration) {
        if let Some(prefills) = self.prefills.get_mut(worker) {
            prefills.remove(request, now);
        }
    }
}

/// Unfinished prefills of one worker, in order of arrival.
#[derive(Debug, Default)]
struct PendingPrefills {
    queue: VecDeque<Prefill>,
    /// Time at which the first prefill of the queue started, if the worker computes one prefill at
    /// a time.
    first_started_at: Duration,
}

/// An unfinished prefill.
#[derive(Debug)]
struct Prefill {
    /// Index of the request in the workload.
    request: usize,
    /// Prompt tokens that were not cached when the worker was chosen, according to its KV events.
    uncached_tokens: u32,
    /// Time that an otherwise idle engine needs for the prefill.
    seconds: f64,
}

impl PendingPrefills {
    fn add(&mut self, prefill: Prefill, now: Duration) {
        if self.queue.is_empty() {
            self.first_started_at = now;
        }
        self.queue.push_back(prefill);
    }

    /// Removes the prefill of `request`, if there is one. The first of the others starts at `now`.
    fn remove(&mut self, request: usize, now: Duration) {
        let is_of_request = |prefill: &Prefill| prefill.request == request;
        if let Some(index) = self.queue.iter().position(is_of_request) {
            self.queue.remove(index);
            self.first_started_at = now;
        }
    }

    /// Returns the uncached tokens of all prefills.
    fn uncached_tokens(&self) -> u64 {
        let tokens = self.queue.iter();
        tokens
            .map(|prefill| u64::from(prefill.uncached_tokens))
            .sum()
    }

    /// Returns the time until all prefills are finished, in seconds. A first prefill that is
    /// overdue adds no time.
    fn seconds(&self, now: Duration) -> f64 {
        let total: f64 = self.queue.iter().map(|prefill| prefill.seconds).sum();
        let first = self.queue.front().map_or(0.0, |prefill| prefill.seconds);
        let elapsed = now.saturating_sub(self.first_started_at).as_secs_f64();
        total - elapsed.min(first)
    }
}

/// Returns the time in which an idle engine computes `tokens` after `context` cached tokens, in
/// seconds, by its step-time model without noise. The tokens are computed in chunks of the token
/// budget. The speed of the worker is not included.
fn prefill_seconds(engine: &EngineConfig, tokens: u32, mut context: u32) -> f64 {
    let mut remaining = tokens;
    let mut seconds = 0.0;
    while remaining > 0 {
        let chunk = remaining.min(engine.max_num_batched_tokens.max(1));
        let mut load = BatchLoad::default();
        load.add_prefill(chunk, context);
        seconds += engine.step_time.mean(&load).as_secs_f64();
        context += chunk;
        remaining -= chunk;
    }
    seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn second(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_pending_time_shrinks_while_the_first_prefill_runs() {
        let prefill = |request, seconds| Prefill {
            request,
            uncached_tokens: 10,
            seconds,
        };
        let mut prefills = PendingPrefills::default();
        prefills.add(prefill(0, 2.0), second(10));
        prefills.add(prefill(1, 3.0), second(11));
        assert_eq!(prefills.seconds(second(11)), 4.0);
        assert_eq!(prefills.uncached_tokens(), 20);
        assert_eq!(prefills.seconds(second(19)), 3.0, "overdue, not finished");
        prefills.remove(0, second(20));
        assert_eq!(prefills.seconds(second(21)), 2.0);
        assert_eq!(prefills.uncached_tokens(), 10);
        prefills.remove(1, second(24));
        assert_eq!(prefills.seconds(second(25)), 0.0);
        prefills.add(prefill(2, 1.0), second(30));
        assert_eq!(prefills.seconds(second(30)), 1.0);
    }
}
