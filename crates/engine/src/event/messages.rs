//! Events and bodies of Anthropic's Messages API.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{ChoiceDelta, Event, is_present, plain_text};
use crate::usage::Usage;

/// The fields of an event that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields<'d> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'d RawValue>,
    #[serde(borrow)]
    delta: Option<Delta<'d>>,
    #[serde(borrow)]
    message: Option<Message<'d>>,
    #[serde(borrow)]
    usage: Option<&'d RawValue>,
}

/// The fields of a delta that are read: of a content block, or of the message at its end.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Delta<'d> {
    #[serde(borrow)]
    text: Option<&'d RawValue>,
    #[serde(borrow)]
    thinking: Option<&'d RawValue>,
    #[serde(borrow)]
    partial_json: Option<&'d RawValue>,
    #[serde(borrow)]
    stop_reason: Option<&'d RawValue>,
}

/// The fields of a message that are read: in an event, or as the body of a response that is not
/// streamed.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Message<'d> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'d RawValue>,
    #[serde(borrow)]
    content: Vec<Block<'d>>,
    #[serde(borrow)]
    stop_reason: Option<&'d RawValue>,
    #[serde(borrow)]
    usage: Option<&'d RawValue>,
}

/// The fields of a content block that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Block<'d> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'d RawValue>,
    #[serde(borrow)]
    text: Option<&'d RawValue>,
}

/// Parses an event. A delta of a content block counts as one token, except that of a signature.
pub(super) fn parse(data: &[u8]) -> Option<Event<'_>> {
    let fields: Fields<'_> = serde_json::from_slice(data).ok()?;
    let delta = fields.delta.unwrap_or_default();
    let event = match plain_text(fields.kind) {
        "content_block_delta" => {
            let text = delta.text.filter(|raw| is_present(raw));
            let has_reasoning = delta.thinking.is_some_and(is_present);
            let has_tool_calls = delta.partial_json.is_some_and(is_present);
            Event::of_delta(ChoiceDelta {
                tokens: u32::from(text.is_some() || has_reasoning || has_tool_calls),
                text,
                has_reasoning,
                has_tool_calls,
                ..ChoiceDelta::default()
            })
        }
        "message_start" => {
            let usage = fields.message.unwrap_or_default().usage;
            let usage = usage.and_then(Usage::read);
            Event {
                // The count of output tokens is that of the start.
                usage: usage.map(|usage| Usage {
                    completion_tokens: None,
                    ..usage
                }),
                ..Event::default()
            }
        }
        "message_delta" => Event {
            usage: fields.usage.and_then(Usage::read),
            ..Event::of_delta(end(delta.stop_reason))
        },
        "message_stop" => Event {
            is_last: true,
            ..Event::default()
        },
        "error" => Event {
            is_error: true,
            is_last: true,
            ..Event::default()
        },
        _ => Event::default(),
    };
    Some(event)
}

/// Parses the body of a response that is not streamed. Its text is that of the first block, if there
/// is no other block before it.
pub(super) fn parse_body(body: &[u8]) -> Option<Event<'_>> {
    let message: Message<'_> = serde_json::from_slice(body).ok()?;
    let mut delta = end(message.stop_reason);
    if let Some(first) = message.content.first() {
        match plain_text(first.kind) {
            "text" => delta.text = first.text,
            "thinking" | "redacted_thinking" => delta.has_reasoning = true,
            _ => {}
        }
    }
    delta.has_tool_calls = message.content.len() > 1;
    Some(Event {
        usage: message.usage.and_then(Usage::read),
        is_error: plain_text(message.kind) == "error",
        is_last: true,
        ..Event::of_delta(delta)
    })
}

/// Returns the end of the message, if the event has a reason for it.
fn end(stop_reason: Option<&RawValue>) -> ChoiceDelta<'_> {
    ChoiceDelta {
        finished: stop_reason.is_some_and(is_present),
        finished_by_stop: matches!(plain_text(stop_reason), "end_turn" | "stop_sequence"),
        ..ChoiceDelta::default()
    }
}
