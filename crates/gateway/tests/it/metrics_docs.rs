//! `docs/metrics.md` is up to date, and a gateway exposes exactly the metrics that it lists.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_api::metrics::TOKEN_PARITY;
use foresee_core::queue::QueueOrder;
use foresee_gateway::{
    Gateway, MetricInfo, MetricsCompat, compat_reference, metric_reference, metrics_page,
};
use serde_json::{Value, json};

/// Metrics of an engine that uses half of its blocks.
const ENGINE_METRICS: &str = "vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"100\"} 1\n\
     vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n";

/// Returns the value of a comment line of each family, such as its type, by the family's name.
fn comments(exposition: &str, keyword: &str) -> BTreeMap<String, String> {
    let prefix = format!("# {keyword} ");
    let lines = exposition
        .lines()
        .filter_map(|line| line.strip_prefix(&prefix));
    lines
        .map(|line| {
            let (name, value) = line.split_once(' ').unwrap();
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

/// Asserts that all series of a metric have the documented labels and values.
fn assert_labels(metric: &MetricInfo, exposition: &str) {
    let is_series = |line: &&str| {
        let name = line.split([' ', '{']).next().unwrap();
        let suffix = name.strip_prefix(metric.name.as_str());
        matches!(suffix, Some("" | "_total" | "_bucket" | "_sum" | "_count"))
    };
    for series in exposition.lines().filter(is_series) {
        let labels = series.split_once('{').map_or("", |(_, rest)| rest);
        let labels = labels.split_once('}').map_or("", |(labels, _)| labels);
        let labels: Vec<(&str, &str)> = labels
            .split_terminator(',')
            .map(|label| label.split_once('=').unwrap())
            .filter(|(name, _)| *name != "le")
            .collect();
        assert_eq!(labels.len(), metric.labels.len(), "{series}");
        for ((name, value), documented) in labels.iter().zip(metric.labels) {
            assert_eq!(*name, documented.name, "{series}");
            let value = value.trim_matches('"');
            let is_documented = documented.values.contains(&value);
            assert!(is_documented || documented.values.is_empty(), "{series}");
        }
    }
}

#[test]
fn the_metrics_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    let page = std::fs::read_to_string(path).unwrap();
    let is_current = page == metrics_page();
    assert!(
        is_current,
        "docs/metrics.md is stale: run `cargo run -p foresee --example generate-docs`"
    );
}

#[tokio::test]
async fn a_gateway_exposes_exactly_the_documented_metrics() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with_all_series(&mut worker).await;
    let exposition = metrics(&gateway).await;
    let reference = metric_reference();
    let documented = |value: fn(&MetricInfo) -> &str| -> BTreeMap<String, String> {
        let pairs = reference
            .iter()
            .map(|metric| (metric.name.clone(), value(metric).to_owned()));
        pairs.collect()
    };
    assert_eq!(
        comments(&exposition, "TYPE"),
        documented(|metric| metric.kind)
    );
    let help = comments(&exposition, "HELP");
    let help: BTreeMap<String, String> = help
        .into_iter()
        .map(|(name, text)| (name, text.trim_end_matches('.').to_owned()))
        .collect();
    assert_eq!(help, documented(|metric| metric.help));
    for (name, unit) in comments(&exposition, "UNIT") {
        assert_eq!(documented(|metric| metric.unit)[&name], unit);
    }
    for metric in &reference {
        assert_labels(metric, &exposition);
    }
}

/// Starts a gateway in front of `worker`, and waits until every metric has a series.
async fn gateway_with_all_series(worker: &mut FakeWorker) -> Gateway {
    worker.set_metrics(ENGINE_METRICS);
    let mut config = config(&[]);
    config.engine_metrics_interval = Some(Duration::from_millis(10));
    // A source of workers, which has series of its own.
    config.discovery.files = vec!["/nonexistent".into()];
    // No engine publishes there, so the worker has an event source whose events are not live.
    let description = format!("{},kv-events=tcp://127.0.0.1:1", worker.spec("a"));
    config.workers = vec![description.parse().unwrap()];
    config.model_aliases = vec![format!("public={MODEL}").parse().unwrap()];
    let gateway = gateway_with(config).await;
    let aliased = json!({"messages": [], "model": "public"}).to_string();
    let _client = Client::sending(gateway.address(), http("POST", CHAT, aliased)).await;
    worker.request().await.keep();
    until_engine_metrics(&gateway).await;
    serve_one(&gateway, worker).await;
    gateway
}

/// Waits until the metrics of the engine of worker `a` were read.
async fn until_engine_metrics(gateway: &Gateway) {
    let engine_blocks = "foresee_worker_engine_active_blocks{worker=\"a\"}";
    within("the engine's metrics to be read", async {
        while value(&metrics(gateway).await, engine_blocks).is_none() {}
    })
    .await;
}

/// Serves a request with three output tokens.
async fn serve_one(gateway: &Gateway, worker: &mut FakeWorker) {
    let request = http("POST", CHAT, chat("x", true));
    let mut client = Client::sending(gateway.address(), request).await;
    let mut exchange = worker.request().await;
    exchange.start_stream().await;
    for _ in 0..3 {
        exchange.send_chunk(token("x")).await;
    }
    exchange.end_stream().await;
    client.head().await;
    client.rest().await.unwrap();
    until_metric(gateway, "foresee_request_duration_seconds_count", 1.0).await;
}

/// Returns the sum of the series of a metric.
fn sum(exposition: &str, name: &str) -> f64 {
    let values = exposition.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest
            .strip_prefix('{')
            .map_or(rest, |labels| labels.split_once('}').unwrap().1);
        let value = rest.strip_prefix(' ')?.split(' ').next()?;
        Some(value.parse::<f64>().unwrap())
    });
    values.sum()
}

#[tokio::test]
async fn llm_d_s_names_have_the_same_numbers() {
    let mut worker = FakeWorker::start().await;
    let mut config = config(&[&worker]);
    config.metrics_compat = Some(MetricsCompat::LlmD);
    config.router.queue_order = Some(QueueOrder::Fcfs);
    let gateway = gateway_with(config).await;
    serve_one(&gateway, &mut worker).await;
    call(gateway.address(), "GET", "/no/such/path", "")
        .await
        .error(404);
    let exposition = metrics(&gateway).await;
    let types = comments(&exposition, "TYPE");
    let found: Vec<_> = types
        .iter()
        .filter(|(name, _)| name.starts_with("llm_d"))
        .map(|(name, kind)| (name.as_str(), kind.as_str()))
        .collect();
    let mut documented: Vec<_> = compat_reference()
        .iter()
        .map(|name| (name.name, name.kind))
        .collect();
    documented.sort_unstable();
    assert_eq!(found, documented);
    for name in compat_reference()
        .iter()
        .filter(|name| name.kind == "histogram")
    {
        for suffix in ["_count", "_sum", "_bucket"] {
            let [theirs, ours] = [name.name, name.query].map(|name| format!("{name}{suffix}"));
            assert_eq!(
                sum(&exposition, &theirs),
                sum(&exposition, &ours),
                "{theirs}"
            );
        }
    }
    assert_eq!(
        sum(&exposition, "llm_d_epp_request_ttft_seconds_count"),
        1.0
    );
    for (series, expected) in [
        ("llm_d_epp_request_total", 2.0),
        ("llm_d_epp_request_error_total", 1.0),
        ("llm_d_epp_ready_endpoints", 1.0),
        ("llm_d_epp_flow_control_queue_size", 0.0),
        ("llm_d_epp_request_running", 0.0),
    ] {
        assert_eq!(sum(&exposition, series), expected, "{series}");
    }
    let labels = format!("{{model_name=\"{MODEL}\",target_model_name=\"{MODEL}\"}}");
    let ready = format!("llm_d_epp_ready_endpoints{labels}");
    assert_eq!(value(&exposition, &ready), Some(1.0));
    let error = "error_code=\"refused\"} 1";
    assert!(
        exposition.lines().any(|line| line.ends_with(error)),
        "{exposition}"
    );
    assert_eq!(exposition.matches("# EOF").count(), 1);
}

/// Returns the names of metrics that begin with `foresee_` in a text of PromQL.
fn names_in(text: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_name(c));
    words.filter(|word| word.starts_with("foresee_")).collect()
}

/// Returns all strings below a key `expr`.
fn expressions<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                match member {
                    Value::String(text) if key == "expr" => found.push(text),
                    _ => expressions(member, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| expressions(item, found)),
        _ => {}
    }
}

#[tokio::test]
async fn boards_rules_and_examples_ask_for_metrics_that_exist() {
    let mut worker = FakeWorker::start().await;
    let gateway = gateway_with_all_series(&mut worker).await;
    let exposition = metrics(&gateway).await;
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let read = |name: &str| std::fs::read_to_string(deploy.join(name)).unwrap();
    let board: Value = serde_json::from_str(&read("grafana/foresee.json")).unwrap();
    assert!(board["schemaVersion"].as_u64().unwrap() >= 39);
    assert_eq!(board["__inputs"][0]["name"], "DS_PROMETHEUS");
    let mut queries = Vec::new();
    expressions(&board, &mut queries);
    assert!(queries.len() >= 20, "{queries:?}");
    let files = [
        queries.join("\n"),
        read("prometheus/alerts.yaml"),
        read("kubernetes/keda-scaledobject.yaml"),
        read("kubernetes/hpa.yaml"),
    ];
    for text in &files {
        // Comments of YAML are not PromQL.
        let lines = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        let names: Vec<&str> = lines.flat_map(names_in).collect();
        assert!(!names.is_empty());
        for name in names {
            let has_series = exposition.lines().any(|line| {
                let rest = line.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            });
            assert!(has_series, "{name} is not on the page of metrics");
        }
    }
}

#[test]
fn the_metrics_that_clients_read_exist() {
    let family = TOKEN_PARITY.trim_end_matches("_total");
    let reference = metric_reference();
    let metric = reference.iter().find(|metric| metric.name == family);
    assert_eq!(metric.unwrap().labels[0].name, "result");
}
