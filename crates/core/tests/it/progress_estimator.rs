//! Progress of requests whose responses are not streamed: by observations of other requests, and by
//! events.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::event_index::CacheDelta;
use foresee_core::router::{CacheSource, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(4).unwrap();

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Returns a prompt of two blocks, followed by `blocks` blocks of output.
fn with_output(content: u32, blocks: u32) -> Sequence {
    let tokens: Vec<u32> = (0..(2 + blocks) * BLOCK_SIZE.get())
        .map(|token| content << 16 | token)
        .collect();
    Sequence::from_tokens(&tokens, BLOCK_SIZE, 0)
}

fn prompt(content: u32) -> Sequence {
    with_output(content, 0)
}

/// A router with one worker.
struct Fleet {
    router: Router,
    id: WorkerId,
}

impl Fleet {
    fn new() -> Self {
        let router = Router::new(RouterConfig {
            block_size: BLOCK_SIZE,
            queue_order: None,
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

    fn book(&self, content: u32, is_streaming: bool) -> Booking {
        let prompt = prompt(content);
        let request = Request {
            is_streaming,
            ..Request::new(&prompt)
        };
        self.router.route(&request, at(0)).unwrap()
    }

    fn active_blocks(&self, seconds: u64) -> u64 {
        self.router.workers(at(seconds)).remove(0).active_blocks
    }
}

#[test]
fn a_request_after_one_without_a_first_token_is_in_prefill() {
    let fleet = Fleet::new();
    let mut streamed = fleet.book(1, true);
    let _unstreamed = fleet.book(2, false);
    assert_eq!(fleet.active_blocks(1000), 4);
    streamed.on_first_token(at(1000));
    assert!(fleet.active_blocks(1001) > 4);
}

#[test]
fn a_request_before_one_with_a_first_token_has_started() {
    let fleet = Fleet::new();
    let _unstreamed = fleet.book(2, false);
    let mut streamed = fleet.book(1, true);
    let soon = Duration::from_micros(1);
    streamed.on_first_token(soon);
    let prefill_tokens = |at| fleet.router.workers(at).remove(0).prefill_tokens;
    assert_eq!(prefill_tokens(soon + Duration::from_millis(100)), 0);
}

/// Reports the blocks of `sequence` after the first `prefix_blocks` as stored. `None` for `now` means
/// a replayed event.
fn report_stored(
    fleet: &Fleet,
    sequence: &Sequence,
    prefix_blocks: usize,
    now: impl Into<Option<Duration>>,
) {
    let mut delta = CacheDelta {
        engine_block_ratio: 1,
        ..CacheDelta::default()
    };
    delta.stored.push_suffix(sequence.hashes(), prefix_blocks);
    fleet
        .router
        .apply_cache_delta(fleet.id, &delta, Observed::from(now.into()));
}

#[test]
fn an_event_shows_that_a_request_has_started() {
    let fleet = Fleet::new();
    fleet.router.set_cache_source(fleet.id, CacheSource::Events);
    let _streamed = fleet.book(1, true);
    let _unstreamed = fleet.book(2, false);
    assert_eq!(fleet.active_blocks(100), 4);
    report_stored(&fleet, &prompt(2), 0, at(100));
    assert!(fleet.active_blocks(101) > 4);
}

/// Reports the last block of the prompt as stored, and then the blocks of a long output one by one.
fn report_long_output(fleet: &Fleet, now: Option<Duration>) {
    for block in 0..50 {
        report_stored(fleet, &with_output(1, block), 1 + block as usize, now);
    }
}

#[test]
fn events_show_how_long_an_output_is() {
    let fleet = Fleet::new();
    fleet.router.set_cache_source(fleet.id, CacheSource::Events);
    let _unstreamed = fleet.book(1, false);
    // Much faster than the estimate.
    let mut now = Duration::from_micros(1);
    for block in 0..50 {
        report_stored(&fleet, &with_output(1, block), 1 + block as usize, now);
        now += Duration::from_micros(1);
    }
    let worker = || fleet.router.workers(now).remove(0);
    // After 49 blocks the next one is started.
    assert_eq!(worker().active_blocks, 2 + 49 + 1);
    assert_eq!(worker().prefill_tokens, 0);
}

#[test]
fn events_correct_an_estimate_that_is_too_fast() {
    let fleet = Fleet::new();
    fleet.router.set_cache_source(fleet.id, CacheSource::Events);
    let _unstreamed = fleet.book(1, false);
    report_stored(&fleet, &prompt(1), 0, at(0));
    assert!(fleet.active_blocks(1000) > 2 + 5);
    report_stored(&fleet, &with_output(1, 1), 2, at(1000));
    let worker = fleet.router.workers(at(1000)).remove(0);
    assert_eq!(worker.active_blocks, 2 + 1 + 1);
    assert!(
        fleet.active_blocks(2000) > 2 + 5,
        "and the estimate continues from there"
    );
}

/// The output of an earlier request may still be cached after the prompt.
#[test]
fn replayed_events_are_not_progress() {
    let fleet = Fleet::new();
    fleet.router.set_cache_source(fleet.id, CacheSource::Events);
    let _unstreamed = fleet.book(1, false);
    let now = Duration::from_micros(1);
    report_stored(&fleet, &prompt(1), 0, now);
    report_long_output(&fleet, None);
    // Nor are several blocks stored at once: they belong to a longer prompt.
    report_stored(&fleet, &with_output(1, 50), 2, now);
    assert!(fleet.router.workers(now).remove(0).active_blocks < 2 + 10);
}

#[test]
fn events_do_not_exceed_the_output_limit() {
    let fleet = Fleet::new();
    fleet.router.set_cache_source(fleet.id, CacheSource::Events);
    let prompt = prompt(1);
    let request = Request {
        is_streaming: false,
        max_tokens: Some(10),
        ..Request::new(&prompt)
    };
    let _unstreamed = fleet.router.route(&request, at(0)).unwrap();
    let now = Duration::from_micros(1);
    report_long_output(&fleet, Some(now));
    assert!(fleet.router.workers(now).remove(0).active_blocks <= 2 + 3);
}

#[test]
fn events_show_no_progress_if_two_requests_have_the_same_prompt() {
    let fleet = Fleet::new();
    fleet.router.set_cache_source(fleet.id, CacheSource::Events);
    let _unstreamed = fleet.book(1, false);
    let _streamed = fleet.book(1, true);
    let now = Duration::from_micros(1);
    report_long_output(&fleet, Some(now));
    assert!(fleet.router.workers(now).remove(0).active_blocks < 2 + 10);
}
