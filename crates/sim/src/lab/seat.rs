//! The router's seat: asks a rule for every request, and books where it says.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::fleet::WorkerId;
use foresee_core::router::{Request, RouteError, Router};
use foresee_core::sequence::Sequence;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::LabRule;
pub(crate) use super::view::Standing;
use super::view::{Metrics, Rule, Seen, View};
use crate::engine::{Engine, EngineConfig};
use crate::law::StepLoad;

/// A request that is to be placed.
pub(crate) struct Arriving<'a> {
    /// Its index in the workload.
    pub(crate) request: usize,
    pub(crate) sequence: &'a Sequence,
    /// Answer length.
    pub(crate) output_tokens: u32,
}

/// A rule of the lab, and what is kept for it.
pub(crate) struct Seat {
    rule: Box<dyn Rule>,
    rng: SmallRng,
    metrics: Vec<Metrics>,
    scrapes: u64,
    /// By worker.
    prefills: Vec<Prefills>,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").finish_non_exhaustive()
    }
}

impl Seat {
    pub(crate) fn new(rule: &LabRule, seed: u64) -> Self {
        Self {
            rule: (rule.make)(),
            rng: SmallRng::seed_from_u64(seed),
            metrics: Vec::new(),
            scrapes: 0,
            prefills: Vec::new(),
        }
    }

    /// Asks engines for their metrics if that is due before `now`, since which nothing happened.
    /// Each comes with the number of the router's blocks in one of its own.
    pub(crate) fn scrape_before<'a>(
        &mut self,
        now: Duration,
        engines: impl Iterator<Item = (&'a Engine, u32)>,
    ) {
        let Some(period) = self.rule.scrapes_every() else {
            return;
        };
        let due = now.as_nanos().div_ceil(period.as_nanos()) as u64;
        if due > self.scrapes {
            self.scrapes = due;
            self.metrics.clear();
            self.metrics.extend(engines.map(|(engine, stride)| Metrics {
                waiting: engine.waiting() as u32,
                used_blocks: engine.pinned_blocks().saturating_mul(stride),
                blocks: engine.capacity().saturating_mul(stride),
            }));
        }
    }

    /// Chooses a worker and books the request there.
    ///
    /// # Errors
    /// If no worker is available.
    pub(crate) fn route<'a>(
        &mut self,
        arriving: &Arriving<'_>,
        router: &Router,
        now: Duration,
        standing: impl Fn(WorkerId) -> Standing<'a>,
    ) -> Result<Booking, RouteError> {
        let sequence = arriving.sequence;
        let request = Request::new(sequence);
        let block_size = sequence.block_size().get();
        let reusable = sequence.reusable_blocks();
        let explanation = router.explain(&request, now)?;
        let candidates = explanation.candidates;
        let workers: Vec<Seen<'_>> = candidates
            .iter()
            .map(|candidate| {
                let standing = standing(candidate.id);
                let worker = standing.worker;
                if self.prefills.len() <= worker {
                    self.prefills.resize_with(worker + 1, Prefills::default);
                }
                let prefills = &self.prefills[worker];
                let overlap = candidate.depth.overlap().min(reusable);
                let new_tokens = sequence.tokens() - overlap * block_size;
                Seen {
                    worker,
                    requests: candidate.requests,
                    active_blocks: candidate.active_blocks,
                    cached: candidate.depth.cached.min(reusable),
                    active: candidate.depth.active.min(reusable),
                    overlap,
                    pending_tokens: prefills.tokens(),
                    pending_seconds: prefills.seconds(now),
                    prefill_seconds: prefill_seconds(
                        standing.engine.config(),
                        new_tokens,
                        overlap * block_size,
                    ) / standing.speed,
                    delay: candidate.delay,
                    metrics: self.metrics.get(worker).copied().unwrap_or_default(),
                    standing: Some(standing),
                }
            })
            .collect();
        let view = View {
            request: arriving.request,
            prompt: sequence.hashes(),
            tokens: sequence.tokens(),
            block_size,
            output_tokens: arriving.output_tokens,
            scrape: self.scrapes,
            ttft_weight: explanation.ttft_weight,
            workers: &workers,
        };
        let chosen = self.rule.choose(&view, &mut self.rng);
        let seen = &workers[chosen];
        self.prefills[seen.worker].begin(
            Prefill {
                request: arriving.request,
                tokens: sequence.tokens() - seen.overlap * block_size,
                seconds: seen.prefill_seconds,
            },
            now,
        );
        let ids = candidates.iter().map(|candidate| candidate.id);
        let others: Vec<WorkerId> = ids.filter(|&id| id != candidates[chosen].id).collect();
        let request = Request {
            excluded: &others,
            ..request
        };
        router.route(&request, now)
    }

    /// A request's prefill on `worker` is over: it has its first token, or was refused.
    pub(crate) fn prefilled(&mut self, request: usize, worker: usize, now: Duration) {
        if let Some(prefills) = self.prefills.get_mut(worker) {
            prefills.end(request, now);
        }
    }
}

/// Prefills a worker has not finished, in the order they came.
#[derive(Debug, Default)]
struct Prefills {
    queue: VecDeque<Prefill>,
    /// When the first of them began, if the worker serves them one by one.
    since: Duration,
}

#[derive(Debug)]
struct Prefill {
    request: usize,
    /// Prompt tokens to compute.
    tokens: u32,
    /// How long that takes.
    seconds: f64,
}

impl Prefills {
    fn begin(&mut self, prefill: Prefill, now: Duration) {
        if self.queue.is_empty() {
            self.since = now;
        }
        self.queue.push_back(prefill);
    }

    fn end(&mut self, request: usize, now: Duration) {
        let ended = self.queue.iter().position(|it| it.request == request);
        if let Some(index) = ended {
            self.queue.remove(index);
            self.since = now;
        }
    }

    fn tokens(&self) -> u64 {
        self.queue.iter().map(|it| u64::from(it.tokens)).sum()
    }

    /// Time until all are done.
    fn seconds(&self, now: Duration) -> f64 {
        let all: f64 = self.queue.iter().map(|it| it.seconds).sum();
        let first = self.queue.front().map_or(0.0, |it| it.seconds);
        all - now.saturating_sub(self.since).as_secs_f64().min(first)
    }
}

/// How long an idle engine takes to compute `tokens` behind a cached `context`, by its law.
fn prefill_seconds(engine: &EngineConfig, tokens: u32, mut context: u32) -> f64 {
    let mut left = tokens;
    let mut seconds = 0.0;
    while left > 0 {
        let chunk = left.min(engine.max_num_batched_tokens.max(1));
        let mut load = StepLoad::default();
        load.add_prefill(chunk, context);
        seconds += engine.law.mean(&load).as_secs_f64();
        context += chunk;
        left -= chunk;
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
    fn a_backlog_shrinks_as_its_first_prefill_goes_on() {
        let prefill = |request, tokens| Prefill {
            request,
            tokens,
            seconds: f64::from(tokens) / 1000.0,
        };
        let mut prefills = Prefills::default();
        prefills.begin(prefill(0, 2000), second(10));
        prefills.begin(prefill(1, 3000), second(11));
        assert_eq!(
            (prefills.tokens(), prefills.seconds(second(11))),
            (5000, 4.0)
        );
        assert_eq!(prefills.seconds(second(19)), 3.0, "late, but not done");
        prefills.end(0, second(20));
        assert_eq!(
            (prefills.tokens(), prefills.seconds(second(21))),
            (3000, 2.0)
        );
        prefills.end(1, second(24));
        assert_eq!((prefills.tokens(), prefills.seconds(second(25))), (0, 0.0));
        prefills.begin(prefill(2, 1000), second(30));
        assert_eq!(prefills.seconds(second(30)), 1.0);
    }
}
