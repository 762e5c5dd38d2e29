//! One event of a streamed response: the deltas of its choices, and the usage or error it reports.
//!
//! This file parses the events of chat and text completions, its submodules those of other APIs.

mod messages;
pub(crate) mod repeated;
mod responses;
mod sglang;

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use crate::endpoint::Endpoint;
use crate::loose_value::LooseValue;
use crate::usage::Usage;

/// The form of an API's events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EventFormat {
    /// Chunks with `choices`, as of chat completions; the stream ends with `[DONE]`.
    #[default]
    Choices,
    /// The typed events of OpenAI's Responses API.
    Responses,
    /// The typed events of Anthropic's Messages API.
    Messages,
    /// The states of the output that SGLang's `/generate` sends; the stream ends with `[DONE]`.
    Sglang,
}

impl From<Endpoint> for EventFormat {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Responses => Self::Responses,
            Endpoint::Messages | Endpoint::MessagesCountTokens => Self::Messages,
            Endpoint::SglangGenerate => Self::Sglang,
            _ => Self::Choices,
        }
    }
}

/// The choices that a usage report of an event covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum UsageScope {
    /// All choices of the response.
    #[default]
    Response,
    /// The choices of the event.
    Choice,
}

/// The contents of one event's data, or of the body of a response that is not streamed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Event<'d> {
    /// Deltas of the choices.
    pub(crate) choices: SmallVec<[ChoiceDelta<'d>; 1]>,
    /// Token counts, if the event reports any.
    pub(crate) usage: Option<Usage>,
    /// The choices that `usage` covers.
    pub(crate) usage_scope: UsageScope,
    /// Whether the engine reports an error.
    pub(crate) is_error: bool,
    /// Whether the response is complete: no event follows that matters.
    pub(crate) is_last: bool,
    /// Id of the response, if the event is the first one of a Responses stream.
    pub(crate) response_id: Option<Cow<'d, str>>,
}

/// The part of one event that belongs to one choice.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ChoiceDelta<'d> {
    /// Index of the choice; 0 if the event contains none.
    pub(crate) index: u32,
    /// Output tokens: the number of token ids if the event lists them, otherwise 1 if the delta has
    /// text, reasoning or tool calls, and 0 if it has none of these.
    pub(crate) tokens: u32,
    /// Whether the choice has a finish reason: no delta of it follows.
    pub(crate) finished: bool,
    /// Whether the finish reason is `stop`: the model or a stop word ended the choice, not its
    /// length limit.
    pub(crate) finished_by_stop: bool,
    /// Text that the event adds, as a raw JSON value; `None` if it adds none.
    pub(crate) text: Option<&'d RawValue>,
    /// Whether the delta contains reasoning.
    pub(crate) has_reasoning: bool,
    /// Whether the delta contains tool calls.
    pub(crate) has_tool_calls: bool,
}

impl<'d> Event<'d> {
    /// Parses an event's data; `None` if it is not a JSON object of this form.
    pub(crate) fn parse(format: EventFormat, data: &'d [u8]) -> Option<Self> {
        match format {
            EventFormat::Choices => Self::parse_choices(data),
            EventFormat::Responses => responses::parse(data),
            EventFormat::Messages => messages::parse(data),
            EventFormat::Sglang => sglang::parse(data),
        }
    }

    /// Parses the body of a response that is not streamed, as if it were one event; `None` if it is
    /// not a JSON object of this form.
    pub(crate) fn parse_body(format: EventFormat, body: &'d [u8]) -> Option<Self> {
        match format {
            EventFormat::Responses => responses::parse_body(body),
            EventFormat::Messages => messages::parse_body(body),
            EventFormat::Choices | EventFormat::Sglang => Self::parse(format, body),
        }
    }

    /// Creates an event that adds one delta to the only choice.
    fn of_delta(delta: ChoiceDelta<'d>) -> Self {
        Self {
            choices: SmallVec::from_buf([delta]),
            ..Self::default()
        }
    }

    /// Parses a chunk with `choices`. Its usage is that of the whole response if it has no choices,
    /// otherwise that of one choice.
    fn parse_choices(data: &'d [u8]) -> Option<Self> {
        let fields: Fields<'_> = serde_json::from_slice(data).ok()?;
        let choices = fields.choices.unwrap_or_default().0;
        Some(Self {
            usage_scope: match choices.is_empty() {
                true => UsageScope::Response,
                false => UsageScope::Choice,
            },
            choices,
            usage: fields.usage.and_then(Usage::read),
            // Older vLLM releases put the fields of an error at the top level.
            is_error: fields.error.is_present()
                || fields.object.is_some_and(|raw| raw.get() == r#""error""#),
            is_last: false,
            response_id: None,
        })
    }
}

/// The fields of an event that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields<'d> {
    #[serde(borrow)]
    choices: Option<Choices<'d>>,
    #[serde(borrow)]
    usage: Option<&'d RawValue>,
    error: LooseValue,
    #[serde(borrow)]
    object: Option<&'d RawValue>,
}

/// The fields of a choice that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Choice<'d> {
    index: LooseValue,
    #[serde(borrow)]
    finish_reason: Option<&'d RawValue>,
    #[serde(borrow)]
    delta: Option<Delta<'d>>,
    /// Replaces `delta` in a response that is not streamed.
    #[serde(borrow)]
    message: Option<Delta<'d>>,
    #[serde(borrow)]
    text: Option<&'d RawValue>,
    token_ids: LooseValue,
}

/// The fields of a chat completion's `delta` or `message` that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Delta<'d> {
    #[serde(borrow)]
    content: Option<&'d RawValue>,
    reasoning_content: LooseValue,
    reasoning: LooseValue,
    tool_calls: LooseValue,
}

/// Returns the text of a raw JSON string without escapes; the raw JSON of any other value.
fn plain_text(raw: Option<&RawValue>) -> &str {
    raw.map_or("", |raw| raw.get().trim_matches('"'))
}

impl<'d> Choice<'d> {
    /// Returns the part of the choice that is counted. The `text` of a completion takes precedence
    /// over the `content` of a chat message.
    fn reduce(&self) -> ChoiceDelta<'d> {
        let delta = self.delta.as_ref().or(self.message.as_ref());
        let text = self.text.or(delta.and_then(|delta| delta.content));
        let text = text.filter(|raw| is_present(raw));
        let has_reasoning = delta.is_some_and(|delta| {
            delta.reasoning_content.is_present() || delta.reasoning.is_present()
        });
        let has_tool_calls = delta.is_some_and(|delta| delta.tool_calls.is_present());
        let finish_reason = self.finish_reason.filter(|raw| is_present(raw));
        ChoiceDelta {
            index: self.index.count().unwrap_or(0),
            tokens: match self.token_ids {
                LooseValue::List(tokens) => u32::try_from(tokens).unwrap_or(u32::MAX),
                _ => u32::from(text.is_some() || has_reasoning || has_tool_calls),
            },
            finished: finish_reason.is_some(),
            finished_by_stop: finish_reason.is_some_and(|raw| raw.get() == r#""stop""#),
            text,
            has_reasoning,
            has_tool_calls,
        }
    }
}

/// Returns whether a raw JSON value is neither `null` nor an empty string, list or object.
///
/// Counterpart of [`LooseValue::is_present`] for a value that was not parsed.
fn is_present(raw: &RawValue) -> bool {
    !matches!(raw.get(), "null" | "\"\"" | "[]" | "{}")
}

/// The choices of an event, each reduced to a [`ChoiceDelta`] while the list is parsed.
#[derive(Default)]
struct Choices<'d>(SmallVec<[ChoiceDelta<'d>; 1]>);

impl<'de: 'd, 'd> Deserialize<'de> for Choices<'d> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReduceChoices(PhantomData))
    }
}

/// Visits the list of choices and reduces each of them.
struct ReduceChoices<'d>(PhantomData<&'d RawValue>);

impl<'de: 'd, 'd> Visitor<'de> for ReduceChoices<'d> {
    type Value = Choices<'d>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array of choices")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Choices<'d>, A::Error> {
        let mut choices = Choices::default();
        while let Some(choice) = list.next_element::<Choice<'_>>()? {
            choices.0.push(choice.reduce());
        }
        Ok(choices)
    }
}
