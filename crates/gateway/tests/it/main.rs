//! Integration tests of the gateway, over real sockets.

mod abort_phases;
mod abort_soak;
mod access_log;
mod admin;
mod admin_drain;
mod batches;
mod cache_feedback;
mod connections;
mod dashboard;
mod discovery;
mod discovery_dns;
mod failures;
#[cfg(feature = "kubernetes")]
mod fake_api_server;
mod fake_worker;
mod fidelity;
mod fleet;
mod health;
mod host_names;
mod http2;
mod keys;
#[cfg(feature = "kubernetes")]
mod kubernetes;
#[cfg(feature = "kubernetes")]
mod kubernetes_rollout;
mod metrics_docs;
mod misbehaving_workers;
mod model_aliases;
mod paths;
mod queue;
mod ranks;
mod selection;
mod shutdown;
mod streaming;
mod swaps;
mod tls;
mod tokens;
mod traces;
mod worker_keys;

/// Folder of a tokenizer and chat template small enough for the repository.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/tiny_model");
