//! An answer on its way through: passed on unchanged and unbuffered, read on the side.
//!
//! The body owns what the request has booked. When it is dropped, at its end or because the client
//! left, the bookings go with it, and so does the connection to the worker.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use foresee_core::batch::Batch;
use foresee_engine::answer::{Continuation, End, parse_answer};
use foresee_engine::error::ApiError;
use foresee_engine::request::Sequences;
use foresee_engine::stream::{StreamObserver, error_event};
use foresee_engine::usage::{Usage, parse_usage};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderValue, response};
use hyper::body::{Body, Frame, Incoming};

use crate::answered::Ending;
use crate::forward::ForwardError;
use crate::metrics::Outcome;
use crate::shared::Shared;
use crate::workers::Worker;

/// Longest body that is kept to read its `usage`.
const MAX_KEPT_BYTES: usize = 4 << 20;

/// What the answer is worth reading as.
#[derive(Debug)]
enum Reader {
    Events(StreamObserver),
    /// A JSON body, kept until its end; shared with what is sent, so nothing is copied.
    Json(Vec<Bytes>, usize),
    /// Compressed, too long, an error, or no JSON.
    Unread,
}

impl Reader {
    /// `collects`: the text of a stream is kept too.
    fn of(head: &response::Parts, collects: bool) -> Self {
        let content_type = head.headers.get(CONTENT_TYPE);
        let content_type = content_type.map_or(&b""[..], |value| value.as_bytes());
        if !head.status.is_success() || head.headers.contains_key(CONTENT_ENCODING) {
            Self::Unread
        } else if content_type.starts_with(b"text/event-stream") {
            Self::Events(if collects {
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

/// What must be known of a request to watch its answer.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) worker: Arc<Worker>,
    /// One booking for each choice; the last may stand for several.
    pub(crate) batch: Batch,
    pub(crate) arrived: Duration,
    /// What the client and the worker call the request.
    pub(crate) request_id: HeaderValue,
    pub(crate) model: String,
    /// It is one prompt with one answer, so that what is reported is said of it.
    pub(crate) is_single: bool,
    /// Tokens of all prompts, as far as they are known.
    pub(crate) prompt_tokens: u32,
    /// Where the answer goes in the prompt's sequence, if that can be known.
    pub(crate) continuation: Option<Continuation>,
    /// Tokens of the prompt that KV events say the worker has cached, if the answer can tell
    /// whether they are right.
    pub(crate) foretold: Option<u32>,
    /// Bytes of prompt text, to learn how many make a token; 0 if there is nothing to learn.
    pub(crate) prompt_bytes: usize,
    /// Tokens that our tokenizer counted in the prompt, if the engine ought to count the same.
    pub(crate) counted_tokens: Option<u32>,
    /// The prompts, if they are to be recorded.
    pub(crate) recorded: Option<Sequences>,
}

/// The body of an answer.
#[derive(Debug)]
pub(crate) struct Watched {
    inner: Incoming,
    /// What was read already and is sent before `inner` is asked again.
    waiting: Option<Frame<Bytes>>,
    reader: Reader,
    outcome: Outcome,
    counted_tokens: u32,
    /// The same for each choice, if there are several.
    counted_apart: Vec<u32>,
    first_token: Option<Duration>,
    last_token: Option<Duration>,
    /// Gone once the answer has ended.
    watch: Option<Watch>,
}

impl Watched {
    /// Whether the answer is a stream of events that went well so far.
    pub(crate) fn is_stream(head: &response::Parts) -> bool {
        matches!(Reader::of(head, false), Reader::Events(_))
    }

    /// `first` is what was already read of `body`.
    pub(crate) fn new(
        head: &response::Parts,
        body: Incoming,
        first: Option<Frame<Bytes>>,
        watch: Watch,
    ) -> Self {
        let outcome = if head.status.is_server_error() {
            Outcome::WorkerError
        } else if head.status.is_client_error() {
            Outcome::Refused
        } else {
            Outcome::Ok
        };
        let mut watched = Self {
            inner: body,
            waiting: None,
            reader: Reader::of(head, watch.wants_text()),
            outcome,
            counted_tokens: 0,
            counted_apart: Vec::new(),
            first_token: None,
            last_token: None,
            watch: Some(watch),
        };
        if let Some(frame) = first {
            watched.read(&frame);
            watched.waiting = Some(frame);
        }
        watched.end_if_complete();
        watched
    }

    fn read(&mut self, frame: &Frame<Bytes>) {
        let Some(data) = frame.data_ref() else {
            return;
        };
        let Some(watch) = &self.watch else {
            return;
        };
        let now = watch.shared.clock.now();
        watch.worker.heard(now);
        match &mut self.reader {
            Reader::Unread => {}
            Reader::Json(_, length) if *length + data.len() > MAX_KEPT_BYTES => {
                self.reader = Reader::Unread;
            }
            Reader::Json(chunks, length) => {
                *length += data.len();
                chunks.push(data.clone());
            }
            Reader::Events(observer) => {
                observer.feed(data);
                let tokens = observer.tokens();
                if watch.batch.prompts() > 1 {
                    self.count_apart(now);
                }
                self.count(tokens, now);
            }
        }
    }

    /// Brings each choice's booking to the output tokens it has by `now`.
    fn count_apart(&mut self, now: Duration) {
        let (Some(watch), Reader::Events(observer)) = (&mut self.watch, &self.reader) else {
            return;
        };
        let bookings = watch.batch.prompts();
        self.counted_apart.resize(bookings, 0);
        let choices = observer.choices().iter().zip(&mut self.counted_apart);
        for (index, (choice, counted)) in choices.enumerate() {
            if let Some(booking) = watch.batch.booking(index) {
                booking.tokens(choice.tokens.saturating_sub(*counted), now);
            }
            *counted = choice.tokens;
            if choice.finished && index + 1 < bookings {
                watch.batch.finish_one(index, now);
            }
        }
    }

    /// Brings the only booking to `total` output tokens, as of `now`, and counts them.
    fn count(&mut self, total: u32, now: Duration) {
        let Some(watch) = &mut self.watch else {
            return;
        };
        if total == self.counted_tokens {
            return;
        }
        let metrics = &watch.shared.metrics;
        let is_alone = watch.batch.prompts() == 1;
        let only = watch.batch.booking(0).filter(|_| is_alone);
        if let Some(new) = total.checked_sub(self.counted_tokens) {
            if let Some(booking) = only {
                booking.tokens(new, now);
            }
            metrics.output_tokens.inc_by(u64::from(new));
            match self.last_token.replace(now) {
                None => {
                    self.first_token = Some(now);
                    let waited = now.saturating_sub(watch.arrived);
                    metrics.time_to_first_token.observe(waited.as_secs_f64());
                }
                Some(last) => {
                    let gap = now.saturating_sub(last).as_secs_f64();
                    metrics.inter_token_latency.observe(gap / f64::from(new));
                }
            }
        } else if let Some(booking) = only {
            booking.set_tokens(total, now);
        }
        self.counted_tokens = total;
    }

    /// A body of known length is not asked for more once it has come whole.
    fn end_if_complete(&mut self) {
        if self.inner.is_end_stream() {
            self.end();
        }
    }

    /// Whether the answer has said that nothing follows: a connection may break after that.
    fn is_done(&self) -> bool {
        matches!(&self.reader, Reader::Events(observer) if observer.is_done())
    }

    /// What a stream has reported so far.
    fn reported(&self) -> Option<Usage> {
        match &self.reader {
            Reader::Events(observer) => observer.usage(),
            _ => None,
        }
    }

    fn ending(&self, outcome: Outcome, usage: Option<Usage>) -> Ending {
        Ending {
            outcome,
            usage: usage.unwrap_or_default(),
            output_tokens: self.counted_tokens,
            apart: self.counted_apart.clone(),
            first_token: self.first_token,
        }
    }

    /// The worker ended its answer as it should.
    fn end(&mut self) {
        let Some(mut watch) = self.watch.take() else {
            return;
        };
        let (usage, answer) = match &mut self.reader {
            Reader::Json(chunks, _) => {
                let body = match chunks.as_slice() {
                    [whole] => whole.clone(),
                    parts => parts.concat().into(),
                };
                let answer = watch.wants_text().then(|| parse_answer(&body));
                (parse_usage(&body), answer.flatten())
            }
            Reader::Events(observer) => (observer.usage(), observer.take_answer()),
            Reader::Unread => (None, None),
        };
        let shared = Arc::clone(&watch.shared);
        let now = shared.clock.now();
        if matches!(&self.reader, Reader::Events(observer) if observer.has_error()) {
            self.outcome = Outcome::WorkerError;
        }
        if let Some(usage) = usage {
            if let (Reader::Json(..), Some(tokens)) = (&self.reader, usage.completion_tokens) {
                // Of several choices only the sum is known.
                let choices = watch.batch.prompts();
                for choice in 0..choices {
                    if let Some(booking) = watch.batch.booking(choice) {
                        booking.set_tokens(tokens / choices as u32, now);
                    }
                }
                shared.metrics.output_tokens.inc_by(u64::from(tokens));
                self.counted_tokens = tokens;
            }
            watch.learn(usage);
        }
        watch.has_ended(&self.ending(self.outcome, usage));
        if self.outcome == Outcome::Ok {
            let generated = usage.and_then(|usage| usage.completion_tokens);
            watch.let_go(answer, End::Whole(generated));
        }
    }

    /// The connection to the worker broke. What the client gets instead of the rest.
    fn broke(&mut self, error: &hyper::Error) -> Option<Bytes> {
        let mut watch = self.watch.take()?;
        let error = ForwardError::broken(error);
        tracing::warn!(worker = %watch.worker.config.name, %error, "answer broke off");
        watch.has_ended(&self.ending(Outcome::WorkerFailed, self.reported()));
        watch.worker.suspect.notify_one();
        let Reader::Events(observer) = &self.reader else {
            return None;
        };
        let message = format!(
            "Worker {} failed in the middle of its answer ({error}). Send the request again.",
            watch.worker.config.name
        );
        let mut rest = Vec::new();
        if observer.mid_event() {
            rest.extend_from_slice(b"\n\n");
        }
        rest.extend(error_event(&ApiError::bad_gateway(message)));
        Some(rest.into())
    }
}

impl Watch {
    fn learn(&mut self, usage: Usage) {
        if let (true, Some(cached)) = (self.is_single, usage.cached_tokens)
            && let Some(booking) = self.batch.booking(0)
        {
            booking.observed_cached(cached);
        }
        if let Some(tokens) = usage.prompt_tokens {
            self.shared
                .text
                .observe(&self.model, self.prompt_bytes, tokens);
            if let (Some(ours), Some(counted)) = (&self.shared.tokens, self.counted_tokens) {
                ours.compare(&self.model, counted, tokens, &self.shared.metrics);
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(mut watch) = self.watch.take() {
            watch.has_ended(&self.ending(Outcome::ClientLeft, self.reported()));
            if let Reader::Events(observer) = &mut self.reader {
                watch.let_go(observer.take_answer(), End::Abandoned);
            }
        }
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(frame) = self.waiting.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.watch.is_none() {
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
                Some(Err(error)) => match self.broke(&error) {
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
        self.watch.is_none() && self.waiting.is_none()
    }
}
