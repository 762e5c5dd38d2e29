//! Name of the model in a worker's response to a request for an alias: the client sees the alias.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::response;
use hyper::body::{Body, Frame};
use memchr::memmem;

use crate::placement::response_observer::ResponseForm;
use crate::tracked_body::{TrackedBody, form_of_body};
use crate::upstream::UpstreamError;

/// Key of the field that is renamed, with its quotes.
const KEY: &[u8] = b"\"model\"";

/// Maximum number of bytes that are kept until their field is complete.
const MAX_KEPT_BYTES: usize = 4 << 10;

/// Body of a worker's response, in which the name of the model is replaced if the client used another.
#[derive(Debug)]
pub(crate) struct RenamedBody {
    inner: TrackedBody,
    renamer: Option<ModelRenamer>,
    /// Trailers that follow the bytes that were kept.
    trailers: Option<Frame<Bytes>>,
}

impl RenamedBody {
    /// Wraps a body that is passed on as it is.
    pub(crate) fn unchanged(inner: TrackedBody) -> Self {
        Self {
            inner,
            renamer: None,
            trailers: None,
        }
    }

    /// Wraps a body in which `model` becomes `alias`, and removes the length from its `head`. A body
    /// that is compressed, or neither JSON nor a stream of events, is passed on as it is.
    pub(crate) fn renamed(
        head: &mut response::Parts,
        inner: TrackedBody,
        model: &str,
        alias: &str,
    ) -> Self {
        if form_of_body(&head.headers) == ResponseForm::Other {
            return Self::unchanged(inner);
        }
        head.headers.remove(CONTENT_LENGTH);
        Self {
            inner,
            renamer: Some(ModelRenamer::new(model, alias)),
            trailers: None,
        }
    }
}

impl Body for RenamedBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        let body = &mut *self;
        let Some(renamer) = &mut body.renamer else {
            return Pin::new(&mut body.inner).poll_frame(context);
        };
        if let Some(trailers) = body.trailers.take() {
            return Poll::Ready(Some(Ok(trailers)));
        }
        loop {
            let frame = match ready!(Pin::new(&mut body.inner).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    let rest = renamer.finish();
                    return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest))));
                }
            };
            match frame.into_data() {
                Ok(data) => {
                    let renamed = renamer.rename(data);
                    if !renamed.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(renamed))));
                    }
                }
                Err(trailers) => {
                    let rest = renamer.finish();
                    if rest.is_empty() {
                        return Poll::Ready(Some(Ok(trailers)));
                    }
                    body.trailers = Some(trailers);
                    return Poll::Ready(Some(Ok(Frame::data(rest))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let keeps_bytes = self.renamer.as_ref().is_some_and(ModelRenamer::keeps_bytes);
        self.inner.is_end_stream() && !keeps_bytes && self.trailers.is_none()
    }
}

/// Replaces the value of fields `model` in JSON that arrives in parts.
///
/// It replaces each `"model": "NAME"`, at any depth. In a text, every quote has a backslash before it,
/// so the key's quotes occur only around a key or a whole text.
#[derive(Debug)]
struct ModelRenamer {
    /// JSON text of the name to replace.
    from: Vec<u8>,
    /// JSON text of the name that replaces it.
    to: Vec<u8>,
    /// Bytes that may be the start of a field.
    kept: Vec<u8>,
}

/// Kind of a place that begins like the key.
enum Field {
    /// The field, whose value is at this place.
    Found(usize),
    /// Another field, or a value.
    Other,
    /// The start of one of these.
    Incomplete,
}

impl ModelRenamer {
    fn new(model: &str, alias: &str) -> Self {
        let quoted = |name: &str| serde_json::Value::from(name).to_string().into_bytes();
        Self {
            from: quoted(model),
            to: quoted(alias),
            kept: Vec::new(),
        }
    }

    /// Returns whether some bytes were not returned yet.
    fn keeps_bytes(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Returns the bytes that were kept, because the body has ended.
    fn finish(&mut self) -> Bytes {
        std::mem::take(&mut self.kept).into()
    }

    /// Returns the next part of the body with the names replaced. Keeps the bytes at its end that may
    /// be the start of a field.
    fn rename(&mut self, part: Bytes) -> Bytes {
        let part = match std::mem::take(&mut self.kept) {
            kept if kept.is_empty() => part,
            mut kept => {
                kept.extend_from_slice(&part);
                kept.into()
            }
        };
        let mut renamed = Vec::new();
        // The bytes before this place are in `renamed`.
        let mut copied = 0;
        let mut position = 0;
        let end = loop {
            let Some(found) = memmem::find(&part[position..], KEY) else {
                break part.len() - partial_key_len(&part[position..]);
            };
            let start = position + found;
            match self.field_at(&part, start) {
                Field::Found(value) => {
                    renamed.extend_from_slice(&part[copied..value]);
                    renamed.extend_from_slice(&self.to);
                    copied = value + self.from.len();
                    position = copied;
                }
                Field::Other => position = start + KEY.len(),
                Field::Incomplete if part.len() - start > MAX_KEPT_BYTES => break part.len(),
                Field::Incomplete => break start,
            }
        };
        self.kept = part[end..].to_vec();
        if copied == 0 {
            return part.slice(..end);
        }
        renamed.extend_from_slice(&part[copied..end]);
        renamed.into()
    }

    /// Returns what is at `start` of `part`, where the key is.
    fn field_at(&self, part: &[u8], start: usize) -> Field {
        let after_space = |from: usize| {
            let space = part[from..]
                .iter()
                .take_while(|byte| byte.is_ascii_whitespace());
            from + space.count()
        };
        let colon = after_space(start + KEY.len());
        match part.get(colon) {
            None => return Field::Incomplete,
            Some(b':') => {}
            Some(_) => return Field::Other,
        }
        let value = after_space(colon + 1);
        let rest = &part[value..];
        if rest.starts_with(&self.from) {
            Field::Found(value)
        } else if self.from.starts_with(rest) {
            Field::Incomplete
        } else {
            Field::Other
        }
    }
}

/// Returns the length of the start of the key at the end of `bytes`; 0 if there is none.
fn partial_key_len(bytes: &[u8]) -> usize {
    let lengths = (1..KEY.len()).rev();
    lengths
        .into_iter()
        .find(|length| bytes.ends_with(&KEY[..*length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Returns what a body becomes that arrives in parts of these lengths, the last part repeated.
    fn rename_in_parts(body: &str, mut lengths: impl Iterator<Item = usize>) -> String {
        let mut renamer = ModelRenamer::new("served/a", "alias \"b\"");
        let mut rest = Bytes::copy_from_slice(body.as_bytes());
        let mut renamed = Vec::new();
        while !rest.is_empty() {
            let length = lengths.next().unwrap_or(1).clamp(1, rest.len());
            renamed.extend_from_slice(&renamer.rename(rest.split_to(length)));
        }
        renamed.extend_from_slice(&renamer.finish());
        assert!(!renamer.keeps_bytes());
        String::from_utf8(renamed).unwrap()
    }

    #[test]
    fn only_the_field_is_renamed() {
        for (body, expected) in [
            (r#"{"model":"served/a"}"#, r#"{"model":"alias \"b\""}"#),
            (
                "data: {\"model\" :\n \"served/a\", \"x\": 1}\n\n",
                "data: {\"model\" :\n \"alias \\\"b\\\"\", \"x\": 1}\n\n",
            ),
            (r#"{"model":"served/ab"}"#, r#"{"model":"served/ab"}"#),
            (
                r#"{"model":null,"x":"served/a"}"#,
                r#"{"model":null,"x":"served/a"}"#,
            ),
            (
                r#"{"x":"model","y":"served/a"}"#,
                r#"{"x":"model","y":"served/a"}"#,
            ),
            (
                r#"{"x":"\"model\":\"served/a\""}"#,
                r#"{"x":"\"model\":\"served/a\""}"#,
            ),
            (r#"{"model"#, r#"{"model"#),
        ] {
            for length in [1, 2, 3, 7, 100] {
                let renamed = rename_in_parts(body, std::iter::repeat(length));
                assert_eq!(renamed, expected, "{length}");
            }
        }
    }

    #[test]
    fn a_field_that_never_ends_is_not_kept() {
        let mut renamer = ModelRenamer::new("a", "b");
        let spaces = format!("{{\"model\"{}", " ".repeat(MAX_KEPT_BYTES));
        let renamed = renamer.rename(spaces.clone().into());
        assert_eq!(renamed.len(), spaces.len());
        assert!(!renamer.keeps_bytes());
    }

    proptest! {
        /// Any JSON, cut anywhere, is as if the values of the fields had been replaced.
        #[test]
        fn renaming_is_that_of_the_parsed_body(
            texts in prop::collection::vec("[\"model:served/a\\\\ ]{0,16}", 0..4),
            is_served in any::<bool>(),
            is_pretty in any::<bool>(),
            lengths in prop::collection::vec(1_usize..9, 1..20),
        ) {
            let model = if is_served { "served/a" } else { "other" };
            let body = |model: &str| json!({
                "choices": texts, "inner": { "model": model }, "model": model, "z": "model",
            });
            let text = |value: &Value| match is_pretty {
                true => serde_json::to_string_pretty(value).unwrap(),
                false => value.to_string(),
            };
            let renamed = rename_in_parts(&text(&body(model)), lengths.into_iter().cycle());
            let expected = if is_served { "alias \"b\"" } else { model };
            prop_assert_eq!(renamed, text(&body(expected)));
        }
    }
}
