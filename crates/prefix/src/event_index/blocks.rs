//! Blocks of one engine, found by engine hash, in 28 bytes each.
//!
//! Blocks lie in pages and never move, so a block refers to its parent by a 22-bit id. A hash table
//! finds blocks by engine hash. A table entry stores the high bits of the (mixed) engine hash
//! together with the block id; the block stores the low bits.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::event_index::delta::is_anchor;
use crate::event_index::probe_table::{OrderedHashTable, TableSlot};
use crate::sequence::IdentityHasher;
use crate::sequence::SequenceHash;

/// Map from a block id, or a key with a block id in it, to a rare attribute of the block.
type MapById<V> = HashMap<u64, V, BuildHasherDefault<IdentityHasher>>;

/// Index of a block in the pages. Reused after removal.
pub(super) type BlockId = u32;

const ID_BITS: u32 = 22;
const ID_MASK: u64 = (1 << ID_BITS) - 1;

/// Absence of a block; as a parent, the start of a sequence.
pub(super) const NO_BLOCK: BlockId = ID_MASK as BlockId;

/// Maximum number of blocks that are tracked. Bounds the memory that an event stream without
/// removals can take.
const MAX_BLOCKS: usize = NO_BLOCK as usize;

/// Maximum number of blocks that [`EngineBlocks::collect_lead_in`] walks. A longer path without an
/// anchor is either artificial or a cycle.
const MAX_LEAD_IN: usize = 256;

const PAGE_BITS: u32 = 9;
/// Blocks per page.
const PAGE: usize = 1 << PAGE_BITS;

/// Table entry: high bits of a mixed engine hash, and the block id in the low bits.
#[derive(Clone, Copy, Debug)]
struct TableEntry(u64);

impl TableEntry {
    fn id(self) -> BlockId {
        (self.0 & ID_MASK) as BlockId
    }
}

impl TableSlot for TableEntry {
    const EMPTY: Self = Self(u64::MAX);

    fn key(&self) -> u64 {
        self.0 & !ID_MASK
    }

    fn is_empty(&self) -> bool {
        self.id() == NO_BLOCK
    }
}

/// Engine hash, mapped one to one to a number that is uniform over 64 bits, as the table requires.
#[derive(Clone, Copy, Debug)]
struct MixedHash(u64);

impl MixedHash {
    fn new(engine_hash: u64) -> Self {
        let product = engine_hash.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self(product ^ product >> 32)
    }

    /// Returns the high bits, which the table stores.
    fn key(self) -> u64 {
        self.0 & !ID_MASK
    }

    /// Returns the low bits, which the block stores.
    fn low_bits(self) -> u64 {
        self.0 & ID_MASK
    }
}

/// Position of a number within the 64 bits of [`EngineBlock::fields`].
#[derive(Clone, Copy)]
struct BitField {
    shift: u32,
    /// Largest value that the field can store, which is also its mask.
    max: u64,
}

/// Id of the block before this one. In a free block: id of the next free block.
const PARENT: BitField = BitField::new(0, ID_BITS);
/// Low bits of the mixed engine hash.
const HASH_LOW_BITS: BitField = BitField::new(ID_BITS, ID_BITS);
/// How many more times the block was stored than removed. 0 in a tombstone.
const STORES: BitField = BitField::new(2 * ID_BITS, 10);
/// Number of stored blocks whose parent is this block.
const CHILDREN: BitField = BitField::new(2 * ID_BITS + 10, 9);
/// Whether a request can hit the block: it was last reported to the index as stored.
const REACHABLE: BitField = BitField::new(63, 1);

impl BitField {
    const fn new(shift: u32, bits: u32) -> Self {
        let max = (1 << bits) - 1;
        Self { shift, max }
    }
}

/// One block, in 16 bytes.
#[derive(Clone, Copy, Debug)]
struct EngineBlock {
    /// Sequence hash of the prefix that ends with the block.
    hash: SequenceHash,
    /// All [`BitField`]s.
    fields: u64,
}

impl EngineBlock {
    /// Returns the value of `field`.
    fn get(&self, field: BitField) -> u64 {
        self.fields >> field.shift & field.max
    }

    /// Sets `field` to `value`, which must not exceed the maximum of the field.
    fn set(&mut self, field: BitField, value: u64) {
        debug_assert!(value <= field.max);
        self.fields = self.fields & !(field.max << field.shift) | value << field.shift;
    }
}

/// Result of a look-up by engine hash. Invalid after any change of the blocks.
#[derive(Clone, Copy)]
pub(super) struct Lookup {
    /// Hash that was looked up.
    hash: MixedHash,
    /// Index in the table of the entry, or of the place to insert it.
    index: usize,
    /// Block that was found, stored or a tombstone; [`NO_BLOCK`] if there is none.
    pub(super) id: BlockId,
}

/// Block that is neither stored nor a tombstone any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct RemovedBlock {
    /// Id of the block, not reused before [`EngineBlocks::recycle_removed`].
    pub(super) id: BlockId,
    /// Parent of the block; [`NO_BLOCK`] if none was known.
    pub(super) parent: BlockId,
    /// Sequence hash of the prefix that ended with the block.
    pub(super) hash: SequenceHash,
    /// Whether the index lists the block, so that the removal must be reported to it.
    pub(super) was_reachable: bool,
}

/// Attributes of a block that is no longer stored but still has children.
#[derive(Debug)]
struct Tombstone {
    /// Mixed engine hash. No event names the block when its last child is removed, so the hash must
    /// be known here to remove the table entry.
    hash: MixedHash,
    /// [Lead-in](EngineBlocks::collect_lead_in) of the block when it was removed. Its ancestors may
    /// be removed before the tombstone.
    lead_in: Box<[SequenceHash]>,
}

/// Blocks of one engine by engine hash. A block is *stored* as long as it was stored more often
/// than removed. A block that is no longer stored but has children stays as a *tombstone*, until
/// the children are gone or the block is stored again.
#[derive(Debug)]
pub(super) struct EngineBlocks {
    /// Block ids by mixed engine hash.
    table: OrderedHashTable<TableEntry>,
    /// Blocks by id.
    pages: Vec<Vec<EngineBlock>>,
    /// First free block; the `PARENT` field of a free block refers to the next.
    free: BlockId,
    /// Tombstones by block id.
    tombstones: MapById<Tombstone>,
    /// Blocks removed since the last [`recycle_removed`](Self::recycle_removed), whose ids are not
    /// free yet.
    removed: Vec<RemovedBlock>,
    /// Excess of `STORES` and `CHILDREN` over what their fields can store, by [`overflow_key`]. Few
    /// blocks have one.
    overflow_counts: MapById<u32>,
}

impl EngineBlocks {
    /// Returns an empty set of blocks.
    pub(super) fn new() -> Self {
        Self {
            table: OrderedHashTable::default(),
            pages: Vec::new(),
            free: NO_BLOCK,
            tombstones: HashMap::default(),
            removed: Vec::new(),
            overflow_counts: HashMap::default(),
        }
    }

    /// Returns the number of blocks, tombstones included.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Looks up an engine hash. The result also serves to insert or remove the block.
    pub(super) fn find(&self, engine_hash: u64) -> Lookup {
        self.find_mixed(MixedHash::new(engine_hash))
    }

    /// Looks up a mixed engine hash.
    fn find_mixed(&self, hash: MixedHash) -> Lookup {
        let is_match =
            |entry: &TableEntry| self.at(entry.id()).get(HASH_LOW_BITS) == hash.low_bits();
        let (index, id) = match self.table.find(hash.key(), is_match) {
            Ok(index) => (
                index,
                self.table.get(index).map_or(NO_BLOCK, |entry| entry.id()),
            ),
            Err(index) => (index, NO_BLOCK),
        };
        Lookup { hash, index, id }
    }

    /// Returns the block with this engine hash, if it is stored.
    pub(super) fn find_stored(&self, engine_hash: u64) -> Option<BlockId> {
        let id = self.find(engine_hash).id;
        (id != NO_BLOCK && self.is_stored(id)).then_some(id)
    }

    /// Reads the memory that [`find`](Self::find) will need. Several look-ups are faster if all
    /// their hashes are prefetched first.
    pub(super) fn prefetch(&self, engine_hash: u64) {
        self.table.prefetch(MixedHash::new(engine_hash).key());
    }

    /// Inserts a block, stored once, that [`find`](Self::find) did not find, and counts it as a
    /// child of `parent`. `parent` is [`NO_BLOCK`] for the first block of a sequence. Returns
    /// `None`, and changes nothing, if [`MAX_BLOCKS`] are tracked already.
    pub(super) fn insert(
        &mut self,
        lookup: Lookup,
        parent: BlockId,
        hash: SequenceHash,
        is_reachable: bool,
    ) -> Option<BlockId> {
        debug_assert!(lookup.id == NO_BLOCK);
        if self.len() == MAX_BLOCKS {
            return None;
        }
        let mixed = lookup.hash;
        let mut block = EngineBlock { hash, fields: 0 };
        block.set(HASH_LOW_BITS, mixed.low_bits());
        block.set(PARENT, u64::from(parent));
        block.set(STORES, 1);
        block.set(REACHABLE, u64::from(is_reachable));
        let id = if self.free == NO_BLOCK {
            self.push(block)
        } else {
            let id = self.free;
            let recycled = std::mem::replace(self.at_mut(id), block);
            self.free = recycled.get(PARENT) as BlockId;
            id
        };
        let entry = TableEntry(mixed.key() | u64::from(id));
        self.table.insert(lookup.index, entry);
        self.increment_children(parent);
        Some(id)
    }

    /// Stores the tombstone `id` again, with a new parent and sequence hash, and counts it as a
    /// child of `parent`. Its reachability stays as it was.
    pub(super) fn restore(&mut self, id: BlockId, parent: BlockId, hash: SequenceHash) {
        self.tombstones.remove(&u64::from(id));
        let block = self.at_mut(id);
        block.hash = hash;
        block.set(PARENT, u64::from(parent));
        block.set(STORES, 1);
        self.increment_children(parent);
    }

    /// Counts one more child of `parent`, unless that is [`NO_BLOCK`].
    fn increment_children(&mut self, parent: BlockId) {
        if parent != NO_BLOCK {
            self.increment(CHILDREN, parent);
        }
    }

    /// Appends a block to the pages and returns its id.
    fn push(&mut self, block: EngineBlock) -> BlockId {
        // No id is free, so the number of blocks in the pages equals the number of table entries.
        let id = self.len();
        if id.is_multiple_of(PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        self.pages[id / PAGE].push(block);
        id as BlockId
    }

    /// Counts one more store of a block that is stored.
    pub(super) fn increment_stores(&mut self, id: BlockId) {
        self.increment(STORES, id);
    }

    /// Counts one removal of a stored block, which `lookup` has found. Returns whether it is no
    /// longer stored: then it is a tombstone, or listed in [`removed`](Self::removed). A parent
    /// that was kept only for this child is removed too. The recorded reachability of the blocks
    /// stays as it was.
    pub(super) fn decrement_stores(&mut self, lookup: Lookup) -> bool {
        let id = lookup.id;
        if self.at(id).get(STORES) > 1 {
            self.decrement(STORES, id);
            return false;
        }
        let block = self.at_mut(id);
        block.set(STORES, 0);
        let parent = block.get(PARENT) as BlockId;
        if block.get(CHILDREN) > 0 {
            let mut lead_in = Vec::new();
            self.collect_lead_in(id, &mut lead_in);
            let tombstone = Tombstone {
                hash: lookup.hash,
                lead_in: lead_in.into(),
            };
            self.tombstones.insert(u64::from(id), tombstone);
            self.at_mut(id).set(PARENT, u64::from(NO_BLOCK));
        } else {
            self.remove(lookup);
        }
        if parent != NO_BLOCK {
            self.decrement(CHILDREN, parent);
            let block = self.at(parent);
            if block.get(CHILDREN) == 0
                && block.get(STORES) == 0
                && let Some(tombstone) = self.tombstones.get(&u64::from(parent))
            {
                self.remove(self.find_mixed(tombstone.hash));
            }
        }
        true
    }

    /// Removes a block from the table and lists it as removed. Its id and its data stay until
    /// [`recycle_removed`](Self::recycle_removed).
    fn remove(&mut self, lookup: Lookup) {
        self.table.remove(lookup.index);
        let (id, block) = (lookup.id, self.at(lookup.id));
        self.removed.push(RemovedBlock {
            id,
            parent: block.get(PARENT) as BlockId,
            hash: block.hash,
            was_reachable: block.get(REACHABLE) > 0,
        });
    }

    /// Returns the blocks that were removed since the last
    /// [`recycle_removed`](Self::recycle_removed), in order of removal. No block may be stored
    /// before they are recycled.
    pub(super) fn removed(&self) -> &[RemovedBlock] {
        &self.removed
    }

    /// Makes the ids of removed blocks available to new ones, and empties
    /// [`removed`](Self::removed).
    pub(super) fn recycle_removed(&mut self) {
        let mut removed = std::mem::take(&mut self.removed);
        for RemovedBlock { id, .. } in removed.drain(..) {
            if !self.tombstones.is_empty() {
                self.tombstones.remove(&u64::from(id));
            }
            let next_free = std::mem::replace(&mut self.free, id);
            let block = self.at_mut(id);
            block.set(REACHABLE, 0);
            block.set(PARENT, u64::from(next_free));
        }
        self.removed = removed;
    }

    /// Appends the sequence hashes of the ancestors of block `id`, nearest first, up to and
    /// including the last anchor or the first block of the sequence. Below a tombstone, appends the
    /// lead-in that the tombstone stored. Ends early after [`MAX_LEAD_IN`] blocks.
    pub(super) fn collect_lead_in(&self, id: BlockId, lead_in: &mut Vec<SequenceHash>) {
        let mut descendant = id;
        for _ in 0..MAX_LEAD_IN {
            let Some(parent) = self.parent(descendant) else {
                if let Some(tombstone) = self.tombstones.get(&u64::from(descendant)) {
                    lead_in.extend_from_slice(&tombstone.lead_in);
                }
                return;
            };
            let hash = self.hash(parent);
            lead_in.push(hash);
            if is_anchor(hash) {
                return;
            }
            descendant = parent;
        }
    }

    /// Returns the sequence hash of the prefix that ends with the block.
    pub(super) fn hash(&self, id: BlockId) -> SequenceHash {
        self.at(id).hash
    }

    /// Returns whether the block is stored, not a tombstone.
    pub(super) fn is_stored(&self, id: BlockId) -> bool {
        self.at(id).get(STORES) > 0
    }

    /// Returns how many more times the block was stored than removed.
    pub(super) fn store_count(&self, id: BlockId) -> u32 {
        let overflow = self.overflow_counts.get(&overflow_key(STORES, id));
        self.at(id).get(STORES) as u32 + overflow.copied().unwrap_or(0)
    }

    /// Returns whether stored blocks have this block as their parent.
    pub(super) fn has_children(&self, id: BlockId) -> bool {
        self.at(id).get(CHILDREN) > 0
    }

    /// Returns whether a request can hit the block, because it and all blocks before it are stored.
    /// This is the value last passed to [`set_reachable`](Self::set_reachable), which may be out of
    /// date and may be true of a tombstone.
    pub(super) fn is_reachable(&self, id: BlockId) -> bool {
        self.at(id).get(REACHABLE) > 0
    }

    /// Records whether a request can hit the block.
    pub(super) fn set_reachable(&mut self, id: BlockId, is_reachable: bool) {
        self.at_mut(id).set(REACHABLE, u64::from(is_reachable));
    }

    /// Returns all blocks that are marked as reachable.
    pub(super) fn reachable(&self) -> impl Iterator<Item = BlockId> {
        (0..self.ids() as BlockId).filter(|&id| self.is_reachable(id))
    }

    /// Returns the parent of the block, if it has one that is known.
    pub(super) fn parent(&self, id: BlockId) -> Option<BlockId> {
        let parent = self.at(id).get(PARENT) as BlockId;
        (parent != NO_BLOCK).then_some(parent)
    }

    /// Returns the upper bound (exclusive) of all block ids.
    pub(super) fn ids(&self) -> usize {
        let last = self.pages.last().map_or(0, Vec::len);
        self.pages.len().saturating_sub(1) * PAGE + last
    }

    /// Returns, by block id, whether the block and all blocks before it are stored. Visits every
    /// block. The recorded reachability is neither read nor changed. A block that is its own
    /// ancestor is not reachable.
    pub(super) fn find_reachable(&self) -> Vec<bool> {
        #[derive(Clone, Copy, PartialEq)]
        enum Visit {
            Unvisited,
            /// The block is on the path that is being walked. If it is met again, it is its own
            /// ancestor.
            InProgress,
            Reachable(bool),
        }
        let mut visits = vec![Visit::Unvisited; self.ids()];
        let mut path = Vec::new();
        for id in (0..self.ids() as BlockId).filter(|&id| self.is_stored(id)) {
            let mut ancestor = id;
            let reachable = loop {
                if ancestor == NO_BLOCK {
                    break true;
                }
                match visits[ancestor as usize] {
                    Visit::Reachable(reachable) => break reachable,
                    Visit::InProgress => break false,
                    Visit::Unvisited if !self.is_stored(ancestor) => break false,
                    Visit::Unvisited => {}
                }
                visits[ancestor as usize] = Visit::InProgress;
                path.push(ancestor);
                ancestor = self.at(ancestor).get(PARENT) as BlockId;
            };
            for id in path.drain(..) {
                visits[id as usize] = Visit::Reachable(reachable);
            }
        }
        let reachable = visits
            .into_iter()
            .map(|visit| visit == Visit::Reachable(true));
        reachable.collect()
    }

    /// Adds one to a counter that may overflow its field.
    fn increment(&mut self, field: BitField, id: BlockId) {
        let block = self.at_mut(id);
        if block.get(field) < field.max {
            block.fields += 1 << field.shift;
        } else {
            *self
                .overflow_counts
                .entry(overflow_key(field, id))
                .or_default() += 1;
        }
    }

    /// Subtracts one from a counter that is above zero.
    fn decrement(&mut self, field: BitField, id: BlockId) {
        debug_assert!(self.at(id).get(field) > 0);
        if self.at(id).get(field) == field.max
            && let Some(overflow) = self.overflow_counts.get_mut(&overflow_key(field, id))
        {
            *overflow -= 1;
            if *overflow == 0 {
                self.overflow_counts.remove(&overflow_key(field, id));
            }
        } else {
            self.at_mut(id).fields -= 1 << field.shift;
        }
    }

    /// Returns the block with this id.
    fn at(&self, id: BlockId) -> &EngineBlock {
        &self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    /// Returns the block with this id, for writing.
    fn at_mut(&mut self, id: BlockId) -> &mut EngineBlock {
        &mut self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }
}

/// Returns the key of a counter of a block in `overflow_counts`.
fn overflow_key(field: BitField, id: BlockId) -> u64 {
    u64::from(field.shift) << 32 | u64::from(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
