//! Reads request bodies, within limits of time, of size, and of bytes in memory in total.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use foresee_engine::error::ApiError;
use http::header::{EXPECT, TRANSFER_ENCODING};
use http::{HeaderMap, request};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use tokio::time::timeout;

use crate::connection_state::ConnectionHandle;

/// Maximum time in which a client may send the rest of a body that was refused.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of idle timeouts in which a body may arrive at any rate.
const SLOW_IDLE_TIMEOUTS: u32 = 4;

/// Least mean rate of a body that takes longer, in bytes per second.
const MIN_BYTES_PER_SECOND: f64 = 1024.0;

/// Value of `Retry-After` if the bodies of other requests take all the memory.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Limits of request bodies, apart from the size of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestBodyConfig {
    /// Maximum time in which a client may send nothing in the middle of a body.
    pub idle_timeout: Duration,
    /// Maximum number of bytes of all request bodies in memory. A body counts with its
    /// `Content-Length` from its start, or else as it arrives, until the worker responds.
    pub max_bytes_in_flight: usize,
}

impl Default for RequestBodyConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(30),
            max_bytes_in_flight: 2 << 30,
        }
    }
}

/// Counts the bytes of all request bodies in memory, up to a limit.
#[derive(Debug)]
pub(crate) struct BodyBudget {
    /// Maximum of `used`.
    limit: usize,
    used: AtomicUsize,
}

impl BodyBudget {
    /// Creates an unused budget of `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            used: AtomicUsize::new(0),
        }
    }

    /// Returns the number of bytes that bodies occupy or have reserved.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Adds `bytes` to the used ones. Returns whether they fit; if not, nothing is added.
    fn reserve(&self, bytes: usize) -> bool {
        let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .is_ok()
    }
}

/// Bytes that one body has reserved. Dropping the permit returns them.
#[derive(Debug)]
pub(crate) struct BodyPermit {
    budget: Arc<BodyBudget>,
    bytes: usize,
}

impl BodyPermit {
    /// Creates a permit for no bytes.
    fn new(budget: &Arc<BodyBudget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            bytes: 0,
        }
    }

    /// Extends the permit to `total` bytes. Fails with a 503 if they do not fit into the budget; the
    /// permit is then as before. A smaller total than before is ignored.
    pub(crate) fn extend_to(&mut self, total: usize) -> Result<(), ApiError> {
        let more = total.saturating_sub(self.bytes);
        if !self.budget.reserve(more) {
            let message = "The request bodies in progress fill the router's memory for them \
                           (--max-body-bytes-in-flight). Try again shortly.";
            return Err(ApiError {
                code: Some("router_overloaded"),
                retry_after: Some(RETRY_AFTER),
                ..ApiError::unavailable(message)
            });
        }
        self.bytes += more;
        Ok(())
    }
}

impl Drop for BodyPermit {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A whole request body. The caller keeps the permit as long as it keeps the bytes.
#[derive(Debug)]
pub(crate) struct RequestBody {
    pub(crate) bytes: Bytes,
    /// Counts the bytes in the budget of all bodies.
    pub(crate) permit: BodyPermit,
}

/// Reader of request bodies.
#[derive(Debug)]
pub(crate) struct RequestBodies {
    budget: Arc<BodyBudget>,
    /// Maximum size of one body, in bytes.
    max_bytes: usize,
    idle_timeout: Duration,
}

impl RequestBodies {
    /// Creates a reader of bodies up to `max_bytes`.
    pub(crate) fn new(max_bytes: usize, config: RequestBodyConfig) -> Self {
        Self {
            budget: Arc::new(BodyBudget::new(config.max_bytes_in_flight)),
            max_bytes,
            idle_timeout: config.idle_timeout,
        }
    }

    /// Returns the number of bytes that bodies occupy or have reserved.
    pub(crate) fn bytes_in_flight(&self) -> usize {
        self.budget.used()
    }

    /// Reads the whole body of the request with this `head`, and tells the request's connection once
    /// it is complete.
    ///
    /// # Errors
    /// Fails with a 413 if the body exceeds the size limit, with a 503 if all bodies exceed the
    /// budget, with a 408 if the client sends nothing for the idle timeout or, after
    /// [`SLOW_IDLE_TIMEOUTS`] of them, less than [`MIN_BYTES_PER_SECOND`] on average, with a 501 if the body
    /// has a transfer coding other than `chunked`, and with a 400 if the client breaks off. A
    /// separate task discards the rest of a body that does not fit.
    pub(crate) async fn read(
        &self,
        head: &request::Parts,
        mut body: Incoming,
    ) -> Result<RequestBody, ApiError> {
        check_transfer_encoding(&head.headers)?;
        let mut has_begun = false;
        match self.collect(&mut body, &mut has_begun).await {
            Ok(whole) => {
                if let Some(connection) = head.extensions.get::<ConnectionHandle>() {
                    connection.note_body_received();
                }
                Ok(whole)
            }
            Err(error) => {
                // A client that sent `Expect: 100-continue` sends no body before it is asked to.
                let sends_body = has_begun || !head.headers.contains_key(EXPECT);
                if matches!(error.status, 413 | 503) && sends_body {
                    tokio::spawn(discard(body));
                }
                Err(error)
            }
        }
    }

    /// Reads all frames of a body into one buffer. Sets `has_begun` before it asks the client for
    /// the first one. See [`read`](Self::read) for the errors.
    async fn collect(
        &self,
        body: &mut Incoming,
        has_begun: &mut bool,
    ) -> Result<RequestBody, ApiError> {
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if announced > self.max_bytes {
            return Err(ApiError::body_too_large(self.max_bytes));
        }
        let mut permit = BodyPermit::new(&self.budget);
        permit.extend_to(announced)?;
        let mut bytes = BytesMut::with_capacity(announced);
        *has_begun = true;
        let began = Instant::now();
        loop {
            let Ok(frame) = timeout(self.idle_timeout, body.frame()).await else {
                return Err(body_timed_out(self.idle_timeout));
            };
            let slowest = Duration::from_secs_f64(bytes.len() as f64 / MIN_BYTES_PER_SECOND);
            if began.elapsed() > self.idle_timeout * SLOW_IDLE_TIMEOUTS + slowest {
                return Err(body_too_slow());
            }
            let data = match frame {
                None => break,
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                Some(Err(error)) => {
                    let message = format!("The request body is incomplete: {error}.");
                    return Err(ApiError::bad_request(message, None));
                }
            };
            let total = bytes.len().saturating_add(data.len());
            if total > self.max_bytes {
                return Err(ApiError::body_too_large(self.max_bytes));
            }
            permit.extend_to(total)?;
            bytes.extend_from_slice(&data);
        }
        Ok(RequestBody {
            bytes: bytes.freeze(),
            permit,
        })
    }
}

/// Fails with a 501 unless the body has no transfer coding or exactly `chunked`. The HTTP library
/// decodes `chunked` and would pass on a body with further codings as if it had none.
fn check_transfer_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_known = match (codings.next(), codings.next()) {
        (None, _) => true,
        (Some(coding), None) => coding.as_bytes().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => false,
    };
    if is_known {
        return Ok(());
    }
    let message = "Only the transfer coding `chunked` is supported.";
    Err(ApiError {
        status: 501,
        code: Some("transfer_encoding_unsupported"),
        ..ApiError::bad_request(message, None)
    })
}

/// Returns a 408: the client sent nothing of its body for `idle_timeout`.
fn body_timed_out(idle_timeout: Duration) -> ApiError {
    let message = format!(
        "The request body is incomplete: nothing arrived for {} s (--body-idle-timeout).",
        idle_timeout.as_secs_f64()
    );
    ApiError::request_timeout(message)
}

/// Returns a 408: the client sends its body so slowly that it would occupy its memory for very long.
fn body_too_slow() -> ApiError {
    ApiError::request_timeout(format!(
        "The request body arrives too slowly: send at least {MIN_BYTES_PER_SECOND} bytes a second."
    ))
}

/// Reads and discards the rest of a refused body. Most clients read no response before they have sent
/// the whole body, and closing the connection earlier would lose the response.
pub(crate) async fn discard(mut body: Incoming) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    // After the timeout the body is dropped, which closes the connection.
    let _ = timeout(DISCARD_TIMEOUT, rest).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_a_bound_and_permits_return_their_bytes() {
        let budget = Arc::new(BodyBudget::new(100));
        let mut first = BodyPermit::new(&budget);
        let mut second = BodyPermit::new(&budget);
        first.extend_to(60).unwrap();
        second.extend_to(40).unwrap();
        second.extend_to(10).unwrap();
        assert_eq!(budget.used(), 100);
        let error = first.extend_to(61).unwrap_err();
        assert_eq!((error.status, error.retry_after), (503, Some(RETRY_AFTER)));
        assert!(first.extend_to(usize::MAX).is_err());
        drop(second);
        assert_eq!(budget.used(), 60);
        first.extend_to(100).unwrap();
        drop(first);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn only_chunked_is_a_known_transfer_coding() {
        let check = |codings: &[&str]| {
            let mut headers = HeaderMap::new();
            for coding in codings {
                headers.append(TRANSFER_ENCODING, coding.parse().unwrap());
            }
            check_transfer_encoding(&headers).map_err(|error| error.status)
        };
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&["chunked"]), Ok(()));
        assert_eq!(check(&["Chunked"]), Ok(()));
        for codings in [
            &["gzip, chunked"][..],
            &["gzip", "chunked"],
            &["chunked", "chunked"],
            &["identity"],
        ] {
            assert_eq!(check(codings), Err(501), "{codings:?}");
        }
    }
}
