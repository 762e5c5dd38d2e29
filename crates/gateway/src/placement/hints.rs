//! Hints of a request: what its client says beside the body.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::time::Duration;

use foresee_core::workers::WorkerId;

/// How long a client waits, from the arrival of its request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deadlines {
    /// Time until the first byte of the response, after which it is of no use.
    pub(crate) first_byte: Option<Duration>,
    /// Time in the router's queue.
    pub(crate) queue: Option<Duration>,
}

/// Routing hints of one request. A front end takes them from where its clients put them.
#[derive(Debug, Default)]
pub(crate) struct RequestHints {
    /// Number of output tokens that the client expects.
    pub(crate) expected_output_tokens: Option<u32>,
    /// Priority in the queue; lower values are dispatched first.
    pub(crate) priority: i32,
    /// [Hash](tenant_hash) of the tenant, for the queue order `fair`. All requests without a tenant
    /// are one tenant, 0.
    pub(crate) tenant: u64,
    /// How long the client waits.
    pub(crate) deadlines: Deadlines,
    /// Workers that the client excluded.
    pub(crate) excluded_workers: Vec<WorkerId>,
}

/// Returns the hash by which requests of one tenant are recognised, whatever front end they use.
pub(crate) fn tenant_hash(tenant: &[u8]) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(tenant)
}
