//! Admin listener: workers and their state, explanations of routing decisions, health and metrics.
//!
//! `docs/api.md` describes the paths and all JSON fields.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::router::{CacheSource, Explanation};
use foresee_core::workers::{WorkerId, WorkerSnapshot};
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::WorkerConfig;
use crate::gateway_state::GatewayState;
use crate::reply::{self, Body};
use crate::subscribe::KvEvents;
use crate::workers::{Worker, start_worker_tasks};

/// Content type of the metrics.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Time between two checks of a draining worker.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(50);

impl GatewayState {
    /// Handles one request to the admin API.
    pub(crate) async fn handle_admin(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let result = self.try_handle_admin(request).await;
        result.unwrap_or_else(|error| reply::error(&error))
    }

    /// Calls the handler of the request's method and path. The error is the response for the
    /// client; for an unknown path, a 404.
    async fn try_handle_admin(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, ApiError> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        match (&head.method, path) {
            (&Method::GET, "/health/live") => {
                Ok(reply::whole(StatusCode::OK, "text/plain", "ok\n"))
            }
            (&Method::GET, "/health/ready") if self.router.is_ready() => {
                Ok(reply::whole(StatusCode::OK, "text/plain", "ok\n"))
            }
            (&Method::GET, "/health/ready") => {
                Err(ApiError::unavailable("Not ready: no worker is healthy."))
            }
            (&Method::GET, "/metrics") => self.expose_metrics(),
            (&Method::GET, "/admin/workers") => Ok(self.list_workers()),
            (&Method::POST, "/admin/workers") => {
                let body = self.read_body(&head.headers, body).await?;
                self.add_worker(&body)
            }
            (&Method::POST, "/admin/explain") => {
                let body = self.read_body(&head.headers, body).await?;
                let explanation = self.explain(endpoint_of(&body), &body)?;
                Ok(reply::json(
                    StatusCode::OK,
                    explanation_json(&explanation).to_string(),
                ))
            }
            (method, path) => match path.strip_prefix("/admin/workers/") {
                Some(name) if method == Method::DELETE => self.drain_worker(&percent_decoded(name)),
                _ => Err(ApiError::path_not_found(method.as_str(), path)),
            },
        }
    }

    /// Returns the metrics in OpenMetrics text format.
    fn expose_metrics(&self) -> Result<Response<Body>, ApiError> {
        let workers = self.router.workers(self.clock.now());
        let text = self.metrics.expose(
            &workers,
            self.router.output_length_accuracy(),
            self.router.booking_count(),
            self.router.prefix_tree_nodes(),
        );
        let text = text.map_err(|error| ApiError::unavailable(error.to_string()))?;
        Ok(reply::whole(StatusCode::OK, METRICS_TYPE, text))
    }

    /// Returns all workers, and the accuracy of the output length model.
    fn list_workers(&self) -> Response<Body> {
        let snapshots = self.router.workers(self.clock.now());
        let workers: Vec<Value> = snapshots
            .iter()
            .map(|worker| self.worker_json(worker))
            .collect();
        let lengths = self.router.output_length_accuracy();
        let body = json!({
            "workers": workers,
            "output_lengths": {
                "outputs": lengths.outputs,
                "expected_tokens": lengths.expected_tokens,
                "bias": lengths.bias,
                "mean_error": lengths.mean_abs_relative_error,
            },
        });
        reply::json(StatusCode::OK, body.to_string())
    }

    /// Returns one worker: the router's view, and the fields that only the gateway knows. The
    /// latter are `null` while the worker is being removed, and the cache source is then
    /// `estimated`.
    fn worker_json(&self, worker: &WorkerSnapshot) -> Value {
        let entry = self.workers.get(worker.id);
        let follows_events = entry
            .as_ref()
            .is_some_and(|entry| entry.events.read().followed);
        let cache_source = if follows_events {
            CacheSource::Events
        } else {
            CacheSource::Estimated
        };
        json!({
            "name": worker.name,
            "url": entry.as_ref().map(|entry| entry.config.url()),
            "rank": entry.as_ref().and_then(|entry| entry.config.rank),
            "state": worker.state.as_str(),
            "models": worker.models,
            "requests": worker.requests,
            "queued_requests": worker.queued_requests,
            "active_blocks": worker.active_blocks,
            "queued_blocks": worker.queued_blocks,
            "engine_active_blocks": entry
                .as_ref()
                .and_then(|entry| *entry.engine_active_blocks.lock()),
            "context_tokens": worker.context_tokens,
            "prefill_tokens": worker.prefill_tokens,
            "cached_blocks": worker.cached_blocks,
            "cache_source": cache_source.as_str(),
            "kv_events": entry.and_then(|entry| kv_events_json(&entry)),
            "capacity_blocks": worker.capacity_blocks,
            "capacity_source": worker.capacity_source.as_str(),
            "eviction": worker.eviction.as_str(),
            "prefill_tokens_per_second": worker.latency.prefill_speed(),
            "inter_token_latency_seconds": worker.inter_token_latency.as_secs_f64(),
            "forecast": forecast_json(worker),
        })
    }

    /// Adds the workers of the body `{"url": "URL[,name=NAME][,ranks=N][,blocks=N]…"}`, a
    /// description as for `--worker`. Responds with a 202 before the first health check. Fails with
    /// a 400 if the description is invalid or the name is taken.
    fn add_worker(self: &Arc<Self>, body: &[u8]) -> Result<Response<Body>, ApiError> {
        #[derive(Deserialize)]
        struct NewWorker {
            url: String,
        }
        let new: NewWorker = serde_json::from_slice(body).map_err(|error| {
            let message =
                format!("The body must be {{\"url\": \"http://HOST:PORT[,name=NAME][,blocks=N]\"}}: {error}.");
            ApiError::bad_request(message, Some("url"))
        })?;
        let config: WorkerConfig = new
            .url
            .parse()
            .map_err(|error| ApiError::bad_request(format!("{error}"), Some("url")))?;
        let added = self
            .workers
            .add(&self.router, &config, self.config.prefix_caching)
            .map_err(|error| ApiError::bad_request(error.to_string(), Some("url")))?;
        for worker in added {
            start_worker_tasks(self, worker);
        }
        let body = json!({ "name": config.name });
        Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
    }

    /// Drains the worker `name` and removes it once it has no requests. The name of an engine with
    /// ranks stands for all its ranks. Responds with a 202 immediately, or with a 404 if no worker
    /// has the name.
    fn drain_worker(self: &Arc<Self>, name: &str) -> Result<Response<Body>, ApiError> {
        let mut workers = self.workers.all();
        workers.retain(|worker| worker.config.name == name || worker.config.engine_name() == name);
        if workers.is_empty() {
            return Err(ApiError {
                status: 404,
                ..ApiError::bad_request(format!("No worker is named `{name}`."), None)
            });
        }
        for worker in workers {
            self.router.set_draining(worker.id, true);
            tokio::spawn(Arc::clone(self).remove_when_drained(worker.id));
        }
        let body = json!({ "name": name, "state": "draining" });
        Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
    }

    /// Waits until no request is booked on the worker, then removes it. There is no time limit.
    async fn remove_when_drained(self: Arc<Self>, id: WorkerId) {
        let has_requests = || {
            let workers = self.router.workers(self.clock.now());
            workers
                .iter()
                .any(|worker| worker.id == id && worker.requests > 0)
        };
        while has_requests() {
            tokio::time::sleep(DRAIN_POLL_INTERVAL).await;
        }
        self.workers.remove(&self.router, id);
    }
}

/// Returns a worker's latency model, and the accuracy of its forecasts.
fn forecast_json(worker: &WorkerSnapshot) -> Value {
    let model = &worker.latency;
    let ttft = worker.ttft_accuracy;
    json!({
        "backlog_seconds": worker.prefill_backlog.as_secs_f64(),
        "prefill": {
            "base_seconds": model.prefill_base,
            "seconds_per_token": model.prefill_per_token,
            "seconds_per_attention_pair": model.prefill_per_attention_pair,
            "samples": model.prefill_accuracy.samples,
            "mean_error": model.prefill_accuracy.mean_abs_relative_error,
        },
        "decode_step": {
            "base_seconds": model.decode_base,
            "seconds_per_request": model.decode_per_request,
            "seconds_per_context_token": model.decode_per_context_token,
            "samples": model.decode_accuracy.samples,
            "mean_error": model.decode_accuracy.mean_abs_relative_error,
        },
        "time_to_first_token": {
            "samples": ttft.samples,
            "mean_error": ttft.mean_abs_relative_error,
        },
    })
}

/// Returns the state of a worker's event stream; `None` without an event source.
fn kv_events_json(worker: &Worker) -> Option<Value> {
    let source = worker.event_source.borrow().clone()?;
    let snapshot = worker.events.read();
    Some(json!({
        "source": source.to_string(),
        "replay": source.replay,
        "discovered": worker.config.kv_events == KvEvents::Discovered,
        "state": snapshot.state.as_str(),
        "exact": snapshot.is_complete,
        "last_sequence": snapshot.last_sequence,
        "lag_seconds": snapshot.lag_seconds,
        "batches": snapshot.batches,
        "gaps": snapshot.gaps,
        "lost": snapshot.lost,
        "untrusted": snapshot.untrusted,
        "full_report_mode": snapshot.full_report_mode,
    }))
}

/// Decodes the percent escapes in a part of a path. Names of workers are often `HOST:PORT`, and many
/// clients write the colon as `%3A`. A `%` without two hexadecimal digits stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| byte == b'%');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() {
            &after[2..]
        } else {
            after
        };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Returns the endpoint that a body is for: embeddings if it has `input`, completions if it has no
/// `messages`, and otherwise chat completions. An unreadable body counts as a chat completion.
fn endpoint_of(body: &[u8]) -> Endpoint {
    #[derive(Deserialize)]
    struct Fields {
        messages: Option<serde::de::IgnoredAny>,
        input: Option<serde::de::IgnoredAny>,
    }
    match serde_json::from_slice(body) {
        Ok(Fields { input: Some(_), .. }) => Endpoint::Embeddings,
        Ok(Fields { messages: None, .. }) => Endpoint::Completions,
        _ => Endpoint::ChatCompletions,
    }
}

/// Returns a routing decision with the costs of all candidates. `choice` is the expected choice, as
/// the actual one can be random.
fn explanation_json(explanation: &Explanation) -> Value {
    let candidates = explanation.candidates.iter().map(|candidate| {
        json!({
            "worker": candidate.name,
            "requests": candidate.requests,
            "active_blocks": candidate.active_blocks,
            "overlap_blocks": candidate.cost.overlap_blocks,
            "overlap_cached_blocks": candidate.prefix_match.cached_blocks,
            "overlap_active_blocks": candidate.prefix_match.active_blocks,
            "prefill_blocks": candidate.cost.prefill_blocks,
            "active_blocks_if_placed": candidate.cost.active_blocks,
            "cost": candidate.cost.total,
            "delay_seconds": {
                "queue_wait": candidate.delay.queue_wait,
                "prefill": candidate.delay.prefill,
                "decode": candidate.delay.decode,
                "decode_slowdown": candidate.delay.decode_slowdown,
                "prefill_stall_caused": candidate.delay.prefill_stall_caused,
                "decode_slowdown_caused": candidate.delay.decode_slowdown_caused,
                "future_arrivals": candidate.delay.future_arrivals,
            },
            "probability": candidate.probability,
        })
    });
    let choice = explanation.expected_choice();
    let choice = choice.map(|candidate| &candidate.name);
    json!({
        "policy": explanation.policy.to_string(),
        "overlap_weight": explanation.overlap_weight,
        "ttft_weight": explanation.ttft_weight,
        "temperature": explanation.temperature,
        "choice": choice,
        "replicates_prefix_to": choice.filter(|_| explanation.replicates_prefix_to.is_some()),
        "candidates": candidates.collect::<Vec<_>>(),
    })
}
