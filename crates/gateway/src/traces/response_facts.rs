//! What a response says about itself besides its output: its id, its model and why its outputs ended.
//! Read only for spans.

use std::borrow::Cow;

use bytes::Bytes;
use memchr::memmem;
use opentelemetry::{Array, KeyValue, StringValue, Value};
use serde::Deserialize;

/// Longest id or model name that is kept, in bytes.
const MAX_NAME_BYTES: usize = 256;

/// Longest reason that is kept, in bytes. All reasons of engines are shorter.
const MAX_REASON_BYTES: usize = 32;

/// Maximum number of reasons that are kept: one for each choice.
const MAX_REASONS: usize = 16;

/// Members of a response that say why an output ended, of OpenAI's and Anthropic's APIs. In the text
/// of an output the quotes are escaped, so that the text is not mistaken for a member.
const REASON_MEMBERS: [&[u8]; 2] = [b"\"finish_reason\":", b"\"stop_reason\":"];

/// Member of a `usage` with the output tokens of the model's reasoning.
const REASONING_MEMBER: &[u8] = b"\"reasoning_tokens\":";

/// Facts about one response.
#[derive(Debug, Default)]
pub(super) struct ResponseFacts {
    id: Option<String>,
    model: Option<String>,
    reasons: Vec<String>,
    /// Output tokens of the model's reasoning, as the engine reports them.
    reasoning_tokens: Option<i64>,
    /// Whether the beginning of the response was read.
    has_begun: bool,
}

impl ResponseFacts {
    /// Reads data of the response, in the parts in which they arrive. A member that is split between
    /// two parts is missed.
    pub(super) fn observe(&mut self, data: &Bytes) {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.read_head(data);
        }
        for member in REASON_MEMBERS {
            for start in memmem::find_iter(data, member) {
                let rest = data[start + member.len()..].trim_ascii_start();
                self.reasons.extend(reason(rest));
            }
        }
        self.reasons.truncate(MAX_REASONS);
        // The last usage of a stream has the sum.
        if let Some(start) = memmem::rfind(data, REASONING_MEMBER) {
            let rest = data[start + REASONING_MEMBER.len()..].trim_ascii_start();
            self.reasoning_tokens = number(rest).or(self.reasoning_tokens);
        }
    }

    /// Reads the id and the model of the first event, or of a whole JSON body.
    fn read_head(&mut self, data: &Bytes) {
        #[derive(Deserialize)]
        struct Head<'b> {
            #[serde(borrow)]
            id: Option<Cow<'b, str>>,
            #[serde(borrow)]
            model: Option<Cow<'b, str>>,
        }
        let first = match memmem::find(data, b"data:") {
            Some(start) if !data.starts_with(b"{") => {
                let line = &data[start + b"data:".len()..];
                line.split(|&byte| byte == b'\n').next().unwrap_or(line)
            }
            _ => data,
        };
        if let Ok(head) = serde_json::from_slice::<Head<'_>>(first) {
            let kept = |name: Option<Cow<'_, str>>| {
                let name = name.filter(|name| name.len() <= MAX_NAME_BYTES);
                name.map(Cow::into_owned)
            };
            (self.id, self.model) = (kept(head.id), kept(head.model));
        }
    }

    /// Returns the facts as attributes of a span.
    pub(super) fn attributes(&mut self) -> Vec<KeyValue> {
        let mut attributes = Vec::new();
        let id = self.id.take();
        attributes.extend(id.map(|id| KeyValue::new("gen_ai.response.id", id)));
        let model = self.model.take();
        attributes.extend(model.map(|model| KeyValue::new("gen_ai.response.model", model)));
        let reasoning = self.reasoning_tokens;
        let name = "gen_ai.usage.reasoning.output_tokens";
        attributes.extend(reasoning.map(|tokens| KeyValue::new(name, tokens)));
        if !self.reasons.is_empty() {
            let reasons = std::mem::take(&mut self.reasons).into_iter();
            let reasons: Vec<StringValue> = reasons.map(StringValue::from).collect();
            let reasons = Value::Array(Array::String(reasons));
            attributes.push(KeyValue::new("gen_ai.response.finish_reasons", reasons));
        }
        attributes
    }
}

/// Returns the reason that begins with its quote here: one word. `None` for `null` and anything else.
fn reason(rest: &[u8]) -> Option<String> {
    let rest = rest.strip_prefix(b"\"")?;
    let end = rest
        .iter()
        .take(MAX_REASON_BYTES + 1)
        .position(|&byte| byte == b'"')?;
    let word = &rest[..end];
    let is_word = |byte: &u8| byte.is_ascii_lowercase() || *byte == b'_';
    (!word.is_empty() && word.iter().all(is_word))
        .then(|| String::from_utf8_lossy(word).into_owned())
}

/// Returns the number that begins here; `None` for `null`, and for a number that the data do not end.
fn number(rest: &[u8]) -> Option<i64> {
    let length = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&rest[..length]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(parts: &[&str]) -> ResponseFacts {
        let mut facts = ResponseFacts::default();
        for part in parts {
            facts.observe(&Bytes::copy_from_slice(part.as_bytes()));
        }
        facts
    }

    #[test]
    fn streams_and_whole_bodies_name_themselves_and_their_ends() {
        let stream = facts(&[
            "data: {\"id\":\"c-1\",\"model\":\"m\",\"choices\":[{\"finish_reason\":null}]}\n\n",
            "data: {\"id\":\"c-2\",\"choices\":[{\"finish_reason\": \"length\"}]}\n\n",
        ]);
        let whole = facts(&[
            r#"{"id":"c-1","model":"m","choices":[{"text":"x","finish_reason":"length"}]}"#,
        ]);
        for facts in [stream, whole] {
            assert_eq!(facts.id.as_deref(), Some("c-1"));
            assert_eq!(facts.model.as_deref(), Some("m"));
            assert_eq!(facts.reasons, ["length"]);
        }
    }

    #[test]
    fn the_last_usage_has_the_reasoning_tokens() {
        let usage = |tokens: &str| {
            format!(
                "data: {{\"usage\":{{\"completion_tokens_details\":{{\"reasoning_tokens\": {tokens}}}}}}}\n\n"
            )
        };
        let stream = facts(&[
            &usage("3"),
            &usage("17"),
            &usage("null"),
            "data: [DONE]\n\n",
        ]);
        assert_eq!(stream.reasoning_tokens, Some(17));
        assert_eq!(facts(&["\"reasoning_tokens\":12"]).reasoning_tokens, None);
    }

    #[test]
    fn an_output_is_not_mistaken_for_a_reason() {
        let output = r#"{"text":"{\"finish_reason\":\"secret\"}","finish_reason":"a secret text"}"#;
        assert!(facts(&[output]).reasons.is_empty());
        let many = r#"{"finish_reason":"stop"}"#.repeat(100);
        assert_eq!(facts(&[&many]).reasons.len(), MAX_REASONS);
    }
}
