//! Pending evictions: evictions for requests that wait in an engine, which its events will report
//! later.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::event_index::{CacheDelta, PrefixRuns};
use foresee_core::router::{CacheSource, Observed, Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};
use foresee_core::{EvictionRule, PrefixMatch};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(4).unwrap();
const NOW: Duration = Duration::ZERO;

/// A router with one worker whose cache source is events.
struct EventWorker {
    router: Router,
    id: WorkerId,
}

impl EventWorker {
    fn with_capacity(capacity_blocks: Option<u32>) -> Self {
        let router = Router::new(RouterConfig {
            block_size: BLOCK_SIZE,
            queue_order: None,
            ..RouterConfig::default()
        })
        .unwrap();
        let id = router
            .add_worker(WorkerSpec {
                name: "only".to_owned(),
                capacity_blocks,
                prefix_caching: true,
                ..WorkerSpec::default()
            })
            .unwrap();
        router.set_healthy(id, true);
        router.set_cache_source(id, CacheSource::Events);
        Self { router, id }
    }

    /// Reports all blocks of a prompt as stored.
    fn stored(&self, prompt: &Sequence) {
        self.router.apply_cache_delta(
            self.id,
            &CacheDelta {
                stored: PrefixRuns::from_sequence(prompt.hashes()),
                engine_block_ratio: 1,
                ..CacheDelta::default()
            },
            Observed::Live(Duration::ZERO),
        );
    }

    /// Reports the blocks of a prompt from index `from` on as removed.
    fn removed(&self, prompt: &Sequence, from: usize) {
        let mut delta = CacheDelta {
            engine_block_ratio: 1,
            ..CacheDelta::default()
        };
        delta.removed.push_suffix(prompt.hashes(), from);
        self.router
            .apply_cache_delta(self.id, &delta, Observed::Live(Duration::ZERO));
    }

    fn book(&self, prompt: &Sequence) -> Booking {
        self.router.route(&Request::new(prompt), NOW).unwrap()
    }

    /// Books a request whose response is not streamed.
    fn book_without_streaming(&self, prompt: &Sequence) -> Booking {
        let request = Request {
            is_streaming: false,
            ..Request::new(prompt)
        };
        self.router.route(&request, NOW).unwrap()
    }

    /// Runs a request from its booking to its end, with the events that it causes.
    fn serve(&self, prompt: &Sequence) {
        let mut booking = self.book(prompt);
        self.stored(prompt);
        booking.on_tokens(1, NOW);
        booking.complete(NOW);
    }

    fn prefix_match(&self, prompt: &Sequence) -> PrefixMatch {
        let explained = self.router.explain(&Request::new(prompt), NOW).unwrap();
        explained.candidates[0].prefix_match
    }

    fn cached_blocks(&self, prompt: &Sequence) -> u32 {
        self.prefix_match(prompt).cached_blocks
    }
}

/// Returns a prompt of `blocks` blocks and one token more, so that all of its blocks can be reused.
fn prompt(content: u32, blocks: u32) -> Sequence {
    let tokens: Vec<u32> = (0..blocks * BLOCK_SIZE.get() + 1)
        .map(|token| content << 16 | token)
        .collect();
    Sequence::from_tokens(&tokens, BLOCK_SIZE, 0)
}

#[test]
fn blocks_that_waiting_requests_will_evict_do_not_count_as_cached() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    assert_eq!(worker.cached_blocks(&cached), 6);

    // The request takes 7 of 10 blocks, so 3 of the 6 are left.
    let mut waiting = worker.book(&prompt(2, 6));
    assert_eq!(worker.cached_blocks(&cached), 3);
    let booked = worker.book(&cached);
    assert_eq!(booked.decision().cost.overlap_blocks, 3);
    assert_eq!(booked.decision().best_overlap_blocks, 3);
    drop(booked);
    let reported = worker.router.workers(NOW).remove(0).cached_blocks;
    assert_eq!(reported, 6, "the snapshot contains what events report");

    waiting.on_first_token(NOW);
    assert_eq!(worker.cached_blocks(&cached), 3, "events lag");
    worker.stored(&prompt(2, 6));
    assert_eq!(
        worker.cached_blocks(&cached),
        6,
        "no request waits, so the events are right"
    );
    drop(waiting);
    assert_eq!(worker.cached_blocks(&cached), 6);
}

#[test]
fn batches_do_not_count_blocks_with_pending_evictions() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waiting = worker.book(&prompt(2, 6));
    let further = [prompt(3, 1)];
    let request = Request::new(&cached);
    let batch = worker.router.route_batch(&request, &further, NOW).unwrap();
    assert_eq!(batch.decision().cost.overlap_blocks, 3);
}

#[test]
fn events_decide_about_evictions_that_they_have_confirmed() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waiting = worker.book(&prompt(2, 6));
    worker.removed(&cached, 4);
    assert_eq!(
        worker.cached_blocks(&cached),
        3,
        "a part of the eviction is pending"
    );
    worker.removed(&cached, 3);
    assert_eq!(worker.cached_blocks(&cached), 3);
    // Another request has computed the prompt again.
    worker.stored(&cached);
    assert_eq!(worker.cached_blocks(&cached), 6);
}

#[test]
fn evictions_for_running_requests_are_never_pending() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let mut running = worker.book(&prompt(2, 2));
    running.on_first_token(NOW);
    running.on_tokens(5 * BLOCK_SIZE.get(), NOW);
    assert_eq!(worker.cached_blocks(&cached), 6);
    // A waiting request takes the rest: the estimate includes the earlier evictions.
    let _waiting = worker.book(&prompt(3, 1));
    assert_eq!(worker.cached_blocks(&cached), 0);
}

#[test]
fn blocks_that_a_waiting_request_pins_stay_cached() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _other = worker.book(&prompt(2, 6));
    let _same = worker.book(&cached);
    assert_eq!(worker.prefix_match(&cached).overlap(), 6);
}

/// SGLang locks the cache hits of all requests of a step before it evicts for any of them.
#[test]
fn requests_of_one_step_do_not_evict_each_others_hits() {
    let at = Duration::from_millis;
    let worker = EventWorker::with_capacity(Some(12));
    worker
        .router
        .set_eviction(worker.id, EvictionRule::SglangRadix);
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let mut running = worker.book(&prompt(2, 1));
    running.on_tokens(1, at(100));
    running.on_tokens(1, at(200));

    let other = prompt(3, 6);
    let _waiting = worker.router.route(&Request::new(&other), at(250)).unwrap();
    assert_eq!(
        worker.cached_blocks(&cached),
        6,
        "both would be in one step"
    );
    // This step started too early to include a request that had just been sent.
    running.on_tokens(1, at(252));
    assert_eq!(worker.cached_blocks(&cached), 6);
    running.on_tokens(1, at(300));
    assert_eq!(worker.cached_blocks(&cached), 0);
}

#[test]
fn blocks_of_outputs_are_evicted_too() {
    let worker = EventWorker::with_capacity(Some(10));
    let (prompt_only, with_output) = (prompt(1, 4), prompt(1, 6));
    let mut booking = worker.book(&prompt_only);
    worker.stored(&with_output);
    booking.on_tokens(2 * BLOCK_SIZE.get() + 1, NOW);
    booking.set_output_sequence(with_output.clone());
    booking.complete(NOW);
    let _waiting = worker.book(&prompt(2, 4));
    assert_eq!(worker.cached_blocks(&with_output), 5);
}

#[test]
fn blocks_unknown_to_the_estimate_have_no_pending_evictions() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.stored(&cached);
    let _waiting = worker.book(&prompt(2, 9));
    assert_eq!(worker.cached_blocks(&cached), 6);
}

#[test]
fn an_assumed_capacity_causes_no_pending_evictions() {
    let worker = EventWorker::with_capacity(None);
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waiting = worker.book(&prompt(2, 20_000));
    assert_eq!(worker.cached_blocks(&cached), 6);
    // Nor does a request that ends.
    worker.serve(&cached);
    assert_eq!(worker.cached_blocks(&cached), 6);
}

#[test]
fn a_new_cache_source_discards_pending_evictions() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waiting = worker.book(&prompt(2, 6));
    worker
        .router
        .set_cache_source(worker.id, CacheSource::Estimated);
    assert_eq!(worker.cached_blocks(&cached), 0);
    worker
        .router
        .set_cache_source(worker.id, CacheSource::Events);
    worker.stored(&cached);
    assert_eq!(worker.cached_blocks(&cached), 6);
}

#[test]
fn pending_evictions_end_when_all_bookings_have_started() {
    let worker = EventWorker::with_capacity(Some(20));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let mut first = worker.book(&prompt(2, 15));
    assert!(worker.cached_blocks(&cached) < 6);
    let second = worker.book(&prompt(3, 1));
    first.on_first_token(NOW);
    worker.stored(&prompt(2, 15));
    assert!(worker.cached_blocks(&cached) < 6, "the second waits");
    let mut unstreamed = worker.book_without_streaming(&prompt(4, 1));
    drop(second);
    assert!(worker.cached_blocks(&cached) < 6, "the third waits");
    // By forecast it has started, although its response has not ended.
    let _ = worker.router.workers(Duration::from_secs(1000));
    worker.stored(&prompt(4, 1));
    assert_eq!(worker.cached_blocks(&cached), 6);
    unstreamed.on_tokens(1, Duration::from_secs(1000));
}

#[test]
fn events_without_changes_end_pending_evictions_too() {
    let worker = EventWorker::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let no_change = || {
        let observed = Observed::Live(NOW);
        worker
            .router
            .apply_cache_delta(worker.id, &CacheDelta::default(), observed);
    };
    let mut waiting = worker.book(&prompt(2, 6));
    no_change();
    assert_eq!(worker.cached_blocks(&cached), 3, "the request waits");
    waiting.on_first_token(NOW);
    assert_eq!(worker.cached_blocks(&cached), 3, "events lag");
    no_change();
    assert_eq!(worker.cached_blocks(&cached), 6);
}

#[test]
fn just_released_blocks_are_cached_before_events_report_them() {
    let worker = EventWorker::with_capacity(Some(20));
    let (prompt_only, with_output) = (prompt(1, 4), prompt(1, 6));
    let mut booking = worker.book(&prompt_only);
    worker.stored(&prompt_only);
    booking.on_tokens(2 * BLOCK_SIZE.get() + 1, NOW);
    booking.set_output_sequence(with_output.clone());
    booking.complete(NOW);
    assert_eq!(worker.cached_blocks(&with_output), 6);
    worker.stored(&prompt(2, 1));
    assert_eq!(
        worker.cached_blocks(&with_output),
        4,
        "later events did not report the output"
    );
}

#[test]
fn the_estimate_covers_only_a_few_unreported_releases() {
    let worker = EventWorker::with_capacity(Some(1000));
    for content in 0..20 {
        worker.book(&prompt(content, 4)).complete(NOW);
    }
    assert_eq!(worker.cached_blocks(&prompt(19, 4)), 4);
    assert_eq!(worker.cached_blocks(&prompt(1, 4)), 0);
}
