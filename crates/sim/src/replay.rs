//! Replays a workload through the router and N simulated engines on a virtual clock.
//!
//! The replay has one thread, one queue of events and no sleeps: an hour of traffic takes seconds,
//! and equal seeds give equal results. The router is the code that `foresee serve` runs, and it
//! receives the same information as there: requests when they arrive, tokens when engines generate
//! them.

mod config;
mod failover;
mod measure;
mod worker;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::ControlFlow;
use std::task::{Context, Poll};
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::router::{CacheSource, Request, RouteError, Router};
use foresee_core::workers::{WorkerId, WorkerSpec};

use crate::arrivals::Arrivals;
use crate::baselines::PolicySpec;
use crate::baselines::driver::{ArrivingRequest, EngineState, PolicyDriver};
use crate::cache_signal::{CacheSignal, DelayedEvents};
use crate::engine::{EngineRequest, TokenEvent};
use crate::fleet_changes::{Change, FleetSchedule};
use crate::forecast_error::ForecastMonitor;
use crate::hashed_workload::HashedWorkload;
use crate::outcome::Outcome;
use crate::prediction::Sampler;
use crate::prompt::coarser_hashes;
use crate::ready_wakers::ReadyWakers;
use crate::workload::Workload;
pub use config::{ReplayConfig, ReplayError};
use failover::Failover;
use worker::{Worker, new_worker};

/// State of a running replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests that have ended.
    pub ended: usize,
    /// Requests of the workload. Requests that a limit of duration drops count, too.
    pub total: usize,
    /// Requests that have missed the SLO ([`crate::slo::Slo`]).
    pub missed: usize,
    /// Time on the virtual clock.
    pub now: Duration,
}

/// Replays `workload` to its end, or to the limit of its duration, under the configured policy, and calls `progress` after each
/// instant at which requests have ended or missed the SLO.
///
/// # Errors
/// If the configuration is invalid, or if no worker has joined the fleet when a request arrives.
/// Requests that do not fit into an engine are counted as rejected.
pub fn run(
    config: &ReplayConfig,
    workload: &Workload,
    progress: &mut dyn FnMut(Progress),
) -> Result<Outcome, ReplayError> {
    let hashed = HashedWorkload::new(workload.clone(), config.router.block_size);
    run_while(config, &hashed, &mut |state| {
        progress(state);
        ControlFlow::Continue(())
    })
}

/// Replays a workload with hashed prompts, to its end or until `progress` returns `Break`.
/// `progress` is called after each instant at which requests have ended or missed the SLO. After
/// `Break`, the outcome counts the other requests as unfinished; with a limit of duration, those
/// that have arrived. Several replays can share one
/// hashed workload, which must have the block size of the configured router.
///
/// # Errors
/// If the configuration is invalid, or if no worker has joined the fleet when a request arrives.
/// Requests that do not fit into an engine are counted as rejected.
pub fn run_while(
    config: &ReplayConfig,
    workload: &HashedWorkload,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Outcome, ReplayError> {
    let mut replay = Replay::new(config, workload)?;
    while let Some(now) = replay.next_event() {
        replay.sample_before(now);
        let before = (replay.ended, replay.missed);
        replay.change_fleet(now)?;
        replay.deliver_cache_events(now);
        replay.end_steps(now);
        replay.fail_due_attempts(now);
        replay.admit_arrivals(now)?;
        replay.dispatch_woken(now);
        replay.start_steps(now);
        if (replay.ended, replay.missed) != before {
            let control = progress(Progress {
                ended: replay.ended,
                total: workload.workload().requests.len(),
                missed: replay.missed,
                now,
            });
            if control.is_break() {
                break;
            }
        }
    }
    Ok(replay.outcome())
}

/// A request between its arrival and its last token.
struct RequestInFlight {
    booking: Booking,
    arrival: Duration,
    first_token: Option<Duration>,
    last_token: Duration,
    /// Output tokens so far.
    generated: u32,
    /// Number of workers that have failed the request.
    attempt: u32,
    /// These workers.
    excluded: Vec<WorkerId>,
}

/// State of a replay.
struct Replay<'a> {
    config: &'a ReplayConfig,
    workload: &'a HashedWorkload,
    router: Router,
    /// Driver of a baseline that sees the engines; `None` if a policy in the router chooses.
    driver: Option<PolicyDriver>,
    workers: Vec<Worker>,
    /// Index in `workers`.
    by_id: HashMap<WorkerId, usize>,
    arrivals: Arrivals,
    schedule: FleetSchedule,
    /// KV events on their way to the router; `None` without events.
    delayed_events: Option<DelayedEvents>,
    /// End of each step in progress, with the index of its worker.
    step_ends: BinaryHeap<Reverse<(Duration, usize)>>,
    /// Indices of workers whose engines may be able to start a step.
    ready: Vec<usize>,
    /// By the request's index in the workload.
    in_flight: Vec<Option<RequestInFlight>>,
    /// Queued requests that the router has woken.
    ready_wakers: ReadyWakers,
    /// Requests that may fail, and what became of the failed ones.
    failover: Failover,
    /// Requests that have ended, rejected ones included.
    ended: usize,
    rejected: usize,
    /// Requests that have missed the SLO.
    missed: usize,
    /// Requests that have arrived.
    arrived: usize,
    first_arrival: Option<Duration>,
    last_end: Duration,
    sampler: Sampler,
    forecast_monitor: ForecastMonitor,
    times_to_first_token: Vec<f32>,
    inter_token_latencies: Vec<f32>,
    times_per_output_token: Vec<f32>,
    end_to_end: Vec<f32>,
}

impl<'a> Replay<'a> {
    /// Creates the state at time zero, with all workers in the fleet except the ones that join
    /// later.
    ///
    /// # Errors
    /// If the event loss is not from 0 to 1, a fleet change names an unknown worker, an engine's
    /// block size is no multiple of the router's, or the router rejects its configuration or a
    /// worker.
    fn new(config: &'a ReplayConfig, workload: &'a HashedWorkload) -> Result<Self, ReplayError> {
        if let CacheSignal::Events {
            loss_fraction: loss,
            ..
        } = config.cache_signal
            && !(0.0..=1.0).contains(&loss)
        {
            return Err(ReplayError::Loss { loss });
        }
        let workers = config.engines.len();
        if let Some(change) = config
            .changes
            .iter()
            .find(|change| change.worker >= workers)
        {
            return Err(ReplayError::NoSuchWorker {
                worker: change.worker,
                workers,
            });
        }
        if let Some(fault) = config.faults.iter().find(|fault| fault.worker >= workers) {
            return Err(ReplayError::NoSuchWorker {
                worker: fault.worker,
                workers,
            });
        }
        let engines = config.engines.iter();
        let has_events = config.cache_signal != CacheSignal::Estimated;
        let workers = engines.map(|engine| new_worker(engine, has_events, workload.block_size()));
        let workers: Vec<Worker> = workers.collect::<Result<_, _>>()?;
        let policy = config.policy.as_ref();
        let settings = match policy {
            Some(policy) => policy.settings(&config.router),
            None => config.router.clone(),
        };
        let driver = policy.and_then(|spec| spec.driver(config.router.seed));
        if policy.is_some_and(PolicySpec::is_baseline) && !config.faults.is_empty() {
            return Err(ReplayError::FaultsUnderBaseline);
        }
        let mut replay = Self {
            config,
            workload,
            router: Router::new(settings)?,
            driver,
            by_id: HashMap::new(),
            arrivals: Arrivals::new(workload.workload()).within(config.duration),
            schedule: FleetSchedule::new(&config.changes),
            delayed_events: DelayedEvents::new(
                config.cache_signal,
                workload,
                workers.iter().map(|worker| worker.engine_block_ratio.get()),
                config.router.seed,
            ),
            step_ends: BinaryHeap::new(),
            ready: Vec::new(),
            in_flight: workload.workload().requests.iter().map(|_| None).collect(),
            ready_wakers: ReadyWakers::default(),
            failover: Failover::default(),
            ended: 0,
            rejected: 0,
            missed: 0,
            arrived: 0,
            first_arrival: None,
            last_end: Duration::ZERO,
            sampler: Sampler::new(workers.len(), config.keep_active_blocks),
            forecast_monitor: ForecastMonitor::default(),
            times_to_first_token: Vec::new(),
            inter_token_latencies: Vec::new(),
            times_per_output_token: Vec::new(),
            end_to_end: Vec::new(),
            workers,
        };
        for index in 0..replay.workers.len() {
            if !replay.schedule.joins_later(index) {
                replay.add_worker(index)?;
            }
        }
        Ok(replay)
    }

    /// Adds a worker to the router, unless it was added before. The worker is healthy at once, and
    /// its cache source follows from the cache signal of the configuration.
    fn add_worker(&mut self, index: usize) -> Result<(), ReplayError> {
        let worker = &mut self.workers[index];
        if worker.id.is_some() {
            return Ok(());
        }
        let engine = worker.engine.config();
        let id = self.router.add_worker(WorkerSpec {
            name: format!("worker-{index}"),
            models: Vec::new(),
            capacity_blocks: self.config.reports_capacity.then(|| {
                engine
                    .blocks
                    .saturating_mul(worker.engine_block_ratio.get())
            }),
            prefix_caching: engine.prefix_caching,
            ..WorkerSpec::default()
        })?;
        self.router
            .set_engine_block_ratio(id, worker.engine_block_ratio);
        let source = match self.delayed_events {
            Some(_) => CacheSource::Events,
            None => CacheSource::Estimated,
        };
        self.router.set_cache_source(id, source);
        self.router.set_healthy(id, true);
        worker.id = Some(id);
        self.by_id.insert(id, index);
        Ok(())
    }

    /// Applies the fleet changes that are due.
    fn change_fleet(&mut self, now: Duration) -> Result<(), ReplayError> {
        while let Some(change) = self.schedule.take_due(now) {
            match change.change {
                Change::Speed(speed) => {
                    self.workers[change.worker].speed = speed;
                    self.forecast_monitor.note_speed_change(change.worker, now);
                }
                Change::Join => self.add_worker(change.worker)?,
            }
        }
        Ok(())
    }

    /// Applies the KV events that have reached the router.
    fn deliver_cache_events(&mut self, now: Duration) {
        if let Some(events) = &mut self.delayed_events {
            let workers = &self.workers;
            events.deliver(now, self.workload, &self.router, |index| workers[index].id);
        }
    }

    /// Returns the virtual time, since the start of the replay, of the next event: the end of a
    /// step, an arrival, a batch of KV events, a failure or a fleet change. Does not remove the event. `None`
    /// means that the replay has ended: fleet changes after the last other event are ignored.
    fn next_event(&self) -> Option<Duration> {
        let step_end = self.step_ends.peek().map(|Reverse((end, _))| *end);
        let arrival = self.arrivals.next_due();
        let cache_event = self
            .delayed_events
            .as_ref()
            .and_then(DelayedEvents::next_due);
        let failure = self.next_failure();
        let next = step_end
            .into_iter()
            .chain(arrival)
            .chain(cache_event)
            .chain(failure)
            .min()?;
        // Fleet changes after the last other event have no effect.
        Some(self.schedule.next_due().map_or(next, |due| next.min(due)))
    }

    /// Ends the steps that are due and delivers their tokens. Sends the KV events of each step
    /// before its tokens, and marks the engine as ready for another step.
    fn end_steps(&mut self, now: Duration) {
        while let Some(&Reverse((end, index))) = self.step_ends.peek()
            && end <= now
        {
            self.step_ends.pop();
            let worker = &mut self.workers[index];
            let Some(step) = worker.step.take() else {
                continue;
            };
            // Events are sent before the tokens are delivered, so that without lag the router knows
            // the blocks of a request when it knows its tokens.
            if let Some(events) = &mut self.delayed_events {
                events.send(index, worker.engine.take_cache_events(), now);
            }
            let tokens = worker.engine.end_step(step);
            self.deliver_cache_events(now);
            for event in tokens {
                self.deliver(event, now);
            }
            self.ready.push(index);
        }
    }

    /// Reports an output token to the router and records its times. The first token also ends the
    /// request's prefill for the baseline and may miss the SLO; the last token completes the
    /// request.
    fn deliver(&mut self, event: TokenEvent, now: Duration) {
        let request = event.id as usize;
        let Some(flight) = &mut self.in_flight[request] else {
            debug_assert!(false, "a token for a request that is not in flight");
            return;
        };
        flight.booking.on_tokens(1, now);
        flight.generated += 1;
        if event.first {
            flight.first_token = Some(now);
            if let Some(driver) = &mut self.driver {
                driver.prefilled(request, self.by_id[&flight.booking.worker()], now);
            }
            let waited = (now - flight.arrival).as_secs_f32();
            self.times_to_first_token.push(waited);
            if !self.config.slo.allows_first_token(f64::from(waited)) {
                self.missed += 1;
            }
        } else {
            let gap = now - flight.last_token;
            self.inter_token_latencies.push(gap.as_secs_f32());
        }
        flight.last_token = now;
        if event.finished
            && let Some(flight) = self.in_flight[request].take()
        {
            self.on_finished(request, flight, event.cached_tokens, now);
        }
    }

    /// Completes the booking of a request and records its times. Without KV events, the router
    /// first learns the cached tokens and the output. Counts a miss of the SLO by the mean gap only
    /// if the first token met its limit.
    fn on_finished(
        &mut self,
        request: usize,
        flight: RequestInFlight,
        cached_tokens: u32,
        now: Duration,
    ) {
        let RequestInFlight {
            mut booking,
            arrival,
            first_token,
            generated,
            ..
        } = flight;
        if self.delayed_events.is_none() {
            // Without events, a gateway learns the cached tokens and the output from the response.
            booking.on_cached_tokens(cached_tokens);
            if let Some(sequence) = self.workload.prompt_and_output(request) {
                booking.set_output_sequence(sequence.clone());
            }
        }
        booking.complete(now);
        self.end_to_end.push((now - arrival).as_secs_f32());
        let first_token = first_token.unwrap_or(now);
        let slo = &self.config.slo;
        if generated > 1 {
            let gap = (now - first_token).as_secs_f64() / f64::from(generated - 1);
            self.times_per_output_token.push(gap as f32);
            let waited = f64::from((first_token - arrival).as_secs_f32());
            if slo.allows_first_token(waited) && !slo.allows_mean_gap(gap) {
                self.missed += 1;
            }
        }
        self.on_request_end(request, now);
    }

    /// Counts the end of a request, which may let others arrive.
    fn on_request_end(&mut self, request: usize, now: Duration) {
        self.arrivals.on_request_end(request, now);
        self.ended += 1;
        self.last_end = now;
    }

    /// Routes and sends the requests whose arrival is due. The router may keep them queued.
    ///
    /// # Errors
    /// If no worker has joined the fleet.
    fn admit_arrivals(&mut self, now: Duration) -> Result<(), ReplayError> {
        while let Some(index) = self.arrivals.take_due(now) {
            self.first_arrival.get_or_insert(now);
            self.arrived += 1;
            self.count_arrival(now);
            self.in_flight[index] = Some(RequestInFlight {
                booking: self.route(index, now)?,
                arrival: now,
                first_token: None,
                last_token: now,
                generated: 0,
                attempt: 0,
                excluded: Vec::new(),
            });
            self.send(index, now);
        }
        Ok(())
    }

    /// Sends the queued requests that the router has woken. With worker faults, lets the router
    /// look for workers that can take one first: a worker that hangs gives no other occasion.
    fn dispatch_woken(&mut self, now: Duration) {
        if !self.config.faults.is_empty() {
            self.router.tick(now);
        }
        while let Some(index) = self.ready_wakers.take() {
            self.send(index, now);
        }
    }

    /// Sends a request to its worker, or leaves it queued until the router wakes it. A request that
    /// does not fit into the engine ends at once, and counts as rejected and as a miss of the SLO.
    /// One that no worker can take is lost.
    /// Ignores a request that is not in flight.
    fn send(&mut self, index: usize, now: Duration) {
        let Some(flight) = &mut self.in_flight[index] else {
            return;
        };
        let waker = self.ready_wakers.waker(index);
        let mut context = Context::from_waker(&waker);
        let poll = flight
            .booking
            .poll_dispatch(&mut context, &flight.excluded, now);
        match poll {
            Poll::Pending => return,
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => return self.lose(index, now),
        }
        let (chosen, prompt_tokens) = (
            self.by_id[&flight.booking.worker()],
            flight.booking.prompt().tokens(),
        );
        let is_served = self.begin_attempt(index, chosen, now);
        let worker = &mut self.workers[chosen];
        if !is_served {
            worker.requests += 1;
            return;
        }
        let hashes = self.workload.longest_known(index).hashes();
        let submitted = worker.engine.submit(EngineRequest {
            id: index as u64,
            hashes: coarser_hashes(hashes, worker.engine_block_ratio.get()).collect(),
            prompt_tokens,
            output_tokens: self.workload.request(index).output_tokens,
        });
        if submitted.is_ok() {
            worker.requests += 1;
            self.ready.push(chosen);
            return;
        }
        self.rejected += 1;
        self.missed += 1;
        self.in_flight[index] = None;
        if let Some(driver) = &mut self.driver {
            driver.prefilled(index, chosen, now);
        }
        self.on_request_end(index, now);
    }

    /// Chooses a worker for a request, by the baseline or by the router's policy.
    ///
    /// # Errors
    /// If no worker has joined the fleet.
    fn route(&mut self, request: usize, now: Duration) -> Result<Booking, RouteError> {
        let prompt = self.workload.prompt(request);
        let output_tokens = self.workload.request(request).output_tokens;
        let Some(driver) = &mut self.driver else {
            let known_tokens = self.config.known_output_lengths.then_some(output_tokens);
            let request = Request {
                max_tokens: known_tokens,
                expected_output_tokens: known_tokens,
                ..Request::new(prompt)
            };
            return self.router.route(&request, now);
        };
        let (workers, by_id, step_ends) = (&self.workers, &self.by_id, &self.step_ends);
        let arriving = ArrivingRequest {
            request,
            prompt,
            output_tokens,
        };
        driver.route(&arriving, &self.router, now, |id| {
            let index = by_id[&id];
            let worker = &workers[index];
            let step_end = step_ends
                .iter()
                .find(|Reverse((_, worker))| *worker == index);
            EngineState {
                worker: index,
                engine: &worker.engine,
                engine_block_ratio: worker.engine_block_ratio.get(),
                speed: worker.speed,
                step_left: step_end.map_or(Duration::ZERO, |Reverse((end, _))| *end - now),
            }
        })
    }

    /// Starts a step on each idle engine in `ready` that has requests, and clears `ready`.
    fn start_steps(&mut self, now: Duration) {
        for index in self.ready.drain(..) {
            let worker = &mut self.workers[index];
            if worker.step.is_some() {
                continue;
            }
            if let Some(step) = worker.engine.begin_step() {
                let end = now + step.duration.div_f64(worker.speed);
                self.step_ends.push(Reverse((end, index)));
                worker.step = Some(step);
            }
        }
    }
}
