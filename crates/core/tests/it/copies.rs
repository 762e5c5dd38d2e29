//! A prefix that many want is computed once more by a worker that idles, once that pays.

#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;
use std::time::Duration;

use foresee_core::fleet::{WorkerId, WorkerSpec};
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;

const BLOCK_SIZE: NonZeroU32 = NonZeroU32::new(16).unwrap();
const PREFIX: u32 = 8000;

fn fleet(config: RouterConfig) -> Router {
    let router = Router::new(config).unwrap();
    for name in ["one", "other"] {
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

/// The prefix of all, and a few tokens of its own.
fn prompt(own: u32) -> Sequence {
    let tokens: Vec<u32> = (0..PREFIX).chain([1 << 20 | own; 20]).collect();
    Sequence::from_tokens(&tokens, BLOCK_SIZE, 0)
}

/// Sends one that ends before the next comes, and tells where.
fn serve(router: &Router, own: u32, now: Duration) -> (WorkerId, u32) {
    let prompt = prompt(own);
    let explained = router.explain(&Request::new(&prompt), now).unwrap();
    let mut booking = router.route(&Request::new(&prompt), now).unwrap();
    let is_cheapest = |id| {
        let candidate = explained.candidates.iter().find(|it| it.id == id);
        candidate.unwrap().probability > 0.0
    };
    match explained.copies_to {
        Some(id) => assert!(id == booking.worker() && !is_cheapest(id)),
        None => assert!(is_cheapest(booking.worker())),
    }
    let overlap = booking.decision().depth.overlap();
    // As fast as is expected before anything is known.
    let computed = u64::from(PREFIX + 20 - overlap * BLOCK_SIZE.get());
    booking.first_token(now + Duration::from_micros(20_000 + 100 * computed));
    (booking.worker(), overlap)
}

/// Where each of a hundred goes while the first, which never ends, is somewhere.
fn beside_one_that_stays(router: &Router) -> (WorkerId, Vec<WorkerId>) {
    let first = prompt(0);
    let mut stays = router.route(&Request::new(&first), Duration::ZERO).unwrap();
    stays.first_token(Duration::from_secs(1));
    let went = (1..=100).map(|own| serve(router, own, Duration::from_secs(u64::from(2 * own))).0);
    (stays.worker(), went.collect())
}

#[test]
fn an_idle_worker_gets_a_copy_once_as_much_is_lost() {
    let router = fleet(RouterConfig {
        block_size: BLOCK_SIZE,
        ..RouterConfig::default()
    });
    let (home, went) = beside_one_that_stays(&router);
    let copied = went.iter().position(|&it| it != home).unwrap();
    assert!(copied > 0, "one alone loses less than a copy costs");
    assert!(went[copied..].iter().all(|&it| it != home), "it idles");
    let (_, overlap) = serve(&router, 101, Duration::from_secs(300));
    assert_eq!(overlap, PREFIX / BLOCK_SIZE);
}

#[test]
fn nothing_is_copied_where_reuse_counts_alone() {
    let router = fleet(RouterConfig {
        block_size: BLOCK_SIZE,
        policy: "kv".parse().unwrap(),
        overlap_weight: 100.0,
        ..RouterConfig::default()
    });
    let (home, went) = beside_one_that_stays(&router);
    assert!(went.iter().all(|&it| it == home));
}
