//! Observes a worker's response for output tokens and usage, and keeps the bookings of its request in
//! step with it until the response has ended.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foresee_core::outlier::ExchangeResult;
use foresee_core::text_ratios::RatioChange;
use foresee_engine::error::ApiError;
use foresee_engine::output_text::{OutputEnd, OutputText, parse_output_and_usage};
use foresee_engine::request::Endpoint;
use foresee_engine::stream::{StreamObserver, parse_response_id};
use foresee_engine::usage::{Usage, parse_usage};

use crate::completion::Completion;
use crate::log_limit::warn_limited;
use crate::metrics::Outcome;
use crate::placement::affinity::Memory;
use crate::placement::request_context::RequestContext;

/// Maximum size of a JSON body that is kept to parse its `usage`.
const MAX_KEPT_BYTES: usize = 4 << 20;

/// Maximum size of a JSON body that is parsed on the I/O thread.
const MAX_INLINE_JSON_BYTES: usize = 256 << 10;

/// Form of a response's body, which decides how it is observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseForm {
    /// A stream of server-sent events.
    Events,
    /// One JSON document.
    Json,
    /// Not observed: compressed, an error, or of another type.
    Other,
    /// Passed on by a program other than the gateway, which reports its progress.
    Reported,
}

/// How a response is observed.
#[derive(Debug)]
enum ResponseReader {
    /// As a stream of server-sent events.
    Events(Box<StreamObserver>),
    /// As a JSON body: its chunks, kept until the end, and their total length in bytes. The chunks are
    /// shared with the frames sent to the client, so nothing is copied.
    Json(Vec<Bytes>, usize),
    /// Not at all.
    Unread,
    /// By reports of the program that passes it on: the token counts so far.
    Reported(Usage),
}

/// Observation of one response. It owns the bookings of the request: dropping it releases them as
/// those of a client that left.
#[derive(Debug)]
pub(crate) struct ResponseObserver {
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
    /// Longest time between two arrivals of output tokens.
    longest_gap: Duration,
    /// Bytes of the body so far.
    bytes: u64,
    /// Whether the data so far end with `[DONE]`, even if the event has no blank line after it.
    ends_with_mark: bool,
    /// Context of the request; `None` once the response has ended and was recorded.
    context: Option<Box<RequestContext>>,
}

impl ResponseObserver {
    /// Starts to observe a response of this form. `outcome` is that of a response that ends as it
    /// should.
    pub(crate) fn new(form: ResponseForm, outcome: Outcome, context: RequestContext) -> Self {
        let reader = match form {
            ResponseForm::Events => {
                let collects_text = context.wants_text();
                let observer = StreamObserver::for_endpoint(context.endpoint, collects_text);
                ResponseReader::Events(Box::new(observer))
            }
            ResponseForm::Json => ResponseReader::Json(Vec::new(), 0),
            ResponseForm::Other => ResponseReader::Unread,
            ResponseForm::Reported => ResponseReader::Reported(Usage::default()),
        };
        Self {
            reader,
            outcome,
            observed_tokens: 0,
            observed_by_choice: Vec::new(),
            first_token: None,
            last_token: None,
            longest_gap: Duration::ZERO,
            bytes: 0,
            ends_with_mark: false,
            context: Some(Box::new(context)),
        }
    }

    /// Returns whether the response has ended and was recorded.
    pub(crate) fn has_ended(&self) -> bool {
        self.context.is_none()
    }

    /// Returns the context of the request, unless the response has ended.
    pub(crate) fn context(&self) -> Option<&RequestContext> {
        self.context.as_deref()
    }

    /// Observes data before it is passed on. Data after the recorded end is ignored. Notes the
    /// activity of the worker. A JSON body longer than [`MAX_KEPT_BYTES`] is no longer read, so its
    /// usage remains unknown.
    pub(crate) fn on_data(&mut self, data: &Bytes) {
        let Some(context) = &mut self.context else {
            return;
        };
        let now = context.shared.clock.now();
        context.worker.liveness.note_activity(now);
        self.bytes += data.len() as u64;
        if let Some(trace) = &mut context.trace {
            trace.on_data(data);
        }
        match &mut self.reader {
            ResponseReader::Unread | ResponseReader::Reported(_) => {}
            ResponseReader::Json(_, length) if *length + data.len() > MAX_KEPT_BYTES => {
                self.reader = ResponseReader::Unread;
            }
            ResponseReader::Json(chunks, length) => {
                *length += data.len();
                chunks.push(data.clone());
            }
            ResponseReader::Events(observer) => {
                observer.feed(data);
                self.ends_with_mark = data.trim_ascii_end().ends_with(b"[DONE]");
                let tokens = observer.tokens();
                if context.batch.prompt_count() > 1 {
                    self.observe_choices(now);
                }
                self.observe_tokens(tokens, now);
            }
        }
    }

    /// Observes a [reported](ResponseForm::Reported) response: the token counts so far, of which
    /// those that are `None` are unchanged, and whether the first output token has arrived, which
    /// any number of output tokens implies. Notes the activity of the worker. Has no effect after
    /// the recorded end, or on a response of another form.
    pub(crate) fn on_report(&mut self, counts: Usage, has_first_token: bool) {
        let (Some(context), ResponseReader::Reported(usage)) =
            (&mut self.context, &mut self.reader)
        else {
            return;
        };
        *usage = Usage {
            prompt_tokens: counts.prompt_tokens.or(usage.prompt_tokens),
            completion_tokens: counts.completion_tokens.or(usage.completion_tokens),
            cached_tokens: counts.cached_tokens.or(usage.cached_tokens),
        };
        let now = context.shared.clock.now();
        context.worker.liveness.note_activity(now);
        if let Some(total) = counts.completion_tokens {
            if context.batch.prompt_count() > 1 {
                context.set_output_sum(total, now);
            }
            self.observe_tokens(total, now);
        }
        if has_first_token {
            self.observe_first_token(now);
        }
    }

    /// Records that the first output token has arrived, at `now`, whose number is not known. Has no
    /// effect after output tokens were observed.
    fn observe_first_token(&mut self, now: Duration) {
        let Some(context) = self.context.as_mut().filter(|_| self.last_token.is_none()) else {
            return;
        };
        for choice in 0..context.batch.prompt_count() {
            if let Some(booking) = context.batch.booking(choice) {
                booking.on_first_token(now);
            }
        }
        self.note_tokens(1, now);
    }

    /// Measures the time to the first output token, or the time between output tokens: `new` of them
    /// arrived at `now`.
    fn note_tokens(&mut self, new: u32, now: Duration) {
        let Some(context) = &self.context else {
            return;
        };
        let metrics = &context.shared.metrics;
        match self.last_token.replace(now) {
            None => {
                self.first_token = Some(now);
                let waited = now.saturating_sub(context.arrived_at);
                metrics.observe_first_token(waited, context.exemplar());
            }
            Some(last) => {
                let gap = now.saturating_sub(last);
                metrics
                    .inter_token_latency_seconds
                    .observe(gap.as_secs_f64() / f64::from(new));
                self.longest_gap = self.longest_gap.max(gap);
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
            self.note_tokens(new, now);
        } else if let Some(booking) = only_booking {
            booking.set_output_tokens(total, now);
        }
        self.observed_tokens = total;
    }

    /// Returns whether the stream contained its end mark. The connection may be lost after that.
    pub(crate) fn is_done(&self) -> bool {
        matches!(&self.reader, ResponseReader::Events(observer) if observer.is_done())
    }

    /// Returns whether the response is a stream that contained neither its end mark nor the end of
    /// its outputs. The end of a stream of an unknown API is unknown, unless it has outputs.
    fn is_cut_short(&self) -> bool {
        let ResponseReader::Events(observer) = &self.reader else {
            return false;
        };
        let choices = observer.choices();
        let endpoint = self.context.as_ref().map(|context| context.endpoint);
        if endpoint == Some(Endpoint::Other) && choices.is_empty() {
            return false;
        }
        let has_finished = !choices.is_empty() && choices.iter().all(|choice| choice.finished);
        let is_complete = observer.is_done() || self.ends_with_mark || has_finished;
        !is_complete && !observer.has_error()
    }

    /// Returns the usage that a stream has reported so far.
    fn reported_usage(&self) -> Option<Usage> {
        match &self.reader {
            ResponseReader::Events(observer) => observer.usage(),
            ResponseReader::Reported(usage) => Some(*usage),
            ResponseReader::Json(..) | ResponseReader::Unread => None,
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
            last_token: self.last_token,
            longest_gap: self.longest_gap,
            bytes: self.bytes,
        }
    }

    /// Ends a response whose body is complete: learns from its usage, records the completion and
    /// releases the bookings. A stream without its end mark ends with an error event, which is
    /// returned. A long JSON body is parsed in the parse pool, and the bookings are released after
    /// that. Has no effect if the end was recorded before.
    pub(crate) fn end(&mut self) -> Option<Bytes> {
        let context = self.context.as_ref()?;
        if self.outcome == Outcome::Ok && self.is_cut_short() {
            let error = "connection lost: the stream has no end mark";
            return self.fail(&error, ExchangeResult::SoftFailure);
        }
        let is_long = matches!(&self.reader, ResponseReader::Json(_, length) if *length > MAX_INLINE_JSON_BYTES);
        if is_long {
            let shared = Arc::clone(&context.shared);
            let mut ended = Self {
                reader: std::mem::replace(&mut self.reader, ResponseReader::Unread),
                observed_by_choice: std::mem::take(&mut self.observed_by_choice),
                context: self.context.take(),
                ..*self
            };
            shared.parse_pool.spawn(move || ended.complete());
        } else {
            self.complete();
        }
        None
    }

    /// Records a complete response and releases the bookings. They are completed, with the output,
    /// only if the outcome is [`Outcome::Ok`]; otherwise they are dropped. An error event in a stream
    /// makes the outcome a worker error.
    fn complete(&mut self) {
        let Some(mut context) = self.context.take() else {
            return;
        };
        let shared = Arc::clone(&context.shared);
        let (usage, output, response_id) = self.read_whole(&context);
        let now = shared.clock.now();
        if matches!(&self.reader, ResponseReader::Events(observer) if observer.has_error()) {
            self.outcome = Outcome::WorkerError;
            context.batch.report(ExchangeResult::SoftFailure, now);
        } else if self.outcome != Outcome::WorkerError && self.observed_tokens == 0 {
            // The first token of a stream has reported this already.
            context.batch.report(ExchangeResult::Success, now);
        }
        if context.worker.was_ejected() || self.outcome == Outcome::WorkerError {
            context
                .worker
                .note_ejection(&shared.router, &shared.metrics);
        }
        if let Some(id) = response_id {
            let memory = Memory::Response(&id);
            shared.affinity.remember(memory, context.worker.id, now);
        }
        if let Some(usage) = usage {
            if let (ResponseReader::Json(..), Some(tokens)) =
                (&self.reader, usage.completion_tokens)
            {
                context.set_output_sum(tokens, now);
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

    /// Returns the usage, the output text and the id of a complete response, as far as they are
    /// known and wanted.
    fn read_whole(
        &mut self,
        context: &RequestContext,
    ) -> (Option<Usage>, Option<OutputText>, Option<String>) {
        match &mut self.reader {
            ResponseReader::Json(chunks, _) => {
                let body = match chunks.as_slice() {
                    [whole] => whole.clone(),
                    parts => parts.concat().into(),
                };
                let (output, usage) = match context.wants_text() {
                    true => parse_output_and_usage(context.endpoint, &body),
                    false => (None, parse_usage(&body)),
                };
                let has_id = context.endpoint == Endpoint::Responses;
                let id = has_id.then(|| parse_response_id(&body)).flatten();
                (usage, output, id)
            }
            ResponseReader::Events(observer) => {
                let id = observer.response_id().map(str::to_owned);
                (observer.usage(), observer.take_output(), id)
            }
            ResponseReader::Reported(usage) => (Some(*usage), None, None),
            ResponseReader::Unread => (None, None, None),
        }
    }

    /// Ends a response that the worker did not complete, because of `error`. Returns the error event
    /// that a stream ends with; `None` for other responses. Records the failure, reports `result` to
    /// the router, drops the bookings and requests a health check of the worker. Has no effect and
    /// returns `None` if the end was recorded before.
    pub(crate) fn fail(
        &mut self,
        error: &dyn fmt::Display,
        result: ExchangeResult,
    ) -> Option<Bytes> {
        let mut context = self.context.take()?;
        let name = &context.worker.config.name;
        warn_limited!(
            key: name, worker = %name, request = ?context.request_id, %error,
            "response of the worker broke off; the client gets an error"
        );
        let shared = &context.shared;
        context.batch.report(result, shared.clock.now());
        context
            .worker
            .note_ejection(&shared.router, &shared.metrics);
        context.record_completion(&self.completion(Outcome::WorkerFailed, self.reported_usage()));
        context.worker.probe_now.notify_one();
        let mut message =
            "The worker failed in the middle of its response. Send the request again.".to_owned();
        if context.shared.exposes_workers {
            message += &format!(" Worker {}: {error}.", context.worker.config.name);
        }
        self.error_event(context.endpoint, &ApiError::bad_gateway(message))
    }

    /// Ends a stream because the gateway shuts down, and returns the event with `error` that it ends
    /// with. Drops the bookings. Returns `None` and has no effect for other responses, and after the
    /// end mark of a stream.
    pub(crate) fn shut_down(&mut self, error: &ApiError) -> Option<Bytes> {
        let context = self.context.as_ref()?;
        if self.is_done() {
            return None;
        }
        let rest = self.error_event(context.endpoint, error)?;
        let mut context = self.context.take()?;
        context.record_completion(&self.completion(Outcome::ShutDown, self.reported_usage()));
        Some(rest)
    }

    /// Ends a response of which nothing more is observed: records `outcome` and drops the bookings.
    /// Has no effect if the end was recorded before.
    pub(crate) fn release(&mut self, outcome: Outcome) {
        if let Some(mut context) = self.context.take() {
            context.record_completion(&self.completion(outcome, self.reported_usage()));
        }
    }

    /// Returns the bytes that end a stream with an error event, after the event that the bytes so far
    /// may have begun; `None` for other responses.
    fn error_event(&self, endpoint: Endpoint, error: &ApiError) -> Option<Bytes> {
        let ResponseReader::Events(observer) = &self.reader else {
            return None;
        };
        let mut rest = Vec::new();
        if observer.is_mid_event() {
            rest.extend_from_slice(b"\n\n");
        }
        rest.extend(error.to_stream_event(endpoint));
        Some(rest.into())
    }
}

impl RequestContext {
    /// Sets the output tokens of all choices so far to `sum`, in equal parts: for several choices,
    /// engines report only the sum.
    fn set_output_sum(&mut self, sum: u32, now: Duration) {
        let choices = self.batch.prompt_count();
        for choice in 0..choices {
            if let Some(booking) = self.batch.booking(choice) {
                booking.set_output_tokens(sum / choices as u32, now);
            }
        }
    }

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
            let text_ratios = &self.shared.text_ratios;
            let change = text_ratios.observe(&self.model, self.prompt_bytes, tokens);
            if let Some(RatioChange { before, now }) = change {
                tracing::info!(
                    model = %self.model, before, now,
                    "bytes-per-token estimate changed; text-based prefix hashes were reset for \
                     this model"
                );
            }
            if let (Some(tokenizer), Some(counted)) = (&self.shared.tokenizer, self.tokenizer_count)
            {
                tokenizer.compare(&self.model, counted, tokens, &self.shared.metrics);
            }
        }
    }
}

impl Drop for ResponseObserver {
    fn drop(&mut self) {
        if let Some(mut context) = self.context.take() {
            context.record_completion(&self.completion(Outcome::ClientLeft, self.reported_usage()));
            if let ResponseReader::Events(observer) = &mut self.reader {
                context.release_bookings(observer.take_output(), OutputEnd::Abandoned);
            }
        }
    }
}
