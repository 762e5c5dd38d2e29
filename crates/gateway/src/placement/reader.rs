//! Reader of requests' bodies: parses, tokenises and hashes them, a long one on a thread of the pool.

use std::num::NonZeroU32;
use std::sync::Arc;

use bytes::Bytes;
use foresee_core::text_ratios::TextRatios;
use foresee_engine::decompress::{DecompressError, decompress};
use foresee_engine::error::ApiError;
use foresee_engine::model_name::replace_model;
use foresee_engine::multipart::model_field;
use foresee_engine::paths::BodyFormat;
use foresee_engine::request::{ApiRequest, Endpoint};

use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::parse_pool::ParsePool;
use crate::placement::affinity::{Affinity, Memory};
use crate::placement::hints::RequestHints;
use crate::placement::parsed_request::{BodyForm, ModelRewrite, ParsedRequest};
use crate::placement::tokenization::{
    MAX_INLINE_TOKENIZE_BYTES, PromptTokenizer, TokenizedPrompts,
};
use crate::workers::model_names::{Conversation, ModelNames};
use crate::workers::registry::WorkerRegistry;

/// Maximum size of a body that is parsed and hashed on the I/O thread. At about 1 GB/s, such a body
/// delays other streams of the thread by at most 0.3 ms.
const MAX_INLINE_PARSE_BYTES: usize = 256 << 10;

/// Reader of requests' bodies.
#[derive(Debug)]
pub(super) struct RequestReader {
    /// Workers, which say how a model's prompts are hashed.
    pub(super) registry: Arc<WorkerRegistry>,
    /// Names of models, which include aliases.
    pub(super) names: Arc<ModelNames>,
    /// Workers that remember the responses which requests continue.
    pub(super) affinity: Arc<Affinity>,
    pub(super) clock: Clock,
    /// Tokenizer of `--tokenizer`; without one, prompts are matched as text.
    pub(super) tokenizer: Option<Arc<PromptTokenizer>>,
    /// Learned bytes per token of each model, for prompts that are matched as text.
    pub(super) text_ratios: Arc<TextRatios>,
    pub(super) parse_pool: Arc<ParsePool>,
    pub(super) metrics: Arc<Metrics>,
    /// The router's block size.
    pub(super) block_size: NonZeroU32,
    /// Maximum size of a decompressed body.
    pub(super) max_body_bytes: usize,
}

impl RequestReader {
    /// Reads a request's body as `form` says how: parses JSON, and takes only the model's name from a
    /// multipart body. A request without a body is routed by load alone. The hints of the result are
    /// empty. `session` is that of the request beside its body, and takes precedence over that of the
    /// body.
    ///
    /// A short body is read on this thread, a long or compressed one in the parse pool. With a
    /// tokenizer, the limit for a short body is lower.
    ///
    /// # Errors
    /// Returns the error response for the client if the body is invalid, its content coding is not
    /// supported, or the parse pool is overloaded.
    pub(super) async fn read(
        self: &Arc<Self>,
        endpoint: Endpoint,
        form: BodyForm,
        body: Bytes,
        session: Option<&[u8]>,
    ) -> Result<ParsedRequest, ApiError> {
        let max_inline_bytes = match (&self.tokenizer, &form.coding) {
            // A few bytes can be decompressed to many.
            (_, Some(_)) => 0,
            (None, None) => MAX_INLINE_PARSE_BYTES,
            (Some(_), None) => MAX_INLINE_TOKENIZE_BYTES,
        };
        if body.len() <= max_inline_bytes {
            return self.read_now(endpoint, &form, &body, session);
        }
        let (reader, session) = (Arc::clone(self), session.map(<[u8]>::to_vec));
        let reading = move || reader.read_now(endpoint, &form, &body, session.as_deref());
        match self.parse_pool.run(reading).await {
            Ok(parsed) => parsed,
            Err(error) => Err(error.into_response()),
        }
    }

    /// Reads a request's body on this thread: see [`read`](Self::read).
    fn read_now(
        &self,
        endpoint: Endpoint,
        form: &BodyForm,
        body: &[u8],
        session: Option<&[u8]>,
    ) -> Result<ParsedRequest, ApiError> {
        let decoded;
        let body = match &form.coding {
            Some(coding) => {
                decoded = decompress(coding, body, self.max_body_bytes)
                    .map_err(|error| unreadable(&error, coding))?;
                &decoded
            }
            None => body,
        };
        match form.format {
            BodyFormat::None => Ok(ParsedRequest::unread(self.block_size, String::new())),
            BodyFormat::Json => self.parse_request(endpoint, body, session),
            BodyFormat::Multipart => {
                let model = model_field(&form.content_type, body)?.unwrap_or_default();
                let conversation = Conversation {
                    session,
                    worker: None,
                };
                let (model, rewrite) = self.resolve(form, body, model, conversation)?;
                let mut unread = ParsedRequest::unread(self.block_size, model);
                unread.rewrite = rewrite;
                unread.session = session.map(<[u8]>::to_vec);
                Ok(unread)
            }
        }
    }

    /// Returns the model that a request for `name` is sent to, and the replacement of the name in
    /// the body if that is another one. Counts the replacement in the metrics.
    ///
    /// # Errors
    /// Fails with a 404 if `name` is an alias of models that no worker lists.
    fn resolve(
        &self,
        form: &BodyForm,
        body: &[u8],
        name: String,
        conversation: Conversation<'_>,
    ) -> Result<(String, Option<ModelRewrite>), ApiError> {
        let Some(model) = self.names.resolve(&name, conversation)? else {
            return Ok((name, None));
        };
        self.metrics.record_alias(&name, &model);
        if model == name {
            return Ok((name, None));
        }
        // The body has been read, and names a model.
        let rewritten = replace_model(form.format, &form.content_type, body, &model);
        let rewrite = rewritten.map(|body| ModelRewrite {
            alias: name,
            body: body.into(),
        });
        Ok((model, rewrite))
    }

    /// Parses, tokenises and hashes an uncompressed body on this thread. The hints of the result
    /// are empty. A request without a model name gets
    /// [`ModelCatalog::only_model`](crate::workers::model_catalog::ModelCatalog::only_model), or an empty name if there is
    /// none. Prompts that cannot be tokenised are hashed as text. With a tokenizer, the text
    /// prompts are counted in the metrics, even if the caller does not send the request.
    fn parse_request(
        &self,
        endpoint: Endpoint,
        body: &[u8],
        session: Option<&[u8]>,
    ) -> Result<ParsedRequest, ApiError> {
        let mut request = ApiRequest::parse(endpoint, body)?;
        let session = session.map(<[u8]>::to_vec);
        let session = session.or_else(|| request.session_key.take().map(String::into_bytes));
        let catalog = self.registry.catalog();
        let names_model = !request.model.is_empty();
        if !names_model {
            // Engines use their own model then, so the prompt is hashed like the blocks that they
            // report.
            request.model = catalog.only_model().unwrap_or_default();
        }
        let mut rewrite = None;
        if names_model && self.names.has_aliases() {
            let name = std::mem::take(&mut request.model);
            let previous = request.previous_response_id.as_deref();
            let conversation = Conversation {
                session: session.as_deref(),
                worker: previous.and_then(|id| {
                    let now = self.clock.now();
                    self.affinity.worker(Memory::Response(id), now)
                }),
            };
            let form = BodyForm::plain_json();
            (request.model, rewrite) = self.resolve(&form, body, name, conversation)?;
        }
        let bytes_per_token = self.text_ratios.get(&request.model);
        let block_size = self.block_size;
        let TokenizedPrompts { ids, token_count } = match &self.tokenizer {
            Some(tokenizer) => {
                let dialect = catalog.dialect();
                tokenizer.encode(endpoint, dialect, &request, body, &self.metrics)
            }
            None => TokenizedPrompts::default(),
        };
        // The request is sent, counted and logged under the model's name, and hashed under the hash name.
        let model = request.model.clone();
        if let Some(hash_name) = catalog.hash_name_of(&model) {
            request.model = hash_name;
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
            let mut unread = ParsedRequest::unread(self.block_size, model);
            unread.names_model = names_model;
            unread.rewrite = rewrite;
            unread.session = session;
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
            rewrite,
            hints: RequestHints::default(),
            previous_response_id: request.previous_response_id,
            session,
            medium: request.media_hash,
            only_worker: None,
            preferred_worker: None,
        })
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
