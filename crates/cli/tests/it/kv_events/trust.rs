//! Events that are not true: what answers report tells, and the shadow takes over.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Whether events are followed, but not believed.
fn is_mistrusted(worker: &Value) -> bool {
    worker["kv_events"]["state"] == "mistrusted" && worker["cache_source"] == "shadow"
}

impl Fleet {
    /// Sends prompts, each twice, until answers have said enough about the events.
    async fn answers_until(&self, prompts: &[Vec<u32>], expected: impl Fn(&Value) -> bool) {
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
        let sent = tokio::time::timeout(PATIENCE, sending).await;
        assert!(sent.is_ok(), "{:#}", self.worker().await);
    }
}

/// Events stop while everything else goes on. When there are some again that would have been
/// right for a while, they are believed again.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_fall_silent_are_not_believed_until_they_are_right_again() {
    let mut engine = Engine::start(engine_of(
        4096,
        Some(KvEventsConfig {
            silent_after: NonZeroU64::new(5),
            ..with_replay()
        }),
    ));
    let fleet = Fleet::following(&engine).await;
    let prompts = prompts(60);
    fleet.answers_until(&prompts, is_mistrusted).await;
    assert_eq!(fleet.metric("foresee_worker_events_live").await, 0.0);
    assert_eq!(
        fleet.metric("foresee_kv_events_mistrusted_total").await,
        1.0
    );
    // The shadow has begun empty, and knows what is sent.
    for prompt in &prompts {
        fleet.send(prompt, 20).await;
        let hit = fleet.send(prompt, 20).await;
        assert_eq!(hit.predicted, hit.actual);
    }
    assert!(is_mistrusted(&fleet.worker().await));

    engine.stop().await;
    engine.config.kv_events.as_mut().unwrap().silent_after = None;
    engine.start_again();
    fleet.becomes(|it| it["state"] == "healthy").await;
    fleet.answers_until(&prompts, follows).await;
    fleet.catches_up(&engine).await;
    let hit = fleet.send(&prompts[59], 20).await;
    assert_eq!(hit.predicted, hit.actual);
    assert_eq!(fleet.worker().await["kv_events"]["state"], "live");
    assert_eq!(fleet.metric("foresee_worker_events_live").await, 1.0);
}

/// Events go on, and claim blocks that are gone.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_claim_hits_that_are_none_are_not_believed() {
    let engine = Engine::start(engine_of(
        48,
        Some(KvEventsConfig {
            hides_removals: true,
            ..with_replay()
        }),
    ));
    let fleet = Fleet::following(&engine).await;
    // Three times what fits, in turn: nothing is there any more when it comes again.
    let prompts: Vec<Vec<u32>> = (0..12)
        .map(|number| (0..12 * BLOCK).map(|token| number * 1000 + token).collect())
        .collect();
    let mut in_turn = prompts.iter().cycle();
    let sending = async {
        while !is_mistrusted(&fleet.worker().await) {
            fleet.send(in_turn.next().unwrap(), 1).await;
        }
    };
    tokio::time::timeout(PATIENCE, sending).await.unwrap();
    for prompt in in_turn.take(24) {
        let hit = fleet.send(prompt, 1).await;
        assert_eq!((hit.predicted, hit.actual), (0, 0));
        assert!(is_mistrusted(&fleet.worker().await));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_network_and_restarts_are_no_lies() {
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
        let cached = engine.metric("model_engine:cached_blocks").await;
        restarts += u32::from(cached == 0);
        let router = fleet.gateway.router();
        let knows = async {
            while router.cached_prefixes() as u64 != cached {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, knows).await.unwrap();
    }
    assert!(restarts > 0);
    let worker = fleet.worker().await;
    assert_eq!(worker["kv_events"]["mistrusted"], 0, "{worker:#}");
    assert!(follows(&worker), "{worker:#}");
}

/// A network between an engine's events and the gateway, which can drop connections without
/// a word to either side.
struct Network {
    endpoint: String,
    connections: Arc<AtomicUsize>,
    /// Of which so many, the oldest, pass nothing on.
    dropped: Arc<AtomicUsize>,
    carrying: JoinHandle<()>,
}

impl Network {
    async fn to(engine: &Engine) -> Self {
        let events = engine.config.kv_events.as_ref().unwrap();
        let address = events.endpoint.strip_prefix("tcp://").unwrap().to_owned();
        let listener = tokio::net::TcpListener::bind(ANY_PORT).await.unwrap();
        let endpoint = format!("tcp://{}", listener.local_addr().unwrap());
        let connections = Arc::<AtomicUsize>::default();
        let dropped = Arc::<AtomicUsize>::default();
        let (opened, lost) = (Arc::clone(&connections), Arc::clone(&dropped));
        let carrying = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let far = TcpStream::connect(&address).await.unwrap();
                let number = opened.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(carry(near, far, number, Arc::clone(&lost)));
            }
        });
        Self {
            endpoint,
            connections,
            dropped,
            carrying,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn drop_connections(&self) {
        self.dropped.store(self.connections(), Ordering::SeqCst);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.carrying.abort();
    }
}

/// Passes bytes on both ways until the connection ends, or is dropped.
async fn carry(near: TcpStream, far: TcpStream, number: usize, lost: Arc<AtomicUsize>) {
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let there = tokio::io::copy(&mut near_read, &mut far_write);
    let back = async {
        let mut bytes = [0; 4096];
        loop {
            let read = far_read.read(&mut bytes).await?;
            if lost.load(Ordering::SeqCst) > number {
                std::future::pending::<()>().await;
            }
            if read == 0 {
                return near_write.shutdown().await;
            }
            near_write.write_all(&bytes[..read]).await?;
        }
    };
    let _ = tokio::join!(there, back);
}

impl Fleet {
    /// A gateway that follows an engine's events over a network.
    async fn following_over(network: &Network, engine: &Engine) -> Self {
        let mut worker = format!("{},kv-events={}", engine.address, network.endpoint);
        if let Some(replay) = &engine.config.kv_events.as_ref().unwrap().replay {
            worker += &format!(",replay={replay}");
        }
        let fleet = Self::start(&worker);
        fleet.becomes(follows).await;
        fleet.hears_again(engine).await;
        fleet
    }
}

/// The prompt with this number, which has nothing in common with the others.
fn prompt(number: u32) -> Vec<u32> {
    (0..4 * BLOCK)
        .map(|token| 1000 * (number + 1000) + token)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_dropped_without_a_word_is_made_anew_when_answers_tell_of_it() {
    let engine = Engine::start(engine_of(4096, Some(publishing())));
    let network = Network::to(&engine).await;
    let fleet = Fleet::following_over(&network, &engine).await;
    let opened = network.connections();
    network.drop_connections();
    let lost: Vec<_> = (0..20).map(prompt).collect();
    fleet.answers_until(&lost, is_mistrusted).await;
    let heard: Vec<_> = (20..60).map(prompt).collect();
    fleet.answers_until(&heard, follows).await;
    assert!(network.connections() > opened);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_made_anew_when_only_replay_brings_anything() {
    let engine = Engine::start(engine_of(4096, Some(with_replay())));
    let network = Network::to(&engine).await;
    let fleet = Fleet::following_over(&network, &engine).await;
    let opened = network.connections();
    network.drop_connections();
    let sending = async {
        for number in 0.. {
            // Each once: nothing is found cached, so answers say nothing.
            fleet.send(&prompt(number), 1).await;
            if network.connections() > opened {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, sending).await.unwrap();
    fleet.catches_up(&engine).await;
    let worker = fleet.worker().await;
    assert_eq!(worker["kv_events"]["mistrusted"], 0, "{worker:#}");
    assert_eq!(worker["kv_events"]["exact"], true, "{worker:#}");
}
