//! Replays of router and engines together: no request is lost, results repeat, and predictions are
//! accurate.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::BLOCK;
use foresee_core::policy::{self, NamedPolicy};
use foresee_core::router::RouterConfig;
use foresee_sim::baselines::{BASELINES, PolicySpec};
use foresee_sim::compare::{Comparison, compare};
use foresee_sim::engine::EngineConfig;
use foresee_sim::hashed_workload::HashedWorkload;
use foresee_sim::outcome::Outcome;
use foresee_sim::replay::{Progress, ReplayConfig, ReplayError, run};
use foresee_sim::step_time::L40S_8B;
use foresee_sim::workload::{Chat, Shape, Workload};

const EVERY_POLICY: [NamedPolicy; 6] = [
    policy::KV,
    policy::ROUND_ROBIN,
    policy::RANDOM,
    policy::LEAST_REQUESTS,
    policy::POWER_OF_TWO,
    policy::CONSISTENT_HASH,
];

fn every_policy() -> Vec<PolicySpec> {
    let baselines = BASELINES
        .iter()
        .map(|baseline| baseline.name.parse().expect("a name"));
    let router = EVERY_POLICY.map(PolicySpec::from);
    router.into_iter().chain(baselines).collect()
}

fn fleet(blocks: u32, workers: u32) -> ReplayConfig {
    let engine = EngineConfig {
        blocks,
        ..EngineConfig::from_preset(&L40S_8B, BLOCK)
    };
    ReplayConfig::uniform(RouterConfig::default(), &engine, workers)
}

fn shape() -> Shape {
    Shape {
        isl: 700,
        isl_spread: 0.9,
        osl: 60,
        osl_spread: 0.9,
        ..Shape::default()
    }
}

fn chat() -> Workload {
    let chat = Chat {
        conversations: 60,
        ..Chat::default()
    };
    Workload::chat(&chat, 1)
}

fn outcome(config: &ReplayConfig, workload: &Workload) -> Outcome {
    run(config, workload, &mut |_| ()).expect("a valid configuration")
}

fn side_by_side(
    config: &ReplayConfig,
    policies: &[PolicySpec],
    workload: &Workload,
    threads: usize,
) -> Comparison {
    let traffic = Arc::new(HashedWorkload::new(workload.clone(), BLOCK));
    compare(config, policies, &[traffic], threads, &|_, _| ()).expect("a valid configuration")
}

#[test]
fn every_request_finishes_and_no_block_leaks_under_any_policy() {
    // The memory is so small that requests preempt each other.
    let config = fleet(200, 4);
    for workload in [
        Workload::closed_loop(&shape(), 150, 40, 1),
        Workload::burst(&shape(), 150, 1),
    ] {
        let report = side_by_side(&config, &every_policy(), &workload, 2);
        assert_eq!(report.outcomes.len(), every_policy().len());
        for (outcome, policy) in report.outcomes.iter().zip(every_policy()) {
            assert_eq!(outcome.policy, policy.to_string());
            assert_eq!((outcome.finished, outcome.unfinished), (150, 0));
            assert_eq!(outcome.leaked_blocks, 0);
            assert!(outcome.preemptions > 0);
            let tokens = workload
                .requests
                .iter()
                .map(|request| u64::from(request.prompt.len()));
            assert_eq!(outcome.prompt_tokens, tokens.sum::<u64>());
        }
    }
}

#[test]
fn equal_seeds_give_equal_outcomes() {
    let workload = chat();
    let config = fleet(3000, 3);
    let first = side_by_side(&config, &every_policy(), &workload, 1);
    let second = side_by_side(&config, &every_policy(), &workload, 3);
    assert_eq!(first.outcomes, second.outcomes);
    assert_eq!(first.summary, second.summary);
    let mut other = config.clone();
    other.engines[0].seed = 99;
    assert_ne!(outcome(&config, &workload), outcome(&other, &workload));
}

#[test]
fn prediction_routes_conversations_to_their_caches() {
    let policies = [policy::KV, policy::ROUND_ROBIN].map(PolicySpec::from);
    let report = side_by_side(&fleet(11_875, 8), &policies, &chat(), 2);
    let [kv, round_robin] = &report.outcomes[..] else {
        panic!("two policies, two outcomes");
    };
    assert!(
        kv.hit_fraction > 1.2 * round_robin.hit_fraction,
        "{report:?}"
    );
    assert!(
        kv.end_to_end.mean < round_robin.end_to_end.mean,
        "{report:?}"
    );
}

#[test]
fn policies_with_more_information_are_not_worse() {
    let policies = ["oracle", "kv", "least-requests", "random"];
    let policies = policies.map(|name| name.parse().expect("a name"));
    let report = side_by_side(&fleet(11_875, 8), &policies, &chat(), 2);
    let means = report
        .outcomes
        .iter()
        .map(|outcome| outcome.end_to_end.mean);
    assert!(means.is_sorted(), "{report:?}");
}

#[test]
fn active_blocks_equal_the_engines_allocated_and_unallocated_blocks() {
    for prefix_caching in [true, false] {
        let mut config = fleet(2000, 4);
        for engine in &mut config.engines {
            engine.prefix_caching = prefix_caching;
        }
        let outcome = outcome(&config, &Workload::closed_loop(&shape(), 400, 40, 1));
        let error = outcome.prediction;
        assert!(error.samples > 500);
        assert!(error.raw >= error.admitted && error.admitted >= error.allocated);
        assert!(error.allocated < 0.005, "{error:?}");
        assert_eq!(outcome.hit_fraction > 0.0, prefix_caching);
    }
}

#[test]
fn requests_that_fit_no_engine_are_rejected_without_delaying_others() {
    let heavy = Shape {
        heavy_fraction: 0.5,
        heavy_factor: 100.0,
        ..shape()
    };
    let outcome = outcome(&fleet(200, 2), &Workload::closed_loop(&heavy, 60, 4, 1));
    assert!(outcome.rejected > 10);
    assert_eq!(
        (outcome.finished + outcome.rejected, outcome.unfinished),
        (60, 0)
    );
    assert_eq!(outcome.leaked_blocks, 0);
}

#[test]
fn progress_counts_up_to_the_end() {
    let mut seen: Vec<Progress> = Vec::new();
    let workload = Workload::closed_loop(&shape(), 30, 4, 1);
    run(&fleet(2000, 2), &workload, &mut |progress| {
        seen.push(progress)
    })
    .unwrap();
    assert!(seen.is_sorted_by_key(|progress| (progress.now, progress.ended)));
    assert_eq!(
        seen.last().map(|last| (last.ended, last.total)),
        Some((30, 30))
    );
}

#[test]
fn an_engines_block_size_must_be_a_multiple_of_the_routers() {
    let mut config = fleet(200, 1);
    let other = NonZeroU32::new(24).unwrap();
    config.engines[0].block_size = other;
    let error = run(&config, &chat(), &mut |_| ()).unwrap_err();
    let expected = ReplayError::BlockSize {
        engine: other,
        router: BLOCK,
    };
    assert_eq!(error, expected);
    assert!(error.to_string().contains("--block-size"));
}
