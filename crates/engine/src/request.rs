//! The part of an OpenAI API body that routing needs: the model, the prompt, the expected output.
//!
//! The body is parsed once, in place, and never rewritten: the engine receives the client's bytes.
//! Fields that routing does not need are skipped without a check, because their validation is the
//! engine's task. Of a repeated key the last value counts, as in Python.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;

use foresee_core::sequence::{self, PartialBlock, Sequence};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

pub use crate::conversation::ASSISTANT_HEADING;
use crate::conversation::{Conversation, Messages};
use crate::loose_value::LooseValue;
use crate::output_text::Continuation;
pub use crate::prompt_sequences::PromptSequences;
use crate::prompts::{Prompts, ReadPrompts};

/// The API that a body was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
}

/// The fields of a body that routing needs.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiRequest {
    /// The requested model, which may be the name of a LoRA adapter; empty if the body names none.
    pub model: String,
    /// Whether the client requests a streamed response.
    pub stream: bool,
    /// Maximum output tokens per choice, if the body limits them.
    pub max_tokens: Option<u32>,
    /// Whether each output has exactly `max_tokens` tokens (`ignore_eos`).
    pub ignore_eos: bool,
    /// Whether the body offers tools, which the output may call.
    pub has_tools: bool,
    /// Outputs generated for each prompt (`n`), at least 1.
    pub choices: u32,
    /// The `cache_salt`: only requests with an equal salt share cached blocks.
    pub cache_salt: Option<String>,
    /// Whether the engine adds special tokens to the prompt, if the body specifies it.
    pub add_special_tokens: Option<bool>,
    /// Whether the engine's KV events shall also list the blocks of this prompt that it found in
    /// its cache (`vllm_xargs: {"kv_cache_report_mode": "full"}`).
    pub full_report_mode: bool,
    /// Number of prompts in the body, at least 1. The engine generates `choices` outputs for each.
    pub prompts: u32,
    /// The prompt, or the first of a batch.
    pub prompt: Prompt,
    /// The further prompts of a batch, fewer than
    /// [`MAX_BATCH_PROMPTS`](foresee_core::batch::MAX_BATCH_PROMPTS).
    pub rest: Vec<Prompt>,
    /// Input that is only counted: the rest of a single prompt, or further prompts of a batch.
    pub unhashed: UnhashedInput,
    /// Position at which the output starts.
    pub completion_follows: CompletionFollows,
}

/// The position at which an output starts in the sequence of its prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionFollows {
    /// Directly after the prompt.
    #[default]
    Prompt,
    /// After the heading of an assistant message.
    AssistantHeader,
    /// At a position that the chat template determines, by options that are not parsed here.
    Template,
    /// At the text of the prompt, which the output repeats (`echo`).
    EchoedPrompt,
}

/// The part of a prompt that can be compared with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, or the canonical bytes of a conversation. The canonical bytes of an earlier turn are a
    /// prefix of those of a later turn, whatever the formatting of the JSON. Not always UTF-8.
    Text(Vec<u8>),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// The part of a request that counts as load but is not hashed: input from the first image, sound
/// or similar part on, and the prompts of a batch after the first
/// [`MAX_BATCH_PROMPTS`](foresee_core::batch::MAX_BATCH_PROMPTS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnhashedInput {
    /// Bytes of text.
    pub bytes: usize,
    /// Tokens, including those assumed for images and other media.
    pub tokens: usize,
}

impl UnhashedInput {
    /// Tokens assumed for one image, sound or similar part. Such parts have from a hundred to a few
    /// thousand tokens, and their length in bytes does not indicate how many.
    const TOKENS_PER_MEDIUM: usize = 1024;

    /// Counts one image, sound or similar part.
    pub(crate) fn add_media(&mut self) {
        self.tokens += Self::TOKENS_PER_MEDIUM;
    }
}

/// Why a body cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BodyError {
    /// Description of the fault and of the valid form.
    pub message: String,
    /// The invalid field; `None` if the body as a whole is invalid.
    pub param: Option<&'static str>,
}

impl ApiRequest {
    /// Parses a body.
    ///
    /// # Errors
    /// If the body is not a JSON object, or a field that routing needs has a form that no engine
    /// accepts.
    pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, BodyError> {
        let mut fields = Fields::new(endpoint);
        let mut json = serde_json::Deserializer::from_slice(body);
        let outcome = fields.deserialize(&mut json).and_then(|()| json.end());
        match outcome {
            Ok(()) => fields.into_request(),
            Err(error) => Err(fields.explain(&error)),
        }
    }

    /// Returns the prompt, or the prompts of a batch that are not only counted.
    pub fn all_prompts(&self) -> impl Iterator<Item = &Prompt> {
        std::iter::once(&self.prompt).chain(&self.rest)
    }

    /// Returns the sequences that the engine runs for this body.
    ///
    /// `ids` are the token ids of the prompts, in the order of [`all_prompts`](Self::all_prompts).
    /// A prompt without ids, or after the end of `ids`, is hashed from its own content.
    /// `bytes_per_token` is the measured length of the engine's tokens in this text; it divides
    /// text into blocks and converts the unhashed bytes into tokens, which match nothing.
    #[must_use]
    pub fn sequences(
        &self,
        ids: &[Option<Vec<u32>>],
        block_size: NonZeroU32,
        bytes_per_token: f64,
    ) -> PromptSequences {
        let salt = self.salt();
        let hash_prompt = |prompt: &Prompt, ids: Option<&Option<Vec<u32>>>| match (ids, prompt) {
            (Some(Some(ids)), _) | (_, Prompt::Tokens(ids)) => {
                Sequence::from_tokens(ids, block_size, salt)
            }
            (_, Prompt::Text(text)) => Sequence::from_text(text, bytes_per_token, block_size, salt),
        };
        let unhashed_tokens = self.unhashed.bytes as f64 / bytes_per_token.max(f64::MIN_POSITIVE)
            + self.unhashed.tokens as f64;
        let unhashed_tokens = unhashed_tokens.ceil() as u32;
        let first = hash_prompt(&self.prompt, ids.first());
        if self.prompts == 1 {
            return PromptSequences::repeated(
                first.with_unhashed_tail(unhashed_tokens),
                self.choices,
            );
        }
        let rest = self.rest.iter().zip(1..);
        let rest = rest.map(|(prompt, index)| hash_prompt(prompt, ids.get(index)));
        PromptSequences::from_prompts(
            first,
            rest.collect(),
            self.prompts,
            self.choices,
            unhashed_tokens,
        )
    }

    /// Returns how the output continues the sequence of the prompt. `ids` are the token ids of the
    /// prompt, if it is hashed as tokens. The arguments must agree with those of
    /// [`sequences`](Self::sequences).
    ///
    /// Returns `None` if the body has several prompts or outputs, if the prompt is not fully
    /// hashed, or if the position of the output is unknown.
    #[must_use]
    pub fn continuation(
        &self,
        ids: Option<&[u32]>,
        block_size: NonZeroU32,
        bytes_per_token: f64,
    ) -> Option<Continuation> {
        let is_single = self.prompts == 1 && self.choices == 1 && self.is_fully_hashed();
        if !is_single || self.completion_follows == CompletionFollows::EchoedPrompt {
            return None;
        }
        let salt = self.salt();
        let from_tokens = |ids| {
            Some(Continuation::from_tokens(PartialBlock::from_tokens(
                ids, block_size, salt,
            )))
        };
        match (&self.prompt, ids, self.completion_follows) {
            (_, Some(ids), _) => from_tokens(ids),
            (Prompt::Tokens(ids), None, _) => from_tokens(ids),
            (
                Prompt::Text(text),
                None,
                CompletionFollows::Prompt | CompletionFollows::AssistantHeader,
            ) => {
                let heading = match self.completion_follows {
                    CompletionFollows::AssistantHeader => ASSISTANT_HEADING,
                    _ => &[],
                };
                let end = PartialBlock::from_text(text, bytes_per_token, block_size, salt);
                Some(Continuation::from_text(end, heading, block_size))
            }
            _ => None,
        }
    }

    /// Returns the salt that all hashes of this body start from.
    fn salt(&self) -> u64 {
        sequence::prefix_salt(&self.model, None, self.cache_salt.as_deref())
    }

    /// Returns whether the hashed prompts contain all input that the engine counts.
    #[must_use]
    pub fn is_fully_hashed(&self) -> bool {
        self.unhashed == UnhashedInput::default()
    }

    /// Returns the bytes of text that the engine's count of prompt tokens stands for, from which
    /// the bytes per token are learned; 0 if part of the input is not text.
    #[must_use]
    pub fn prompt_bytes(&self) -> usize {
        let bytes = self.all_prompts().map(|prompt| match prompt {
            Prompt::Text(text) => Some(text.len()),
            Prompt::Tokens(_) => None,
        });
        match bytes.sum::<Option<usize>>() {
            Some(bytes) if self.unhashed.tokens == 0 => bytes + self.unhashed.bytes,
            _ => 0,
        }
    }
}

/// The fields of a body, collected while the body is parsed.
struct Fields<'b> {
    endpoint: Endpoint,
    /// The field being parsed, to which an error refers.
    current: Option<Key>,
    model: Option<String>,
    stream: LooseValue,
    max_tokens: LooseValue,
    max_completion_tokens: LooseValue,
    ignore_eos: LooseValue,
    choices: LooseValue,
    add_special_tokens: LooseValue,
    add_generation_prompt: LooseValue,
    continue_final_message: LooseValue,
    echo: LooseValue,
    cache_salt: Option<&'b RawValue>,
    vllm_xargs: Option<&'b RawValue>,
    tools: Option<&'b RawValue>,
    conversation: Option<Conversation>,
    prompts: Prompts,
}

/// The keys of a body that are read.
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
    /// Creates the fields of a body of which nothing was parsed.
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            current: None,
            model: None,
            stream: LooseValue::Null,
            max_tokens: LooseValue::Null,
            max_completion_tokens: LooseValue::Null,
            ignore_eos: LooseValue::Null,
            choices: LooseValue::Null,
            add_special_tokens: LooseValue::Null,
            add_generation_prompt: LooseValue::Null,
            continue_final_message: LooseValue::Null,
            echo: LooseValue::Null,
            cache_salt: None,
            vllm_xargs: None,
            tools: None,
            conversation: None,
            prompts: Prompts::default(),
        }
    }

    /// Returns whether the endpoint takes its prompt from this field.
    fn is_prompt(&self, key: Key) -> bool {
        match key {
            Key::Messages => self.endpoint != Endpoint::Completions,
            Key::Prompt => self.endpoint == Endpoint::Completions,
            Key::Input => self.endpoint == Endpoint::Embeddings,
            _ => false,
        }
    }

    /// Builds the request once all fields were read. Optional fields of an unexpected type count as
    /// missing.
    ///
    /// # Errors
    /// If a chat completion has no `messages`. A missing prompt of another endpoint is an empty
    /// text.
    fn into_request(self) -> Result<ApiRequest, BodyError> {
        let (prompt, unhashed) = match (self.prompts.first, self.conversation) {
            (Some(prompt), _) => (prompt, self.prompts.unhashed),
            (None, Some(conversation)) => {
                let (bytes, unhashed) = conversation.finish(self.tools);
                (Prompt::Text(bytes), unhashed)
            }
            (None, None) if self.endpoint == Endpoint::ChatCompletions => {
                return Err(BodyError {
                    message: format!("`messages` is missing; it {MESSAGES_RULE}."),
                    param: Some("messages"),
                });
            }
            // The prompt may be in a field that only the engine reads, such as `prompt_embeds`.
            (None, None) => (Prompt::Text(Vec::new()), self.prompts.unhashed),
        };
        let max_completion_tokens = match self.endpoint {
            Endpoint::ChatCompletions => self.max_completion_tokens.count(),
            Endpoint::Completions | Endpoint::Embeddings => None,
        };
        let completion_follows = match self.endpoint {
            Endpoint::ChatCompletions
                if self.add_generation_prompt == LooseValue::Bool(false)
                    || self.continue_final_message == LooseValue::Bool(true) =>
            {
                CompletionFollows::Template
            }
            Endpoint::ChatCompletions => CompletionFollows::AssistantHeader,
            _ if self.echo == LooseValue::Bool(true) => CompletionFollows::EchoedPrompt,
            _ => CompletionFollows::Prompt,
        };
        Ok(ApiRequest {
            completion_follows,
            model: self.model.unwrap_or_default(),
            stream: matches!(
                self.stream,
                LooseValue::Bool(true) | LooseValue::Number(1.0)
            ),
            max_tokens: max_completion_tokens.or(self.max_tokens.count()),
            ignore_eos: self.ignore_eos == LooseValue::Bool(true),
            has_tools: self.tools.is_some_and(is_nonempty_list),
            choices: match self.endpoint {
                Endpoint::Embeddings => 1,
                _ => self.choices.count().unwrap_or(1).max(1),
            },
            // The engine rejects a salt that is not a string.
            cache_salt: self
                .cache_salt
                .and_then(|raw| serde_json::from_str(raw.get()).ok()),
            add_special_tokens: match self.add_special_tokens {
                LooseValue::Bool(add) => Some(add),
                _ => None,
            },
            full_report_mode: self.vllm_xargs.is_some_and(is_full_report_mode),
            prompts: self.prompts.count.max(1),
            prompt,
            rest: self.prompts.rest,
            unhashed,
        })
    }

    /// Describes the error with which the parse of this body ended. For valid JSON, the description
    /// names the field that was being read and its valid form, or says that the body must be an
    /// object. For invalid JSON, `param` is `None`. The description never quotes the body.
    fn explain(&self, error: &serde_json::Error) -> BodyError {
        if !error.is_data() {
            return BodyError {
                message: format!("The body is not valid JSON: {error}."),
                param: None,
            };
        }
        let (param, rule) = match self.current {
            Some(Key::Messages) => ("messages", MESSAGES_RULE),
            Some(Key::Prompt) => ("prompt", PROMPTS_RULE),
            Some(Key::Input) => ("input", PROMPTS_RULE),
            Some(Key::Model) => ("model", "must be a string with the name of a model"),
            _ => {
                return BodyError {
                    message: "The body must be a JSON object.".to_owned(),
                    param: None,
                };
            }
        };
        // The message of `error` itself may quote the whole prompt.
        let (line, column) = (error.line(), error.column());
        BodyError {
            message: format!("`{param}` {rule} (line {line}, column {column})."),
            param: Some(param),
        }
    }
}

/// Returns whether a raw JSON value is a list that is not empty.
fn is_nonempty_list(value: &RawValue) -> bool {
    let elements = value.get().strip_prefix('[');
    elements.is_some_and(|elements| elements.trim_start() != "]")
}

/// Returns whether `vllm_xargs` requests full report mode.
fn is_full_report_mode(xargs: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Xargs<'b> {
        #[serde(borrow)]
        kv_cache_report_mode: Cow<'b, str>,
    }
    let xargs = serde_json::from_str::<Xargs<'_>>(xargs.get());
    xargs.is_ok_and(|xargs| xargs.kv_cache_report_mode == "full")
}

/// The valid form of `messages`, as an error message states it.
const MESSAGES_RULE: &str = "must be an array of objects, each with `role` and `content`, the \
                            content being a string or an array of parts";
/// The valid form of `prompt` and `input`, as an error message states it.
const PROMPTS_RULE: &str = "must be a string, an array of token ids, an array of strings or an array of arrays of \
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
