//! What `serve --record` wrote of real traffic, `replay --trace` plays again.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::ports::ANY_PORT;
use foresee_core::router::RouterConfig;
use foresee_sim::engine::EngineConfig;
use foresee_sim::law::L40S_8B;
use foresee_sim::load::{LiveOutcome, LoadConfig, run};
use foresee_sim::server::{ServerConfig, bind, serve};
use foresee_sim::trace;
use foresee_sim::workload::{Shape, Workload};

const TIME_SCALE: f64 = 50.0;

/// Sends a workload through a router that records, and stops it as its owner would.
async fn record(workload: &Workload, path: &Path) -> LiveOutcome {
    let engine = EngineConfig::from_preset(&L40S_8B, RouterConfig::default().block_size);
    let config = ServerConfig {
        time_scale: TIME_SCALE,
        ..ServerConfig::new("model", engine)
    };
    let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
    let worker = listener.local_addr().unwrap().to_string();
    tokio::spawn(serve(config, listener, std::future::pending()));

    let mut child = Command::new(env!("CARGO_BIN_EXE_foresee"))
        .args(["serve", "--listen", ANY_PORT, "--admin-listen", ANY_PORT])
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
    // Read on, or what it says later breaks its pipe.
    let reading = std::thread::spawn(move || rest.for_each(drop));

    let config = LoadConfig {
        workers: 1,
        time_scale: TIME_SCALE,
        ..LoadConfig::new(format!("http://{address}"), "model")
    };
    let outcome = run(&config, workload, |_| {}).await.unwrap();
    let killed = Command::new("kill").arg(child.id().to_string()).status();
    assert!(killed.unwrap().success());
    let ended = tokio::task::spawn_blocking(move || child.wait());
    assert!(ended.await.unwrap().unwrap().success());
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
    // The second run adds to the file of the first.
    for _ in 0..2 {
        let live = record(&workload, &path).await;
        assert_eq!((live.finished, live.failures()), (80, 0));
    }

    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.lines().all(|line| line.contains(r#""model":"model""#)));
    let requests = trace::read(text.as_bytes()).unwrap();
    assert_eq!(requests.len(), 160);
    assert!(requests.iter().all(|it| it.prompt_tokens == 704));
    assert!(requests.iter().all(|it| it.hash_ids.len() == 44));
    let output = requests.iter().map(|it| it.output_tokens).sum::<u32>();
    let sent = workload.requests.iter().map(|it| it.output_tokens);
    assert_eq!(output, 2 * sent.sum::<u32>());
    // Half of each prompt is one of four prefixes, and the other half its own in either run.
    let different = |block: usize| {
        let ids = requests.iter().map(|it| it.hash_ids[block]);
        ids.collect::<HashSet<u64>>().len()
    };
    assert_eq!((different(0), different(21), different(43)), (4, 4, 80));

    let json = path.with_extension("json");
    let replayed = Command::new(env!("CARGO_BIN_EXE_foresee"))
        .args(["replay", "--workers", "2", "--policy", "kv"])
        .args(["--trace", path.to_str().unwrap()])
        .args(["--requests", "80", "--json", json.to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&replayed.stderr).into_owned();
    assert!(replayed.status.success(), "{said}");
    let report = std::fs::read(&json).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let outcome = &report["outcomes"][0];
    assert_eq!(outcome["finished"], 80);
    assert_eq!(outcome["prompt_tokens"], 80 * 704);
    // As each prefix is computed on one worker or both.
    let hits = outcome["cached_tokens"].as_u64().unwrap();
    assert!((72 * 352..=76 * 352).contains(&hits), "{hits}");
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_file(&json).unwrap();
}
