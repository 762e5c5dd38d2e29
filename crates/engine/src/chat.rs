//! A chat request as an engine hands it to the model's chat template.
//!
//! Engines do not pass messages on as they came: vLLM keeps the fields it knows, makes one text of
//! a content's parts (or parts of a text, where the template reads parts), and reads tool
//! arguments from their JSON. What is done here is what it does.

use std::collections::BTreeMap;

use minijinja::Value;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::chat_template::{ContentFormat, TemplateError};

/// What of a chat completion's body reaches the prompt.
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

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

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

/// Added to the message that is to be continued, to find its end in the rendered text.
const END_OF_FINAL_MESSAGE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl Chat {
    /// Reads the body of a chat completion.
    ///
    /// # Errors
    /// If it is no chat, or one that cannot be rendered as the engine would.
    pub fn parse(body: &[u8]) -> Result<Self, TemplateError> {
        let chat: Self =
            serde_json::from_slice(body).map_err(|error| TemplateError::Chat(error.to_string()))?;
        if chat.chat_template.is_some() {
            return Err(TemplateError::Chat("it brings its own template".to_owned()));
        }
        Ok(chat)
    }

    /// Whether the rendered text is to be framed with special tokens once more.
    #[must_use]
    pub fn adds_special_tokens(&self) -> bool {
        self.add_special_tokens.unwrap_or(false)
    }

    /// Whether tools are offered, which may call for another template.
    pub(crate) fn has_tools(&self) -> bool {
        self.tools.is_some()
    }

    /// The variables of the template, the request's own among them.
    pub(crate) fn variables(
        &self,
        format: ContentFormat,
    ) -> Result<BTreeMap<String, Value>, TemplateError> {
        let mut messages = Vec::with_capacity(self.messages.len());
        for (index, message) in self.messages.iter().enumerate() {
            let continued = self.continues() && index + 1 == self.messages.len();
            messages.push(message.as_engines_see_it(format, continued)?);
        }
        let mut variables = self.chat_template_kwargs.clone().unwrap_or_default();
        let tools = self.tools.as_ref().map(|tools| {
            let tools: Vec<Value> = tools.iter().map(tool_as_engines_see_it).collect();
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

    /// Cuts the rendered text where the message that is to be continued ends.
    pub(crate) fn cut(&self, mut rendered: String) -> Result<String, TemplateError> {
        if !self.continues() {
            return Ok(rendered);
        }
        let Some(end) = rendered.rfind(END_OF_FINAL_MESSAGE.trim_end()) else {
            return Err(TemplateError::Chat(
                "the message to continue is not in the rendered text".to_owned(),
            ));
        };
        let trimmed = !rendered[end..].starts_with(END_OF_FINAL_MESSAGE);
        rendered.truncate(end);
        if trimmed {
            // The template strips the ends of messages, so this one's own end goes too.
            rendered.truncate(rendered.trim_end().len());
        }
        Ok(rendered)
    }

    fn continues(&self) -> bool {
        self.continue_final_message.unwrap_or(false)
    }
}

impl Message {
    fn as_engines_see_it(
        &self,
        format: ContentFormat,
        continued: bool,
    ) -> Result<Value, TemplateError> {
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
                Some(last) => last.push_str(END_OF_FINAL_MESSAGE),
                None => texts.push(END_OF_FINAL_MESSAGE.to_owned()),
            }
        }
        // vLLM makes one text of a tool's answer in either case.
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
                    let calls: Vec<Value> = calls.iter().map(call_as_engines_see_it).collect();
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
                // How many tokens an image takes, only the engine knows.
                _ => Err(TemplateError::Media(kind.clone())),
            },
        }
    }
}

/// A tool with the fields of OpenAI's schema first and present, the others behind them.
fn tool_as_engines_see_it(tool: &Value) -> Value {
    let function = tool.get_attr("function").unwrap_or_default();
    let fields = ["name", "description", "parameters"];
    let described = with_fields_first(&function, &fields.map(|field| (field, Value::from(()))));
    let defaults = [("type", Value::from("function")), ("function", described)];
    let tool = with_fields_first(tool, &defaults);
    replace(&tool, "function", |_| defaults[1].1.clone())
}

/// A call with its arguments as an object, whether they came as one or as JSON.
fn call_as_engines_see_it(call: &Value) -> Value {
    replace(call, "function", |function| {
        let arguments = function.get_attr("arguments").unwrap_or_default();
        let read = match arguments.as_str() {
            Some(json) => serde_json::from_str(json).unwrap_or_default(),
            None => arguments,
        };
        let object = match read.kind() {
            minijinja::value::ValueKind::Map => read,
            _ => Value::from_pairs(Vec::<(&str, Value)>::new()),
        };
        let function = with_fields_first(function, &[]);
        let mut fields = pairs(&replace(&function, "arguments", |_| object.clone()));
        if !fields
            .iter()
            .any(|(key, _)| key.as_str() == Some("arguments"))
        {
            fields.push(("arguments".into(), object));
        }
        Value::from_pairs(fields)
    })
}

fn pairs(map: &Value) -> Vec<(Value, Value)> {
    let Ok(keys) = map.try_iter() else {
        return Vec::new();
    };
    keys.map(|key| {
        let value = map.get_item(&key).unwrap_or_default();
        (key, value)
    })
    .collect()
}

/// The map with one value, if it is there, replaced.
fn replace(map: &Value, name: &str, new: impl Fn(&Value) -> Value) -> Value {
    let replaced = pairs(map).into_iter().map(|(key, value)| {
        let value = match key.as_str() {
            Some(key) if key == name => new(&value),
            _ => value,
        };
        (key, value)
    });
    Value::from_pairs(replaced)
}

/// The map with these fields first, in this order, and with these values where it has none.
fn with_fields_first(map: &Value, defaults: &[(&str, Value)]) -> Value {
    let given = pairs(map);
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
