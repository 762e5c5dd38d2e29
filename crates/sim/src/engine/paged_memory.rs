//! KV memory of an engine: a pool of blocks that requests share by the content of their prefixes.

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use foresee_core::sequence::SequenceHash;

use super::EngineConfig;
use super::scheduler::KvMemory;
use crate::block_pool::{Allocated, BlockId, BlockPool};
use crate::prompt::mix;

/// A change of the prefix cache, as engines publish it.
///
/// Blocks with equal content are not merged, so a hash can be stored several times. It is no longer
/// cached when it has been removed as many times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks of a request were added to the cache.
    Stored {
        /// Id of the request.
        request: u64,
        /// Indices of the blocks in [`EngineRequest::hashes`](super::EngineRequest::hashes).
        blocks: Range<usize>,
    },
    /// A block was removed from the cache.
    Removed {
        /// Hash of the block.
        hash: SequenceHash,
    },
}

/// KV memory with a prefix cache.
#[derive(Debug)]
pub(crate) struct PagedMemory {
    /// All blocks of the engine.
    pub(super) pool: BlockPool,
    /// Tokens per block.
    block_size: NonZeroU32,
    /// Whether requests reuse the cached blocks of equal prefixes.
    prefix_caching: bool,
    /// Changes of the cache that were not taken yet; `None` if they are not recorded.
    cache_events: Option<Vec<CacheEvent>>,
}

/// Blocks of one request.
#[derive(Debug)]
pub(crate) struct PagedBlocks {
    /// Sequence hashes of the full blocks of prompt and output, as far as their content is known.
    pub(crate) hashes: Arc<[SequenceHash]>,
    /// Allocated blocks, in the order of the request's tokens.
    pub(crate) ids: Vec<BlockId>,
    /// Number of leading blocks that are in the cache under the request's hashes.
    stored: usize,
}

impl PagedBlocks {
    /// Returns the blocks of a request that has just arrived: none.
    pub(super) fn new(hashes: Arc<[SequenceHash]>) -> Self {
        Self {
            hashes,
            ids: Vec::new(),
            stored: 0,
        }
    }
}

impl PagedMemory {
    /// Creates an empty memory.
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self {
            pool: BlockPool::new(config.blocks),
            block_size: config.block_size,
            prefix_caching: config.prefix_caching,
            cache_events: config.cache_events.then(Vec::new),
        }
    }

    /// Returns the changes of the prefix cache since the last call, in order. Empty if they are not
    /// recorded.
    pub(super) fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.cache_events
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Returns how many of the `tokens` tokens of a sequence with these hashes are cached. At least
    /// one token is left to compute. 0 without prefix caching.
    pub(super) fn cached_tokens_of(&self, hashes: &[SequenceHash], tokens: u32) -> u32 {
        if !self.prefix_caching {
            return 0;
        }
        let reusable = tokens.saturating_sub(1) / self.block_size;
        let hashes = &hashes[..hashes.len().min(reusable as usize)];
        // The end of a sequence is evicted first, so all blocks before a cached one are cached.
        let cached = hashes.partition_point(|&hash| self.pool.find(hash).is_some());
        cached as u32 * self.block_size.get()
    }

    /// Returns the number of blocks for `tokens` tokens.
    pub(super) fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_size.get())
    }

    /// Adds the blocks that the first `tokens` tokens of request `id` fill to the cache. Blocks of
    /// unknown content are cached too, under keys that no other request finds.
    fn store_full_blocks(&mut self, id: u64, blocks: &mut PagedBlocks, tokens: u32) {
        let full = (tokens / self.block_size) as usize;
        for block in blocks.stored..full {
            let hash = blocks.hashes.get(block).copied();
            let hash = hash.unwrap_or_else(|| unhashed_block_key(id, block));
            self.pool.store(blocks.ids[block], hash);
        }
        // Blocks of unknown content are not published.
        let known = full.min(blocks.hashes.len());
        let entering = blocks.stored.min(known)..known;
        blocks.stored = blocks.stored.max(full);
        if let Some(events) = &mut self.cache_events
            && !entering.is_empty()
        {
            events.push(CacheEvent::Stored {
                request: id,
                blocks: entering,
            });
        }
    }
}

impl KvMemory for PagedMemory {
    type Blocks = PagedBlocks;

    fn cached_tokens(&self, blocks: &PagedBlocks, tokens: u32) -> u32 {
        self.cached_tokens_of(&blocks.hashes, tokens)
    }

    fn fits(&self, blocks: &PagedBlocks, reused: u32, tokens: u32) -> bool {
        let missing = self.blocks_for(tokens) - blocks.ids.len() as u32;
        let free = self.pool.free();
        if missing <= free {
            return true;
        }
        // A reused block takes a free block unless a running request pins it already. The pinned
        // blocks are counted only if the decision depends on them.
        let hits = reused / self.block_size;
        if missing - hits > free {
            return false;
        }
        let hashes = blocks.hashes[..hits as usize].iter();
        let pinned = hashes
            .filter_map(|&hash| self.pool.find(hash))
            .filter(|&block| self.pool.is_pinned(block))
            .count();
        missing - pinned as u32 <= free
    }

    fn reuse(&mut self, blocks: &mut PagedBlocks, reused: u32) {
        let hits = (reused / self.block_size) as usize;
        for &hash in &blocks.hashes[..hits] {
            let Some(block) = self.pool.find(hash) else {
                break;
            };
            self.pool.pin(block);
            blocks.ids.push(block);
        }
        debug_assert_eq!(blocks.ids.len(), hits, "a cached prefix has no gaps");
        blocks.stored = hits;
    }

    /// Also adds the blocks that the tokens fill to the cache.
    fn allocate(&mut self, id: u64, blocks: &mut PagedBlocks, tokens: u32) {
        let needed = self.blocks_for(tokens) as usize;
        while blocks.ids.len() < needed {
            let Some(Allocated { block, evicted }) = self.pool.allocate() else {
                debug_assert!(false, "enough blocks are free");
                return;
            };
            blocks.ids.push(block);
            if let (Some(events), Some(hash)) = (&mut self.cache_events, evicted) {
                events.push(CacheEvent::Removed { hash });
            }
        }
        if self.prefix_caching {
            self.store_full_blocks(id, blocks, tokens);
        }
    }

    /// The request's full blocks stay in the cache, where it may find them again.
    fn release(&mut self, blocks: &mut PagedBlocks) {
        self.pool.release(&blocks.ids);
        blocks.ids.clear();
        blocks.stored = 0;
    }
}

/// Returns the hash under which the engine caches a full block of unknown content. It is unique to
/// the request, so no other request finds the block.
fn unhashed_block_key(request: u64, block: usize) -> SequenceHash {
    mix(mix(request) ^ block as u64)
}
