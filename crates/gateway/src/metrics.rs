//! Prometheus metrics of the gateway, under the prefix `foresee_`, in base units.
//!
//! All metrics are declared in one table. From it come the fields of [`Metrics`], their registration
//! and the reference page `docs/metrics.md`, so none of them can lack a metric.

mod declaration;
mod page;
mod prometheus_text;

use std::cmp::Ordering;
use std::fmt;
use std::time::{Duration, SystemTime};

use foresee_core::OutputLengthAccuracy;
use foresee_core::workers::{WorkerSnapshot, WorkerState};
use parking_lot::Mutex;
use prometheus_client::encoding::text;
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{Atomic, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

pub(crate) use declaration::Exemplar;
use declaration::{
    CounterByAlias, CounterByLabel, CounterByWorker, FloatGauge, FloatGaugeByWorker, GaugeByWorker,
    Series, TracedHistogram, WorkerLabel, declare_metrics, register, type_name,
};
pub use declaration::{LabelInfo, MetricInfo};
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

/// Tokens of one request and its response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResponseTokens {
    pub(crate) prompt: u32,
    /// Prompt tokens that the engine reports as cached.
    pub(crate) cached: Option<u32>,
    pub(crate) output: u32,
}

const PREFIX: &str = "foresee";

const NO_LABEL: &[LabelInfo] = &[];
const WORKER: &[LabelInfo] = &[LabelInfo {
    name: "worker",
    values: &[],
}];
const OUTCOME: &[LabelInfo] = &[LabelInfo {
    name: "outcome",
    values: &[
        Outcome::Ok.as_str(),
        Outcome::Refused.as_str(),
        Outcome::WorkerError.as_str(),
        Outcome::WorkerFailed.as_str(),
        Outcome::Unavailable.as_str(),
        Outcome::ClientLeft.as_str(),
        Outcome::ShutDown.as_str(),
    ],
}];
const OVERLAP_KIND: &[LabelInfo] = &[LabelInfo {
    name: "kind",
    values: &["predicted", "best", "actual"],
}];
const PREDICTION_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["exact", "over", "under"],
}];
const TOKENIZATION_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &[
        "tokens",
        "suspended",
        "no_template",
        "media",
        "not_rendered",
        "not_text",
        "not_encoded",
    ],
}];
const PARITY_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["equal", "different"],
}];
const ALIAS_AND_MODEL: &[LabelInfo] = &[
    LabelInfo {
        name: "alias",
        values: &[],
    },
    LabelInfo {
        name: "model",
        values: &[],
    },
];
const DRY_RUN_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["same", "different"],
}];
const DRY_RUN_KIND: &[LabelInfo] = &[LabelInfo {
    name: "kind",
    values: &["chosen", "least_delay"],
}];
const KEY_REFUSAL: &[LabelInfo] = &[LabelInfo {
    name: "reason",
    values: &[
        "missing",
        "unknown",
        "expired",
        "scope",
        "model",
        "requests",
        "tokens",
        "concurrency",
    ],
}];
const SPAN_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["sent", "queue_full", "failed"],
}];
const RECORDING_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["written", "dropped"],
}];

declare_metrics! {
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
    bookings: Gauge, "bookings", NO_LABEL,
        "Bookings: prompts and outputs of the requests that are queued or running";
    prefix_tree_nodes: Gauge, "nodes", NO_LABEL,
        "Nodes of the prefix trees; the router's memory is proportional to them";
    pub(crate) access_log_dropped: Counter, "lines", NO_LABEL,
        "Lines of the access log dropped because the file was too slow";
    trace_spans: CounterByLabel, "spans", SPAN_RESULT,
        "Spans of traces that the collector accepted, that found the queue full, or that could not be sent";
    pub(crate) discovery_errors: Counter, "lists", NO_LABEL,
        "Lists of workers that could not be used, or not as a whole";
    pub(crate) discovery_last_success_timestamp_seconds: FloatGauge, "seconds", NO_LABEL,
        "Unix time at which a list of workers was used last; 0 without lists";
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

/// Adds an observation, with the time of now if it names a trace.
fn observe(histogram: &TracedHistogram, time: Duration, exemplar: Option<Exemplar>) {
    let now = exemplar.is_some().then(SystemTime::now);
    histogram.observe(time.as_secs_f64(), exemplar, now);
}

/// Creates a histogram like [`histogram`] whose buckets name traces.
fn traced_histogram(first: f64, bucket_count: u16) -> TracedHistogram {
    HistogramWithExemplars::new(exponential_buckets(first, 2.0, bucket_count))
}

/// Creates a histogram of numbers of tokens: 16 buckets, the first up to 16 tokens.
fn token_histogram() -> Histogram {
    histogram(16.0, 16)
}

impl Metrics {
    /// Records the time that a request was queued. `exemplar` names its trace, if it is sampled.
    pub(crate) fn observe_queue_time(&self, time: Duration, exemplar: Option<Exemplar>) {
        observe(&self.queue_duration_seconds, time, exemplar);
    }

    /// Records the time to the first token of a request. `exemplar` is as above.
    pub(crate) fn observe_first_token(&self, time: Duration, exemplar: Option<Exemplar>) {
        observe(&self.time_to_first_token_seconds, time, exemplar);
    }

    /// Records a response that has ended: its time since the arrival of the request, and its tokens.
    /// `exemplar` is as above.
    pub(crate) fn observe_response(
        &self,
        time: Duration,
        tokens: ResponseTokens,
        exemplar: Option<Exemplar>,
    ) {
        observe(&self.request_duration_seconds, time, exemplar);
        self.request_prompt_tokens.observe(tokens.prompt.into());
        self.request_output_tokens.observe(tokens.output.into());
        if let Some(cached) = tokens.cached {
            self.request_cached_tokens.observe(cached.into());
        }
    }

    /// Returns the counter of spans with this `result`.
    pub(crate) fn trace_span_counter(&self, result: &'static str) -> Counter {
        self.trace_spans
            .get_or_create(&[("result", result)])
            .clone()
    }

    /// Counts a request that ended.
    pub(crate) fn record_outcome(&self, outcome: Outcome) {
        self.requests
            .get_or_create(&[("outcome", outcome.as_str())])
            .inc();
    }

    /// Counts a request that was refused because of its key.
    pub(crate) fn record_key_refusal(&self, reason: &'static str) {
        self.key_refusals.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts a request for `alias` that is sent to `model`. Both are names of the configuration.
    pub(crate) fn record_alias(&self, alias: &str, model: &str) {
        let labels = [("alias", alias.to_owned()), ("model", model.to_owned())];
        self.model_alias_requests.get_or_create(&labels).inc();
    }

    /// Sets whether KV events are a worker's cache source.
    pub(crate) fn set_events_live(&self, worker: &str, live: bool) {
        self.worker_events_live
            .get_or_create(&[("worker", worker.to_owned())])
            .set(live.into());
    }

    /// Removes the series of [`set_events_live`](Self::set_events_live): the worker has no event
    /// source or was removed.
    pub(crate) fn remove_events_live(&self, worker: &str) {
        self.worker_events_live
            .remove(&[("worker", worker.to_owned())]);
    }

    /// Sets the number of active blocks that a worker's engine reports, in its own block size. `None`
    /// removes the series: the engine does not report it.
    pub(crate) fn set_engine_active_blocks(&self, worker: &str, blocks: Option<u64>) {
        let label = [("worker", worker.to_owned())];
        match blocks {
            Some(blocks) => {
                let gauge = self.worker_engine_active_blocks.get_or_create(&label);
                gauge.set(gauge_value(blocks));
            }
            None => {
                self.worker_engine_active_blocks.remove(&label);
            }
        }
    }

    /// Counts a decision of a dry run: whether the worker of the least predicted delay was chosen, by
    /// how many seconds the chosen one's is longer, and the overlap of both in blocks.
    pub(crate) fn record_dry_run(&self, is_same: bool, longer_by: f64, overlaps: [u32; 2]) {
        let result = if is_same { "same" } else { "different" };
        self.dry_run_decisions
            .get_or_create(&[("result", result)])
            .inc();
        self.dry_run_delay_seconds.observe(longer_by);
        for (kind, blocks) in ["chosen", "least_delay"].into_iter().zip(overlaps) {
            self.dry_run_overlap_blocks
                .get_or_create(&[("kind", kind)])
                .inc_by(u64::from(blocks));
        }
    }

    /// Counts a text prompt. `result` is `tokens` if it was matched as tokens, and otherwise the
    /// reason why it was matched as text.
    pub(crate) fn record_tokenization(&self, result: &'static str) {
        self.tokenized_prompts
            .get_or_create(&[("result", result)])
            .inc();
    }

    /// Counts a response whose reported prompt tokens were compared with the tokenizer's.
    pub(crate) fn record_token_parity(&self, equal: bool) {
        let result = if equal { "equal" } else { "different" };
        self.token_parity.get_or_create(&[("result", result)]).inc();
    }

    /// Returns the counter of recorded requests with this `result`: `written` or `dropped`.
    pub(crate) fn recorded_counter(&self, result: &'static str) -> Counter {
        self.recorded_requests
            .get_or_create(&[("result", result)])
            .clone()
    }

    /// Adds prompt blocks of one request to the overlap of a `kind`: `predicted`, `best` or `actual`.
    pub(crate) fn add_overlap_blocks(&self, kind: &'static str, blocks: u32) {
        self.overlap_blocks
            .get_or_create(&[("kind", kind)])
            .inc_by(u64::from(blocks));
    }

    /// Counts a request by how its predicted overlap compares with the reported one, both in blocks.
    pub(crate) fn record_overlap_prediction(&self, predicted: u32, actual: u32) {
        let result = match predicted.cmp(&actual) {
            Ordering::Equal => "exact",
            Ordering::Greater => "over",
            Ordering::Less => "under",
        };
        self.overlap_predictions
            .get_or_create(&[("result", result)])
            .inc();
    }

    /// Returns the exposition in OpenMetrics text format. The arguments are the router's present
    /// state, to which the gauges are set first. Series of workers that are not in `workers` are
    /// removed from these gauges.
    pub(crate) fn expose(
        &self,
        workers: &[WorkerSnapshot],
        output_lengths: OutputLengthAccuracy,
        bookings: usize,
        prefix_tree_nodes: usize,
    ) -> Result<String, fmt::Error> {
        let _exposition = self.exposition.lock();
        self.bookings.set(gauge_value(bookings as u64));
        self.prefix_tree_nodes
            .set(gauge_value(prefix_tree_nodes as u64));
        self.output_expected_tokens
            .set(output_lengths.expected_tokens);
        self.output_length_bias_ratio.set(output_lengths.bias);
        self.output_length_error_ratio
            .set(output_lengths.mean_abs_relative_error);
        self.set_loads(workers);
        self.set_forecasts(workers);
        let mut exposition = String::new();
        text::encode(&mut exposition, &self.registry)?;
        Ok(exposition)
    }

    /// Sets the gauges of the state, requests and blocks of every worker.
    fn set_loads(&self, workers: &[WorkerSnapshot]) {
        let set = |gauge: &GaugeByWorker, value: fn(&WorkerSnapshot) -> u64| {
            set_per_worker(gauge, workers, |worker| gauge_value(value(worker)));
        };
        set(&self.worker_up, |worker| {
            u64::from(worker.state == WorkerState::Healthy)
        });
        set(&self.worker_ejected, |worker| {
            worker.outlier.is_ejected.into()
        });
        set(&self.worker_requests, |worker| worker.requests.into());
        set(&self.worker_queued_requests, |worker| {
            worker.queued_requests.into()
        });
        set(&self.worker_active_blocks, |worker| worker.active_blocks);
        set(&self.worker_queued_blocks, |worker| worker.queued_blocks);
        set(&self.worker_cached_blocks, |worker| worker.cached_blocks);
        set(&self.worker_capacity_blocks, |worker| {
            worker.capacity_blocks.into()
        });
        set(&self.worker_prefill_tokens, |worker| worker.prefill_tokens);
        set(&self.worker_context_tokens, |worker| worker.context_tokens);
    }

    /// Sets the gauges of every worker's latency model and of its accuracy.
    fn set_forecasts(&self, workers: &[WorkerSnapshot]) {
        let set = |gauge: &FloatGaugeByWorker, value: fn(&WorkerSnapshot) -> f64| {
            set_per_worker(gauge, workers, value);
        };
        set(&self.worker_failure_charge_seconds, |worker| {
            worker.outlier.charge_seconds
        });
        set(&self.worker_inter_token_latency_seconds, |worker| {
            worker.inter_token_latency.as_secs_f64()
        });
        set(&self.worker_prefill_tokens_per_second, |worker| {
            worker.latency.prefill_speed()
        });
        set(&self.worker_prefill_base_seconds, |worker| {
            worker.latency.prefill_base
        });
        set(&self.worker_prefill_token_seconds, |worker| {
            worker.latency.prefill_per_token
        });
        set(&self.worker_prefill_attention_pair_seconds, |worker| {
            worker.latency.prefill_per_attention_pair
        });
        set(&self.worker_prefill_error_ratio, |worker| {
            worker.latency.prefill_accuracy.mean_abs_relative_error
        });
        set(&self.worker_decode_step_base_seconds, |worker| {
            worker.latency.decode_base
        });
        set(&self.worker_decode_step_request_seconds, |worker| {
            worker.latency.decode_per_request
        });
        set(&self.worker_decode_step_context_token_seconds, |worker| {
            worker.latency.decode_per_context_token
        });
        set(&self.worker_decode_step_error_ratio, |worker| {
            worker.latency.decode_accuracy.mean_abs_relative_error
        });
        set(&self.worker_time_to_first_token_error_ratio, |worker| {
            worker.ttft_accuracy.mean_abs_relative_error
        });
        let set = |gauge: &GaugeByWorker, samples: fn(&WorkerSnapshot) -> u64| {
            set_per_worker(gauge, workers, |worker| gauge_value(samples(worker)));
        };
        set(&self.worker_prefill_samples, |worker| {
            worker.latency.prefill_accuracy.samples
        });
        set(&self.worker_decode_step_samples, |worker| {
            worker.latency.decode_accuracy.samples
        });
        set(&self.worker_time_to_first_token_samples, |worker| {
            worker.ttft_accuracy.samples
        });
    }
}

/// Sets a gauge of every worker in `workers` to its `value` and removes all other series of the
/// gauge.
fn set_per_worker<N, A: Atomic<N> + Default>(
    gauge: &Family<WorkerLabel, Gauge<N, A>>,
    workers: &[WorkerSnapshot],
    value: impl Fn(&WorkerSnapshot) -> N,
) {
    gauge.clear();
    for worker in workers {
        gauge
            .get_or_create(&[("worker", worker.name.to_string())])
            .set(value(worker));
    }
}

/// Converts a count to a gauge's type; the largest value stands for all that are larger.
pub(crate) fn gauge_value(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
