//! A chat request in the form in which an engine passes it to the model's chat template.
//!
//! Engines normalise messages first: vLLM keeps the fields that it knows, joins the parts of a
//! content into one text (or turns a text into parts, if the template reads parts), and parses tool
//! arguments from their JSON. This module does the same.

use std::collections::BTreeMap;

use minijinja::Value;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::chat_template::{ContentFormat, TemplateError};

/// The fields of a chat completion's body that affect the prompt.
#[derive(Debug, Deserialize)]
pub struct Chat {
    messages: Vec<Message>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    documents: Option<Value>,
    #[serde(default)]
    reasoning_effort: Option<Value>,
    #[serde(default)]
    add_generation_prompt: Option<bool>,
    #[serde(default)]
    continue_final_message: Option<bool>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
    #[serde(default)]
    chat_template: Option<IgnoredAny>,
    #[serde(default)]
    chat_template_kwargs: Option<BTreeMap<String, Value>>,
}

/// The fields of a message that affect the prompt.
#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Option<Vec<Value>>,
    #[serde(default, alias = "reasoning_content")]
    reasoning: Option<String>,
    #[serde(default)]
    tool_call_id: Option<Value>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tools: Option<Value>,
}

/// The content of a message.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// One part of a content: a bare string or an object with a type.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Part {
    Bare(String),
    Typed {
        #[serde(rename = "type")]
        kind: String,
        #[serde(default)]
        text: Option<String>,
        #[serde(default)]
        refusal: Option<String>,
    },
}

/// Text that is appended to the message to be continued, so that its end can be found in the
/// rendered text.
const FINAL_MESSAGE_SENTINEL: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl Chat {
    /// Parses the body of a chat completion.
    ///
    /// # Errors
    /// If the body is not a chat completion, or contains its own template.
    pub fn parse(body: &[u8]) -> Result<Self, TemplateError> {
        let chat: Self =
            serde_json::from_slice(body).map_err(|error| TemplateError::Chat(error.to_string()))?;
        if chat.chat_template.is_some() {
            return Err(TemplateError::Chat(
                "the request contains its own `chat_template`".to_owned(),
            ));
        }
        Ok(chat)
    }

    /// Returns whether the engine adds special tokens to the rendered text, in addition to those
    /// that the template writes.
    #[must_use]
    pub fn adds_special_tokens(&self) -> bool {
        self.add_special_tokens.unwrap_or(false)
    }

    /// Returns whether the body offers tools, for which a model may have a template of its own.
    pub(crate) fn has_tools(&self) -> bool {
        self.tools.is_some()
    }

    /// Returns the variables of the template, including those of `chat_template_kwargs`, which the
    /// fields of the body override. `tools` and `documents` are always defined, and
    /// `add_generation_prompt` is true by default.
    ///
    /// # Errors
    /// If a message contains a part that is not text.
    pub(crate) fn variables(
        &self,
        format: ContentFormat,
    ) -> Result<BTreeMap<String, Value>, TemplateError> {
        let mut messages = Vec::with_capacity(self.messages.len());
        for (index, message) in self.messages.iter().enumerate() {
            let continued = self.continues_final_message() && index + 1 == self.messages.len();
            messages.push(message.normalize(format, continued)?);
        }
        let mut variables = self.chat_template_kwargs.clone().unwrap_or_default();
        let tools = self.tools.as_ref().map(|tools| {
            let tools: Vec<Value> = tools.iter().map(normalize_tool).collect();
            Value::from(tools)
        });
        let mut set = |name: &str, value| variables.insert(name.to_owned(), value);
        set("messages", Value::from(messages));
        set("tools", tools.into());
        set("documents", self.documents.clone().into());
        let generation_prompt = self.add_generation_prompt.unwrap_or(true);
        set("add_generation_prompt", generation_prompt.into());
        if let Some(effort) = &self.reasoning_effort {
            set("reasoning_effort", effort.clone());
        }
        Ok(variables)
    }

    /// Cuts the rendered text at the end of the message to be continued. Returns the text unchanged
    /// if the chat does not continue its last message.
    ///
    /// # Errors
    /// If the rendered text does not contain that message.
    pub(crate) fn cut_at_final_message(
        &self,
        mut rendered: String,
    ) -> Result<String, TemplateError> {
        if !self.continues_final_message() {
            return Ok(rendered);
        }
        let Some(end) = rendered.rfind(FINAL_MESSAGE_SENTINEL.trim_end()) else {
            return Err(TemplateError::Chat(
                "rendered text does not contain the message to continue".to_owned(),
            ));
        };
        let trimmed = !rendered[end..].starts_with(FINAL_MESSAGE_SENTINEL);
        rendered.truncate(end);
        if trimmed {
            // The template strips white space at the ends of messages, so it is stripped here too.
            rendered.truncate(rendered.trim_end().len());
        }
        Ok(rendered)
    }

    /// Returns whether the output continues the last message instead of starting a new one.
    fn continues_final_message(&self) -> bool {
        self.continue_final_message.unwrap_or(false)
    }
}

impl Message {
    /// Returns the message as vLLM passes it to a template that expects `format`: fields that do
    /// not belong to the message's role are left out. `continued` appends the sentinel that marks
    /// the end of the message.
    ///
    /// # Errors
    /// If the message contains a part that is not text.
    fn normalize(&self, format: ContentFormat, continued: bool) -> Result<Value, TemplateError> {
        let mut texts = match &self.content {
            None => Vec::new(),
            Some(Content::Text(text)) => vec![text.clone()],
            Some(Content::Parts(parts)) => {
                let texts = parts.iter().map(Part::text);
                texts.collect::<Result<_, _>>()?
            }
        };
        if format == ContentFormat::Text {
            texts.retain(|text| !text.is_empty());
        }
        if continued {
            match texts.last_mut() {
                Some(last) => last.push_str(FINAL_MESSAGE_SENTINEL),
                None => texts.push(FINAL_MESSAGE_SENTINEL.to_owned()),
            }
        }
        // vLLM joins the parts of a tool message in either case.
        let content = if format == ContentFormat::Text || self.role == "tool" {
            Value::from(texts.join("\n"))
        } else {
            let part = |text| Value::from_pairs([("type", Value::from("text")), ("text", text)]);
            texts.into_iter().map(|text| part(text.into())).collect()
        };
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
}

impl Part {
    /// Returns the text of the part, which is empty if its field is missing.
    ///
    /// # Errors
    /// If the part is not text.
    fn text(&self) -> Result<String, TemplateError> {
        match self {
            Self::Bare(text) => Ok(text.clone()),
            Self::Typed {
                kind,
                text,
                refusal,
            } => match kind.as_str() {
                "text" | "input_text" | "output_text" => Ok(text.clone().unwrap_or_default()),
                "refusal" => Ok(refusal.clone().unwrap_or_default()),
                // Only the engine knows how many tokens an image or a sound takes.
                _ => Err(TemplateError::Media(kind.clone())),
            },
        }
    }
}

/// Returns a tool in which the fields of OpenAI's schema come first and are all present, followed
/// by its other fields.
fn normalize_tool(tool: &Value) -> Value {
    let function = tool.get_attr("function").unwrap_or_default();
    let fields = ["name", "description", "parameters"];
    let described = with_fields_first(&function, &fields.map(|field| (field, Value::from(()))));
    let defaults = [("type", Value::from("function")), ("function", described)];
    let tool = with_fields_first(tool, &defaults);
    replace_field(&tool, "function", |_| defaults[1].1.clone())
}

/// Returns a tool call whose arguments are an object. The request may contain them as an object or
/// as JSON text; anything else becomes an empty object. A call without `function` is returned
/// unchanged.
fn normalize_tool_call(call: &Value) -> Value {
    replace_field(call, "function", |function| {
        let arguments = function.get_attr("arguments").unwrap_or_default();
        let parsed = match arguments.as_str() {
            Some(json) => serde_json::from_str(json).unwrap_or_default(),
            None => arguments,
        };
        let object = match parsed.kind() {
            minijinja::value::ValueKind::Map => parsed,
            _ => Value::from_pairs(Vec::<(&str, Value)>::new()),
        };
        let function = with_fields_first(function, &[]);
        let mut fields = map_entries(&replace_field(&function, "arguments", |_| object.clone()));
        if !fields
            .iter()
            .any(|(key, _)| key.as_str() == Some("arguments"))
        {
            fields.push(("arguments".into(), object));
        }
        Value::from_pairs(fields)
    })
}

/// Returns the keys and values of a map, in order; none if the value is not a map.
fn map_entries(map: &Value) -> Vec<(Value, Value)> {
    let Ok(keys) = map.try_iter() else {
        return Vec::new();
    };
    keys.map(|key| {
        let value = map.get_item(&key).unwrap_or_default();
        (key, value)
    })
    .collect()
}

/// Returns the map with the value of `name` replaced by `new(value)`, if the map has that key.
fn replace_field(map: &Value, name: &str, new: impl Fn(&Value) -> Value) -> Value {
    let replaced = map_entries(map).into_iter().map(|(key, value)| {
        let value = match key.as_str() {
            Some(key) if key == name => new(&value),
            _ => value,
        };
        (key, value)
    });
    Value::from_pairs(replaced)
}

/// Returns the map with the fields of `defaults` first, in that order. A field that is missing in
/// the map has its default value.
fn with_fields_first(map: &Value, defaults: &[(&str, Value)]) -> Value {
    let given = map_entries(map);
    let is_first = |key: &Value| defaults.iter().any(|(name, _)| key.as_str() == Some(*name));
    let mut fields: Vec<(Value, Value)> = Vec::with_capacity(given.len() + defaults.len());
    for (name, default) in defaults {
        let found = given.iter().find(|(key, _)| key.as_str() == Some(*name));
        let value = found.map_or(default, |(_, value)| value);
        fields.push(((*name).into(), value.clone()));
    }
    fields.extend(given.into_iter().filter(|(key, _)| !is_first(key)));
    Value::from_pairs(fields)
}
