//! JSON that the dashboard reads: `GET /admin/snapshot`, `/admin/stream`, `/admin/history`,
//! `/admin/decisions` and `/admin/config`. `docs/api.md` describes all fields.
//!
//! Numbers that are not known are `null`. Times are seconds since the Unix epoch, durations seconds.

use serde::{Deserialize, Serialize};

use crate::admin::{Accuracy, OutputLengths};

/// State of the router: the response of `GET /admin/snapshot`, and the first event of
/// `GET /admin/stream`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Time of the snapshot.
    pub time: f64,
    /// When the router started.
    pub started: f64,
    /// Version of the router.
    pub version: String,
    /// Name of the policy.
    pub policy: String,
    /// Order of the queue; `null` without a queue.
    pub queue: Option<String>,
    /// Tokens of a block.
    pub block_size: u32,
    /// Whether the router shuts down or the latest reload failed, and similar.
    pub notices: Vec<String>,
    /// Models that the workers serve.
    pub models: Vec<String>,
    /// Latest sample of the fleet.
    pub sample: FleetSample,
    /// Quality of the predictions.
    pub quality: Quality,
    /// All workers, in the order in which they were added.
    pub workers: Vec<WorkerStatus>,
    /// Latest decisions that were recorded, the oldest first, without the costs of the candidates.
    pub decisions: Vec<Decision>,
}

/// Changes of one second: an event of `GET /admin/stream`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tick {
    /// Time of the tick.
    pub time: f64,
    /// As [`Snapshot::notices`].
    pub notices: Vec<String>,
    /// Latest sample of the fleet.
    pub sample: FleetSample,
    /// Quality of the predictions; `null` if it is as before.
    pub quality: Option<Quality>,
    /// Workers that are new or have changed.
    pub workers: Vec<WorkerStatus>,
    /// Names of the workers that are gone.
    pub removed: Vec<String>,
    /// Decisions that are new or have an outcome since, without the costs of the candidates.
    pub decisions: Vec<Decision>,
}

/// One worker in a [`Snapshot`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Unique name.
    pub name: String,
    /// `healthy`, `unhealthy`, `ejected` or `draining`.
    pub state: String,
    /// Problems of the worker, each in a few words; empty without any.
    pub problems: Vec<String>,
    /// Requests that were sent to the worker and have not ended.
    pub running: u32,
    /// Requests that are queued in the router for the worker.
    pub queued: u32,
    /// Blocks that running requests pin, predicted.
    pub active_blocks: u64,
    /// Blocks that queued requests will pin in addition.
    pub queued_blocks: u64,
    /// Blocks in the prefix cache.
    pub cached_blocks: u64,
    /// KV blocks of the worker.
    pub capacity_blocks: u32,
    /// Booked prompt tokens that are not computed yet.
    pub backlog_tokens: u64,
    /// Predicted time until a prompt that is booked now starts prefill.
    pub wait_seconds: f64,
    /// Predicted time between two tokens of a request.
    pub token_seconds: f64,
    /// Fraction of the prompt blocks of the last minutes that were predicted to be cached.
    pub hits_predicted: Option<f64>,
    /// Fraction of the same blocks that the engine reported as cached.
    pub hits_actual: Option<f64>,
    /// State of the KV events, as in `GET /admin/workers`; `null` without an event source.
    pub events: Option<String>,
    /// Whether the worker's cache is known from its events; otherwise it is estimated.
    pub follows_events: bool,
    /// Whether the worker gets only trials.
    pub ejected: bool,
    /// Recent ejections.
    pub ejections: u32,
    /// Fraction of the latest results that were failures.
    pub failure_rate: f64,
    /// Mean relative error of the predicted times to first token.
    pub ttft_error: Option<f64>,
}

/// Quality of the predictions of the whole fleet since the start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Forecast times to first token, weighted by their number on each worker.
    pub time_to_first_token: Accuracy,
    /// Latency model of prefills.
    pub prefill: Accuracy,
    /// Latency model of decode steps.
    pub decode_step: Accuracy,
    /// Forecasts of output lengths.
    pub output_lengths: OutputLengths,
    /// Requests whose overlap in blocks was predicted exactly.
    pub overlap_exact: u64,
    /// Requests whose overlap was predicted too large.
    pub overlap_over: u64,
    /// Requests whose overlap was predicted too small.
    pub overlap_under: u64,
}

/// Declares the series of the fleet: a sample of all of them, and the columns of many samples.
macro_rules! fleet_series {
    ($($(#[doc = $doc:literal])+ $name:ident,)*) => {
        /// State of the fleet in one second or minute. Counts are rates per second.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct FleetSample {
            /// End of the second or minute.
            pub time: f64,
            $($(#[doc = $doc])+ pub $name: Option<f32>,)*
        }

        /// Columns of [`FleetSample`]s, the oldest first.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct FleetSeries {
            /// Ends of the seconds or minutes.
            pub time: Vec<f64>,
            $($(#[doc = $doc])+ pub $name: Vec<Option<f32>>,)*
        }

        impl FleetSeries {
            /// Adds a sample.
            pub fn push(&mut self, sample: &FleetSample) {
                self.time.push(sample.time);
                $(self.$name.push(sample.$name);)*
            }
        }

        impl FleetSample {
            /// Returns the means of samples, each over those in which it is known. The time is that
            /// of the last one.
            #[must_use]
            pub fn mean_of(samples: &[Self]) -> Self {
                let mut mean = Self::default();
                if let Some(last) = samples.last() {
                    mean.time = last.time;
                }
                $(
                    let known = samples.iter().filter_map(|sample| sample.$name);
                    let (sum, count) = known.fold((0.0, 0), |(sum, count), value| {
                        (sum + f64::from(value), count + 1)
                    });
                    mean.$name = (count > 0).then(|| (sum / f64::from(count)) as f32);
                )*
                mean
            }
        }
    };
}

fleet_series! {
    /// Workers that can be chosen.
    healthy,
    /// Requests that were sent to workers and have not ended.
    running,
    /// Requests that are queued in the router.
    queued,
    /// Active blocks divided by the capacity, over all workers.
    kv_mean,
    /// Active blocks divided by the capacity, on the worker with the most.
    kv_max,
    /// Predicted wait for prefill, mean of the healthy workers.
    wait_mean,
    /// Predicted wait for prefill, on the worker with the longest.
    wait_max,
    /// Median time to first token of the requests that ended.
    ttft_p50,
    /// 99th percentile of the time to first token.
    ttft_p99,
    /// Median of the mean time between output tokens, over the requests that ended.
    itl_p50,
    /// 99th percentile of the mean time between output tokens.
    itl_p99,
    /// Prompt tokens routed per second.
    prompt_tokens,
    /// Output tokens observed per second.
    output_tokens,
    /// Prompt blocks that were predicted to be cached, as a fraction.
    hits_predicted,
    /// Prompt blocks that the engines reported as cached, as a fraction of the same blocks.
    hits_actual,
    /// Requests per second that ended with a whole response.
    ok,
    /// Requests per second that were refused.
    refused,
    /// Requests per second for which no worker was available.
    unavailable,
    /// Requests per second that a worker answered with an error.
    worker_error,
    /// Requests per second that a worker failed.
    worker_failed,
    /// Requests per second whose client disconnected.
    client_left,
}

/// Response of `GET /admin/history`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Samples of each second of the last ten minutes.
    pub seconds: FleetSeries,
    /// Samples of each minute of the last twelve hours.
    pub minutes: FleetSeries,
    /// Series of workers: the last five minutes of all, or the last hour of the one that the query
    /// names.
    pub workers: Vec<WorkerSeries>,
}

/// Load of one worker in the past, one sample for every ten seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerSeries {
    /// Name of the worker.
    pub name: String,
    /// Time of the last sample.
    pub end: f64,
    /// Time between two samples.
    pub step: f64,
    /// Requests booked on the worker, queued ones included.
    pub requests: Vec<u16>,
    /// Thousandths of the capacity that running requests pin.
    pub active_permille: Vec<u16>,
}

/// Response of `GET /admin/decisions`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decisions {
    /// Recorded decisions, the oldest first.
    pub decisions: Vec<Decision>,
    /// Whether there are more: pass the last `id` as `after`.
    pub has_more: bool,
}

/// A recorded routing decision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Ascending number.
    pub id: u64,
    /// When the worker was chosen.
    pub time: f64,
    /// Model that the request named.
    pub model: String,
    /// Prompts and outputs that were booked.
    pub prompts: usize,
    /// Prompt tokens, counted or estimated.
    pub prompt_tokens: u32,
    /// Blocks of the prompts.
    pub prompt_blocks: u32,
    /// Policy that decided.
    pub policy: String,
    /// Weight of the time to first token in the cost of `marginal-delay`.
    pub ttft_weight: f64,
    /// Worker that was chosen.
    pub chosen: String,
    /// Why another worker than the one of least cost was chosen: `replication`, `trial`; `null`
    /// otherwise.
    pub reason: Option<String>,
    /// Cost of the chosen worker, in the policy's own unit.
    pub cost: Option<f64>,
    /// Worker of the least cost among the others.
    pub runner_up: Option<String>,
    /// Cost of the runner-up.
    pub runner_up_cost: Option<f64>,
    /// Number of candidates.
    pub candidate_count: usize,
    /// Predictions for the chosen worker.
    pub predicted: Predicted,
    /// Outcome of the request; `null` while the request runs.
    pub outcome: Option<DecisionOutcome>,
    /// Costs of all candidates, in the order in which the workers were added. Empty in events and
    /// snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<CandidateCost>,
    /// Eligible workers that were passed over. Empty in events and snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<PassedOver>,
}

/// Predictions of the router for a request on the chosen worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// Time from the decision to the first token.
    pub ttft_seconds: Option<f64>,
    /// Time from the decision to the end.
    pub total_seconds: Option<f64>,
    /// Prompt tokens that need not be computed.
    pub cached_tokens: u32,
    /// Output tokens of all outputs.
    pub output_tokens: u32,
}

/// How a request ended whose decision was recorded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DecisionOutcome {
    /// Outcome as in the metric `foresee_requests`, or `no_response`.
    pub outcome: String,
    /// Worker that responded, which is another one after a failover or a move in the queue.
    pub worker: Option<String>,
    /// Time from the decision to the first token.
    pub ttft_seconds: Option<f64>,
    /// Time from the decision to the end.
    pub total_seconds: f64,
    /// Prompt tokens that the engine took from its cache, if it reports that.
    pub cached_tokens: Option<u32>,
    /// Output tokens of all outputs.
    pub output_tokens: u32,
}

/// Cost of a request on one candidate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CandidateCost {
    /// Name of the worker.
    pub worker: String,
    /// Requests booked there.
    pub requests: u32,
    /// Cost that the policy compared, in its own unit; `null` if it is infinite.
    pub policy_cost: Option<f64>,
    /// Probability that the policy chooses the worker.
    pub probability: f64,
    /// Leading blocks of the prompt that need not be computed there.
    pub overlap_blocks: u32,
    /// Blocks that must be computed there.
    pub prefill_blocks: u32,
    /// Active and queued blocks with this request.
    pub active_blocks: u64,
    /// Terms of the cost of `marginal-delay` in seconds, weighted, so that they sum to it.
    pub terms: Vec<(String, f64)>,
    /// Sum of the terms.
    pub delay: f64,
}

/// An eligible worker that was passed over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PassedOver {
    /// Name of the worker.
    pub worker: String,
    /// `ejected`, `backpressure` or `warm_up`.
    pub reason: String,
}

/// Response of `GET /admin/config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// Settings in force, by key.
    pub settings: Vec<Setting>,
}

/// A setting in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Key in the configuration file.
    pub key: String,
    /// Value as text; `set` for a secret.
    pub value: String,
    /// Whether the value differs from the default.
    pub is_changed: bool,
    /// Whether a reload applies a new value.
    pub is_live: bool,
}
