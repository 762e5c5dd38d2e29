//! Workers join, fail, return and leave; the admin API shows and changes them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::policy;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, StartError};
use serde_json::{Value, json};

async fn admin(gateway: &Gateway, method: &str, path: &str, body: &str) -> ClientResponse {
    call(gateway.admin_address(), method, path, body).await
}

/// Sends a request and returns the name of the worker that responded.
async fn serving_worker(gateway: &Gateway, workers: &mut [&mut FakeWorker]) -> String {
    let mut client =
        Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
    let mut exchange = None;
    until("a request to reach a worker", || {
        exchange = workers.iter_mut().find_map(|worker| worker.try_request());
        exchange.is_some()
    })
    .await;
    exchange.unwrap().respond_json("{}").await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    response.head.get("x-foresee-worker").unwrap().to_owned()
}

/// Waits until no metric has a series of the worker: they are removed after its tasks have ended.
async fn until_no_series(gateway: &Gateway, worker: &str) {
    let label = format!("worker=\"{worker}\"");
    within("the worker's metrics to be removed", async {
        while metrics(gateway).await.contains(&label) {}
    })
    .await;
}

// Health

#[tokio::test]
async fn a_gateway_is_ready_once_a_worker_is() {
    let worker = FakeWorker::start().await;
    worker.set_healthy(false);
    let gateway = Gateway::start(config(&[&worker])).unwrap();
    until("a few health checks", || worker.probes() >= 3).await;
    let live = admin(&gateway, "GET", "/health/live", "").await;
    assert_eq!(live.status(), 200);
    admin(&gateway, "GET", "/health/ready", "").await.error(503);
    let health = call(gateway.address(), "GET", "/health", "").await;
    assert_eq!(health.status(), 503);
    let response = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
    response.error(503);
    assert!(worker.is_idle());

    worker.set_healthy(true);
    until("the worker to be healthy", || {
        state(&gateway, "a") == WorkerState::Healthy
    })
    .await;
    let ready = admin(&gateway, "GET", "/health/ready", "").await;
    assert_eq!(ready.status(), 200);
    let health = call(gateway.address(), "GET", "/health", "").await;
    assert_eq!((health.status(), health.text()), (200, ""));
}

#[tokio::test]
async fn a_dead_worker_gets_no_requests_until_it_returns() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    first.die().await;
    until("the health check to fail", || {
        state(&gateway, "a") == WorkerState::Unhealthy
    })
    .await;
    for _ in 0..4 {
        assert_eq!(serving_worker(&gateway, &mut [&mut second]).await, "b");
    }
    let text = metrics(&gateway).await;
    assert_eq!(value(&text, "foresee_worker_up{worker=\"a\"}"), Some(0.0));
    let failures = "foresee_probe_failures_total{worker=\"a\"}";
    assert!(value(&text, failures).unwrap() >= 2.0);
    assert_eq!(value(&text, "foresee_retries_total"), Some(0.0));

    let probes = second.probes();
    first.come_back();
    until("the health check to succeed", || {
        state(&gateway, "a") == WorkerState::Healthy
    })
    .await;
    // One interval, counted by the health checks of the other worker, the next of which may have been
    // due.
    assert!(second.probes() <= probes + 3);
    let mut servers = HashSet::new();
    for _ in 0..2 {
        servers.insert(serving_worker(&gateway, &mut [&mut first, &mut second]).await);
    }
    assert_eq!(servers.len(), 2, "both workers get requests again");
}

#[tokio::test]
async fn a_worker_that_returns_after_refusing_connections_has_an_empty_cache() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let long = "a prompt of many blocks ".repeat(40);
    let body = chat(&long, false);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, &body)).await;
    worker.request().await.respond_json("{}").await;
    client.response().await;
    let cached = || workers(&gateway)["a"].cached_blocks;
    until("the prompt to be cached", || cached() > 10).await;

    worker.die().await;
    until("the health check to fail", || {
        state(&gateway, "a") == WorkerState::Unhealthy
    })
    .await;
    assert!(cached() > 10, "the worker may only be unreachable");
    worker.come_back();
    until("the health check to succeed", || {
        state(&gateway, "a") == WorkerState::Healthy
    })
    .await;
    assert_eq!(cached(), 0);
}

#[tokio::test]
async fn one_failed_health_check_does_not_make_a_worker_unhealthy() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.probe_interval = Duration::from_secs(60);
    let gateway = gateway_with(config).await;
    worker.set_healthy(false);
    // A request that fails triggers a health check, which fails too.
    let failures = "foresee_probe_failures_total{worker=\"a\"}";
    let mut worker = worker;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    client.head().await;
    exchange.reset();
    until_metric(&gateway, failures, 1.0).await;
    assert_eq!(state(&gateway, "a"), WorkerState::Healthy);
}

#[tokio::test]
async fn health_checks_do_not_count_as_load() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let probes = worker.probes();
    until("many health checks", || {
        assert!(has_no_bookings(&gateway));
        worker.probes() >= probes + 5
    })
    .await;
    let text = metrics(&gateway).await;
    assert_eq!(
        value(&text, "foresee_decision_duration_seconds_count"),
        Some(0.0)
    );
    assert_eq!(value(&text, "foresee_prompt_tokens_total"), Some(0.0));
}

#[tokio::test]
async fn models_and_capacity_are_read_from_the_worker() {
    let worker = FakeWorker::serving(&["m", "adapter"]).await;
    worker.set_metrics(
        "# TYPE vllm:cache_config_info gauge\n\
         vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"27312\"} 1.0\n",
    );
    let gateway = gateway(&[&worker]).await;
    let worker = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(worker["models"], json!(["m", "adapter"]));
    assert_eq!(
        worker["capacity_blocks"], 27311,
        "vLLM never uses one block"
    );
    assert_eq!(worker["state"], "healthy");
}

// Joining and leaving

#[tokio::test]
async fn a_worker_drains_and_is_removed() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = first.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    assert_eq!(client.head().await.status(), 200);
    client.chunk().await;

    for _ in 0..2 {
        // A second request to drain changes nothing.
        let response = admin(&gateway, "DELETE", "/admin/workers/a", "").await;
        assert_eq!(response.status(), 202);
        assert_eq!(response.json()["state"], "draining");
    }
    let draining = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(
        (&draining["state"], &draining["requests"]),
        (&json!("draining"), &json!(1))
    );
    for _ in 0..3 {
        assert_eq!(serving_worker(&gateway, &mut [&mut second]).await, "b");
    }
    // Health checks do not make a draining worker available.
    let probes = first.probes();
    until("more health checks", || first.probes() >= probes + 2).await;
    assert_eq!(state(&gateway, "a"), WorkerState::Draining);

    exchange.send_chunk(token("y")).await;
    assert_eq!(client.chunk().await, token("y").as_bytes());
    exchange.end_stream().await;
    assert!(client.rest().await.unwrap().ends_with("data: [DONE]\n\n"));
    until("the worker to be removed", || {
        !workers(&gateway).contains_key("a")
    })
    .await;
    assert!(worker_json(&gateway, "a").await.is_none());
    until_no_series(&gateway, "a").await;
    assert!(has_no_bookings(&gateway));
    let response = admin(&gateway, "DELETE", "/admin/workers/a", "").await;
    response.error(404);

    // The name can be used again.
    let body = json!({ "url": first.spec("a") }).to_string();
    let response = admin(&gateway, "POST", "/admin/workers", &body).await;
    assert_eq!(response.status(), 202);
    until("the worker to be healthy again", || {
        state(&gateway, "a") == WorkerState::Healthy
    })
    .await;
    assert!(has_no_bookings(&gateway));
}

#[tokio::test]
async fn the_last_worker_can_be_drained() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    admin(&gateway, "DELETE", "/admin/workers/a", "").await;
    until("the worker to be removed", || workers(&gateway).is_empty()).await;
    let response = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
    response.error(503);
    // The worker gets no health checks any more.
    let probes = worker.probes();
    let response = admin(&gateway, "GET", "/health/ready", "").await;
    response.error(503);
    a_few_probe_intervals().await;
    assert!(worker.probes() <= probes + 1);
}

#[tokio::test]
async fn a_worker_joins_and_serves() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[]).await;
    let body = json!({ "url": worker.spec("new") + ",blocks=77" }).to_string();
    let response = admin(&gateway, "POST", "/admin/workers", &body).await;
    assert_eq!(response.status(), 202);
    assert_eq!(response.json()["name"], "new");
    until("the worker to be healthy", || {
        state(&gateway, "new") == WorkerState::Healthy
    })
    .await;
    let joined = worker_json(&gateway, "new").await.unwrap();
    assert_eq!(joined["capacity_blocks"], 77);
    assert_eq!(joined["url"], format!("http://{}", worker.address));
    assert_eq!(serving_worker(&gateway, &mut [&mut worker]).await, "new");

    let response = admin(&gateway, "POST", "/admin/workers", &body).await;
    let error = response.error(409);
    assert_eq!(error["code"], "worker_exists");
    assert!(
        error["message"].as_str().unwrap().contains("`new`"),
        "{error}"
    );
    for invalid in [
        "",
        "{}",
        "{\"url\": 7}",
        r#"{"url": "ftp://x"}"#,
        r#"{"url": ",name=x"}"#,
    ] {
        let response = admin(&gateway, "POST", "/admin/workers", invalid).await;
        assert_eq!(response.error(400)["param"], "url", "{invalid}");
    }
    assert_eq!(workers(&gateway).len(), 1);
}

#[tokio::test]
async fn two_workers_with_one_name_fail_the_start() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker, &worker]);
    config.workers[1].name = "a".to_owned();
    let started = Gateway::start(config);
    assert!(matches!(started, Err(StartError::Worker(_))), "{started:?}");
}

#[tokio::test]
async fn workers_can_be_removed_by_percent_encoded_names() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[]).await;
    for (name, path) in [
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("127.0.0.1:8000", "127.0.0.1%3A8000"),
        ("rack/1", "rack%2f1"),
        ("50%", "50%"),
    ] {
        let body = json!({ "url": worker.spec(name) }).to_string();
        let response = admin(&gateway, "POST", "/admin/workers", &body).await;
        assert_eq!(response.status(), 202, "{name}");
        let path = format!("/admin/workers/{path}");
        let response = admin(&gateway, "DELETE", &path, "").await;
        assert_eq!(response.status(), 202, "{name}");
        until("the worker to be removed", || workers(&gateway).is_empty()).await;
    }
}

#[tokio::test]
async fn an_unknown_admin_path_is_a_404_with_the_path() {
    let gateway = gateway(&[]).await;
    let response = admin(&gateway, "GET", "/admin/nothing", "").await;
    let error = response.error(404);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("GET /admin/nothing"), "{message}");
    let response = admin(&gateway, "DELETE", "/admin/workers/ghost", "").await;
    response.error(404);
}

// Explanations and metrics

#[tokio::test]
async fn explain_shows_every_part_of_the_cost_and_books_nothing() {
    let (mut first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut config = config(&[&first, &second]);
    config.router.policy = policy::KV;
    config.router.overlap_weight = 2.0;
    let gateway = gateway_with(config).await;
    let mut second = second;
    // One of the workers has the prompt, and still runs it.
    let prompt = "the same words again and again ".repeat(30);
    let body = chat(&prompt, true);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, &body)).await;
    let mut exchange = None;
    until("a request to reach a worker", || {
        exchange = first.try_request().or_else(|| second.try_request());
        exchange.is_some()
    })
    .await;
    let mut exchange = exchange.unwrap();
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    let head = client.head().await;
    let running_on = head.get("x-foresee-worker").unwrap();
    client.chunk().await;

    let before = admin(&gateway, "GET", "/admin/workers", "").await.json();
    for _ in 0..3 {
        let response = admin(&gateway, "POST", "/admin/explain", &body).await;
        assert_eq!(response.status(), 200);
        let explained = response.json();
        assert_eq!(explained["policy"], "kv");
        assert_eq!(explained["overlap_weight"], 2.0);
        let candidates = explained["candidates"].as_array().unwrap();
        assert_eq!(candidates.len(), 2);
        let mut costs = HashMap::new();
        for candidate in candidates {
            let number = |name: &str| {
                let value = &candidate[name];
                value
                    .as_f64()
                    .unwrap_or_else(|| panic!("{name} in {candidate}"))
            };
            let name = candidate["worker"].as_str().unwrap();
            let cost = 2.0 * number("prefill_blocks") + number("active_blocks_if_placed");
            assert_eq!(number("cost"), cost, "{candidate}");
            assert_eq!(number("policy_cost"), cost, "{candidate}");
            assert_eq!(
                number("overlap_blocks"),
                number("overlap_cached_blocks").max(number("overlap_active_blocks"))
            );
            let runs_here = name == running_on;
            assert_eq!(number("requests"), f64::from(u8::from(runs_here)));
            assert_eq!(number("overlap_blocks") > 0.0, runs_here);
            assert_eq!(number("active_blocks") > 0.0, runs_here);
            costs.insert(name.to_owned(), number("cost"));
            assert!((0.0..=1.0).contains(&number("probability")));
        }
        let choice = explained["choice"].as_str().unwrap();
        assert!(costs.values().all(|cost| *cost >= costs[choice]));
    }
    let after = admin(&gateway, "GET", "/admin/workers", "").await.json();
    let load = |listed: &Value| -> Vec<Value> {
        let names = [
            "requests",
            "active_blocks",
            "context_tokens",
            "cached_blocks",
        ];
        let workers = listed["workers"].as_array().unwrap();
        let pairs = workers
            .iter()
            .flat_map(|worker| names.map(|name| worker[name].clone()));
        pairs.collect()
    };
    assert_eq!(load(&after), load(&before));
    assert_eq!(gateway.router().booking_count(), 1);
    exchange.end_stream().await;
    client.rest().await.unwrap();
    until_released(&gateway).await;

    for (body, status) in [("{", 400), (r#"{"model": "gpt", "messages": []}"#, 404)] {
        admin(&gateway, "POST", "/admin/explain", body)
            .await
            .error(status);
    }
    for body in [
        r#"{"prompt": "hi"}"#,
        r#"{"input": ["hi"]}"#,
        r#"{"prompt": [1, 2]}"#,
    ] {
        let response = admin(&gateway, "POST", "/admin/explain", body).await;
        assert_eq!(response.status(), 200, "{body}");
    }
}

/// Parses an exposition as strictly as a scraper does, and returns the names of all series.
fn parse_exposition(text: &str) -> HashSet<String> {
    let mut names = HashSet::new();
    let mut types = HashMap::new();
    let body = text.strip_suffix("# EOF\n").expect("the line `# EOF`");
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (kind, name) = (words.next().unwrap(), words.next().unwrap());
            assert!(["HELP", "TYPE", "UNIT"].contains(&kind), "{line}");
            assert!(name.starts_with("foresee_"), "{line}");
            if kind == "TYPE" {
                let duplicate = types.insert(name.to_owned(), words.next().unwrap().to_owned());
                assert_eq!(duplicate, None, "{line}");
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        value.parse::<f64>().unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels.strip_suffix('}').unwrap();
        for label in labels.split_terminator(',') {
            let (_, value) = label.split_once('=').unwrap();
            assert!(
                value.len() >= 2 && value.starts_with('"') && value.ends_with('"'),
                "{line}"
            );
        }
        let family = ["_total", "_bucket", "_count", "_sum"]
            .iter()
            .find_map(|suffix| {
                name.strip_suffix(suffix)
                    .filter(|name| types.contains_key(*name))
            });
        assert!(
            types.contains_key(family.unwrap_or(name)),
            "no type: {line}"
        );
        names.insert(
            series
                .split_once("le=")
                .map_or(series, |(name, _)| name)
                .to_owned(),
        );
    }
    names
}

#[tokio::test]
async fn metrics_have_their_documented_names() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("x")).await;
    exchange.send_chunk(token("y")).await;
    client.head().await;
    client.chunk().await;
    let during = metrics(&gateway).await;
    let active = "foresee_worker_active_blocks{worker=\"a\"}";
    assert!(value(&during, active).unwrap() > 0.0);
    assert_eq!(
        value(&during, "foresee_worker_requests{worker=\"a\"}"),
        Some(1.0)
    );
    let usage = json!({"choices": [], "usage": {
        "prompt_tokens": 50, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 16},
    }});
    exchange.send_chunk(format!("data: {usage}\n\n")).await;
    exchange.end_stream().await;
    client.rest().await.unwrap();
    until_released(&gateway).await;

    let text = metrics(&gateway).await;
    let names = parse_exposition(&text);
    for series in [
        "foresee_worker_active_blocks{worker=\"a\"}",
        "foresee_worker_prefill_tokens{worker=\"a\"}",
        "foresee_worker_requests{worker=\"a\"}",
        "foresee_decision_duration_seconds_count",
        "foresee_decision_duration_seconds_bucket{",
        "foresee_time_to_first_token_seconds_count",
        "foresee_time_to_first_token_seconds_bucket{",
        "foresee_inter_token_latency_seconds_count",
        "foresee_inter_token_latency_seconds_bucket{",
        "foresee_overlap_blocks_total{kind=\"predicted\"}",
        "foresee_overlap_blocks_total{kind=\"best\"}",
        "foresee_overlap_blocks_total{kind=\"actual\"}",
        "foresee_requests_total{outcome=\"ok\"}",
    ] {
        assert!(names.contains(series), "{series} in\n{text}");
    }
    assert_eq!(value(&text, active), Some(0.0));
    assert_eq!(value(&text, "foresee_bookings"), Some(0.0));
}
