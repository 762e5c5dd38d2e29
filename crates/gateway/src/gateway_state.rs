//! State of one gateway, shared by its listeners, requests and tasks.

use std::sync::atomic::{AtomicU64, Ordering};

use foresee_core::router::Router;
use http::HeaderValue;

use crate::bytes_per_token::TextRatios;
use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::metrics::Metrics;
use crate::recorder::Recorder;
use crate::tokenization::PromptTokenizer;
use crate::upstream::UpstreamClient;
use crate::workers::Workers;

/// State of one gateway.
#[derive(Debug)]
pub(crate) struct GatewayState {
    /// Settings from the start; they never change.
    pub(crate) config: GatewayConfig,
    /// Chooses workers and counts what is booked on them.
    pub(crate) router: Router,
    /// Addresses and models of the router's workers.
    pub(crate) workers: Workers,
    /// Client for health checks and other requests of the gateway's own. Clients' requests use the
    /// client of the I/O thread that they arrived on.
    pub(crate) probe_client: UpstreamClient,
    /// Metrics of the admin listener's `/metrics`.
    pub(crate) metrics: Metrics,
    /// Clock of all times that are passed to the router.
    pub(crate) clock: Clock,
    /// Learned bytes per token of each model, for prompts that are matched as text.
    pub(crate) text_ratios: TextRatios,
    /// Tokenizer of `--tokenizer`; without one, prompts are matched as text.
    pub(crate) tokenizer: Option<PromptTokenizer>,
    /// Source of request ids.
    pub(crate) request_ids: RequestIds,
    /// Writer of `--record`.
    pub(crate) recorder: Option<Recorder>,
}

/// Generator of request ids that are unique across gateways.
#[derive(Debug)]
pub(crate) struct RequestIds {
    /// Random number of this gateway.
    prefix: u64,
    /// Serial number of the next id.
    next: AtomicU64,
}

impl RequestIds {
    /// Creates a generator with a random prefix.
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, RandomState};
        Self {
            prefix: RandomState::new().hash_one(std::process::id()),
            next: AtomicU64::new(0),
        }
    }

    /// Returns a new id, as a header value.
    pub(crate) fn next(&self) -> HeaderValue {
        let serial = self.next.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:016x}-{serial:x}", self.prefix);
        HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("unnamed"))
    }
}
