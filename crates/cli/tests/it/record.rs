//! Recordings of `serve --record`, replayed with `replay run --trace`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::ports::ANY_PORT;
use foresee_client::load::{LiveOutcome, LoadConfig, run};
use foresee_core::router::RouterConfig;
use foresee_mock::{MockEngineConfig, bind, serve};
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::L40S_8B;
use foresee_sim::trace;
use foresee_sim::workload::{Shape, Workload};

/// Speed of the mock engine in multiples of real time.
const SPEEDUP: f64 = 50.0;

/// Sends a workload through a router that records it to `path`, and stops the router with SIGTERM.
async fn record(workload: &Workload, path: &Path) -> LiveOutcome {
    let engine = EngineConfig::from_preset(&L40S_8B, RouterConfig::default().block_size);
    let config = MockEngineConfig {
        speedup: SPEEDUP,
        ..MockEngineConfig::new("model", engine)
    };
    let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
    let worker = listener.local_addr().unwrap().to_string();
    tokio::spawn(serve(config, listener, std::future::pending()));

    let mut child = Command::new(env!("CARGO_BIN_EXE_foresee"))
        .args(["serve", "--listen", ANY_PORT, "--admin-listen", ANY_PORT])
        .args(["--shutdown-delay", "0s"])
        .args(["--worker", &worker, "--record", path.to_str().unwrap()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = child.stderr.take().unwrap();
    let (address, rest) = tokio::task::spawn_blocking(move || {
        let mut lines = BufReader::new(stderr).lines();
        let mut address: Option<SocketAddr> = None;
        for line in lines.by_ref() {
            let line = line.unwrap();
            if let Some(api) = line.split("api=").nth(1) {
                address = Some(api.split(' ').next().unwrap().parse().unwrap());
            }
            if line.contains("worker is healthy") {
                break;
            }
        }
        (address.unwrap(), lines)
    })
    .await
    .unwrap();
    // Without a reader of its pipe, the program fails at a later log line.
    let reading = std::thread::spawn(move || rest.for_each(drop));

    let config = LoadConfig {
        workers: 1,
        speedup: SPEEDUP,
        ..LoadConfig::new(format!("http://{address}"), "model")
    };
    let outcome = run(&config, workload, |_| {}).await.unwrap();
    let kill = Command::new("kill").arg(child.id().to_string()).status();
    assert!(kill.unwrap().success());
    let exit = tokio::task::spawn_blocking(move || child.wait());
    assert!(exit.await.unwrap().unwrap().success());
    reading.join().unwrap();
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_traffic_can_be_replayed() {
    let name = format!("foresee-record-{}.jsonl", std::process::id());
    let path = std::env::temp_dir().join(name);
    let shape = Shape {
        isl: 704,
        osl: 20,
        osl_spread: 0.5,
        prefixes: 4,
        ..Shape::default()
    };
    let workload = Workload::closed_loop(&shape, 80, 8, 1);
    // The second run appends to the file of the first.
    for _ in 0..2 {
        let live = record(&workload, &path).await;
        assert_eq!((live.finished, live.failures()), (80, 0));
    }

    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.lines().all(|line| line.contains(r#""model":"model""#)));
    let requests = trace::read(text.as_bytes()).unwrap();
    assert_eq!(requests.len(), 160);
    assert!(requests.iter().all(|request| request.prompt_tokens == 704));
    assert!(requests.iter().all(|request| request.hash_ids.len() == 44));
    let recorded_output: u32 = requests.iter().map(|request| request.output_tokens).sum();
    let sent = workload.requests.iter();
    let sent_output: u32 = sent.map(|request| request.output_tokens).sum();
    assert_eq!(recorded_output, 2 * sent_output);
    // The first half of each prompt is one of four prefixes. The second half is its own, and equal
    // in both runs.
    let distinct_ids = |block: usize| {
        let ids = requests.iter().map(|request| request.hash_ids[block]);
        ids.collect::<HashSet<u64>>().len()
    };
    assert_eq!(
        (distinct_ids(0), distinct_ids(21), distinct_ids(43)),
        (4, 4, 80)
    );

    let json = path.with_extension("json");
    let replayed = Command::new(env!("CARGO_BIN_EXE_foresee"))
        .args(["replay", "run", "--workers", "2", "--policy", "kv"])
        .args(["--trace", path.to_str().unwrap()])
        .args(["--requests", "80", "--json", json.to_str().unwrap()])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&replayed.stderr).into_owned();
    assert!(replayed.status.success(), "{error}");
    let report = std::fs::read(&json).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let outcome = &report["outcomes"][0];
    assert_eq!(outcome["finished"], 80);
    assert_eq!(outcome["prompt_tokens"], 80 * 704);
    // All prefixes are hits except the first request with a prefix on each worker. Each of the four
    // prefixes is computed on one worker or on both.
    let hits = outcome["cached_tokens"].as_u64().unwrap();
    assert!((72 * 352..=76 * 352).contains(&hits), "{hits}");
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&json).unwrap();
}
