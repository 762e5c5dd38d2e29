//! HTTP responses: content types, bodies and errors.

use std::io;

use bytes::Bytes;
use foresee_engine::error::ApiError;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

use crate::engine_loop::Stopped;

/// Body of a response: whole, or a stream of frames.
pub(crate) type ResponseBody = UnsyncBoxBody<Bytes, io::Error>;

/// Content type of bodies in JSON.
pub(crate) const JSON: &str = "application/json";
/// Content type of an empty body.
pub(crate) const TEXT: &str = "text/plain; charset=utf-8";
/// Content type of metrics.
pub(crate) const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Content type of event streams.
pub(crate) const EVENTS: &str = "text/event-stream; charset=utf-8";

/// Returns a response with status 200.
pub(crate) fn reply(content_type: &'static str, body: Vec<u8>) -> Response<ResponseBody> {
    let body = Full::from(body).map_err(|never| match never {});
    reply_with(content_type, body.boxed_unsync())
}

/// Returns a response with status 200, whose body may be a stream.
pub(crate) fn reply_with(content_type: &'static str, body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// Returns the response with an error's status and body.
pub(crate) fn error_reply(error: &ApiError) -> Response<ResponseBody> {
    let mut response = reply(JSON, error.to_json());
    *response.status_mut() =
        StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

/// Returns the error for requests that arrive while the engine shuts down.
pub(crate) fn stopping(_: Stopped) -> ApiError {
    ApiError::unavailable("The engine is shutting down.")
}
