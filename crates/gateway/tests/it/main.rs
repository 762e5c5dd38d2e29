//! Integration tests of the gateway, over real sockets.

mod abort_soak;
mod batches;
mod cache_feedback;
mod failures;
mod fake_worker;
mod fidelity;
mod fleet;
mod metrics_docs;
mod queue;
mod ranks;
mod shutdown;
mod streaming;
mod tokens;

/// Folder of a tokenizer and chat template small enough for the repository.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/tiny_model");
