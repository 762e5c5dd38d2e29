//! Watches a streamed answer pass: counts tokens, reads usage, notices the end.
//!
//! The bytes themselves are never touched. They may be cut anywhere: what is seen depends on the
//! bytes, not on where they were cut.

use foresee_core::batch::MOST_IN_BATCH;
use memchr::{memchr, memchr2};
use smallvec::SmallVec;

use crate::answer::Answer;
use crate::error::ApiError;
use crate::event::Event;
use crate::usage::Usage;

/// The longest event that is read. A longer one passes unread and counts as one token.
pub const MAX_EVENT_BYTES: usize = 1 << 20;

/// What some bytes brought, and how the stream stands after them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Output tokens that were not known of before.
    pub new_tokens: u32,
    /// Whether the stream has said that it is complete.
    pub done: bool,
    /// Whether the stream has reported an error.
    pub error: bool,
}

/// How one choice of an answer stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Its output tokens known of so far.
    pub tokens: u32,
    /// Whether nothing more of it will come.
    pub finished: bool,
}

/// Reads the event stream of one response as it passes.
///
/// A token is counted for each choice that an event adds text, reasoning or tool calls to. Where
/// the engine reports counts itself, those are believed: several tokens may share an event.
#[derive(Debug, Default)]
pub struct StreamObserver {
    /// The line that the bytes so far end in, if they end inside one; not all of it if too long.
    line: Vec<u8>,
    /// The data of the event so far, as far as it had to be kept from earlier bytes.
    data: Vec<u8>,
    event: OpenEvent,
    /// The last byte was `\r`: a `\n` that follows belongs to the same line end.
    after_cr: bool,
    tokens: u32,
    choices: SmallVec<[Progress; 1]>,
    usage: Option<Usage>,
    done: bool,
    error: bool,
    unread_events: u32,
    /// The text so far, if it is collected.
    answer: Option<Box<Answer>>,
}

/// What is known of an event whose end, a blank line, has not come yet.
#[derive(Debug, Default)]
struct OpenEvent {
    begun: bool,
    has_data: bool,
    is_error: bool,
    too_long: bool,
}

impl StreamObserver {
    /// An observer of a stream that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, and it collects the text of the first choice.
    #[must_use]
    pub fn collecting() -> Self {
        Self {
            answer: Some(Box::default()),
            ..Self::default()
        }
    }

    /// The text so far, if it was collected; it is collected no further.
    #[must_use]
    pub fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take().map(|answer| *answer)
    }

    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) -> Seen {
        let tokens_before = self.tokens;
        // The data of an event that lies whole in `bytes` is read where it is.
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
        Seen {
            new_tokens: self.tokens.saturating_sub(tokens_before),
            done: self.done,
            error: self.error,
        }
    }

    /// Output tokens known of so far, over all choices.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// How each choice stands, by its index; the last of [`MOST_IN_BATCH`] is all that follow.
    #[must_use]
    pub fn choices(&self) -> &[Progress] {
        &self.choices
    }

    /// The engine's latest report. Its prompt and cached tokens are the request's; its completion
    /// tokens are one choice's until the last report has come.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// Whether the stream has said that it is complete.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Whether the stream has reported an error.
    #[must_use]
    pub fn has_error(&self) -> bool {
        self.error
    }

    /// Whether the bytes so far end inside an event, so that it must be ended with a blank line
    /// before another can follow.
    #[must_use]
    pub fn mid_event(&self) -> bool {
        self.event.begun || !self.line.is_empty()
    }

    /// Events that were too long or were not understood. Each was counted as one token.
    #[must_use]
    pub fn unread_events(&self) -> u32 {
        self.unread_events
    }

    fn take_line<'l>(&mut self, line: &'l [u8], data_in_place: &mut Option<&'l [u8]>) {
        if line.is_empty() {
            return self.end_event(data_in_place.take());
        }
        self.event.begun = true;
        if line.len() > MAX_EVENT_BYTES {
            self.event.too_long = true;
            return;
        }
        // A line that begins with a colon is a comment: a field without a name.
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

    /// Keeps a piece of a line until the rest has come: at most one byte more than may be read.
    fn keep_line(&mut self, piece: &[u8]) {
        let room = (MAX_EVENT_BYTES + 1).saturating_sub(self.line.len());
        let kept = piece.get(..room).unwrap_or(piece);
        self.line.extend_from_slice(kept);
    }

    /// Keeps a line of data until the event's end has come.
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

    fn take_data(&mut self, data: &[u8], is_error: bool) {
        if data.trim_ascii() == b"[DONE]" {
            self.done = true;
            return;
        }
        self.error |= is_error;
        match Event::parse(data) {
            Some(event) => self.take_event(&event),
            None if is_error => {}
            None => self.take_unreadable(),
        }
    }

    fn take_event(&mut self, event: &Event<'_>) {
        self.error |= event.is_error;
        if let Some(answer) = &mut self.answer {
            answer.add(event);
        }
        for piece in &event.choices {
            let choice = self.choice(piece.index);
            choice.tokens = choice.tokens.saturating_add(piece.tokens);
            choice.finished |= piece.finished;
            self.tokens = self.tokens.saturating_add(piece.tokens);
        }
        let Some(usage) = event.usage else {
            return;
        };
        self.usage = Some(usage);
        let Some(reported) = usage.completion_tokens else {
            return;
        };
        // A report beside choices is about one of them. It can show that the count is too low,
        // but a higher count may well be right, for there may be other choices.
        match event.choices.as_slice() {
            [] => self.tokens = reported,
            [piece] => {
                let choice = self.choice(piece.index);
                choice.tokens = choice.tokens.max(reported);
                let tokens = self.choices.iter().map(|choice| choice.tokens);
                self.tokens = self.tokens.max(tokens.fold(0, u32::saturating_add));
            }
            _ => self.tokens = self.tokens.max(reported),
        }
    }

    fn choice(&mut self, index: u32) -> &mut Progress {
        let index = (index as usize).min(MOST_IN_BATCH - 1);
        if self.choices.len() <= index {
            self.choices.resize(index + 1, Progress::default());
        }
        &mut self.choices[index]
    }

    fn take_unreadable(&mut self) {
        self.tokens = self.tokens.saturating_add(1);
        self.unread_events = self.unread_events.saturating_add(1);
        if let Some(answer) = &mut self.answer {
            answer.close();
        }
    }
}

/// The bytes that end a stream which broke: the error as an event, then the end mark. If the
/// stream broke inside an event ([`StreamObserver::mid_event`]), send a blank line first.
#[must_use]
pub fn error_event(error: &ApiError) -> Vec<u8> {
    let mut event = b"data: ".to_vec();
    event.extend_from_slice(&error.to_json());
    event.extend_from_slice(b"\n\ndata: [DONE]\n\n");
    event
}
