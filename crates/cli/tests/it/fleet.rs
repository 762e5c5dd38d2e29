//! The whole of it: model engines, the gateway and clients over TCP, and the program itself.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::ports::ANY_PORT;
use foresee_core::fleet::WorkerState;
use foresee_core::router::RouterConfig;
use foresee_gateway::{Gateway, GatewayConfig, WorkerConfig, raise_open_file_limit};
use foresee_sim::engine::EngineConfig;
use foresee_sim::law::L40S_8B;
use foresee_sim::load::{LiveOutcome, LoadConfig, run};
use foresee_sim::server::{ServerConfig, bind, serve};
use foresee_sim::workload::{Shape, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const WORKERS: usize = 8;
/// Slow enough that a burst has come long before most of its answers: a pause of the machine, many
/// times as long to engines that run fast, would look like a slow engine.
const TIME_SCALE: f64 = 2.0;
const PATIENCE: Duration = Duration::from_secs(20);

/// Eight model engines behind a gateway. The engines die with the set.
struct Fleet {
    gateway: Gateway,
    engines: Vec<SocketAddr>,
    _serving: JoinSet<std::io::Result<()>>,
}

impl Fleet {
    async fn start() -> Self {
        raise_open_file_limit().unwrap();
        let mut serving = JoinSet::new();
        let mut engines = Vec::new();
        for _ in 0..WORKERS {
            let block_size = RouterConfig::default().block_size;
            let engine = EngineConfig::from_preset(&L40S_8B, block_size);
            let config = ServerConfig {
                time_scale: TIME_SCALE,
                ..ServerConfig::new("model", engine)
            };
            let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
            engines.push(listener.local_addr().unwrap());
            serving.spawn(serve(config, listener, std::future::pending()));
        }
        let workers = engines.iter().map(|it| it.to_string().parse().unwrap());
        let gateway = Gateway::start(GatewayConfig {
            listen: ANY_PORT.parse().unwrap(),
            admin_listen: ANY_PORT.parse().unwrap(),
            workers: workers.collect::<Vec<WorkerConfig>>(),
            ..GatewayConfig::default()
        })
        .unwrap();
        let router = gateway.router().clone();
        eventually(|| {
            let workers = router.workers(Duration::ZERO);
            workers.iter().all(|it| it.state == WorkerState::Healthy)
        })
        .await;
        Self {
            gateway,
            engines,
            _serving: serving,
        }
    }

    async fn send(&self, workload: &Workload, abort_share: f64) -> LiveOutcome {
        let config = LoadConfig {
            workers: WORKERS,
            time_scale: TIME_SCALE,
            abort_share,
            ..LoadConfig::new(format!("http://{}", self.gateway.address()), "model")
        };
        run(&config, workload, |_| {}).await.unwrap()
    }

    /// What the router books and what the engines hold must both come to nothing.
    async fn assert_empty(&self) {
        let router = self.gateway.router();
        eventually(|| {
            let workers = router.workers(Duration::ZERO);
            router.bookings() == 0
                && workers.iter().all(|it| {
                    (
                        it.requests,
                        it.active_blocks,
                        it.context_tokens,
                        it.prefill_tokens,
                    ) == (0, 0, 0, 0)
                })
        })
        .await;
        for &engine in &self.engines {
            let wait = async { while !is_idle(&get(engine, "/metrics").await) {} };
            tokio::time::timeout(PATIENCE, wait).await.unwrap();
        }
    }
}

/// Whether an engine's metrics say that it runs nothing and holds no block.
fn is_idle(metrics: &str) -> bool {
    ["vllm:num_requests_running", "vllm:kv_cache_usage_perc"]
        .iter()
        .all(|name| {
            let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
            let value: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
            value == 0.0
        })
}

async fn eventually(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait)
        .await
        .unwrap();
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// A tenth of the size of the burst that `foresee demo --workload burst` sends, per request.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_is_spread_and_none_of_it_lost() {
    let fleet = Fleet::start().await;
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
    assert!(
        outcome.computed_imbalance < 1.1,
        "{}",
        outcome.computed_imbalance
    );
    assert!(outcome.hit_share > 0.4, "{}", outcome.hit_share);
    fleet.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_clients_break_off_leave_nothing_behind() {
    let fleet = Fleet::start().await;
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

fn foresee(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[tokio::test]
async fn serve_ends_well_on_sigterm() {
    let mut child = foresee(&["serve", "--listen", ANY_PORT, "--admin-listen", ANY_PORT])
        .spawn()
        .unwrap();
    // It listens, and so has its signal handlers, once it says so.
    let stderr = child.stderr.take().unwrap();
    let said = tokio::task::spawn_blocking(move || {
        use std::io::BufRead;
        let mut lines = std::io::BufReader::new(stderr).lines();
        assert!(lines.any(|line| line.unwrap().contains("listening")));
        lines
    });
    // Read on, or what it says later breaks its pipe.
    let _rest = said.await.unwrap();
    let killed = Command::new("kill")
        .arg(child.id().to_string())
        .status()
        .unwrap();
    assert!(killed.success());
    let status = tokio::task::spawn_blocking(move || child.wait())
        .await
        .unwrap()
        .unwrap();
    assert!(status.success(), "{status}");
}

/// One line for each answer: what was predicted, and what came true.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_in_the_log_if_asked_for() {
    let block_size = RouterConfig::default().block_size;
    let engine = EngineConfig::from_preset(&L40S_8B, block_size);
    let config = ServerConfig {
        time_scale: TIME_SCALE,
        ..ServerConfig::new("model", engine)
    };
    let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
    let worker = format!("{},name=w", listener.local_addr().unwrap());
    tokio::spawn(serve(config, listener, std::future::pending()));
    let mut child = foresee(&["serve", "--listen", ANY_PORT, "--admin-listen", ANY_PORT])
        .args(["--worker", &worker])
        .env("FORESEE_LOG", "info,foresee::answer=debug")
        .spawn()
        .unwrap();
    let (told, mut lines) = tokio::sync::mpsc::unbounded_channel();
    let stderr = child.stderr.take().unwrap();
    std::thread::spawn(move || {
        use std::io::BufRead;
        let lines = std::io::BufReader::new(stderr).lines();
        lines.for_each(|line| drop(told.send(line.unwrap())));
    });
    let mut line_with = async |what: &str| {
        let find = async {
            loop {
                let line = lines.recv().await.unwrap();
                if line.contains(what) {
                    return line;
                }
            }
        };
        tokio::time::timeout(PATIENCE, find).await.unwrap()
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
    for found in [0, 6] {
        let mut stream = TcpStream::connect(api).await.unwrap();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             x-request-id: r{found}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let line = line_with("foresee::answer").await;
        for part in [
            format!(r#"request="r{found}" worker=w model=model outcome="ok""#),
            "prompt_tokens=100 output_tokens=5".to_owned(),
            format!("predicted_blocks={found} best_blocks={found} actual_blocks={found}"),
        ] {
            assert!(line.contains(&part), "{part} in {line}");
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_configuration_is_read_and_judged() {
    let file = std::env::temp_dir().join(format!("foresee-{}.toml", std::process::id()));
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "policy = \"random\"\nworker = [\"http://a:1,name=x\", \"b:2\"]\n",
    )
    .unwrap();
    let good = foresee(&["check-config", "--config", path, "--overlap-weight", "2"])
        .output()
        .unwrap();
    let said = String::from_utf8(good.stdout).unwrap();
    assert!(good.status.success(), "{said}");
    for part in [
        "random",
        "x at http://a:1",
        "b:2 at http://b:2",
        "overlap-weight   2",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }

    std::fs::write(&file, "polcy = \"random\"\n").unwrap();
    let bad = foresee(&["check-config", "--config", path])
        .output()
        .unwrap();
    let said = String::from_utf8(bad.stderr).unwrap();
    assert!(!bad.status.success() && said.contains("`polcy`"), "{said}");
    std::fs::remove_file(&file).unwrap();

    let same_name = [
        "check-config",
        "--worker",
        "a:1,name=x",
        "--worker",
        "b:1,name=x",
    ];
    let bad = foresee(&same_name).output().unwrap();
    let said = String::from_utf8(bad.stderr).unwrap();
    assert!(!bad.status.success() && said.contains("`x`"), "{said}");
}
