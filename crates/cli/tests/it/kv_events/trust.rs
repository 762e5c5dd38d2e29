//! Events that contradict responses: the worker becomes untrusted, and its cache is estimated.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Returns whether events are received but untrusted.
fn is_untrusted(worker: &Value) -> bool {
    worker["kv_events"]["state"] == "untrusted" && worker["cache_source"] == "estimated"
}

impl Fleet {
    /// Sends prompts, each twice, until the worker satisfies a condition. The second response
    /// reports whether the blocks of the first are cached.
    async fn send_until(&self, prompts: &[Vec<u32>], expected: impl Fn(&Value) -> bool) {
        let sending = async {
            for prompt in prompts.iter().cycle() {
                for _ in 0..2 {
                    self.send(prompt, 1).await;
                    if expected(&self.worker().await) {
                        return;
                    }
                }
            }
        };
        let sent = tokio::time::timeout(STATE_TIMEOUT, sending).await;
        assert!(sent.is_ok(), "{:#}", self.worker().await);
    }
}

/// The engine stops publishing events but serves requests. After a restart it publishes again, and
/// its events are trusted after they have agreed with enough responses.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_stop_are_untrusted_until_they_agree_with_responses_again() {
    let mut engine = Engine::start(engine_of(
        4096,
        Some(KvEventsConfig {
            silent_after: NonZeroU64::new(5),
            ..with_replay()
        }),
    ));
    let fleet = Fleet::following(&engine).await;
    let prompts = prompts(60);
    fleet.send_until(&prompts, is_untrusted).await;
    assert_eq!(fleet.metric("foresee_worker_events_live").await, 0.0);
    assert_eq!(fleet.metric("foresee_kv_events_untrusted_total").await, 1.0);
    // The estimated cache started empty and contains the prompts sent since.
    for prompt in &prompts {
        fleet.send(prompt, 20).await;
        let hit = fleet.send(prompt, 20).await;
        assert_eq!(hit.predicted, hit.actual);
    }
    assert!(is_untrusted(&fleet.worker().await));

    engine.stop().await;
    engine.config.kv_events.as_mut().unwrap().silent_after = None;
    engine.start_again();
    fleet.becomes(|worker| worker["state"] == "healthy").await;
    fleet.send_until(&prompts, follows_events).await;
    fleet.catches_up(&engine).await;
    let hit = fleet.send(&prompts[59], 20).await;
    assert_eq!(hit.predicted, hit.actual);
    assert_eq!(fleet.worker().await["kv_events"]["state"], "live");
    assert_eq!(fleet.metric("foresee_worker_events_live").await, 1.0);
}

/// The engine does not report evictions, so that its events claim blocks that are no longer cached.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_claim_evicted_blocks_are_untrusted() {
    let engine = Engine::start(engine_of(
        48,
        Some(KvEventsConfig {
            hide_removals: true,
            ..with_replay()
        }),
    ));
    let fleet = Fleet::following(&engine).await;
    // The prompts need three times the blocks of the engine: each is evicted before it is repeated.
    let prompts: Vec<Vec<u32>> = (0..12)
        .map(|number| (0..12 * BLOCK).map(|token| number * 1000 + token).collect())
        .collect();
    let mut repeated = prompts.iter().cycle();
    let sending = async {
        while !is_untrusted(&fleet.worker().await) {
            fleet.send(repeated.next().unwrap(), 1).await;
        }
    };
    tokio::time::timeout(STATE_TIMEOUT, sending).await.unwrap();
    for prompt in repeated.take(24) {
        let hit = fleet.send(prompt, 1).await;
        assert_eq!((hit.predicted, hit.actual), (0, 0));
        assert!(is_untrusted(&fleet.worker().await));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_events_and_restarts_do_not_make_events_untrusted() {
    let engine = Engine::start(engine_of(
        256,
        Some(KvEventsConfig {
            lag: Duration::from_millis(20),
            restart_every: NonZeroU64::new(40),
            ..with_replay()
        }),
    ));
    let fleet = Fleet::following(&engine).await;
    let mut restarts = 0;
    for prompt in prompts(80) {
        let hit = fleet.send(&prompt, 20).await;
        assert_eq!(hit.predicted, hit.actual);
        let cached = engine.metric("mock_engine:cached_blocks").await;
        restarts += u32::from(cached == 0);
        let router = fleet.gateway.router();
        let applied = async {
            while router.indexed_blocks() as u64 != cached {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(STATE_TIMEOUT, applied).await.unwrap();
    }
    assert!(restarts > 0);
    let worker = fleet.worker().await;
    assert_eq!(worker["kv_events"]["untrusted"], 0, "{worker:#}");
    assert!(follows_events(&worker), "{worker:#}");
}

/// A proxy between an engine's events and the gateway. It can stop forwarding without closing the
/// connections, as a failing network does.
struct Network {
    /// Endpoint of the proxy, for the gateway.
    endpoint: String,
    /// Number of connections accepted so far.
    connections: Arc<AtomicUsize>,
    /// Number of the oldest connections on which no more events are forwarded.
    dropped: Arc<AtomicUsize>,
    forwarding: JoinHandle<()>,
}

impl Network {
    /// Starts a proxy to the events of an engine.
    async fn to(engine: &Engine) -> Self {
        let events = engine.config.kv_events.as_ref().unwrap();
        let address = events.endpoint.strip_prefix("tcp://").unwrap().to_owned();
        let listener = tokio::net::TcpListener::bind(ANY_PORT).await.unwrap();
        let endpoint = format!("tcp://{}", listener.local_addr().unwrap());
        let connections = Arc::<AtomicUsize>::default();
        let dropped = Arc::<AtomicUsize>::default();
        let (accepted, dropped_count) = (Arc::clone(&connections), Arc::clone(&dropped));
        let forwarding = tokio::spawn(async move {
            loop {
                let (gateway, _) = listener.accept().await.unwrap();
                let engine = TcpStream::connect(&address).await.unwrap();
                let number = accepted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(forward(gateway, engine, number, Arc::clone(&dropped_count)));
            }
        });
        Self {
            endpoint,
            connections,
            dropped,
            forwarding,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Stops forwarding events on all connections that are open now.
    fn drop_connections(&self) {
        self.dropped.store(self.connections(), Ordering::SeqCst);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.forwarding.abort();
    }
}

/// Forwards bytes in both directions until the connection ends. Nothing is forwarded to the gateway
/// if the connection is one of the first `dropped`; `number` counts connections from 0.
async fn forward(gateway: TcpStream, engine: TcpStream, number: usize, dropped: Arc<AtomicUsize>) {
    let (mut gateway_read, mut gateway_write) = gateway.into_split();
    let (mut engine_read, mut engine_write) = engine.into_split();
    let to_engine = tokio::io::copy(&mut gateway_read, &mut engine_write);
    let to_gateway = async {
        let mut bytes = [0; 4096];
        loop {
            let read = engine_read.read(&mut bytes).await?;
            if dropped.load(Ordering::SeqCst) > number {
                std::future::pending::<()>().await;
            }
            if read == 0 {
                return gateway_write.shutdown().await;
            }
            gateway_write.write_all(&bytes[..read]).await?;
        }
    };
    let _ = tokio::join!(to_engine, to_gateway);
}

impl Fleet {
    /// Starts a gateway that follows an engine's events through a proxy, and waits until it does.
    async fn following_over(network: &Network, engine: &Engine) -> Self {
        let mut worker = format!("{},kv-events={}", engine.address, network.endpoint);
        if let Some(replay) = &engine.config.kv_events.as_ref().unwrap().replay {
            worker += &format!(",replay={replay}");
        }
        let fleet = Self::start(&worker);
        fleet.becomes(follows_events).await;
        fleet.receives_events(engine).await;
        fleet
    }
}

/// Returns a prompt that shares no prefix with prompts of other numbers.
fn prompt(number: u32) -> Vec<u32> {
    (0..4 * BLOCK)
        .map(|token| 1000 * (number + 1000) + token)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silently_dropped_connection_is_replaced_when_responses_contradict_the_events() {
    let engine = Engine::start(engine_of(4096, Some(publishing())));
    let network = Network::to(&engine).await;
    let fleet = Fleet::following_over(&network, &engine).await;
    let connections = network.connections();
    network.drop_connections();
    let unreported: Vec<_> = (0..20).map(prompt).collect();
    fleet.send_until(&unreported, is_untrusted).await;
    let reported: Vec<_> = (20..60).map(prompt).collect();
    fleet.send_until(&reported, follows_events).await;
    assert!(network.connections() > connections);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_replaced_when_events_arrive_only_by_replay() {
    let engine = Engine::start(engine_of(4096, Some(with_replay())));
    let network = Network::to(&engine).await;
    let fleet = Fleet::following_over(&network, &engine).await;
    let connections = network.connections();
    network.drop_connections();
    let sending = async {
        for number in 0.. {
            // Each prompt is sent once and hits no cached block, so responses cannot contradict
            // events.
            fleet.send(&prompt(number), 1).await;
            if network.connections() > connections {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(STATE_TIMEOUT, sending).await.unwrap();
    fleet.catches_up(&engine).await;
    let worker = fleet.worker().await;
    assert_eq!(worker["kv_events"]["untrusted"], 0, "{worker:#}");
    assert_eq!(worker["kv_events"]["exact"], true, "{worker:#}");
}
