//! What LLM engines speak: OpenAI bodies, token streams, error bodies, metrics, KV events, tokens.
//!
//! Everything here is pure: bytes in, meaning out. Nothing does I/O but the loading of a model's
//! tokenizer and chat template, and no input, however malformed, panics or grows a buffer without
//! bound.
pub mod answer;
pub mod chat;
pub mod chat_template;
mod conversation;
pub mod error;
mod event;
pub mod kv_events;
mod lenient;
mod msgpack;
mod prompts;
mod python_json;
pub mod request;
mod sequences;
pub mod server_info;
pub mod stream;
mod strftime;
pub mod tokenizer;
pub mod usage;
pub mod worker_metrics;
