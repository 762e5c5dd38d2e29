//! What the gateway counts, under the prefix `foresee_`, in base units.

use std::cmp::Ordering;
use std::fmt;
use std::sync::atomic::AtomicU64;

use foresee_core::LengthForecast;
use foresee_core::fleet::{WorkerSnapshot, WorkerState};
use parking_lot::Mutex;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

type Label = [(&'static str, &'static str); 1];
type WorkerLabel = [(&'static str, String); 1];
type WorkerGauge = Family<WorkerLabel, Gauge>;
/// A worker, and which of several numbers of it.
type PartLabel = [(&'static str, String); 2];
type PartGauge = Family<PartLabel, Gauge<f64, AtomicU64>>;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The worker's answer went through whole.
    Ok,
    /// The request was refused as it is: by the gateway, or by the worker with a 4xx.
    Refused,
    /// The worker answered with a 5xx, or with an error in its stream.
    WorkerError,
    /// The worker failed and nobody could take over.
    WorkerFailed,
    /// There was no worker to ask.
    Unavailable,
    /// The client left before the end.
    ClientLeft,
}

impl Outcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::WorkerError => "worker_error",
            Self::WorkerFailed => "worker_failed",
            Self::Unavailable => "unavailable",
            Self::ClientLeft => "client_left",
        }
    }
}

/// All metrics of one gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    exposing: Mutex<()>,
    requests: Family<Label, Counter>,
    pub(crate) retries: Counter,
    overlap_blocks: Family<Label, Counter>,
    overlap_predictions: Family<Label, Counter>,
    tokenized_prompts: Family<Label, Counter>,
    token_parity: Family<Label, Counter>,
    recorded_requests: Family<Label, Counter>,
    pub(crate) prompt_tokens: Counter,
    pub(crate) output_tokens: Counter,
    pub(crate) decision_duration: Histogram,
    pub(crate) queue_duration: Histogram,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) probe_failures: Family<WorkerLabel, Counter>,
    pub(crate) kv_event_batches: Family<WorkerLabel, Counter>,
    pub(crate) kv_event_gaps: Family<WorkerLabel, Counter>,
    pub(crate) kv_events_mistrusted: Family<WorkerLabel, Counter>,
    worker_events_live: WorkerGauge,
    bookings: Gauge,
    tracked_edges: Gauge,
    worker_up: WorkerGauge,
    worker_requests: WorkerGauge,
    worker_held_requests: WorkerGauge,
    worker_active_blocks: WorkerGauge,
    worker_held_blocks: WorkerGauge,
    worker_engine_active_blocks: WorkerGauge,
    worker_cached_blocks: WorkerGauge,
    worker_capacity_blocks: WorkerGauge,
    worker_prefill_tokens: WorkerGauge,
    worker_context_tokens: WorkerGauge,
    worker_prefill_speed: Family<WorkerLabel, Gauge<f64, AtomicU64>>,
    worker_inter_token_latency: Family<WorkerLabel, Gauge<f64, AtomicU64>>,
    worker_pace: PartGauge,
    worker_forecast_samples: PartGauge,
    worker_forecast_error: PartGauge,
    output_forecast: Family<Label, Gauge<f64, AtomicU64>>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // 1 µs to 65 ms; twice 1 ms to 524 s; 0.1 ms to 52 s.
        let decision_duration = Histogram::new(exponential_buckets(1e-6, 2.0, 17));
        let queue_duration = Histogram::new(exponential_buckets(1e-3, 2.0, 20));
        let time_to_first_token = Histogram::new(exponential_buckets(1e-3, 2.0, 20));
        let inter_token_latency = Histogram::new(exponential_buckets(1e-4, 2.0, 20));
        let mut metrics = Self {
            registry: Registry::with_prefix("foresee"),
            exposing: Mutex::new(()),
            requests: Family::default(),
            retries: Counter::default(),
            overlap_blocks: Family::default(),
            overlap_predictions: Family::default(),
            tokenized_prompts: Family::default(),
            token_parity: Family::default(),
            recorded_requests: Family::default(),
            prompt_tokens: Counter::default(),
            output_tokens: Counter::default(),
            decision_duration,
            queue_duration,
            time_to_first_token,
            inter_token_latency,
            probe_failures: Family::default(),
            kv_event_batches: Family::default(),
            kv_event_gaps: Family::default(),
            kv_events_mistrusted: Family::default(),
            worker_events_live: Family::default(),
            bookings: Gauge::default(),
            tracked_edges: Gauge::default(),
            worker_up: Family::default(),
            worker_requests: Family::default(),
            worker_held_requests: Family::default(),
            worker_active_blocks: Family::default(),
            worker_held_blocks: Family::default(),
            worker_engine_active_blocks: Family::default(),
            worker_cached_blocks: Family::default(),
            worker_capacity_blocks: Family::default(),
            worker_prefill_tokens: Family::default(),
            worker_context_tokens: Family::default(),
            worker_prefill_speed: Family::default(),
            worker_inter_token_latency: Family::default(),
            worker_pace: Family::default(),
            worker_forecast_samples: Family::default(),
            worker_forecast_error: Family::default(),
            output_forecast: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        macro_rules! register {
            ($($field:ident: $help:literal,)*) => {
                $(self.registry.register(stringify!($field), $help, self.$field.clone());)*
            };
        }
        register! {
            requests: "Requests that ended, by how",
            retries: "Requests sent again to another worker before their first byte",
            overlap_blocks: "Prompt blocks: predicted cached on the chosen worker, the best any worker offered, actually cached by the engine's own report",
            overlap_predictions: "Requests whose overlap was predicted exactly, too large or too small, in blocks, where the engine reports it",
            tokenized_prompts: "Text prompts that were matched as tokens, or the reason why as text",
            token_parity: "Prompt token counts reported by engines: equal to ours, or different",
            recorded_requests: "Requests of the recording: written, or dropped because the file could not keep up or failed",
            prompt_tokens: "Prompt tokens routed, as counted or estimated",
            output_tokens: "Output tokens seen",
            bookings: "Requests booked now",
            tracked_edges: "Runs of blocks tracked; memory is proportional to it",
            probe_failures: "Health probes that failed",
            kv_event_batches: "Batches of KV events applied, replayed ones included",
            kv_event_gaps: "Times that batches of KV events were missing, replayed or not",
            kv_events_mistrusted: "Times that KV events were no longer believed, because answers reported another cache",
            worker_events_live: "Whether the worker's KV events tell what it caches, rather than the shadow",
            worker_up: "Whether the worker can be chosen",
            worker_requests: "Requests booked on the worker",
            worker_held_requests: "Those of them that wait at the router",
            worker_active_blocks: "Predicted active KV blocks of the worker",
            worker_held_blocks: "KV blocks beside those that requests waiting at the router will take",
            worker_engine_active_blocks: "Active KV blocks by the engine's own account, in its blocks, if it is sampled",
            worker_cached_blocks: "Predicted cached KV blocks of the worker, active ones included",
            worker_capacity_blocks: "KV blocks of the worker, as configured, reported, learned or assumed",
            worker_prefill_tokens: "Booked prompt tokens not yet computed, by forecast",
            worker_context_tokens: "Prompt and output tokens of the requests booked on the worker",
            worker_forecast_samples: "What the forecasts of prefill, decode steps and times to first token were learned from or held against",
            worker_forecast_error: "Mean absolute error of those forecasts, as a share",
            output_forecast: "Lengths of answers: tokens expected of the next, seen over forecast, mean absolute error as a share",
        }
        let seconds = prometheus_client::registry::Unit::Seconds;
        let histograms = [
            (
                "decision_duration",
                "Time of one routing decision",
                &self.decision_duration,
            ),
            (
                "queue_duration",
                "That a request waited at the router for its worker to have room",
                &self.queue_duration,
            ),
            (
                "time_to_first_token",
                "From the request's arrival to its first output token",
                &self.time_to_first_token,
            ),
            (
                "inter_token_latency",
                "Between two output tokens of one request",
                &self.inter_token_latency,
            ),
        ];
        for (name, help, histogram) in histograms {
            self.registry
                .register_with_unit(name, help, seconds.clone(), histogram.clone());
        }
        self.registry.register_with_unit(
            "worker_inter_token_latency",
            "Learned time between two tokens of one request",
            seconds.clone(),
            self.worker_inter_token_latency.clone(),
        );
        self.registry.register_with_unit(
            "worker_pace",
            "What the worker takes, as learned: for prompts computed together, a prompt token, a pair of tokens that look at each other, a decode step, a request in it, a token of context in it",
            seconds,
            self.worker_pace.clone(),
        );
        self.registry.register(
            "worker_prefill_tokens_per_second",
            "Learned prefill speed",
            self.worker_prefill_speed.clone(),
        );
    }

    pub(crate) fn ended(&self, outcome: Outcome) {
        self.requests
            .get_or_create(&[("outcome", outcome.as_str())])
            .inc();
    }

    /// Whether a worker's events are what the router follows.
    pub(crate) fn events_live(&self, worker: &str, live: bool) {
        let label = [("worker", worker.to_owned())];
        let gauge = self.worker_events_live.get_or_create(&label);
        gauge.set(live.into());
    }

    /// A worker is gone.
    pub(crate) fn forget_events(&self, worker: &str) {
        let label = [("worker", worker.to_owned())];
        self.worker_events_live.remove(&label);
    }

    /// What a worker says it carries, or that it does not say.
    pub(crate) fn engine_active(&self, worker: &str, blocks: Option<u64>) {
        let label = [("worker", worker.to_owned())];
        match blocks.map(i64::try_from) {
            Some(blocks) => {
                let gauge = self.worker_engine_active_blocks.get_or_create(&label);
                gauge.set(blocks.unwrap_or(i64::MAX));
            }
            None => {
                self.worker_engine_active_blocks.remove(&label);
            }
        }
    }

    /// A prompt was matched as tokens, or as text for some reason.
    pub(crate) fn tokenized(&self, as_what: &'static str) {
        self.tokenized_prompts
            .get_or_create(&[("as", as_what)])
            .inc();
    }

    pub(crate) fn token_parity(&self, equal: bool) {
        let result = if equal { "equal" } else { "different" };
        self.token_parity.get_or_create(&[("result", result)]).inc();
    }

    /// The count of requests of the recording with this `result`.
    pub(crate) fn recorded(&self, result: &'static str) -> Counter {
        let label = [("result", result)];
        self.recorded_requests.get_or_create(&label).clone()
    }

    pub(crate) fn overlap(&self, kind: &'static str, blocks: u32) {
        self.overlap_blocks
            .get_or_create(&[("kind", kind)])
            .inc_by(u64::from(blocks));
    }

    /// What a request was predicted to find cached, in blocks, and found.
    pub(crate) fn prediction(&self, predicted: u32, actual: u32) {
        let result = match predicted.cmp(&actual) {
            Ordering::Equal => "exact",
            Ordering::Greater => "over",
            Ordering::Less => "under",
        };
        self.overlap_predictions
            .get_or_create(&[("result", result)])
            .inc();
    }

    /// The exposition text, with the workers as they stand.
    pub(crate) fn expose(
        &self,
        workers: &[WorkerSnapshot],
        lengths: LengthForecast,
        bookings: usize,
        edges: usize,
    ) -> Result<String, fmt::Error> {
        // Gauges are cleared and set again: another scrape must not see them in between.
        let _one_at_a_time = self.exposing.lock();
        self.bookings.set(bookings as i64);
        self.tracked_edges.set(edges as i64);
        self.show(&self.worker_up, workers, |worker| {
            u64::from(worker.state == WorkerState::Healthy)
        });
        self.show(&self.worker_requests, workers, |worker| {
            worker.requests.into()
        });
        self.show(&self.worker_held_requests, workers, |worker| {
            worker.held_requests.into()
        });
        self.show(&self.worker_active_blocks, workers, |worker| {
            worker.active_blocks
        });
        self.show(&self.worker_held_blocks, workers, |worker| {
            worker.held_blocks
        });
        self.show(&self.worker_cached_blocks, workers, |worker| {
            worker.cached_blocks
        });
        self.show(&self.worker_capacity_blocks, workers, |worker| {
            worker.capacity_blocks.into()
        });
        self.show(&self.worker_prefill_tokens, workers, |worker| {
            worker.prefill_tokens
        });
        self.show(&self.worker_context_tokens, workers, |worker| {
            worker.context_tokens
        });
        self.worker_prefill_speed.clear();
        self.worker_inter_token_latency.clear();
        for worker in workers {
            let label = [("worker", worker.name.clone())];
            self.worker_prefill_speed
                .get_or_create(&label)
                .set(worker.pace.prefill_speed());
            self.worker_inter_token_latency
                .get_or_create(&label)
                .set(worker.inter_token_latency.as_secs_f64());
        }
        self.show_forecasts(workers);
        for (of, value) in [
            ("expected_tokens", lengths.expected),
            ("bias", lengths.bias),
            ("error", lengths.error),
        ] {
            self.output_forecast.get_or_create(&[("of", of)]).set(value);
        }
        let mut exposition = String::new();
        text::encode(&mut exposition, &self.registry)?;
        Ok(exposition)
    }

    fn show_forecasts(&self, workers: &[WorkerSnapshot]) {
        let gauges = [
            &self.worker_pace,
            &self.worker_forecast_samples,
            &self.worker_forecast_error,
        ];
        gauges.iter().for_each(|gauge| gauge.clear());
        for worker in workers {
            let set = |gauge: &PartGauge, of: &str, value: f64| {
                let label = [("worker", worker.name.clone()), ("of", of.to_owned())];
                gauge.get_or_create(&label).set(value);
            };
            let pace = &worker.pace;
            for (of, value) in [
                ("prefill_start", pace.start),
                ("prefill_token", pace.token),
                ("prefill_attention", pace.attention),
                ("step", pace.step),
                ("step_sequence", pace.sequence),
                ("step_context_token", pace.context),
            ] {
                set(&self.worker_pace, of, value);
            }
            let (first_tokens, first_token_error) = worker.first_token_error;
            let learned = [
                ("prefill", pace.samples[0], pace.errors[0]),
                ("step", pace.samples[1], pace.errors[1]),
                ("time_to_first_token", first_tokens, first_token_error),
            ];
            for (of, samples, error) in learned {
                set(&self.worker_forecast_samples, of, samples as f64);
                set(&self.worker_forecast_error, of, error);
            }
        }
    }

    /// Sets one gauge of every worker, and forgets workers that are gone.
    fn show(
        &self,
        gauge: &WorkerGauge,
        workers: &[WorkerSnapshot],
        value: impl Fn(&WorkerSnapshot) -> u64,
    ) {
        gauge.clear();
        for worker in workers {
            gauge
                .get_or_create(&[("worker", worker.name.clone())])
                .set(i64::try_from(value(worker)).unwrap_or(i64::MAX));
        }
    }
}
