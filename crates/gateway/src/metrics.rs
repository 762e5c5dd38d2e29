//! Prometheus metrics of the gateway, under the prefix `foresee_`, in base units.
//!
//! All metrics are declared in one table. From it come the fields of [`Metrics`], their registration
//! and the reference page `docs/metrics.md`, so none of them can lack a metric.

mod declaration;
mod exposition;
mod labels;
mod llm_d;
mod observations;
mod page;
mod prometheus_text;

use parking_lot::Mutex;
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

pub(crate) use declaration::Exemplar;
use declaration::{
    BuildInfo, CounterByAlias, CounterByLabel, CounterBySource, CounterByWorker, FloatGauge,
    FloatGaugeBySource, FloatGaugeByWorker, GaugeBySource, GaugeByWorker, Series, TracedHistogram,
    declare_metrics, register, type_name,
};
pub use declaration::{LabelInfo, MetricInfo};
pub(crate) use exposition::{CompatNames, PresentState, gauge_value};
use labels::{
    ALIAS_AND_MODEL, BUILD, DRY_RUN_KIND, DRY_RUN_RESULT, KEY_REFUSAL, NO_LABEL, OUTCOME,
    OVERLAP_KIND, PARITY_RESULT, PREDICTION_RESULT, RECORDING_RESULT, SOURCE, SPAN_RESULT,
    TOKENIZATION_RESULT, WORKER,
};
pub use llm_d::{CompatName, MetricsCompat, compat_reference};
pub(crate) use observations::ResponseTokens;
pub use page::metrics_page;
pub(crate) use prometheus_text::{OPEN_METRICS, PROMETHEUS_TEXT, prometheus_text};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The whole response of the worker was passed on.
    Ok,
    /// The request was refused: by the gateway, or by the worker with a 4xx.
    Refused,
    /// The worker responded with a 5xx, or with an error event in its stream.
    WorkerError,
    /// The worker failed, and no other worker could take over.
    WorkerFailed,
    /// No worker was available.
    Unavailable,
    /// The client disconnected before the end of the response.
    ClientLeft,
    /// The gateway shut down before the end of the response.
    ShutDown,
}

impl Outcome {
    /// Returns the value of the label `outcome`.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::WorkerError => "worker_error",
            Self::WorkerFailed => "worker_failed",
            Self::Unavailable => "unavailable",
            Self::ClientLeft => "client_left",
            Self::ShutDown => "shut_down",
        }
    }
}

const PREFIX: &str = "foresee";

declare_metrics! {
    build_info: BuildInfo, "1", BUILD,
        "1, with the version of the router and the platform that it was built for";
    requests: CounterByLabel, "requests", OUTCOME,
        "Requests that ended, by outcome";
    pub(crate) deadlines_unreachable: Counter, "requests", NO_LABEL,
        "Requests refused because their first byte was predicted after their deadline";
    key_refusals: CounterByLabel, "requests", KEY_REFUSAL,
        "Requests refused because of their key or its limits";
    model_alias_requests: CounterByAlias, "requests", ALIAS_AND_MODEL,
        "Requests for an alias, by the model that they were sent to; only with --model-alias";
    pub(crate) retries: Counter, "requests", NO_LABEL,
        "Requests sent again to another worker before the first byte of a response";
    pub(crate) retries_over_budget: Counter, "requests", NO_LABEL,
        "Requests that were not sent again because the retry budget was used up";
    pub(crate) decision_duration_seconds: Histogram = histogram(1e-6, 17), "seconds", NO_LABEL,
        "Time of one routing decision";
    queue_duration_seconds: TracedHistogram = traced_histogram(1e-3, 20), "seconds", NO_LABEL,
        "Time requests spent queued in the router";
    pub(crate) queue_displaced: Counter, "requests", NO_LABEL,
        "Queued requests that lost their place in a full queue to one of a higher priority or of a tenant with less service";
    time_to_first_token_seconds: TracedHistogram = traced_histogram(1e-3, 20), "seconds", NO_LABEL,
        "Time from the arrival of a request to its first output token";
    request_duration_seconds: TracedHistogram = traced_histogram(1e-3, 22), "seconds", NO_LABEL,
        "Time from the arrival of a request to the end of its response, of requests that were sent to a worker";
    pub(crate) inter_token_latency_seconds: Histogram = histogram(1e-4, 20), "seconds", NO_LABEL,
        "Time between two output tokens of one request";
    pub(crate) prompt_tokens: Counter, "tokens", NO_LABEL,
        "Prompt tokens routed, counted or estimated by the router";
    request_prompt_tokens: Histogram = token_histogram(), "tokens", NO_LABEL,
        "Prompt tokens of one request, reported by the engine or else counted by the router";
    request_cached_tokens: Histogram = token_histogram(), "tokens", NO_LABEL,
        "Prompt tokens of one request that the engine reports as cached";
    request_output_tokens: Histogram = token_histogram(), "tokens", NO_LABEL,
        "Output tokens of one request, reported by the engine or else observed";
    pub(crate) output_tokens: Counter, "tokens", NO_LABEL,
        "Output tokens observed in responses";
    pub(crate) client_connections: Gauge, "connections", NO_LABEL,
        "Open connections of clients to the API";
    pub(crate) refused_connections: Counter, "connections", NO_LABEL,
        "Connections of clients refused because of --max-connections";
    pub(crate) request_body_bytes: Gauge, "bytes", NO_LABEL,
        "Bytes of request bodies in memory or announced, bounded by --max-body-bytes-in-flight";
    pub(crate) reservations: Gauge, "reservations", NO_LABEL,
        "Reservations of the selection API, bounded by --max-reservations";
    pub(crate) reservations_expired: Counter, "reservations", NO_LABEL,
        "Reservations released because their clients did not renew them in time";
    forecast_requests_per_second: FloatGauge, "requests per second", NO_LABEL,
        "Requests that are forecast to arrive, --scale-horizon from now";
    workers_needed: FloatGauge, "workers", NO_LABEL,
        "Workers that this load needs within --slo-ttft and --slo-itl, not rounded";
    worker_sustainable_requests_per_second: FloatGaugeByWorker, "requests per second", WORKER,
        "Requests of the present lengths that the worker sustains within --slo-ttft and --slo-itl; absent before the first response";
    bookings: Gauge, "bookings", NO_LABEL,
        "Bookings: prompts and outputs of the requests that are queued or running";
    prefix_tree_nodes: Gauge, "nodes", NO_LABEL,
        "Nodes of the prefix trees; the router's memory is proportional to them";
    pub(crate) access_log_dropped: Counter, "lines", NO_LABEL,
        "Lines of the access log dropped because the file was too slow";
    pub(crate) discovery_workers: GaugeBySource, "workers", SOURCE,
        "Workers that a source of discovery lists, each with all of its ranks counted once";
    pub(crate) discovery_errors: CounterBySource, "lists", SOURCE,
        "Lists of a source of discovery that could not be read or used, or not as a whole";
    pub(crate) discovery_last_success_timestamp_seconds: FloatGaugeBySource, "seconds", SOURCE,
        "Unix time at which the list of a source of discovery was used last; 0 before that";
    trace_spans: CounterByLabel, "spans", SPAN_RESULT,
        "Spans of traces that the collector accepted, that found the queue full, or that could not be sent";
    pub(crate) tls_certificate_expiry_timestamp_seconds: FloatGauge, "seconds", NO_LABEL,
        "Unix time at which the certificate of the listeners expires; 0 without TLS";
    pub(crate) tls_handshake_failures: Counter, "handshakes", NO_LABEL,
        "Handshakes with clients that failed";
    pub(crate) config_last_reload_successful: Gauge, "0 or 1", NO_LABEL,
        "Whether the latest reload of the configuration succeeded; 1 before the first one";
    pub(crate) config_last_reload_success_timestamp_seconds: FloatGauge, "seconds", NO_LABEL,
        "Unix time of the start or of the latest successful reload of the configuration";

    overlap_blocks: CounterByLabel, "blocks", OVERLAP_KIND,
        "Prompt blocks predicted to be cached on the chosen worker, on the best worker, and reported as cached by the engine";
    overlap_predictions: CounterByLabel, "requests", PREDICTION_RESULT,
        "Requests whose overlap in blocks was predicted exactly, too large or too small, where the engine reports it";
    dry_run_decisions: CounterByLabel, "requests", DRY_RUN_RESULT,
        "Requests whose worker is the one of the least predicted delay, or is not; only with --dry-run";
    dry_run_overlap_blocks: CounterByLabel, "blocks", DRY_RUN_KIND,
        "Prompt blocks predicted to be cached on the chosen worker, and on that of the least predicted delay; only with --dry-run";
    dry_run_delay_seconds: Histogram = histogram(1e-3, 20), "seconds", NO_LABEL,
        "Predicted delay of the chosen worker beyond the least one, over all requests; only with --dry-run";
    tokenized_prompts: CounterByLabel, "prompts", TOKENIZATION_RESULT,
        "Text prompts that were matched as tokens, or the reason why they were matched as text";
    token_parity: CounterByLabel, "responses", PARITY_RESULT,
        "Responses whose prompt token count by the engine equals the tokenizer's, or differs";
    output_expected_tokens: FloatGauge, "tokens", NO_LABEL,
        "Tokens expected of the next output, if nothing is known about its request";
    output_length_bias_ratio: FloatGauge, "ratio", NO_LABEL,
        "Observed output tokens divided by forecast output tokens; 1 is unbiased";
    output_length_error_ratio: FloatGauge, "ratio", NO_LABEL,
        "Mean absolute error of forecast output lengths, relative to the mean length";
    recorded_requests: CounterByLabel, "requests", RECORDING_RESULT,
        "Requests written to the recording, or dropped because the file was too slow or failed";

    worker_up: GaugeByWorker, "0 or 1", WORKER,
        "Whether the worker can be chosen";
    pub(crate) probe_failures: CounterByWorker, "health checks", WORKER,
        "Failed health checks";
    pub(crate) dns_failures: CounterByWorker, "look-ups", WORKER,
        "Failed look-ups of the worker's host name; the last address stays in use";
    worker_ejected: GaugeByWorker, "0 or 1", WORKER,
        "Whether the worker gets only trials, because it failed more often than its peers";
    pub(crate) worker_ejections: CounterByWorker, "times", WORKER,
        "Times that the worker was ejected";
    worker_failure_charge_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Seconds that the worker's recent failures add to its cost";
    worker_requests: GaugeByWorker, "requests", WORKER,
        "Requests booked on the worker, queued ones included";
    worker_queued_requests: GaugeByWorker, "requests", WORKER,
        "Requests queued in the router for the worker";
    worker_active_blocks: GaugeByWorker, "blocks", WORKER,
        "KV blocks that running requests pin, predicted";
    worker_queued_blocks: GaugeByWorker, "blocks", WORKER,
        "KV blocks that queued requests will pin in addition, predicted";
    worker_engine_active_blocks: GaugeByWorker, "engine blocks", WORKER,
        "KV blocks that running requests pin, reported by the engine in its own block size; only with --engine-metrics-interval";
    worker_cached_blocks: GaugeByWorker, "blocks", WORKER,
        "KV blocks in the worker's prefix cache, active ones included";
    worker_capacity_blocks: GaugeByWorker, "blocks", WORKER,
        "KV blocks of the worker: configured, reported, learned or assumed";
    worker_prefill_tokens: GaugeByWorker, "tokens", WORKER,
        "Booked prompt tokens that are not computed yet, predicted";
    worker_context_tokens: GaugeByWorker, "tokens", WORKER,
        "Prompt and output tokens of the requests on the worker, shared ones counted each time";

    worker_events_live: GaugeByWorker, "0 or 1", WORKER,
        "Whether KV events are the worker's cache source; if not, the cache is estimated. Absent without an event source";
    pub(crate) kv_event_batches: CounterByWorker, "batches", WORKER,
        "Batches of KV events applied, replayed ones included";
    pub(crate) kv_event_gaps: CounterByWorker, "gaps", WORKER,
        "Times that batches of KV events were missing, replayed or not";
    pub(crate) kv_events_untrusted: CounterByWorker, "times", WORKER,
        "Times that KV events became untrusted because responses contradicted them";

    worker_inter_token_latency_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Forecast time between two tokens of one request at the present load";
    worker_prefill_tokens_per_second: FloatGaugeByWorker, "tokens per second", WORKER,
        "Learned prefill speed for a prompt of 1,000 tokens";
    worker_prefill_base_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Learned base time of one prefill batch";
    worker_prefill_token_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Learned prefill time of one prompt token to compute";
    worker_prefill_attention_pair_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Learned prefill time of one attention pair: a token to compute and a token before it";
    worker_prefill_samples: GaugeByWorker, "samples", WORKER,
        "Prefills that the latency model was learned from, on all similar workers";
    worker_prefill_error_ratio: FloatGaugeByWorker, "ratio", WORKER,
        "Mean absolute relative error of the prefill forecasts";
    worker_decode_step_base_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Learned base time of one decode step";
    worker_decode_step_request_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Learned decode step time of one request in the batch";
    worker_decode_step_context_token_seconds: FloatGaugeByWorker, "seconds", WORKER,
        "Learned decode step time of one context token";
    worker_decode_step_samples: GaugeByWorker, "samples", WORKER,
        "Decode steps that the latency model was learned from, on all similar workers";
    worker_decode_step_error_ratio: FloatGaugeByWorker, "ratio", WORKER,
        "Mean absolute relative error of the decode step forecasts";
    worker_time_to_first_token_samples: GaugeByWorker, "samples", WORKER,
        "Requests whose forecast time to first token was compared with the measured one";
    worker_time_to_first_token_error_ratio: FloatGaugeByWorker, "ratio", WORKER,
        "Mean absolute relative error of the forecast times to first token";
}

/// Creates a histogram of `bucket_count` buckets, the first up to `first` seconds, each twice as
/// large as the one before.
fn histogram(first: f64, bucket_count: u16) -> Histogram {
    Histogram::new(exponential_buckets(first, 2.0, bucket_count))
}

/// Creates a histogram like [`histogram`] whose buckets name traces.
fn traced_histogram(first: f64, bucket_count: u16) -> TracedHistogram {
    HistogramWithExemplars::new(exponential_buckets(first, 2.0, bucket_count))
}

/// Creates a histogram of numbers of tokens: 16 buckets, the first up to 16 tokens.
fn token_histogram() -> Histogram {
    histogram(16.0, 16)
}
