//! A message of a chat in the form in which vLLM passes it to a chat template.

use minijinja::Value;
use serde::Deserialize;

use crate::chat_tool::normalize_tool_call;
use crate::conversion::Dialect;
use crate::template_error::TemplateError;

/// Start of a line that Claude Code writes into its system prompt. The line changes with each
/// request, so vLLM removes it before it renders the prompt.
pub(crate) const BILLING_HEADER: &str = "x-anthropic-billing-header";

/// Text that is appended to the message to be continued, so that its end can be found in the
/// rendered text.
pub(crate) const FINAL_MESSAGE_SENTINEL: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The form of a message's content that a template expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentFormat {
    /// A text.
    Text,
    /// A list of parts.
    Parts,
}

/// The form of a chat that a template expects.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TemplateForm {
    /// Form of the messages' content.
    pub(crate) content: ContentFormat,
    /// Whether the template names the role `developer`.
    pub(crate) has_developer_role: bool,
}

/// The fields of a message that affect the prompt.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    #[serde(default)]
    pub(crate) content: Option<Content>,
    #[serde(default)]
    pub(crate) tool_calls: Option<Vec<Value>>,
    #[serde(default, alias = "reasoning_content")]
    pub(crate) reasoning: Option<String>,
    #[serde(default)]
    pub(crate) tool_call_id: Option<Value>,
    #[serde(default)]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) tools: Option<Value>,
}

/// The content of a message.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// One part of a content: a bare string or an object with a type.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Part {
    Bare(String),
    Typed(TypedPart),
}

/// A part of a content that is an object. Each field belongs to some of the types.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct TypedPart {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) text: Option<String>,
    #[serde(default)]
    pub(crate) refusal: Option<String>,
    #[serde(default)]
    pub(crate) thinking: Option<String>,
    #[serde(default)]
    pub(crate) name: Option<String>,
}

/// A part as a template receives it.
enum Piece {
    Text(String),
    /// The name of a tool that the template describes at this position.
    ToolReference(String),
}

impl Message {
    /// Creates a message with a text.
    pub(crate) fn of_text(role: &str, text: impl Into<String>) -> Self {
        Self {
            role: role.to_owned(),
            content: Some(Content::Text(text.into())),
            ..Self::default()
        }
    }

    /// Returns the message as the engine passes it to a template that expects `format`: fields that
    /// do not belong to the message's role are left out. `continued` appends the sentinel that marks
    /// the end of the message.
    ///
    /// # Errors
    /// If the message contains a part that is not text.
    pub(crate) fn normalize(
        &self,
        format: ContentFormat,
        dialect: Dialect,
        continued: bool,
    ) -> Result<Value, TemplateError> {
        let content = self.normalize_content(format, dialect, continued)?;
        let mut fields = vec![("role", Value::from(&self.role)), ("content", content)];
        match self.role.as_str() {
            "assistant" => {
                if let Some(calls) = self.tool_calls.as_ref().filter(|calls| !calls.is_empty()) {
                    let calls: Vec<Value> = calls.iter().map(normalize_tool_call).collect();
                    fields.push(("tool_calls", calls.into()));
                }
                if let Some(reasoning) = &self.reasoning {
                    fields.push(("reasoning", reasoning.into()));
                    fields.push(("reasoning_content", reasoning.into()));
                }
            }
            "tool" => {
                if let Some(id) = &self.tool_call_id {
                    fields.push(("tool_call_id", id.clone()));
                }
            }
            "developer" => fields.push(("tools", self.tools.clone().into())),
            _ => {}
        }
        if let Some(name) = &self.name {
            fields.push(("name", name.into()));
        }
        Ok(Value::from_pairs(fields))
    }

    /// Returns the content as a template that expects `format` receives it; see
    /// [`normalize`](Self::normalize).
    fn normalize_content(
        &self,
        format: ContentFormat,
        dialect: Dialect,
        continued: bool,
    ) -> Result<Value, TemplateError> {
        let is_vllm = dialect == Dialect::Vllm;
        let mut pieces = self.pieces(dialect)?;
        if format == ContentFormat::Text {
            // vLLM leaves out empty texts, SGLang all that is not text.
            pieces.retain(|piece| match is_vllm {
                true => !piece.text().is_empty(),
                false => matches!(piece, Piece::Text(_)),
            });
        }
        if continued {
            match pieces.last_mut() {
                Some(Piece::Text(last)) => last.push_str(FINAL_MESSAGE_SENTINEL),
                _ => pieces.push(Piece::Text(FINAL_MESSAGE_SENTINEL.to_owned())),
            }
        }
        let has_only_text = pieces.iter().all(|piece| matches!(piece, Piece::Text(_)));
        // SGLang splits no text into parts.
        let is_text = !is_vllm && !matches!(self.content, Some(Content::Parts(_)));
        // The parts of a tool message are joined in either case, unless one is not text.
        let is_joined = format == ContentFormat::Text || self.role == "tool" && has_only_text;
        if is_text || is_joined {
            let separator = if is_vllm { "\n" } else { " " };
            let texts: Vec<&str> = pieces.iter().map(Piece::text).collect();
            return Ok(Value::from(texts.join(separator)));
        }
        let parts = pieces.into_iter().map(|piece| match piece {
            Piece::Text(text) => {
                Value::from_pairs([("type", Value::from("text")), ("text", text.into())])
            }
            Piece::ToolReference(name) => Value::from_pairs([
                ("type", Value::from("tool_reference")),
                ("name", name.into()),
            ]),
        });
        Ok(parts.collect())
    }

    /// Returns the parts of the content. vLLM removes the [`BILLING_HEADER`] of a system message.
    fn pieces(&self, dialect: Dialect) -> Result<Vec<Piece>, TemplateError> {
        let is_stripped = dialect == Dialect::Vllm && self.role == "system";
        let strip = |text: &str| match is_stripped {
            true => strip_billing_header(text).map(str::to_owned),
            false => Some(text.to_owned()),
        };
        match &self.content {
            None => Ok(Vec::new()),
            Some(Content::Text(text)) => Ok(strip(text).map(Piece::Text).into_iter().collect()),
            Some(Content::Parts(parts)) => {
                let mut pieces = Vec::with_capacity(parts.len());
                for part in parts {
                    match part.piece()? {
                        Piece::Text(text) if part.is_plain_text() => {
                            pieces.extend(strip(&text).map(Piece::Text));
                        }
                        piece => pieces.push(piece),
                    }
                }
                Ok(pieces)
            }
        }
    }
}

/// Removes the line with the [`BILLING_HEADER`] from the start of a text; `None` if nothing else is
/// left.
pub(crate) fn strip_billing_header(text: &str) -> Option<&str> {
    if !text.starts_with(BILLING_HEADER) {
        return Some(text);
    }
    let (_, rest) = text.split_once('\n')?;
    (!rest.is_empty()).then_some(rest)
}

impl Part {
    /// Creates a part of text.
    pub(crate) fn of_text(text: impl Into<String>) -> Self {
        Self::Typed(TypedPart {
            kind: "text".to_owned(),
            text: Some(text.into()),
            ..TypedPart::default()
        })
    }

    /// Creates a part that is not text, such as `image_url`.
    pub(crate) fn of_media(kind: &str) -> Self {
        Self::Typed(TypedPart {
            kind: kind.to_owned(),
            ..TypedPart::default()
        })
    }

    /// Returns the text of the part; `None` if the part is not text.
    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Bare(text) => Some(text),
            Self::Typed(part) => match part.kind.as_str() {
                "text" | "input_text" | "output_text" => part.text.as_deref(),
                "refusal" => part.refusal.as_deref(),
                "thinking" => part.thinking.as_deref(),
                "tool_reference" => part.name.as_deref(),
                _ => return None,
            }
            .or(Some("")),
        }
    }

    /// Returns whether the part is a bare string or of the type `text`.
    fn is_plain_text(&self) -> bool {
        match self {
            Self::Bare(_) => true,
            Self::Typed(part) => part.kind == "text",
        }
    }

    /// Returns the part as a template receives it. The text is empty if its field is missing.
    ///
    /// # Errors
    /// If the part is not text.
    fn piece(&self) -> Result<Piece, TemplateError> {
        match (self, self.text()) {
            (Self::Typed(part), Some(name)) if part.kind == "tool_reference" => {
                Ok(Piece::ToolReference(name.to_owned()))
            }
            (_, Some(text)) => Ok(Piece::Text(text.to_owned())),
            // Only the engine knows how many tokens an image or a sound takes.
            (Self::Typed(part), None) => Err(TemplateError::Media(part.kind.clone())),
            (Self::Bare(_), None) => Ok(Piece::Text(String::new())),
        }
    }
}

impl Piece {
    /// Returns the text, or the name of the tool.
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::ToolReference(text) => text,
        }
    }
}
