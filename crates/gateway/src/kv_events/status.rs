//! Status of a worker's event subscription, shared with requests and the admin API.
//!
//! The subscription writes its state here. Requests report here what they send, and responses
//! whether they agree with the events; [`EventStatus::hit_checked`] wakes the subscription when it
//! has to act on that.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use foresee_core::event_index::CacheDelta;
use foresee_core::sequence::{Sequence, SequenceHash};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use crate::kv_events::event_trust::{DistrustReason, EventTrust, HitCheck, UntrustedIndex};

/// Maximum number of prompts of one block that wait for the subscription to take them.
const MAX_UNSEEN_PROMPTS: usize = 256;

/// State of an event stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum EventsState {
    /// The worker has no event source.
    #[default]
    Off,
    /// The worker has not listed its models yet. The model's name is part of every block hash.
    Waiting,
    /// No connection is open.
    Connecting,
    /// A connection is open, but no events arrive although requests must have filled blocks.
    Silent,
    /// Events arrive, but cannot be used.
    Faulty,
    /// Events are untrusted: responses contradicted them.
    Untrusted,
    /// Events are applied as they arrive.
    Live,
}

impl EventsState {
    /// Returns the name that the admin API shows.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Waiting => "waiting",
            Self::Connecting => "connecting",
            Self::Silent => "silent",
            Self::Faulty => "faulty",
            Self::Untrusted => "untrusted",
            Self::Live => "live",
        }
    }
}

/// State and counters of a subscription at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EventSnapshot {
    /// State of the event stream.
    pub(crate) state: EventsState,
    /// Whether the router uses the events. If not, it uses an estimated cache.
    pub(crate) followed: bool,
    /// Whether nothing was missed since the cache was last empty.
    pub(crate) is_complete: bool,
    /// Sequence number of the last batch that was applied.
    pub(crate) last_sequence: Option<u64>,
    /// Age of the last live batch when it was applied: this machine's clock minus the batch's
    /// timestamp by the engine's clock.
    pub(crate) lag_seconds: Option<f64>,
    /// Number of batches applied, replayed ones included.
    pub(crate) batches: u64,
    /// Number of times that batches were missing, replayed or not.
    pub(crate) gaps: u64,
    /// Number of gaps that could not be closed by a replay.
    pub(crate) lost: u64,
    /// Number of times that responses contradicted the events.
    pub(crate) untrusted: u64,
    /// Whether the engine lists cached blocks that it found again. Such listings are not counted as
    /// stores.
    pub(crate) full_report_mode: bool,
}

/// Status of one worker's subscription.
#[derive(Debug, Default)]
pub(crate) struct EventStatus {
    snapshot: Mutex<EventSnapshot>,
    trust: Mutex<EventTrust>,
    /// Reason to revoke trust that the subscription has not taken yet.
    reason: Mutex<Option<DistrustReason>>,
    /// Contents of the cache according to untrusted events; `None` while events are trusted.
    untrusted_index: RwLock<Option<UntrustedIndex>>,
    /// Whether a request has asked for a block listing since the subscription last took this.
    listing_requested: AtomicBool,
    /// Prompts of exactly one engine block that were sent and that the subscription has not taken
    /// yet.
    single_block_prompts: Mutex<Vec<SequenceHash>>,
    /// Tokens per engine block; 0 until the first event.
    engine_block_size: AtomicU32,
    /// Wakes the subscription when trust has to be revoked or restored.
    pub(crate) hit_checked: Notify,
}

impl EventStatus {
    /// Returns a copy of the current state and counters.
    pub(crate) fn read(&self) -> EventSnapshot {
        *self.snapshot.lock()
    }

    /// Records that a request asks this worker to list the cached blocks that it finds (full report
    /// mode).
    pub(crate) fn request_block_listing(&self) {
        self.listing_requested.store(true, Ordering::Relaxed);
    }

    /// Returns whether a request has asked for a listing since the last call.
    pub(crate) fn take_listing_requested(&self) -> bool {
        self.listing_requested.swap(false, Ordering::Relaxed)
    }

    /// Records a prompt that is about to be sent, if it is exactly one engine block: the engine
    /// stores such a prompt even if it is cached. Other prompts are ignored, and so is every prompt
    /// before the first event and while [`MAX_UNSEEN_PROMPTS`] wait.
    pub(crate) fn note_sent(&self, prompt: &Sequence) {
        if prompt.tokens() != self.engine_block_size.load(Ordering::Relaxed) {
            return;
        }
        let mut sent = self.single_block_prompts.lock();
        if let Some(&hash) = prompt.hashes().last()
            && sent.len() < MAX_UNSEEN_PROMPTS
        {
            sent.push(hash);
        }
    }

    /// Takes the prompts that [`note_sent`](Self::note_sent) recorded since the last call.
    pub(crate) fn take_sent(&self) -> Vec<SequenceHash> {
        std::mem::take(&mut self.single_block_prompts.lock())
    }

    /// Sets the number of tokens per engine block.
    pub(crate) fn set_engine_block_size(&self, tokens: u32) {
        self.engine_block_size.store(tokens, Ordering::Relaxed);
    }

    /// Returns how many leading blocks of `prompt` are cached and reusable according to untrusted
    /// events. `None` while events are trusted.
    pub(crate) fn predict(&self, prompt: &Sequence) -> Option<u32> {
        let index = self.untrusted_index.read();
        let cached_blocks = index.as_ref()?.cached_blocks(prompt.hashes());
        Some(cached_blocks.min(prompt.max_reusable_blocks()))
    }

    /// Compares a response's reported cache hit with the prediction, and wakes the subscription if
    /// trust has to be revoked or restored. A check without evidence is ignored. `now` is a time of
    /// the gateway's clock.
    pub(crate) fn record_hit_check(&self, check: HitCheck, now: Duration) {
        let mut trust = self.trust.lock();
        let reason = trust.record_hit_check(check, now);
        if reason.is_some() || trust.is_restored() {
            *self.reason.lock() = reason;
            self.hit_checked.notify_one();
        }
    }

    /// Records a response that does not report its cache hit and for which the engine computed
    /// `tokens` tokens, in blocks of at least `block_tokens` tokens. Wakes the subscription if such
    /// responses should have caused events and none arrived. Must be called only for responses that
    /// completed.
    pub(crate) fn record_computed(&self, tokens: u32, block_tokens: u32, now: Duration) {
        let mut trust = self.trust.lock();
        if let Some(reason) = trust.record_computed(tokens, block_tokens, now) {
            *self.reason.lock() = Some(reason);
            self.hit_checked.notify_one();
        }
    }

    /// Takes the reason to revoke trust, if there is one.
    pub(crate) fn take_reason(&self) -> Option<DistrustReason> {
        self.reason.lock().take()
    }

    /// Calls `access` with the trust in the events, under its lock.
    pub(crate) fn with_trust<T>(&self, access: impl FnOnce(&mut EventTrust) -> T) -> T {
        access(&mut self.trust.lock())
    }

    /// Starts to keep the contents of untrusted events, from `contents` on, or stops with `None`.
    pub(crate) fn set_untrusted_index(&self, contents: Option<&CacheDelta>) {
        *self.untrusted_index.write() = contents.map(|contents| {
            let mut index = UntrustedIndex::default();
            index.update(contents);
            index
        });
    }

    /// Applies changes to the contents of untrusted events. Has no effect while events are trusted.
    pub(crate) fn update_untrusted_index(&self, changes: &CacheDelta) {
        if let Some(index) = &mut *self.untrusted_index.write() {
            index.update(changes);
        }
    }

    /// Calls `change` with the state and counters, under their lock.
    pub(crate) fn change(&self, change: impl FnOnce(&mut EventSnapshot)) {
        change(&mut self.snapshot.lock());
    }
}
