//! Plays a workload through the router and N model engines on a virtual clock.
//!
//! One thread, one queue of events, no sleeping: an hour of traffic takes seconds, and equal
//! seeds give equal outcomes. The router is the one that serves; it sees what it would see
//! there: requests when they come, tokens when engines deliver them.

mod config;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::task::Context;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::fleet::{WorkerId, WorkerSnapshot, WorkerSpec};
use foresee_core::router::{Request, RouteError, Router};
use foresee_core::sequence::SequenceHash;

use crate::arrivals::Arrivals;
use crate::engine::{Engine, EngineConfig, EngineRequest, Step, TokenEvent};
use crate::knowledge::{Follower, Knowledge};
use crate::lab::seat::{Arriving, Seat, Standing};
use crate::law::StepLoad;
use crate::learning::Watch;
use crate::prediction::{Booked, Sampler, unallocated};
use crate::report::{Goodput, Latency, Outcome, imbalance};
use crate::schedule::{Change, Schedule};
use crate::traffic::Traffic;
use crate::woken::Woken;
use crate::workload::Workload;
pub use config::{ReplayConfig, ReplayError};

/// How far a replay has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests that have ended.
    pub ended: usize,
    /// Requests of the workload.
    pub total: usize,
    /// Requests that have missed the [`Slo`].
    pub missed: usize,
    /// The virtual time.
    pub now: Duration,
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
    let traffic = Traffic::new(workload.clone(), config.router.block_size);
    run_while(config, &traffic, &mut |it| {
        progress(it);
        ControlFlow::Continue(())
    })
}

/// As [`run`], with prompts that are hashed already, to its end or until `progress` breaks it off.
///
/// # Errors
/// As [`run`].
pub fn run_while(
    config: &ReplayConfig,
    traffic: &Traffic,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Outcome, ReplayError> {
    let mut replay = Replay::new(config, traffic)?;
    while let Some(now) = replay.next_event() {
        replay.sample_before(now);
        let before = (replay.ended, replay.missed);
        replay.change_fleet(now)?;
        replay.hear_events(now);
        replay.end_steps(now);
        replay.admit_arrivals(now)?;
        replay.send_woken(now);
        replay.begin_steps(now);
        if (replay.ended, replay.missed) != before {
            let told = progress(Progress {
                ended: replay.ended,
                total: traffic.workload().requests.len(),
                missed: replay.missed,
                now,
            });
            if told.is_break() {
                break;
            }
        }
    }
    Ok(replay.outcome())
}

/// A worker: an engine, and the step it computes.
struct Worker {
    /// `None` before it joins.
    id: Option<WorkerId>,
    engine: Engine,
    step: Option<Step>,
    /// How many times as fast as its law.
    speed: f64,
    /// The router's blocks in one of the engine's.
    stride: NonZeroU32,
    requests: u64,
}

/// A request between its arrival and its last token.
struct Flight {
    booking: Booking,
    arrival: Duration,
    first_token: Option<Duration>,
    last_token: Duration,
    generated: u32,
}

struct Replay<'a> {
    config: &'a ReplayConfig,
    traffic: &'a Traffic,
    router: Router,
    /// Where a rule of the lab sits, if one chooses.
    seat: Option<Seat>,
    workers: Vec<Worker>,
    by_id: HashMap<WorkerId, usize>,
    arrivals: Arrivals,
    schedule: Schedule,
    /// What carries engines' events to the router, if anything does.
    follower: Option<Follower>,
    /// Ends of the steps under way, and whose.
    step_ends: BinaryHeap<Reverse<(Duration, usize)>>,
    /// Workers whose engines may have become ready for a step.
    ready: Vec<usize>,
    /// By index of the request.
    flights: Vec<Option<Flight>>,
    /// Requests that the router kept waiting, and has called.
    woken: Woken,
    ended: usize,
    rejected: usize,
    /// Requests that have not been served as the SLO says.
    missed: usize,
    first_arrival: Option<Duration>,
    last_end: Duration,
    sampler: Sampler,
    learning: Watch,
    times_to_first_token: Vec<f32>,
    inter_token_latencies: Vec<f32>,
    times_per_output_token: Vec<f32>,
    end_to_end: Vec<f32>,
}

impl<'a> Replay<'a> {
    fn new(config: &'a ReplayConfig, traffic: &'a Traffic) -> Result<Self, ReplayError> {
        if let Knowledge::Events { loss, .. } = config.knowledge
            && !(0.0..=1.0).contains(&loss)
        {
            return Err(ReplayError::Loss { loss });
        }
        let workers = config.engines.len();
        if let Some(change) = config.changes.iter().find(|it| it.worker >= workers) {
            return Err(ReplayError::NoSuchWorker {
                worker: change.worker,
                workers,
            });
        }
        let engines = config.engines.iter();
        let tells = config.knowledge != Knowledge::Shadow;
        let workers = engines.map(|engine| new_worker(engine, tells, traffic.block_size()));
        let workers: Vec<Worker> = workers.collect::<Result<_, _>>()?;
        let contender = config.contender.as_ref();
        let settings = match contender {
            Some(contender) => contender.settings(&config.router),
            None => config.router.clone(),
        };
        let mut replay = Self {
            config,
            traffic,
            router: Router::new(settings)?,
            seat: contender.and_then(|it| it.seat(config.router.seed)),
            by_id: HashMap::new(),
            arrivals: Arrivals::new(traffic.workload()),
            schedule: Schedule::new(&config.changes),
            follower: Follower::new(
                config.knowledge,
                traffic,
                workers.iter().map(|worker| worker.stride.get()),
                config.router.seed,
            ),
            step_ends: BinaryHeap::new(),
            ready: Vec::new(),
            flights: traffic.workload().requests.iter().map(|_| None).collect(),
            woken: Woken::default(),
            ended: 0,
            rejected: 0,
            missed: 0,
            first_arrival: None,
            last_end: Duration::ZERO,
            sampler: Sampler::new(workers.len(), config.keep_active_blocks),
            learning: Watch::default(),
            times_to_first_token: Vec::new(),
            inter_token_latencies: Vec::new(),
            times_per_output_token: Vec::new(),
            end_to_end: Vec::new(),
            workers,
        };
        for index in 0..replay.workers.len() {
            if !replay.schedule.is_to_join(index) {
                replay.join(index)?;
            }
        }
        Ok(replay)
    }

    /// Adds a worker to the fleet.
    fn join(&mut self, index: usize) -> Result<(), ReplayError> {
        let worker = &mut self.workers[index];
        if worker.id.is_some() {
            return Ok(());
        }
        let engine = worker.engine.config();
        let id = self.router.add_worker(WorkerSpec {
            name: format!("worker-{index}"),
            models: Vec::new(),
            capacity_blocks: self
                .config
                .capacity_known
                .then(|| engine.blocks.saturating_mul(worker.stride.get())),
            prefix_caching: engine.prefix_caching,
            ..WorkerSpec::default()
        })?;
        self.router.set_stride(id, worker.stride);
        self.router.follow_events(id, self.follower.is_some());
        self.router.set_healthy(id, true);
        worker.id = Some(id);
        self.by_id.insert(id, index);
        Ok(())
    }

    fn change_fleet(&mut self, now: Duration) -> Result<(), ReplayError> {
        while let Some(change) = self.schedule.take_due(now) {
            match change.what {
                Change::Speed(speed) => {
                    self.workers[change.worker].speed = speed;
                    self.learning.changes(change.worker, now);
                }
                Change::Join => self.join(change.worker)?,
            }
        }
        Ok(())
    }

    fn hear_events(&mut self, now: Duration) {
        if let Some(follower) = &mut self.follower {
            let workers = &self.workers;
            follower.deliver(now, self.traffic, &self.router, |index| workers[index].id);
        }
    }

    fn next_event(&self) -> Option<Duration> {
        let step_end = self.step_ends.peek().map(|Reverse((end, _))| *end);
        let arrival = self.arrivals.next_due();
        let heard = self.follower.as_ref().and_then(Follower::next_due);
        let next = step_end.into_iter().chain(arrival).chain(heard).min()?;
        // What happens to a fleet that nobody uses any more does not matter.
        Some(self.schedule.next_due().map_or(next, |due| next.min(due)))
    }

    fn end_steps(&mut self, now: Duration) {
        while let Some(&Reverse((end, index))) = self.step_ends.peek()
            && end <= now
        {
            self.step_ends.pop();
            let worker = &mut self.workers[index];
            let Some(step) = worker.step.take() else {
                continue;
            };
            // Before anybody is answered, so that who knows of an answer may know of its blocks.
            if let Some(follower) = &mut self.follower {
                follower.send(index, worker.engine.take_cache_events(), now);
            }
            let tokens = worker.engine.end_step(step);
            self.hear_events(now);
            for event in tokens {
                self.deliver(event, now);
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
            flight.first_token = Some(now);
            if let Some(seat) = &mut self.seat {
                seat.prefilled(request, self.by_id[&flight.booking.worker()], now);
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
            && let Some(flight) = self.flights[request].take()
        {
            self.finished(request, flight, event.cached_tokens, now);
        }
    }

    fn finished(&mut self, request: usize, flight: Flight, cached_tokens: u32, now: Duration) {
        let Flight {
            mut booking,
            arrival,
            first_token,
            generated,
            ..
        } = flight;
        if self.follower.is_none() {
            // What answers tell a gateway, at their ends.
            booking.observed_cached(cached_tokens);
            if let Some(answered) = self.traffic.answered(request) {
                booking.answered(answered.clone());
            }
        }
        booking.finish(now);
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
        self.ended(request, now);
    }

    fn ended(&mut self, request: usize, now: Duration) {
        self.arrivals.ended(request, now);
        self.ended += 1;
        self.last_end = now;
    }

    fn admit_arrivals(&mut self, now: Duration) -> Result<(), ReplayError> {
        while let Some(index) = self.arrivals.take_due(now) {
            self.first_arrival.get_or_insert(now);
            self.flights[index] = Some(Flight {
                booking: self.route(index, now)?,
                arrival: now,
                first_token: None,
                last_token: now,
                generated: 0,
            });
            self.send(index, now);
        }
        Ok(())
    }

    /// Sends to their workers those whom the router kept waiting and has room for.
    fn send_woken(&mut self, now: Duration) {
        while let Some(index) = self.woken.take() {
            self.send(index, now);
        }
    }

    /// Sends a request to its worker, or waits until the router says so.
    fn send(&mut self, index: usize, now: Duration) {
        let Some(flight) = &mut self.flights[index] else {
            return;
        };
        let waker = self.woken.waker(index);
        let mut context = Context::from_waker(&waker);
        if flight
            .booking
            .poll_sent(&mut context, &[], now)
            .is_pending()
        {
            return;
        }
        let chosen = self.by_id[&flight.booking.worker()];
        let worker = &mut self.workers[chosen];
        let hashes = self.traffic.known(index).hashes();
        let submitted = worker.engine.submit(EngineRequest {
            id: index as u64,
            hashes: coarser(hashes, worker.stride.get()).collect(),
            prompt_tokens: flight.booking.sequence().tokens(),
            output_tokens: self.traffic.request(index).output_tokens,
        });
        if submitted.is_ok() {
            worker.requests += 1;
            self.ready.push(chosen);
            return;
        }
        self.rejected += 1;
        self.missed += 1;
        self.flights[index] = None;
        if let Some(seat) = &mut self.seat {
            seat.prefilled(index, chosen, now);
        }
        self.ended(index, now);
    }

    fn route(&mut self, request: usize, now: Duration) -> Result<Booking, RouteError> {
        let sequence = self.traffic.prompt(request);
        let Some(seat) = &mut self.seat else {
            return self.router.route(&Request::new(sequence), now);
        };
        let (workers, by_id, step_ends) = (&self.workers, &self.by_id, &self.step_ends);
        let arriving = Arriving {
            request,
            sequence,
            output_tokens: self.traffic.request(request).output_tokens,
        };
        seat.route(&arriving, &self.router, now, |id| {
            let index = by_id[&id];
            let worker = &workers[index];
            let step_end = step_ends.iter().find(|Reverse((_, it))| *it == index);
            Standing {
                worker: index,
                engine: &worker.engine,
                stride: worker.stride.get(),
                speed: worker.speed,
                step_left: step_end.map_or(Duration::ZERO, |Reverse((end, _))| *end - now),
            }
        })
    }

    fn begin_steps(&mut self, now: Duration) {
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

    /// Looks at router and engines at the instants before `now`, since which nothing happened.
    fn sample_before(&mut self, now: Duration) {
        if let Some(seat) = &mut self.seat {
            let workers = self.workers.iter();
            let engines = workers.map(|worker| (&worker.engine, worker.stride.get()));
            seat.scrape_before(now, engines);
        }
        while let Some(instant) = self.sampler.due_before(now) {
            let snapshots = self.router.workers(instant);
            self.compare_learned(instant, &snapshots);
            let flights = &self.flights;
            let workers = &self.workers;
            let block_size = self.traffic.block_size().get();
            let samples = snapshots.iter().filter_map(|snapshot| {
                let worker = &workers[*self.by_id.get(&snapshot.id)?];
                let (engine, stride) = (&worker.engine, worker.stride.get());
                let booked: Vec<Booked<'_>> = engine
                    .in_flight()
                    .filter_map(|it| {
                        let flight = flights[it.id as usize].as_ref()?;
                        let sequence = flight.booking.sequence();
                        let shareable = engine.config().prefix_caching;
                        Some(Booked {
                            hashes: if shareable { sequence.hashes() } else { &[] },
                            blocks: (sequence.tokens() + flight.generated).div_ceil(block_size),
                            held: it.running.then_some(it.blocks * stride),
                        })
                    })
                    .collect();
                Some((
                    snapshot.active_blocks,
                    engine.pinned_blocks() * stride,
                    unallocated(&booked),
                ))
            });
            self.sampler.take(samples);
        }
    }

    fn compare_learned(&mut self, now: Duration, snapshots: &[WorkerSnapshot]) {
        self.learning.take_lengths(self.router.length_forecast());
        for snapshot in snapshots {
            let Some(&index) = self.by_id.get(&snapshot.id) else {
                continue;
            };
            let worker = &self.workers[index];
            let mut decodes = StepLoad::default();
            for it in worker.engine.in_flight() {
                if let Some(flight) = &self.flights[it.id as usize]
                    && flight.generated > 0
                {
                    decodes.add_decode(flight.booking.sequence().tokens() + flight.generated);
                }
            }
            let truth = (&worker.engine.config().law, worker.speed);
            self.learning.take(now, index, snapshot, truth, &decodes);
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
        let first_arrival = self.first_arrival.unwrap_or_default();
        let makespan = self.last_end.saturating_sub(first_arrival);
        let requests = self.traffic.workload().requests.len();
        let unfinished = requests - self.ended;
        let served_well = self.ended.saturating_sub(self.missed);
        Outcome {
            policy: match &self.config.contender {
                Some(contender) => contender.to_string(),
                None => self.config.router.policy.to_string(),
            },
            seed: self.config.router.seed,
            finished: self.end_to_end.len(),
            rejected: self.rejected,
            unfinished,
            goodput: Goodput {
                share: served_well as f64 / requests.max(1) as f64,
                per_second: served_well as f64 / makespan.as_secs_f64().max(1e-9),
            },
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
            learning: self.learning.finish(self.last_end),
            active_blocks: self.sampler.take_instants(),
            time_to_first_token: Latency::of(&mut self.times_to_first_token),
            inter_token_latency: Latency::of(&mut self.inter_token_latencies),
            time_per_output_token: Latency::of(&mut self.times_per_output_token),
            end_to_end: Latency::of(&mut self.end_to_end),
        }
    }
}

/// The hashes of blocks that are so many of ours: each has the prefix of the last of ours in it.
pub(crate) fn coarser(
    hashes: &[SequenceHash],
    stride: u32,
) -> impl Iterator<Item = SequenceHash> + '_ {
    let stride = stride.max(1) as usize;
    hashes.iter().skip(stride - 1).step_by(stride).copied()
}

/// `tells`: whether its engine keeps events.
fn new_worker(
    engine: &EngineConfig,
    tells: bool,
    block_size: NonZeroU32,
) -> Result<Worker, ReplayError> {
    let stride = NonZeroU32::new(engine.block_size.get() / block_size);
    let stride = stride.filter(|_| engine.block_size.get() % block_size == 0);
    Ok(Worker {
        id: None,
        stride: stride.ok_or(ReplayError::BlockSize {
            engine: engine.block_size,
            router: block_size,
        })?,
        engine: Engine::new(EngineConfig {
            cache_events: tells,
            ..engine.clone()
        }),
        step: None,
        speed: 1.0,
        requests: 0,
    })
}
