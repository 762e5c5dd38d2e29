//! The client that live addresses are asked with, and how its failures are said.

use std::error::Error;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// The longest message that is kept of a failure, in characters.
const LONGEST_MESSAGE: usize = 300;

/// Keeps connections for the next request.
pub(crate) type HttpClient = Client<HttpConnector, Full<Bytes>>;

pub(crate) fn client() -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

/// A request that brings a JSON body.
pub(crate) fn post(uri: &Uri, body: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    let json = HeaderValue::from_static("application/json");
    request.headers_mut().insert(CONTENT_TYPE, json);
    request
}

/// What an answer that is no success says.
pub(crate) async fn refusal(response: Response<Incoming>) -> String {
    const LONGEST_BODY: usize = 1 << 16;
    let body = Limited::new(response.into_body(), LONGEST_BODY).collect();
    match body.await {
        Ok(body) => shortened(&String::from_utf8_lossy(&body.to_bytes())),
        Err(error) => chain(error.as_ref()),
    }
}

/// An error and what caused it.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    shortened(&causes.join(": "))
}

pub(crate) fn shortened(message: &str) -> String {
    message.trim().chars().take(LONGEST_MESSAGE).collect()
}
