//! Wire formats of LLM engines: OpenAI bodies, token streams, error bodies, metrics, KV events,
//! tokens.
//!
//! Functions turn bytes into values without I/O. There are two exceptions: a model's tokenizer and
//! chat template are loaded from files, and the `strftime_now` of chat templates reads the clock. No
//! input, however malformed, causes a panic or makes a buffer grow without bound.

pub mod chat;
pub mod chat_template;
mod conversation;
pub mod error;
mod event;
pub mod kv_events;
mod loose_value;
mod msgpack;
pub mod output_text;
mod prompt_sequences;
mod prompts;
mod python_json;
pub mod request;
pub mod server_info;
pub mod stream;
mod strftime;
pub mod tokenizer;
pub mod usage;
pub mod worker_metrics;
