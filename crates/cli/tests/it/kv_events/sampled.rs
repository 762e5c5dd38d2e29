//! Active blocks that engines report, next to the router's prediction.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_load_of_an_engine_is_shown_while_the_engine_reports_it() {
    let mut engine = Engine::start(MockEngineConfig {
        speedup: 20.0,
        ..engine_of(4096, Some(with_replay()))
    });
    let fleet = Fleet::following(&engine).await;
    fleet
        .becomes(|worker| worker["engine_active_blocks"] == 0)
        .await;
    let prompts = prompts(8);
    let mut sending = tokio::task::JoinSet::new();
    for prompt in prompts.clone() {
        let body =
            json!({ "prompt": prompt, "max_tokens": 4000, "ignore_eos": true, "stream": true });
        let address = fleet.gateway.address();
        sending.spawn(async move {
            let body = body.to_string();
            http(address, "POST", "/v1/completions", &body).await;
        });
    }
    // Both numbers grow with the outputs beyond the blocks of the prompts. They are read at
    // different times, so they are only about equal.
    let block_size = BLOCK as usize;
    let prompt_blocks: usize = prompts.iter().map(|prompt| prompt.len() / block_size).sum();
    fleet
        .becomes(|worker| {
            let blocks = |field: &str| worker[field].as_u64().unwrap_or(0);
            let (reported, predicted) = (blocks("engine_active_blocks"), blocks("active_blocks"));
            reported > prompt_blocks as u64 && reported.abs_diff(predicted) <= predicted / 5
        })
        .await;
    let metric = "foresee_worker_engine_active_blocks{worker=\"w\"}";
    assert!(fleet.metric(metric).await > 0.0);
    sending.shutdown().await;
    fleet
        .becomes(|worker| worker["engine_active_blocks"] == 0 && worker["active_blocks"] == 0)
        .await;

    engine.stop().await;
    fleet
        .becomes(|worker| worker["name"] == "w" && worker["engine_active_blocks"].is_null())
        .await;
    let (_, metrics) = http(fleet.gateway.admin_address(), "GET", "/metrics", "").await;
    assert!(!metrics.contains(metric), "{metrics}");
}
