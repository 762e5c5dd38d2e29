//! `foresee serve --state`: learned speeds survive a restart.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;

use serde_json::Value;

use crate::ports::free_port;
use crate::process::{Process, eventually, exchange};

/// A router with one worker and a state file.
struct Router {
    process: Process,
    api: SocketAddr,
    admin: SocketAddr,
}

impl Router {
    fn start(engine: SocketAddr, state: &str) -> Self {
        let [api, admin] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
        let worker = format!("http://{engine},name=a");
        let process = Process::start(&[
            "serve",
            "--worker",
            &worker,
            "--state",
            state,
            "--listen",
            &api,
            "--admin-listen",
            &admin,
            "--shutdown-delay",
            "1ms",
        ]);
        let [api, admin] = [api, admin].map(|address| address.parse().unwrap());
        eventually(|| {
            exchange(admin, "GET /health/ready", "").filter(|(status, _)| *status == 200)
        });
        Self {
            process,
            api,
            admin,
        }
    }

    /// Returns the forecast of the worker: seconds of a decode step, and of a prompt token.
    fn forecast(&self) -> [f64; 2] {
        let (_, body) = exchange(self.admin, "GET /admin/workers", "").unwrap();
        let list: Value = serde_json::from_str(&body).unwrap();
        let forecast = &list["workers"][0]["forecast"];
        [
            &forecast["decode_step"]["base_seconds"],
            &forecast["prefill"]["seconds_per_token"],
        ]
        .map(|value| value.as_f64().unwrap())
    }

    /// Sends requests whose prompts have 10 to 6,010 words, so that prefill takes far longer than
    /// the delays of a loaded machine.
    fn teach(&self) {
        for index in 0..60 {
            let prompt = "word ".repeat(1_000 * (index % 7) + 10);
            let body = format!(
                "{{\"model\": \"model\", \"prompt\": \"{index} {prompt}\", \"max_tokens\": 20, \
                 \"stream\": true}}"
            );
            assert_eq!(
                exchange(self.api, "POST /v1/completions", &body).unwrap().0,
                200
            );
        }
    }

    /// Ends the router, which writes its state.
    fn stop(mut self) {
        self.process.signal("-TERM");
        assert!(self.process.wait().success());
    }
}

#[test]
fn learned_speeds_survive_a_restart() {
    let engine: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let address = engine.to_string();
    let _engine = Process::start(&["mock-engine", "--listen", &address, "--speedup", "20"]);
    eventually(|| exchange(engine, "GET /health", "").filter(|(status, _)| *status == 200));
    let file = format!("foresee-state-{}.json", std::process::id());
    let path = std::env::temp_dir().join(file);
    let state = path.to_str().unwrap();

    let router = Router::start(engine, state);
    let initial = router.forecast();
    router.teach();
    let learned = router.forecast();
    router.stop();
    assert!(learned[0] < initial[0] / 2.0, "{initial:?} {learned:?}");
    assert!(learned[1] > 0.0, "{learned:?}");
    let router = Router::start(engine, state);
    let restored = router.forecast();
    router.stop();
    for (restored, learned) in restored.iter().zip(learned) {
        assert!(
            (restored / learned - 1.0).abs() < 0.2,
            "{restored} {learned}"
        );
    }

    // A damaged file costs only what was learned.
    std::fs::write(&path, &std::fs::read(&path).unwrap()[..100]).unwrap();
    let router = Router::start(engine, state);
    assert_eq!(router.forecast(), initial);
    router.stop();
    std::fs::remove_file(&path).unwrap();
}
