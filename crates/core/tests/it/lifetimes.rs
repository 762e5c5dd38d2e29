//! One booking from the first token to the last: what is learned from it and what it holds when
//! nobody watches.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::fleet::{WorkerId, WorkerSnapshot, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;

fn router_of_one() -> (Router, WorkerId) {
    let router = Router::new(RouterConfig::default()).unwrap();
    let spec = WorkerSpec {
        name: "only".to_owned(),
        prefix_caching: true,
        ..WorkerSpec::default()
    };
    let id = router.add_worker(spec).unwrap();
    router.set_healthy(id, true);
    (router, id)
}

fn opaque(tokens: u32) -> Sequence {
    Sequence::opaque(tokens, RouterConfig::default().block_size)
}

fn millis(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn route(router: &Router, tokens: u32, now: Duration) -> Booking {
    let sequence = opaque(tokens);
    router.route(&Request::new(&sequence), now).unwrap()
}

fn route_unwatched(router: &Router, tokens: u32, most: Option<u32>, now: Duration) -> Booking {
    let sequence = opaque(tokens);
    let request = Request {
        streams: false,
        max_tokens: most,
        ..Request::new(&sequence)
    };
    router.route(&request, now).unwrap()
}

fn look(router: &Router, now: Duration) -> WorkerSnapshot {
    router.workers(now).remove(0)
}

#[test]
fn prefill_speed_is_learned_from_first_tokens() {
    let (router, _) = router_of_one();
    let mut now = Duration::ZERO;
    for prompt in 0..50 {
        let tokens = 1_000 + 200 * (prompt % 5);
        let mut booking = route(&router, tokens, now);
        now += Duration::from_secs_f64(f64::from(tokens) / 30_000.0);
        booking.tokens(1, now);
        now += millis(10);
        booking.finish(now);
    }
    let speed = look(&router, now).pace.prefill_speed();
    assert!((speed / 30_000.0 - 1.0).abs() < 0.25, "{speed}");
}

#[test]
fn the_backlog_decays_and_the_first_token_settles_it() {
    let (router, _) = router_of_one();
    let mut first = route(&router, 6_000, Duration::ZERO);
    let second = route(&router, 4_000, Duration::ZERO);
    let backlog = |now| look(&router, now).prefill_tokens;
    assert_eq!(backlog(millis(0)), 10_000);
    let later = backlog(millis(300));
    assert!(
        (7_000..8_000).contains(&later),
        "{later}: nearly 10,000 a second until it is known better"
    );
    first.first_token(millis(400));
    assert!(backlog(millis(400)) <= 4_000);
    drop(second);
    assert_eq!(backlog(millis(400)), 0);
}

#[test]
fn inter_token_latency_is_learned_from_streams() {
    let (router, _) = router_of_one();
    let mut booking = route(&router, 100, Duration::ZERO);
    let mut now = millis(50);
    booking.tokens(1, now);
    for _ in 0..200 {
        now += millis(24);
        booking.tokens(2, now);
        booking.tokens(0, now + millis(12)); // a comment, an empty delta
    }
    let latency = look(&router, now).inter_token_latency.as_secs_f64();
    assert!((latency / 0.012 - 1.0).abs() < 0.05, "{latency}");
}

#[test]
fn unwatched_output_grows_and_stops_where_it_is_expected_to() {
    let (router, _) = router_of_one();
    let mut booking = route_unwatched(&router, 1_600, Some(64), Duration::ZERO);
    let blocks = |now| look(&router, now).active_blocks;
    assert_eq!(blocks(millis(0)), 100);
    // 190 ms of prefill, then 20 ms for each token.
    let mut last = 100;
    for step in 1..=30 {
        let now = blocks(millis(100 * step));
        assert!((last..=104).contains(&now), "{last} blocks, then {now}");
        last = now;
    }
    assert_eq!(last, 104);
    assert_eq!(blocks(Duration::from_secs(1_000_000)), 104);
    assert_eq!(look(&router, Duration::MAX).context_tokens, 1_664);
    // What the worker says replaces the forecast.
    booking.set_tokens(10, Duration::MAX);
    assert_eq!(look(&router, Duration::MAX).context_tokens, 1_610);
    booking.finish(Duration::MAX);
    assert_eq!(look(&router, Duration::MAX).active_blocks, 0);
}

/// A prompt that ends in the middle of a block fills it long before it has answered a block.
#[test]
fn unwatched_output_takes_a_block_when_the_last_is_full() {
    let (router, _) = router_of_one();
    let _booking = route_unwatched(&router, 1_595, Some(64), Duration::ZERO);
    let grows_at = |blocks| {
        let mut at = (0..2_000).map(millis);
        at.find(|now| look(&router, *now).active_blocks == blocks)
    };
    // 190 ms of prefill, then 20 ms for each token: of the first six, and of sixteen more.
    let (first, second) = (grows_at(101).unwrap(), grows_at(102).unwrap());
    assert!((millis(280)..=millis(330)).contains(&first), "{first:?}");
    let later = second - first;
    assert!((millis(310)..=millis(330)).contains(&later), "{later:?}");
}

#[test]
fn unwatched_requests_that_may_answer_nothing_do_not_grow() {
    let (router, _) = router_of_one();
    let _booking = route_unwatched(&router, 100, Some(0), Duration::ZERO);
    assert_eq!(look(&router, Duration::from_secs(60)).context_tokens, 100);
}

/// An answer nobody counted is as long as was forecast. It must not confirm the forecast: those
/// that end early would shorten it each time, and none would ever lengthen it.
#[test]
fn forecasts_do_not_teach_themselves() {
    let (router, _) = router_of_one();
    let mut now = Duration::ZERO;
    for _ in 0..500 {
        let booking = route_unwatched(&router, 10, None, now);
        now += millis(500);
        booking.finish(now);
    }
    let before = look(&router, now);
    assert_eq!(before.pace.samples, [0, 0]);
    let _booking = route_unwatched(&router, 1_000, None, now);
    let later = look(&router, now + Duration::from_secs(60));
    assert_eq!(later.context_tokens, 1_000 + 128);
}

/// A worker of the same model that has loaded an adapter is no other engine.
#[test]
fn adapters_do_not_make_another_law() {
    let (router, one) = router_of_one();
    let add = |name: &str| {
        let name = name.to_owned();
        router.add_worker(WorkerSpec {
            name,
            ..WorkerSpec::default()
        })
    };
    let other = add("other").unwrap();
    let model = |names: &[&str]| names.iter().map(|&it| it.to_owned()).collect();
    router.set_models(one, model(&["base"]));
    router.set_models(other, model(&["base"]));
    let mut now = Duration::ZERO;
    for round in 0..100 {
        let mut booking = route(&router, 1_000 + 10 * round, now);
        now += millis(10);
        booking.first_token(now);
        now += millis(90);
    }
    let prefill = |id| {
        let workers = router.workers(now);
        let pace = workers.iter().find(|it| it.id == id).map(|it| it.pace);
        pace.unwrap().prefill_speed()
    };
    assert!(prefill(one) > 50_000.0, "{}", prefill(one));
    router.set_models(other, model(&["base", "adapter"]));
    assert!((prefill(other) / prefill(one) - 1.0).abs() < 0.1);
    // Another model is.
    router.set_models(other, model(&["large"]));
    assert!(prefill(other) < 20_000.0, "{}", prefill(other));
}

/// Calls without a prompt (a list of models, a health check) take time and compute no prompt
/// token. Taken for a speed, they would bring it to zero, and forecasts to infinity.
#[test]
fn calls_without_a_prompt_leave_the_forecast_alone() {
    let (router, _) = router_of_one();
    let mut now = Duration::ZERO;
    for _ in 0..20_000 {
        let booking = route(&router, 0, now);
        now += millis(5);
        booking.finish(now);
    }
    assert_eq!(look(&router, now).pace.samples[0], 0);
    drop(route_unwatched(&router, 7_000, None, now));
    let seen = look(&router, now);
    assert_eq!(
        (seen.active_blocks, seen.requests, seen.prefill_tokens),
        (0, 0, 0)
    );
}

#[test]
fn enormous_numbers_come_back_to_zero() {
    let (router, id) = router_of_one();
    let mut booking = route(&router, u32::MAX, Duration::MAX);
    booking.tokens(u32::MAX, Duration::ZERO);
    booking.tokens(u32::MAX, Duration::MAX);
    let other = route_unwatched(&router, u32::MAX, Some(u32::MAX), Duration::MAX);
    assert!(look(&router, Duration::MAX).context_tokens >= 3 * u64::from(u32::MAX));
    router.set_capacity(id, u32::MAX);
    booking.set_tokens(0, Duration::MAX);
    booking.finish(Duration::MAX);
    drop(other);
    router.set_capacity(id, 0);
    let seen = look(&router, Duration::MAX);
    assert_eq!(
        (seen.active_blocks, seen.context_tokens, seen.prefill_tokens),
        (0, 0, 0)
    );
}

#[test]
fn a_smaller_cache_is_smaller_at_once() {
    let (router, id) = router_of_one();
    let tokens: Vec<u32> = (0..1_600).collect();
    let sequence = Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0);
    let booking = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    booking.finish(Duration::ZERO);
    assert_eq!(look(&router, Duration::ZERO).cached_blocks, 100);
    router.set_capacity(id, 30);
    assert_eq!(look(&router, Duration::ZERO).cached_blocks, 30);
    let explained = router
        .explain(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    assert_eq!(explained.candidates[0].depth.cached, 30);
}

/// What two prompts have in common of a block that neither fills, an engine stores for each.
#[test]
fn an_engine_of_larger_blocks_shares_only_full_ones() {
    let (router, only) = router_of_one();
    router.set_stride(only, NonZeroU32::new(2).unwrap());
    let look = || look(&router, Duration::ZERO);
    let tokens: Vec<u32> = (0..5 * 16).collect();
    let sequence = Sequence::from_tokens(&tokens, NonZeroU32::new(16).unwrap(), 0);
    let book = || {
        let request = Request::new(&sequence);
        router.route(&request, Duration::ZERO).unwrap()
    };
    let (mut first, second) = (book(), book());
    assert_eq!(look().active_blocks, 4 + 2 + 2);
    first.tokens(1, Duration::ZERO);
    drop(second);
    assert_eq!(look().active_blocks, 6);
    first.finish(Duration::ZERO);
    assert_eq!((look().active_blocks, look().cached_blocks), (0, 4));
}

#[test]
fn an_engine_of_larger_blocks_takes_whole_ones() {
    let (router, only) = router_of_one();
    let active = || look(&router, Duration::ZERO).active_blocks;
    let before = route(&router, 16, Duration::ZERO);
    router.set_stride(only, NonZeroU32::new(4).unwrap());
    // 4 times 16 tokens is what its engine takes at a time.
    let mut booking = route(&router, 60, Duration::ZERO);
    assert_eq!(active(), 1 + 4);
    booking.tokens(4, Duration::ZERO);
    assert_eq!(active(), 1 + 4);
    booking.tokens(1, Duration::ZERO);
    assert_eq!(active(), 1 + 8);
    // What is booked stays as it is.
    router.set_stride(only, NonZeroU32::MIN);
    drop(booking);
    assert_eq!(active(), 1);
    drop(before);
    assert_eq!(active(), 0);
}
