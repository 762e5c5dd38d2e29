//! Discovery of pods, with a scripted API server.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use foresee_core::workers::{WorkerId, WorkerState};
use foresee_gateway::{Gateway, GatewayConfig, KubernetesConfig};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::fake_api_server::{ApiServer, NAMESPACE, Pod};
use crate::fake_worker::*;

/// Time between two lists where the test relies on the watch.
pub(crate) const LONG: Duration = Duration::from_secs(600);

/// Time between two lists where the test relies on lists.
const SHORT: Duration = Duration::from_millis(300);

/// Label of the series of the source.
const SOURCE: &str = "{source=\"kubernetes:app=vllm\"}";

pub(crate) fn config_for(server: &ApiServer, resync: Duration) -> GatewayConfig {
    let mut config = config(&[]);
    config.discovery.kubernetes = KubernetesConfig {
        selector: Some("app=vllm".to_owned()),
        resync,
        kubeconfig: Some(server.kubeconfig.clone()),
        ..KubernetesConfig::default()
    };
    config
}

pub(crate) async fn start(server: &ApiServer, resync: Duration) -> Gateway {
    gateway_with(config_for(server, resync)).await
}

/// Waits until the gateway has exactly the workers of these pods, all of them healthy or draining.
pub(crate) async fn until_pods(gateway: &Gateway, expected: &[&str]) {
    let mut expected: Vec<_> = expected
        .iter()
        .map(|name| format!("{NAMESPACE}/{name}"))
        .collect();
    expected.sort();
    let started = Instant::now();
    loop {
        let workers = workers(gateway);
        let mut names: Vec<_> = workers.keys().cloned().collect();
        names.sort();
        let is_starting = |state| state == WorkerState::Unhealthy;
        if names == expected && !workers.values().any(|worker| is_starting(worker.state)) {
            return;
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "workers are {names:?}, not {expected:?}"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn id(gateway: &Gateway, name: &str) -> WorkerId {
    workers(gateway)[&format!("{NAMESPACE}/{name}")].id
}

pub(crate) async fn metric(gateway: &Gateway, name: &str) -> f64 {
    let text = metrics(gateway).await;
    value(&text, &format!("foresee_discovery_{name}{SOURCE}")).unwrap()
}

async fn until_errors(gateway: &Gateway, above: f64) {
    let started = Instant::now();
    while metric(gateway, "errors_total").await <= above {
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

#[tokio::test]
async fn ready_pods_of_the_selector_become_workers() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let server = ApiServer::start().await;
    let [a, b] = ["a", "b"].map(|name| Pod::at(name, engines[usize::from(name == "b")].address));
    server.apply(a.clone().annotated("foresee.dev/blocks", "77"));
    let mut other = b.clone();
    other.name = "other".to_owned();
    other.labels.insert("app".to_owned(), "web".to_owned());
    server.apply(other);
    // One that starts: first without an address, then not ready.
    let mut starting = b.clone();
    (starting.phase, starting.ready) = ("Pending", false);
    starting.ip = String::new();
    server.apply(starting.clone());
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a"]).await;
    let shown = worker_json(&gateway, "prod/a").await.unwrap();
    assert_eq!(shown["url"], format!("http://{}", engines[0].address));
    assert_eq!(workers(&gateway)["prod/a"].capacity_blocks, 77);
    assert_eq!(metric(&gateway, "workers").await, 1.0);
    assert!(metric(&gateway, "last_success_timestamp_seconds").await > 1e9);

    starting.ip = b.ip.clone();
    server.apply(starting.clone());
    starting.phase = "Running";
    server.apply(starting.clone());
    until("the watch", || server.watches() == 1).await;
    a_few_probe_intervals().await;
    until_pods(&gateway, &["a"]).await;
    server.apply(b.clone());
    until_pods(&gateway, &["a", "b"]).await;

    // Readiness that flaps is left to the router's own health checks.
    let before = id(&gateway, "b");
    server.apply(starting.clone());
    // A later change shows that this one was applied.
    server.delete("a");
    until_pods(&gateway, &["b"]).await;
    assert_eq!(id(&gateway, "b"), before);
    assert_eq!(server.lists(), 1);
    assert_eq!(metric(&gateway, "errors_total").await, 0.0);
}

#[tokio::test]
async fn pods_that_end_or_lose_their_label_leave() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    let pod = |name: &str| Pod::at(name, engine.address);
    for name in ["deleted", "relabelled", "evicted", "finished", "stays"] {
        server.apply(pod(name));
    }
    let gateway = start(&server, LONG).await;
    let mut left = vec!["deleted", "relabelled", "evicted", "finished", "stays"];
    until_pods(&gateway, &left).await;
    // Deleted by force: no timestamp announces it.
    server.delete("deleted");
    left.retain(|name| *name != "deleted");
    until_pods(&gateway, &left).await;
    let mut relabelled = pod("relabelled");
    relabelled
        .labels
        .insert("app".to_owned(), "debug".to_owned());
    server.apply(relabelled);
    left.retain(|name| *name != "relabelled");
    until_pods(&gateway, &left).await;
    // An evicted pod stays in the list, without an address.
    let mut evicted = pod("evicted");
    (evicted.phase, evicted.ip) = ("Failed", String::new());
    server.apply(evicted);
    left.retain(|name| *name != "evicted");
    until_pods(&gateway, &left).await;
    let mut finished = pod("finished");
    finished.phase = "Succeeded";
    server.apply(finished);
    until_pods(&gateway, &["stays"]).await;
    assert_eq!(server.lists(), 1);
    assert_eq!(metric(&gateway, "workers").await, 1.0);
}

#[tokio::test]
async fn a_terminating_pod_gets_no_new_request_and_ends_its_streams() {
    let mut engines = [FakeWorker::start().await, FakeWorker::start().await];
    let server = ApiServer::start().await;
    server.apply(Pod::at("a", engines[0].address));
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a"]).await;
    let request = http("POST", CHAT, chat("hi", true));
    let mut client = Client::sending(gateway.address(), &request).await;
    let mut stream = engines[0].request().await;
    stream.start_stream().await;
    stream.send_chunk(token("one")).await;
    assert_eq!(client.head().await.status(), 200);
    server.apply(Pod::at("b", engines[1].address));
    until_pods(&gateway, &["a", "b"]).await;
    server.terminate("a");
    until("the pod to drain", || {
        state(&gateway, "prod/a") == WorkerState::Draining
    })
    .await;
    for _ in 0..4 {
        let other = Client::sending(gateway.address(), &request).await;
        let mut exchange = engines[1].request().await;
        exchange.start_stream().await;
        exchange.end_stream().await;
        drop(other);
    }
    // The pod is gone from the list, but its stream goes on.
    server.delete("a");
    stream.send_chunk(token("two")).await;
    stream.end_stream().await;
    assert!(client.rest().await.unwrap().contains("[DONE]"));
    assert!(engines[0].is_idle());
    until_pods(&gateway, &["b"]).await;
}

#[tokio::test]
async fn an_address_that_another_pod_takes_over_is_another_worker() {
    let mut engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    server.apply(Pod::at("a", engine.address));
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a"]).await;
    let first = id(&gateway, "a");
    // A stream that never ends: the process is gone, and its connection with it.
    let request = http("POST", CHAT, chat("hi", true));
    let _client = Client::sending(gateway.address(), &request).await;
    let _stream = engine.request().await;

    // The same name and address, as a StatefulSet gives them to the next pod.
    let mut next = Pod::at("a", engine.address);
    next.uid = "another".to_owned();
    server.delete("a");
    server.apply(next.clone());
    until("another worker", || {
        let workers = workers(&gateway);
        workers
            .get("prod/a")
            .is_some_and(|worker| worker.id != first)
    })
    .await;
    until_pods(&gateway, &["a"]).await;
    assert_eq!(workers(&gateway)["prod/a"].requests, 0);

    // Another name at the same address, while the first pod still has a stream.
    let _client = Client::sending(gateway.address(), &request).await;
    let _stream = engine.request().await;
    server.delete("a");
    server.apply(Pod::at("b", engine.address));
    until_pods(&gateway, &["b"]).await;
    assert_eq!(workers(&gateway)["prod/b"].requests, 0);

    // One change in place of two: the uid alone differs.
    let before = id(&gateway, "b");
    let mut changed = Pod::at("b", engine.address);
    changed.uid = "third".to_owned();
    server.apply(changed);
    until("another worker", || {
        let workers = workers(&gateway);
        workers
            .get("prod/b")
            .is_some_and(|worker| worker.id != before)
    })
    .await;
}

#[tokio::test]
async fn two_pods_can_swap_their_addresses() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let [one, other] = [engines[0].address, engines[1].address];
    let server = ApiServer::start().await;
    server.apply(Pod::at("a", one));
    server.apply(Pod::at("b", other));
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a", "b"]).await;
    server.apply(Pod::at("a", other));
    server.apply(Pod::at("b", one));
    for (name, address) in [("prod/a", other), ("prod/b", one)] {
        let started = Instant::now();
        loop {
            let shown = worker_json(&gateway, name).await;
            if shown.is_some_and(|shown| shown["url"] == format!("http://{address}")) {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{name}");
        }
    }
    until_pods(&gateway, &["a", "b"]).await;
}

#[tokio::test]
async fn a_watch_that_breaks_off_or_expires_is_followed_by_a_list() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    server.apply(Pod::at("a", engine.address));
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a"]).await;

    server.sever();
    server.apply(Pod::at("b", engine.address));
    until_pods(&gateway, &["a", "b"]).await;
    until("a watch", || server.watches() == 1).await;
    // Missed changes, and a version that is too old: reported in the watch, then by its status.
    server.remove_silently("a");
    server.apply_silently(Pod::at("c", engine.address));
    server.expire();
    until_pods(&gateway, &["b", "c"]).await;
    until("a watch", || server.watches() == 1).await;
    server.expire_next();
    server.sever();
    server.delete("c");
    until_pods(&gateway, &["b"]).await;
    until("a watch", || server.watches() == 1).await;
    assert_eq!(metric(&gateway, "errors_total").await, 0.0);
}

#[tokio::test]
async fn pods_are_listed_again_whatever_the_watch_says() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    for name in ["a", "b"] {
        server.apply(Pod::at(name, engine.address));
    }
    let gateway = start(&server, SHORT).await;
    until_pods(&gateway, &["a", "b"]).await;
    server.remove_silently("a");
    until_pods(&gateway, &["b"]).await;
    // The watch stays open and shows nothing.
    server.set_silent(true);
    server.apply(Pod::at("c", engine.address));
    server.delete("b");
    until_pods(&gateway, &["c"]).await;
}

#[tokio::test]
async fn an_api_server_that_fails_changes_nothing() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    server.apply(Pod::at("a", engine.address));
    let gateway = start(&server, SHORT).await;
    until_pods(&gateway, &["a"]).await;
    let refusals = [
        (
            403,
            "pods is forbidden: User \"u\" cannot list resource \"pods\"",
        ),
        (500, "etcdserver: request timed out"),
        (429, "too many requests"),
    ];
    for refusal in refusals {
        let before = metric(&gateway, "errors_total").await;
        server.refuse(Some(refusal));
        until_errors(&gateway, before).await;
        until_pods(&gateway, &["a"]).await;
    }
    server.refuse(None);
    server.set_hanging(true);
    let before = metric(&gateway, "errors_total").await;
    until_errors(&gateway, before).await;
    until_pods(&gateway, &["a"]).await;
    server.set_hanging(false);
    server.set_delay(Duration::from_millis(20));
    server.apply_silently(Pod::at("b", engine.address));
    until_pods(&gateway, &["a", "b"]).await;
}

#[tokio::test]
async fn the_start_does_not_wait_for_the_api_server() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    server.set_hanging(true);
    let mut config = config_for(&server, LONG);
    config.workers = vec![engine.spec("configured").parse().unwrap()];
    let gateway = gateway_with(config).await;
    let names: Vec<_> = workers(&gateway).into_keys().collect();
    assert_eq!(names, ["configured"]);
    let ready = call(gateway.admin_address(), "GET", "/health/ready", "").await;
    assert_eq!(ready.status(), 200);
}

#[tokio::test]
async fn tokens_rotate() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    server.require_token("first");
    server.apply(Pod::at("a", engine.address));
    let gateway = start(&server, SHORT).await;
    until_pods(&gateway, &["a"]).await;
    assert_eq!(metric(&gateway, "errors_total").await, 0.0);
    // The file is behind the server for a moment.
    server.require_token("second");
    until_errors(&gateway, 0.0).await;
    std::fs::write(&server.token_file, "second").unwrap();
    server.apply(Pod::at("b", engine.address));
    until_pods(&gateway, &["a", "b"]).await;
}

#[tokio::test]
async fn the_api_server_is_reached_over_tls() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start_tls().await;
    server.require_token("first");
    server.apply(Pod::at("a", engine.address));
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a"]).await;

    // Another authority than the server's.
    let other = ApiServer::start_tls().await;
    let folder = |server: &ApiServer| server.kubeconfig.parent().unwrap().to_owned();
    std::fs::copy(
        folder(&server).join("ca.crt"),
        folder(&other).join("ca.crt"),
    )
    .unwrap();
    other.apply(Pod::at("a", engine.address));
    let gateway = start(&other, LONG).await;
    until_errors(&gateway, 0.0).await;
    assert!(workers(&gateway).is_empty());
}

#[tokio::test]
async fn a_pool_names_labels_and_ports() {
    let engines = [FakeWorker::start().await, FakeWorker::start().await];
    let ports = [engines[0].address.port(), engines[1].address.port()];
    let server = ApiServer::start().await;
    let mut pod = Pod::at("a", engines[0].address);
    pod.annotations.clear();
    server.apply(pod.clone());
    server.set_pool("pool", ("app", "vllm"), &ports);
    let mut config = config_for(&server, SHORT);
    config.discovery.kubernetes.selector = None;
    config.discovery.kubernetes.pools = vec!["pool".parse().unwrap()];
    let gateway = gateway_with(config).await;
    let both = ports.map(|port| format!("a:{port}"));
    until_pods(&gateway, &[&both[0], &both[1]]).await;
    // Ports of the annotation, then a pool with another selector.
    server.apply(
        pod.clone()
            .annotated("llm-d.ai/active-ports", &ports[1].to_string()),
    );
    until_pods(&gateway, &["a"]).await;
    pod.name = "other".to_owned();
    pod.labels.insert("app".to_owned(), "sglang".to_owned());
    server.apply(pod);
    server.set_pool("pool", ("app", "sglang"), &ports[..1]);
    until_pods(&gateway, &["other"]).await;
    let text = metrics(&gateway).await;
    let series = "foresee_discovery_workers{source=\"kubernetes:pool/pool\"}";
    assert_eq!(value(&text, series), Some(1.0));
}

#[tokio::test]
async fn annotations_describe_a_worker() {
    let engine = FakeWorker::start().await;
    let server = ApiServer::start().await;
    let pod = Pod::at("a", engine.address);
    server.apply(
        pod.clone()
            .annotated("foresee.dev/blocks", "7")
            .annotated("foresee.dev/ranks", "2")
            .annotated("foresee.dev/unknown", "x"),
    );
    // Files of the router's machine are not for those who can annotate a pod.
    let refused = "bind:tcp://*:5557";
    server.apply(Pod::at("refused", engine.address).annotated("foresee.dev/kv-events", refused));
    let gateway = start(&server, LONG).await;
    until_pods(&gateway, &["a/0", "a/1"]).await;
    assert_eq!(workers(&gateway)["prod/a/0"].capacity_blocks, 7);
    until_errors(&gateway, 0.0).await;
    // What cannot be read leaves the description that the pod had.
    let before = metric(&gateway, "errors_total").await;
    server.apply(pod.clone().annotated("foresee.dev/blocks", "many"));
    until_errors(&gateway, before).await;
    until_pods(&gateway, &["a/0", "a/1"]).await;
    let ports = format!("{0},{0}", engine.address.port());
    server.apply(pod.annotated("foresee.dev/ports", &ports));
    until_pods(&gateway, &["a"]).await;
}

/// Compares the scripted server with what another client expects of a real one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_reads_the_scripted_server() {
    let engine: SocketAddr = "127.0.0.1:8000".parse().unwrap();
    let server = ApiServer::start_tls().await;
    server.require_token("first");
    server.apply(Pod::at("a", engine));
    let mut kubectl = tokio::process::Command::new("kubectl");
    kubectl.arg("--kubeconfig").arg(&server.kubeconfig).args([
        "--cache-dir",
        server.kubeconfig.parent().unwrap().to_str().unwrap(),
        "get",
        "pods",
        "--selector=app=vllm",
        "--output-watch-events",
        "--watch",
        "--output=jsonpath={.type} {.object.metadata.name} {.object.status.podIP}{'\\n'}",
    ]);
    kubectl
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true);
    let Ok(mut process) = kubectl.spawn() else {
        eprintln!("skipped: kubectl is not installed");
        return;
    };
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await;
        line.expect("a line of kubectl").unwrap().unwrap()
    };
    assert_eq!(next().await, "ADDED a 127.0.0.1");
    until("the watch", || server.watches() == 1).await;
    server.terminate("a");
    assert_eq!(next().await, "MODIFIED a 127.0.0.1");
    server.delete("a");
    assert_eq!(next().await, "DELETED a 127.0.0.1");
}
