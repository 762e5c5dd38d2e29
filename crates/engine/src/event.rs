//! One event of a streamed answer: what its choices carry, and what it reports.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use crate::lenient::Gist;
use crate::usage::Usage;

/// What the data of one event says, or the body of an answer that is not streamed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Event<'d> {
    /// If there are none, the usage is the whole request's, else one choice's.
    pub(crate) choices: SmallVec<[Piece<'d>; 1]>,
    pub(crate) usage: Option<Usage>,
    pub(crate) is_error: bool,
}

/// What an event says of one choice.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Piece<'d> {
    /// Which choice; the first where it is not said.
    pub(crate) index: u32,
    /// As many as it lists ids, else one if it says anything.
    pub(crate) tokens: u32,
    /// Whether nothing more of it will come.
    pub(crate) finished: bool,
    /// The model or a stop word ended it, rather than its length.
    pub(crate) stopped: bool,
    /// Its text, as JSON.
    pub(crate) text: Option<&'d RawValue>,
    pub(crate) reasons: bool,
    pub(crate) calls_tools: bool,
}

impl<'d> Event<'d> {
    /// Reads an event's data; `None` if it is not such an object.
    pub(crate) fn parse(data: &'d [u8]) -> Option<Self> {
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
    #[serde(borrow)]
    choices: Option<Choices<'d>>,
    #[serde(borrow)]
    usage: Option<&'d RawValue>,
    error: Gist,
    #[serde(borrow)]
    object: Option<&'d RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Choice<'d> {
    index: Gist,
    #[serde(borrow)]
    finish_reason: Option<&'d RawValue>,
    #[serde(borrow)]
    delta: Option<Delta<'d>>,
    /// In place of `delta` where the answer is not streamed.
    #[serde(borrow)]
    message: Option<Delta<'d>>,
    #[serde(borrow)]
    text: Option<&'d RawValue>,
    token_ids: Gist,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Delta<'d> {
    #[serde(borrow)]
    content: Option<&'d RawValue>,
    reasoning_content: Gist,
    reasoning: Gist,
    tool_calls: Gist,
}

impl<'d> Choice<'d> {
    fn reduce(&self) -> Piece<'d> {
        let delta = self.delta.as_ref().or(self.message.as_ref());
        let text = self.text.or(delta.and_then(|delta| delta.content));
        let text = text.filter(|raw| is_present(raw));
        let reasons = delta.is_some_and(|delta| {
            delta.reasoning_content.is_present() || delta.reasoning.is_present()
        });
        let calls_tools = delta.is_some_and(|delta| delta.tool_calls.is_present());
        let finish_reason = self.finish_reason.filter(|raw| is_present(raw));
        Piece {
            index: self.index.count().unwrap_or(0),
            tokens: match self.token_ids {
                Gist::List(tokens) => u32::try_from(tokens).unwrap_or(u32::MAX),
                _ => u32::from(text.is_some() || reasons || calls_tools),
            },
            finished: finish_reason.is_some(),
            stopped: finish_reason.is_some_and(|raw| raw.get() == r#""stop""#),
            text,
            reasons,
            calls_tools,
        }
    }
}

/// As [`Gist::is_present`], of a value that was not read.
fn is_present(raw: &RawValue) -> bool {
    !matches!(raw.get(), "null" | "\"\"" | "[]" | "{}")
}

/// The choices, each reduced to what counts as it is read.
#[derive(Default)]
struct Choices<'d>(SmallVec<[Piece<'d>; 1]>);

impl<'de: 'd, 'd> Deserialize<'de> for Choices<'d> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ReduceChoices(PhantomData))
    }
}

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
