//! Events that are not true: what answers report tells, and the shadow takes over.

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
