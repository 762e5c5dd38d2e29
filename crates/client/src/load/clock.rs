//! The engine's time, derived from real time.

use std::time::Duration;

use tokio::time::Instant;

/// Limit for one sleep. A caller that is woken early sleeps again.
const MAX_SLEEP: Duration = Duration::from_secs(3600);

/// The time of an engine that runs faster or slower than real time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    origin: Instant,
    begin: Duration,
    scale: f64,
}

impl Clock {
    /// Starts a clock at `begin` that advances by `scale` seconds in each second of real time.
    pub(super) fn start(begin: Duration, scale: f64) -> Self {
        Self {
            origin: Instant::now(),
            begin,
            scale,
        }
    }

    /// Returns the time at which the clock was started.
    pub(super) fn begin(self) -> Duration {
        self.begin
    }

    /// Returns the current time.
    pub(super) fn now(self) -> Duration {
        let passed = scaled(self.origin.elapsed(), self.scale);
        self.begin.saturating_add(passed)
    }

    /// Sleeps until `time`, but at most for an hour of real time.
    pub(super) async fn sleep_until(self, time: Duration) {
        let left = time.saturating_sub(self.now());
        tokio::time::sleep(self.real(left).min(MAX_SLEEP)).await;
    }

    /// Returns the real time in which `duration` of this clock passes.
    pub(super) fn real(self, duration: Duration) -> Duration {
        scaled(duration, 1.0 / self.scale)
    }
}

/// Multiplies a duration; a product that does not fit becomes the longest duration.
fn scaled(duration: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}
