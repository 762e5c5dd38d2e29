//! Lenient parsing of JSON values: a value of an unexpected type is recorded, and not an error.
//!
//! The router must not reject a body that an engine would accept, so only the values that the
//! router requires are parsed strictly.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The type and size of a JSON value, without its contents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum LooseValue {
    #[default]
    Null,
    Bool(bool),
    Number(f64),
    /// A string, with its length in bytes.
    Text(usize),
    /// A list, with its number of elements.
    List(usize),
    /// An object, with its number of entries.
    Object(usize),
}

impl LooseValue {
    /// Returns the value as a count, if it is a nonnegative number.
    pub(crate) fn count(self) -> Option<u32> {
        match self {
            Self::Number(number) => count_from(number),
            _ => None,
        }
    }

    /// Returns whether the value is neither `null` nor an empty string, list or object.
    pub(crate) fn is_present(self) -> bool {
        match self {
            Self::Null => false,
            Self::Bool(_) | Self::Number(_) => true,
            Self::Text(length) | Self::List(length) | Self::Object(length) => length > 0,
        }
    }
}

impl<'de> Deserialize<'de> for LooseValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LooseValueVisitor { text: None })
    }
}

/// Parses any value. A string is also appended to the buffer.
pub(crate) struct AppendText<'b>(pub(crate) &'b mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for AppendText<'_> {
    type Value = LooseValue;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<LooseValue, D::Error> {
        deserializer.deserialize_any(LooseValueVisitor { text: Some(self.0) })
    }
}

/// Visits any value.
struct LooseValueVisitor<'b> {
    /// Buffer to which a string is appended.
    text: Option<&'b mut Vec<u8>>,
}

impl<'de> Visitor<'de> for LooseValueVisitor<'_> {
    type Value = LooseValue;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<LooseValue, E> {
        Ok(LooseValue::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<LooseValue, E> {
        Ok(LooseValue::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<LooseValue, E> {
        Ok(LooseValue::Number(number as f64))
    }

    fn visit_i64<E>(self, number: i64) -> Result<LooseValue, E> {
        Ok(LooseValue::Number(number as f64))
    }

    fn visit_f64<E>(self, number: f64) -> Result<LooseValue, E> {
        Ok(LooseValue::Number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<LooseValue, E> {
        if let Some(buffer) = self.text {
            buffer.extend_from_slice(text.as_bytes());
        }
        Ok(LooseValue::Text(text.len()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LooseValue, A::Error> {
        let mut length = 0;
        while list.next_element::<IgnoredAny>()?.is_some() {
            length += 1;
        }
        Ok(LooseValue::List(length))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<LooseValue, A::Error> {
        let mut length = 0;
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            length += 1;
        }
        Ok(LooseValue::Object(length))
    }
}

/// Returns a nonnegative number as a count: the fraction is cut off, and a number that is too large
/// becomes `u32::MAX`.
pub(crate) fn count_from(number: f64) -> Option<u32> {
    (number >= 0.0).then_some(number as u32)
}
