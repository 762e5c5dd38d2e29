//! What requests lose for want of another copy of their prefix, and when an idle worker is to
//! make one.
//!
//! The least delay leaves a prefix on the workers that have it while computing it anew costs more
//! than the crowd there: right for one request, wrong for all that follow. How many will is not
//! known, so a copy is made once as much has been lost for want of it as it costs: that is at most
//! twice what it costs one who knows (ski rental; Karlin, Manasse, Rudolph and Sleator, 1988).
//!
//! Only idle workers make copies. Where all are busy, the time that takes is that of others, and
//! loads put prefixes on further workers by themselves.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::choose::Policy;
use crate::fleet::WorkerId;
use crate::request::Request;
use crate::sequence::{AlreadyHashed, SequenceHash};
use crate::state::{Reading, State};
use crate::tree::{Depth, Slot};

/// Prefixes that losses are kept of, twice.
const MOST_PREFIXES: usize = 4096;

type BySequence = HashMap<SequenceHash, f64, BuildHasherDefault<AlreadyHashed>>;

/// Seconds lost for want of another copy, by the prefix. Those that nobody lost anything for in a
/// long time are forgotten.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    recent: BySequence,
    before: BySequence,
}

impl Losses {
    /// Adds what one more request lost, and tells what all have.
    fn add(&mut self, prefix: SequenceHash, seconds: f64) -> f64 {
        if self.recent.len() == MOST_PREFIXES && !self.recent.contains_key(&prefix) {
            self.before = std::mem::take(&mut self.recent);
        }
        let known = self.before.remove(&prefix).unwrap_or_default();
        let lost = self.recent.entry(prefix).or_insert(known);
        *lost += seconds;
        *lost
    }

    fn of(&self, prefix: SequenceHash) -> f64 {
        let known = self.recent.get(&prefix).or(self.before.get(&prefix));
        known.copied().unwrap_or_default()
    }

    /// There is another copy.
    fn settle(&mut self, prefix: SequenceHash) {
        self.recent.remove(&prefix);
        self.before.remove(&prefix);
    }
}

/// A copy that would spare a request something.
struct Copy {
    /// Who would make it.
    idle: WorkerId,
    /// What the request loses for want of it, in seconds.
    loses: f64,
    /// What it costs everybody if this request makes it, in seconds.
    takes: f64,
}

impl State {
    /// The idle worker that is to compute the request's prefix once more, if one is, instead of
    /// `chosen`, which costs least.
    pub(crate) fn copies_to(
        &mut self,
        chosen: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> Option<WorkerId> {
        let (prefix, blocks) = self.to_copy(reading, request)?;
        if overlap(chosen.slot, reading, request) < blocks {
            // It computes the prefix itself.
            self.losses.settle(prefix);
            return None;
        }
        let copy = self.copy(blocks, chosen, reading, request)?;
        if self.losses.add(prefix, copy.loses) < copy.takes {
            return None;
        }
        self.losses.settle(prefix);
        Some(copy.idle)
    }

    /// The same, if nothing is to change by it.
    pub(crate) fn would_copy_to(
        &self,
        chosen: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> Option<WorkerId> {
        let (prefix, blocks) = self.to_copy(reading, request)?;
        if overlap(chosen.slot, reading, request) < blocks {
            return None;
        }
        let copy = self.copy(blocks, chosen, reading, request)?;
        let lost = self.losses.of(prefix) + copy.loses;
        (lost >= copy.takes).then_some(copy.idle)
    }

    /// The longest prefix of the request that some worker has, and its blocks; `None` if nothing is
    /// copied.
    fn to_copy(&self, reading: &Reading, request: &Request<'_>) -> Option<(SequenceHash, u32)> {
        if self.config.policy != Policy::Delay || self.config.temperature > 0.0 {
            return None;
        }
        let best = reading.at.best_overlap;
        let best = best.min(request.sequence.reusable_blocks());
        let last = best.checked_sub(1)? as usize;
        Some((*request.sequence.hashes().get(last)?, best))
    }

    /// What another copy of so many blocks would be worth, where `chosen`, which has one, is busy,
    /// and somebody idles.
    fn copy(
        &self,
        blocks: u32,
        chosen: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> Option<Copy> {
        let overlap = |slot| overlap(slot, reading, request);
        let idles = |slot: Slot| self.fleet.loads[slot as usize].requests == 0;
        if idles(chosen.slot) {
            return None;
        }
        let excluded = self.excluded(request);
        let lacking = self.fleet.eligible(request.model)?.iter().copied();
        let lacking = lacking.filter(|&slot| {
            idles(slot)
                && overlap(slot) < blocks
                && !excluded.contains(&slot)
                && self.fleet.at(slot).is_some_and(|it| it.prefix_caching)
        });
        let idle = lacking.max_by_key(|&slot| overlap(slot))?;

        let placement = self.placement(request, reading);
        let cost =
            |slot: Slot, depth: Depth| placement.total(&self.fleet.delay(&placement, slot, depth));
        let least = cost(chosen.slot, reading.depths()[chosen.slot as usize]);
        let depth = reading.depths()[idle as usize];
        let with_it = Depth {
            cached: blocks,
            ..depth
        };
        let loses = least - cost(idle, with_it);
        (loses > 0.0).then_some(Copy {
            idle: self.fleet.at(idle)?.id,
            loses,
            takes: cost(idle, depth) - least,
        })
    }
}

/// Blocks of the request that are there.
fn overlap(slot: Slot, reading: &Reading, request: &Request<'_>) -> u32 {
    let depth = reading.depths()[slot as usize];
    depth.overlap().min(request.sequence.reusable_blocks())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_add_up_until_there_is_a_copy() {
        let mut losses = Losses::default();
        assert_eq!(losses.add(1, 2.0), 2.0);
        assert_eq!(losses.add(2, 5.0), 5.0);
        assert_eq!(losses.add(1, 1.0), 3.0);
        losses.settle(1);
        assert_eq!(losses.add(1, 1.0), 1.0);
    }

    #[test]
    fn what_is_kept_is_bounded_and_what_is_recent_stays() {
        let mut losses = Losses::default();
        for prefix in 0..20 * MOST_PREFIXES as u64 {
            losses.add(prefix + 1, 1.0);
            assert_eq!(losses.add(0, 1.0), 1.0 + prefix as f64);
        }
        assert!(losses.recent.len() + losses.before.len() <= 2 * MOST_PREFIXES);
    }
}
