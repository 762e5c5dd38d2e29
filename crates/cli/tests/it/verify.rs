//! The router's predictions compared with mock engines, and with real engines if
//! `FORESEE_TEST_VLLM_URL` or `FORESEE_TEST_SGLANG_URL` is set.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::TcpListener;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::ports::{ANY_PORT, free_endpoint};
use foresee_client::verify::{Lengths, Verdict, Verification, VerifyConfig, run};
use foresee_core::router::CacheSource;
use foresee_core::router::RouterConfig;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, GatewayConfig, WorkerConfig};
use foresee_mock::{KvEventsConfig, MockEngineConfig, bind, serve};
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::L40S_8B;
use tokio::task::JoinSet;

/// Time limit for workers to become healthy.
const STATE_TIMEOUT: Duration = Duration::from_secs(60);

/// Starts a gateway with these workers, which are written as for `--worker`.
fn gateway(workers: &[String], block_size: u32, tokenizer: Option<PathBuf>) -> Gateway {
    let workers = workers
        .iter()
        .map(|worker| worker.parse::<WorkerConfig>().unwrap());
    Gateway::start(GatewayConfig {
        listen: ANY_PORT.parse().unwrap(),
        admin_listen: ANY_PORT.parse().unwrap(),
        workers: workers.collect(),
        router: RouterConfig {
            block_size: NonZeroU32::new(block_size).unwrap(),
            ..RouterConfig::default()
        },
        tokenizer,
        shutdown: foresee_gateway::ShutdownConfig {
            delay: Duration::ZERO,
        },
        ..GatewayConfig::default()
    })
    .unwrap()
}

/// Verifies the workers of a gateway, as soon as all are healthy and have their cache source:
/// events if `has_events`, and an estimate otherwise.
async fn verify(gateway: &Gateway, has_events: bool, config: VerifyConfig) -> Verification {
    let router = gateway.router().clone();
    let ready = async {
        loop {
            let workers = router.workers(Duration::ZERO);
            if workers.iter().all(|worker| {
                worker.state == WorkerState::Healthy
                    && (worker.cache_source == CacheSource::Events) == has_events
            }) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(STATE_TIMEOUT, ready).await.unwrap();
    let config = VerifyConfig {
        api: format!("http://{}", gateway.address()),
        admin: format!("http://{}", gateway.admin_listen()),
        ..config
    };
    run(&config, |_| {}).await.unwrap()
}

/// Returns a short verification with one and with eight requests in flight.
fn config(block_size: u32) -> VerifyConfig {
    VerifyConfig {
        api: String::new(),
        admin: String::new(),
        admin_key: None,
        model: None,
        block_size,
        has_tokenizer: false,
        requests: 120,
        concurrency: vec![1, 8],
        lengths: Lengths {
            prompt: 600,
            output: 40,
        },
        stream_fraction: 0.6,
        abort_fraction: 0.05,
        sample_interval: Duration::from_millis(20),
        seed: 1,
        timeout: Duration::from_secs(60),
    }
}

/// Starts two mock engines whose caches hold some of the prompts. Returns them as for `--worker`.
fn mock_engines(serving: &mut JoinSet<std::io::Result<()>>, has_events: bool) -> Vec<String> {
    let engines = (0..2).map(|_| {
        let mut engine = EngineConfig::from_preset(&L40S_8B, NonZeroU32::new(16).unwrap());
        engine.blocks = 300;
        let kv_events = has_events.then(|| KvEventsConfig::new(free_endpoint()));
        let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
        let mut worker = format!("http://{}", listener.local_addr().unwrap());
        if let Some(events) = &kv_events {
            worker += &format!(",kv-events={}", events.endpoint);
        }
        let config = MockEngineConfig {
            speedup: 4.0, // steps that outlast a pause of a busy machine, so that clients can abort
            kv_events,
            ..MockEngineConfig::new("model", engine)
        };
        serving.spawn(serve(config, listener, std::future::pending()));
        worker
    });
    engines.collect()
}

/// Verifies fresh mock engines, and returns the first of at most three verifications in which all
/// workers kept their cache source, and that predicted every overlap of its first phase exactly, but
/// for `max_inexact`. That phase has one request in flight. On a busy machine, an event or the end of
/// a response can arrive after the next request was sent.
async fn verify_mock_engines(has_events: bool, max_inexact: usize) -> Verification {
    const MAX_ATTEMPTS: usize = 3;
    for attempt in 1.. {
        let mut serving = JoinSet::new();
        let workers = mock_engines(&mut serving, has_events);
        let gateway = gateway(&workers, 16, None);
        let verification = verify(&gateway, has_events, config(16)).await;
        let overlaps = verification.phases[0].predictable(false);
        assert!(overlaps.requests > 50, "{verification}");
        assert!(overlaps.actual > 100, "there were hits: {verification}");
        let source = if has_events { "events" } else { "estimated" };
        let mut workers = verification.workers.iter();
        if overlaps.equal + max_inexact >= overlaps.requests
            && workers.all(|worker| worker.cache_source == source)
        {
            return verification;
        }
        assert!(attempt < MAX_ATTEMPTS, "{verification}");
    }
    unreachable!("the last attempt returns or panics")
}

/// Asserts that no block is active at the end, that no request failed, and that some were aborted.
fn assert_nothing_is_left(verification: &Verification) {
    for worker in &verification.workers {
        let active = &worker.active;
        assert!(active.peak > 0.0 && active.samples > 2, "{verification}");
        assert_eq!(
            (active.predicted_at_rest, active.reported_at_rest),
            (0, 0.0)
        );
    }
    let failed = verification.phases.iter().map(|phase| phase.failed);
    assert_eq!(failed.sum::<usize>(), 0);
    assert!(
        verification.phases[1].aborted > 0,
        "some clients aborted: {verification}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn predictions_hold_on_mock_engines_with_events() {
    let verification = verify_mock_engines(true, 2).await;
    assert_nothing_is_left(&verification);
    assert!(
        verification
            .workers
            .iter()
            .any(|worker| worker.event_lag.is_some())
    );
    assert!(verification.html().contains("<svg"));
}

#[tokio::test(flavor = "multi_thread")]
async fn predictions_hold_on_mock_engines_without_events() {
    let verification = verify_mock_engines(false, 0).await;
    assert_nothing_is_left(&verification);
    // A hundred responses are too few to show a goal of 97 %.
    let checks = verification.checks.iter();
    let overlap = checks.filter(|check| check.evidence.is_some());
    for check in overlap {
        assert_ne!(check.verdict, Verdict::Fails, "{verification}");
        let evidence = check.evidence.unwrap();
        assert!(evidence.responses_needed >= evidence.proportion.trials);
        assert!(
            (evidence.interval.0..=evidence.interval.1).contains(&0.97),
            "{verification}"
        );
    }
}

/// Uses a tokenizer that differs from the engines'.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_tokenizer_fails_the_verification() {
    let mut serving = JoinSet::new();
    let workers = mock_engines(&mut serving, false);
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/tiny_model");
    let gateway = gateway(&workers, 16, Some(PathBuf::from(tiny)));
    let config = VerifyConfig {
        has_tokenizer: true,
        ..config(16)
    };
    let verification = verify(&gateway, false, config).await;
    assert!(verification.parity.different > 0);
    assert_eq!(verification.verdict(), Verdict::Fails);
    let text = verification.to_string();
    let failed = "FAILS        prompt tokens counted as the engines count them";
    assert!(text.contains(failed), "{text}");
    assert!(
        text.contains("The predictions do not hold on these engines"),
        "{text}"
    );
}

/// Checks the exit codes of the command, with the lines that explain them.
#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_distinguish_a_verification_from_one_that_could_not_be_carried_out() {
    let mut serving = JoinSet::new();
    let workers = mock_engines(&mut serving, false);
    let run = |flags: Vec<String>| {
        let output = tokio::task::spawn_blocking(move || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_foresee"));
            command.arg("verify").args(flags).output().unwrap()
        });
        async {
            let Output {
                status,
                stdout,
                stderr,
            } = output.await.unwrap();
            let text = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
            (status.code().unwrap(), text)
        }
    };
    let flags = |more: &[&str]| {
        let requests = [
            "--requests",
            "40",
            "--concurrency",
            "1",
            "--max-prompt",
            "400",
        ];
        let all = requests.iter().chain(more).map(ToString::to_string);
        all.collect::<Vec<_>>()
    };
    let both = ["--worker", &workers[0], "--worker", &workers[1]];
    let (code, [report, error]) = run(flags(&both)).await;
    assert_eq!(code, 0, "{report} {error}");
    assert!(
        report.contains("consistent with the goal of 97 %"),
        "{report}"
    );
    assert!(
        report.contains("responses would be needed to show it"),
        "{report}"
    );

    let (code, [_, error]) = run(flags(&[])).await;
    assert_eq!(code, 3, "{error}");
    let listener = TcpListener::bind(ANY_PORT).unwrap();
    let closed = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let router = ["--router", &closed, "--router-admin", &closed];
    let (code, [_, error]) = run(flags(&router)).await;
    assert_eq!(code, 3, "{error}");
    assert!(error.contains("refused"), "{error}");
}

/// Verifies real engines, which the variable describes as for `--worker`, separated by white space.
/// With `FORESEE_TEST_MODEL`, the folder of their model, text is matched by their tokens.
async fn verify_real(variable: &str, block_size: u32) {
    let Ok(workers) = std::env::var(variable) else {
        eprintln!("skipped: {variable} is not set");
        return;
    };
    let workers: Vec<String> = workers.split_whitespace().map(str::to_owned).collect();
    let block_size =
        std::env::var("FORESEE_BLOCK_SIZE").map_or(block_size, |given| given.parse().unwrap());
    let tokenizer = std::env::var_os("FORESEE_TEST_MODEL").map(PathBuf::from);
    let has_events = workers.iter().all(|worker| worker.contains("kv-events="));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let config = VerifyConfig {
        has_tokenizer: tokenizer.is_some(),
        requests: 200,
        // Three phases of eight at a time, because a goal of 99 % needs hundreds of responses.
        concurrency: vec![1, 8, 8, 8],
        lengths: Lengths {
            prompt: 400,
            output: 400,
        },
        // The progress of responses that are not streamed is unknown, which blurs active blocks.
        stream_fraction: 1.0,
        sample_interval: Duration::from_millis(250),
        seed: now.as_secs(),
        ..config(block_size)
    };
    // The second router starts with warm caches, as after a restart. If the engines replay their
    // events, the router knows their caches, and the second round sends the same prompts. Otherwise
    // it sends different prompts.
    let has_replay = workers.iter().all(|worker| worker.contains("replay="));
    for round in 0..2 {
        let gateway = gateway(&workers, block_size, tokenizer.clone());
        let seed_offset = if has_replay { 0 } else { 10 * round };
        let config = VerifyConfig {
            seed: config.seed.wrapping_add(seed_offset),
            ..config.clone()
        };
        let verification = verify(&gateway, has_events, config).await;
        eprintln!("{verification}");
        let verdict = verification.verdict();
        assert!(
            matches!(verdict, Verdict::Holds | Verdict::NotShown),
            "{verification}"
        );
        gateway.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_vllm_matches_the_predictions() {
    verify_real("FORESEE_TEST_VLLM_URL", 16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_sglang_matches_the_predictions() {
    verify_real("FORESEE_TEST_SGLANG_URL", 16).await;
}
