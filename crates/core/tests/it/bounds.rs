//! Bounds on client input, on the queue and on batches, and removal of what a worker held.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_core::booking::Booking;
use foresee_core::event_index::{CacheDelta, PrefixRuns};
use foresee_core::queue::QueueOrder;
use foresee_core::router::{
    CacheSource, MAX_MODEL_NAME_BYTES, Observed, Request, RouteError, Router, RouterConfig,
};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};

const NOW: Duration = Duration::from_secs(1);

fn router(change: impl FnOnce(&mut RouterConfig)) -> Router {
    let mut config = RouterConfig::default();
    change(&mut config);
    Router::new(config).unwrap()
}

fn add_worker(router: &Router, name: &str, models: &[&str]) -> WorkerId {
    let id = router.add_worker(WorkerSpec {
        name: name.to_owned(),
        models: models.iter().map(|&model| model.to_owned()).collect(),
        capacity_blocks: Some(100_000),
        prefix_caching: true,
        ..WorkerSpec::default()
    });
    let id = id.unwrap();
    router.set_healthy(id, true);
    id
}

/// Returns a prompt of `tokens` tokens that shares no block with a prompt of another `seed`.
fn prompt(seed: u32, tokens: u32) -> Sequence {
    let tokens: Vec<u32> = (0..tokens).map(|token| token | seed << 20).collect();
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 7)
}

/// Counts how often a task is woken.
#[derive(Default)]
struct WakeCount(AtomicUsize);

impl Wake for WakeCount {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl WakeCount {
    fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

fn poll(booking: &mut Booking, wakes: &Arc<WakeCount>) -> Poll<Result<(), RouteError>> {
    let waker = Waker::from(Arc::clone(wakes));
    booking.poll_dispatch(&mut Context::from_waker(&waker), &[], NOW)
}

#[test]
fn a_model_name_that_is_too_long_is_unknown() {
    let router = router(|_| ());
    add_worker(&router, "a", &[]);
    let sequence = prompt(1, 100);
    let route = |model: &str| {
        let request = Request {
            model,
            ..Request::new(&sequence)
        };
        router.route(&request, NOW).map(drop)
    };
    assert_eq!(route(&"m".repeat(MAX_MODEL_NAME_BYTES)), Ok(()));
    // The beginning in the error ends with a whole character.
    let name = format!("m{}", "é".repeat(MAX_MODEL_NAME_BYTES));
    let beginning = name[..MAX_MODEL_NAME_BYTES - 1].to_owned();
    assert_eq!(route(&name), Err(RouteError::UnknownModel(beginning)));
}

#[test]
fn a_prompt_of_another_block_size_is_refused() {
    let router = router(|_| ());
    add_worker(&router, "a", &[]);
    let sequence = prompt(1, 100);
    let other = Sequence::from_tokens(&[1; 64], 32.try_into().unwrap(), 7);
    let mismatch = RouteError::BlockSizeMismatch {
        prompt: 32.try_into().unwrap(),
        router: 16.try_into().unwrap(),
    };
    let booked = router.route(&Request::new(&other), NOW).map(drop);
    assert_eq!(booked.as_ref(), Err(&mismatch));
    let explained = router.explain(&Request::new(&other), NOW).map(drop);
    assert_eq!(explained.as_ref(), Err(&mismatch));
    let batch = router.route_batch(&Request::new(&sequence), &[other], NOW);
    assert_eq!(batch.map(drop), Err(mismatch));
    assert_eq!(router.booking_count(), 0);
}

#[test]
fn a_batch_of_too_many_prompts_is_refused() {
    let router = router(|_| ());
    add_worker(&router, "a", &[]);
    let prompts: Vec<Sequence> = (0..=MAX_BATCH_PROMPTS as u32)
        .map(|seed| prompt(seed, 20))
        .collect();
    let route = |further: &[Sequence]| {
        let request = Request::new(&prompts[0]);
        router.route_batch(&request, further, NOW).map(drop)
    };
    assert_eq!(route(&prompts[1..MAX_BATCH_PROMPTS]), Ok(()));
    let too_many = RouteError::TooManyPrompts {
        prompts: MAX_BATCH_PROMPTS + 1,
        limit: MAX_BATCH_PROMPTS,
    };
    assert_eq!(route(&prompts[1..]), Err(too_many));
    assert_eq!(router.booking_count(), 0);
}

#[test]
fn a_full_queue_refuses_a_request_before_it_is_booked() {
    let router = router(|config| {
        config.queue_order = Some(QueueOrder::Fcfs);
        config.queue_limit = Some(2);
    });
    add_worker(&router, "a", &[]);
    let sequences: Vec<Sequence> = (0..4).map(|seed| prompt(seed, 50_000)).collect();
    let route = |index: usize| router.route(&Request::new(&sequences[index]), NOW);
    let sent = route(0).unwrap();
    let queued = [route(1).unwrap(), route(2).unwrap()];
    assert_eq!(router.queued_requests(), 2);
    let full = RouteError::QueueFull { limit: 2 };
    assert_eq!(route(3).map(drop), Err(full));
    assert_eq!(router.booking_count(), 3);
    // An idle worker takes requests however long the queue is.
    add_worker(&router, "b", &[]);
    let dispatched = route(3).unwrap();
    assert_eq!(router.queued_requests(), 2);
    drop((dispatched, queued));
    assert!(route(1).is_ok());
    drop(sent);
}

#[test]
fn only_a_change_of_state_wakes_the_queue() {
    let router = router(|config| config.queue_order = Some(QueueOrder::Fcfs));
    let id = add_worker(&router, "a", &[]);
    let wakes = Arc::new(WakeCount::default());
    let sequences: Vec<Sequence> = (0..100).map(|seed| prompt(seed, 20_000)).collect();
    let mut bookings: Vec<Booking> = sequences
        .iter()
        .map(|sequence| router.route(&Request::new(sequence), NOW).unwrap())
        .collect();
    let mut poll_all = || {
        let polls = bookings.iter_mut().map(|booking| poll(booking, &wakes));
        polls.filter(Poll::is_pending).count()
    };
    let queued = poll_all();
    assert!(queued > 90);
    wakes.take();
    router.set_healthy(id, false);
    assert_eq!(wakes.take(), queued);
    assert_eq!(poll_all(), 0, "no other worker can take them");
    assert_eq!(router.queued_requests(), queued);
    assert_eq!(poll_all(), queued, "the error is returned once");
    for _ in 0..3 {
        router.set_healthy(id, false);
    }
    assert_eq!(wakes.take(), 0);
}

#[test]
fn a_queued_request_is_refused_once_no_worker_can_take_it() {
    let router = router(|config| config.queue_order = Some(QueueOrder::Fcfs));
    let id = add_worker(&router, "a", &["m"]);
    let wakes = Arc::new(WakeCount::default());
    let sequences: Vec<Sequence> = (0..2).map(|seed| prompt(seed, 50_000)).collect();
    let request = |index: usize| Request {
        model: "m",
        ..Request::new(&sequences[index])
    };
    let sent = router.route(&request(0), NOW).unwrap();
    let mut queued = router.route(&request(1), NOW).unwrap();
    assert!(poll(&mut queued, &wakes).is_pending());
    router.set_draining(id, true);
    assert_eq!(wakes.take(), 1);
    let refused = RouteError::NoWorker("m".to_owned());
    assert_eq!(poll(&mut queued, &wakes), Poll::Ready(Err(refused)));
    assert_eq!(router.queued_requests(), 1);
    // A caller that waits on is woken when the worker accepts requests again.
    assert!(poll(&mut queued, &wakes).is_pending());
    router.set_draining(id, false);
    drop(sent);
    assert!(wakes.take() > 0);
    assert_eq!(poll(&mut queued, &wakes), Poll::Ready(Ok(())));
}

/// Idle workers take requests from the queues of workers with the same first model only. Requests
/// for a LoRA adapter of another base model must not depend on that.
#[test]
fn requests_of_an_unhealthy_worker_choose_again_when_another_becomes_healthy() {
    let router = router(|config| config.queue_order = Some(QueueOrder::Fcfs));
    let first = add_worker(&router, "a", &["base", "adapter"]);
    let second = add_worker(&router, "b", &["other base", "adapter"]);
    router.set_healthy(second, false);
    let wakes = Arc::new(WakeCount::default());
    let sequences: Vec<Sequence> = (0..100).map(|seed| prompt(seed, 20_000)).collect();
    let mut bookings: Vec<Booking> = sequences
        .iter()
        .map(|sequence| {
            let request = Request {
                model: "adapter",
                ..Request::new(sequence)
            };
            router.route(&request, NOW).unwrap()
        })
        .collect();
    router.set_healthy(first, false);
    for booking in &mut bookings {
        // Fails once; a caller that polls again waits on.
        let _ = poll(booking, &wakes);
    }
    let queued: Vec<usize> = (0..bookings.len())
        .filter(|&index| poll(&mut bookings[index], &wakes).is_pending())
        .collect();
    assert!(queued.len() > 90);
    wakes.take();
    router.set_healthy(second, true);
    assert_eq!(wakes.take(), queued.len());
    for index in queued {
        let _ = poll(&mut bookings[index], &wakes);
        assert_eq!(bookings[index].worker(), second);
    }
}

/// In a large fleet, the delays of a batch are computed for a shortlist of workers only.
#[test]
fn the_shortlist_of_a_batch_contains_the_worker_of_least_delay() {
    let router = router(|config| config.queue_order = None);
    let ids: Vec<WorkerId> = (0..200)
        .map(|number| add_worker(&router, &number.to_string(), &[]))
        .collect();
    let shared: Vec<Sequence> = (0..40).map(|seed| prompt(seed, 2_000)).collect();
    let mut running = Vec::new();
    for (number, &id) in ids.iter().enumerate() {
        // The workers differ in what they cache and in how many requests they have.
        for repetition in 0..number * 7 % 5 {
            let seed = (number * 13 + repetition * 11) % shared.len();
            let mut booking = router.route(&Request::new(&shared[seed]), NOW).unwrap();
            booking.move_to(id, NOW).unwrap();
            if repetition > 0 || number % 3 == 0 {
                booking.on_tokens(1, NOW);
            }
            running.push(booking);
        }
    }
    for (seed, prompts) in [(0, 2), (3, 3), (11, 8), (20, 20), (39, 40)] {
        let batch: Vec<Sequence> = (0..prompts)
            .map(|number| shared[(seed + number * 5) % shared.len()].clone())
            .collect();
        let first = Request::new(&batch[0]);
        let explained = router.explain_batch(&first, &batch[1..], NOW).unwrap();
        let delay_of = |id: WorkerId| {
            let candidates = explained.candidates.iter();
            let found = candidates.filter(|candidate| candidate.id == id);
            let weight = RouterConfig::default().ttft_weight;
            found.map(|candidate| candidate.delay.total(weight)).next()
        };
        let best = ids.iter().filter_map(|&id| delay_of(id));
        let best = best.min_by(f64::total_cmp).unwrap();
        let routed = router.route_batch(&first, &batch[1..], NOW).unwrap();
        let chosen = delay_of(routed.worker()).unwrap();
        assert!(
            (chosen / best - 1.0).abs() < 1e-9,
            "{prompts} prompts: {chosen} instead of {best}"
        );
    }
}

#[test]
fn a_removed_worker_leaves_nothing_behind_while_its_bookings_end() {
    let router = router(|config| config.queue_order = Some(QueueOrder::Fcfs));
    for round in 0..20 {
        let id = add_worker(&router, &round.to_string(), &[]);
        let mut bookings: Vec<Booking> = (0..150)
            .map(|number| {
                let sequence = prompt(number / 2, 400);
                router.route(&Request::new(&sequence), NOW).unwrap()
            })
            .collect();
        for booking in bookings.iter_mut().step_by(3) {
            booking.on_tokens(1, NOW);
        }
        for booking in bookings.drain(..50) {
            booking.complete(NOW);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(router.remove_worker(id)));
            scope.spawn(|| bookings.drain(..50));
        });
        assert!(router.workers(NOW).is_empty());
        assert_eq!(router.prefix_tree_nodes(), 0);
        assert_eq!(router.queued_requests(), 0);
        // The next worker has the same index, and none of the blocks.
        let next = add_worker(&router, "next", &[]);
        let sequence = prompt(0, 400);
        let explained = router.explain(&Request::new(&sequence), NOW).unwrap();
        assert_eq!(explained.candidates[0].prefix_match.overlap(), 0);
        drop(bookings);
        assert_eq!(router.workers(NOW)[0].requests, 0);
        assert!(router.remove_worker(next));
        assert_eq!(router.booking_count(), 0);
    }
}

#[test]
fn a_large_cache_is_cleared_completely() {
    let router = router(|config| config.queue_order = None);
    let id = add_worker(&router, "a", &[]);
    let fill_estimate = || {
        for seed in 0..300 {
            let mut booking = router
                .route(&Request::new(&prompt(seed, 400)), NOW)
                .unwrap();
            booking.on_tokens(1, NOW);
            booking.complete(NOW);
        }
        assert!(router.prefix_tree_nodes() >= 300);
    };
    fill_estimate();
    router.clear_cache(id);
    assert_eq!(router.prefix_tree_nodes(), 0);
    fill_estimate();
    router.set_capacity(id, 25);
    assert_eq!(router.prefix_tree_nodes(), 1);
    router.set_capacity(id, 100_000);
    fill_estimate();
    router.set_cache_source(id, CacheSource::Events);
    assert_eq!(router.prefix_tree_nodes(), 0);
    for seed in 0..1_000 {
        let delta = CacheDelta {
            stored: PrefixRuns::from_sequence(prompt(seed, 400).hashes()),
            removed: PrefixRuns::default(),
            engine_block_ratio: 1,
        };
        router.apply_cache_delta(id, &delta, Observed::Replayed);
    }
    assert_eq!(router.indexed_blocks(), 25_000);
    router.set_cache_source(id, CacheSource::Estimated);
    assert_eq!(router.indexed_blocks(), 0);
    assert_eq!(router.workers(NOW)[0].cached_blocks, 0);
}
