//! Sets of workers, each kept once, however many prefixes it holds.
//!
//! What many workers cache they cache in runs: a system prompt, a conversation up to where it
//! moved. So there are few sets, and a prefix needs only the number of its own.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use rapidhash::fast::RapidHasher;
use slab::Slab;

use crate::tree::Slot;

/// A set of workers: none, one, or the number of a set of several. Equal numbers mean equal sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holders(u32);

/// Bits of their number, which is stored with every prefix.
pub(super) const HOLDER_BITS: u32 = 26;

/// Marks the number of a set, where otherwise a worker's slot is.
const SEVERAL: u32 = 1 << (HOLDER_BITS - 1);

/// Sets that are kept at most. A fleet has thousands; what would need more is forgotten.
const MOST_SETS: usize = if cfg!(test) { 64 } else { 1 << 24 };

/// The largest number, but for nobody's.
pub(super) const MOST_HOLDERS: u32 = SEVERAL + MOST_SETS as u32 - 1;

impl Holders {
    pub(super) const NOBODY: Self = Self((1 << HOLDER_BITS) - 1);

    pub(super) fn bits(self) -> u32 {
        self.0
    }

    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    fn one(worker: Slot) -> Self {
        debug_assert!(worker < SEVERAL);
        Self(worker)
    }

    fn several(id: usize) -> Self {
        Self(id as u32 | SEVERAL)
    }

    /// The number of its set, if it is one of several.
    fn id(self) -> Option<usize> {
        (self.0 & SEVERAL != 0 && self != Self::NOBODY).then_some((self.0 & !SEVERAL) as usize)
    }
}

#[derive(Debug)]
struct Set {
    /// A bit for each worker, up to the last that is in it.
    members: Arc<[u64]>,
    /// How many prefixes have it.
    prefixes: u32,
}

/// A set, the worker that joined or left it, and what that made of it.
type Step = (Holders, Slot, Holders);

/// All sets of several workers.
#[derive(Debug, Default)]
pub(super) struct HolderSets {
    sets: Slab<Set>,
    by_members: HashMap<Arc<[u64]>, u32, BuildHasherDefault<RapidHasher<'static>>>,
    /// The last change from one set to another: along a run of blocks it comes again and again.
    last_step: Option<Step>,
    scratch: Vec<u64>,
}

impl HolderSets {
    /// Takes a prefix's holders and returns those with `worker` among them.
    pub(super) fn with(&mut self, holders: Holders, worker: Slot) -> Holders {
        if holders == Holders::NOBODY {
            return Holders::one(worker);
        }
        if self.contains(holders, worker) {
            return holders;
        }
        self.flip(holders, worker).unwrap_or(holders)
    }

    /// Takes a prefix's holders and returns those without `worker`.
    pub(super) fn without(&mut self, holders: Holders, worker: Slot) -> Holders {
        if !self.contains(holders, worker) {
            return holders;
        }
        if holders.id().is_none() {
            return Holders::NOBODY;
        }
        self.flip(holders, worker).unwrap_or_else(|| {
            self.leave(holders);
            Holders::NOBODY
        })
    }

    fn contains(&self, holders: Holders, worker: Slot) -> bool {
        match holders.id() {
            Some(id) => {
                let word = self.sets[id].members.get(worker as usize / 64);
                word.is_some_and(|word| word & bit(worker) != 0)
            }
            None => holders == Holders::one(worker),
        }
    }

    /// Lets `worker` in if it is out, and out if it is in. `None`, and nothing is changed, if that
    /// takes one set too many.
    fn flip(&mut self, from: Holders, worker: Slot) -> Option<Holders> {
        if let Some((last_from, last_worker, to)) = self.last_step
            && (last_from, last_worker) == (from, worker)
        {
            if let Some(id) = to.id() {
                self.sets[id].prefixes += 1;
            }
            self.leave(from);
            return Some(to);
        }
        let mut members = std::mem::take(&mut self.scratch);
        members.clear();
        if let Some(id) = from.id() {
            members.extend_from_slice(&self.sets[id].members);
        } else {
            flip(&mut members, from.0);
        }
        flip(&mut members, worker);
        while members.last() == Some(&0) {
            members.pop();
        }
        let to = self.enter(&members);
        self.scratch = members;
        let to = to?;
        self.last_step = Some((from, worker, to));
        self.leave(from);
        Some(to)
    }

    /// Counts one more prefix with these members, if that takes no set too many.
    fn enter(&mut self, members: &[u64]) -> Option<Holders> {
        let count: u32 = members.iter().map(|word| word.count_ones()).sum();
        if count == 1 {
            let word = members.len() - 1;
            let worker = word as Slot * 64 + members[word].trailing_zeros();
            return Some(Holders::one(worker));
        }
        if let Some(&id) = self.by_members.get(members) {
            self.sets[id as usize].prefixes += 1;
            return Some(Holders::several(id as usize));
        }
        if self.sets.len() == MOST_SETS {
            return None;
        }
        let members: Arc<[u64]> = members.into();
        let id = self.sets.insert(Set {
            members: Arc::clone(&members),
            prefixes: 1,
        });
        self.by_members.insert(members, id as u32);
        Some(Holders::several(id))
    }

    /// A prefix no longer has these holders.
    fn leave(&mut self, holders: Holders) {
        let Some(id) = holders.id() else {
            return;
        };
        self.sets[id].prefixes -= 1;
        if self.sets[id].prefixes == 0 {
            let set = self.sets.remove(id);
            self.by_members.remove(&set.members);
            // Its number may come to mean another set.
            self.last_step
                .take_if(|(from, _, to)| *from == holders || *to == holders);
        }
    }

    /// Calls `visit` for each of `holders` that is not one of `others`.
    pub(super) fn for_each_beyond(
        &self,
        holders: Holders,
        others: Holders,
        mut visit: impl FnMut(Slot),
    ) {
        let Some(id) = holders.id() else {
            if holders != Holders::NOBODY && !self.contains(others, holders.0) {
                visit(holders.0);
            }
            return;
        };
        let beside: &[u64] = match others.id() {
            Some(id) => &self.sets[id].members,
            None => &[],
        };
        for (index, &word) in self.sets[id].members.iter().enumerate() {
            let mut left = word & !beside.get(index).unwrap_or(&0);
            while left != 0 {
                let worker = index as Slot * 64 + left.trailing_zeros();
                if others != Holders::one(worker) {
                    visit(worker);
                }
                left &= left - 1;
            }
        }
    }
}

fn bit(worker: Slot) -> u64 {
    1 << (worker % 64)
}

fn flip(members: &mut Vec<u64>, worker: Slot) {
    let word = worker as usize / 64;
    members.resize(members.len().max(word + 1), 0);
    members[word] ^= bit(worker);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    use proptest::prelude::*;

    const WORKERS: [Slot; 7] = [0, 1, 63, 64, 65, 127, 4095];

    fn beyond(sets: &HolderSets, holders: Holders, others: Holders) -> BTreeSet<Slot> {
        let mut found = BTreeSet::new();
        sets.for_each_beyond(holders, others, |worker| {
            assert!(found.insert(worker), "visited twice");
        });
        found
    }

    proptest! {
        #[test]
        fn equal_sets_have_equal_numbers_and_none_is_left(
            steps in prop::collection::vec((0..4usize, 0..WORKERS.len(), any::<bool>()), 0..200)
        ) {
            let mut sets = HolderSets::default();
            let mut prefixes = [Holders::NOBODY; 4];
            let mut models: [BTreeSet<Slot>; 4] = Default::default();
            for (prefix, worker, joins) in steps {
                let (worker, holders) = (WORKERS[worker], prefixes[prefix]);
                prefixes[prefix] = if joins {
                    models[prefix].insert(worker);
                    sets.with(holders, worker)
                } else {
                    models[prefix].remove(&worker);
                    sets.without(holders, worker)
                };
                for (&one, model) in prefixes.iter().zip(&models) {
                    for (&other, beside) in prefixes.iter().zip(&models) {
                        prop_assert_eq!(one == other, model == beside);
                        let difference: BTreeSet<Slot> = model - beside;
                        prop_assert_eq!(beyond(&sets, one, other), difference);
                    }
                }
            }
            for (holders, model) in prefixes.iter_mut().zip(&models) {
                for &worker in model {
                    *holders = sets.without(*holders, worker);
                }
                prop_assert_eq!(*holders, Holders::NOBODY);
            }
            prop_assert!(sets.sets.is_empty() && sets.by_members.is_empty());
        }
    }

    #[test]
    fn sets_are_bounded() {
        let mut sets = HolderSets::default();
        let both = |sets: &mut HolderSets, one, other| {
            let holders = sets.with(Holders::NOBODY, one);
            sets.with(holders, other)
        };
        let others = 1..MOST_SETS as Slot;
        let pairs: Vec<Holders> = others.map(|it| both(&mut sets, 0, it)).collect();
        let pair = both(&mut sets, 100, 101);
        // One more cannot join, until there is room for one more set.
        assert_eq!(sets.with(pair, 102), pair);
        assert_eq!(sets.without(pairs[0], 0), Holders::one(1));
        let three = sets.with(pair, 102);
        assert_eq!(
            beyond(&sets, three, Holders::NOBODY),
            [100, 101, 102].into()
        );
        // One cannot leave: then none is known to stay.
        both(&mut sets, 0, 1);
        assert_eq!(sets.sets.len(), MOST_SETS);
        assert_eq!(sets.without(three, 100), Holders::NOBODY);
        assert_eq!(sets.sets.len(), MOST_SETS - 1);
    }
}
