//! Deltas of a cache: runs of prefixes, and the anchors by which the index finds them.

use smallvec::SmallVec;

use crate::sequence::SequenceHash;

/// Average distance between anchors, in blocks. A walk from an anchor to a block has this length on
/// average, and hardly ever ten times as much. A larger interval takes less memory. At 16 instead
/// of 8, applying events became noticeably slower.
const ANCHOR_INTERVAL: u64 = if cfg!(test) { 3 } else { 8 };

/// Returns whether the index looks up a block by this hash. Other blocks are found by walking from
/// the last anchor before them, or from the start of their sequence.
pub(super) fn is_anchor(hash: SequenceHash) -> bool {
    hash.is_multiple_of(ANCHOR_INTERVAL)
}

/// Consecutive block hashes of one sequence. `hashes[changed_from..]` are the blocks that were
/// stored or removed. `hashes[..changed_from]` is the *lead-in*: unchanged blocks from the last
/// anchor before them, or from the start of the sequence. The index needs it to locate the change,
/// because it looks up anchors only.
#[derive(Clone, Copy, Debug)]
pub struct PrefixRun<'a> {
    /// Lead-in and changed blocks, shortest prefix first.
    hashes: &'a [SequenceHash],
    /// Length of the lead-in.
    changed_from: usize,
}

impl<'a> PrefixRun<'a> {
    /// Returns the lead-in, followed by the changed blocks.
    pub(super) fn hashes(self) -> &'a [SequenceHash] {
        self.hashes
    }

    /// Returns the index of the first changed block in [`hashes`](Self::hashes).
    pub(super) fn changed_from(self) -> usize {
        self.changed_from
    }

    /// Returns the changed blocks, shortest prefix first.
    pub fn changed(self) -> &'a [SequenceHash] {
        &self.hashes[self.changed_from..]
    }

    /// Returns the block before the first changed one; `None` if the run starts a sequence.
    pub fn parent_of_changed(self) -> Option<SequenceHash> {
        let before = self.changed_from.checked_sub(1)?;
        self.hashes.get(before).copied()
    }

    /// Splits the run into runs of at most `max_len` changed blocks, each with a lead-in of its
    /// own. `max_len` must not be 0. The lead-in of a later chunk may contain changed blocks of
    /// earlier ones: apply stored chunks from first to last, removed chunks from last to first.
    pub fn chunks(self, max_len: usize) -> impl DoubleEndedIterator<Item = Self> {
        (self.changed_from..self.hashes.len())
            .step_by(max_len)
            .map(move |from| {
                let before = &self.hashes[..from];
                let start = if from == self.changed_from {
                    0
                } else {
                    before
                        .iter()
                        .rposition(|&hash| is_anchor(hash))
                        .unwrap_or(0)
                };
                let end = self.hashes.len().min(from.saturating_add(max_len));
                let (hashes, changed_from) = (&self.hashes[start..end], from - start);
                Self {
                    hashes,
                    changed_from,
                }
            })
    }
}

/// Runs of changed prefixes. The prefixes of one run continue each other, and follow a lead-in of
/// unchanged ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixRuns {
    /// Hashes of all runs, one after the other.
    hashes: Vec<SequenceHash>,
    /// Start of each run in `hashes`. Most deltas have one run.
    starts: SmallVec<[RunStart; 1]>,
}

/// Place of one run in [`PrefixRuns::hashes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RunStart {
    /// Index of the first hash of the lead-in.
    start: usize,
    /// Index of the first changed hash.
    changed_from: usize,
}

impl PrefixRuns {
    /// Returns one run with all prefixes of a sequence. `hashes` are the sequence hashes at the
    /// ends of engine blocks.
    #[must_use]
    pub fn from_sequence(hashes: &[SequenceHash]) -> Self {
        let mut runs = Self::default();
        runs.push_suffix(hashes, 0);
        runs
    }

    /// Adds a run with the prefixes of a sequence, except the first `prefix_len`, of which a part
    /// becomes the lead-in. The run has no changed prefix if `prefix_len` is the length of `hashes`
    /// or more.
    pub fn push_suffix(&mut self, hashes: &[SequenceHash], prefix_len: usize) {
        let prefix_len = prefix_len.min(hashes.len());
        let (prefix, suffix) = hashes.split_at(prefix_len);
        let anchor = prefix.iter().rposition(|&hash| is_anchor(hash));
        self.start_run(&prefix[anchor.unwrap_or(0)..]);
        self.extend(suffix.iter().copied());
    }

    /// Reserves memory for exactly `prefixes` more hashes.
    pub(super) fn reserve(&mut self, prefixes: usize) {
        self.hashes.reserve_exact(prefixes);
    }

    /// Starts a run with the given lead-in.
    pub(super) fn start_run(&mut self, lead_in: &[SequenceHash]) {
        let start = self.hashes.len();
        self.hashes.extend_from_slice(lead_in);
        let changed_from = self.hashes.len();
        self.starts.push(RunStart {
            start,
            changed_from,
        });
    }

    /// Adds a changed block to the current run, the last one that was [started](Self::start_run).
    pub(super) fn push(&mut self, hash: SequenceHash) {
        self.hashes.push(hash);
    }

    /// Adds changed blocks to the current run.
    pub(super) fn extend(&mut self, hashes: impl Iterator<Item = SequenceHash>) {
        self.hashes.extend(hashes);
    }

    /// Returns the changed blocks of the current run.
    pub(super) fn current_run(&self) -> &[SequenceHash] {
        let changed_from = self.starts.last().map_or(0, |run| run.changed_from);
        &self.hashes[changed_from..]
    }

    /// Returns all runs, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = PrefixRun<'_>> {
        let ends = self.starts.iter().skip(1).map(|run| run.start);
        let ends = ends.chain(std::iter::once(self.hashes.len()));
        self.starts.iter().zip(ends).map(|(run, end)| PrefixRun {
            hashes: &self.hashes[run.start..end],
            changed_from: run.changed_from - run.start,
        })
    }

    /// Returns the changed prefixes of all runs.
    pub fn changed(&self) -> impl Iterator<Item = SequenceHash> {
        self.iter().flat_map(|run| run.changed().iter().copied())
    }

    /// Returns the number of changed prefixes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iter().map(|run| run.changed().len()).sum()
    }

    /// Returns whether no prefix changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
