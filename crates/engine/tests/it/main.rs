//! Integration tests of the wire formats.

mod chats;
mod kv_events;
mod output_text;
mod render;
mod requests;
mod server_info;
mod streams;
mod tokens;
mod worker_metrics;

/// Folder of a tokenizer and chat template small enough for the repository.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tiny_model");
