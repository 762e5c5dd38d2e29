//! Spans of requests reach an OTLP collector, and their trace reaches the worker.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foresee_core::queue::QueueOrder;
use foresee_gateway::{Gateway, GatewayConfig, KeyConfig, KeyHash, TraceConfig};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use prost::Message;
use serde_json::{Value, json};

use crate::fake_worker::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// Server that receives spans.
struct Collector {
    address: SocketAddr,
    received: Arc<Mutex<Received>>,
}

#[derive(Default)]
struct Received {
    spans: Vec<Span>,
    /// Attributes of the resource of the latest export.
    resource: HashMap<String, Value>,
    /// All bytes of all requests.
    bytes: Vec<u8>,
}

impl Collector {
    async fn start() -> Self {
        let mut server = FakeWorker::start().await;
        let received = Arc::<Mutex<Received>>::default();
        let collector = Self {
            address: server.address,
            received: Arc::clone(&received),
        };
        tokio::spawn(async move {
            loop {
                let exchange = server.request_at_any_time().await;
                assert_eq!(exchange.head.first_line, "POST /v1/traces HTTP/1.1");
                let content_type = exchange.head.get("content-type");
                assert_eq!(content_type, Some("application/x-protobuf"));
                let request = ExportTraceServiceRequest::decode(&exchange.body[..]).unwrap();
                {
                    let mut received = received.lock();
                    for resource in request.resource_spans {
                        let attributes = resource.resource.unwrap().attributes;
                        received.resource = json_of(&attributes);
                        for scope in resource.scope_spans {
                            assert_eq!(scope.scope.unwrap().name, "foresee");
                            received.spans.extend(scope.spans);
                        }
                    }
                    received.bytes.extend(&exchange.body);
                    let head = format!("{:?}", exchange.head);
                    received.bytes.extend(head.as_bytes());
                }
                let response = whole("200 OK", "application/x-protobuf", "");
                exchange.respond(response).await;
            }
        });
        collector
    }

    fn config(&self) -> TraceConfig {
        config_of(self.address)
    }

    /// Returns the spans in the order in which they began.
    fn spans(&self) -> Vec<Span> {
        let mut spans = self.received.lock().spans.clone();
        spans.sort_by_key(|span| span.start_time_unix_nano);
        spans
    }
}

fn config_of(collector: SocketAddr) -> TraceConfig {
    TraceConfig {
        sample_ratio: Some(1.0),
        timeout: Duration::from_secs(1),
        ..TraceConfig::new(format!("http://{collector}").parse().unwrap())
    }
}

fn json_of(
    attributes: &[opentelemetry_proto::tonic::common::v1::KeyValue],
) -> HashMap<String, Value> {
    let json = |value: &AnyValue| match value {
        AnyValue::StringValue(text) => json!(text),
        AnyValue::BoolValue(value) => json!(value),
        AnyValue::IntValue(value) => json!(value),
        AnyValue::DoubleValue(value) => json!(value),
        AnyValue::ArrayValue(array) => json!(
            array
                .values
                .iter()
                .map(|value| match value.value.as_ref().unwrap() {
                    AnyValue::StringValue(text) => text.clone(),
                    other => panic!("{other:?}"),
                })
                .collect::<Vec<_>>()
        ),
        other => panic!("{other:?}"),
    };
    let pairs = attributes.iter().map(|attribute| {
        let value = attribute.value.as_ref().unwrap().value.as_ref().unwrap();
        (attribute.key.clone(), json(value))
    });
    pairs.collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a chat with further headers, each with its line end.
fn with_headers(body: &str, headers: &str) -> Vec<u8> {
    let request = String::from_utf8(http("POST", CHAT, body)).unwrap();
    request
        .replacen("\r\n", &format!("\r\n{headers}"), 1)
        .into()
}

async fn traced(mut config: GatewayConfig, collector: &Collector) -> Gateway {
    config.traces = Some(collector.config());
    gateway_with(config).await
}

/// Responds to a request with a stream of two tokens.
async fn stream(mut exchange: Exchange) {
    let usage = json!({"prompt_tokens": 9, "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 4}});
    let first = json!({"id": "chatcmpl-7", "model": "served",
        "choices": [{"index": 0, "delta": {"content": "private"}}]});
    let last = json!({"choices": [{"index": 0, "delta": {"content": "answer"},
        "finish_reason": "length"}], "usage": usage});
    exchange.start_stream().await;
    for event in [first, last] {
        exchange.send_chunk(format!("data: {event}\n\n")).await;
    }
    exchange.end_stream().await;
}

#[tokio::test]
async fn the_spans_of_a_request_arrive_as_a_tree_below_its_caller_s() {
    let mut worker = FakeWorker::start().await;
    let collector = Collector::start().await;
    let mut config = config(&[&worker]);
    config.router.queue_order = Some(QueueOrder::Fcfs);
    config.keys = Some(vec![KeyConfig::new("team", KeyHash::of(b"secret"))]);
    let gateway = traced(config, &collector).await;
    let body = json!({"model": MODEL, "stream": true, "max_tokens": 5, "temperature": 0.5,
        "messages": [{"role": "user", "content": "private words"}]});
    let headers = format!(
        "authorization: Bearer secret\r\nuser-agent: test/1\r\ntraceparent: 00-{TRACE}-{CALLER}-01\r\n\
         tracestate: a=1,b=2\r\nbaggage: k=v\r\n"
    );
    let request = with_headers(&body.to_string(), &headers);
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = worker.request().await;
    let sent = exchange.head.get("traceparent").unwrap().to_owned();
    assert_eq!(exchange.head.get("tracestate"), Some("a=1,b=2"));
    assert_eq!(exchange.head.get("baggage"), Some("k=v"));
    stream(exchange).await;
    client.head().await;
    client.rest().await.unwrap();
    let page = metrics(&gateway).await;
    gateway.shut_down().await;

    let spans = collector.spans();
    let named = |name: &str| {
        let mut found = spans.iter().filter(|span| span.name == name);
        let span = found
            .next()
            .unwrap_or_else(|| panic!("{name} in {spans:?}"));
        assert!(found.next().is_none());
        (span, json_of(&span.attributes))
    };
    assert_eq!(spans.len(), 5, "{spans:?}");
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE));
    assert!(
        spans
            .iter()
            .all(|span| span.start_time_unix_nano <= span.end_time_unix_nano)
    );
    let (server, attributes) = named(&format!("POST {CHAT}"));
    assert_eq!(
        (server.kind, hex(&server.parent_span_id)),
        (2, CALLER.to_owned())
    );
    assert_eq!(server.trace_state, "a=1,b=2");
    for (name, expected) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!(CHAT)),
        ("url.path", json!(CHAT)),
        ("http.response.status_code", json!(200)),
        ("client.address", json!("127.0.0.1")),
        ("user_agent.original", json!("test/1")),
        ("foresee.outcome", json!("ok")),
    ] {
        assert_eq!(attributes[name], expected, "{name}");
    }
    for name in ["foresee.tokenize", "foresee.queue"] {
        assert_eq!(named(name).0.parent_span_id, server.span_id, "{name}");
    }
    let (route, attributes) = named("foresee.route");
    assert_eq!(route.parent_span_id, server.span_id);
    assert_eq!(attributes["foresee.worker"], json!("a"));
    assert_eq!(attributes["foresee.policy"], json!("round-robin"));
    assert!(attributes["foresee.prompt_tokens"].as_i64().unwrap() > 0);
    assert!(attributes["foresee.predicted_ttft"].is_f64());
    let (call, attributes) = named("chat m");
    assert_eq!((call.kind, &call.parent_span_id), (3, &server.span_id));
    assert_eq!(sent, format!("00-{TRACE}-{}-01", hex(&call.span_id)));
    for (name, expected) in [
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.provider.name", json!("openai")),
        ("gen_ai.request.model", json!(MODEL)),
        ("gen_ai.request.stream", json!(true)),
        ("gen_ai.request.max_tokens", json!(5)),
        ("gen_ai.request.temperature", json!(0.5)),
        ("gen_ai.response.id", json!("chatcmpl-7")),
        ("gen_ai.response.model", json!("served")),
        ("gen_ai.response.finish_reasons", json!(["length"])),
        ("gen_ai.usage.input_tokens", json!(9)),
        ("gen_ai.usage.output_tokens", json!(2)),
        ("gen_ai.usage.cache_read.input_tokens", json!(4)),
        ("server.address", json!("127.0.0.1")),
        ("server.port", json!(worker.address.port())),
        ("foresee.worker", json!("a")),
        ("foresee.attempt", json!(1)),
    ] {
        assert_eq!(attributes[name], expected, "{name}");
    }
    assert!(
        attributes["gen_ai.response.time_to_first_chunk"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    assert_eq!(
        collector.received.lock().resource["service.name"],
        json!("foresee")
    );
    let bytes = collector.received.lock().bytes.clone();
    let text = String::from_utf8_lossy(&bytes);
    for secret in ["private", "answer", "secret"] {
        assert!(!text.contains(secret) && !page.contains(secret), "{secret}");
    }

    for family in ["time_to_first_token", "request_duration", "queue_duration"] {
        let bucket = format!("foresee_{family}_seconds_bucket");
        let exemplar = format!("# {{trace_id=\"{TRACE}\"}} ");
        let has_exemplar = |line: &str| line.starts_with(&bucket) && line.contains(&exemplar);
        assert!(page.lines().any(has_exemplar), "{family} in {page}");
    }
}

#[tokio::test]
async fn each_attempt_has_a_span_of_its_own() {
    let (mut first, mut second) = (FakeWorker::start().await, FakeWorker::start().await);
    let collector = Collector::start().await;
    let gateway = traced(config(&[&first, &second]), &collector).await;
    let request = http("POST", CHAT, chat("x", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let exchange = first.request().await;
    let failed = exchange.head.get("traceparent").unwrap().to_owned();
    exchange.reset();
    let exchange = second.request().await;
    let sent = exchange.head.get("traceparent").unwrap().to_owned();
    stream(exchange).await;
    client.head().await;
    client.rest().await.unwrap();
    gateway.shut_down().await;

    let spans = collector.spans();
    let calls: Vec<&Span> = spans.iter().filter(|span| span.kind == 3).collect();
    let [lost, used] = calls.as_slice() else {
        panic!("{spans:?}");
    };
    let header = |span: &Span| format!("00-{}-{}-01", hex(&span.trace_id), hex(&span.span_id));
    assert_eq!((header(lost), header(used)), (failed, sent));
    assert_eq!(lost.parent_span_id, used.parent_span_id);
    let attributes = json_of(&lost.attributes);
    assert_eq!(attributes["error.type"], json!("connection_lost"));
    assert_eq!(attributes["foresee.worker"], json!("a"));
    assert_eq!(lost.status.as_ref().unwrap().code, 2);
    let attributes = json_of(&used.attributes);
    assert_eq!(attributes["foresee.attempt"], json!(2));
    assert!(!attributes.contains_key("error.type"));
}

#[tokio::test]
async fn refused_requests_and_clients_that_leave_have_spans_too() {
    let mut worker = FakeWorker::start().await;
    let collector = Collector::start().await;
    let gateway = traced(config(&[&worker]), &collector).await;
    let unknown = json!({"model": "unknown", "messages": [{"role": "user", "content": "x"}]});
    call(gateway.address(), "POST", CHAT, unknown.to_string())
        .await
        .error(404);
    call(gateway.address(), "GET", "/no/such/path", "")
        .await
        .error(404);
    let request = http("POST", CHAT, chat("x", false));
    let client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    drop(client);
    exchange.closed().await;
    until_released(&gateway).await;
    gateway.shut_down().await;
    let outcomes: Vec<_> = collector
        .spans()
        .into_iter()
        .filter(|span| span.kind == 2)
        .map(|span| {
            let attributes = json_of(&span.attributes);
            let error = attributes["error.type"].as_str().unwrap().to_owned();
            (
                span.name,
                error,
                span.status.map_or(0, |status| status.code),
            )
        })
        .collect();
    let expected = [
        (format!("POST {CHAT}"), "model_not_found".to_owned(), 0),
        ("GET".to_owned(), "unknown_url".to_owned(), 0),
        (format!("POST {CHAT}"), "client_left".to_owned(), 0),
    ];
    assert_eq!(outcomes, expected);
}

#[tokio::test]
async fn requests_that_are_not_sampled_are_passed_on_without_spans() {
    let mut worker = FakeWorker::start().await;
    let collector = Collector::start().await;
    let mut config = config(&[&worker]);
    config.traces = Some(TraceConfig {
        sample_ratio: Some(0.0),
        ..collector.config()
    });
    let gateway = gateway_with(config).await;
    let unsampled = format!("00-{TRACE}-{CALLER}-00");
    for (headers, expected) in [
        (
            format!("traceparent: {unsampled}\r\ntracestate: a=1\r\n"),
            Some(&unsampled),
        ),
        (String::new(), None),
        (
            "traceparent: 00-0-0-01\r\ntracestate: a=1\r\n".to_owned(),
            None,
        ),
    ] {
        let request = with_headers(&chat("x", false), &headers);
        let mut client = Client::sending(gateway.address(), request).await;
        let exchange = worker.request().await;
        let sent = exchange.head.get("traceparent").unwrap();
        match expected {
            Some(expected) => {
                assert_eq!(sent, expected);
                assert_eq!(exchange.head.get("tracestate"), Some("a=1"));
            }
            None => {
                assert!(sent.starts_with("00-") && sent.ends_with("-00"), "{sent}");
                assert_eq!((sent.len(), exchange.head.get("tracestate")), (55, None));
            }
        }
        exchange.respond_json("{}").await;
        assert_eq!(client.response().await.status(), 200);
    }
    assert!(!metrics(&gateway).await.contains("trace_id"));
    gateway.shut_down().await;
    assert_eq!(collector.spans(), []);
}

#[tokio::test]
async fn without_a_collector_headers_of_traces_pass_unchanged() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway(&[&worker]).await;
    for value in ["garbage", &format!("00-{TRACE}-{CALLER}-01")] {
        let headers = format!("traceparent: {value}\r\ntracestate: a=1\r\nbaggage: k=v\r\n");
        let request = with_headers(&chat("x", false), &headers);
        let mut client = Client::sending(gateway.address(), request).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.head.get("traceparent"), Some(value));
        assert_eq!(exchange.head.get("tracestate"), Some("a=1"));
        assert_eq!(exchange.head.get("baggage"), Some("k=v"));
        exchange.respond_json("{}").await;
        assert_eq!(client.response().await.status(), 200);
    }
}

#[tokio::test]
async fn a_collector_that_is_down_or_hangs_costs_only_spans() {
    let mut worker = FakeWorker::start().await;
    let mut hanging = FakeWorker::start().await;
    let down = FakeWorker::start().await;
    let address = down.address;
    drop(down);
    for collector in [address, hanging.address] {
        let mut config = config(&[&worker]);
        config.traces = Some(config_of(collector));
        let gateway = gateway_with(config).await;
        let request = http("POST", CHAT, chat("x", false));
        let mut client = Client::sending(gateway.address(), request).await;
        worker.request().await.respond_json("{}").await;
        assert_eq!(client.response().await.status(), 200);
        // The spans of a request are the server's, those of two steps, and that of one attempt.
        until_metric(
            &gateway,
            "foresee_trace_spans_total{result=\"failed\"}",
            4.0,
        )
        .await;
        let sent = "foresee_trace_spans_total{result=\"sent\"}";
        assert_eq!(value(&metrics(&gateway).await, sent), Some(0.0));
        let before = Instant::now();
        gateway.shut_down().await;
        assert!(before.elapsed() < Duration::from_secs(4));
    }
    drop(hanging.request().await);
}

#[tokio::test]
async fn the_access_log_names_the_trace_and_the_span() {
    let mut worker = FakeWorker::start().await;
    let collector = Collector::start().await;
    let path = std::env::temp_dir().join(format!("foresee-traced-{}", std::process::id()));
    let mut config = config(&[&worker]);
    config.access_log = Some(path.clone());
    let gateway = traced(config, &collector).await;
    let request = http("POST", CHAT, chat("x", true));
    let mut client = Client::sending(gateway.address(), request).await;
    stream(worker.request().await).await;
    client.head().await;
    client.rest().await.unwrap();
    gateway.shut_down().await;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    let spans = collector.spans();
    let server = spans.iter().find(|span| span.kind == 2).unwrap();
    assert_eq!(line["trace_id"], json!(hex(&server.trace_id)));
    assert_eq!(line["span_id"], json!(hex(&server.span_id)));
    for name in [
        "queue_seconds",
        "route_seconds",
        "predicted_ttft_seconds",
        "itl_mean_seconds",
        "itl_max_seconds",
    ] {
        assert!(line[name].is_f64(), "{name} in {line}");
    }
    assert_eq!(line["stream"], json!(true));
    assert!(line["bytes_out"].as_u64().unwrap() > 100, "{line}");
}
