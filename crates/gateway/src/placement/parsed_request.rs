//! A request's body as routing needs it: parsed, tokenised and hashed.

use std::num::NonZeroU32;

use bytes::Bytes;
use foresee_core::router::Request as RouteRequest;
use foresee_core::sequence::Sequence;
use foresee_core::workers::WorkerId;
use foresee_engine::output_text::Continuation;
use foresee_engine::paths::BodyFormat;
use foresee_engine::request::PromptSequences;

use crate::placement::hints::RequestHints;

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

/// Replacement of an alias in a request by the name of the model.
#[derive(Debug)]
pub(crate) struct ModelRewrite {
    /// Name that the client used.
    pub(crate) alias: String,
    /// Body of the request with the model's name. It is not compressed.
    pub(crate) body: Bytes,
}

/// Properties of a request that routing and the response's observation need.
#[derive(Debug)]
pub(crate) struct ParsedRequest {
    /// Name of the model as workers serve it: that of the request, or the one behind an alias. If the
    /// request gave none, the model that all workers list first; empty if there is no such model.
    pub(crate) model: String,
    /// Whether the request named the model.
    pub(super) names_model: bool,
    /// Replacement of the model's name, if the request named an alias.
    pub(crate) rewrite: Option<ModelRewrite>,
    /// Hashed prompts of the request, one for each output.
    pub(crate) sequences: PromptSequences,
    /// Limit of output tokens.
    pub(crate) max_tokens: Option<u32>,
    /// Whether the output continues to `max_tokens`.
    pub(super) ignore_eos: bool,
    /// Whether the request offers tools to the model.
    pub(super) has_tools: bool,
    pub(crate) is_streaming: bool,
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
    /// Returns the name of the model that the client used.
    pub(crate) fn requested_model(&self) -> &str {
        self.rewrite
            .as_ref()
            .map_or(&self.model, |rewrite| &rewrite.alias)
    }

    /// Returns a request of unknown content, which is routed by load alone. `model` is empty if it
    /// is unknown.
    pub(super) fn unread(block_size: NonZeroU32, model: String) -> Self {
        Self {
            names_model: !model.is_empty(),
            model,
            rewrite: None,
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
