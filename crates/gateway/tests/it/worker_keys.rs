//! API keys of workers: which requests carry them, and which do not.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::PathBuf;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::workers::WorkerState;
use foresee_gateway::{ApiKeySource, Gateway, StartError};
use serde_json::json;

/// File with a key, which is removed at the end of the test.
struct KeyFile(PathBuf);

impl KeyFile {
    fn new(name: &str, key: &str) -> Self {
        let name = format!("foresee-key-{}-{name}", std::process::id());
        let file = Self(std::env::temp_dir().join(name));
        file.write(key);
        file
    }

    fn write(&self, key: &str) {
        std::fs::write(&self.0, format!("{key}\n")).unwrap();
    }
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Sends a request with this `authorization` and returns what the worker received of that header.
async fn forwarded(
    gateway: &Gateway,
    worker: &mut FakeWorker,
    authorization: Option<&str>,
) -> Option<String> {
    let request = String::from_utf8(http("POST", CHAT, chat("hi", false))).unwrap();
    let request = match authorization {
        Some(value) => request.replacen("\r\n", &format!("\r\nauthorization: {value}\r\n"), 1),
        None => request,
    };
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = worker.request().await;
    let received = exchange.head.get("authorization").map(str::to_owned);
    exchange.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
    received
}

#[tokio::test]
async fn every_query_of_the_gateway_carries_the_key_and_clients_keep_their_own() {
    let (mut first, second) = (FakeWorker::start().await, FakeWorker::start().await);
    first.require_authorization("Bearer shared");
    second.require_authorization("Bearer own");
    // So that the event source is asked for, too.
    let vllm = json!({"data": [{"id": MODEL, "owned_by": "vllm"}]});
    first.set_model_list(&vllm.to_string());
    let shared = KeyFile::new("shared", "shared");
    let own = KeyFile::new("own", "own");
    let mut config = config(&[&first, &second]);
    config.worker_key.source = Some(ApiKeySource::File(shared.0.clone()));
    config.workers[1].api_key = Some(ApiKeySource::File(own.0.clone()));
    config.engine_metrics_interval = Some(Duration::from_millis(10));
    let gateway = gateway_with(config).await;
    let asked = |worker: &FakeWorker, key: &str, paths: &[&str]| {
        let requests = worker.own_requests("authorization");
        let has_key = |(_, value): &(String, Option<String>)| value.as_deref() == Some(key);
        assert!(requests.iter().all(has_key), "{requests:?}");
        let is_asked = |path: &&str| requests.iter().any(|(line, _)| line.contains(path));
        paths.iter().all(is_asked)
    };
    let vllm_paths = ["/health", "/v1/models", "/metrics", "/kv_event_sources"];
    until("all queries", || {
        asked(&first, "Bearer shared", &vllm_paths)
    })
    .await;
    let sglang_paths = ["/health", "/v1/models", "/metrics", "/server_info"];
    until("all queries", || {
        asked(&second, "Bearer own", &sglang_paths)
    })
    .await;

    // Round robin begins with the first worker.
    let sent = forwarded(&gateway, &mut first, Some("Bearer client")).await;
    assert_eq!(sent.as_deref(), Some("Bearer client"));
}

#[tokio::test]
async fn a_client_without_a_key_gets_the_workers_only_if_that_is_configured() {
    for (for_clients, expected) in [(false, None), (true, Some("Bearer shared"))] {
        let mut worker = FakeWorker::start().await;
        let mut config = config(&[&worker]);
        config.worker_key.source = Some(ApiKeySource::Value("shared".to_owned()));
        config.worker_key.for_clients = for_clients;
        let gateway = gateway_with(config).await;
        assert_eq!(
            forwarded(&gateway, &mut worker, None).await.as_deref(),
            expected
        );
        let own = forwarded(&gateway, &mut worker, Some("Basic x")).await;
        assert_eq!(own.as_deref(), Some("Basic x"));
    }
}

#[tokio::test]
async fn a_changed_key_is_read_after_the_worker_refused_the_old_one() {
    let worker = FakeWorker::start().await;
    let file = KeyFile::new("changed", "first");
    worker.require_authorization("Bearer first");
    let mut config = config(&[&worker]);
    config.worker_key.source = Some(ApiKeySource::File(file.0.clone()));
    let gateway = gateway_with(config).await;
    worker.require_authorization("Bearer second");
    until("the worker to refuse the key", || {
        state(&gateway, "a") == WorkerState::Unhealthy
    })
    .await;
    let health = worker_json(&gateway, "a").await.unwrap()["health"].clone();
    assert_eq!(health["status"], 401);
    file.write("second");
    until("the worker to accept the new key", || {
        state(&gateway, "a") == WorkerState::Healthy
    })
    .await;
}

#[tokio::test]
async fn a_key_that_cannot_be_read_fails_the_start() {
    let worker = FakeWorker::start().await;
    let mut with_default = config(&[&worker]);
    with_default.worker_key.source = Some(ApiKeySource::File("/nonexistent/key".into()));
    let mut with_own = config(&[&worker]);
    with_own.workers[0].api_key = Some(ApiKeySource::File("/nonexistent/key".into()));
    for config in [with_default, with_own] {
        let started = Gateway::start(config);
        let error = started.unwrap_err();
        assert!(matches!(error, StartError::ApiKey(_)));
        assert!(error.to_string().contains("/nonexistent/key"), "{error}");
    }
}

#[tokio::test]
async fn a_key_file_cannot_be_named_over_http() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[]).await;
    let url = format!("{},api-key=file:/etc/hostname", worker.spec("new"));
    let body = json!({ "url": url }).to_string();
    let response = call(gateway.admin_address(), "POST", "/admin/workers", body).await;
    let error = response.error(400);
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("--worker"), "{message}");
    assert!(workers(&gateway).is_empty());
    assert_eq!(worker.connections(), 0);
}
