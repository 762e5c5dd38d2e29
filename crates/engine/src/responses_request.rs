//! Converts a request of OpenAI's Responses API to the chat that the engine renders.
//!
//! An output of the model is several items of the input: reasoning, a message, calls of functions.
//! The conversion joins them to one assistant message. It follows vLLM's `construct_input_messages`
//! and SGLang's `_construct_input_messages`.

use std::collections::BTreeMap;

use minijinja::Value;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::chat::Chat;
use crate::chat_message::{Content, Message, Part};
use crate::chat_tool::{FunctionTool, tool_call};
use crate::conversion::{Conversion, Dialect};
use crate::converted::Converted;
use crate::media::hash_media;
use crate::template_error::TemplateError;

/// The fields of a body that affect the prompt.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Body<'b> {
    #[serde(borrow)]
    input: Option<&'b RawValue>,
    #[serde(borrow)]
    instructions: Option<&'b RawValue>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    reasoning: Option<Reasoning>,
    chat_template_kwargs: Option<BTreeMap<String, Value>>,
    previous_response_id: Option<String>,
}

/// The fields of `reasoning` that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Reasoning {
    effort: Option<Value>,
}

/// The fields of an input item that are read. Each belongs to some types of items.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Item<'i> {
    #[serde(rename = "type")]
    kind: Option<String>,
    role: Option<String>,
    #[serde(borrow)]
    content: Option<&'i RawValue>,
    name: Option<String>,
    namespace: Option<String>,
    arguments: Option<String>,
    call_id: Option<String>,
    #[serde(borrow)]
    output: Option<&'i RawValue>,
    summary: Option<Vec<Text>>,
    encrypted_content: Option<String>,
    status: Option<String>,
    input: Option<String>,
}

/// A part of the content of an item, reduced to its text.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Text {
    text: Option<String>,
}

/// The fields of an image in a content.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Image<'i> {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(borrow)]
    image_url: Option<&'i RawValue>,
    #[serde(borrow)]
    file_id: Option<&'i RawValue>,
    #[serde(borrow)]
    file_data: Option<&'i RawValue>,
}

/// Parses a body and converts it to the chat that the engine renders.
///
/// # Errors
/// If the body is not one of the Responses API, or has an item that is not supported. Also if the
/// body continues a stored response, because its conversation is known only to the engine.
pub(crate) fn to_chat(conversion: Conversion, body: &[u8]) -> Result<Chat, TemplateError> {
    let body: Body<'_> =
        serde_json::from_slice(body).map_err(|error| TemplateError::Chat(error.to_string()))?;
    if body.previous_response_id.is_some() {
        return Err(TemplateError::Chat(
            "the request continues a stored response".to_owned(),
        ));
    }
    let (converted, continues) = convert(conversion, body.instructions, body.input);
    let messages = converted.into_messages()?;
    let tools = body.tools.filter(|tools| !tools.is_empty());
    Ok(Chat {
        messages,
        dialect: conversion.dialect,
        tool_choice: body.tool_choice.map(|choice| nest_tool_choice(&choice)),
        tools: tools.map(|tools| {
            let tools = tools.iter();
            tools
                .flat_map(|tool| to_function_tools(tool, conversion.dialect))
                .collect()
        }),
        reasoning_effort: body.reasoning.and_then(|reasoning| reasoning.effort),
        add_generation_prompt: (conversion.dialect == Dialect::Vllm).then_some(!continues),
        continue_final_message: Some(continues),
        // Only the prompts of chat completions are tokenised without them.
        add_special_tokens: Some(conversion.dialect == Dialect::Vllm),
        chat_template_kwargs: body.chat_template_kwargs,
        ..Chat::default()
    })
}

/// Converts `instructions` and `input` to messages. Also returns whether the output continues the
/// last message.
pub(crate) fn convert(
    conversion: Conversion,
    instructions: Option<&RawValue>,
    input: Option<&RawValue>,
) -> (Converted, bool) {
    let mut converted = Converted::default();
    let instructions = instructions.and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    if let Some(text) = instructions.filter(|text| !text.is_empty()) {
        converted.messages.push(Message::of_text("system", text));
    }
    let first = converted.messages.len();
    let mut continues = false;
    match input.map(RawValue::get) {
        Some(text) if text.starts_with('"') => {
            let text: String = serde_json::from_str(text).unwrap_or_default();
            converted.messages.push(Message::of_text("user", text));
        }
        Some(list) => {
            let items: Vec<&RawValue> = serde_json::from_str(list).unwrap_or_default();
            for raw in items {
                match serde_json::from_str::<Item<'_>>(raw.get()) {
                    Ok(item) => {
                        continues = conversion.dialect == Dialect::Vllm && item.is_unfinished();
                        converted.read_media(item.content.or(item.output));
                        item.add_to(&mut converted, first, conversion.dialect);
                    }
                    Err(error) => converted.add_unsupported(error.to_string()),
                }
            }
        }
        None => {}
    }
    if conversion.dialect == Dialect::Sglang {
        converted.join_assistant_messages();
        if conversion.merges_system {
            converted.merge_system("\n\n");
        }
    }
    (converted, continues)
}

impl Converted {
    /// Hashes the first image of a content, unless an earlier image was hashed.
    fn read_media(&mut self, content: Option<&RawValue>) {
        if self.media_hash.is_some() || content.is_none_or(|raw| !raw.get().starts_with('[')) {
            return;
        }
        let parts: Vec<Image<'_>> = content
            .and_then(|raw| serde_json::from_str(raw.get()).ok())
            .unwrap_or_default();
        let image = parts.iter().find(|part| {
            let kind = part.kind.as_deref();
            matches!(kind, Some("input_image" | "image_url" | "input_file"))
        });
        let data = image.and_then(|part| part.image_url.or(part.file_data).or(part.file_id));
        self.media_hash = data.map(hash_media);
    }
}

impl Item<'_> {
    /// Returns whether the item is a message or reasoning that is not complete.
    fn is_unfinished(&self) -> bool {
        let is_continued = matches!(self.kind.as_deref(), None | Some("message" | "reasoning"));
        is_continued && matches!(self.status.as_deref(), Some("in_progress" | "incomplete"))
    }

    /// Adds the item to the messages: as a message of its own, or to the assistant message that is
    /// the last of the input. The input starts with the message `first`.
    fn add_to(self, converted: &mut Converted, first: usize, dialect: Dialect) {
        let is_sglang = dialect == Dialect::Sglang;
        match (self.kind.as_deref(), self.role.as_deref()) {
            (Some("function_call"), _) => match (&self.name, &self.arguments, &self.call_id) {
                (Some(name), Some(arguments), Some(id)) => {
                    let name = match &self.namespace {
                        Some(namespace) if !is_sglang => &format!("{namespace}__{name}"),
                        _ => name,
                    };
                    let function = [("name", name.as_str()), ("arguments", arguments)];
                    converted.add_tool_call(first, tool_call(id, function));
                }
                _ => converted.add_unsupported("incomplete function_call"),
            },
            (Some("custom_tool_call"), _) => {
                let input = self.input.unwrap_or_default();
                let arguments = serde_json::json!({ "input": input }).to_string();
                let name = self.name.unwrap_or_default();
                let id = self.call_id.unwrap_or_default();
                let function = [("name", name.as_str()), ("arguments", &arguments)];
                converted.add_tool_call(first, tool_call(&id, function));
            }
            (Some("function_call_output" | "custom_tool_call_output"), _) => {
                let mut content = read_content(self.output, converted);
                if let (true, Some(Content::Parts(parts))) = (is_sglang, &content) {
                    let texts = parts.iter().filter_map(Part::text);
                    content = Some(Content::Text(texts.collect()));
                }
                converted.messages.push(Message {
                    role: "tool".to_owned(),
                    content,
                    tool_call_id: self.call_id.map(Value::from),
                    ..Message::default()
                });
            }
            (Some("reasoning"), _) => self.add_reasoning(converted, first, dialect),
            (None | Some("message"), Some("assistant")) if !is_sglang => {
                self.add_assistant_message(converted, first);
            }
            (None | Some("message"), Some(role)) => {
                let mut content = read_content(self.content, converted);
                let role = match role {
                    "developer" if is_sglang => {
                        content = content.map(label_developer_content);
                        "system"
                    }
                    role => role,
                };
                converted.messages.push(Message {
                    role: role.to_owned(),
                    content,
                    ..Message::default()
                });
            }
            (kind, _) => {
                converted.add_unsupported(format!("item of type {:?}", kind.unwrap_or_default()));
            }
        }
    }

    /// Adds an assistant message, of which vLLM reads only the first part.
    fn add_assistant_message(self, converted: &mut Converted, first: usize) {
        let text = match read_content(self.content, converted) {
            Some(Content::Text(text)) => Some(text),
            Some(Content::Parts(parts)) => parts.first().and_then(Part::text).map(str::to_owned),
            None => None,
        };
        let Some(text) = text else {
            return converted.add_unsupported("assistant message without text");
        };
        match converted.last_assistant_message(first) {
            Some(message) if message.content.is_none() => {
                message.content = Some(Content::Text(text));
            }
            _ => converted.messages.push(Message::of_text("assistant", text)),
        }
    }

    /// Adds the text of a reasoning item: that of the first part of its content, or else of its
    /// summary. SGLang prefers the summary, and reads all parts.
    fn add_reasoning(self, converted: &mut Converted, first: usize, dialect: Dialect) {
        if self
            .encrypted_content
            .is_some_and(|content| !content.is_empty())
        {
            // The reasoning is not part of the text by which prompts are matched.
            converted.set_fault("encrypted reasoning");
            return;
        }
        let content: Vec<Text> = self
            .content
            .and_then(|raw| serde_json::from_str(raw.get()).ok())
            .unwrap_or_default();
        let summary = self.summary.unwrap_or_default();
        let reasoning = match dialect {
            Dialect::Vllm => {
                let first = content.into_iter().next();
                let first = first.or_else(|| summary.into_iter().next());
                first.and_then(|part| part.text).unwrap_or_default()
            }
            Dialect::Sglang => {
                let texts = |parts: Vec<Text>| {
                    let texts = parts.into_iter().filter_map(|part| part.text);
                    texts
                        .filter(|text| !text.is_empty())
                        .collect::<Vec<_>>()
                        .join("\n")
                };
                match texts(summary) {
                    summary if summary.is_empty() => texts(content),
                    summary => summary,
                }
            }
        };
        if dialect == Dialect::Sglang && reasoning.is_empty() {
            return;
        }
        match converted.last_assistant_message(first) {
            Some(message) if message.reasoning.is_none() => message.reasoning = Some(reasoning),
            _ => converted.messages.push(Message {
                role: "assistant".to_owned(),
                reasoning: Some(reasoning),
                ..Message::default()
            }),
        }
    }
}

/// Puts a label before the content of a developer message, which SGLang renders as a system message.
fn label_developer_content(content: Content) -> Content {
    const LABEL: &str = "Developer instructions:";
    match content {
        Content::Text(text) => Content::Text(format!("{LABEL}\n{text}")),
        Content::Parts(parts) => {
            let mut labelled = parts.clone();
            let text = parts.iter().position(|part| part.text().is_some());
            match text.and_then(|index| parts.get(index)?.text().map(|text| (index, text))) {
                Some((index, text)) => labelled[index] = Part::of_text(format!("{LABEL}\n{text}")),
                None => labelled.insert(0, Part::of_text(LABEL)),
            }
            Content::Parts(labelled)
        }
    }
}

/// Parses a content or an output; `None` if it is missing. A part of media stands for a content of
/// another form, which is not supported.
fn read_content(raw: Option<&RawValue>, converted: &mut Converted) -> Option<Content> {
    let content = serde_json::from_str(raw?.get());
    Some(content.unwrap_or_else(|_| {
        converted.set_fault("content of an unknown form");
        Content::Parts(vec![Part::of_media("unsupported")])
    }))
}

/// Returns the tools that a tool of the body stands for in a template: a function stands for
/// itself, a namespace for its functions, a custom tool for a function with one text. Tools that
/// the engine itself calls have none, and SGLang leaves out namespaces.
fn to_function_tools(tool: &Value, dialect: Dialect) -> Vec<Value> {
    let finish = |mut function: FunctionTool| match dialect {
        Dialect::Vllm => function.into_tool(),
        Dialect::Sglang => {
            function.defer_loading = Value::from(());
            function.into_sglang_tool()
        }
    };
    let kind = tool.get_attr("type").unwrap_or_default();
    match kind.as_str() {
        Some("function") => vec![finish(FunctionTool::read(tool))],
        Some("namespace") if dialect == Dialect::Vllm => {
            let namespace = tool.get_attr("name").unwrap_or_default();
            let tools = tool.get_attr("tools").unwrap_or_default();
            let tools = tools.try_iter().into_iter().flatten();
            let functions = tools.filter(|tool| {
                let kind = tool.get_attr("type").unwrap_or_default();
                kind.as_str() == Some("function")
            });
            let flat = functions.map(|tool| {
                let mut function = FunctionTool::read(&tool);
                function.name = Value::from(format!("{namespace}__{}", function.name));
                function.into_tool()
            });
            flat.collect()
        }
        Some("custom") => {
            let mut function = FunctionTool::read(tool);
            function.parameters = custom_tool_parameters();
            vec![finish(function)]
        }
        _ => Vec::new(),
    }
}

/// Returns a choice of a tool in the form of a chat completion.
fn nest_tool_choice(choice: &Value) -> Value {
    match choice.get_attr("name") {
        Ok(name) if !name.is_undefined() => Value::from_pairs([
            ("type", Value::from("function")),
            ("function", Value::from_pairs([("name", name)])),
        ]),
        _ => choice.clone(),
    }
}

/// Returns the parameters by which engines describe a custom tool: one text.
fn custom_tool_parameters() -> Value {
    let description = "The freeform text payload for this tool.";
    let input = [("type", "string"), ("description", description)];
    let input = Value::from_pairs(input.map(|(key, value)| (key, Value::from(value))));
    Value::from_pairs([
        ("type", Value::from("object")),
        ("properties", Value::from_pairs([("input", input)])),
        ("required", vec![Value::from("input")].into()),
        ("additionalProperties", Value::from(false)),
    ])
}
