//! The paged KV cache of one engine: what each block holds, who uses it, which is taken next.
//!
//! Follows vLLM's `BlockPool`. A block that nobody uses stays in the cache until it is allocated
//! again, and the one unused for longest is allocated first. Blocks with equal content are not
//! merged: a sequence hash may be held by several blocks.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use foresee_core::sequence::SequenceHash;

/// Index of a physical block.
pub type BlockId = u32;

/// No block: the end of a list.
const NONE: BlockId = BlockId::MAX;

/// A pool of blocks with reference counts, a prefix cache, and a free queue in LRU order.
///
/// Every operation is O(1) per block.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// The first of the ring of blocks that hold a hash: the one that has held it for longest.
    cached: HashMap<SequenceHash, BlockId, BuildHasherDefault<AlreadyHashed>>,
    /// The free block unused for longest: the next to be allocated.
    oldest_free: BlockId,
    newest_free: BlockId,
    free: u32,
}

#[derive(Debug)]
struct Block {
    references: u32,
    hash: Option<SequenceHash>,
    /// Neighbours in the free queue; meaningful while nobody refers to the block.
    older: BlockId,
    newer: BlockId,
    /// Neighbours in the ring of blocks with the same hash; meaningful while `hash` is some.
    previous_twin: BlockId,
    next_twin: BlockId,
}

impl BlockPool {
    /// A pool of `blocks` free, empty blocks. (vLLM sets one of its blocks aside; that one is
    /// not counted here.)
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        let mut pool = Self {
            blocks: Vec::with_capacity(blocks as usize),
            cached: HashMap::default(),
            oldest_free: NONE,
            newest_free: NONE,
            free: 0,
        };
        for block in 0..blocks {
            pool.blocks.push(Block {
                references: 0,
                hash: None,
                older: NONE,
                newer: NONE,
                previous_twin: block,
                next_twin: block,
            });
            pool.enqueue_free(block);
        }
        pool
    }

    /// Blocks in all.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks nobody refers to, whether they hold cached content or not.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Blocks somebody refers to, each counted once.
    #[must_use]
    pub fn pinned(&self) -> u32 {
        self.capacity() - self.free
    }

    /// Distinct sequence hashes in the cache, pinned or free.
    #[must_use]
    pub fn cached_hashes(&self) -> usize {
        self.cached.len()
    }

    /// The block to use for `hash`: of several, the one that has held it for longest.
    #[must_use]
    pub fn find(&self, hash: SequenceHash) -> Option<BlockId> {
        self.cached.get(&hash).copied()
    }

    /// Whether somebody refers to `block`.
    #[must_use]
    pub fn is_pinned(&self, block: BlockId) -> bool {
        self.blocks[block as usize].references > 0
    }

    /// Adds a reference to a block found in the cache.
    pub fn pin(&mut self, block: BlockId) {
        if self.blocks[block as usize].references == 0 {
            self.dequeue_free(block);
        }
        self.blocks[block as usize].references += 1;
    }

    /// Takes the block unused for longest, with one reference; `None` when none is free.
    pub fn allocate(&mut self) -> Option<Allocated> {
        let block = self.oldest_free;
        if block == NONE {
            return None;
        }
        self.dequeue_free(block);
        let evicted = self.forget(block);
        self.blocks[block as usize].references = 1;
        Some(Allocated { block, evicted })
    }

    /// Lets requests find `block`, which is in use and not in the cache yet, by `hash`.
    pub fn store(&mut self, block: BlockId, hash: SequenceHash) {
        debug_assert!(self.is_pinned(block), "only a block in use gets content");
        debug_assert!(self.blocks[block as usize].hash.is_none(), "stored twice");
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

    /// Drops one reference to each of a request's `blocks`, given in the order of its tokens.
    ///
    /// Full blocks join the free queue last block first, so that a prompt's tail is evicted before
    /// its beginning, which more requests can use. A partial block is of no use to anybody and is
    /// taken next.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let references = &mut self.blocks[block as usize].references;
            debug_assert!(*references > 0, "released more often than taken");
            *references -= 1;
            if *references > 0 {
                continue;
            }
            if self.blocks[block as usize].hash.is_some() {
                self.enqueue_free(block);
            } else {
                self.enqueue_next(block);
            }
        }
    }

    /// Takes `block` out of the cache. Returns what it held.
    fn forget(&mut self, block: BlockId) -> Option<SequenceHash> {
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

    fn enqueue_free(&mut self, block: BlockId) {
        self.blocks[block as usize].older = self.newest_free;
        self.blocks[block as usize].newer = NONE;
        match self.newest_free {
            NONE => self.oldest_free = block,
            newest => self.blocks[newest as usize].newer = block,
        }
        self.newest_free = block;
        self.free += 1;
    }

    /// Puts a free block at the front of the queue.
    fn enqueue_next(&mut self, block: BlockId) {
        self.blocks[block as usize].older = NONE;
        self.blocks[block as usize].newer = self.oldest_free;
        match self.oldest_free {
            NONE => self.newest_free = block,
            oldest => self.blocks[oldest as usize].older = block,
        }
        self.oldest_free = block;
        self.free += 1;
    }

    fn dequeue_free(&mut self, block: BlockId) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NONE => self.oldest_free = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest_free = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.free -= 1;
    }
}

/// A block taken by [`BlockPool::allocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// The block.
    pub block: BlockId,
    /// What it held until now. Other blocks may still hold the same.
    pub evicted: Option<SequenceHash>,
}

/// Sequence hashes are uniform already; hashing them again would only cost time.
#[derive(Debug, Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
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

    /// The same pool with lists that are searched.
    struct Model {
        references: Vec<u32>,
        /// In the order they were stored.
        stored: Vec<(SequenceHash, BlockId)>,
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
            let held = self.stored.iter().position(|(_, holder)| *holder == block);
            let evicted = held.map(|position| self.stored.remove(position).0);
            Some(Allocated { block, evicted })
        }

        fn release(&mut self, blocks: &[BlockId]) {
            for &block in blocks.iter().rev() {
                self.references[block as usize] -= 1;
                if self.references[block as usize] > 0 {
                    continue;
                }
                if self.stored.iter().any(|(_, holder)| *holder == block) {
                    self.free.push_back(block);
                } else {
                    self.free.push_front(block);
                }
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        /// A request takes what is cached of these hashes and allocates and stores the rest.
        Admit { hashes: Vec<u64>, unhashed: usize },
        /// The request at this position (modulo their number) ends.
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
        fn behaves_as_the_searched_lists(ops in prop::collection::vec(op(), 1..200)) {
            let mut pool = BlockPool::new(24);
            let mut model = Model::new(24);
            let mut requests: Vec<Vec<BlockId>> = Vec::new();
            for op in ops {
                match op {
                    Op::Admit { hashes, unhashed } => {
                        let mut blocks = Vec::new();
                        for (index, hash) in hashes.into_iter().enumerate() {
                            prop_assert_eq!(pool.find(hash), model.find(hash));
                            // Every third is computed although it is cached, which makes twins.
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
    fn a_twin_keeps_a_hash_in_the_cache() {
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
