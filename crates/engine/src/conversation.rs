//! A chat as bytes of which an earlier turn is an exact prefix.
//!
//! Tools come first, then each message's role, content and tool calls. What separates them is
//! bytes that no UTF-8 text contains, so two conversations have equal bytes only if they say the
//! same; and nothing in front of a text depends on its end (no lengths), so texts that begin
//! alike have bytes that begin alike.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::lenient::{AppendText, Gist};
use crate::request::Unmatched;

const MESSAGE: u8 = 0xFF;
const CONTENT: u8 = 0xFE;
const TOOL_CALLS: u8 = 0xFD;
const TOOLS: u8 = 0xFC;

/// What stands between a conversation's canonical bytes and its answer's text: followed by that
/// text, the bytes are those of the conversation with the answer as its next message.
pub const ANSWER_HEADING: &[u8] = b"\xffassistant\xfe";

/// The canonical bytes, written message by message.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    bytes: Vec<u8>,
    unmatched: Unmatched,
    /// Set by the first thing that is not text: nothing after it can be matched.
    matching_ended: bool,
    /// The message being read; here so that its buffers are reused.
    message: Message,
}

/// One message, its keys in any order.
#[derive(Debug, Default)]
struct Message {
    role: Vec<u8>,
    /// Text up to the first part that is not text.
    content: Vec<u8>,
    /// Whether there was such a part, and what followed.
    content_ended: bool,
    unmatched: Unmatched,
}

impl Conversation {
    /// The canonical bytes with `tools` (raw JSON) in front, and what could not be matched.
    pub(crate) fn finish(self, tools: Option<&RawValue>) -> (Vec<u8>, Unmatched) {
        let mut bytes = self.bytes;
        let tools = tools.map_or("", RawValue::get);
        if !matches!(tools, "" | "null" | "[]") {
            bytes.splice(0..0, tools.bytes().chain([TOOLS]));
        }
        (bytes, self.unmatched)
    }

    fn start_message(&mut self) {
        self.message.role.clear();
        self.message.clear_content();
    }

    fn end_message(&mut self, tool_calls: Option<&RawValue>) {
        let message = &self.message;
        let tool_calls = match tool_calls.map(RawValue::get) {
            None | Some("null" | "[]") => "",
            Some(raw) => raw,
        };
        if self.matching_ended {
            self.unmatched.bytes += message.role.len() + message.content.len() + tool_calls.len();
        } else {
            self.bytes.push(MESSAGE);
            self.bytes.extend_from_slice(&message.role);
            self.bytes.push(CONTENT);
            self.bytes.extend_from_slice(&message.content);
            if message.content_ended {
                self.matching_ended = true;
                self.unmatched.bytes += tool_calls.len();
            } else if !tool_calls.is_empty() {
                self.bytes.push(TOOL_CALLS);
                self.bytes.extend_from_slice(tool_calls.as_bytes());
            }
        }
        self.unmatched.bytes += message.unmatched.bytes;
        self.unmatched.tokens += message.unmatched.tokens;
    }
}

impl Message {
    fn clear_content(&mut self) {
        self.content.clear();
        self.content_ended = false;
        self.unmatched = Unmatched::default();
    }

    /// Takes back what a part appended as text at `start`, if the part cannot be matched.
    fn end_part(&mut self, start: usize, is_text: bool) {
        let text = self.content.len() - start;
        if !is_text {
            self.content_ended = true;
            self.unmatched.add_media();
        }
        if self.content_ended {
            self.content.truncate(start);
            self.unmatched.bytes += text;
        }
    }
}

/// Reads `messages`. A message's fields that are not known to reach the prompt are ignored.
pub(crate) struct Messages<'c>(pub(crate) &'c mut Conversation);

impl<'de> DeserializeSeed<'de> for Messages<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Messages<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array of message objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(OneMessage(&mut *self.0))?.is_some() {}
        Ok(())
    }
}

struct OneMessage<'c>(&'c mut Conversation);

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum MessageKey {
    Role,
    Content,
    ToolCalls,
    #[serde(other)]
    Other,
}

impl<'de> DeserializeSeed<'de> for OneMessage<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for OneMessage<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a message object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        self.0.start_message();
        let mut tool_calls = None;
        while let Some(key) = object.next_key()? {
            let message = &mut self.0.message;
            match key {
                MessageKey::Role => {
                    message.role.clear();
                    object.next_value_seed(AppendText(&mut message.role))?;
                }
                MessageKey::Content => {
                    message.clear_content();
                    object.next_value_seed(Content(message))?;
                }
                MessageKey::ToolCalls => tool_calls = Some(object.next_value::<&RawValue>()?),
                MessageKey::Other => {
                    object.next_value::<IgnoredAny>()?;
                }
            }
        }
        self.0.end_message(tool_calls);
        Ok(())
    }
}

/// A message's content: a string, or a list of parts. Anything else says nothing.
struct Content<'m>(&'m mut Message);

impl<'de> DeserializeSeed<'de> for Content<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Content<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string or an array of parts")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.content.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Part(&mut *self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        self.0.end_part(self.0.content.len(), false);
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
}

/// One part of a content: `{"type": "text", "text": …}`, a bare string, or what is not text.
struct Part<'m>(&'m mut Message);

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum PartKey {
    Text,
    #[serde(other)]
    Other,
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a content part, which is a string or an object")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        let start = self.0.content.len();
        self.0.content.extend_from_slice(text.as_bytes());
        self.0.end_part(start, true);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        let start = self.0.content.len();
        // A part is text if it has text, whatever it calls its type.
        let mut is_text = false;
        while let Some(key) = object.next_key()? {
            match key {
                PartKey::Text => {
                    self.0.content.truncate(start);
                    let text = object.next_value_seed(AppendText(&mut self.0.content))?;
                    is_text = matches!(text, Gist::Text(_));
                }
                PartKey::Other => {
                    object.next_value::<IgnoredAny>()?;
                }
            }
        }
        self.0.end_part(start, is_text);
        Ok(())
    }
}
