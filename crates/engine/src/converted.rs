//! The messages that a request of another API is converted to.

use minijinja::Value;

use crate::chat_message::{Content, Message, Part};
use crate::template_error::TemplateError;

/// The messages of a converted request, and what could not be converted.
#[derive(Debug, Default)]
pub(crate) struct Converted {
    pub(crate) messages: Vec<Message>,
    /// Hash of the first image.
    pub(crate) media_hash: Option<u64>,
    /// The first item or part that is not supported. Then the messages are only good for matching
    /// text: a part of media stands for the item.
    fault: Option<String>,
}

impl Converted {
    /// Returns the messages.
    ///
    /// # Errors
    /// If a part of the request is not supported.
    pub(crate) fn into_messages(self) -> Result<Vec<Message>, TemplateError> {
        match self.fault {
            None => Ok(self.messages),
            Some(fault) => Err(TemplateError::Chat(format!("not supported: {fault}"))),
        }
    }

    /// Records a part of the request that is not supported.
    pub(crate) fn set_fault(&mut self, fault: impl Into<String>) {
        self.fault.get_or_insert_with(|| fault.into());
    }

    /// Adds a message with a part of media for an item that is not supported.
    pub(crate) fn add_unsupported(&mut self, fault: impl Into<String>) {
        self.set_fault(fault);
        self.messages.push(Message {
            role: "user".to_owned(),
            content: Some(Content::Parts(vec![Part::of_media("unsupported")])),
            ..Message::default()
        });
    }

    /// Returns the last message, if it is an assistant message at the position `first` or later.
    pub(crate) fn last_assistant_message(&mut self, first: usize) -> Option<&mut Message> {
        let last = self.messages.get_mut(first..)?.last_mut();
        last.filter(|message| message.role == "assistant")
    }

    /// Adds a tool call to the last message, if that is an assistant message at the position
    /// `first` or later, otherwise as a message of its own.
    pub(crate) fn add_tool_call(&mut self, first: usize, call: Value) {
        match self.last_assistant_message(first) {
            Some(message) => message.tool_calls.get_or_insert_default().push(call),
            None => self.messages.push(Message {
                role: "assistant".to_owned(),
                tool_calls: Some(vec![call]),
                ..Message::default()
            }),
        }
    }

    /// Joins successive assistant messages, as SGLang does. Their texts are separated by a blank
    /// line.
    pub(crate) fn join_assistant_messages(&mut self) {
        let messages = std::mem::take(&mut self.messages);
        for message in messages {
            match self.messages.last_mut() {
                Some(last) if last.role == "assistant" && message.role == "assistant" => {
                    last.absorb(message);
                }
                _ => self.messages.push(message),
            }
        }
    }

    /// Moves the texts of all system messages to a system message at the start. `separator` stands
    /// between two texts.
    pub(crate) fn merge_system(&mut self, separator: &str) {
        let mut texts = Vec::new();
        self.messages.retain(|message| {
            let is_system = message.role == "system";
            if is_system {
                match &message.content {
                    Some(Content::Text(text)) => texts.push(text.clone()),
                    Some(Content::Parts(parts)) => {
                        texts.extend(parts.iter().filter_map(Part::text).map(str::to_owned));
                    }
                    None => {}
                }
            }
            !is_system
        });
        if !texts.is_empty() {
            let text = texts.join(separator);
            self.messages.insert(0, Message::of_text("system", text));
        }
    }
}

impl Message {
    /// Adds the content, the tool calls and the reasoning of an assistant message that follows.
    fn absorb(&mut self, next: Self) {
        let is_empty =
            |content: &Content| matches!(content, Content::Text(text) if text.is_empty());
        let content = self.content.take().filter(|content| !is_empty(content));
        let added = next.content.filter(|content| !is_empty(content));
        self.content = match (content, added) {
            (Some(Content::Text(text)), Some(Content::Text(added))) => {
                Some(Content::Text(format!("{text}\n\n{added}")))
            }
            (Some(content), Some(added)) => {
                let mut parts = content.into_parts();
                parts.extend(added.into_parts());
                Some(Content::Parts(parts))
            }
            (content, added) => content.or(added),
        };
        if let Some(calls) = next.tool_calls {
            self.tool_calls.get_or_insert_default().extend(calls);
        }
        self.reasoning = match (self.reasoning.take(), next.reasoning) {
            (Some(reasoning), Some(added)) => Some(format!("{reasoning}\n{added}")),
            (reasoning, added) => reasoning.or(added),
        };
    }
}

impl Content {
    /// Returns the content as a list of parts.
    fn into_parts(self) -> Vec<Part> {
        match self {
            Self::Text(text) => vec![Part::of_text(text)],
            Self::Parts(parts) => parts,
        }
    }
}
