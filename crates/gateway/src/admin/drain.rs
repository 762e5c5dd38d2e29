//! Drains workers, and removes them once they have no requests or their deadline has passed.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use foresee_core::router::Router;
use foresee_core::workers::{WorkerId, WorkerState};
use foresee_engine::error::ApiError;
use http::{Response, StatusCode};
use parking_lot::Mutex;
use serde_json::json;

use super::access::{quoted, refusal};
use crate::clock::Clock;
use crate::reply::{self, Body};
use crate::workers::Workers;
use crate::workers::worker::Worker;

/// Time after which a draining worker is removed although it has requests, unless the client sets
/// another one. Long enough for all but the longest outputs.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// Maximum time that a client can set.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Time between two checks of the workers that are to be removed.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Drains workers, and removes those whose removal is pending: a worker stays until it has no requests
/// or its deadline has passed.
#[derive(Debug)]
pub(super) struct Drains {
    workers: Arc<Workers>,
    router: Router,
    clock: Clock,
    removals: Mutex<RemovalState>,
}

/// Pending removals, and whether a task carries them out.
#[derive(Debug, Default)]
struct RemovalState {
    /// Deadline of each removal, by the gateway's clock. Contains only workers of the gateway, so
    /// their number is bounded.
    deadlines: HashMap<WorkerId, Duration>,
    /// Whether a task checks the workers. It ends when there are no pending removals.
    is_watched: bool,
}

impl Drains {
    /// Creates the drains of a gateway that removes no worker yet.
    pub(super) fn new(workers: Arc<Workers>, router: Router, clock: Clock) -> Self {
        Self {
            workers,
            router,
            clock,
            removals: Mutex::default(),
        }
    }

    /// Returns the time from `now` until a worker is removed even with requests; `None` if no
    /// removal of the worker is pending.
    pub(super) fn time_left(&self, id: WorkerId, now: Duration) -> Option<Duration> {
        let deadline = *self.removals.lock().deadlines.get(&id)?;
        Some(deadline.saturating_sub(now))
    }

    /// Drains the workers named `name`, and removes each of them once it has no requests or
    /// `timeout` has passed. Replaces the deadline of a pending removal. Responds immediately with
    /// a 202, or with a 404 if no worker has the name.
    pub(super) fn remove_when_drained(
        self: &Arc<Self>,
        name: &str,
        timeout: Duration,
    ) -> Result<Response<Body>, ApiError> {
        let mut removals = self.removals.lock();
        let workers = self.workers_named(name)?;
        let deadline = self.clock.now().saturating_add(timeout);
        for worker in workers {
            self.router.set_draining(worker.id, true);
            removals.deadlines.insert(worker.id, deadline);
            tracing::info!(
                worker = %worker.config.name, ?timeout,
                "draining the worker; it is removed when it has no requests"
            );
        }
        if !removals.is_watched {
            removals.is_watched = true;
            tokio::spawn(watch_removals(Arc::downgrade(self)));
        }
        let body = json!({
            "name": name,
            "state": WorkerState::Draining.as_str(),
            "drain_deadline_seconds": timeout.as_secs_f64(),
        });
        Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
    }

    /// Drains the workers named `name`, or ends that if `draining` is false, and cancels their
    /// pending removals. Responds with a 200 and the state of the first of them, or with a 404 if
    /// no worker has the name.
    pub(super) fn set_draining(
        &self,
        name: &str,
        draining: bool,
    ) -> Result<Response<Body>, ApiError> {
        // Held throughout, so that none of the workers is removed in between.
        let mut removals = self.removals.lock();
        let workers = self.workers_named(name)?;
        for worker in &workers {
            self.router.set_draining(worker.id, draining);
            let was_pending = removals.deadlines.remove(&worker.id).is_some();
            tracing::info!(
                worker = %worker.config.name, draining, removal_cancelled = was_pending,
                "set whether the worker is draining"
            );
        }
        let first = workers.first().map(|worker| worker.id);
        let snapshots = self.router.workers(self.clock.now());
        let state = snapshots
            .iter()
            .find(|snapshot| Some(snapshot.id) == first)
            .map(|snapshot| snapshot.state.as_str());
        let body = json!({ "name": name, "state": state });
        Ok(reply::json(StatusCode::OK, body.to_string()))
    }

    /// Returns the workers that `name` stands for: the worker of this name, or all ranks of the
    /// engine of this name. Fails with a 404 if there are none.
    fn workers_named(&self, name: &str) -> Result<Vec<Arc<Worker>>, ApiError> {
        let mut workers = self.workers.registry().all();
        workers.retain(|worker| worker.config.name == name || worker.config.engine_name() == name);
        if workers.is_empty() {
            let message = format!(
                "No worker is named `{}`. `GET /admin/workers` lists the names of all workers.",
                quoted(name)
            );
            return Err(refusal(404, "worker_not_found", message));
        }
        Ok(workers)
    }

    /// Carries out the removals that are due. Returns whether others are pending; if not, the task
    /// that calls this has to end.
    fn remove_drained_workers(&self) -> bool {
        let mut removals = self.removals.lock();
        let now = self.clock.now();
        let snapshots = self.router.workers(now);
        removals.deadlines.retain(|id, deadline| {
            // A worker that is unknown was removed by other means.
            let worker = snapshots.iter().find(|worker| worker.id == *id);
            let requests = worker.map_or(0, |worker| worker.requests);
            if requests > 0 && now < *deadline {
                return true;
            }
            let name = worker.map_or("", |worker| &worker.name);
            if requests > 0 {
                tracing::warn!(
                    worker = %name, requests,
                    "drain deadline passed; removing the worker while its requests still run"
                );
            } else {
                tracing::info!(worker = %name, "removing the drained worker");
            }
            self.workers.remove(*id);
            false
        });
        removals.is_watched = !removals.deadlines.is_empty();
        removals.is_watched
    }
}

/// Removes drained workers until no removal is pending or the gateway has ended.
async fn watch_removals(drains: Weak<Drains>) {
    while drains
        .upgrade()
        .is_some_and(|drains| drains.remove_drained_workers())
    {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Returns the `timeout` of a request's query, [`DEFAULT_TIMEOUT`] without one.
///
/// # Errors
/// Fails with a 400 if the query has another parameter, or the timeout is not a duration of at most
/// 24 hours.
pub(super) fn timeout_of(query: Option<&str>) -> Result<Duration, ApiError> {
    let mut timeout = DEFAULT_TIMEOUT;
    for parameter in query
        .unwrap_or("")
        .split('&')
        .filter(|text| !text.is_empty())
    {
        let Some(text) = parameter.strip_prefix("timeout=") else {
            let message = "The only parameter is `timeout`, a duration such as `timeout=30s`.";
            return Err(ApiError::bad_request(message, None));
        };
        timeout = humantime::parse_duration(text)
            .ok()
            .filter(|timeout| *timeout <= MAX_TIMEOUT)
            .ok_or_else(|| {
                let message = "`timeout` must be a duration with a unit of at most 24h, such as \
                               `30s`; `0s` removes the worker at once.";
                ApiError::bad_request(message, Some("timeout"))
            })?;
    }
    Ok(timeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_has_a_unit_and_a_limit() {
        let seconds = |query| timeout_of(query).map(|timeout| timeout.as_secs());
        assert_eq!(seconds(None), Ok(600));
        assert_eq!(seconds(Some("")), Ok(600));
        assert_eq!(seconds(Some("timeout=0s")), Ok(0));
        assert_eq!(seconds(Some("timeout=2m")), Ok(120));
        assert_eq!(seconds(Some("timeout=24h")), Ok(86_400));
        for query in ["timeout=", "timeout=30", "timeout=-1s", "timeout=25h"] {
            let error = timeout_of(Some(query)).unwrap_err();
            assert_eq!(
                (error.status, error.param),
                (400, Some("timeout")),
                "{query}"
            );
        }
        assert_eq!(timeout_of(Some("timeot=30s")).unwrap_err().status, 400);
    }
}
