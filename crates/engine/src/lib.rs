//! Wire formats of LLM engines: OpenAI bodies, token streams, error bodies, metrics, KV events,
//! tokens.
//!
//! Functions turn bytes into values without I/O. There are two exceptions: a model's tokenizer and
//! chat template are loaded from files, and the `strftime_now` of chat templates reads the clock. No
//! input, however malformed, causes a panic or makes a buffer grow without bound.

mod body_error;
pub mod chat;
mod chat_message;
pub mod chat_template;
mod chat_tool;
mod conversation;
pub mod conversion;
mod converted;
pub mod decompress;
mod endpoint;
pub mod error;
mod event;
pub mod kv_events;
mod loose_value;
mod media;
mod messages_request;
pub mod model_name;
mod msgpack;
pub mod multipart;
pub mod output_text;
pub mod paths;
mod prompt;
pub mod prompt_encoder;
mod prompt_sequences;
mod prompts;
mod python_json;
pub mod request;
mod request_body;
mod responses_request;
pub mod server_info;
pub mod stream;
mod strftime;
mod template_error;
pub mod tokenizer;
pub mod usage;
pub mod worker_metrics;
