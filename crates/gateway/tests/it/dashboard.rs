//! The dashboard: the page, and what it reads from the admin API.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::Duration;

use crate::fake_worker::*;
use foresee_api::dashboard::{Configuration, Decision, Decisions, History, Snapshot, Tick};
use foresee_core::policy;
use foresee_gateway::{AdminKey, AdminListen, Gateway, GatewayConfig, KeyConfig, KeyHash, Scope};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Text of prompts, which must not appear in anything that the dashboard shows.
const SECRET: &str = "zanzibar";

/// Paths of the data.
const DATA: [&str; 6] = [
    "/admin/snapshot",
    "/admin/stream",
    "/admin/history",
    "/admin/decisions",
    "/admin/decisions/1",
    "/admin/config",
];

/// Sends a request without a body to the admin listener, with header lines.
async fn send(gateway: &Gateway, method: &str, path: &str, headers: &str) -> ClientResponse {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n"
    );
    let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
    client.response().await
}

/// Reads JSON from the admin listener.
async fn read<T: DeserializeOwned>(gateway: &Gateway, path: &str) -> T {
    let response = call(gateway.admin_address(), "GET", path, "").await;
    assert_eq!(response.status(), 200, "{path} {}", response.text());
    assert_eq!(response.head.get("cache-control"), Some("no-store"));
    assert!(!response.text().contains(SECRET), "{path}");
    serde_json::from_slice(&response.body).unwrap()
}

/// Opens a stream, and reads its first event.
async fn open_stream(gateway: &Gateway) -> (Client, Snapshot) {
    let request = http("GET", "/admin/stream", "");
    let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
    let head = client.head().await;
    assert_eq!(head.status(), 200);
    assert_eq!(head.get("content-type"), Some("text/event-stream"));
    assert_eq!(head.get("x-accel-buffering"), Some("no"));
    let chunk = String::from_utf8(client.chunk().await).unwrap();
    assert!(chunk.starts_with(": connected\nretry: "), "{chunk}");
    let (name, data) = event(&chunk);
    assert_eq!(name, "snapshot");
    (client, serde_json::from_str(data).unwrap())
}

/// Returns the name and the data of the event in a chunk.
fn event(chunk: &str) -> (&str, &str) {
    assert!(chunk.ends_with("\n\n"), "{chunk}");
    assert!(!chunk.contains(SECRET), "{chunk}");
    let field = |name: &str| {
        let line = chunk.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {chunk}"))
    };
    field("id: ").parse::<u64>().unwrap();
    (field("event: "), field("data: "))
}

/// Reads ticks until one meets a condition.
async fn tick(client: &mut Client, mut is_wanted: impl FnMut(&Tick) -> bool) -> Tick {
    loop {
        let chunk = String::from_utf8(client.chunk().await).unwrap();
        let (name, data) = event(&chunk);
        assert_eq!(name, "tick");
        let tick: Tick = serde_json::from_str(data).unwrap();
        if is_wanted(&tick) {
            return tick;
        }
    }
}

/// Polls a path until what it returns meets a condition.
async fn until_read<T: DeserializeOwned>(
    gateway: &Gateway,
    path: &str,
    mut is_wanted: impl FnMut(&T) -> bool,
) -> T {
    within(path, async {
        loop {
            let value = read(gateway, path).await;
            if is_wanted(&value) {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// Returns the configuration of a gateway that chooses the worker of the least delay.
fn least_delay(workers: &[&FakeWorker]) -> GatewayConfig {
    let mut config = config(workers);
    config.router.policy = policy::MARGINAL_DELAY;
    config
}

/// Sends one chat to whichever of the workers is chosen, which responds with usage and this text.
async fn chat_once(gateway: &Gateway, workers: &mut [FakeWorker], text: &str) {
    let prompt = format!("{SECRET} {}", "many words ".repeat(40));
    let mut client =
        Client::sending(gateway.address(), http("POST", CHAT, chat(&prompt, true))).await;
    let mut exchange = within("a request to reach a worker", async {
        loop {
            if let Some(exchange) = workers.iter_mut().find_map(FakeWorker::try_request) {
                return exchange;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    exchange.start_stream().await;
    for _ in 0..3 {
        exchange.send_chunk(token(text)).await;
    }
    let usage = json!({
        "prompt_tokens": 160, "completion_tokens": 3,
        "prompt_tokens_details": { "cached_tokens": 32 },
    });
    let last = json!({ "choices": [], "usage": usage });
    exchange.send_chunk(format!("data: {last}\n\n")).await;
    exchange.end_stream().await;
    assert_eq!(client.head().await.status(), 200);
    client.rest().await.unwrap();
}

// The page

#[tokio::test]
async fn the_page_needs_no_key_and_loads_only_its_own_files() {
    let mut config = config(&[]);
    config.admin.key = Some(AdminKey::new("s3cret").unwrap());
    let gateway = gateway_with(config).await;
    let page = send(&gateway, "GET", "/dashboard", "").await;
    assert_eq!(page.status(), 200);
    let html = page.text().to_owned();
    let mut files = vec!["dashboard".to_owned()];
    for part in html.split(['"', '\'']) {
        if part.starts_with("dashboard/") {
            files.push(part.to_owned());
        }
    }
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        next += 1;
        let path = format!("/{file}");
        let response = send(&gateway, "GET", &path, "").await;
        assert_eq!(response.status(), 200, "{path}");
        for (name, value) in [
            (
                "content-security-policy",
                "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
            ),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
        ] {
            assert_eq!(response.head.get(name), Some(value), "{path}");
        }
        let text = response.text();
        let text = text.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !text.contains("http://") && !text.contains("https://"),
            "{path}"
        );
        for unsafe_call in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!text.contains(unsafe_call), "{path} has {unsafe_call}");
        }
        for imported in text.split("from \"./").skip(1) {
            let name = format!("dashboard/{}", imported.split('"').next().unwrap());
            if !files.contains(&name) {
                files.push(name);
            }
        }
        let tag = response.head.get("etag").unwrap();
        for known in [
            tag.to_owned(),
            format!("W/{tag}"),
            format!("\"x\", {tag}"),
            "*".to_owned(),
        ] {
            let same = send(
                &gateway,
                "GET",
                &path,
                &format!("if-none-match: {known}\r\n"),
            )
            .await;
            assert_eq!((same.status(), same.body.len()), (304, 0), "{path} {known}");
            assert_eq!(same.head.get("etag"), Some(tag));
        }
        let other = send(&gateway, "GET", &path, "if-none-match: \"x\"\r\n").await;
        assert_eq!(other.status(), 200, "{path}");
    }
    assert!(files.len() > 8, "{files:?}");
    for path in [
        "/dashboard/",
        "/dashboard/none.js",
        "/dashboards",
        "/dashboard/../admin/config",
    ] {
        let response = send(&gateway, "GET", path, "").await;
        assert!([401, 404].contains(&response.status()), "{path}");
    }
    let response = send(&gateway, "POST", "/dashboard", "").await;
    assert_eq!(response.status(), 401);
    // A page whose name was made to resolve to the listener cannot read even the page.
    let request = "GET /dashboard HTTP/1.1\r\nhost: evil.example\r\n\r\n";
    let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
    assert_eq!(
        client.response().await.error(403)["code"],
        "host_not_allowed"
    );
}

#[tokio::test]
async fn the_data_need_a_key_that_may_read_and_a_reload_one_that_may_change() {
    let mut config = config(&[]);
    let mut keys = Vec::new();
    for (id, scope) in [
        ("reader", Scope::AdminRead),
        ("admin", Scope::Admin),
        ("client", Scope::Api),
        ("scraper", Scope::Metrics),
    ] {
        let mut key = KeyConfig::new(id, KeyHash::of(id.as_bytes()));
        key.scopes = vec![scope];
        keys.push(key);
    }
    config.keys = Some(keys);
    let gateway = gateway_with(config).await;
    for path in DATA {
        let error = send(&gateway, "GET", path, "").await.error(401);
        assert_eq!(error["code"], "invalid_api_key", "{path}");
        for (key, status) in [("client", 403), ("scraper", 403), ("wrong", 401)] {
            let header = format!("authorization: Bearer {key}\r\n");
            let response = send(&gateway, "GET", path, &header).await;
            assert_eq!(response.status(), status, "{path} {key}");
        }
        for key in ["reader", "admin"] {
            let header = format!("authorization: Bearer {key}\r\n");
            let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{header}\r\n");
            let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
            let status = client.head().await.status();
            let expected = if path.ends_with("/1") { 404 } else { 200 };
            assert_eq!(status, expected, "{path} {key}");
        }
    }
    let reload = |key: &str| format!("authorization: Bearer {key}\r\n");
    let response = send(&gateway, "POST", "/admin/reload", &reload("reader")).await;
    assert_eq!(response.status(), 403);
    let response = send(&gateway, "POST", "/admin/reload", &reload("admin")).await;
    assert_eq!(response.error(409)["code"], "no_configuration");
}

#[tokio::test]
async fn the_dashboard_can_be_switched_off() {
    let mut config = config(&[]);
    config.admin.dashboard = false;
    let gateway = gateway_with(config).await;
    for path in [
        "/dashboard",
        "/dashboard/app.js",
        "/admin/snapshot",
        "/admin/stream",
        "/admin/decisions/1",
    ] {
        let error = send(&gateway, "GET", path, "").await.error(404);
        assert_eq!(error["code"], "unknown_url", "{path}");
    }
    let configuration: Configuration =
        serde_json::from_slice(&send(&gateway, "GET", "/admin/config", "").await.body).unwrap();
    let setting = configuration
        .settings
        .iter()
        .find(|setting| setting.key == "dashboard");
    let setting = setting.unwrap();
    assert_eq!((&*setting.value, setting.is_changed), ("off", true));
}

#[tokio::test]
async fn a_unix_socket_serves_the_dashboard() {
    let path = std::env::temp_dir().join(format!("foresee-page-{}.sock", std::process::id()));
    let gateway = Gateway::start(GatewayConfig {
        admin_listen: AdminListen::Unix(path.clone()),
        ..config(&[])
    })
    .unwrap();
    for target in ["/dashboard", "/admin/snapshot"] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: any\r\nconnection: close\r\n\r\n");
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        within("a response", stream.read_to_string(&mut response))
            .await
            .unwrap();
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    }
    within("the gateway to stop", gateway.shut_down()).await;
}

// The stream

#[tokio::test]
async fn a_stream_begins_with_a_snapshot_and_continues_with_changes() {
    let (first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = gateway(&[&first, &second]).await;
    let (mut client, snapshot) = open_stream(&gateway).await;
    let names: Vec<&str> = snapshot
        .workers
        .iter()
        .map(|worker| &*worker.name)
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert!(
        snapshot
            .workers
            .iter()
            .all(|worker| worker.state == "healthy" && worker.problems.is_empty())
    );
    assert_eq!((&*snapshot.policy, snapshot.queue), ("round-robin", None));
    assert_eq!(snapshot.models, [MODEL]);

    // A worker that does not change is not sent again.
    let quiet = tick(&mut client, |tick| tick.workers.is_empty()).await;
    assert_eq!(quiet.sample.healthy, Some(2.0));

    first.set_healthy(false);
    let failed = tick(&mut client, |tick| {
        tick.workers
            .iter()
            .any(|worker| worker.state == "unhealthy")
    })
    .await;
    let worker = &failed.workers[0];
    assert_eq!((&*worker.name, worker.problems.len()), ("a", 1));
    assert!(worker.problems[0].contains("500"), "{worker:?}");

    let removed = call(
        gateway.admin_address(),
        "DELETE",
        "/admin/workers/b?timeout=0s",
        "",
    )
    .await;
    assert_eq!(removed.status(), 202);
    let gone = tick(&mut client, |tick| !tick.removed.is_empty()).await;
    assert_eq!(gone.removed, ["b"]);

    // A second stream begins with the same state.
    let (_second, snapshot) = open_stream(&gateway).await;
    assert_eq!(snapshot.workers.len(), 1);

    // Streams do not delay the shutdown.
    let stop = async {
        gateway.shut_down().await;
    };
    tokio::join!(within("the gateway to stop", stop), async {
        client.rest().await.unwrap();
    });
}

#[tokio::test]
async fn streams_are_limited() {
    let gateway = gateway(&[]).await;
    let mut streams = Vec::new();
    let refused = loop {
        let request = http("GET", "/admin/stream", "");
        let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
        let head = client.head().await;
        if head.status() != 200 {
            break head;
        }
        streams.push(client);
        assert!(streams.len() <= 64);
    };
    assert_eq!((refused.status(), streams.len()), (429, 32));
    assert!(refused.get("retry-after").is_some());
    // Closed streams make room.
    streams.clear();
    within("room for a stream", async {
        loop {
            let request = http("GET", "/admin/stream", "");
            let mut client = Client::sending(gateway.admin_address().unwrap(), request).await;
            if client.head().await.status() == 200 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

// The past

#[tokio::test]
async fn the_history_has_what_happened_before_it_is_read() {
    let mut workers = [FakeWorker::start().await];
    let gateway = gateway(&[&workers[0]]).await;
    for _ in 0..3 {
        chat_once(&gateway, &mut workers, "word").await;
    }
    let has_all = |history: &History| {
        let rates = history.seconds.ok.iter().flatten();
        rates.map(|rate| f64::from(*rate)).sum::<f64>() > 2.0
            && history.seconds.time.len() >= 2
            && history.seconds.ttft_p50.iter().any(Option::is_some)
    };
    let history: History = until_read(&gateway, "/admin/history", has_all).await;
    let seconds = &history.seconds;
    assert!(seconds.time.is_sorted());
    for (name, column) in [
        ("itl_p99", &seconds.itl_p99),
        ("hits_actual", &seconds.hits_actual),
        ("output_tokens", &seconds.output_tokens),
    ] {
        assert_eq!(column.len(), seconds.time.len(), "{name}");
        assert!(
            column
                .iter()
                .any(|value| value.is_some_and(|value| value > 0.0)),
            "{name}"
        );
    }
    assert_eq!(history.workers.len(), 1);

    // `serde_json` reads numbers to within the last bit, which could be on either side of the sample.
    let since = seconds.time[seconds.time.len() - 2] + 1e-4;
    let path = format!("/admin/history?since={since}");
    let later: History = read(&gateway, &path).await;
    assert!(later.seconds.time.len() < seconds.time.len() + 2);
    assert!(later.seconds.time.iter().all(|time| *time > since));

    let one: History = read(&gateway, "/admin/history?worker=%61").await;
    assert_eq!((one.workers.len(), one.seconds.time.len()), (1, 0));
    assert!(!one.workers[0].requests.is_empty());
    let error = call(
        gateway.admin_address(),
        "GET",
        "/admin/history?worker=b",
        "",
    )
    .await;
    assert_eq!(error.error(404)["code"], "worker_not_found");
    for query in ["since=x", "until=1"] {
        let path = format!("/admin/history?{query}");
        call(gateway.admin_address(), "GET", &path, "")
            .await
            .error(400);
    }
    // The fractions of cached blocks are those of the same prompts.
    let has_hits = |snapshot: &Snapshot| snapshot.workers[0].hits_actual.is_some();
    let snapshot: Snapshot = until_read(&gateway, "/admin/snapshot", has_hits).await;
    let worker = &snapshot.workers[0];
    assert!(
        (worker.hits_actual.unwrap() - 0.2).abs() < 0.01,
        "{worker:?}"
    );
    let all = &snapshot.quality;
    assert_eq!(all.overlap_exact + all.overlap_over + all.overlap_under, 3);
}

// Decisions

#[tokio::test]
async fn the_terms_of_a_decision_sum_to_its_cost_and_the_outcome_arrives() {
    let mut workers = [FakeWorker::start().await, FakeWorker::start().await];
    let mut config = least_delay(&[&workers[0], &workers[1]]);
    config.router.ttft_weight = 2.0;
    let gateway = gateway_with(config).await;
    let (mut stream, snapshot) = open_stream(&gateway).await;
    assert_eq!(snapshot.decisions, []);
    chat_once(&gateway, &mut workers, "word").await;

    let has_outcome = |tick: &Tick| {
        tick.decisions
            .iter()
            .any(|decision| decision.outcome.is_some())
    };
    let tick = tick(&mut stream, has_outcome).await;
    let summary = &tick.decisions[0];
    assert!(summary.candidates.is_empty());
    assert_eq!(
        (summary.id, &*summary.model, summary.prompts),
        (1, MODEL, 1)
    );

    let decision: Decision = read(&gateway, "/admin/decisions/1").await;
    assert_eq!(decision.candidates.len(), 2);
    for candidate in &decision.candidates {
        let sum: f64 = candidate.terms.iter().map(|(_, seconds)| seconds).sum();
        let cost = candidate.policy_cost.unwrap();
        assert!((sum - cost).abs() <= 1e-9 * cost.abs(), "{candidate:?}");
        assert!(
            (candidate.delay - cost).abs() <= 1e-9 * cost.abs(),
            "{candidate:?}"
        );
        assert!(cost > 0.0 && candidate.terms.len() == 9);
    }
    let least = decision
        .candidates
        .iter()
        .filter_map(|candidate| candidate.policy_cost);
    assert_eq!(decision.cost, least.reduce(f64::min));
    assert!(["a", "b"].contains(&&*decision.chosen));
    assert_ne!(decision.runner_up.as_ref(), Some(&decision.chosen));
    assert!(decision.predicted.ttft_seconds.unwrap() > 0.0);
    let outcome = decision.outcome.unwrap();
    assert_eq!(
        (&*outcome.outcome, outcome.worker.as_ref()),
        ("ok", Some(&decision.chosen))
    );
    assert_eq!(
        (outcome.output_tokens, outcome.cached_tokens),
        (3, Some(32))
    );
    assert!(outcome.ttft_seconds.unwrap() <= outcome.total_seconds);

    let list: Decisions = read(&gateway, "/admin/decisions?after=0").await;
    assert_eq!((list.decisions.len(), list.has_more), (1, false));
    assert_eq!(list.decisions[0].candidates, decision.candidates);
    let list: Decisions = read(&gateway, "/admin/decisions?after=1").await;
    assert!(list.decisions.is_empty());
    for (path, status) in [
        ("/admin/decisions/2", 404),
        ("/admin/decisions/x", 404),
        ("/admin/decisions?after=-1", 400),
        ("/admin/decisions?limit=1", 400),
    ] {
        call(gateway.admin_address(), "GET", path, "")
            .await
            .error(status);
    }
    // The snapshot has the decision, for a page that is opened later.
    let snapshot: Snapshot = read(&gateway, "/admin/snapshot").await;
    assert_eq!(snapshot.decisions.len(), 1);
    assert!(snapshot.decisions[0].candidates.is_empty());
}

#[tokio::test]
async fn a_decision_without_a_response_has_an_outcome_too() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let mut client =
        Client::sending(gateway.address(), http("POST", CHAT, chat(SECRET, false))).await;
    let response = loop {
        tokio::select! {
            response = client.response() => break response,
            exchange = worker.request_at_any_time() => exchange.reset(),
        }
    };
    assert!(response.status() >= 500);
    let is_settled = |decision: &Decision| decision.outcome.is_some();
    let decision: Decision = until_read(&gateway, "/admin/decisions/1", is_settled).await;
    assert_eq!(decision.outcome.unwrap().outcome, "no_response");
}

#[tokio::test]
async fn few_decisions_are_recorded_while_no_page_is_open() {
    let mut workers = [FakeWorker::start().await];
    let gateway = gateway(&[&workers[0]]).await;
    for _ in 0..20 {
        chat_once(&gateway, &mut workers, "word").await;
    }
    let list: Decisions = read(&gateway, "/admin/decisions").await;
    // One a second, however long the requests took.
    let decisions = &list.decisions;
    let gaps = decisions.windows(2).map(|pair| pair[1].time - pair[0].time);
    assert!(
        gaps.clone().all(|gap| gap > 0.9),
        "{:?}",
        gaps.collect::<Vec<_>>()
    );
    assert!(!decisions.is_empty() && decisions.len() < 20);
}

#[tokio::test]
async fn one_worker_can_be_read() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let response = call(gateway.admin_address(), "GET", "/admin/workers/a", "").await;
    assert_eq!(response.json()["name"], "a");
    let error = call(gateway.admin_address(), "GET", "/admin/workers/x", "").await;
    assert_eq!(error.error(404)["code"], "worker_not_found");
}
