//! Health checks: one task per worker sends `GET /health` at an interval, and whenever a request
//! finds the worker failing.
//!
//! Health checks are not requests: they are booked nowhere and never count as load.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, Limited};

use crate::gateway_state::GatewayState;
use crate::log_limit::warn_limited;
use crate::upstream::{UpstreamError, UpstreamRequest};
use crate::worker_info::{discover_event_source, learn_models_and_capacity};
use crate::workers::Worker;

/// Number of successive failed health checks after which a worker is unhealthy, so that one slow
/// response is not an outage. A refused connection makes a worker unhealthy immediately, through the
/// request that meets it.
const UNHEALTHY_THRESHOLD: u32 = 2;

/// Number of successful health checks per request of `/v1/models`, because LoRA adapters are added
/// and removed while an engine runs.
const PROBES_PER_MODEL_REFRESH: u32 = 10;

/// Number of times that a worker is asked for its event source after it became reachable, until it
/// responds in time. The worker may be another process than before.
const MAX_EARLY_INFO_REQUESTS: u32 = 3;

/// Minimum time between two health checks, however many requests ask for one, so that successive
/// failures are not one short moment.
const MIN_PROBE_GAP: Duration = Duration::from_millis(10);

/// Maximum size of a response, in bytes.
const MAX_PROBE_BYTES: usize = 4 << 20;

/// Checks a worker's health until the worker is removed, and keeps its models, capacity and event
/// source up to date.
///
/// One successful check makes the worker healthy in the router, and [`UNHEALTHY_THRESHOLD`]
/// failures in a row make it unhealthy. A check without a response is ignored if data arrived from
/// the worker meanwhile. When a worker responds after a refused connection, its cache state is
/// cleared.
pub(crate) async fn watch_worker(shared: Arc<GatewayState>, worker: Arc<Worker>) {
    let mut failures = 0;
    let mut successes = 0;
    let mut info_requests_left = MAX_EARLY_INFO_REQUESTS;
    let mut first_model = None;
    loop {
        tokio::time::sleep(MIN_PROBE_GAP).await;
        let sent_at = shared.clock.now();
        let name = &worker.config.name;
        match get(&shared, &worker, "/health").await {
            Ok(_) => {
                let has_returned = worker.note_reachable();
                if has_returned {
                    tracing::info!(
                        worker = %name,
                        "worker is reachable again after refusing connections; assuming that it \
                         restarted and clearing its cache state"
                    );
                    shared.router.clear_cache(worker.id);
                    info_requests_left = MAX_EARLY_INFO_REQUESTS;
                }
                let mut model_changed = false;
                if has_returned || successes % PROBES_PER_MODEL_REFRESH == 0 {
                    learn_models_and_capacity(&shared, &worker).await;
                    if let Some(model) = worker.known_first_model() {
                        model_changed = first_model.as_ref().is_some_and(|known| *known != model);
                        first_model = Some(model);
                    }
                }
                // After an outage, connections may be dead although neither end has noticed.
                if has_returned || model_changed || failures >= UNHEALTHY_THRESHOLD {
                    worker.resubscribe.notify_one();
                }
                if info_requests_left > 0 {
                    let is_final = discover_event_source(&shared, &worker).await;
                    info_requests_left = if is_final { 0 } else { info_requests_left - 1 };
                }
                shared.router.set_healthy(worker.id, true);
                if successes == 0 {
                    tracing::info!(worker = %name, "worker is healthy");
                }
                (failures, successes) = (0, successes + 1);
            }
            // The worker is too busy for a health check, but not for requests.
            Err(ProbeError::NoResponse(error)) if worker.last_activity() > sent_at => {
                tracing::debug!(
                    worker = %name, error,
                    "ignoring a failed health check, because responses arrive from the worker"
                );
            }
            Err(error) => {
                if matches!(error, ProbeError::ConnectionRefused(_)) {
                    worker.mark_gone();
                }
                let label = [("worker", name.clone())];
                shared.metrics.probe_failures.get_or_create(&label).inc();
                (failures, successes) = (failures + 1, 0);
                info_requests_left = MAX_EARLY_INFO_REQUESTS;
                if failures == UNHEALTHY_THRESHOLD {
                    warn_limited!(
                        key: name, worker = %name, url = %worker.config.url(),
                        status = error.status(), %error,
                        next_check_in = ?shared.config.probe_interval,
                        "worker marked unhealthy after {failures} failed health checks"
                    );
                } else {
                    tracing::debug!(worker = %name, failures, %error, "health check failed");
                }
                if failures >= UNHEALTHY_THRESHOLD {
                    shared.router.set_healthy(worker.id, false);
                }
            }
        }
        tokio::select! {
            () = worker.until_removed() => return,
            () = worker.probe_now.notified() => {}
            () = tokio::time::sleep(shared.config.probe_interval) => {}
        }
    }
}

/// Why a worker did not respond to a GET of the gateway with success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProbeError {
    /// No response arrived in time, or no connection could be opened for a reason other than a
    /// refusal.
    #[error("{0}")]
    NoResponse(String),
    /// No process listens at the worker's address.
    #[error("{0}")]
    ConnectionRefused(String),
    /// The response has a status other than 2xx.
    #[error("HTTP status {0}")]
    Status(StatusCode),
    /// The connection was lost, or the body is too large or unreadable.
    #[error("{0}")]
    Failed(String),
}

impl ProbeError {
    /// Returns the response's status code, if that is the error.
    fn status(&self) -> Option<u16> {
        match self {
            Self::Status(status) => Some(status.as_u16()),
            _ => None,
        }
    }
}

/// Sends `GET path` to a worker and returns the body of a 2xx response. The request has no headers
/// of a client, and so no API key. The time limit, for the body too, is the connect timeout, at
/// least 100 ms. A body over [`MAX_PROBE_BYTES`] is an error.
pub(crate) async fn get(
    shared: &GatewayState,
    worker: &Worker,
    path: &'static str,
) -> Result<Bytes, ProbeError> {
    let request = UpstreamRequest {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        is_repeatable: true,
        full_report_mode: false,
    };
    let exchange = async {
        let sent = shared.probe_client.send(worker, &request).await;
        let response = sent.map_err(|error| {
            let text = error.to_string();
            match error {
                UpstreamError::Unreachable(_) | UpstreamError::LocalExhaustion(_) => {
                    ProbeError::NoResponse(text)
                }
                UpstreamError::ConnectionRefused(_) => ProbeError::ConnectionRefused(text),
                _ => ProbeError::Failed(text),
            }
        })?;
        if !response.status().is_success() {
            return Err(ProbeError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_PROBE_BYTES).collect();
        let body = body
            .await
            .map_err(|error| ProbeError::Failed(format!("cannot read the body: {error}")))?;
        Ok(body.to_bytes())
    };
    let time_limit = shared
        .config
        .connect_timeout
        .max(Duration::from_millis(100));
    match tokio::time::timeout(time_limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(ProbeError::NoResponse(format!(
            "no response within {time_limit:?}"
        ))),
    }
}
