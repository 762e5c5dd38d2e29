//! Discovery of many pods, and of pods that are replaced under load.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use foresee_core::workers::WorkerState;
use foresee_gateway::Gateway;
use tokio::sync::mpsc;

use crate::fake_api_server::{ApiServer, NAMESPACE, Pod};
use crate::fake_worker::*;
use crate::kubernetes::{LONG, config_for, metric, start, until_pods};

#[tokio::test]
async fn a_thousand_pods_come_and_go() {
    const PODS: usize = 1000;
    let engine = FakeWorker::at("0.0.0.0:0".parse().unwrap(), &[MODEL]).await;
    let port = engine.address.port();
    let server = ApiServer::start().await;
    let address = |number: usize| -> SocketAddr {
        let ip = [
            127,
            90,
            u8::try_from(number / 250).unwrap(),
            u8::try_from(number % 250).unwrap(),
        ];
        (ip, port).into()
    };
    let pod = |number: usize| Pod::at(&format!("p{number}"), address(number));
    for number in 0..PODS / 2 {
        server.apply(pod(number));
    }
    let mut config = config_for(&server, LONG);
    config.probe_interval = Duration::from_secs(20);
    let gateway = Gateway::start(config).unwrap();
    let until_count = async |expected: usize| {
        let started = Instant::now();
        while workers(&gateway).len() != expected {
            assert!(started.elapsed() < Duration::from_secs(60));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    until_count(PODS / 2).await;
    for number in PODS / 2..PODS {
        server.apply(pod(number));
    }
    until_count(PODS).await;
    assert_eq!(metric(&gateway, "workers").await, 1000.0);
    // A list with several pages.
    server.sever();
    until("a watch", || server.watches() == 1).await;
    assert!(server.lists() >= 3, "{}", server.lists());
    assert_eq!(workers(&gateway).len(), PODS);
    for number in 10..PODS {
        server.delete(&format!("p{number}"));
    }
    until_count(10).await;
    assert_eq!(metric(&gateway, "errors_total").await, 0.0);
}

/// An engine in a pod: responds to every request with a stream of some tokens.
struct PodEngine {
    name: String,
    address: SocketAddr,
    running: Arc<AtomicUsize>,
    stop: mpsc::Sender<()>,
    stopped: tokio::task::JoinHandle<()>,
}

impl PodEngine {
    async fn start(name: &str, address: SocketAddr) -> Self {
        let mut worker = FakeWorker::at(address, &[MODEL]).await;
        let address = worker.address;
        let running = Arc::new(AtomicUsize::new(0));
        let (stop, mut stopping) = mpsc::channel(1);
        let count = Arc::clone(&running);
        let stopped = tokio::spawn(async move {
            loop {
                let mut exchange = tokio::select! {
                    exchange = worker.request_at_any_time() => exchange,
                    _ = stopping.recv() => break worker.die().await,
                };
                count.fetch_add(1, Ordering::SeqCst);
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    exchange.start_stream().await;
                    for text in ["a", "b", "c"] {
                        tokio::time::sleep(Duration::from_millis(3)).await;
                        exchange.send_chunk(token(text)).await;
                    }
                    exchange.end_stream().await;
                    count.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            name: name.to_owned(),
            address,
            running,
            stop,
            stopped,
        }
    }

    /// Ends the process, as after its last request.
    async fn stop(self) {
        self.stop.send(()).await.unwrap();
        self.stopped.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_of_all_pods_under_load_loses_nothing() {
    const PODS: usize = 4;
    const CLIENTS: usize = 8;
    let server = ApiServer::start().await;
    let mut old = Vec::new();
    for number in 0..PODS {
        let engine =
            PodEngine::start(&format!("old-{number}"), "127.0.0.1:0".parse().unwrap()).await;
        server.apply(Pod::at(&engine.name, engine.address));
        old.push(engine);
    }
    let gateway = start(&server, LONG).await;
    let names: Vec<_> = old.iter().map(|engine| engine.name.as_str()).collect();
    until_pods(&gateway, &names).await;

    let (sent, is_over) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (sent, is_over) = (Arc::clone(&sent), Arc::clone(&is_over));
            let address = gateway.address();
            tokio::spawn(async move {
                while !is_over.load(Ordering::SeqCst) {
                    let request = http("POST", CHAT, chat("hi", true));
                    let mut client = Client::sending(address, request).await;
                    assert_eq!(client.head().await.status(), 200);
                    let body = client.rest().await.unwrap();
                    assert!(body.contains("[DONE]") && body.contains("\"c\""), "{body}");
                    sent.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let until_more = async |more: usize| {
        let target = sent.load(Ordering::SeqCst) + more;
        let started = Instant::now();
        while sent.load(Ordering::SeqCst) < target {
            assert!(started.elapsed() < Duration::from_secs(60), "no responses");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    until_more(50).await;
    let mut started = Vec::new();
    for (number, engine) in old.into_iter().enumerate() {
        let name = format!("new-{number}");
        let new = PodEngine::start(&name, "127.0.0.1:0".parse().unwrap()).await;
        let mut pod = Pod::at(&name, new.address);
        pod.ready = false;
        server.apply(pod.clone());
        pod.ready = true;
        server.apply(pod);
        until("the new pod to be healthy", || {
            let name = format!("{NAMESPACE}/{name}");
            workers(&gateway)
                .get(&name)
                .is_some_and(|worker| worker.state == WorkerState::Healthy)
        })
        .await;
        started.push(new);
        until_more(20).await;
        server.terminate(&engine.name);
        // The process goes on until its requests have ended, as with a `preStop` hook.
        let name = format!("{NAMESPACE}/{}", engine.name);
        until("the old pod to leave", || {
            let is_leaving = !workers(&gateway).contains_key(&name);
            is_leaving && engine.running.load(Ordering::SeqCst) == 0
        })
        .await;
        let gone = engine.name.clone();
        engine.stop().await;
        server.delete(&gone);
        if number % 2 == 0 {
            server.sever();
        }
        until_more(20).await;
    }
    is_over.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    until_pods(&gateway, &["new-0", "new-1", "new-2", "new-3"]).await;
    let text = metrics(&gateway).await;
    let count = |outcome: &str| {
        let series = format!("foresee_requests_total{{outcome=\"{outcome}\"}}");
        value(&text, &series).unwrap()
    };
    let sent = sent.load(Ordering::SeqCst);
    assert_eq!(count("ok"), sent as f64);
    for outcome in [
        "refused",
        "worker_error",
        "worker_failed",
        "unavailable",
        "client_left",
    ] {
        assert_eq!(count(outcome), 0.0, "{outcome}");
    }
    println!("{sent} requests during the update of {PODS} pods, 0 lost");
}
