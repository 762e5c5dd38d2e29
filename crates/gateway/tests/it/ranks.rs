//! Several data-parallel ranks at one address, and workers that report where they publish events.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::TcpListener;
use std::time::Duration;

use crate::fake_worker::*;
use bytes::Bytes;
use foresee_engine::kv_events::{BlockKey, BlockStored, Event, EventBatch};
use foresee_gateway::{Gateway, WorkerConfig};
use foresee_mock::{Layout, encode_batch};
use serde_json::{Value, json};
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

const RANK: &str = "x-data-parallel-rank";

/// Starts a gateway with one engine, described by its address and `options`.
async fn gateway_of(worker: &FakeWorker, options: &str) -> Gateway {
    let mut config = config(&[]);
    let description = format!("{}{options}", worker.spec("gpu"));
    config.workers = vec![description.parse::<WorkerConfig>().unwrap()];
    gateway_with(config).await
}

/// Sends a request that names `rank`, if any. Returns the worker that it was booked on, and the rank in
/// the request to the engine.
async fn route_one(
    gateway: &Gateway,
    engine: &mut FakeWorker,
    rank: Option<&str>,
) -> (String, Option<String>) {
    let request = String::from_utf8(http("POST", CHAT, chat("hi", false))).unwrap();
    let request = match rank {
        Some(rank) => request.replacen("\r\n", &format!("\r\n{RANK}: {rank}\r\n"), 1),
        None => request,
    };
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = engine.request().await;
    let asked = exchange.head.get(RANK).map(str::to_owned);
    exchange.respond_json("{}").await;
    let response = client.response().await;
    let worker = response.head.get("x-foresee-worker").unwrap();
    (worker.to_owned(), asked)
}

#[tokio::test]
async fn each_rank_is_a_worker_and_requests_are_pinned_to_it() {
    let mut engine = FakeWorker::start().await;
    // Each rank of vLLM reports the sum of all ranks.
    engine.set_metrics(
        "vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"200\"} 1\n\
         vllm:cache_config_info{engine=\"1\",block_size=\"16\",num_gpu_blocks=\"200\"} 1\n",
    );
    let gateway = gateway_of(&engine, ",ranks=2").await;
    for (name, rank) in [("gpu/0", 0), ("gpu/1", 1)] {
        let worker = worker_json(&gateway, name).await.unwrap();
        assert_eq!(worker["url"], format!("http://{}", engine.address));
        assert_eq!(
            (&worker["rank"], &worker["capacity_blocks"]),
            (&json!(rank), &json!(99))
        );
    }
    for turn in 0..4 {
        let (worker, asked) = route_one(&gateway, &mut engine, None).await;
        let rank = turn % 2;
        assert_eq!(
            (worker, asked),
            (format!("gpu/{rank}"), Some(rank.to_string()))
        );
    }
}

#[tokio::test]
async fn a_client_can_choose_a_rank() {
    let mut engine = FakeWorker::start().await;
    let gateway = gateway_of(&engine, ",ranks=3").await;
    for rank in ["2", "2", "0", "2"] {
        let (worker, asked) = route_one(&gateway, &mut engine, Some(rank)).await;
        assert_eq!(
            (worker, asked.as_deref()),
            (format!("gpu/{rank}"), Some(rank))
        );
    }
    // An invalid rank is passed on, so that the engine reports the error.
    for rank in ["3", "first"] {
        let (_, asked) = route_one(&gateway, &mut engine, Some(rank)).await;
        assert_eq!(asked.as_deref(), Some(rank));
    }
}

#[tokio::test]
async fn a_chosen_rank_is_kept_when_its_worker_fails() {
    let mut engine = FakeWorker::start().await;
    let gateway = gateway_of(&engine, ",ranks=2").await;
    let request = String::from_utf8(http("POST", CHAT, chat("hi", false))).unwrap();
    let request = request.replacen("\r\n", &format!("\r\n{RANK}: 1\r\n"), 1);
    let mut client = Client::sending(gateway.address(), request).await;
    // A lost connection is retried once, and never on the other rank.
    for _ in 0..2 {
        let exchange = engine.request().await;
        assert_eq!(exchange.head.get(RANK), Some("1"));
        exchange.reset();
    }
    client.response().await.error(502);
    until_released(&gateway).await;
}

#[tokio::test]
async fn all_ranks_of_an_engine_join_and_leave_together() {
    let engine = FakeWorker::start().await;
    let gateway = gateway_with(config(&[&engine])).await;
    let admin = async |method: &str, path: &str, body: &str| {
        call(gateway.admin_address(), method, path, body).await
    };
    let url = json!({ "url": engine.spec("gpu") + ",ranks=3" }).to_string();
    let response = admin("POST", "/admin/workers", &url).await;
    assert_eq!(
        (response.status(), &response.json()["name"]),
        (202, &json!("gpu"))
    );
    assert_eq!(workers(&gateway).len(), 4);
    // The name is taken, for an engine with ranks and for one without.
    for taken in [",ranks=2", ""] {
        let url = json!({ "url": engine.spec("gpu") + taken }).to_string();
        admin("POST", "/admin/workers", &url).await.error(409);
    }
    let response = admin("DELETE", "/admin/workers/gpu/1", "").await;
    assert_eq!(response.status(), 202);
    until("one rank to be removed", || workers(&gateway).len() == 3).await;
    assert_eq!(
        admin("DELETE", "/admin/workers/gpu", "").await.status(),
        202
    );
    until("all ranks to be removed", || workers(&gateway).len() == 1).await;
    admin("DELETE", "/admin/workers/gpu", "").await.error(404);

    let url = json!({ "url": engine.spec("other/1") }).to_string();
    assert_eq!(admin("POST", "/admin/workers", &url).await.status(), 202);
    let url = json!({ "url": engine.spec("other") + ",ranks=2" }).to_string();
    admin("POST", "/admin/workers", &url).await.error(409);
    assert_eq!(
        workers(&gateway).len(),
        2,
        "either all ranks are added or none"
    );
}

// Events

/// PUB socket, as an engine has it.
struct Publisher {
    socket: PubSocket,
    port: u16,
}

impl Publisher {
    async fn start() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut socket = PubSocket::new();
        let endpoint = format!("tcp://127.0.0.1:{port}");
        socket.bind(&endpoint).await.unwrap();
        Self { socket, port }
    }

    /// Publishes that a block was stored whose tokens are all `sequence`.
    async fn stored(&mut self, topic: &str, sequence: u64, rank: Option<u32>) {
        let batch = EventBatch {
            timestamp: Some(sequence as f64),
            events: vec![Event::Stored(BlockStored {
                hashes: vec![BlockKey(sequence)],
                tokens: vec![sequence as u32; 16],
                block_size: 16,
                ..BlockStored::default()
            })],
            data_parallel_rank: rank,
            ..EventBatch::default()
        };
        let frames = [
            topic.as_bytes().to_vec(),
            sequence.to_be_bytes().to_vec(),
            encode_batch(&batch, Layout::Map),
        ];
        let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
        let message = ZmqMessage::try_from(frames).unwrap();
        self.socket.send(message).await.unwrap();
    }
}

/// Waits until the admin API shows a worker as `is_expected` requires, and returns it.
async fn until_worker(
    gateway: &Gateway,
    name: &str,
    is_expected: impl Fn(&Value) -> bool,
) -> Value {
    let polling = async {
        loop {
            if let Some(worker) = worker_json(gateway, name).await
                && is_expected(&worker)
            {
                return worker;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within("a worker to be as expected", polling).await
}

/// Returns the number of cached blocks that are predicted on `gpu` for a request for `model` with the
/// block of the batch `sequence`.
async fn predicted_blocks(gateway: &Gateway, model: &str, sequence: u64) -> Value {
    let prompt = vec![sequence as u32; 17];
    let body = json!({"model": model, "prompt": prompt}).to_string();
    let explained = call(gateway.admin_address(), "POST", "/admin/explain", body).await;
    let explained = explained.json();
    let mut candidates = explained["candidates"].as_array().into_iter().flatten();
    let candidate = candidates.find(|candidate| candidate["worker"] == "gpu");
    candidate.map_or(Value::Null, |candidate| {
        candidate["overlap_cached_blocks"].clone()
    })
}

/// Publishes until the gateway receives a batch: batches sent before the subscription arrives are lost.
async fn publish_until_received(
    gateway: &Gateway,
    publisher: &mut Publisher,
    topic: &str,
    rank: Option<u32>,
) {
    let mut sequence = 0;
    until_async("events to be received", async || {
        publisher.stored(topic, sequence, rank).await;
        sequence += 1;
        let worker = worker_json(gateway, "gpu").await.unwrap();
        worker["cached_blocks"] != 0
    })
    .await;
}

async fn until_async(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Returns the server info of an SGLang that publishes events.
fn sglang(publisher: &Publisher, topic: &str) -> Value {
    let config = json!({
        "publisher": "zmq", "endpoint": format!("tcp://*:{}", publisher.port), "topic": topic,
    });
    json!({
        "page_size": 16, "max_total_num_tokens": 2304, "kv_events_config": config.to_string(),
    })
}

#[tokio::test]
async fn the_event_source_of_sglang_is_discovered() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    engine.set_server_info(&sglang(&publisher, "kv"));
    let gateway = gateway_of(&engine, "").await;
    let live = |worker: &Value| worker["kv_events"]["state"] == "live";
    let worker = until_worker(&gateway, "gpu", live).await;
    assert_eq!(worker["capacity_blocks"], 144);
    let source = format!("tcp://127.0.0.1:{}", publisher.port);
    assert_eq!(worker["kv_events"]["source"], source);
    assert_eq!(worker["kv_events"]["discovered"], true);
    publish_until_received(&gateway, &mut publisher, "kv", None).await;
    assert_eq!(
        worker_json(&gateway, "gpu").await.unwrap()["cache_source"],
        "events"
    );
}

#[tokio::test]
async fn the_event_source_of_each_vllm_rank_is_discovered() {
    let publishers = [Publisher::start().await, Publisher::start().await];
    let source = |publisher: &Publisher| json!({"endpoint": format!("tcp://*:{}", publisher.port)});
    let engine = FakeWorker::start().await;
    engine.set_model_list(r#"{"data": [{"id": "m", "owned_by": "vllm"}]}"#);
    engine.set_event_sources(&json!({"0": source(&publishers[0]), "1": source(&publishers[1])}));
    let gateway = gateway_of(&engine, ",ranks=2").await;
    for (name, publisher) in ["gpu/0", "gpu/1"].into_iter().zip(&publishers) {
        let worker =
            until_worker(&gateway, name, |worker| worker["cache_source"] == "events").await;
        let source = format!("tcp://127.0.0.1:{}", publisher.port);
        assert_eq!(worker["kv_events"]["source"], source);
    }
    gateway.shut_down().await;
    // If two ranks are configured as one worker, neither rank's events describe that worker.
    let gateway = gateway_of(&engine, "").await;
    let worker = worker_json(&gateway, "gpu").await.unwrap();
    assert_eq!(worker["kv_events"], Value::Null);
}

/// vLLM reports `tcp://*:0` as the address that it became.
#[tokio::test]
async fn an_event_source_of_vllm_at_a_dynamic_port_is_discovered() {
    let publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    engine.set_model_list(r#"{"data": [{"id": "m", "owned_by": "vllm"}]}"#);
    let endpoint = format!("tcp://127.0.0.1:{}", publisher.port);
    engine.set_event_sources(&json!({"0": {"endpoint": endpoint}}));
    let mut config = config(&[]);
    let by_name = format!("http://localhost:{},name=gpu", engine.address.port());
    config.workers = vec![by_name.parse::<WorkerConfig>().unwrap()];
    let gateway = gateway_with(config).await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
}

#[tokio::test]
async fn the_eviction_rule_follows_the_engine_unless_configured() {
    let engine = FakeWorker::start().await;
    for (owner, options, eviction) in [
        ("vllm", "", "queue"),
        ("sglang", "", "radix"),
        ("sglang", ",kv-events=off", "radix"),
        ("sglang", ",eviction=queue", "queue"),
        ("unknown", ",eviction=radix", "radix"),
    ] {
        let models = json!({"data": [{"id": "m", "owned_by": owner}]});
        engine.set_model_list(&models.to_string());
        let gateway = gateway_of(&engine, options).await;
        let worker = until_worker(&gateway, "gpu", |worker| worker["state"] == "healthy").await;
        assert_eq!(worker["eviction"], eviction, "{owner}{options}");
        gateway.shut_down().await;
    }
}

#[tokio::test]
async fn sglang_can_move_or_end_its_events_at_a_restart() {
    let (first, second) = (Publisher::start().await, Publisher::start().await);
    let engine = FakeWorker::start().await;
    engine.set_server_info(&sglang(&first, ""));
    let gateway = gateway_of(&engine, "").await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
    // Every restart is observed as a failed health check.
    let restart = async |info: &Value| {
        engine.set_healthy(false);
        until_worker(&gateway, "gpu", |worker| worker["state"] == "unhealthy").await;
        engine.set_server_info(info);
        engine.set_healthy(true);
    };
    restart(&sglang(&second, "")).await;
    let moved = format!("tcp://127.0.0.1:{}", second.port);
    until_worker(&gateway, "gpu", |worker| {
        worker["kv_events"]["source"] == moved && worker["cache_source"] == "events"
    })
    .await;
    restart(&json!({"page_size": 16, "kv_events_config": null})).await;
    until_worker(&gateway, "gpu", |worker| {
        worker["kv_events"].is_null() && worker["cache_source"] == "estimated"
    })
    .await;
}

#[tokio::test]
async fn events_are_not_discovered_if_they_are_off() {
    let publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    engine.set_server_info(&sglang(&publisher, ""));
    let gateway = gateway_of(&engine, ",kv-events=off").await;
    let worker = worker_json(&gateway, "gpu").await.unwrap();
    assert_eq!(worker["state"], "healthy");
    assert_eq!(worker["kv_events"], Value::Null);
}

#[tokio::test]
async fn only_the_configured_topic_is_followed() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    let options = format!(",kv-events=tcp://127.0.0.1:{},topic=kv@1", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
    publish_until_received(&gateway, &mut publisher, "kv@1", None).await;
    let last_sequence = worker_json(&gateway, "gpu").await.unwrap()["kv_events"]["last_sequence"]
        .as_u64()
        .unwrap();
    // Batches of a topic with the same prefix and of no topic. If they were applied, there would be a
    // gap.
    publisher.stored("kv@10", last_sequence + 7, None).await;
    publisher.stored("", last_sequence + 8, None).await;
    publisher.stored("kv@1", last_sequence + 1, None).await;
    let is_next = |worker: &Value| worker["kv_events"]["last_sequence"] == last_sequence + 1;
    let worker = until_worker(&gateway, "gpu", is_next).await;
    assert_eq!(worker["kv_events"]["gaps"], 0);
}

#[tokio::test]
async fn blocks_are_found_under_every_name_of_a_model() {
    let mut publisher = Publisher::start().await;
    let mut engine = FakeWorker::start().await;
    let served = json!({"data": [
        {"id": "m", "root": "/models/m", "parent": null},
        {"id": "alias", "root": "/models/m", "parent": null},
        {"id": "adapter", "root": "/models/m", "parent": "m"},
        {"id": "other", "root": "/models/other", "parent": null},
        {"id": "rootless"},
    ]});
    engine.set_model_list(&served.to_string());
    let options = format!(",kv-events=tcp://127.0.0.1:{}", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
    publish_until_received(&gateway, &mut publisher, "", None).await;
    let worker = worker_json(&gateway, "gpu").await.unwrap();
    let sequence = worker["kv_events"]["last_sequence"].as_u64().unwrap();
    for (model, blocks) in [
        ("m", 1),
        ("alias", 1),
        ("adapter", 0),
        ("other", 0),
        ("rootless", 0),
    ] {
        assert_eq!(
            predicted_blocks(&gateway, model, sequence).await,
            blocks,
            "{model}"
        );
    }
    // The request reaches the engine with the name that the client used.
    let body = json!({"model": "alias", "prompt": vec![sequence; 17]}).to_string();
    let request = http("POST", "/v1/completions", &body);
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = engine.request().await;
    assert_eq!(exchange.body, body.as_bytes());
    exchange.respond_json("{}").await;
    let response = client.response().await;
    assert_eq!(response.head.get("x-foresee-overlap-tokens"), Some("16"));
}

/// A name that is an alias on one worker and a model of its own on another is hashed as itself.
#[tokio::test]
async fn a_name_that_workers_resolve_differently_is_not_an_alias() {
    let mut publisher = Publisher::start().await;
    let (first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    first.set_model_list(r#"{"data": [{"id": "m", "root": "/m"}, {"id": "n", "root": "/m"}]}"#);
    second.set_model_list(r#"{"data": [{"id": "n", "root": "/m"}]}"#);
    let mut config = config(&[&first]);
    let (spec, port) = (second.spec("gpu"), publisher.port);
    let description = format!("{spec},kv-events=tcp://127.0.0.1:{port}");
    config.workers.push(description.parse().unwrap());
    let gateway = gateway_with(config).await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
    publish_until_received(&gateway, &mut publisher, "", None).await;
    let worker = worker_json(&gateway, "gpu").await.unwrap();
    let sequence = worker["kv_events"]["last_sequence"].as_u64().unwrap();
    assert_eq!(predicted_blocks(&gateway, "n", sequence).await, 1);
}

#[tokio::test]
async fn blocks_are_known_under_a_model_that_replaced_another() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    let options = format!(",kv-events=tcp://127.0.0.1:{}", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
    publish_until_received(&gateway, &mut publisher, "", None).await;
    // No health check fails.
    engine.set_model_list(r#"{"data": [{"id": "n"}]}"#);
    let mut sequence = 1000;
    until_async("the new model's blocks to be known", async || {
        sequence += 1;
        publisher.stored("", sequence, None).await;
        // The previous batch has had time to arrive.
        predicted_blocks(&gateway, "n", sequence - 1).await == 1
    })
    .await;
}

/// Responses that do not report cached tokens still show that blocks were filled.
#[tokio::test]
async fn a_stream_without_the_configured_topic_is_silent() {
    let mut publisher = Publisher::start().await;
    let mut engine = FakeWorker::start().await;
    let (spec, port) = (engine.spec("gpu"), publisher.port);
    let mut config = config(&[]);
    config.events_grace = Duration::from_millis(50);
    let description = format!("{spec},kv-events=tcp://127.0.0.1:{port},topic=kv");
    config.workers = vec![description.parse::<WorkerConfig>().unwrap()];
    let gateway = gateway_with(config).await;
    until_worker(&gateway, "gpu", |worker| worker["cache_source"] == "events").await;
    let mut sent = 0;
    until_async("the silence to be detected", async || {
        publisher.stored("kv@1", sent, None).await;
        let prompt = format!("{sent} and so on ").repeat(100);
        let request = http("POST", CHAT, chat(&prompt, false));
        let mut client = Client::sending(gateway.address(), request).await;
        engine.request().await.respond_json("{}").await;
        client.response().await;
        sent += 1;
        let worker = worker_json(&gateway, "gpu").await.unwrap();
        worker["kv_events"]["state"] == "silent" && worker["cache_source"] == "estimated"
    })
    .await;
    publish_until_received(&gateway, &mut publisher, "kv", None).await;
    let worker = worker_json(&gateway, "gpu").await.unwrap();
    assert_eq!(worker["kv_events"]["state"], "live");
    assert_eq!(worker["cache_source"], "events");
}

#[tokio::test]
async fn events_of_another_rank_are_not_applied() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    let options = format!(",ranks=1,kv-events=tcp://127.0.0.1:{}", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    let name = "gpu/0";
    until_worker(&gateway, name, |worker| worker["cache_source"] == "events").await;
    let mut sequence = 0;
    until_async("the fault to be detected", async || {
        publisher.stored("", sequence, Some(1)).await;
        sequence += 1;
        let worker = worker_json(&gateway, name).await.unwrap();
        worker["kv_events"]["state"] == "faulty"
    })
    .await;
    assert_eq!(
        worker_json(&gateway, name).await.unwrap()["cached_blocks"],
        0
    );
}
