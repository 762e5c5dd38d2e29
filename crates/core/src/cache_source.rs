//! Where the router's knowledge of a worker's prefix cache comes from.

use std::fmt;
use std::time::Duration;

/// Source of a worker's cache contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSource {
    /// The KV events that the engine publishes.
    Events,
    /// The estimated cache: the engine's eviction rule, run on the requests routed to the worker.
    #[default]
    Estimated,
}

impl CacheSource {
    /// Returns the name that the admin API uses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Estimated => "estimated",
        }
    }
}

impl fmt::Display for CacheSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// When a reported change of a worker's cache happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Just before this instant. The change also shows how far the worker's requests have come.
    Live(Duration),
    /// At an unknown earlier time: a replayed batch or a snapshot. The change says nothing about
    /// the progress of requests.
    Replayed,
}

impl From<Option<Duration>> for Observed {
    /// Returns `Live` for an instant, `Replayed` for `None`.
    fn from(at: Option<Duration>) -> Self {
        at.map_or(Self::Replayed, Self::Live)
    }
}
