//! End-to-end tests of KV events: mock engines publish events over real sockets, the gateway
//! follows them, and its predictions are compared with the cache hits of the engines.

#![allow(clippy::unwrap_used, missing_docs)]

mod sampled;
mod trust;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use crate::ports::{ANY_PORT, free_endpoint, free_port};
use bytes::Bytes;
use foresee_core::router::RouterConfig;
use foresee_engine::kv_events::{
    BlockKey, BlockStored, Event, EventBatch, parse_replay_request, replay_end,
};
use foresee_gateway::{Gateway, GatewayConfig, WorkerConfig};
use foresee_mock::{KvEventsConfig, Layout, MockEngineConfig, bind, encode_batch, serve};
use foresee_sim::engine::EngineConfig;
use foresee_sim::step_time::L40S_8B;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// Tokens per block.
const BLOCK: u32 = 16;
/// Time limit for expected conditions.
const STATE_TIMEOUT: Duration = Duration::from_secs(30);
/// Number of status requests after which an event counts as lost.
const MAX_STATUS_REQUESTS: u32 = 100;

/// A mock engine that can be stopped and started again at its address.
struct Engine {
    address: SocketAddr,
    /// Applies at the next start.
    config: MockEngineConfig,
    /// Stops the engine when it is dropped.
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<std::io::Result<()>>>,
}

/// Returns the configuration of an engine with `blocks` blocks.
fn engine_of(blocks: u32, kv_events: Option<KvEventsConfig>) -> MockEngineConfig {
    let mut engine = EngineConfig::from_preset(&L40S_8B, NonZeroU32::new(BLOCK).unwrap());
    engine.blocks = blocks;
    MockEngineConfig {
        speedup: 1000.0,
        kv_events,
        ..MockEngineConfig::new("model", engine)
    }
}

/// Returns the settings of an engine that publishes events and cannot replay them.
fn publishing() -> KvEventsConfig {
    KvEventsConfig::new(free_endpoint())
}

/// Returns the settings of an engine that publishes events and can replay them.
fn with_replay() -> KvEventsConfig {
    KvEventsConfig {
        replay: Some(free_endpoint()),
        ..publishing()
    }
}

impl Engine {
    fn start(config: MockEngineConfig) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut engine = Self {
            address,
            config,
            stop: None,
            serving: None,
        };
        engine.start_again();
        engine
    }

    /// Starts a new process of the engine, with an empty cache and the current configuration.
    fn start_again(&mut self) {
        let listener = bind(self.address).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            let _ = stopped.await;
        };
        self.stop = Some(stop);
        self.serving = Some(tokio::spawn(serve(self.config.clone(), listener, stopped)));
    }

    async fn stop(&mut self) {
        drop(self.stop.take());
        self.serving.take().unwrap().await.unwrap().unwrap();
    }

    /// Returns a value of the engine's `/metrics`.
    async fn metric(&self, name: &str) -> u64 {
        let metrics = http(self.address, "GET", "/metrics", "").await.1;
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
    }
}

/// Cached tokens of one request.
#[derive(Debug, PartialEq)]
struct Hit {
    /// According to the router, from the header of the response.
    predicted: u64,
    /// According to the engine, from the usage in the response.
    actual: u64,
}

/// A gateway with one worker.
struct Fleet {
    gateway: Gateway,
}

impl Fleet {
    /// Starts a gateway with a worker, which is written as for `--worker`.
    fn start(worker: &str) -> Self {
        let gateway = Gateway::start(GatewayConfig {
            listen: ANY_PORT.parse().unwrap(),
            admin_listen: ANY_PORT.parse().unwrap(),
            workers: vec![worker.parse::<WorkerConfig>().unwrap()],
            probe_interval: Duration::from_millis(20),
            events_grace: Duration::from_millis(100),
            engine_metrics_interval: Some(Duration::from_millis(20)),
            router: RouterConfig {
                queue_order: None,
                ..RouterConfig::default()
            },
            shutdown: foresee_gateway::ShutdownConfig {
                delay: Duration::ZERO,
            },
            ..GatewayConfig::default()
        });
        Self {
            gateway: gateway.unwrap(),
        }
    }

    /// Starts a gateway that follows an engine's events, and waits until it does.
    async fn following(engine: &Engine) -> Self {
        let events = engine.config.kv_events.as_ref().unwrap();
        let mut worker = format!("{},name=w,kv-events={}", engine.address, events.endpoint);
        if let Some(replay) = &events.replay {
            worker += &format!(",replay={replay}");
        }
        let fleet = Self::start(&worker);
        fleet.becomes(follows_events).await;
        fleet
    }

    /// Returns the worker in `/admin/workers`.
    async fn worker(&self) -> Value {
        let (_, body) = http(self.gateway.admin_address(), "GET", "/admin/workers", "").await;
        let body: Value = serde_json::from_str(&body).unwrap();
        body["workers"][0].clone()
    }

    /// Waits until the worker in `/admin/workers` satisfies a condition.
    async fn becomes(&self, expected: impl Fn(&Value) -> bool) {
        let mut worker = Value::Null;
        let wait = async {
            while !expected(&worker) {
                tokio::time::sleep(Duration::from_millis(2)).await;
                worker = self.worker().await;
            }
        };
        let waited = tokio::time::timeout(STATE_TIMEOUT, wait).await;
        assert!(waited.is_ok(), "{worker:#}");
    }

    /// Waits until the gateway has applied all events that the engine published.
    async fn catches_up(&self, engine: &Engine) {
        let published = engine.metric("mock_engine:kv_event_batches_total").await;
        self.becomes(|worker| worker["kv_events"]["last_sequence"] == published - 1)
            .await;
    }

    /// Sends requests until the gateway receives an event that the engine publishes for one of
    /// them.
    async fn receives_events(&self, engine: &Engine) {
        let received = async {
            for token in 1.. {
                self.send(&[token; 100], 20).await;
                let published = engine.metric("mock_engine:kv_event_batches_total").await;
                for _ in 0..MAX_STATUS_REQUESTS {
                    if self.worker().await["kv_events"]["last_sequence"] == published - 1 {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        };
        let waited = tokio::time::timeout(STATE_TIMEOUT, received).await;
        assert!(waited.is_ok(), "no event of the engine was received");
    }

    /// Sends a request and returns its cached tokens.
    async fn send(&self, prompt: &[u32], max_tokens: u32) -> Hit {
        let body = json!({
            "model": "model", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true,
        });
        let address = self.gateway.address();
        let (head, body) = http(address, "POST", "/v1/completions", &body.to_string()).await;
        let header = "x-foresee-overlap-tokens: ";
        let predicted = head.lines().find_map(|line| line.strip_prefix(header));
        let body: Value = serde_json::from_str(&body).unwrap();
        let details = &body["usage"]["prompt_tokens_details"];
        Hit {
            predicted: predicted.unwrap().parse().unwrap(),
            actual: details["cached_tokens"].as_u64().unwrap(),
        }
    }

    /// Returns a value of the gateway's `/metrics`, or 0 if it is missing.
    async fn metric(&self, name: &str) -> f64 {
        let (_, metrics) = http(self.gateway.admin_address(), "GET", "/metrics", "").await;
        let line = metrics.lines().find(|line| line.starts_with(name));
        line.map_or(0.0, |line| {
            line.rsplit(' ').next().unwrap().parse().unwrap()
        })
    }
}

/// Returns whether the cache source of a healthy worker is its events.
fn follows_events(worker: &Value) -> bool {
    worker["cache_source"] == "events" && worker["state"] == "healthy"
}

/// Sends a request and returns the head and the body of the response, whose status must be 200.
async fn http(
    address: impl Into<Option<SocketAddr>>,
    method: &str,
    path: &str,
    body: &str,
) -> (String, String) {
    let mut stream = TcpStream::connect(address.into().unwrap()).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{response}");
    (head.to_owned(), body.to_owned())
}

/// Returns prompts that share prefixes and repeat, that end within blocks and at their ends, and
/// that exceed a small cache together.
fn prompts(count: u32) -> Vec<Vec<u32>> {
    (0..count)
        .map(|number| {
            let family = number % 5;
            let blocks = 2 + number * 7 % 11;
            let shared = (0..blocks * BLOCK).map(move |token| family * 100_000 + token);
            let own = (0..number * 3 % 20).map(move |token| 900_000 + number % 8 * 100 + token);
            shared.chain(own).collect()
        })
        .collect()
}

/// Asserts that all hits are predicted exactly, with an engine that evicts blocks.
async fn every_hit_is_predicted(events: KvEventsConfig) {
    let engine = Engine::start(engine_of(48, Some(events)));
    let fleet = Fleet::following(&engine).await;
    let mut hits = 0;
    for (number, prompt) in prompts(60).iter().enumerate() {
        let hit = fleet.send(prompt, 1 + number as u32 % 40).await;
        assert_eq!(hit.predicted, hit.actual, "request {number}");
        hits += hit.actual;
        fleet.catches_up(&engine).await;
        let cached = fleet.gateway.router().indexed_blocks() as u64;
        assert_eq!(cached, engine.metric("mock_engine:cached_blocks").await);
    }
    assert!(hits > 1000, "{hits} tokens");
    let worker = fleet.worker().await;
    assert_eq!(worker["kv_events"]["exact"], true, "{worker:#}");
    assert_eq!(worker["kv_events"]["gaps"], 0);
    assert_eq!(fleet.metric("foresee_worker_events_live").await, 1.0);
    assert!(fleet.metric("foresee_kv_event_batches_total").await >= 60.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_are_predicted_from_events_as_maps() {
    every_hit_is_predicted(with_replay()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_are_predicted_from_events_as_arrays_with_a_topic_and_without_replay() {
    let events = KvEventsConfig {
        layout: Layout::Array,
        topic: "kv@engine".to_owned(),
        ..publishing()
    };
    every_hit_is_predicted(events).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_events_are_replayed() {
    let events = KvEventsConfig {
        drop_every: NonZeroU64::new(3),
        ..with_replay()
    };
    let engine = Engine::start(engine_of(48, Some(events)));
    let fleet = Fleet::following(&engine).await;
    for prompt in prompts(40) {
        fleet.send(&prompt, 20).await;
    }
    fleet.catches_up(&engine).await;
    let cached = fleet.gateway.router().indexed_blocks() as u64;
    assert_eq!(cached, engine.metric("mock_engine:cached_blocks").await);
    let worker = fleet.worker().await;
    let events = &worker["kv_events"];
    assert_eq!(
        (&events["exact"], &events["lost"]),
        (&json!(true), &json!(0))
    );
    assert!(events["gaps"].as_u64().unwrap() > 3, "{worker:#}");
    assert!(fleet.metric("foresee_kv_event_gaps_total").await > 3.0);
    let hit = fleet.send(&prompts(40)[39], 1).await;
    assert_eq!(hit.predicted, hit.actual);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_events_without_replay_make_the_index_inexact() {
    let events = KvEventsConfig {
        drop_every: NonZeroU64::new(4),
        ..publishing()
    };
    let engine = Engine::start(engine_of(4096, Some(events)));
    let fleet = Fleet::following(&engine).await;
    for prompt in prompts(40) {
        fleet.send(&prompt, 20).await;
    }
    fleet
        .becomes(|worker| worker["kv_events"]["lost"].as_u64() > Some(3))
        .await;
    let worker = fleet.worker().await;
    assert_eq!(worker["kv_events"]["exact"], false, "{worker:#}");
    assert!(follows_events(&worker), "{worker:#}");
    // No block was evicted, so all indexed blocks are cached, but some cached blocks are not
    // indexed.
    let hit = fleet.send(&prompts(40)[39], 1).await;
    assert!(0 < hit.predicted && hit.predicted <= hit.actual, "{hit:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_from_before_the_subscription_are_replayed() {
    let engine = Engine::start(engine_of(4096, Some(with_replay())));
    let first = Fleet::following(&engine).await;
    let prompt = &prompts(11)[10];
    first.send(prompt, 30).await;
    first.gateway.shut_down().await;

    let second = Fleet::following(&engine).await;
    second.catches_up(&engine).await;
    let hit = second.send(prompt, 30).await;
    assert_eq!(hit.predicted, hit.actual);
    assert!(hit.actual > 0);
}

/// Asserts that the gateway clears the worker's cache when the engine restarts.
async fn a_restart_empties_the_cache(events: KvEventsConfig) {
    let mut engine = Engine::start(engine_of(4096, Some(events)));
    let fleet = Fleet::following(&engine).await;
    let prompt = &prompts(11)[10];
    for _ in 0..5 {
        fleet.send(prompt, 20).await;
    }
    fleet.catches_up(&engine).await;
    assert!(fleet.gateway.router().indexed_blocks() > 0);

    engine.stop().await;
    fleet.becomes(|worker| worker["state"] != "healthy").await;
    let has_replay = engine.config.kv_events.as_ref().unwrap().replay.is_some();
    engine.start_again();
    fleet
        .becomes(|worker| {
            follows_events(worker)
                && worker["kv_events"]["state"] == "live"
                && (!has_replay || worker["kv_events"]["last_sequence"].is_null())
        })
        .await;
    if has_replay {
        assert_eq!(fleet.gateway.router().indexed_blocks(), 0);
    } else {
        // Without replay, the restart shows in the next batch that the gateway receives. The engine
        // may publish its first batch before the gateway is subscribed again.
        fleet.receives_events(&engine).await;
    }
    for has_hit in [false, true] {
        let hit = fleet.send(prompt, 20).await;
        assert_eq!(
            (hit.predicted, hit.actual > 0),
            (hit.actual, has_hit),
            "{hit:?}"
        );
        fleet.catches_up(&engine).await;
    }
    if has_replay {
        assert_eq!(fleet.worker().await["kv_events"]["exact"], true);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_empties_the_cache_with_replay() {
    a_restart_empties_the_cache(with_replay()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_empties_the_cache_without_replay() {
    a_restart_empties_the_cache(publishing()).await;
}

/// Restarts the engine and sends requests directly to it, so that its sequence numbers may pass
/// those of the old process before the gateway reads any.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_noticed_even_if_the_new_process_is_ahead() {
    let mut engine = Engine::start(engine_of(4096, Some(with_replay())));
    let fleet = Fleet::following(&engine).await;
    fleet.send(&prompts(11)[10], 20).await;
    fleet.catches_up(&engine).await;

    engine.stop().await;
    engine.start_again();
    for prompt in prompts(20) {
        let body = json!({ "prompt": prompt, "max_tokens": 20, "ignore_eos": true });
        http(engine.address, "POST", "/v1/completions", &body.to_string()).await;
    }
    fleet.catches_up(&engine).await;
    let cached = fleet.gateway.router().indexed_blocks() as u64;
    assert_eq!(cached, engine.metric("mock_engine:cached_blocks").await);
    assert_eq!(fleet.worker().await["kv_events"]["exact"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_is_estimated_while_the_engine_publishes_no_events() {
    let events = with_replay();
    let mut engine = Engine::start(engine_of(4096, None));
    let replay = events.replay.as_ref().unwrap();
    let worker = format!(
        "{},kv-events={},replay={replay}",
        engine.address, events.endpoint
    );
    let fleet = Fleet::start(&worker);
    fleet
        .becomes(|worker| {
            worker["state"] == "healthy" && worker["kv_events"]["state"] == "connecting"
        })
        .await;
    let prompt = &prompts(11)[10];
    fleet.send(prompt, 20).await;
    let hit = fleet.send(prompt, 20).await;
    assert_eq!(hit.predicted, hit.actual);
    assert!(hit.predicted > 0);
    assert_eq!(fleet.worker().await["cache_source"], "estimated");
    assert_eq!(fleet.metric("foresee_worker_events_live").await, 0.0);

    engine.stop().await;
    engine.config.kv_events = Some(events);
    engine.start_again();
    fleet.becomes(follows_events).await;
    fleet.send(prompt, 20).await;
    fleet.catches_up(&engine).await;

    // The engine stops publishing.
    engine.stop().await;
    engine.config.kv_events = None;
    engine.start_again();
    fleet
        .becomes(|worker| worker["cache_source"] == "estimated" && worker["state"] == "healthy")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_is_estimated_if_the_engine_has_an_unsuitable_block_size() {
    let mut config = engine_of(4096, Some(with_replay()));
    config.engine.block_size = NonZeroU32::new(24).unwrap();
    let engine = Engine::start(config);
    let fleet = Fleet::following(&engine).await;
    fleet.send(&prompts(11)[10], 20).await;
    fleet
        .becomes(|worker| {
            worker["kv_events"]["state"] == "faulty" && worker["cache_source"] == "estimated"
        })
        .await;
}

/// Returns the frames of a batch that stores one block.
fn batch(sequence: u64, timestamp: f64, block: u32) -> [Bytes; 3] {
    let batch = EventBatch {
        timestamp: Some(timestamp),
        events: vec![Event::Stored(BlockStored {
            hashes: vec![BlockKey(u64::from(block) + 1)],
            tokens: (0..BLOCK).map(|token| block + token).collect(),
            block_size: BLOCK,
            ..BlockStored::default()
        })],
        ..EventBatch::default()
    };
    [
        Bytes::new(),
        Bytes::copy_from_slice(&sequence.to_be_bytes()),
        encode_batch(&batch, Layout::Map).into(),
    ]
}

fn message(frames: &[Bytes]) -> ZmqMessage {
    ZmqMessage::try_from(frames.to_vec()).unwrap()
}

/// Sends a batch repeatedly until the gateway receives it: the first ones are lost if the
/// subscription has not reached the publisher.
async fn publish_until_received(
    fleet: &Fleet,
    publisher: &mut PubSocket,
    sequence: u64,
    frames: &[Bytes],
) {
    let send = async {
        loop {
            publisher.send(message(frames)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = send => {}
        () = fleet.becomes(|worker| worker["kv_events"]["last_sequence"] == sequence) => {}
    }
}

/// Serves requests for a replay. For the first requested sequence number, `select` returns the
/// batches to send, and whether the end marker is sent.
async fn serve_replay(
    router: &mut RouterSocket,
    batches: &[[Bytes; 3]],
    select: impl Fn(usize) -> (Vec<usize>, bool),
) {
    loop {
        let request = router.recv().await.unwrap().into_vec();
        let from = parse_replay_request(&request[1..]).unwrap() as usize;
        let (sent, has_end) = select(from);
        let sent = sent
            .iter()
            .map(|index| [&[Bytes::new()][..], &batches[*index]].concat());
        let end = replay_end().map(Bytes::from).to_vec();
        for frames in sent.chain(has_end.then_some(end)) {
            let frames = [&request[..1], &frames].concat();
            // A client that gave up has closed its socket and will send another request.
            let _ = router.send(message(&frames)).await;
        }
    }
}

/// Starts the replay socket only after a batch was lost.
#[tokio::test(flavor = "multi_thread")]
async fn lost_events_are_replayed_as_soon_as_replay_works() {
    let (endpoint, replay) = (free_endpoint(), free_endpoint());
    let engine = Engine::start(engine_of(4096, None));
    let worker = format!("{},kv-events={endpoint},replay={replay}", engine.address);
    let mut publisher = PubSocket::new();
    publisher.bind(&endpoint).await.unwrap();
    let fleet = Fleet::start(&worker);
    fleet.becomes(follows_events).await;
    let batches: Vec<_> = (0..3).map(|n| batch(n, n as f64, n as u32)).collect();
    for sequence in [0, 2] {
        publish_until_received(
            &fleet,
            &mut publisher,
            sequence,
            &batches[sequence as usize],
        )
        .await;
    }
    assert_eq!(fleet.worker().await["kv_events"]["exact"], false);
    assert_eq!(fleet.gateway.router().indexed_blocks(), 2);

    let mut router = RouterSocket::new();
    router.bind(&replay).await.unwrap();
    tokio::select! {
        () = serve_replay(&mut router, &batches, |from| ((from..3).collect(), true)) => {}
        () = fleet.becomes(|worker| worker["kv_events"]["exact"] == true) => {}
    }
    assert_eq!(fleet.gateway.router().indexed_blocks(), 3);
}

/// Sends incomplete replays: a ROUTER socket drops messages that it cannot send fast enough.
#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_replay_is_requested_again() {
    let (endpoint, replay) = (free_endpoint(), free_endpoint());
    let engine = Engine::start(engine_of(4096, None));
    let worker = format!("{},kv-events={endpoint},replay={replay}", engine.address);
    let mut publisher = PubSocket::new();
    publisher.bind(&endpoint).await.unwrap();
    let mut router = RouterSocket::new();
    router.bind(&replay).await.unwrap();
    let fleet = Fleet::start(&worker);
    let batches: Vec<_> = (0..9).map(|n| batch(n, n as f64, n as u32)).collect();
    let select = |from| match from {
        0 => (vec![0, 1], false),
        2 => (vec![2, 4, 5, 6, 7, 8], true),
        _ => ((from..9).collect(), true),
    };
    tokio::select! {
        () = serve_replay(&mut router, &batches, select) => {}
        () = fleet.becomes(|worker| worker["kv_events"]["last_sequence"] == 8) => {}
    }
    assert_eq!(fleet.worker().await["kv_events"]["exact"], true);
    assert_eq!(fleet.gateway.router().indexed_blocks(), 9);
}

/// Loses more batches than blocks are indexed. The batches may have removed all of these blocks.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_gap_clears_the_index() {
    let endpoint = free_endpoint();
    let engine = Engine::start(engine_of(4096, None));
    let worker = format!("{},kv-events={endpoint}", engine.address);
    let mut publisher = PubSocket::new();
    publisher.bind(&endpoint).await.unwrap();
    let fleet = Fleet::start(&worker);
    for (sequence, cached) in [(0_u64, 1), (1, 2), (3, 3), (4, 4), (10, 1), (11, 2)] {
        let frames = batch(sequence, sequence as f64, sequence as u32);
        publish_until_received(&fleet, &mut publisher, sequence, &frames).await;
        assert_eq!(
            fleet.gateway.router().indexed_blocks(),
            cached,
            "{sequence}"
        );
    }
    assert_eq!(fleet.worker().await["kv_events"]["exact"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_an_engine_that_connects_are_received() {
    let endpoint = free_endpoint();
    let engine = Engine::start(engine_of(4096, None));
    let worker = format!("{},kv-events=bind:{endpoint}", engine.address);
    let fleet = Fleet::start(&worker);
    fleet
        .becomes(|worker| {
            worker["state"] == "healthy" && worker["kv_events"]["state"] == "connecting"
        })
        .await;
    let mut block_counts = HashSet::new();
    // The second process is recognized as a restart of the engine.
    for process in 0..2 {
        let mut publisher = PubSocket::new();
        publisher.connect(&endpoint).await.unwrap();
        fleet
            .becomes(|worker| follows_events(worker) && worker["kv_events"]["state"] == "live")
            .await;
        // Batches are lost until the subscription has reached the publisher.
        let mut sequence = 0_u64;
        let send = async {
            loop {
                let timestamp = f64::from(process) * 1e6 + sequence as f64;
                let frames = batch(sequence, timestamp, process as u32);
                publisher.send(message(&frames)).await.unwrap();
                sequence += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let batches = fleet.worker().await["kv_events"]["batches"].clone();
        let received = fleet.becomes(|worker| {
            worker["kv_events"]["batches"].as_u64() > batches.as_u64().map(|count| count + 3)
        });
        tokio::select! {
            () = send => {}
            () = received => {}
        }
        block_counts.insert(fleet.gateway.router().indexed_blocks());
        drop(publisher);
        fleet
            .becomes(|worker| worker["kv_events"]["state"] == "connecting")
            .await;
    }
    assert_eq!(
        block_counts,
        HashSet::from([1]),
        "only the block of the current process is indexed"
    );
}
