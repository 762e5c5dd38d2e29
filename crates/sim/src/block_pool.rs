//! Paged KV cache of one engine: contents, reference counts and eviction order of its blocks.
//!
//! The pool follows vLLM's `BlockPool`. A block without references stays in the cache until it is
//! allocated again, and the least recently used free block is allocated first. Blocks with equal
//! content are not merged, so several blocks can have the same sequence hash.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use foresee_core::sequence::SequenceHash;

/// Index of a physical block.
pub type BlockId = u32;

/// Marker for the end of a list.
const NO_BLOCK: BlockId = BlockId::MAX;

/// Pool of blocks with reference counts, a prefix cache, and a free queue in LRU order.
///
/// Every operation is O(1) per block.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// By sequence hash: the block in which the hash was stored first. It is the head of the ring
    /// of blocks with this hash.
    cached: HashMap<SequenceHash, BlockId, BuildHasherDefault<IdentityHasher>>,
    /// Head of the free queue: the block that is allocated next.
    oldest_free: BlockId,
    /// Tail of the free queue.
    newest_free: BlockId,
    /// Length of the free queue.
    free: u32,
}

/// A physical block.
#[derive(Debug)]
struct Block {
    /// Number of running requests that use the block.
    references: u32,
    /// Sequence hash under which the block is in the cache; `None` if it is not cached.
    hash: Option<SequenceHash>,
    /// Neighbour towards the head of the free queue; unused while the block has references.
    older: BlockId,
    /// Neighbour towards the tail of the free queue; unused while the block has references.
    newer: BlockId,
    /// Neighbour in the ring of blocks with the same hash; unused while `hash` is `None`.
    previous_twin: BlockId,
    /// Other neighbour in the ring of blocks with the same hash; unused while `hash` is `None`.
    next_twin: BlockId,
}

impl BlockPool {
    /// Creates a pool of `blocks` free blocks that are not cached. vLLM reserves one of its blocks;
    /// that one is not counted here.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        let mut pool = Self {
            blocks: Vec::with_capacity(blocks as usize),
            cached: HashMap::default(),
            oldest_free: NO_BLOCK,
            newest_free: NO_BLOCK,
            free: 0,
        };
        for block in 0..blocks {
            pool.blocks.push(Block {
                references: 0,
                hash: None,
                older: NO_BLOCK,
                newer: NO_BLOCK,
                previous_twin: block,
                next_twin: block,
            });
            pool.enqueue_free(block);
        }
        pool
    }

    /// Returns the number of blocks of the pool.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Returns the number of blocks without references, cached or not.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Returns the number of blocks with references, each counted once.
    #[must_use]
    pub fn pinned(&self) -> u32 {
        self.capacity() - self.free
    }

    /// Returns the number of distinct sequence hashes in the cache, of pinned and of free blocks.
    #[must_use]
    pub fn cached_hashes(&self) -> usize {
        self.cached.len()
    }

    /// Returns the cached block with this hash; of several, the one in which it was stored first.
    #[must_use]
    pub fn find(&self, hash: SequenceHash) -> Option<BlockId> {
        self.cached.get(&hash).copied()
    }

    /// Returns whether `block` has references.
    #[must_use]
    pub fn is_pinned(&self, block: BlockId) -> bool {
        self.blocks[block as usize].references > 0
    }

    /// Adds a reference to a block of the cache, and removes the block from the free queue if it
    /// had none.
    pub fn pin(&mut self, block: BlockId) {
        if self.blocks[block as usize].references == 0 {
            self.dequeue_free(block);
        }
        self.blocks[block as usize].references += 1;
    }

    /// Takes the least recently used free block, removes it from the cache, and gives it one
    /// reference. `None` if no block is free.
    pub fn allocate(&mut self) -> Option<Allocated> {
        let block = self.oldest_free;
        if block == NO_BLOCK {
            return None;
        }
        self.dequeue_free(block);
        let evicted = self.evict(block);
        self.blocks[block as usize].references = 1;
        Some(Allocated { block, evicted })
    }

    /// Adds `block` to the cache under `hash`. The block must have a reference and must not be in
    /// the cache. If another block has this hash already, [`find`](Self::find) still returns that
    /// block.
    pub fn store(&mut self, block: BlockId, hash: SequenceHash) {
        debug_assert!(self.is_pinned(block), "a stored block has a reference");
        debug_assert!(
            self.blocks[block as usize].hash.is_none(),
            "a stored block is not in the cache"
        );
        let first = *self.cached.entry(hash).or_insert(block);
        if first != block {
            let last = self.blocks[first as usize].previous_twin;
            self.blocks[last as usize].next_twin = block;
            self.blocks[first as usize].previous_twin = block;
            self.blocks[block as usize].previous_twin = last;
            self.blocks[block as usize].next_twin = first;
        }
        self.blocks[block as usize].hash = Some(hash);
    }

    /// Drops one reference to each of `blocks`, which are those of one request in the order of its
    /// tokens.
    ///
    /// Blocks without other references are freed. Cached blocks are appended to the free queue,
    /// last block first, so that the end of a prompt is evicted before its beginning, which more
    /// requests can reuse. Blocks that are not cached, such as a partial block, cannot be reused
    /// and are put at the head of the queue.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let references = &mut self.blocks[block as usize].references;
            debug_assert!(*references > 0, "a released block has a reference");
            *references -= 1;
            if *references > 0 {
                continue;
            }
            if self.blocks[block as usize].hash.is_some() {
                self.enqueue_free(block);
            } else {
                self.enqueue_first(block);
            }
        }
    }

    /// Removes `block` from the cache and returns the hash that it had; `None` if it was not
    /// cached. Other blocks with this hash stay cached.
    fn evict(&mut self, block: BlockId) -> Option<SequenceHash> {
        let hash = self.blocks[block as usize].hash.take()?;
        let Block {
            previous_twin: previous,
            next_twin: next,
            ..
        } = self.blocks[block as usize];
        if next == block {
            self.cached.remove(&hash);
        } else {
            self.blocks[previous as usize].next_twin = next;
            self.blocks[next as usize].previous_twin = previous;
            if self.cached.get(&hash) == Some(&block) {
                self.cached.insert(hash, next);
            }
            self.blocks[block as usize].previous_twin = block;
            self.blocks[block as usize].next_twin = block;
        }
        Some(hash)
    }

    /// Appends a block to the tail of the free queue. The block must not be in the queue.
    fn enqueue_free(&mut self, block: BlockId) {
        self.blocks[block as usize].older = self.newest_free;
        self.blocks[block as usize].newer = NO_BLOCK;
        match self.newest_free {
            NO_BLOCK => self.oldest_free = block,
            newest => self.blocks[newest as usize].newer = block,
        }
        self.newest_free = block;
        self.free += 1;
    }

    /// Puts a block at the head of the free queue. The block must not be in the queue.
    fn enqueue_first(&mut self, block: BlockId) {
        self.blocks[block as usize].older = NO_BLOCK;
        self.blocks[block as usize].newer = self.oldest_free;
        match self.oldest_free {
            NO_BLOCK => self.newest_free = block,
            oldest => self.blocks[oldest as usize].older = block,
        }
        self.oldest_free = block;
        self.free += 1;
    }

    /// Removes a block from the free queue. The block must be in the queue. Its own links are not
    /// reset.
    fn dequeue_free(&mut self, block: BlockId) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NO_BLOCK => self.oldest_free = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NO_BLOCK => self.newest_free = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.free -= 1;
    }
}

/// Result of [`BlockPool::allocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// Allocated block.
    pub block: BlockId,
    /// Hash under which the block was cached. Other blocks may still be cached under it.
    pub evicted: Option<SequenceHash>,
}

/// Hasher that returns a `u64` unchanged. Sequence hashes are already uniform, so hashing them
/// again would only cost time.
#[derive(Debug, Default)]
struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Naive model of a block pool: lists that are searched linearly.
    struct Model {
        /// By block: number of references.
        references: Vec<u32>,
        /// Cached blocks with their hashes, in the order in which they were stored.
        stored: Vec<(SequenceHash, BlockId)>,
        /// Free blocks in the order of allocation.
        free: VecDeque<BlockId>,
    }

    impl Model {
        fn new(blocks: u32) -> Self {
            Self {
                references: vec![0; blocks as usize],
                stored: Vec::new(),
                free: (0..blocks).collect(),
            }
        }

        fn find(&self, hash: SequenceHash) -> Option<BlockId> {
            let found = self.stored.iter().find(|(stored, _)| *stored == hash);
            found.map(|(_, block)| *block)
        }

        fn pin(&mut self, block: BlockId) {
            self.references[block as usize] += 1;
            self.free.retain(|free| *free != block);
        }

        fn allocate(&mut self) -> Option<Allocated> {
            let block = self.free.pop_front()?;
            self.references[block as usize] = 1;
            let position = self.stored.iter().position(|(_, stored)| *stored == block);
            let evicted = position.map(|position| self.stored.remove(position).0);
            Some(Allocated { block, evicted })
        }

        fn release(&mut self, blocks: &[BlockId]) {
            for &block in blocks.iter().rev() {
                self.references[block as usize] -= 1;
                if self.references[block as usize] > 0 {
                    continue;
                }
                if self.stored.iter().any(|(_, stored)| *stored == block) {
                    self.free.push_back(block);
                } else {
                    self.free.push_front(block);
                }
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        /// A request pins cached blocks of these hashes, allocates and stores the others, and
        /// allocates `unhashed` blocks that it does not store.
        Admit { hashes: Vec<u64>, unhashed: usize },
        /// The request at this position, modulo the number of requests, ends.
        Finish(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        let admit = (prop::collection::vec(0..12_u64, 0..6), 0..3_usize);
        prop_oneof![
            admit.prop_map(|(hashes, unhashed)| Op::Admit { hashes, unhashed }),
            any::<usize>().prop_map(Op::Finish),
        ]
    }

    proptest! {
        #[test]
        fn a_pool_behaves_as_the_naive_model(ops in prop::collection::vec(op(), 1..200)) {
            let mut pool = BlockPool::new(24);
            let mut model = Model::new(24);
            let mut requests: Vec<Vec<BlockId>> = Vec::new();
            for op in ops {
                match op {
                    Op::Admit { hashes, unhashed } => {
                        let mut blocks = Vec::new();
                        for (index, hash) in hashes.into_iter().enumerate() {
                            prop_assert_eq!(pool.find(hash), model.find(hash));
                            // Every third block is computed although it is cached, which creates
                            // twins.
                            if let Some(found) = pool.find(hash).filter(|_| index % 3 != 2) {
                                pool.pin(found);
                                model.pin(found);
                                blocks.push(found);
                                continue;
                            }
                            let taken = pool.allocate();
                            prop_assert_eq!(taken, model.allocate());
                            let Some(Allocated { block, .. }) = taken else { break };
                            pool.store(block, hash);
                            model.stored.push((hash, block));
                            blocks.push(block);
                        }
                        for _ in 0..unhashed {
                            let taken = pool.allocate();
                            prop_assert_eq!(taken, model.allocate());
                            blocks.extend(taken.map(|taken| taken.block));
                        }
                        requests.push(blocks);
                    }
                    Op::Finish(position) if !requests.is_empty() => {
                        let position = position % requests.len();
                        let blocks = requests.swap_remove(position);
                        pool.release(&blocks);
                        model.release(&blocks);
                    }
                    Op::Finish(_) => {}
                }
                let pinned = model.references.iter().filter(|count| **count > 0).count();
                prop_assert_eq!(pool.pinned() as usize, pinned);
                prop_assert_eq!(pool.free() as usize, model.free.len());
            }
        }
    }

    #[test]
    fn the_tail_of_a_released_request_is_evicted_first() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<BlockId> = (0..3).map(|_| pool.allocate().unwrap().block).collect();
        for (&block, hash) in blocks.iter().zip([10, 11, 12]) {
            pool.store(block, hash);
        }
        pool.release(&blocks);
        let evicted: Vec<_> = (0..3).map(|_| pool.allocate().unwrap().evicted).collect();
        assert_eq!(evicted, [Some(12), Some(11), Some(10)]);
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn a_hash_stays_cached_while_one_block_has_it() {
        let mut pool = BlockPool::new(2);
        let first = pool.allocate().unwrap().block;
        let second = pool.allocate().unwrap().block;
        pool.store(first, 7);
        pool.store(second, 7);
        assert_eq!(pool.find(7), Some(first));
        pool.release(&[first]);
        assert_eq!(pool.allocate().unwrap().evicted, Some(7));
        assert_eq!(pool.find(7), Some(second));
    }
}
