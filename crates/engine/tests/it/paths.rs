//! The table of inference paths.

use foresee_engine::paths::{BodyFormat, allowed_method, find};
use foresee_engine::request::Endpoint;

#[test]
fn each_api_has_its_paths() {
    let endpoint = |path| find("POST", path).map(|path| path.endpoint);
    assert_eq!(
        endpoint("/v1/chat/completions"),
        Some(Endpoint::ChatCompletions)
    );
    assert_eq!(endpoint("/v1/responses"), Some(Endpoint::Responses));
    assert_eq!(endpoint("/v1/messages"), Some(Endpoint::Messages));
    assert_eq!(
        endpoint("/v1/messages/count_tokens"),
        Some(Endpoint::MessagesCountTokens)
    );
    assert_eq!(
        endpoint("/inference/v1/generate"),
        Some(Endpoint::VllmGenerate)
    );
    assert_eq!(endpoint("/generate"), Some(Endpoint::SglangGenerate));
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        assert_eq!(endpoint(path), Some(Endpoint::Rerank), "{path}");
    }
    let audio = find("POST", "/v1/audio/transcriptions").unwrap();
    assert_eq!(audio.body, BodyFormat::Multipart);
    assert!(audio.output_grows && audio.is_repeatable);
    let pooling = find("POST", "/pooling").unwrap();
    assert!(!pooling.output_grows && pooling.is_repeatable);
}

#[test]
fn control_paths_of_engines_are_not_inference() {
    for path in [
        "/",
        "/v1/chat/completions/",
        "/v1/chat/completions/render",
        "/v1/responses/render",
        "/v1/messages/render",
        "/V1/chat/completions",
        "//v1/chat/completions",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/abort_requests",
        "/abort_request",
        "/open_session",
        "/close_session",
        "/update_weights",
        "/update_weights_from_disk",
        "/start_profile",
        "/sleep",
        "/wake_up",
        "/pause",
        "/reset_prefix_cache",
        "/flush_cache",
        "/server_info",
        "/get_server_info",
        "/collective_rpc",
        "/metrics",
        "/v1/loads",
        "/tokenizer_info",
        "/kv_event_sources",
        "/v1/models",
        "/health",
    ] {
        for method in ["GET", "POST", "PUT", "DELETE"] {
            assert_eq!(find(method, path), None, "{method} {path}");
        }
        assert_eq!(allowed_method(path), None, "{path}");
    }
}

#[test]
fn another_method_is_told_apart_from_another_path() {
    assert_eq!(find("GET", "/v1/chat/completions"), None);
    assert_eq!(allowed_method("/v1/chat/completions"), Some("POST"));
    assert_eq!(allowed_method("/v1/responses/resp_1"), Some("GET"));
    assert_eq!(allowed_method("/v1/responses/resp_1/cancel"), Some("POST"));
    assert_eq!(allowed_method("/v1/chat"), None);
}

#[test]
fn a_stored_response_has_its_id() {
    let stored = find("GET", "/v1/responses/resp_1").unwrap();
    assert_eq!(stored.response_id, Some("resp_1"));
    assert!(stored.is_repeatable && !stored.output_grows);
    let cancel = find("POST", "/v1/responses/resp_1/cancel").unwrap();
    assert_eq!(cancel.response_id, Some("resp_1"));
    assert!(!cancel.is_repeatable);
    for (method, path) in [
        ("GET", "/v1/responses/"),
        ("POST", "/v1/responses//cancel"),
        ("POST", "/v1/responses/resp_1"),
        ("GET", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/"),
        ("GET", "/v1/responses/resp_1/input_items"),
    ] {
        assert_eq!(find(method, path), None, "{method} {path}");
    }
}
