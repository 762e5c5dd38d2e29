//! Replication: an idle worker computes a popular prefix once the regret reaches its cost.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec};

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();
const PREFIX: u32 = 8000;

fn fleet(config: RouterConfig) -> Router {
    let router = Router::new(config).unwrap();
    for name in ["first", "second"] {
        let id = router.add_worker(WorkerSpec {
            name: name.to_owned(),
            capacity_blocks: Some(100_000),
            prefix_caching: true,
            ..WorkerSpec::default()
        });
        router.set_healthy(id.unwrap(), true);
    }
    router
}

/// Returns the common prefix, followed by a few tokens that only this prompt has.
fn prompt(own: u32) -> Sequence {
    let tokens: Vec<u32> = (0..PREFIX).chain([1 << 20 | own; 20]).collect();
    Sequence::from_tokens(&tokens, BLOCK_SIZE, 0)
}

/// Runs a request that ends before the next one arrives. Returns its worker and its overlap.
fn serve(router: &Router, own: u32, now: Duration) -> (WorkerId, u32) {
    let prompt = prompt(own);
    let explained = router.explain(&Request::new(&prompt), now).unwrap();
    let mut booking = router.route(&Request::new(&prompt), now).unwrap();
    let is_cheapest = |id| {
        let candidate = explained
            .candidates
            .iter()
            .find(|candidate| candidate.id == id);
        candidate.unwrap().probability > 0.0
    };
    match explained.replicates_prefix_to {
        Some(id) => assert!(id == booking.worker() && !is_cheapest(id)),
        None => assert!(is_cheapest(booking.worker())),
    }
    let overlap = booking.decision().prefix_match.overlap();
    // The speed that is assumed before anything is learned.
    let computed_tokens = u64::from(PREFIX + 20 - overlap * BLOCK_SIZE.get());
    booking.on_first_token(now + Duration::from_micros(20_000 + 100 * computed_tokens));
    (booking.worker(), overlap)
}

/// Returns the worker of a first request, which does not end, and the workers of a hundred requests
/// after it.
fn route_after_a_long_request(router: &Router) -> (WorkerId, Vec<WorkerId>) {
    let first = prompt(0);
    let mut long = router.route(&Request::new(&first), Duration::ZERO).unwrap();
    long.on_first_token(Duration::from_secs(1));
    let workers =
        (1..=100).map(|own| serve(router, own, Duration::from_secs(u64::from(2 * own))).0);
    (long.worker(), workers.collect())
}

#[test]
fn an_idle_worker_replicates_a_prefix_once_the_regret_reaches_its_cost() {
    let router = fleet(RouterConfig {
        block_size: BLOCK_SIZE,
        queue_order: None,
        ..RouterConfig::default()
    });
    let (home, workers) = route_after_a_long_request(&router);
    let replicated = workers.iter().position(|&worker| worker != home).unwrap();
    assert!(
        replicated > 0,
        "the regret of one request is less than the cost"
    );
    assert!(
        workers[replicated..].iter().all(|&worker| worker != home),
        "the replica is on an idle worker"
    );
    let (_, overlap) = serve(&router, 101, Duration::from_secs(300));
    assert_eq!(overlap, PREFIX / BLOCK_SIZE);
}

#[test]
fn the_kv_policy_does_not_replicate() {
    let router = fleet(RouterConfig {
        block_size: BLOCK_SIZE,
        policy: "kv".parse().unwrap(),
        overlap_weight: 100.0,
        queue_order: None,
        ..RouterConfig::default()
    });
    let (home, workers) = route_after_a_long_request(&router);
    assert!(workers.iter().all(|&worker| worker == home));
}
