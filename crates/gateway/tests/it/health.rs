//! Health checks: what they request, how many decide, and what the admin API shows of them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::num::NonZeroU32;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, GatewayConfig, HealthMethod, HealthPath};
use serde_json::Value;

async fn until_state(gateway: &Gateway, name: &str, expected: WorkerState) {
    until("the worker's state", || state(gateway, name) == expected).await;
}

/// Returns the field `health` of a worker in the admin API.
async fn health_of(gateway: &Gateway, name: &str) -> Value {
    worker_json(gateway, name).await.unwrap()["health"].clone()
}

/// Sends a request and returns the status of the response. The worker must not be reached.
async fn unserved(gateway: &Gateway) -> u16 {
    let response = call(gateway.address(), "POST", CHAT, chat("hi", false)).await;
    response.status()
}

/// Returns a configuration whose workers have no health check.
fn without_health_check(workers: &[&FakeWorker]) -> GatewayConfig {
    let mut config = config(workers);
    config.health.path = HealthPath::None;
    config
}

#[tokio::test]
async fn method_and_path_are_configurable_and_a_worker_has_its_own_path() {
    let (first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    first.set_health_check("HEAD /ping?full=1");
    second.set_health_check("HEAD /own");
    let mut config = config(&[&first, &second]);
    config.health.path = "/ping?full=1".parse().unwrap();
    config.health.method = HealthMethod::Head;
    config.workers[1].health_path = Some("/own".parse().unwrap());
    let gateway = gateway_with(config).await;
    assert!(first.probes() >= 1 && second.probes() >= 1);
    let other = |worker: &FakeWorker| {
        let requests = worker.own_requests("host");
        requests.iter().any(|(line, _)| line.contains("/health"))
    };
    assert!(!other(&first) && !other(&second));
    gateway.shut_down().await;
}

#[tokio::test]
async fn a_check_is_appended_to_the_path_of_the_url_and_may_be_a_post() {
    let worker = FakeWorker::start().await;
    worker.set_health_check("POST /engine/live");
    let mut config = config(&[]);
    let description = format!("http://{}/engine,name=a,health-path=/live", worker.address);
    config.workers = vec![description.parse().unwrap()];
    config.health.method = HealthMethod::Post;
    let gateway = Gateway::start(config).unwrap();
    until("a successful check", || worker.probes() >= 1).await;
    gateway.shut_down().await;
}

#[tokio::test]
async fn without_a_health_check_a_refused_request_decides_and_a_connection_brings_it_back() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with(without_health_check(&[&worker])).await;
    assert_eq!(*workers(&gateway)["a"].models, [MODEL]);
    let request = http("POST", CHAT, chat("hi", false));
    let mut client = Client::sending(gateway.address(), &request).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);

    worker.die().await;
    a_few_probe_intervals().await;
    assert_eq!(state(&gateway, "a"), WorkerState::Healthy, "not checked");
    assert_eq!(
        health_of(&gateway, "a").await["last_check_seconds_ago"],
        Value::Null
    );
    assert_eq!(unserved(&gateway).await, 503);
    assert_eq!(state(&gateway, "a"), WorkerState::Unhealthy);
    let connect_failures = "foresee_probe_failures_total{worker=\"a\"}";
    within("a refused connection", async {
        while value(&metrics(&gateway).await, connect_failures) == Some(0.0) {}
    })
    .await;
    let error = health_of(&gateway, "a").await["last_error"].clone();
    assert!(error.as_str().unwrap().contains("refused"), "{error}");

    worker.come_back();
    until_state(&gateway, "a", WorkerState::Healthy).await;
    let mut client = Client::sending(gateway.address(), &request).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(worker.probes(), 0);
    let requests = worker.own_requests("host");
    assert!(requests.iter().all(|(line, _)| !line.contains("/health")));
}

#[tokio::test]
async fn thresholds_decide_how_many_checks_change_the_state() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.health.unhealthy_threshold = NonZeroU32::new(4).unwrap();
    config.health.healthy_threshold = NonZeroU32::new(3).unwrap();
    let gateway = gateway_with(config).await;
    // The next check may have been answered before the change.
    worker.set_healthy(false);
    let before = worker.probes();
    until_state(&gateway, "a", WorkerState::Unhealthy).await;
    assert!(worker.probes() >= before + 4);
    let shown = health_of(&gateway, "a").await;
    assert!(shown["consecutive_failures"].as_u64().unwrap() >= 4);

    worker.set_healthy(true);
    let before = worker.probes();
    until_state(&gateway, "a", WorkerState::Healthy).await;
    assert!(worker.probes() >= before + 3);
}

#[tokio::test]
async fn the_cause_of_the_last_failure_is_shown_and_kept() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let healthy = health_of(&gateway, "a").await;
    assert_eq!(healthy["status"], 200);
    assert_eq!(healthy["last_error"], Value::Null);
    assert_eq!(healthy["consecutive_failures"], 0);
    assert!(healthy["last_check_seconds_ago"].as_f64().unwrap() < 5.0);
    assert!(healthy["next_check_in_seconds"].as_f64().unwrap() < 0.1);

    worker.set_healthy(false);
    until_state(&gateway, "a", WorkerState::Unhealthy).await;
    let failing = health_of(&gateway, "a").await;
    assert_eq!(failing["status"], 500);
    assert!(failing["consecutive_failures"].as_u64().unwrap() >= 2);
    let error = failing["last_error"].as_str().unwrap();
    assert!(error.contains("500"), "{error}");

    worker.set_healthy(true);
    until_state(&gateway, "a", WorkerState::Healthy).await;
    let recovered = health_of(&gateway, "a").await;
    assert_eq!(recovered["status"], 200);
    assert_eq!(recovered["consecutive_failures"], 0);
    assert_eq!(recovered["last_error"], failing["last_error"]);
}

#[tokio::test]
async fn a_check_without_a_response_ends_after_its_own_timeout() {
    // Accepts connections and never responds.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = config(&[]);
    let address = silent.local_addr().unwrap();
    config.workers = vec![format!("http://{address},name=a").parse().unwrap()];
    config.connect_timeout = Duration::from_secs(60);
    config.health.timeout = Duration::from_millis(30);
    let gateway = Gateway::start(config).unwrap();
    within("a check to fail", async {
        while health_of(&gateway, "a").await["consecutive_failures"] == 0 {}
    })
    .await;
    let shown = health_of(&gateway, "a").await;
    let error = shown["last_error"].as_str().unwrap();
    assert!(error.contains("no response within 30ms"), "{error}");
    assert_eq!(shown["status"], Value::Null);
}

#[tokio::test]
async fn a_worker_that_refused_connections_is_checked_soon() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.probe_interval = Duration::from_secs(600);
    let gateway = gateway_with(config).await;
    worker.die().await;
    assert_eq!(unserved(&gateway).await, 503);
    // The check that the request asked for was refused, too; the next interval is ten minutes.
    let failures = "foresee_probe_failures_total{worker=\"a\"}";
    until_metric(&gateway, failures, 1.0).await;
    let next = health_of(&gateway, "a").await["next_check_in_seconds"].clone();
    assert!(next.as_f64().unwrap() <= 0.5, "{next}");
    worker.come_back();
    until_state(&gateway, "a", WorkerState::Healthy).await;
}

#[tokio::test]
async fn a_slow_query_of_the_capacity_does_not_keep_a_worker_unhealthy() {
    let worker = FakeWorker::start().await;
    worker.hang_on_metrics();
    let mut config = config(&[&worker]);
    config.health.timeout = Duration::from_secs(600);
    let gateway = gateway_with(config).await;
    assert_eq!(*workers(&gateway)["a"].models, [MODEL], "known before");
}
