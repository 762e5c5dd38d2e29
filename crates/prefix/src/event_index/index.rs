//! The router side of the event index: which workers cache which prefix.

use smallvec::SmallVec;

use crate::active_tree::{PrefixMatch, WorkerIndex};
use crate::counter::Counter;
use crate::event_index::CacheDelta;
use crate::event_index::anchors::AnchorTable;
use crate::event_index::delta::{PrefixRun, is_anchor};
use crate::event_index::runs::{BlockPosition, RunId, Runs};
use crate::sequence::SequenceHash;

/// Index of which workers cache which prefix.
///
/// Consecutive prefixes are stored as the blocks of a run. A table gives the positions of
/// *anchors*; other blocks are found by walking from an anchor. The deepest block of a prompt that
/// any worker caches is found by bisection over its anchors. From there back to its start, the
/// prompt follows a few runs. Each worker caches leading blocks of every run that it has, so its
/// prefix match ends in the last of these runs that it caches.
#[derive(Debug, Default)]
pub struct EventIndex {
    /// One table per engine block ratio. Most fleets have one.
    by_ratio: SmallVec<[RatioIndex; 1]>,
    /// Number of workers whose lost blocks are being removed: see
    /// [`lose_worker`](Self::lose_worker).
    removals: u32,
}

/// Maximum number of runs that one call of [`EventIndex::remove_lost`] visits.
const MAX_RUNS_PER_REMOVAL: usize = if cfg!(test) { 1 } else { 256 };
/// Number of blocks after which one call of [`EventIndex::remove_lost`] visits no further run.
const MAX_BLOCKS_PER_REMOVAL: usize = 512;

/// How far the lost blocks of a worker are removed from the index.
#[derive(Clone, Copy, Debug, Default)]
pub struct RemovalCursor {
    /// Tables with a smaller engine block ratio are done.
    engine_block_ratio: u32,
    /// Runs with a smaller id are done in the table with that ratio.
    run: RunId,
}

/// Result of one step of the removal of a worker's lost blocks.
#[derive(Debug)]
pub enum RemovalStep {
    /// Blocks may be left. The next step continues here.
    Continue(RemovalCursor),
    /// No blocks are left. The tables that have become empty are to be dropped without the lock,
    /// because they are large.
    Done(UnusedTables),
}

/// Tables of an index that contain no block any more.
#[derive(Debug)]
pub struct UnusedTables(#[expect(dead_code, reason = "only dropped")] Vec<RatioIndex>);

/// Index of all engines with one block size.
#[derive(Debug)]
struct RatioIndex {
    /// Engine block size ÷ router block size.
    engine_block_ratio: u32,
    /// Positions of the blocks that are anchors or the first of a run.
    anchors: AnchorTable,
    /// All blocks that some worker caches.
    runs: Runs,
}

impl EventIndex {
    /// Applies the delta of one worker, removals first, and updates `cached_blocks`, the running
    /// number of router blocks that the worker caches. Worker indices must be dense from 0. A delta
    /// with an engine block ratio of 0 has no effect.
    pub fn update(&mut self, worker: WorkerIndex, delta: &CacheDelta, cached_blocks: &mut u64) {
        for run in delta.removed.iter() {
            self.remove(worker, delta.engine_block_ratio, run, cached_blocks);
        }
        for run in delta.stored.iter() {
            self.add(worker, delta.engine_block_ratio, run, cached_blocks);
        }
    }

    /// Removes the changed blocks of `run` from what `worker` caches, and with each of them all
    /// later blocks of the same stored run. Subtracts them from `cached_blocks`, in router blocks.
    /// Ignores blocks that the worker does not cache, and an engine block ratio without any blocks.
    pub(crate) fn remove(
        &mut self,
        worker: WorkerIndex,
        engine_block_ratio: u32,
        run: PrefixRun<'_>,
        cached_blocks: &mut u64,
    ) {
        if let Some(table) = self
            .by_ratio
            .iter_mut()
            .find(|table| table.engine_block_ratio == engine_block_ratio)
        {
            cached_blocks.subtract(table.remove(worker, run) * u64::from(engine_block_ratio));
        }
    }

    /// Records that `worker` caches the changed blocks of `run`. Adds the number of blocks that the
    /// worker did not cache before to `cached_blocks`, in router blocks. The hashes of `run` are
    /// those of engine blocks, each of `engine_block_ratio` router blocks.
    ///
    /// Adds nothing, without an error, if the worker does not cache the lead-in. Adds only some of
    /// the blocks when the maximum number of runs is reached.
    pub(crate) fn add(
        &mut self,
        worker: WorkerIndex,
        engine_block_ratio: u32,
        run: PrefixRun<'_>,
        cached_blocks: &mut u64,
    ) {
        if engine_block_ratio == 0 || run.changed().is_empty() {
            return;
        }
        let known = self
            .by_ratio
            .iter()
            .position(|table| table.engine_block_ratio == engine_block_ratio);
        let index = known.unwrap_or_else(|| {
            self.by_ratio.push(RatioIndex::new(engine_block_ratio));
            self.by_ratio.len() - 1
        });
        *cached_blocks += self.by_ratio[index].add(worker, run) * u64::from(engine_block_ratio);
    }

    /// Removes a worker from the index. Visits every run. The caller resets its own count of the
    /// worker's cached blocks.
    pub fn remove_worker(&mut self, worker: WorkerIndex) {
        let mut cursor = self.lose_worker(worker);
        while let RemovalStep::Continue(next) = self.remove_lost(worker, cursor) {
            cursor = next;
        }
    }

    /// Makes a worker lose all its blocks at once: none of them matches any more. The caller resets
    /// its own count of the worker's cached blocks, and removes the lost blocks from the index with
    /// [`remove_lost`](Self::remove_lost), beginning at the returned cursor. Meanwhile the worker
    /// may store blocks again.
    pub(crate) fn lose_worker(&mut self, worker: WorkerIndex) -> RemovalCursor {
        for table in &mut self.by_ratio {
            table.runs.lose_worker(worker);
        }
        self.removals += 1;
        RemovalCursor::default()
    }

    /// Removes a part of the blocks that a worker has [lost](Self::lose_worker). One call visits at
    /// most [`MAX_RUNS_PER_REMOVAL`] runs, and so takes part of a critical section.
    pub(crate) fn remove_lost(
        &mut self,
        worker: WorkerIndex,
        cursor: RemovalCursor,
    ) -> RemovalStep {
        let remaining_tables = self
            .by_ratio
            .iter_mut()
            .filter(|table| table.engine_block_ratio >= cursor.engine_block_ratio);
        if let Some(table) = remaining_tables.min_by_key(|table| table.engine_block_ratio) {
            let engine_block_ratio = table.engine_block_ratio;
            let from = match engine_block_ratio == cursor.engine_block_ratio {
                true => cursor.run,
                false => 0,
            };
            let next = match table.remove_lost(worker, from) {
                Some(run) => RemovalCursor {
                    engine_block_ratio,
                    run,
                },
                None => RemovalCursor {
                    engine_block_ratio: engine_block_ratio.saturating_add(1),
                    run: 0,
                },
            };
            return RemovalStep::Continue(next);
        }
        self.removals.subtract(1);
        let tables = std::mem::take(&mut self.by_ratio).into_iter();
        let (used, unused): (Vec<_>, Vec<_>) = tables.partition(|table| table.runs.len() > 0);
        self.by_ratio = used.into();
        RemovalStep::Done(UnusedTables(unused))
    }

    /// Returns the number of prefixes that some worker caches, in engine blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_ratio.iter().map(|table| table.runs.len()).sum()
    }

    /// Returns whether no worker caches any prefix.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raises `cached_blocks` of every worker that caches a prefix of `chain`, in router blocks; a
    /// value that is larger already stays. `prefix_matches` is indexed by worker. Returns the
    /// largest number of router blocks that any worker caches, those beyond the end of
    /// `prefix_matches` included.
    pub fn match_prefix(&self, chain: &[SequenceHash], prefix_matches: &mut [PrefixMatch]) -> u32 {
        let has_lost_blocks = self.removals > 0;
        let deepest = self
            .by_ratio
            .iter()
            .map(|table| table.match_prefix(chain, prefix_matches, has_lost_blocks));
        deepest.max().unwrap_or(0)
    }
}

/// Part of a run that a prompt follows.
struct MatchedRun {
    /// Id of the run.
    run: RunId,
    /// First block of the run, in engine blocks from the start of the prompt.
    start: usize,
    /// End (exclusive) of the part that prompt and run have in common, in engine blocks.
    end: usize,
}

impl RatioIndex {
    /// Returns an empty index for engines with this block ratio.
    fn new(engine_block_ratio: u32) -> Self {
        Self {
            engine_block_ratio,
            anchors: AnchorTable::new(),
            runs: Runs::default(),
        }
    }

    /// Adds the changed blocks of `run` to what `worker` caches. Returns how many of them it did
    /// not cache before. Adds nothing if the worker does not cache the lead-in, and stops when the
    /// maximum number of runs is reached.
    fn add(&mut self, worker: WorkerIndex, run: PrefixRun<'_>) -> u64 {
        let (lead_in, mut changed) = run.hashes().split_at(run.changed_from());
        for &hash in changed.iter().filter(|&&hash| is_anchor(hash)) {
            self.anchors.prefetch(hash);
        }
        let mut last = self.last_cached(worker, lead_in);
        if last.is_none() && !lead_in.is_empty() {
            return 0;
        }
        let mut added = 0;
        while let Some(&first) = changed.first() {
            let (position, blocks) = if let Some(position) = self.next(last, first) {
                let blocks = common_prefix(self.runs.tail_at(position), changed);
                added += self.runs.extend_holder(position, blocks, worker);
                (position, blocks)
            } else if let Some((position, blocks)) = self.runs.append(last, changed, worker) {
                for (index, &hash) in changed[..blocks].iter().enumerate() {
                    if is_anchored(position.plus(index), hash) {
                        self.anchors.insert(hash, position.plus(index));
                    }
                }
                added += blocks;
                (position, blocks)
            } else {
                break;
            };
            last = Some(position.plus(blocks - 1));
            changed = &changed[blocks..];
        }
        added as u64
    }

    /// Returns the position of the last of `hashes`, which begin with an anchor or at the start of
    /// a sequence. `None` if `worker` does not cache that block, or if `hashes` is empty.
    fn last_cached(&self, worker: WorkerIndex, hashes: &[SequenceHash]) -> Option<BlockPosition> {
        let (mut rest, mut last) = (hashes, None);
        while let Some(&hash) = rest.first() {
            let cached = self.cached_from(hash, worker);
            let blocks = cached.map_or(1, |(_, cached)| common_prefix(cached, rest));
            last = cached.map(|(position, _)| position.plus(blocks - 1));
            rest = &rest[blocks..];
        }
        last
    }

    /// Returns the position of a block in the table of anchors that `worker` caches, and the blocks
    /// that it caches of the run from there on. `None` if the worker does not cache the block or
    /// the table does not contain it.
    fn cached_from(
        &self,
        hash: SequenceHash,
        worker: WorkerIndex,
    ) -> Option<(BlockPosition, &[SequenceHash])> {
        let cached = |position| self.runs.cached_from(position, worker);
        let position = self
            .anchors
            .find(hash, |position| !cached(position).is_empty())?;
        Some((position, cached(position)))
    }

    /// Returns the position of the block `hash` that follows the block `last`, or that starts a
    /// sequence if `last` is `None`. `None` if no worker caches such a block.
    fn next(&self, last: Option<BlockPosition>, hash: SequenceHash) -> Option<BlockPosition> {
        if let Some(last) = last
            && self.runs.tail_at(last).get(1) == Some(&hash)
        {
            return Some(last.plus(1));
        }
        let continues = |position: BlockPosition| self.runs.get(position.run()).parent() == last;
        let is_next = |position: BlockPosition| position.block() == 0 && continues(position);
        self.anchors.find(hash, is_next)
    }

    /// Removes the changed blocks of `run` from what `worker` caches, and with each of them all
    /// later blocks of the same stored run. Returns the number of blocks removed.
    fn remove(&mut self, worker: WorkerIndex, run: PrefixRun<'_>) -> u64 {
        let (hashes, changed_from) = (run.hashes(), run.changed_from());
        let (mut removed, mut index) = (0, 0);
        while let Some(&hash) = hashes.get(index) {
            let Some((position, cached)) = self.cached_from(hash, worker) else {
                index += 1;
                continue;
            };
            let blocks = common_prefix(cached, &hashes[index..]);
            if index + blocks > changed_from {
                removed +=
                    self.remove_from(position.plus(changed_from.saturating_sub(index)), worker);
            }
            index += blocks;
        }
        removed
    }

    /// Removes the block at `position`, and all blocks after it in its run, from what `worker`
    /// caches, and forgets blocks that no worker caches any longer. Returns how many blocks the
    /// worker lost.
    fn remove_from(&mut self, position: BlockPosition, worker: WorkerIndex) -> u64 {
        let (lost, left) = self.runs.truncate_holder(position, worker);
        self.forget_blocks(position.run(), left);
        lost as u64
    }

    /// Removes a worker that has lost its blocks from the runs with ids from `from` on, and forgets
    /// blocks that no worker caches any longer. Returns the id at which to continue; `None` if
    /// there is no further run.
    fn remove_lost(&mut self, worker: WorkerIndex, from: RunId) -> Option<RunId> {
        let end = self.runs.ids().end;
        let stop = end.min(from.saturating_add(MAX_RUNS_PER_REMOVAL as RunId));
        let mut forgotten_blocks = 0;
        for run in from..stop {
            if self.runs.remove_lost(run, worker) {
                forgotten_blocks += self.forget_blocks(run, self.runs.max_cached(run));
            }
            if forgotten_blocks >= MAX_BLOCKS_PER_REMOVAL {
                return Some(run + 1);
            }
        }
        (stop < end).then_some(stop)
    }

    /// Removes all blocks of a run except the first `left`, which must include every block that a
    /// worker caches. Returns the number of removed blocks.
    fn forget_blocks(&mut self, run: RunId, left: usize) -> usize {
        let unused = self.runs.tail(run, left);
        let count = unused.len();
        for &hash in unused.iter().filter(|&&hash| is_anchor(hash)) {
            self.anchors.prefetch(hash);
        }
        for (block, &hash) in (left..).zip(unused) {
            let position = BlockPosition::new(run, block);
            if is_anchored(position, hash) {
                self.anchors.remove(hash, position);
            }
        }
        self.runs.truncate(run, left);
        count
    }

    /// Raises `cached_blocks` of every worker that caches a prefix of `chain`. Returns the largest
    /// number of router blocks that any worker caches. `has_lost_blocks` is whether some holders of
    /// runs may have lost their blocks.
    fn match_prefix(
        &self,
        chain: &[SequenceHash],
        prefix_matches: &mut [PrefixMatch],
        has_lost_blocks: bool,
    ) -> u32 {
        let matched_runs = self.matched_runs(chain, has_lost_blocks);
        let mut deeper_holders = 0;
        let mut deepest = 0;
        for matched in &matched_runs {
            let holders = self.runs.get(matched.run).holders();
            // Every worker that caches a deeper run also caches this one. Equally many holders are
            // therefore the same workers, unless the lost blocks of a worker are partly removed.
            if holders.len() == deeper_holders && !has_lost_blocks {
                continue;
            }
            deeper_holders = holders.len();
            let (start, end) = (matched.start as u32, matched.end as u32);
            for holder in holders {
                if has_lost_blocks && !self.runs.is_current(holder) {
                    continue;
                }
                let blocks = end.min(start + u32::from(holder.blocks));
                deepest = deepest.max(blocks);
                if let Some(prefix_match) = prefix_matches.get_mut(holder.worker as usize) {
                    prefix_match.cached_blocks = prefix_match
                        .cached_blocks
                        .max(blocks * self.engine_block_ratio);
                }
            }
        }
        deepest * self.engine_block_ratio
    }

    /// Returns the runs that the prompt follows, from the deepest block that any worker caches back
    /// to its start. Empty if no worker caches the first block.
    /// `has_lost_blocks` is whether some holders of runs may have lost their blocks.
    fn matched_runs(
        &self,
        chain: &[SequenceHash],
        has_lost_blocks: bool,
    ) -> SmallVec<[MatchedRun; 8]> {
        let mut matched = SmallVec::new();
        let blocks = chain.len() / self.engine_block_ratio as usize;
        let mut deepest = self.deepest_cached(chain, blocks, has_lost_blocks);
        while let Some((mut last, mut position)) = deepest {
            matched.clear();
            let start = loop {
                let start = last.saturating_sub(position.block());
                let (run, end) = (position.run(), last + 1);
                matched.push(MatchedRun { run, start, end });
                if start == 0 {
                    return matched;
                }
                last = start - 1;
                let expected = self.block_hash(chain, last);
                match self.runs.get(run).parent() {
                    Some(parent) if self.runs.tail_at(parent).first() == Some(&expected) => {
                        position = parent;
                    }
                    _ => break start,
                }
            };
            // A worker removed a block and has not yet removed the blocks after it. Only the prompt
            // up to that block can match.
            deepest = self.deepest_cached(chain, start, has_lost_blocks);
        }
        matched
    }

    /// Returns the last of the first `blocks` engine blocks of a prompt that any worker caches: its
    /// number in the prompt, from 0, and its position. `None` if no block is found. Blocks before
    /// the returned one may be missing: the caller must check them.
    fn deepest_cached(
        &self,
        chain: &[SequenceHash],
        blocks: usize,
        has_lost_blocks: bool,
    ) -> Option<(usize, BlockPosition)> {
        // A block that was lost and stored again may have two positions.
        let is_cached = |position: BlockPosition| !has_lost_blocks || self.runs.is_cached(position);
        let mut deepest = None;
        // The last anchor that any worker caches lies in this range.
        let (mut low, mut high) = (0, blocks);
        // The first guesses are the ends: often a worker caches all of the prompt, or no worker any
        // of it.
        let mut guess = blocks.checked_sub(1)?;
        while low < high {
            let mut candidates = (low..=guess).rev();
            let anchor =
                candidates.find(|&block| block == 0 || is_anchor(self.block_hash(chain, block)));
            let found = anchor.map(|block| {
                (
                    block,
                    self.anchors.find(self.block_hash(chain, block), is_cached),
                )
            });
            match found {
                Some((anchor, None)) => high = anchor,
                Some((anchor, Some(position))) => {
                    deepest = Some((anchor, position));
                    low = guess + 1;
                }
                None => low = guess + 1,
            }
            guess = match deepest {
                None if guess == blocks - 1 => 0,
                _ => low.midpoint(high),
            };
        }
        let (mut last, mut position) = deepest?;
        while last + 1 < blocks {
            let next = self.block_hash(chain, last + 1);
            let Some(next) = self.next(Some(position), next) else {
                break;
            };
            (last, position) = (last + 1, next);
        }
        Some((last, position))
    }

    /// Returns the sequence hash at the end of an engine block of a prompt.
    fn block_hash(&self, chain: &[SequenceHash], block: usize) -> SequenceHash {
        chain[(block + 1) * self.engine_block_ratio as usize - 1]
    }
}

/// Returns the number of leading hashes that are equal.
fn common_prefix(a: &[SequenceHash], b: &[SequenceHash]) -> usize {
    let pairs = a.iter().zip(b);
    pairs.take_while(|(x, y)| x == y).count()
}

/// Returns whether the table of anchors contains the block.
fn is_anchored(position: BlockPosition, hash: SequenceHash) -> bool {
    position.block() == 0 || is_anchor(hash)
}

#[cfg(test)]
mod tests;
