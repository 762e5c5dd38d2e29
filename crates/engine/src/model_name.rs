//! The model's name in a request's body, and its replacement.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::multipart::find_model;
use crate::paths::BodyFormat;

/// Returns a body like `body` whose `model` is `model`; everything else stays as it is, byte for byte.
/// `content_type` is the value of the header `Content-Type`. `None` if the body names no model, or
/// is not valid.
///
/// A JSON body with several fields `model` keeps all but the last, which engines read.
pub fn replace_model(
    format: BodyFormat,
    content_type: &str,
    body: &[u8],
    model: &str,
) -> Option<Vec<u8>> {
    let (old, new) = match format {
        BodyFormat::None => return None,
        BodyFormat::Json => (json_model(body)?, serde_json::to_vec(model).ok()?),
        BodyFormat::Multipart => (find_model(content_type, body).ok()??, model.into()),
    };
    let Range { start, end } = range_within(body, old);
    Some([&body[..start], &new, &body[end..]].concat())
}

/// Returns the place of `part` in `whole`, of which it is a slice.
fn range_within(whole: &[u8], part: &[u8]) -> Range<usize> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    start..start + part.len()
}

/// Returns the value of the last field `model` of a JSON object, with its quotes.
fn json_model(body: &[u8]) -> Option<&[u8]> {
    let found: LastModel<'_> = serde_json::from_slice(body).ok()?;
    found.0.map(|value| value.get().as_bytes())
}

/// The last field `model` of an object.
struct LastModel<'b>(Option<&'b RawValue>);

impl<'b> Deserialize<'b> for LastModel<'b> {
    fn deserialize<D: Deserializer<'b>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(field_identifier, rename_all = "snake_case")]
        enum Key {
            Model,
            #[serde(other)]
            Other,
        }

        struct Fields;

        impl<'b> Visitor<'b> for Fields {
            type Value = LastModel<'b>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'b>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
                let mut last = None;
                while let Some(key) = fields.next_key()? {
                    match key {
                        Key::Model => last = Some(fields.next_value()?),
                        Key::Other => {
                            fields.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(LastModel(last))
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const FORM: &str = "multipart/form-data; boundary=b";

    #[test]
    fn the_name_is_replaced_and_nothing_else() {
        let replace = |body: &str| {
            let replaced = replace_model(BodyFormat::Json, "", body.as_bytes(), "new\"name");
            replaced.map(|body| String::from_utf8(body).unwrap())
        };
        assert_eq!(
            replace(r#" { "model" : "a" , "n": 1.0, "x": {"model": "a"} } "#).unwrap(),
            r#" { "model" : "new\"name" , "n": 1.0, "x": {"model": "a"} } "#
        );
        // Engines read the last of several fields, and escapes in a key.
        assert_eq!(
            replace(r#"{"model":"a","mod\u0065l":"b"}"#).unwrap(),
            r#"{"model":"a","mod\u0065l":"new\"name"}"#
        );
        for body in ["{}", "[]", "{", r#"{"x": {"model": "a"}}"#, ""] {
            assert_eq!(replace(body), None, "{body}");
        }
    }

    #[test]
    fn the_name_in_a_form_is_replaced() {
        let body = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nold\r\n--b\r\n\
                    Content-Disposition: form-data; name=\"file\"\r\n\r\nold\r\n--b--\r\n";
        let replaced = replace_model(BodyFormat::Multipart, FORM, body.as_bytes(), "new").unwrap();
        assert_eq!(
            String::from_utf8(replaced).unwrap(),
            body.replacen("old", "new", 1)
        );
        let other = body.replace("name=\"model\"", "name=\"language\"");
        let replaced = replace_model(BodyFormat::Multipart, FORM, other.as_bytes(), "new");
        assert_eq!(replaced, None);
        assert_eq!(replace_model(BodyFormat::None, "", b"", "new"), None);
    }

    proptest! {
        #[test]
        fn a_replaced_body_parses_to_the_same_fields(
            before in "\\PC{0,12}", after in "\\PC{0,12}", old in "\\PC{0,12}", new in "\\PC{0,12}",
        ) {
            let mut body = json!({ "before": before, "model": old, "z": [after, { "model": 1 }] });
            let replaced =
                replace_model(BodyFormat::Json, "", body.to_string().as_bytes(), &new).unwrap();
            body["model"] = json!(new);
            prop_assert_eq!(serde_json::from_slice::<Value>(&replaced).unwrap(), body);
        }
    }
}
