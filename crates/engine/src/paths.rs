//! The inference paths of OpenAI, Anthropic, vLLM and SGLang: what each computes, and how its
//! request can be routed.
//!
//! Only paths of this table are inference. The control paths of engines (weights, LoRA adapters,
//! cache flushes, profiles, sessions, aborts, metrics) are not in it, so that a router that passes
//! on only the paths of this table never exposes them. Paths that only describe the
//! engine, such as `/v1/models`, are not in it either. Paths are compared exactly: `/v1/models/` is
//! another path than `/v1/models`.
//!
//! The table follows the route definitions of vLLM 0.32 and SGLang 0.5.23. SGLang also takes `PUT`
//! on a few of these paths; the table has only `POST`.

use crate::endpoint::Endpoint;

/// How the body of a request is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFormat {
    /// The request has no body that matters.
    None,
    /// JSON.
    Json,
    /// `multipart/form-data`, with the model's name in the field `model`.
    Multipart,
}

/// An inference path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InferencePath<'p> {
    /// The API that defines the body and the response.
    pub endpoint: Endpoint,
    /// Encoding of the request's body.
    pub body: BodyFormat,
    /// Whether the engine generates an output that grows token by token.
    pub output_grows: bool,
    /// Whether the request may be sent to another worker after a worker failed it: the result does
    /// not depend on the state of the first worker, and leaves none there.
    pub is_repeatable: bool,
    /// Id of the stored response that the path names. Only the worker that generated this response
    /// has it.
    pub response_id: Option<&'p str>,
    /// The path, with `{response_id}` in the place of an id.
    pub route: &'static str,
}

/// A row of the table.
struct Row {
    method: &'static str,
    path: &'static str,
    entry: InferencePath<'static>,
}

/// Returns the row of a path that is sent with `POST` and has a repeatable result.
const fn post(path: &'static str, endpoint: Endpoint, kind: Kind, body: BodyFormat) -> Row {
    Row {
        method: "POST",
        path,
        entry: InferencePath {
            endpoint,
            body,
            output_grows: matches!(kind, Kind::Generates),
            is_repeatable: true,
            response_id: None,
            route: path,
        },
    }
}

/// The kind of an engine's work on a request.
#[derive(Clone, Copy)]
enum Kind {
    /// The engine generates an output token by token.
    Generates,
    /// The engine computes the prompts once.
    Computes,
}

use BodyFormat::{Json, Multipart};
use Kind::{Computes, Generates};

/// The paths without a variable part. The most frequent ones come first, because a look-up compares
/// them in order.
const ROWS: &[Row] = &[
    post(
        "/v1/chat/completions",
        Endpoint::ChatCompletions,
        Generates,
        Json,
    ),
    post("/v1/completions", Endpoint::Completions, Generates, Json),
    post("/v1/responses", Endpoint::Responses, Generates, Json),
    post("/v1/messages", Endpoint::Messages, Generates, Json),
    post("/v1/embeddings", Endpoint::Embeddings, Computes, Json),
    post(
        "/v1/messages/count_tokens",
        Endpoint::MessagesCountTokens,
        Computes,
        Json,
    ),
    post(
        "/v1/audio/transcriptions",
        Endpoint::Other,
        Generates,
        Multipart,
    ),
    post(
        "/v1/audio/translations",
        Endpoint::Other,
        Generates,
        Multipart,
    ),
    post("/score", Endpoint::Score, Computes, Json),
    post("/v1/score", Endpoint::Score, Computes, Json),
    post("/rerank", Endpoint::Rerank, Computes, Json),
    post("/v1/rerank", Endpoint::Rerank, Computes, Json),
    post("/v2/rerank", Endpoint::Rerank, Computes, Json),
    post("/classify", Endpoint::Classify, Computes, Json),
    post("/v1/classify", Endpoint::Classify, Computes, Json),
    post("/tokenize", Endpoint::Tokenize, Computes, Json),
    post("/v1/tokenize", Endpoint::Tokenize, Computes, Json),
    post("/detokenize", Endpoint::Detokenize, Computes, Json),
    post("/v1/detokenize", Endpoint::Detokenize, Computes, Json),
    post("/v1/systemone", Endpoint::Other, Computes, Json),
    post("/invocations", Endpoint::Other, Generates, Json),
    // vLLM alone
    post(
        "/inference/v1/generate",
        Endpoint::VllmGenerate,
        Generates,
        Json,
    ),
    post(
        "/v1/chat/completions/batch",
        Endpoint::Other,
        Generates,
        Json,
    ),
    post("/cohere/v2/chat", Endpoint::Other, Generates, Json),
    post("/v2/embed", Endpoint::Embeddings, Computes, Json),
    post("/pooling", Endpoint::Pooling, Computes, Json),
    post("/generative_scoring", Endpoint::Score, Computes, Json),
    // SGLang alone; the last two are Ollama's
    post("/generate", Endpoint::SglangGenerate, Generates, Json),
    post("/encode", Endpoint::Embeddings, Computes, Json),
    post("/v1/decisions", Endpoint::Other, Computes, Json),
    post("/api/chat", Endpoint::Other, Generates, Json),
    post("/api/generate", Endpoint::Other, Generates, Json),
];

/// Returns the inference path that a request with this method and path calls; `None` if there is
/// none. `path` has no query.
#[must_use]
pub fn find<'p>(method: &str, path: &'p str) -> Option<InferencePath<'p>> {
    let row = ROWS.iter().find(|row| row.path == path);
    match row {
        Some(row) => (row.method == method).then_some(row.entry),
        None => stored_response(method, path),
    }
}

/// Returns the method that a path of the table is called with, for the `Allow` header of a 405;
/// `None` if the path is not in the table.
#[must_use]
pub fn allowed_method(path: &str) -> Option<&'static str> {
    let row = ROWS.iter().find(|row| row.path == path);
    row.map(|row| row.method).or_else(|| {
        let mut methods = ["GET", "POST"].into_iter();
        methods.find(|method| stored_response(method, path).is_some())
    })
}

/// Returns the entry of a path that names a stored response: `GET /v1/responses/{id}` and
/// `POST /v1/responses/{id}/cancel`. Engines accept only ids that start with `resp_`.
fn stored_response<'p>(method: &str, path: &'p str) -> Option<InferencePath<'p>> {
    let rest = path.strip_prefix("/v1/responses/")?;
    let (id, is_repeatable, route) = match (method, rest.split_once('/')) {
        ("GET", None) => (rest, true, "/v1/responses/{response_id}"),
        ("POST", Some((id, "cancel"))) => (id, false, "/v1/responses/{response_id}/cancel"),
        _ => return None,
    };
    let entry = InferencePath {
        endpoint: Endpoint::Other,
        body: BodyFormat::None,
        output_grows: false,
        is_repeatable,
        response_id: Some(id),
        route,
    };
    id.starts_with("resp_").then_some(entry)
}
