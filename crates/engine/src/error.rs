//! Error responses in the form that OpenAI clients expect: a status and the body
//! `{"error": {message, type, param, code}}`.

use std::time::Duration;

use serde_json::json;

use crate::request::BodyError;

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
}

impl ApiError {
    /// Returns a 400: the body or one of its fields (`param`) cannot be used.
    #[must_use]
    pub fn bad_request(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self {
            param,
            ..Self::new(400, "invalid_request_error", None, message)
        }
    }

    /// Returns a 401: the API key is missing or wrong.
    #[must_use]
    pub fn unauthorized(message: impl Into<String>) -> Self {
        let kind = "authentication_error";
        Self::new(401, kind, Some("invalid_api_key"), message)
    }

    /// Returns a 404: no worker serves the model.
    #[must_use]
    pub fn model_not_found(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist.");
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

    /// Returns a 413: the body is longer than `limit` bytes.
    #[must_use]
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than {limit} bytes.");
        let kind = "invalid_request_error";
        Self::new(413, kind, Some("request_too_large"), message)
    }

    /// Returns a 429: the router accepts no further request now. The client may retry after
    /// `retry_after`.
    #[must_use]
    pub fn overloaded(message: impl Into<String>, retry_after: Duration) -> Self {
        let code = Some("rate_limit_exceeded");
        Self {
            retry_after: Some(retry_after),
            ..Self::new(429, "rate_limit_error", code, message)
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
        }
    }

    /// Returns the body of the response.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let body = json!({
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        });
        body.to_string().into_bytes()
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
        let body = parsed(&ApiError::model_not_found("gpt\"5\n"));
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
            ApiError::model_not_found(""),
            ApiError::path_not_found("GET", "/"),
            ApiError::body_too_large(1),
            ApiError::overloaded("", second),
            ApiError::bad_gateway(""),
            ApiError::unavailable(""),
            ApiError::timed_out(""),
        ]
        .map(|error| error.status);
        assert_eq!(statuses, [400, 401, 404, 404, 413, 429, 502, 503, 504]);
        assert_eq!(ApiError::overloaded("", second).retry_after, Some(second));
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
