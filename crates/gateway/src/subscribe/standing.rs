//! How a worker's subscription stands, for whoever wants to know, and what answers say of it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use foresee_core::cache::Changes;
use foresee_core::sequence::{Sequence, SequenceHash};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use crate::subscribe::evidence::{Claims, Evidence, Finding, Reason};

/// Prompts of one block kept for a subscription that does not look.
const MOST_UNSEEN: usize = 256;

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
    /// There is a connection, and none come although answers must have filled blocks.
    Silent,
    /// Events come, and cannot be used.
    Faulty,
    /// Events are not believed: answers report another cache.
    Mistrusted,
    /// Events are followed as they come.
    Live,
}

impl EventsState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Waiting => "waiting",
            Self::Connecting => "connecting",
            Self::Silent => "silent",
            Self::Faulty => "faulty",
            Self::Mistrusted => "mistrusted",
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
    /// Times that events were found not to be true.
    pub(crate) mistrusted: u64,
    /// Stores that say again what is known are lists, and not counted.
    pub(crate) has_lists: bool,
}

/// A place where the subscription says how it stands, and answers say whether it is right.
#[derive(Debug, Default)]
pub(crate) struct Board {
    standing: Mutex<Standing>,
    evidence: Mutex<Evidence>,
    /// Why the events should not be believed any longer, until the subscription has seen it.
    reason: Mutex<Option<Reason>>,
    /// What events that are not believed say.
    claims: RwLock<Option<Claims>>,
    /// Since the subscription last looked.
    lists_asked_for: AtomicBool,
    /// Prompts of exactly one block that were sent, until the subscription has seen them.
    of_one_block: Mutex<Vec<SequenceHash>>,
    /// Tokens of the engine's block; 0 until it is known.
    engine_block_size: AtomicU32,
    /// Asks the subscription to look at what answers say.
    pub(super) weighed: Notify,
}

impl Board {
    pub(crate) fn read(&self) -> Standing {
        *self.standing.lock()
    }

    /// A request asks this worker to list what it finds cached among its events.
    pub(crate) fn lists_are_asked_for(&self) {
        self.lists_asked_for.store(true, Ordering::Relaxed);
    }

    /// Whether that happened since this was last asked.
    pub(super) fn were_lists_asked_for(&self) -> bool {
        self.lists_asked_for.swap(false, Ordering::Relaxed)
    }

    /// A prompt is about to be sent.
    pub(crate) fn is_sent(&self, prompt: &Sequence) {
        if prompt.tokens() != self.engine_block_size.load(Ordering::Relaxed) {
            return;
        }
        let mut sent = self.of_one_block.lock();
        if let Some(&hash) = prompt.hashes().last()
            && sent.len() < MOST_UNSEEN
        {
            sent.push(hash);
        }
    }

    pub(super) fn take_sent(&self) -> Vec<SequenceHash> {
        std::mem::take(&mut self.of_one_block.lock())
    }

    pub(super) fn set_engine_block_size(&self, tokens: u32) {
        self.engine_block_size.store(tokens, Ordering::Relaxed);
    }

    /// How many of a prompt's blocks events that are not believed say are cached; `None` if they
    /// are believed.
    pub(crate) fn foretell(&self, prompt: &Sequence) -> Option<u32> {
        let claims = self.claims.read();
        let depth = claims.as_ref()?.depth(prompt.hashes());
        Some(depth.min(prompt.reusable_blocks()))
    }

    /// Takes what an answer says about the events.
    pub(crate) fn weigh(&self, finding: Finding, now: Duration) {
        let mut evidence = self.evidence.lock();
        let reason = evidence.weigh(finding, now);
        if reason.is_some() || evidence.is_won_back() {
            *self.reason.lock() = reason;
            self.weighed.notify_one();
        }
    }

    /// Takes note of an answer for which so many tokens were computed, in blocks of at least
    /// `block_tokens`, and that says nothing of what was cached.
    pub(crate) fn computed(&self, tokens: u32, block_tokens: u32, now: Duration) {
        let mut evidence = self.evidence.lock();
        if let Some(reason) = evidence.computed(tokens, block_tokens, now) {
            *self.reason.lock() = Some(reason);
            self.weighed.notify_one();
        }
    }

    pub(super) fn take_reason(&self) -> Option<Reason> {
        self.reason.lock().take()
    }

    pub(super) fn with_evidence<T>(&self, look: impl FnOnce(&mut Evidence) -> T) -> T {
        look(&mut self.evidence.lock())
    }

    /// Keeps apart what events say that are not believed, from these contents on; `None`: they
    /// are believed.
    pub(super) fn set_claims(&self, contents: Option<&Changes>) {
        *self.claims.write() = contents.map(|contents| {
            let mut claims = Claims::default();
            claims.update(contents);
            claims
        });
    }

    pub(super) fn update_claims(&self, changes: &Changes) {
        if let Some(claims) = &mut *self.claims.write() {
            claims.update(changes);
        }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.standing.lock());
    }
}
