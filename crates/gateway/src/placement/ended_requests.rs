//! Requests that ended since the last reading: their latencies, and what was predicted and reported of
//! their cache hits. The dashboard's history reads them once a second.

use std::time::Duration;

use foresee_core::workers::WorkerId;
use parking_lot::Mutex;

/// Maximum number of requests that are kept between two readings. Percentiles of more need no more.
const MAX_REQUESTS: usize = 8192;

/// A request that ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndedRequest {
    /// Worker that responded.
    pub(crate) worker: WorkerId,
    /// Time from the arrival to the first token, if one was observed.
    pub(crate) ttft: Option<Duration>,
    /// Mean time between two output tokens, if there were two.
    pub(crate) token_interval: Option<Duration>,
    /// Blocks of the prompt.
    pub(crate) prompt_blocks: u32,
    /// Blocks of the prompt that were predicted to be cached.
    pub(crate) predicted_blocks: u32,
    /// Blocks of the prompt that the engine reported as cached, if it does that.
    pub(crate) actual_blocks: Option<u32>,
}

/// Requests that ended since the last reading.
#[derive(Debug, Default)]
pub(crate) struct EndedRequests(Mutex<Vec<EndedRequest>>);

impl EndedRequests {
    /// Adds a request. Has no effect if there are too many already.
    pub(super) fn add(&self, request: EndedRequest) {
        let mut requests = self.0.lock();
        if requests.len() < MAX_REQUESTS {
            requests.push(request);
        }
    }

    /// Returns the requests that ended since the last call.
    pub(crate) fn take(&self) -> Vec<EndedRequest> {
        std::mem::take(&mut *self.0.lock())
    }
}
