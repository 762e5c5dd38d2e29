//! Descriptions and metrics of engines.

use foresee_engine::server_info::{KvEventEndpoint, ServerInfo, parse_event_sources};
use foresee_engine::worker_metrics::{CacheConfig, EngineLoad};

/// Checks what is read in an engine's description, list of event sources and metrics. Panics if two
/// reads differ, if there are more ranks than lines or bytes, or if a number is not one that the
/// router can calculate with.
pub fn check(bytes: &[u8]) {
    let info = ServerInfo::parse(bytes);
    assert_eq!(info, ServerInfo::parse(bytes));
    if let Some(info) = info {
        assert!(info.ranks >= 1 && info.page_size != Some(0));
        check_endpoint(&info.kv_events, bytes.len());
    }
    for is_own in [false, true] {
        let sources = parse_event_sources(bytes, |_| is_own).unwrap_or_default();
        assert!(sources.len() <= bytes.len());
        for endpoint in sources.values() {
            check_endpoint(endpoint, bytes.len());
        }
    }
    let Ok(metrics) = std::str::from_utf8(bytes) else {
        return;
    };
    let line_count = metrics.lines().count();
    let caches = CacheConfig::parse(metrics);
    assert_eq!(caches, CacheConfig::parse(metrics));
    assert!(caches.len() <= line_count);
    assert!(caches.is_sorted_by(|(rank, _), (next, _)| rank < next));
    assert!(caches.iter().all(|(_, cache)| cache.block_size != Some(0)));
    let loads = EngineLoad::parse(metrics);
    assert_eq!(loads, EngineLoad::parse(metrics));
    assert!(loads.len() <= line_count);
    for (_, load) in loads {
        assert!(load.active_blocks.is_finite() && load.active_blocks >= 0.0);
    }
}

/// Checks that the texts of an endpoint are no longer than the description.
fn check_endpoint(endpoint: &KvEventEndpoint, description_bytes: usize) {
    match endpoint {
        KvEventEndpoint::None => {}
        KvEventEndpoint::Bind { host, topic, .. } => {
            assert!(host.len() + topic.len() <= description_bytes);
        }
        KvEventEndpoint::Connect(endpoint) => assert!(endpoint.len() <= description_bytes),
    }
}
