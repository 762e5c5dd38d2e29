//! The output text of a response, and the cache blocks that it fills.
//!
//! Engines cache the tokens that they generate like the tokens of prompts, so the next turn of a
//! conversation finds the previous output in the cache. Only plain text that directly follows the
//! prompt counts as known: text after reasoning, tool calls or bytes that form no character is
//! ignored.
//!
//! An engine caches the token ids that it generated. The next turn contains the ids that a
//! tokenizer makes of the text. Where the two differ, the engine's cache is missed. Each event
//! shows where the ids it carried end in the text, which reveals the first difference: the router's
//! ids are trusted as long as they end where the engine's ids end.

use std::borrow::Cow;
use std::num::NonZeroU32;

use foresee_core::sequence::{PartialBlock, Sequence};
use serde_json::value::RawValue;

use crate::endpoint::Endpoint;
use crate::event::Event;
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::usage::{Usage, parse_usage};

/// Maximum output text that is kept, in bytes. Text after it counts as unknown.
pub const MAX_OUTPUT_TEXT_BYTES: usize = 256 << 10;

/// The character that engines put in place of bytes that form no character.
const REPLACEMENT_CHARACTER: char = '\u{FFFD}';

/// The output text of a response's first choice, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct OutputText {
    text: String,
    /// The end of each event's part of the text, in order.
    deltas: Vec<DeltaEnd>,
    /// Whether the output continues after `text` in a way that is not known.
    closed: bool,
    /// Whether the model or a stop word ended the output: then the engine generated at least one
    /// token after the last token of `text`.
    finished_by_stop: bool,
}

/// The end of one event's part of the text.
#[derive(Clone, Copy, Debug)]
struct DeltaEnd {
    /// Position in the text, in bytes.
    end: usize,
    /// Output tokens that the event carried.
    tokens: u32,
}

/// How the output of a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputEnd {
    /// The engine completed the output. Contains the number of generated tokens, if the engine
    /// reports it.
    Complete(Option<u32>),
    /// The client disconnected before the end.
    Abandoned,
}

/// Reads the output text in the body of a chat or text completion that is not streamed. Returns
/// `None` if the body cannot be parsed. A body without choices, such as an error, has an empty
/// output.
#[must_use]
pub fn parse_output_text(body: &[u8]) -> Option<OutputText> {
    parse_output_text_for(Endpoint::ChatCompletions, body)
}

/// Reads the output text in the body of a response of this API that is not streamed. Returns `None`
/// if the body cannot be parsed.
#[must_use]
pub fn parse_output_text_for(endpoint: Endpoint, body: &[u8]) -> Option<OutputText> {
    let mut output = OutputText::default();
    output.add(&Event::parse_body(endpoint.into(), body)?);
    Some(output)
}

/// Reads the output text and the usage in the body of a response of this API that is not streamed.
/// They are those of [`parse_output_text_for`] and [`parse_usage`], but the body is parsed once if it
/// has both.
#[must_use]
pub fn parse_output_and_usage(
    endpoint: Endpoint,
    body: &[u8],
) -> (Option<OutputText>, Option<Usage>) {
    let Some(event) = Event::parse_body(endpoint.into(), body) else {
        return (None, parse_usage(body));
    };
    let mut output = OutputText::default();
    output.add(&event);
    // The usage of an event of SGLang's API is that of one choice.
    let is_whole = endpoint != Endpoint::SglangGenerate;
    let usage = event.usage.filter(|_| is_whole);
    (Some(output), usage.or_else(|| parse_usage(body)))
}

impl OutputText {
    /// Returns the text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Marks all further output as unknown.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Adds the first choice's part of an event. Reasoning, text that is not a string, and tool
    /// calls close the output: text after them is ignored.
    pub(crate) fn add(&mut self, event: &Event<'_>) {
        let Some(delta) = event.choices.iter().find(|delta| delta.index == 0) else {
            return;
        };
        self.finished_by_stop |= delta.finished_by_stop;
        // Reasoning precedes the text of the same event.
        self.closed |= delta.has_reasoning;
        if self.closed {
            return;
        }
        if let Some(raw) = delta.text {
            match decode_json_string(raw) {
                Some(text) => self.add_text(&text, delta.tokens),
                None => self.closed = true,
            }
        }
        self.closed |= delta.has_tool_calls;
    }

    /// Adds the text of an event that carried `tokens` output tokens, up to the first replacement
    /// character. Closes the output at such a character, or before a text with which the output
    /// would exceed [`MAX_OUTPUT_TEXT_BYTES`].
    fn add_text(&mut self, text: &str, tokens: u32) {
        let known = text.split(REPLACEMENT_CHARACTER).next().unwrap_or_default();
        if self.text.len() + known.len() > MAX_OUTPUT_TEXT_BYTES {
            self.closed = true;
            return;
        }
        self.text.push_str(known);
        if known.len() < text.len() {
            self.closed = true;
            return;
        }
        self.deltas.push(DeltaEnd {
            end: self.text.len(),
            tokens,
        });
    }

    /// Returns how many of the router's leading ids the engine has cached. Counts no id after the
    /// first known difference between the engine's ids and the router's, and none at all if the
    /// engine reports another number of tokens and no event shows where the difference is.
    ///
    /// `lengths` contains the bytes of text that each of these ids stands for. The list may end
    /// before the text does; later ids are not counted.
    fn cached_ids(&self, lengths: &[usize], end: OutputEnd) -> usize {
        let generated = match end {
            OutputEnd::Complete(generated) => generated.map(|tokens| tokens as usize),
            OutputEnd::Abandoned => None,
        };
        let (mut ids, mut bytes) = (0, 0);
        // The ids before the first event whose token count differs from the number of the router's
        // ids for its text; `None` while there is no such event.
        let mut certain = None;
        // Ids up to the last position where an event's text and an id of the router both end.
        let mut agreed = 0;
        for delta in &self.deltas {
            while bytes < delta.end
                && let Some(length) = lengths.get(ids)
            {
                bytes += length;
                ids += 1;
            }
            if bytes != delta.end {
                return certain.unwrap_or(agreed);
            }
            if ids - agreed != delta.tokens as usize {
                // An event may carry several tokens, and these may differ from the router's ids.
                certain.get_or_insert(agreed);
            }
            agreed = ids;
        }
        if self.closed {
            return certain.unwrap_or(agreed);
        }
        // A token is cached when the one after it is computed, so the last token is not.
        let all = if self.finished_by_stop {
            agreed
        } else {
            agreed.saturating_sub(1)
        };
        match (generated, certain) {
            (Some(generated), _) if generated == agreed => all,
            // The token that ended the output has no text.
            (Some(generated), _) if generated == agreed + 1 && self.finished_by_stop => all,
            (_, Some(certain)) => certain,
            // The engine generated more or fewer tokens, at an unknown position inside an event.
            (Some(_), None) => 0,
            (None, None) => all,
        }
    }
}

/// Returns the text of a JSON string; `None` if the value is not a string.
fn decode_json_string(raw: &RawValue) -> Option<Cow<'_, str>> {
    let quoted = raw.get();
    let plain = quoted.strip_prefix('"')?.strip_suffix('"')?;
    if memchr::memchr(b'\\', plain.as_bytes()).is_none() {
        return Some(Cow::Borrowed(plain));
    }
    serde_json::from_str(quoted).ok().map(Cow::Owned)
}

/// The position in a prompt's sequence at which its output continues.
#[derive(Clone, Debug)]
pub struct Continuation {
    /// The last, incomplete block of the prompt.
    end: PartialBlock,
    content: Content,
}

/// The form in which an output extends its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Token ids.
    Tokens,
    /// Text.
    Text {
        /// Bytes between the prompt and the output.
        heading: &'static [u8],
        /// Bytes of one token, rounded up.
        bytes_per_token: usize,
    },
}

impl Continuation {
    /// Creates the continuation of a prompt that is hashed as token ids.
    pub(crate) fn from_tokens(end: PartialBlock) -> Self {
        Self {
            end,
            content: Content::Tokens,
        }
    }

    /// Creates the continuation of a prompt that is hashed as text. `heading` stands between the
    /// prompt and the output.
    pub(crate) fn from_text(
        end: PartialBlock,
        heading: &'static [u8],
        block_size: NonZeroU32,
    ) -> Self {
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

    /// Returns whether [`sequence`](Self::sequence) needs a tokenizer.
    #[must_use]
    pub fn is_token_based(&self) -> bool {
        self.content == Content::Tokens
    }

    /// Returns the sequence of the prompt and of the part of the output that the engine has
    /// certainly cached. Returns `None` if that part fills no further block, or if the output
    /// cannot be tokenised but must be.
    ///
    /// `prompt` must be the sequence of the prompt that this continuation was created for.
    /// `tokenizer` is used only if [`is_token_based`](Self::is_token_based).
    #[must_use]
    pub fn sequence(
        &self,
        prompt: &Sequence,
        output: &OutputText,
        end: OutputEnd,
        tokenizer: Option<&Tokenizer>,
    ) -> Option<Sequence> {
        let sequence = match self.content {
            Content::Tokens => {
                let tokenizer = tokenizer?;
                let ids = tokenizer
                    .encode(&output.text, SpecialTokens::AlreadyPresent)
                    .ok()?;
                let cached = output.cached_ids(&tokenizer.text_lengths(&ids), end);
                prompt.extended_with_tokens(&self.end, ids.get(..cached)?)
            }
            Content::Text {
                heading,
                bytes_per_token,
            } => {
                // A token is cached when the one after it is computed, so the last token is not.
                // How much of an abandoned output is cached is unknown: a block's bytes are left
                // out.
                let uncached_bytes = match end {
                    OutputEnd::Abandoned => self.end.bytes_per_block(),
                    OutputEnd::Complete(_) if output.finished_by_stop || output.closed => 0,
                    OutputEnd::Complete(_) => bytes_per_token,
                };
                let cached_bytes = output.text.len().saturating_sub(uncached_bytes);
                let text = &output.text.as_bytes()[..cached_bytes];
                prompt.extended_with_text(&self.end, &[heading, text].concat())
            }
        };
        (sequence.hashes().len() > prompt.hashes().len()).then_some(sequence)
    }
}
