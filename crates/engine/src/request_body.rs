//! The fields of a request body that are read, and how its input becomes prompts.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::body_error::BodyError;
use crate::conversation::{Conversation, Messages};
use crate::conversion::Conversion;
use crate::converted::Converted;
use crate::endpoint::Endpoint;
use crate::loose_value::LooseValue;
use crate::media::hash_media;
use crate::prompt::{Prompt, UnhashedInput};
use crate::prompts::{Prompts, ReadPrompts};
use crate::stream::MAX_ID_BYTES;
use crate::{messages_request, responses_request};

/// The fields of a body, collected while the body is parsed.
pub(crate) struct RequestBody<'b> {
    endpoint: Endpoint,
    /// The field being parsed, to which an error refers.
    current: Option<Key>,
    pub(crate) model: Option<String>,
    stream: LooseValue,
    max_tokens: LooseValue,
    max_completion_tokens: LooseValue,
    max_output_tokens: LooseValue,
    ignore_eos: LooseValue,
    choices: LooseValue,
    add_special_tokens: LooseValue,
    add_generation_prompt: LooseValue,
    continue_final_message: LooseValue,
    echo: LooseValue,
    cache_salt: Option<&'b RawValue>,
    vllm_xargs: Option<&'b RawValue>,
    tools: Option<&'b RawValue>,
    previous_response_id: Option<&'b RawValue>,
    prompt_cache_key: Option<&'b RawValue>,
    session_id: Option<&'b RawValue>,
    image_data: Option<&'b RawValue>,
    /// `instructions` or `system`.
    system: Option<&'b RawValue>,
    /// `input` or `messages` of an API whose items are converted.
    items: Option<&'b RawValue>,
    sampling_params: SamplingParams,
    conversation: Option<Conversation>,
    /// The prompts, or the documents that a query is compared with.
    prompts: Prompts,
    /// The queries of a rerank or score request.
    queries: Prompts,
}

/// The input of a body.
#[derive(Default)]
pub(crate) struct Input {
    pub(crate) prompts: Prompts,
    pub(crate) media_hash: Option<u64>,
    /// Whether the output continues the last message.
    pub(crate) continues: bool,
}

/// The fields of `sampling_params` that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct SamplingParams {
    max_tokens: LooseValue,
    max_new_tokens: LooseValue,
    n: LooseValue,
    ignore_eos: LooseValue,
}

/// The keys of a body that are read.
#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Key {
    Model,
    Stream,
    MaxTokens,
    MaxCompletionTokens,
    MaxOutputTokens,
    IgnoreEos,
    N,
    CacheSalt,
    VllmXargs,
    AddSpecialTokens,
    AddGenerationPrompt,
    ContinueFinalMessage,
    Echo,
    Tools,
    PreviousResponseId,
    #[serde(rename = "prompt_cache_key")]
    Session,
    SessionId,
    SamplingParams,
    ImageData,
    Instructions,
    System,
    Messages,
    Prompt,
    Input,
    TokenIds,
    InputIds,
    Text,
    Texts,
    Query,
    Queries,
    #[serde(rename = "text_1")]
    FirstText,
    #[serde(rename = "data_1")]
    FirstData,
    Documents,
    Items,
    #[serde(rename = "text_2")]
    SecondText,
    #[serde(rename = "data_2")]
    SecondData,
    #[serde(other)]
    Other,
}

/// How a field is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// As the messages of a chat, which are read in place.
    Conversation,
    /// As items that are converted to the messages of a chat.
    Items,
    /// As what such items start with: `instructions` or `system`.
    System,
    /// As prompts, or as documents.
    Prompts,
    /// As queries.
    Queries,
    /// Not at all.
    None,
}

/// Returns how a field that can contain input is used.
fn input_use(endpoint: Endpoint, key: Key) -> Use {
    use Endpoint as E;
    match (key, endpoint) {
        (Key::Messages, E::ChatCompletions | E::Embeddings | E::Classify | E::Pooling) => {
            Use::Conversation
        }
        (Key::Messages, E::Messages) | (Key::Input, E::Responses) => Use::Items,
        (Key::System, E::Messages) | (Key::Instructions, E::Responses) => Use::System,
        (Key::Prompt, E::Completions)
        | (Key::Input, E::Embeddings | E::Classify | E::Pooling)
        | (Key::Text | Key::InputIds, E::SglangGenerate | E::Embeddings | E::Classify)
        | (Key::Texts, E::Embeddings)
        | (Key::TokenIds, E::VllmGenerate)
        | (Key::Documents | Key::Items | Key::SecondText | Key::SecondData, E::Rerank | E::Score) => {
            Use::Prompts
        }
        (Key::Query | Key::Queries | Key::FirstText | Key::FirstData, E::Rerank | E::Score) => {
            Use::Queries
        }
        _ => Use::None,
    }
}

impl<'b> RequestBody<'b> {
    /// Parses a body.
    ///
    /// # Errors
    /// If the body is not a JSON object, or its input or model has an invalid form.
    pub(crate) fn parse(endpoint: Endpoint, body: &'b [u8]) -> Result<Self, BodyError> {
        let mut fields = Self::new(endpoint);
        let mut json = serde_json::Deserializer::from_slice(body);
        let outcome = (&mut fields)
            .deserialize(&mut json)
            .and_then(|()| json.end());
        match outcome {
            Ok(()) => Ok(fields),
            Err(error) => Err(fields.explain(&error)),
        }
    }

    /// Creates the fields of a body of which nothing was parsed.
    fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            current: None,
            model: None,
            stream: LooseValue::Null,
            max_tokens: LooseValue::Null,
            max_completion_tokens: LooseValue::Null,
            max_output_tokens: LooseValue::Null,
            ignore_eos: LooseValue::Null,
            choices: LooseValue::Null,
            add_special_tokens: LooseValue::Null,
            add_generation_prompt: LooseValue::Null,
            continue_final_message: LooseValue::Null,
            echo: LooseValue::Null,
            cache_salt: None,
            vllm_xargs: None,
            tools: None,
            previous_response_id: None,
            prompt_cache_key: None,
            session_id: None,
            image_data: None,
            system: None,
            items: None,
            sampling_params: SamplingParams::default(),
            conversation: None,
            prompts: Prompts::default(),
            queries: Prompts::default(),
        }
    }

    /// Takes the input of the body, once all fields were read. Input of a request that continues a
    /// stored response is only counted, because the engine puts the stored conversation before it.
    ///
    /// # Errors
    /// If the API requires an input and the body has none, or one of an invalid form. For other
    /// APIs, a missing prompt is an empty text.
    pub(crate) fn take_input(&mut self) -> Result<Input, BodyError> {
        let mut input = match self.endpoint {
            Endpoint::Responses => {
                let items = self.require_items("input", INPUT_RULE, b"\"[")?;
                let conversion = Conversion::default();
                let (converted, continues) =
                    responses_request::convert(conversion, self.system, Some(items));
                Input {
                    continues,
                    ..Input::from_converted(&converted, self.tools)
                }
            }
            Endpoint::Messages => {
                let items = self.require_items("messages", MESSAGES_RULE, b"[")?;
                let conversion = Conversion::default();
                let (converted, _) =
                    messages_request::convert(conversion, self.system, Some(items));
                Input::from_converted(&converted, self.tools)
            }
            Endpoint::Rerank | Endpoint::Score => Input {
                prompts: pairs(&self.queries, &self.prompts),
                ..Input::default()
            },
            _ => match (self.prompts.count, self.conversation.take()) {
                (0, Some(conversation)) => Input::from_conversation(conversation, self.tools),
                (0, None) if self.endpoint == Endpoint::ChatCompletions => {
                    return Err(missing("messages", MESSAGES_RULE));
                }
                _ => Input {
                    prompts: std::mem::take(&mut self.prompts),
                    ..Input::default()
                },
            },
        };
        if let Some(image) = self.image_data {
            input.media_hash = Some(hash_media(image));
            input.prompts.unhashed.add_media();
        }
        if self.previous_response_id().is_some()
            && let Some(Prompt::Text(text)) = input.prompts.first.take()
        {
            input.prompts.unhashed.bytes += text.len();
        }
        Ok(input)
    }

    /// Returns the raw items that are converted to messages. `starts` are the bytes that a valid
    /// form can start with.
    fn require_items(
        &self,
        param: &'static str,
        rule: &str,
        starts: &[u8],
    ) -> Result<&'b RawValue, BodyError> {
        let items = self.items.ok_or_else(|| missing(param, rule))?;
        match items.get().bytes().next() {
            Some(first) if starts.contains(&first) => Ok(items),
            _ => Err(BodyError {
                message: format!("`{param}` {rule}."),
                param: Some(param),
            }),
        }
    }

    /// Returns whether the body requests a stream.
    pub(crate) fn streams(&self) -> bool {
        matches!(
            self.stream,
            LooseValue::Bool(true) | LooseValue::Number(1.0)
        )
    }

    /// Returns the limit of the output tokens, by the field that takes precedence in this API.
    pub(crate) fn max_tokens(&self) -> Option<u32> {
        let fields: &[LooseValue] = match self.endpoint {
            Endpoint::ChatCompletions => &[self.max_completion_tokens, self.max_tokens],
            Endpoint::Responses => &[self.max_output_tokens],
            Endpoint::VllmGenerate => &[self.sampling_params.max_tokens],
            Endpoint::SglangGenerate => &[self.sampling_params.max_new_tokens],
            Endpoint::Other => &[
                self.max_completion_tokens,
                self.max_output_tokens,
                self.max_tokens,
            ],
            _ => &[self.max_tokens],
        };
        fields.iter().find_map(|field| field.count())
    }

    /// Returns whether each output has exactly as many tokens as the limit says.
    pub(crate) fn ignores_eos(&self) -> bool {
        let fields = [self.ignore_eos, self.sampling_params.ignore_eos];
        fields.contains(&LooseValue::Bool(true))
    }

    /// Returns the number of outputs for each prompt, at least 1.
    pub(crate) fn choices(&self) -> u32 {
        let choices = self.choices.count().or(self.sampling_params.n.count());
        choices.unwrap_or(1).max(1)
    }

    /// Returns whether the body offers tools.
    pub(crate) fn has_tools(&self) -> bool {
        self.tools.is_some_and(is_nonempty_list)
    }

    /// Returns whether the position of the output depends on an option that the template reads.
    pub(crate) fn sets_continuation(&self) -> bool {
        self.add_generation_prompt == LooseValue::Bool(false)
            || self.continue_final_message == LooseValue::Bool(true)
    }

    /// Returns whether the output repeats the prompt.
    pub(crate) fn echoes(&self) -> bool {
        self.echo == LooseValue::Bool(true)
    }

    /// Returns the cache salt. The engine rejects a salt that is not a string.
    pub(crate) fn cache_salt(&self) -> Option<String> {
        self.cache_salt
            .and_then(|raw| serde_json::from_str(raw.get()).ok())
    }

    /// Returns whether the engine adds special tokens to the prompt, if the body specifies it.
    pub(crate) fn add_special_tokens(&self) -> Option<bool> {
        match self.add_special_tokens {
            LooseValue::Bool(add) => Some(add),
            _ => None,
        }
    }

    /// Returns whether `vllm_xargs` requests full report mode.
    pub(crate) fn requests_full_report_mode(&self) -> bool {
        self.vllm_xargs.is_some_and(is_full_report_mode)
    }

    /// Returns the id of the stored response that the request continues.
    pub(crate) fn previous_response_id(&self) -> Option<String> {
        read_id(self.previous_response_id)
    }

    /// Returns the key of the client's session.
    pub(crate) fn session_key(&self) -> Option<String> {
        read_id(self.prompt_cache_key).or_else(|| read_id(self.session_id))
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
            Some(Key::Text) => ("text", PROMPTS_RULE),
            Some(Key::Texts) => ("texts", PROMPTS_RULE),
            Some(Key::InputIds) => ("input_ids", PROMPTS_RULE),
            Some(Key::TokenIds) => ("token_ids", "must be an array of token ids"),
            Some(Key::Query) => ("query", PROMPTS_RULE),
            Some(Key::Documents) => ("documents", PROMPTS_RULE),
            Some(Key::Model) => ("model", "must be a string with the name of a model"),
            Some(_) => {
                return BodyError {
                    message: format!(
                        "A field of the body has an invalid value (line {}, column {}).",
                        error.line(),
                        error.column()
                    ),
                    param: None,
                };
            }
            None => {
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

impl Input {
    /// Returns the input of a chat whose messages were read in place.
    fn from_conversation(conversation: Conversation, tools: Option<&RawValue>) -> Self {
        let media_hash = conversation.media_hash();
        let (bytes, unhashed) = conversation.finish(tools);
        Self {
            prompts: Prompts {
                first: Some(Prompt::Text(bytes)),
                count: 1,
                unhashed,
                ..Prompts::default()
            },
            media_hash,
            continues: false,
        }
    }

    /// Returns the input of a request that was converted to the messages of a chat.
    fn from_converted(converted: &Converted, tools: Option<&RawValue>) -> Self {
        let conversation = Conversation::of_messages(&converted.messages);
        Self {
            media_hash: converted.media_hash,
            ..Self::from_conversation(conversation, tools)
        }
    }
}

/// Returns the input of a rerank or score request, of which nothing is hashed: each document is
/// computed together with a query. A single query is computed with each document.
fn pairs(queries: &Prompts, documents: &Prompts) -> Prompts {
    let repeats = match queries.count {
        1 => documents.count.max(1) as usize,
        _ => 1,
    };
    let size = queries.size();
    let mut unhashed = UnhashedInput {
        bytes: size.bytes.saturating_mul(repeats),
        tokens: size.tokens.saturating_mul(repeats),
    };
    unhashed.add(documents.size());
    Prompts {
        unhashed,
        ..Prompts::default()
    }
}

/// Returns the error for a field that is missing.
fn missing(param: &'static str, rule: &str) -> BodyError {
    BodyError {
        message: format!("`{param}` is missing; it {rule}."),
        param: Some(param),
    }
}

/// Parses an id or a key; `None` if it is empty, not a string, or longer than [`MAX_ID_BYTES`].
fn read_id(raw: Option<&RawValue>) -> Option<String> {
    let raw = raw.filter(|raw| raw.get().len() <= MAX_ID_BYTES + 2)?;
    let id: String = serde_json::from_str(raw.get()).ok()?;
    (!id.is_empty()).then_some(id)
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
/// The valid form of the `input` of the Responses API, as an error message states it.
const INPUT_RULE: &str = "must be a string or an array of items";
/// The valid form of `prompt` and similar fields, as an error message states it.
const PROMPTS_RULE: &str = "must be a string, an array of token ids, an array of strings or an array of arrays of \
     token ids";

impl<'b> DeserializeSeed<'b> for &mut RequestBody<'b> {
    type Value = ();

    fn deserialize<D: Deserializer<'b>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'b> Visitor<'b> for &mut RequestBody<'b> {
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
                Key::MaxOutputTokens => self.max_output_tokens = body.next_value()?,
                Key::IgnoreEos => self.ignore_eos = body.next_value()?,
                Key::N => self.choices = body.next_value()?,
                Key::AddSpecialTokens => self.add_special_tokens = body.next_value()?,
                Key::AddGenerationPrompt => self.add_generation_prompt = body.next_value()?,
                Key::ContinueFinalMessage => self.continue_final_message = body.next_value()?,
                Key::Echo => self.echo = body.next_value()?,
                Key::CacheSalt => self.cache_salt = Some(body.next_value()?),
                Key::VllmXargs => self.vllm_xargs = Some(body.next_value()?),
                Key::Tools => self.tools = Some(body.next_value()?),
                Key::PreviousResponseId => self.previous_response_id = body.next_value()?,
                Key::Session => self.prompt_cache_key = body.next_value()?,
                Key::SessionId => self.session_id = body.next_value()?,
                Key::ImageData if self.endpoint == Endpoint::SglangGenerate => {
                    self.image_data = body.next_value()?;
                }
                Key::SamplingParams => {
                    let raw: &RawValue = body.next_value()?;
                    // The parameters of a batch are a list. Then the limits are not known.
                    self.sampling_params = serde_json::from_str(raw.get()).unwrap_or_default();
                }
                key => match input_use(self.endpoint, key) {
                    Use::Conversation => {
                        let conversation = self.conversation.insert(Conversation::default());
                        body.next_value_seed(Messages(conversation))?;
                    }
                    Use::Items => self.items = body.next_value()?,
                    Use::System => self.system = body.next_value()?,
                    Use::Prompts => {
                        let mut prompts = Prompts::default();
                        body.next_value_seed(ReadPrompts(&mut prompts))?;
                        // `null` may stand beside another field with the prompts.
                        if prompts.count > 0 || self.prompts.count == 0 {
                            self.prompts = prompts;
                        }
                    }
                    Use::Queries => {
                        self.queries = Prompts::default();
                        body.next_value_seed(ReadPrompts(&mut self.queries))?;
                    }
                    Use::None => {
                        body.next_value::<IgnoredAny>()?;
                    }
                },
            }
            self.current = None;
        }
        Ok(())
    }
}
