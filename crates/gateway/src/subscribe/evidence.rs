//! Whether a worker's events tell the truth about its cache, as far as its answers can judge.
//!
//! An engine that reports `cached_tokens` says with each answer what its cache really held. Where
//! the events foretold something else again and again, they are no longer believed, and the router
//! guesses from what it sends (the shadow), until they would have been right again for a while.
//! Pure: it is handed answers and times.

use std::collections::HashSet;
use std::time::Duration;

use foresee_core::cache::Changes;
use foresee_core::sequence::SequenceHash;

/// Answers that are looked back on.
const WINDOW: u32 = 16;

/// So many wrong ones among them are no accident. Siblings that start in another order than they
/// were sent, or blocks evicted while a request waits, make a few wrong whoever tells.
const MOST_WRONG: u32 = 14;

/// So many suffice while no event comes at all: then the cache did not change by the events'
/// account, and nothing excuses them.
const MOST_WRONG_IN_SILENCE: u32 = 4;

/// How long no event must have come, to be silence rather than lag.
const SILENCE: Duration = Duration::from_secs(2);

/// So many answers that filled so many blocks each, without one event, are silence whatever they
/// report. They double each time, as what is cached already is not filled, and not all of that is
/// known.
const MOST_UNHEARD: u32 = 4;
const BLOCKS_FILLED: u32 = 4;

/// Right answers in a row that win trust back. They double with each loss of it.
const RIGHT_AGAIN: u32 = 8;
const MOST_DOUBLINGS: u32 = 5;

/// What one answer says about the events.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finding {
    /// Tokens that the events said were cached.
    pub(crate) foretold: u32,
    /// Tokens that the engine says it found.
    pub(crate) found: u32,
}

/// Why events are no longer believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// None come, and answers report another cache than the last one told of.
    Silent,
    /// They come, and answers report another cache.
    Wrong,
    /// None come, and answers must have filled blocks.
    Unheard,
}

/// What the answers so far come to.
#[derive(Debug)]
pub(crate) struct Evidence {
    trust: Trust,
    /// Tokens of an engine's block: no difference up to one is held against anybody.
    block_tokens: u32,
    heard_at: Duration,
    /// Answers since then that must have filled blocks, and when the first of them ended.
    unheard: u32,
    unheard_since: Duration,
    /// How often that was silence.
    silences: u32,
    /// How often trust was lost.
    losses: u32,
}

#[derive(Clone, Copy, Debug)]
enum Trust {
    /// Events are not followed, so answers say nothing about them.
    Unasked,
    Full {
        /// The latest answers, one bit each: whether they were foretold wrong.
        wrong: u32,
        wrong_since_heard: u32,
    },
    Lost {
        right_in_a_row: u32,
        heard: bool,
    },
}

impl Trust {
    const NEW: Self = Self::Full {
        wrong: 0,
        wrong_since_heard: 0,
    };
}

impl Default for Evidence {
    fn default() -> Self {
        Self {
            trust: Trust::Unasked,
            block_tokens: 1,
            heard_at: Duration::ZERO,
            unheard: 0,
            unheard_since: Duration::ZERO,
            silences: 0,
            losses: 0,
        }
    }
}

impl Evidence {
    /// Events are followed from now on, and nothing is held against them.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.trust = Trust::NEW;
        self.heard_at = now;
        self.unheard = 0;
    }

    /// Events are not followed any longer, for another reason.
    pub(crate) fn rest(&mut self) {
        if !self.is_lost() {
            self.trust = Trust::Unasked;
        }
    }

    /// Events are believed again, once they are followed.
    pub(crate) fn rest_assured(&mut self) {
        self.trust = Trust::Unasked;
    }

    /// Events are not believed.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self.trust, Trust::Lost { .. })
    }

    /// Events were applied, of an engine whose blocks have so many tokens.
    pub(crate) fn heard(&mut self, block_tokens: u32, now: Duration) {
        self.block_tokens = block_tokens.max(1);
        self.heard_at = now;
        self.unheard = 0;
        match &mut self.trust {
            Trust::Unasked => {}
            Trust::Full {
                wrong_since_heard, ..
            } => *wrong_since_heard = 0,
            Trust::Lost { heard, .. } => *heard = true,
        }
    }

    /// Weighs an answer. Returns a reason to believe the events no longer, if there is one now.
    pub(crate) fn weigh(&mut self, finding: Finding, now: Duration) -> Option<Reason> {
        let Finding { foretold, found } = finding;
        // That nothing is cached can be guessed.
        if foretold == 0 && found == 0 {
            return None;
        }
        let difference = foretold.abs_diff(found);
        let is_wrong = difference > self.block_tokens;
        if difference > 0 && !is_wrong {
            return None;
        }
        match &mut self.trust {
            Trust::Unasked => None,
            Trust::Lost { right_in_a_row, .. } => {
                *right_in_a_row = if is_wrong { 0 } else { *right_in_a_row + 1 };
                None
            }
            Trust::Full {
                wrong,
                wrong_since_heard,
            } => {
                *wrong = (*wrong << 1 | u32::from(is_wrong)) & ((1 << WINDOW) - 1);
                *wrong_since_heard += u32::from(is_wrong);
                let silence = now.saturating_sub(self.heard_at);
                if *wrong_since_heard >= MOST_WRONG_IN_SILENCE && silence >= SILENCE {
                    Some(Reason::Silent)
                } else {
                    (wrong.count_ones() >= MOST_WRONG).then_some(Reason::Wrong)
                }
            }
        }
    }

    /// An answer has ended for which so many tokens were computed, in blocks of at least
    /// `block_tokens`, and does not report what it found cached. Returns a reason to believe the
    /// events no longer, if there is one now.
    pub(crate) fn computed(
        &mut self,
        tokens: u32,
        block_tokens: u32,
        now: Duration,
    ) -> Option<Reason> {
        let block_tokens = self.block_tokens.max(block_tokens);
        let must_be_heard = matches!(self.trust, Trust::Full { .. });
        if !must_be_heard || tokens / block_tokens < BLOCKS_FILLED {
            return None;
        }
        if self.unheard == 0 {
            self.unheard_since = now;
        }
        self.unheard += 1;
        // The events of the last ones may be on their way.
        let has_lasted = now.saturating_sub(self.unheard_since) >= SILENCE;
        let most = MOST_UNHEARD << self.silences.min(MOST_DOUBLINGS);
        if self.unheard <= most || !has_lasted {
            return None;
        }
        self.unheard = 0;
        self.silences += 1;
        Some(Reason::Unheard)
    }

    /// Believes the events no longer.
    pub(crate) fn lose(&mut self) {
        self.losses += 1;
        self.trust = Trust::Lost {
            right_in_a_row: 0,
            heard: false,
        };
    }

    /// Whether events that were not believed have been right for long enough.
    pub(crate) fn is_won_back(&self) -> bool {
        let doublings = self.losses.saturating_sub(1).min(MOST_DOUBLINGS);
        matches!(
            self.trust,
            Trust::Lost { right_in_a_row, heard: true }
                if right_in_a_row >= RIGHT_AGAIN << doublings
        )
    }
}

/// What events that are not believed say is cached.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    prefixes: HashSet<SequenceHash>,
    stride: usize,
}

impl Claims {
    pub(crate) fn update(&mut self, changes: &Changes) {
        self.stride = self.stride.max(changes.stride as usize);
        for hash in changes.removed.told() {
            self.prefixes.remove(&hash);
        }
        self.prefixes.extend(changes.added.told());
    }

    /// Leading blocks of a prompt that are cached, as they say.
    pub(crate) fn depth(&self, chain: &[SequenceHash]) -> u32 {
        let stride = self.stride.max(1);
        let ends = chain.iter().skip(stride - 1).step_by(stride);
        let cached = ends.take_while(|hash| self.prefixes.contains(hash)).count();
        (cached * stride) as u32
    }
}

#[cfg(test)]
mod tests {
    use foresee_core::cache::Paths;

    use super::*;

    const BLOCK: u32 = 32;
    const WRONG: Finding = Finding {
        foretold: 10 * BLOCK,
        found: 0,
    };
    const RIGHT: Finding = Finding {
        foretold: 3 * BLOCK,
        found: 3 * BLOCK,
    };

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn followed() -> Evidence {
        let mut evidence = Evidence::default();
        evidence.begin(at(0.0));
        evidence.heard(BLOCK, at(0.0));
        evidence
    }

    #[test]
    fn a_few_wrong_answers_are_no_lie() {
        let mut evidence = followed();
        for step in 0..1000 {
            let now = at(f64::from(step));
            evidence.heard(BLOCK, now);
            let finding = if step % 16 < 13 { WRONG } else { RIGHT };
            assert_eq!(evidence.weigh(finding, now), None);
        }
    }

    #[test]
    fn what_is_always_wrong_is() {
        let mut evidence = followed();
        for step in 0..MOST_WRONG {
            evidence.heard(BLOCK, at(f64::from(step)));
            let reason = evidence.weigh(WRONG, at(f64::from(step)));
            assert_eq!(reason, (step == MOST_WRONG - 1).then_some(Reason::Wrong));
        }
    }

    #[test]
    fn silence_takes_fewer_but_takes_its_time() {
        let mut evidence = followed();
        for step in 0..4 {
            assert_eq!(evidence.weigh(WRONG, at(0.1 * f64::from(step))), None);
        }
        assert_eq!(evidence.weigh(RIGHT, at(1.9)), None);
        assert_eq!(evidence.weigh(WRONG, at(2.0)), Some(Reason::Silent));

        let mut evidence = followed();
        for step in 0..4 {
            assert_eq!(evidence.weigh(WRONG, at(0.1 * f64::from(step))), None);
        }
        evidence.heard(BLOCK, at(1.0));
        assert_eq!(evidence.weigh(WRONG, at(4.0)), None);
    }

    #[test]
    fn what_says_nothing_is_not_held_against_anybody() {
        let mut evidence = followed();
        let nothing_at_stake = Finding {
            foretold: 0,
            found: 0,
        };
        let one_block = Finding {
            foretold: 4 * BLOCK,
            found: 3 * BLOCK,
        };
        for finding in [nothing_at_stake, one_block].repeat(50) {
            assert_eq!(evidence.weigh(finding, at(100.0)), None);
        }
        evidence.rest();
        for _ in 0..50 {
            assert_eq!(evidence.weigh(WRONG, at(200.0)), None);
        }
    }

    #[test]
    fn what_fills_blocks_unheard_is_silence() {
        let filled = BLOCKS_FILLED * BLOCK;
        let mut evidence = followed();
        for step in 0..100 {
            let now = at(f64::from(step));
            assert_eq!(evidence.computed(filled - 1, 1, now), None, "too little");
            assert_eq!(
                evidence.computed(filled, BLOCK + 1, now),
                None,
                "too little"
            );
        }
        for _ in 0..100 {
            assert_eq!(evidence.computed(filled, 1, at(100.0)), None, "too soon");
        }
        for silence in 0..9 {
            evidence.heard(BLOCK, at(101.0));
            let most = MOST_UNHEARD << silence.min(MOST_DOUBLINGS);
            for step in 0..most {
                let now = at(102.0 + f64::from(step));
                assert_eq!(evidence.computed(filled, 1, now), None);
            }
            let reason = evidence.computed(filled, 1, at(300.0));
            assert_eq!(reason, Some(Reason::Unheard));
        }
        evidence.rest();
        assert_eq!(
            evidence.computed(filled, 1, at(300.0)),
            None,
            "not followed"
        );
    }

    #[test]
    fn trust_comes_back_and_each_time_later() {
        let mut evidence = followed();
        for loss in 0..9 {
            evidence.lose();
            let expected = RIGHT_AGAIN << loss.min(MOST_DOUBLINGS);
            for _ in 0..2 * expected {
                evidence.weigh(RIGHT, at(1.0));
                assert!(!evidence.is_won_back(), "nothing was heard");
            }
            evidence.weigh(WRONG, at(1.0));
            evidence.heard(BLOCK, at(2.0));
            let mut needed = 0;
            while !evidence.is_won_back() {
                evidence.weigh(RIGHT, at(2.0));
                needed += 1;
            }
            assert_eq!(needed, expected);
            evidence.rest_assured();
            evidence.begin(at(3.0));
        }
    }

    #[test]
    fn claims_reach_as_deep_as_their_blocks() {
        let mut claims = Claims::default();
        assert_eq!(claims.depth(&[1, 2]), 0);
        claims.update(&Changes {
            added: Paths::whole(&[2, 4, 6]),
            stride: 2,
            ..Changes::default()
        });
        assert_eq!(claims.depth(&[1, 2, 3, 4, 5, 6, 7]), 6);
        let mut removed = Paths::default();
        removed.push_behind(&[2, 4], 1);
        claims.update(&Changes {
            removed,
            stride: 2,
            ..Changes::default()
        });
        assert_eq!(claims.depth(&[1, 2, 3, 4, 5, 6, 7]), 2);
        assert_eq!(claims.depth(&[]), 0);
    }
}
