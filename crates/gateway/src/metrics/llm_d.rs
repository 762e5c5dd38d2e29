//! `--metrics-compat llm-d`: the metrics of llm-d's endpoint picker, with the numbers of this gateway.
//!
//! Boards, alerts and triggers that ask for llm-d's names then work unchanged. Histograms are the same
//! objects under a second name; sums and means are computed from the state that the gauges show.

use std::borrow::Cow;
use std::fmt;

use foresee_core::workers::{WorkerSnapshot, WorkerState};
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use crate::metrics::declaration::{CounterByLabel, FixedLabel, FloatGauge};
use crate::metrics::labels::OUTCOME;
use crate::metrics::{Metrics, Outcome};

/// Prefix of llm-d's names.
const PREFIX: &str = "llm_d_epp";

/// Names of metrics of another program, which `/metrics` has in addition to the gateway's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsCompat {
    /// Those of llm-d's endpoint picker.
    LlmD,
}

/// A name of llm-d, and the number of this gateway that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompatName {
    /// Name of the metric family as in the `# TYPE` line of the exposition.
    pub name: &'static str,
    /// OpenMetrics type.
    pub kind: &'static str,
    /// The same number as a query of the gateway's own metrics.
    pub query: &'static str,
}

/// Returns llm-d's names that the gateway has.
#[must_use]
pub const fn compat_reference() -> &'static [CompatName] {
    &NAMES
}

const fn row(name: &'static str, kind: &'static str, query: &'static str) -> CompatName {
    CompatName { name, kind, query }
}

const NAMES: [CompatName; 15] = [
    row(
        "llm_d_epp_request",
        "counter",
        "sum(foresee_requests_total)",
    ),
    row(
        "llm_d_epp_request_error",
        "counter",
        "foresee_requests_total{outcome!=\"ok\"}",
    ),
    row(
        "llm_d_epp_request_duration_seconds",
        "histogram",
        "foresee_request_duration_seconds",
    ),
    row(
        "llm_d_epp_request_ttft_seconds",
        "histogram",
        "foresee_time_to_first_token_seconds",
    ),
    row(
        "llm_d_epp_request_streaming_itl_seconds",
        "histogram",
        "foresee_inter_token_latency_seconds",
    ),
    row(
        "llm_d_epp_request_input_tokens",
        "histogram",
        "foresee_request_prompt_tokens",
    ),
    row(
        "llm_d_epp_request_output_tokens",
        "histogram",
        "foresee_request_output_tokens",
    ),
    row(
        "llm_d_epp_request_cached_tokens",
        "histogram",
        "foresee_request_cached_tokens",
    ),
    row(
        "llm_d_epp_request_running",
        "gauge",
        "sum(foresee_worker_requests) - sum(foresee_worker_queued_requests)",
    ),
    row(
        "llm_d_epp_ready_endpoints",
        "gauge",
        "sum(foresee_worker_up)",
    ),
    row(
        "llm_d_epp_average_queue_size",
        "gauge",
        "avg(foresee_worker_queued_requests)",
    ),
    row(
        "llm_d_epp_average_kv_cache_utilization",
        "gauge",
        "avg(foresee_worker_active_blocks / foresee_worker_capacity_blocks)",
    ),
    row(
        "llm_d_epp_scheduler_e2e_duration_seconds",
        "histogram",
        "foresee_decision_duration_seconds",
    ),
    row(
        "llm_d_epp_flow_control_queue_size",
        "gauge",
        "sum(foresee_worker_queued_requests)",
    ),
    row(
        "llm_d_epp_flow_control_request_queue_duration_seconds",
        "histogram",
        "foresee_queue_duration_seconds",
    ),
];

/// Appends the metrics with llm-d's names to a page. All series have the labels `model_name` and
/// `target_model_name` if all workers serve one `model`, which is then known; otherwise they have
/// neither.
pub(super) fn append(
    page: &mut String,
    metrics: &Metrics,
    workers: &[WorkerSnapshot],
    model: Option<&str>,
) -> fmt::Result {
    let label = |name| model.map(|model| (Cow::Borrowed(name), Cow::Owned(model.to_owned())));
    let labels = ["model_name", "target_model_name"].into_iter();
    let labels = labels.filter_map(label);
    let mut registry = Registry::with_prefix_and_labels(PREFIX, labels);
    add_counters(&mut registry, metrics);
    add_histograms(&mut registry, metrics);
    add_gauges(&mut registry, workers);
    text::encode_registry(page, &registry)
}

/// Registers the counters of requests.
fn add_counters(registry: &mut Registry, metrics: &Metrics) {
    let (all, errors) = (Counter::<u64>::default(), CounterByLabel::default());
    for outcome in OUTCOME.iter().flat_map(|label| label.values) {
        let count = metrics
            .requests
            .get_or_create(&[("outcome", outcome)])
            .get();
        all.inc_by(count);
        if *outcome != Outcome::Ok.as_str() {
            let label: FixedLabel = [("error_code", outcome)];
            errors.get_or_create(&label).inc_by(count);
        }
    }
    registry.register("request", "Requests that ended", all);
    registry.register(
        "request_error",
        "Requests that ended without success",
        errors,
    );
}

/// Registers the histograms.
fn add_histograms(registry: &mut Registry, metrics: &Metrics) {
    let traced = [
        (
            "request_duration_seconds",
            "Time of a request",
            &metrics.request_duration_seconds,
        ),
        (
            "request_ttft_seconds",
            "Time to first token",
            &metrics.time_to_first_token_seconds,
        ),
        (
            "flow_control_request_queue_duration_seconds",
            "Time in the queue",
            &metrics.queue_duration_seconds,
        ),
    ];
    for (name, help, histogram) in traced {
        registry.register(name, help, histogram.clone());
    }
    let others = [
        (
            "request_streaming_itl_seconds",
            "Time between output tokens",
            &metrics.inter_token_latency_seconds,
        ),
        (
            "request_input_tokens",
            "Prompt tokens of a request",
            &metrics.request_prompt_tokens,
        ),
        (
            "request_output_tokens",
            "Output tokens of a request",
            &metrics.request_output_tokens,
        ),
        (
            "request_cached_tokens",
            "Cached prompt tokens of a request",
            &metrics.request_cached_tokens,
        ),
        (
            "scheduler_e2e_duration_seconds",
            "Time of one decision",
            &metrics.decision_duration_seconds,
        ),
    ];
    for (name, help, histogram) in others {
        registry.register(name, help, histogram.clone());
    }
}

/// Registers the gauges of the fleet.
fn add_gauges(registry: &mut Registry, workers: &[WorkerSnapshot]) {
    let sum = |value: fn(&WorkerSnapshot) -> f64| workers.iter().map(value).sum::<f64>();
    let count = workers.len().max(1) as f64;
    let queued = sum(|worker| worker.queued_requests.into());
    let gauges = [
        (
            "request_running",
            "Requests at the workers",
            sum(|worker| worker.requests.into()) - queued,
        ),
        (
            "ready_endpoints",
            "Workers that can be chosen",
            sum(|worker| f64::from(u8::from(worker.state == WorkerState::Healthy))),
        ),
        (
            "average_queue_size",
            "Requests queued for a worker",
            queued / count,
        ),
        (
            "average_kv_cache_utilization",
            "Fraction of a worker's KV cache that running requests pin",
            sum(|worker| worker.active_blocks as f64 / f64::from(worker.capacity_blocks.max(1)))
                / count,
        ),
        (
            "flow_control_queue_size",
            "Requests queued in the router",
            queued,
        ),
    ];
    for (name, help, value) in gauges {
        let gauge = FloatGauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    }
}
