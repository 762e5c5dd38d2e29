//! An OpenAI API body as routing sees it: for which model, what prompt, how much output.
//!
//! The body is read once, in place, and never written again: what is forwarded is what came.
//! Fields that routing does not need are skipped unseen, because judging them is the engine's
//! business. A key given twice counts as last given, as in Python.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;

use foresee_core::sequence::{self, OpenEnd, Sequence};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::answer::Continuation;
pub use crate::conversation::ANSWER_HEADING;
use crate::conversation::{Conversation, Messages};
use crate::lenient::Gist;
use crate::prompts::{Prompts, ReadPrompts};
pub use crate::sequences::Sequences;

/// Which API a body was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
}

/// What routing needs of a body.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiRequest {
    /// The model asked for, which may name a LoRA adapter; empty if none was named.
    pub model: String,
    /// Whether the answer is to come as a stream of events.
    pub stream: bool,
    /// The most output tokens per choice, if the request says.
    pub max_tokens: Option<u32>,
    /// Whether the answer has all of those (`ignore_eos`).
    pub ignores_eos: bool,
    /// Whether the answer may call tools.
    pub has_tools: bool,
    /// How many answers are generated from each prompt (`n`), at least 1.
    pub choices: u32,
    /// Keeps this prompt's cache apart from others'.
    pub cache_salt: Option<String>,
    /// Whether a tokenizer is to frame the prompt with special tokens, if the request says.
    pub add_special_tokens: Option<bool>,
    /// Whether the engine is to list, among its KV events, the blocks it found cached for this
    /// prompt (`vllm_xargs: {"kv_cache_report_mode": "full"}`).
    pub lists_cached: bool,
    /// How many prompts the request holds, at least 1. Each gets `choices` answers.
    pub prompts: u32,
    /// The prompt, or the first of a batch.
    pub prompt: Prompt,
    /// The prompts of a batch that follow it, less than
    /// [`MOST_IN_BATCH`](foresee_core::batch::MOST_IN_BATCH) of them.
    pub further: Vec<Prompt>,
    /// What comes besides and is only counted: after the only prompt, or beside those of a batch.
    pub unmatched: Unmatched,
    /// Where the answer begins.
    pub answered: Answered,
}

/// Where an answer begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answered {
    /// After the prompt.
    #[default]
    Directly,
    /// After the heading of an assistant's message.
    AsMessage,
    /// The template decides, by options that are not read here.
    AsTemplated,
    /// Before the prompt, which it repeats (`echo`).
    WithPrompt,
}

/// The part of a prompt that can be compared with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, or the canonical bytes of a conversation: those of an earlier turn are a prefix of
    /// those of a later one, however either was formatted as JSON. Not always UTF-8.
    Text(Vec<u8>),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// The part of a request that counts as load but is compared with nothing: whatever follows an
/// image or the like, and the prompts of a batch that are too many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmatched {
    /// Bytes of text.
    pub bytes: usize,
    /// Tokens, those supposed for images among them.
    pub tokens: usize,
}

impl Unmatched {
    /// What one image, sound or the like is taken to cost: such inputs range from a hundred
    /// tokens to a few thousand, and their length in bytes says nothing about it.
    const TOKENS_PER_MEDIUM: usize = 1024;

    pub(crate) fn add_media(&mut self) {
        self.tokens += Self::TOKENS_PER_MEDIUM;
    }
}

/// Why a body cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BodyError {
    /// What is wrong, and what would be right.
    pub message: String,
    /// The field at fault; `None` if the body as a whole is.
    pub param: Option<&'static str>,
}

impl ApiRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// If the body is not a JSON object, or a field that routing needs has a form no engine
    /// would take.
    pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::new(endpoint);
        let mut json = serde_json::Deserializer::from_slice(body);
        let outcome = fields.deserialize(&mut json).and_then(|()| json.end());
        match outcome {
            Ok(()) => fields.into_request(),
            Err(error) => Err(fields.explain(&error)),
        }
    }

    /// The prompt, or those of a batch that are more than counted.
    pub fn all_prompts(&self) -> impl Iterator<Item = &Prompt> {
        std::iter::once(&self.prompt).chain(&self.further)
    }

    /// The prompts as the prefix cache sees them: in the order of [`all_prompts`](Self::all_prompts),
    /// by their token `ids` as far as those are given, by what they hold otherwise.
    /// `bytes_per_token` is what the engine's tokens are known to measure; it cuts text into
    /// blocks.
    #[must_use]
    pub fn sequences(
        &self,
        ids: &[Option<Vec<u32>>],
        block_size: NonZeroU32,
        bytes_per_token: f64,
    ) -> Sequences {
        let salt = self.salt();
        let cut = |prompt: &Prompt, ids: Option<&Option<Vec<u32>>>| match (ids, prompt) {
            (Some(Some(ids)), _) | (_, Prompt::Tokens(ids)) => {
                Sequence::from_tokens(ids, block_size, salt)
            }
            (_, Prompt::Text(text)) => Sequence::from_text(text, bytes_per_token, block_size, salt),
        };
        let unmatched = self.unmatched.bytes as f64 / bytes_per_token.max(f64::MIN_POSITIVE)
            + self.unmatched.tokens as f64;
        let unmatched = unmatched.ceil() as u32;
        let first = cut(&self.prompt, ids.first());
        if self.prompts == 1 {
            return Sequences::of_one(first.with_opaque_tail(unmatched), self.choices);
        }
        let further = self.further.iter().zip(1..);
        let further = further.map(|(prompt, index)| cut(prompt, ids.get(index)));
        Sequences::of_batch(
            first,
            further.collect(),
            self.prompts,
            self.choices,
            unmatched,
        )
    }

    /// How the only prompt's sequence goes on with its only answer; `None` if that cannot be known.
    /// `ids` are the prompt's, where it is matched as tokens.
    #[must_use]
    pub fn continuation(
        &self,
        ids: Option<&[u32]>,
        block_size: NonZeroU32,
        bytes_per_token: f64,
    ) -> Option<Continuation> {
        let is_single = self.prompts == 1 && self.choices == 1 && self.is_matched_whole();
        if !is_single || self.answered == Answered::WithPrompt {
            return None;
        }
        let salt = self.salt();
        let of_tokens = |ids| {
            Some(Continuation::of_tokens(OpenEnd::of_tokens(
                ids, block_size, salt,
            )))
        };
        match (&self.prompt, ids, self.answered) {
            (_, Some(ids), _) => of_tokens(ids),
            (Prompt::Tokens(ids), None, _) => of_tokens(ids),
            (Prompt::Text(text), None, Answered::Directly | Answered::AsMessage) => {
                let heading = match self.answered {
                    Answered::AsMessage => ANSWER_HEADING,
                    _ => &[],
                };
                let end = OpenEnd::of_text(text, bytes_per_token, block_size, salt);
                Some(Continuation::of_text(end, heading, block_size))
            }
            _ => None,
        }
    }

    fn salt(&self) -> u64 {
        sequence::salt(&self.model, None, self.cache_salt.as_deref())
    }

    /// Whether the prompts are all that the engine will count.
    #[must_use]
    pub fn is_matched_whole(&self) -> bool {
        self.unmatched == Unmatched::default()
    }

    /// Bytes of prompt text that the engine's count of prompt tokens stands for, to learn how
    /// many bytes make a token; 0 if part of the prompt was no text.
    #[must_use]
    pub fn prompt_bytes(&self) -> usize {
        let bytes = self.all_prompts().map(|prompt| match prompt {
            Prompt::Text(text) => Some(text.len()),
            Prompt::Tokens(_) => None,
        });
        match bytes.sum::<Option<usize>>() {
            Some(bytes) if self.unmatched.tokens == 0 => bytes + self.unmatched.bytes,
            _ => 0,
        }
    }
}

/// The fields of a body, as they are met.
struct Fields<'b> {
    endpoint: Endpoint,
    /// The field being read, which an error is about.
    current: Option<Key>,
    model: Option<String>,
    stream: Gist,
    max_tokens: Gist,
    max_completion_tokens: Gist,
    ignore_eos: Gist,
    choices: Gist,
    add_special_tokens: Gist,
    add_generation_prompt: Gist,
    continue_final_message: Gist,
    echo: Gist,
    cache_salt: Option<&'b RawValue>,
    vllm_xargs: Option<&'b RawValue>,
    tools: Option<&'b RawValue>,
    conversation: Option<Conversation>,
    prompts: Prompts,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Key {
    Model,
    Stream,
    MaxTokens,
    MaxCompletionTokens,
    IgnoreEos,
    N,
    CacheSalt,
    VllmXargs,
    AddSpecialTokens,
    AddGenerationPrompt,
    ContinueFinalMessage,
    Echo,
    Tools,
    Messages,
    Prompt,
    Input,
    #[serde(other)]
    Other,
}

impl<'b> Fields<'b> {
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            current: None,
            model: None,
            stream: Gist::Null,
            max_tokens: Gist::Null,
            max_completion_tokens: Gist::Null,
            ignore_eos: Gist::Null,
            choices: Gist::Null,
            add_special_tokens: Gist::Null,
            add_generation_prompt: Gist::Null,
            continue_final_message: Gist::Null,
            echo: Gist::Null,
            cache_salt: None,
            vllm_xargs: None,
            tools: None,
            conversation: None,
            prompts: Prompts::default(),
        }
    }

    /// Whether the endpoint takes its prompt from this field.
    fn is_prompt(&self, key: Key) -> bool {
        match key {
            Key::Messages => self.endpoint != Endpoint::Completions,
            Key::Prompt => self.endpoint == Endpoint::Completions,
            Key::Input => self.endpoint == Endpoint::Embeddings,
            _ => false,
        }
    }

    fn into_request(self) -> Result<ApiRequest, BodyError> {
        let (prompt, unmatched) = match (self.prompts.first, self.conversation) {
            (Some(prompt), _) => (prompt, self.prompts.unmatched),
            (None, Some(conversation)) => {
                let (bytes, unmatched) = conversation.finish(self.tools);
                (Prompt::Text(bytes), unmatched)
            }
            (None, None) if self.endpoint == Endpoint::ChatCompletions => {
                return Err(BodyError {
                    message: format!("`messages` is missing: it {MESSAGES_ARE}."),
                    param: Some("messages"),
                });
            }
            // A prompt may come in fields that only the engine knows, such as `prompt_embeds`.
            (None, None) => (Prompt::Text(Vec::new()), self.prompts.unmatched),
        };
        let max_completion_tokens = match self.endpoint {
            Endpoint::ChatCompletions => self.max_completion_tokens.count(),
            Endpoint::Completions | Endpoint::Embeddings => None,
        };
        let answered = match self.endpoint {
            Endpoint::ChatCompletions
                if self.add_generation_prompt == Gist::Bool(false)
                    || self.continue_final_message == Gist::Bool(true) =>
            {
                Answered::AsTemplated
            }
            Endpoint::ChatCompletions => Answered::AsMessage,
            _ if self.echo == Gist::Bool(true) => Answered::WithPrompt,
            _ => Answered::Directly,
        };
        Ok(ApiRequest {
            answered,
            model: self.model.unwrap_or_default(),
            stream: matches!(self.stream, Gist::Bool(true) | Gist::Number(1.0)),
            max_tokens: max_completion_tokens.or(self.max_tokens.count()),
            ignores_eos: self.ignore_eos == Gist::Bool(true),
            has_tools: self.tools.is_some_and(has_any),
            choices: match self.endpoint {
                Endpoint::Embeddings => 1,
                _ => self.choices.count().unwrap_or(1).max(1),
            },
            // A salt that is no string is refused by the engine.
            cache_salt: self
                .cache_salt
                .and_then(|raw| serde_json::from_str(raw.get()).ok()),
            add_special_tokens: match self.add_special_tokens {
                Gist::Bool(add) => Some(add),
                _ => None,
            },
            lists_cached: self.vllm_xargs.is_some_and(lists_cached),
            prompts: self.prompts.count.max(1),
            prompt,
            further: self.prompts.further,
            unmatched,
        })
    }

    fn explain(&self, error: &serde_json::Error) -> BodyError {
        if !error.is_data() {
            return BodyError {
                message: format!("The body is not valid JSON: {error}."),
                param: None,
            };
        }
        let (param, rule) = match self.current {
            Some(Key::Messages) => ("messages", MESSAGES_ARE),
            Some(Key::Prompt) => ("prompt", PROMPTS_ARE),
            Some(Key::Input) => ("input", PROMPTS_ARE),
            Some(Key::Model) => ("model", "must be a string, the name of a model"),
            _ => {
                return BodyError {
                    message: "The body must be a JSON object.".to_owned(),
                    param: None,
                };
            }
        };
        // The error's own text may quote the whole prompt.
        let (line, column) = (error.line(), error.column());
        BodyError {
            message: format!("`{param}` {rule} (line {line}, column {column})."),
            param: Some(param),
        }
    }
}

/// Whether it is a list, and not an empty one.
fn has_any(list: &RawValue) -> bool {
    let rest = list.get().strip_prefix('[');
    rest.is_some_and(|it| it.trim_start() != "]")
}

fn lists_cached(xargs: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Xargs<'b> {
        #[serde(borrow)]
        kv_cache_report_mode: Cow<'b, str>,
    }
    let read = serde_json::from_str::<Xargs<'_>>(xargs.get());
    read.is_ok_and(|it| it.kv_cache_report_mode == "full")
}

const MESSAGES_ARE: &str = "must be an array of objects, each with `role` and `content`, the \
                            content being a string or an array of parts";
const PROMPTS_ARE: &str = "must be a string, an array of token ids, an array of strings or an array of arrays of \
     token ids";

impl<'b> DeserializeSeed<'b> for &mut Fields<'b> {
    type Value = ();

    fn deserialize<D: Deserializer<'b>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'b> Visitor<'b> for &mut Fields<'b> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'b>>(self, mut body: A) -> Result<(), A::Error> {
        while let Some(key) = body.next_key()? {
            self.current = Some(key);
            match key {
                Key::Model => self.model = body.next_value()?,
                Key::Stream => self.stream = body.next_value()?,
                Key::MaxTokens => self.max_tokens = body.next_value()?,
                Key::MaxCompletionTokens => self.max_completion_tokens = body.next_value()?,
                Key::IgnoreEos => self.ignore_eos = body.next_value()?,
                Key::N => self.choices = body.next_value()?,
                Key::AddSpecialTokens => self.add_special_tokens = body.next_value()?,
                Key::AddGenerationPrompt => self.add_generation_prompt = body.next_value()?,
                Key::ContinueFinalMessage => self.continue_final_message = body.next_value()?,
                Key::Echo => self.echo = body.next_value()?,
                Key::CacheSalt => self.cache_salt = Some(body.next_value()?),
                Key::VllmXargs => self.vllm_xargs = Some(body.next_value()?),
                Key::Tools => self.tools = Some(body.next_value()?),
                Key::Messages if self.is_prompt(key) => {
                    let conversation = self.conversation.insert(Conversation::default());
                    body.next_value_seed(Messages(conversation))?;
                }
                Key::Prompt | Key::Input if self.is_prompt(key) => {
                    self.prompts = Prompts::default();
                    body.next_value_seed(ReadPrompts(&mut self.prompts))?;
                }
                Key::Messages | Key::Prompt | Key::Input | Key::Other => {
                    body.next_value::<IgnoredAny>()?;
                }
            }
            self.current = None;
        }
        Ok(())
    }
}
