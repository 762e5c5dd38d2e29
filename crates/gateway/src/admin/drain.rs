//! Responses to requests that drain and remove workers.

use std::sync::Arc;
use std::time::Duration;

use foresee_core::workers::WorkerState;
use foresee_engine::error::ApiError;
use http::{Response, StatusCode};
use serde_json::json;

use super::access::{quoted, refusal};
use crate::reply::{self, Body};
use crate::workers::removals::{DEFAULT_DRAIN_TIMEOUT, Removals};

/// Maximum time that a client can set.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Drains the workers named `name`, and removes each of them once it has no requests or `timeout` has
/// passed. Responds immediately with a 202, or with a 404 if no worker has the name.
pub(super) fn remove_when_drained(
    removals: &Arc<Removals>,
    name: &str,
    timeout: Duration,
) -> Result<Response<Body>, ApiError> {
    if !removals.remove_when_drained(name, timeout) {
        return Err(not_found(name));
    }
    let body = json!({
        "name": name,
        "state": WorkerState::Draining.as_str(),
        "drain_deadline_seconds": timeout.as_secs_f64(),
    });
    Ok(reply::json(StatusCode::ACCEPTED, body.to_string()))
}

/// Drains the workers named `name`, or ends that if `draining` is false, and cancels their pending
/// removals. Responds with a 200 and the state of the first of them, or with a 404 if no worker has
/// the name.
pub(super) fn set_draining(
    removals: &Removals,
    name: &str,
    draining: bool,
) -> Result<Response<Body>, ApiError> {
    let state = removals.set_draining(name, draining);
    let state = state.ok_or_else(|| not_found(name))?;
    let body = json!({ "name": name, "state": state.as_str() });
    Ok(reply::json(StatusCode::OK, body.to_string()))
}

/// Returns the error for a name that no worker has.
pub(super) fn not_found(name: &str) -> ApiError {
    let message = format!(
        "No worker is named `{}`. `GET /admin/workers` lists the names of all workers.",
        quoted(name)
    );
    refusal(404, "worker_not_found", message)
}

/// Returns the `timeout` of a request's query, [`DEFAULT_DRAIN_TIMEOUT`] without one.
///
/// # Errors
/// Fails with a 400 if the query has another parameter, or the timeout is not a duration of at most
/// 24 hours.
pub(super) fn timeout_of(query: Option<&str>) -> Result<Duration, ApiError> {
    let mut timeout = DEFAULT_DRAIN_TIMEOUT;
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
