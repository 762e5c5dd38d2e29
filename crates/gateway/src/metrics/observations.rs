//! What happens to requests and workers, added to the metrics.

use std::cmp::Ordering;
use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;

use crate::metrics::declaration::{Exemplar, TracedHistogram};
use crate::metrics::{Metrics, Outcome, gauge_value};

/// Tokens of one request and its response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResponseTokens {
    pub(crate) prompt: u32,
    /// Prompt tokens that the engine reports as cached.
    pub(crate) cached: Option<u32>,
    pub(crate) output: u32,
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

    /// Returns the number of requests that ended with this outcome.
    pub(crate) fn outcome_count(&self, outcome: Outcome) -> u64 {
        let series = self
            .requests
            .get_or_create(&[("outcome", outcome.as_str())]);
        series.get()
    }

    /// Returns the numbers of requests whose overlap was predicted exactly, too large and too small.
    pub(crate) fn overlap_prediction_counts(&self) -> [u64; 3] {
        ["exact", "over", "under"].map(|result| {
            let series = self
                .overlap_predictions
                .get_or_create(&[("result", result)]);
            series.get()
        })
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
}

/// Adds an observation, with the time of now if it names a trace.
fn observe(histogram: &TracedHistogram, time: Duration, exemplar: Option<Exemplar>) {
    let now = exemplar.is_some().then(SystemTime::now);
    histogram.observe(time.as_secs_f64(), exemplar, now);
}
