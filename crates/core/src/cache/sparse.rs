//! A table sorted by key, of which a third is gaps.
//!
//! Keys are uniform, so where an entry belongs follows from its key, and it is never far from
//! there: linear probing with the runs kept in order (Amble and Knuth, 1974). In order, a look-up
//! of what is not there ends where it would be, so the table may be rather full; and to grow it is
//! to copy from front to back, so it may grow a little at a time.

/// What a table is made of.
pub(super) trait Entry: Copy {
    /// An entry that is none. Its key is the largest.
    const GAP: Self;

    /// What entries are sorted by: uniform over all 64-bit numbers.
    fn key(&self) -> u64;

    fn is_gap(&self) -> bool;
}

/// Entries in a hundred places, at most: beyond that, the table grows by a thirty-second part. The
/// fuller, the longer its runs, of which every change moves a part: events are applied faster by a
/// tenth than at 78, which saves 2 bytes a block.
const MOST_IN_HUNDRED: usize = 68;
/// When there are fewer, it shrinks.
const LEAST_IN_HUNDRED: usize = 40;
const FEWEST_PLACES: usize = 8;

#[derive(Debug)]
pub(super) struct Sparse<E> {
    /// One in each place, and beyond, where the last run does not fit.
    entries: Vec<E>,
    places: usize,
    len: usize,
}

impl<E> Default for Sparse<E> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            places: 0,
            len: 0,
        }
    }
}

impl<E: Entry> Sparse<E> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where the entry with this key is that is looked for, or else where those with its key begin,
    /// or would.
    pub(super) fn find(&self, key: u64, is_it: impl Fn(&E) -> bool) -> Result<usize, usize> {
        let first = self.seek(key);
        let mut at = first;
        while let Some(entry) = self.get(at)
            && entry.key() == key
        {
            if is_it(entry) {
                return Ok(at);
            }
            at += 1;
        }
        Err(first)
    }

    fn seek(&self, key: u64) -> usize {
        let mut at = self.home(key);
        while self.entries.get(at).is_some_and(|entry| entry.key() < key) {
            at += 1;
        }
        at
    }

    /// The entry at a place, unless that is a gap.
    pub(super) fn get(&self, at: usize) -> Option<&E> {
        self.entries.get(at).filter(|entry| !entry.is_gap())
    }

    /// Reads where a key belongs, and on to where its run is likely to end. Reading for several
    /// keys before looking them up lets the processor wait for memory only once.
    pub(super) fn touch(&self, key: u64) {
        let line = 64 / size_of::<E>();
        let home = self.home(key);
        for at in [home, home + line] {
            std::hint::black_box(self.entries.get(at).map(Entry::key));
        }
    }

    /// Where a key belongs: no less than where smaller ones do.
    fn home(&self, key: u64) -> usize {
        (((key >> 32) * self.places as u64) >> 32) as usize
    }

    /// Inserts an entry before those of its key, whose place [`find`](Self::find) has just told.
    pub(super) fn insert(&mut self, mut at: usize, entry: E) {
        if (self.len + 1) * 100 > self.places * MOST_IN_HUNDRED {
            self.resize(self.places + self.places / 32 + 1);
            at = self.seek(entry.key());
        }
        // What is in the way moves down by one, up to the next gap.
        let mut moved = entry;
        while !moved.is_gap() {
            match self.entries.get_mut(at) {
                Some(place) => moved = std::mem::replace(place, moved),
                None => {
                    push(&mut self.entries, moved);
                    break;
                }
            }
            at += 1;
        }
        self.len += 1;
    }

    pub(super) fn remove(&mut self, mut at: usize) {
        // What follows moves up, but not beyond where it belongs.
        while let Some(&next) = self.get(at + 1)
            && self.home(next.key()) <= at
        {
            self.entries[at] = next;
            at += 1;
        }
        self.entries[at] = E::GAP;
        self.len -= 1;
        if self.len * 100 < self.places * LEAST_IN_HUNDRED && self.places > FEWEST_PLACES {
            self.resize(self.len * 4 / 3);
        }
    }

    fn resize(&mut self, places: usize) {
        self.places = places.max(FEWEST_PLACES);
        let old = std::mem::take(&mut self.entries);
        let mut entries = Vec::with_capacity(self.places + 4);
        for entry in old.into_iter().filter(|it| !it.is_gap()) {
            let home = self.home(entry.key());
            if entries.len() < home {
                entries.resize(home, E::GAP);
            }
            push(&mut entries, entry);
        }
        if entries.len() < self.places {
            entries.resize(self.places, E::GAP);
        }
        self.entries = entries;
    }
}

/// Pushes without doubling what the entries take.
fn push<E>(entries: &mut Vec<E>, entry: E) {
    if entries.len() == entries.capacity() {
        entries.reserve_exact(8);
    }
    entries.push(entry);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Pair(u64, u32);

    impl Entry for Pair {
        const GAP: Self = Self(u64::MAX, u32::MAX);

        fn key(&self) -> u64 {
            self.0
        }

        fn is_gap(&self) -> bool {
            self.1 == u32::MAX
        }
    }

    /// Keys of all sizes, many of them near each other, at either end, or the largest.
    fn key() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => any::<u64>(),
            2 => (0..40u64).prop_map(|it| it << 40),
            1 => (0..40u64).prop_map(|it| u64::MAX - it),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn a_table_is_a_map(steps in prop::collection::vec((key(), 0..100u32), 0..400)) {
            let mut table = Sparse::<Pair>::default();
            let mut model = BTreeMap::new();
            for (key, value) in steps {
                // Some entries share their keys.
                let found = table.find(key, |it| it.1 % 2 == value % 2);
                let is_known = model.contains_key(&(key, value % 2));
                prop_assert_eq!(found.is_ok(), is_known);
                match found {
                    Err(at) => {
                        table.insert(at, Pair(key, value));
                        model.insert((key, value % 2), value);
                    }
                    Ok(at) => {
                        let removed = model.remove(&(key, value % 2));
                        prop_assert_eq!(table.get(at).map(|it| it.1), removed);
                        table.remove(at);
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                // At rest, none is too empty to be worth its memory.
                prop_assert!(table.entries.len() <= FEWEST_PLACES + 3 * model.len() + 32);
            }
            let left = table.entries.iter().filter(|it| !it.is_gap());
            let mut left: Vec<_> = left.map(|it| ((it.0, it.1 % 2), it.1)).collect();
            prop_assert!(left.is_sorted_by_key(|it| it.0.0));
            left.sort_unstable();
            prop_assert_eq!(left, model.into_iter().collect::<Vec<_>>());
        }
    }
}
