//! Prefixes by how they continue each other, and by which of them the others are found.

use smallvec::SmallVec;

use crate::sequence::SequenceHash;

/// One prefix in so many is a mark: on average, so many are walked from one to what is looked for,
/// and hardly ever ten times as many. With twice as many, events are applied slower by a fifth.
const PER_MARK: u64 = if cfg!(test) { 3 } else { 8 };

/// Whether a prefix is looked up by its hash. Others are found by walking from the last mark
/// before them, or from where their sequence begins.
pub(super) fn is_mark(hash: SequenceHash) -> bool {
    hash.is_multiple_of(PER_MARK)
}

/// Prefixes of one sequence that are told of, each of which continues the one before, and the way
/// to the first of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path<'a> {
    hashes: &'a [SequenceHash],
    told_from: usize,
}

impl<'a> Path<'a> {
    /// What is told of, and before that the way: from the last mark, or from where the sequence
    /// begins.
    pub(super) fn hashes(self) -> &'a [SequenceHash] {
        self.hashes
    }

    /// Where in [those](Self::hashes) what is told of begins.
    pub(super) fn told_from(self) -> usize {
        self.told_from
    }

    /// What is told of, shortest prefix first.
    pub(crate) fn told(self) -> &'a [SequenceHash] {
        &self.hashes[self.told_from..]
    }

    /// What the first of those continues, unless it begins a sequence.
    pub(crate) fn before_told(self) -> Option<SequenceHash> {
        let before = self.told_from.checked_sub(1)?;
        self.hashes.get(before).copied()
    }

    /// The same in pieces that tell of so many at most.
    pub(crate) fn pieces(self, most: usize) -> impl DoubleEndedIterator<Item = Self> {
        (self.told_from..self.hashes.len())
            .step_by(most)
            .map(move |from| {
                let way = &self.hashes[..from];
                let start = if from == self.told_from {
                    0
                } else {
                    way.iter().rposition(|&it| is_mark(it)).unwrap_or(0)
                };
                let end = self.hashes.len().min(from.saturating_add(most));
                let (hashes, told_from) = (&self.hashes[start..end], from - start);
                Self { hashes, told_from }
            })
    }
}

/// Any number of paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// Of all, one behind the other.
    hashes: Vec<SequenceHash>,
    /// Mostly there is one.
    starts: SmallVec<[Start; 1]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start {
    start: usize,
    /// Where the part that is told of begins.
    told_from: usize,
}

impl Paths {
    /// All prefixes of a sequence, by the engine's blocks.
    #[must_use]
    pub fn whole(hashes: &[SequenceHash]) -> Self {
        let mut paths = Self::default();
        paths.push_behind(hashes, 0);
        paths
    }

    /// Adds the prefixes of a sequence but for the first `before`, which only lead there.
    pub fn push_behind(&mut self, hashes: &[SequenceHash], before: usize) {
        let before = before.min(hashes.len());
        let (way, told) = hashes.split_at(before);
        let mark = way.iter().rposition(|&it| is_mark(it));
        self.begin(&way[mark.unwrap_or(0)..]);
        self.extend(told.iter().copied());
    }

    pub(super) fn reserve(&mut self, prefixes: usize) {
        self.hashes.reserve_exact(prefixes);
    }

    /// Begins a path, with the prefixes that lead to it.
    pub(super) fn begin(&mut self, way: &[SequenceHash]) {
        let start = self.hashes.len();
        self.hashes.extend_from_slice(way);
        let told_from = self.hashes.len();
        self.starts.push(Start { start, told_from });
    }

    /// Goes on with the path that was [begun](Self::begin) last.
    pub(super) fn push(&mut self, hash: SequenceHash) {
        self.hashes.push(hash);
    }

    pub(super) fn extend(&mut self, hashes: impl Iterator<Item = SequenceHash>) {
        self.hashes.extend(hashes);
    }

    /// What the path that was begun last tells of.
    pub(super) fn last_told(&self) -> &[SequenceHash] {
        let told_from = self.starts.last().map_or(0, |it| it.told_from);
        &self.hashes[told_from..]
    }

    /// Each of the paths.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Path<'_>> {
        let ends = self.starts.iter().skip(1).map(|it| it.start);
        let ends = ends.chain(std::iter::once(self.hashes.len()));
        self.starts.iter().zip(ends).map(|(it, end)| Path {
            hashes: &self.hashes[it.start..end],
            told_from: it.told_from - it.start,
        })
    }

    /// The prefixes that are told of.
    pub fn told(&self) -> impl Iterator<Item = SequenceHash> {
        self.iter().flat_map(|it| it.told().iter().copied())
    }

    /// How many those are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iter().map(|it| it.told().len()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
