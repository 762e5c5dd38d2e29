//! A full queue: which request is refused, and which one loses its place to another.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::queue::QueueOrder;
use foresee_core::router::{Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(1);

/// A router whose only worker computes a prompt and takes no other request.
struct Full {
    router: Router,
    worker: WorkerId,
    limit: usize,
    /// Number of requests so far.
    requests: u32,
    /// The request that the worker computes.
    running: Option<Booking>,
}

impl Full {
    fn new(order: QueueOrder, limit: usize) -> Self {
        let router = Router::new(RouterConfig {
            queue_order: Some(order),
            queue_limit: Some(limit),
            ..RouterConfig::default()
        });
        let router = router.unwrap();
        let worker = router.add_worker(WorkerSpec::default()).unwrap();
        router.set_healthy(worker, true);
        let prompt = prompt(0, 50_000);
        let running = Request {
            tenant: u64::MAX,
            ..Request::new(&prompt)
        };
        let running = Some(router.route(&running, NOW).unwrap());
        Self {
            router,
            worker,
            limit,
            requests: 0,
            running,
        }
    }

    /// Routes a request with a prompt of its own.
    fn route(&mut self, priority: i32, tenant: u64) -> Result<Booking, RouteError> {
        self.requests += 1;
        let prompt = prompt(self.requests, 1_000);
        let request = Request {
            priority,
            tenant,
            ..Request::new(&prompt)
        };
        self.router.route(&request, NOW)
    }

    fn full(&self) -> RouteError {
        RouteError::QueueFull { limit: self.limit }
    }
}

/// Returns a prompt that shares no block with a prompt of another `seed`.
fn prompt(seed: u32, tokens: u32) -> Sequence {
    let tokens: Vec<u32> = (0..tokens).map(|token| token | seed << 20).collect();
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 7)
}

fn poll(booking: &mut Booking) -> Poll<Result<(), RouteError>> {
    booking.poll_dispatch(&mut Context::from_waker(Waker::noop()), &[], NOW)
}

#[test]
fn a_higher_priority_takes_the_place_of_the_lowest() {
    for order in [QueueOrder::Fcfs, QueueOrder::ShortestPrefillFirst] {
        let mut full = Full::new(order, 2);
        let mut urgent = full.route(-1, 0).unwrap();
        let mut normal = full.route(0, 0).unwrap();
        assert_eq!(full.route(0, 0).map(drop), Err(full.full()), "equal");
        assert_eq!(full.route(1, 0).map(drop), Err(full.full()), "lower");
        let mut second = full.route(-1, 0).unwrap();
        assert_eq!(full.router.queued_requests(), 2);
        assert_eq!(poll(&mut normal), Poll::Ready(Err(full.full())));
        assert_eq!(poll(&mut normal), Poll::Ready(Err(full.full())), "again");
        assert!(poll(&mut urgent).is_pending() && poll(&mut second).is_pending());
        assert_eq!(full.route(-1, 0).map(drop), Err(full.full()));
        drop(normal);
        assert_eq!(full.router.queued_requests(), 2);
        drop((urgent, second));
        assert_eq!(full.router.queued_requests(), 0);
        assert!(full.route(9, 0).is_ok());
    }
}

#[test]
fn a_request_that_lost_its_place_is_never_dispatched() {
    let mut full = Full::new(QueueOrder::Fcfs, 1);
    let mut displaced = full.route(1, 0).unwrap();
    let mut queued = full.route(0, 0).unwrap();
    // The worker is idle.
    full.running = None;
    assert_eq!(poll(&mut queued), Poll::Ready(Ok(())));
    drop(queued);
    assert_eq!(poll(&mut displaced), Poll::Ready(Err(full.full())));
}

#[test]
fn a_removed_worker_leaves_no_queued_request() {
    let mut full = Full::new(QueueOrder::Fcfs, 1);
    let bookings = [full.route(1, 0).unwrap(), full.route(0, 0).unwrap()];
    assert_eq!(full.router.queued_requests(), 1);
    assert!(full.router.remove_worker(full.worker));
    assert_eq!(full.router.queued_requests(), 0);
    drop(bookings);
    assert_eq!(full.router.queued_requests(), 0);
}

proptest! {
    /// Under fair queueing, the places of a full queue are shared as equally as the tenants' numbers
    /// of requests allow.
    #[test]
    fn tenants_share_a_full_queue(
        arrivals in prop::collection::vec(prop_oneof![4 => Just(0), 1 => 1..5_u64], 1..80),
        limit in 1..24_usize,
    ) {
        let mut full = Full::new(QueueOrder::FairByTenant, limit);
        let mut queued: Vec<(u64, Booking)> = Vec::new();
        let mut demand = HashMap::<u64, usize>::new();
        for tenant in arrivals {
            *demand.entry(tenant).or_default() += 1;
            match full.route(0, tenant) {
                Ok(booking) => queued.push((tenant, booking)),
                Err(error) => prop_assert_eq!(error, full.full()),
            }
            queued.retain_mut(|(_, booking)| poll(booking).is_pending());
            prop_assert_eq!(full.router.queued_requests(), queued.len());
            prop_assert!(queued.len() <= limit);
            let asked: usize = demand.values().sum();
            prop_assert_eq!(queued.len(), asked.min(limit));
            let places = |tenant: u64| queued.iter().filter(|(other, _)| *other == tenant).count();
            let most = demand.keys().map(|tenant| places(*tenant)).max().unwrap_or(0);
            for (tenant, asked) in &demand {
                let places = places(*tenant);
                prop_assert!(
                    places == *asked || places + 1 >= most,
                    "tenant {} has {} of {} places, another has {}", tenant, places, asked, most
                );
            }
        }
    }
}
