//! The text of `/metrics`, with vLLM's metric names.

use std::fmt::Write;

use crate::config::MockEngineConfig;
use crate::engine_loop::Snapshot;

/// Returns the metrics in Prometheus' text format. `published_batches` is `None` without KV events;
/// the counter of batches is then missing.
pub(crate) fn render(
    config: &MockEngineConfig,
    snapshot: &Snapshot,
    published_batches: Option<u64>,
) -> String {
    let totals = snapshot.totals;
    let blocks = config.engine.blocks;
    let usage = f64::from(snapshot.pinned_blocks) / f64::from(blocks.max(1));
    let model = escape(&config.model);
    let mut text = String::new();
    let mut write_as = |name: &str, kind: &str, value: f64| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE {name} {kind}");
        let _ = writeln!(
            text,
            r#"{name}{{engine="0",model_name="{model}"}} {value:?}"#
        );
    };
    // vLLM has no such metrics. Tests compare a subscriber's view with them.
    let cached = snapshot.cached_hashes as f64;
    write_as("mock_engine:cached_blocks", "gauge", cached);
    if let Some(batches) = published_batches {
        let batches = batches as f64;
        write_as("mock_engine:kv_event_batches_total", "counter", batches);
    }
    let mut write = |name: &str, kind: &str, value: f64| {
        write_as(&format!("vllm:{name}"), kind, value);
    };
    write("num_requests_running", "gauge", snapshot.running as f64);
    write("num_requests_waiting", "gauge", snapshot.waiting as f64);
    write("kv_cache_usage_perc", "gauge", usage);
    for (name, sum) in [
        ("num_preemptions_total", totals.preemptions),
        ("prefix_cache_queries_total", totals.prompt_tokens),
        ("prefix_cache_hits_total", totals.cached_tokens),
        ("prompt_tokens_total", totals.prompt_tokens),
        ("generation_tokens_total", totals.output_tokens),
    ] {
        write(name, "counter", sum as f64);
    }
    let prefix_caching = if config.engine.prefix_caching {
        "True"
    } else {
        "False"
    };
    // vLLM reserves one block that no request gets, and computes the usage without it.
    let _ = writeln!(
        text,
        "# TYPE vllm:cache_config_info gauge\n\
         vllm:cache_config_info{{block_size=\"{}\",enable_prefix_caching=\"{prefix_caching}\",\
         engine=\"0\",num_gpu_blocks=\"{}\"}} 1.0",
        config.engine.block_size,
        blocks.saturating_add(1),
    );
    text
}

/// Escapes a label value.
fn escape(label: &str) -> String {
    label
        .replace('\\', r"\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
