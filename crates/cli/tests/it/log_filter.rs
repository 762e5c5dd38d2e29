//! The filter of the log is read and replaced over the admin API.

#![allow(clippy::unwrap_used, missing_docs)]

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::ports::free_port;
use crate::process::{Process, eventually, exchange};

#[test]
fn the_log_filter_is_replaced_while_the_router_runs() {
    let log = format!("foresee-log-filter-{}.log", std::process::id());
    let log = std::env::temp_dir().join(log);
    let [api, admin] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
    let listen = ["serve", "--listen", &api, "--admin-listen", &admin];
    let options = ["--worker", "127.0.0.1:1", "--log-level", "warn"];
    let _router = Process::start_with_log(&[&listen[..], &options].concat(), &log);
    let admin: SocketAddr = admin.parse().unwrap();
    eventually(|| exchange(admin, "GET /health/live", "").filter(|(status, _)| *status == 200));
    let filter = |request: &str, body: &str| -> (u16, Value) {
        let (status, body) = exchange(admin, request, body).unwrap();
        (status, serde_json::from_str(&body).unwrap())
    };
    let reload = || exchange(admin, "POST /admin/reload", "").unwrap();
    let has = |text: &str| std::fs::read_to_string(&log).unwrap().contains(text);
    assert_eq!(
        filter("GET /admin/log", ""),
        (200, json!({"filter": "warn"}))
    );
    reload();
    assert!(!has("reloaded the configuration"));

    let (status, body) = filter("PUT /admin/log", r#"{"filter": "info"}"#);
    assert_eq!(status, 200);
    assert!(body["filter"].as_str().unwrap().contains("info"), "{body}");
    reload();
    eventually(|| has("reloaded the configuration").then_some(()));

    for invalid in [r#"{"filter": "inof"}"#, r#"{"level": "info"}"#, "info"] {
        let (status, body) = filter("PUT /admin/log", invalid);
        assert_eq!((status, &body["error"]["param"]), (400, &json!("filter")));
    }
    // Changes over the admin API are logged whatever the level.
    filter("PUT /admin/log", r#"{"filter": "off"}"#);
    exchange(admin, "DELETE /admin/workers/unknown", "").unwrap();
    eventually(|| has("/admin/workers/unknown").then_some(()));
    let _ = std::fs::remove_file(&log);
}
