//! The HTTP client of the load generator and of `verify`: GET, POST, and event streams that are
//! read to their end.

use std::error::Error;
use std::fmt;
use std::ops::ControlFlow;

use bytes::Bytes;
use foresee_api::headers;
use foresee_engine::stream::{Observed, StreamObserver};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::{Serialize, Serializer};

/// Limit for the message that is kept of a failure, in characters.
const MAX_MESSAGE_CHARS: usize = 300;

/// Limit for a body that is read as a whole, in bytes.
pub(crate) const MAX_BODY_BYTES: usize = 16 << 20;

/// A client with a pool of idle connections.
pub(crate) type HttpClient = Client<HttpConnector, Full<Bytes>>;

/// Returns a client without connections.
pub(crate) fn client() -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

/// A key that is sent as `Authorization: Bearer KEY`. Its `Debug` output leaves the key out.
#[derive(Clone, Debug)]
pub struct ApiKey(HeaderValue);

/// An API key with characters that an HTTP header cannot carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the API key contains characters that are not allowed in an HTTP header")]
pub struct InvalidApiKey;

impl ApiKey {
    /// Checks a key.
    ///
    /// # Errors
    /// If the key contains a control character, such as the end of a line.
    pub fn new(key: &str) -> Result<Self, InvalidApiKey> {
        let value = HeaderValue::from_str(&format!("Bearer {key}"));
        let mut value = value.map_err(|_| InvalidApiKey)?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

/// The cause of a request's failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// No connection could be opened.
    Connect,
    /// The connection broke.
    Reset,
    /// The response's status is outside 200 to 299.
    Status(u16),
    /// The stream contained an error event.
    ErrorEvent,
    /// The stream ended without `data: [DONE]`.
    CutShort,
    /// The response did not end within the time limit.
    Timeout,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("connect"),
            Self::Reset => f.write_str("reset"),
            Self::Status(status) => write!(f, "status {status}"),
            Self::ErrorEvent => f.write_str("error event"),
            Self::CutShort => f.write_str("cut short"),
            Self::Timeout => f.write_str("timeout"),
        }
    }
}

/// Serialises the displayed text, which can be a map's key.
impl Serialize for FailureKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// The error with its causes, or the beginning of the response's body.
    pub(crate) message: String,
    /// The worker that a router named in the failed response.
    pub(crate) worker: Option<String>,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: String) -> Self {
        let worker = None;
        Self {
            kind,
            message,
            worker,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.message)
    }
}

/// A response with a successful status, before its body is read.
#[derive(Debug)]
pub(crate) struct Opened {
    /// `x-foresee-worker`: the worker that a router chose.
    pub(crate) worker: Option<String>,
    /// `x-foresee-overlap-tokens`: prompt tokens that the router expects in the worker's cache.
    pub(crate) predicted_tokens: Option<u32>,
    /// Body of the response, not read yet.
    pub(crate) body: Incoming,
}

/// How the reading of a stream ended without a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// The stream reported that it is complete.
    Complete,
    /// The caller stopped reading.
    Left,
}

/// Returns a GET request without a body.
pub(crate) fn get(uri: &Uri, api_key: Option<&ApiKey>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(Bytes::new()));
    *request.uri_mut() = uri.clone();
    authorize(&mut request, api_key);
    request
}

/// Returns a POST request with a JSON body.
pub(crate) fn post(uri: &Uri, body: Bytes, api_key: Option<&ApiKey>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    let json = HeaderValue::from_static("application/json");
    request.headers_mut().insert(CONTENT_TYPE, json);
    authorize(&mut request, api_key);
    request
}

/// Adds the `Authorization` header, if there is a key.
fn authorize(request: &mut Request<Full<Bytes>>, api_key: Option<&ApiKey>) {
    if let Some(ApiKey(value)) = api_key {
        request.headers_mut().insert(AUTHORIZATION, value.clone());
    }
}

/// Sends a request and waits for the head of its response, without a time limit.
///
/// # Errors
/// If no connection can be opened, if it breaks, or if the status is outside 200 to 299. Only the
/// failure of a status names the worker.
pub(crate) async fn send(
    client: &HttpClient,
    request: Request<Full<Bytes>>,
) -> Result<Opened, Failure> {
    let response = client.request(request).await.map_err(|error| {
        let kind = if error.is_connect() {
            FailureKind::Connect
        } else {
            FailureKind::Reset
        };
        Failure::new(kind, chain(&error))
    })?;
    let worker = header(response.headers(), headers::WORKER);
    let predicted = header(response.headers(), headers::OVERLAP_TOKENS);
    let status = response.status();
    if !status.is_success() {
        return Err(Failure {
            kind: FailureKind::Status(status.as_u16()),
            message: error_message(response).await,
            worker,
        });
    }
    Ok(Opened {
        worker,
        predicted_tokens: predicted.and_then(|tokens| tokens.parse().ok()),
        body: response.into_body(),
    })
}

/// Returns the value of a header; `None` if it is missing or not visible ASCII.
fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.to_owned())
}

/// Reads a body of at most [`MAX_BODY_BYTES`].
///
/// # Errors
/// [`FailureKind::Reset`] if the body is longer, or if the connection breaks.
pub(crate) async fn read_whole(body: Incoming) -> Result<Bytes, Failure> {
    let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
    let body = body.map_err(|error| Failure::new(FailureKind::Reset, chain(error.as_ref())))?;
    Ok(body.to_bytes())
}

/// Reads an event stream to the end of its body, so that the connection can be used again.
///
/// `on_bytes` is called with each chunk of the body after the observer has read it, and can stop
/// the reading: the result is then [`StreamEnd::Left`], even after an error event. Otherwise a
/// response that reports an error, or ends without `data: [DONE]`, is a failure.
pub(crate) async fn read_stream(
    mut body: Incoming,
    observer: &mut StreamObserver,
    mut on_bytes: impl FnMut(&[u8], &StreamObserver, Observed) -> ControlFlow<()>,
) -> Result<StreamEnd, Failure> {
    while let Some(frame) = body.frame().await {
        let bytes = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            // A complete response stays complete when its connection breaks afterwards.
            Err(_) if observer.is_done() => break,
            Err(error) => return Err(Failure::new(FailureKind::Reset, chain(&error))),
        };
        let observed = observer.feed(&bytes);
        if on_bytes(&bytes, observer, observed).is_break() {
            return Ok(StreamEnd::Left);
        }
        if observed.error {
            let message = shortened(&String::from_utf8_lossy(&bytes));
            return Err(Failure::new(FailureKind::ErrorEvent, message));
        }
    }
    if observer.is_done() {
        return Ok(StreamEnd::Complete);
    }
    let tokens = observer.tokens();
    let message = format!("the stream ended after {tokens} tokens without `data: [DONE]`");
    Err(Failure::new(FailureKind::CutShort, message))
}

/// Returns the beginning of the body of a response with an error status. If the body cannot be read
/// or is very long, returns the reason instead.
async fn error_message(response: Response<Incoming>) -> String {
    const MAX_ERROR_BYTES: usize = 1 << 16;
    let body = Limited::new(response.into_body(), MAX_ERROR_BYTES).collect();
    match body.await {
        Ok(body) => shortened(&String::from_utf8_lossy(&body.to_bytes())),
        Err(error) => chain(error.as_ref()),
    }
}

/// Returns the text of an error and of its causes.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    shortened(&causes.join(": "))
}

/// Returns at most [`MAX_MESSAGE_CHARS`] characters of a message, without surrounding white space.
fn shortened(message: &str) -> String {
    message.trim().chars().take(MAX_MESSAGE_CHARS).collect()
}
