//! How far requests are that nobody watches, by what is seen of others and by events.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::cache::Changes;
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(4).unwrap();

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A prompt and so many blocks of answer.
fn answered(content: u32, blocks: u32) -> Sequence {
    let tokens: Vec<u32> = (0..(2 + blocks) * BLOCK_SIZE.get())
        .map(|it| content << 16 | it)
        .collect();
    Sequence::from_tokens(&tokens, BLOCK_SIZE, 0)
}

fn prompt(content: u32) -> Sequence {
    answered(content, 0)
}

struct Side {
    router: Router,
    id: WorkerId,
}

impl Side {
    fn new() -> Self {
        let router = Router::new(RouterConfig {
            block_size: BLOCK_SIZE,
            ..RouterConfig::default()
        })
        .unwrap();
        let spec = WorkerSpec {
            name: "only".to_owned(),
            capacity_blocks: Some(1000),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
        Self { router, id }
    }

    fn book(&self, content: u32, streams: bool) -> Booking {
        let prompt = prompt(content);
        let request = Request {
            streams,
            ..Request::new(&prompt)
        };
        self.router.route(&request, at(0)).unwrap()
    }

    fn active(&self, seconds: u64) -> u64 {
        self.router.workers(at(seconds)).remove(0).active_blocks
    }
}

#[test]
fn one_that_came_after_a_waiting_one_waits() {
    let side = Side::new();
    let mut watched = side.book(1, true);
    let _whole = side.book(2, false);
    assert_eq!(side.active(1000), 4);
    watched.first_token(at(1000));
    assert!(side.active(1001) > 4);
}

#[test]
fn one_that_came_before_a_running_one_runs() {
    let side = Side::new();
    let _whole = side.book(2, false);
    let mut watched = side.book(1, true);
    let soon = Duration::from_micros(1);
    watched.first_token(soon);
    let fresh = |at| side.router.workers(at).remove(0).prefill_tokens;
    assert_eq!(fresh(soon + Duration::from_millis(100)), 0);
}

/// Events tell that these blocks were stored, the first `before` of them before.
fn tell(side: &Side, tokens: &Sequence, before: usize, now: impl Into<Option<Duration>>) {
    let mut changes = Changes {
        stride: 1,
        ..Changes::default()
    };
    changes.added.push_behind(tokens.hashes(), before);
    side.router.update_cache(side.id, &changes, now.into());
}

#[test]
fn events_tell_that_one_runs() {
    let side = Side::new();
    side.router.follow_events(side.id, true);
    let _watched = side.book(1, true);
    let _whole = side.book(2, false);
    assert_eq!(side.active(100), 4);
    tell(&side, &prompt(2), 0, at(100));
    assert!(side.active(101) > 4);
}

/// Events tell that the prompt's last block was filled, and one by one those of a long answer.
fn tell_long_answer(side: &Side, now: Option<Duration>) {
    for block in 0..50 {
        tell(side, &answered(1, block), 1 + block as usize, now);
    }
}

#[test]
fn events_tell_how_far_one_is() {
    let side = Side::new();
    side.router.follow_events(side.id, true);
    let _whole = side.book(1, false);
    // Far ahead of any forecast.
    let mut now = Duration::from_micros(1);
    for block in 0..50 {
        tell(&side, &answered(1, block), 1 + block as usize, now);
        now += Duration::from_micros(1);
    }
    let worker = || side.router.workers(now).remove(0);
    // Behind 49 blocks the next is begun.
    assert_eq!(worker().active_blocks, 2 + 49 + 1);
    assert_eq!(worker().prefill_tokens, 0);
}

#[test]
fn events_correct_a_forecast_that_went_too_fast() {
    let side = Side::new();
    side.router.follow_events(side.id, true);
    let _whole = side.book(1, false);
    tell(&side, &prompt(1), 0, at(0));
    assert!(side.active(1000) > 2 + 5);
    tell(&side, &answered(1, 1), 2, at(1000));
    let worker = side.router.workers(at(1000)).remove(0);
    assert_eq!(worker.active_blocks, 2 + 1 + 1);
    assert!(side.active(2000) > 2 + 5, "and goes on from there");
}

/// An answer of before may still be cached behind the prompt.
#[test]
fn what_is_listed_is_nobodys_progress() {
    let side = Side::new();
    side.router.follow_events(side.id, true);
    let _whole = side.book(1, false);
    let now = Duration::from_micros(1);
    tell(&side, &prompt(1), 0, now);
    tell_long_answer(&side, None);
    // Nor what is stored at once: another's prompt that goes on from this one.
    tell(&side, &answered(1, 50), 2, now);
    assert!(side.router.workers(now).remove(0).active_blocks < 2 + 10);
}

#[test]
fn nobody_is_further_than_it_may_come() {
    let side = Side::new();
    side.router.follow_events(side.id, true);
    let prompt = prompt(1);
    let request = Request {
        streams: false,
        max_tokens: Some(10),
        ..Request::new(&prompt)
    };
    let _whole = side.router.route(&request, at(0)).unwrap();
    let now = Duration::from_micros(1);
    tell_long_answer(&side, Some(now));
    assert!(side.router.workers(now).remove(0).active_blocks <= 2 + 3);
}

#[test]
fn of_two_with_one_prompt_nobody_knows_which_is_where() {
    let side = Side::new();
    side.router.follow_events(side.id, true);
    let _whole = side.book(1, false);
    let _watched = side.book(1, true);
    let now = Duration::from_micros(1);
    tell_long_answer(&side, Some(now));
    assert!(side.router.workers(now).remove(0).active_blocks < 2 + 10);
}
