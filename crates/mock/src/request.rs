//! Reads request bodies: prompts become tokens, and outputs get a known length.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use foresee_core::sequence::{self, Sequence};
use foresee_engine::error::ApiError;
use foresee_engine::request::{ASSISTANT_HEADING, ApiRequest, Endpoint, Prompt};
use foresee_sim::engine::EngineRequest;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::config::MockEngineConfig;
use crate::engine_loop::Submission;
use crate::kv_publisher::Content;
use crate::output::{MockOutput, tokenize};

/// Maximum value of `n`: choices for each prompt.
const MAX_CHOICES: u32 = 128;

/// Maximum number of prompts in a request.
const MAX_PROMPTS: u32 = 4096;

/// A parsed request with everything that the engine and the response need.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) endpoint: Endpoint,
    /// Id of the response without the prefix of the endpoint.
    pub(crate) name: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) stream: bool,
    /// `stream_options.include_usage`: the stream ends with an event that has the usage.
    pub(crate) usage_at_end: bool,
    /// `stream_options.continuous_usage_stats`: each event has the usage so far.
    pub(crate) usage_in_each_event: bool,
    /// Sum over all prompts.
    pub(crate) prompt_tokens: u32,
    /// One output for each choice of each prompt.
    pub(crate) outputs: Vec<PlannedOutput>,
    /// One submission for each output; the engine loop assigns the ids.
    pub(crate) requests: Vec<Submission>,
}

/// Where an output ends.
#[derive(Clone, Copy, Debug)]
enum OutputLength {
    /// At the length that the prompt determines.
    Natural,
    /// After `min_tokens`: the next token is the end-of-sequence token.
    Minimum(u32),
    /// At the limit, because the end-of-sequence token is ignored.
    Limit,
}

impl OutputLength {
    /// Returns where the outputs of a request with these fields end.
    ///
    /// # Errors
    /// If `min_tokens` is above `limit`.
    fn read(fields: &EngineFields, limit: u32) -> Result<Self, ApiError> {
        if let Some(tokens) = fields.min_tokens.filter(|&tokens| tokens > limit) {
            let message = format!("min_tokens must be at most max_tokens={limit}, got {tokens}.");
            return Err(ApiError::bad_request(message, Some("min_tokens")));
        }
        Ok(match (fields.ignore_eos, fields.min_tokens) {
            (Some(true), _) => Self::Limit,
            (_, Some(tokens)) if tokens > 0 => Self::Minimum(tokens),
            _ => Self::Natural,
        })
    }
}

/// An output with its length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedOutput {
    pub(crate) output: MockOutput,
    pub(crate) tokens: u32,
    /// `stop` or `length`.
    pub(crate) finish_reason: &'static str,
}

/// Fields of the body that a router does not read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EngineFields {
    ignore_eos: Option<bool>,
    min_tokens: Option<u32>,
    stream_options: Option<StreamOptions>,
}

/// Field of a body for `/tokenize` that tells a chat from a prompt.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizeFields {
    messages: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

impl CompletionRequest {
    /// Parses a request body. A body without a model asks for the configured one. Embeddings are
    /// never streamed, and `continuous_usage_stats` is ignored without `include_usage`.
    ///
    /// `name` is only used for the id of the response.
    ///
    /// # Errors
    /// If the body is invalid, names another model, or exceeds a limit.
    pub(crate) fn read(
        config: &MockEngineConfig,
        endpoint: Endpoint,
        name: String,
        body: &[u8],
    ) -> Result<Self, ApiError> {
        let request = ApiRequest::parse(endpoint, body)?;
        let fields: EngineFields = serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_request(error.to_string(), None))?;
        if !request.model.is_empty() && request.model != config.model {
            return Err(ApiError::model_not_found(&request.model, &[]));
        }
        if fields.stream_options.is_some() && !request.stream {
            let message = "Stream options can only be defined when `stream=True`.";
            return Err(ApiError::bad_request(message, Some("stream_options")));
        }
        if request.choices > MAX_CHOICES {
            let message = format!("n must be at most {MAX_CHOICES}.");
            return Err(ApiError::bad_request(message, Some("n")));
        }
        if request.prompts > MAX_PROMPTS {
            let message = format!("A request may contain at most {MAX_PROMPTS} prompts.");
            return Err(ApiError::bad_request(message, None));
        }

        let prompts = Prompts::read(&request, endpoint);
        let limit = output_limit(config, &request, endpoint, &prompts)?;
        let length = OutputLength::read(&fields, limit)?;
        let outputs: Vec<PlannedOutput> = (0..request.prompts * request.choices)
            .map(|choice| {
                let prompt = prompts.known(choice / request.choices);
                let output = MockOutput::for_prompt(prompt.unwrap_or_default());
                // The outputs for a prompt do not depend on the other prompts of the request.
                // Prompts with unknown tokens all look alike, so the index tells their outputs
                // apart.
                let choice = match prompt {
                    Some(_) => choice % request.choices,
                    None => choice,
                };
                PlannedOutput::limited(output.choice(choice), limit, length)
            })
            .collect();
        let requests = outputs.iter().zip(0_u32..).map(|(output, choice)| {
            let prompt = choice / request.choices;
            prompts.submission(config, &request, prompt, *output)
        });
        let options = fields.stream_options.unwrap_or_default();
        let usage_at_end = options.include_usage.unwrap_or(false);
        Ok(Self {
            endpoint,
            name,
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            model: config.model.clone(),
            stream: request.stream && endpoint != Endpoint::Embeddings,
            usage_at_end,
            usage_in_each_event: usage_at_end && options.continuous_usage_stats.unwrap_or(false),
            prompt_tokens: prompts.total(),
            requests: requests.collect(),
            outputs,
        })
    }
}

/// Returns the tokens of the first prompt of a body for `/tokenize`: the messages of a chat, or a
/// prompt.
///
/// # Errors
/// If the body is invalid.
pub(crate) fn prompt_tokens(body: &[u8]) -> Result<Vec<u32>, ApiError> {
    let fields: TokenizeFields = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(error.to_string(), None))?;
    let endpoint = match fields.messages {
        Some(IgnoredAny) => Endpoint::ChatCompletions,
        None => Endpoint::Completions,
    };
    let request = ApiRequest::parse(endpoint, body)?;
    let prompts = Prompts::read(&request, endpoint);
    Ok(prompts.known.into_iter().next().unwrap_or_default())
}

/// The prompts of a request as tokens.
struct Prompts {
    /// Tokens of the first prompts, which are text or token ids.
    known: Vec<Vec<u32>>,
    /// Number of unknown tokens after those of the only prompt, such as an image's.
    unknown_tail: u32,
    /// Number of prompts after the known ones, whose content is unknown.
    unknown_prompts: u32,
    /// Tokens of each unknown prompt.
    unknown_prompt_tokens: u32,
}

impl Prompts {
    /// Converts the prompts to tokens. A chat prompt ends with the heading of the assistant's
    /// message.
    ///
    /// Content that the request parser does not hash, such as images, becomes unknown tokens: one
    /// for four bytes, or the parser's own estimate. If only some prompts are known, the others
    /// share the unknown tokens equally, with at least one token each.
    fn read(request: &ApiRequest, endpoint: Endpoint) -> Self {
        let known = request.all_prompts().map(|prompt| match prompt {
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Text(text) if endpoint == Endpoint::ChatCompletions => {
                tokenize(&[text, ASSISTANT_HEADING].concat())
            }
            Prompt::Text(text) => tokenize(text),
        });
        let known: Vec<Vec<u32>> = known.collect();
        let unknown_tokens = request.unhashed.bytes.div_ceil(4) + request.unhashed.tokens;
        let unknown_tokens = u32::try_from(unknown_tokens).unwrap_or(u32::MAX);
        let unknown_prompts = request.prompts.saturating_sub(known.len() as u32);
        let (unknown_tail, unknown_prompt_tokens) = match unknown_prompts {
            0 => (unknown_tokens, 0),
            _ => (0, unknown_tokens.div_ceil(unknown_prompts).max(1)),
        };
        Self {
            known,
            unknown_tail,
            unknown_prompts,
            unknown_prompt_tokens,
        }
    }

    /// Returns the tokens of a prompt; `None` if they are unknown.
    fn known(&self, prompt: u32) -> Option<&[u32]> {
        self.known.get(prompt as usize).map(Vec::as_slice)
    }

    /// Returns the length of a prompt in tokens.
    fn tokens(&self, prompt: u32) -> u32 {
        match self.known(prompt) {
            Some(tokens) => {
                let tokens = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
                tokens.saturating_add(self.unknown_tail)
            }
            None => self.unknown_prompt_tokens,
        }
    }

    fn count(&self) -> u32 {
        self.known.len() as u32 + self.unknown_prompts
    }

    fn total(&self) -> u32 {
        let tokens = (0..self.count()).map(|prompt| self.tokens(prompt));
        tokens.fold(0, u32::saturating_add)
    }

    /// Returns the lengths of the shortest and the longest prompt.
    fn range(&self) -> (u32, u32) {
        let tokens = || (0..self.count()).map(|prompt| self.tokens(prompt));
        (tokens().min().unwrap_or(0), tokens().max().unwrap_or(0))
    }

    /// Returns the engine request for one output of a prompt. Blocks of unknown tokens have no
    /// hash. After unknown tokens, the blocks of the output have none either.
    ///
    /// The id is 0 until the engine loop assigns one.
    fn submission(
        &self,
        config: &MockEngineConfig,
        request: &ApiRequest,
        prompt: u32,
        planned: PlannedOutput,
    ) -> Submission {
        let prompt_tokens = self.tokens(prompt);
        let Some(known) = self.known(prompt) else {
            let request = EngineRequest {
                id: 0,
                hashes: Arc::from([]),
                prompt_tokens,
                output_tokens: planned.tokens,
            };
            return Submission {
                request,
                content: None,
            };
        };
        let mut tokens = known.to_vec();
        if self.unknown_tail == 0 {
            tokens.extend((0..planned.tokens).map(|index| planned.output.token(index)));
        }
        // A request without a model is for the configured one.
        let salt = sequence::prefix_salt(&config.model, None, request.cache_salt.as_deref());
        let block_size = config.engine.block_size;
        let sequence = Sequence::from_tokens(&tokens, block_size, salt);
        let hashes: Arc<[u64]> = Arc::from(sequence.hashes());
        let content = Content {
            hashes: Arc::clone(&hashes),
            tokens,
            block_size: block_size.get(),
            cache_salt: request.cache_salt.as_deref().map(Into::into),
        };
        let request = EngineRequest {
            id: 0,
            hashes,
            prompt_tokens,
            output_tokens: planned.tokens,
        };
        Submission {
            request,
            // The content takes memory until the request ends, so it exists only for KV events.
            content: config.kv_events.is_some().then(|| Arc::new(content)),
        }
    }
}

impl PlannedOutput {
    /// Returns the output with finish reason `stop`. If `limit` is shorter, or if the
    /// end-of-sequence token is ignored, the output has `limit` tokens and finish reason `length`.
    fn limited(output: MockOutput, limit: u32, length: OutputLength) -> Self {
        let natural = match length {
            OutputLength::Natural => Some(output.length()),
            OutputLength::Minimum(tokens) => Some(tokens),
            OutputLength::Limit => None,
        };
        let (tokens, finish_reason) = match natural.filter(|&tokens| tokens <= limit) {
            Some(tokens) => (tokens, "stop"),
            None => (limit, "length"),
        };
        Self {
            output,
            tokens,
            finish_reason,
        }
    }
}

/// Returns the maximum number of tokens of each output: `max_tokens` if the request has it,
/// otherwise 16 for completions, and for chat completions all tokens that the longest prompt leaves
/// free. Embeddings always have one token.
///
/// # Errors
/// If a prompt is empty, if `max_tokens` is 0, or if the longest prompt and its output do not fit
/// into the maximum model length.
fn output_limit(
    config: &MockEngineConfig,
    request: &ApiRequest,
    endpoint: Endpoint,
    prompts: &Prompts,
) -> Result<u32, ApiError> {
    let (shortest, longest) = prompts.range();
    let max_model_len = config.max_model_len;
    if shortest == 0 {
        let message = "The prompt is empty.";
        return Err(ApiError::bad_request(message, Some("prompt")));
    }
    if request.max_tokens == Some(0) {
        let message = "max_tokens must be at least 1, got 0.";
        return Err(ApiError::bad_request(message, Some("max_tokens")));
    }
    let free_tokens = max_model_len.saturating_sub(longest);
    let asked = match endpoint {
        // One step computes the prompt; its output token stands for the embedding.
        Endpoint::Embeddings => Some(1),
        Endpoint::Completions => request.max_tokens.or(Some(16)),
        _ => request.max_tokens,
    };
    if free_tokens == 0 || asked.is_some_and(|asked| asked > free_tokens) {
        let requested = u64::from(longest) + u64::from(asked.unwrap_or(1));
        let message = format!(
            "This model's maximum context length is {max_model_len} tokens. However, you requested \
             {requested} tokens ({longest} in the prompt, {} in the completion). Please reduce \
             the length of the prompt or the completion.",
            asked.unwrap_or(1),
        );
        return Err(ApiError::bad_request(message, None));
    }
    Ok(asked.unwrap_or(free_tokens))
}
