//! Bodies of requests to the admin listener, within limits of size and time.

use std::time::Duration;

use bytes::Bytes;
use foresee_engine::error::ApiError;
use http::HeaderMap;
use http::header::EXPECT;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};

use crate::request_body::discard;

/// Maximum time in which a client may send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads a whole body of at most `limit` bytes. `headers` say whether the client waits for
/// `100 Continue` before it sends the body.
///
/// # Errors
/// Fails with a 413 if the body is longer, with a 408 if it takes longer than [`BODY_TIMEOUT`], and
/// with a 400 if the client breaks off. A separate task discards the rest of a body that is too
/// long.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Incoming,
    limit: usize,
) -> Result<Bytes, ApiError> {
    if body.size_hint().lower() > limit as u64 {
        // A client that sent `Expect: 100-continue` has not sent the body yet.
        if !headers.contains_key(EXPECT) {
            tokio::spawn(discard(body));
        }
        return Err(ApiError::body_too_large(limit));
    }
    let collect = Limited::new(&mut body, limit).collect();
    match tokio::time::timeout(BODY_TIMEOUT, collect).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            tokio::spawn(discard(body));
            Err(ApiError::body_too_large(limit))
        }
        Ok(Err(error)) => {
            let message = format!("The request body is incomplete: {error}.");
            Err(ApiError::bad_request(message, None))
        }
        Err(_) => {
            let message = format!("The request body did not arrive within {BODY_TIMEOUT:?}.");
            Err(ApiError::request_timeout(message))
        }
    }
}
