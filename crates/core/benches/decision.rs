//! Time of a routing decision: `cargo bench -p foresee-core --bench decision`.
//!
//! The fleet is busy during the measurement: every worker runs four requests and caches earlier
//! ones. The first half of each prompt is one of ten prefixes; the second half is unique. A decision
//! includes booking, first token and release.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use foresee_core::booking::Booking;
use foresee_core::policy::{self, NamedPolicy};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, prefix_salt};
use foresee_core::workers::WorkerSpec;

fn main() {
    divan::main();
}

const ISL: usize = 4096;
const LONG_ISL: usize = 131_072;
const WORKERS: [usize; 3] = [8, 64, 512];

/// Number of requests so far, over all threads. Also serves as the clock.
static REQUESTS: AtomicU64 = AtomicU64::new(1);

fn now() -> Duration {
    Duration::from_millis(100 * REQUESTS.load(Ordering::Relaxed))
}

/// Returns when a request that is routed now has its first token: after 5 ms, and 20 µs for each
/// token to compute.
fn first_token_at(booking: &Booking) -> Duration {
    let prefill_blocks = u64::from(booking.decision().cost.prefill_blocks);
    now() + Duration::from_micros(5_000 + 320 * prefill_blocks)
}

/// Returns a prompt whose first half is one of ten prefixes, and whose second half is unique.
fn tokens(isl: usize) -> Vec<u32> {
    let mut tokens = vec![0; isl];
    make_unique(&mut tokens);
    tokens
}

/// Turns `tokens` into the prompt of the next request.
fn make_unique(tokens: &mut [u32]) {
    let request = REQUESTS.fetch_add(1, Ordering::Relaxed) as u32;
    let half = tokens.len() / 2;
    tokens[0] = request % 10;
    tokens[half] = request;
}

fn hash(tokens: &[u32]) -> Sequence {
    Sequence::from_tokens(tokens, RouterConfig::default().block_size, 7)
}

fn route(router: &Router, sequence: &Sequence) -> Booking {
    router.route(&Request::new(sequence), now()).unwrap()
}

/// Returns a fleet with running requests. They run until the bookings are dropped.
fn busy_fleet(workers: usize, isl: usize) -> (Router, Vec<Booking>) {
    busy_fleet_under(NamedPolicy::default(), workers, isl)
}

fn busy_fleet_under(policy: NamedPolicy, workers: usize, isl: usize) -> (Router, Vec<Booking>) {
    let config = RouterConfig {
        policy,
        queue_order: None,
        ..RouterConfig::default()
    };
    let router = Router::new(config).unwrap();
    for worker in 0..workers {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            capacity_blocks: Some(27_312),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
    }
    for _ in 0..workers * 8 {
        let sequence = hash(&tokens(isl));
        let mut booking = route(&router, &sequence);
        let first_token_at = first_token_at(&booking);
        booking.on_tokens(1, first_token_at);
        booking.complete(first_token_at);
    }
    let running = (0..workers * 4).map(|_| {
        let mut booking = route(&router, &hash(&tokens(isl)));
        booking.on_tokens(1, first_token_at(&booking));
        booking
    });
    let running = running.collect();
    (router, running)
}

/// Routes one request, reports its first token, and releases it.
fn decide(router: &Router, sequence: &Sequence) {
    let mut booking = route(router, sequence);
    booking.on_tokens(1, first_token_at(&booking));
    drop(black_box(booking));
}

#[divan::bench(args = [ISL, LONG_ISL])]
fn hashing(bencher: Bencher<'_, '_>, isl: usize) {
    let tokens = tokens(isl);
    bencher
        .counter(BytesCount::of_many::<u32>(isl))
        .bench_local(|| hash(black_box(&tokens)));
}

#[divan::bench]
fn salting() -> u64 {
    prefix_salt(black_box("meta-llama/Llama-3.3-70B-Instruct"), None, None)
}

/// Hashing, choice, booking, first token, release.
#[divan::bench(args = WORKERS, threads = [1, 2], sample_size = 50, sample_count = 2000)]
fn whole_decision(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet(workers, ISL);
    bencher
        .counter(ItemsCount::new(1_u32))
        .with_inputs(|| tokens(ISL))
        .bench_refs(|tokens| decide(&router, &hash(tokens)));
    drop(running);
}

/// Choice, booking, first token, release, without hashing. Measured one by one, so that the median is
/// that of single decisions.
#[divan::bench(args = WORKERS, sample_size = 1, sample_count = 20_000)]
fn without_hashing(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet(workers, ISL);
    bencher
        .with_inputs(|| hash(&tokens(ISL)))
        .bench_local_refs(|sequence| decide(&router, sequence));
    drop(running);
}

/// Decisions without hashing, under the policy `kv`.
#[divan::bench(args = WORKERS, sample_size = 1, sample_count = 20_000)]
fn without_hashing_in_blocks(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet_under(policy::KV, workers, ISL);
    bencher
        .with_inputs(|| hash(&tokens(ISL)))
        .bench_local_refs(|sequence| decide(&router, sequence));
    drop(running);
}

/// Decisions without hashing, for prompts of 131,072 tokens.
#[divan::bench(args = WORKERS, sample_size = 1, sample_count = 2_000)]
fn without_hashing_at_128k(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet(workers, LONG_ISL);
    bencher
        .with_inputs(|| hash(&tokens(LONG_ISL)))
        .bench_local_refs(|sequence| decide(&router, sequence));
    drop(running);
}

/// Report of one more token of a running request.
#[divan::bench]
fn token(bencher: Bencher<'_, '_>) {
    let (router, running) = busy_fleet(8, ISL);
    let mut booking = route(&router, &hash(&tokens(ISL)));
    bencher.bench_local(|| booking.on_tokens(1, now()));
    drop(running);
}
