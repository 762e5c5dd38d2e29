//! The forms in which `prompt` and `input` come: a text, token ids, or a list of either.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use foresee_core::batch::MOST_IN_BATCH;

use crate::request::{Prompt, Unmatched};

/// The first prompts, and how much the others hold.
#[derive(Debug, Default)]
pub(crate) struct Prompts {
    pub(crate) first: Option<Prompt>,
    /// Those that follow it, as many as are booked apart.
    pub(crate) further: Vec<Prompt>,
    pub(crate) count: u32,
    pub(crate) unmatched: Unmatched,
}

impl Prompts {
    fn add_text(&mut self, text: &str) {
        self.count = self.count.saturating_add(1);
        if self.has_room() {
            self.add(Prompt::Text(text.as_bytes().to_vec()));
        } else {
            self.unmatched.bytes += text.len();
        }
    }

    fn add_tokens(&mut self, tokens: Vec<u32>) {
        self.count = self.count.saturating_add(1);
        if self.has_room() {
            self.add(Prompt::Tokens(tokens));
        } else {
            self.unmatched.tokens += tokens.len();
        }
    }

    fn has_room(&self) -> bool {
        self.further.len() + 1 < MOST_IN_BATCH
    }

    fn add(&mut self, prompt: Prompt) {
        if self.first.is_none() {
            self.first = Some(prompt);
        } else {
            self.further.push(prompt);
        }
    }
}

/// Reads `prompt` or `input`.
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
            return Err(A::Error::custom("token ids and prompts are mixed"));
        }
        self.0.add_tokens(tokens);
        Ok(())
    }
}

/// One element of the list: a token of the only prompt, or a prompt of the batch.
struct Element<'p> {
    prompts: &'p mut Prompts,
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
        let token = u32::try_from(token).map_err(|_| E::custom("a token id is too large"))?;
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
        self.prompts.unmatched.add_media();
        Ok(())
    }
}
