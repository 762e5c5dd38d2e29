//! Prompts: from the arguments of a call to the request that the router places.

use std::num::NonZeroU32;
use std::path::Path;

use foresee_core::router::Request;
use foresee_core::sequence::{PartialBlock, Sequence, prefix_salt};
use foresee_core::text_ratios::TextRatios;
use foresee_core::workers::WorkerId;
use foresee_engine::chat_template::ChatTemplate;
use foresee_engine::conversion::Dialect;
use foresee_engine::paths::{self, BodyFormat};
use foresee_engine::prompt_encoder::PromptEncoder;
use foresee_engine::request::{ApiRequest, Endpoint, Prompt, PromptSequences};
use foresee_engine::tokenizer::{SpecialTokens, Tokenizer};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;

use crate::errors::Error;

/// The content of a request.
#[derive(Debug)]
pub(crate) enum Content<'a> {
    /// Token ids.
    Tokens(Vec<u32>),
    /// Text without a chat template.
    Text(&'a str),
    /// Body of a request to an inference API.
    Body(Endpoint, &'a [u8]),
}

impl<'a> Content<'a> {
    /// Returns the content of the arguments, of which exactly one must be given. `path` belongs to
    /// `body`.
    ///
    /// # Errors
    /// If another number of arguments is given, the tokens are none, or the path is not known.
    pub(crate) fn new(
        tokens: Option<&Bound<'_, PyAny>>,
        text: Option<&'a str>,
        body: Option<&'a [u8]>,
        path: &str,
    ) -> PyResult<Self> {
        match (tokens, text, body) {
            (Some(tokens), None, None) => Ok(Self::Tokens(token_ids("tokens", tokens)?)),
            (None, Some(text), None) => Ok(Self::Text(text)),
            (None, None, Some(body)) => {
                let known = paths::find("POST", path).filter(|path| path.body == BodyFormat::Json);
                let known = known.ok_or_else(|| Error::Path(path.to_owned()))?;
                Ok(Self::Body(known.endpoint, body))
            }
            _ => Err(Error::Content.into()),
        }
    }
}

/// Returns the token ids of the argument `field`: a buffer of integers (an array of `array` or NumPy),
/// or a sequence of numbers.
///
/// # Errors
/// If it is neither, or has a number that is no token id.
pub(crate) fn token_ids(field: &'static str, tokens: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let py = tokens.py();
    if let Ok(buffer) = PyBuffer::<u32>::get(tokens) {
        return buffer.to_vec(py);
    }
    let invalid = |reason: String| Error::Tokens { field, reason };
    if let Ok(buffer) = PyBuffer::<i64>::get(tokens) {
        let signed = buffer.to_vec(py)?.into_iter();
        let ids: Result<Vec<u32>, _> = signed.map(u32::try_from).collect();
        return ids.map_err(|error| invalid(error.to_string()).into());
    }
    if let Ok(buffer) = PyBuffer::<i32>::get(tokens) {
        let signed = buffer.to_vec(py)?.into_iter();
        let ids: Result<Vec<u32>, _> = signed.map(u32::try_from).collect();
        return ids.map_err(|error| invalid(error.to_string()).into());
    }
    tokens.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(py) {
            invalid(error.value(py).to_string()).into()
        } else {
            error
        }
    })
}

/// What a call says about a request beside its content. A body says these things itself, and the
/// arguments replace what it says.
#[derive(Debug, Default)]
pub(crate) struct Hints<'a> {
    pub(crate) model: Option<&'a str>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) expected_output_tokens: Option<u32>,
    pub(crate) has_tools: Option<bool>,
    pub(crate) is_streaming: Option<bool>,
    pub(crate) cache_salt: Option<&'a str>,
}

/// A request that the router can place.
#[derive(Debug)]
pub(crate) struct PlacedContent {
    /// The sequences that the engine runs.
    pub(crate) sequences: PromptSequences,
    /// Requested model; empty for any.
    pub(crate) model: String,
    max_tokens: Option<u32>,
    ignore_eos: bool,
    expected_output_tokens: Option<u32>,
    has_tools: bool,
    is_streaming: bool,
    /// Length of the prompt's text, for the ratio of bytes per token; 0 for token ids.
    pub(crate) text_bytes: usize,
    /// Whether there is one prompt with one output, all of whose content is hashed.
    pub(crate) is_single: bool,
    /// The last, incomplete block of a prompt of token ids.
    pub(crate) end: Option<PartialBlock>,
}

impl PlacedContent {
    /// Returns the request for the router.
    pub(crate) fn request<'a>(&'a self, excluded_workers: &'a [WorkerId]) -> Request<'a> {
        Request {
            model: &self.model,
            max_tokens: self.max_tokens,
            ignore_eos: self.ignore_eos,
            expected_output_tokens: self.expected_output_tokens,
            has_tools: self.has_tools,
            is_streaming: self.is_streaming,
            excluded_workers,
            ..Request::new(&self.sequences.first)
        }
    }
}

/// Reads prompts.
#[derive(Debug)]
pub(crate) struct PromptReader {
    pub(crate) block_size: NonZeroU32,
    dialect: Dialect,
    /// Tokenizer of texts; without one, texts are matched as text.
    tokenizer: Option<Tokenizer>,
    /// Chat template beside the tokenizer; without one, chats are matched as text.
    template: Option<ChatTemplate>,
    /// Learned bytes per token of each model.
    pub(crate) text_ratios: TextRatios,
}

impl PromptReader {
    /// Returns a reader for engines of this dialect, with the tokenizer in the folder of a model. A
    /// folder without a chat template has none.
    ///
    /// # Errors
    /// If there is no tokenizer, or it cannot be used.
    pub(crate) fn new(
        block_size: NonZeroU32,
        dialect: Dialect,
        tokenizer: Option<&Path>,
    ) -> Result<Self, Error> {
        Ok(Self {
            block_size,
            dialect,
            template: tokenizer.and_then(|folder| ChatTemplate::load(folder).ok()),
            tokenizer: tokenizer.map(Tokenizer::load).transpose()?,
            text_ratios: TextRatios::default(),
        })
    }

    /// Reads a request. `only_model` is the model of a request that names none.
    ///
    /// # Errors
    /// If the body cannot be read, or the text cannot be tokenised.
    pub(crate) fn read(
        &self,
        content: Content<'_>,
        hints: &Hints<'_>,
        only_model: Option<String>,
    ) -> Result<PlacedContent, Error> {
        let content = match content {
            Content::Body(endpoint, body) => {
                return self.read_body(endpoint, body, hints, only_model);
            }
            other => other,
        };
        let model = hints.model.map(str::to_owned).or(only_model);
        let model = model.unwrap_or_default();
        let salt = prefix_salt(&model, None, hints.cache_salt);
        let (sequence, end, text_bytes) = match (content, &self.tokenizer) {
            (Content::Text(text), None) => {
                let bytes_per_token = self.text_ratios.get(&model);
                let text = text.as_bytes();
                let hashed = Sequence::from_text(text, bytes_per_token, self.block_size, salt);
                (hashed, None, text.len())
            }
            (Content::Text(text), Some(tokenizer)) => {
                let ids = tokenizer.encode(text, SpecialTokens::Add)?;
                let (hashed, end) = self.hash_tokens(&ids, salt);
                (hashed, Some(end), text.len())
            }
            (Content::Tokens(ids), _) => {
                let (hashed, end) = self.hash_tokens(&ids, salt);
                (hashed, Some(end), 0)
            }
            (Content::Body(..), _) => return Err(Error::Content),
        };
        Ok(PlacedContent {
            sequences: PromptSequences::repeated(sequence, 1),
            model,
            max_tokens: hints.max_tokens,
            ignore_eos: false,
            expected_output_tokens: hints.expected_output_tokens,
            has_tools: hints.has_tools.unwrap_or(false),
            is_streaming: hints.is_streaming.unwrap_or(true),
            text_bytes,
            is_single: true,
            end,
        })
    }

    /// Hashes token ids. Returns the last, incomplete block as well.
    fn hash_tokens(&self, ids: &[u32], salt: u64) -> (Sequence, PartialBlock) {
        (
            Sequence::from_tokens(ids, self.block_size, salt),
            PartialBlock::from_tokens(ids, self.block_size, salt),
        )
    }

    /// Reads the body of a request to an inference API. Prompts that cannot be tokenised are hashed
    /// as text.
    fn read_body(
        &self,
        endpoint: Endpoint,
        body: &[u8],
        hints: &Hints<'_>,
        only_model: Option<String>,
    ) -> Result<PlacedContent, Error> {
        let mut request = ApiRequest::parse(endpoint, body)?;
        if let Some(model) = hints.model {
            request.model = model.to_owned();
        } else if request.model.is_empty() {
            request.model = only_model.unwrap_or_default();
        }
        if let Some(salt) = hints.cache_salt {
            request.cache_salt = Some(salt.to_owned());
        }
        let ids = self.encode_prompts(endpoint, &request, body);
        let bytes_per_token = self.text_ratios.get(&request.model);
        let sequences = request.sequences(&ids, self.block_size, bytes_per_token);
        Ok(PlacedContent {
            is_single: sequences.rest.is_empty() && request.is_fully_hashed(),
            sequences,
            max_tokens: hints.max_tokens.or(request.max_tokens),
            ignore_eos: request.ignore_eos,
            expected_output_tokens: hints.expected_output_tokens,
            has_tools: hints.has_tools.unwrap_or(request.has_tools),
            is_streaming: hints.is_streaming.unwrap_or(request.stream),
            text_bytes: request.prompt_bytes(),
            end: None,
            model: request.model,
        })
    }

    /// Returns the token ids of each text prompt of a request that can be tokenised.
    fn encode_prompts(
        &self,
        endpoint: Endpoint,
        request: &ApiRequest,
        body: &[u8],
    ) -> Vec<Option<Vec<u32>>> {
        let Some(tokenizer) = &self.tokenizer else {
            return Vec::new();
        };
        let encoder = PromptEncoder {
            tokenizer,
            template: self.template.as_ref(),
            dialect: self.dialect,
        };
        let encode = |prompt: &Prompt| match prompt {
            Prompt::Text(_) => encoder.encode(endpoint, request, prompt, body).ok(),
            Prompt::Tokens(_) => None,
        };
        request.all_prompts().map(encode).collect()
    }
}
