//! The router's predictions against engines: model engines always, real ones where
//! `FORESEE_TEST_VLLM_URL` or `FORESEE_TEST_SGLANG_URL` names some.

#![allow(clippy::unwrap_used, missing_docs)]

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::ports::{ANY_PORT, free_endpoint};
use foresee_core::fleet::WorkerState;
use foresee_core::queue::Order;
use foresee_core::router::RouterConfig;
use foresee_gateway::{Gateway, GatewayConfig, WorkerConfig};
use foresee_sim::engine::EngineConfig;
use foresee_sim::law::L40S_8B;
use foresee_sim::server::{KvEventsConfig, ServerConfig, bind, serve};
use foresee_sim::verify::{Lengths, Verification, VerifyConfig, run};
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(60);

fn gateway(workers: &[String], block_size: u32, tokenizer: Option<PathBuf>) -> Gateway {
    let workers = workers.iter().map(|it| it.parse::<WorkerConfig>().unwrap());
    Gateway::start(GatewayConfig {
        listen: ANY_PORT.parse().unwrap(),
        admin_listen: ANY_PORT.parse().unwrap(),
        workers: workers.collect(),
        router: RouterConfig {
            block_size: NonZeroU32::new(block_size).unwrap(),
            // As `serve` has it.
            queue: Some(Order::Shortest),
            ..RouterConfig::default()
        },
        tokenizer,
        ..GatewayConfig::default()
    })
    .unwrap()
}

/// Verifies the workers through a gateway, once it knows all it can know of them.
async fn verify(gateway: &Gateway, events: bool, config: VerifyConfig) -> Verification {
    let router = gateway.router().clone();
    let known = async {
        loop {
            let workers = router.workers(Duration::ZERO);
            if workers
                .iter()
                .all(|it| it.state == WorkerState::Healthy && it.follows_events == events)
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, known).await.unwrap();
    let config = VerifyConfig {
        api: format!("http://{}", gateway.address()),
        admin: format!("http://{}", gateway.admin_address()),
        ..config
    };
    run(&config, |_| {}).await.unwrap()
}

fn config(block_size: u32) -> VerifyConfig {
    VerifyConfig {
        api: String::new(),
        admin: String::new(),
        model: None,
        block_size,
        has_tokenizer: false,
        requests: 120,
        concurrency: vec![1, 8],
        lengths: Lengths {
            prompt: 600,
            answer: 40,
        },
        stream_share: 0.6,
        abort_share: 0.05,
        sample_interval: Duration::from_millis(20),
        seed: 1,
        timeout: Duration::from_secs(60),
    }
}

/// Two engines with room for some of the prompts, and how to reach them.
fn model_engines(serving: &mut JoinSet<std::io::Result<()>>, events: bool) -> Vec<String> {
    let engines = (0..2).map(|_| {
        let mut engine = EngineConfig::from_preset(&L40S_8B, NonZeroU32::new(16).unwrap());
        engine.blocks = 300;
        let kv_events = events.then(|| KvEventsConfig::new(free_endpoint()));
        let listener = bind(ANY_PORT.parse().unwrap()).unwrap();
        let mut worker = format!("http://{}", listener.local_addr().unwrap());
        if let Some(events) = &kv_events {
            worker += &format!(",kv-events={}", events.endpoint);
        }
        let config = ServerConfig {
            time_scale: 20.0,
            kv_events,
            ..ServerConfig::new("model", engine)
        };
        serving.spawn(serve(config, listener, std::future::pending()));
        worker
    });
    engines.collect()
}

fn assert_one_at_a_time_is_exact(found: &Verification, late: usize) {
    let alone = found.phases[0].predictable(false);
    assert!(alone.requests > 50, "{found}");
    assert!(alone.equal + late >= alone.requests, "{found}");
    assert!(alone.actual > 100, "there were hits: {found}");
}

fn assert_nothing_is_left(found: &Verification) {
    for worker in &found.workers {
        let active = &worker.active;
        assert!(active.peak > 0.0 && active.samples > 2, "{found}");
        assert_eq!((active.predicted_at_rest, active.held_at_rest), (0, 0.0));
    }
    assert_eq!(found.phases.iter().map(|it| it.failed).sum::<usize>(), 0);
    assert!(found.phases[1].left > 0, "some clients left: {found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn model_engines_do_as_predicted_with_events() {
    let mut serving = JoinSet::new();
    let workers = model_engines(&mut serving, true);
    let gateway = gateway(&workers, 16, None);
    let found = verify(&gateway, true, config(16)).await;
    // On a busy machine an event can come later than the next request.
    assert_one_at_a_time_is_exact(&found, 2);
    assert_nothing_is_left(&found);
    assert!(found.workers.iter().all(|it| it.cache_source == "events"));
    assert!(found.workers.iter().any(|it| it.event_lag.is_some()));
    assert!(found.html().contains("<svg"));
}

#[tokio::test(flavor = "multi_thread")]
async fn model_engines_do_as_predicted_without_events() {
    let mut serving = JoinSet::new();
    let workers = model_engines(&mut serving, false);
    let gateway = gateway(&workers, 16, None);
    let found = verify(&gateway, false, config(16)).await;
    assert_one_at_a_time_is_exact(&found, 0);
    assert_nothing_is_left(&found);
    assert!(found.workers.iter().all(|it| it.cache_source == "shadow"));
}

/// A tokenizer that is not the engines' is found out.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_so_is_said() {
    let mut serving = JoinSet::new();
    let workers = model_engines(&mut serving, false);
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/tiny_model");
    let gateway = gateway(&workers, 16, Some(PathBuf::from(tiny)));
    let config = VerifyConfig {
        has_tokenizer: true,
        ..config(16)
    };
    let found = verify(&gateway, false, config).await;
    assert!(found.parity.different > 0);
    assert!(!found.passed());
    assert!(found.to_string().contains("FAIL prompts counted"));
}

/// Real engines, written as for `--worker` and separated by white space. With
/// `FORESEE_TEST_MODEL`, the folder that they serve, text is matched by their tokens.
async fn verify_real(variable: &str, block_size: u32) {
    let Ok(workers) = std::env::var(variable) else {
        eprintln!("skipped: {variable} names no engine");
        return;
    };
    let workers: Vec<String> = workers.split_whitespace().map(str::to_owned).collect();
    let block_size =
        std::env::var("FORESEE_BLOCK_SIZE").map_or(block_size, |given| given.parse().unwrap());
    let tokenizer = std::env::var_os("FORESEE_TEST_MODEL").map(PathBuf::from);
    let has_events = workers.iter().all(|it| it.contains("kv-events="));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let config = VerifyConfig {
        has_tokenizer: tokenizer.is_some(),
        requests: 200,
        // One hit in a hundred may be missed: a few hundred tell little of that.
        concurrency: vec![1, 8, 8, 8],
        lengths: Lengths {
            prompt: 400,
            answer: 400,
        },
        // How far an answer is that comes whole nobody sees, which blurs the active blocks.
        stream_share: 1.0,
        sample_interval: Duration::from_millis(250),
        seed: now.as_secs(),
        ..config(block_size)
    };
    // The second router meets warm caches, as after a restart. What they hold it can know if the
    // engines tell again, and then the same prompts come once more.
    let has_replay = workers.iter().all(|it| it.contains("replay="));
    for round in 0..2 {
        let gateway = gateway(&workers, block_size, tokenizer.clone());
        let others = if has_replay { 0 } else { 10 * round };
        let config = VerifyConfig {
            seed: config.seed.wrapping_add(others),
            ..config.clone()
        };
        let found = verify(&gateway, has_events, config).await;
        eprintln!("{found}");
        assert!(found.passed());
        gateway.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_vllm_does_as_predicted() {
    verify_real("FORESEE_TEST_VLLM_URL", 16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_sglang_does_as_predicted() {
    verify_real("FORESEE_TEST_SGLANG_URL", 16).await;
}
