//! Converts a request of Anthropic's Messages API to the chat that the engine renders.
//!
//! The conversion follows vLLM's `AnthropicServingMessages` and SGLang's `AnthropicServing`. Both
//! turn each tool result into a message of its own, and the tools into functions.

use std::collections::BTreeMap;

use minijinja::Value;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::chat::Chat;
use crate::chat_message::{BILLING_HEADER, Content, Message, Part, TypedPart};
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
    system: Option<&'b RawValue>,
    #[serde(borrow)]
    messages: Option<&'b RawValue>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    thinking: Option<Thinking>,
    output_config: Option<OutputConfig>,
    chat_template_kwargs: Option<BTreeMap<String, Value>>,
}

/// The fields of `thinking` that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Thinking {
    #[serde(rename = "type")]
    kind: String,
}

/// The fields of `output_config` that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct OutputConfig {
    effort: Option<Value>,
}

/// A message of the body.
#[derive(Deserialize)]
struct Turn<'m> {
    role: String,
    #[serde(borrow)]
    content: &'m RawValue,
}

/// The fields of a content block that are read. Each belongs to some types of blocks.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Block<'m> {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    thinking: Option<String>,
    id: Option<String>,
    tool_use_id: Option<String>,
    name: Option<String>,
    tool_name: Option<String>,
    #[serde(borrow)]
    input: Option<&'m RawValue>,
    #[serde(borrow)]
    content: Option<&'m RawValue>,
    #[serde(borrow)]
    source: Option<&'m RawValue>,
    tool: Option<Value>,
}

/// A content: a text or blocks.
enum Blocks<'m> {
    Text(String),
    List(Vec<Block<'m>>),
}

/// A change of the tools that a message of the conversation makes.
pub(crate) enum ToolChange {
    /// Adds this tool, or the known one with this name.
    Add(Value),
    /// Removes the tool with this name.
    Remove(Value),
}

/// Parses a body and converts it to the chat that the engine renders.
///
/// # Errors
/// If the body is not one of the Messages API, or has a block that is not supported.
pub(crate) fn to_chat(conversion: Conversion, body: &[u8]) -> Result<Chat, TemplateError> {
    let body: Body<'_> =
        serde_json::from_slice(body).map_err(|error| TemplateError::Chat(error.to_string()))?;
    let (converted, tool_changes) = convert(conversion, body.system, body.messages);
    let messages = converted.into_messages()?;
    let tools = resolve_tools(body.tools, tool_changes)?;
    let thinking = body.thinking.unwrap_or_default();
    Ok(Chat {
        messages,
        dialect: conversion.dialect,
        tool_choice: body.tool_choice.map(|choice| to_tool_choice(&choice)),
        tools: tools.map(|tools| {
            let tools = tools.iter();
            tools
                .map(|tool| to_function_tool(tool, conversion.dialect))
                .collect()
        }),
        reasoning_effort: body.output_config.and_then(|config| config.effort),
        disables_thinking: thinking.kind == "disabled",
        // Only vLLM reads these options of a Messages request.
        chat_template_kwargs: match conversion.dialect {
            Dialect::Vllm => body.chat_template_kwargs,
            Dialect::Sglang => None,
        },
        ..Chat::default()
    })
}

/// Converts `system` and `messages` to the messages of a chat. Also returns the changes of the
/// tools that the messages make.
pub(crate) fn convert(
    conversion: Conversion,
    system: Option<&RawValue>,
    messages: Option<&RawValue>,
) -> (Converted, Vec<ToolChange>) {
    let mut converted = Converted::default();
    let mut tool_changes = Vec::new();
    let turns: Vec<Turn<'_>> = messages
        .and_then(|raw| serde_json::from_str(raw.get()).ok())
        .unwrap_or_default();
    let is_vllm = conversion.dialect == Dialect::Vllm;
    let mut system_texts = match system.and_then(Blocks::read) {
        Some(Blocks::Text(text)) if is_vllm || !text.trim().is_empty() => vec![text],
        Some(Blocks::List(blocks)) => system_texts(blocks, conversion.dialect),
        _ => Vec::new(),
    };
    let inline_system = |turn: &Turn<'_>| system_text(turn.content, conversion.dialect);
    if conversion.merges_system {
        let inline = turns.iter().filter(|turn| turn.role == "system");
        system_texts.extend(inline.filter_map(inline_system));
    }
    system_texts.retain(|text| !text.is_empty());
    if !system_texts.is_empty() {
        let separator = if is_vllm { "" } else { "\n" };
        let text = system_texts.join(separator);
        converted.messages.push(Message::of_text("system", text));
    }
    for turn in turns {
        if turn.role == "system" && (is_vllm || conversion.merges_system) {
            tool_changes.extend(read_tool_changes(turn.content));
            let text = inline_system(&turn).filter(|_| !conversion.merges_system);
            if let Some(text) = text {
                converted.messages.push(Message::of_text("system", text));
            }
            continue;
        }
        match Blocks::read(turn.content) {
            Some(Blocks::Text(text)) => {
                let message = Message::of_text(&turn.role, text);
                converted.messages.push(message);
            }
            Some(Blocks::List(blocks)) => {
                TurnConversion::new(&turn.role, conversion.dialect).run(blocks, &mut converted);
            }
            None => converted.add_unsupported("content that is neither a text nor blocks"),
        }
    }
    (converted, tool_changes)
}

impl<'m> Blocks<'m> {
    /// Parses a content; `None` if it has another form.
    fn read(raw: &'m RawValue) -> Option<Self> {
        match raw.get().as_bytes().first() {
            Some(b'"') => serde_json::from_str(raw.get()).ok().map(Self::Text),
            Some(b'[') => serde_json::from_str(raw.get()).ok().map(Self::List),
            _ => None,
        }
    }
}

/// Returns the texts of a system prompt's blocks. vLLM leaves out the text that Claude Code changes
/// with each request.
fn system_texts(blocks: Vec<Block<'_>>, dialect: Dialect) -> Vec<String> {
    let texts = blocks.into_iter().filter(|block| block.kind == "text");
    let texts = texts.filter_map(|block| block.text);
    let is_kept = |text: &String| dialect == Dialect::Sglang || !text.starts_with(BILLING_HEADER);
    texts.filter(is_kept).collect()
}

/// Returns the text of a system message among the other messages; `None` if there is none.
fn system_text(content: &RawValue, dialect: Dialect) -> Option<String> {
    let text = match (Blocks::read(content)?, dialect) {
        (Blocks::Text(text), Dialect::Vllm) => {
            Some(text).filter(|text| !text.starts_with(BILLING_HEADER))?
        }
        (Blocks::List(blocks), Dialect::Vllm) => system_texts(blocks, dialect).concat(),
        (Blocks::Text(text), Dialect::Sglang) => text.trim().to_owned(),
        (Blocks::List(blocks), Dialect::Sglang) => {
            let texts = system_texts(blocks, dialect);
            let texts = texts.iter().map(|text| text.trim());
            let texts: Vec<&str> = texts.filter(|text| !text.is_empty()).collect();
            texts.join("\n")
        }
    };
    (!text.is_empty()).then_some(text)
}

/// The conversion of one message with blocks.
struct TurnConversion<'r> {
    dialect: Dialect,
    role: &'r str,
    parts: Vec<Part>,
    tool_calls: Vec<Value>,
    reasoning: Vec<String>,
}

impl<'r> TurnConversion<'r> {
    fn new(role: &'r str, dialect: Dialect) -> Self {
        Self {
            dialect,
            role,
            parts: Vec::new(),
            tool_calls: Vec::new(),
            reasoning: Vec::new(),
        }
    }

    /// Converts the blocks to messages. Each tool result becomes a message before that of the other
    /// blocks; with SGLang, the order of texts and tool results is kept.
    fn run(mut self, blocks: Vec<Block<'_>>, converted: &mut Converted) {
        for block in blocks {
            self.add_block(block, converted);
        }
        let has_reasoning = !self.reasoning.is_empty();
        let has_tool_calls = !self.tool_calls.is_empty();
        let mut content = take_content(&mut self.parts);
        if content.is_none() && self.role == "user" {
            return;
        }
        if self.dialect == Dialect::Sglang && !has_tool_calls {
            content = content.or(Some(Content::Text(String::new())));
        }
        converted.messages.push(Message {
            role: self.role.to_owned(),
            content,
            tool_calls: has_tool_calls.then_some(self.tool_calls),
            reasoning: has_reasoning.then(|| self.reasoning.concat()),
            ..Message::default()
        });
    }

    /// Converts one block.
    fn add_block(&mut self, block: Block<'_>, converted: &mut Converted) {
        match block.kind.as_str() {
            "text" => {
                let text = block.text.unwrap_or_default();
                if !text.is_empty() || self.dialect == Dialect::Sglang {
                    self.parts.push(Part::of_text(text));
                }
            }
            "image" => {
                if let Some(source) = block.source {
                    converted
                        .media_hash
                        .get_or_insert_with(|| hash_media(source));
                    self.parts.push(Part::of_media("image_url"));
                }
            }
            // SGLang puts it between marks that depend on its reasoning parser.
            "thinking" if self.dialect == Dialect::Sglang => {
                converted.set_fault("thinking, which SGLang renders by an option");
            }
            "thinking" => self.reasoning.extend(block.thinking),
            "redacted_thinking" if self.dialect == Dialect::Vllm => {}
            "tool_use" => {
                let id = block.id.unwrap_or_else(|| {
                    converted.set_fault("tool_use without an id");
                    String::new()
                });
                let input = block.input.map_or("{}", RawValue::get);
                let name = block.name.unwrap_or_default();
                let function = [("arguments", input), ("name", &name)];
                self.tool_calls.push(tool_call(&id, function));
            }
            "tool_result" if self.role == "user" => {
                if self.dialect == Dialect::Sglang
                    && let Some(content) = take_content(&mut self.parts)
                {
                    converted.messages.push(Message {
                        role: "user".to_owned(),
                        content: Some(content),
                        ..Message::default()
                    });
                }
                self.add_tool_result(&block, converted);
            }
            "tool_result" => match block.content.map(Blocks::read) {
                None => self.parts.push(Part::of_text("Tool result: ")),
                Some(Some(Blocks::Text(text))) => {
                    self.parts
                        .push(Part::of_text(format!("Tool result: {text}")));
                }
                Some(_) => converted.set_fault("tool_result with blocks in an assistant message"),
            },
            "tool_reference" => {}
            kind => {
                converted.set_fault(format!("block of type {kind:?}"));
                self.parts.push(Part::of_media("unsupported"));
            }
        }
    }

    /// Adds the messages of a tool result in a user message: its text, then its images, then its
    /// references to tools.
    fn add_tool_result(&self, block: &Block<'_>, converted: &mut Converted) {
        let id = block.tool_use_id.clone().unwrap_or_default();
        let mut texts = Vec::new();
        let mut images = Vec::new();
        let mut references = Vec::new();
        match block.content.and_then(Blocks::read) {
            Some(Blocks::Text(text)) => texts.push(text),
            Some(Blocks::List(items)) => {
                for item in items {
                    match item.kind.as_str() {
                        "text" => texts.extend(item.text),
                        "image" => {
                            if let Some(source) = item.source {
                                converted
                                    .media_hash
                                    .get_or_insert_with(|| hash_media(source));
                            }
                            images.push(Part::of_media("image_url"));
                        }
                        "tool_reference" => references.extend(item.tool_name.or(item.name)),
                        _ => {}
                    }
                }
            }
            None => {}
        }
        let tool_message = |content| Message {
            role: "tool".to_owned(),
            content: Some(content),
            tool_call_id: Some(Value::from(id.as_str())),
            ..Message::default()
        };
        let text = Content::Text(texts.join("\n"));
        converted.messages.push(tool_message(text));
        if !images.is_empty() {
            converted.messages.push(Message {
                role: "user".to_owned(),
                content: Some(Content::Parts(images)),
                ..Message::default()
            });
        }
        if !references.is_empty() {
            let references = references.into_iter().map(|name| {
                Part::Typed(TypedPart {
                    kind: "tool_reference".to_owned(),
                    name: Some(name),
                    ..TypedPart::default()
                })
            });
            let references = Content::Parts(references.collect());
            converted.messages.push(tool_message(references));
        }
    }
}

/// Takes the collected parts as a content; `None` if there are none. A single part of text becomes
/// a text.
fn take_content(parts: &mut Vec<Part>) -> Option<Content> {
    let parts = std::mem::take(parts);
    match parts.as_slice() {
        [] => None,
        [Part::Typed(part)] if part.kind == "text" => {
            Some(Content::Text(part.text.clone().unwrap_or_default()))
        }
        _ => Some(Content::Parts(parts)),
    }
}

/// Returns the changes of the tools in the content of a system message.
fn read_tool_changes(content: &RawValue) -> Vec<ToolChange> {
    let Some(Blocks::List(blocks)) = Blocks::read(content) else {
        return Vec::new();
    };
    let changes = blocks.into_iter().filter_map(|block| {
        let tool = block.tool?;
        let field = |name| tool.get_attr(name).unwrap_or_default();
        match block.kind.as_str() {
            "tool_addition" if field("type").as_str() == Some("tool_definition") => {
                Some(ToolChange::Add(field("definition")))
            }
            "tool_addition" => Some(ToolChange::Add(field("name"))),
            "tool_removal" => Some(ToolChange::Remove(field("name"))),
            _ => None,
        }
    });
    changes.collect()
}

/// Applies the changes that the messages make to the tools of the body.
///
/// # Errors
/// If a change names a tool that is not known.
fn resolve_tools(
    tools: Option<Vec<Value>>,
    changes: Vec<ToolChange>,
) -> Result<Option<Vec<Value>>, TemplateError> {
    if changes.is_empty() {
        return Ok(tools);
    }
    /// A tool by its name, and whether it was removed.
    struct Entry {
        name: Value,
        tool: Value,
        is_removed: bool,
        is_loaded: bool,
    }
    let name_of = |tool: &Value| tool.get_attr("name").unwrap_or_default();
    let entry = |tool: Value| Entry {
        name: name_of(&tool),
        tool,
        is_removed: false,
        is_loaded: false,
    };
    let mut entries: Vec<Entry> = tools.unwrap_or_default().into_iter().map(entry).collect();
    for change in changes {
        let (name, definition, is_removed) = match change {
            ToolChange::Add(name) if name.as_str().is_some() => (name, None, false),
            ToolChange::Add(definition) => (name_of(&definition), Some(definition), false),
            ToolChange::Remove(name) => (name, None, true),
        };
        let known = entries.iter_mut().find(|entry| entry.name == name);
        match (known, definition) {
            (Some(known), definition) => {
                known.is_removed = is_removed;
                known.is_loaded |= !is_removed && definition.is_none();
                if let Some(definition) = definition {
                    known.tool = definition;
                }
            }
            (None, Some(definition)) => entries.push(entry(definition)),
            (None, None) => {
                return Err(TemplateError::Chat(format!("tool {name} is not declared")));
            }
        }
    }
    let kept = entries.into_iter().filter(|entry| !entry.is_removed);
    let kept = kept.map(|entry| match entry.is_loaded {
        true => without_field(&entry.tool, "defer_loading"),
        false => entry.tool,
    });
    Ok(Some(kept.collect()))
}

/// Returns a choice of a tool in the form of a chat completion.
fn to_tool_choice(choice: &Value) -> Value {
    let field = |name| choice.get_attr(name).unwrap_or_default();
    match field("type").as_str() {
        Some("tool") => Value::from_pairs([
            ("type", Value::from("function")),
            ("function", Value::from_pairs([("name", field("name"))])),
        ]),
        _ => field("type"),
    }
}

/// Returns the map without one of its fields.
fn without_field(map: &Value, field: &str) -> Value {
    let keys = map.try_iter().into_iter().flatten();
    let kept = keys.filter(|key| key.as_str() != Some(field));
    let pairs = kept.map(|key| {
        let value = map.get_item(&key).unwrap_or_default();
        (key, value)
    });
    Value::from_pairs(pairs.collect::<Vec<_>>())
}

/// Returns the function that a tool stands for in a template. Parameters without a type describe an
/// object; with SGLang, a missing description is empty.
fn to_function_tool(tool: &Value, dialect: Dialect) -> Value {
    let schema = tool.get_attr("input_schema").unwrap_or_default();
    let mut function = FunctionTool::read(tool);
    if dialect == Dialect::Sglang && function.description.is_none() {
        function.description = Value::from("");
    }
    let has_type = schema
        .get_attr("type")
        .is_ok_and(|kind| !kind.is_undefined());
    function.parameters = match (has_type, schema.try_iter()) {
        (false, Ok(keys)) => {
            let fields = keys.map(|key| {
                let value = schema.get_item(&key).unwrap_or_default();
                (key, value)
            });
            let kind = (Value::from("type"), Value::from("object"));
            Value::from_pairs(fields.chain([kind]).collect::<Vec<_>>())
        }
        _ => schema,
    };
    match dialect {
        Dialect::Vllm => function.into_tool(),
        Dialect::Sglang => function.into_sglang_tool(),
    }
}
