//! Bodies and queries of the selection API.

use std::time::Duration;

use bytes::Bytes;
use foresee_engine::error::ApiError;
use foresee_engine::paths::{self, BodyFormat};
use foresee_engine::request::Endpoint;
use foresee_engine::usage::Usage;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use serde_json::value::RawValue;

/// Time for which a reservation is held without a renewal, unless the client sets another one.
const DEFAULT_TTL: Duration = Duration::from_secs(30);

/// Maximum time for which a reservation is held without a renewal. A client that has failed must not
/// occupy a worker for longer.
const MAX_TTL: Duration = Duration::from_secs(600);

/// Maximum time that a client can wait for the dispatch of its request.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Body of `POST /admin/select`.
#[derive(Debug)]
pub(super) struct SelectRequest {
    /// API of `body`.
    pub(super) endpoint: Endpoint,
    /// Body of the request that a worker is selected for.
    pub(super) body: Bytes,
    pub(super) ttl: Duration,
    /// Maximum time in the router's queue; `None` to be sent at once.
    pub(super) wait: Option<Duration>,
    pub(super) expected_output_tokens: Option<u32>,
    pub(super) priority: i32,
    pub(super) tenant: Option<String>,
    pub(super) session: Option<String>,
    /// Names of workers that must not be selected.
    pub(super) excluded_workers: Vec<String>,
    /// Whether the response contains the costs of all candidates.
    pub(super) explain: bool,
}

/// Fields of `POST /admin/select` as they are written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SelectFields<'b> {
    #[serde(borrow)]
    path: Option<&'b RawValue>,
    body: Option<&'b RawValue>,
    model: Option<&'b RawValue>,
    token_ids: Option<&'b RawValue>,
    max_tokens: Option<&'b RawValue>,
    ttl: Option<&'b RawValue>,
    wait: Option<&'b RawValue>,
    expected_output_tokens: Option<&'b RawValue>,
    priority: Option<&'b RawValue>,
    tenant: Option<&'b RawValue>,
    session: Option<&'b RawValue>,
    exclude: Option<&'b RawValue>,
    explain: Option<&'b RawValue>,
}

impl SelectRequest {
    /// Parses a body.
    ///
    /// # Errors
    /// Fails with a 400 that names the field and says what to write instead.
    pub(super) fn parse(body: &Bytes) -> Result<Self, ApiError> {
        let fields: SelectFields<'_> = parse_object(body)?;
        let number = "a non-negative integer";
        let (endpoint, request_body) = read_prompt(body, &fields)?;
        let wait = duration("wait", fields.wait, MAX_WAIT)?;
        let ttl = duration("ttl", fields.ttl, MAX_TTL)?;
        Ok(Self {
            endpoint,
            body: request_body,
            ttl: checked_ttl(ttl)?.unwrap_or(DEFAULT_TTL),
            wait: wait.filter(|wait| !wait.is_zero()),
            expected_output_tokens: field(
                "expected_output_tokens",
                fields.expected_output_tokens,
                number,
            )?,
            priority: field(
                "priority",
                fields.priority,
                "an integer; lower values are dispatched first",
            )?
            .unwrap_or(0),
            tenant: field("tenant", fields.tenant, "a string")?,
            session: field("session", fields.session, "a string")?,
            excluded_workers: field("exclude", fields.exclude, "a list of names of workers")?
                .unwrap_or_default(),
            explain: field("explain", fields.explain, "`true` or `false`")?.unwrap_or(true),
        })
    }
}

/// Returns the API and the body of the request that `fields`, the fields of `whole`, describe: a body,
/// or token ids, which are those of a completion.
fn read_prompt(whole: &Bytes, fields: &SelectFields<'_>) -> Result<(Endpoint, Bytes), ApiError> {
    let described = "`path` and `body`, or `model` and `token_ids`";
    match (fields.body, fields.token_ids) {
        (Some(body), None) => {
            for (name, value) in [("model", fields.model), ("max_tokens", fields.max_tokens)] {
                if value.is_some() {
                    let message = format!("`{name}` goes with `token_ids`; put it into `body`.");
                    return Err(ApiError::bad_request(message, Some(name)));
                }
            }
            let path: Option<String> = field("path", fields.path, "a path")?;
            let path = path.unwrap_or_default();
            let found = paths::find("POST", &path).filter(|found| found.body == BodyFormat::Json);
            let Some(found) = found else {
                let message = "`path` must be an inference path with a JSON body, such as \
                               `/v1/chat/completions`.";
                return Err(ApiError::bad_request(message, Some("path")));
            };
            Ok((found.endpoint, whole.slice_ref(body.get().as_bytes())))
        }
        (None, Some(_)) => {
            if fields.path.is_some() {
                let message = "`path` goes with `body`; leave it out beside `token_ids`.";
                return Err(ApiError::bad_request(message, Some("path")));
            }
            let ids = "a list of token ids, which are non-negative integers";
            let prompt: Vec<u32> = field("token_ids", fields.token_ids, ids)?.unwrap_or_default();
            if prompt.is_empty() {
                let message = format!("`token_ids` must be {ids}, and not empty.");
                return Err(ApiError::bad_request(message, Some("token_ids")));
            }
            let model: Option<String> = field("model", fields.model, "the name of a model")?;
            let max_tokens: Option<u32> =
                field("max_tokens", fields.max_tokens, "a non-negative integer")?;
            let mut body = json!({ "prompt": prompt, "stream": true });
            if let Some(model) = model {
                body["model"] = model.into();
            }
            if let Some(max_tokens) = max_tokens {
                body["max_tokens"] = max_tokens.into();
            }
            Ok((Endpoint::Completions, body.to_string().into()))
        }
        (Some(_), Some(_)) => {
            let message = format!("The prompt must be given once: as {described}.");
            Err(ApiError::bad_request(message, Some("token_ids")))
        }
        (None, None) => {
            let message = format!("The prompt is missing: give {described}.");
            Err(ApiError::bad_request(message, Some("body")))
        }
    }
}

/// Body of `POST /admin/reservations/{id}/progress`.
#[derive(Debug, PartialEq)]
pub(super) struct ProgressReport {
    /// Token counts so far; `None` for a count that the report does not change.
    pub(super) counts: Usage,
    /// Whether the first output token has arrived.
    pub(super) has_first_token: bool,
    /// New time for which the reservation is held without a renewal.
    pub(super) ttl: Option<Duration>,
}

impl ProgressReport {
    /// Parses a body; an empty one only renews the reservation.
    ///
    /// # Errors
    /// Fails with a 400 that names the field and says what to write instead.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        #[derive(Default, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields<'b> {
            #[serde(borrow)]
            output_tokens: Option<&'b RawValue>,
            prompt_tokens: Option<&'b RawValue>,
            cached_tokens: Option<&'b RawValue>,
            first_token: Option<&'b RawValue>,
            ttl: Option<&'b RawValue>,
        }
        let fields = match body.trim_ascii().is_empty() {
            true => Fields::default(),
            false => parse_object(body)?,
        };
        let output = "a non-negative integer: all output tokens so far";
        let number = "a non-negative integer";
        let ttl = duration("ttl", fields.ttl, MAX_TTL)?;
        Ok(Self {
            counts: Usage {
                completion_tokens: field("output_tokens", fields.output_tokens, output)?,
                prompt_tokens: field("prompt_tokens", fields.prompt_tokens, number)?,
                cached_tokens: field("cached_tokens", fields.cached_tokens, number)?,
            },
            has_first_token: field("first_token", fields.first_token, "`true` or `false`")?
                .unwrap_or(false),
            ttl: checked_ttl(ttl)?,
        })
    }
}

/// How the request of a reservation ended, as the client says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReportedEnd {
    /// The whole output was generated.
    Completed,
    /// The worker failed.
    Failed,
    /// Neither: the output was cut off, or the request was never sent.
    Abandoned,
}

impl ReportedEnd {
    /// Returns the value of the parameter `outcome`.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Parses the query of `DELETE /admin/reservations/{id}`: the outcome, and the last token counts.
///
/// # Errors
/// Fails with a 400 if a parameter is unknown or has an invalid value.
pub(super) fn parse_end(query: Option<&str>) -> Result<(ReportedEnd, Usage), ApiError> {
    let mut end = ReportedEnd::Abandoned;
    let mut counts = Usage::default();
    let parameters = query.unwrap_or("").split('&');
    for parameter in parameters.filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let count = |name: &'static str| {
            let message = format!("`{name}` must be a non-negative integer.");
            let number: Result<u32, _> = value.parse();
            let number = number.map_err(|_| ApiError::bad_request(message, Some(name)));
            number.map(Some)
        };
        match name {
            "outcome" => {
                use ReportedEnd::{Abandoned, Completed, Failed};
                let mut outcomes = [Completed, Failed, Abandoned].into_iter();
                end = outcomes.find(|end| end.as_str() == value).ok_or_else(|| {
                    let message = "`outcome` must be `completed`, `failed` or `abandoned`.";
                    ApiError::bad_request(message, Some("outcome"))
                })?;
            }
            "output_tokens" => counts.completion_tokens = count("output_tokens")?,
            "prompt_tokens" => counts.prompt_tokens = count("prompt_tokens")?,
            "cached_tokens" => counts.cached_tokens = count("cached_tokens")?,
            _ => {
                let message = "The parameters are `outcome`, `output_tokens`, `prompt_tokens` and \
                               `cached_tokens`.";
                return Err(ApiError::bad_request(message, None));
            }
        }
    }
    Ok((end, counts))
}

/// Parses a body that must be a JSON object. The error says what is wrong, such as an unknown field.
fn parse_object<'b, T: Deserialize<'b>>(body: &'b [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        let message =
            format!("The body must be a JSON object with the documented fields: {error}.");
        ApiError::bad_request(message, None)
    })
}

/// Returns the value of a field; `None` if the field is absent or `null`. Fails with a 400 if the
/// value does not have the type `T`. `requirement` completes the message "`name` must be …".
fn field<T: DeserializeOwned>(
    name: &'static str,
    value: Option<&RawValue>,
    requirement: &str,
) -> Result<Option<T>, ApiError> {
    let Some(value) = value else {
        return Ok(None);
    };
    serde_json::from_str(value.get())
        .map_err(|_| ApiError::bad_request(format!("`{name}` must be {requirement}."), Some(name)))
}

/// Returns the duration in a field; `None` if the field is absent. Fails with a 400 unless it is a
/// duration with a unit of at most `limit`.
fn duration(
    name: &'static str,
    value: Option<&RawValue>,
    limit: Duration,
) -> Result<Option<Duration>, ApiError> {
    let requirement = format!(
        "a duration with a unit of at most {}, such as `\"30s\"`",
        humantime::format_duration(limit)
    );
    let Some(text) = field::<String>(name, value, &requirement)? else {
        return Ok(None);
    };
    let parsed = humantime::parse_duration(&text).ok();
    parsed
        .filter(|duration| *duration <= limit)
        .map(Some)
        .ok_or_else(|| {
            ApiError::bad_request(format!("`{name}` must be {requirement}."), Some(name))
        })
}

/// Fails with a 400 if a `ttl` is zero: the reservation would end before it can be used.
fn checked_ttl(ttl: Option<Duration>) -> Result<Option<Duration>, ApiError> {
    if ttl.is_some_and(|ttl| ttl.is_zero()) {
        let message = "`ttl` must be longer than 0s: a reservation ends when it is not renewed \
                       for that time.";
        return Err(ApiError::bad_request(message, Some("ttl")));
    }
    Ok(ttl)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<SelectRequest, ApiError> {
        SelectRequest::parse(&Bytes::copy_from_slice(body.as_bytes()))
    }

    #[test]
    fn a_body_is_passed_on_as_it_was_written() {
        let request = parse(
            r#"{"path": "/v1/chat/completions", "ttl": "5s", "priority": -3,
                "body": {"model" : "m", "messages":[ ]}, "wait": "0s", "explain": false}"#,
        );
        let request = request.unwrap();
        assert_eq!(request.endpoint, Endpoint::ChatCompletions);
        assert_eq!(request.body, r#"{"model" : "m", "messages":[ ]}"#);
        assert_eq!(request.ttl, Duration::from_secs(5));
        assert_eq!((request.priority, request.wait), (-3, None));
        assert!(!request.explain);
    }

    #[test]
    fn token_ids_are_the_prompt_of_a_completion() {
        let request = parse(r#"{"model": "m", "token_ids": [1, 2], "max_tokens": 7}"#).unwrap();
        assert_eq!(request.endpoint, Endpoint::Completions);
        let body: serde_json::Value = serde_json::from_slice(&request.body).unwrap();
        let expected = json!({"model": "m", "prompt": [1, 2], "max_tokens": 7, "stream": true});
        assert_eq!(body, expected);
        assert_eq!((request.ttl, request.explain), (DEFAULT_TTL, true));
    }

    #[test]
    fn errors_name_the_field() {
        for (body, param) in [
            ("{}", Some("body")),
            ("[1]", None),
            (r#"{"token_ids": [1], "surprise": 1}"#, None),
            (r#"{"token_ids": [1], "body": {}}"#, Some("token_ids")),
            (r#"{"token_ids": [-1]}"#, Some("token_ids")),
            (r#"{"token_ids": []}"#, Some("token_ids")),
            (r#"{"token_ids": "text"}"#, Some("token_ids")),
            (
                r#"{"token_ids": [1], "path": "/v1/completions"}"#,
                Some("path"),
            ),
            (r#"{"token_ids": [1], "model": 3}"#, Some("model")),
            (
                r#"{"token_ids": [1], "max_tokens": "x"}"#,
                Some("max_tokens"),
            ),
            (r#"{"token_ids": [1], "ttl": "0s"}"#, Some("ttl")),
            (r#"{"token_ids": [1], "ttl": "11m"}"#, Some("ttl")),
            (r#"{"token_ids": [1], "ttl": 30}"#, Some("ttl")),
            (r#"{"token_ids": [1], "wait": "61s"}"#, Some("wait")),
            (r#"{"token_ids": [1], "exclude": "a"}"#, Some("exclude")),
            (r#"{"token_ids": [1], "priority": 1.5}"#, Some("priority")),
            (r#"{"body": {}}"#, Some("path")),
            (r#"{"body": {}, "path": "/v1/models"}"#, Some("path")),
            (
                r#"{"body": {}, "path": "/v1/audio/transcriptions"}"#,
                Some("path"),
            ),
            (
                r#"{"body": {}, "path": "/v1/completions", "model": "m"}"#,
                Some("model"),
            ),
        ] {
            let error = parse(body).unwrap_err();
            assert_eq!((error.status, error.param), (400, param), "{body}");
            if let Some(param) = param {
                assert!(
                    error.message.contains(param) || param == "body",
                    "{error:?}"
                );
            }
        }
    }

    #[test]
    fn progress_and_the_end_have_counts() {
        let report = ProgressReport::parse(br#"{"output_tokens": 5, "first_token": true}"#);
        let report = report.unwrap();
        assert_eq!(report.counts.completion_tokens, Some(5));
        assert!(report.has_first_token);
        assert!(!ProgressReport::parse(b" ").unwrap().has_first_token);
        let error = ProgressReport::parse(br#"{"output_tokens": -5}"#).unwrap_err();
        assert_eq!(error.param, Some("output_tokens"));

        assert_eq!(parse_end(None).unwrap().0, ReportedEnd::Abandoned);
        let (end, counts) = parse_end(Some("outcome=completed&output_tokens=7")).unwrap();
        assert_eq!(
            (end, counts.completion_tokens),
            (ReportedEnd::Completed, Some(7))
        );
        for (query, param) in [
            ("outcome=done", Some("outcome")),
            ("output_tokens=x", Some("output_tokens")),
            ("cached_tokens", Some("cached_tokens")),
            ("tokens=1", None),
        ] {
            assert_eq!(parse_end(Some(query)).unwrap_err().param, param, "{query}");
        }
    }
}
