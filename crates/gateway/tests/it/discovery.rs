//! Discovery: workers that files and URLs list.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpListener;

use crate::fake_worker::*;
use crate::tls::Authority;
use foresee_gateway::{Gateway, GatewayConfig};

/// File with a list, which is removed at the end of the test.
struct ListFile(PathBuf);

impl ListFile {
    fn new(name: &str, text: &str) -> Self {
        let name = format!("foresee-list-{}-{name}", std::process::id());
        let file = Self(std::env::temp_dir().join(name));
        file.write(text);
        file
    }

    /// Replaces the file as a whole.
    fn write(&self, text: &str) {
        let new = self.0.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, &self.0).unwrap();
    }
}

impl Drop for ListFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Returns a list of workers with these names.
fn list(workers: &[(&str, &FakeWorker)]) -> String {
    let groups = workers.iter().map(|(name, worker)| {
        let target = worker.address;
        format!("{{\"targets\": [\"{target}\"], \"labels\": {{\"foresee_name\": \"{name}\"}}}}")
    });
    format!("[{}]", groups.collect::<Vec<_>>().join(","))
}

/// Waits until the gateway has exactly these workers.
async fn until_workers(gateway: &Gateway, expected: &[&str]) {
    until("the listed workers", || {
        let mut names: Vec<_> = workers(gateway).into_keys().collect();
        names.sort();
        names == expected
    })
    .await;
}

/// Returns the number of lists that could not be used, of all sources.
async fn errors(gateway: &Gateway) -> f64 {
    let text = metrics(gateway).await;
    let series = text.lines();
    let series = series.filter(|line| line.starts_with("foresee_discovery_errors_total{"));
    let values = series.map(|line| line.rsplit_once(' ').unwrap().1);
    values.map(|value| value.parse::<f64>().unwrap()).sum()
}

#[tokio::test]
async fn a_file_adds_and_removes_its_own_workers() {
    let mut engines = [FakeWorker::start().await, FakeWorker::start().await];
    let configured = FakeWorker::start().await;
    let file = ListFile::new("file", &list(&[("x", &engines[0])]));
    let mut config = config(&[&configured]);
    config.discovery.files = vec![file.0.clone()];
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &["a", "x"]).await;
    assert_eq!(errors(&gateway).await, 0.0);

    // Lists that cannot be used, and an empty one, change nothing.
    for text in ["[{\"targets\": [\"1.2.", "[]", "{}"] {
        let before = errors(&gateway).await;
        file.write(text);
        let started = std::time::Instant::now();
        while errors(&gateway).await == before {
            assert!(started.elapsed() < Duration::from_secs(20), "{text}");
        }
        until_workers(&gateway, &["a", "x"]).await;
    }

    // A worker with a running request is drained.
    file.write(&list(&[("x", &engines[0]), ("y", &engines[1])]));
    until_workers(&gateway, &["a", "x", "y"]).await;
    until("three healthy workers", || {
        let healthy = foresee_core::workers::WorkerState::Healthy;
        workers(&gateway)
            .values()
            .all(|worker| worker.state == healthy)
    })
    .await;
    let mut clients = Vec::new();
    let mut exchange = None;
    while exchange.is_none() {
        let request = http("POST", CHAT, chat("hi", false));
        clients.push(Client::sending(gateway.address(), request).await);
        until("a request", || {
            exchange = engines[0].try_request();
            exchange.is_some() || gateway.router().booking_count() == clients.len()
        })
        .await;
    }
    file.write(&list(&[("y", &engines[1])]));
    until("the worker to drain", || {
        state(&gateway, "x") == foresee_core::workers::WorkerState::Draining
    })
    .await;
    exchange.unwrap().respond_json("{}").await;
    until_workers(&gateway, &["a", "y"]).await;
}

#[tokio::test]
async fn a_name_that_another_source_has_is_left_out() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let file = ListFile::new("names", &list(&[("a", &engines[1]), ("b", &engines[1])]));
    let mut config = config(&[&engines[0]]);
    config.discovery.files = vec![file.0.clone()];
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &["a", "b"]).await;
    let configured = worker_json(&gateway, "a").await.unwrap();
    assert_eq!(configured["url"], format!("http://{}", engines[0].address));
    assert!(errors(&gateway).await > 0.0);
}

#[tokio::test]
async fn a_list_does_not_remove_the_worker_of_another_source() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    // The description of `a` is that of the configuration.
    let file = ListFile::new("owner", &list(&[("a", &engines[0]), ("b", &engines[1])]));
    let mut config = config(&[&engines[0]]);
    config.discovery.files = vec![file.0.clone()];
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &["a", "b"]).await;
    assert_eq!(errors(&gateway).await, 1.0);
    file.write(&list(&[("c", &engines[1])]));
    until_workers(&gateway, &["a", "c"]).await;
    assert_eq!(
        state(&gateway, "a"),
        foresee_core::workers::WorkerState::Healthy
    );
}

#[tokio::test]
async fn a_url_is_read_in_intervals() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let response = Arc::new(Mutex::new(whole(
        "200 OK",
        "application/json",
        list(&[("x", &engines[0])]),
    )));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = Arc::clone(&response);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = Connection::new(stream);
            connection.head().await.unwrap();
            let bytes = served.lock().clone();
            tokio::io::AsyncWriteExt::write_all(&mut connection.stream, &bytes)
                .await
                .unwrap();
        }
    });
    let mut config: GatewayConfig = config(&[]);
    config.discovery.urls = vec![format!("http://{address}/targets").parse().unwrap()];
    config.discovery.refresh = Duration::from_millis(20);
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &["x"]).await;
    *response.lock() = whole("500 Internal Server Error", "text/plain", "");
    let started = std::time::Instant::now();
    while errors(&gateway).await == 0.0 {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    until_workers(&gateway, &["x"]).await;
    *response.lock() = whole("200 OK", "application/json", list(&[("y", &engines[1])]));
    until_workers(&gateway, &["y"]).await;
}

#[tokio::test]
async fn workers_that_cannot_be_added_do_not_disturb_others() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let (listed, configured) = (&engines[0], &engines[1]);
    // Every name of the configuration is taken; one worker of the list is new and one is replaced.
    let file = ListFile::new("disturb", &list(&[("x", listed)]));
    let mut config = config(&[configured, configured, configured]);
    config.discovery.files = vec![file.0.clone()];
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &["a", "b", "c", "x"]).await;
    let before = generation(&gateway, "x");
    let listed_anew = [
        ("x", configured),
        ("y", listed),
        ("a", listed),
        ("z", listed),
        ("b", listed),
        ("c", listed),
    ];
    file.write(&list(&listed_anew));
    until_workers(&gateway, &["a", "b", "c", "x", "y", "z"]).await;
    // Each was added once: y, z, and x with its other address.
    let mut added = ["x", "y", "z"].map(|name| generation(&gateway, name));
    added.sort_unstable();
    assert_eq!(added, [before + 1, before + 2, before + 3]);
    assert_eq!(errors(&gateway).await, 3.0);
}

/// Returns the number of a worker, counted over all that were ever added.
fn generation(gateway: &Gateway, name: &str) -> u64 {
    let id = format!("{:?}", workers(gateway)[name].id);
    let (_, number) = id.split_once("generation: ").unwrap();
    number.split(',').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_list_is_read_over_https() {
    let engine = FakeWorker::start().await;
    let authority = Authority::new();
    let tls = authority.sign("server").acceptor(None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let response = whole("200 OK", "application/json", list(&[("x", &engine)]));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that does not trust the certificate ends the handshake.
            let Ok(mut stream) = tls.accept(stream).await else {
                continue;
            };
            let mut head = [0; 1024];
            tokio::io::AsyncReadExt::read(&mut stream, &mut head)
                .await
                .unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, &response)
                .await
                .unwrap();
        }
    });
    let mut config: GatewayConfig = config(&[]);
    config.discovery.urls = vec![format!("https://localhost:{port}/targets").parse().unwrap()];
    config.discovery.refresh = Duration::from_millis(20);
    // The system does not trust the authority.
    let gateway = gateway_with(config.clone()).await;
    let started = std::time::Instant::now();
    while errors(&gateway).await == 0.0 {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    assert!(workers(&gateway).is_empty());
    let ca = ListFile::new("ca", &authority.certificate);
    config.discovery.url_ca = Some(ca.0.clone());
    let gateway = gateway_with(config).await;
    until_workers(&gateway, &["x"]).await;
}
