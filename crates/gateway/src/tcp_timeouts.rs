//! Times after which TCP gives up a connection, to a client or to a worker.

use std::time::Duration;

/// Time without traffic after which TCP probes whether the other end still exists, and time between
/// two probes.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Number of unanswered probes after which the connection ends.
pub(crate) const KEEPALIVE_PROBES: u32 = 3;

/// Time for which sent data may stay unacknowledged before the kernel ends the connection. Without
/// it, Linux retransmits to a machine that vanished for about a quarter of an hour.
pub(crate) const USER_TIMEOUT: Duration = Duration::from_secs(30);
