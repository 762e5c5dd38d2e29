//! The one clock of a gateway. `foresee-core` reads none, so every time it gets starts here.

use std::time::{Duration, Instant};

/// Tells the time since the gateway started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    epoch: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self {
            epoch: Instant::now(),
        }
    }

    pub(crate) fn now(self) -> Duration {
        self.epoch.elapsed()
    }
}
