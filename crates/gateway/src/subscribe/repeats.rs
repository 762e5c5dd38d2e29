//! Stores that may be no news: blocks an engine says again that it has.
//!
//! An engine without merged blocks stores a hash once for each copy and removes it as often, so a
//! view counts. But for a request with `vllm_xargs: {"kv_cache_report_mode": "full"}` vLLM also
//! lists, in a store like any other, what the request found in its cache; no removal answers that
//! one, and a view that counts it believes in the block for ever.
//!
//! One thing tells: the list begins the sequence. A request that finds blocks cached stores
//! nothing from the beginning, so only those store a known block there that do not look: prompts
//! of exactly one block, which are expected when they are sent, and those that want logprobs of
//! the prompt. So what begins a sequence, is known and is not expected is in doubt: it counts,
//! until somebody is seen to ask for such lists; from then on it does not, and what was counted
//! in doubt is taken back.

use std::collections::HashMap;
use std::num::NonZeroU32;

use foresee_core::cache::{CacheView, Changes, StoredBlocks};
use foresee_core::sequence::{Sequence, SequenceHash};

/// Prompts of one block that are expected to be stored, at most.
const MOST_EXPECTED: usize = 1024;

/// A block that may have been listed.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    /// Its copies, if those stores were lists.
    copies: u32,
    /// How many more are counted.
    excess: u32,
}

/// The stores in doubt of one engine. Blocks that are gone are forgotten, so it is never larger
/// than the view.
#[derive(Debug)]
pub(super) struct Repeats {
    /// The router's.
    block_size: NonZeroU32,
    /// They are lists, not stores.
    are_lists: bool,
    in_doubt: HashMap<u64, Doubt>,
    /// The sum of all that is counted in excess.
    excess: u64,
    /// Prompts of exactly one block that were sent, and not seen stored yet.
    expected: HashMap<SequenceHash, u32>,
}

impl Repeats {
    pub(super) fn new(block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            are_lists: false,
            in_doubt: HashMap::new(),
            excess: 0,
            expected: HashMap::new(),
        }
    }

    /// For a view that begins anew, of an engine that is asked for the same.
    pub(super) fn anew(&self) -> Self {
        Self {
            are_lists: self.are_lists,
            ..Self::new(self.block_size)
        }
    }

    /// A prompt was sent that is one block, and will be stored whether it is cached or not.
    pub(super) fn expect(&mut self, prompt: SequenceHash) {
        if self.expected.len() < MOST_EXPECTED || self.expected.contains_key(&prompt) {
            *self.expected.entry(prompt).or_default() += 1;
        }
    }

    fn is_expected(&mut self, stored: &StoredBlocks<'_>) -> bool {
        if self.expected.is_empty() || stored.hashes.len() != 1 {
            return false;
        }
        let block = Sequence::from_tokens(stored.tokens, self.block_size, stored.salt);
        let Some(hash) = block.hashes().last() else {
            return false;
        };
        let Some(count) = self.expected.get_mut(hash) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            self.expected.remove(hash);
        }
        true
    }

    pub(super) fn are_lists(&self) -> bool {
        self.are_lists
    }

    /// Copies of blocks that are counted and are none, if stores in doubt were lists.
    pub(super) fn excess(&self) -> u64 {
        self.excess
    }

    /// Blocks came to be cached, or are listed.
    pub(super) fn store(
        &mut self,
        view: &mut CacheView,
        stored: &StoredBlocks<'_>,
    ) -> Vec<Changes> {
        let is_store = stored.parent.is_some() || self.is_expected(stored);
        if is_store {
            for name in stored.hashes {
                if let Some(doubt) = self.in_doubt.get_mut(name) {
                    doubt.copies += 1;
                }
            }
        } else if self.are_lists {
            return store_unknown(view, stored);
        } else {
            for &name in stored.hashes {
                self.doubt(name, view.copies(name));
            }
        }
        vec![view.store(stored)]
    }

    /// A block with `copies` is stored once more, or listed.
    fn doubt(&mut self, name: u64, copies: u32) {
        if copies == 0 {
            return;
        }
        let before = Doubt { copies, excess: 0 };
        let doubt = self.in_doubt.entry(name).or_insert(before);
        if doubt.copies == 0 {
            // A list has only what is cached.
            doubt.copies = 1;
        } else {
            doubt.excess += 1;
            self.excess += 1;
        }
    }

    /// Blocks were removed from the view, each once.
    pub(super) fn removed(&mut self, view: &CacheView, hashes: &[u64]) {
        for name in hashes {
            let Some(doubt) = self.in_doubt.get_mut(name) else {
                continue;
            };
            if doubt.copies > 0 {
                doubt.copies -= 1;
            } else if doubt.excess > 0 {
                doubt.excess -= 1;
                self.excess -= 1;
            }
            if view.copies(*name) == 0 || doubt.excess == 0 {
                self.excess -= u64::from(doubt.excess);
                self.in_doubt.remove(name);
            }
        }
    }

    /// The view is empty: nothing that was asked for has left a trace.
    pub(super) fn clear(&mut self) {
        self.are_lists = false;
        self.in_doubt.clear();
        self.excess = 0;
    }

    /// Somebody asks for lists: what was counted in excess is taken back, and such stores are not
    /// counted any more.
    pub(super) fn take_back(&mut self, view: &mut CacheView) -> Vec<Changes> {
        self.are_lists = true;
        self.excess = 0;
        let in_doubt = std::mem::take(&mut self.in_doubt);
        let excess = in_doubt
            .into_iter()
            .flat_map(|(name, doubt)| std::iter::repeat_n(name, doubt.excess as usize));
        excess.map(|name| view.remove(&[name])).collect()
    }
}

/// Stores those blocks that are not known, run by run. They are cached, or they were not listed,
/// so a view that missed something learns of them here.
fn store_unknown(view: &mut CacheView, stored: &StoredBlocks<'_>) -> Vec<Changes> {
    let size = stored.block_size as usize;
    let is_known: Vec<bool> = stored
        .hashes
        .iter()
        .map(|&it| view.copies(it) > 0)
        .collect();
    let mut changes = Vec::new();
    let mut begin = 0;
    for run in is_known.chunk_by(|a, b| a == b) {
        let end = begin + run.len();
        if !run[0] {
            let parent = begin.checked_sub(1).map(|before| stored.hashes[before]);
            let tokens = stored.tokens.get(begin * size..end * size);
            changes.push(view.store(&StoredBlocks {
                parent,
                hashes: &stored.hashes[begin..end],
                tokens: tokens.unwrap_or_default(),
                ..*stored
            }));
        }
        begin = end;
    }
    changes
}
