//! The shapes of vLLM's responses.

use std::fmt::Write;

use foresee_engine::request::Endpoint;
use serde_json::{Value, json};

use crate::server::job::Job;

/// What a request cost, in tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) cached_tokens: u32,
}

impl Usage {
    fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": u64::from(self.prompt_tokens) + u64::from(self.completion_tokens),
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// Writes a response's events. What is the same in all of them is made once.
#[derive(Debug)]
pub(super) struct EventWriter {
    chat: bool,
    /// From `data: {` to the choices.
    head: String,
}

impl EventWriter {
    pub(super) fn new(job: &Job) -> Self {
        let chat = job.endpoint == Endpoint::ChatCompletions;
        let object = if chat {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        let id = Value::from(id(job));
        let model = Value::from(job.model.as_str());
        let created = job.created;
        Self {
            chat,
            head: format!(
                r#"data: {{"id":{id},"object":"{object}","created":{created},"model":{model},"#
            ),
        }
    }

    /// Whether the first event of a choice has its role and no text.
    pub(super) fn begins_with_role(&self) -> bool {
        self.chat
    }

    pub(super) fn write_role(&self, events: &mut String, choice: usize, usage: Option<Usage>) {
        let delta = r#""delta":{"role":"assistant","content":""},"logprobs":null"#;
        self.write_choice(events, choice, delta, None, usage);
    }

    /// `text` must not need escaping.
    pub(super) fn write_text(
        &self,
        events: &mut String,
        choice: usize,
        text: &str,
        finish_reason: Option<&'static str>,
        usage: Option<Usage>,
    ) {
        let said = if self.chat {
            format!(r#""delta":{{"content":"{text}"}},"logprobs":null"#)
        } else {
            format!(r#""text":"{text}","logprobs":null"#)
        };
        self.write_choice(events, choice, &said, finish_reason, usage);
    }

    fn write_choice(
        &self,
        events: &mut String,
        choice: usize,
        said: &str,
        finish_reason: Option<&'static str>,
        usage: Option<Usage>,
    ) {
        events.push_str(&self.head);
        // Writing to a string cannot fail.
        let _ = write!(
            events,
            r#""choices":[{{"index":{choice},{said},"finish_reason":"#
        );
        let _ = match finish_reason {
            Some(reason) => write!(events, r#""{reason}","stop_reason":null}}]"#),
            None => write!(events, "null}}]"),
        };
        if let Some(usage) = usage {
            let _ = write!(events, r#","usage":{}"#, usage.to_json());
        }
        events.push_str("}\n\n");
    }

    /// The last report, without choices.
    pub(super) fn write_usage(&self, events: &mut String, usage: Usage) {
        events.push_str(&self.head);
        let _ = write!(events, "\"choices\":[],\"usage\":{}}}\n\n", usage.to_json());
    }

    pub(super) fn write_done(&self, events: &mut String) {
        events.push_str("data: [DONE]\n\n");
    }
}

/// The response that is not a stream, for chats and completions.
pub(super) fn completion(job: &Job, usage: Usage) -> Vec<u8> {
    let chat = job.endpoint == Endpoint::ChatCompletions;
    let choices = job.answers.iter().enumerate().map(|(index, planned)| {
        let text = planned.answer.text(0..planned.tokens);
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
        "id": id(job),
        "object": object,
        "created": job.created,
        "model": job.model,
        "choices": choices.collect::<Vec<_>>(),
        "usage": usage.to_json(),
    }))
}

/// The response for embeddings: a short vector for each prompt.
pub(super) fn embeddings(job: &Job, usage: Usage) -> Vec<u8> {
    const DIMENSIONS: u32 = 8;
    let data = job.answers.iter().enumerate().map(|(index, planned)| {
        let values = (0..DIMENSIONS).map(|dimension| {
            let random = f64::from(planned.answer.token(dimension)) / f64::from(u32::MAX);
            random * 2.0 - 1.0
        });
        json!({
            "index": index,
            "object": "embedding",
            "embedding": values.collect::<Vec<f64>>(),
        })
    });
    to_bytes(&json!({
        "id": id(job),
        "object": "list",
        "created": job.created,
        "model": job.model,
        "data": data.collect::<Vec<_>>(),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.prompt_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": null,
        },
    }))
}

/// The list of the one model.
pub(super) fn models(model: &str, max_model_len: u32) -> Vec<u8> {
    to_bytes(&json!({
        "object": "list",
        "data": [{
            "id": model,
            "object": "model",
            "created": 0,
            "owned_by": "foresee",
            "root": model,
            "parent": null,
            "max_model_len": max_model_len,
        }],
    }))
}

fn id(job: &Job) -> String {
    let prefix = match job.endpoint {
        Endpoint::ChatCompletions => "chatcmpl",
        Endpoint::Completions => "cmpl",
        Endpoint::Embeddings => "embd",
    };
    format!("{prefix}-{}", job.name)
}

fn to_bytes(body: &Value) -> Vec<u8> {
    body.to_string().into_bytes()
}
