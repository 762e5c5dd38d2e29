//! A request's body as routing needs it: parsed, tokenised and hashed, and then booked on a worker.

use std::sync::Arc;

use bytes::Bytes;
use foresee_core::router::{Explanation, Request as RouteRequest};
use foresee_core::sequence::Sequence;
use foresee_core::workers::WorkerId;
use foresee_engine::decompress::{DecompressError, decompress};
use foresee_engine::error::ApiError;
use foresee_engine::multipart::model_field;
use foresee_engine::output_text::Continuation;
use foresee_engine::paths::BodyFormat;
use foresee_engine::request::Endpoint;
use foresee_engine::request::{ApiRequest, BodyError, PromptSequences};

use crate::gateway_state::GatewayState;
use crate::placement::hints::RequestHints;
use crate::tokenization::TokenizedPrompts;

/// Maximum size of a body that is parsed and hashed on the I/O thread. At about 1 GB/s, such a body
/// delays other streams of the thread by at most 0.3 ms.
const MAX_INLINE_PARSE_BYTES: usize = 256 << 10;

/// Maximum size of a text that is tokenised on the I/O thread, at about 10 MB/s.
pub(crate) const MAX_INLINE_TOKENIZE_BYTES: usize = 4 << 10;

/// How the body of a request is encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BodyForm {
    pub(crate) format: BodyFormat,
    /// Value of `Content-Type`, which has the boundary of a multipart body; empty if it is absent.
    pub(crate) content_type: String,
    /// Value of `Content-Encoding`, if the body is compressed.
    pub(crate) coding: Option<String>,
}

impl BodyForm {
    /// Returns the form of a JSON body that is not compressed.
    pub(crate) fn plain_json() -> Self {
        Self {
            format: BodyFormat::Json,
            content_type: String::new(),
            coding: None,
        }
    }
}

/// Properties of a request that routing and the response's observation need.
#[derive(Debug)]
pub(crate) struct ParsedRequest {
    /// Name of the model as the request gave it. If it gave none, the model that all workers list
    /// first; empty if there is no such model.
    pub(crate) model: String,
    /// Whether the request named the model.
    names_model: bool,
    /// Hashed prompts of the request, one for each output.
    pub(crate) sequences: PromptSequences,
    /// Limit of output tokens.
    max_tokens: Option<u32>,
    /// Whether the output continues to `max_tokens`.
    ignore_eos: bool,
    /// Whether the request offers tools to the model.
    has_tools: bool,
    is_streaming: bool,
    /// Bytes of prompt text, from which bytes per token are learned; 0 if there is nothing to learn.
    pub(crate) prompt_bytes: usize,
    /// Whether the request has one prompt, all of it hashed, and asks for one output.
    pub(crate) is_single: bool,
    /// Where the output continues the prompt's sequence, if that is known.
    pub(crate) continuation: Option<Continuation>,
    /// Whether the request asks the engine to list the cached blocks that it finds (full report mode).
    pub(crate) full_report_mode: bool,
    /// Prompt tokens counted by the tokenizer; `None` if the engine's count can differ from it.
    pub(crate) tokenizer_count: Option<u32>,
    /// Hints of the request's client.
    pub(crate) hints: RequestHints,
    /// Id of the stored response that the request continues.
    pub(crate) previous_response_id: Option<String>,
    /// Session of the client, whose requests probably have a prefix in common.
    pub(crate) session: Option<Vec<u8>>,
    /// Hash of the first image or other medium.
    pub(crate) medium: Option<u64>,
    /// Worker that the request has to go to.
    pub(crate) only_worker: Option<WorkerId>,
    /// Worker that has probably cached the part of the prompt that is not hashed.
    pub(crate) preferred_worker: Option<WorkerId>,
}

impl ParsedRequest {
    /// Returns a request of unknown content, which is routed by load alone. `model` is empty if it
    /// is unknown.
    fn unread(state: &GatewayState, model: String) -> Self {
        let block_size = state.config.router.block_size;
        Self {
            names_model: !model.is_empty(),
            model,
            sequences: PromptSequences::repeated(Sequence::unhashed(0, block_size), 1),
            max_tokens: None,
            ignore_eos: false,
            has_tools: false,
            is_streaming: true,
            prompt_bytes: 0,
            is_single: false,
            continuation: None,
            full_report_mode: false,
            tokenizer_count: None,
            hints: RequestHints::default(),
            previous_response_id: None,
            session: None,
            medium: None,
            only_worker: None,
            preferred_worker: None,
        }
    }

    /// Returns the router's view of the request.
    pub(crate) fn request(&self) -> RouteRequest<'_> {
        RouteRequest {
            model: if self.names_model { &self.model } else { "" },
            prompt: &self.sequences.first,
            max_tokens: self.max_tokens,
            ignore_eos: self.ignore_eos,
            expected_output_tokens: self.hints.expected_output_tokens,
            has_tools: self.has_tools,
            is_streaming: self.is_streaming,
            priority: self.hints.priority,
            tenant: self.hints.tenant,
            excluded_workers: &self.hints.excluded_workers,
            only_worker: self.only_worker,
            preferred_worker: self.preferred_worker,
        }
    }
}

impl GatewayState {
    /// Reads a request's body as `form` says how: parses JSON, and takes only the model's name from a
    /// multipart body. A request without a body is routed by load alone. The hints of the result are
    /// empty.
    ///
    /// A short body is read on this thread, a long one in the parse pool. With a tokenizer, the
    /// limit for a short body is lower.
    ///
    /// # Errors
    /// Returns the error response for the client if the body is invalid, its content coding is not
    /// supported, or the parse pool is overloaded.
    pub(crate) async fn read_request(
        self: &Arc<Self>,
        endpoint: Endpoint,
        form: BodyForm,
        body: Bytes,
    ) -> Result<ParsedRequest, ApiError> {
        let max_inline_bytes = match (&self.tokenizer, &form.coding) {
            (None, None) => MAX_INLINE_PARSE_BYTES,
            _ => MAX_INLINE_TOKENIZE_BYTES,
        };
        if body.len() <= max_inline_bytes {
            return self.read_now(endpoint, &form, &body);
        }
        let shared = Arc::clone(self);
        let reading = move || shared.read_now(endpoint, &form, &body);
        match self.parse_pool.run(reading).await {
            Ok(parsed) => parsed,
            Err(error) => Err(error.into_response()),
        }
    }

    /// Reads a request's body on this thread: see [`read_request`](Self::read_request).
    fn read_now(
        &self,
        endpoint: Endpoint,
        form: &BodyForm,
        body: &[u8],
    ) -> Result<ParsedRequest, ApiError> {
        let decoded;
        let body = match &form.coding {
            Some(coding) => {
                decoded = decompress(coding, body, self.config.max_body_bytes)
                    .map_err(|error| unreadable(&error, coding))?;
                &decoded
            }
            None => body,
        };
        match form.format {
            BodyFormat::None => Ok(ParsedRequest::unread(self, String::new())),
            BodyFormat::Json => Ok(self.parse_request(endpoint, body)?),
            BodyFormat::Multipart => {
                let model = model_field(&form.content_type, body)?;
                Ok(ParsedRequest::unread(self, model.unwrap_or_default()))
            }
        }
    }

    /// Parses, tokenises and hashes an uncompressed body on this thread. The hints of the result
    /// are empty. A request without a model name gets
    /// [`ModelCatalog::only_model`](crate::workers::model_catalog::ModelCatalog::only_model), or an empty name if there is
    /// none. Prompts that cannot be tokenised are hashed as text. With a tokenizer, the text
    /// prompts are counted in the metrics, even if the caller does not send the request.
    fn parse_request(&self, endpoint: Endpoint, body: &[u8]) -> Result<ParsedRequest, BodyError> {
        let mut request = ApiRequest::parse(endpoint, body)?;
        let catalog = self.workers.registry().catalog();
        let names_model = !request.model.is_empty();
        if !names_model {
            // Engines use their own model then, so the prompt is hashed like the blocks that they
            // report.
            request.model = catalog.only_model().unwrap_or_default();
        }
        let bytes_per_token = self.text_ratios.get(&request.model);
        let block_size = self.config.router.block_size;
        let TokenizedPrompts { ids, token_count } = match &self.tokenizer {
            Some(tokenizer) => {
                let dialect = catalog.dialect();
                tokenizer.encode(endpoint, dialect, &request, body, &self.metrics)
            }
            None => TokenizedPrompts::default(),
        };
        // The request is sent, counted and logged under the name that the client used.
        let model = request.model.clone();
        if let Some(alias) = catalog.alias_of(&model) {
            request.model = alias;
        }
        let limit = catalog.context_limit(&model);
        // Every engine refuses the prompt before it allocates a block. If the prompt were booked with
        // its blocks, they would evict the prompts of other requests from the estimated cache.
        let is_one_prompt = matches!(ids.as_slice(), [Some(_)]) && request.is_fully_hashed();
        let is_too_long = endpoint.generates()
            && is_one_prompt
            && token_count
                .zip(limit)
                .is_some_and(|(tokens, limit)| tokens > limit);
        if is_too_long {
            let mut unread = ParsedRequest::unread(self, model);
            unread.names_model = names_model;
            unread.is_streaming = request.stream;
            return Ok(unread);
        }
        let sequences = request.sequences(&ids, block_size, bytes_per_token);
        let continuation = endpoint.generates().then(|| {
            request.continuation(
                ids.first().and_then(Option::as_deref),
                block_size,
                bytes_per_token,
            )
        });
        Ok(ParsedRequest {
            tokenizer_count: token_count.filter(|_| request.is_fully_hashed()),
            is_single: sequences.rest.is_empty() && request.is_fully_hashed(),
            continuation: continuation
                .flatten()
                .filter(|place| !place.is_token_based() || self.tokenizer.is_some()),
            names_model,
            full_report_mode: request.full_report_mode,
            sequences,
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            has_tools: request.has_tools,
            is_streaming: request.stream,
            prompt_bytes: request.prompt_bytes(),
            model,
            hints: RequestHints::default(),
            previous_response_id: request.previous_response_id,
            session: request.session_key.map(String::into_bytes),
            medium: request.media_hash,
            only_worker: None,
            preferred_worker: None,
        })
    }

    /// Returns how the request would be routed now, with the costs of all candidates. Books nothing.
    /// If no worker can be chosen, fails with the response for the client.
    pub(crate) fn explain(&self, parsed: &ParsedRequest) -> Result<Explanation, ApiError> {
        let now = self.clock.now();
        self.router
            .explain_batch(&parsed.request(), &parsed.sequences.rest, now)
            .map_err(|error| self.refusal(&error))
    }
}

/// Returns the response to a request whose body has a content coding that cannot be read.
fn unreadable(error: &DecompressError, coding: &str) -> ApiError {
    match error {
        DecompressError::Unsupported => ApiError::unsupported_content_coding(coding),
        DecompressError::TooLarge(limit) => ApiError::body_too_large(*limit),
        DecompressError::Invalid(_) => ApiError::bad_request(format!("The {error}."), None),
    }
}
