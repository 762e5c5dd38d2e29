//! What a replay can vary: the fleet, what the router hears of caches, and how often it is run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use crate::BLOCK;
use foresee_core::choose::Policy;
use foresee_core::router::RouterConfig;
use foresee_sim::capacity::{CapacityError, Sought, find};
use foresee_sim::compare::compare;
use foresee_sim::engine::EngineConfig;
use foresee_sim::knowledge::Knowledge;
use foresee_sim::lab::{Contender, RULES};
use foresee_sim::law::L40S_8B;
use foresee_sim::replay::{ReplayConfig, ReplayError, run};
use foresee_sim::report::Outcome;
use foresee_sim::traffic::Traffic;
use foresee_sim::workload::{Chat, Gaps, Recipe, Shape, Spacing, Workload};

fn fleet(workers: u32) -> ReplayConfig {
    let engine = EngineConfig {
        blocks: 3000,
        ..EngineConfig::from_preset(&L40S_8B, BLOCK)
    };
    ReplayConfig::uniform(RouterConfig::default(), &engine, workers)
}

fn with(mut config: ReplayConfig, policy: Policy) -> ReplayConfig {
    config.router.policy = policy;
    config
}

fn small() -> Shape {
    Shape {
        isl: 700,
        isl_spread: 0.9,
        osl: 60,
        osl_spread: 0.5,
        ..Shape::default()
    }
}

fn steady(rate: f64, requests: u32, seed: u64) -> Workload {
    let gaps = "poisson".parse::<Spacing>().unwrap().at(rate).unwrap();
    Workload::open_loop(&small(), requests, &gaps, seed)
}

/// Conversations that together need more memory than the fleet of [`fleet`] has.
fn chats() -> Workload {
    Workload::chat(&chat(), 1)
}

fn chat() -> Chat {
    Chat {
        conversations: 120,
        starts: Gaps::poisson(Duration::from_millis(300)),
        ..Chat::default()
    }
}

fn outcome(config: &ReplayConfig, workload: &Workload) -> Outcome {
    let outcome = run(config, workload, &mut |_| ()).expect("a valid configuration");
    let expected = (workload.requests.len(), 0, 0);
    let told = (outcome.finished, outcome.unfinished, outcome.leaked_blocks);
    assert_eq!(told, expected);
    outcome
}

#[test]
fn a_slow_worker_makes_everything_slower_and_a_fast_one_faster() {
    let workload = steady(10.0, 200, 1);
    let at_speed = |changes: &[&str]| {
        let mut config = with(fleet(2), Policy::RoundRobin);
        config.changes = changes.iter().map(|it| it.parse().unwrap()).collect();
        outcome(&config, &workload)
    };
    let plain = at_speed(&[]);
    assert_eq!(at_speed(&["1:speed=1"]), plain);
    let slow = at_speed(&["1:speed=0.5"]);
    let fast = at_speed(&["0:speed=2", "1:speed=2"]);
    let gap = |it: &Outcome| it.inter_token_latency.mean;
    assert!(gap(&slow) > 1.25 * gap(&plain), "{slow:?}");
    assert!(gap(&fast) < 0.7 * gap(&plain), "{fast:?}");
    // Half of the time it is as the others.
    let later = at_speed(&["1:speed=0.5@10s"]);
    assert!(gap(&plain) < gap(&later) && gap(&later) < gap(&slow));
    // Long after the last request.
    assert_eq!(at_speed(&["1:speed=0.5@10h"]), plain);
}

#[test]
fn a_worker_that_joins_serves_from_then_on() {
    let workload = steady(10.0, 200, 1);
    let mut config = with(fleet(2), Policy::RoundRobin);
    config.changes = vec!["1:join@10s".parse().unwrap()];
    let joined = outcome(&config, &workload);
    // About half of the requests come before, and of the others it gets half: a quarter of all.
    let imbalance = joined.request_imbalance;
    assert!((1.4..1.6).contains(&imbalance), "{imbalance}");

    config.changes = vec!["2:join@10s".parse().unwrap()];
    let error = run(&config, &workload, &mut |_| ()).unwrap_err();
    let expected = ReplayError::NoSuchWorker {
        worker: 2,
        workers: 2,
    };
    assert_eq!(error, expected);
}

#[test]
fn a_shadow_learns_from_answers_what_events_tell() {
    let mut config = fleet(4);
    config.capacity_known = false;
    let workload = chats();
    let events = outcome(&config, &workload).hit_share;
    config.knowledge = Knowledge::Shadow;
    let shadow = outcome(&config, &workload).hit_share;
    assert_ne!(events, shadow);
    assert!((events - shadow).abs() < 0.05, "{events} and {shadow}");
}

#[test]
fn events_that_come_late_or_never_are_worth_less() {
    // What has just ended is counted on until events have caught up: of those who think so long,
    // little has just ended.
    let think = Duration::from_secs(20);
    let workload = Workload::chat(&Chat { think, ..chat() }, 1);
    let told = |lag: u64, loss: f64| {
        let mut config = fleet(4);
        config.knowledge = Knowledge::Events {
            lag: Duration::from_secs(lag),
            loss,
        };
        outcome(&config, &workload).hit_share
    };
    let at_once = told(0, 0.0);
    assert_eq!(at_once, told(0, 0.0));
    let never = told(0, 1.0);
    assert!(never < 0.9 * at_once, "{never} of {at_once}");
    assert!(told(3600, 0.0) < 0.9 * at_once);
    assert!(told(0, 0.5) < at_once);

    let mut config = fleet(1);
    config.knowledge = Knowledge::Events {
        lag: Duration::ZERO,
        loss: 1.5,
    };
    let error = run(&config, &workload, &mut |_| ()).unwrap_err();
    assert_eq!(error, ReplayError::Loss { loss: 1.5 });
}

#[test]
fn larger_blocks_of_engines_are_counted_in_the_routers_own() {
    for knowledge in [Knowledge::default(), Knowledge::Shadow] {
        let mut config = fleet(4);
        config.knowledge = knowledge;
        let plain = outcome(&config, &chats());
        for engine in &mut config.engines {
            engine.block_size = NonZeroU32::new(64).unwrap();
            engine.blocks /= 4;
        }
        let large = outcome(&config, &chats());
        assert!(large.hit_share > 0.8 * plain.hit_share, "{large:?}");
        let peaks = [plain, large].map(|it| f64::from(it.prediction.peak_blocks));
        assert!((0.8..1.25).contains(&(peaks[1] / peaks[0])), "{peaks:?}");
    }
}

#[test]
fn rules_of_the_lab_choose_in_any_fleet() {
    let workload = steady(20.0, 300, 1);
    let mut config = fleet(4);
    config.changes = ["0:speed=0.2", "3:join@5s"]
        .map(|it| it.parse().unwrap())
        .to_vec();
    for engine in &mut config.engines[1..] {
        engine.block_size = NonZeroU32::new(32).unwrap();
        engine.blocks = 1500;
    }
    let mut by_rule = |name: &str| {
        config.contender = Some(name.parse().unwrap());
        outcome(&config, &workload)
    };
    let blind = by_rule("least-requests");
    for rule in &RULES {
        let outcome = by_rule(rule.name);
        assert_eq!(outcome.policy, rule.name);
        // Those that know how fast engines are spare the slow one.
        if ["min-ttft", "oracle", "oracle:ttft"].contains(&rule.name) {
            let (told, blind) = (outcome.end_to_end.mean, blind.end_to_end.mean);
            assert!(told < 0.8 * blind, "{}: {told} and {blind}", rule.name);
        }
    }
}

#[test]
fn requests_within_the_slo_are_counted_one_by_one() {
    let workload = steady(10.0, 200, 1);
    let mut config = fleet(2);
    let within = |config: &mut ReplayConfig, slo: &str| {
        config.slo = slo.parse().unwrap();
        outcome(config, &workload).goodput
    };
    assert_eq!(within(&mut config, "ttft=1h,itl=1h").share, 1.0);
    assert_eq!(within(&mut config, "itl=1ms").share, 0.0);
    let all = outcome(&config, &workload);
    // As many as there are below a percentile.
    let median = format!("ttft={}s", all.time_to_first_token.p50 + 1e-6);
    assert!((within(&mut config, &median).share - 0.5).abs() < 0.01);
    let p95 = format!("itl={}s", all.time_per_output_token.p95 + 1e-6);
    let goodput = within(&mut config, &p95);
    assert!((goodput.share - 0.95).abs() < 0.01);
    let served = goodput.per_second * all.makespan;
    assert!((served - 200.0 * goodput.share).abs() < 1e-6);
}

#[test]
fn several_seeds_are_paired_and_ties_are_called_so() {
    let traffic: Vec<Arc<Traffic>> = (0..4)
        .map(|seed| Arc::new(Traffic::new(steady(30.0, 300, seed), BLOCK)))
        .collect();
    let policies = [Policy::Kv, Policy::RoundRobin, Policy::Random].map(Contender::from);
    let config = fleet(2);
    let report = compare(&config, &policies, &traffic, 2, &|_, _| ()).unwrap();
    let again = compare(&config, &policies, &traffic, 1, &|_, _| ()).unwrap();
    assert_eq!(report.outcomes, again.outcomes);
    assert_eq!((report.outcomes.len(), report.seeds), (12, 4));
    for runs in report.outcomes.chunks(4) {
        let seeds: Vec<u64> = runs.iter().map(|it| it.seed).collect();
        assert_eq!(
            seeds,
            report.outcomes[..4]
                .iter()
                .map(|it| it.seed)
                .collect::<Vec<_>>()
        );
        assert!(runs[0].end_to_end != runs[1].end_to_end);
    }
    let of = |measure: &str| {
        let all = report.summary.iter();
        let all = all.filter(move |it| it.measure == measure);
        all.cloned().collect::<Vec<_>>()
    };
    let end_to_end = of("end to end mean, s");
    let best = end_to_end.iter().find(|it| it.is_best).unwrap();
    assert_eq!(best.against_best, None);
    assert_eq!(
        end_to_end.iter().filter(|it| it.is_best).count(),
        1,
        "{report}"
    );
    for other in end_to_end.iter().filter(|it| !it.is_best) {
        let difference = other.against_best.unwrap().mean;
        assert!((difference - (other.mean - best.mean)).abs() < 1e-9);
    }
    let random = end_to_end[2].against_best.unwrap();
    assert!(random.mean > 0.0 && !random.is_tie, "{report}");
    let mean: f64 = report.outcomes[..4]
        .iter()
        .map(|it| it.end_to_end.mean)
        .sum();
    assert!((end_to_end[0].mean - mean / 4.0).abs() < 1e-9);
    // All of the same traffic: the makespan is when the last request came, for everybody.
    assert!(
        of("makespan, s")
            .iter()
            .any(|it| it.against_best.is_some_and(|it| it.is_tie))
    );
    let table = report.to_string();
    assert!(table.contains("≈") && table.contains(" *") && table.contains("times real time"));
    assert!(report.virtual_seconds > 12.0 * 10.0 && report.real_seconds > 0.0);
}

#[test]
fn the_highest_rate_is_where_the_slo_breaks() {
    let traffic = [Arc::new(Traffic::new(steady(5.0, 150, 1), BLOCK))];
    let config = fleet(2);
    let policies = [Policy::Kv, Policy::Random].map(Contender::from);
    let slo = "ttft=500ms,itl=40ms".parse().unwrap();
    let config = ReplayConfig { slo, ..config };
    let found = find(
        &config,
        &policies,
        &traffic,
        Sought::Rate,
        0.9,
        2,
        &|_, _, _| (),
    )
    .unwrap();
    let [kv, random] = &found.found[..] else {
        panic!("two policies");
    };
    assert!(kv.rate > random.rate, "{found}");
    let by_kv = ReplayConfig {
        contender: Some(Policy::Kv.into()),
        ..config.clone()
    };
    let share = |rate: f64| {
        let workload = traffic[0].at_rate(rate).unwrap();
        outcome(&by_kv, workload.workload()).goodput.share
    };
    let rate = kv.rate.unwrap();
    assert!(share(rate) >= 0.9 && share(rate * 1.1) < 0.9, "{rate}");

    let impossible = ReplayConfig {
        slo: "itl=1ms".parse().unwrap(),
        ..config.clone()
    };
    let none = find(
        &impossible,
        &policies,
        &traffic,
        Sought::Rate,
        0.9,
        2,
        &|_, _, _| (),
    );
    assert_eq!(none.unwrap().found[0].rate, Some(0.0));
    let target = find(
        &config,
        &policies,
        &traffic,
        Sought::Rate,
        0.0,
        1,
        &|_, _, _| (),
    );
    assert_eq!(target, Err(CapacityError::Target { target: 0.0 }));
    let closed = Recipe::named("seed").unwrap().make(1);
    let closed = [Arc::new(Traffic::new(closed, BLOCK))];
    let error = find(
        &config,
        &policies,
        &closed,
        Sought::Rate,
        0.9,
        1,
        &|_, _, _| (),
    );
    assert!(error.unwrap_err().to_string().contains("--rps"));
}

#[test]
fn the_fewest_workers_are_where_one_less_breaks_the_slo() {
    let traffic = [Arc::new(Traffic::new(steady(30.0, 300, 1), BLOCK))];
    let slo = "ttft=500ms,itl=40ms".parse().unwrap();
    let config = ReplayConfig { slo, ..fleet(1) };
    let found = find(
        &config,
        &[Policy::Kv.into()],
        &traffic,
        Sought::Workers,
        0.9,
        1,
        &|_, _, _| (),
    );
    let workers = found.unwrap().found[0].workers.unwrap();
    assert!(workers > 1);
    let share = |workers: u32| {
        let config = ReplayConfig {
            contender: Some(Policy::Kv.into()),
            ..config.with_workers(workers)
        };
        outcome(&config, traffic[0].workload()).goodput.share
    };
    assert!(
        share(workers) >= 0.9 && share(workers - 1) < 0.9,
        "{workers}"
    );
    let mut config = config;
    config.changes = vec!["0:speed=0.5".parse().unwrap()];
    let error = find(
        &config,
        &[Policy::Kv.into()],
        &traffic,
        Sought::Workers,
        0.9,
        1,
        &|_, _, _| (),
    );
    assert_eq!(error, Err(CapacityError::Changes));
}
