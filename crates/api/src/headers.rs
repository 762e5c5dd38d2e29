//! Names of the headers that the public API reads and writes.

/// Prefix of the request headers that control the router.
pub const CONTROL_PREFIX: &str = "x-foresee-";

/// Request header with the priority in the queue: lower values are dispatched first; the default is
/// 0.
pub const PRIORITY: &str = "x-foresee-priority";

/// Request header with the expected number of output tokens.
pub const EXPECTED_TOKENS: &str = "x-foresee-expected-tokens";

/// Request header with the time, in milliseconds from the arrival, after which the first byte of the
/// response is of no use to the client.
pub const DEADLINE: &str = "x-foresee-deadline-ms";

/// Response header with the name of the worker that the router chose.
pub const WORKER: &str = "x-foresee-worker";

/// Response header with the number of prompt tokens that the router expects in the worker's cache.
pub const OVERLAP_TOKENS: &str = "x-foresee-overlap-tokens";
