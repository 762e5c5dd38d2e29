//! Replays under different conditions: fleets, cache signals, seeds and SLOs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use crate::BLOCK;
use foresee_core::policy::{self, NamedPolicy};
use foresee_core::router::RouterConfig;
use foresee_sim::baselines::{BASELINES, PolicySpec};
use foresee_sim::cache_signal::CacheSignal;
use foresee_sim::capacity::{CapacityError, Target, find};
use foresee_sim::compare::compare;
use foresee_sim::engine::EngineConfig;
use foresee_sim::hashed_workload::HashedWorkload;
use foresee_sim::outcome::Outcome;
use foresee_sim::replay::{ReplayConfig, ReplayError, run};
use foresee_sim::step_time::L40S_8B;
use foresee_sim::workload::{Chat, Gaps, Recipe, Shape, Spacing, Workload};

fn fleet(workers: u32) -> ReplayConfig {
    let engine = EngineConfig {
        blocks: 3000,
        ..EngineConfig::from_preset(&L40S_8B, BLOCK)
    };
    ReplayConfig::uniform(RouterConfig::default(), &engine, workers)
}

fn with(mut config: ReplayConfig, policy: NamedPolicy) -> ReplayConfig {
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

/// Returns conversations that together need more memory than a fleet of four workers has.
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
    let actual = (outcome.finished, outcome.unfinished, outcome.leaked_blocks);
    assert_eq!(actual, expected);
    outcome
}

#[test]
fn a_slow_worker_increases_latency_and_fast_workers_reduce_it() {
    let workload = steady(10.0, 200, 1);
    let at_speed = |changes: &[&str]| {
        let mut config = with(fleet(2), policy::ROUND_ROBIN);
        config.changes = changes
            .iter()
            .map(|change| change.parse().unwrap())
            .collect();
        outcome(&config, &workload)
    };
    let plain = at_speed(&[]);
    assert_eq!(at_speed(&["1:speed=1"]), plain);
    let slow = at_speed(&["1:speed=0.5"]);
    let fast = at_speed(&["0:speed=2", "1:speed=2"]);
    let gap = |outcome: &Outcome| outcome.inter_token_latency.mean;
    assert!(gap(&slow) > 1.25 * gap(&plain), "{slow:?}");
    assert!(gap(&fast) < 0.7 * gap(&plain), "{fast:?}");
    // Half of the time, the worker has the speed of the other one.
    let later = at_speed(&["1:speed=0.5@10s"]);
    assert!(gap(&plain) < gap(&later) && gap(&later) < gap(&slow));
    // A change long after the last request has no effect.
    assert_eq!(at_speed(&["1:speed=0.5@10h"]), plain);
}

#[test]
fn a_worker_that_joins_serves_from_then_on() {
    let workload = steady(10.0, 200, 1);
    let mut config = with(fleet(2), policy::ROUND_ROBIN);
    config.changes = vec!["1:join@10s".parse().unwrap()];
    let joined = outcome(&config, &workload);
    // About half of the requests arrive before the worker joins. It gets half of the others: a
    // quarter of all requests.
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
fn the_estimated_cache_is_nearly_as_good_as_events() {
    let mut config = fleet(4);
    config.reports_capacity = false;
    let workload = chats();
    let events = outcome(&config, &workload).hit_fraction;
    config.cache_signal = CacheSignal::Estimated;
    let estimated = outcome(&config, &workload).hit_fraction;
    assert_ne!(events, estimated);
    assert!(
        (events - estimated).abs() < 0.05,
        "{events} and {estimated}"
    );
}

#[test]
fn known_output_lengths_are_forecast_better() {
    let mut config = fleet(4);
    let workload = chats();
    let forecast = outcome(&config, &workload).forecast_errors.output_length;
    config.known_output_lengths = true;
    let known = outcome(&config, &workload).forecast_errors.output_length;
    assert!(known < 0.5 * forecast, "{known} and {forecast}");
}

#[test]
fn late_or_lost_events_reduce_the_hits() {
    // The router counts the blocks of a request that has just ended as cached until the events have
    // caught up. With long think times, few requests have just ended.
    let think = Duration::from_secs(20);
    let workload = Workload::chat(&Chat { think, ..chat() }, 1);
    let hits = |lag: u64, loss: f64| {
        let mut config = fleet(4);
        config.cache_signal = CacheSignal::Events {
            lag: Duration::from_secs(lag),
            loss_fraction: loss,
        };
        outcome(&config, &workload).hit_fraction
    };
    let all_events = hits(0, 0.0);
    assert_eq!(all_events, hits(0, 0.0));
    let no_events = hits(0, 1.0);
    assert!(no_events < 0.9 * all_events, "{no_events} of {all_events}");
    assert!(hits(3600, 0.0) < 0.9 * all_events);
    assert!(hits(0, 0.5) < all_events);

    let mut config = fleet(1);
    config.cache_signal = CacheSignal::Events {
        lag: Duration::ZERO,
        loss_fraction: 1.5,
    };
    let error = run(&config, &workload, &mut |_| ()).unwrap_err();
    assert_eq!(error, ReplayError::Loss { loss: 1.5 });
}

#[test]
fn larger_engine_blocks_are_converted_to_router_blocks() {
    for cache_signal in [CacheSignal::default(), CacheSignal::Estimated] {
        let mut config = fleet(4);
        config.cache_signal = cache_signal;
        let plain = outcome(&config, &chats());
        for engine in &mut config.engines {
            engine.block_size = NonZeroU32::new(64).unwrap();
            engine.blocks /= 4;
        }
        let large = outcome(&config, &chats());
        assert!(large.hit_fraction > 0.8 * plain.hit_fraction, "{large:?}");
        let peaks = [plain, large].map(|outcome| f64::from(outcome.prediction.peak_blocks));
        assert!((0.8..1.25).contains(&(peaks[1] / peaks[0])), "{peaks:?}");
    }
}

#[test]
fn every_baseline_works_in_a_mixed_fleet() {
    let workload = steady(20.0, 300, 1);
    let mut config = fleet(4);
    config.changes = ["0:speed=0.2", "3:join@5s"]
        .map(|change| change.parse().unwrap())
        .to_vec();
    for engine in &mut config.engines[1..] {
        engine.block_size = NonZeroU32::new(32).unwrap();
        engine.blocks = 1500;
    }
    let mut run_baseline = |name: &str| {
        config.policy = Some(name.parse().unwrap());
        outcome(&config, &workload)
    };
    let blind = run_baseline("least-requests");
    for baseline in &BASELINES {
        let outcome = run_baseline(baseline.name);
        assert_eq!(outcome.policy, baseline.name);
        // Baselines that know the speed of engines send less to the slow one.
        if ["min-ttft", "oracle", "oracle:ttft"].contains(&baseline.name) {
            let (informed, blind) = (outcome.end_to_end.mean, blind.end_to_end.mean);
            assert!(
                informed < 0.8 * blind,
                "{}: {informed} and {blind}",
                baseline.name
            );
        }
    }
}

#[test]
fn goodput_counts_the_requests_within_the_slo() {
    let workload = steady(10.0, 200, 1);
    let mut config = fleet(2);
    let within = |config: &mut ReplayConfig, slo: &str| {
        config.slo = slo.parse().unwrap();
        outcome(config, &workload).goodput
    };
    assert_eq!(within(&mut config, "ttft=1h,itl=1h").fraction, 1.0);
    assert_eq!(within(&mut config, "itl=1ms").fraction, 0.0);
    let all = outcome(&config, &workload);
    // A limit at a percentile is met by that fraction of requests.
    let median = format!("ttft={:.9}s", all.time_to_first_token.p50 + 1e-6);
    assert!((within(&mut config, &median).fraction - 0.5).abs() < 0.01);
    let p95 = format!("itl={:.9}s", all.time_per_output_token.p95 + 1e-6);
    let goodput = within(&mut config, &p95);
    assert!((goodput.fraction - 0.95).abs() < 0.01);
    let served = goodput.per_second * all.makespan;
    assert!((served - 200.0 * goodput.fraction).abs() < 1e-6);
}

#[test]
fn runs_are_paired_by_seed_and_ties_are_marked() {
    let traffic: Vec<Arc<HashedWorkload>> = (0..4)
        .map(|seed| Arc::new(HashedWorkload::new(steady(30.0, 300, seed), BLOCK)))
        .collect();
    let policies = [policy::KV, policy::ROUND_ROBIN, policy::RANDOM].map(PolicySpec::from);
    let config = fleet(2);
    let report = compare(&config, &policies, &traffic, 2, &|_, _| ()).unwrap();
    let again = compare(&config, &policies, &traffic, 1, &|_, _| ()).unwrap();
    assert_eq!(report.outcomes, again.outcomes);
    assert_eq!((report.outcomes.len(), report.seeds), (12, 4));
    for runs in report.outcomes.chunks(4) {
        let seeds: Vec<u64> = runs.iter().map(|run| run.seed).collect();
        assert_eq!(
            seeds,
            report.outcomes[..4]
                .iter()
                .map(|run| run.seed)
                .collect::<Vec<_>>()
        );
        assert!(runs[0].end_to_end != runs[1].end_to_end);
    }
    let of = |measure: &str| {
        let all = report.summary.iter();
        let all = all.filter(move |row| row.measure == measure);
        all.cloned().collect::<Vec<_>>()
    };
    let end_to_end = of("end to end mean, s");
    let best = end_to_end.iter().find(|row| row.is_best).unwrap();
    assert_eq!(best.against_best, None);
    assert_eq!(
        end_to_end.iter().filter(|row| row.is_best).count(),
        1,
        "{report:?}"
    );
    for other in end_to_end.iter().filter(|row| !row.is_best) {
        let difference = other.against_best.unwrap().mean;
        assert!((difference - (other.mean - best.mean)).abs() < 1e-9);
    }
    let random = end_to_end[2].against_best.unwrap();
    assert!(random.mean > 0.0 && !random.is_tie, "{report:?}");
    let mean: f64 = report.outcomes[..4]
        .iter()
        .map(|run| run.end_to_end.mean)
        .sum();
    assert!((end_to_end[0].mean - mean / 4.0).abs() < 1e-9);
    // All policies have the same arrivals, and the makespan depends mostly on the last arrival.
    assert!(
        of("makespan, s")
            .iter()
            .any(|row| row.against_best.is_some_and(|difference| difference.is_tie))
    );
    assert!(report.virtual_seconds > 12.0 * 10.0 && report.real_seconds > 0.0);
}

#[test]
fn requests_after_the_limit_of_duration_do_not_count() {
    let workload = Recipe::named("chat").unwrap().make(1);
    let replay = |config: &ReplayConfig| run(config, &workload, &mut |_| ()).unwrap();
    let mut config = fleet(2);
    let whole = replay(&config);
    assert_eq!(whole.requests, workload.requests.len());
    config.duration = Some(Duration::from_secs(30));
    let limited = replay(&config);
    assert!((20..whole.requests / 2).contains(&limited.requests));
    assert_eq!(limited.finished, limited.requests);
    assert_eq!((limited.unfinished, limited.leaked_blocks), (0, 0));
    config.slo = "ttft=1h,itl=1h".parse().unwrap();
    assert_eq!(replay(&config).goodput.fraction, 1.0);

    // A third of the requests are sent, and all of them miss the limits.
    let traffic = [Arc::new(HashedWorkload::new(steady(5.0, 150, 1), BLOCK))];
    config.duration = Some(Duration::from_secs(10));
    config.slo = "itl=1ms".parse().unwrap();
    let policies = [PolicySpec::from(policy::KV)];
    let target = Target::Workers;
    let found = find(&config, &policies, &traffic, target, 0.5, 1, &|_, _, _| ());
    assert_eq!(found.unwrap().results[0].workers, None);
}

#[test]
fn at_a_higher_rate_than_the_found_one_the_slo_is_missed() {
    let traffic = [Arc::new(HashedWorkload::new(steady(5.0, 150, 1), BLOCK))];
    let config = fleet(2);
    let policies = [policy::KV, policy::RANDOM].map(PolicySpec::from);
    let slo = "ttft=500ms,itl=40ms".parse().unwrap();
    let config = ReplayConfig { slo, ..config };
    let found = find(
        &config,
        &policies,
        &traffic,
        Target::Rate,
        0.9,
        2,
        &|_, _, _| (),
    )
    .unwrap();
    let [kv, random] = &found.results[..] else {
        panic!("two policies");
    };
    assert!(kv.rate > random.rate, "{found:?}");
    let by_kv = ReplayConfig {
        policy: Some(policy::KV.into()),
        ..config.clone()
    };
    let fraction_within_slo = |rate: f64| {
        let workload = traffic[0].at_rate(rate).unwrap();
        outcome(&by_kv, workload.workload()).goodput.fraction
    };
    let rate = kv.rate.unwrap();
    assert!(
        fraction_within_slo(rate) >= 0.9 && fraction_within_slo(rate * 1.1) < 0.9,
        "{rate}"
    );

    let impossible = ReplayConfig {
        slo: "itl=1ms".parse().unwrap(),
        ..config.clone()
    };
    let none = find(
        &impossible,
        &policies,
        &traffic,
        Target::Rate,
        0.9,
        2,
        &|_, _, _| (),
    );
    assert_eq!(none.unwrap().results[0].rate, Some(0.0));
    let target = find(
        &config,
        &policies,
        &traffic,
        Target::Rate,
        0.0,
        1,
        &|_, _, _| (),
    );
    assert_eq!(target, Err(CapacityError::Target { target: 0.0 }));
    let closed = Recipe::named("shared-prefix").unwrap().make(1);
    let closed = [Arc::new(HashedWorkload::new(closed, BLOCK))];
    let error = find(
        &config,
        &policies,
        &closed,
        Target::Rate,
        0.9,
        1,
        &|_, _, _| (),
    );
    assert!(error.unwrap_err().to_string().contains("--rps"));
}

#[test]
fn with_one_worker_less_than_the_found_number_the_slo_is_missed() {
    let traffic = [Arc::new(HashedWorkload::new(steady(30.0, 300, 1), BLOCK))];
    let slo = "ttft=500ms,itl=40ms".parse().unwrap();
    let config = ReplayConfig { slo, ..fleet(1) };
    let found = find(
        &config,
        &[policy::KV.into()],
        &traffic,
        Target::Workers,
        0.9,
        1,
        &|_, _, _| (),
    );
    let workers = found.unwrap().results[0].workers.unwrap();
    assert!(workers > 1);
    let fraction_within_slo = |workers: u32| {
        let config = ReplayConfig {
            policy: Some(policy::KV.into()),
            ..config.with_workers(workers)
        };
        outcome(&config, traffic[0].workload()).goodput.fraction
    };
    assert!(
        fraction_within_slo(workers) >= 0.9 && fraction_within_slo(workers - 1) < 0.9,
        "{workers}"
    );
    let mut config = config;
    config.changes = vec!["0:speed=0.5".parse().unwrap()];
    let error = find(
        &config,
        &[policy::KV.into()],
        &traffic,
        Target::Workers,
        0.9,
        1,
        &|_, _, _| (),
    );
    assert_eq!(error, Err(CapacityError::Changes));
}
