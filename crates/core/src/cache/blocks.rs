//! The blocks of one engine, by its names for them: 28 bytes each.
//!
//! Blocks lie in pages and do not move, so that one can name its parent by a short number. A
//! table finds them by name. It holds the larger part of the name, beside the number, and the
//! block the rest.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::cache::paths::is_mark;
use crate::cache::sparse::{Entry, Sparse};
use crate::sequence::AlreadyHashed;
use crate::sequence::SequenceHash;

type ById<V> = HashMap<u64, V, BuildHasherDefault<AlreadyHashed>>;

/// Number of a block.
pub(super) type Id = u32;

const ID_BITS: u32 = 22;
const ID_MASK: u64 = (1 << ID_BITS) - 1;

/// No block.
pub(super) const NONE: Id = ID_MASK as Id;

/// Blocks that are followed at most. A stream that loses removals must not grow them for ever.
const MOST_BLOCKS: usize = NONE as usize;

/// Blocks that are [before](Blocks::write_before) another, at most, but for those before a hole. So
/// many without a mark are either not of this world or a circle.
const MOST_BEFORE: usize = 256;

const PAGE_BITS: u32 = 9;
const PAGE: usize = 1 << PAGE_BITS;

/// The larger part of a name, and the block's number.
#[derive(Clone, Copy, Debug)]
struct Named(u64);

impl Named {
    fn id(self) -> Id {
        (self.0 & ID_MASK) as Id
    }
}

impl Entry for Named {
    const GAP: Self = Self(u64::MAX);

    fn key(&self) -> u64 {
        self.0 & !ID_MASK
    }

    fn is_gap(&self) -> bool {
        self.id() == NONE
    }
}

/// An engine's name for a block, spread over all 64-bit numbers, one to one.
#[derive(Clone, Copy, Debug)]
struct Name(u64);

impl Name {
    fn new(given: u64) -> Self {
        let product = given.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self(product ^ product >> 32)
    }

    /// The part that the table holds.
    fn key(self) -> u64 {
        self.0 & !ID_MASK
    }

    /// The part that the block holds.
    fn rest(self) -> u64 {
        self.0 & ID_MASK
    }
}

/// Numbers that share a word.
#[derive(Clone, Copy)]
struct Field {
    shift: u32,
    most: u64,
}

/// The id of the block before it; of the next that is free, if it is.
const PARENT: Field = Field::new(0, ID_BITS);
const REST_OF_NAME: Field = Field::new(ID_BITS, ID_BITS);
/// How often it was stored and not removed since.
const STORES: Field = Field::new(2 * ID_BITS, 10);
/// Blocks whose parent it is.
const CHILDREN: Field = Field::new(2 * ID_BITS + 10, 9);
const REACHABLE: Field = Field::new(63, 1);

impl Field {
    const fn new(shift: u32, bits: u32) -> Self {
        let most = (1 << bits) - 1;
        Self { shift, most }
    }
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// The sequence hash of its end.
    hash: SequenceHash,
    fields: u64,
}

impl Block {
    fn get(&self, field: Field) -> u64 {
        self.fields >> field.shift & field.most
    }

    fn set(&mut self, field: Field, value: u64) {
        debug_assert!(value <= field.most);
        self.fields = self.fields & !(field.most << field.shift) | value << field.shift;
    }
}

/// What became of looking for a name. Means nothing after the blocks have changed.
#[derive(Clone, Copy)]
pub(super) struct Found {
    name: Name,
    at: usize,
    /// [`NONE`] if it is not there.
    pub(super) id: Id,
}

/// A block that is neither stored nor a hole any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone {
    pub(super) id: Id,
    /// [`NONE`] if none was known.
    pub(super) parent: Id,
    pub(super) hash: SequenceHash,
    pub(super) was_reachable: bool,
}

/// What a hole has to remember.
#[derive(Debug)]
struct Hole {
    /// Nobody names it when it goes.
    name: Name,
    /// What was [before it](Blocks::write_before), which may go before it.
    before: Box<[SequenceHash]>,
}

/// Blocks by name. A block is *stored* while it was stored more often than removed. One that is
/// not but has children stays, as a hole, until they are gone or it is stored again.
#[derive(Debug)]
pub(super) struct Blocks {
    table: Sparse<Named>,
    pages: Vec<Vec<Block>>,
    /// The first block that is free; each tells the next.
    free: Id,
    holes: ById<Hole>,
    /// Whose memory is not yet free.
    gone: Vec<Gone>,
    /// What stores and children exceed their bits by, of the few that do.
    excess: ById<u32>,
}

impl Blocks {
    pub(super) fn new() -> Self {
        Self {
            table: Sparse::default(),
            pages: Vec::new(),
            free: NONE,
            holes: HashMap::default(),
            gone: Vec::new(),
            excess: HashMap::default(),
        }
    }

    /// Blocks and holes.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Looks a name up.
    pub(super) fn find(&self, name: u64) -> Found {
        self.find_name(Name::new(name))
    }

    fn find_name(&self, name: Name) -> Found {
        let is_it = |named: &Named| self.at(named.id()).get(REST_OF_NAME) == name.rest();
        let (at, id) = match self.table.find(name.key(), is_it) {
            Ok(at) => (at, self.table.get(at).map_or(NONE, |it| it.id())),
            Err(at) => (at, NONE),
        };
        Found { name, at, id }
    }

    pub(super) fn find_stored(&self, name: u64) -> Option<Id> {
        let id = self.find(name).id;
        (id != NONE && self.is_stored(id)).then_some(id)
    }

    /// Makes [finding](Self::find) several blocks faster.
    pub(super) fn touch(&self, name: u64) {
        self.table.touch(Name::new(name).key());
    }

    /// Adds a block where a name was [looked for](Self::find) and is not. `None` if there are too
    /// many.
    pub(super) fn insert(
        &mut self,
        found: Found,
        parent: Id,
        hash: SequenceHash,
        reachable: bool,
    ) -> Option<Id> {
        debug_assert!(found.id == NONE);
        if self.len() == MOST_BLOCKS {
            return None;
        }
        let name = found.name;
        let mut block = Block { hash, fields: 0 };
        block.set(REST_OF_NAME, name.rest());
        block.set(PARENT, u64::from(parent));
        block.set(STORES, 1);
        block.set(REACHABLE, u64::from(reachable));
        let id = if self.free == NONE {
            self.push(block)
        } else {
            let id = self.free;
            let free = std::mem::replace(self.at_mut(id), block);
            self.free = free.get(PARENT) as Id;
            id
        };
        let named = Named(name.key() | u64::from(id));
        self.table.insert(found.at, named);
        self.raise_children(parent);
        Some(id)
    }

    /// Stores a hole again.
    pub(super) fn fill(&mut self, id: Id, parent: Id, hash: SequenceHash) {
        self.holes.remove(&u64::from(id));
        let block = self.at_mut(id);
        block.hash = hash;
        block.set(PARENT, u64::from(parent));
        block.set(STORES, 1);
        self.raise_children(parent);
    }

    fn raise_children(&mut self, parent: Id) {
        if parent != NONE {
            self.raise(CHILDREN, parent);
        }
    }

    fn push(&mut self, block: Block) -> Id {
        // None is free, so there are as many as the table knows.
        let id = self.len();
        if id.is_multiple_of(PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        self.pages[id / PAGE].push(block);
        id as Id
    }

    /// A block was stored once more.
    pub(super) fn count_store(&mut self, id: Id) {
        self.raise(STORES, id);
    }

    /// A block that is stored was removed once. Returns whether it is no longer stored: then it is
    /// a hole, or [gone](Self::gone).
    pub(super) fn count_removal(&mut self, found: Found) -> bool {
        let id = found.id;
        if self.at(id).get(STORES) > 1 {
            self.lower(STORES, id);
            return false;
        }
        let block = self.at_mut(id);
        block.set(STORES, 0);
        let parent = block.get(PARENT) as Id;
        if block.get(CHILDREN) > 0 {
            let mut before = Vec::new();
            self.write_before(id, &mut before);
            let (name, before) = (found.name, before.into());
            self.holes.insert(u64::from(id), Hole { name, before });
            self.at_mut(id).set(PARENT, u64::from(NONE));
        } else {
            self.remove(found);
        }
        if parent != NONE {
            self.lower(CHILDREN, parent);
            let block = self.at(parent);
            if block.get(CHILDREN) == 0
                && block.get(STORES) == 0
                && let Some(hole) = self.holes.get(&u64::from(parent))
            {
                self.remove(self.find_name(hole.name));
            }
        }
        true
    }

    fn remove(&mut self, found: Found) {
        self.table.remove(found.at);
        let (id, block) = (found.id, self.at(found.id));
        self.gone.push(Gone {
            id,
            parent: block.get(PARENT) as Id,
            hash: block.hash,
            was_reachable: block.get(REACHABLE) > 0,
        });
    }

    /// Blocks that are gone, in the order in which they went, until they are
    /// [freed](Self::free_gone). Nothing must be stored before that.
    pub(super) fn gone(&self) -> &[Gone] {
        &self.gone
    }

    pub(super) fn free_gone(&mut self) {
        let mut gone = std::mem::take(&mut self.gone);
        for it in gone.drain(..) {
            if !self.holes.is_empty() {
                self.holes.remove(&u64::from(it.id));
            }
            let free = std::mem::replace(&mut self.free, it.id);
            let block = self.at_mut(it.id);
            block.set(REACHABLE, 0);
            block.set(PARENT, u64::from(free));
        }
        self.gone = gone;
    }

    /// Writes what is before a block, backwards to the last mark, or to where its sequence begins.
    pub(super) fn write_before(&self, id: Id, before: &mut Vec<SequenceHash>) {
        let mut at = id;
        for _ in 0..MOST_BEFORE {
            let Some(parent) = self.parent(at) else {
                if let Some(hole) = self.holes.get(&u64::from(at)) {
                    before.extend_from_slice(&hole.before);
                }
                return;
            };
            let hash = self.hash(parent);
            before.push(hash);
            if is_mark(hash) {
                return;
            }
            at = parent;
        }
    }

    pub(super) fn hash(&self, id: Id) -> SequenceHash {
        self.at(id).hash
    }

    pub(super) fn is_stored(&self, id: Id) -> bool {
        self.at(id).get(STORES) > 0
    }

    /// How often it is stored.
    pub(super) fn copies(&self, id: Id) -> u32 {
        let excess = self.excess.get(&excess_key(STORES, id));
        self.at(id).get(STORES) as u32 + excess.copied().unwrap_or(0)
    }

    pub(super) fn has_children(&self, id: Id) -> bool {
        self.at(id).get(CHILDREN) > 0
    }

    /// It and all blocks before it are stored, so that it can be hit: as last
    /// [said](Self::set_reachable), even of a hole.
    pub(super) fn is_reachable(&self, id: Id) -> bool {
        self.at(id).get(REACHABLE) > 0
    }

    pub(super) fn set_reachable(&mut self, id: Id, reachable: bool) {
        self.at_mut(id).set(REACHABLE, u64::from(reachable));
    }

    /// All blocks that can be hit.
    pub(super) fn reachable(&self) -> impl Iterator<Item = Id> {
        (0..self.ids() as Id).filter(|&id| self.is_reachable(id))
    }

    /// The block before it, if it is stored and that is known.
    pub(super) fn parent(&self, id: Id) -> Option<Id> {
        let parent = self.at(id).get(PARENT) as Id;
        (parent != NONE).then_some(parent)
    }

    /// What every id is below.
    pub(super) fn ids(&self) -> usize {
        let last = self.pages.last().map_or(0, Vec::len);
        self.pages.len().saturating_sub(1) * PAGE + last
    }

    /// Which blocks have all blocks before them stored, by id.
    pub(super) fn find_reachable(&self) -> Vec<bool> {
        #[derive(Clone, Copy, PartialEq)]
        enum Known {
            No,
            /// It is on the path that is looked at. Met again, it is its own ancestor.
            Asked,
            Reachable(bool),
        }
        let mut known = vec![Known::No; self.ids()];
        let mut path = Vec::new();
        for id in (0..self.ids() as Id).filter(|&id| self.is_stored(id)) {
            let mut ancestor = id;
            let reachable = loop {
                if ancestor == NONE {
                    break true;
                }
                match known[ancestor as usize] {
                    Known::Reachable(reachable) => break reachable,
                    Known::Asked => break false,
                    Known::No if !self.is_stored(ancestor) => break false,
                    Known::No => {}
                }
                known[ancestor as usize] = Known::Asked;
                path.push(ancestor);
                ancestor = self.at(ancestor).get(PARENT) as Id;
            };
            for id in path.drain(..) {
                known[id as usize] = Known::Reachable(reachable);
            }
        }
        let reachable = known.into_iter().map(|it| it == Known::Reachable(true));
        reachable.collect()
    }

    fn raise(&mut self, count: Field, id: Id) {
        let block = self.at_mut(id);
        if block.get(count) < count.most {
            block.fields += 1 << count.shift;
        } else {
            *self.excess.entry(excess_key(count, id)).or_default() += 1;
        }
    }

    fn lower(&mut self, count: Field, id: Id) {
        debug_assert!(self.at(id).get(count) > 0);
        if self.at(id).get(count) == count.most
            && let Some(excess) = self.excess.get_mut(&excess_key(count, id))
        {
            *excess -= 1;
            if *excess == 0 {
                self.excess.remove(&excess_key(count, id));
            }
        } else {
            self.at_mut(id).fields -= 1 << count.shift;
        }
    }

    fn at(&self, id: Id) -> &Block {
        &self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }

    fn at_mut(&mut self, id: Id) -> &mut Block {
        &mut self.pages[(id >> PAGE_BITS) as usize][id as usize % PAGE]
    }
}

fn excess_key(count: Field, id: Id) -> u64 {
    u64::from(count.shift) << 32 | u64::from(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    /// The name that comes to be `mixed`.
    fn name_of(mixed: u64) -> u64 {
        let product = mixed ^ mixed >> 32;
        let odd = 0x9E37_79B9_7F4A_7C15_u64;
        // Newton's iteration doubles the bits that are right.
        let inverse = (0..6).fold(odd, |inverse: u64, _| {
            inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)))
        });
        product.wrapping_mul(inverse)
    }

    #[derive(Clone, Debug, Default)]
    struct Model {
        stores: u32,
        parent: Option<u64>,
    }

    fn children(model: &HashMap<u64, Model>, name: u64) -> usize {
        let parents = model.values().filter(|it| it.stores > 0);
        parents.filter(|it| it.parent == Some(name)).count()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Among them names that are equal in what the table holds, in what the block holds, and
        /// in neither.
        #[test]
        fn blocks_are_counted_by_name(
            steps in prop::collection::vec((0..16u64, 0..16u64, any::<bool>()), 1..200)
        ) {
            let name = |it: u64| name_of(((it / 4 * 0x1234_5678_9ABC) << ID_BITS) | (it % 4));
            let mut blocks = Blocks::new();
            let mut model = HashMap::<u64, Model>::new();
            for (which, parent, stores) in steps {
                let found = blocks.find(name(which));
                let entry = model.entry(which).or_default();
                prop_assert_eq!(entry.stores > 0, found.id != NONE && blocks.is_stored(found.id));
                if entry.stores > 0 && stores {
                    entry.stores += 1;
                    blocks.count_store(found.id);
                } else if entry.stores > 0 {
                    entry.stores -= 1;
                    let gone = entry.stores == 0;
                    prop_assert_eq!(blocks.count_removal(found), gone);
                    blocks.free_gone();
                } else {
                    let parent_id = blocks.find_stored(name(parent));
                    entry.stores = 1;
                    entry.parent = parent_id.map(|_| parent);
                    let parent_id = parent_id.unwrap_or(NONE);
                    if found.id == NONE {
                        blocks.insert(found, parent_id, which, true).unwrap();
                    } else {
                        blocks.fill(found.id, parent_id, which);
                    }
                }
                let mut expected = 0;
                for which in 0..16 {
                    let stores = model.get(&which).map_or(0, |it| it.stores);
                    let children = children(&model, which);
                    let id = blocks.find(name(which)).id;
                    prop_assert_eq!(id != NONE, stores > 0 || children > 0);
                    if id != NONE {
                        expected += 1;
                        prop_assert_eq!(blocks.hash(id), which);
                        prop_assert_eq!(blocks.has_children(id), children > 0);
                    }
                }
                prop_assert_eq!(blocks.len(), expected);
                prop_assert!(blocks.holes.len() <= expected);
            }
        }
    }
}
