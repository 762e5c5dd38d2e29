//! Ids of requests whose clients send none.

use std::sync::atomic::{AtomicU64, Ordering};

use http::HeaderValue;

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
