//! What an answer adds to its prompt: its text, collected as it passes, and the blocks it fills.
//!
//! Engines cache what they generate as they cache prompts, so the next turn of a conversation
//! finds its last answer there. Only plain text that follows the prompt is taken for known:
//! nothing behind reasoning, tool calls, or bytes that were no character.
//!
//! An engine caches the ids it generated, and the next turn's are those that a tokenizer makes of
//! the text. Where the two part, the engine's cache is missed. Each event shows where the ids it
//! carried end in the text, so the point is found: ids of ours are believed as far as they end
//! where the engine's do.

use std::borrow::Cow;
use std::num::NonZeroU32;

use foresee_core::sequence::{OpenEnd, Sequence};
use serde_json::value::RawValue;

use crate::event::Event;
use crate::tokenizer::{Framing, Tokenizer};

/// The most text that is kept; what follows counts as unknown.
pub const MAX_ANSWER_BYTES: usize = 256 << 10;

/// What stands in text for bytes that are no character.
const NO_CHARACTER: char = '\u{FFFD}';

/// The text of a response's first choice, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    text: String,
    /// Where each event's part of the text ends.
    marks: Vec<Mark>,
    /// What follows the text is not known.
    closed: bool,
    /// The model ended it, or a stop word did: something followed the last token of the text.
    stopped: bool,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    end: usize,
    /// Tokens that the event carried.
    tokens: u32,
}

/// How an answer came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it should, with so many tokens generated, if the engine says.
    Whole(Option<u32>),
    /// Its client left.
    Abandoned,
}

/// Reads the answer in the body of a response that is not a stream. `None` if it cannot be read.
#[must_use]
pub fn parse_answer(body: &[u8]) -> Option<Answer> {
    let mut answer = Answer::default();
    answer.add(&Event::parse(body)?);
    Some(answer)
}

impl Answer {
    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Nothing that follows is known.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Adds what an event says of the first choice.
    pub(crate) fn add(&mut self, event: &Event<'_>) {
        let Some(piece) = event.choices.iter().find(|piece| piece.index == 0) else {
            return;
        };
        self.stopped |= piece.stopped;
        // Reasoning came before the text of the same event.
        self.closed |= piece.reasons;
        if self.closed {
            return;
        }
        if let Some(raw) = piece.text {
            match unquote(raw) {
                Some(text) => self.add_text(&text, piece.tokens),
                None => self.closed = true,
            }
        }
        self.closed |= piece.calls_tools;
    }

    fn add_text(&mut self, text: &str, tokens: u32) {
        let known = text.split(NO_CHARACTER).next().unwrap_or_default();
        if self.text.len() + known.len() > MAX_ANSWER_BYTES {
            self.closed = true;
            return;
        }
        self.text.push_str(known);
        if known.len() < text.len() {
            self.closed = true;
            return;
        }
        self.marks.push(Mark {
            end: self.text.len(),
            tokens,
        });
    }

    /// How many of our ids the engine has stored. `lengths` are the bytes of text that each stands
    /// for.
    fn stored(&self, lengths: &[usize], end: End) -> usize {
        let generated = match end {
            End::Whole(generated) => generated.map(|tokens| tokens as usize),
            End::Abandoned => None,
        };
        let (mut ids, mut bytes) = (0, 0);
        // How far each event has been of as many ids of ours as it carried.
        let mut certain = None;
        let mut agreed = 0;
        for mark in &self.marks {
            while bytes < mark.end
                && let Some(length) = lengths.get(ids)
            {
                bytes += length;
                ids += 1;
            }
            if bytes != mark.end {
                return certain.unwrap_or(agreed);
            }
            if ids - agreed != mark.tokens as usize {
                // Several tokens may come in one event, and so may others than ours.
                certain.get_or_insert(agreed);
            }
            agreed = ids;
        }
        if self.closed {
            return certain.unwrap_or(agreed);
        }
        // The last one is not stored, as nothing followed it.
        let all = if self.stopped {
            agreed
        } else {
            agreed.saturating_sub(1)
        };
        match (generated, certain) {
            (Some(generated), _) if generated == agreed => all,
            // One that ends the answer has no text.
            (Some(generated), _) if generated == agreed + 1 && self.stopped => all,
            (_, Some(certain)) => certain,
            // Fewer of ours, or more, somewhere inside an event.
            (Some(_), None) => 0,
            (None, None) => all,
        }
    }
}

/// A JSON string's text; `None` if it is something else.
fn unquote(raw: &RawValue) -> Option<Cow<'_, str>> {
    let quoted = raw.get();
    let plain = quoted.strip_prefix('"')?.strip_suffix('"')?;
    if memchr::memchr(b'\\', plain.as_bytes()).is_none() {
        return Some(Cow::Borrowed(plain));
    }
    serde_json::from_str(quoted).ok().map(Cow::Owned)
}

/// Where in its prompt's sequence an answer goes.
#[derive(Clone, Debug)]
pub struct Continuation {
    end: OpenEnd,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Tokens,
    /// Text, with a heading between prompt and answer.
    Text {
        heading: &'static [u8],
        bytes_per_token: usize,
    },
}

impl Continuation {
    pub(crate) fn of_tokens(end: OpenEnd) -> Self {
        Self {
            end,
            content: Content::Tokens,
        }
    }

    pub(crate) fn of_text(end: OpenEnd, heading: &'static [u8], block_size: NonZeroU32) -> Self {
        let tokens = block_size.get() as usize;
        let bytes_per_token = end.bytes_per_block().div_ceil(tokens);
        Self {
            end,
            content: Content::Text {
                heading,
                bytes_per_token,
            },
        }
    }

    /// Whether it takes a tokenizer.
    #[must_use]
    pub fn is_of_tokens(&self) -> bool {
        self.content == Content::Tokens
    }

    /// The sequence of the prompt and what is surely stored of the answer; `None` if that fills no
    /// further block.
    #[must_use]
    pub fn sequence(
        &self,
        prompt: &Sequence,
        answer: &Answer,
        end: End,
        tokenizer: Option<&Tokenizer>,
    ) -> Option<Sequence> {
        let sequence = match self.content {
            Content::Tokens => {
                let tokenizer = tokenizer?;
                let ids = tokenizer.encode(&answer.text, Framing::InText).ok()?;
                let stored = answer.stored(&tokenizer.text_lengths(&ids), end);
                prompt.followed_by_tokens(&self.end, ids.get(..stored)?)
            }
            Content::Text {
                heading,
                bytes_per_token,
            } => {
                // The last token is not stored, as nothing followed it; and of an answer given
                // up, who knows how much.
                let unstored = match end {
                    End::Abandoned => self.end.bytes_per_block(),
                    End::Whole(_) if answer.stopped || answer.closed => 0,
                    End::Whole(_) => bytes_per_token,
                };
                let stored = answer.text.len().saturating_sub(unstored);
                let text = &answer.text.as_bytes()[..stored];
                prompt.followed_by_text(&self.end, &[heading, text].concat())
            }
        };
        (sequence.hashes().len() > prompt.hashes().len()).then_some(sequence)
    }
}
