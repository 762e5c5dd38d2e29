//! Longest hold of the router's lock: `cargo bench -p foresee-core --bench lock_hold`.
//!
//! 512 workers cache four million blocks: half of the workers according to their KV events, the
//! others according to the estimate. Then, while events stream in, requests are queued, dispatched,
//! rebalanced and finished, batches are routed, and workers restart. The table lists the holds by
//! the call that made them: their number, the CPU time that the holder used in the median hold, in
//! all but one in a thousand, and in the longest, and the wall time of all but one in ten thousand.
//! The CPU time of a hold includes one reading of the clock.
//!
//! On a virtual machine, time that the host takes away may count as CPU time of the thread. So the
//! scenario runs twice, and the smaller result of each number is printed.

#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use foresee_core::EvictionRule;
use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_core::booking::Booking;
use foresee_core::event_index::{CacheDelta, PrefixRuns};
use foresee_core::router::{CacheSource, LockObserver, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, SequenceHash};
use foresee_core::workers::{WorkerId, WorkerSpec};
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

const WORKERS: usize = 512;
const BLOCKS_PER_WORKER: usize = 9216;
const CONVERSATION: usize = 32;
const CONVERSATIONS: usize = BLOCKS_PER_WORKER / CONVERSATION;
const CAPACITY: u32 = 16_384;
const BLOCK: usize = 16;
const ADAPTERS: usize = 50;
const RESTARTS: usize = 12;
const QUEUED: usize = 1000;
const RUNS: usize = 2;

/// Holds of one call, in nanoseconds of CPU time and of wall time.
type Holds = Vec<(u32, u32)>;

/// Holds by the name of the call, in the order of the first hold.
#[derive(Default)]
struct HoldsByCall(Vec<(&'static str, Holds)>);

impl HoldsByCall {
    fn of(&mut self, call: &'static str) -> &mut Holds {
        let known = self.0.iter().position(|(name, _)| *name == call);
        let index = known.unwrap_or_else(|| {
            self.0.push((call, Vec::new()));
            self.0.len() - 1
        });
        &mut self.0[index].1
    }
}

thread_local! {
    static CALL: Cell<&'static str> = const { Cell::new("") };
    static STARTED: Cell<Option<(u64, Instant)>> = const { Cell::new(None) };
    static HOLDS: RefCell<HoldsByCall> = const { RefCell::new(HoldsByCall(Vec::new())) };
}

fn cpu_nanos() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

struct Stopwatch;

impl LockObserver for Stopwatch {
    fn on_locked(&self) {
        let wall = Instant::now();
        STARTED.set(Some((cpu_nanos(), wall)));
    }

    fn on_unlocking(&self) {
        let cpu = cpu_nanos();
        if let Some((cpu_before, wall_before)) = STARTED.take() {
            let wall = wall_before.elapsed().as_nanos() as u32;
            HOLDS.with_borrow_mut(|holds| {
                holds.of(CALL.get()).push(((cpu - cpu_before) as u32, wall))
            });
        }
    }
}

/// Names the holds that `call` makes.
fn named<T>(name: &'static str, call: impl FnOnce() -> T) -> T {
    CALL.set(name);
    call()
}

/// Moves the holds of this thread to `total`.
fn flush(total: &Mutex<HoldsByCall>) {
    let mut total = total.lock();
    for (call, holds) in HOLDS.take().0 {
        total.of(call).extend(holds);
    }
}

/// Returns the element that is smaller than `rank` others.
fn nth_largest(values: impl Iterator<Item = u32>, rank: usize) -> f64 {
    let mut values: Vec<u32> = values.collect();
    values.sort_unstable_by(|a, b| b.cmp(a));
    values
        .get(rank)
        .map_or(0.0, |&nanos| f64::from(nanos) / 1000.0)
}

fn print(runs: &mut [HoldsByCall]) {
    println!(
        "{:28} {:>9} {:>10} {:>10} {:>10} {:>14}",
        "call", "holds", "median CPU", "p99.9 CPU", "max CPU", "p99.99 wall"
    );
    let calls: Vec<&'static str> = runs[0].0.iter().map(|(call, _)| *call).collect();
    for call in calls {
        let mut least = [f64::INFINITY; 4];
        for run in &mut *runs {
            let holds = run.of(call);
            let cpu = |rank| nth_largest(holds.iter().map(|(cpu, _)| *cpu), rank);
            let wall = |rank| nth_largest(holds.iter().map(|(_, wall)| *wall), rank);
            let of_run = [
                cpu(holds.len() / 2),
                cpu(holds.len() / 1_000),
                cpu(0),
                wall(holds.len() / 10_000),
            ];
            for (least, value) in least.iter_mut().zip(of_run) {
                *least = least.min(value);
            }
        }
        let [median, p999, max, wall] = least;
        let holds = runs[0].of(call).len();
        println!("{call:28} {holds:>9} {median:>10.1} {p999:>10.1} {max:>10.1} {wall:>14.1}");
    }
}

fn mix(number: u64) -> u64 {
    let product = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (product ^ product >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

/// Returns the hashes of a conversation of one worker.
fn conversation(worker: usize, number: usize) -> Vec<SequenceHash> {
    let start = (worker << 32 | number << 12) as u64;
    (0..CONVERSATION as u64)
        .map(|block| mix(start | block))
        .collect()
}

fn stored(worker: usize, number: usize) -> CacheDelta {
    CacheDelta {
        stored: PrefixRuns::from_sequence(&conversation(worker, number)),
        removed: PrefixRuns::default(),
        engine_block_ratio: 1,
    }
}

fn removed(worker: usize, number: usize) -> CacheDelta {
    CacheDelta {
        stored: PrefixRuns::default(),
        removed: PrefixRuns::from_sequence(&conversation(worker, number)),
        engine_block_ratio: 1,
    }
}

static PROMPTS: AtomicU64 = AtomicU64::new(1);

/// Returns a prompt of `blocks` blocks, whose first quarter is one of ten prefixes.
fn prompt(blocks: usize) -> Sequence {
    let number = PROMPTS.fetch_add(1, Ordering::Relaxed);
    let mut tokens = vec![0_u32; blocks * BLOCK];
    tokens[0] = (number % 10) as u32;
    tokens[blocks * BLOCK / 4] = number as u32;
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 7)
}

fn spec(number: usize, restart: usize) -> WorkerSpec {
    WorkerSpec {
        name: format!("worker-{number}-{restart}"),
        models: (0..=ADAPTERS)
            .map(|adapter| format!("meta-llama/Llama-3.3-70B-Instruct-adapter-{adapter}"))
            .collect(),
        capacity_blocks: Some(CAPACITY),
        prefix_caching: true,
        eviction: EvictionRule::VllmLru,
    }
}

struct NoWake;

impl Wake for NoWake {
    fn wake(self: Arc<Self>) {}
}

/// A fleet, its virtual time, and its running requests.
struct Fleet {
    router: Router,
    workers: Vec<WorkerId>,
    now: Duration,
    live: VecDeque<(Booking, u32)>,
}

impl Fleet {
    fn new() -> Self {
        let router = Router::with_lock_observer(RouterConfig::default(), Arc::new(Stopwatch));
        Self {
            router: router.unwrap(),
            workers: Vec::new(),
            now: Duration::from_secs(1),
            live: VecDeque::new(),
        }
    }

    fn is_event_tracked(worker: usize) -> bool {
        worker.is_multiple_of(2)
    }

    fn add_workers(&mut self) {
        for number in 0..WORKERS {
            let id = named("add_worker", || {
                self.router.add_worker(spec(number, 0)).unwrap()
            });
            named("set_healthy", || self.router.set_healthy(id, true));
            if Self::is_event_tracked(number) {
                self.router.set_cache_source(id, CacheSource::Events);
            }
            self.workers.push(id);
        }
    }

    fn fill(&mut self) {
        for conversation in 0..CONVERSATIONS {
            for worker in 0..WORKERS {
                if Self::is_event_tracked(worker) {
                    let delta = stored(worker, conversation);
                    named("fill: apply_cache_delta", || {
                        self.router.apply_cache_delta(
                            self.workers[worker],
                            &delta,
                            Observed::Replayed,
                        );
                    });
                } else {
                    self.cache_by_request(worker);
                }
            }
        }
    }

    /// Runs a request on an estimated worker to its end.
    fn cache_by_request(&mut self, worker: usize) {
        let sequence = prompt(CONVERSATION);
        self.now += Duration::from_micros(100);
        let mut booking = named("fill: route", || {
            self.router
                .route(&Request::new(&sequence), self.now)
                .unwrap()
        });
        named("fill: move_to", || {
            booking.move_to(self.workers[worker], self.now).unwrap()
        });
        named("fill: on_tokens", || booking.on_tokens(2, self.now));
        named("fill: complete", || booking.complete(self.now));
    }

    /// Routes a request. Its prompt is `blocks` blocks long.
    fn route(&mut self, blocks: usize) {
        let sequence = prompt(blocks);
        let request = Request {
            model: "meta-llama/Llama-3.3-70B-Instruct-adapter-0",
            max_tokens: Some(200),
            is_streaming: !self.live.len().is_multiple_of(4),
            ..Request::new(&sequence)
        };
        let booking = named("route", || self.router.route(&request, self.now).unwrap());
        self.live.push_back((booking, 0));
    }

    /// Advances the time, and every live request by one step.
    fn step(&mut self) {
        self.now += Duration::from_millis(10);
        named("tick", || self.router.tick(self.now));
        let waker = Waker::from(Arc::new(NoWake));
        let mut context = Context::from_waker(&waker);
        for _ in 0..self.live.len() {
            let (mut booking, age) = self.live.pop_front().unwrap();
            let poll = named("poll_dispatch", || {
                booking.poll_dispatch(&mut context, &[], self.now)
            });
            if poll.is_pending() {
                self.live.push_back((booking, 0));
                continue;
            }
            match age {
                0..20 => {}
                20 => named("on_first_token", || booking.on_first_token(self.now)),
                21..40 => named("on_tokens", || booking.on_tokens(4, self.now)),
                40 => named("on_cached_tokens", || booking.on_cached_tokens(0)),
                _ => {
                    named("complete", || booking.complete(self.now));
                    continue;
                }
            }
            self.live.push_back((booking, age + 1));
        }
    }

    /// Queues requests until [`QUEUED`] wait, then lets all of them run.
    fn run_overloaded(&mut self) {
        for _ in 0..3 {
            while named("queued_requests", || self.router.queued_requests()) < QUEUED {
                self.route(256);
            }
            for _ in 0..30 {
                self.step();
            }
        }
        for step in 0..400 {
            if step % 40 == 0 {
                named("workers", || drop(self.router.workers(self.now)));
            }
            self.step();
        }
    }

    /// Routes requests whose model name is long, and batches.
    fn route_unusual_requests(&mut self) {
        let long_name = "m".repeat(1 << 20);
        for _ in 0..20 {
            let sequence = prompt(8);
            let request = Request {
                model: &long_name,
                ..Request::new(&sequence)
            };
            named("route: model name of 1 MiB", || {
                assert!(self.router.route(&request, self.now).is_err());
            });
            let further: Vec<Sequence> = (1..MAX_BATCH_PROMPTS).map(|_| prompt(64)).collect();
            let request = Request::new(&sequence);
            let batch = named("route_batch: 64 prompts", || {
                self.router
                    .route_batch(&request, &further, self.now)
                    .unwrap()
            });
            named("drop of a batch", || drop(batch));
            named("explain", || drop(self.router.explain(&request, self.now)));
        }
    }

    /// Restarts workers that have running and queued requests.
    fn restart_workers(&mut self) {
        for restart in 1..=RESTARTS {
            let number = restart * 37 % WORKERS;
            let id = self.workers[number];
            let mut others = Vec::new();
            for _ in 0..QUEUED {
                let sequence = prompt(64);
                let request = Request::new(&sequence);
                let mut booking = named("route", || self.router.route(&request, self.now).unwrap());
                named("move_to", || booking.move_to(id, self.now).unwrap());
                others.push(booking);
            }
            for _ in 0..3 {
                named("set_healthy: 1,000 queued", || {
                    self.router.set_healthy(id, false)
                });
            }
            named("set_healthy: 1,000 queued", || {
                self.router.set_healthy(id, true)
            });
            named("set_capacity", || {
                self.router.set_capacity(id, CAPACITY / 8)
            });
            named("set_eviction", || {
                self.router.set_eviction(id, EvictionRule::SglangRadix);
                self.router.set_eviction(id, EvictionRule::VllmLru);
            });
            named("clear_cache", || self.router.clear_cache(id));
            named("set_cache_source", || {
                self.router.set_cache_source(id, CacheSource::Estimated);
                self.router.set_cache_source(id, CacheSource::Events);
                self.router.set_cache_source(id, CacheSource::Estimated);
            });
            named("remove_worker", || self.router.remove_worker(id));
            named("drop of a booking", || drop(others));
            let spec = spec(number, restart);
            let id = named("add_worker", || self.router.add_worker(spec).unwrap());
            named("set_healthy", || self.router.set_healthy(id, true));
            self.workers[number] = id;
            self.step();
        }
    }
}

/// Replaces the oldest conversation of one event-tracked worker after the other, until `stop`.
fn stream_events(router: &Router, workers: &[WorkerId], stop: &AtomicBool) {
    let mut next = CONVERSATIONS;
    while !stop.load(Ordering::Relaxed) {
        for (number, &id) in workers.iter().enumerate().step_by(2) {
            let deltas = [removed(number, next - CONVERSATIONS), stored(number, next)];
            named("apply_cache_delta", || {
                for delta in &deltas {
                    router.apply_cache_delta(id, delta, Observed::Replayed);
                }
            });
            // About as many events as a fleet of this size publishes. Without a pause, the two
            // threads would pass the lock to each other most of the time.
            if number.is_multiple_of(16) {
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
        next += 1;
    }
}

/// Returns the holds of one run.
fn run() -> HoldsByCall {
    let total = Mutex::new(HoldsByCall::default());
    let mut fleet = Fleet::new();
    fleet.add_workers();
    fleet.fill();
    let workers = named("workers", || fleet.router.workers(fleet.now));
    let blocks: u64 = workers.iter().map(|worker| worker.cached_blocks).sum();
    println!("{WORKERS} workers cache {blocks} blocks");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (router, workers) = (fleet.router.clone(), fleet.workers.clone());
        let (stop, total) = (&stop, &total);
        scope.spawn(move || {
            stream_events(&router, &workers, stop);
            flush(total);
        });
        fleet.run_overloaded();
        fleet.route_unusual_requests();
        fleet.restart_workers();
        stop.store(true, Ordering::Relaxed);
        flush(total);
    });
    total.into_inner()
}

fn main() {
    let mut runs: Vec<HoldsByCall> = (0..RUNS).map(|_| run()).collect();
    println!("Microseconds; the least of {RUNS} runs.");
    print(&mut runs);
}
