//! `foresee load` against a mock engine and a scripted server, over real sockets.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::ports::ANY_PORT;
use foresee_mock::{MockEngineConfig, bind, serve};
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::L40S_8B;
use serde_json::Value;

/// Flags of a short load.
const SMALL: [&str; 8] = [
    "--workload",
    "rag",
    "--requests",
    "12",
    "--isl",
    "200",
    "--osl",
    "5",
];

/// Exit code and output of `foresee load`.
struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Outcome {
    /// Returns the report of `--json -`.
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|_| panic!("{}", self.stderr))
    }
}

/// Runs `foresee load`.
fn load(address: &str, flags: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    command.env("FORESEE_TEST_KEY", "secret");
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .args(["load", address])
        .args(flags)
        .output()
        .unwrap();
    let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    Outcome {
        code: status.code().unwrap(),
        stdout,
        stderr,
    }
}

/// Runs `foresee load` while the test's async tasks continue.
async fn load_blocking(address: &str, flags: &[&str]) -> Outcome {
    let address = address.to_owned();
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    let run = move || {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        load(&address, &flags)
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// Starts a mock engine that serves `model` at 50 times real speed.
fn mock_engine() -> String {
    let engine = EngineConfig::from_preset(&L40S_8B, NonZeroU32::new(16).unwrap());
    let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let config = MockEngineConfig {
        speedup: 50.0,
        ..MockEngineConfig::new("model", engine)
    };
    tokio::spawn(serve(config, listener, std::future::pending()));
    address
}

/// A request that the scripted server received.
#[derive(Clone, Debug)]
struct Received {
    authorization: Option<String>,
    /// Header `x-foresee-deadline-ms`.
    deadline: Option<String>,
    body: String,
}

/// A server that responds with 503 to every third completion.
struct Scripted {
    /// Base URL, with `/v1`.
    address: String,
    /// Completions in order of their arrival.
    received: Receiver<Received>,
}

impl Scripted {
    /// Starts a server that lists these models.
    fn start(models: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind(ANY_PORT).unwrap();
        let address = format!("http://{}/v1", listener.local_addr().unwrap());
        let (sender, received) = channel();
        let count = Arc::new(AtomicUsize::new(0));
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let (sender, count) = (sender.clone(), count.clone());
                std::thread::spawn(move || respond(socket.unwrap(), models, &sender, &count));
            }
        });
        Self { address, received }
    }

    /// Returns the bodies received since the last call, sorted.
    fn take_bodies(&self) -> Vec<String> {
        let received = self.received.try_iter();
        let mut bodies: Vec<String> = received.map(|request| request.body).collect();
        bodies.sort();
        bodies
    }
}

/// Reads one request and sends the response. Each connection carries one request.
fn respond(
    mut socket: TcpStream,
    models: &[&str],
    received: &Sender<Received>,
    count: &AtomicUsize,
) {
    let mut reader = BufReader::new(socket.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        let values = lines.iter().filter_map(|line| line.split_once(": "));
        let mut values = values.filter(|(field, _)| field.eq_ignore_ascii_case(name));
        values.next().map(|(_, value)| value.to_owned())
    };
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let (status, payload) = if lines[0].contains("/v1/models") {
        let models = models.iter().map(|id| serde_json::json!({"id": id}));
        let list = serde_json::json!({"data": models.collect::<Vec<_>>()});
        ("200 OK", list.to_string())
    } else {
        let request = Received {
            authorization: header("authorization"),
            deadline: header("x-foresee-deadline-ms"),
            body: String::from_utf8(body).unwrap(),
        };
        received.send(request).unwrap();
        if count.fetch_add(1, Ordering::SeqCst) % 3 == 2 {
            ("503 Service Unavailable", "busy".to_owned())
        } else {
            let token = "data: {\"choices\":[{\"index\":0,\"text\":\" a\"}]}\n\n";
            ("200 OK", format!("{token}{token}data: [DONE]\n\n"))
        }
    };
    let response = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\
         x-foresee-worker: gpu1\r\n\r\n{payload}",
        payload.len()
    );
    // The client may have closed the connection.
    let _ = socket.write_all(response.as_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_on_a_mock_engine_is_measured() {
    let address = mock_engine();
    let flags = [&SMALL[..], &["--speedup", "50", "--json", "-"]].concat();
    let outcome = load_blocking(&address, &flags).await;
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let report = outcome.json();
    assert_eq!(report["model"], "model", "discovered");
    assert_eq!(report["api"], "completions");
    assert_eq!(report["workload"], "rag");
    assert_eq!(report["seed"], 0);
    assert_eq!(report["speedup"], 50.0);
    let results = &report["outcome"];
    assert_eq!(
        (&results["sent"], &results["finished"]),
        (&12.into(), &12.into())
    );
    assert_eq!(results["cached_tokens_reports"], 12);
    assert!(results["requests_per_second"].as_f64().unwrap() > 0.0);
    assert!(results["output_tokens_per_second"].as_f64().unwrap() > 0.0);
    for measure in ["time_to_first_token", "inter_token_latency", "end_to_end"] {
        for statistic in ["mean", "p50", "p90", "p99"] {
            let value = &results[measure][statistic];
            assert!(value.as_f64().is_some(), "{measure} {statistic}");
        }
    }

    let chat = [&SMALL[..], &["--speedup", "50", "--api", "chat"]].concat();
    let outcome = load_blocking(&address, &chat).await;
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    for part in ["time to first token", "p90", "requests/s", "prefix cache:"] {
        assert!(outcome.stdout.contains(part), "{part}: {}", outcome.stdout);
    }
}

#[test]
fn failures_are_reported_by_status_and_end_in_exit_code_1() {
    let server = Scripted::start(&["m"]);
    let file = std::env::temp_dir().join(format!("foresee-load-{}.json", std::process::id()));
    let json = file.to_str().unwrap();
    let key = ["--rate", "50", "--api-key-env", "FORESEE_TEST_KEY"];
    let header = ["--header", "x-foresee-deadline-ms: 60000"];
    let outcome = load(
        &server.address,
        &[&SMALL[..], &key, &header, &["--json", json]].concat(),
    );
    assert_eq!(outcome.code, 1, "{}", outcome.stderr);
    assert!(
        outcome.stdout.contains("failed, status 503: 4: busy"),
        "{}",
        outcome.stdout
    );
    assert!(!outcome.stderr.contains("secret"));
    let report = std::fs::read(&file).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    std::fs::remove_file(&file).unwrap();
    let results = &report["outcome"];
    assert_eq!(results["finished"], 8);
    assert_eq!(results["failed"]["status 503"]["count"], 4);
    assert_eq!(results["workers"]["gpu1"]["requests"], 12);
    let mut received = server.received.try_iter();
    assert!(received.all(|request| {
        request.authorization.as_deref() == Some("Bearer secret")
            && request.deadline.as_deref() == Some("60000")
    }));
}

#[test]
fn the_same_seed_sends_the_same_bodies() {
    let server = Scripted::start(&["m"]);
    let sent = |seed: &str, more: &[&str]| {
        let flags = [&SMALL[..], &["--rate", "50", "--seed", seed], more].concat();
        load(&server.address, &flags);
        server.take_bodies()
    };
    let first = sent("7", &[]);
    assert_eq!(first.len(), 12);
    assert_eq!(first, sent("7", &[]));
    assert_ne!(first, sent("8", &[]));
    let counts = |bodies: &[String]| {
        let mut counts = BTreeMap::new();
        for body in bodies {
            let body: Value = serde_json::from_str(body).unwrap();
            *counts.entry(body["ignore_eos"].as_bool()).or_insert(0) += 1;
        }
        counts
    };
    assert_eq!(counts(&first), BTreeMap::from([(Some(true), 12)]));
    let plain = sent("7", &["--no-ignore-eos"]);
    assert_eq!(counts(&plain), BTreeMap::from([(None, 12)]));
}

/// Writes a trace of ten requests over nine seconds.
fn trace(name: &str) -> PathBuf {
    let name = format!("foresee-load-{name}-{}.jsonl", std::process::id());
    let path = std::env::temp_dir().join(name);
    let line = |n: u32| {
        format!(
            r#"{{"timestamp": {}, "input_length": 40, "output_length": 2, "hash_ids": [{n}]}}"#,
            n * 1000
        )
    };
    let lines: Vec<String> = (0..10).map(line).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn a_trace_is_sent_at_its_rate_or_in_a_closed_loop() {
    let server = Scripted::start(&["m"]);
    let path = trace("rate");
    let file = path.to_str().unwrap();
    let sent = |flags: &[&str]| {
        let trace = ["--trace", file, "--json", "-"];
        let outcome = load(&server.address, &[&trace[..], flags].concat());
        let report = outcome.json();
        assert_eq!(report["workload"], file);
        report["outcome"]["sent"].as_u64().unwrap()
    };
    assert_eq!(sent(&["--rate", "100"]), 10);
    assert_eq!(sent(&["--rate", "100", "--requests", "4"]), 4);
    assert_eq!(sent(&["--rate", "100", "--duration", "45ms"]), 5);
    assert_eq!(sent(&["--concurrency", "3"]), 10);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn replay_sends_the_requests_of_a_load_with_the_same_flags() {
    let server = Scripted::start(&["m"]);
    let json = std::env::temp_dir().join(format!("foresee-replay-{}.json", std::process::id()));
    let sent = |flags: &[&str]| {
        let traffic = [
            "--workload",
            "rag",
            "--isl",
            "200",
            "--osl",
            "5",
            "--seed",
            "7",
        ];
        let flags = [&traffic[..], flags].concat();
        let speed = ["--speedup", "20", "--json", "-"];
        let report = load(&server.address, &[&flags[..], &speed].concat()).json();
        let replayed = Command::new(env!("CARGO_BIN_EXE_foresee"))
            .args(["replay", "run", "--workers", "1", "--policy", "kv"])
            .args(["--json", json.to_str().unwrap()])
            .args(&flags)
            .output();
        assert!(replayed.unwrap().status.success());
        let replay: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        let replayed = &replay["outcomes"][0];
        let (requests, tokens) = (&replayed["requests"], &replayed["prompt_tokens"]);
        assert_eq!(replayed["finished"], *requests);
        assert_eq!(replayed["unfinished"], 0);
        assert_eq!(*requests, report["outcome"]["sent"]);
        (requests.as_u64().unwrap(), tokens.as_u64().unwrap())
    };
    let minute = sent(&["--rps", "2", "--duration", "60s"]);
    assert!((80..160).contains(&minute.0), "{minute:?}");
    let faster = sent(&["--rps", "2", "--rate", "2", "--duration", "30s"]);
    assert_eq!(
        faster, minute,
        "the limit counts at the rate at which requests are sent"
    );
    std::fs::remove_file(&json).unwrap();
}

#[test]
fn a_load_that_cannot_be_sent_ends_in_exit_code_3() {
    let listener = TcpListener::bind(ANY_PORT).unwrap();
    let closed = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    for flags in [&[][..], &["--model", "m"]] {
        let outcome = load(&closed, flags);
        assert_eq!(outcome.code, 3, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("refused"), "{}", outcome.stderr);
    }
    let several = Scripted::start(&["a", "b"]);
    for (address, flags, reason) in [
        (several.address.as_str(), &[][..], "several: a, b"),
        ("https://example.com", &[], "only http://"),
        (
            &several.address,
            &["--trace", "/nowhere/x.jsonl"],
            "/nowhere/x.jsonl",
        ),
        (
            &several.address,
            &["--api-key-env", "FORESEE_UNSET"],
            "FORESEE_UNSET",
        ),
        (
            &several.address,
            &["--workload", "chat", "--concurrency", "2"],
            "--rps",
        ),
    ] {
        let outcome = load(address, flags);
        assert_eq!(outcome.code, 3, "{flags:?}: {}", outcome.stderr);
        assert!(
            outcome.stderr.contains(reason),
            "{reason}: {}",
            outcome.stderr
        );
    }
}

#[test]
fn wrong_flags_end_in_exit_code_2() {
    for (flags, reason) in [
        (["--duration", "5"], "5s"),
        (["--abort-fraction", "1.5"], "between 0 and 1"),
        (["--api", "responses"], "completions"),
        (["--workload", "no-such"], "shared-prefix"),
        (["--header", "x-session-id"], "NAME: VALUE"),
        (["--header", "x session: 1"], "name is not one of a header"),
    ] {
        let outcome = load("http://127.0.0.1:1", &flags);
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        assert!(
            outcome.stderr.contains(reason),
            "{reason}: {}",
            outcome.stderr
        );
    }
}
