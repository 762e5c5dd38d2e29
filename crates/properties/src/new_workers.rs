//! Bodies of `POST /admin/workers`, as clients of the admin API send them.

use foresee_gateway::{KvEvents, WorkerConfig, parse_new_worker};
use serde_json::{Value, json};

/// Checks a body. Panics if an accepted one gives another worker than its description, or one that
/// reads a file or opens a port of the router's host, or if an error does not name the field.
pub fn check(bytes: &[u8]) {
    let config = match parse_new_worker(bytes) {
        Ok(config) => config,
        Err(error) => {
            assert!([400, 403].contains(&error.status), "{error:?}");
            assert_eq!(error.param, Some("url"));
            assert!(error.message.ends_with('.'), "{error:?}");
            return;
        }
    };
    assert_eq!(config.api_key, None);
    if let KvEvents::At(source) = &config.kv_events {
        assert!(!source.binds, "{source:?}");
        for endpoint in [Some(&source.endpoint), source.replay.as_ref()] {
            let is_remote = endpoint.is_none_or(|endpoint| endpoint.starts_with("tcp://"));
            assert!(is_remote, "{source:?}");
        }
    }
    // Fields that are not read may have invalid values.
    let Ok(body) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    let url = body["url"].as_str().unwrap_or_default();
    assert_eq!(url.parse::<WorkerConfig>().ok().as_ref(), Some(&config));
    let again = json!({ "url": url }).to_string();
    assert_eq!(parse_new_worker(again.as_bytes()).ok(), Some(config));
}
