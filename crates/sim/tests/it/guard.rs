//! Guards the quality of the marginal delay: it is as good as the greedy oracle, no worse than
//! least-requests without shared prefixes, and the router's queue improves it. These replays are
//! small enough to run with every change; the complete list is [`foresee_sim::suite`].

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use crate::BLOCK;
use foresee_core::router::RouterConfig;
use foresee_sim::baselines::PolicySpec;
use foresee_sim::compare::{Case, Comparison, compare_all};
use foresee_sim::engine::EngineConfig;
use foresee_sim::hashed_workload::HashedWorkload;
use foresee_sim::replay::ReplayConfig;
use foresee_sim::step_time::L40S_8B;
use foresee_sim::workload::{Recipe, Shape, Spacing, Workload};

const SEEDS: u64 = 2;

/// Returns a case of four workers, with the workload that `make` returns for each seed.
fn case(make: impl Fn(u64) -> Workload) -> Case {
    let engine = EngineConfig::from_preset(&L40S_8B, BLOCK);
    let traffic = (0..SEEDS).map(|seed| Arc::new(HashedWorkload::new(make(seed), BLOCK)));
    Case {
        config: ReplayConfig::uniform(RouterConfig::default(), &engine, 4),
        traffic: traffic.collect(),
    }
}

fn open(recipe: &Recipe, requests: u32, rate: f64) -> Case {
    let recipe = recipe.clone().with_requests(requests);
    let recipe = recipe.open(rate, Spacing { cv: 1.0 }).unwrap();
    case(|seed| recipe.make(seed))
}

fn replayed(cases: &[Case], policies: &[&str]) -> Vec<Comparison> {
    let policies = policies.iter().map(|name| name.parse().unwrap());
    let policies: Vec<PolicySpec> = policies.collect();
    compare_all(cases, &policies, 2, &|_, _| ()).unwrap()
}

/// Returns each policy's mean time from arrival to the last token, over seeds.
fn end_to_end(report: &Comparison) -> Vec<f64> {
    let runs = report.outcomes.chunks(SEEDS as usize);
    let sums = runs.map(|runs| runs.iter().map(|run| run.end_to_end.mean).sum::<f64>());
    sums.map(|sum| sum / SEEDS as f64).collect()
}

#[test]
fn the_marginal_delay_is_within_three_percent_of_the_greedy_oracle() {
    let named = |name| Recipe::named(name).unwrap();
    let cases = [
        open(&named("chat"), 100, 10.0),
        open(&named("rag"), 300, 4.5),
        case(|seed| named("n-samples").with_requests(250).make(seed)),
    ];
    let reports = replayed(&cases, &["marginal-delay+shortest", "oracle"]);
    let ratios = reports.iter().map(|report| {
        let [marginal_delay, oracle] = end_to_end(report)[..] else {
            panic!("two policies")
        };
        marginal_delay / oracle
    });
    let ratios: Vec<f64> = ratios.collect();
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(mean <= 1.03, "{mean:.3} times the oracle's: {ratios:.3?}");
}

/// Returns prompts of very different lengths without shared prefixes.
fn plain() -> Recipe {
    Recipe::Burst {
        shape: Shape {
            isl: 1200,
            isl_spread: 0.9,
            osl: 200,
            osl_spread: 0.9,
            prefixes: 0,
            ..Shape::default()
        },
        requests: 0,
    }
}

#[test]
fn the_router_queue_helps_under_load_and_costs_nothing_otherwise() {
    let long = Recipe::named("burst-isl").unwrap();
    let burst = case(|seed| long.clone().with_requests(300).make(seed));
    let cases = [open(&plain(), 300, 6.0), burst];
    let reports = replayed(&cases, &["marginal-delay", "marginal-delay+shortest"]);
    let ratio = |report: &Comparison| {
        let [without_queue, with_queue] = end_to_end(report)[..] else {
            panic!("two policies")
        };
        with_queue / without_queue
    };
    let (idle, busy) = (ratio(&reports[0]), ratio(&reports[1]));
    assert!(idle <= 1.01, "{idle:.3} times as long on idle workers");
    assert!(busy <= 0.97, "{busy:.3} times as long on busy workers");
}

#[test]
fn the_marginal_delay_is_no_worse_than_least_requests_without_shared_prefixes() {
    let reports = replayed(
        &[open(&plain(), 600, 12.0)],
        &["marginal-delay+shortest", "least-requests"],
    );
    let [marginal_delay, least_requests] = end_to_end(&reports[0])[..] else {
        panic!("two policies")
    };
    assert!(
        marginal_delay <= least_requests,
        "{marginal_delay:.3} s, {least_requests:.3} s"
    );
}

#[test]
fn the_latency_model_is_accurate_and_follows_a_change_of_speed() {
    let mut case = open(&plain(), 600, 12.0);
    case.config.changes = vec!["1:speed=0.5@20s".parse().unwrap()];
    let reports = replayed(&[case], &["marginal-delay"]);
    for outcome in &reports[0].outcomes {
        let errors = outcome.forecast_errors;
        let recovers = errors.recovery > 0.0 && errors.recovery < 10.0;
        assert!(recovers && errors.decode_step < 0.05, "{errors:?}");
        assert!(errors.prefill < 0.2, "{errors:?}");
    }
}
