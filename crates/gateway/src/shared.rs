//! What every request, probe and listener of one gateway shares.

use std::sync::atomic::{AtomicU64, Ordering};

use foresee_core::router::Router;
use http::HeaderValue;

use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::forward::Forwarder;
use crate::metrics::Metrics;
use crate::recorder::Recorder;
use crate::text::TextRatios;
use crate::tokens::Tokens;
use crate::workers::Workers;

/// One gateway's state.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: GatewayConfig,
    pub(crate) router: Router,
    pub(crate) workers: Workers,
    /// Carries probes. Requests go by the forwarder of the thread they are on.
    pub(crate) probes: Forwarder,
    pub(crate) metrics: Metrics,
    pub(crate) clock: Clock,
    pub(crate) text: TextRatios,
    pub(crate) tokens: Option<Tokens>,
    pub(crate) request_ids: RequestIds,
    pub(crate) recorder: Option<Recorder>,
}

/// Makes ids that no other gateway makes.
#[derive(Debug)]
pub(crate) struct RequestIds {
    prefix: u64,
    next: AtomicU64,
}

impl RequestIds {
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, RandomState};
        Self {
            prefix: RandomState::new().hash_one(std::process::id()),
            next: AtomicU64::new(0),
        }
    }

    pub(crate) fn next(&self) -> HeaderValue {
        let serial = self.next.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:016x}-{serial:x}", self.prefix);
        HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("unnamed"))
    }
}
