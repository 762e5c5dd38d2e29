//! The way to the block that was told of last.

use crate::cache::blocks::{Blocks, Id, NONE};
use crate::cache::paths::{Paths, is_mark};
use crate::sequence::SequenceHash;

/// The prefixes from the last mark up to the end of a block. Events that come one after the other
/// mostly go on from there, forth or back, and need not look for it block by block.
#[derive(Debug, Default)]
pub(super) struct Way {
    /// The block; [`NONE`] if it is where all sequences begin. `None` if nothing is known.
    to: Option<Id>,
    hashes: Vec<SequenceHash>,
}

impl Way {
    /// Blocks that it may pass have changed.
    pub(super) fn forget(&mut self) {
        self.to = None;
    }

    /// Begins to tell of what follows `parent`, first of `id`.
    pub(super) fn begin(&mut self, parent: Id, id: Id, blocks: &Blocks, paths: &mut Paths) {
        if self.to != Some(parent) {
            self.lead_before(id, blocks);
        }
        paths.begin(&self.hashes);
    }

    /// What has been told of since then ends with `id`.
    pub(super) fn end(&mut self, id: Id, paths: &Paths) {
        let told = paths.last_told();
        let mark = told.iter().rposition(|&it| is_mark(it));
        if mark.is_some() {
            self.hashes.clear();
        }
        self.hashes.extend_from_slice(&told[mark.unwrap_or(0)..]);
        self.to = Some(id);
    }

    /// Tells of blocks that follow each other, given from the last to the first, if there are any.
    /// Afterwards it leads to what is before them.
    pub(super) fn tell_back<I>(&mut self, backwards: I, blocks: &Blocks, paths: &mut Paths)
    where
        I: DoubleEndedIterator<Item = (Id, SequenceHash)> + ExactSizeIterator + Clone,
    {
        let ends = (backwards.clone().next(), backwards.clone().next_back());
        let (Some((last, _)), Some((first, _))) = ends else {
            return;
        };
        match self.hashes.len().checked_sub(backwards.len()) {
            Some(left @ 1..) if self.to == Some(last) => {
                self.hashes.truncate(left);
                self.to = blocks.parent(first);
            }
            _ => self.lead_before(first, blocks),
        }
        paths.begin(&self.hashes);
        paths.extend(backwards.rev().map(|(_, hash)| hash));
    }

    fn lead_before(&mut self, id: Id, blocks: &Blocks) {
        self.hashes.clear();
        blocks.write_before(id, &mut self.hashes);
        self.hashes.reverse();
        let begins = self.hashes.is_empty();
        self.to = blocks.parent(id).or(begins.then_some(NONE));
    }
}
