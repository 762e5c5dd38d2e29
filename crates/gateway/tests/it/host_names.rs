//! Workers named by a host name: look-ups in the background, several addresses, and failures.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_core::workers::WorkerState;
use foresee_gateway::{Gateway, GatewayConfig, Resolver};
use parking_lot::Mutex;
use serde_json::{Value, json};

/// Name service of a test: the addresses of the only name, or none for an error.
#[derive(Clone, Default)]
struct Names {
    addresses: Arc<Mutex<Option<Vec<IpAddr>>>>,
    look_ups: Arc<Mutex<usize>>,
}

impl Names {
    fn set(&self, addresses: &[&str]) {
        let addresses = addresses.iter().map(|address| address.parse().unwrap());
        *self.addresses.lock() = Some(addresses.collect());
    }

    fn fail(&self) {
        *self.addresses.lock() = None;
    }

    fn look_ups(&self) -> usize {
        *self.look_ups.lock()
    }

    fn resolver(&self) -> Resolver {
        let names = self.clone();
        Resolver::from_fn(move |host| {
            assert_eq!(host, "gpu.test");
            *names.look_ups.lock() += 1;
            let found = names.addresses.lock().clone();
            async move { found.ok_or_else(|| io::Error::other("no such host")) }
        })
    }

    /// Returns a configuration with one worker `gpu` at `http://gpu.test:PORT`, and with frequent
    /// look-ups.
    fn config(&self, port: u16, options: &str) -> GatewayConfig {
        let mut config = config(&[]);
        let description = format!("http://gpu.test:{port},name=gpu{options}");
        config.workers = vec![description.parse().unwrap()];
        config.dns.refresh = Duration::from_millis(20);
        config.dns.resolver = self.resolver();
        config
    }

    /// Waits until the gateway has acted on the present addresses: the look-up after the next has
    /// begun.
    async fn until_looked_up(&self) {
        let before = self.look_ups();
        until("two look-ups", || self.look_ups() >= before + 2).await;
    }
}

fn names_of(gateway: &Gateway) -> BTreeSet<String> {
    workers(gateway).into_keys().collect()
}

async fn until_names(gateway: &Gateway, expected: &[&str]) {
    let expected: BTreeSet<_> = expected.iter().map(|name| (*name).to_owned()).collect();
    until("the workers of the name", || names_of(gateway) == expected).await;
}

async fn until_healthy(gateway: &Gateway, name: &str) {
    until("the worker to be healthy", || {
        workers(gateway)
            .get(name)
            .is_some_and(|worker| worker.state == WorkerState::Healthy)
    })
    .await;
}

/// Sends a prompt of many blocks, which `worker` serves, and waits until it counts as cached.
async fn fill_cache(gateway: &Gateway, worker: &mut FakeWorker) {
    let body = chat(&"a prompt of many blocks ".repeat(40), false);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, &body)).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
    until("the prompt to be cached", || {
        workers(gateway)["gpu"].cached_blocks > 10
    })
    .await;
}

/// Starts workers at one port of 127.0.0.1, 127.0.0.2 and so on.
async fn workers_at_one_port(count: u8) -> Vec<FakeWorker> {
    let first = FakeWorker::start().await;
    let port = first.address.port();
    let mut fleet = vec![first];
    for last in 2..=count {
        let address = SocketAddr::from(([127, 0, 0, last], port));
        fleet.push(FakeWorker::at(address, &[MODEL]).await);
    }
    fleet
}

#[tokio::test]
async fn requests_go_to_the_address_with_the_name_in_the_host_header() {
    let mut worker = FakeWorker::start().await;
    let names = Names::default();
    names.set(&["127.0.0.1"]);
    let port = worker.address.port();
    let gateway = gateway_with(names.config(port, "")).await;
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, chat("hi", true))).await;
    let exchange = worker.request().await;
    let host = format!("gpu.test:{port}");
    assert_eq!(exchange.head.get("host"), Some(host.as_str()));
    exchange.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
    let own = worker.own_requests("host");
    assert!(own.iter().all(|(_, value)| value.as_ref() == Some(&host)));
    let shown = worker_json(&gateway, "gpu").await.unwrap();
    assert_eq!(shown["url"], format!("http://{host}"));
    assert_eq!(shown["address"], "127.0.0.1");
    assert_eq!(names_of(&gateway).len(), 1);
}

#[tokio::test]
async fn a_name_that_no_longer_resolves_keeps_its_address_and_cache() {
    let mut worker = FakeWorker::start().await;
    let names = Names::default();
    names.set(&["127.0.0.1"]);
    let gateway = gateway_with(names.config(worker.address.port(), "")).await;
    fill_cache(&gateway, &mut worker).await;
    names.fail();
    within("failed look-ups to be counted", async {
        let failures = "foresee_dns_failures_total{worker=\"gpu\"}";
        while value(&metrics(&gateway).await, failures).unwrap() < 3.0 {}
    })
    .await;
    // New connections work, too.
    let probes = worker.probes();
    until("more health checks", || worker.probes() >= probes + 2).await;
    fill_cache(&gateway, &mut worker).await;
    assert_eq!(state(&gateway, "gpu"), WorkerState::Healthy);
    // An empty response says as little.
    names.set(&[]);
    names.until_looked_up().await;
    assert_eq!(state(&gateway, "gpu"), WorkerState::Healthy);
    assert!(workers(&gateway)["gpu"].cached_blocks > 10);
}

#[tokio::test]
async fn a_worker_whose_name_was_never_resolved_shows_the_cause_until_it_is() {
    let worker = FakeWorker::start().await;
    let names = Names::default();
    let gateway = Gateway::start(names.config(worker.address.port(), "")).unwrap();
    within("a health check to fail", async {
        loop {
            let shown = worker_json(&gateway, "gpu").await.unwrap();
            let health = &shown["health"];
            if let Some(error) = health["last_error"].as_str() {
                assert!(error.contains("gpu.test"), "{error}");
                assert!(error.contains("no such host"), "{error}");
                assert_eq!(health["status"], Value::Null);
                break;
            }
        }
    })
    .await;
    let response = call(gateway.address(), "POST", CHAT, chat("hi", true)).await;
    response.error(503);
    names.set(&["127.0.0.1"]);
    until_healthy(&gateway, "gpu").await;
}

#[tokio::test]
async fn each_address_of_a_name_is_a_worker_and_leaves_with_the_address() {
    let mut fleet = workers_at_one_port(3).await;
    let names = Names::default();
    names.set(&["127.0.0.2", "127.0.0.1"]);
    let gateway = gateway_with(names.config(fleet[0].address.port(), "")).await;
    until_names(&gateway, &["gpu", "gpu@127.0.0.2"]).await;
    until_healthy(&gateway, "gpu@127.0.0.2").await;

    // Both serve. The second keeps a request while its address leaves the name.
    let request = http("POST", CHAT, chat("hi", true));
    let mut clients = Vec::new();
    for _ in 0..2 {
        clients.push(Client::sending(gateway.address(), &request).await);
    }
    let first = fleet[0].request().await;
    let mut second = fleet[1].request().await;
    first.respond_json("{}").await;
    second.start_stream().await;
    second.send_chunk(token("x")).await;
    names.set(&["127.0.0.1", "127.0.0.3"]);
    until_names(&gateway, &["gpu", "gpu@127.0.0.2", "gpu@127.0.0.3"]).await;
    until("the worker to drain", || {
        state(&gateway, "gpu@127.0.0.2") == WorkerState::Draining
    })
    .await;
    until_healthy(&gateway, "gpu@127.0.0.3").await;
    assert_eq!(state(&gateway, "gpu"), WorkerState::Healthy);
    second.end_stream().await;
    for mut client in clients {
        assert_eq!(client.head().await.status(), 200);
    }
    until_names(&gateway, &["gpu", "gpu@127.0.0.3"]).await;
    assert_eq!(fleet[0].own_requests("host").first().unwrap().1, {
        let port = fleet[0].address.port();
        Some(format!("gpu.test:{port}"))
    });
}

#[tokio::test]
async fn the_only_address_may_change_and_the_worker_keeps_its_name_but_not_its_cache() {
    let mut fleet = workers_at_one_port(2).await;
    let names = Names::default();
    names.set(&["127.0.0.1"]);
    let gateway = gateway_with(names.config(fleet[0].address.port(), "")).await;
    fill_cache(&gateway, &mut fleet[0]).await;
    names.set(&["127.0.0.2"]);
    until("the cache to be cleared", || {
        workers(&gateway)["gpu"].cached_blocks == 0
    })
    .await;
    fill_cache(&gateway, &mut fleet[1]).await;
    assert_eq!(names_of(&gateway), BTreeSet::from(["gpu".to_owned()]));
}

#[tokio::test]
async fn two_address_families_are_one_worker() {
    let worker = FakeWorker::start().await;
    let names = Names::default();
    names.set(&["::1", "127.0.0.1"]);
    let gateway = gateway_with(names.config(worker.address.port(), "")).await;
    names.until_looked_up().await;
    assert_eq!(names_of(&gateway), BTreeSet::from(["gpu".to_owned()]));
    assert!(worker.probes() > 0);
}

#[tokio::test]
async fn removing_the_engine_removes_all_addresses_and_ends_the_look_ups() {
    let fleet = workers_at_one_port(2).await;
    let names = Names::default();
    names.set(&["127.0.0.1", "127.0.0.2"]);
    let gateway = gateway_with(names.config(fleet[0].address.port(), ",ranks=2")).await;
    until_names(
        &gateway,
        &["gpu/0", "gpu/1", "gpu@127.0.0.2/0", "gpu@127.0.0.2/1"],
    )
    .await;
    let response = call(gateway.admin_address(), "DELETE", "/admin/workers/gpu", "").await;
    assert_eq!(response.status(), 202);
    until_names(&gateway, &[]).await;
    // A look-up may have begun before.
    a_few_probe_intervals().await;
    let before = names.look_ups();
    a_few_probe_intervals().await;
    assert_eq!(names.look_ups(), before);
    assert!(names_of(&gateway).is_empty());

    // The name can be added again.
    let url = format!("http://gpu.test:{},name=gpu", fleet[0].address.port());
    let body = json!({ "url": url }).to_string();
    let response = call(gateway.admin_address(), "POST", "/admin/workers", body).await;
    assert_eq!(response.status(), 202);
    until_names(&gateway, &["gpu", "gpu@127.0.0.2"]).await;
    until_healthy(&gateway, "gpu@127.0.0.2").await;
}

#[tokio::test]
async fn a_worker_that_is_drained_by_itself_does_not_come_back() {
    let fleet = workers_at_one_port(2).await;
    let names = Names::default();
    names.set(&["127.0.0.1", "127.0.0.2"]);
    let gateway = gateway_with(names.config(fleet[0].address.port(), "")).await;
    until_names(&gateway, &["gpu", "gpu@127.0.0.2"]).await;
    let path = "/admin/workers/gpu@127.0.0.2";
    let response = call(gateway.admin_address(), "DELETE", path, "").await;
    assert_eq!(response.status(), 202);
    until_names(&gateway, &["gpu"]).await;
    names.until_looked_up().await;
    assert_eq!(names_of(&gateway), BTreeSet::from(["gpu".to_owned()]));
    // A worker is added once the name has lost the address and has it again.
    names.set(&["127.0.0.1"]);
    names.until_looked_up().await;
    names.set(&["127.0.0.1", "127.0.0.2"]);
    until_names(&gateway, &["gpu", "gpu@127.0.0.2"]).await;
}

#[tokio::test]
async fn kv_events_at_the_same_host_use_the_resolved_address() {
    let worker = FakeWorker::start().await;
    let names = Names::default();
    names.set(&["127.0.0.1"]);
    let options = ",kv-events=tcp://gpu.test:5557,replay=tcp://other.test:5558";
    let gateway = gateway_with(names.config(worker.address.port(), options)).await;
    let events = worker_json(&gateway, "gpu").await.unwrap()["kv_events"].clone();
    assert_eq!(events["source"], "tcp://127.0.0.1:5557");
    assert_eq!(events["replay"], "tcp://other.test:5558");
}

#[tokio::test]
async fn a_name_that_is_not_resolved_in_the_background_is_one_worker() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[]);
    let port = worker.address.port();
    let description = format!("http://localhost:{port},name=a,resolve=off");
    config.workers = vec![description.parse().unwrap()];
    config.dns.resolver = Resolver::from_fn(async |_| panic!("the name must not be resolved"));
    let gateway = gateway_with(config).await;
    let own = worker.own_requests("host");
    assert_eq!(own[0].1, Some(format!("localhost:{port}")));
    gateway.shut_down().await;
}

#[tokio::test]
async fn all_parts_of_a_request_can_have_ipv6_addresses() {
    let loopback: SocketAddr = "[::1]:0".parse().unwrap();
    let mut worker = FakeWorker::at(loopback, &[MODEL]).await;
    let mut config = config(&[]);
    config.listen = loopback;
    config.admin_listen = "[::1]:0".parse().unwrap();
    config.workers = vec![format!("http://{}", worker.address).parse().unwrap()];
    let gateway = gateway_with(config).await;
    assert!(gateway.address().is_ipv6());
    let body = chat("question", false);
    let mut client = Client::sending(gateway.address(), http("POST", CHAT, body)).await;
    worker.request().await.respond_json("{}").await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    let name = worker.address.to_string();
    assert_eq!(response.head.get("x-foresee-worker"), Some(&*name));
}
