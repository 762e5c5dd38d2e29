//! The command line: help, exit codes, logs, completions and manual pages.

#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output, Stdio};

use foresee_core::policy::{self, NamedPolicy};
use foresee_core::queue::QueueOrder;
use foresee_sim::workload::NAMED;

/// Runs the program with these variables only: variables of the test's own environment are removed.
fn run(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FORESEE_") {
            command.env_remove(name);
        }
    }
    let command = command.args(arguments).envs(variables.iter().copied());
    command.stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Returns the error of arguments that are refused as wrong usage.
fn refused(variables: &[(&str, &str)], arguments: &[&str]) -> String {
    let output = run(variables, arguments);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    error
}

/// Subcommands with flags.
const SUBCOMMANDS: [&[&str]; 12] = [
    &["serve"],
    &["demo"],
    &["load"],
    &["verify"],
    &["mock-engine"],
    &["replay", "run"],
    &["replay", "sweep"],
    &["replay", "suite"],
    &["replay", "capacity"],
    &["check-config"],
    &["completions"],
    &["man"],
];

#[test]
fn help_lists_all_policies_queue_orders_and_workloads() {
    let help = stdout(&run(&[], &["serve", "--help"]));
    let policies = policy::ALL.map(|policy| policy.name);
    let orders = QueueOrder::ALL.map(|(_, name)| name);
    for part in policies.iter().chain(&orders).chain(&["off"]) {
        assert!(help.contains(&format!("- {part}:")), "{part}: {help}");
    }
    for heading in [
        "Listen",
        "Workers",
        "Routing",
        "Queue",
        "Limits and timeouts",
    ] {
        assert!(
            help.contains(&format!("\n{heading}:\n")),
            "{heading}: {help}"
        );
    }
    let default = NamedPolicy::default();
    assert!(help.contains(&format!("[default: {default}]")), "{help}");
    let help = stdout(&run(&[], &["replay", "run", "--help"]));
    for part in NAMED.iter().map(|(name, _)| name).chain(&policies) {
        assert!(help.contains(part), "{part}: {help}");
    }
    for subcommand in SUBCOMMANDS {
        for flag in ["-h", "--help"] {
            let output = run(&[], &[subcommand, &[flag]].concat());
            assert!(
                output.status.success() && !output.stdout.is_empty(),
                "{subcommand:?}"
            );
        }
    }
}

#[test]
fn only_serve_verify_and_check_config_read_the_variables_of_serve() {
    for subcommand in SUBCOMMANDS {
        let help = stdout(&run(&[], &[subcommand, &["--help"]].concat()));
        let has_variable = help.contains("FORESEE_OVERLAP_WEIGHT");
        let expected = ["serve", "verify", "check-config"].contains(&subcommand[0]);
        assert_eq!(has_variable, expected, "{subcommand:?}");
    }
    let variables = [("FORESEE_OVERLAP_WEIGHT", "heavy"), ("FORESEE_SEED", "x")];
    let small = ["--requests", "2", "--workers", "1", "--policy", "random"];
    let output = run(&variables, &[&["replay", "run"][..], &small].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    refused(&variables, &["check-config"]);
}

#[test]
fn only_serve_and_check_config_read_the_configuration_file() {
    let variable = [("FORESEE_CONFIG", "/nonexistent/foresee.toml")];
    for arguments in [
        &["--version"][..],
        &["--help"],
        &["serve", "--help"],
        &["demo", "--help"],
        &["mock-engine", "--help"],
        &["completions", "bash"],
        &["replay", "run", "--requests", "2", "--policy", "random"],
    ] {
        let output = run(&variable, arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
    }
    // These subcommands do not read the file; the errors are about their own flags.
    let error = refused(&variable, &["mock-engine", "--listen", "nonsense"]);
    assert!(error.contains("--listen"), "{error}");
    let error = refused(&variable, &["demo", "--workload", "nonsense"]);
    assert!(error.contains("--workload"), "{error}");
    for subcommand in ["serve", "check-config"] {
        let error = refused(&variable, &[subcommand]);
        assert!(error.contains("/nonexistent/foresee.toml"), "{error}");
    }
}

#[test]
fn an_unknown_policy_leads_to_a_suggestion() {
    for (given, suggested) in [
        ("cache_aware", "marginal-delay"),
        ("marginal-dely", "marginal-delay"),
        ("roundrobin", "round-robin"),
    ] {
        let error = refused(&[], &["check-config", "--policy", given]);
        assert!(error.contains(&format!("'{suggested}'")), "{error}");
        assert!(error.contains("consistent-hash"), "{error}");
    }
    let output = run(&[], &["check-config", "--policy", "round_robin"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_number_without_a_unit_is_refused_with_the_unit_to_add() {
    for (arguments, remedy) in [
        (&["check-config", "--probe-interval", "1"][..], "1s"),
        (&["check-config", "--shutdown-timeout", "0.5"], "0.5s"),
        (&["check-config", "--max-body-size", "1000"], "1000KiB"),
        (&["mock-engine", "--kv-lag", "200"], "200ms"),
        (&["verify", "--sample-interval", "0.25"], "0.25s"),
        (&["replay", "suite", "--event-lag", "200"], "200ms"),
        (
            &["check-config", "--probe-interval", "0s"],
            "longer than 0s",
        ),
        (&["demo", "--abort-fraction", "2"], "between 0 and 1"),
    ] {
        let error = refused(&[], arguments);
        assert!(error.contains(remedy), "{arguments:?}: {error}");
    }
}

#[test]
fn exit_codes_distinguish_wrong_usage_from_failure() {
    refused(&[], &["serve", "--no-such-flag"]);
    refused(&[], &["check-config", "--ttft-weight", "-1"]);
    refused(
        &[],
        &[
            "check-config",
            "--worker",
            "a:1,name=x",
            "--worker",
            "b:1,name=x",
        ],
    );
    refused(
        &[],
        &[
            "serve",
            "--tokenizer",
            "/nonexistent",
            "--listen",
            "127.0.0.1:0",
        ],
    );
    let report = ["replay", "run", "--requests", "2", "--policy", "random"];
    let failed = run(
        &[],
        &[&report[..], &["--json", "/nonexistent/x.json"]].concat(),
    );
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    let help = stdout(&run(&[], &["--help"]));
    assert!(help.contains("Exit codes:"), "{help}");
}

#[test]
fn the_error_for_an_invalid_log_filter_quotes_it() {
    let error = refused(&[("FORESEE_LOG", "inof")], &["serve"]);
    assert!(error.contains("inof"), "{error}");
    let error = refused(&[], &["serve", "--log-level", "foresee=loud"]);
    assert!(error.contains("foresee=loud"), "{error}");
}

/// Returns the first line that the program logs. The program ends at once because it cannot listen
/// on an address of another machine.
fn logged(variables: &[(&str, &str)], flags: &[&str]) -> String {
    let arguments = ["serve", "--listen", "192.0.2.1:1"];
    let output = run(variables, &[&arguments[..], flags].concat());
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    text.lines().next().unwrap().to_owned()
}

#[test]
fn logs_are_text_or_json_and_have_no_colour_without_a_terminal() {
    let text = logged(&[], &[]);
    assert!(text.contains("WARN") && !text.contains('\u{1b}'), "{text}");
    let json = logged(&[], &["--log-format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["level"], "WARN");
    let json = logged(&[("FORESEE_LOG_FORMAT", "json")], &[]);
    assert!(json.starts_with('{'), "{json}");
    // Without the warning, the first line is the error.
    let error = logged(&[("FORESEE_LOG", "warn")], &["--log-level", "error"]);
    assert!(error.starts_with("foresee: cannot listen"), "{error}");
}

#[test]
fn the_version_names_the_package() {
    let version = stdout(&run(&[], &["--version"]));
    let expected = concat!("foresee ", env!("CARGO_PKG_VERSION"));
    assert!(version.starts_with(expected), "{version}");
    let rest = version.trim_end().trim_start_matches(expected);
    assert!(
        rest.is_empty() || (rest.starts_with(" (") && rest.ends_with(')')),
        "{version}"
    );
}

#[test]
fn completions_and_manual_pages_are_printed() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&run(&[], &["completions", shell]));
        assert!(script.contains("worker-urls"), "{shell}");
        let lists_values = ["bash", "zsh", "fish"].contains(&shell);
        assert!(
            script.contains("marginal-delay") || !lists_values,
            "{shell}"
        );
    }
    for (arguments, part) in [
        (&["man"][..], ".TH foresee 1"),
        (&["man", "serve"], ".TH foresee-serve 1"),
        (&["man", "replay", "run"], ".TH foresee-replay-run 1"),
    ] {
        let page = stdout(&run(&[], arguments));
        assert!(page.contains(part), "{arguments:?}: {page}");
    }
    refused(&[], &["man", "nothing"]);
    refused(&[], &["man", "--all", "/nonexistent", "serve"]);
}

#[test]
fn all_manual_pages_are_written_to_a_folder() {
    let folder = format!("foresee-man-{}", std::process::id());
    let folder = std::env::temp_dir().join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    let output = run(&[], &["man", "--all", folder.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    assert!(read("foresee.1").contains(".TH foresee 1"));
    for subcommand in SUBCOMMANDS {
        let name = format!("foresee-{}", subcommand.join("-"));
        let page = read(&format!("{name}.1"));
        assert_eq!(page, stdout(&run(&[], &[&["man"], subcommand].concat())));
        assert!(page.contains(&format!(".TH {name} 1")), "{name}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let output = run(&[], &["man", "--all", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
}
