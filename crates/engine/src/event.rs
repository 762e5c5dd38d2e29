//! One event of a streamed answer: what its choices carry, and what it reports.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use crate::lenient::Gist;
use crate::usage::Usage;

/// What the data of one event says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Event {
    /// If there are none, the usage is the whole request's, else one choice's.
    pub(crate) choices: SmallVec<[Piece; 1]>,
    pub(crate) usage: Option<Usage>,
    pub(crate) is_error: bool,
}

/// What an event says of one choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which choice; the first where it is not said.
    pub(crate) index: u32,
    /// As many as it lists ids, else one if it says anything.
    pub(crate) tokens: u32,
    /// Whether nothing more of it will come.
    pub(crate) finished: bool,
}

impl Event {
    /// Reads an event's data; `None` if it is not such an object.
    pub(crate) fn parse(data: &[u8]) -> Option<Self> {
        let fields: Fields<'_> = serde_json::from_slice(data).ok()?;
        Some(Self {
            choices: fields.choices.unwrap_or_default().0,
            usage: fields.usage.and_then(Usage::read),
            // Older vLLM puts the error's fields at the top.
            is_error: fields.error.is_present()
                || fields.object.is_some_and(|raw| raw.get() == r#""error""#),
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields<'d> {
    choices: Option<Choices>,
    #[serde(borrow)]
    usage: Option<&'d RawValue>,
    error: Gist,
    #[serde(borrow)]
    object: Option<&'d RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Choice {
    index: Gist,
    finish_reason: Gist,
    delta: Option<Delta>,
    text: Gist,
    token_ids: Gist,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Delta {
    content: Gist,
    reasoning_content: Gist,
    reasoning: Gist,
    tool_calls: Gist,
}

impl Choice {
    fn tokens(&self) -> u32 {
        if let Gist::List(tokens) = self.token_ids {
            return u32::try_from(tokens).unwrap_or(u32::MAX);
        }
        let says_anything = self.text.is_present()
            || self.delta.as_ref().is_some_and(|delta| {
                delta.content.is_present()
                    || delta.reasoning_content.is_present()
                    || delta.reasoning.is_present()
                    || delta.tool_calls.is_present()
            });
        u32::from(says_anything)
    }
}

/// The choices, each reduced to what counts as it is read.
#[derive(Default)]
struct Choices(SmallVec<[Piece; 1]>);

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReduceChoices)
    }
}

struct ReduceChoices;

impl<'de> Visitor<'de> for ReduceChoices {
    type Value = Choices;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array of choices")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Choices, A::Error> {
        let mut choices = Choices::default();
        while let Some(choice) = list.next_element::<Choice>()? {
            choices.0.push(Piece {
                index: choice.index.count().unwrap_or(0),
                tokens: choice.tokens(),
                finished: choice.finish_reason.is_present(),
            });
        }
        Ok(choices)
    }
}
