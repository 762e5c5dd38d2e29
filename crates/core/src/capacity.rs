//! How many KV blocks a worker has: told, or learned.
//!
//! In a cache that gives up what was used longest ago, a block is still there exactly if no more
//! blocks than the capacity were in use at once or used since, itself included. That number is
//! its *distance*. So a hit at some distance shows that the capacity is at least that, and a miss
//! that it is less. Both are counted on what this router sent, and other things than capacity
//! make misses too, so the estimate moves only when a few reports in a row speak against it in
//! the same sense, no further than the least of them says, and at most by a factor of two.

use smallvec::SmallVec;

/// Blocks assumed where nobody says how many a worker has: 8B weights on a 48 GB card leave
/// about this much. It bounds the router's memory for that worker.
pub const DEFAULT_CAPACITY_BLOCKS: u32 = 12_288;

/// What is learned stays between these: the upper one bounds memory.
const FEWEST_BLOCKS: u32 = 16;
const MOST_BLOCKS: u32 = 1 << 20;

/// Reports that must speak against the estimate in the same sense.
const REPORTS_BEFORE_CHANGE: usize = 3;

/// Who says how many blocks a worker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapacitySource {
    /// The operator.
    Configured,
    /// The worker's metrics.
    Reported,
    /// Nobody: hits and misses that its responses report.
    Learned,
    /// Nobody, and no response has contradicted the assumption.
    Assumed,
}

impl CapacitySource {
    /// The name used in the admin API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Reported => "reported",
            Self::Learned => "learned",
            Self::Assumed => "assumed",
        }
    }
}

/// The estimate, and what speaks against it.
#[derive(Debug)]
pub(crate) struct Capacity {
    blocks: u32,
    source: CapacitySource,
    /// The greatest distance at which a block was hit lately.
    proven: u64,
    /// The latest contradictions, all of one sense: what the capacity is at least.
    at_least: SmallVec<[u64; REPORTS_BEFORE_CHANGE]>,
    /// The same for what it is at most.
    at_most: SmallVec<[u64; REPORTS_BEFORE_CHANGE]>,
}

impl Capacity {
    /// As configured, or else to be learned.
    pub(crate) fn new(configured: Option<u32>) -> Self {
        let source = match configured {
            Some(_) => CapacitySource::Configured,
            None => CapacitySource::Assumed,
        };
        Self::known(configured.unwrap_or(DEFAULT_CAPACITY_BLOCKS), source)
    }

    pub(crate) fn reported(blocks: u32) -> Self {
        Self::known(blocks, CapacitySource::Reported)
    }

    fn known(blocks: u32, source: CapacitySource) -> Self {
        Self {
            blocks,
            source,
            proven: 0,
            at_least: SmallVec::new(),
            at_most: SmallVec::new(),
        }
    }

    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    pub(crate) fn source(&self) -> CapacitySource {
        self.source
    }

    /// Whether nobody tells, so that it is to be learned.
    pub(crate) fn is_learned(&self) -> bool {
        matches!(
            self.source,
            CapacitySource::Learned | CapacitySource::Assumed
        )
    }

    /// A block was hit at this distance.
    pub(crate) fn hit(&mut self, distance: u64) {
        if !self.is_learned() {
            return;
        }
        if distance <= u64::from(self.blocks) {
            self.proven = self.proven.max(distance);
            self.at_most.retain(|most| *most >= distance);
            return;
        }
        self.at_most.clear();
        self.at_least.push(distance);
        if self.at_least.len() == REPORTS_BEFORE_CHANGE {
            let least = self.at_least.drain(..).min().unwrap_or(0);
            let now = u64::from(self.blocks);
            // Half of the way, because distances beyond the estimate are overestimated.
            let gap = least.saturating_sub(now).min(2 * now);
            self.become_learned(now + gap.div_ceil(2));
        }
    }

    /// A block was missed at this distance.
    pub(crate) fn missed(&mut self, distance: u64) {
        if !self.is_learned() || distance > u64::from(self.blocks) {
            return;
        }
        if distance <= self.proven {
            // Not for want of room; or what was proven holds no longer.
            self.proven -= self.proven / 16;
            return;
        }
        self.at_least.clear();
        self.at_most.push(distance.saturating_sub(1));
        if self.at_most.len() == REPORTS_BEFORE_CHANGE {
            let most = self.at_most.drain(..).max().unwrap_or(0);
            self.become_learned(most.max(self.proven).max(u64::from(self.blocks) / 2));
        }
    }

    fn become_learned(&mut self, blocks: u64) {
        let blocks = u32::try_from(blocks).unwrap_or(MOST_BLOCKS);
        self.blocks = blocks.clamp(FEWEST_BLOCKS, MOST_BLOCKS);
        self.source = CapacitySource::Learned;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_not_learned_away() {
        for mut capacity in [Capacity::new(Some(100)), Capacity::reported(100)] {
            let source = capacity.source();
            for _ in 0..10 {
                capacity.missed(5);
                capacity.hit(500);
            }
            assert_eq!((capacity.blocks(), capacity.source()), (100, source));
        }
    }

    #[test]
    fn one_odd_report_changes_nothing() {
        let mut capacity = Capacity::new(None);
        for _ in 0..100 {
            capacity.missed(40);
            capacity.hit(20_000);
        }
        assert_eq!(capacity.source(), CapacitySource::Assumed);
    }

    #[test]
    fn it_moves_to_what_the_reports_agree_on() {
        let mut capacity = Capacity::new(None);
        for distance in [9_001, 8_001, 10_001] {
            capacity.missed(distance);
        }
        assert_eq!(capacity.blocks(), 10_000);
        for distance in [1, 2, 3] {
            capacity.missed(distance);
        }
        assert_eq!(capacity.blocks(), 5_000, "at most by half");
        for distance in [7_000, 6_000, 8_000] {
            capacity.hit(distance);
        }
        assert_eq!(capacity.blocks(), 5_500, "half of the way");
        assert_eq!(capacity.source(), CapacitySource::Learned);
        capacity.hit(3_000);
        for _ in 0..3 {
            capacity.missed(2_000);
        }
        assert_eq!(capacity.blocks(), 5_500, "more than that was hit");
    }

    #[test]
    fn it_stays_within_bounds() {
        let mut capacity = Capacity::new(None);
        for _ in 0..1_000 {
            capacity.hit(u64::MAX);
        }
        assert_eq!(capacity.blocks(), MOST_BLOCKS);
        for _ in 0..10_000 {
            capacity.missed(1);
        }
        assert_eq!(capacity.blocks(), FEWEST_BLOCKS);
    }
}
