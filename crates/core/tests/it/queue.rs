//! The router's queue: every request is sent, none waits for an idle worker, and the order, the time
//! and the worker are right.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use foresee_core::EvictionRule;
use foresee_core::booking::Booking;
use foresee_core::outlier::OutlierConfig;
use foresee_core::queue::QueueOrder;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::{Sequence, prefix_salt};
use foresee_core::workers::{WorkerId, WorkerSpec};
use proptest::prelude::*;

/// Waker that records whether it was woken.
#[derive(Default)]
struct WakeFlag(AtomicBool);

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A request, and the task that waits for its dispatch.
struct Task {
    booking: Booking,
    wake_flag: Arc<WakeFlag>,
    is_sent: bool,
    has_first_token: bool,
}

/// A router, and the tasks of its requests.
struct Fleet {
    router: Router,
    /// Description of all workers, apart from their names.
    spec: WorkerSpec,
    workers: Vec<WorkerId>,
    tasks: Vec<Task>,
    now: Duration,
}

impl Fleet {
    fn new(order: QueueOrder, workers: usize) -> Self {
        let spec = WorkerSpec {
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        Self::with_spec(spec, order, workers)
    }

    /// Returns a fleet of workers with this eviction rule and capacity.
    fn with_capacity(
        order: QueueOrder,
        workers: usize,
        eviction: EvictionRule,
        capacity_blocks: u32,
    ) -> Self {
        let spec = WorkerSpec {
            prefix_caching: true,
            eviction,
            capacity_blocks: Some(capacity_blocks),
            ..WorkerSpec::default()
        };
        Self::with_spec(spec, order, workers)
    }

    fn with_spec(spec: WorkerSpec, order: QueueOrder, workers: usize) -> Self {
        let router = Router::new(RouterConfig {
            queue_order: Some(order),
            outlier: OutlierConfig::disabled(),
            ..RouterConfig::default()
        });
        let mut fleet = Self {
            router: router.unwrap(),
            spec,
            workers: Vec::new(),
            tasks: Vec::new(),
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
        self.poll_woken();
    }

    /// Routes a request with a new prompt of `tokens` tokens. Returns the index of its task.
    fn route(&mut self, tokens: u32, request: Request<'_>) -> usize {
        self.route_prompt(self.now.as_nanos() as u32, tokens, request)
    }

    /// Routes a request whose prompt is a sequence of `tokens` numbers from `seed` on. Returns the
    /// index of its task.
    fn route_prompt(&mut self, seed: u32, tokens: u32, request: Request<'_>) -> usize {
        let prompt: Vec<u32> = (0..tokens).map(|token| token.wrapping_add(seed)).collect();
        let sequence =
            Sequence::from_tokens(&prompt, 16.try_into().unwrap(), prefix_salt("", None, None));
        let request = Request {
            prompt: &sequence,
            ..request
        };
        self.now += Duration::from_millis(1);
        let booking = self.router.route(&request, self.now).unwrap();
        self.tasks.push(Task {
            booking,
            wake_flag: Arc::default(),
            is_sent: false,
            has_first_token: false,
        });
        self.poll(self.tasks.len() - 1);
        self.poll_woken();
        self.tasks.len() - 1
    }

    fn route_many(&mut self, requests: usize, tokens: u32, request: Request<'_>) {
        for _ in 0..requests {
            self.route(tokens, request);
        }
    }

    fn poll(&mut self, index: usize) {
        let task = &mut self.tasks[index];
        let waker = Waker::from(Arc::clone(&task.wake_flag));
        let mut context = Context::from_waker(&waker);
        let mut poll = task.booking.poll_dispatch(&mut context, &[], self.now);
        if matches!(poll, Poll::Ready(Err(_))) {
            // These tasks wait on when no worker can take their requests.
            poll = task.booking.poll_dispatch(&mut context, &[], self.now);
        }
        let is_sent = poll == Poll::Ready(Ok(()));
        assert!(is_sent || !task.is_sent, "a sent request stays sent");
        task.is_sent = is_sent;
    }

    /// Polls tasks that were woken, until there are none.
    fn poll_woken(&mut self) {
        let take_woken = |task: &Task| task.wake_flag.0.swap(false, Ordering::Relaxed);
        while let Some(index) = self.tasks.iter().position(take_woken) {
            self.poll(index);
        }
    }

    fn first_token(&mut self, index: usize) {
        self.now += Duration::from_millis(400);
        self.tasks[index].has_first_token = true;
        self.tasks[index].booking.on_tokens(1, self.now);
        self.poll_woken();
    }

    fn complete(&mut self, index: usize) {
        self.tasks.remove(index).booking.complete(self.now);
        self.poll_woken();
    }

    /// Returns the indices of the requests that were sent.
    fn sent(&self) -> Vec<usize> {
        let is_sent = |index: &usize| self.tasks[*index].is_sent;
        (0..self.tasks.len()).filter(is_sent).collect()
    }

    /// Asserts that no request is queued for a healthy worker without prefill backlog, unless the
    /// worker has requests and limited memory, and that queued requests are counted.
    fn check(&self) {
        let snapshots = self.router.workers(self.now);
        let is_queued = |task: &&Task| !task.is_sent;
        assert_eq!(
            self.router.queued_requests(),
            self.tasks.iter().filter(is_queued).count()
        );
        for queued in self.tasks.iter().filter(is_queued) {
            let worker = queued.booking.worker();
            let is_busy = self
                .tasks
                .iter()
                .filter(|task| task.booking.worker() == worker && task.is_sent)
                .any(|task| !task.has_first_token || self.spec.capacity_blocks.is_some());
            let snapshot = snapshots
                .iter()
                .find(|snapshot| snapshot.id == worker)
                .unwrap();
            let is_healthy = snapshot.state == foresee_core::workers::WorkerState::Healthy;
            assert!(is_busy || !is_healthy, "{worker:?} is idle");
        }
        for snapshot in snapshots {
            let is_here = |task: &&Task| task.booking.worker() == snapshot.id;
            let queued = self.tasks.iter().filter(is_here).filter(is_queued).count();
            assert_eq!(snapshot.queued_requests as usize, queued);
        }
    }
}

/// Returns a request with default settings, whose prompt the fleet replaces.
fn plain() -> Request<'static> {
    static EMPTY: std::sync::OnceLock<Sequence> = std::sync::OnceLock::new();
    Request::new(EMPTY.get_or_init(|| Sequence::unhashed(1, 16.try_into().unwrap())))
}

fn worker_of(fleet: &Fleet, index: usize) -> WorkerId {
    fleet.tasks[index].booking.worker()
}

#[test]
fn a_worker_is_sent_its_next_prompt_when_it_has_computed_the_last() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    fleet.route_many(4, 20_000, plain());
    for sent in 1..4 {
        assert_eq!(fleet.sent(), (0..sent).collect::<Vec<_>>());
        fleet.first_token(sent - 1);
        fleet.check();
    }
    // All of them are booked from the start.
    assert_eq!(fleet.router.workers(fleet.now)[0].requests, 4);
}

#[test]
fn the_overlap_is_assessed_again_at_the_dispatch() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    let overlap = |fleet: &Fleet, index: usize| {
        let decision = fleet.tasks[index].booking.decision();
        decision.cost.overlap_blocks
    };
    fleet.route_prompt(7, 20_000, plain());
    fleet.route_prompt(7, 24_000, plain());
    assert_eq!(overlap(&fleet, 1), 1250);
    // The first request is aborted before it is computed, so none of its blocks are cached.
    drop(fleet.tasks.remove(0));
    fleet.poll_woken();
    assert_eq!((fleet.sent(), overlap(&fleet, 0)), (vec![0], 0));
}

#[test]
fn a_prompt_that_is_being_computed_there_waits_only_for_queued_requests() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    fleet.route_prompt(7, 20_000, plain());
    fleet.route_prompt(7, 20_000, plain());
    assert_eq!(fleet.sent(), [0, 1]);
    fleet.route_prompt(8, 20_000, plain());
    fleet.route_prompt(7, 20_000, plain());
    assert_eq!(fleet.sent(), [0, 1]);
}

#[test]
fn queued_requests_count_in_decisions_but_not_as_active_blocks() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 2);
    fleet.route_many(2, 60_000, plain());
    let queued = fleet.route_prompt(7, 40_010, plain());
    let repeated = fleet.route_prompt(7, 40_010, plain());
    let worker = worker_of(&fleet, queued);
    assert_eq!(worker_of(&fleet, repeated), worker);
    let snapshots = fleet.router.workers(fleet.now);
    let snapshot = snapshots
        .iter()
        .find(|snapshot| snapshot.id == worker)
        .unwrap();
    assert_eq!((snapshot.requests, snapshot.queued_requests), (3, 2));
    assert_eq!(snapshot.active_blocks, 60_000 / 16);
    // Common blocks count once. Each request has a partial block of its own.
    assert_eq!(snapshot.queued_blocks, 40_000 / 16 + 2);
}

#[test]
fn sglang_is_sent_only_requests_whose_reservation_fits() {
    let with_limit = |max_tokens, ignore_eos| Request {
        max_tokens: Some(max_tokens),
        ignore_eos,
        ..plain()
    };
    for (blocks, next, is_sent) in [
        // Blocks: 60 for the first prompt with its output, 40 for the second, and one page each.
        (200, with_limit(160, true), true),
        (102, with_limit(160, true), true),
        (101, with_limit(160, true), false),
        // Of the first output 0.7 is reserved; all of the second output must fit.
        (96, with_limit(70, false), true),
        (96, with_limit(120, false), false),
    ] {
        let mut fleet =
            Fleet::with_capacity(QueueOrder::Fcfs, 1, EvictionRule::SglangRadix, blocks);
        let first = fleet.route(50 * 16, with_limit(160, next.ignore_eos));
        fleet.first_token(first);
        let second = fleet.route(30 * 16, next);
        assert_eq!(fleet.tasks[second].is_sent, is_sent, "{blocks} {next:?}");
        // A request that is alone on the worker is always sent.
        fleet.complete(first);
        assert!(fleet.tasks[0].is_sent);
    }
}

#[test]
fn a_request_that_does_not_fit_waits_for_memory_and_smaller_ones_pass() {
    let mut fleet = Fleet::with_capacity(
        QueueOrder::ShortestPrefillFirst,
        1,
        EvictionRule::VllmLru,
        2000,
    );
    // Two requests of 1,250 blocks each, and one of 500.
    fleet.route_many(2, 20_000, plain());
    fleet.first_token(0);
    assert_eq!(fleet.sent(), [0]);
    fleet.route(8000, plain());
    fleet.first_token(2);
    assert_eq!(fleet.sent(), [0, 2]);
    fleet.complete(0);
    assert_eq!(fleet.sent(), [0, 1]);
    // A request that is alone on the worker need not fit.
    fleet.route(40_000, plain());
    fleet.first_token(0);
    assert_eq!(fleet.sent(), [0, 1]);
    fleet.complete(0);
    fleet.complete(0);
    assert_eq!(fleet.sent(), [0]);
}

#[test]
fn a_queued_request_can_be_marked_as_sent() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    let first = fleet.route(20_000, plain());
    let second = fleet.route(20_000, plain());
    assert_eq!(fleet.sent(), [first]);
    let now = fleet.now;
    fleet.tasks[second].booking.mark_sent(now);
    assert_eq!(fleet.router.queued_requests(), 0);
    fleet.poll(second);
    assert_eq!(fleet.sent(), [first, second]);
    fleet.check();
}

#[test]
fn without_a_queue_every_request_is_sent_at_once() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    fleet.router = Router::new(RouterConfig {
        queue_order: None,
        ..RouterConfig::default()
    })
    .unwrap();
    fleet.workers.clear();
    fleet.add_worker();
    fleet.route_many(4, 20_000, plain());
    assert_eq!(fleet.sent(), [0, 1, 2, 3]);
}

#[test]
fn shorter_prompts_are_sent_first_and_urgent_ones_before_them() {
    let mut fleet = Fleet::new(QueueOrder::ShortestPrefillFirst, 1);
    let urgent = Request {
        priority: -1,
        ..plain()
    };
    fleet.route(20_000, plain());
    fleet.route(40_000, plain());
    fleet.route(20_000, plain());
    fleet.route(40_000, urgent);
    for expected in [&[0][..], &[0, 3], &[0, 2, 3], &[0, 1, 2, 3]] {
        assert_eq!(fleet.sent(), expected);
        let next = fleet
            .sent()
            .into_iter()
            .find(|&index| !fleet.tasks[index].has_first_token);
        fleet.first_token(next.unwrap());
    }
}

#[test]
fn a_tenant_with_a_hundred_requests_does_not_delay_another() {
    let mut fleet = Fleet::new(QueueOrder::FairByTenant, 1);
    let of_tenant = |tenant| Request { tenant, ..plain() };
    fleet.route_many(100, 20_000, of_tenant(1));
    let other = fleet.route(20_000, of_tenant(2));
    fleet.first_token(0);
    fleet.first_token(1);
    assert!(fleet.tasks[other].is_sent);
}

#[test]
fn several_prompts_of_one_body_are_charged_to_their_tenant() {
    let mut fleet = Fleet::new(QueueOrder::FairByTenant, 1);
    let of_tenant = |tenant| Request { tenant, ..plain() };
    let sequence = Sequence::unhashed(20_000, 16.try_into().unwrap());
    let request = Request {
        prompt: &sequence,
        ..of_tenant(1)
    };
    let further = vec![sequence.clone(); 9];
    let batch = fleet
        .router
        .route_batch(&request, &further, fleet.now)
        .unwrap();
    let busy = fleet.route(20_000, of_tenant(3));
    fleet.route(20_000, of_tenant(1));
    let other = fleet.route(20_000, of_tenant(2));
    drop(batch);
    fleet.poll_woken();
    assert_eq!(fleet.sent(), [busy]);
    fleet.first_token(busy);
    assert_eq!(fleet.sent(), [busy, other]);
}

#[test]
fn requests_without_a_prompt_delay_none_and_teach_nothing_about_prefill() {
    let sequence = Sequence::unhashed(0, 16.try_into().unwrap());
    let empty = Request {
        prompt: &sequence,
        ..plain()
    };
    let run = |with_empty: bool| {
        let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
        let empty_booking = with_empty.then(|| fleet.router.route(&empty, fleet.now).unwrap());
        fleet.now += Duration::from_secs(60);
        let first = fleet.route(20_000, plain());
        assert!(fleet.tasks[first].is_sent);
        fleet.now += Duration::from_secs(2);
        if let Some(booking) = empty_booking {
            booking.complete(fleet.now);
        }
        fleet.first_token(first);
        // The second request shows when the first is computed.
        let second = fleet.route(10_000, plain());
        fleet.first_token(second);
        fleet.router.workers(fleet.now)[0].clone()
    };
    let (without_empty, with_empty) = (run(false), run(true));
    assert!(without_empty.latency.prefill_accuracy.samples > 0);
    assert_eq!(without_empty.latency, with_empty.latency);
    assert_eq!(without_empty.prefill_backlog, with_empty.prefill_backlog);
}

#[test]
fn a_request_that_declines_to_move_keeps_its_position() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 2);
    // One worker has the prefix, the other one has a long prefill.
    let first = fleet.route_prompt(7, 60_000, plain());
    let other = fleet.route(60_000, plain());
    fleet.first_token(first);
    let sent = fleet.route_prompt(7, 80_000, plain());
    let queued = [100_000, 101_000].map(|tokens| fleet.route_prompt(7, tokens, plain()));
    assert_eq!(fleet.sent(), [first, other, sent]);
    assert!(
        queued
            .iter()
            .all(|&index| worker_of(&fleet, index) == worker_of(&fleet, first))
    );
    // Before its task polls, the first queued request is offered the other worker and is dispatched
    // by its own.
    fleet.now += Duration::from_secs(1);
    for index in [other, sent] {
        fleet.tasks[index].booking.on_tokens(1, fleet.now);
    }
    fleet.poll_woken();
    assert_eq!(fleet.sent(), [first, other, sent, queued[0]]);
}

#[test]
fn queued_requests_move_to_a_worker_that_is_added() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    fleet.route_many(6, 50_000, plain());
    fleet.add_worker();
    let moved: Vec<_> = fleet
        .sent()
        .into_iter()
        .map(|index| worker_of(&fleet, index))
        .collect();
    assert_eq!(moved, fleet.workers);
    fleet.check();
}

#[test]
fn queued_requests_leave_a_worker_that_accepts_no_more() {
    for stop_worker in [
        (|fleet, id| fleet.router.set_healthy(id, false)) as fn(&Fleet, WorkerId),
        |fleet, id| fleet.router.set_draining(id, true),
        |fleet, id| assert!(fleet.router.remove_worker(id)),
    ] {
        let mut fleet = Fleet::new(QueueOrder::Fcfs, 2);
        fleet.route_many(8, 50_000, plain());
        let (stopped, other) = (fleet.workers[0], fleet.workers[1]);
        stop_worker(&fleet, stopped);
        fleet.poll_woken();
        for task in fleet.tasks.iter().filter(|task| !task.is_sent) {
            assert_eq!(task.booking.worker(), other);
        }
        assert!(fleet.router.queued_requests() > 0);
    }
}

#[test]
fn requests_queued_for_the_only_worker_are_sent_when_it_recovers() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    fleet.route_many(3, 50_000, plain());
    fleet.router.set_healthy(fleet.workers[0], false);
    fleet.poll_woken();
    fleet.first_token(0);
    assert_eq!(fleet.sent(), [0]);
    fleet.router.set_healthy(fleet.workers[0], true);
    fleet.poll_woken();
    assert_eq!(fleet.sent(), [0, 1]);
    // If the only worker is removed, the tasks of its queue become ready.
    fleet.router.remove_worker(fleet.workers[0]);
    fleet.poll_woken();
    assert_eq!(fleet.sent(), [0, 1, 2]);
    assert_eq!(fleet.router.queued_requests(), 0);
}

#[test]
fn an_estimated_end_of_prefill_dispatches_the_next_request() {
    let mut fleet = Fleet::new(QueueOrder::Fcfs, 1);
    let unstreamed = Request {
        is_streaming: false,
        ..plain()
    };
    fleet.route(50_000, unstreamed);
    fleet.route(50_000, plain());
    assert_eq!(fleet.sent(), [0]);
    fleet.now += Duration::from_secs(600);
    fleet.router.tick(fleet.now);
    fleet.poll_woken();
    assert_eq!(fleet.sent(), [0, 1]);
}

proptest! {
    #[test]
    fn every_queued_request_is_sent(
        order in prop::sample::select(QueueOrder::ALL.map(|(order, _)| order).to_vec()),
        capacity in prop::option::of((1..8_000u32, prop::sample::select(vec![EvictionRule::VllmLru, EvictionRule::SglangRadix]))),
        steps in prop::collection::vec((0..12u8, any::<prop::sample::Index>(), 1..60_000u32), 1..80)
    ) {
        let mut fleet = match capacity {
            Some((capacity, eviction)) => Fleet::with_capacity(order, 3, eviction, capacity),
            None => Fleet::new(order, 3),
        };
        for (action, choice, size) in steps {
            let task = choice.index(fleet.tasks.len().max(1));
            let worker = fleet.workers[choice.index(fleet.workers.len())];
            match action {
                _ if fleet.tasks.is_empty() || action < 5 => {
                    let request = Request {
                        priority: (size % 3) as i32,
                        tenant: u64::from(size % 5),
                        max_tokens: (size % 7 > 0).then_some(size % 1000),
                        ignore_eos: size % 2 == 0,
                        ..plain()
                    };
                    fleet.route(size, request);
                }
                5..=7 => {
                    let sent = fleet.sent();
                    if !sent.is_empty() {
                        fleet.first_token(sent[choice.index(sent.len())]);
                    }
                }
                8 => if fleet.tasks[task].is_sent {
                    fleet.complete(task);
                }
                // The client aborts.
                9 => drop(fleet.tasks.remove(task)),
                10 => fleet.router.set_healthy(worker, size % 2 == 0),
                _ => {
                    fleet.now += Duration::from_millis(size.into());
                    fleet.router.tick(fleet.now);
                }
            }
            fleet.poll_woken();
            // At least one worker must be healthy for requests to be routed.
            fleet.router.set_healthy(fleet.workers[0], true);
            fleet.poll_woken();
            fleet.check();
        }
        for &worker in &fleet.workers {
            fleet.router.set_healthy(worker, true);
        }
        fleet.poll_woken();
        while !fleet.tasks.is_empty() {
            let sent = fleet.sent();
            prop_assert!(!sent.is_empty(), "all requests are queued");
            fleet.complete(sent[0]);
            fleet.check();
        }
        prop_assert_eq!(fleet.router.booking_count(), 0);
        for worker in fleet.router.workers(fleet.now) {
            prop_assert_eq!((worker.active_blocks, worker.queued_blocks), (0, 0));
        }
    }
}
