//! Responses that the gateway produces itself.

use bytes::Bytes;
use foresee_engine::error::ApiError;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{Either, Full};

use crate::tracked_body::TrackedBody;

/// Body of a response: the gateway's own, or a worker's that is passed on.
pub(crate) type Body = Either<Full<Bytes>, TrackedBody>;

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

/// Returns an error in the form that OpenAI clients expect, with `Retry-After` in whole seconds if
/// the error has it. An invalid status becomes a 502; a `Retry-After` below one second becomes 1.
pub(crate) fn error(error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut response = json(status, error.to_json());
    if let Some(after) = error.retry_after {
        let seconds = after.as_secs().max(1);
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}
