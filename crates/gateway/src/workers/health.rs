//! Health checks: one task per worker sends a request at an interval, and whenever a request of a
//! client finds the worker failing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use foresee_core::router::Router;
use http::StatusCode;
use http::uri::PathAndQuery;
use tokio::time::{sleep, timeout};

use crate::clock::Clock;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use crate::worker_info::WorkerInfoReader;
use crate::workers::health_config::{HealthConfig, HealthPath};
use crate::workers::health_state::{CheckSchedule, HealthState};
use crate::workers::query::{QueryError, WorkerQueries};
use crate::workers::worker::Worker;

/// Number of successful health checks per request of `/v1/models`, because LoRA adapters are added
/// and removed while an engine runs.
const CHECKS_PER_MODEL_REFRESH: u32 = 10;

/// Number of times that a worker is asked for its event source after it became reachable, until it
/// responds in time. The worker may be another process than before.
const MAX_EARLY_INFO_REQUESTS: u32 = 3;

/// Minimum time between two health checks, however many requests ask for one, so that successive
/// failures are not one short moment.
const MIN_CHECK_GAP: Duration = Duration::from_millis(10);

/// Maximum time by which queries of capacity and event source delay a worker that becomes healthy.
/// Requests are then routed with an assumed capacity until the queries end.
const MAX_INFO_DELAY: Duration = Duration::from_millis(500);

/// Health checks of all workers.
#[derive(Debug)]
pub(crate) struct HealthChecks {
    pub(crate) router: Router,
    pub(crate) queries: WorkerQueries,
    pub(crate) info: WorkerInfoReader,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    pub(crate) config: HealthConfig,
    /// Time between two health checks of a worker.
    pub(crate) interval: Duration,
}

impl HealthChecks {
    /// Checks a worker's health until the worker is removed, and keeps its models, capacity and event
    /// source up to date. Waits for the first look-up of its host name before.
    pub(crate) async fn watch(self: Arc<Self>, worker: Arc<Worker>) {
        let watching = async {
            worker.address.until_looked_up().await;
            HealthWatch::new(&self, &worker).run().await;
        };
        tokio::select! {
            () = worker.until_removed() => {}
            () = watching => {}
        }
    }
}

/// How a health check succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Success {
    /// The worker responded with this status.
    Responded(StatusCode),
    /// The worker accepted a connection.
    Connected,
    /// Nothing was sent: the worker has no health check and no request has failed.
    NotChecked,
}

/// Health checks of one worker.
struct HealthWatch<'w> {
    checks: &'w HealthChecks,
    worker: &'w Arc<Worker>,
    /// Path of the checks; `None` for a worker without a health check.
    path: Option<PathAndQuery>,
    state: HealthState,
    schedule: CheckSchedule,
    /// Successful checks in a row, for [`CHECKS_PER_MODEL_REFRESH`].
    successes: u32,
    info_requests_left: u32,
    /// First model that the worker listed last.
    first_model: Option<String>,
}

impl<'w> HealthWatch<'w> {
    /// Prepares the checks of a worker.
    fn new(checks: &'w HealthChecks, worker: &'w Arc<Worker>) -> Self {
        let config = &checks.config;
        let path = worker.config.health_path.as_ref().unwrap_or(&config.path);
        Self {
            checks,
            worker,
            path: match path {
                HealthPath::Path(path) => Some(path.clone()),
                HealthPath::None => None,
            },
            state: HealthState::new(config),
            schedule: CheckSchedule::new(checks.interval),
            successes: 0,
            info_requests_left: MAX_EARLY_INFO_REQUESTS,
            first_model: None,
        }
    }

    /// Checks the worker in intervals and on demand. Never returns.
    async fn run(mut self) {
        let mut is_requested = false;
        loop {
            sleep(MIN_CHECK_GAP).await;
            let sent_at = self.checks.clock.now();
            let result = self.check(is_requested).await;
            let was_refused = matches!(result, Err(QueryError::ConnectionRefused(_)));
            let delay = self.schedule.next_delay(was_refused);
            match result {
                Ok(success) => self.on_success(success).await,
                Err(error) if is_busy(&error, self.worker, sent_at) => {
                    tracing::debug!(
                        worker = %self.worker.config.name, %error,
                        "ignoring a failed health check, because responses arrive from the worker"
                    );
                }
                Err(error) => self.on_failure(error, delay).await,
            }
            self.worker.health.set_next_check(Instant::now() + delay);
            is_requested = tokio::select! {
                () = self.worker.probe_now.notified() => true,
                () = sleep(delay) => false,
            };
        }
    }

    /// Checks the worker once. A worker without a health check is only connected to, and only while
    /// it is unhealthy or after a request failed (`is_requested`).
    async fn check(&self, is_requested: bool) -> Result<Success, QueryError> {
        let (checks, worker) = (self.checks, self.worker);
        if let Some(path) = &self.path {
            let method = checks.config.method.as_http();
            let (status, _) = checks.queries.query(worker, method, path.clone()).await?;
            return Ok(Success::Responded(status));
        }
        let has_failed = self.state.failures() > 0 || worker.liveness.is_gone();
        if has_failed || is_requested || worker.address.unresolved_error().is_some() {
            checks.queries.connect(worker).await?;
            return Ok(Success::Connected);
        }
        Ok(Success::NotChecked)
    }

    /// Makes the worker healthy in the router if enough checks succeeded, and refreshes what is known
    /// about it. If it had refused a connection, its cache state is cleared.
    ///
    /// Its models are known before the worker becomes healthy, or it has not listed them in time.
    /// Other queries delay that by at most [`MAX_INFO_DELAY`].
    async fn on_success(&mut self, success: Success) {
        let (checks, worker) = (self.checks, self.worker);
        let name = &worker.config.name;
        let has_returned = success != Success::NotChecked && worker.liveness.note_reachable();
        if has_returned {
            tracing::info!(
                worker = %name,
                "worker is reachable again after refusing connections; assuming that it restarted \
                 and clearing its cache state"
            );
            checks.router.clear_cache(worker.id);
            checks.router.reset_outlier(worker.id, checks.clock.now());
            self.info_requests_left = MAX_EARLY_INFO_REQUESTS;
        }
        match success {
            Success::Responded(status) => worker
                .health
                .on_success(Instant::now(), Some(status.as_u16())),
            Success::Connected => worker.health.on_success(Instant::now(), None),
            Success::NotChecked => {}
        }
        let had_outage = self.state.failures() > 0 && !self.state.is_healthy();
        let was_healthy = self.state.is_healthy() && !has_returned;
        let is_healthy = self.state.on_success(has_returned);

        let is_refresh_due =
            has_returned || self.successes.is_multiple_of(CHECKS_PER_MODEL_REFRESH);
        let mut has_other_model = false;
        if is_refresh_due {
            reload_key(worker).await;
            checks.info.learn_models(worker).await;
            if let Some(model) = worker.models.known_first() {
                has_other_model = self
                    .first_model
                    .as_ref()
                    .is_some_and(|known| *known != model);
                self.first_model = Some(model);
            }
        }
        // After an outage, connections may be dead although neither end has noticed.
        if has_returned || has_other_model || had_outage {
            worker.resubscribe.notify_one();
        }
        let asks_for_events = self.info_requests_left > 0;
        let info = async {
            if is_refresh_due {
                checks.info.learn_capacity(worker).await;
            }
            asks_for_events && checks.info.discover_event_source(worker).await
        };
        tokio::pin!(info);
        let mut is_final = None;
        if is_healthy && !was_healthy {
            is_final = timeout(MAX_INFO_DELAY, &mut info).await.ok();
        }
        if is_healthy {
            checks.router.set_healthy(worker.id, true);
            if !was_healthy {
                tracing::info!(worker = %name, "worker is healthy");
            }
        }
        let is_final = match is_final {
            Some(is_final) => is_final,
            None => info.await,
        };
        if asks_for_events {
            self.info_requests_left = if is_final {
                0
            } else {
                self.info_requests_left - 1
            };
        }
        self.successes = self.successes.wrapping_add(1);
    }

    /// Makes the worker unhealthy in the router if enough checks failed, and counts the failure. A
    /// refused connection also means that its cache is gone. `delay` is the time until the next
    /// check, for the log.
    async fn on_failure(&mut self, error: QueryError, delay: Duration) {
        let (checks, worker) = (self.checks, self.worker);
        let name = &worker.config.name;
        if matches!(error, QueryError::ConnectionRefused(_)) {
            worker.liveness.mark_gone();
        }
        let label = [("worker", name.clone())];
        checks.metrics.probe_failures.get_or_create(&label).inc();
        self.successes = 0;
        self.info_requests_left = MAX_EARLY_INFO_REQUESTS;
        let reaches_threshold = self.state.on_failure();
        let failures = self.state.failures();
        let status = error.status();
        worker.health.on_failure(
            Instant::now(),
            failures,
            status.map(|status| status.as_u16()),
            &error.to_string(),
        );
        if reaches_threshold {
            warn_limited!(
                key: name, worker = %name, url = %worker.config.url(),
                status = status.map(|status| status.as_u16()), %error, next_check_in = ?delay,
                "worker marked unhealthy after {failures} failed health checks"
            );
        } else {
            tracing::debug!(worker = %name, failures, %error, "health check failed");
        }
        if !self.state.is_healthy() {
            checks.router.set_healthy(worker.id, false);
        }
        if matches!(
            status,
            Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
        ) {
            reload_key(worker).await;
        }
    }
}

/// Returns whether a check failed because the worker is too busy for it, but not for requests: data
/// arrived from the worker after the check was sent at `sent_at`.
fn is_busy(error: &QueryError, worker: &Worker, sent_at: Duration) -> bool {
    matches!(error, QueryError::NoResponse(_)) && worker.liveness.last_activity() > sent_at
}

/// Reads the worker's API key again if it comes from a file.
async fn reload_key(worker: &Arc<Worker>) {
    if worker.key.is_from_file() {
        let worker = Arc::clone(worker);
        let reload = move || worker.key.reload(&worker.config.name);
        // The error says that the runtime is shutting down.
        let _ = tokio::task::spawn_blocking(reload).await;
    }
}
