//! End-to-end tests over TCP: mock engines, the gateway and clients, and `foresee serve`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::ports::ANY_PORT;
use foresee_client::load::{LiveOutcome, LoadConfig, run};
use foresee_core::router::RouterConfig;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, GatewayConfig, WorkerConfig, raise_open_file_limit};
use foresee_mock::{MockEngineConfig, bind, serve};
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::L40S_8B;
use foresee_sim::workload::{Shape, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const WORKERS: usize = 8;
/// Speed of the mock engines in multiples of real time. A pause of the machine lasts `SPEEDUP` times
/// as long in the engines' time, so that faster engines would look slow after it.
const SPEEDUP: f64 = 2.0;
/// Speed at which a burst has arrived long before most of its first tokens, even if the machine has
/// other work. Workers with different progress, and different learned speeds, get different numbers
/// of requests.
const BURST_SPEEDUP: f64 = 0.5;
/// Time limit for expected conditions and log lines.
const STATE_TIMEOUT: Duration = Duration::from_secs(20);

/// A gateway with [`WORKERS`] mock engines.
struct Fleet {
    gateway: Gateway,
    /// Speed of the engines in multiples of real time.
    speedup: f64,
    /// Addresses of the engines.
    engines: Vec<SocketAddr>,
    /// Servers of the engines, which end when the set is dropped.
    _serving: JoinSet<std::io::Result<()>>,
}

impl Fleet {
    /// Starts the engines and the gateway, and waits until all workers are healthy.
    async fn start(speedup: f64) -> Self {
        raise_open_file_limit().unwrap();
        let mut serving = JoinSet::new();
        let mut engines = Vec::new();
        for _ in 0..WORKERS {
            let block_size = RouterConfig::default().block_size;
            let engine = EngineConfig::from_preset(&L40S_8B, block_size);
            let config = MockEngineConfig {
                speedup,
                ..MockEngineConfig::new("model", engine)
            };
            let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
            engines.push(listener.local_addr().unwrap());
            serving.spawn(serve(config, listener, std::future::pending()));
        }
        let workers = engines
            .iter()
            .map(|engine| engine.to_string().parse().unwrap());
        let gateway = Gateway::start(GatewayConfig {
            listen: ANY_PORT.parse().unwrap(),
            admin_listen: ANY_PORT.parse().unwrap(),
            workers: workers.collect::<Vec<WorkerConfig>>(),
            expose_worker_header: true,
            router: RouterConfig {
                queue_order: None,
                ..RouterConfig::default()
            },
            ..GatewayConfig::default()
        })
        .unwrap();
        let router = gateway.router().clone();
        eventually(|| {
            let workers = router.workers(Duration::ZERO);
            workers
                .iter()
                .all(|worker| worker.state == WorkerState::Healthy)
        })
        .await;
        Self {
            gateway,
            speedup,
            engines,
            _serving: serving,
        }
    }

    /// Sends a workload through the gateway.
    async fn send(&self, workload: &Workload, abort_fraction: f64) -> LiveOutcome {
        let config = LoadConfig {
            workers: WORKERS,
            speedup: self.speedup,
            abort_fraction,
            ..LoadConfig::new(format!("http://{}", self.gateway.address()), "model")
        };
        run(&config, workload, |_| {}).await.unwrap()
    }

    /// Waits until the router has no booking and no engine has a running request or a used block.
    async fn assert_empty(&self) {
        let router = self.gateway.router();
        eventually(|| {
            let workers = router.workers(Duration::ZERO);
            router.booking_count() == 0
                && workers.iter().all(|worker| {
                    (
                        worker.requests,
                        worker.active_blocks,
                        worker.context_tokens,
                        worker.prefill_tokens,
                    ) == (0, 0, 0, 0)
                })
        })
        .await;
        for &engine in &self.engines {
            let wait = async { while !is_idle(&get(engine, "/metrics").await) {} };
            tokio::time::timeout(STATE_TIMEOUT, wait).await.unwrap();
        }
    }
}

/// Returns whether an engine's metrics report no running request and no used block.
fn is_idle(metrics: &str) -> bool {
    ["vllm:num_requests_running", "vllm:kv_cache_usage_perc"]
        .iter()
        .all(|name| {
            let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
            let value: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
            value == 0.0
        })
}

/// Waits until a condition is true.
async fn eventually(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(STATE_TIMEOUT, wait).await.unwrap();
}

/// Returns the response to a GET request, with its head.
async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

/// Sends the workload `burst` of `foresee demo` with about a tenth of the tokens per request.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_is_spread_evenly_and_loses_no_request() {
    let fleet = Fleet::start(BURST_SPEEDUP).await;
    let shape = Shape {
        isl: 704,
        osl: 8,
        ..Shape::default()
    };
    let outcome = fleet.send(&Workload::burst(&shape, 1000, 7), 0.0).await;
    assert_eq!(
        (outcome.finished, outcome.failures()),
        (1000, 0),
        "{:?}",
        outcome.failed
    );
    let imbalance = outcome.computed_imbalance.unwrap();
    assert!((1.0..1.1).contains(&imbalance), "{imbalance}");
    assert!(outcome.hit_fraction > 0.4, "{}", outcome.hit_fraction);
    fleet.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn aborted_streams_leave_no_booking_and_no_used_block() {
    let fleet = Fleet::start(SPEEDUP).await;
    let shape = Shape {
        isl: 400,
        osl: 40,
        ..Shape::default()
    };
    let workload = Workload::closed_loop(&shape, 600, 100, 3);
    let outcome = fleet.send(&workload, 0.3).await;
    assert_eq!(outcome.failures(), 0, "{:?}", outcome.failed);
    assert!(outcome.aborted > 20, "{}", outcome.aborted);
    assert_eq!(outcome.finished + outcome.aborted, 600);
    fleet.assert_empty().await;
}

/// Returns a command that runs the program with piped output.
fn foresee(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[tokio::test]
async fn serve_exits_with_success_on_sigterm() {
    let mut child = foresee(&["serve", "--listen", ANY_PORT, "--admin-listen", ANY_PORT])
        .args(["--shutdown-delay", "0s"])
        .spawn()
        .unwrap();
    // The signal handlers are installed before the line is logged.
    let stderr = child.stderr.take().unwrap();
    let listening = tokio::task::spawn_blocking(move || {
        use std::io::BufRead;
        let mut lines = std::io::BufReader::new(stderr).lines();
        assert!(lines.any(|line| line.unwrap().contains("listening")));
        lines
    });
    // Without a reader of its pipe, the program fails at a later log line.
    let _pipe = listening.await.unwrap();
    let kill = Command::new("kill")
        .arg(child.id().to_string())
        .status()
        .unwrap();
    assert!(kill.success());
    let status = tokio::task::spawn_blocking(move || child.wait())
        .await
        .unwrap()
        .unwrap();
    assert!(status.success(), "{status}");
}

/// Each line contains the predicted and the actual overlap.
#[tokio::test(flavor = "multi_thread")]
async fn each_completion_is_logged_at_level_debug() {
    let block_size = RouterConfig::default().block_size;
    let engine = EngineConfig::from_preset(&L40S_8B, block_size);
    let config = MockEngineConfig {
        speedup: SPEEDUP,
        ..MockEngineConfig::new("model", engine)
    };
    let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
    let worker = format!("{},name=w", listener.local_addr().unwrap());
    tokio::spawn(serve(config, listener, std::future::pending()));
    let mut child = foresee(&["serve", "--listen", ANY_PORT, "--admin-listen", ANY_PORT])
        .args(["--worker", &worker])
        .env("FORESEE_LOG", "info,foresee::completion=debug")
        .spawn()
        .unwrap();
    let (sender, mut lines) = tokio::sync::mpsc::unbounded_channel();
    let stderr = child.stderr.take().unwrap();
    std::thread::spawn(move || {
        use std::io::BufRead;
        let lines = std::io::BufReader::new(stderr).lines();
        lines.for_each(|line| drop(sender.send(line.unwrap())));
    });
    let mut line_with = async |part: &str| {
        let find = async {
            loop {
                let line = lines.recv().await.unwrap();
                if line.contains(part) {
                    return line;
                }
            }
        };
        tokio::time::timeout(STATE_TIMEOUT, find).await.unwrap()
    };
    let listening = line_with("listening").await;
    let api = listening.split("api=").nth(1).unwrap();
    let api: SocketAddr = api.split(' ').next().unwrap().parse().unwrap();
    line_with("worker is healthy").await;
    let prompt: Vec<String> = (0..100).map(|token: u32| token.to_string()).collect();
    let body = format!(
        r#"{{"model": "model", "prompt": [{}], "max_tokens": 5, "ignore_eos": true}}"#,
        prompt.join(",")
    );
    for overlap in [0, 6] {
        let mut stream = TcpStream::connect(api).await.unwrap();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             x-request-id: r{overlap}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        let line = line_with("foresee::completion").await;
        for part in [
            format!(r#"request="r{overlap}" worker=w model=model outcome="ok""#),
            "prompt_tokens=100 output_tokens=5".to_owned(),
            format!("predicted_blocks={overlap} best_blocks={overlap} actual_blocks={overlap}"),
        ] {
            assert!(line.contains(&part), "{part} in {line}");
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
