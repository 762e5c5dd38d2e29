//! A chat request in the form in which an engine passes it to the model's chat template.
//!
//! Engines normalise messages first: vLLM keeps the fields that it knows, joins the parts of a
//! content into one text (or turns a text into parts, if the template reads parts), and parses tool
//! arguments from their JSON. This module does the same. Requests of the Responses and Messages
//! APIs are converted to this form first, as engines do.

use std::collections::BTreeMap;

use minijinja::Value;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::chat_message::{FINAL_MESSAGE_SENTINEL, Message, TemplateForm};

use crate::chat_tool::{keep_tool_order, normalize_tool, order_tool_call};
use crate::conversion::Dialect;
use crate::template_error::TemplateError;

/// The parts of a body that affect the prompt.
#[derive(Debug, Default, Deserialize)]
pub struct Chat {
    pub(crate) messages: Vec<Message>,
    #[serde(default)]
    pub(crate) tools: Option<Vec<Value>>,
    #[serde(default)]
    pub(crate) documents: Option<Value>,
    #[serde(default)]
    pub(crate) reasoning_effort: Option<Value>,
    /// Whether the request turns reasoning off by Anthropic's `thinking`. Which effort this stands
    /// for depends on the template.
    #[serde(skip)]
    pub(crate) disables_thinking: bool,
    /// The engine that renders the chat.
    #[serde(skip)]
    pub(crate) dialect: Dialect,
    /// Read only for SGLang, which offers the model only the tools that this choice allows.
    #[serde(default)]
    pub(crate) tool_choice: Option<Value>,
    #[serde(default)]
    pub(crate) add_generation_prompt: Option<bool>,
    #[serde(default)]
    pub(crate) continue_final_message: Option<bool>,
    #[serde(default)]
    pub(crate) add_special_tokens: Option<bool>,
    #[serde(default)]
    pub(crate) chat_template: Option<IgnoredAny>,
    #[serde(default)]
    pub(crate) chat_template_kwargs: Option<BTreeMap<String, Value>>,
}

impl Chat {
    /// Parses the body of a chat completion.
    ///
    /// # Errors
    /// If the body is not a chat completion, or contains its own template.
    pub fn parse(body: &[u8]) -> Result<Self, TemplateError> {
        let mut chat: Self =
            serde_json::from_slice(body).map_err(|error| TemplateError::Chat(error.to_string()))?;
        if chat.chat_template.is_some() {
            return Err(TemplateError::Chat(
                "the request contains its own `chat_template`".to_owned(),
            ));
        }
        for message in &mut chat.messages {
            for call in message.tool_calls.iter_mut().flatten() {
                *call = order_tool_call(call);
            }
        }
        Ok(chat)
    }

    /// Returns the chat as an engine of this dialect renders it.
    #[must_use]
    pub fn rendered_by(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
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
    /// `add_generation_prompt` is true by default. A reasoning effort also defines
    /// `enable_thinking`. `form` is the form of a chat that the template expects, and
    /// `disabled_effort` the effort that stands for disabled thinking.
    ///
    /// # Errors
    /// If a message contains a part that is not text.
    pub(crate) fn variables(
        &self,
        form: TemplateForm,
        disabled_effort: &'static str,
    ) -> Result<BTreeMap<String, Value>, TemplateError> {
        let is_vllm = self.dialect == Dialect::Vllm;
        let mut messages = Vec::with_capacity(self.messages.len());
        for (index, message) in self.messages.iter().enumerate() {
            let continued = self.continues_final_message() && index + 1 == self.messages.len();
            messages.push(message.normalize(form.content, self.dialect, continued)?);
        }
        let has_developer = self
            .messages
            .iter()
            .any(|message| message.role == "developer");
        if is_vllm && has_developer && !form.has_developer_role {
            messages = developer_to_system(messages);
        }
        if !is_vllm && self.add_generation_prompt.is_none() && !self.continues_final_message() {
            end_with_user(&mut messages);
        }
        let mut variables = self.chat_template_kwargs.clone().unwrap_or_default();
        let tools = self.offered_tools().map(Value::from);
        let mut set = |name: &str, value| variables.insert(name.to_owned(), value);
        set("messages", Value::from(messages));
        set("tools", tools.into());
        set("documents", self.documents.clone().into());
        let generation_prompt = self.add_generation_prompt.unwrap_or(true);
        set("add_generation_prompt", generation_prompt.into());
        let effort = match self.disables_thinking {
            true if is_vllm => Some(Value::from(disabled_effort)),
            _ => self.reasoning_effort.clone(),
        };
        let effort = effort.filter(|effort| !effort.is_none());
        let has_effort = effort.is_some();
        let thinks = match &effort {
            _ if self.disables_thinking && !is_vllm => false,
            Some(effort) => effort.as_str() != Some("none"),
            None => true,
        };
        if let Some(effort) = effort {
            // `auto` leaves the effort to the template.
            if effort.as_str() != Some("auto") {
                set("reasoning_effort", effort);
            }
        }
        if is_vllm && has_effort {
            variables
                .entry("enable_thinking".to_owned())
                .or_insert(thinks.into());
        } else if !thinks {
            // SGLang sets the options of all families of models.
            for option in ["thinking", "enable_thinking"] {
                variables.entry(option.to_owned()).or_insert(thinks.into());
            }
        }
        Ok(variables)
    }

    /// Returns the tools in the form in which the template receives them; `None` if there are none.
    fn offered_tools(&self) -> Option<Vec<Value>> {
        let tools = self.tools.as_ref()?;
        match self.dialect {
            Dialect::Vllm => Some(tools.iter().map(normalize_tool).collect()),
            Dialect::Sglang => {
                let choice = self.tool_choice.clone().unwrap_or_default();
                let function = choice.get_attr("function").unwrap_or_default();
                let chosen = function.get_attr("name").unwrap_or_default();
                let tools = tools.iter().map(keep_tool_order).filter(|tool| {
                    let function = tool.get_attr("function").unwrap_or_default();
                    chosen.is_undefined()
                        || function.get_attr("name").is_ok_and(|name| name == chosen)
                });
                let tools: Vec<Value> = tools.collect();
                (!tools.is_empty() && choice.as_str() != Some("none")).then_some(tools)
            }
        }
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

/// Gives the last message the role `user`, if it is an assistant message with a text. SGLang does
/// this unless the request says how the output starts.
fn end_with_user(messages: &mut [Value]) {
    let Some(last) = messages.last_mut() else {
        return;
    };
    let field = |name| last.get_attr(name).unwrap_or_default();
    let (role, content) = (field("role"), field("content"));
    if role.as_str() == Some("assistant") && content.as_str().is_some() {
        *last = Value::from_pairs([("role", Value::from("user")), ("content", content)]);
    }
}

/// Gives developer messages the role `system`, and joins all system messages to one at the start if
/// there are others than the first message. vLLM does this for a template that does not name the
/// role `developer`.
fn developer_to_system(messages: Vec<Value>) -> Vec<Value> {
    let field = |message: &Value, name| message.get_attr(name).unwrap_or_default();
    let is_system = |message: &Value| {
        let role = field(message, "role");
        matches!(role.as_str(), Some("system" | "developer"))
    };
    let converted = messages
        .into_iter()
        .map(|message| match is_system(&message) {
            true => Value::from_pairs([
                ("role", Value::from("system")),
                ("content", field(&message, "content")),
            ]),
            false => message,
        });
    let converted: Vec<Value> = converted.collect();
    if !converted.iter().skip(1).any(is_system) {
        return converted;
    }
    let (system, others): (Vec<Value>, Vec<Value>) = converted.into_iter().partition(is_system);
    let texts = system.iter().map(|message| {
        let content = field(message, "content");
        match content.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let parts = content.try_iter().into_iter().flatten();
                let texts =
                    parts.filter_map(|part| field(&part, "text").as_str().map(str::to_owned));
                texts.collect::<Vec<_>>().join("\n")
            }
        }
    });
    let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
    let merged = [("role", "system"), ("content", &texts.join("\n\n"))];
    let merged = Value::from_pairs(merged.map(|(key, value)| (key, Value::from(value))));
    std::iter::once(merged).chain(others).collect()
}
