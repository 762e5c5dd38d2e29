//! Worker faults: a worker that fails or hangs costs few requests, attracts none, and gets its share
//! back when it recovers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::time::Duration;

use crate::BLOCK;
use foresee_core::router::RouterConfig;
use foresee_sim::engine::EngineConfig;
use foresee_sim::faults::{FaultKind, WorkerFault};
use foresee_sim::outcome::Outcome;
use foresee_sim::replay::{ReplayConfig, ReplayError, run};
use foresee_sim::step_time::L40S_8B;
use foresee_sim::workload::{Chat, Gaps, Shape, Workload};

/// Requests a second, at which four workers are about half busy.
const RATE: f64 = 8.0;

fn fleet(workers: u32, faults: &[&str]) -> ReplayConfig {
    let engine = EngineConfig::from_preset(&L40S_8B, BLOCK);
    let config = ReplayConfig::uniform(RouterConfig::default(), &engine, workers);
    ReplayConfig {
        faults: faults.iter().map(|text| text.parse().unwrap()).collect(),
        ..config
    }
}

/// Returns the gaps of a Poisson process.
fn gaps(rate: f64) -> Gaps {
    Gaps {
        mean: Duration::from_secs_f64(1.0 / rate),
        cv: 1.0,
    }
}

fn requests(seconds: f64) -> Workload {
    let shape = Shape {
        isl: 700,
        isl_spread: 0.5,
        osl: 60,
        osl_spread: 0.5,
        ..Shape::default()
    };
    Workload::open_loop(&shape, (seconds * RATE) as u32, &gaps(RATE), 1)
}

fn outcome(config: &ReplayConfig, workload: &Workload) -> Outcome {
    let outcome = run(config, workload, &mut |_| ()).expect("a valid configuration");
    assert_eq!((outcome.unfinished, outcome.leaked_blocks), (0, 0));
    let ended = outcome.finished + outcome.faults.lost;
    assert_eq!(ended, workload.requests.len());
    outcome
}

#[test]
fn a_failing_worker_costs_few_requests_and_recovers() {
    let workload = requests(240.0);
    let smaller = outcome(&fleet(3, &[]), &workload);
    for (kind, name) in FaultKind::ALL {
        let fault = format!("1:{name}@20s-100s");
        let result = outcome(&fleet(4, &[&fault]), &workload);
        let faults = result.faults;
        assert_eq!(faults.lost_late, 0, "{kind:?}: {faults:?}");
        assert!(faults.lost <= 5, "{kind:?}: {faults:?}");
        let ratio = result.goodput.fraction / smaller.goodput.fraction;
        assert!(ratio >= 0.95, "{kind:?}: {ratio}");
        assert!(
            faults.recovered_share.unwrap() >= 0.7,
            "{kind:?}: {faults:?}"
        );
        assert_eq!(faults.ejected_at_end, 0, "{kind:?}");
    }
}

/// Ten minutes of conversations on eight workers, about fifteen requests a second.
#[test]
#[ignore = "takes minutes; the figures are in docs/benchmarks.md"]
fn eight_workers_over_ten_minutes() {
    let chat = Chat {
        conversations: 2_040,
        starts: gaps(3.4),
        ..Chat::default()
    };
    let workload = Workload::chat(&chat, 1);
    let count = workload.requests.len();
    let show = |name: &str, result: &Outcome| {
        let Outcome {
            goodput, faults, ..
        } = result;
        eprintln!(
            "{name}: {count} requests, lost {}, lost late {}, sent {}, within SLO {:.4}, share {:?}, \
             ejected {}, TTFT p99 {:.2} s",
            faults.lost,
            faults.lost_late,
            faults.sent_to_workers,
            goodput.fraction,
            faults.recovered_share,
            faults.ejected_at_end,
            result.time_to_first_token.p99,
        );
    };
    let smaller = outcome(&fleet(7, &[]), &workload);
    show("seven workers", &smaller);
    show("eight workers", &outcome(&fleet(8, &[]), &workload));
    for (_, name) in FaultKind::ALL {
        for until in ["", "-300s"] {
            let fault = format!("3:{name}@60s{until}");
            let result = outcome(&fleet(8, &[&fault]), &workload);
            show(&fault, &result);
            assert!(result.faults.lost_late * 100 <= count, "{fault}");
            assert!(
                result.goodput.fraction >= 0.95 * smaller.goodput.fraction,
                "{fault}"
            );
            let share = result.faults.recovered_share;
            assert!(share.is_none_or(|share| share >= 0.7), "{fault}: {share:?}");
        }
    }
    let all = (0..8).map(|worker| format!("{worker}:fail-half@60s-540s"));
    let all: Vec<String> = all.collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let result = outcome(&fleet(8, &all), &workload);
    show("all fail-half@60s-540s", &result);
    assert_eq!(result.faults.ejected_at_end, 0);
    let limit = 1.2 * count as f64 + 3.0 * result.makespan;
    assert!(result.faults.sent_to_workers as f64 <= limit);
}

#[test]
fn a_fleet_that_fails_as_a_whole_is_not_ejected_and_not_flooded() {
    // A first ejection, of 30 s, may begin just before the faults end.
    let workload = requests(150.0);
    let faults = ["0:fail-half@0s-100s", "1:fail-half@0s-100s"];
    let more = ["2:fail-half@0s-100s", "3:fail-half@0s-100s"];
    let result = outcome(&fleet(4, &[faults, more].concat()), &workload);
    let faults = result.faults;
    assert_eq!(faults.ejected_at_end, 0, "{faults:?}");
    let clients = workload.requests.len() as f64;
    let limit = 1.2 * clients + 3.0 * 150.0;
    assert!((faults.sent_to_workers as f64) < limit, "{faults:?}");
    assert!(
        faults.lost > 0,
        "the budget does not suffice for all: {faults:?}"
    );
}

#[test]
fn without_faults_each_request_is_sent_once() {
    let workload = requests(20.0);
    let result = outcome(&fleet(4, &[]), &workload);
    let sent = result.faults.sent_to_workers;
    assert_eq!(sent, workload.requests.len() as u64);
    assert_eq!(result.faults.recovered_share, None);
}

#[test]
fn faults_of_unknown_workers_and_under_other_policies_are_rejected() {
    let workload = requests(1.0);
    let mut config = fleet(2, &["2:hang@1s"]);
    let error = run(&config, &workload, &mut |_| ()).err();
    let (worker, workers) = (2, 2);
    assert_eq!(error, Some(ReplayError::NoSuchWorker { worker, workers }));
    config.faults = vec![WorkerFault {
        worker: 0,
        kind: FaultKind::Hang,
        from: Duration::ZERO,
        until: None,
    }];
    config.policy = Some("dynamo".parse().unwrap());
    let error = run(&config, &workload, &mut |_| ()).err();
    assert_eq!(error, Some(ReplayError::FaultsUnderBaseline));
}
