//! JSON of the admin API's `GET /admin/workers` and `POST /admin/reload`. `docs/api.md` describes all
//! fields.
//!
//! A reader needs the fields that routers have always written. All others get a default if a router
//! of another version does not write them.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};

/// Result of `POST /admin/reload`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Keys of the settings that changed, without the workers.
    pub changed: Vec<String>,
    /// Keys of settings that differ, but keep their values until a restart.
    pub needs_restart: Vec<String>,
    /// Names of the added workers.
    pub workers_added: Vec<String>,
    /// Names of the workers that have another description, and were replaced at once.
    pub workers_replaced: Vec<String>,
    /// Names of the workers that are drained and then removed.
    pub workers_removed: Vec<String>,
}

/// Body of `GET` and `PUT /admin/log`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSettings {
    /// Filter of the log, as of `--log-level`.
    pub filter: String,
}

/// All workers of a router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerList {
    /// The workers.
    pub workers: Vec<Worker>,
    /// Forecasts of output lengths.
    #[serde(default)]
    pub output_lengths: OutputLengths,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Unique name.
    pub name: String,
    /// Address without options; `None` while the worker is being removed.
    pub url: Option<String>,
    /// IP address to which the host name of `url` was resolved.
    pub address: Option<IpAddr>,
    /// Data-parallel rank, for an address with several engines.
    pub rank: Option<u32>,
    /// `healthy`, `unhealthy`, `ejected` or `draining`.
    pub state: String,
    /// Whether the worker only finishes the requests that it has.
    #[serde(default)]
    pub draining: bool,
    /// Time until the worker is removed even if it has requests; `None` if no removal is pending.
    pub drain_deadline_seconds: Option<f64>,
    /// Results of the health checks; `None` while the worker is being removed.
    pub health: Option<Health>,
    /// Models that the worker lists; empty if they are not known.
    pub models: Vec<String>,
    /// Failures, ejection and backpressure.
    #[serde(default)]
    pub outlier: Outlier,
    /// Requests booked on the worker, queued ones included.
    pub requests: u32,
    /// Requests booked on the worker that are queued in the router.
    pub queued_requests: u32,
    /// Predicted blocks that running requests pin; shared ones count once.
    pub active_blocks: u64,
    /// Predicted blocks that queued requests will pin in addition.
    #[serde(default)]
    pub queued_blocks: u64,
    /// Blocks that running requests pin by the engine's metrics, in the engine's block size.
    pub engine_active_blocks: Option<u64>,
    /// Prompt and output tokens of all requests; shared ones count each time.
    #[serde(default)]
    pub context_tokens: u64,
    /// Booked prompt tokens that are not computed yet.
    #[serde(default)]
    pub prefill_tokens: u64,
    /// Blocks in the prefix cache, pinned or not.
    #[serde(default)]
    pub cached_blocks: u64,
    /// `events` or `estimated`.
    pub cache_source: String,
    /// State of the event stream; `None` without an event source.
    pub kv_events: Option<KvEvents>,
    /// KV blocks of the worker.
    pub capacity_blocks: u32,
    /// `configured`, `reported`, `learned` or `assumed`.
    #[serde(default)]
    pub capacity_source: String,
    /// Eviction rule of the estimated cache: `queue` or `radix`.
    #[serde(default)]
    pub eviction: String,
    /// Learned speed for a prompt of 1,000 tokens.
    #[serde(default, deserialize_with = "number")]
    pub prefill_tokens_per_second: f64,
    /// Forecast time between two tokens of a request at the present load.
    #[serde(default, deserialize_with = "number")]
    pub inter_token_latency_seconds: f64,
    /// Latency model, and the accuracy of its forecasts.
    #[serde(default)]
    pub forecast: Forecast,
}

/// Results of a worker's health checks at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// Age of the last check; `None` before the first, and for a worker without health checks whose
    /// connections were never refused.
    pub last_check_seconds_ago: Option<f64>,
    /// Time until the next check is due; 0 if it is running or overdue.
    pub next_check_in_seconds: f64,
    /// Failed checks in a row.
    pub consecutive_failures: u32,
    /// Status code of the last check's response; `None` without a response.
    pub status: Option<u16>,
    /// Error of the last check that failed, also if later ones succeeded.
    pub last_error: Option<String>,
}

/// State of a worker that follows from its past results.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outlier {
    /// Whether the worker gets only trials, because it failed more often than its peers.
    pub ejected: bool,
    /// Whether the time of the ejection has passed, so that the next trial decides.
    pub half_open: bool,
    /// Recent ejections.
    pub ejections: u32,
    /// Time until the ejection ends; `None` unless ejected.
    pub ejected_seconds: Option<f64>,
    /// Time until a request may be sent as a trial; `None` unless ejected.
    pub next_trial_seconds: Option<f64>,
    /// Fraction of the latest results that were failures.
    #[serde(deserialize_with = "number")]
    pub failure_rate: f64,
    /// Failures since the last success.
    pub consecutive_failures: u32,
    /// Seconds that recent failures add to the worker's cost.
    #[serde(deserialize_with = "number")]
    pub charge_seconds: f64,
    /// Time for which the worker gets no requests, because it responded with 429 or 503.
    pub backpressure_seconds: Option<f64>,
    /// Whether the worker has produced no output since it was added or restarted.
    pub warming_up: bool,
}

/// State of a worker's event stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvEvents {
    /// Endpoint, with `bind:` if the router binds it.
    #[serde(default)]
    pub source: String,
    /// Endpoint of the event replay.
    pub replay: Option<String>,
    /// Whether the engine reported the endpoint, as opposed to the configuration.
    #[serde(default)]
    pub discovered: bool,
    /// `off`, `waiting`, `connecting`, `silent`, `faulty`, `untrusted` or `live`.
    #[serde(default)]
    pub state: String,
    /// Whether nothing was missed since the cache was last empty.
    pub exact: bool,
    /// Sequence number of the last applied batch.
    pub last_sequence: Option<u64>,
    /// Age of the last live batch when it was applied, by the clocks of both machines.
    pub lag_seconds: Option<f64>,
    /// Batches applied, replayed ones included.
    pub batches: u64,
    /// Times that batches were missing.
    #[serde(default)]
    pub gaps: u64,
    /// Gaps that no replay closed.
    #[serde(default)]
    pub lost: u64,
    /// Times that responses contradicted the events.
    #[serde(default)]
    pub untrusted: u64,
    /// Whether the engine also lists cached blocks that it found again.
    #[serde(default)]
    pub full_report_mode: bool,
}

/// A worker's latency model, and the accuracy of its forecasts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Forecast {
    /// Time until a prompt booked now starts prefill.
    #[serde(deserialize_with = "number")]
    pub backlog_seconds: f64,
    /// Time of a prefill batch.
    pub prefill: PrefillModel,
    /// Time of a decode step.
    pub decode_step: DecodeStepModel,
    /// Accuracy of the forecast time from arrival to first token.
    pub time_to_first_token: Accuracy,
}

/// Learned time of a prefill batch: the sum of three terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefillModel {
    /// Time of each batch.
    #[serde(deserialize_with = "number")]
    pub base_seconds: f64,
    /// Time of each prompt token to compute.
    #[serde(deserialize_with = "number")]
    pub seconds_per_token: f64,
    /// Time of each pair of a prompt token to compute and a token before it.
    #[serde(deserialize_with = "number")]
    pub seconds_per_attention_pair: f64,
    /// Accuracy of the model.
    #[serde(flatten)]
    pub accuracy: Accuracy,
}

/// Learned time of a decode step: the sum of three terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DecodeStepModel {
    /// Time of each step.
    #[serde(deserialize_with = "number")]
    pub base_seconds: f64,
    /// Time of each request of the batch.
    #[serde(deserialize_with = "number")]
    pub seconds_per_request: f64,
    /// Time of each context token of the batch.
    #[serde(deserialize_with = "number")]
    pub seconds_per_context_token: f64,
    /// Accuracy of the model.
    #[serde(flatten)]
    pub accuracy: Accuracy,
}

/// Accuracy of a forecast.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Accuracy {
    /// Number of samples.
    pub samples: u64,
    /// Mean absolute error, as a fraction of the observed value.
    #[serde(deserialize_with = "number")]
    pub mean_error: f64,
}

/// Forecasts of output lengths.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OutputLengths {
    /// Number of outputs that ended.
    pub outputs: u64,
    /// Expected tokens of the next output, if nothing is known about its request.
    #[serde(deserialize_with = "number")]
    pub expected_tokens: f64,
    /// Ratio of observed to forecast tokens over the latest outputs.
    #[serde(deserialize_with = "number")]
    pub bias: f64,
    /// Mean absolute error over the latest outputs, as a fraction of their mean length.
    #[serde(deserialize_with = "number")]
    pub mean_error: f64,
}

/// Reads a number, or `null` as NaN: JSON has no other way to write a number that is not finite.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"{"workers": [{"name": "a", "url": null, "state": "healthy",
        "models": ["m"], "active_blocks": 7, "requests": 5, "queued_requests": 2,
        "cache_source": "events", "capacity_blocks": 100,
        "kv_events": {"exact": true, "batches": 3}, "new_field": [1]}]}"#;

    #[test]
    fn fields_that_a_router_of_another_version_does_not_write_have_defaults() {
        let list: WorkerList = serde_json::from_str(LEAST).unwrap();
        let worker = &list.workers[0];
        assert_eq!((worker.requests, worker.cached_blocks), (5, 0));
        assert_eq!(worker.kv_events.as_ref().unwrap().batches, 3);
        assert_eq!(worker.outlier, Outlier::default());
        let without_name = LEAST.replace("\"name\": \"a\",", "");
        let error = serde_json::from_str::<WorkerList>(&without_name).unwrap_err();
        assert!(
            error.to_string().contains("missing field `name`"),
            "{error}"
        );
    }

    #[test]
    fn a_list_that_is_written_can_be_read() {
        let mut list: WorkerList = serde_json::from_str(LEAST).unwrap();
        let worker = &mut list.workers[0];
        worker.address = Some(IpAddr::from([10, 0, 0, 1]));
        worker.health = Some(Health::default());
        worker.forecast.prefill.accuracy.samples = 9;
        let text = serde_json::to_string(&list).unwrap();
        assert!(text.contains(r#""prefill":{"base_seconds":0.0"#), "{text}");
        assert_eq!(serde_json::from_str::<WorkerList>(&text).unwrap(), list);
    }

    #[test]
    fn a_number_that_is_not_finite_does_not_make_a_list_unreadable() {
        let mut list: WorkerList = serde_json::from_str(LEAST).unwrap();
        list.workers[0].prefill_tokens_per_second = f64::INFINITY;
        list.workers[0].forecast.prefill.accuracy.mean_error = f64::NAN;
        let text = serde_json::to_string(&list).unwrap();
        let read: WorkerList = serde_json::from_str(&text).unwrap();
        assert!(read.workers[0].prefill_tokens_per_second.is_nan());
    }
}
