//! Several data-parallel ranks behind one address, and workers that say where their events are.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::TcpListener;
use std::time::Duration;

use crate::fake_worker::*;
use bytes::Bytes;
use foresee_engine::kv_events::{BlockKey, BlockStored, Event, EventBatch, Layout, encode_batch};
use foresee_gateway::{Gateway, WorkerConfig};
use serde_json::{Value, json};
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

const RANK: &str = "x-data-parallel-rank";

/// A gateway before one engine.
async fn gateway_of(worker: &FakeWorker, options: &str) -> Gateway {
    let mut config = config(&[]);
    let written = format!("{}{options}", worker.spec("gpu"));
    config.workers = vec![written.parse::<WorkerConfig>().unwrap()];
    gateway_with(config).await
}

/// Sends a request, with a rank of the client's choice, and returns the worker that it was booked
/// on and the rank that the engine was asked for.
async fn placed(
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
    exchange.answer_json("{}").await;
    let answer = client.answer().await;
    let worker = answer.head.get("x-foresee-worker").unwrap();
    (worker.to_owned(), asked)
}

#[tokio::test]
async fn each_rank_is_a_worker_and_is_asked_for() {
    let mut engine = FakeWorker::start().await;
    // Each rank of vLLM tells the sum of all.
    engine.set_metrics(
        "vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"200\"} 1\n\
         vllm:cache_config_info{engine=\"1\",block_size=\"16\",num_gpu_blocks=\"200\"} 1\n",
    );
    let gateway = gateway_of(&engine, ",ranks=2").await;
    for (name, rank) in [("gpu/0", 0), ("gpu/1", 1)] {
        let worker = shown(&gateway, name).await.unwrap();
        assert_eq!(worker["url"], format!("http://{}", engine.address));
        assert_eq!(
            (&worker["rank"], &worker["capacity_blocks"]),
            (&json!(rank), &json!(99))
        );
    }
    for turn in 0..4 {
        let (worker, asked) = placed(&gateway, &mut engine, None).await;
        let rank = turn % 2;
        assert_eq!(
            (worker, asked),
            (format!("gpu/{rank}"), Some(rank.to_string()))
        );
    }
}

#[tokio::test]
async fn a_client_may_name_a_rank() {
    let mut engine = FakeWorker::start().await;
    let gateway = gateway_of(&engine, ",ranks=3").await;
    for rank in ["2", "2", "0", "2"] {
        let (worker, asked) = placed(&gateway, &mut engine, Some(rank)).await;
        assert_eq!(
            (worker, asked.as_deref()),
            (format!("gpu/{rank}"), Some(rank))
        );
    }
    // The engine is to say what is wrong with it.
    for rank in ["3", "first"] {
        let (_, asked) = placed(&gateway, &mut engine, Some(rank)).await;
        assert_eq!(asked.as_deref(), Some(rank));
    }
}

#[tokio::test]
async fn a_named_rank_is_kept_when_its_worker_fails() {
    let mut engine = FakeWorker::start().await;
    let gateway = gateway_of(&engine, ",ranks=2").await;
    let request = String::from_utf8(http("POST", CHAT, chat("hi", false))).unwrap();
    let request = request.replacen("\r\n", &format!("\r\n{RANK}: 1\r\n"), 1);
    let mut client = Client::sending(gateway.address(), request).await;
    // A broken connection is tried once more, and never on the other rank.
    for _ in 0..2 {
        let exchange = engine.request().await;
        assert_eq!(exchange.head.get(RANK), Some("1"));
        exchange.reset();
    }
    client.answer().await.error(502);
    freed(&gateway).await;
}

#[tokio::test]
async fn ranks_come_and_go_together() {
    let engine = FakeWorker::start().await;
    let gateway = gateway_with(config(&[&engine])).await;
    let admin = async |method: &str, path: &str, body: &str| {
        call(gateway.admin_address(), method, path, body).await
    };
    let url = json!({ "url": engine.spec("gpu") + ",ranks=3" }).to_string();
    let answer = admin("POST", "/admin/workers", &url).await;
    assert_eq!(
        (answer.status(), &answer.json()["name"]),
        (202, &json!("gpu"))
    );
    assert_eq!(workers(&gateway).len(), 4);
    // The same name again, as ranks or as one.
    for taken in [",ranks=2", ""] {
        let url = json!({ "url": engine.spec("gpu") + taken }).to_string();
        admin("POST", "/admin/workers", &url).await.error(400);
    }
    let answer = admin("DELETE", "/admin/workers/gpu/1", "").await;
    assert_eq!(answer.status(), 202);
    until("one rank to be gone", || workers(&gateway).len() == 3).await;
    assert_eq!(
        admin("DELETE", "/admin/workers/gpu", "").await.status(),
        202
    );
    until("all ranks to be gone", || workers(&gateway).len() == 1).await;
    admin("DELETE", "/admin/workers/gpu", "").await.error(404);

    let url = json!({ "url": engine.spec("other/1") }).to_string();
    assert_eq!(admin("POST", "/admin/workers", &url).await.status(), 202);
    let url = json!({ "url": engine.spec("other") + ",ranks=2" }).to_string();
    admin("POST", "/admin/workers", &url).await.error(400);
    assert_eq!(workers(&gateway).len(), 2, "all ranks are added, or none");
}

// Events

/// A PUB socket, as an engine has it.
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

    /// Says that a block of these tokens is cached.
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

/// Waits until a worker is shown as expected.
async fn becomes(gateway: &Gateway, name: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let looking = async {
        loop {
            if let Some(worker) = shown(gateway, name).await
                && is_so(&worker)
            {
                return worker;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within("a worker to become what it should", looking).await
}

/// How many blocks of the publisher's batch `sequence` a request for `model` is predicted to find
/// on `gpu`.
async fn found(gateway: &Gateway, model: &str, sequence: u64) -> Value {
    let prompt = vec![sequence as u32; 17];
    let body = json!({"model": model, "prompt": prompt}).to_string();
    let explained = call(gateway.admin_address(), "POST", "/admin/explain", body).await;
    let explained = explained.json();
    let mut candidates = explained["candidates"].as_array().into_iter().flatten();
    let on_it = candidates.find(|it| it["worker"] == "gpu");
    on_it.map_or(Value::Null, |it| it["overlap_cached_blocks"].clone())
}

/// Publishes until it is heard: what is sent before a subscription has arrived is lost.
async fn until_heard(gateway: &Gateway, publisher: &mut Publisher, topic: &str, rank: Option<u32>) {
    let mut sequence = 0;
    until_async("events to be heard", async || {
        publisher.stored(topic, sequence, rank).await;
        sequence += 1;
        let worker = shown(gateway, "gpu").await.unwrap();
        worker["cached_blocks"] != 0
    })
    .await;
}

async fn until_async(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

fn sglang(publisher: &Publisher, topic: &str) -> Value {
    let config = json!({
        "publisher": "zmq", "endpoint": format!("tcp://*:{}", publisher.port), "topic": topic,
    });
    json!({
        "page_size": 16, "max_total_num_tokens": 2304, "kv_events_config": config.to_string(),
    })
}

#[tokio::test]
async fn an_sglang_is_followed_where_it_says() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    engine.set_server_info(&sglang(&publisher, "kv"));
    let gateway = gateway_of(&engine, "").await;
    let live = |worker: &Value| worker["kv_events"]["state"] == "live";
    let worker = becomes(&gateway, "gpu", live).await;
    assert_eq!(worker["capacity_blocks"], 144);
    let source = format!("tcp://127.0.0.1:{}", publisher.port);
    assert_eq!(worker["kv_events"]["source"], source);
    assert_eq!(worker["kv_events"]["discovered"], true);
    until_heard(&gateway, &mut publisher, "kv", None).await;
    assert_eq!(
        shown(&gateway, "gpu").await.unwrap()["cache_source"],
        "events"
    );
}

#[tokio::test]
async fn each_rank_of_a_vllm_is_followed_where_it_says() {
    let publishers = [Publisher::start().await, Publisher::start().await];
    let source = |publisher: &Publisher| json!({"endpoint": format!("tcp://*:{}", publisher.port)});
    let engine = FakeWorker::start().await;
    engine.set_model_list(r#"{"data": [{"id": "m", "owned_by": "vllm"}]}"#);
    engine.set_event_sources(&json!({"0": source(&publishers[0]), "1": source(&publishers[1])}));
    let gateway = gateway_of(&engine, ",ranks=2").await;
    for (name, publisher) in ["gpu/0", "gpu/1"].into_iter().zip(&publishers) {
        let worker = becomes(&gateway, name, |it| it["cache_source"] == "events").await;
        let source = format!("tcp://127.0.0.1:{}", publisher.port);
        assert_eq!(worker["kv_events"]["source"], source);
    }
    gateway.shut_down().await;
    // Of two ranks taken for one worker, neither's events are its own.
    let gateway = gateway_of(&engine, "").await;
    let worker = shown(&gateway, "gpu").await.unwrap();
    assert_eq!(worker["kv_events"], Value::Null);
}

/// `tcp://*:0` is told as the address it became.
#[tokio::test]
async fn a_vllm_is_followed_at_a_port_of_the_systems_choice() {
    let publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    engine.set_model_list(r#"{"data": [{"id": "m", "owned_by": "vllm"}]}"#);
    let endpoint = format!("tcp://127.0.0.1:{}", publisher.port);
    engine.set_event_sources(&json!({"0": {"endpoint": endpoint}}));
    let mut config = config(&[]);
    let by_name = format!("http://localhost:{},name=gpu", engine.address.port());
    config.workers = vec![by_name.parse::<WorkerConfig>().unwrap()];
    let gateway = gateway_with(config).await;
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
}

#[tokio::test]
async fn an_engine_evicts_as_it_says_it_does_unless_it_is_written() {
    let engine = FakeWorker::start().await;
    for (owner, options, eviction) in [
        ("vllm", "", "queue"),
        ("sglang", "", "radix"),
        ("sglang", ",kv-events=off", "radix"),
        ("sglang", ",eviction=queue", "queue"),
        ("somebody", ",eviction=radix", "radix"),
    ] {
        let models = json!({"data": [{"id": "m", "owned_by": owner}]});
        engine.set_model_list(&models.to_string());
        let gateway = gateway_of(&engine, options).await;
        let worker = becomes(&gateway, "gpu", |it| it["state"] == "healthy").await;
        assert_eq!(worker["eviction"], eviction, "{owner}{options}");
        gateway.shut_down().await;
    }
}

#[tokio::test]
async fn an_sglang_may_move_its_events_or_end_them() {
    let (first, second) = (Publisher::start().await, Publisher::start().await);
    let engine = FakeWorker::start().await;
    engine.set_server_info(&sglang(&first, ""));
    let gateway = gateway_of(&engine, "").await;
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
    // Every restart shows as a failing probe.
    let restart = async |info: &Value| {
        engine.set_healthy(false);
        becomes(&gateway, "gpu", |it| it["state"] == "unhealthy").await;
        engine.set_server_info(info);
        engine.set_healthy(true);
    };
    restart(&sglang(&second, "")).await;
    let moved = format!("tcp://127.0.0.1:{}", second.port);
    becomes(&gateway, "gpu", |it| {
        it["kv_events"]["source"] == moved && it["cache_source"] == "events"
    })
    .await;
    restart(&json!({"page_size": 16, "kv_events_config": null})).await;
    becomes(&gateway, "gpu", |it| {
        it["kv_events"].is_null() && it["cache_source"] == "shadow"
    })
    .await;
}

#[tokio::test]
async fn events_are_not_looked_for_where_they_are_off() {
    let publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    engine.set_server_info(&sglang(&publisher, ""));
    let gateway = gateway_of(&engine, ",kv-events=off").await;
    let worker = shown(&gateway, "gpu").await.unwrap();
    assert_eq!(worker["state"], "healthy");
    assert_eq!(worker["kv_events"], Value::Null);
}

#[tokio::test]
async fn only_the_topic_asked_for_is_followed() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    let options = format!(",kv-events=tcp://127.0.0.1:{},topic=kv@1", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
    until_heard(&gateway, &mut publisher, "kv@1", None).await;
    let heard = shown(&gateway, "gpu").await.unwrap()["kv_events"]["last_sequence"]
        .as_u64()
        .unwrap();
    // One that begins the same, and another's; were they taken, they would be a gap.
    publisher.stored("kv@10", heard + 7, None).await;
    publisher.stored("", heard + 8, None).await;
    publisher.stored("kv@1", heard + 1, None).await;
    let next = |it: &Value| it["kv_events"]["last_sequence"] == heard + 1;
    let worker = becomes(&gateway, "gpu", next).await;
    assert_eq!(worker["kv_events"]["gaps"], 0);
}

#[tokio::test]
async fn what_a_model_is_called_makes_no_difference_to_its_blocks() {
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
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
    until_heard(&gateway, &mut publisher, "", None).await;
    let worker = shown(&gateway, "gpu").await.unwrap();
    let sequence = worker["kv_events"]["last_sequence"].as_u64().unwrap();
    for (model, blocks) in [
        ("m", 1),
        ("alias", 1),
        ("adapter", 0),
        ("other", 0),
        ("rootless", 0),
    ] {
        assert_eq!(found(&gateway, model, sequence).await, blocks, "{model}");
    }
    // The engine is asked for what the client wrote.
    let body = json!({"model": "alias", "prompt": vec![sequence; 17]}).to_string();
    let request = http("POST", "/v1/completions", &body);
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = engine.request().await;
    assert_eq!(exchange.body, body.as_bytes());
    exchange.answer_json("{}").await;
    let answer = client.answer().await;
    assert_eq!(answer.head.get("x-foresee-overlap-tokens"), Some("16"));
}

/// A name that is one worker's alias and another's own is hashed as it is.
#[tokio::test]
async fn workers_that_differ_on_a_name_leave_it_as_it_is() {
    let mut publisher = Publisher::start().await;
    let (one, two) = (FakeWorker::start().await, FakeWorker::start().await);
    one.set_model_list(r#"{"data": [{"id": "m", "root": "/m"}, {"id": "n", "root": "/m"}]}"#);
    two.set_model_list(r#"{"data": [{"id": "n", "root": "/m"}]}"#);
    let mut config = config(&[&one]);
    let (spec, port) = (two.spec("gpu"), publisher.port);
    let followed = format!("{spec},kv-events=tcp://127.0.0.1:{port}");
    config.workers.push(followed.parse().unwrap());
    let gateway = gateway_with(config).await;
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
    until_heard(&gateway, &mut publisher, "", None).await;
    let worker = shown(&gateway, "gpu").await.unwrap();
    let sequence = worker["kv_events"]["last_sequence"].as_u64().unwrap();
    assert_eq!(found(&gateway, "n", sequence).await, 1);
}

#[tokio::test]
async fn a_model_put_in_place_of_another_is_the_one_whose_blocks_are_known() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    let options = format!(",kv-events=tcp://127.0.0.1:{}", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
    until_heard(&gateway, &mut publisher, "", None).await;
    // Its probes see no failure.
    engine.set_model_list(r#"{"data": [{"id": "n"}]}"#);
    let mut sequence = 1000;
    until_async("the new model's blocks to be known", async || {
        sequence += 1;
        publisher.stored("", sequence, None).await;
        // The one before has had time to arrive.
        found(&gateway, "n", sequence - 1).await == 1
    })
    .await;
}

/// Where answers do not report what they found cached, they still tell that blocks were filled.
#[tokio::test]
async fn what_is_published_under_another_topic_is_silence() {
    let mut publisher = Publisher::start().await;
    let mut engine = FakeWorker::start().await;
    let (spec, port) = (engine.spec("gpu"), publisher.port);
    let mut config = config(&[]);
    config.events_grace = Duration::from_millis(50);
    let written = format!("{spec},kv-events=tcp://127.0.0.1:{port},topic=kv");
    config.workers = vec![written.parse::<WorkerConfig>().unwrap()];
    let gateway = gateway_with(config).await;
    becomes(&gateway, "gpu", |it| it["cache_source"] == "events").await;
    let mut sent = 0;
    until_async("the silence to be noticed", async || {
        publisher.stored("kv@1", sent, None).await;
        let prompt = format!("{sent} and so on ").repeat(100);
        let request = http("POST", CHAT, chat(&prompt, false));
        let mut client = Client::sending(gateway.address(), request).await;
        engine.request().await.answer_json("{}").await;
        client.answer().await;
        sent += 1;
        let worker = shown(&gateway, "gpu").await.unwrap();
        worker["kv_events"]["state"] == "silent" && worker["cache_source"] == "shadow"
    })
    .await;
    until_heard(&gateway, &mut publisher, "kv", None).await;
    let worker = shown(&gateway, "gpu").await.unwrap();
    assert_eq!(worker["kv_events"]["state"], "live");
    assert_eq!(worker["cache_source"], "events");
}

#[tokio::test]
async fn events_of_another_rank_are_not_believed() {
    let mut publisher = Publisher::start().await;
    let engine = FakeWorker::start().await;
    let options = format!(",ranks=1,kv-events=tcp://127.0.0.1:{}", publisher.port);
    let gateway = gateway_of(&engine, &options).await;
    let name = "gpu/0";
    becomes(&gateway, name, |it| it["cache_source"] == "events").await;
    let mut sequence = 0;
    until_async("the fault to be seen", async || {
        publisher.stored("", sequence, Some(1)).await;
        sequence += 1;
        let worker = shown(&gateway, name).await.unwrap();
        worker["kv_events"]["state"] == "faulty"
    })
    .await;
    assert_eq!(shown(&gateway, name).await.unwrap()["cached_blocks"], 0);
}
