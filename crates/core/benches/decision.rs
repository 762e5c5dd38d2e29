//! What a decision costs: `cargo bench -p foresee-core`.
//!
//! The fleet is busy while it is measured: every worker runs four requests and caches what went
//! before, prompts share one of ten prefixes of half their length, and what follows is unique.
//! A decision includes booking, first token and freeing.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use foresee_core::booking::Booking;
use foresee_core::choose::Policy;
use foresee_core::fleet::WorkerSpec;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, salt};

// As in the program: chains are allocated by one thread and may be freed by another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

const ISL: usize = 4096;
const LONG_ISL: usize = 131_072;
const WORKERS: [usize; 3] = [8, 64, 512];

/// Numbers requests across threads; also the clock.
static REQUESTS: AtomicU64 = AtomicU64::new(1);

fn now() -> Duration {
    Duration::from_micros(100 * REQUESTS.load(Ordering::Relaxed))
}

/// A prompt whose first half is one of ten, and whose second half no other has.
fn tokens(isl: usize) -> Vec<u32> {
    let mut tokens = vec![0; isl];
    renew(&mut tokens);
    tokens
}

/// Makes `tokens` the next request's prompt.
fn renew(tokens: &mut [u32]) {
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

/// A fleet in the middle of its work. The bookings keep it so.
fn busy_fleet(workers: usize, isl: usize) -> (Router, Vec<Booking>) {
    busy_fleet_under(Policy::default(), workers, isl)
}

fn busy_fleet_under(policy: Policy, workers: usize, isl: usize) -> (Router, Vec<Booking>) {
    let config = RouterConfig {
        policy,
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
        booking.tokens(20, now());
        booking.finish(now());
    }
    let running = (0..workers * 4).map(|_| {
        let mut booking = route(&router, &hash(&tokens(isl)));
        booking.tokens(20, now());
        booking
    });
    let running = running.collect();
    (router, running)
}

/// One request's life, less hashing.
fn decide(router: &Router, sequence: &Sequence) {
    let mut booking = route(router, sequence);
    booking.tokens(1, now());
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
    salt(black_box("meta-llama/Llama-3.3-70B-Instruct"), None, None)
}

/// Hash, choose, book, first token, free.
#[divan::bench(args = WORKERS, threads = [1, 2], sample_size = 50, sample_count = 2000)]
fn whole_decision(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet(workers, ISL);
    bencher
        .counter(ItemsCount::new(1_u32))
        .with_inputs(|| tokens(ISL))
        .bench_refs(|tokens| decide(&router, &hash(tokens)));
    drop(running);
}

/// Choose, book, first token, free: what is not hashing, one by one, so that the median is that
/// of single decisions.
#[divan::bench(args = WORKERS, sample_size = 1, sample_count = 20_000)]
fn without_hashing(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet(workers, ISL);
    bencher
        .with_inputs(|| hash(&tokens(ISL)))
        .bench_local_refs(|sequence| decide(&router, sequence));
    drop(running);
}

/// The same by the cost in blocks.
#[divan::bench(args = WORKERS, sample_size = 1, sample_count = 20_000)]
fn without_hashing_in_blocks(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet_under(Policy::Kv, workers, ISL);
    bencher
        .with_inputs(|| hash(&tokens(ISL)))
        .bench_local_refs(|sequence| decide(&router, sequence));
    drop(running);
}

/// The same for prompts 32 times as long.
#[divan::bench(args = WORKERS, sample_size = 1, sample_count = 2_000)]
fn without_hashing_at_128k(bencher: Bencher<'_, '_>, workers: usize) {
    let (router, running) = busy_fleet(workers, LONG_ISL);
    bencher
        .with_inputs(|| hash(&tokens(LONG_ISL)))
        .bench_local_refs(|sequence| decide(&router, sequence));
    drop(running);
}

/// Counting one more token of a running stream.
#[divan::bench]
fn token(bencher: Bencher<'_, '_>) {
    let (router, running) = busy_fleet(8, ISL);
    let mut booking = route(&router, &hash(&tokens(ISL)));
    bencher.bench_local(|| booking.tokens(1, now()));
    drop(running);
}
