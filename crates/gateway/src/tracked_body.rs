//! Body of a worker's response on its way to the client: passed on unchanged and unbuffered, and
//! observed for output tokens and usage.
//!
//! The body owns the bookings of its request. When the body is dropped, at its end or because the
//! client disconnected, the bookings are released and the connection to the worker is closed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_engine::error::ApiError;
use foresee_engine::output_text::{Continuation, OutputEnd, parse_output_text};
use foresee_engine::request::PromptSequences;
use foresee_engine::stream::{StreamObserver, error_event};
use foresee_engine::usage::{Usage, parse_usage};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderValue, response};
use hyper::body::{Body, Frame, Incoming};

use crate::completion_log::Completion;
use crate::gateway_state::GatewayState;
use crate::log_limit::warn_limited;
use crate::metrics::Outcome;
use crate::upstream::UpstreamError;
use crate::workers::Worker;

/// Maximum size of a JSON body that is kept to parse its `usage`.
const MAX_KEPT_BYTES: usize = 4 << 20;

/// How a response is observed.
#[derive(Debug)]
enum ResponseReader {
    /// As a stream of server-sent events.
    Events(StreamObserver),
    /// As a JSON body: its chunks, kept until the end, and their total length in bytes. The chunks are
    /// shared with the frames sent to the client, so nothing is copied.
    Json(Vec<Bytes>, usize),
    /// Not at all: compressed, too long, an error, or of another type.
    Unread,
}

impl ResponseReader {
    /// Returns the reader for a response with this head. `collects_text` says that the text of a
    /// stream is kept too. Only a stream has use for it: a JSON body is kept whole. Returns
    /// [`Unread`](Self::Unread) for an error, a compressed response and any other content type.
    fn for_response(head: &response::Parts, collects_text: bool) -> Self {
        let content_type = head.headers.get(CONTENT_TYPE);
        let content_type = content_type.map_or(&b""[..], |value| value.as_bytes());
        if !head.status.is_success() || head.headers.contains_key(CONTENT_ENCODING) {
            Self::Unread
        } else if content_type.starts_with(b"text/event-stream") {
            Self::Events(if collects_text {
                StreamObserver::collecting()
            } else {
                StreamObserver::new()
            })
        } else if content_type.starts_with(b"application/json") {
            Self::Json(Vec::new(), 0)
        } else {
            Self::Unread
        }
    }
}

/// Context of a request, for the observation of its response.
#[derive(Debug)]
pub(crate) struct RequestContext {
    pub(crate) shared: Arc<GatewayState>,
    /// Worker that responds.
    pub(crate) worker: Arc<Worker>,
    /// One booking for each choice; the last one may stand for several.
    pub(crate) batch: Batch,
    /// When the request arrived, by the gateway's clock.
    pub(crate) arrived_at: Duration,
    /// Request id that the client and the worker know.
    pub(crate) request_id: HeaderValue,
    /// Model as the client named it; without a name, the model that all workers list first.
    pub(crate) model: String,
    /// Whether the request has one prompt, all of it hashed, and one output, so that the reported
    /// usage can be compared with the prediction.
    pub(crate) is_single: bool,
    /// Tokens of all prompts, counted or estimated.
    pub(crate) prompt_tokens: u32,
    /// Where the output continues the prompt's sequence, if that is known.
    pub(crate) continuation: Option<Continuation>,
    /// Prompt tokens that the worker has cached according to its KV events; `None` if the response
    /// cannot verify that number.
    pub(crate) predicted_tokens: Option<u32>,
    /// Bytes of prompt text, from which bytes per token are learned; 0 if there is nothing to learn.
    pub(crate) prompt_bytes: usize,
    /// Prompt tokens counted by the tokenizer; `None` if the engine's count can differ from it.
    pub(crate) tokenizer_count: Option<u32>,
    /// The prompts, if the request has to be added to a recording.
    pub(crate) recorded: Option<PromptSequences>,
}

/// Body of a worker's response.
#[derive(Debug)]
pub(crate) struct TrackedBody {
    /// Body that the worker sends.
    inner: Incoming,
    /// Frame that was already read from `inner` and is sent first.
    buffered_frame: Option<Frame<Bytes>>,
    reader: ResponseReader,
    /// Outcome if the response ends as it should.
    outcome: Outcome,
    /// Output tokens observed so far, of all choices.
    observed_tokens: u32,
    /// Output tokens observed so far of each choice; empty for a single choice.
    observed_by_choice: Vec<u32>,
    /// When the first output tokens arrived.
    first_token: Option<Duration>,
    /// When the latest output tokens arrived.
    last_token: Option<Duration>,
    /// Context of the request; `None` once the response has ended and was recorded.
    context: Option<RequestContext>,
}

impl TrackedBody {
    /// Returns whether a response with this head is a successful stream of events. A compressed
    /// stream is not recognised.
    pub(crate) fn is_stream(head: &response::Parts) -> bool {
        matches!(
            ResponseReader::for_response(head, false),
            ResponseReader::Events(_)
        )
    }

    /// Wraps the body of a response and derives the outcome from the status. `first_frame` was
    /// already read from the body; it is observed now and passed on first. If the body is complete,
    /// its end is recorded and the bookings are released at once.
    pub(crate) fn new(
        head: &response::Parts,
        body: Incoming,
        first_frame: Option<Frame<Bytes>>,
        context: RequestContext,
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
            reader: ResponseReader::for_response(head, context.wants_text()),
            outcome,
            observed_tokens: 0,
            observed_by_choice: Vec::new(),
            first_token: None,
            last_token: None,
            context: Some(context),
        };
        if let Some(frame) = first_frame {
            tracked.read(&frame);
            tracked.buffered_frame = Some(frame);
        }
        tracked.end_if_complete();
        tracked
    }

    /// Observes a frame before it is passed on. Trailers, and frames after the recorded end, are
    /// ignored. Notes the activity of the worker. A JSON body longer than [`MAX_KEPT_BYTES`] is no
    /// longer read, so its usage remains unknown.
    fn read(&mut self, frame: &Frame<Bytes>) {
        let Some(data) = frame.data_ref() else {
            return;
        };
        let Some(context) = &self.context else {
            return;
        };
        let now = context.shared.clock.now();
        context.worker.note_activity(now);
        match &mut self.reader {
            ResponseReader::Unread => {}
            ResponseReader::Json(_, length) if *length + data.len() > MAX_KEPT_BYTES => {
                self.reader = ResponseReader::Unread;
            }
            ResponseReader::Json(chunks, length) => {
                *length += data.len();
                chunks.push(data.clone());
            }
            ResponseReader::Events(observer) => {
                observer.feed(data);
                let tokens = observer.tokens();
                if context.batch.prompt_count() > 1 {
                    self.observe_choices(now);
                }
                self.observe_tokens(tokens, now);
            }
        }
    }

    /// Updates each choice's booking to the output tokens observed until `now`, and completes the
    /// bookings of choices that have finished. The last booking may stand for several choices, so
    /// it is not completed here. Has no effect unless the response is read as a stream.
    fn observe_choices(&mut self, now: Duration) {
        let (Some(context), ResponseReader::Events(observer)) = (&mut self.context, &self.reader)
        else {
            return;
        };
        let bookings = context.batch.prompt_count();
        self.observed_by_choice.resize(bookings, 0);
        let choices = observer.choices().iter().zip(&mut self.observed_by_choice);
        for (index, (choice, observed)) in choices.enumerate() {
            if let Some(booking) = context.batch.booking(index) {
                booking.on_tokens(choice.tokens.saturating_sub(*observed), now);
            }
            *observed = choice.tokens;
            if choice.finished && index + 1 < bookings {
                context.batch.complete_prompt(index, now);
            }
        }
    }

    /// Updates the booking to `total` output tokens at `now`, if it is the only one, and the
    /// metrics. `total` counts all choices since the start of the response. A lower total than
    /// before is a correction by the engine's usage, which changes only the booking.
    fn observe_tokens(&mut self, total: u32, now: Duration) {
        let Some(context) = &mut self.context else {
            return;
        };
        if total == self.observed_tokens {
            return;
        }
        let metrics = &context.shared.metrics;
        let has_one_booking = context.batch.prompt_count() == 1;
        let only_booking = context.batch.booking(0).filter(|_| has_one_booking);
        if let Some(new) = total.checked_sub(self.observed_tokens) {
            if let Some(booking) = only_booking {
                booking.on_tokens(new, now);
            }
            metrics.output_tokens.inc_by(u64::from(new));
            match self.last_token.replace(now) {
                None => {
                    self.first_token = Some(now);
                    let waited = now.saturating_sub(context.arrived_at);
                    metrics
                        .time_to_first_token_seconds
                        .observe(waited.as_secs_f64());
                }
                Some(last) => {
                    let gap = now.saturating_sub(last).as_secs_f64();
                    metrics
                        .inter_token_latency_seconds
                        .observe(gap / f64::from(new));
                }
            }
        } else if let Some(booking) = only_booking {
            booking.set_output_tokens(total, now);
        }
        self.observed_tokens = total;
    }

    /// Ends the response if the whole body has been read. The HTTP server does not poll a body of known
    /// length again after its last byte.
    fn end_if_complete(&mut self) {
        if self.inner.is_end_stream() {
            self.end();
        }
    }

    /// Returns whether the stream contained its end mark. The connection may be lost after that.
    fn is_done(&self) -> bool {
        matches!(&self.reader, ResponseReader::Events(observer) if observer.is_done())
    }

    /// Returns the usage that a stream has reported so far.
    fn reported_usage(&self) -> Option<Usage> {
        match &self.reader {
            ResponseReader::Events(observer) => observer.usage(),
            _ => None,
        }
    }

    /// Returns the record of the response's end. `usage` is that of the engine; `None` if the
    /// engine reported none.
    fn completion(&self, outcome: Outcome, usage: Option<Usage>) -> Completion {
        Completion {
            outcome,
            usage: usage.unwrap_or_default(),
            output_tokens: self.observed_tokens,
            output_tokens_by_choice: self.observed_by_choice.clone(),
            first_token: self.first_token,
        }
    }

    /// Ends a response that the worker completed: learns from its usage, records the completion and
    /// releases the bookings. They are completed, with the output, only if the outcome is
    /// [`Outcome::Ok`]; otherwise they are dropped. An error event in a stream makes the outcome a
    /// worker error. Has no effect if the end was recorded before.
    fn end(&mut self) {
        let Some(mut context) = self.context.take() else {
            return;
        };
        let (usage, output) = match &mut self.reader {
            ResponseReader::Json(chunks, _) => {
                let body = match chunks.as_slice() {
                    [whole] => whole.clone(),
                    parts => parts.concat().into(),
                };
                let output = context.wants_text().then(|| parse_output_text(&body));
                (parse_usage(&body), output.flatten())
            }
            ResponseReader::Events(observer) => (observer.usage(), observer.take_output()),
            ResponseReader::Unread => (None, None),
        };
        let shared = Arc::clone(&context.shared);
        let now = shared.clock.now();
        if matches!(&self.reader, ResponseReader::Events(observer) if observer.has_error()) {
            self.outcome = Outcome::WorkerError;
        }
        if let Some(usage) = usage {
            if let (ResponseReader::Json(..), Some(tokens)) =
                (&self.reader, usage.completion_tokens)
            {
                // For several choices, engines report only the sum.
                let choices = context.batch.prompt_count();
                for choice in 0..choices {
                    if let Some(booking) = context.batch.booking(choice) {
                        booking.set_output_tokens(tokens / choices as u32, now);
                    }
                }
                shared.metrics.output_tokens.inc_by(u64::from(tokens));
                self.observed_tokens = tokens;
            }
            context.learn_from_usage(usage);
        }
        context.record_completion(&self.completion(self.outcome, usage));
        if self.outcome == Outcome::Ok {
            let generated = usage.and_then(|usage| usage.completion_tokens);
            context.release_bookings(output, OutputEnd::Complete(generated));
        }
    }

    /// Ends a response whose connection to the worker was lost. Returns the error event that a
    /// stream ends with; `None` for other responses. Records the failure, drops the bookings and
    /// requests a health check of the worker. Has no effect and returns `None` if the end was
    /// recorded before.
    fn fail(&mut self, error: &hyper::Error) -> Option<Bytes> {
        let mut context = self.context.take()?;
        let error = UpstreamError::connection_lost(error);
        let name = &context.worker.config.name;
        warn_limited!(
            key: name, worker = %name, request = ?context.request_id, %error,
            "response of the worker broke off; the client gets an error"
        );
        context.record_completion(&self.completion(Outcome::WorkerFailed, self.reported_usage()));
        context.worker.probe_now.notify_one();
        let ResponseReader::Events(observer) = &self.reader else {
            return None;
        };
        let message = format!(
            "Worker {} failed in the middle of its response ({error}). Send the request again.",
            context.worker.config.name
        );
        let mut rest = Vec::new();
        if observer.is_mid_event() {
            rest.extend_from_slice(b"\n\n");
        }
        rest.extend(error_event(&ApiError::bad_gateway(message)));
        Some(rest.into())
    }
}

impl RequestContext {
    /// Reports the usage to the booking, the bytes-per-token ratios and the tokenizer's comparison.
    /// Counts that the engine did not report are ignored. Cached tokens reach the booking only if
    /// [`is_single`](Self::is_single).
    fn learn_from_usage(&mut self, usage: Usage) {
        if let (true, Some(cached)) = (self.is_single, usage.cached_tokens)
            && let Some(booking) = self.batch.booking(0)
        {
            booking.on_cached_tokens(cached);
        }
        if let Some(tokens) = usage.prompt_tokens {
            self.shared
                .text_ratios
                .observe(&self.model, self.prompt_bytes, tokens);
            if let (Some(tokenizer), Some(counted)) = (&self.shared.tokenizer, self.tokenizer_count)
            {
                tokenizer.compare(&self.model, counted, tokens, &self.shared.metrics);
            }
        }
    }
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        if let Some(mut context) = self.context.take() {
            context.record_completion(&self.completion(Outcome::ClientLeft, self.reported_usage()));
            if let ResponseReader::Events(observer) = &mut self.reader {
                context.release_bookings(observer.take_output(), OutputEnd::Abandoned);
            }
        }
    }
}

impl Body for TrackedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(frame) = self.buffered_frame.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.context.is_none() {
            return Poll::Ready(None);
        }
        Poll::Ready(
            match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
                Some(Ok(frame)) => {
                    self.read(&frame);
                    self.end_if_complete();
                    Some(Ok(frame))
                }
                Some(Err(_)) if self.is_done() => {
                    self.end();
                    None
                }
                Some(Err(error)) => match self.fail(&error) {
                    Some(rest) => Some(Ok(Frame::data(rest))),
                    None => Some(Err(error)),
                },
                None => {
                    self.end();
                    None
                }
            },
        )
    }

    fn is_end_stream(&self) -> bool {
        self.context.is_none() && self.buffered_frame.is_none()
    }
}
