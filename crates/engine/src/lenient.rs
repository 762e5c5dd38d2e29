//! JSON values taken for what they are worth: one of an unexpected type is noted, not refused.
//!
//! A router must not refuse what an engine would accept, so only the values it cannot do without
//! are read strictly.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// What kind of value stood there, and how much of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Gist {
    #[default]
    Null,
    Bool(bool),
    Number(f64),
    /// A string of so many bytes.
    Text(usize),
    /// A list of so many elements.
    List(usize),
    /// An object of so many entries.
    Object(usize),
}

impl Gist {
    /// The value as a count, if it was a number that can be one.
    pub(crate) fn count(self) -> Option<u32> {
        match self {
            Self::Number(number) => count_from(number),
            _ => None,
        }
    }

    /// Whether the value says anything: `null` and what is empty do not.
    pub(crate) fn is_present(self) -> bool {
        match self {
            Self::Null => false,
            Self::Bool(_) | Self::Number(_) => true,
            Self::Text(length) | Self::List(length) | Self::Object(length) => length > 0,
        }
    }
}

impl<'de> Deserialize<'de> for Gist {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Glance { text: None })
    }
}

/// Reads any value; if it is a string, appends it to the buffer.
pub(crate) struct AppendText<'b>(pub(crate) &'b mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for AppendText<'_> {
    type Value = Gist;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Gist, D::Error> {
        deserializer.deserialize_any(Glance { text: Some(self.0) })
    }
}

struct Glance<'b> {
    text: Option<&'b mut Vec<u8>>,
}

impl<'de> Visitor<'de> for Glance<'_> {
    type Value = Gist;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Gist, E> {
        Ok(Gist::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Gist, E> {
        Ok(Gist::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Gist, E> {
        Ok(Gist::Number(number as f64))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Gist, E> {
        Ok(Gist::Number(number as f64))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Gist, E> {
        Ok(Gist::Number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Gist, E> {
        if let Some(buffer) = self.text {
            buffer.extend_from_slice(text.as_bytes());
        }
        Ok(Gist::Text(text.len()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Gist, A::Error> {
        let mut length = 0;
        while list.next_element::<IgnoredAny>()?.is_some() {
            length += 1;
        }
        Ok(Gist::List(length))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Gist, A::Error> {
        let mut length = 0;
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            length += 1;
        }
        Ok(Gist::Object(length))
    }
}

/// A number as a count: fractions are cut off, what is too large saturates.
pub(crate) fn count_from(number: f64) -> Option<u32> {
    (number >= 0.0).then_some(number as u32)
}
