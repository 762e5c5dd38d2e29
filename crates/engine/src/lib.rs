//! What LLM engines speak: OpenAI bodies, token streams, error bodies, metrics and KV events.
//!
//! Everything here is pure: bytes in, meaning out. Nothing does I/O, and no input, however
//! malformed, panics or grows a buffer without bound.
mod conversation;
pub mod error;
mod event;
pub mod kv_events;
mod lenient;
mod msgpack;
mod prompts;
pub mod request;
pub mod stream;
pub mod usage;
pub mod worker_metrics;
