//! The inference APIs whose bodies and responses the router understands.

/// The API that a body was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`, `/v2/embed` and SGLang's `/encode`
    Embeddings,
    /// `/v1/responses` of OpenAI's Responses API
    Responses,
    /// `/v1/messages` of Anthropic's Messages API
    Messages,
    /// `/v1/messages/count_tokens`, which renders a prompt and generates nothing
    MessagesCountTokens,
    /// vLLM's `/inference/v1/generate`: token ids in, token ids out
    VllmGenerate,
    /// SGLang's `/generate`: a text or token ids, without a chat template
    SglangGenerate,
    /// `/rerank`, `/v1/rerank` and `/v2/rerank`
    Rerank,
    /// `/score`, `/v1/score` and `/generative_scoring`
    Score,
    /// `/classify` and `/v1/classify`
    Classify,
    /// `/pooling`
    Pooling,
    /// `/tokenize` and `/v1/tokenize`
    Tokenize,
    /// `/detokenize` and `/v1/detokenize`
    Detokenize,
    /// Any other path with a JSON body, of which only the model, the output limit and the stream
    /// flag are read
    Other,
}

/// The form in which the clients of an API expect errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorShape {
    /// `{"error": {message, type, param, code}}`
    OpenAi,
    /// The body of `OpenAi`; in a stream, an event `error` with the fields of OpenAI's schema.
    Responses,
    /// `{"type": "error", "error": {type, message}}`
    Anthropic,
}

impl Endpoint {
    /// Returns whether the engine renders the prompt with the model's chat template.
    #[must_use]
    pub fn has_chat_template(self) -> bool {
        matches!(
            self,
            Self::ChatCompletions | Self::Responses | Self::Messages | Self::MessagesCountTokens
        )
    }

    /// Returns whether the engine generates an output that grows token by token. For
    /// [`Other`](Self::Other), the row of [`paths`](crate::paths) determines it, and this returns
    /// true.
    #[must_use]
    pub fn generates(self) -> bool {
        match self {
            Self::ChatCompletions
            | Self::Completions
            | Self::Responses
            | Self::Messages
            | Self::VllmGenerate
            | Self::SglangGenerate
            | Self::Other => true,
            Self::Embeddings
            | Self::MessagesCountTokens
            | Self::Rerank
            | Self::Score
            | Self::Classify
            | Self::Pooling
            | Self::Tokenize
            | Self::Detokenize => false,
        }
    }

    /// Returns the form of this API's errors.
    pub(crate) fn error_shape(self) -> ErrorShape {
        match self {
            Self::Messages | Self::MessagesCountTokens => ErrorShape::Anthropic,
            Self::Responses => ErrorShape::Responses,
            _ => ErrorShape::OpenAi,
        }
    }
}
