//! Checks whether a worker's KV events agree with its responses.
//!
//! An engine that reports `cached_tokens` says with each response how much of the prompt its cache
//! really contained. If that repeatedly differs from what the events predicted, the events become
//! *untrusted*: the router uses an estimated cache instead, until the events would have predicted
//! correctly for a while. Pure: responses and times are parameters.

use std::collections::HashSet;
use std::time::Duration;

use foresee_core::event_index::CacheDelta;
use foresee_core::sequence::SequenceHash;

/// Number of latest responses that are considered.
const WINDOW: u32 = 16;

/// Number of wrong predictions among them that revokes trust. A few are wrong with correct events
/// too: requests that start in another order than they were sent, or blocks that are evicted while
/// a request is queued.
const MAX_WRONG: u32 = 14;

/// Number of wrong predictions that revokes trust while no event arrives. It is smaller, because
/// without events the cache has not changed, and nothing explains a difference.
const MAX_WRONG_IN_SILENCE: u32 = 4;

/// Time without events that counts as silence. Shorter gaps can be delivery delay.
const SILENCE: Duration = Duration::from_secs(2);

/// Number of responses without any event that are tolerated, each of which must have filled at
/// least [`MIN_FILLED_BLOCKS`] blocks. Doubles with each silence found, because blocks that are
/// cached already are not filled, and the router may not know all of them.
const MAX_REQUESTS_WITHOUT_EVENTS: u32 = 4;
/// Number of blocks that a response must have filled to be evidence of silence.
const MIN_FILLED_BLOCKS: u32 = 4;

/// Number of successive correct predictions that restores trust. Doubles with each revocation.
const RIGHT_TO_RESTORE: u32 = 8;
/// Maximum number of doublings of the two limits above.
const MAX_DOUBLINGS: u32 = 5;

/// Predicted and reported cache hit of one response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HitCheck {
    /// Prompt tokens that were cached according to the events.
    pub(crate) predicted: u32,
    /// Prompt tokens that were cached according to the response.
    pub(crate) actual: u32,
}

/// Why events are no longer trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DistrustReason {
    /// No events arrive, and responses contradict the last ones.
    Silent,
    /// Events arrive, and responses contradict them.
    Wrong,
    /// No events arrive, although requests must have filled blocks.
    NoEvents,
}

/// Trust in one worker's events, and the evidence for it.
#[derive(Debug)]
pub(crate) struct EventTrust {
    level: TrustLevel,
    /// Tokens per engine block. A difference of at most one block is not evidence.
    block_tokens: u32,
    /// When events were last applied, by the gateway's clock.
    last_event_at: Duration,
    /// Number of responses since the last event that must have filled blocks.
    requests_without_events: u32,
    /// When the first of them ended.
    without_events_since: Duration,
    /// Number of times that [`DistrustReason::NoEvents`] was found.
    silences: u32,
    /// Number of times that trust was revoked.
    revocations: u32,
}

/// How far events are trusted.
#[derive(Clone, Copy, Debug)]
enum TrustLevel {
    /// Events are not used for a reason other than distrust, so responses say nothing about them.
    Suspended,
    /// Events are used.
    Trusted {
        /// The latest responses, one bit each: whether the prediction was wrong.
        wrong: u32,
        /// Number of wrong predictions since the last event.
        wrong_since_event: u32,
    },
    /// Events are not used, because responses contradicted them.
    Revoked {
        /// Number of successive correct predictions.
        right_in_a_row: u32,
        /// Whether events have arrived since the revocation.
        has_events: bool,
    },
}

impl TrustLevel {
    /// Trust without any evidence.
    const NEW: Self = Self::Trusted {
        wrong: 0,
        wrong_since_event: 0,
    };
}

impl Default for EventTrust {
    fn default() -> Self {
        Self {
            level: TrustLevel::Suspended,
            block_tokens: 1,
            last_event_at: Duration::ZERO,
            requests_without_events: 0,
            without_events_since: Duration::ZERO,
            silences: 0,
            revocations: 0,
        }
    }
}

impl EventTrust {
    /// Starts to check events that are used from `now` on, without earlier evidence. Also ends a
    /// revocation.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.level = TrustLevel::NEW;
        self.last_event_at = now;
        self.requests_without_events = 0;
    }

    /// Stops checking, because events are not used for a reason other than distrust. Has no effect
    /// while trust is revoked.
    pub(crate) fn suspend(&mut self) {
        if !self.is_revoked() {
            self.level = TrustLevel::Suspended;
        }
    }

    /// Ends a revocation. Checking starts again with [`begin`](Self::begin), when the events are
    /// used.
    pub(crate) fn restore(&mut self) {
        self.level = TrustLevel::Suspended;
    }

    /// Returns whether events are untrusted.
    pub(crate) fn is_revoked(&self) -> bool {
        matches!(self.level, TrustLevel::Revoked { .. })
    }

    /// Records that events arrived from an engine with blocks of `block_tokens` tokens. Restarts
    /// the count of responses without events.
    pub(crate) fn on_event(&mut self, block_tokens: u32, now: Duration) {
        self.block_tokens = block_tokens.max(1);
        self.last_event_at = now;
        self.requests_without_events = 0;
        match &mut self.level {
            TrustLevel::Suspended => {}
            TrustLevel::Trusted {
                wrong_since_event, ..
            } => *wrong_since_event = 0,
            TrustLevel::Revoked { has_events, .. } => *has_events = true,
        }
    }

    /// Compares the prediction for one response with its report. Returns a reason to revoke trust,
    /// if there is one now; the caller decides whether to call [`revoke`](Self::revoke). While
    /// trust is revoked, the comparison counts towards its restoration and the result is `None`;
    /// while checking is suspended, nothing is recorded.
    ///
    /// Two kinds of responses are no evidence: nothing predicted and nothing found, which would be
    /// right without events too, and a difference of at most one block.
    pub(crate) fn record_hit_check(
        &mut self,
        check: HitCheck,
        now: Duration,
    ) -> Option<DistrustReason> {
        let HitCheck { predicted, actual } = check;
        if predicted == 0 && actual == 0 {
            return None;
        }
        let difference = predicted.abs_diff(actual);
        let is_wrong = difference > self.block_tokens;
        if difference > 0 && !is_wrong {
            return None;
        }
        match &mut self.level {
            TrustLevel::Suspended => None,
            TrustLevel::Revoked { right_in_a_row, .. } => {
                *right_in_a_row = if is_wrong { 0 } else { *right_in_a_row + 1 };
                None
            }
            TrustLevel::Trusted {
                wrong,
                wrong_since_event,
            } => {
                *wrong = (*wrong << 1 | u32::from(is_wrong)) & ((1 << WINDOW) - 1);
                *wrong_since_event += u32::from(is_wrong);
                let silence = now.saturating_sub(self.last_event_at);
                if *wrong_since_event >= MAX_WRONG_IN_SILENCE && silence >= SILENCE {
                    Some(DistrustReason::Silent)
                } else {
                    (wrong.count_ones() >= MAX_WRONG).then_some(DistrustReason::Wrong)
                }
            }
        }
    }

    /// Records a completed response that does not report its cache hit and for which the engine
    /// computed `tokens` tokens, in blocks of at least `block_tokens` tokens. Returns a reason to
    /// revoke trust, if there is one now. The only reason is [`DistrustReason::NoEvents`]. Nothing
    /// is recorded unless events are trusted and the tokens fill at least [`MIN_FILLED_BLOCKS`]
    /// blocks.
    pub(crate) fn record_computed(
        &mut self,
        tokens: u32,
        block_tokens: u32,
        now: Duration,
    ) -> Option<DistrustReason> {
        let block_tokens = self.block_tokens.max(block_tokens);
        let is_checked = matches!(self.level, TrustLevel::Trusted { .. });
        if !is_checked || tokens / block_tokens < MIN_FILLED_BLOCKS {
            return None;
        }
        if self.requests_without_events == 0 {
            self.without_events_since = now;
        }
        self.requests_without_events += 1;
        // The events of the latest responses may still be in transit.
        let has_lasted = now.saturating_sub(self.without_events_since) >= SILENCE;
        let tolerated = MAX_REQUESTS_WITHOUT_EVENTS << self.silences.min(MAX_DOUBLINGS);
        if self.requests_without_events <= tolerated || !has_lasted {
            return None;
        }
        self.requests_without_events = 0;
        self.silences += 1;
        Some(DistrustReason::NoEvents)
    }

    /// Revokes trust: the events are untrusted until [`is_restored`](Self::is_restored).
    pub(crate) fn revoke(&mut self) {
        self.revocations += 1;
        self.level = TrustLevel::Revoked {
            right_in_a_row: 0,
            has_events: false,
        };
    }

    /// Returns whether untrusted events have arrived and predicted correctly for long enough to be
    /// trusted again.
    pub(crate) fn is_restored(&self) -> bool {
        let doublings = self.revocations.saturating_sub(1).min(MAX_DOUBLINGS);
        matches!(
            self.level,
            TrustLevel::Revoked { right_in_a_row, has_events: true }
                if right_in_a_row >= RIGHT_TO_RESTORE << doublings
        )
    }
}

/// The blocks that are cached according to untrusted events. Responses are checked against it, to
/// find out when the events can be trusted again.
#[derive(Debug, Default)]
pub(crate) struct UntrustedIndex {
    /// Cached blocks, by sequence hash.
    prefixes: HashSet<SequenceHash>,
    /// Engine block size ÷ router block size; 0 until the first change.
    engine_block_ratio: usize,
}

impl UntrustedIndex {
    /// Applies stored and removed blocks.
    pub(crate) fn update(&mut self, changes: &CacheDelta) {
        self.engine_block_ratio = self
            .engine_block_ratio
            .max(changes.engine_block_ratio as usize);
        for hash in changes.removed.changed() {
            self.prefixes.remove(&hash);
        }
        self.prefixes.extend(changes.stored.changed());
    }

    /// Returns the number of leading blocks of the prompt with `hash_chain` that are cached. Counts
    /// router blocks, and only those of whole engine blocks.
    pub(crate) fn cached_blocks(&self, hash_chain: &[SequenceHash]) -> u32 {
        let ratio = self.engine_block_ratio.max(1);
        let engine_block_ends = hash_chain.iter().skip(ratio - 1).step_by(ratio);
        let engine_blocks = engine_block_ends
            .take_while(|hash| self.prefixes.contains(hash))
            .count();
        (engine_blocks * ratio) as u32
    }
}

#[cfg(test)]
mod tests {
    use foresee_core::event_index::PrefixRuns;

    use super::*;

    const BLOCK: u32 = 32;
    const WRONG: HitCheck = HitCheck {
        predicted: 10 * BLOCK,
        actual: 0,
    };
    const RIGHT: HitCheck = HitCheck {
        predicted: 3 * BLOCK,
        actual: 3 * BLOCK,
    };

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Trust in events that are used, the latest of which arrived at time 0.
    fn trusted() -> EventTrust {
        let mut trust = EventTrust::default();
        trust.begin(at(0.0));
        trust.on_event(BLOCK, at(0.0));
        trust
    }

    #[test]
    fn thirteen_wrong_predictions_of_sixteen_do_not_revoke_trust() {
        let mut trust = trusted();
        for step in 0..1000 {
            let now = at(f64::from(step));
            trust.on_event(BLOCK, now);
            let check = if step % 16 < 13 { WRONG } else { RIGHT };
            assert_eq!(trust.record_hit_check(check, now), None);
        }
    }

    #[test]
    fn fourteen_wrong_predictions_revoke_trust() {
        let mut trust = trusted();
        for step in 0..MAX_WRONG {
            trust.on_event(BLOCK, at(f64::from(step)));
            let reason = trust.record_hit_check(WRONG, at(f64::from(step)));
            assert_eq!(
                reason,
                (step == MAX_WRONG - 1).then_some(DistrustReason::Wrong)
            );
        }
    }

    #[test]
    fn without_events_fewer_wrong_predictions_revoke_trust_after_two_seconds() {
        let mut trust = trusted();
        for step in 0..4 {
            assert_eq!(
                trust.record_hit_check(WRONG, at(0.1 * f64::from(step))),
                None
            );
        }
        assert_eq!(trust.record_hit_check(RIGHT, at(1.9)), None);
        assert_eq!(
            trust.record_hit_check(WRONG, at(2.0)),
            Some(DistrustReason::Silent)
        );

        let mut trust = trusted();
        for step in 0..4 {
            assert_eq!(
                trust.record_hit_check(WRONG, at(0.1 * f64::from(step))),
                None
            );
        }
        trust.on_event(BLOCK, at(1.0));
        assert_eq!(trust.record_hit_check(WRONG, at(4.0)), None);
    }

    #[test]
    fn responses_without_evidence_do_not_count() {
        let mut trust = trusted();
        let nothing_cached = HitCheck {
            predicted: 0,
            actual: 0,
        };
        let one_block_less = HitCheck {
            predicted: 4 * BLOCK,
            actual: 3 * BLOCK,
        };
        for check in [nothing_cached, one_block_less].repeat(50) {
            assert_eq!(trust.record_hit_check(check, at(100.0)), None);
        }
        trust.suspend();
        for _ in 0..50 {
            assert_eq!(trust.record_hit_check(WRONG, at(200.0)), None);
        }
    }

    #[test]
    fn filled_blocks_without_events_are_silence() {
        let filled = MIN_FILLED_BLOCKS * BLOCK;
        let mut trust = trusted();
        for step in 0..100 {
            let now = at(f64::from(step));
            assert_eq!(
                trust.record_computed(filled - 1, 1, now),
                None,
                "too few blocks"
            );
            assert_eq!(
                trust.record_computed(filled, BLOCK + 1, now),
                None,
                "too few blocks"
            );
        }
        for _ in 0..100 {
            assert_eq!(
                trust.record_computed(filled, 1, at(100.0)),
                None,
                "too soon"
            );
        }
        for silence in 0..9 {
            trust.on_event(BLOCK, at(101.0));
            let tolerated = MAX_REQUESTS_WITHOUT_EVENTS << silence.min(MAX_DOUBLINGS);
            for step in 0..tolerated {
                let now = at(102.0 + f64::from(step));
                assert_eq!(trust.record_computed(filled, 1, now), None);
            }
            let reason = trust.record_computed(filled, 1, at(300.0));
            assert_eq!(reason, Some(DistrustReason::NoEvents));
        }
        trust.suspend();
        assert_eq!(
            trust.record_computed(filled, 1, at(300.0)),
            None,
            "events are not used"
        );
    }

    #[test]
    fn trust_is_restored_later_after_each_revocation() {
        let mut trust = trusted();
        for revocation in 0..9 {
            trust.revoke();
            let expected = RIGHT_TO_RESTORE << revocation.min(MAX_DOUBLINGS);
            for _ in 0..2 * expected {
                trust.record_hit_check(RIGHT, at(1.0));
                assert!(!trust.is_restored(), "no event arrived");
            }
            trust.record_hit_check(WRONG, at(1.0));
            trust.on_event(BLOCK, at(2.0));
            let mut needed = 0;
            while !trust.is_restored() {
                trust.record_hit_check(RIGHT, at(2.0));
                needed += 1;
            }
            assert_eq!(needed, expected);
            trust.restore();
            trust.begin(at(3.0));
        }
    }

    #[test]
    fn the_untrusted_index_counts_whole_engine_blocks() {
        let mut index = UntrustedIndex::default();
        assert_eq!(index.cached_blocks(&[1, 2]), 0);
        index.update(&CacheDelta {
            stored: PrefixRuns::from_sequence(&[2, 4, 6]),
            engine_block_ratio: 2,
            ..CacheDelta::default()
        });
        assert_eq!(index.cached_blocks(&[1, 2, 3, 4, 5, 6, 7]), 6);
        let mut removed = PrefixRuns::default();
        removed.push_suffix(&[2, 4], 1);
        index.update(&CacheDelta {
            removed,
            engine_block_ratio: 2,
            ..CacheDelta::default()
        });
        assert_eq!(index.cached_blocks(&[1, 2, 3, 4, 5, 6, 7]), 2);
        assert_eq!(index.cached_blocks(&[]), 0);
    }
}
