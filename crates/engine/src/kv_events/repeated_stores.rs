//! Stores of blocks that the view already contains: second copies, or listings in full report mode.
//!
//! An engine that does not merge equal blocks stores a hash once for each physical copy and removes
//! it as often, so a view counts the copies. But for a request with
//! `vllm_xargs: {"kv_cache_report_mode": "full"}`, vLLM also *lists* the blocks that the request
//! found in its cache, in a store event like any other. No removal corresponds to a listing, so a
//! view that counts it keeps the block forever.
//!
//! A listing begins at the start of a sequence. A request that finds blocks cached does not store the
//! first block, so a known first block is stored again only by prompts that do not look it up:
//! prompts of exactly one block, which [`RepeatedStores::expect`] announces when they are sent, and
//! prompts with logprobs. Hence a store of a known first block that is not expected is *uncertain*.
//! Uncertain stores count until a request is seen to ask for listings. From then on they are ignored,
//! and the uncertain ones that were counted are undone.

use std::collections::HashMap;
use std::num::NonZeroU32;

use foresee_core::event_index::{CacheDelta, CacheView, StoredBlocks};
use foresee_core::sequence::{Sequence, SequenceHash};

/// Maximum number of prompts of one block that are expected to be stored.
const MAX_EXPECTED_PROMPTS: usize = 1024;

/// A block with uncertain stores.
#[derive(Clone, Copy, Debug)]
struct UncertainBlock {
    /// Number of copies if the uncertain stores were listings.
    stores: u32,
    /// Number of uncertain stores that the view counts in addition.
    excess: u32,
}

/// The uncertain stores of one engine. Blocks that leave the view are removed, so it is never larger
/// than the view.
#[derive(Debug)]
pub(super) struct RepeatedStores {
    /// The router's block size.
    block_size: NonZeroU32,
    /// Whether uncertain stores are listings: the engine is in full report mode.
    is_full_report: bool,
    /// Blocks with uncertain stores, by engine hash.
    uncertain: HashMap<u64, UncertainBlock>,
    /// Sum of `excess` over all uncertain blocks.
    excess: u64,
    /// Prompts of exactly one block that were sent and whose store has not arrived, with their
    /// number.
    expected: HashMap<SequenceHash, u32>,
}

impl RepeatedStores {
    /// Creates the state for an engine with an empty cache. `block_size` is the router's.
    pub(super) fn new(block_size: NonZeroU32) -> Self {
        Self {
            block_size,
            is_full_report: false,
            uncertain: HashMap::new(),
            excess: 0,
            expected: HashMap::new(),
        }
    }

    /// Returns the state for an empty view of the same engine: keeps only the full report mode,
    /// because requests ask for listings as before.
    pub(super) fn for_new_process(&self) -> Self {
        Self {
            is_full_report: self.is_full_report,
            ..Self::new(self.block_size)
        }
    }

    /// Announces a prompt of exactly one block that was sent. The engine will store it whether it is
    /// cached or not.
    pub(super) fn expect(&mut self, prompt: SequenceHash) {
        if self.expected.len() < MAX_EXPECTED_PROMPTS || self.expected.contains_key(&prompt) {
            *self.expected.entry(prompt).or_default() += 1;
        }
    }

    /// Takes the announcement that `stored` fulfils. Returns whether there was one. A store of more
    /// than one block fulfils none.
    fn take_expected(&mut self, stored: &StoredBlocks<'_>) -> bool {
        if self.expected.is_empty() || stored.engine_hashes.len() != 1 {
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

    /// Returns whether uncertain stores are ignored as listings.
    pub(super) fn is_full_report(&self) -> bool {
        self.is_full_report
    }

    /// Returns the number of stores that the view counts in excess if uncertain stores were listings.
    pub(super) fn excess(&self) -> u64 {
        self.excess
    }

    /// Applies a store event to `view` and returns the changes. In full report mode, only the
    /// unknown blocks of an uncertain store are applied. The changes can be empty.
    pub(super) fn store(
        &mut self,
        view: &mut CacheView,
        stored: &StoredBlocks<'_>,
    ) -> Vec<CacheDelta> {
        let is_certain = stored.parent.is_some() || self.take_expected(stored);
        if is_certain {
            for engine_hash in stored.engine_hashes {
                if let Some(block) = self.uncertain.get_mut(engine_hash) {
                    block.stores += 1;
                }
            }
        } else if self.is_full_report {
            return store_unknown(view, stored);
        } else {
            for &engine_hash in stored.engine_hashes {
                self.note_uncertain(engine_hash, view.store_count(engine_hash));
            }
        }
        vec![view.store(stored)]
    }

    /// Records an uncertain store of a block that has `copies` copies so far. Has no effect for a
    /// block without a copy: the store is its first.
    fn note_uncertain(&mut self, engine_hash: u64, copies: u32) {
        if copies == 0 {
            return;
        }
        let initial = UncertainBlock {
            stores: copies,
            excess: 0,
        };
        let block = self.uncertain.entry(engine_hash).or_insert(initial);
        if block.stores == 0 {
            // A listing contains only cached blocks, so there is at least one copy.
            block.stores = 1;
        } else {
            block.excess += 1;
            self.excess += 1;
        }
    }

    /// Records that one copy of each block in `engine_hashes` was removed from `view`. Called after
    /// the removal. Blocks without uncertain stores are ignored.
    pub(super) fn removed(&mut self, view: &CacheView, engine_hashes: &[u64]) {
        for engine_hash in engine_hashes {
            let Some(block) = self.uncertain.get_mut(engine_hash) else {
                continue;
            };
            if block.stores > 0 {
                block.stores -= 1;
            } else if block.excess > 0 {
                block.excess -= 1;
                self.excess -= 1;
            }
            if view.store_count(*engine_hash) == 0 || block.excess == 0 {
                self.excess -= u64::from(block.excess);
                self.uncertain.remove(engine_hash);
            }
        }
    }

    /// Forgets all uncertain stores and the full report mode, because the view was emptied: earlier
    /// listings have no effect any more.
    pub(super) fn clear(&mut self) {
        self.is_full_report = false;
        self.uncertain.clear();
        self.excess = 0;
    }

    /// Enters full report mode: removes the excess stores from `view`, returns the changes, and
    /// ignores uncertain stores from now on.
    pub(super) fn undo(&mut self, view: &mut CacheView) -> Vec<CacheDelta> {
        self.is_full_report = true;
        self.excess = 0;
        let uncertain = std::mem::take(&mut self.uncertain);
        let excess = uncertain.into_iter().flat_map(|(engine_hash, block)| {
            std::iter::repeat_n(engine_hash, block.excess as usize)
        });
        excess
            .map(|engine_hash| view.remove(&[engine_hash]))
            .collect()
    }
}

/// Stores the blocks of a listing that `view` does not contain, run by run, and returns the changes.
/// A listed block is cached, so a view that missed its store learns of it here.
fn store_unknown(view: &mut CacheView, stored: &StoredBlocks<'_>) -> Vec<CacheDelta> {
    let block_size = stored.block_size as usize;
    let is_known: Vec<bool> = stored
        .engine_hashes
        .iter()
        .map(|&engine_hash| view.store_count(engine_hash) > 0)
        .collect();
    let mut changes = Vec::new();
    let mut start = 0;
    for run in is_known.chunk_by(|a, b| a == b) {
        let end = start + run.len();
        if !run[0] {
            let parent = start
                .checked_sub(1)
                .map(|before| stored.engine_hashes[before]);
            let tokens = stored.tokens.get(start * block_size..end * block_size);
            changes.push(view.store(&StoredBlocks {
                parent,
                engine_hashes: &stored.engine_hashes[start..end],
                tokens: tokens.unwrap_or_default(),
                ..*stored
            }));
        }
        start = end;
    }
    changes
}
