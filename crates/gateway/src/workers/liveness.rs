//! Signs of life of a worker's process, which requests and health checks note.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Signs of life of one worker.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    /// When data last arrived from the worker, in milliseconds of the gateway's clock.
    last_activity: AtomicU64,
    /// Whether the worker refused a connection and has not responded since. When it responds again,
    /// its cache is empty.
    gone: AtomicBool,
    /// Whether the worker has returned after refusing connections, and its event subscription has
    /// not taken that yet.
    cache_lost: AtomicBool,
}

impl Liveness {
    /// Records that data arrived from the worker at `now`.
    pub(crate) fn note_activity(&self, now: Duration) {
        self.last_activity
            .store(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns when data last arrived from the worker, by the gateway's clock.
    pub(crate) fn last_activity(&self) -> Duration {
        Duration::from_millis(self.last_activity.load(Ordering::Relaxed))
    }

    /// Records that the worker refused a connection: no process listens at its address.
    pub(crate) fn mark_gone(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// Returns whether the worker refused a connection and has not responded since.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Records that the worker responded. Returns whether it had refused a connection since the last
    /// call.
    pub(crate) fn note_reachable(&self) -> bool {
        let was_gone = self.gone.swap(false, Ordering::Relaxed);
        self.cache_lost.fetch_or(was_gone, Ordering::Relaxed);
        was_gone
    }

    /// Returns whether the worker has returned after refusing connections since the last call.
    pub(crate) fn take_cache_lost(&self) -> bool {
        self.cache_lost.swap(false, Ordering::Relaxed)
    }
}
