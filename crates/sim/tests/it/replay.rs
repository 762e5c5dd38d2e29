//! Router and engines together: nothing is lost, everything repeats, prediction is near truth.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::BLOCK;
use foresee_core::choose::Policy;
use foresee_core::router::RouterConfig;
use foresee_sim::compare::compare;
use foresee_sim::engine::EngineConfig;
use foresee_sim::lab::{Contender, RULES};
use foresee_sim::law::L40S_8B;
use foresee_sim::replay::{Progress, ReplayConfig, ReplayError, run};
use foresee_sim::report::{Outcome, Report};
use foresee_sim::traffic::Traffic;
use foresee_sim::workload::{Chat, Shape, Workload};

const EVERY_POLICY: [Policy; 6] = [
    Policy::Kv,
    Policy::RoundRobin,
    Policy::Random,
    Policy::LeastRequests,
    Policy::PowerOfTwo,
    Policy::ConsistentHash,
];

fn every_policy() -> Vec<Contender> {
    let rules = RULES.iter().map(|rule| rule.name.parse().expect("a name"));
    let router = EVERY_POLICY.map(Contender::from);
    router.into_iter().chain(rules).collect()
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
    policies: &[Contender],
    workload: &Workload,
    threads: usize,
) -> Report {
    let traffic = Arc::new(Traffic::new(workload.clone(), BLOCK));
    compare(config, policies, &[traffic], threads, &|_, _| ()).expect("a valid configuration")
}

#[test]
fn every_request_finishes_and_nothing_is_left_under_any_policy() {
    // So little memory that requests preempt each other.
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
                .map(|it| u64::from(it.prompt.len()));
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
    let policies = [Policy::Kv, Policy::RoundRobin].map(Contender::from);
    let report = side_by_side(&fleet(11_875, 8), &policies, &chat(), 2);
    let [kv, round_robin] = &report.outcomes[..] else {
        panic!("two policies, two outcomes");
    };
    assert!(kv.hit_share > 1.2 * round_robin.hit_share, "{report}");
    assert!(kv.end_to_end.mean < round_robin.end_to_end.mean, "{report}");
}

#[test]
fn whoever_knows_more_is_not_worse() {
    let policies = ["oracle", "kv", "least-requests", "random"];
    let policies = policies.map(|name| name.parse().expect("a name"));
    let report = side_by_side(&fleet(11_875, 8), &policies, &chat(), 2);
    let means = report.outcomes.iter().map(|it| it.end_to_end.mean);
    assert!(means.is_sorted(), "{report}");
}

#[test]
fn active_blocks_are_what_engines_hold_but_for_what_they_have_not_allocated() {
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
        assert_eq!(outcome.hit_share > 0.0, prefix_caching);
    }
}

#[test]
fn requests_that_fit_nowhere_are_rejected_and_hold_up_nobody() {
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
    run(&fleet(2000, 2), &workload, &mut |it| seen.push(it)).unwrap();
    assert!(seen.is_sorted_by_key(|it| (it.now, it.ended)));
    assert_eq!(seen.last().map(|it| (it.ended, it.total)), Some((30, 30)));
}

#[test]
fn an_engine_s_block_size_must_be_a_multiple() {
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
