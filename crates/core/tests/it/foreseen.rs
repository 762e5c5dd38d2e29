//! Evictions that a worker's events will tell of, for requests that wait in its engine.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::cache::{Changes, Paths};
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::{Depth, Eviction};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(4).unwrap();
const NOW: Duration = Duration::ZERO;

/// A router with one worker whose events it follows.
struct Told {
    router: Router,
    id: WorkerId,
}

impl Told {
    fn with_capacity(capacity_blocks: Option<u32>) -> Self {
        let router = Router::new(RouterConfig {
            block_size: BLOCK_SIZE,
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
        router.follow_events(id, true);
        Self { router, id }
    }

    fn stored(&self, prompt: &Sequence) {
        self.router.update_cache(
            self.id,
            &Changes {
                added: Paths::whole(prompt.hashes()),
                stride: 1,
                ..Changes::default()
            },
            Some(Duration::ZERO),
        );
    }

    fn removed(&self, prompt: &Sequence, from: usize) {
        let mut changes = Changes {
            stride: 1,
            ..Changes::default()
        };
        changes.removed.push_behind(prompt.hashes(), from);
        self.router
            .update_cache(self.id, &changes, Some(Duration::ZERO));
    }

    fn book(&self, prompt: &Sequence) -> Booking {
        self.router.route(&Request::new(prompt), NOW).unwrap()
    }

    /// Nobody will see how far its answer is.
    fn book_whole(&self, prompt: &Sequence) -> Booking {
        let request = Request {
            streams: false,
            ..Request::new(prompt)
        };
        self.router.route(&request, NOW).unwrap()
    }

    /// A request from its booking to its end, with the events that it causes.
    fn serve(&self, prompt: &Sequence) {
        let mut booking = self.book(prompt);
        self.stored(prompt);
        booking.tokens(1, NOW);
        booking.finish(NOW);
    }

    fn depth(&self, prompt: &Sequence) -> Depth {
        let explained = self.router.explain(&Request::new(prompt), NOW).unwrap();
        explained.candidates[0].depth
    }

    fn cached(&self, prompt: &Sequence) -> u32 {
        self.depth(prompt).cached
    }
}

/// A prompt of so many blocks, and of one token more: all of its blocks can be reused.
fn prompt(content: u32, blocks: u32) -> Sequence {
    let tokens: Vec<u32> = (0..blocks * BLOCK_SIZE.get() + 1)
        .map(|token| content << 16 | token)
        .collect();
    Sequence::from_tokens(&tokens, BLOCK_SIZE, 0)
}

#[test]
fn what_waiting_requests_will_evict_is_not_counted_on() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    assert_eq!(worker.cached(&cached), 6);

    // Of 10 blocks it takes 7, so 3 of the 6 are left.
    let mut waits = worker.book(&prompt(2, 6));
    assert_eq!(worker.cached(&cached), 3);
    let booked = worker.book(&cached);
    assert_eq!(booked.decision().cost.overlap_blocks, 3);
    assert_eq!(booked.decision().best_overlap_blocks, 3);
    drop(booked);
    let told = worker.router.workers(NOW).remove(0).cached_blocks;
    assert_eq!(told, 6, "what events tell is what is reported");

    waits.first_token(NOW);
    assert_eq!(worker.cached(&cached), 3, "events lag");
    worker.stored(&prompt(2, 6));
    assert_eq!(worker.cached(&cached), 6, "nothing waits: events know");
    drop(waits);
    assert_eq!(worker.cached(&cached), 6);
}

#[test]
fn a_batch_does_not_count_on_it_either() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waits = worker.book(&prompt(2, 6));
    let further = [prompt(3, 1)];
    let request = Request::new(&cached);
    let batch = worker.router.route_batch(&request, &further, NOW).unwrap();
    assert_eq!(batch.decision().cost.overlap_blocks, 3);
}

#[test]
fn what_events_have_confirmed_is_theirs_to_tell() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waits = worker.book(&prompt(2, 6));
    worker.removed(&cached, 4);
    assert_eq!(worker.cached(&cached), 3, "not all has happened");
    worker.removed(&cached, 3);
    assert_eq!(worker.cached(&cached), 3);
    // Another has computed it again since.
    worker.stored(&cached);
    assert_eq!(worker.cached(&cached), 6);
}

#[test]
fn what_a_running_request_takes_is_told_by_events_alone() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let mut runs = worker.book(&prompt(2, 2));
    runs.first_token(NOW);
    runs.tokens(5 * BLOCK_SIZE.get(), NOW);
    assert_eq!(worker.cached(&cached), 6);
    // What waits takes the rest, by an account that knows what was evicted before.
    let _waits = worker.book(&prompt(3, 1));
    assert_eq!(worker.cached(&cached), 0);
}

#[test]
fn what_a_waiting_request_pins_stays() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _other = worker.book(&prompt(2, 6));
    let _same = worker.book(&cached);
    assert_eq!(worker.depth(&cached).overlap(), 6);
}

/// An SGLang keeps what a step's requests find before it makes room for any of them.
#[test]
fn requests_of_one_step_evict_nothing_of_each_others() {
    let at = Duration::from_millis;
    let worker = Told::with_capacity(Some(12));
    worker.router.set_eviction(worker.id, Eviction::Radix);
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let mut runs = worker.book(&prompt(2, 1));
    runs.tokens(1, at(100));
    runs.tokens(1, at(200));

    let other = prompt(3, 6);
    let _waits = worker.router.route(&Request::new(&other), at(250)).unwrap();
    assert_eq!(worker.cached(&cached), 6, "it would be of the same step");
    // This step began too early for one that had just been sent.
    runs.tokens(1, at(252));
    assert_eq!(worker.cached(&cached), 6);
    runs.tokens(1, at(300));
    assert_eq!(worker.cached(&cached), 0);
}

#[test]
fn an_answer_is_among_what_will_be_evicted() {
    let worker = Told::with_capacity(Some(10));
    let (asked, answered) = (prompt(1, 4), prompt(1, 6));
    let mut booking = worker.book(&asked);
    worker.stored(&answered);
    booking.tokens(2 * BLOCK_SIZE.get() + 1, NOW);
    booking.answered(answered.clone());
    booking.finish(NOW);
    let _waits = worker.book(&prompt(2, 4));
    assert_eq!(worker.cached(&answered), 5);
}

#[test]
fn what_the_shadow_never_knew_is_for_events_to_tell() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.stored(&cached);
    let _waits = worker.book(&prompt(2, 9));
    assert_eq!(worker.cached(&cached), 6);
}

#[test]
fn nothing_is_foreseen_from_a_guess_at_the_capacity() {
    let worker = Told::with_capacity(None);
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waits = worker.book(&prompt(2, 20_000));
    assert_eq!(worker.cached(&cached), 6);
    // Nor while it lets go of what ends.
    worker.serve(&cached);
    assert_eq!(worker.cached(&cached), 6);
}

#[test]
fn who_tells_anew_tells_alone() {
    let worker = Told::with_capacity(Some(10));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let _waits = worker.book(&prompt(2, 6));
    worker.router.follow_events(worker.id, false);
    assert_eq!(worker.cached(&cached), 0);
    worker.router.follow_events(worker.id, true);
    worker.stored(&cached);
    assert_eq!(worker.cached(&cached), 6);
}

#[test]
fn what_started_without_evicting_it_did_not_need_it() {
    let worker = Told::with_capacity(Some(20));
    let cached = prompt(1, 6);
    worker.serve(&cached);
    let mut first = worker.book(&prompt(2, 15));
    assert!(worker.cached(&cached) < 6);
    let second = worker.book(&prompt(3, 1));
    first.first_token(NOW);
    worker.stored(&prompt(2, 15));
    assert!(worker.cached(&cached) < 6, "the second waits");
    let mut whole = worker.book_whole(&prompt(4, 1));
    drop(second);
    assert!(worker.cached(&cached) < 6, "the third waits");
    // By forecast it does not, however long it is until it ends.
    let _ = worker.router.workers(Duration::from_secs(1000));
    worker.stored(&prompt(4, 1));
    assert_eq!(worker.cached(&cached), 6);
    whole.tokens(1, Duration::from_secs(1000));
}

#[test]
fn what_has_just_ended_is_cached_though_no_event_said_so() {
    let worker = Told::with_capacity(Some(20));
    let (asked, answered) = (prompt(1, 4), prompt(1, 6));
    let mut booking = worker.book(&asked);
    worker.stored(&asked);
    booking.tokens(2 * BLOCK_SIZE.get() + 1, NOW);
    booking.answered(answered.clone());
    booking.finish(NOW);
    assert_eq!(worker.cached(&answered), 6);
    worker.stored(&prompt(2, 1));
    assert_eq!(worker.cached(&answered), 4, "events are past it");
}

#[test]
fn events_that_stay_silent_are_not_stood_in_for() {
    let worker = Told::with_capacity(Some(1000));
    for content in 0..20 {
        worker.book(&prompt(content, 4)).finish(NOW);
    }
    assert_eq!(worker.cached(&prompt(19, 4)), 4);
    assert_eq!(worker.cached(&prompt(1, 4)), 0);
}
