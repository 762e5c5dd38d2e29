//! Plays a workload through the router and N model engines on a virtual clock.
//!
//! One thread, one queue of events, no sleeping: an hour of traffic takes seconds, and equal
//! seeds give equal outcomes. The router is the one that serves; it sees what it would see
//! there: requests when they come, tokens when engines deliver them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::choose::Policy;
use foresee_core::fleet::{WorkerError, WorkerId, WorkerSpec};
use foresee_core::router::{ConfigError, Request, RouteError, Router, RouterConfig};

use crate::arrivals::Arrivals;
use crate::engine::{Engine, EngineConfig, EngineRequest, Step, TokenEvent};
use crate::prediction::{Booked, Sampler, unallocated};
use crate::report::{Latency, Outcome, Report, imbalance};
use crate::workload::Workload;

/// A fleet and its router.
#[derive(Clone, Debug)]
pub struct ReplayConfig {
    /// The router's settings.
    pub router: RouterConfig,
    /// The workers, one engine each. Their block size is the router's.
    pub engines: Vec<EngineConfig>,
    /// Whether the router is told how many blocks each worker has.
    pub capacity_known: bool,
}

impl ReplayConfig {
    /// `workers` equal engines whose step times vary independently.
    #[must_use]
    pub fn uniform(router: RouterConfig, engine: &EngineConfig, workers: u32) -> Self {
        let engines = (0..workers).map(|worker| EngineConfig {
            seed: engine.seed.wrapping_add(u64::from(worker)),
            ..engine.clone()
        });
        Self {
            router,
            engines: engines.collect(),
            capacity_known: true,
        }
    }
}

/// How far a replay has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests that have ended.
    pub ended: usize,
    /// Requests of the workload.
    pub total: usize,
    /// The virtual time.
    pub now: Duration,
}

/// Why a replay cannot be run.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ReplayError {
    /// A setting of the router.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A worker cannot be added.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A request found no worker.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Prefixes would never match.
    #[error("an engine has blocks of {engine} tokens, the router of {router}")]
    BlockSize {
        /// The engine's.
        engine: NonZeroU32,
        /// The router's.
        router: NonZeroU32,
    },
}

/// Replays `workload` once for each of `policies`, on up to `threads` threads. Everything else,
/// seeds included, is the same for all of them.
///
/// # Errors
/// As [`run`], for any policy.
pub fn compare(
    config: &ReplayConfig,
    policies: &[Policy],
    workload: &Workload,
    threads: usize,
    progress: &(dyn Fn(Policy, Progress) + Sync),
) -> Result<Report, ReplayError> {
    let next = AtomicUsize::new(0);
    let run_until_done = || {
        let mut outcomes = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&policy) = policies.get(index) else {
                return outcomes;
            };
            let mut config = config.clone();
            config.router.policy = policy;
            let outcome = run(&config, workload, &mut |it| progress(policy, it));
            outcomes.push((index, outcome));
        }
    };
    let threads = threads.clamp(1, policies.len().max(1));
    let mut outcomes = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run_until_done)).collect();
        let mut outcomes = run_until_done();
        for other in others {
            match other.join() {
                Ok(more) => outcomes.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        outcomes
    });
    outcomes.sort_unstable_by_key(|(index, _)| *index);
    let outcomes = outcomes.into_iter().map(|(_, outcome)| outcome);
    Ok(Report {
        workload: workload.name.clone(),
        workers: config.engines.len(),
        outcomes: outcomes.collect::<Result<_, _>>()?,
    })
}

/// Replays `workload` to its end under the configured policy.
///
/// # Errors
/// When the configuration makes no sense. Requests that no engine can hold are no error: they
/// are counted as rejected.
pub fn run(
    config: &ReplayConfig,
    workload: &Workload,
    progress: &mut dyn FnMut(Progress),
) -> Result<Outcome, ReplayError> {
    let mut replay = Replay::new(config, workload)?;
    while let Some(now) = replay.next_event() {
        replay.sample_before(now);
        let ended_before = replay.ended;
        replay.end_steps(now);
        replay.admit_arrivals(now)?;
        replay.begin_steps(now);
        if replay.ended > ended_before {
            progress(Progress {
                ended: replay.ended,
                total: workload.requests.len(),
                now,
            });
        }
    }
    Ok(replay.outcome())
}

/// A worker: an engine, and the step it computes.
struct Worker {
    id: WorkerId,
    engine: Engine,
    step: Option<Step>,
    requests: u64,
}

/// A request between its arrival and its last token.
struct Flight {
    booking: Booking,
    arrival: Duration,
    last_token: Duration,
    generated: u32,
}

struct Replay<'a> {
    config: &'a ReplayConfig,
    workload: &'a Workload,
    router: Router,
    workers: Vec<Worker>,
    by_id: HashMap<WorkerId, usize>,
    arrivals: Arrivals,
    /// Ends of the steps under way, and whose.
    step_ends: BinaryHeap<Reverse<(Duration, usize)>>,
    /// Workers whose engines may have become ready for a step.
    ready: Vec<usize>,
    /// By index of the request.
    flights: Vec<Option<Flight>>,
    ended: usize,
    rejected: usize,
    first_arrival: Option<Duration>,
    last_end: Duration,
    sampler: Sampler,
    times_to_first_token: Vec<f32>,
    inter_token_latencies: Vec<f32>,
    end_to_end: Vec<f32>,
}

impl<'a> Replay<'a> {
    fn new(config: &'a ReplayConfig, workload: &'a Workload) -> Result<Self, ReplayError> {
        let block_size = config.router.block_size;
        let router = Router::new(config.router.clone())?;
        let mut workers = Vec::new();
        for (index, engine) in config.engines.iter().enumerate() {
            if engine.block_size != block_size {
                return Err(ReplayError::BlockSize {
                    engine: engine.block_size,
                    router: block_size,
                });
            }
            let id = router.add_worker(WorkerSpec {
                name: format!("worker-{index}"),
                models: Vec::new(),
                capacity_blocks: config.capacity_known.then_some(engine.blocks),
                prefix_caching: engine.prefix_caching,
                ..WorkerSpec::default()
            })?;
            router.set_healthy(id, true);
            workers.push(Worker {
                id,
                engine: Engine::new(engine.clone()),
                step: None,
                requests: 0,
            });
        }
        let ids = workers.iter().enumerate();
        Ok(Self {
            config,
            workload,
            router,
            by_id: ids.map(|(index, worker)| (worker.id, index)).collect(),
            arrivals: Arrivals::new(workload),
            step_ends: BinaryHeap::new(),
            ready: Vec::new(),
            flights: workload.requests.iter().map(|_| None).collect(),
            ended: 0,
            rejected: 0,
            first_arrival: None,
            last_end: Duration::ZERO,
            sampler: Sampler::new(workers.len()),
            times_to_first_token: Vec::new(),
            inter_token_latencies: Vec::new(),
            end_to_end: Vec::new(),
            workers,
        })
    }

    fn block_size(&self) -> NonZeroU32 {
        self.config.router.block_size
    }

    fn next_event(&self) -> Option<Duration> {
        let step_end = self.step_ends.peek().map(|Reverse((end, _))| *end);
        let arrival = self.arrivals.next_due();
        step_end.into_iter().chain(arrival).min()
    }

    fn end_steps(&mut self, now: Duration) {
        while let Some(&Reverse((end, index))) = self.step_ends.peek()
            && end <= now
        {
            self.step_ends.pop();
            let worker = &mut self.workers[index];
            if let Some(step) = worker.step.take() {
                for event in worker.engine.end_step(step) {
                    self.deliver(event, now);
                }
            }
            self.ready.push(index);
        }
    }

    fn deliver(&mut self, event: TokenEvent, now: Duration) {
        let request = event.id as usize;
        let Some(flight) = &mut self.flights[request] else {
            debug_assert!(false, "a token for a request that is not in flight");
            return;
        };
        flight.booking.tokens(1, now);
        flight.generated += 1;
        if event.first {
            let waited = now - flight.arrival;
            self.times_to_first_token.push(waited.as_secs_f32());
        } else {
            let gap = now - flight.last_token;
            self.inter_token_latencies.push(gap.as_secs_f32());
        }
        flight.last_token = now;
        if event.finished
            && let Some(Flight {
                booking, arrival, ..
            }) = self.flights[request].take()
        {
            booking.finish(now);
            self.end_to_end.push((now - arrival).as_secs_f32());
            self.ended(request, now);
        }
    }

    fn ended(&mut self, request: usize, now: Duration) {
        self.arrivals.ended(request, now);
        self.ended += 1;
        self.last_end = now;
    }

    fn admit_arrivals(&mut self, now: Duration) -> Result<(), ReplayError> {
        while let Some(index) = self.arrivals.take_due(now) {
            self.first_arrival.get_or_insert(now);
            let request = &self.workload.requests[index];
            let sequence = request.prompt.sequence(self.block_size());
            let booking = self.router.route(&Request::new(&sequence), now)?;
            let chosen = self.by_id[&booking.worker()];
            let worker = &mut self.workers[chosen];
            let hashes = if request.answer_stream.is_some() {
                Arc::from(
                    request
                        .prompt_and_answer()
                        .sequence(self.config.router.block_size)
                        .hashes(),
                )
            } else {
                Arc::from(sequence.hashes())
            };
            let submitted = worker.engine.submit(EngineRequest {
                id: index as u64,
                hashes,
                prompt_tokens: sequence.tokens(),
                output_tokens: request.output_tokens,
            });
            if submitted.is_err() {
                self.rejected += 1;
                drop(booking);
                self.ended(index, now);
                continue;
            }
            worker.requests += 1;
            self.flights[index] = Some(Flight {
                booking,
                arrival: now,
                last_token: now,
                generated: 0,
            });
            self.ready.push(chosen);
        }
        Ok(())
    }

    fn begin_steps(&mut self, now: Duration) {
        for index in self.ready.drain(..) {
            let worker = &mut self.workers[index];
            if worker.step.is_some() {
                continue;
            }
            if let Some(step) = worker.engine.begin_step() {
                self.step_ends.push(Reverse((now + step.duration, index)));
                worker.step = Some(step);
            }
        }
    }

    /// Compares router and engines at the instants before `now`, since which nothing happened.
    fn sample_before(&mut self, now: Duration) {
        while let Some(instant) = self.sampler.due_before(now) {
            let snapshots = self.router.workers(instant);
            let flights = &self.flights;
            let workers = &self.workers;
            let block_size = self.config.router.block_size.get();
            let samples = snapshots.iter().filter_map(|snapshot| {
                let engine = &workers[*self.by_id.get(&snapshot.id)?].engine;
                let booked: Vec<Booked<'_>> = engine
                    .in_flight()
                    .filter_map(|it| {
                        let flight = flights[it.id as usize].as_ref()?;
                        let sequence = flight.booking.sequence();
                        let shareable = engine.config().prefix_caching;
                        Some(Booked {
                            hashes: if shareable { sequence.hashes() } else { &[] },
                            blocks: (sequence.tokens() + flight.generated).div_ceil(block_size),
                            held: it.running.then_some(it.blocks),
                        })
                    })
                    .collect();
                Some((
                    snapshot.active_blocks,
                    engine.pinned_blocks(),
                    unallocated(&booked),
                ))
            });
            self.sampler.take(samples);
        }
    }

    fn outcome(mut self) -> Outcome {
        let totals = || self.workers.iter().map(|worker| worker.engine.totals());
        let prompt_tokens: u64 = totals().map(|it| it.prompt_tokens).sum();
        let cached_tokens: u64 = totals().map(|it| it.cached_tokens).sum();
        let output_tokens: u64 = totals().map(|it| it.output_tokens).sum();
        let predicted = self.router.workers(self.last_end);
        let predicted: u64 = predicted.iter().map(|it| it.active_blocks).sum();
        let held = self
            .workers
            .iter()
            .map(|it| u64::from(it.engine.pinned_blocks()));
        let makespan = self.last_end - self.first_arrival.unwrap_or_default();
        Outcome {
            policy: self.config.router.policy.to_string(),
            finished: self.end_to_end.len(),
            rejected: self.rejected,
            unfinished: self.workload.requests.len() - self.ended,
            makespan: makespan.as_secs_f64(),
            output_tokens_per_second: output_tokens as f64 / makespan.as_secs_f64().max(1e-9),
            prompt_tokens,
            cached_tokens,
            hit_share: cached_tokens as f64 / prompt_tokens.max(1) as f64,
            preemptions: totals().map(|it| it.preemptions).sum(),
            computed_imbalance: imbalance(totals().map(|it| it.prompt_tokens - it.cached_tokens)),
            request_imbalance: imbalance(self.workers.iter().map(|it| it.requests)),
            leaked_blocks: predicted + held.sum::<u64>(),
            prediction: self.sampler.finish(),
            time_to_first_token: Latency::of(&mut self.times_to_first_token),
            inter_token_latency: Latency::of(&mut self.inter_token_latencies),
            end_to_end: Latency::of(&mut self.end_to_end),
        }
    }
}
