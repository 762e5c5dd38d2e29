//! The admin listener refuses requests of web pages and requests without a key, and listens at the
//! configured address.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::fake_worker::*;
use foresee_gateway::{AdminKey, AdminListen, Gateway, GatewayConfig, StartError};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Sends a request with these header lines besides `content-length`.
async fn send(gateway: &Gateway, request: &str, headers: &[&str], body: &str) -> ClientResponse {
    let mut head = format!("{request} HTTP/1.1\r\n");
    for header in headers {
        head += &format!("{header}\r\n");
    }
    if !body.is_empty() {
        head += &format!("content-length: {}\r\n", body.len());
    }
    let bytes = format!("{head}\r\n{body}");
    let mut client = Client::sending(gateway.admin_address().unwrap(), bytes).await;
    client.response().await
}

/// Asserts that the response is an error with this code, allows no other origin, and names a remedy.
fn assert_refused(response: &ClientResponse, status: u16, code: &str, remedy: &str) {
    let error = response.error(status);
    assert_eq!(error["code"], code, "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(remedy), "{message}");
    let headers = &response.head.headers;
    let has_cors = headers
        .iter()
        .any(|(name, _)| name.starts_with("access-control"));
    assert!(!has_cors, "{headers:?}");
}

/// The body that adds a worker at an address where nothing listens.
fn new_worker(options: &str) -> String {
    json!({ "url": format!("http://127.0.0.1:1,name=evil{options}") }).to_string()
}

const JSON: &str = "content-type: application/json";
const LOCAL: &str = "host: 127.0.0.1:8081";

// Requests of web pages

#[tokio::test]
async fn a_page_of_another_site_cannot_change_workers() {
    let worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    let evil = "origin: http://evil.example";
    let body = new_worker("");
    for (request, headers, body) in [
        ("POST /admin/workers", &[LOCAL, evil, JSON][..], &*body),
        ("POST /admin/workers", &[LOCAL, "origin: null", JSON], &body),
        ("POST /admin/workers", &["host: x", evil, JSON], &body),
        ("POST /admin/workers/a/drain", &[LOCAL, evil], ""),
        ("DELETE /admin/workers/a", &[LOCAL, evil], ""),
        ("OPTIONS /admin/workers", &[LOCAL, evil], ""),
        ("GET /admin/workers", &[LOCAL, evil], ""),
        ("GET /metrics", &[LOCAL, evil], ""),
        ("GET /health/live", &[LOCAL, evil], ""),
    ] {
        let response = send(&gateway, request, headers, body).await;
        assert_refused(&response, 403, "origin_not_allowed", "`Origin`");
    }
    for content_type in ["content-type: text/plain", "content-type:", "x-none: x"] {
        let headers = [LOCAL, content_type];
        let response = send(&gateway, "POST /admin/workers", &headers, &body).await;
        assert_refused(&response, 415, "unsupported_media_type", "application/json");
    }
    assert_eq!(workers(&gateway).len(), 1);
    // A page of the listener itself may send requests.
    let own = [LOCAL, "origin: http://127.0.0.1:8081", JSON];
    let response = send(&gateway, "POST /admin/workers", &own, &body).await;
    assert_eq!(response.status(), 202);
    assert_eq!(workers(&gateway).len(), 2);
}

#[tokio::test]
async fn only_probes_and_scrapers_may_use_another_host_name() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.admin.hosts = vec!["router.internal".to_owned()];
    let gateway = gateway_with(config).await;
    let evil = "host: evil.example";
    let body = new_worker("");
    for (request, headers, body) in [
        ("GET /admin/workers", &[evil][..], ""),
        ("POST /admin/workers", &[evil, JSON], &*body),
        ("POST /admin/explain", &[evil, JSON], r#"{"prompt": "x"}"#),
        ("DELETE /admin/workers/a", &[evil], ""),
    ] {
        let response = send(&gateway, request, headers, body).await;
        assert_refused(&response, 403, "host_not_allowed", "--admin-host");
    }
    for request in [
        "GET /metrics",
        "GET /health/live",
        "GET /health/ready",
        "GET /admin/workers",
    ] {
        let headers = ["host: router.internal:8081"];
        let response = send(&gateway, request, &headers, "").await;
        assert_eq!(response.status(), 200, "{request}");
    }
    for request in ["GET /metrics", "GET /health/live", "GET /health/ready"] {
        let response = send(&gateway, request, &[evil], "").await;
        assert_eq!(response.status(), 200, "{request}");
    }
    assert_eq!(workers(&gateway).len(), 1);
}

// Keys

#[tokio::test]
async fn the_admin_api_needs_its_key() {
    let worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.admin.key = Some(AdminKey::new("s3cret").unwrap());
    let gateway = gateway_with(config).await;
    let body = new_worker("");
    for (request, headers, body) in [
        ("GET /admin/workers", &[LOCAL][..], ""),
        (
            "GET /admin/workers",
            &[LOCAL, "authorization: Bearer s3cre"],
            "",
        ),
        (
            "GET /admin/workers",
            &[LOCAL, "authorization: Basic s3cret"],
            "",
        ),
        ("POST /admin/workers", &[LOCAL, JSON], &*body),
        ("GET /admin/nothing", &[LOCAL], ""),
    ] {
        let response = send(&gateway, request, headers, body).await;
        assert_refused(&response, 401, "invalid_api_key", "Authorization");
        assert_eq!(response.head.get("www-authenticate"), Some("Bearer"));
    }
    assert_eq!(workers(&gateway).len(), 1);
    for request in ["GET /metrics", "GET /health/live", "GET /health/ready"] {
        let response = send(&gateway, request, &[LOCAL], "").await;
        assert_eq!(response.status(), 200, "{request}");
    }
    let key = "authorization: Bearer s3cret";
    let response = send(&gateway, "GET /admin/workers", &[LOCAL, key], "").await;
    assert_eq!(response.status(), 200);
    let headers = [LOCAL, key, JSON];
    let response = send(&gateway, "POST /admin/workers", &headers, &body).await;
    assert_eq!(response.status(), 202);
}

#[tokio::test]
async fn metrics_can_have_a_key_of_their_own() {
    let mut config = config(&[]);
    config.admin.key = Some(AdminKey::new("admin").unwrap());
    config.admin.metrics_key = Some(AdminKey::new("scraper").unwrap());
    let gateway = gateway_with(config).await;
    for (key, metrics, workers) in [
        ("none", 401, 401),
        ("scraper", 200, 401),
        ("admin", 200, 200),
    ] {
        let header = format!("authorization: Bearer {key}");
        let headers = [LOCAL, &*header];
        let response = send(&gateway, "GET /metrics", &headers, "").await;
        assert_eq!(response.status(), metrics, "{key}");
        let response = send(&gateway, "GET /admin/workers", &headers, "").await;
        assert_eq!(response.status(), workers, "{key}");
    }
    let response = send(&gateway, "GET /health/live", &[LOCAL], "").await;
    assert_eq!(response.status(), 200);
}

// Where it listens

#[tokio::test]
async fn other_hosts_need_a_key_or_permission() {
    let public: AdminListen = "0.0.0.0:0".parse().unwrap();
    let start = |config: GatewayConfig| Gateway::start(config);
    let mut config = config(&[]);
    config.admin_listen = public.clone();
    let refused = start(config.clone());
    assert!(
        matches!(refused, Err(StartError::UnprotectedAdmin(_))),
        "{refused:?}"
    );
    config.admin.key = Some(AdminKey::new("k").unwrap());
    assert!(start(config.clone()).is_ok());
    config.admin.key = None;
    config.admin.open = true;
    assert!(start(config).is_ok());
}

#[tokio::test]
async fn an_admin_listener_can_be_left_out() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.admin_listen = AdminListen::Off;
    let gateway = gateway_with(config).await;
    assert_eq!(gateway.admin_address(), None);
    assert_eq!(gateway.admin_listen(), &AdminListen::Off);
    let mut client =
        Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
    worker.request().await.respond_json("{}").await;
    assert_eq!(client.response().await.status(), 200);
    within("the gateway to stop", gateway.shut_down()).await;
}

/// A path for a Unix socket that no other test uses.
fn socket_path() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("foresee-{}-{number}.sock", std::process::id()))
}

fn at_socket(path: &Path) -> GatewayConfig {
    GatewayConfig {
        admin_listen: AdminListen::Unix(path.to_owned()),
        ..config(&[])
    }
}

#[tokio::test]
async fn a_unix_socket_is_private_and_removed_at_the_end() {
    let path = socket_path();
    let gateway = Gateway::start(at_socket(&path)).unwrap();
    assert_eq!(gateway.admin_address(), None);
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    // Any host is accepted: a web page cannot open a Unix socket.
    let request = b"GET /admin/workers HTTP/1.1\r\nhost: any\r\nconnection: close\r\n\r\n";
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut response = String::new();
    within("a response", stream.read_to_string(&mut response))
        .await
        .unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(response.contains("\"workers\":[]"), "{response}");

    // Another gateway does not take the socket away.
    let second = Gateway::start(at_socket(&path));
    let error = second.unwrap_err().to_string();
    assert!(error.contains("another process listens"), "{error}");
    assert!(UnixStream::connect(&path).await.is_ok());

    within("the gateway to stop", gateway.shut_down()).await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_other_files_are_kept() {
    let path = socket_path();
    // The file of a socket stays when its process is killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let gateway = Gateway::start(at_socket(&path)).unwrap();
    assert!(UnixStream::connect(&path).await.is_ok());

    // A file that replaced the gateway's own is not removed at its end.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "text").unwrap();
    within("the gateway to stop", gateway.shut_down()).await;
    let error = Gateway::start(at_socket(&path)).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "text");
    std::fs::remove_file(&path).unwrap();
}

// Bodies and formats

#[tokio::test]
async fn bodies_of_the_admin_api_are_bounded() {
    let mut config = config(&[]);
    config.max_body_bytes = 3 << 20;
    let gateway = gateway_with(config).await;
    let padding = "x".repeat(2 << 20);
    let body = json!({ "url": padding }).to_string();
    let response = send(&gateway, "POST /admin/workers", &[LOCAL, JSON], &body).await;
    assert_eq!(response.error(413)["code"], "request_too_large");
    // Every request of the public API can be explained, however long.
    let body = json!({ "prompt": padding }).to_string();
    let response = send(&gateway, "POST /admin/explain", &[LOCAL, JSON], &body).await;
    assert_eq!(response.error(503)["code"], "no_worker");
    let body = json!({ "prompt": padding.repeat(2) }).to_string();
    let response = send(&gateway, "POST /admin/explain", &[LOCAL, JSON], &body).await;
    assert_eq!(response.error(413)["code"], "request_too_large");
}

#[tokio::test]
async fn a_worker_that_is_added_over_http_opens_nothing_on_the_routers_host() {
    let gateway = gateway(&[]).await;
    for options in [
        ",kv-events=bind:tcp://*:5557",
        ",kv-events=ipc:///tmp/foresee-events",
        ",kv-events=bind:ipc:///tmp/foresee-events",
        ",kv-events=tcp://127.0.0.1:1,replay=ipc:///tmp/foresee-events",
    ] {
        let body = new_worker(options);
        let response = send(&gateway, "POST /admin/workers", &[LOCAL, JSON], &body).await;
        assert_refused(&response, 403, "endpoint_not_allowed", "--worker");
        assert_eq!(response.error(403)["param"], "url");
    }
    assert!(workers(&gateway).is_empty());
    let body = new_worker(",kv-events=tcp://127.0.0.1:1,replay=tcp://127.0.0.1:2");
    let response = send(&gateway, "POST /admin/workers", &[LOCAL, JSON], &body).await;
    assert_eq!(response.status(), 202);
}

#[tokio::test]
async fn metrics_have_the_format_that_the_scraper_accepts() {
    let gateway = gateway(&[]).await;
    let counter = "# TYPE foresee_retries_total counter\n";
    for accept in [
        "x-none: x",
        "accept: */*",
        "accept: text/plain;version=0.0.4",
    ] {
        let response = send(&gateway, "GET /metrics", &[LOCAL, accept], "").await;
        let content_type = response.head.get("content-type");
        let expected = "text/plain; version=0.0.4; charset=utf-8";
        assert_eq!(content_type, Some(expected), "{accept}");
        let text = response.text();
        assert!(text.contains(counter), "{text}");
        assert!(
            !text.contains("# EOF") && !text.contains("# UNIT"),
            "{text}"
        );
    }
    let text = metrics(&gateway).await;
    assert!(text.contains("# TYPE foresee_retries counter\n"), "{text}");
    assert!(text.ends_with("# EOF\n"));
}

#[tokio::test]
async fn head_is_handled_like_get_without_a_body() {
    let gateway = gateway(&[]).await;
    let address = gateway.admin_address().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = b"HEAD /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut response = String::new();
    within("a response", stream.read_to_string(&mut response))
        .await
        .unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(response.ends_with("\r\n\r\n"), "{response}");
}
