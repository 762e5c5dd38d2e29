//! A model's chat template: a conversation in, the text its engine would tokenise out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Deserialize;

use crate::chat::Chat;
use crate::python_json::tojson;
use crate::strftime::strftime_now;
use crate::tokenizer::SpecialToken;

/// A compiled chat template, and the special tokens it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, Value>,
    /// What each template, by name, expects of a message's content.
    formats: BTreeMap<String, ContentFormat>,
}

/// What a template expects of a message's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentFormat {
    /// A text.
    Text,
    /// A list of parts.
    Parts,
}

/// Why a chat cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's folder has none.
    #[error("the model has no chat template")]
    Missing,
    /// A file is not what it should be.
    #[error("{file} cannot be read: {reason}")]
    File {
        /// The file, in the model's folder.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The template is no template, or it refuses the chat.
    #[error("the chat template fails: {0}")]
    Template(#[from] Error),
    /// The chat holds what only an engine can turn into tokens.
    #[error("the chat holds a part of type `{0}`")]
    Media(String),
    /// The request cannot be rendered, which may be its own fault.
    #[error("the chat cannot be rendered: {0}")]
    Chat(String),
}

/// The part of `tokenizer_config.json` that rendering needs.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<Templates>,
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

const DEFAULT: &str = "default";
const WITH_TOOLS: &str = "tool_use";
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
    /// Loads the template of a model's folder: `chat_template.jinja`, or else what
    /// `tokenizer_config.json` holds, or else `chat_template.json`.
    ///
    /// # Errors
    /// If there is none, or it is no valid template.
    pub fn load(folder: &Path) -> Result<Self, TemplateError> {
        const CONFIG: &str = "tokenizer_config.json";
        let config: TokenizerConfig = read_json(folder, CONFIG)?.unwrap_or_default();
        let special_tokens = SPECIAL_TOKENS.iter().filter_map(|&name| {
            let token = config.others.get(name)?.clone();
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
                named.map(|one| (one.name, one.template)).collect()
            }
        };
        Self::compile(templates, special_tokens)
    }

    /// Compiles a template that needs no special tokens.
    ///
    /// # Errors
    /// If it is no valid template.
    pub fn from_source(source: &str) -> Result<Self, TemplateError> {
        let only = vec![(DEFAULT.to_owned(), source.to_owned())];
        Self::compile(only, BTreeMap::new())
    }

    fn compile(
        templates: Vec<(String, String)>,
        special_tokens: BTreeMap<String, Value>,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("strftime_now", |format: &str| strftime_now(format));
        environment.add_function(
            "raise_exception",
            |reason: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, reason))
            },
        );
        let mut formats = BTreeMap::new();
        for (name, source) in templates {
            let source = without_generation_marks(&source);
            formats.insert(name.clone(), ContentFormat::detect(&source));
            environment.add_template_owned(name, source)?;
        }
        Ok(Self {
            environment,
            special_tokens,
            formats,
        })
    }

    /// The text of a chat, as the engine would tokenise it.
    ///
    /// # Errors
    /// If the template refuses it, or it holds what is not text.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        let name = if chat.has_tools() && self.formats.contains_key(WITH_TOOLS) {
            WITH_TOOLS
        } else {
            DEFAULT
        };
        let format = *self.formats.get(name).ok_or(TemplateError::Missing)?;
        let mut variables = self.special_tokens.clone();
        variables.extend(chat.variables(format)?);
        let template = self.environment.get_template(name)?;
        let rendered = template.render(Value::from_pairs(variables))?;
        chat.cut(rendered)
    }
}

impl ContentFormat {
    /// As vLLM decides it: a template that loops over a message's content expects parts.
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

/// What stands inside `{% … %}`.
fn statements(source: &str) -> impl Iterator<Item = &str> {
    source.split("{%").skip(1).filter_map(|rest| {
        let (statement, _) = rest.split_once("%}")?;
        Some(statement.trim_matches(['-', '+']).trim())
    })
}

fn assignment(statement: &str) -> Option<(&str, &str)> {
    let (name, value) = statement.strip_prefix("set ")?.split_once('=')?;
    Some((name.trim(), value.trim()))
}

fn for_loop(statement: &str) -> Option<(&str, &str)> {
    let (name, list) = statement.strip_prefix("for ")?.split_once(" in ")?;
    let list = list.split_once(" if ").map_or(list, |(list, _)| list);
    Some((name.trim(), list.trim()))
}

/// The list itself, without filters and slices behind it.
fn list_name(expression: &str) -> &str {
    let list = expression.split('|').next().unwrap_or_default().trim();
    match list.rsplit_once('[') {
        Some((list, index)) if index.ends_with(']') && index.contains(':') => list,
        _ => list,
    }
}

/// Without the tags that mark an assistant's words for training, which print nothing.
fn without_generation_marks(source: &str) -> String {
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
        let always = match inside.trim_matches(['-', '+']).trim() {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => continue,
        };
        cleaned.push_str(&always);
        rest = after;
    }
    cleaned.push_str(rest);
    cleaned
}

fn read_json<T: serde::de::DeserializeOwned>(
    folder: &Path,
    file: &'static str,
) -> Result<Option<T>, TemplateError> {
    let Ok(json) = fs::read(folder.join(file)) else {
        return Ok(None);
    };
    match serde_json::from_slice(&json) {
        Ok(read) => Ok(Some(read)),
        Err(error) => Err(TemplateError::File {
            file,
            reason: error.to_string(),
        }),
    }
}
