//! Admin listener: workers and their state, explanations of routing decisions, health and metrics.
//!
//! `settings` and `listener` say where it listens, `access` which requests it accepts, `new_worker`
//! which workers may be added, `drain` how workers leave, `explain` how a request would be routed,
//! `log` has the filter of the log, `dashboard` has the page and its data, and `selection` is a front
//! end for proxies that send requests themselves.
//!
//! `docs/api.md` describes the paths and all JSON fields.

mod access;
mod body;
mod dashboard;
mod drain;
mod event_stream;
mod explain;
pub(crate) mod key;
mod listener;
mod log;
mod new_worker;
mod parts;
mod selection;
pub(crate) mod settings;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use foresee_api::admin as api;
use foresee_core::LatencyAccuracy;
use foresee_core::outlier::OutlierSnapshot;
use foresee_core::router::CacheSource;
use foresee_core::workers::{WorkerError, WorkerSnapshot, WorkerState};
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use http::header::{ACCEPT, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, request};
use http_body_util::Either;
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use serde_json::json;

use crate::kv_events::source::KvEvents;
use crate::log_limit::warn_limited;
use crate::metrics::{
    CompatNames, MetricsCompat, OPEN_METRICS, PROMETHEUS_TEXT, PresentState, gauge_value,
    prometheus_text,
};
use crate::reload::ReloadError;
use crate::reload::changes::settings_in_force;
use crate::reply::{self, Body};
use crate::shutdown::shutting_down;
use crate::workers::worker::Worker;
use access::refusal;
use drain::{remove_when_drained, set_draining, timeout_of};
use explain::Explainer;
use listener::ConnectionCloser;
use selection::SelectionApi;

pub(crate) use dashboard::{Dashboard, DashboardFeed, DashboardParts};
pub use key::{AdminKey, KeyError};
pub(crate) use listener::{AdminBody, AdminListener};
pub use new_worker::parse_new_worker;
pub(crate) use parts::AdminParts;
pub use settings::{AdminConfig, AdminListen, UnprotectedAdmin};

/// Maximum size of a request body, except for explanations.
const MAX_BODY_BYTES: usize = 1 << 20;

/// The admin API: a front end on [`workers`](crate::workers), and with its
/// [selection API](selection) one on [`placement`](crate::placement).
#[derive(Debug)]
pub(crate) struct AdminApi {
    parts: AdminParts,
    /// Which requests are accepted.
    config: Arc<ArcSwap<AdminConfig>>,
    /// Where the listener listens.
    listen: AdminListen,
    explainer: Explainer,
    selection: SelectionApi,
    /// The dashboard, if there is one.
    dashboard: Option<Arc<Dashboard>>,
}

impl AdminApi {
    /// Creates the API of a gateway that removes no worker and has no reservations. A request to
    /// explain has at most `max_body_bytes`.
    pub(crate) fn new(
        parts: AdminParts,
        config: Arc<ArcSwap<AdminConfig>>,
        listen: AdminListen,
        max_body_bytes: usize,
        dashboard: Option<Arc<Dashboard>>,
    ) -> Self {
        let max_reservations = config.load().max_reservations;
        Self {
            explainer: Explainer::new(Arc::clone(&parts.placement), max_body_bytes),
            selection: SelectionApi::new(&parts, max_reservations),
            parts,
            config,
            listen,
            dashboard,
        }
    }

    /// Releases reservations as they expire, until [`close`](Self::close).
    pub(crate) fn expire_reservations(&self) -> impl Future<Output = ()> + use<> {
        let expired = self.parts.metrics.reservations_expired.clone();
        self.selection.expire(expired)
    }

    /// Releases all reservations, because the gateway ends.
    pub(crate) fn close(&self) {
        self.selection.close();
    }

    /// Handles one request to the admin listener. Errors become responses. A request that is refused
    /// for its host, origin, key or content type is logged.
    pub(crate) async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Response<AdminBody> {
        let result = self.try_handle(request).await;
        result.unwrap_or_else(|error| {
            let mut response = reply::error(Endpoint::Other, &error);
            if error.status == 401 {
                let challenge = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            }
            response.map(Either::Left)
        })
    }

    /// Checks that the request may be handled, and calls the handler of its method and path. `HEAD`
    /// is handled like `GET`; the connection leaves out the body. The error is the response for the
    /// client; for an unknown path, a 404. A request that changes workers or settings is logged with
    /// the target `foresee::audit`.
    async fn try_handle(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<AdminBody>, ApiError> {
        let (head, body) = request.into_parts();
        let config = self.config.load();
        let checked = config.check_request(&self.listen, &self.parts.keys, &head);
        let principal = checked.inspect_err(|error| {
            warn_limited!(
                key: error.code.unwrap_or(""),
                status = error.status, code = error.code, method = %head.method,
                path = head.uri.path(),
                "refused a request to the admin listener"
            );
        })?;
        if is_change(&head) {
            let (method, path) = (head.method.clone(), head.uri.path().to_owned());
            let result = self.respond(head, body).await;
            let status = match &result {
                Ok(response) => response.status().as_u16(),
                Err(error) => error.status,
            };
            tracing::info!(
                target: "foresee::audit", %principal, %method, path, status,
                "request to change something"
            );
            return result.map(whole_body);
        }
        if head.method == Method::GET || head.method == Method::HEAD {
            let connection = head.extensions.get::<ConnectionCloser>().cloned();
            let dashboard = self.dashboard.as_ref();
            let (path, query) = (head.uri.path(), head.uri.query());
            let response = dashboard
                .and_then(|dashboard| dashboard.respond(path, query, &head.headers, connection));
            if let Some(response) = response {
                return response;
            }
        }
        self.respond(head, body).await.map(whole_body)
    }

    /// Calls the handler of a request's method and path. The error is the response for the client.
    async fn respond(
        self: Arc<Self>,
        head: request::Parts,
        body: Incoming,
    ) -> Result<Response<Body>, ApiError> {
        let path = head.uri.path();
        let method = match head.method {
            Method::HEAD => &Method::GET,
            ref method => method,
        };
        match (method, path) {
            (&Method::GET, "/health/live") => {
                Ok(reply::whole(StatusCode::OK, "text/plain", "ok\n"))
            }
            (&Method::GET, "/health/ready") if self.parts.shutdown.has_begun() => {
                Err(shutting_down())
            }
            (&Method::GET, "/health/ready") if self.parts.router.is_ready() => {
                Ok(reply::whole(StatusCode::OK, "text/plain", "ok\n"))
            }
            (&Method::GET, "/health/ready") => {
                Err(ApiError::unavailable("Not ready: no worker is healthy."))
            }
            (&Method::GET, "/metrics") => self.expose_metrics(&head.headers),
            (&Method::GET, "/admin/workers") => Ok(self.list_workers()),
            (&Method::GET, "/admin/config") => Ok(self.configuration()),
            (&Method::POST, "/admin/workers") => {
                let body = body::read(&head.headers, body, MAX_BODY_BYTES).await?;
                self.add_worker(&body)
            }
            (&Method::POST, "/admin/reload") => self.reload().await,
            (&Method::GET, "/admin/log") => log::show(self.parts.program.log_filter.as_ref()),
            (&Method::PUT, "/admin/log") => {
                let body = body::read(&head.headers, body, MAX_BODY_BYTES).await?;
                log::replace(self.parts.program.log_filter.as_ref(), &body)
            }
            (&Method::POST, "/admin/explain") => self.explainer.explain(&head.headers, body).await,
            (&Method::POST, "/admin/select") => self.selection.select(&head, body).await,
            (method, path) => match path.strip_prefix("/admin/reservations/") {
                Some(rest) => self.selection.change_reservation(&head, rest, body).await,
                None => self.change_worker(method, path, head.uri.query()),
            },
        }
    }

    /// Handles the paths below `/admin/workers/`, which name a worker. Their requests have no body;
    /// one that is sent is ignored. Fails with a 404 for any other path.
    fn change_worker(
        &self,
        method: &Method,
        path: &str,
        query: Option<&str>,
    ) -> Result<Response<Body>, ApiError> {
        let not_found = || ApiError::path_not_found(method.as_str(), path);
        let rest = path.strip_prefix("/admin/workers/").ok_or_else(not_found)?;
        let removals = &self.parts.removals;
        match *method {
            Method::DELETE => {
                remove_when_drained(removals, &percent_decoded(rest), timeout_of(query)?)
            }
            Method::GET => self.show_worker(&percent_decoded(rest)),
            Method::POST => match rest.rsplit_once('/') {
                Some((name, "drain")) => set_draining(removals, &percent_decoded(name), true),
                Some((name, "undrain")) => set_draining(removals, &percent_decoded(name), false),
                _ => Err(not_found()),
            },
            _ => Err(not_found()),
        }
    }

    /// Returns the metrics in OpenMetrics text format if the client accepts it, and otherwise in
    /// the older text format of Prometheus.
    fn expose_metrics(&self, headers: &HeaderMap) -> Result<Response<Body>, ApiError> {
        let now = self.parts.clock.now();
        let workers = self.parts.router.workers(now);
        let body_bytes = self.parts.bodies.bytes_in_flight() as u64;
        self.parts
            .metrics
            .request_body_bytes
            .set(gauge_value(body_bytes));
        let reservations = self.selection.reservation_count() as u64;
        self.parts
            .metrics
            .reservations
            .set(gauge_value(reservations));
        let state = PresentState {
            workers: &workers,
            output_lengths: self.parts.router.output_length_accuracy(),
            bookings: self.parts.router.booking_count(),
            prefix_tree_nodes: self.parts.router.prefix_tree_nodes(),
            need: &self.parts.placement.demand().need(&workers, now),
        };
        let model = self.parts.workers.registry().catalog().only_model();
        let compat = self.parts.metrics_compat.map(|MetricsCompat::LlmD| {
            let model = model.as_deref();
            CompatNames { model }
        });
        let text = self.parts.metrics.expose(&state, compat);
        let text = text.map_err(|error| ApiError::unavailable(error.to_string()))?;
        let accepts_open_metrics = headers
            .get_all(ACCEPT)
            .iter()
            .filter_map(|accepted| accepted.to_str().ok())
            .any(|accepted| accepted.contains("application/openmetrics-text"));
        Ok(if accepts_open_metrics {
            reply::whole(StatusCode::OK, OPEN_METRICS, text)
        } else {
            reply::whole(StatusCode::OK, PROMETHEUS_TEXT, prometheus_text(&text))
        })
    }

    /// Returns all workers, and the accuracy of the output length model.
    fn list_workers(&self) -> Response<Body> {
        let snapshots = self.parts.router.workers(self.parts.clock.now());
        let workers = snapshots.iter().map(|worker| self.describe(worker));
        let lengths = self.parts.router.output_length_accuracy();
        let list = api::WorkerList {
            workers: workers.collect(),
            output_lengths: api::OutputLengths {
                outputs: lengths.outputs,
                expected_tokens: lengths.expected_tokens,
                bias: lengths.bias,
                mean_error: lengths.mean_abs_relative_error,
            },
        };
        reply::serialized(&list)
    }

    /// Returns the worker with this name. Fails with a 404 if there is none.
    fn show_worker(&self, name: &str) -> Result<Response<Body>, ApiError> {
        let snapshots = self.parts.router.workers(self.parts.clock.now());
        let named = snapshots.iter().find(|worker| *worker.name == *name);
        let worker = named.ok_or_else(|| drain::not_found(name))?;
        Ok(reply::serialized(&self.describe(worker)))
    }

    /// Returns the settings in force.
    fn configuration(&self) -> Response<Body> {
        let settings = self.parts.reloader.in_force(settings_in_force);
        let configuration = foresee_api::dashboard::Configuration { settings };
        reply::serialized(&configuration)
    }

    /// Returns one worker: the router's view, and the fields that only the gateway knows. The
    /// latter are `None` while the worker is being removed, and the cache source is then
    /// `estimated`.
    fn describe(&self, worker: &WorkerSnapshot) -> api::Worker {
        let entry = self.parts.workers.registry().get(worker.id);
        let follows_events = entry
            .as_ref()
            .is_some_and(|entry| entry.events.read().followed);
        let cache_source = if follows_events {
            CacheSource::Events
        } else {
            CacheSource::Estimated
        };
        let removals = &self.parts.removals;
        let time_left = removals.time_left(worker.id, self.parts.clock.now());
        api::Worker {
            name: worker.name.to_string(),
            url: entry.as_ref().map(|entry| entry.config.url()),
            address: entry.as_ref().and_then(|entry| entry.address.resolved_ip()),
            rank: entry.as_ref().and_then(|entry| entry.config.rank),
            state: worker.state.as_str().to_owned(),
            draining: worker.state == WorkerState::Draining,
            drain_deadline_seconds: time_left.map(|time| time.as_secs_f64()),
            health: entry.as_ref().map(|entry| entry.health_status()),
            models: worker.models.to_vec(),
            outlier: describe_outlier(&worker.outlier, self.parts.clock.now()),
            requests: worker.requests,
            queued_requests: worker.queued_requests,
            active_blocks: worker.active_blocks,
            queued_blocks: worker.queued_blocks,
            engine_active_blocks: entry
                .as_ref()
                .and_then(|entry| *entry.reports.active_blocks.lock()),
            context_tokens: worker.context_tokens,
            prefill_tokens: worker.prefill_tokens,
            cached_blocks: worker.cached_blocks,
            cache_source: cache_source.as_str().to_owned(),
            kv_events: entry.and_then(|entry| describe_kv_events(&entry)),
            capacity_blocks: worker.capacity_blocks,
            capacity_source: worker.capacity_source.as_str().to_owned(),
            eviction: worker.eviction.as_str().to_owned(),
            prefill_tokens_per_second: worker.latency.prefill_speed(),
            inter_token_latency_seconds: worker.inter_token_latency.as_secs_f64(),
            forecast: describe_forecast(worker),
        }
    }

    /// Reloads the configuration, and responds with what changed. Fails with a 400 if the configuration
    /// is invalid, and with a 409 if it cannot be applied; then nothing has changed.
    async fn reload(&self) -> Result<Response<Body>, ApiError> {
        let reload = self.parts.reloader.reload().await.map_err(|error| {
            let (status, code) = match error {
                ReloadError::NoSource => (409, "no_configuration"),
                ReloadError::Invalid(_) => (400, "invalid_configuration"),
                ReloadError::Worker(_) => (409, "worker_conflict"),
            };
            refusal(status, code, format!("Nothing was reloaded: {error}."))
        })?;
        Ok(reply::serialized(&reload))
    }

    /// Adds the workers that the body describes. Responds with a 202 before the first health check.
    /// Fails as [`parse_new_worker`] does, and with a 409 if the name is taken or there are too many
    /// workers.
    fn add_worker(&self, body: &[u8]) -> Result<Response<Body>, ApiError> {
        let config = parse_new_worker(body)?;
        let added = self.parts.workers.add(&config);
        self.parts
            .workers
            .start(added.map_err(|error| conflict(&error))?);
        let body = json!({ "name": config.name });
        Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
    }
}

/// Returns a response with a body of known length as one of the admin listener.
fn whole_body(response: Response<Body>) -> Response<AdminBody> {
    response.map(Either::Left)
}

/// Returns whether a request changes workers or settings. Requests of the selection API do not.
fn is_change(head: &request::Parts) -> bool {
    let path = head.uri.path();
    match head.method {
        Method::POST | Method::DELETE => {
            path.starts_with("/admin/workers") || path == "/admin/reload"
        }
        Method::PUT => path == "/admin/log",
        _ => false,
    }
}

/// Returns the error response for a worker that cannot be added to the present workers.
fn conflict(error: &WorkerError) -> ApiError {
    let (code, message) = match error {
        WorkerError::NameTaken(name) => (
            "worker_exists",
            format!(
                "A worker named `{name}` exists already. Give this one another name with `name=`, \
                 or remove that one first."
            ),
        ),
        WorkerError::TooMany(count) => (
            "too_many_workers",
            format!("There are {count} workers already, which is the limit. Remove one first."),
        ),
    };
    ApiError {
        param: Some("url"),
        ..refusal(409, code, message)
    }
}

/// Returns what a worker's past results say about it. Times are seconds from `now`.
fn describe_outlier(outlier: &OutlierSnapshot, now: Duration) -> api::Outlier {
    let seconds_until = |at: Option<Duration>| at.map(|at| at.saturating_sub(now).as_secs_f64());
    api::Outlier {
        ejected: outlier.is_ejected,
        half_open: outlier.is_half_open,
        ejections: outlier.ejections,
        ejected_seconds: seconds_until(outlier.ejected_until),
        next_trial_seconds: seconds_until(outlier.next_trial_at),
        failure_rate: outlier.failure_rate,
        consecutive_failures: outlier.consecutive_failures,
        charge_seconds: outlier.charge_seconds,
        backpressure_seconds: seconds_until(outlier.backpressure_until),
        warming_up: outlier.is_warming_up,
    }
}

/// Returns a worker's latency model, and the accuracy of its forecasts.
fn describe_forecast(worker: &WorkerSnapshot) -> api::Forecast {
    let model = &worker.latency;
    let accuracy = |accuracy: LatencyAccuracy| api::Accuracy {
        samples: accuracy.samples,
        mean_error: accuracy.mean_abs_relative_error,
    };
    api::Forecast {
        backlog_seconds: worker.prefill_backlog.as_secs_f64(),
        prefill: api::PrefillModel {
            base_seconds: model.prefill_base,
            seconds_per_token: model.prefill_per_token,
            seconds_per_attention_pair: model.prefill_per_attention_pair,
            accuracy: accuracy(model.prefill_accuracy),
        },
        decode_step: api::DecodeStepModel {
            base_seconds: model.decode_base,
            seconds_per_request: model.decode_per_request,
            seconds_per_context_token: model.decode_per_context_token,
            accuracy: accuracy(model.decode_accuracy),
        },
        time_to_first_token: accuracy(worker.ttft_accuracy),
    }
}

/// Returns the state of a worker's event stream; `None` without an event source.
fn describe_kv_events(worker: &Worker) -> Option<api::KvEvents> {
    let source = worker.event_source.borrow().clone()?;
    let snapshot = worker.events.read();
    Some(api::KvEvents {
        source: source.to_string(),
        replay: source.replay,
        discovered: worker.config.kv_events == KvEvents::Discovered,
        state: snapshot.state.as_str().to_owned(),
        exact: snapshot.is_complete,
        last_sequence: snapshot.last_sequence,
        lag_seconds: snapshot.lag_seconds,
        batches: snapshot.batches,
        gaps: snapshot.gaps,
        lost: snapshot.lost,
        untrusted: snapshot.untrusted,
        full_report_mode: snapshot.full_report_mode,
    })
}

/// Decodes the percent escapes in a part of a path. Names of workers are often `HOST:PORT`, and many
/// clients write the colon as `%3A`. A `%` without two hexadecimal digits stays as it is.
fn percent_decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}
