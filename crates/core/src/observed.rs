//! When a change of a worker's cache happened.

use std::time::Duration;

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
