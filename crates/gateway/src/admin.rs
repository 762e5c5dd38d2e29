//! The admin listener: what the fleet looks like, why a request would go where, and metrics.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::fleet::{WorkerId, WorkerSnapshot};
use foresee_core::router::Explanation;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::WorkerConfig;
use crate::reply::{self, Body};
use crate::shared::Shared;
use crate::subscribe::KvEvents;
use crate::workers::{Worker, start_watching};

const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How often a draining worker is looked at.
const DRAIN_POLL: Duration = Duration::from_millis(50);

impl Shared {
    /// Answers one request to the admin API.
    pub(crate) async fn answer_admin(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let answered = self.try_answer_admin(request).await;
        answered.unwrap_or_else(|error| reply::error(&error))
    }

    async fn try_answer_admin(
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
                    show_explanation(&explanation).to_string(),
                ))
            }
            (method, path) => match path.strip_prefix("/admin/workers/") {
                Some(name) if method == Method::DELETE => self.drain_worker(&percent_decoded(name)),
                _ => Err(ApiError::path_not_found(method.as_str(), path)),
            },
        }
    }

    fn expose_metrics(&self) -> Result<Response<Body>, ApiError> {
        let workers = self.router.workers(self.clock.now());
        let (bookings, edges) = (self.router.bookings(), self.router.tracked_edges());
        let text = self
            .metrics
            .expose(&workers, self.router.length_forecast(), bookings, edges);
        let text = text.map_err(|error| ApiError::unavailable(error.to_string()))?;
        Ok(reply::whole(StatusCode::OK, METRICS_TYPE, text))
    }

    fn list_workers(&self) -> Response<Body> {
        let snapshots = self.router.workers(self.clock.now());
        let shown: Vec<Value> = snapshots.iter().map(|worker| self.show(worker)).collect();
        let lengths = self.router.length_forecast();
        let lengths = json!({
            "answers": lengths.answers,
            "expected_tokens": lengths.expected,
            "bias": lengths.bias,
            "mean_error": lengths.error,
        });
        let shown = json!({ "workers": shown, "output_lengths": lengths });
        reply::json(StatusCode::OK, shown.to_string())
    }

    fn show(&self, worker: &WorkerSnapshot) -> Value {
        let known = self.workers.get(worker.id);
        let follows_events = known.as_ref().is_some_and(|it| it.events.read().followed);
        json!({
            "name": worker.name,
            "url": known.as_ref().map(|worker| worker.config.url()),
            "rank": known.as_ref().and_then(|worker| worker.config.rank),
            "state": worker.state.as_str(),
            "models": worker.models,
            "requests": worker.requests,
            "held_requests": worker.held_requests,
            "active_blocks": worker.active_blocks,
            "held_blocks": worker.held_blocks,
            "engine_active_blocks": known.as_ref().and_then(|it| *it.engine_active_blocks.lock()),
            "context_tokens": worker.context_tokens,
            "prefill_tokens": worker.prefill_tokens,
            "cached_blocks": worker.cached_blocks,
            "cache_source": if follows_events { "events" } else { "shadow" },
            "kv_events": known.and_then(|worker| show_events(&worker)),
            "capacity_blocks": worker.capacity_blocks,
            "capacity_source": worker.capacity_source.as_str(),
            "eviction": worker.eviction.as_str(),
            "prefill_tokens_per_second": worker.pace.prefill_speed(),
            "inter_token_latency_seconds": worker.inter_token_latency.as_secs_f64(),
            "forecast": show_forecast(worker),
        })
    }

    /// `{"url": "URL[,name=…][,ranks=N][,blocks=N]…"}`, as on the command line.
    fn add_worker(self: &Arc<Self>, body: &[u8]) -> Result<Response<Body>, ApiError> {
        #[derive(Deserialize)]
        struct New {
            url: String,
        }
        let new: New = serde_json::from_slice(body).map_err(|error| {
            let message =
                format!("Send {{\"url\": \"http://HOST:PORT[,name=NAME][,blocks=N]\"}}: {error}.");
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
            start_watching(self, worker);
        }
        let body = json!({ "name": config.name });
        Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
    }

    /// Of an engine with ranks, all of them or one.
    fn drain_worker(self: &Arc<Self>, name: &str) -> Result<Response<Body>, ApiError> {
        let is_named = |worker: &Arc<Worker>| {
            worker.config.name == name || worker.config.engine_name() == name
        };
        let mut named = self.workers.all();
        named.retain(is_named);
        if named.is_empty() {
            return Err(ApiError {
                status: 404,
                ..ApiError::bad_request(format!("There is no worker named `{name}`."), None)
            });
        }
        for worker in named {
            self.router.set_draining(worker.id, true);
            tokio::spawn(Arc::clone(self).remove_when_drained(worker.id));
        }
        let body = json!({ "name": name, "state": "draining" });
        Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
    }

    async fn remove_when_drained(self: Arc<Self>, id: WorkerId) {
        let running = || {
            let workers = self.router.workers(self.clock.now());
            workers
                .iter()
                .any(|worker| worker.id == id && worker.requests > 0)
        };
        while running() {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        self.workers.remove(&self.router, id);
    }
}

/// What was learned of a worker, and how well it foretells.
fn show_forecast(worker: &WorkerSnapshot) -> Value {
    let pace = &worker.pace;
    let (first_tokens, error) = worker.first_token_error;
    json!({
        "backlog_seconds": worker.backlog.as_secs_f64(),
        "prefill": {
            "start_seconds": pace.start,
            "token_seconds": pace.token,
            "attention_seconds": pace.attention,
            "samples": pace.samples[0],
            "mean_error": pace.errors[0],
        },
        "step": {
            "step_seconds": pace.step,
            "sequence_seconds": pace.sequence,
            "context_token_seconds": pace.context,
            "samples": pace.samples[1],
            "mean_error": pace.errors[1],
        },
        "time_to_first_token": { "samples": first_tokens, "mean_error": error },
    })
}

/// How a worker's KV events stand; `None` if it has none.
fn show_events(worker: &Worker) -> Option<Value> {
    let source = worker.event_source.borrow().clone()?;
    let standing = worker.events.read();
    Some(json!({
        "source": source.to_string(),
        "replay": source.replay,
        "discovered": worker.config.kv_events == KvEvents::Discovered,
        "state": standing.state.as_str(),
        "exact": standing.exact,
        "last_sequence": standing.last_sequence,
        "lag_seconds": standing.lag_seconds,
        "batches": standing.batches,
        "gaps": standing.gaps,
        "lost": standing.lost,
        "mistrusted": standing.mistrusted,
        "lists_cached": standing.has_lists,
    }))
}

/// A part of a path as it was meant: names are often `HOST:PORT`, and many clients write that
/// colon as `%3A`. What is no escape stands for itself.
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

/// Which API a body is for, by the field that only that one has.
fn endpoint_of(body: &[u8]) -> Endpoint {
    #[derive(Deserialize)]
    struct Marks {
        messages: Option<serde::de::IgnoredAny>,
        input: Option<serde::de::IgnoredAny>,
    }
    match serde_json::from_slice(body) {
        Ok(Marks { input: Some(_), .. }) => Endpoint::Embeddings,
        Ok(Marks { messages: None, .. }) => Endpoint::Completions,
        _ => Endpoint::ChatCompletions,
    }
}

fn show_explanation(explanation: &Explanation) -> Value {
    let candidates = explanation.candidates.iter().map(|candidate| {
        json!({
            "worker": candidate.name,
            "requests": candidate.requests,
            "active_blocks": candidate.active_blocks,
            "overlap_blocks": candidate.cost.overlap_blocks,
            "overlap_cached_blocks": candidate.depth.cached,
            "overlap_active_blocks": candidate.depth.active,
            "prefill_blocks": candidate.cost.prefill_blocks,
            "active_blocks_if_placed": candidate.cost.active_blocks,
            "cost": candidate.cost.total,
            "delay_seconds": {
                "wait": candidate.delay.wait,
                "prefill": candidate.delay.prefill,
                "decode": candidate.delay.decode,
                "slowed": candidate.delay.slowed,
                "stalls": candidate.delay.stalls,
                "slows": candidate.delay.slows,
                "future": candidate.delay.future,
            },
            "probability": candidate.probability,
        })
    });
    let choice = explanation.choice().map(|it| &it.name);
    json!({
        "policy": explanation.policy.to_string(),
        "overlap_weight": explanation.overlap_weight,
        "ttft_weight": explanation.ttft_weight,
        "temperature": explanation.temperature,
        "choice": choice,
        "copies_to": choice.filter(|_| explanation.copies_to.is_some()),
        "candidates": candidates.collect::<Vec<_>>(),
    })
}
