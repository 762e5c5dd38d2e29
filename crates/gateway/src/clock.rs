//! Monotonic clock of one gateway. `foresee-core` reads no clock; every time that it receives is
//! counted from this clock's start.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic clock that starts with the gateway.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    epoch: Instant,
}

impl Clock {
    /// Starts a clock at zero.
    pub(crate) fn start() -> Self {
        Self {
            epoch: Instant::now(),
        }
    }

    /// Returns the time since the start.
    pub(crate) fn now(self) -> Duration {
        self.epoch.elapsed()
    }
}

/// Returns the time since 1970 by the clock of the system, which can be set; 0 before 1970.
pub(crate) fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
