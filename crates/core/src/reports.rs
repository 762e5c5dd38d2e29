//! What a worker's responses say it took from its cache, held against what was expected.
//!
//! A block that was expected and not found was evicted early, or the cache was lost: by a
//! restart nobody saw, or because somebody told the engine to drop it. Each miss is weighed as a
//! sign of a smaller [`Capacity`]; a run of nothing but misses means that all is lost.

use smallvec::SmallVec;

use crate::capacity::Capacity;

/// Misses in a row, with no hit on anything as old, that mean the cache was lost.
const MISSES_WHEN_LOST: u32 = 4;

/// What a worker says it found of a prompt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hits {
    /// Leading blocks.
    pub(crate) blocks: u32,
    /// Our blocks are pieces of text, so that a few more or less say nothing.
    pub(crate) are_estimate: bool,
}

/// What a booking expected to be cached.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// Leading blocks expected.
    pub(crate) cached: u32,
    /// Those of them that others pinned, which no eviction takes.
    pub(crate) active: u32,
    /// The latest freeing before.
    pub(crate) made_at: u64,
    /// The freeing that the deepest of them had waited in the queue since.
    pub(crate) oldest: u64,
    /// Where the others stood in the free queue, nearest to the root first; kept while that
    /// teaches something.
    pub(crate) runs: SmallVec<[Run; 1]>,
}

/// A part of a claim that one freeing had left behind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Its first block.
    pub(crate) start: u32,
    /// Blocks in use, or freed later, when the claim was made.
    pub(crate) behind: u64,
}

impl Claim {
    /// How many blocks a worker must have to keep the block at `index` so long.
    fn distance(&self, index: u32) -> Option<u64> {
        let run = self.runs.iter().rev().find(|run| run.start <= index)?;
        Some(run.behind + u64::from(index - run.start) + 1)
    }

    /// Blocks that should be found: those that others only compute by now are there as well when
    /// they have.
    pub(crate) fn expected(&self) -> u32 {
        self.cached.max(self.active)
    }

    /// More than so many blocks short of what was expected is a miss to reckon with.
    fn tolerance(&self) -> u32 {
        1 + self.cached / 4
    }
}

/// What follows from a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing, but that the capacity may have changed.
    Kept,
    /// What was freed before this is lost.
    LostBefore(u64),
}

/// What the reports have been like.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    /// It has reported a hit. Until then its zeros mean that it does not report.
    has_reported: bool,
    /// Misses in a row, and the latest freeing before the first of them.
    misses: u32,
    since: u64,
}

impl Reports {
    /// The worker reports `hits` of what `claim` is about. `spared`: the block after those
    /// expected was evicted here, so many evicted blocks ago.
    pub(crate) fn observe(
        &mut self,
        claim: &Claim,
        hits: Hits,
        spared: Option<u64>,
        capacity: &mut Capacity,
    ) -> Verdict {
        self.has_reported |= hits.blocks > 0;
        if !self.has_reported || hits.blocks < claim.active {
            return Verdict::Kept;
        }
        if let Some(evicted_since) = spared {
            capacity.hit(u64::from(capacity.blocks()) + evicted_since.max(1));
        }
        if claim.cached <= claim.active {
            return Verdict::Kept;
        }
        let found = hits.blocks.min(claim.cached);
        let missed = claim.cached - found;
        let is_miss = missed > claim.tolerance();
        if found > claim.active
            && let Some(distance) = claim.distance(found - 1)
        {
            capacity.hit(distance);
        }
        if (is_miss || missed > 0 && !hits.are_estimate)
            && let Some(distance) = claim.distance(found)
        {
            capacity.missed(distance);
        }
        self.count(claim, is_miss)
    }

    fn count(&mut self, claim: &Claim, is_miss: bool) -> Verdict {
        if self.misses > 0 && claim.oldest > self.since {
            // Computed again since: says nothing of what is older.
            return Verdict::Kept;
        }
        if !is_miss {
            self.misses = 0;
            return Verdict::Kept;
        }
        self.since = match self.misses {
            0 => claim.made_at,
            _ => self.since.min(claim.made_at),
        };
        self.misses += 1;
        if self.misses < MISSES_WHEN_LOST {
            return Verdict::Kept;
        }
        self.misses = 0;
        Verdict::LostBefore(self.since + 1)
    }
}
