//! Number of KV blocks of a worker: configured, reported or learned.
//!
//! In a cache that evicts the least recently used block, a block is still cached exactly if its
//! *reuse distance* is at most the capacity. The reuse distance of a block is the number of blocks
//! that were in use or were used since its last use, itself included (Mattson et al., 1970). A hit
//! at some distance shows that the capacity is at least that distance, and a miss shows that it is
//! smaller.
//!
//! Distances are counted on the requests of this router only, and misses have other causes than
//! capacity. So the estimate moves only when several reports in a row contradict it in the same
//! direction, only as far as the weakest of them requires, and at most by a factor of two.

use smallvec::SmallVec;

/// Number of blocks assumed for a worker that neither configuration nor metrics describe. About
/// this much is left on a 48 GB card with the weights of an 8B model. It bounds the router's memory
/// for that worker.
pub const DEFAULT_CAPACITY_BLOCKS: u32 = 12_288;

/// Smallest capacity that is learned.
const MIN_BLOCKS: u32 = 16;
/// Largest capacity that is learned. It bounds the router's memory.
const MAX_BLOCKS: u32 = 1 << 20;

/// Number of successive reports that must contradict the estimate in the same direction before it
/// changes.
const REPORTS_BEFORE_CHANGE: usize = 3;

/// Source of a worker's capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapacitySource {
    /// The configuration.
    Configured,
    /// The worker's metrics.
    Reported,
    /// Cache hits and misses that the worker's responses report.
    Learned,
    /// [`DEFAULT_CAPACITY_BLOCKS`]: no other source is known, and no response has contradicted it.
    Assumed,
}

impl CapacitySource {
    /// Returns the name used in the admin API.
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

/// Capacity of one worker, with the recent evidence against a learned estimate.
#[derive(Debug)]
pub(crate) struct Capacity {
    /// Capacity in blocks, in use now.
    blocks: u32,
    /// Where `blocks` comes from. Only a learned or assumed value changes with reports.
    source: CapacitySource,
    /// Greatest recent distance of a hit, in blocks. Lowered when misses contradict it.
    largest_hit_distance: u64,
    /// Distances of the latest hits that contradict the estimate: lower bounds of the capacity.
    /// Empty if the latest contradiction was a miss.
    lower_bounds: SmallVec<[u64; REPORTS_BEFORE_CHANGE]>,
    /// Upper bounds of the capacity, from the latest misses that contradict the estimate. Empty if
    /// the latest contradiction was a hit.
    upper_bounds: SmallVec<[u64; REPORTS_BEFORE_CHANGE]>,
}

impl Capacity {
    /// Returns the configured capacity, or [`DEFAULT_CAPACITY_BLOCKS`] to learn from.
    pub(crate) fn new(configured: Option<u32>) -> Self {
        let source = match configured {
            Some(_) => CapacitySource::Configured,
            None => CapacitySource::Assumed,
        };
        Self::with_source(configured.unwrap_or(DEFAULT_CAPACITY_BLOCKS), source)
    }

    /// Returns a capacity that the worker's metrics report.
    pub(crate) fn reported(blocks: u32) -> Self {
        Self::with_source(blocks, CapacitySource::Reported)
    }

    /// Returns a capacity without evidence against it.
    fn with_source(blocks: u32, source: CapacitySource) -> Self {
        Self {
            blocks,
            source,
            largest_hit_distance: 0,
            lower_bounds: SmallVec::new(),
            upper_bounds: SmallVec::new(),
        }
    }

    /// Returns the capacity in blocks.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Returns where the capacity comes from.
    pub(crate) fn source(&self) -> CapacitySource {
        self.source
    }

    /// Returns whether the capacity is to be learned, because it is neither configured nor
    /// reported.
    pub(crate) fn is_learned(&self) -> bool {
        matches!(
            self.source,
            CapacitySource::Learned | CapacitySource::Assumed
        )
    }

    /// Records that a block was hit at this reuse distance, in blocks. A distance beyond the
    /// estimate counts against it; three such reports in a row raise it, half of the way to the
    /// smallest of their distances. No effect on a configured or reported capacity.
    pub(crate) fn observe_hit(&mut self, distance: u64) {
        if !self.is_learned() {
            return;
        }
        if distance <= u64::from(self.blocks) {
            self.largest_hit_distance = self.largest_hit_distance.max(distance);
            self.upper_bounds
                .retain(|upper_bound| *upper_bound >= distance);
            return;
        }
        self.upper_bounds.clear();
        self.lower_bounds.push(distance);
        if self.lower_bounds.len() == REPORTS_BEFORE_CHANGE {
            let lower_bound = self.lower_bounds.drain(..).min().unwrap_or(0);
            let current = u64::from(self.blocks);
            // Moves half of the way, because distances beyond the estimate are overestimated.
            let gap = lower_bound.saturating_sub(current).min(2 * current);
            self.set_learned(current + gap.div_ceil(2));
        }
    }

    /// Records that a block was missed at this reuse distance, in blocks. A distance within the
    /// estimate counts against it, unless a block was hit at the same or a greater distance; three
    /// such reports in a row lower it, at most by half. A distance beyond the estimate is ignored.
    /// No effect on a configured or reported capacity.
    pub(crate) fn observe_miss(&mut self, distance: u64) {
        if !self.is_learned() || distance > u64::from(self.blocks) {
            return;
        }
        if distance <= self.largest_hit_distance {
            // Either the miss has another cause than capacity, or the recorded hit distance is
            // outdated.
            self.largest_hit_distance -= self.largest_hit_distance / 16;
            return;
        }
        self.lower_bounds.clear();
        self.upper_bounds.push(distance.saturating_sub(1));
        if self.upper_bounds.len() == REPORTS_BEFORE_CHANGE {
            let upper_bound = self.upper_bounds.drain(..).max().unwrap_or(0);
            self.set_learned(
                upper_bound
                    .max(self.largest_hit_distance)
                    .max(u64::from(self.blocks) / 2),
            );
        }
    }

    /// Sets a learned capacity, limited to [`MIN_BLOCKS`] and [`MAX_BLOCKS`].
    fn set_learned(&mut self, blocks: u64) {
        let blocks = u32::try_from(blocks).unwrap_or(MAX_BLOCKS);
        self.blocks = blocks.clamp(MIN_BLOCKS, MAX_BLOCKS);
        self.source = CapacitySource::Learned;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configured_or_reported_capacity_is_never_learned() {
        for mut capacity in [Capacity::new(Some(100)), Capacity::reported(100)] {
            let source = capacity.source();
            for _ in 0..10 {
                capacity.observe_miss(5);
                capacity.observe_hit(500);
            }
            assert_eq!((capacity.blocks(), capacity.source()), (100, source));
        }
    }

    #[test]
    fn contradicting_reports_change_nothing() {
        let mut capacity = Capacity::new(None);
        for _ in 0..100 {
            capacity.observe_miss(40);
            capacity.observe_hit(20_000);
        }
        assert_eq!(capacity.source(), CapacitySource::Assumed);
    }

    #[test]
    fn the_estimate_moves_to_what_three_reports_agree_on() {
        let mut capacity = Capacity::new(None);
        for distance in [9_001, 8_001, 10_001] {
            capacity.observe_miss(distance);
        }
        assert_eq!(capacity.blocks(), 10_000);
        for distance in [1, 2, 3] {
            capacity.observe_miss(distance);
        }
        assert_eq!(
            capacity.blocks(),
            5_000,
            "one step lowers the estimate at most by half"
        );
        for distance in [7_000, 6_000, 8_000] {
            capacity.observe_hit(distance);
        }
        assert_eq!(
            capacity.blocks(),
            5_500,
            "the estimate moves half of the way up"
        );
        assert_eq!(capacity.source(), CapacitySource::Learned);
        capacity.observe_hit(3_000);
        for _ in 0..3 {
            capacity.observe_miss(2_000);
        }
        assert_eq!(
            capacity.blocks(),
            5_500,
            "a hit at a greater distance outweighs the misses"
        );
    }

    #[test]
    fn the_estimate_stays_within_bounds() {
        let mut capacity = Capacity::new(None);
        for _ in 0..1_000 {
            capacity.observe_hit(u64::MAX);
        }
        assert_eq!(capacity.blocks(), MAX_BLOCKS);
        for _ in 0..10_000 {
            capacity.observe_miss(1);
        }
        assert_eq!(capacity.blocks(), MIN_BLOCKS);
    }
}
