//! The engine's time, told by the clock on the wall.

use std::time::Duration;

use tokio::time::Instant;

/// The longest sleep; whoever is woken too early looks at the clock and sleeps again.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// Time as an engine counts it that runs faster or slower than real time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    origin: Instant,
    begin: Duration,
    scale: f64,
}

impl Clock {
    /// A clock that shows `begin` now, and `scale` seconds more in each real one.
    pub(super) fn start(begin: Duration, scale: f64) -> Self {
        Self {
            origin: Instant::now(),
            begin,
            scale,
        }
    }

    /// What it showed first.
    pub(super) fn begin(self) -> Duration {
        self.begin
    }

    /// What it shows.
    pub(super) fn now(self) -> Duration {
        let passed = scaled(self.origin.elapsed(), self.scale);
        self.begin.saturating_add(passed)
    }

    /// Sleeps until it shows `time`, or for an hour of real time.
    pub(super) async fn sleep_until(self, time: Duration) {
        let left = time.saturating_sub(self.now());
        tokio::time::sleep(self.real(left).min(LONGEST_SLEEP)).await;
    }

    /// How long `duration` of its time takes.
    pub(super) fn real(self, duration: Duration) -> Duration {
        scaled(duration, 1.0 / self.scale)
    }
}

/// A product that does not fit is as long as a time can be.
fn scaled(duration: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(duration.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}
