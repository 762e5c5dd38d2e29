//! Conclusions from the cache hits that workers report.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::WorkerSpec;
use foresee_core::{CapacitySource, DEFAULT_CAPACITY_BLOCKS};

const BLOCK: u32 = 16;
const NOW: Duration = Duration::ZERO;

/// A router with one worker, for prompts of ten blocks.
struct Fleet {
    router: Router,
}

impl Fleet {
    fn new(capacity_blocks: Option<u32>) -> Self {
        let router = Router::new(RouterConfig {
            queue_order: None,
            ..RouterConfig::default()
        })
        .unwrap();
        let worker = router
            .add_worker(WorkerSpec {
                capacity_blocks,
                prefix_caching: true,
                ..WorkerSpec::default()
            })
            .unwrap();
        router.set_healthy(worker, true);
        Self { router }
    }

    fn book(&self, prompt: u32) -> Booking {
        let tokens: Vec<u32> = (0..10 * BLOCK + 1)
            .map(|token| prompt * 1000 + token)
            .collect();
        let sequence = Sequence::from_tokens(&tokens, BLOCK.try_into().unwrap(), 0);
        self.router.route(&Request::new(&sequence), NOW).unwrap()
    }

    /// Runs a request for a prompt, of which the worker reports `hits` cached blocks. Returns the
    /// predicted overlap.
    fn run(&self, prompt: u32, hits: Option<u32>) -> u32 {
        let mut booking = self.book(prompt);
        let predicted = booking.decision().cost.overlap_blocks;
        booking.on_tokens(1, NOW);
        if let Some(hits) = hits {
            booking.on_cached_tokens(hits * BLOCK);
        }
        booking.complete(NOW);
        predicted
    }

    /// Runs a request for each prompt, with the predicted overlap as reported hit.
    fn fill(&self, prompts: std::ops::Range<u32>) {
        for prompt in prompts {
            let hits = self.predicted(prompt);
            self.run(prompt, Some(hits));
        }
    }

    fn predicted(&self, prompt: u32) -> u32 {
        self.book(prompt).decision().cost.overlap_blocks
    }

    fn capacity(&self) -> (u32, CapacitySource) {
        let workers = self.router.workers(NOW);
        (workers[0].capacity_blocks, workers[0].capacity_source)
    }
}

#[test]
fn a_run_of_misses_means_that_the_cache_was_lost() {
    for capacity in [Some(1_000), None] {
        let fleet = Fleet::new(capacity);
        fleet.fill(0..20);
        fleet.fill(0..20);
        for prompt in 0..4 {
            assert_eq!(fleet.run(prompt, Some(0)), 10);
        }
        for prompt in 0..20 {
            // Prompts that were computed after the loss are cached.
            let expected = if prompt < 4 { 10 } else { 0 };
            assert_eq!(fleet.predicted(prompt), expected, "prompt {prompt}");
        }
    }
}

#[test]
fn misses_between_hits_do_not_clear_the_cache() {
    let fleet = Fleet::new(None);
    fleet.fill(0..20);
    fleet.fill(0..20);
    for prompt in 0..20 {
        fleet.run(prompt, Some(if prompt % 3 == 0 { 10 } else { 0 }));
    }
    assert!((0..20).all(|prompt| fleet.predicted(prompt) == 10));
    assert_eq!(
        fleet.capacity(),
        (DEFAULT_CAPACITY_BLOCKS, CapacitySource::Assumed)
    );
}

#[test]
fn a_worker_that_never_reports_a_hit_is_not_audited() {
    for hits in [Some(0), None] {
        let fleet = Fleet::new(None);
        for _ in 0..3 {
            for prompt in 0..20 {
                fleet.run(prompt, hits);
            }
        }
        assert!((0..20).all(|prompt| fleet.predicted(prompt) == 10));
        assert_eq!(fleet.capacity().1, CapacitySource::Assumed);
    }
}

#[test]
fn hits_on_recomputed_prompts_do_not_prove_that_the_rest_is_cached() {
    let fleet = Fleet::new(Some(1_000));
    fleet.fill(0..20);
    fleet.fill(0..20);
    for prompt in 0..4 {
        fleet.run(prompt, Some(0));
        // A hit, because the prompt was just computed.
        fleet.run(prompt, Some(10));
    }
    assert_eq!(fleet.predicted(10), 0);
    assert_eq!(fleet.predicted(3), 10);
}

#[test]
fn hits_on_active_blocks_prove_nothing() {
    let fleet = Fleet::new(Some(1_000));
    fleet.fill(0..20);
    fleet.fill(0..20);
    let _running = fleet.book(0);
    for _ in 0..10 {
        // Reports vary, because another request computes the same blocks at the time.
        fleet.run(0, Some(0));
        fleet.run(0, Some(10));
    }
    assert_eq!(fleet.predicted(10), 10);
}

#[test]
fn only_the_first_report_of_a_request_counts() {
    let fleet = Fleet::new(Some(1_000));
    fleet.fill(0..20);
    fleet.fill(0..20);
    let mut booking = fleet.book(5);
    for _ in 0..10 {
        booking.on_cached_tokens(0);
    }
    drop(booking);
    assert_eq!(fleet.predicted(10), 10);
}
