//! `foresee replay`: its reports, and its errors for invalid flags.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};

/// Runs a subcommand of `replay`.
fn replay(subcommand: &str, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    command
        .args(["replay", subcommand])
        .args(flags)
        .output()
        .unwrap()
}

/// Returns the report of a subcommand that succeeds.
fn report(subcommand: &str, flags: &[&str]) -> String {
    let output = replay(subcommand, flags);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{flags:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the error of a subcommand that fails.
fn refused(subcommand: &str, flags: &[&str]) -> String {
    let output = replay(subcommand, flags);
    assert!(!output.status.success(), "{flags:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A workload without an arrival rate.
const CLOSED_LOOP: &str = "n-samples";

/// Flags of a short replay.
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
fn a_run_combines_all_conditions_and_repeats_exactly() {
    let conditions = [
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
        "--event-loss-fraction",
        "0.1",
        "--fleet-change",
        "0:speed=0.5",
        "--fleet-change",
        "1:join@500ms",
        "--engine-block-size",
        "64",
    ];
    let table = report("run", &[&SMALL[..], &conditions].concat());
    for part in [
        "TTFT p95, s",
        "within SLO, %",
        "Means over 3 seeds",
        "SLO ttft=1s;",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let again = report("run", &[&SMALL[..], &conditions].concat());
    // The line that begins with SLO contains the real time of the run.
    let is_repeatable = |line: &str| !line.starts_with("SLO");
    assert!(table.lines().filter(|line| is_repeatable(line)).count() > 20);
    for (first, second) in table.lines().zip(again.lines()) {
        assert!(
            first == second || !is_repeatable(first),
            "{first}\n{second}"
        );
    }
}

#[test]
fn capacity_is_found_for_each_policy() {
    let flags = ["--workload", "rag", "--slo-fraction", "0.8"];
    let found = report("capacity", &[&SMALL[..], &flags].concat());
    assert!(found.contains("highest rate, times") && found.contains("for 80 % of requests"));
    let flags = ["--workload", "rag", "--isl", "600", "--find", "workers"];
    let found = report("capacity", &[&SMALL[..], &flags].concat());
    assert!(found.contains("fewest workers"), "{found}");
}

#[test]
fn errors_for_invalid_flags_name_the_remedy() {
    for (flags, remedy) in [
        (&["--workload", CLOSED_LOOP, "--rate", "2"][..], "--rps"),
        (&["--trace", "x.jsonl", "--rps", "2"], "scale its rate"),
        (&["--duration", "0s"], "longer than 0s"),
        (&["--duration", "10", "--trace", "x"], "no unit"),
        (&["--gap", "500"], "write 500ms"),
        (&["--workload", "n-sample"], "'n-samples'"),
        (&["--rps", "0"], "positive"),
        (&["--arrivals", "weibull"], "gamma:CV"),
        (&["--slo", "tpot=1s"], "itl=60ms"),
        (&["--fleet-change", "9:speed=2"], "there are 8"),
        (&["--fleet-change", "0:speed=fast"], "WORKER:speed=FACTOR"),
        (&["--fault", "9:hang@1s"], "there are 8"),
        (&["--fault", "0:explode@1s"], "fail-fast, fail-half"),
        (
            &["--fault", "0:hang@1s", "--policy", "dynamo"],
            "change --policy",
        ),
        (&["--engine-block-size", "24"], "--block-size"),
        (&["--event-loss-fraction", "2"], "between 0 and 1"),
        (&["--trace", "/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
    ] {
        let error = refused("run", flags);
        assert!(error.contains(remedy), "{flags:?}: {error}");
    }
    for (subcommand, flags, remedy) in [
        ("capacity", &["--workload", CLOSED_LOOP][..], "--rps"),
        (
            "sweep",
            &["--workload", CLOSED_LOOP, "--rates", "1,2"],
            "--rps",
        ),
        ("suite", &["--trace", "x.jsonl"], "unexpected argument"),
        ("suite", &["--only", "n-sample"], "'n-samples'"),
        ("run", &["--conversation", "x.jsonl"], "unexpected argument"),
    ] {
        let error = refused(subcommand, flags);
        assert!(error.contains(remedy), "{subcommand} {flags:?}: {error}");
    }
}

#[test]
fn a_suite_prints_a_row_for_each_scenario_and_lists_scenarios_left_out() {
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
        "--only",
        "conversation-50,no-events,azure",
        "--conversation",
        trace.to_str().unwrap(),
        "--policy",
        "kv,marginal-delay,marginal-delay:no-prefill-stall-caused",
        "--seeds",
        "2",
        "--json",
        json.to_str().unwrap(),
        "--html",
        html.to_str().unwrap(),
    ];
    let table = report("suite", &flags);
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
    assert_eq!(grid["reference"], "marginal-delay");
    assert_eq!(grid["rows"][1]["name"], "no-events");
    let outcomes = grid["rows"][1]["report"]["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 6);
    assert!(outcomes.iter().all(|outcome| outcome["finished"] == 40));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_run_writes_a_page_and_a_sweep_prints_a_row_for_each_rate() {
    let page = std::env::temp_dir().join(format!("foresee-replay-{}.html", std::process::id()));
    let flags = ["--workload", "rag", "--html", page.to_str().unwrap()];
    report("run", &[&SMALL[..], &flags].concat());
    assert!(
        std::fs::read_to_string(&page)
            .unwrap()
            .contains("Active blocks under kv")
    );
    std::fs::remove_file(&page).unwrap();
    let flags = ["--workload", "rag", "--rates", "0.5,1"];
    let table = report("sweep", &[&SMALL[..], &flags].concat());
    assert!(
        table.contains("\nrate 0.5 ") && table.contains("\nrate 1 "),
        "{table}"
    );
}
