//! Names and values of OpenTelemetry's conventions for generative AI.

use bytes::Bytes;
use foresee_engine::request::Endpoint;
use opentelemetry::KeyValue;
use serde::Deserialize;

use crate::placement::parsed_request::ParsedRequest;

/// Longest body whose sampling parameters are read, in bytes. They are read only for spans.
const MAX_PARAMETER_BYTES: usize = 256 << 10;

/// Longest text of a client that a span repeats, in characters.
const MAX_TEXT_CHARS: usize = 256;

/// Returns the beginning of a text.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).collect()
}

/// Returns the name of the operation that a request calls; `None` if the conventions have none.
pub(super) fn operation(endpoint: Endpoint) -> Option<&'static str> {
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Responses | Endpoint::Messages => Some("chat"),
        Endpoint::Completions | Endpoint::VllmGenerate | Endpoint::SglangGenerate => {
            Some("text_completion")
        }
        Endpoint::Embeddings => Some("embeddings"),
        _ => None,
    }
}

/// Sampling parameters of a body, which routing does not need.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Parameters {
    temperature: Option<f64>,
    top_p: Option<f64>,
}

/// Returns the attributes of a call that follow from its request: those of the model and of the
/// parameters, and no content.
pub(super) fn request_attributes(
    endpoint: Endpoint,
    parsed: &ParsedRequest,
    body: &Bytes,
) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(16);
    let Some(operation) = operation(endpoint) else {
        return attributes;
    };
    attributes.push(KeyValue::new("gen_ai.operation.name", operation));
    attributes.push(KeyValue::new(
        "gen_ai.request.model",
        shortened(&parsed.model),
    ));
    let session = parsed.session.as_deref();
    if let Some(session) = session.and_then(|session| std::str::from_utf8(session).ok()) {
        let id = KeyValue::new("gen_ai.conversation.id", shortened(session));
        attributes.push(id);
    }
    if endpoint.generates() {
        attributes.push(KeyValue::new("gen_ai.request.stream", parsed.is_streaming));
        if let Some(tokens) = parsed.max_tokens {
            attributes.push(KeyValue::new(
                "gen_ai.request.max_tokens",
                i64::from(tokens),
            ));
        }
        let choices = 1 + parsed.sequences.rest.len();
        if choices > 1 {
            attributes.push(KeyValue::new(
                "gen_ai.request.choice.count",
                i64::try_from(choices).unwrap_or(i64::MAX),
            ));
        }
        if body.len() <= MAX_PARAMETER_BYTES {
            // Parameters of another type are the engine's to refuse.
            let parameters: Parameters = serde_json::from_slice(body).unwrap_or_default();
            let named = [
                ("gen_ai.request.temperature", parameters.temperature),
                ("gen_ai.request.top_p", parameters.top_p),
            ];
            for (name, value) in named {
                attributes.extend(value.map(|value| KeyValue::new(name, value)));
            }
        }
    }
    attributes
}
