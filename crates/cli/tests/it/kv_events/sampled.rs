//! What engines say they carry, beside what is predicted.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_an_engine_carries_is_shown_as_long_as_it_says_so() {
    let mut engine = Engine::start(ServerConfig {
        time_scale: 20.0,
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
    // It grows all the while, so both are the same at moments, and more than prompts alone.
    let of_prompts: usize = prompts.iter().map(|it| it.len() / BLOCK as usize).sum();
    fleet
        .becomes(|worker| {
            let theirs = worker["engine_active_blocks"].as_u64();
            theirs.is_some_and(|it| it > of_prompts as u64)
                && worker["active_blocks"] == json!(theirs)
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
