//! Canonical bytes of a chat, of which the bytes of an earlier turn are an exact prefix.
//!
//! Tools come first, then each message's role, content and tool calls. They are separated by bytes
//! that no UTF-8 text contains, so two conversations have equal bytes only if their contents are
//! equal. No byte before a text depends on the text's end (there are no lengths), so conversations
//! with a common start have a common prefix of bytes.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::chat_message::{self, strip_billing_header};
use crate::loose_value::{AppendText, LooseValue};
use crate::media::hash_media;
use crate::prompt::UnhashedInput;

/// Starts a message; followed by its role.
const MESSAGE_MARK: u8 = 0xFF;
/// Precedes the content of a message.
const CONTENT_MARK: u8 = 0xFE;
/// Precedes the tool calls of a message, as raw JSON.
const TOOL_CALLS_MARK: u8 = 0xFD;
/// Ends the tools, as raw JSON, with which the canonical bytes start.
const TOOLS_MARK: u8 = 0xFC;

/// The bytes between the canonical bytes of a conversation and the text of its output. All three
/// together are the canonical bytes of the conversation with the output as its next message.
pub const ASSISTANT_HEADING: &[u8] = b"\xffassistant\xfe";

/// Writes the canonical bytes of a conversation, message by message.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    /// The canonical bytes so far.
    bytes: Vec<u8>,
    /// Size of the input that is not part of `bytes`.
    unhashed: UnhashedInput,
    /// Whether a part that is not text was found: no input after it can be matched.
    matching_ended: bool,
    /// The message being parsed; a field, so that its buffers are reused.
    message: Message,
}

/// One message, whose keys may come in any order.
#[derive(Debug, Default)]
struct Message {
    role: Vec<u8>,
    /// Text before the first part that is not text.
    content: Vec<u8>,
    /// Whether there was a part that is not text.
    content_ended: bool,
    /// Size of the parts that are not in `content`.
    unhashed: UnhashedInput,
    /// Hash of the first image or other media part of the conversation.
    media_hash: Option<u64>,
}

impl Conversation {
    /// Returns the conversation of messages that were converted from another API. Their tool calls
    /// are written in compact JSON.
    pub(crate) fn of_messages(messages: &[chat_message::Message]) -> Self {
        let mut conversation = Self::default();
        for message in messages {
            conversation.start_message();
            let current = &mut conversation.message;
            current.role.extend_from_slice(message.role.as_bytes());
            match &message.content {
                None => {}
                Some(chat_message::Content::Text(text)) => {
                    current.content.extend_from_slice(text.as_bytes());
                }
                Some(chat_message::Content::Parts(parts)) => {
                    for part in parts {
                        let start = current.content.len();
                        let text = part.text();
                        current
                            .content
                            .extend_from_slice(text.unwrap_or_default().as_bytes());
                        current.end_part(start, text.is_some());
                    }
                }
            }
            let calls = message.tool_calls.as_ref();
            let calls = calls.map(|calls| serde_json::to_string(calls).unwrap_or_default());
            conversation.end_message(calls.as_deref());
        }
        conversation
    }

    /// Returns the hash of the first image or other media part.
    pub(crate) fn media_hash(&self) -> Option<u64> {
        self.message.media_hash
    }

    /// Returns the canonical bytes, which start with `tools` (raw JSON), and the size of the input
    /// that cannot be matched. Tools that are `null` or an empty list add no bytes.
    pub(crate) fn finish(self, tools: Option<&RawValue>) -> (Vec<u8>, UnhashedInput) {
        let mut bytes = self.bytes;
        let tools = tools.map_or("", RawValue::get);
        if !matches!(tools, "" | "null" | "[]") {
            bytes.splice(0..0, tools.bytes().chain([TOOLS_MARK]));
        }
        (bytes, self.unhashed)
    }

    /// Prepares the buffers for the next message.
    fn start_message(&mut self) {
        self.message.role.clear();
        self.message.clear_content();
    }

    /// Appends the message that was parsed, with its tool calls (raw JSON). After the first part
    /// that is not text, input is only counted: the rest of that message and all later messages. A
    /// system message is appended without the line that changes with each request.
    fn end_message(&mut self, tool_calls: Option<&str>) {
        let message = &mut self.message;
        if message.role == b"system" {
            let text = std::str::from_utf8(&message.content).unwrap_or_default();
            let kept = strip_billing_header(text).map_or(0, str::len);
            message.content.drain(..text.len() - kept);
        }
        let tool_calls = match tool_calls {
            None | Some("null" | "[]") => "",
            Some(raw) => raw,
        };
        if self.matching_ended {
            self.unhashed.bytes += message.role.len() + message.content.len() + tool_calls.len();
        } else {
            self.bytes.push(MESSAGE_MARK);
            self.bytes.extend_from_slice(&message.role);
            self.bytes.push(CONTENT_MARK);
            self.bytes.extend_from_slice(&message.content);
            if message.content_ended {
                self.matching_ended = true;
                self.unhashed.bytes += tool_calls.len();
            } else if !tool_calls.is_empty() {
                self.bytes.push(TOOL_CALLS_MARK);
                self.bytes.extend_from_slice(tool_calls.as_bytes());
            }
        }
        self.unhashed.bytes += message.unhashed.bytes;
        self.unhashed.tokens += message.unhashed.tokens;
    }
}

impl Message {
    /// Discards a content that was parsed: a repeated key replaces it.
    fn clear_content(&mut self) {
        self.content.clear();
        self.content_ended = false;
        self.unhashed = UnhashedInput::default();
    }

    /// Ends a part whose text, if any, was appended to `content` from `start` on. A part that is
    /// not text counts as media and ends the content: the text of this part and of all later parts
    /// is removed from `content`, and its bytes are counted in `unhashed`.
    fn end_part(&mut self, start: usize, is_text: bool) {
        let text_bytes = self.content.len() - start;
        if !is_text {
            self.content_ended = true;
            self.unhashed.add_media();
        }
        if self.content_ended {
            self.content.truncate(start);
            self.unhashed.bytes += text_bytes;
        }
    }
}

/// Parses `messages`. Fields of a message that are not known to reach the prompt are ignored.
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

/// Parses one message object.
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
        self.0.end_message(tool_calls.map(RawValue::get));
        Ok(())
    }
}

/// Parses a message's content: a string, or a list of parts. A single object counts as a part that
/// is not text; any other value counts as empty.
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

/// Parses one part of a content: `{"type": "text", "text": …}`, a bare string, or a part that is
/// not text.
struct Part<'m>(&'m mut Message);

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum PartKey {
    Text,
    Uuid,
    ImageUrl,
    VideoUrl,
    AudioUrl,
    InputAudio,
    File,
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
        // A part with a `text` string is text, whatever its `type`.
        let mut is_text = false;
        // The client's id of an image takes precedence over its data.
        let (mut id, mut media) = (None, None);
        while let Some(key) = object.next_key()? {
            match key {
                PartKey::Text => {
                    self.0.content.truncate(start);
                    let text = object.next_value_seed(AppendText(&mut self.0.content))?;
                    is_text = matches!(text, LooseValue::Text(_));
                }
                PartKey::Uuid => id = object.next_value::<Option<&RawValue>>()?,
                PartKey::ImageUrl
                | PartKey::VideoUrl
                | PartKey::AudioUrl
                | PartKey::InputAudio
                | PartKey::File => media = object.next_value::<Option<&RawValue>>()?,
                PartKey::Other => {
                    object.next_value::<IgnoredAny>()?;
                }
            }
        }
        if let (false, None, Some(media)) = (is_text, self.0.media_hash, id.or(media)) {
            self.0.media_hash = Some(hash_media(media));
        }
        self.0.end_part(start, is_text);
        Ok(())
    }
}
