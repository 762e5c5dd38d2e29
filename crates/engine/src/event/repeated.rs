//! Events that differ from an earlier event of their stream only in the text that they add.
//!
//! Nearly all events of a stream do: the id, the model and the form of the choice are the same in each.
//! Such an event is recognised by comparing bytes, which costs a tenth of parsing it.

use serde_json::value::RawValue;
use smallvec::SmallVec;

use crate::event::{ChoiceDelta, Event};

/// Returns whether a JSON value is a string that is not empty. An empty one adds nothing, so it does
/// not mean the same as others.
fn is_filled_string(value: &[u8]) -> bool {
    value.first() == Some(&b'"') && value != b"\"\""
}

/// The bytes around the text of an event, and what the event means.
///
/// The text is one JSON string, so an event with the same bytes around another string has the same
/// meaning, apart from that string.
#[derive(Debug)]
pub(crate) struct RepeatedEvent {
    before_text: Box<[u8]>,
    after_text: Box<[u8]>,
    /// The delta of the only choice, without its text.
    delta: ChoiceDelta<'static>,
}

impl RepeatedEvent {
    /// Returns the form of an event that was parsed from `data`; `None` unless all that it does is to
    /// add text to one choice.
    pub(crate) fn of(event: &Event<'_>, data: &[u8]) -> Option<Self> {
        let &[delta] = event.choices.as_slice() else {
            return None;
        };
        let has_more = event.usage.is_some()
            || event.is_error
            || event.is_last
            || event.response_id.is_some()
            || delta.finished;
        let text = delta.text.filter(|_| !has_more)?.get();
        if !is_filled_string(text.as_bytes()) {
            return None;
        }
        let start = text.as_ptr().addr().checked_sub(data.as_ptr().addr())?;
        Some(Self {
            before_text: data.get(..start)?.into(),
            after_text: data.get(start + text.len()..)?.into(),
            delta: ChoiceDelta {
                index: delta.index,
                tokens: delta.tokens,
                finished: false,
                finished_by_stop: false,
                text: None,
                has_reasoning: delta.has_reasoning,
                has_tool_calls: delta.has_tool_calls,
            },
        })
    }

    /// Returns the event with this data; `None` if it has another form, or no text.
    pub(crate) fn read<'d>(&self, data: &'d [u8]) -> Option<Event<'d>> {
        let rest = data.strip_prefix(&*self.before_text)?;
        let text = rest.strip_suffix(&*self.after_text)?;
        if !is_filled_string(text) {
            return None;
        }
        // Fails unless all of `text` is one value.
        let text: &RawValue = serde_json::from_slice(text).ok()?;
        Some(Event {
            choices: SmallVec::from_buf([ChoiceDelta {
                text: Some(text),
                ..self.delta
            }]),
            ..Event::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::EventFormat;

    const CHAT: &str =
        r#"{"id":"c","choices":[{"index":1,"delta":{"content":TEXT},"finish_reason":null}]}"#;

    /// Events of all forms, with `TEXT` in place of a value.
    const FORMS: [(EventFormat, &str); 8] = [
        (EventFormat::Choices, CHAT),
        (
            EventFormat::Choices,
            r#"{"choices":[{"text":TEXT,"token_ids":[4,5]}],"usage":null}"#,
        ),
        (
            EventFormat::Choices,
            r#"{"choices":[{"delta":{"content":TEXT,"reasoning":"r"}}]}"#,
        ),
        (
            EventFormat::Choices,
            r#"{"choices":[{"delta":{"content":TEXT},"finish_reason":"stop"}]}"#,
        ),
        (
            EventFormat::Choices,
            r#"{"choices":[{"delta":{"content":TEXT}}],"usage":{"completion_tokens":3}}"#,
        ),
        (
            EventFormat::Choices,
            r#"{"choices":[{"text":TEXT},{"index":1,"text":"b"}]}"#,
        ),
        (
            EventFormat::Responses,
            r#"{"type":"response.output_text.delta","delta":TEXT}"#,
        ),
        (
            EventFormat::Messages,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":TEXT}}"#,
        ),
    ];

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            ".{0,8}".prop_map(|text| serde_json::to_string(&text).unwrap()),
            "[ -~\n]{0,12}",
            r#"("a"|null|\[\]|""|"\\"|"\\""|"a" |"a","b":"c"|"\\u12")"#,
        ]
    }

    proptest! {
        #[test]
        fn a_repeated_event_means_what_its_data_say(
            form in prop::sample::select(&FORMS[..]),
            first in text(),
            second in text(),
        ) {
            let (format, form) = form;
            let first = form.replace("TEXT", &first);
            let event = Event::parse(format, first.as_bytes()).unwrap_or_default();
            let repeated = RepeatedEvent::of(&event, first.as_bytes());
            let second = form.replace("TEXT", &second);
            let read = repeated.as_ref().and_then(|repeated| repeated.read(second.as_bytes()));
            if let Some(read) = read {
                let parsed = Event::parse(format, second.as_bytes());
                // Without usage, its scope has no meaning.
                let parsed = parsed.map(|event| Event { usage_scope: read.usage_scope, ..event });
                prop_assert_eq!(format!("{:?}", Some(read)), format!("{parsed:?}"));
            }
        }
    }

    #[test]
    fn the_next_text_is_recognised_and_nothing_else() {
        let data = |text: &str| CHAT.replace("TEXT", text);
        let first = data(r#""a""#);
        let event = Event::parse(EventFormat::Choices, first.as_bytes()).unwrap();
        let repeated = RepeatedEvent::of(&event, first.as_bytes()).unwrap();
        let second = data(r#"" \"é\"""#);
        let event = repeated.read(second.as_bytes()).unwrap();
        assert_eq!(event.choices[0].text.unwrap().get(), r#"" \"é\"""#);
        for other in [
            data(r#""""#),
            data("null"),
            data("1"),
            data(r#""a","content":"b""#),
            data(r#""a""#).replace("null", r#""stop""#),
            data(r#""a""#).replace(r#""index":1"#, r#""index":2"#),
        ] {
            assert!(repeated.read(other.as_bytes()).is_none(), "{other}");
        }
    }
}
