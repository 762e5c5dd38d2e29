//! Observes a streamed response: counts tokens, reads usage and detects the end.
//!
//! The observer never changes the bytes. They may arrive in chunks of any size: the result depends
//! on the bytes, not on the chunk boundaries.

use foresee_core::batch::MAX_BATCH_PROMPTS;
use memchr::{memchr, memchr2};
use smallvec::SmallVec;

use crate::endpoint::Endpoint;
use crate::error::ApiError;
use crate::event::repeated::RepeatedEvent;
use crate::event::{Event, EventFormat, UsageScope};
use crate::output_text::OutputText;
use crate::usage::Usage;

/// Maximum length of an event that is parsed, in bytes. A longer event is not parsed and counts as
/// one token.
pub const MAX_EVENT_BYTES: usize = 1 << 20;

/// Maximum length of a response id or session key that is kept, in bytes.
pub const MAX_ID_BYTES: usize = 256;

/// The effect of a chunk of bytes, and the state of the stream after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Output tokens that the chunk added to the count.
    pub new_tokens: u32,
    /// Whether the stream has reported that it is complete.
    pub done: bool,
    /// Whether the stream has reported an error.
    pub error: bool,
}

/// Progress of one choice of a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChoiceProgress {
    /// Output tokens counted so far.
    pub tokens: u32,
    /// Whether the engine has ended the choice: no output of it follows.
    pub finished: bool,
}

/// Reads the event stream of one response while its bytes pass.
///
/// An event counts as one token for each choice to which it adds text, reasoning or tool calls.
/// Token ids and counts that the engine reports take precedence, because several tokens may share
/// an event. The typed events of the Responses and Messages APIs are reduced to the same counts, as
/// one choice.
#[derive(Debug, Default)]
pub struct StreamObserver {
    /// The form of the events.
    format: EventFormat,
    /// The unfinished line at the end of the bytes so far, truncated if it is too long.
    line: Vec<u8>,
    /// Data of the current event, as far as it had to be copied from earlier chunks or lines.
    data: Vec<u8>,
    /// The event that is being received.
    event: OpenEvent,
    /// Form of the last event that was parsed and only added text, as most events do.
    repeated: Option<Box<RepeatedEvent>>,
    /// Whether the last byte was `\r`: a `\n` that follows belongs to the same line end.
    after_cr: bool,
    /// Output tokens counted so far, over all choices.
    tokens: u32,
    /// Progress of each choice, by its index.
    choices: SmallVec<[ChoiceProgress; 1]>,
    /// The engine's latest usage report.
    usage: Option<Usage>,
    /// Whether the mark of the end was received.
    done: bool,
    /// Whether an error was reported.
    error: bool,
    /// Events that were too long or could not be parsed.
    unread_events: u32,
    /// Text of the first choice, if it is collected.
    output: Option<Box<OutputText>>,
    /// Id of the response, if its API stores responses.
    response_id: Option<String>,
}

/// An event whose end, a blank line, has not been received yet.
#[derive(Debug, Default)]
struct OpenEvent {
    /// Whether a line of the event was received.
    started: bool,
    /// Whether the event has a `data` line.
    has_data: bool,
    /// Whether the event's type is `error`.
    is_error: bool,
    /// Whether the event exceeds [`MAX_EVENT_BYTES`].
    too_long: bool,
}

impl StreamObserver {
    /// Creates an observer for a stream of chat or text completions of which nothing was received.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an observer that also collects the text of the first choice.
    #[must_use]
    pub fn collecting() -> Self {
        Self::for_endpoint(Endpoint::ChatCompletions, true)
    }

    /// Creates an observer for a stream of this API of which nothing was received. `collects_text`:
    /// it also collects the text of the first choice.
    #[must_use]
    pub fn for_endpoint(endpoint: Endpoint, collects_text: bool) -> Self {
        Self {
            format: endpoint.into(),
            output: collects_text.then(Box::default),
            ..Self::default()
        }
    }

    /// Returns the text collected so far and stops collecting; `None` if no text is collected.
    #[must_use]
    pub fn take_output(&mut self) -> Option<OutputText> {
        self.output.take().map(|output| *output)
    }

    /// Processes the next bytes of the stream. An event counts when the blank line that ends it
    /// arrives.
    ///
    /// Returns the increase of the token count, or 0 if a usage report lowered it, and the state of
    /// the stream as a whole: `done` and `error` remain true.
    pub fn feed(&mut self, bytes: &[u8]) -> Observed {
        let tokens_before = self.tokens;
        // The data of an event that lies completely in `bytes` is parsed without a copy.
        let mut data_in_place = None;
        let mut rest = bytes;
        loop {
            if self.after_cr && !rest.is_empty() {
                self.after_cr = false;
                rest = rest.strip_prefix(b"\n").unwrap_or(rest);
            }
            let Some(end) = memchr2(b'\n', b'\r', rest) else {
                break;
            };
            let (line, line_end) = rest.split_at(end);
            self.after_cr = line_end.first() == Some(&b'\r');
            rest = line_end.get(1..).unwrap_or_default();
            if self.line.is_empty() {
                self.take_line(line, &mut data_in_place);
            } else {
                self.keep_line(line);
                self.take_kept_line();
            }
        }
        self.keep_line(rest);
        if let Some(data) = data_in_place {
            self.keep_data(data);
        }
        Observed {
            new_tokens: self.tokens.saturating_sub(tokens_before),
            done: self.done,
            error: self.error,
        }
    }

    /// Returns the output tokens counted so far, over all choices.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Returns the progress of each choice, by its index. Choices after the first
    /// [`MAX_BATCH_PROMPTS`] are added to the last of these.
    #[must_use]
    pub fn choices(&self) -> &[ChoiceProgress] {
        &self.choices
    }

    /// Returns the engine's latest usage report. Its prompt and cached tokens belong to the whole
    /// request; its completion tokens belong to one choice until the last report was received.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// Returns whether the stream has reported that it is complete: by `[DONE]`, by
    /// `response.completed`, `response.incomplete` or `response.failed` of the Responses API, by
    /// `message_stop` of the Messages API, or by an `error` event of these two.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Returns whether the stream has reported an error.
    #[must_use]
    pub fn has_error(&self) -> bool {
        self.error
    }

    /// Returns the id of the response, by which a later request can refer to it; `None` unless the
    /// stream is one of the Responses API and its first event was received. Ids longer than
    /// [`MAX_ID_BYTES`] are ignored.
    #[must_use]
    pub fn response_id(&self) -> Option<&str> {
        self.response_id.as_deref()
    }

    /// Returns whether the bytes so far end inside an event. That event must be ended with a blank
    /// line before another event can follow.
    #[must_use]
    pub fn is_mid_event(&self) -> bool {
        self.event.started || !self.line.is_empty()
    }

    /// Returns the number of events that were too long or could not be parsed. Each counts as one
    /// token.
    #[must_use]
    pub fn unread_events(&self) -> u32 {
        self.unread_events
    }

    /// Processes one line; an empty line ends the event. Data that need not be copied is returned
    /// through `data_in_place`, which may already contain the data of an earlier line of the event.
    fn take_line<'l>(&mut self, line: &'l [u8], data_in_place: &mut Option<&'l [u8]>) {
        if line.is_empty() {
            return self.end_event(data_in_place.take());
        }
        self.event.started = true;
        if line.len() > MAX_EVENT_BYTES {
            self.event.too_long = true;
            return;
        }
        // A line that starts with a colon is a comment: a field without a name.
        let (field, value) = match memchr(b':', line) {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, [].as_slice()),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"data" if self.event.has_data => {
                if let Some(data) = data_in_place.take() {
                    self.keep_data(data);
                }
                self.keep_data(value);
            }
            b"data" => {
                self.event.has_data = true;
                *data_in_place = Some(value);
            }
            b"event" => self.event.is_error = value == b"error",
            _ => {}
        }
    }

    /// Processes the buffered line, which is complete now, and clears the buffer.
    ///
    /// A field of the line is added to the pending event, which counts only once the blank line after
    /// it has arrived.
    fn take_kept_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let mut data = None;
        self.take_line(&line, &mut data);
        if let Some(data) = data {
            self.keep_data(data);
        }
        self.line = line;
        self.line.clear();
    }

    /// Buffers a fragment of a line until the line is complete. The buffer holds at most one byte
    /// more than the longest event that is parsed, so that a line that is too long shows.
    fn keep_line(&mut self, fragment: &[u8]) {
        let free_bytes = (MAX_EVENT_BYTES + 1).saturating_sub(self.line.len());
        let kept = fragment.get(..free_bytes).unwrap_or(fragment);
        self.line.extend_from_slice(kept);
    }

    /// Buffers a line of data until the event is complete. Marks the event as too long, and drops
    /// the line, if the data would exceed [`MAX_EVENT_BYTES`].
    fn keep_data(&mut self, line: &[u8]) {
        if self.data.len() + line.len() >= MAX_EVENT_BYTES {
            self.event.too_long = true;
            return;
        }
        if !self.data.is_empty() {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(line);
    }

    /// Processes a complete event and prepares for the next one. Its data is in `data_in_place`, or
    /// else in the buffer. An event without data is ignored.
    fn end_event(&mut self, data_in_place: Option<&[u8]>) {
        let event = std::mem::take(&mut self.event);
        let kept = std::mem::take(&mut self.data);
        if event.too_long {
            self.take_unreadable();
        } else if event.has_data {
            let data = data_in_place.unwrap_or(&kept);
            self.take_data(data, event.is_error);
        }
        self.data = kept;
        self.data.clear();
    }

    /// Processes the data of an event whose type was `error` if `is_error`. The data of such an
    /// event need not be JSON; any other data that cannot be parsed counts as an unread event.
    fn take_data(&mut self, data: &[u8], is_error: bool) {
        if data.trim_ascii() == b"[DONE]" {
            self.done = true;
            return;
        }
        self.error |= is_error;
        let repeated = self.repeated.as_ref();
        if let Some(event) = repeated.and_then(|repeated| repeated.read(data)) {
            return self.take_event(&event);
        }
        match Event::parse(self.format, data) {
            Some(event) => {
                self.take_event(&event);
                if let Some(repeated) = RepeatedEvent::of(&event, data) {
                    self.repeated = Some(Box::new(repeated));
                }
            }
            None if is_error => {}
            None => self.take_unreadable(),
        }
    }

    /// Adds a parsed event to the counts, to the collected text and to the latest usage. A usage
    /// report for the whole request replaces the token count; a report for one choice can only
    /// raise it.
    fn take_event(&mut self, event: &Event<'_>) {
        self.error |= event.is_error;
        self.done |= event.is_last;
        if let Some(id) = event
            .response_id
            .as_deref()
            .filter(|id| id.len() <= MAX_ID_BYTES)
        {
            self.response_id = Some(id.to_owned());
        }
        if let Some(output) = &mut self.output {
            output.add(event);
        }
        for delta in &event.choices {
            let choice = self.choice(delta.index);
            choice.tokens = choice.tokens.saturating_add(delta.tokens);
            choice.finished |= delta.finished;
            self.tokens = self.tokens.saturating_add(delta.tokens);
        }
        let Some(usage) = event.usage else {
            return;
        };
        self.usage = Some(usage.or(self.usage));
        let Some(reported) = usage.completion_tokens else {
            return;
        };
        // Usage of one choice can prove that the total is too low, but not that it is too high,
        // because other choices may account for the difference.
        match (event.usage_scope, event.choices.as_slice()) {
            (UsageScope::Response, _) => self.tokens = reported,
            (UsageScope::Choice, [delta]) => {
                let choice = self.choice(delta.index);
                choice.tokens = choice.tokens.max(reported);
                let tokens = self.choices.iter().map(|choice| choice.tokens);
                self.tokens = self.tokens.max(tokens.fold(0, u32::saturating_add));
            }
            (UsageScope::Choice, _) => self.tokens = self.tokens.max(reported),
        }
    }

    /// Returns the progress of a choice, which is created if it is new. Choices after the first
    /// [`MAX_BATCH_PROMPTS`] share the last of these.
    fn choice(&mut self, index: u32) -> &mut ChoiceProgress {
        let index = (index as usize).min(MAX_BATCH_PROMPTS - 1);
        if self.choices.len() <= index {
            self.choices.resize(index + 1, ChoiceProgress::default());
        }
        &mut self.choices[index]
    }

    /// Counts an event that cannot be parsed as one token. Text after it is unknown.
    fn take_unreadable(&mut self) {
        self.tokens = self.tokens.saturating_add(1);
        self.unread_events = self.unread_events.saturating_add(1);
        if let Some(output) = &mut self.output {
            output.close();
        }
    }
}

/// Reads the id of a stored response in a body of the Responses API that is not streamed; `None` if
/// there is none, or it is longer than [`MAX_ID_BYTES`].
#[must_use]
pub fn parse_response_id(body: &[u8]) -> Option<String> {
    let event = Event::parse_body(Endpoint::Responses.into(), body)?;
    let id = event.response_id?;
    (id.len() <= MAX_ID_BYTES).then(|| id.into_owned())
}

/// Returns the bytes that end a broken stream of a chat or text completion; see
/// [`ApiError::to_stream_event`] for the other APIs.
#[must_use]
pub fn error_event(error: &ApiError) -> Vec<u8> {
    error.to_stream_event(Endpoint::ChatCompletions)
}
