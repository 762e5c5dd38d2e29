//! A model's chat template: turns a conversation into the text that the engine tokenises.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Deserialize;

use crate::chat::Chat;
use crate::chat_message::{ContentFormat, Message, TemplateForm};
use crate::conversion::Dialect;
use crate::python_json::tojson;
use crate::strftime::strftime_now;
pub use crate::template_error::TemplateError;
use crate::tokenizer::SpecialToken;

/// A model's compiled chat templates, and the special tokens that they may print.
#[derive(Debug)]
pub struct ChatTemplate {
    /// Compiled templates: `default` and, for some models, `tool_use`.
    environment: Environment<'static>,
    /// Texts of special tokens, by the name of the template variable, such as `bos_token`.
    special_tokens: BTreeMap<String, Value>,
    /// Form of a chat that each template expects, by the template's name.
    forms: BTreeMap<String, TemplateForm>,
    /// Whether a template rejects a system message that is not the first.
    rejects_later_system: bool,
    /// Whether a template prints a system message that is not the first.
    prints_later_system: bool,
    /// The reasoning effort that stands for disabled thinking: `none` or `low`.
    disabled_effort: &'static str,
}

/// The fields of `tokenizer_config.json` that rendering needs.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<Templates>,
    /// All other fields, among them the special tokens.
    #[serde(flatten)]
    other_fields: BTreeMap<String, serde_json::Value>,
}

/// A model's templates: a single one, or several with names.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

/// A template in a list of several.
#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Name of a model's only template, or of the one for chats without tools.
const DEFAULT: &str = "default";
/// Name of the template for chats with tools, if a model has one.
const WITH_TOOLS: &str = "tool_use";
/// Fields of `tokenizer_config.json` that templates may use as variables.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl ChatTemplate {
    /// Loads the template from a model's folder: from `chat_template.jinja`, else from
    /// `tokenizer_config.json`, else from `chat_template.json`. A file that cannot be opened counts
    /// as missing. Special tokens come from `tokenizer_config.json`; an entry without the text of a
    /// token is ignored.
    ///
    /// # Errors
    /// If the folder contains no template, the template is invalid, or a JSON file that is read
    /// cannot be parsed.
    pub fn load(folder: &Path) -> Result<Self, TemplateError> {
        const CONFIG: &str = "tokenizer_config.json";
        let config: TokenizerConfig = read_json(folder, CONFIG)?.unwrap_or_default();
        let special_tokens = SPECIAL_TOKENS.iter().filter_map(|&name| {
            let token = config.other_fields.get(name)?.clone();
            let token: SpecialToken = serde_json::from_value(token).ok()?;
            Some((name.to_owned(), Value::from(token.text())))
        });
        let special_tokens = special_tokens.collect();
        let templates = match fs::read_to_string(folder.join("chat_template.jinja")) {
            Ok(source) => Some(Templates::One(source)),
            Err(_) => match config.chat_template {
                Some(templates) => Some(templates),
                None => read_json::<TokenizerConfig>(folder, "chat_template.json")?
                    .and_then(|file| file.chat_template),
            },
        };
        let templates = match templates.ok_or(TemplateError::Missing)? {
            Templates::One(source) => vec![(DEFAULT.to_owned(), source)],
            Templates::Named(named) => {
                let named = named.into_iter();
                named.map(|entry| (entry.name, entry.template)).collect()
            }
        };
        Self::compile(templates, special_tokens)
    }

    /// Compiles a template that uses no special tokens.
    ///
    /// # Errors
    /// If the template is invalid.
    pub fn from_source(source: &str) -> Result<Self, TemplateError> {
        let templates = vec![(DEFAULT.to_owned(), source.to_owned())];
        Self::compile(templates, BTreeMap::new())
    }

    /// Compiles templates, given as name and source, in an environment that behaves like the Jinja
    /// of `transformers`. Detects the form of a chat that each
    /// template expects.
    ///
    /// # Errors
    /// If a template is invalid.
    fn compile(
        templates: Vec<(String, String)>,
        special_tokens: BTreeMap<String, Value>,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        set_up(&mut environment)?;
        environment.add_function("strftime_now", |format: &str| strftime_now(format));
        environment.add_function(
            "raise_exception",
            |reason: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, reason))
            },
        );
        let mut forms = BTreeMap::new();
        let used = || templates.iter().filter(|(name, _)| is_used(name));
        let probes: Vec<Option<bool>> = used()
            .map(|(_, source)| probe_later_system(source))
            .collect();
        for (name, source) in templates {
            let source = remove_generation_tags(&source);
            forms.insert(name.clone(), TemplateForm::detect(&source));
            environment.add_template_owned(name, source)?;
        }
        let mut template = Self {
            environment,
            special_tokens,
            forms,
            rejects_later_system: probes.contains(&None),
            prints_later_system: probes.iter().all(|probe| *probe == Some(true)),
            disabled_effort: "none",
        };
        if !template.distinguishes_effort_none() {
            template.disabled_effort = "low";
        }
        Ok(template)
    }

    /// Returns whether the engine moves the texts of all system messages of a Messages request to
    /// the first message: vLLM if the template rejects any other system message, SGLang also if the
    /// template ignores it.
    #[must_use]
    pub fn needs_leading_system(&self, dialect: Dialect) -> bool {
        match dialect {
            Dialect::Vllm => self.rejects_later_system,
            Dialect::Sglang => !self.prints_later_system,
        }
    }

    /// Returns whether the effort `none` renders another prompt than each effort of Anthropic's API.
    /// vLLM uses the effort `low` for disabled thinking if it does not.
    fn distinguishes_effort_none(&self) -> bool {
        let rendered = |effort: &str| {
            let chat = Chat {
                messages: vec![Message::of_text("user", "Hi")],
                reasoning_effort: Some(effort.into()),
                ..Chat::default()
            };
            self.render(&chat).ok()
        };
        let efforts = ["low", "medium", "high", "xhigh", "max"];
        rendered("none").is_some_and(|none| {
            efforts
                .iter()
                .all(|effort| rendered(effort).as_ref() != Some(&none))
        })
    }

    /// Returns the text of a chat that the engine tokenises. Uses the template for tools if the
    /// chat has tools and the model has such a template.
    ///
    /// # Errors
    /// If the template rejects the chat, or the chat contains a part that is not text. Also if the
    /// chat continues its last message and the rendered text does not contain that message, or if
    /// the model has only templates with other names.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        let name = if chat.has_tools() && self.forms.contains_key(WITH_TOOLS) {
            WITH_TOOLS
        } else {
            DEFAULT
        };
        let form = *self.forms.get(name).ok_or(TemplateError::Missing)?;
        let mut variables = self.special_tokens.clone();
        variables.extend(chat.variables(form, self.disabled_effort)?);
        let template = self.environment.get_template(name)?;
        let rendered = template.render(Value::from_pairs(variables))?;
        chat.cut_at_final_message(rendered)
    }
}

/// Returns whether the template with this name can be used to render a prompt.
fn is_used(name: &str) -> bool {
    matches!(name, DEFAULT | WITH_TOOLS)
}

/// Returns whether a template prints a system message that is not the first; `None` if it rejects
/// the message. As in the engines' own tests, the template is rendered without the functions and
/// special tokens that it has otherwise.
fn probe_later_system(source: &str) -> Option<bool> {
    const SENTINEL: &str = "LATER_SYSTEM_TAG";
    let message = |(role, content)| Value::from_pairs([("role", role), ("content", content)]);
    let messages = [
        ("system", "t"),
        ("user", "t"),
        ("system", SENTINEL),
        ("user", "t"),
    ];
    let variables = [
        ("messages", messages.into_iter().map(message).collect()),
        ("add_generation_prompt", Value::from(false)),
    ];
    let render = || {
        let mut environment = Environment::new();
        set_up(&mut environment)?;
        environment.render_str(source, Value::from_pairs(variables))
    };
    render().ok().map(|text| text.contains(SENTINEL))
}

/// Sets the syntax, the methods and the filters that every template may use.
fn set_up(environment: &mut Environment<'_>) -> Result<(), Error> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    Ok(())
}

impl TemplateForm {
    /// Returns the form of a chat that a template expects.
    fn detect(source: &str) -> Self {
        Self {
            content: ContentFormat::detect(source),
            has_developer_role: ["\"developer\"", "'developer'"]
                .iter()
                .any(|name| source.contains(name)),
        }
    }
}

impl ContentFormat {
    /// Returns the content format of a template by vLLM's rule: a template that loops over a
    /// message's content expects parts, any other template expects text.
    fn detect(source: &str) -> Self {
        let statements: Vec<&str> = statements(source).collect();
        let mut lists = vec!["messages"];
        for statement in &statements {
            if let Some((name, value)) = assignment(statement)
                && lists.contains(&list_name(value))
            {
                lists.push(name);
            }
        }
        let loops = || {
            statements
                .iter()
                .filter_map(|statement| for_loop(statement))
        };
        let messages: Vec<&str> = loops()
            .filter(|(_, list)| lists.contains(&list_name(list)))
            .map(|(name, _)| name)
            .collect();
        let is_content = |list: &str| {
            let accessed = ["['content']", "[\"content\"]", ".content"];
            let accessed = accessed.iter().find_map(|end| list.strip_suffix(end));
            accessed.is_some_and(|message| messages.contains(&message))
        };
        if loops().any(|(_, list)| is_content(list_name(list))) {
            Self::Parts
        } else {
            Self::Text
        }
    }
}

/// Returns the statements of a template: the text inside each `{% … %}`.
fn statements(source: &str) -> impl Iterator<Item = &str> {
    source.split("{%").skip(1).filter_map(|rest| {
        let (statement, _) = rest.split_once("%}")?;
        Some(statement.trim_matches(['-', '+']).trim())
    })
}

/// Parses `set name = value`.
fn assignment(statement: &str) -> Option<(&str, &str)> {
    let (name, value) = statement.strip_prefix("set ")?.split_once('=')?;
    Some((name.trim(), value.trim()))
}

/// Parses `for name in list`, with or without a condition.
fn for_loop(statement: &str) -> Option<(&str, &str)> {
    let (name, list) = statement.strip_prefix("for ")?.split_once(" in ")?;
    let list = list.split_once(" if ").map_or(list, |(list, _)| list);
    Some((name.trim(), list.trim()))
}

/// Returns the list in an expression, without the filters and the slice that follow it.
fn list_name(expression: &str) -> &str {
    let list = expression.split('|').next().unwrap_or_default().trim();
    match list.rsplit_once('[') {
        Some((list, index)) if index.ends_with(']') && index.contains(':') => list,
        _ => list,
    }
}

/// Replaces the `generation` tags, which mark assistant output for training and print nothing, by a
/// condition that is always true. The template engine does not know these tags.
fn remove_generation_tags(source: &str) -> String {
    let mut cleaned = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        cleaned.push_str(before);
        cleaned.push_str("{%");
        rest = tag;
        let Some(end) = tag.find("%}") else {
            break;
        };
        let (inside, after) = tag.split_at(end);
        let condition = match inside.trim_matches(['-', '+']).trim() {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => continue,
        };
        cleaned.push_str(&condition);
        rest = after;
    }
    cleaned.push_str(rest);
    cleaned
}

/// Parses a JSON file of the model's folder; `None` if the file does not exist or cannot be opened.
///
/// # Errors
/// If the file is not valid JSON of the expected form.
fn read_json<T: serde::de::DeserializeOwned>(
    folder: &Path,
    file: &'static str,
) -> Result<Option<T>, TemplateError> {
    let Ok(json) = fs::read(folder.join(file)) else {
        return Ok(None);
    };
    match serde_json::from_slice(&json) {
        Ok(parsed) => Ok(Some(parsed)),
        Err(error) => Err(TemplateError::File {
            file,
            reason: error.to_string(),
        }),
    }
}
