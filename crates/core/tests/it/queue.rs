//! Requests that wait at the router: nobody is forgotten, nobody waits in vain, and who is sent
//! when and where.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use foresee_core::Eviction;
use foresee_core::booking::Booking;
use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::queue::Order;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, salt};
use proptest::prelude::*;

/// Whether it was woken.
#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A request, and what its carrier knows.
struct Carried {
    booking: Booking,
    bell: Arc<Bell>,
    is_sent: bool,
    has_begun: bool,
}

/// A router, and those who carry requests.
struct Fleet {
    router: Router,
    /// What its workers are like, but for their names.
    spec: WorkerSpec,
    workers: Vec<WorkerId>,
    carried: Vec<Carried>,
    now: Duration,
}

impl Fleet {
    fn new(order: Order, workers: usize) -> Self {
        let spec = WorkerSpec {
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        Self::of(spec, order, workers)
    }

    /// Workers that have so little memory.
    fn small(order: Order, workers: usize, eviction: Eviction, capacity_blocks: u32) -> Self {
        let spec = WorkerSpec {
            prefix_caching: true,
            eviction,
            capacity_blocks: Some(capacity_blocks),
            ..WorkerSpec::default()
        };
        Self::of(spec, order, workers)
    }

    fn of(spec: WorkerSpec, order: Order, workers: usize) -> Self {
        let router = Router::new(RouterConfig {
            queue: Some(order),
            ..RouterConfig::default()
        });
        let mut fleet = Self {
            router: router.unwrap(),
            spec,
            workers: Vec::new(),
            carried: Vec::new(),
            now: Duration::from_secs(1),
        };
        (0..workers).for_each(|_| fleet.add_worker());
        fleet
    }

    fn add_worker(&mut self) {
        let worker = self.router.add_worker(WorkerSpec {
            name: format!("{}", self.workers.len()),
            ..self.spec.clone()
        });
        let worker = worker.unwrap();
        self.router.set_healthy(worker, true);
        self.workers.push(worker);
        self.answer_bells();
    }

    /// A request whose prompt is like no other, of so many tokens. Returns its index.
    fn comes(&mut self, tokens: u32, request: Request<'_>) -> usize {
        self.asks(self.now.as_nanos() as u32, tokens, request)
    }

    /// One whose prompt is that of this number.
    fn asks(&mut self, seed: u32, tokens: u32, request: Request<'_>) -> usize {
        let prompt: Vec<u32> = (0..tokens).map(|it| it.wrapping_add(seed)).collect();
        let sequence = Sequence::from_tokens(&prompt, 16.try_into().unwrap(), salt("", None, None));
        let request = Request {
            sequence: &sequence,
            ..request
        };
        self.now += Duration::from_millis(1);
        let booking = self.router.route(&request, self.now).unwrap();
        self.carried.push(Carried {
            booking,
            bell: Arc::default(),
            is_sent: false,
            has_begun: false,
        });
        self.poll(self.carried.len() - 1);
        self.answer_bells();
        self.carried.len() - 1
    }

    fn come(&mut self, requests: usize, tokens: u32, request: Request<'_>) {
        for _ in 0..requests {
            self.comes(tokens, request);
        }
    }

    fn poll(&mut self, index: usize) {
        let carried = &mut self.carried[index];
        let waker = Waker::from(Arc::clone(&carried.bell));
        let mut context = Context::from_waker(&waker);
        let poll = carried.booking.poll_sent(&mut context, &[], self.now);
        let is_sent = poll == Poll::Ready(());
        assert!(is_sent || !carried.is_sent, "sent is sent");
        carried.is_sent = is_sent;
    }

    fn answer_bells(&mut self) {
        let is_rung = |it: &Carried| it.bell.0.swap(false, Ordering::Relaxed);
        while let Some(index) = self.carried.iter().position(is_rung) {
            self.poll(index);
        }
    }

    fn begins(&mut self, index: usize) {
        self.now += Duration::from_millis(400);
        self.carried[index].has_begun = true;
        self.carried[index].booking.tokens(1, self.now);
        self.answer_bells();
    }

    fn ends(&mut self, index: usize) {
        self.carried.remove(index).booking.finish(self.now);
        self.answer_bells();
    }

    fn sent(&self) -> Vec<usize> {
        let sent = |index: &usize| self.carried[*index].is_sent;
        (0..self.carried.len()).filter(sent).collect()
    }

    /// Nobody waits for a worker that has nothing to compute, or is not there, unless it has
    /// something and little memory.
    fn check(&self) {
        let snapshots = self.router.workers(self.now);
        let held = |it: &&Carried| !it.is_sent;
        assert_eq!(
            self.router.held_requests(),
            self.carried.iter().filter(held).count()
        );
        for waits in self.carried.iter().filter(held) {
            let worker = waits.booking.worker();
            let is_busy = self
                .carried
                .iter()
                .filter(|it| it.booking.worker() == worker && it.is_sent)
                .any(|it| !it.has_begun || self.spec.capacity_blocks.is_some());
            let snapshot = snapshots.iter().find(|it| it.id == worker).unwrap();
            let is_healthy = snapshot.state == foresee_core::fleet::WorkerState::Healthy;
            assert!(is_busy || !is_healthy, "{worker:?} is idle");
        }
        for snapshot in snapshots {
            let here = |it: &&Carried| it.booking.worker() == snapshot.id;
            let held = self.carried.iter().filter(here).filter(held).count();
            assert_eq!(snapshot.held_requests as usize, held);
        }
    }
}

fn plain() -> Request<'static> {
    static EMPTY: std::sync::OnceLock<Sequence> = std::sync::OnceLock::new();
    Request::new(EMPTY.get_or_init(|| Sequence::opaque(1, 16.try_into().unwrap())))
}

fn worker_of(fleet: &Fleet, index: usize) -> WorkerId {
    fleet.carried[index].booking.worker()
}

#[test]
fn a_worker_gets_its_next_prompt_when_it_has_computed_the_last() {
    let mut fleet = Fleet::new(Order::Fcfs, 1);
    fleet.come(4, 20_000, plain());
    for sent in 1..4 {
        assert_eq!(fleet.sent(), (0..sent).collect::<Vec<_>>());
        fleet.begins(sent - 1);
        fleet.check();
    }
    // Booked they all are from the beginning.
    assert_eq!(fleet.router.workers(fleet.now)[0].requests, 4);
}

#[test]
fn what_is_cached_is_what_is_cached_when_it_is_sent() {
    let mut fleet = Fleet::new(Order::Fcfs, 1);
    let overlap = |fleet: &Fleet, index: usize| {
        let decision = fleet.carried[index].booking.decision();
        decision.cost.overlap_blocks
    };
    fleet.asks(7, 20_000, plain());
    fleet.asks(7, 20_000, plain());
    assert_eq!(overlap(&fleet, 1), 1249);
    // The first leaves before it is computed, and nothing of it stays.
    drop(fleet.carried.remove(0));
    fleet.answer_bells();
    assert_eq!((fleet.sent(), overlap(&fleet, 0)), (vec![0], 0));
}

#[test]
fn whoever_waits_is_reckoned_with_but_holds_nothing() {
    let mut fleet = Fleet::new(Order::Fcfs, 2);
    fleet.come(2, 60_000, plain());
    let waits = fleet.asks(7, 40_010, plain());
    let like_it = fleet.asks(7, 40_010, plain());
    let worker = worker_of(&fleet, waits);
    assert_eq!(worker_of(&fleet, like_it), worker);
    let snapshots = fleet.router.workers(fleet.now);
    let snapshot = snapshots.iter().find(|it| it.id == worker).unwrap();
    assert_eq!((snapshot.requests, snapshot.held_requests), (3, 2));
    assert_eq!(snapshot.active_blocks, 60_000 / 16);
    // What they share is held once, and of the last block each has its own.
    assert_eq!(snapshot.held_blocks, 40_000 / 16 + 2);
}

#[test]
fn an_engine_that_sets_memory_aside_gets_what_it_begins_with_at_once() {
    let answer = |max_tokens, ignores_eos| Request {
        max_tokens: Some(max_tokens),
        ignores_eos,
        ..plain()
    };
    for (blocks, next, is_sent) in [
        // 60 and a page for the first and its answer, 40 and a page for the second and its own.
        (200, answer(160, true), true),
        (102, answer(160, true), true),
        (101, answer(160, true), false),
        // Seven tenths of the first's answer may be enough, all of the next one's it must be.
        (96, answer(70, false), true),
        (96, answer(120, false), false),
    ] {
        let mut fleet = Fleet::small(Order::Fcfs, 1, Eviction::Radix, blocks);
        let of_first = answer(160, next.ignores_eos);
        let first = fleet.comes(50 * 16, of_first);
        fleet.begins(first);
        let second = fleet.comes(30 * 16, next);
        assert_eq!(fleet.carried[second].is_sent, is_sent, "{blocks} {next:?}");
        // However little there is, one is always begun with.
        fleet.ends(first);
        assert!(fleet.carried[0].is_sent);
    }
}

#[test]
fn who_does_not_fit_waits_for_memory_and_who_does_goes_by() {
    let mut fleet = Fleet::small(Order::Shortest, 1, Eviction::Queue, 2000);
    // Of 1,250 blocks each, and one of 500.
    fleet.come(2, 20_000, plain());
    fleet.begins(0);
    assert_eq!(fleet.sent(), [0]);
    fleet.comes(8000, plain());
    fleet.begins(2);
    assert_eq!(fleet.sent(), [0, 2]);
    fleet.ends(0);
    assert_eq!(fleet.sent(), [0, 1]);
    // Alone it need not fit.
    fleet.comes(40_000, plain());
    fleet.begins(0);
    assert_eq!(fleet.sent(), [0, 1]);
    fleet.ends(0);
    fleet.ends(0);
    assert_eq!(fleet.sent(), [0]);
}

#[test]
fn without_a_queue_nobody_waits() {
    let mut fleet = Fleet::new(Order::Fcfs, 1);
    fleet.router = Router::new(RouterConfig::default()).unwrap();
    fleet.workers.clear();
    fleet.add_worker();
    fleet.come(4, 20_000, plain());
    assert_eq!(fleet.sent(), [0, 1, 2, 3]);
}

#[test]
fn the_shorter_go_first_and_the_urgent_before_them() {
    let mut fleet = Fleet::new(Order::Shortest, 1);
    let urgent = Request {
        priority: -1,
        ..plain()
    };
    fleet.comes(20_000, plain());
    fleet.comes(40_000, plain());
    fleet.comes(20_000, plain());
    fleet.comes(40_000, urgent);
    for expected in [&[0][..], &[0, 3], &[0, 2, 3], &[0, 1, 2, 3]] {
        assert_eq!(fleet.sent(), expected);
        let begins = fleet
            .sent()
            .into_iter()
            .find(|&it| !fleet.carried[it].has_begun);
        fleet.begins(begins.unwrap());
    }
}

#[test]
fn a_tenant_with_a_hundred_requests_does_not_keep_another_waiting() {
    let mut fleet = Fleet::new(Order::Fair, 1);
    let of = |tenant| Request { tenant, ..plain() };
    fleet.come(100, 20_000, of(1));
    let other = fleet.comes(20_000, of(2));
    fleet.begins(0);
    fleet.begins(1);
    assert!(fleet.carried[other].is_sent);
}

#[test]
fn several_prompts_of_one_body_are_charged_to_their_tenant() {
    let mut fleet = Fleet::new(Order::Fair, 1);
    let of = |tenant| Request { tenant, ..plain() };
    let sequence = Sequence::opaque(20_000, 16.try_into().unwrap());
    let request = Request {
        sequence: &sequence,
        ..of(1)
    };
    let further = vec![sequence.clone(); 9];
    let batch = fleet
        .router
        .route_batch(&request, &further, fleet.now)
        .unwrap();
    let busy = fleet.comes(20_000, of(3));
    fleet.comes(20_000, of(1));
    let other = fleet.comes(20_000, of(2));
    drop(batch);
    fleet.answer_bells();
    assert_eq!(fleet.sent(), [busy]);
    fleet.begins(busy);
    assert_eq!(fleet.sent(), [busy, other]);
}

#[test]
fn what_has_no_prompt_keeps_nobody_waiting_and_tells_nothing_of_prefill() {
    let sequence = Sequence::opaque(0, 16.try_into().unwrap());
    let without = Request {
        sequence: &sequence,
        ..plain()
    };
    let run = |beside: bool| {
        let mut fleet = Fleet::new(Order::Fcfs, 1);
        let none = beside.then(|| fleet.router.route(&without, fleet.now).unwrap());
        fleet.now += Duration::from_secs(60);
        let first = fleet.comes(20_000, plain());
        assert!(fleet.carried[first].is_sent);
        fleet.now += Duration::from_secs(2);
        if let Some(booking) = none {
            booking.finish(fleet.now);
        }
        fleet.begins(first);
        // The next tells when the first is over.
        let second = fleet.comes(10_000, plain());
        fleet.begins(second);
        fleet.router.workers(fleet.now)[0].clone()
    };
    let (alone, beside) = (run(false), run(true));
    assert!(alone.pace.samples[0] > 0);
    assert_eq!(alone.pace, beside.pace);
    assert_eq!(alone.backlog, beside.backlog);
}

#[test]
fn who_is_invited_and_stays_keeps_its_turn() {
    let mut fleet = Fleet::new(Order::Fcfs, 2);
    // One worker has the prefix, the other computes for long.
    let first = fleet.asks(7, 60_000, plain());
    let other = fleet.comes(60_000, plain());
    fleet.begins(first);
    let sent = fleet.asks(7, 80_000, plain());
    let waits = [100_000, 101_000].map(|it| fleet.asks(7, it, plain()));
    assert_eq!(fleet.sent(), [first, other, sent]);
    assert!(
        waits
            .iter()
            .all(|&it| worker_of(&fleet, it) == worker_of(&fleet, first))
    );
    // Before its carrier wakes, the first in line is invited by the other, and called at home.
    fleet.now += Duration::from_secs(1);
    for index in [other, sent] {
        fleet.carried[index].booking.tokens(1, fleet.now);
    }
    fleet.answer_bells();
    assert_eq!(fleet.sent(), [first, other, sent, waits[0]]);
}

#[test]
fn whoever_waits_goes_to_a_worker_that_joins() {
    let mut fleet = Fleet::new(Order::Fcfs, 1);
    fleet.come(6, 50_000, plain());
    fleet.add_worker();
    let moved: Vec<_> = fleet
        .sent()
        .into_iter()
        .map(|it| worker_of(&fleet, it))
        .collect();
    assert_eq!(moved, fleet.workers);
    fleet.check();
}

#[test]
fn a_line_leaves_a_worker_that_takes_no_more() {
    for leaves in [
        (|fleet, id| fleet.router.set_healthy(id, false)) as fn(&Fleet, WorkerId),
        |fleet, id| fleet.router.set_draining(id, true),
        |fleet, id| assert!(fleet.router.remove_worker(id)),
    ] {
        let mut fleet = Fleet::new(Order::Fcfs, 2);
        fleet.come(8, 50_000, plain());
        let (gone, left) = (fleet.workers[0], fleet.workers[1]);
        leaves(&fleet, gone);
        fleet.answer_bells();
        for carried in fleet.carried.iter().filter(|it| !it.is_sent) {
            assert_eq!(carried.booking.worker(), left);
        }
        assert!(fleet.router.held_requests() > 0);
    }
}

#[test]
fn whoever_waits_for_the_only_worker_is_sent_when_it_is_back() {
    let mut fleet = Fleet::new(Order::Fcfs, 1);
    fleet.come(3, 50_000, plain());
    fleet.router.set_healthy(fleet.workers[0], false);
    fleet.answer_bells();
    fleet.begins(0);
    assert_eq!(fleet.sent(), [0]);
    fleet.router.set_healthy(fleet.workers[0], true);
    fleet.answer_bells();
    assert_eq!(fleet.sent(), [0, 1]);
    // One that is removed with nobody to take over lets its carriers see so.
    fleet.router.remove_worker(fleet.workers[0]);
    fleet.answer_bells();
    assert_eq!(fleet.sent(), [0, 1, 2]);
    assert_eq!(fleet.router.held_requests(), 0);
}

#[test]
fn a_prompt_that_nobody_watches_makes_room_in_time() {
    let mut fleet = Fleet::new(Order::Fcfs, 1);
    let unwatched = Request {
        streams: false,
        ..plain()
    };
    fleet.comes(50_000, unwatched);
    fleet.comes(50_000, plain());
    assert_eq!(fleet.sent(), [0]);
    fleet.now += Duration::from_secs(600);
    fleet.router.tick(fleet.now);
    fleet.answer_bells();
    assert_eq!(fleet.sent(), [0, 1]);
}

proptest! {
    #[test]
    fn nobody_is_forgotten(
        order in prop::sample::select(Order::ALL.map(|it| it.0).to_vec()),
        capacity in prop::option::of((1..8_000u32, prop::sample::select(vec![Eviction::Queue, Eviction::Radix]))),
        steps in prop::collection::vec((0..12u8, any::<prop::sample::Index>(), 1..60_000u32), 1..80)
    ) {
        let mut fleet = match capacity {
            Some((capacity, eviction)) => Fleet::small(order, 3, eviction, capacity),
            None => Fleet::new(order, 3),
        };
        for (what, which, size) in steps {
            let some = which.index(fleet.carried.len().max(1));
            let worker = fleet.workers[which.index(fleet.workers.len())];
            match what {
                _ if fleet.carried.is_empty() || what < 5 => {
                    let request = Request {
                        priority: (size % 3) as i32,
                        tenant: u64::from(size % 5),
                        max_tokens: (size % 7 > 0).then_some(size % 1000),
                        ignores_eos: size % 2 == 0,
                        ..plain()
                    };
                    fleet.comes(size, request);
                }
                5..=7 => {
                    let sent = fleet.sent();
                    if !sent.is_empty() {
                        fleet.begins(sent[which.index(sent.len())]);
                    }
                }
                8 => if fleet.carried[some].is_sent {
                    fleet.ends(some);
                }
                // The client leaves.
                9 => drop(fleet.carried.remove(some)),
                10 => fleet.router.set_healthy(worker, size % 2 == 0),
                _ => {
                    fleet.now += Duration::from_millis(size.into());
                    fleet.router.tick(fleet.now);
                }
            }
            fleet.answer_bells();
            // Not everybody is healthy for ever, but one must be for anybody to be routed.
            fleet.router.set_healthy(fleet.workers[0], true);
            fleet.answer_bells();
            fleet.check();
        }
        for &worker in &fleet.workers {
            fleet.router.set_healthy(worker, true);
        }
        fleet.answer_bells();
        while !fleet.carried.is_empty() {
            let sent = fleet.sent();
            prop_assert!(!sent.is_empty(), "all wait");
            fleet.ends(sent[0]);
            fleet.check();
        }
        prop_assert_eq!(fleet.router.bookings(), 0);
        for worker in fleet.router.workers(fleet.now) {
            prop_assert_eq!((worker.active_blocks, worker.held_blocks), (0, 0));
        }
    }
}
