//! What a change of the cost in seconds must not lose: it is as good as the greedy oracle, and no
//! worse than least-requests where nothing is shared; and waiting at the router is worth it. Small
//! enough to be run with every change; the whole list is that of [`foresee_sim::suite`].

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use crate::BLOCK;
use foresee_core::router::RouterConfig;
use foresee_sim::compare::{Case, compare_all};
use foresee_sim::engine::EngineConfig;
use foresee_sim::lab::Contender;
use foresee_sim::law::L40S_8B;
use foresee_sim::replay::ReplayConfig;
use foresee_sim::report::Report;
use foresee_sim::traffic::Traffic;
use foresee_sim::workload::{Recipe, Shape, Spacing, Workload};

const SEEDS: u64 = 2;

/// Four workers, and what `make` makes of each seed.
fn case(make: impl Fn(u64) -> Workload) -> Case {
    let engine = EngineConfig::from_preset(&L40S_8B, BLOCK);
    let traffic = (0..SEEDS).map(|seed| Arc::new(Traffic::new(make(seed), BLOCK)));
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

fn replayed(cases: &[Case], policies: &[&str]) -> Vec<Report> {
    let policies = policies.iter().map(|name| name.parse().unwrap());
    let policies: Vec<Contender> = policies.collect();
    compare_all(cases, &policies, 2, &|_, _| ()).unwrap()
}

/// Each policy's mean time from arrival to last token, over seeds.
fn end_to_end(report: &Report) -> Vec<f64> {
    let runs = report.outcomes.chunks(SEEDS as usize);
    let sums = runs.map(|runs| runs.iter().map(|it| it.end_to_end.mean).sum::<f64>());
    sums.map(|sum| sum / SEEDS as f64).collect()
}

#[test]
fn delay_is_within_three_percent_of_the_greedy_oracle() {
    let named = |name| Recipe::named(name).unwrap();
    let cases = [
        open(&named("chat"), 100, 10.0),
        open(&named("rag"), 300, 4.5),
        case(|seed| named("n-samples").with_requests(250).make(seed)),
    ];
    let reports = replayed(&cases, &["delay+shortest", "oracle"]);
    let ratios = reports.iter().map(|report| {
        let [delay, oracle] = end_to_end(report)[..] else {
            panic!("two policies")
        };
        delay / oracle
    });
    let ratios: Vec<f64> = ratios.collect();
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(mean <= 1.03, "{mean:.3} times the oracle's: {ratios:.3?}");
}

/// Prompts of most different lengths that share nothing.
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
fn waiting_at_the_router_wins_if_all_are_busy_and_costs_nothing_otherwise() {
    let long = Recipe::named("burst-isl").unwrap();
    let burst = case(|seed| long.clone().with_requests(300).make(seed));
    let cases = [open(&plain(), 300, 6.0), burst];
    let reports = replayed(&cases, &["delay", "delay+shortest"]);
    let ratio = |report: &Report| {
        let [at_once, in_line] = end_to_end(report)[..] else {
            panic!("two policies")
        };
        in_line / at_once
    };
    let (idle, busy) = (ratio(&reports[0]), ratio(&reports[1]));
    assert!(idle <= 1.01, "{idle:.3} times as long when there is room");
    assert!(busy <= 0.97, "{busy:.3} times as long when there is none");
}

#[test]
fn delay_is_no_worse_than_least_requests_where_nothing_is_shared() {
    let reports = replayed(
        &[open(&plain(), 600, 12.0)],
        &["delay+shortest", "least-requests"],
    );
    let [delay, least_requests] = end_to_end(&reports[0])[..] else {
        panic!("two policies")
    };
    assert!(
        delay <= least_requests,
        "{delay:.3} s, {least_requests:.3} s"
    );
}

#[test]
fn what_is_learned_is_near_the_truth_and_follows_it() {
    let mut case = open(&plain(), 600, 12.0);
    case.config.changes = vec!["1:speed=0.5@20s".parse().unwrap()];
    let reports = replayed(&[case], &["delay"]);
    for outcome in &reports[0].outcomes {
        let learned = outcome.learning;
        let recovers = learned.recovery > 0.0 && learned.recovery < 10.0;
        assert!(recovers && learned.step < 0.05, "{learned:?}");
        assert!(learned.prefill < 0.2, "{learned:?}");
    }
}
