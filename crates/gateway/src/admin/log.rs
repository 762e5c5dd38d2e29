//! The filter of the log: `GET` and `PUT /admin/log`.

use std::sync::Arc;

use foresee_api::admin::LogSettings;
use foresee_engine::error::ApiError;
use http::Response;

use super::access::refusal;
use crate::program::LogFilter;
use crate::reply::{self, Body};

/// Returns the filter in force.
///
/// # Errors
/// Fails with a 409 if the program has no filter that can be read.
pub(super) fn show(filter: Option<&Arc<dyn LogFilter>>) -> Result<Response<Body>, ApiError> {
    let filter = filter.ok_or_else(no_filter)?.current();
    Ok(reply::serialized(&LogSettings { filter }))
}

/// Replaces the filter by that of the body, and returns it. The change is logged.
///
/// # Errors
/// Fails with a 400 if the body or the filter is invalid, and as [`show`] does. The filter then stays.
pub(super) fn replace(
    filter: Option<&Arc<dyn LogFilter>>,
    body: &[u8],
) -> Result<Response<Body>, ApiError> {
    let filter = filter.ok_or_else(no_filter)?;
    let invalid = |message| ApiError::bad_request(message, Some("filter"));
    let new: LogSettings = serde_json::from_slice(body).map_err(|error| {
        invalid(format!(
            "The body must be {{\"filter\": \"info,foresee::completion=debug\"}}: {error}."
        ))
    })?;
    let old = filter.current();
    let replaced = filter.replace(&new.filter);
    replaced.map_err(|error| invalid(format!("The log filter is invalid: {error}.")))?;
    tracing::info!(target: "foresee::audit", old, new = new.filter, "replaced the log filter");
    show(Some(filter))
}

/// Returns the error of a program without a filter.
fn no_filter() -> ApiError {
    let message = "This program has no log filter that can be read or changed.";
    refusal(409, "no_log_filter", message)
}
