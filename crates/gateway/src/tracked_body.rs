//! Body of a worker's response on its way to the client: passed on unchanged and unbuffered, and
//! [observed](crate::placement::response_observer) for output tokens and usage.
//!
//! The body owns the bookings of its request. When the body is dropped, at its end or because the
//! client disconnected, the bookings are released and the connection to the worker is closed. A
//! worker that falls silent ends the body too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use foresee_core::outlier::ExchangeResult;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, response};
use hyper::body::{Body, Frame};
use tokio::time::{Instant, Sleep};

use crate::metrics::Outcome;
use crate::placement::request_context::RequestContext;
use crate::placement::response_observer::{ResponseForm, ResponseObserver};
use crate::shutdown::{ShutdownSignal, shutting_down};
use crate::upstream::{UpstreamBody, UpstreamError};

/// When the responses of a gateway end early.
#[derive(Debug)]
pub(crate) struct ResponseLimits {
    /// Maximum time for which a worker may be silent in the middle of its response.
    pub(crate) idle_timeout: Duration,
    /// Shutdown of the listener.
    pub(crate) shutdown: Arc<ShutdownSignal>,
}

/// Body of a worker's response.
#[derive(Debug)]
pub(crate) struct TrackedBody {
    /// Body that the worker sends.
    inner: UpstreamBody,
    /// Frame that was already read from `inner` and is sent first.
    buffered_frame: Option<Frame<Bytes>>,
    observer: ResponseObserver,
    limits: Arc<ResponseLimits>,
    /// When the body began to wait for the worker; `None` while it has data.
    waiting_since: Option<Instant>,
    /// Wakes the task when the worker may have been silent for too long. Set again only after it has
    /// elapsed, because most frames arrive much earlier.
    idle_timer: Pin<Box<Sleep>>,
}

impl TrackedBody {
    /// Returns whether a response with this head is a successful stream of events. A compressed
    /// stream is not recognised.
    pub(crate) fn is_stream(head: &response::Parts) -> bool {
        form_of(head) == ResponseForm::Events
    }

    /// Wraps the body of a response and derives the outcome from the status. `first_frame` was
    /// already read from the body; it is observed now and passed on first. If the body is complete,
    /// its end is recorded and the bookings are released at once.
    pub(crate) fn new(
        head: &response::Parts,
        body: UpstreamBody,
        first_frame: Option<Frame<Bytes>>,
        context: RequestContext,
        limits: &Arc<ResponseLimits>,
    ) -> Self {
        let outcome = if head.status.is_server_error() {
            Outcome::WorkerError
        } else if head.status.is_client_error() {
            Outcome::Refused
        } else {
            Outcome::Ok
        };
        let mut tracked = Self {
            inner: body,
            buffered_frame: None,
            observer: ResponseObserver::new(form_of(head), outcome, context),
            limits: Arc::clone(limits),
            waiting_since: None,
            idle_timer: Box::pin(tokio::time::sleep(limits.idle_timeout)),
        };
        if let Some(frame) = first_frame {
            tracked.read(&frame);
            tracked.buffered_frame = Some(frame);
        }
        tracked.end_if_complete();
        tracked
    }

    /// Observes a frame before it is passed on. Trailers are ignored.
    fn read(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.observer.on_data(data);
        }
    }

    /// Ends the response if the whole body has been read. The HTTP server does not poll a body of known
    /// length again after its last byte. A stream has no known length.
    fn end_if_complete(&mut self) {
        if self.inner.is_end_stream() {
            self.observer.end();
        }
    }

    /// Polls the timer of a body that waits for its worker. Ready if the worker has been silent for
    /// too long.
    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<UpstreamError> {
        let limit = self.limits.idle_timeout;
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        loop {
            ready!(self.idle_timer.as_mut().poll(context));
            if since.elapsed() >= limit {
                return Poll::Ready(UpstreamError::Silent(limit));
            }
            self.idle_timer.as_mut().reset(since + limit);
        }
    }

    /// Returns the frame that passes on a failure: the error event of a stream, or an error that
    /// breaks the response off.
    fn fail(&mut self, error: UpstreamError) -> Option<Result<Frame<Bytes>, UpstreamError>> {
        match self.observer.fail(&error, ExchangeResult::Failure) {
            Some(rest) => Some(Ok(Frame::data(rest))),
            None => Some(Err(error)),
        }
    }
}

/// Returns the form of a response with this head. An error is not observed.
fn form_of(head: &response::Parts) -> ResponseForm {
    match head.status.is_success() {
        true => form_of_body(&head.headers),
        false => ResponseForm::Other,
    }
}

/// Returns the form of a body with these headers. A compressed body, and any other content type than
/// those of JSON and of event streams, is not observed.
pub(crate) fn form_of_body(headers: &HeaderMap) -> ResponseForm {
    let content_type = headers.get(CONTENT_TYPE);
    let content_type = content_type.map_or(&b""[..], |value| value.as_bytes());
    if headers.contains_key(CONTENT_ENCODING) {
        ResponseForm::Other
    } else if content_type.starts_with(b"text/event-stream") {
        ResponseForm::Events
    } else if content_type.starts_with(b"application/json") {
        ResponseForm::Json
    } else {
        ResponseForm::Other
    }
}

impl Body for TrackedBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        if let Some(frame) = self.buffered_frame.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.observer.has_ended() {
            return Poll::Ready(None);
        }
        // The task of the connection polls the body when the shutdown's phase changes.
        if self.limits.shutdown.must_abort()
            && let Some(rest) = self.observer.shut_down(&shutting_down())
        {
            return Poll::Ready(Some(Ok(Frame::data(rest))));
        }
        let Poll::Ready(next) = Pin::new(&mut self.inner).poll_frame(context) else {
            let error = ready!(self.poll_idle(context));
            return Poll::Ready(self.fail(error));
        };
        self.waiting_since = None;
        Poll::Ready(match next {
            Some(Ok(frame)) => {
                self.read(&frame);
                self.end_if_complete();
                Some(Ok(frame))
            }
            Some(Err(_)) if self.observer.is_done() => {
                self.observer.end();
                None
            }
            Some(Err(error)) => self.fail(UpstreamError::connection_lost(&error)),
            None => self.observer.end().map(|rest| Ok(Frame::data(rest))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.observer.has_ended() && self.buffered_frame.is_none()
    }
}
