//! Where the knowledge of a worker's prefix cache comes from.

use std::fmt;

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
