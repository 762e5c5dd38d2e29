//! How a worker's subscription stands, for whoever wants to know.

use parking_lot::Mutex;

/// What a subscription does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EventsState {
    /// There is nothing to subscribe to.
    #[default]
    Off,
    /// The worker has not said yet what it serves, which blocks are hashed with.
    Waiting,
    /// There is no connection.
    Connecting,
    /// Events come, and cannot be used.
    Faulty,
    /// Events are followed as they come.
    Live,
}

impl EventsState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Waiting => "waiting",
            Self::Connecting => "connecting",
            Self::Faulty => "faulty",
            Self::Live => "live",
        }
    }
}

/// A subscription at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Standing {
    pub(crate) state: EventsState,
    /// Whether the router follows the events, rather than the shadow.
    pub(crate) followed: bool,
    /// Whether nothing was missed that matters.
    pub(crate) exact: bool,
    pub(crate) last_sequence: Option<u64>,
    /// How old the last live batch was when it was applied, by both clocks.
    pub(crate) lag_seconds: Option<f64>,
    pub(crate) batches: u64,
    /// Times that batches were missing.
    pub(crate) gaps: u64,
    /// Gaps that could not be closed.
    pub(crate) lost: u64,
}

/// A place where the subscription says how it stands.
#[derive(Debug, Default)]
pub(crate) struct Board {
    standing: Mutex<Standing>,
}

impl Board {
    pub(crate) fn read(&self) -> Standing {
        *self.standing.lock()
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.standing.lock());
    }
}
