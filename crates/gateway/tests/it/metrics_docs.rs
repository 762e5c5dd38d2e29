//! `docs/metrics.md` is up to date, and a gateway exposes exactly the metrics that it lists.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::fake_worker::*;
use foresee_api::metrics::TOKEN_PARITY;
use foresee_gateway::{MetricInfo, metric_reference, metrics_page};
use serde_json::json;

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
    worker.set_metrics(
        "vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"100\"} 1\n\
         vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n",
    );
    let mut config = config(&[]);
    config.engine_metrics_interval = Some(Duration::from_millis(10));
    // A source of workers, which has series of its own.
    config.discovery.files = vec!["/nonexistent".into()];
    // No engine publishes there, so the worker has an event source whose events are not live.
    let description = format!("{},kv-events=tcp://127.0.0.1:1", worker.spec("a"));
    config.workers = vec![description.parse().unwrap()];
    config.model_aliases = vec![format!("public={MODEL}").parse().unwrap()];
    let gateway = gateway_with(config).await;
    let engine_blocks = "foresee_worker_engine_active_blocks{worker=\"a\"}";
    let chat = json!({"messages": [], "model": "public"}).to_string();
    let _client = Client::sending(gateway.address(), http("POST", CHAT, chat)).await;
    worker.request().await.keep();
    within("the engine's metrics to be read", async {
        while value(&metrics(&gateway).await, engine_blocks).is_none() {}
    })
    .await;

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

#[test]
fn the_metrics_that_clients_read_exist() {
    let family = TOKEN_PARITY.trim_end_matches("_total");
    let reference = metric_reference();
    let metric = reference.iter().find(|metric| metric.name == family);
    assert_eq!(metric.unwrap().labels[0].name, "result");
}
