//! One booking from the first token to the last: what is learned from it, and what it occupies while
//! its response is not streamed.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSnapshot, WorkerSpec};

fn router_with_one_worker() -> (Router, WorkerId) {
    let router = Router::new(RouterConfig {
        queue_order: None,
        ..RouterConfig::default()
    })
    .unwrap();
    let spec = WorkerSpec {
        name: "only".to_owned(),
        prefix_caching: true,
        ..WorkerSpec::default()
    };
    let id = router.add_worker(spec).unwrap();
    router.set_healthy(id, true);
    (router, id)
}

fn unhashed(tokens: u32) -> Sequence {
    Sequence::unhashed(tokens, RouterConfig::default().block_size)
}

fn millis(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn route(router: &Router, tokens: u32, now: Duration) -> Booking {
    let sequence = unhashed(tokens);
    router.route(&Request::new(&sequence), now).unwrap()
}

fn route_without_streaming(
    router: &Router,
    tokens: u32,
    max_tokens: Option<u32>,
    now: Duration,
) -> Booking {
    let sequence = unhashed(tokens);
    let request = Request {
        is_streaming: false,
        max_tokens,
        ..Request::new(&sequence)
    };
    router.route(&request, now).unwrap()
}

fn snapshot(router: &Router, now: Duration) -> WorkerSnapshot {
    router.workers(now).remove(0)
}

#[test]
fn prefill_speed_is_learned_from_first_tokens() {
    let (router, _) = router_with_one_worker();
    let mut now = Duration::ZERO;
    for prompt in 0..50 {
        let tokens = 1_000 + 200 * (prompt % 5);
        let mut booking = route(&router, tokens, now);
        now += Duration::from_secs_f64(f64::from(tokens) / 30_000.0);
        booking.on_tokens(1, now);
        now += millis(10);
        booking.complete(now);
    }
    let speed = snapshot(&router, now).latency.prefill_speed();
    assert!((speed / 30_000.0 - 1.0).abs() < 0.25, "{speed}");
}

#[test]
fn the_prefill_backlog_shrinks_with_time_and_with_the_first_token() {
    let (router, _) = router_with_one_worker();
    let mut first = route(&router, 6_000, Duration::ZERO);
    let second = route(&router, 4_000, Duration::ZERO);
    let backlog = |now| snapshot(&router, now).prefill_tokens;
    assert_eq!(backlog(millis(0)), 10_000);
    let later = backlog(millis(300));
    assert!(
        (7_000..8_000).contains(&later),
        "{later}: about 10,000 tokens per second until the speed is learned"
    );
    first.on_first_token(millis(400));
    assert!(backlog(millis(400)) <= 4_000);
    drop(second);
    assert_eq!(backlog(millis(400)), 0);
}

#[test]
fn inter_token_latency_is_learned_from_streams() {
    let (router, _) = router_with_one_worker();
    let mut booking = route(&router, 100, Duration::ZERO);
    let mut now = millis(50);
    booking.on_tokens(1, now);
    for _ in 0..200 {
        now += millis(24);
        booking.on_tokens(2, now);
        booking.on_tokens(0, now + millis(12)); // an empty delta
    }
    let latency = snapshot(&router, now).inter_token_latency.as_secs_f64();
    assert!((latency / 0.012 - 1.0).abs() < 0.05, "{latency}");
}

#[test]
fn estimated_output_grows_up_to_its_limit() {
    let (router, _) = router_with_one_worker();
    let mut booking = route_without_streaming(&router, 1_600, Some(64), Duration::ZERO);
    let blocks = |now| snapshot(&router, now).active_blocks;
    assert_eq!(blocks(millis(0)), 100);
    // The prefill takes 190 ms, and each token 20 ms.
    let mut last = 100;
    for step in 1..=30 {
        let now = blocks(millis(100 * step));
        assert!((last..=104).contains(&now), "{last} blocks, then {now}");
        last = now;
    }
    assert_eq!(last, 104);
    assert_eq!(blocks(Duration::from_secs(1_000_000)), 104);
    assert_eq!(snapshot(&router, Duration::MAX).context_tokens, 1_664);
    // The reported number replaces the estimate.
    booking.set_output_tokens(10, Duration::MAX);
    assert_eq!(snapshot(&router, Duration::MAX).context_tokens, 1_610);
    booking.complete(Duration::MAX);
    assert_eq!(snapshot(&router, Duration::MAX).active_blocks, 0);
}

/// The output of a prompt that ends in the middle of a block fills that block first.
#[test]
fn estimated_output_takes_a_block_when_the_last_one_is_full() {
    let (router, _) = router_with_one_worker();
    let _booking = route_without_streaming(&router, 1_595, Some(64), Duration::ZERO);
    let grows_at = |blocks| {
        let mut at = (0..2_000).map(millis);
        at.find(|now| snapshot(&router, *now).active_blocks == blocks)
    };
    // The prefill takes 190 ms, and each token 20 ms: first six tokens, then sixteen more.
    let (first, second) = (grows_at(101).unwrap(), grows_at(102).unwrap());
    assert!((millis(280)..=millis(330)).contains(&first), "{first:?}");
    let later = second - first;
    assert!((millis(310)..=millis(330)).contains(&later), "{later:?}");
}

#[test]
fn estimated_output_with_a_limit_of_zero_does_not_grow() {
    let (router, _) = router_with_one_worker();
    let _booking = route_without_streaming(&router, 100, Some(0), Duration::ZERO);
    assert_eq!(
        snapshot(&router, Duration::from_secs(60)).context_tokens,
        100
    );
}

/// An output whose tokens nothing reported has its forecast length. It must not confirm the forecast:
/// requests that end early would shorten the forecast each time, and none would lengthen it.
#[test]
fn forecasts_do_not_learn_from_estimated_outputs() {
    let (router, _) = router_with_one_worker();
    let mut now = Duration::ZERO;
    for _ in 0..500 {
        let booking = route_without_streaming(&router, 10, None, now);
        now += millis(500);
        booking.complete(now);
    }
    let before = snapshot(&router, now);
    assert_eq!(before.latency.prefill_accuracy.samples, 0);
    assert_eq!(before.latency.decode_accuracy.samples, 0);
    let _booking = route_without_streaming(&router, 1_000, None, now);
    let later = snapshot(&router, now + Duration::from_secs(60));
    assert_eq!(later.context_tokens, 1_000 + 128);
}

/// A worker with a LoRA adapter shares its latency model with the workers of the same base model.
#[test]
fn adapters_do_not_change_the_latency_model() {
    let (router, first) = router_with_one_worker();
    let add = |name: &str| {
        let name = name.to_owned();
        router.add_worker(WorkerSpec {
            name,
            ..WorkerSpec::default()
        })
    };
    let second = add("second").unwrap();
    let model = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    router.set_models(first, model(&["base"]));
    router.set_models(second, model(&["base"]));
    let mut now = Duration::ZERO;
    for round in 0..100 {
        let mut booking = route(&router, 1_000 + 10 * round, now);
        now += millis(10);
        booking.on_first_token(now);
        now += millis(90);
    }
    let prefill = |id| {
        let workers = router.workers(now);
        let worker = workers.iter().find(|worker| worker.id == id).unwrap();
        worker.latency.prefill_speed()
    };
    assert!(prefill(first) > 50_000.0, "{}", prefill(first));
    router.set_models(second, model(&["base", "adapter"]));
    assert!((prefill(second) / prefill(first) - 1.0).abs() < 0.1);
    // Another base model has its own latency model.
    router.set_models(second, model(&["large"]));
    assert!(prefill(second) < 20_000.0, "{}", prefill(second));
}

/// Calls without a prompt (a list of models, a health check) take time and compute no prompt token.
/// As samples of prefill speed they would reduce it to zero, and make forecasts infinite.
#[test]
fn calls_without_a_prompt_do_not_change_the_latency_model() {
    let (router, _) = router_with_one_worker();
    let mut now = Duration::ZERO;
    for _ in 0..20_000 {
        let booking = route(&router, 0, now);
        now += millis(5);
        booking.complete(now);
    }
    assert_eq!(snapshot(&router, now).latency.prefill_accuracy.samples, 0);
    drop(route_without_streaming(&router, 7_000, None, now));
    let worker = snapshot(&router, now);
    assert_eq!(
        (worker.active_blocks, worker.requests, worker.prefill_tokens),
        (0, 0, 0)
    );
}

#[test]
fn enormous_numbers_are_released_exactly() {
    let (router, id) = router_with_one_worker();
    let mut booking = route(&router, u32::MAX, Duration::MAX);
    booking.on_tokens(u32::MAX, Duration::ZERO);
    booking.on_tokens(u32::MAX, Duration::MAX);
    let second = route_without_streaming(&router, u32::MAX, Some(u32::MAX), Duration::MAX);
    assert!(snapshot(&router, Duration::MAX).context_tokens >= 3 * u64::from(u32::MAX));
    router.set_capacity(id, u32::MAX);
    booking.set_output_tokens(0, Duration::MAX);
    booking.complete(Duration::MAX);
    drop(second);
    router.set_capacity(id, 0);
    let worker = snapshot(&router, Duration::MAX);
    assert_eq!(
        (
            worker.active_blocks,
            worker.context_tokens,
            worker.prefill_tokens
        ),
        (0, 0, 0)
    );
}

#[test]
fn a_smaller_capacity_evicts_at_once() {
    let (router, id) = router_with_one_worker();
    let tokens: Vec<u32> = (0..1_600).collect();
    let sequence = Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0);
    let booking = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    booking.complete(Duration::ZERO);
    assert_eq!(snapshot(&router, Duration::ZERO).cached_blocks, 100);
    router.set_capacity(id, 30);
    assert_eq!(snapshot(&router, Duration::ZERO).cached_blocks, 30);
    let explained = router
        .explain(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    assert_eq!(explained.candidates[0].prefix_match.cached_blocks, 30);
}

/// An engine shares only full blocks of its own size. Two requests that fill a part of one do not
/// share it.
#[test]
fn an_engine_with_larger_blocks_shares_only_full_ones() {
    let (router, worker) = router_with_one_worker();
    router.set_engine_block_ratio(worker, NonZeroU32::new(2).unwrap());
    let now = || snapshot(&router, Duration::ZERO);
    let tokens: Vec<u32> = (0..5 * 16).collect();
    let sequence = Sequence::from_tokens(&tokens, NonZeroU32::new(16).unwrap(), 0);
    let book = || {
        let request = Request::new(&sequence);
        router.route(&request, Duration::ZERO).unwrap()
    };
    let (mut first, second) = (book(), book());
    assert_eq!(now().active_blocks, 4 + 2 + 2);
    first.on_tokens(1, Duration::ZERO);
    drop(second);
    assert_eq!(now().active_blocks, 6);
    first.complete(Duration::ZERO);
    assert_eq!((now().active_blocks, now().cached_blocks), (0, 4));
}

#[test]
fn an_engine_with_larger_blocks_occupies_whole_ones() {
    let (router, worker) = router_with_one_worker();
    let active = || snapshot(&router, Duration::ZERO).active_blocks;
    let before = route(&router, 16, Duration::ZERO);
    router.set_engine_block_ratio(worker, NonZeroU32::new(4).unwrap());
    // One engine block has 4 × 16 tokens.
    let mut booking = route(&router, 60, Duration::ZERO);
    assert_eq!(active(), 1 + 4);
    booking.on_tokens(4, Duration::ZERO);
    assert_eq!(active(), 1 + 4);
    booking.on_tokens(1, Duration::ZERO);
    assert_eq!(active(), 1 + 8);
    // The ratio of existing bookings does not change.
    router.set_engine_block_ratio(worker, NonZeroU32::MIN);
    drop(booking);
    assert_eq!(active(), 1);
    drop(before);
    assert_eq!(active(), 0);
}
