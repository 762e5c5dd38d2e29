//! Integration tests of the wire formats.

mod api_requests;
mod api_streams;
mod chats;
mod decompress;
mod kv_events;
mod multipart;
mod output_text;
mod parity;
mod paths;
mod render;
mod requests;
mod server_info;
mod streams;
mod tokens;
mod worker_metrics;

/// Folder of a tokenizer and chat template small enough for the repository.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tiny_model");
