//! Foresee's side: `foresee-core` behind its lock, called from ordinary threads.

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use foresee_core::booking::Booking;
use foresee_core::event_index::{CacheDelta, PrefixRuns};
use foresee_core::policy::NamedPolicy;
use foresee_core::router::{CacheSource, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};

use crate::scenario::{
    self, BLOCK_SIZE, Batches, CAPACITY_BLOCKS, Measurement, PROMPT_BLOCKS, Tally, Window,
};

/// Salt of all prompts.
pub(crate) const SALT: u64 = 7;

/// A router, its fleet, and the requests that run there.
pub(crate) struct Fleet {
    router: Router,
    /// Held only: dropping them would release them.
    _running: Vec<Booking>,
    /// Number of the next request. Also serves as the clock of the router: requests are 100 ms
    /// apart.
    next_request: AtomicU64,
}

/// Hashes a prompt.
pub(crate) fn hash(tokens: &[u32]) -> Sequence {
    let block_size = NonZeroU32::new(BLOCK_SIZE).expect("not zero");
    Sequence::from_tokens(tokens, block_size, SALT)
}

/// Returns a router with healthy workers, whose caches are known from `source`.
pub(crate) fn router(
    policy: NamedPolicy,
    source: CacheSource,
    workers: usize,
) -> (Router, Vec<WorkerId>) {
    let config = RouterConfig {
        policy,
        queue_order: None,
        ..RouterConfig::default()
    };
    let router = Router::new(config).expect("the default configuration is valid");
    let add = |worker| {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            capacity_blocks: Some(CAPACITY_BLOCKS),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).expect("names are unique");
        router.set_healthy(id, true);
        router.set_cache_source(id, source);
        id
    };
    let ids = (0..workers).map(add).collect();
    (router, ids)
}

impl Fleet {
    /// Returns a fleet on which the [earlier requests](scenario::earlier_requests) were booked.
    ///
    /// If the source is events, the workers have reported the prompts of all these requests as
    /// stored. Otherwise the estimated cache has followed the requests.
    pub(crate) fn new(policy: NamedPolicy, source: CacheSource, workers: usize) -> Self {
        let (router, ids) = router(policy, source, workers);
        let mut running = Vec::new();
        for earlier in scenario::earlier_requests(workers) {
            let sequence = scenario::with_prompt(earlier.number, hash);
            let now = clock(earlier.number);
            let id = ids[earlier.worker];
            if source == CacheSource::Events {
                let delta = CacheDelta {
                    stored: PrefixRuns::from_sequence(sequence.hashes()),
                    engine_block_ratio: 1,
                    ..CacheDelta::default()
                };
                router.apply_cache_delta(id, &delta, Observed::Live(now));
                if !earlier.is_running {
                    continue;
                }
            }
            let request = Request {
                only_worker: Some(id),
                ..Request::new(&sequence)
            };
            let mut booking = router.route(&request, now).expect("workers are healthy");
            let first_token_at = first_token_at(&booking, now);
            booking.on_tokens(1, first_token_at);
            match earlier.is_running {
                true => running.push(booking),
                false => booking.complete(first_token_at),
            }
        }
        Self {
            router,
            _running: running,
            next_request: AtomicU64::new(scenario::first_measured_request(workers)),
        }
    }

    /// Makes decisions on `threads` threads, hashing included.
    pub(crate) fn measure(&self, threads: usize) -> Measurement {
        let window = Window::from_now();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..threads)
                .map(|_| scope.spawn(|| self.decide_during(window)))
                .collect();
            let tallies = threads.into_iter().map(|thread| thread.join());
            Tally::measurement(tallies.map(|tally| tally.expect("the thread did not panic")))
        })
    }

    /// Makes decisions on one thread, and counts their time without that of hashing.
    pub(crate) fn measure_without_hashing(&self) -> Measurement {
        let mut batches = Batches::new();
        for decision in Batches::decisions() {
            let request = self.next_request();
            let sequence = scenario::with_prompt(request, hash);
            let start = Instant::now();
            let cached_blocks = self.decide(&sequence, clock(request));
            batches.add(decision, start.elapsed(), cached_blocks);
        }
        batches.measurement()
    }

    fn decide_during(&self, window: Window) -> Tally {
        let mut tally = Tally::default();
        while let Some(slice) = window.slice() {
            let request = self.next_request();
            let sequence = scenario::with_prompt(request, hash);
            let cached_blocks = self.decide(&sequence, clock(request));
            tally.count(slice, cached_blocks);
        }
        tally
    }

    fn next_request(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed)
    }

    /// Routes a request, reports its first token, and releases it. Returns how many blocks of the
    /// prompt its worker has.
    fn decide(&self, sequence: &Sequence, now: Duration) -> u64 {
        let mut booking = self
            .router
            .route(&Request::new(sequence), now)
            .expect("workers are healthy");
        booking.on_tokens(1, first_token_at(&booking, now));
        let prefill_blocks = booking.decision().cost.prefill_blocks;
        drop(black_box(booking));
        PROMPT_BLOCKS as u64 - u64::from(prefill_blocks)
    }
}

/// Returns when a request arrives.
fn clock(request: u64) -> Duration {
    Duration::from_millis(100 * request)
}

/// Returns when a request that arrives at `now` has its first token: after 5 ms, and 20 µs for each
/// token to compute.
fn first_token_at(booking: &Booking, now: Duration) -> Duration {
    let prefill_blocks = u64::from(booking.decision().cost.prefill_blocks);
    now + Duration::from_micros(5_000 + 20 * u64::from(BLOCK_SIZE) * prefill_blocks)
}
