//! What a request body asks of the engine: prompts as tokens, answers of a known length.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use foresee_core::sequence::{self, Sequence};
use foresee_engine::error::ApiError;
use foresee_engine::request::{ANSWER_HEADING, ApiRequest, Endpoint, Prompt};
use serde::Deserialize;

use crate::engine::EngineRequest;
use crate::server::ServerConfig;
use crate::server::clockwork::Submission;
use crate::server::publish::Content;
use crate::text::{Answer, tokenize};

/// Most answers to one prompt that a request may ask for.
const MOST_CHOICES: u32 = 128;

/// Most prompts in a batch.
const MOST_PROMPTS: u32 = 4096;

/// A request, ready to be submitted and answered.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) endpoint: Endpoint,
    /// The response's id without the prefix of its endpoint.
    pub(super) name: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) usage_at_end: bool,
    pub(super) usage_in_each_event: bool,
    /// Tokens of all prompts.
    pub(super) prompt_tokens: u32,
    /// One for each choice.
    pub(super) answers: Vec<PlannedAnswer>,
    /// One for each choice; their ids are not given yet.
    pub(super) requests: Vec<Submission>,
}

/// An answer and where it ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlannedAnswer {
    pub(super) answer: Answer,
    pub(super) tokens: u32,
    /// `stop` or `length`.
    pub(super) finish_reason: &'static str,
}

/// What only the engine reads of a body.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EngineFields {
    ignore_eos: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

impl Job {
    pub(super) fn read(
        config: &ServerConfig,
        endpoint: Endpoint,
        name: String,
        body: &[u8],
    ) -> Result<Self, ApiError> {
        let request = ApiRequest::parse(endpoint, body)?;
        let fields: EngineFields = serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_request(error.to_string(), None))?;
        if !request.model.is_empty() && request.model != config.model {
            return Err(ApiError::model_not_found(&request.model));
        }
        if fields.stream_options.is_some() && !request.stream {
            let message = "Stream options can only be defined when `stream=True`.";
            return Err(ApiError::bad_request(message, Some("stream_options")));
        }
        if request.choices > MOST_CHOICES {
            let message = format!("n must be at most {MOST_CHOICES}.");
            return Err(ApiError::bad_request(message, Some("n")));
        }
        if request.prompts > MOST_PROMPTS {
            let message = format!("A request may hold at most {MOST_PROMPTS} prompts.");
            return Err(ApiError::bad_request(message, None));
        }

        let prompts = Prompts::read(&request, endpoint);
        let limit = output_limit(config, &request, endpoint, &prompts)?;
        let ignore_eos = fields.ignore_eos.unwrap_or(false);
        let answers: Vec<PlannedAnswer> = (0..request.prompts * request.choices)
            .map(|choice| {
                let prompt = prompts.known(choice / request.choices);
                let answer = Answer::to(prompt.unwrap_or_default());
                // What is asked of a prompt alone is answered in the same way.
                let choice = match prompt {
                    Some(_) => choice % request.choices,
                    None => choice,
                };
                PlannedAnswer::limited(answer.choice(choice), limit, ignore_eos)
            })
            .collect();
        let requests = answers.iter().zip(0_u32..).map(|(answer, choice)| {
            let prompt = choice / request.choices;
            prompts.submission(config, &request, prompt, *answer)
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
            answers,
        })
    }
}

/// The prompts of a request in tokens.
struct Prompts {
    /// The first ones, as far as they are text or ids.
    known: Vec<Vec<u32>>,
    /// Tokens of the only one that stand for something else, after the others.
    opaque_tail: u32,
    /// How many there are beyond the known ones, and tokens of each of them.
    beyond: u32,
    tokens_beyond: u32,
}

impl Prompts {
    fn read(request: &ApiRequest, endpoint: Endpoint) -> Self {
        let known = request.all_prompts().map(|prompt| match prompt {
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Text(text) if endpoint == Endpoint::ChatCompletions => {
                tokenize(&[text, ANSWER_HEADING].concat())
            }
            Prompt::Text(text) => tokenize(text),
        });
        let known: Vec<Vec<u32>> = known.collect();
        let unmatched = request.unmatched.bytes.div_ceil(4) + request.unmatched.tokens;
        let unmatched = u32::try_from(unmatched).unwrap_or(u32::MAX);
        let beyond = request.prompts.saturating_sub(known.len() as u32);
        let (opaque_tail, tokens_beyond) = match beyond {
            0 => (unmatched, 0),
            _ => (0, unmatched.div_ceil(beyond).max(1)),
        };
        Self {
            known,
            opaque_tail,
            beyond,
            tokens_beyond,
        }
    }

    fn known(&self, prompt: u32) -> Option<&[u32]> {
        self.known.get(prompt as usize).map(Vec::as_slice)
    }

    fn tokens(&self, prompt: u32) -> u32 {
        match self.known(prompt) {
            Some(tokens) => {
                let tokens = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
                tokens.saturating_add(self.opaque_tail)
            }
            None => self.tokens_beyond,
        }
    }

    fn count(&self) -> u32 {
        self.known.len() as u32 + self.beyond
    }

    fn total(&self) -> u32 {
        let tokens = (0..self.count()).map(|prompt| self.tokens(prompt));
        tokens.fold(0, u32::saturating_add)
    }

    /// The shortest and the longest.
    fn range(&self) -> (u32, u32) {
        let tokens = || (0..self.count()).map(|prompt| self.tokens(prompt));
        (tokens().min().unwrap_or(0), tokens().max().unwrap_or(0))
    }

    fn submission(
        &self,
        config: &ServerConfig,
        request: &ApiRequest,
        prompt: u32,
        answer: PlannedAnswer,
    ) -> Submission {
        let prompt_tokens = self.tokens(prompt);
        let Some(known) = self.known(prompt) else {
            let request = EngineRequest {
                id: 0,
                hashes: Arc::from([]),
                prompt_tokens,
                output_tokens: answer.tokens,
            };
            return Submission {
                request,
                content: None,
            };
        };
        let mut tokens = known.to_vec();
        if self.opaque_tail == 0 {
            tokens.extend((0..answer.tokens).map(|index| answer.answer.token(index)));
        }
        // A request that names no model is for the one there is.
        let salt = sequence::salt(&config.model, None, request.cache_salt.as_deref());
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
            output_tokens: answer.tokens,
        };
        Submission {
            request,
            // Kept as long as the request is there, so only if somebody will be told.
            content: config.kv_events.is_some().then(|| Arc::new(content)),
        }
    }
}

impl PlannedAnswer {
    fn limited(answer: Answer, limit: u32, ignore_eos: bool) -> Self {
        let length = answer.length();
        let (tokens, finish_reason) = if ignore_eos || length > limit {
            (limit, "length")
        } else {
            (length, "stop")
        };
        Self {
            answer,
            tokens,
            finish_reason,
        }
    }
}

/// The most tokens each answer may have.
fn output_limit(
    config: &ServerConfig,
    request: &ApiRequest,
    endpoint: Endpoint,
    prompts: &Prompts,
) -> Result<u32, ApiError> {
    let (shortest, longest) = prompts.range();
    let length = config.max_model_len;
    if shortest == 0 {
        let message = "The prompt is empty.";
        return Err(ApiError::bad_request(message, Some("prompt")));
    }
    if request.max_tokens == Some(0) {
        let message = "max_tokens must be at least 1, got 0.";
        return Err(ApiError::bad_request(message, Some("max_tokens")));
    }
    let room = length.saturating_sub(longest);
    let asked = match endpoint {
        // One step computes the prompt, and what it would generate is the embedding.
        Endpoint::Embeddings => Some(1),
        Endpoint::Completions => request.max_tokens.or(Some(16)),
        Endpoint::ChatCompletions => request.max_tokens,
    };
    if room == 0 || asked.is_some_and(|asked| asked > room) {
        let requested = u64::from(longest) + u64::from(asked.unwrap_or(1));
        let message = format!(
            "This model's maximum context length is {length} tokens. However, you requested \
             {requested} tokens ({longest} in the prompt, {} in the completion). Please reduce \
             the length of the prompt or the completion.",
            asked.unwrap_or(1),
        );
        return Err(ApiError::bad_request(message, None));
    }
    Ok(asked.unwrap_or(room))
}
