//! Parsing of `prompt` and `input`: a text, token ids, or a list of either.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use foresee_core::batch::MAX_BATCH_PROMPTS;

use crate::prompt::{Prompt, UnhashedInput};

/// The prompts of a body: the first ones in full, the others only by size.
#[derive(Debug, Default)]
pub(crate) struct Prompts {
    /// The first prompt.
    pub(crate) first: Option<Prompt>,
    /// The prompts after the first that are booked individually, fewer than [`MAX_BATCH_PROMPTS`].
    pub(crate) rest: Vec<Prompt>,
    /// How many prompts the body has, those in `unhashed` included.
    pub(crate) count: u32,
    /// Size of the prompts that are not kept.
    pub(crate) unhashed: UnhashedInput,
}

impl Prompts {
    /// Counts a text, and keeps it unless [`MAX_BATCH_PROMPTS`] prompts are kept. Of further texts,
    /// only the length is added to `unhashed`.
    fn add_text(&mut self, text: &str) {
        self.count = self.count.saturating_add(1);
        if self.is_below_limit() {
            self.add(Prompt::Text(text.as_bytes().to_vec()));
        } else {
            self.unhashed.bytes += text.len();
        }
    }

    /// Counts a prompt of token ids, and keeps it unless [`MAX_BATCH_PROMPTS`] prompts are kept. Of
    /// further prompts, only the number of tokens is added to `unhashed`.
    fn add_tokens(&mut self, tokens: Vec<u32>) {
        self.count = self.count.saturating_add(1);
        if self.is_below_limit() {
            self.add(Prompt::Tokens(tokens));
        } else {
            self.unhashed.tokens += tokens.len();
        }
    }

    /// Returns the size of all prompts.
    pub(crate) fn size(&self) -> UnhashedInput {
        let mut size = self.unhashed;
        for prompt in self.first.iter().chain(&self.rest) {
            match prompt {
                Prompt::Text(text) => size.bytes += text.len(),
                Prompt::Tokens(tokens) => size.tokens += tokens.len(),
            }
        }
        size
    }

    /// Returns whether another prompt may be kept.
    fn is_below_limit(&self) -> bool {
        self.rest.len() + 1 < MAX_BATCH_PROMPTS
    }

    fn add(&mut self, prompt: Prompt) {
        if self.first.is_none() {
            self.first = Some(prompt);
        } else {
            self.rest.push(prompt);
        }
    }
}

/// Parses the value of `prompt` or `input` into [`Prompts`].
pub(crate) struct ReadPrompts<'p>(pub(crate) &'p mut Prompts);

impl<'de> DeserializeSeed<'de> for ReadPrompts<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ReadPrompts<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a prompt or an array of prompts")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.add_text(text);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut tokens = Vec::new();
        let mut elements: usize = 0;
        while list
            .next_element_seed(Element {
                prompts: &mut *self.0,
                tokens: &mut tokens,
            })?
            .is_some()
        {
            elements += 1;
        }
        if tokens.is_empty() {
            return Ok(());
        }
        if tokens.len() != elements {
            return Err(A::Error::custom("list mixes token ids and prompts"));
        }
        self.0.add_tokens(tokens);
        Ok(())
    }
}

/// Parses one element of the list: a token id of the only prompt, or a prompt of a batch.
struct Element<'p> {
    /// Receives the element if it is a prompt.
    prompts: &'p mut Prompts,
    /// Receives the element if it is a token id.
    tokens: &'p mut Vec<u32>,
}

impl<'de> DeserializeSeed<'de> for Element<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Element<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a token id, a text, or an array of token ids")
    }

    fn visit_u64<E: Error>(self, token: u64) -> Result<(), E> {
        let token =
            u32::try_from(token).map_err(|_| E::custom("token id does not fit into 32 bits"))?;
        self.tokens.push(token);
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.prompts.add_text(text);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut tokens = Vec::new();
        while let Some(token) = list.next_element()? {
            tokens.push(token);
        }
        self.prompts.add_tokens(tokens);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        self.prompts.count = self.prompts.count.saturating_add(1);
        self.prompts.unhashed.add_media();
        Ok(())
    }
}
