//! Responses that the gateway produces itself.

use bytes::Bytes;
use foresee_engine::error::ApiError;
use foresee_engine::request::Endpoint;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{Either, Full};
use serde::Serialize;

use crate::model_renaming::RenamedBody;

/// Body of a response: the gateway's own, or a worker's that is passed on.
pub(crate) type Body = Either<Full<Bytes>, RenamedBody>;

/// Returns a response with a body of known length.
pub(crate) fn whole(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Returns a response with a JSON body.
pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    whole(status, "application/json", body)
}

/// Returns a 200 with a value as JSON.
pub(crate) fn serialized(value: &impl Serialize) -> Response<Body> {
    json(StatusCode::OK, to_json(value))
}

/// Returns a value as JSON.
pub(crate) fn to_json(value: &impl Serialize) -> String {
    // Serialisation fails only for maps with keys other than strings.
    serde_json::to_string(value).unwrap_or_default()
}

/// Returns an error in the form that clients of `endpoint` expect. With a time to retry, it has
/// `Retry-After` in whole seconds, rounded up and at least 1, and `retry-after-ms`; with advice for
/// clients' libraries, `x-should-retry`. An invalid status becomes a 502.
pub(crate) fn error(endpoint: Endpoint, error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut response = json(status, error.to_json_for(endpoint));
    let headers = response.headers_mut();
    if let Some(after) = error.retry_after {
        let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        let milliseconds = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        headers.insert("retry-after-ms", HeaderValue::from(milliseconds));
    }
    if let Some(should_retry) = error.should_retry {
        let advice = if should_retry { "true" } else { "false" };
        headers.insert("x-should-retry", HeaderValue::from_static(advice));
    }
    response
}
