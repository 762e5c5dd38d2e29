//! Error responses in the form that each API's clients expect: a status and a JSON body.
//!
//! A 429 means that workers serve the model and are busy; a 503 means that none can serve it. Only a
//! refusal that ends when time passes has a `Retry-After`.

use std::time::Duration;

use serde_json::json;

use crate::body_error::BodyError;
use crate::endpoint::{Endpoint, ErrorShape};

/// Maximum number of models that [`ApiError::model_not_found`] lists.
const MAX_LISTED_MODELS: usize = 20;
/// Maximum length of a model's name in an error, in characters.
const MAX_NAME_CHARS: usize = 200;

/// An error response that the router produces itself, as opposed to one of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// Description for a person: what is wrong and what to do.
    pub message: String,
    /// The `type` field: the class of error, such as `invalid_request_error`.
    pub kind: &'static str,
    /// The request field that caused the error.
    pub param: Option<&'static str>,
    /// Identifier for programs, such as `model_not_found`.
    pub code: Option<&'static str>,
    /// Time after which the client may retry, for the `Retry-After` header.
    pub retry_after: Option<Duration>,
    /// Whether the client's library shall retry, for the `x-should-retry` header that OpenAI's and
    /// Anthropic's libraries obey. `None` leaves it to their rule for the status.
    pub should_retry: Option<bool>,
}

impl ApiError {
    /// Returns a 400: the body or one of its fields (`param`) cannot be used.
    #[must_use]
    pub fn bad_request(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self {
            param,
            ..Self::new(400, INVALID_REQUEST, None, message)
        }
    }

    /// Returns a 401: the API key is missing or wrong.
    #[must_use]
    pub fn unauthorized(message: impl Into<String>) -> Self {
        let kind = "authentication_error";
        Self::new(401, kind, Some("invalid_api_key"), message)
    }

    /// Returns a 403: the key does not open what the request calls.
    #[must_use]
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, "permission_error", Some("key_not_allowed"), message)
    }

    /// Returns a 403: the key does not open the model.
    #[must_use]
    pub fn model_not_allowed(model: &str) -> Self {
        let message = format!("The key does not open the model `{}`.", shortened(model));
        Self {
            param: Some("model"),
            ..Self::new(403, "permission_error", Some("model_not_allowed"), message)
        }
    }

    /// Returns a 404: no worker serves the model. The message lists the models that are `served`, at
    /// most 20 of them.
    #[must_use]
    pub fn model_not_found(model: &str, served: &[String]) -> Self {
        let mut message = format!("The model `{}` does not exist.", shortened(model));
        if !served.is_empty() {
            let listed = served.iter().take(MAX_LISTED_MODELS);
            let listed: Vec<String> = listed
                .map(|name| format!("`{}`", shortened(name)))
                .collect();
            message.push_str(&format!(" Models that are served: {}", listed.join(", ")));
            match served.len().saturating_sub(MAX_LISTED_MODELS) {
                0 => message.push('.'),
                more => message.push_str(&format!(" and {more} more.")),
            }
        }
        Self {
            param: Some("model"),
            ..Self::new(404, "not_found_error", Some("model_not_found"), message)
        }
    }

    /// Returns a 404: the path does not exist.
    #[must_use]
    pub fn path_not_found(method: &str, path: &str) -> Self {
        let message = format!("Not found: {method} {path}");
        Self::new(404, "not_found_error", Some("unknown_url"), message)
    }

    /// Returns a 405: the path is called with another method, which is `allowed`.
    #[must_use]
    pub fn method_not_allowed(method: &str, path: &str, allowed: &str) -> Self {
        let message = format!("{method} is not allowed for {path}: use {allowed}.");
        Self::new(405, INVALID_REQUEST, Some("method_not_allowed"), message)
    }

    /// Returns a 408: the client did not send the whole request in time.
    #[must_use]
    pub fn request_timeout(message: impl Into<String>) -> Self {
        Self::new(408, INVALID_REQUEST, Some("request_timeout"), message)
    }

    /// Returns a 413: the body is longer than `limit` bytes.
    #[must_use]
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than {limit} bytes.");
        Self::new(413, INVALID_REQUEST, Some("request_too_large"), message)
    }

    /// Returns a 415: the body is compressed with a coding that the router cannot read.
    #[must_use]
    pub fn unsupported_content_coding(coding: &str) -> Self {
        let message = format!(
            "The content coding `{}` is not supported: use gzip, deflate, zstd or br, or none.",
            shortened(coding)
        );
        Self::new(
            415,
            INVALID_REQUEST,
            Some("unsupported_content_coding"),
            message,
        )
    }

    /// Returns a 429: the router accepts no further request now. The client may retry after
    /// `retry_after`.
    #[must_use]
    pub fn overloaded(message: impl Into<String>, retry_after: Duration) -> Self {
        Self::rate_limited(message, Some(retry_after))
    }

    /// Returns a 429: a limit of the request's key is reached. `retry_after` is the time after which
    /// it is not, if that is known.
    #[must_use]
    pub fn rate_limited(message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        let code = Some("rate_limit_exceeded");
        Self {
            retry_after,
            ..Self::new(429, "rate_limit_error", code, message)
        }
    }

    /// Returns a 429: workers serve the model, and none has room for the request. `retry_after` is
    /// the time after which there is room, if it is known.
    #[must_use]
    pub fn capacity_exceeded(message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        Self {
            retry_after,
            ..Self::new(429, OVERLOADED, Some("capacity_exceeded"), message)
        }
    }

    /// Returns a 429: the first byte of the response would come after the deadline that the client has
    /// set. `retry_after` is by how much.
    #[must_use]
    pub fn deadline_unreachable(message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        Self {
            retry_after,
            ..Self::new(429, OVERLOADED, Some("deadline_unreachable"), message)
        }
    }

    /// Returns a 429: workers serve the model, and the request waited in the queue as long as it
    /// may. There is no time to retry after, because the wait says nothing about the next one.
    #[must_use]
    pub fn queue_timeout(message: impl Into<String>) -> Self {
        Self::new(429, OVERLOADED, Some("queue_timeout"), message)
    }

    /// Returns a 501: the client requests another protocol, such as WebSocket, on the connection.
    #[must_use]
    pub fn upgrade_not_supported(message: impl Into<String>) -> Self {
        Self {
            // No retry changes it, although clients' libraries retry a 5xx.
            should_retry: Some(false),
            ..Self::new(501, INVALID_REQUEST, Some("upgrade_not_supported"), message)
        }
    }

    /// Returns a 502: the worker failed, or its response cannot be parsed.
    #[must_use]
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(502, "server_error", Some("worker_failed"), message)
    }

    /// Returns a 503: no worker is available.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "server_error", Some("no_worker_available"), message)
    }

    /// Returns a 503: no worker that serves the model can take requests. `retry_after` is the time
    /// after which one is expected to, if there is such an expectation.
    #[must_use]
    pub fn no_worker(message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        Self {
            retry_after,
            ..Self::new(503, "server_error", Some("no_worker"), message)
        }
    }

    /// Returns a 504: the worker did not respond in time.
    #[must_use]
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(504, "server_error", Some("worker_timed_out"), message)
    }

    /// Creates an error without `param` and without a time to retry. `kind` is its `type` field.
    fn new(
        status: u16,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            message: message.into(),
            kind,
            param: None,
            code,
            retry_after: None,
            should_retry: None,
        }
    }

    /// Returns the body of the response in OpenAI's form, which also the admin API uses.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        json!({"error": self.openai_fields()})
            .to_string()
            .into_bytes()
    }

    /// Returns the body of the response in the form that clients of this API expect.
    #[must_use]
    pub fn to_json_for(&self, endpoint: Endpoint) -> Vec<u8> {
        match endpoint.error_shape() {
            ErrorShape::OpenAi | ErrorShape::Responses => self.to_json(),
            ErrorShape::Anthropic => self.anthropic_body().to_string().into_bytes(),
        }
    }

    /// Returns the bytes that end a broken stream of this API: the error as an event, and `[DONE]` if
    /// the API's streams end with it. If the stream broke inside an event
    /// (`StreamObserver::is_mid_event`), send a blank line first.
    #[must_use]
    pub fn to_stream_event(&self, endpoint: Endpoint) -> Vec<u8> {
        let event = match endpoint.error_shape() {
            ErrorShape::OpenAi => {
                format!(
                    "data: {}\n\ndata: [DONE]\n\n",
                    json!({"error": self.openai_fields()})
                )
            }
            ErrorShape::Responses => {
                // OpenAI's schema has the fields at the top level. Its Python library raises an
                // exception only for data with a field `error`.
                let data = json!({
                    "type": "error",
                    "code": self.code,
                    "message": self.message,
                    "param": self.param,
                    "sequence_number": 0,
                    "error": self.openai_fields(),
                });
                format!("event: error\ndata: {data}\n\n")
            }
            ErrorShape::Anthropic => format!("event: error\ndata: {}\n\n", self.anthropic_body()),
        };
        event.into_bytes()
    }

    /// Returns the fields of OpenAI's error object.
    fn openai_fields(&self) -> serde_json::Value {
        json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        })
    }

    /// Returns the body in Anthropic's form, whose types follow from the status.
    fn anthropic_body(&self) -> serde_json::Value {
        let kind = match (self.status, self.kind) {
            (429, OVERLOADED) | (503, _) => "overloaded_error",
            (429, _) => "rate_limit_error",
            (401, _) => "authentication_error",
            (403, _) => "permission_error",
            (404, _) => "not_found_error",
            (413, _) => "request_too_large",
            (504, _) => "timeout_error",
            (400..500, _) => "invalid_request_error",
            _ => "api_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }
}

/// The `type` of errors that only the client can correct.
const INVALID_REQUEST: &str = "invalid_request_error";
/// The `type` of errors that end when other requests end.
const OVERLOADED: &str = "server_overloaded";

/// Returns the first [`MAX_NAME_CHARS`] characters of a name, with `…` if there are more.
fn shortened(name: &str) -> String {
    match name.char_indices().nth(MAX_NAME_CHARS) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        Self::bad_request(error.message, error.param)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(error: &ApiError) -> serde_json::Value {
        serde_json::from_slice(&error.to_json()).unwrap()
    }

    #[test]
    fn the_body_has_the_four_fields_clients_read() {
        let body = parsed(&ApiError::model_not_found("gpt\"5\n", &[]));
        assert_eq!(
            body,
            json!({"error": {
                "message": "The model `gpt\"5\n` does not exist.",
                "type": "not_found_error",
                "param": "model",
                "code": "model_not_found",
            }})
        );
        let body = parsed(&ApiError::bad_request("no", None));
        assert_eq!(body["error"]["param"], serde_json::Value::Null);
        assert_eq!(body["error"]["code"], serde_json::Value::Null);
    }

    #[test]
    fn each_constructor_has_its_status() {
        let second = Duration::from_secs(1);
        let statuses = [
            ApiError::bad_request("", None),
            ApiError::unauthorized(""),
            ApiError::model_not_found("", &[]),
            ApiError::path_not_found("GET", "/"),
            ApiError::request_timeout(""),
            ApiError::body_too_large(1),
            ApiError::overloaded("", second),
            ApiError::capacity_exceeded("", None),
            ApiError::queue_timeout(""),
            ApiError::upgrade_not_supported(""),
            ApiError::bad_gateway(""),
            ApiError::unavailable(""),
            ApiError::no_worker("", None),
            ApiError::timed_out(""),
        ];
        let statuses = statuses.each_ref().map(|error| error.status);
        let expected = [
            400, 401, 404, 404, 408, 413, 429, 429, 429, 501, 502, 503, 503, 504,
        ];
        assert_eq!(statuses, expected);
    }

    #[test]
    fn only_refusals_that_end_with_time_have_a_time_to_retry() {
        let second = Duration::from_secs(1);
        assert_eq!(ApiError::overloaded("", second).retry_after, Some(second));
        let full = ApiError::capacity_exceeded("", Some(second));
        assert_eq!(full.retry_after, Some(second));
        assert_eq!(ApiError::queue_timeout("").retry_after, None);
        let upgrade = ApiError::upgrade_not_supported("");
        assert_eq!(upgrade.should_retry, Some(false));
        assert_eq!(ApiError::queue_timeout("").should_retry, None);
    }

    #[test]
    fn the_error_for_an_unknown_model_lists_the_served_ones() {
        let served: Vec<String> = (0..23).map(|index| format!("m{index}")).collect();
        let message = ApiError::model_not_found("x", &served[..2]).message;
        assert_eq!(
            message,
            "The model `x` does not exist. Models that are served: `m0`, `m1`."
        );
        let message = ApiError::model_not_found(&"ä".repeat(10_000), &served).message;
        assert!(message.ends_with("`m19` and 3 more."), "{message}");
        assert!(message.starts_with(&format!("The model `{}…`", "ä".repeat(200))));
    }

    #[test]
    fn errors_have_anthropics_form_for_the_messages_api() {
        let body = |error: &ApiError| -> serde_json::Value {
            serde_json::from_slice(&error.to_json_for(Endpoint::Messages)).unwrap()
        };
        let missing = ApiError::model_not_found("m", &[]);
        assert_eq!(
            body(&missing),
            json!({"type": "error", "error": {
                "type": "not_found_error",
                "message": "The model `m` does not exist.",
            }})
        );
        assert_eq!(missing.to_json_for(Endpoint::Responses), missing.to_json());
        let second = Duration::from_secs(1);
        let kinds = [
            ApiError::bad_request("", None),
            ApiError::unauthorized(""),
            ApiError::request_timeout(""),
            ApiError::body_too_large(1),
            ApiError::overloaded("", second),
            ApiError::capacity_exceeded("", None),
            ApiError::bad_gateway(""),
            ApiError::no_worker("", None),
            ApiError::timed_out(""),
        ]
        .map(|error| body(&error)["error"]["type"].as_str().unwrap().to_owned());
        assert_eq!(
            kinds,
            [
                "invalid_request_error",
                "authentication_error",
                "invalid_request_error",
                "request_too_large",
                "rate_limit_error",
                "overloaded_error",
                "api_error",
                "overloaded_error",
                "timeout_error",
            ]
        );
    }

    #[test]
    fn a_broken_stream_ends_with_an_error_in_the_form_of_its_api() {
        let error = ApiError::bad_gateway("Worker a failed.");
        let event = |endpoint| String::from_utf8(error.to_stream_event(endpoint)).unwrap();
        assert_eq!(
            event(Endpoint::Messages),
            "event: error\ndata: {\"error\":{\"message\":\"Worker a failed.\",\"type\":\"api_error\"},\
             \"type\":\"error\"}\n\n"
        );
        let chat = event(Endpoint::ChatCompletions);
        assert!(chat.starts_with("data: {\"error\":{") && chat.ends_with("\n\ndata: [DONE]\n\n"));
        let response = event(Endpoint::Responses);
        let data = response.strip_prefix("event: error\ndata: ").unwrap();
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], "error");
        assert_eq!(data["code"], "worker_failed");
        assert_eq!(data["message"], "Worker a failed.");
    }

    #[test]
    fn a_body_error_keeps_the_name_of_its_field() {
        let error = BodyError {
            message: "bad".into(),
            param: Some("messages"),
        };
        let error = ApiError::from(error);
        assert_eq!((error.status, error.param), (400, Some("messages")));
    }
}
