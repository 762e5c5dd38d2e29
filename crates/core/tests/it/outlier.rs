//! Outlier ejection, failure charge, backpressure and warm-up limit.

#![allow(clippy::unwrap_used)]

use std::task::{Context, Waker};
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::outlier::{ExchangeResult, OutlierConfig, OutlierSnapshot, Restriction};
use foresee_core::policy::{self, NamedPolicy};
use foresee_core::queue::QueueOrder;
use foresee_core::router::{Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSnapshot, WorkerSpec, WorkerState};

use ExchangeResult::{Backpressure, Failure, SoftFailure, Success};

const BUSY: ExchangeResult = Backpressure { retry_after: None };

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Returns a router without a queue whose workers have all produced output.
fn warm_fleet(workers: usize, config: RouterConfig) -> (Router, Vec<WorkerId>) {
    let (router, ids) = new_fleet(workers, config);
    for &id in &ids {
        router.report(id, Success, Duration::ZERO);
    }
    (router, ids)
}

fn new_fleet(workers: usize, config: RouterConfig) -> (Router, Vec<WorkerId>) {
    let router = Router::new(config).unwrap();
    let ids = (0..workers)
        .map(|index| add_worker(&router, index))
        .collect();
    (router, ids)
}

fn add_worker(router: &Router, index: usize) -> WorkerId {
    let id = router
        .add_worker(WorkerSpec {
            name: format!("worker-{index}"),
            prefix_caching: true,
            ..WorkerSpec::default()
        })
        .unwrap();
    router.set_healthy(id, true);
    id
}

fn unqueued(policy: NamedPolicy) -> RouterConfig {
    RouterConfig {
        queue_order: None,
        ..RouterConfig::for_policy(policy)
    }
}

fn prompt(number: u32) -> Sequence {
    let tokens: Vec<u32> = (0..1_000).map(|token| number * 1_000 + token).collect();
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0)
}

fn route(router: &Router, now: Duration) -> Booking {
    router.route(&Request::new(&prompt(1)), now).unwrap()
}

/// Routes one request and reports its result. Returns its worker.
fn exchange(router: &Router, result: ExchangeResult, now: Duration) -> WorkerId {
    let mut booking = route(router, now);
    booking.report(result, now);
    booking.worker()
}

fn snapshot(router: &Router, id: WorkerId, now: Duration) -> WorkerSnapshot {
    let mut workers = router.workers(now).into_iter();
    workers.find(|worker| worker.id == id).unwrap()
}

fn outlier(router: &Router, id: WorkerId, now: Duration) -> OutlierSnapshot {
    snapshot(router, id, now).outlier
}

fn report_many(
    router: &Router,
    id: WorkerId,
    results: impl IntoIterator<Item = ExchangeResult>,
    now: Duration,
) {
    for result in results {
        router.report(id, result, now);
    }
}

#[test]
fn five_failures_in_a_row_eject_and_a_successful_trial_ends_it() {
    let config = RouterConfig {
        outlier: OutlierConfig {
            failure_rate: 0.0,
            ..OutlierConfig::default()
        },
        ..unqueued(NamedPolicy::default())
    };
    let (router, ids) = warm_fleet(4, config);
    report_many(&router, ids[0], [Failure; 4], seconds(1.0));
    router.report(ids[0], Success, seconds(1.0));
    report_many(&router, ids[0], [Failure; 4], seconds(1.0));
    assert_eq!(
        snapshot(&router, ids[0], seconds(1.0)).state,
        WorkerState::Healthy
    );
    router.report(ids[0], Failure, seconds(1.0));
    let ejected = snapshot(&router, ids[0], seconds(1.0));
    assert_eq!(ejected.state, WorkerState::Ejected);
    assert_eq!(ejected.state.as_str(), "ejected");
    assert_eq!(ejected.outlier.next_trial_at, Some(seconds(31.0)));
    assert_eq!(ejected.outlier.consecutive_failures, 5);

    let mut bookings: Vec<Booking> = (0..30).map(|_| route(&router, seconds(30.9))).collect();
    assert!(bookings.iter().all(|booking| booking.worker() != ids[0]));
    // A retry is no trial.
    let sequence = prompt(2);
    let retry = Request {
        excluded_workers: &ids[1..2],
        ..Request::new(&sequence)
    };
    bookings.push(router.route(&retry, seconds(31.0)).unwrap());
    assert_ne!(bookings[30].worker(), ids[0]);
    let explanation = router
        .explain(&Request::new(&sequence), seconds(31.0))
        .unwrap();
    assert_eq!(explanation.trial_on, Some(ids[0]));
    assert_eq!(explanation.passed_over[0].id, ids[0]);
    assert_eq!(explanation.passed_over[0].restriction, Restriction::Ejected);
    assert_eq!(explanation.candidates.len(), 3);
    let mut trial = route(&router, seconds(31.0));
    assert_eq!(trial.worker(), ids[0]);
    assert_ne!(
        route(&router, seconds(31.0)).worker(),
        ids[0],
        "one trial at a time"
    );
    assert!(outlier(&router, ids[0], seconds(31.5)).is_half_open);
    trial.on_first_token(seconds(32.0));
    let closed = snapshot(&router, ids[0], seconds(32.0));
    assert_eq!(closed.state, WorkerState::Healthy);
    assert_eq!(
        (closed.outlier.failure_rate, closed.outlier.charge_seconds),
        (0.0, 0.0)
    );
    assert_eq!(closed.outlier.ejections, 1);
    assert_eq!(outlier(&router, ids[0], seconds(332.0)).ejections, 0);
}

#[test]
fn only_a_trial_after_the_end_of_an_ejection_lengthens_it() {
    let (router, ids) = warm_fleet(4, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [Failure; 5], seconds(0.0));
    let mut now = 30.0;
    let mut ejections = Vec::new();
    for _ in 0..400 {
        if exchange(&router, Failure, seconds(now)) == ids[0] {
            let outlier = outlier(&router, ids[0], seconds(now));
            ejections.push((now as u64, outlier.ejected_until.unwrap().as_secs()));
        }
        // The other workers stay good.
        for &id in &ids[1..] {
            report_many(&router, id, [Success; 5], seconds(now));
        }
        now += 5.0;
    }
    // Trials every 30 s. The one at the end of each ejection doubles, triples, … the next one.
    assert_eq!(ejections[0], (30, 90));
    assert_eq!(ejections[1], (60, 90));
    assert_eq!(ejections[2], (90, 180));
    assert_eq!(ejections[5], (180, 300));
    let pauses = ejections.windows(2).map(|pair| pair[1].0 - pair[0].0);
    assert!(
        pauses.clone().all(|pause| pause == 30),
        "{:?}",
        pauses.collect::<Vec<_>>()
    );
    let longest = ejections.iter().map(|&(now, until)| until - now).max();
    assert_eq!(longest, Some(300));
}

#[test]
fn a_worker_that_fails_half_of_the_time_is_ejected_unless_its_peers_do_too() {
    for (failing, expected) in [(1, 1), (8, 0)] {
        let mut ejected = 0;
        for seed in 0..20_u64 {
            let (router, ids) = warm_fleet(8, unqueued(policy::ROUND_ROBIN));
            let mut state = seed * 2 + 1;
            for _ in 0..100 {
                for (index, &id) in ids.iter().enumerate() {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let fails = index < failing && (state >> 40).is_multiple_of(2);
                    let result = if fails { Failure } else { Success };
                    if !outlier(&router, id, seconds(1.0)).is_ejected {
                        router.report(id, result, seconds(1.0));
                    }
                }
            }
            let workers = router.workers(seconds(1.0));
            let states = workers.iter().map(|worker| worker.outlier.is_ejected);
            ejected += states.filter(|is_ejected| *is_ejected).count();
        }
        // Of 160 workers that fail alike a few are ejected by chance, for thirty seconds.
        match expected {
            0 => assert!(ejected <= 12, "{ejected} of 160"),
            _ => assert_eq!(ejected, 20 * expected),
        }
    }
}

#[test]
fn a_soft_failure_counts_half_and_a_failed_stream_replaces_its_success() {
    let (router, ids) = warm_fleet(2, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [SoftFailure; 9], seconds(1.0));
    assert_eq!(
        outlier(&router, ids[0], seconds(1.0)).consecutive_failures,
        4
    );
    router.report(ids[0], SoftFailure, seconds(1.0));
    assert!(outlier(&router, ids[0], seconds(1.0)).is_ejected);

    // Every stream of the worker begins, and then breaks.
    let (router, ids) = warm_fleet(2, unqueued(policy::ROUND_ROBIN));
    let mut broken = 0;
    while !outlier(&router, ids[0], seconds(1.0)).is_ejected {
        let mut booking = route(&router, seconds(1.0));
        booking.on_tokens(1, seconds(1.0));
        if booking.worker() == ids[0] {
            booking.report(Failure, seconds(1.0));
            // Counts once.
            booking.report(Failure, seconds(1.0));
            broken += 1;
        }
    }
    assert_eq!(broken, 5);
}

#[test]
fn results_from_before_a_recovery_are_ignored() {
    let (router, ids) = warm_fleet(2, unqueued(policy::ROUND_ROBIN));
    let mut old: Vec<Booking> = (0..20).map(|_| route(&router, seconds(1.0))).collect();
    old.retain(|booking| booking.worker() == ids[0]);
    let failed = old.split_off(5);
    for mut booking in failed {
        booking.report(Failure, seconds(40.0));
    }
    // The success of a request from before the ejection does not end it.
    let mut earlier = old.pop().unwrap();
    earlier.report(Success, seconds(41.0));
    assert!(outlier(&router, ids[0], seconds(41.0)).is_ejected);
    assert_eq!(exchange(&router, Success, seconds(70.0)), ids[0]);
    assert!(!outlier(&router, ids[0], seconds(70.0)).is_ejected);
    for mut booking in old {
        booking.report(Failure, seconds(71.0));
    }
    let after = outlier(&router, ids[0], seconds(71.0));
    assert_eq!((after.consecutive_failures, after.charge_seconds), (0, 0.0));
}

/// One worker fails at once and so has no load. Every failed request is retried elsewhere.
#[test]
fn a_worker_that_fails_at_once_gets_few_requests() {
    for policy in policy::ALL {
        let name = policy.name;
        let (router, ids) = warm_fleet(4, unqueued(policy));
        let mut running = std::collections::VecDeque::new();
        let mut failed = 0;
        for number in 0..400 {
            let now = seconds(f64::from(number) * 0.05);
            let sequence = prompt(number);
            let mut booking = router.route(&Request::new(&sequence), now).unwrap();
            if booking.worker() == ids[0] {
                failed += 1;
                booking.report(Failure, now);
                booking.reroute(&ids[..1], now).unwrap();
            }
            assert_ne!(booking.worker(), ids[0]);
            booking.on_tokens(1, now + seconds(0.01));
            running.push_back(booking);
            if running.len() > 60 {
                running.pop_front();
            }
        }
        assert!(failed <= 20, "{name}: {failed} of 400");
        drop(running);
        assert_idle(&router, seconds(20.0));
    }
}

fn assert_idle(router: &Router, now: Duration) {
    for worker in router.workers(now) {
        let load = (
            worker.active_blocks,
            worker.queued_blocks,
            worker.context_tokens,
        );
        assert_eq!(load, (0, 0, 0));
        assert_eq!((worker.requests, worker.prefill_tokens), (0, 0));
        assert_eq!(worker.prefill_backlog, Duration::ZERO);
    }
}

#[test]
fn a_failure_is_charged_with_what_the_request_would_have_taken() {
    for policy in [
        policy::MARGINAL_DELAY,
        policy::KV,
        policy::LEAST_REQUESTS,
        policy::POWER_OF_TWO,
    ] {
        let (router, ids) = warm_fleet(2, unqueued(policy));
        let failed = exchange(&router, Failure, seconds(1.0));
        let charge = |now| outlier(&router, failed, seconds(now)).charge_seconds;
        let first = charge(1.0);
        assert!(first > 0.1, "{first}");
        assert!((charge(16.0) / first - (-1.0_f64).exp()).abs() < 1e-9);
        assert_idle(&router, seconds(1.0));
        let request = prompt(1);
        let explanation = router
            .explain(&Request::new(&request), seconds(1.0))
            .unwrap();
        for candidate in &explanation.candidates {
            let is_failed = candidate.id == failed;
            let probability = f64::from(u8::from(!is_failed));
            assert_eq!(candidate.probability, probability, "{policy}");
            assert_eq!(candidate.delay.failure_charge > 0.0, is_failed);
        }
        assert_ne!(route(&router, seconds(1.0)).worker(), failed);
        // The charge has decayed after a while.
        let mut later: Vec<_> = (0..40).map(|_| route(&router, seconds(301.0))).collect();
        later.retain(|booking| booking.worker() == failed);
        assert!(!later.is_empty(), "{policy}");
        assert_eq!(outlier(&router, failed, seconds(301.0)).charge_seconds, 0.0);
        assert!(ids.contains(&failed));
    }
}

#[test]
fn a_slow_failure_is_charged_with_the_time_that_it_took() {
    let (router, _) = warm_fleet(2, unqueued(NamedPolicy::default()));
    let mut booking = route(&router, seconds(1.0));
    booking.report(Failure, seconds(101.0));
    let charge = outlier(&router, booking.worker(), seconds(101.0)).charge_seconds;
    assert!((charge - 100.0).abs() < 1e-6, "{charge}");
}

#[test]
fn a_failed_batch_counts_once_and_charges_every_prompt() {
    let (router, _) = warm_fleet(2, unqueued(NamedPolicy::default()));
    let prompts: Vec<Sequence> = (0..4).map(prompt).collect();
    let request = Request::new(&prompts[0]);
    let mut batch = router
        .route_batch(&request, &prompts[1..], seconds(1.0))
        .unwrap();
    batch.report(Failure, seconds(1.0));
    batch.report(Failure, seconds(1.0));
    let failed = outlier(&router, batch.worker(), seconds(1.0));
    assert_eq!(failed.consecutive_failures, 1);
    let single = exchange(&router, Failure, seconds(1.0));
    let single = outlier(&router, single, seconds(1.0)).charge_seconds;
    assert!(failed.charge_seconds > 3.0 * single, "{failed:?} {single}");
    drop(batch);
    assert_idle(&router, seconds(1.0));
}

#[test]
fn backpressure_lasts_a_second_whatever_the_worker_names() {
    let (router, ids) = warm_fleet(2, unqueued(NamedPolicy::default()));
    let named = Backpressure {
        retry_after: Some(seconds(0.0)),
    };
    router.report(ids[0], named, seconds(1.0));
    let busy = snapshot(&router, ids[0], seconds(1.0));
    assert_eq!(busy.outlier.backpressure_until, Some(seconds(2.0)));
}

#[test]
fn backpressure_is_neither_failure_nor_success() {
    let (router, ids) = warm_fleet(2, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [Failure; 4], seconds(1.0));
    let named = Backpressure {
        retry_after: Some(seconds(7.0)),
    };
    router.report(ids[0], named, seconds(1.0));
    let busy = snapshot(&router, ids[0], seconds(1.0));
    assert_eq!(busy.outlier.consecutive_failures, 4);
    assert_eq!(busy.outlier.backpressure_until, Some(seconds(8.0)));
    assert_eq!(busy.state, WorkerState::Healthy);
    for _ in 0..20 {
        assert_eq!(exchange(&router, Success, seconds(7.9)), ids[1]);
    }
    router.report(ids[1], BUSY, seconds(7.5));
    let error = router.route(&Request::new(&prompt(1)), seconds(7.9)).err();
    assert_eq!(
        error,
        Some(RouteError::Backpressure {
            retry_after: seconds(0.1)
        })
    );
    assert_eq!(route(&router, seconds(8.0)).worker(), ids[0]);
}

#[test]
fn backpressure_without_a_time_doubles_from_one_to_ten_seconds() {
    let (router, ids) = warm_fleet(1, unqueued(NamedPolicy::default()));
    let mut now = 1.0;
    let mut pauses = Vec::new();
    for _ in 0..6 {
        router.report(ids[0], BUSY, seconds(now));
        // Requests that were sent before say nothing new.
        router.report(ids[0], BUSY, seconds(now));
        let until = outlier(&router, ids[0], seconds(now)).backpressure_until;
        pauses.push(until.unwrap().as_secs_f64() - now);
        now = until.unwrap().as_secs_f64();
    }
    assert_eq!(pauses, [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]);
    router.report(ids[0], Success, seconds(now));
    router.report(ids[0], BUSY, seconds(now));
    let until = outlier(&router, ids[0], seconds(now)).backpressure_until;
    assert_eq!(until, Some(seconds(now + 1.0)));
    // A time that is far too long is cut.
    let (router, ids) = warm_fleet(1, unqueued(NamedPolicy::default()));
    let retry_after = Some(Duration::MAX);
    router.report(ids[0], Backpressure { retry_after }, seconds(1.0));
    let until = outlier(&router, ids[0], seconds(1.0)).backpressure_until;
    assert_eq!(until, Some(seconds(301.0)));
}

#[test]
fn backpressure_during_a_trial_keeps_the_ejection() {
    let (router, ids) = warm_fleet(2, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [Failure; 5], seconds(0.0));
    assert_eq!(exchange(&router, BUSY, seconds(30.0)), ids[0]);
    let half_open = outlier(&router, ids[0], seconds(30.0));
    assert!(half_open.is_ejected && half_open.is_half_open);
    assert_eq!(
        (half_open.ejections, half_open.next_trial_at),
        (1, Some(seconds(31.0)))
    );
    assert_eq!(exchange(&router, Success, seconds(30.9)), ids[1]);
    assert_eq!(exchange(&router, Success, seconds(31.0)), ids[0]);
    assert!(!outlier(&router, ids[0], seconds(31.0)).is_ejected);
}

#[test]
fn the_only_worker_is_never_ejected_and_an_ejected_one_is_better_than_none() {
    let (router, ids) = warm_fleet(1, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [Failure; 50], seconds(1.0));
    assert_eq!(route(&router, seconds(1.0)).worker(), ids[0]);

    let (router, ids) = warm_fleet(2, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [Failure; 50], seconds(1.0));
    report_many(&router, ids[1], [Failure; 50], seconds(1.0));
    assert!(outlier(&router, ids[0], seconds(1.0)).is_ejected);
    assert!(!outlier(&router, ids[1], seconds(1.0)).is_ejected);
    let sequence = prompt(1);
    let retry = Request {
        excluded_workers: &ids[1..],
        ..Request::new(&sequence)
    };
    assert_eq!(router.route(&retry, seconds(2.0)).unwrap().worker(), ids[0]);
    // The ejection ends when the fleet shrinks to the ejected worker.
    router.set_healthy(ids[1], false);
    assert!(!outlier(&router, ids[0], seconds(2.0)).is_ejected);
    assert_eq!(route(&router, seconds(2.0)).worker(), ids[0]);
}

#[test]
fn ejection_survives_health_checks_and_ends_with_a_restart() {
    let (router, ids) = warm_fleet(4, unqueued(NamedPolicy::default()));
    report_many(&router, ids[0], [Failure; 5], seconds(1.0));
    router.set_healthy(ids[0], false);
    assert_eq!(
        snapshot(&router, ids[0], seconds(2.0)).state,
        WorkerState::Unhealthy
    );
    router.set_healthy(ids[0], true);
    assert_eq!(
        snapshot(&router, ids[0], seconds(2.0)).state,
        WorkerState::Ejected
    );
    router.reset_outlier(ids[0], seconds(3.0));
    let restarted = snapshot(&router, ids[0], seconds(3.0));
    assert_eq!(restarted.state, WorkerState::Healthy);
    assert!(restarted.outlier.is_warming_up);
    assert_eq!(restarted.outlier.ejections, 0);
}

#[test]
fn a_worker_without_output_gets_two_requests() {
    let (router, ids) = warm_fleet(3, unqueued(policy::LEAST_REQUESTS));
    let mut bookings: Vec<Booking> = (0..9).map(|_| route(&router, seconds(1.0))).collect();
    let new = add_worker(&router, 3);
    bookings.extend((0..9).map(|_| route(&router, seconds(2.0))));
    let on_new = |bookings: &[Booking]| {
        let all = bookings.iter().map(Booking::worker);
        all.filter(|&worker| worker == new).count()
    };
    assert_eq!(on_new(&bookings), 2);
    let position = bookings.iter().position(|booking| booking.worker() == new);
    bookings[position.unwrap()].on_first_token(seconds(3.0));
    assert!(!outlier(&router, new, seconds(3.0)).is_warming_up);
    bookings.extend((0..9).map(|_| route(&router, seconds(3.0))));
    assert!(on_new(&bookings) >= 6, "{}", on_new(&bookings));

    drop((bookings, ids));
}

/// Workers of a new fleet produce their first outputs at different times. A burst is spread evenly
/// over all of them nevertheless.
#[test]
fn a_burst_on_a_new_fleet_is_not_limited() {
    let (router, ids) = new_fleet(4, unqueued(policy::LEAST_REQUESTS));
    let mut bookings: Vec<Booking> = Vec::new();
    for round in 1..=4 {
        bookings.extend((0..40).map(|_| route(&router, seconds(1.0))));
        for &id in &ids {
            let booked = bookings.iter().filter(|booking| booking.worker() == id);
            assert_eq!(booked.count(), 10 * round);
        }
        let of_next = |booking: &&mut Booking| booking.worker() == ids[round - 1];
        let first = bookings.iter_mut().find(of_next);
        first.unwrap().on_first_token(seconds(1.0));
    }
    // A worker that joins them is limited.
    let new = add_worker(&router, 4);
    bookings.extend((0..9).map(|_| route(&router, seconds(2.0))));
    let on_new = bookings.iter().filter(|booking| booking.worker() == new);
    assert_eq!(on_new.count(), 2);
}

#[test]
fn queued_requests_leave_a_worker_that_is_ejected_or_has_backpressure() {
    for result in [Failure, BUSY] {
        let config = RouterConfig {
            queue_order: Some(QueueOrder::Fcfs),
            ..RouterConfig::default()
        };
        let (router, ids) = warm_fleet(2, config);
        let long = |number: u32| {
            let tokens: Vec<u32> = (0..60_000).map(|token| number * 100_000 + token).collect();
            Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0)
        };
        let mut bookings: Vec<Booking> = (0..6)
            .map(|number| {
                let sequence = long(number);
                router
                    .route(&Request::new(&sequence), seconds(1.0))
                    .unwrap()
            })
            .collect();
        let mut context = Context::from_waker(Waker::noop());
        let mut poll = |bookings: &mut Vec<Booking>| {
            for booking in bookings {
                let _ = booking.poll_dispatch(&mut context, &[], seconds(1.0));
            }
        };
        poll(&mut bookings);
        assert_eq!(router.queued_requests(), 4);
        report_many(&router, ids[0], [result; 5], seconds(1.0));
        poll(&mut bookings);
        let left = snapshot(&router, ids[0], seconds(1.0));
        assert_eq!((left.requests, left.queued_requests), (1, 0), "{result:?}");
        drop(bookings);
        assert_idle(&router, seconds(1.0));
    }
}
