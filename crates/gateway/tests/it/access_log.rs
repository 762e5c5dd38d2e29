//! Access log: one line for each request, whatever its outcome.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use serde_json::{Value, json};

use crate::fake_worker::*;
use foresee_gateway::{KeyConfig, KeyHash};

#[tokio::test]
async fn every_request_gets_a_line_without_its_text() {
    let path = std::env::temp_dir().join(format!("foresee-access-{}", std::process::id()));
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.access_log = Some(path.clone());
    config.keys = Some(vec![KeyConfig {
        tenant: "t".to_owned(),
        ..KeyConfig::new("team", KeyHash::of(b"secret"))
    }]);
    let gateway = gateway_with(config).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let request = |body: &str, extra: &str| {
        let request = String::from_utf8(http("POST", CHAT, body)).unwrap();
        let headers = format!("\r\nx-api-key: secret\r\nuser-agent: test/1\r\n{extra}");
        request.replacen("\r\n", &headers, 1)
    };

    let traced = format!("traceparent: 00-{trace}-b7ad6b7169203331-01\r\nx-request-id: r-1\r\n");
    let streamed = request(&chat("private words", true), &traced);
    let mut client = Client::sending(gateway.address(), streamed).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    exchange.send_chunk(token("private answer")).await;
    exchange.end_stream().await;
    client.head().await;
    client.rest().await.unwrap();

    let unknown = json!({"model": "unknown", "messages": [{"role": "user", "content": "x"}]});
    let unknown = request(&unknown.to_string(), "");
    Client::sending(gateway.address(), unknown)
        .await
        .response()
        .await
        .error(404);
    call(gateway.address(), "POST", CHAT, chat("private", false))
        .await
        .error(401);
    let leaving = request(&chat("private", false), "");
    let client = Client::sending(gateway.address(), leaving).await;
    let mut exchange = worker.request().await;
    drop(client);
    exchange.closed().await;
    until_released(&gateway).await;
    gateway.shut_down().await;

    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(
        !text.contains("private") && !text.contains("secret"),
        "{text}"
    );
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let outcomes: Vec<_> = lines
        .iter()
        .map(|line| line["outcome"].as_str().unwrap())
        .collect();
    assert_eq!(outcomes, ["ok", "refused", "refused", "client_left"]);
    let first = &lines[0];
    for (field, expected) in [
        ("request_id", json!("r-1")),
        ("trace_id", json!(trace)),
        ("method", json!("POST")),
        ("path", json!(CHAT)),
        ("client", json!("127.0.0.1")),
        ("user_agent", json!("test/1")),
        ("key", json!("team")),
        ("tenant", json!("t")),
        ("model", json!(MODEL)),
        ("status", json!(200)),
        ("worker", json!("a")),
        ("attempts", json!(1)),
        ("output_tokens", json!(1)),
        ("predicted_cached_tokens", json!(0)),
    ] {
        assert_eq!(first[field], expected, "{field}");
    }
    assert!(
        first["ttft_seconds"].as_f64() <= first["duration_seconds"].as_f64(),
        "{first}"
    );
    assert_eq!(
        (&lines[1]["status"], &lines[1]["error_code"]),
        (&json!(404), &json!("model_not_found"))
    );
    assert_eq!(
        (&lines[2]["status"], &lines[2]["key"]),
        (&json!(401), &Value::Null)
    );
}

#[tokio::test]
async fn a_request_that_workers_fail_is_logged_with_its_model_and_worker() {
    let path = std::env::temp_dir().join(format!("foresee-access-failed-{}", std::process::id()));
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.access_log = Some(path.clone());
    let gateway = gateway_with(config).await;
    let mut client =
        Client::sending(gateway.address(), http("POST", CHAT, chat("hi", false))).await;
    worker
        .request()
        .await
        .respond(whole("500 Error", "text/plain", ""))
        .await;
    let status = client.response().await.status();
    until_released(&gateway).await;
    gateway.shut_down().await;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    for (field, expected) in [
        ("status", json!(status)),
        ("model", json!(MODEL)),
        ("worker", json!("a")),
        ("attempts", json!(1)),
    ] {
        assert_eq!(line[field], expected, "{field}: {line}");
    }
}

#[tokio::test]
async fn of_successes_a_fraction_is_logged_and_of_failures_all() {
    let path = std::env::temp_dir().join(format!("foresee-access-sampled-{}", std::process::id()));
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.access_log = Some(path.clone());
    config.access_log_sample_ratio = 0.25;
    let gateway = gateway_with(config).await;
    for number in 0..8 {
        let body = chat(&format!("question {number}"), false);
        let mut client = Client::sending(gateway.address(), http("POST", CHAT, body)).await;
        worker.request().await.respond_json("{}").await;
        client.response().await;
    }
    for _ in 0..3 {
        call(gateway.address(), "POST", CHAT, "not JSON")
            .await
            .error(400);
    }
    until_released(&gateway).await;
    gateway.shut_down().await;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let with = |outcome: &str| {
        lines
            .iter()
            .filter(|line| line["outcome"] == outcome)
            .count()
    };
    assert_eq!((with("ok"), with("refused")), (2, 3), "{text}");
}
