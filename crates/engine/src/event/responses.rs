//! Events and bodies of OpenAI's Responses API.

use std::borrow::Cow;

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
    delta: Option<&'d RawValue>,
    #[serde(borrow)]
    response: Option<Response<'d>>,
}

/// The fields of a response object that are read: in an event, or as the body of a response that is
/// not streamed.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Response<'d> {
    #[serde(borrow)]
    id: Option<Cow<'d, str>>,
    #[serde(borrow)]
    status: Option<&'d RawValue>,
    #[serde(borrow)]
    usage: Option<&'d RawValue>,
    #[serde(borrow)]
    output: Vec<Item<'d>>,
}

/// The fields of an output item that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Item<'d> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'d RawValue>,
    #[serde(borrow)]
    content: Option<Vec<Part<'d>>>,
}

/// The fields of a part of an item's content that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Part<'d> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'d RawValue>,
    #[serde(borrow)]
    text: Option<&'d RawValue>,
}

/// Parses an event. An event whose type ends with `.delta` counts as one token.
pub(super) fn parse(data: &[u8]) -> Option<Event<'_>> {
    let fields: Fields<'_> = serde_json::from_slice(data).ok()?;
    let kind = plain_text(fields.kind);
    if kind.ends_with(".delta") {
        let delta = fields.delta.filter(|raw| is_present(raw));
        let is_text = kind == "response.output_text.delta";
        let has_reasoning = kind.starts_with("response.reasoning");
        return Some(Event::of_delta(ChoiceDelta {
            tokens: u32::from(delta.is_some()),
            text: delta.filter(|_| is_text),
            has_reasoning,
            // Any other output than text and reasoning ends the known text as a tool call does.
            has_tool_calls: !is_text && !has_reasoning,
            ..ChoiceDelta::default()
        }));
    }
    let response = fields.response.unwrap_or_default();
    let event = match kind {
        "response.created" => Event {
            response_id: response.id,
            ..Event::default()
        },
        "response.completed" | "response.incomplete" | "response.failed" => Event {
            is_error: kind == "response.failed",
            ..end(&response)
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

/// Parses the body of a response that is not streamed. Its text is that of the first part, if the
/// output has no other item or part before it.
pub(super) fn parse_body(body: &[u8]) -> Option<Event<'_>> {
    let mut response: Response<'_> = serde_json::from_slice(body).ok()?;
    let mut event = end(&response);
    event.response_id = response.id.take();
    if let Some(delta) = event.choices.first_mut() {
        let first = response.output.first();
        let parts = first
            .and_then(|item| item.content.as_deref())
            .unwrap_or(&[]);
        match parts {
            [part, ..] if plain_text(part.kind) == "output_text" => delta.text = part.text,
            _ => {}
        }
        delta.has_reasoning = first.is_some_and(|item| plain_text(item.kind) == "reasoning");
        delta.has_tool_calls = response.output.len() > 1 || parts.len() > 1;
    }
    Some(event)
}

/// Returns the end of a response, with its usage.
fn end<'d>(response: &Response<'d>) -> Event<'d> {
    Event {
        is_last: true,
        usage: response.usage.and_then(Usage::read),
        ..Event::of_delta(ChoiceDelta {
            finished: true,
            finished_by_stop: plain_text(response.status) == "completed",
            ..ChoiceDelta::default()
        })
    }
}
