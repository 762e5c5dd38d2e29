//! How requests are spread: each policy, each error, each part of a decision.

#![allow(clippy::unwrap_used)]

use std::sync::Barrier;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::choose::Policy;
use foresee_core::fleet::WorkerSpec;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;

fn fleet(count: usize, config: RouterConfig) -> Router {
    let router = Router::new(config).unwrap();
    for worker in 0..count {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
    }
    router
}

/// 1,000 requests at once, from 16 threads, of one length and nothing in common: each decision
/// sees all others, so they spread exactly.
#[test]
fn simultaneous_requests_spread_evenly() {
    for seed in 0..20 {
        let router = fleet(
            8,
            RouterConfig {
                seed,
                ..RouterConfig::default()
            },
        );
        let start = Barrier::new(16);
        let bookings: Vec<Booking> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16u32)
                .map(|thread| {
                    let (router, start) = (&router, &start);
                    scope.spawn(move || {
                        start.wait();
                        let share = 1000 / 16 + u32::from(thread < 1000 % 16);
                        (0..share)
                            .map(|i| {
                                let first = thread * 1_000_000 + i * 1_000;
                                let prompt: Vec<u32> = (first..first + 700).collect();
                                let block_size = RouterConfig::default().block_size;
                                let sequence = Sequence::from_tokens(&prompt, block_size, 0);
                                router
                                    .route(&Request::new(&sequence), Duration::ZERO)
                                    .unwrap()
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap())
                .collect()
        });
        assert_eq!(bookings.len(), 1000);
        for worker in router.workers(Duration::ZERO) {
            assert_eq!(worker.requests, 125);
            assert_eq!(worker.active_blocks, 125 * 700_u64.div_ceil(16));
        }
        drop(bookings);
        assert!(
            router
                .workers(Duration::ZERO)
                .iter()
                .all(|worker| worker.active_blocks == 0)
        );
    }
}

/// Whatever the policy, load is booked, and the same seed makes the same choices.
#[test]
fn every_policy_books_and_repeats_itself() {
    let run = |policy| {
        let router = fleet(
            5,
            RouterConfig {
                policy,
                seed: 9,
                ..RouterConfig::default()
            },
        );
        let bookings: Vec<_> = (0..200u32)
            .map(|i| {
                let prompt: Vec<u32> = (0..100 + i).map(|t| t / 40 * (i % 7)).collect();
                let sequence =
                    Sequence::from_tokens(&prompt, RouterConfig::default().block_size, 0);
                router
                    .route(&Request::new(&sequence), Duration::ZERO)
                    .unwrap()
            })
            .collect();
        let requests: Vec<_> = router
            .workers(Duration::ZERO)
            .iter()
            .map(|worker| worker.requests)
            .collect();
        assert_eq!(requests.iter().sum::<u32>(), 200, "{policy}");
        let bound = if policy == Policy::Random { 70 } else { 50 };
        assert!(
            requests.iter().all(|&requests| requests <= bound),
            "{policy}: {requests:?}"
        );
        bookings.iter().map(Booking::worker).collect::<Vec<_>>()
    };
    for (policy, _) in Policy::ALL {
        if policy == Policy::Kv {
            continue; // balances blocks, not requests
        }
        assert_eq!(run(policy), run(policy), "{policy}");
    }
}

#[test]
fn weight_zero_looks_at_load_alone() {
    let router = fleet(
        2,
        RouterConfig {
            overlap_weight: 0.0,
            ..RouterConfig::default()
        },
    );
    let prompt: Vec<u32> = (0..1600).collect();
    let sequence = Sequence::from_tokens(&prompt, RouterConfig::default().block_size, 0);
    // A shared block costs nothing where it is, yet the second copy goes elsewhere.
    let first = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    let second = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    assert_ne!(first.worker(), second.worker());
}

#[test]
fn overlap_draws_until_load_outweighs_it() {
    let router = fleet(2, RouterConfig::default());
    let prompt: Vec<u32> = (0..1600).collect();
    let block_size = RouterConfig::default().block_size;
    let sequence = Sequence::from_tokens(&prompt, block_size, 0);
    let mut warm = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    let holder = warm.worker();
    warm.tokens(1, Duration::ZERO);
    warm.finish(Duration::ZERO);
    // Cached, not active: a sibling goes there.
    let sibling = router
        .route(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    assert_eq!(sibling.worker(), holder);
    assert_eq!(
        sibling.decision().cost.overlap_blocks,
        99,
        "one token must be computed"
    );
    // Its blocks there now weigh as much as computing the prompt elsewhere, and more once others
    // join: strangers go to the empty worker.
    let stranger: Vec<u32> = (10_000..11_600).collect();
    let stranger = Sequence::from_tokens(&stranger, block_size, 0);
    let elsewhere = router
        .route(&Request::new(&stranger), Duration::ZERO)
        .unwrap();
    assert_ne!(elsewhere.worker(), holder);
}
