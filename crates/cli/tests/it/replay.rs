//! `foresee replay` by its flags: what it prints, and what it says of flags that make no sense.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};

fn replay(flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    command.arg("replay").args(flags).output().unwrap()
}

fn told(flags: &[&str]) -> String {
    let output = replay(flags);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{flags:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(flags: &[&str]) -> String {
    let output = replay(flags);
    assert!(!output.status.success(), "{flags:?}");
    String::from_utf8(output.stderr).unwrap()
}

const SMALL: [&str; 8] = [
    "--requests",
    "40",
    "--workers",
    "2",
    "--policy",
    "kv,random",
    "--seed",
    "3",
];

#[test]
fn every_condition_can_be_asked_for() {
    let conditions = [
        "--workload",
        "seed",
        "--isl",
        "600",
        "--rps",
        "20",
        "--arrivals",
        "gamma:2",
        "--seeds",
        "3",
        "--slo",
        "ttft=1s",
        "--event-lag",
        "50ms",
        "--event-loss",
        "0.1",
        "--fleet-change",
        "0:speed=0.5",
        "--fleet-change",
        "1:join@500ms",
        "--engine-block-size",
        "64",
    ];
    let table = told(&[&SMALL[..], &conditions].concat());
    for part in [
        "TTFT p95, s",
        "within SLO, %",
        "Means over 3 seeds",
        "SLO ttft=1000ms;",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let again = told(&[&SMALL[..], &conditions].concat());
    // All but how long it took.
    let numbers = |table: &str| table.lines().filter(|it| !it.starts_with("SLO")).count();
    assert!(numbers(&table) > 20);
    for (one, other) in table.lines().zip(again.lines()) {
        assert!(one == other || one.starts_with("SLO"), "{one}\n{other}");
    }
}

#[test]
fn capacity_is_found_for_each_policy() {
    let flags = ["--workload", "rag", "--find-capacity", "--slo-share", "0.8"];
    let found = told(&[&SMALL[..], &flags].concat());
    assert!(found.contains("highest rate, times") && found.contains("for 80 % of requests"));
    let flags = [
        "--workload",
        "rag",
        "--isl",
        "600",
        "--find-capacity=workers",
    ];
    let found = told(&[&SMALL[..], &flags].concat());
    assert!(found.contains("fewest workers"), "{found}");
}

#[test]
fn what_makes_no_sense_is_refused_with_its_remedy() {
    for (flags, remedy) in [
        (&["--workload", "seed", "--rate", "2"][..], "--rps"),
        (&["--workload", "seed", "--find-capacity"], "--rps"),
        (&["--trace", "x.jsonl", "--rps", "2"], "--rate"),
        (&["--duration", "10m"], "--trace"),
        (&["--workload", "seed", "--rates", "1,2"], "--rps"),
        (&["--suite", "--trace", "x.jsonl"], "cannot be used with"),
        (&["--suite", "--only", "sead"], "seed-isl"),
        (&["--conversation", "x.jsonl"], "--suite"),
        (&["--rps", "0"], "positive"),
        (&["--arrivals", "weibull"], "gamma:CV"),
        (&["--slo", "tpot=1s"], "itl=60ms"),
        (&["--fleet-change", "9:speed=2"], "there are 8"),
        (&["--fleet-change", "0:speed=fast"], "WORKER:speed=FACTOR"),
        (&["--engine-block-size", "24"], "--block-size"),
        (&["--event-loss", "2"], "event-loss"),
        (&["--trace", "/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
    ] {
        let error = refused(flags);
        assert!(error.contains(remedy), "{flags:?}: {error}");
    }
}

#[test]
fn a_suite_is_a_table_of_its_scenarios_and_says_what_it_left_out() {
    let folder = std::env::temp_dir().join(format!("foresee-suite-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (trace, json) = (folder.join("trace.jsonl"), folder.join("suite.json"));
    let html = folder.join("suite.html");
    let line = |n: u32| {
        format!(
            r#"{{"timestamp": {}, "input_length": 900, "output_length": 20, "hash_ids": [1, {n}]}}"#,
            n * 100
        )
    };
    std::fs::write(&trace, (0..40).map(|n| line(n) + "\n").collect::<String>()).unwrap();
    let flags = [
        "--suite",
        "--only",
        "conversation-50,no-events,azure",
        "--conversation",
        trace.to_str().unwrap(),
        "--policy",
        "kv,delay,delay:no-stalls",
        "--seeds",
        "2",
        "--json",
        json.to_str().unwrap(),
        "--html",
        html.to_str().unwrap(),
    ];
    let table = told(&flags);
    assert!(std::fs::read_to_string(&html).unwrap().contains("<svg"));
    for part in [
        "conversation-50",
        "no-events",
        "geometric mean",
        "Left out: azure",
        "real time",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let grid: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(grid["reference"], "delay");
    assert_eq!(grid["rows"][1]["name"], "no-events");
    let outcomes = grid["rows"][1]["report"]["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 6);
    assert!(outcomes.iter().all(|it| it["finished"] == 40));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_page_is_drawn_and_rates_are_rows() {
    let page = std::env::temp_dir().join(format!("foresee-replay-{}.html", std::process::id()));
    let flags = ["--workload", "rag", "--html", page.to_str().unwrap()];
    told(&[&SMALL[..], &flags].concat());
    assert!(
        std::fs::read_to_string(&page)
            .unwrap()
            .contains("Active blocks under kv")
    );
    std::fs::remove_file(&page).unwrap();
    let flags = ["--workload", "rag", "--rates", "0.5,1"];
    let table = told(&[&SMALL[..], &flags].concat());
    assert!(
        table.contains("\nrate 0.5 ") && table.contains("\nrate 1 "),
        "{table}"
    );
}
