//! Comparison of the cache hits that a worker's responses report with the hits that the router
//! expected.
//!
//! A block that was expected and not found was either evicted early, or the worker has lost its
//! whole cache: through a restart that the router did not notice, or because its cache was reset.
//! Each miss is evidence for a smaller [`Capacity`]. A run of nothing but misses means that the
//! whole cache is lost.

use smallvec::SmallVec;

use crate::capacity::Capacity;

/// Number of successive misses that mean that the cache was lost. A hit on a block that is as old
/// as the missed ones resets the count.
const LOST_CACHE_MISSES: u32 = 4;

/// Cache hit of one prompt, as its response reports it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReportedHit {
    /// Number of leading blocks that the worker found in its cache.
    pub(crate) blocks: u32,
    /// Whether the router's blocks are text blocks. Their number only approximates the engine's
    /// blocks, so a small difference proves nothing.
    pub(crate) is_estimate: bool,
}

/// Cache hit that a booking expected when it was made.
#[derive(Clone, Debug)]
pub struct ExpectedHit {
    /// Number of leading blocks expected to be cached.
    pub(crate) cached_blocks: u32,
    /// Number of leading blocks that other requests had pinned. An engine never evicts pinned
    /// blocks.
    pub(crate) active_blocks: u32,
    /// Latest free epoch when the booking was made.
    pub(crate) epoch: u64,
    /// Free epoch of the deepest block that the booking took out of the free queue; `u64::MAX` if
    /// it took none.
    pub(crate) oldest_epoch: u64,
    /// Position in the free queue of the blocks that no request had pinned, nearest to the root
    /// first. Filled only while the capacity is learned.
    pub(crate) runs: SmallVec<[ExpectedRun; 1]>,
}

/// Consecutive blocks of an expected hit that were released in one free epoch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpectedRun {
    /// Index of the first block, counted from the start of the prompt.
    pub(crate) start: u32,
    /// Blocks that were in use when the booking was made, or released later than this run.
    pub(crate) reuse_distance: u64,
}

impl ExpectedHit {
    /// Returns the reuse distance of the block at `index`: the capacity, in blocks, that a worker
    /// needs to have kept it. `None` if the distance is unknown.
    fn distance(&self, index: u32) -> Option<u64> {
        let run = self.runs.iter().rev().find(|run| run.start <= index)?;
        Some(run.reuse_distance + u64::from(index - run.start) + 1)
    }

    /// Returns the number of leading blocks that the worker should find. It includes blocks that
    /// other requests were still computing at the booking: they are cached by the time the worker
    /// starts this request.
    pub(crate) fn expected(&self) -> u32 {
        self.cached_blocks.max(self.active_blocks)
    }

    /// Returns by how many blocks a hit may fall short of the expectation before it counts as a
    /// miss of the cache.
    fn tolerance(&self) -> u32 {
        1 + self.cached_blocks / 4
    }
}

/// Conclusion from one reported hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AuditResult {
    /// The cache is as expected, apart from its capacity, which may have been adjusted.
    Consistent,
    /// The worker has lost all blocks that were released before this free epoch.
    CacheLostBefore(u64),
}

/// Recent history of a worker's reported hits.
#[derive(Debug, Default)]
pub(crate) struct HitAudit {
    /// Whether the worker has ever reported a hit. Until then a zero may mean that its responses do
    /// not report hits.
    has_reported: bool,
    /// Number of successive misses.
    successive_misses: u32,
    /// Smallest [`ExpectedHit::epoch`] among those misses. Blocks that were released later may have
    /// been cached after the loss.
    first_miss_epoch: u64,
}

impl HitAudit {
    /// Evaluates a `reported` hit against the `expected` one and adjusts the `capacity`.
    /// `survived_evictions` is the number of blocks that the estimate has evicted since it evicted
    /// the first block beyond the expectation, which the worker nevertheless found; `None` if that
    /// is not known.
    ///
    /// As long as the worker has never reported a hit, or if the hit is shorter than the blocks
    /// that other requests pinned, the result is [`AuditResult::Consistent`] and nothing is
    /// learned.
    pub(crate) fn observe(
        &mut self,
        expected: &ExpectedHit,
        reported: ReportedHit,
        survived_evictions: Option<u64>,
        capacity: &mut Capacity,
    ) -> AuditResult {
        self.has_reported |= reported.blocks > 0;
        if !self.has_reported || reported.blocks < expected.active_blocks {
            return AuditResult::Consistent;
        }
        if let Some(evictions) = survived_evictions {
            capacity.observe_hit(u64::from(capacity.blocks()) + evictions.max(1));
        }
        if expected.cached_blocks <= expected.active_blocks {
            return AuditResult::Consistent;
        }
        let found = reported.blocks.min(expected.cached_blocks);
        let missing = expected.cached_blocks - found;
        let is_miss = missing > expected.tolerance();
        if found > expected.active_blocks
            && let Some(distance) = expected.distance(found - 1)
        {
            capacity.observe_hit(distance);
        }
        if (is_miss || missing > 0 && !reported.is_estimate)
            && let Some(distance) = expected.distance(found)
        {
            capacity.observe_miss(distance);
        }
        self.count_misses(expected, is_miss)
    }

    /// Counts successive misses. Returns [`AuditResult::CacheLostBefore`] when there are enough of
    /// them to conclude that the cache was lost, and starts to count anew. A booking whose cached
    /// blocks were all released after the first miss is ignored.
    fn count_misses(&mut self, expected: &ExpectedHit, is_miss: bool) -> AuditResult {
        if self.successive_misses > 0 && expected.oldest_epoch > self.first_miss_epoch {
            // The blocks were computed again after the first miss, so this hit says nothing about
            // older blocks.
            return AuditResult::Consistent;
        }
        if !is_miss {
            self.successive_misses = 0;
            return AuditResult::Consistent;
        }
        self.first_miss_epoch = match self.successive_misses {
            0 => expected.epoch,
            _ => self.first_miss_epoch.min(expected.epoch),
        };
        self.successive_misses += 1;
        if self.successive_misses < LOST_CACHE_MISSES {
            return AuditResult::Consistent;
        }
        self.successive_misses = 0;
        AuditResult::CacheLostBefore(self.first_miss_epoch + 1)
    }
}
