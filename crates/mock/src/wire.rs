//! The JSON of vLLM's responses.

use std::fmt::Write;

use foresee_engine::request::Endpoint;
use foresee_engine::usage::Usage;
use serde_json::{Value, json};

use crate::request::CompletionRequest;

/// Returns the `usage` of a response. Counts that are `None` are written as 0.
fn usage_json(usage: Usage) -> Value {
    let prompt_tokens = usage.prompt_tokens.unwrap_or(0);
    let completion_tokens = usage.completion_tokens.unwrap_or(0);
    json!({
        "prompt_tokens": prompt_tokens,
        "total_tokens": u64::from(prompt_tokens) + u64::from(completion_tokens),
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens.unwrap_or(0)},
    })
}

/// Writes the events of a streamed response. The part that is equal in all events is formatted
/// once.
#[derive(Debug)]
pub(crate) struct EventWriter {
    chat: bool,
    /// The beginning of each event, from `data: {` to the choices.
    head: String,
}

impl EventWriter {
    /// Returns a writer of events in the format of the request's endpoint, which must be chat
    /// completions or completions.
    pub(crate) fn new(request: &CompletionRequest) -> Self {
        let chat = request.endpoint == Endpoint::ChatCompletions;
        let object = if chat {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        let id = Value::from(id(request));
        let model = Value::from(request.model.as_str());
        let created = request.created;
        Self {
            chat,
            head: format!(
                r#"data: {{"id":{id},"object":"{object}","created":{created},"model":{model},"#
            ),
        }
    }

    /// Returns whether the first event of a choice contains the role and no text.
    pub(crate) fn starts_with_role(&self) -> bool {
        self.chat
    }

    /// Writes the event with the role of a choice.
    pub(crate) fn write_role(&self, events: &mut String, choice: usize, usage: Option<Usage>) {
        let delta = r#""delta":{"role":"assistant","content":""},"logprobs":null"#;
        self.write_choice(events, choice, delta, None, usage);
    }

    /// Appends an event with text of a choice to `events`. `text` must not need JSON escapes.
    /// `finish_reason` is given for the last event of the choice only. Without `usage`, the event
    /// has no such field.
    pub(crate) fn write_text(
        &self,
        events: &mut String,
        choice: usize,
        text: &str,
        finish_reason: Option<&'static str>,
        usage: Option<Usage>,
    ) {
        let content = if self.chat {
            format!(r#""delta":{{"content":"{text}"}},"logprobs":null"#)
        } else {
            format!(r#""text":"{text}","logprobs":null"#)
        };
        self.write_choice(events, choice, &content, finish_reason, usage);
    }

    /// Appends an event with one choice to `events`. `content` is the JSON of the choice's fields
    /// between its index and its finish reason.
    fn write_choice(
        &self,
        events: &mut String,
        choice: usize,
        content: &str,
        finish_reason: Option<&'static str>,
        usage: Option<Usage>,
    ) {
        events.push_str(&self.head);
        // Writing to a string cannot fail.
        let _ = write!(
            events,
            r#""choices":[{{"index":{choice},{content},"finish_reason":"#
        );
        let _ = match finish_reason {
            Some(reason) => write!(events, r#""{reason}","stop_reason":null}}]"#),
            None => write!(events, "null}}]"),
        };
        if let Some(usage) = usage {
            let _ = write!(events, r#","usage":{}"#, usage_json(usage));
        }
        events.push_str("}\n\n");
    }

    /// Writes the event with the final usage, which has no choices.
    pub(crate) fn write_usage(&self, events: &mut String, usage: Usage) {
        events.push_str(&self.head);
        let _ = write!(
            events,
            "\"choices\":[],\"usage\":{}}}\n\n",
            usage_json(usage)
        );
    }

    /// Writes the event that ends the stream.
    pub(crate) fn write_done(&self, events: &mut String) {
        events.push_str("data: [DONE]\n\n");
    }
}

/// Returns the body of a response without streaming, for chat completions and completions. Each
/// choice has its whole planned output, so all choices must be finished.
pub(crate) fn completion(request: &CompletionRequest, usage: Usage) -> Vec<u8> {
    let chat = request.endpoint == Endpoint::ChatCompletions;
    let choices = request.outputs.iter().enumerate().map(|(index, planned)| {
        let text = planned.output.text(0..planned.tokens);
        let mut choice = json!({
            "index": index,
            "logprobs": null,
            "finish_reason": planned.finish_reason,
            "stop_reason": null,
        });
        if chat {
            choice["message"] = json!({"role": "assistant", "content": text, "tool_calls": []});
        } else {
            choice["text"] = Value::from(text);
        }
        choice
    });
    let object = if chat {
        "chat.completion"
    } else {
        "text_completion"
    };
    to_bytes(&json!({
        "id": id(request),
        "object": object,
        "created": request.created,
        "model": request.model,
        "choices": choices.collect::<Vec<_>>(),
        "usage": usage_json(usage),
    }))
}

/// Returns the body of a response with embeddings: a short vector for each prompt.
pub(crate) fn embeddings(request: &CompletionRequest, usage: Usage) -> Vec<u8> {
    const DIMENSIONS: u32 = 8;
    let data = request.outputs.iter().enumerate().map(|(index, planned)| {
        let values = (0..DIMENSIONS).map(|dimension| {
            let random = f64::from(planned.output.token(dimension)) / f64::from(u32::MAX);
            random * 2.0 - 1.0
        });
        json!({
            "index": index,
            "object": "embedding",
            "embedding": values.collect::<Vec<f64>>(),
        })
    });
    to_bytes(&json!({
        "id": id(request),
        "object": "list",
        "created": request.created,
        "model": request.model,
        "data": data.collect::<Vec<_>>(),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.prompt_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": null,
        },
    }))
}

/// Returns the body of `/v1/models`: a list with the served model. Its owner is vLLM's, because
/// routers tell from the owner which metrics an engine has.
pub(crate) fn models(model: &str, max_model_len: u32) -> Vec<u8> {
    to_bytes(&json!({
        "object": "list",
        "data": [{
            "id": model,
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": model,
            "parent": null,
            "max_model_len": max_model_len,
        }],
    }))
}

/// Returns the body of `/tokenize`: the tokens of a prompt.
pub(crate) fn tokens(tokens: &[u32], max_model_len: u32) -> Vec<u8> {
    to_bytes(&json!({
        "count": tokens.len(),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "token_strs": null,
    }))
}

/// Returns the response's id, with vLLM's prefix for the endpoint.
fn id(request: &CompletionRequest) -> String {
    let prefix = match request.endpoint {
        Endpoint::ChatCompletions => "chatcmpl",
        Endpoint::Embeddings => "embd",
        _ => "cmpl",
    };
    format!("{prefix}-{}", request.name)
}

fn to_bytes(body: &Value) -> Vec<u8> {
    body.to_string().into_bytes()
}
