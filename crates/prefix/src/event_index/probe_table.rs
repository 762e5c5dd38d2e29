//! Hash table sorted by key, about a third of which is empty.
//!
//! Keys are uniform, so the place of an entry follows from its key, and the entry is never far from
//! it: linear probing with ordered runs (Amble and Knuth, *Ordered hash tables*, 1974). Because of
//! the order, a look-up of a missing key ends at the place where the key would be, so the table may
//! be rather full. Resizing copies the entries from front to back, so the table may grow in small
//! steps.

/// Element of a table: an entry, or an empty slot.
pub(super) trait TableSlot: Copy {
    /// Empty slot. Its key is the largest possible.
    const EMPTY: Self;

    /// Returns the sort key, which must be uniform over all 64-bit numbers.
    fn key(&self) -> u64;

    /// Returns whether this is the empty slot.
    fn is_empty(&self) -> bool;
}

/// Maximum number of entries per 100 buckets. Beyond it, the table grows by a thirty-second part. A
/// fuller table has longer runs of entries, and every change moves a part of a run: a limit of 78
/// saves 2 bytes per block, but made applying events noticeably slower.
const MAX_LOAD_PERCENT: usize = 68;
/// Number of entries per 100 buckets below which the table shrinks.
const MIN_LOAD_PERCENT: usize = 40;
/// Number of buckets below which the table never shrinks.
const MIN_BUCKETS: usize = 8;

/// Hash table with entries sorted by key. Several entries may share a key.
#[derive(Debug)]
pub(super) struct OrderedHashTable<E> {
    /// One slot for each bucket, and more at the end if the last run of entries does not fit.
    entries: Vec<E>,
    /// Number of places to which keys are mapped.
    buckets: usize,
    /// Number of entries.
    len: usize,
}

impl<E> Default for OrderedHashTable<E> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            buckets: 0,
            len: 0,
        }
    }
}

impl<E: TableSlot> OrderedHashTable<E> {
    /// Returns the number of entries.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the index of the entry with this key for which `is_match` holds. Otherwise returns,
    /// as the error, the index at which to insert: that of the first entry with this key, or the
    /// place for it.
    pub(super) fn find(&self, key: u64, is_match: impl Fn(&E) -> bool) -> Result<usize, usize> {
        let first = self.seek(key);
        let mut index = first;
        while let Some(entry) = self.get(index)
            && entry.key() == key
        {
            if is_match(entry) {
                return Ok(index);
            }
            index += 1;
        }
        Err(first)
    }

    /// Returns the index of the first slot whose key is not smaller than `key`.
    fn seek(&self, key: u64) -> usize {
        let mut index = self.ideal_index(key);
        while self
            .entries
            .get(index)
            .is_some_and(|entry| entry.key() < key)
        {
            index += 1;
        }
        index
    }

    /// Returns the entry at `index`; `None` if the slot is empty.
    pub(super) fn get(&self, index: usize) -> Option<&E> {
        self.entries.get(index).filter(|entry| !entry.is_empty())
    }

    /// Reads the slots where the key and the rest of its run are likely to be. With several keys to
    /// look up, reading all first lets the processor wait for memory only once.
    pub(super) fn prefetch(&self, key: u64) {
        let entries_per_line = 64 / size_of::<E>();
        let ideal = self.ideal_index(key);
        for index in [ideal, ideal + entries_per_line] {
            std::hint::black_box(self.entries.get(index).map(TableSlot::key));
        }
    }

    /// Returns the bucket of a key. Larger keys never have smaller buckets.
    fn ideal_index(&self, key: u64) -> usize {
        (((key >> 32) * self.buckets as u64) >> 32) as usize
    }

    /// Inserts an entry at the index that [`find`](Self::find) has just returned as the error,
    /// before other entries with its key. May resize the table: all indices returned before are
    /// invalid.
    pub(super) fn insert(&mut self, mut index: usize, entry: E) {
        if (self.len + 1) * 100 > self.buckets * MAX_LOAD_PERCENT {
            self.resize(self.buckets + self.buckets / 32 + 1);
            index = self.seek(entry.key());
        }
        // Entries in the way move down by one, up to the next empty slot.
        let mut displaced = entry;
        while !displaced.is_empty() {
            match self.entries.get_mut(index) {
                Some(slot) => displaced = std::mem::replace(slot, displaced),
                None => {
                    push(&mut self.entries, displaced);
                    break;
                }
            }
            index += 1;
        }
        self.len += 1;
    }

    /// Removes the entry at `index`, which must not be empty. May resize the table: all indices
    /// returned before are invalid.
    pub(super) fn remove(&mut self, mut index: usize) {
        // The entries that follow move up, but not above their own bucket.
        while let Some(&next) = self.get(index + 1)
            && self.ideal_index(next.key()) <= index
        {
            self.entries[index] = next;
            index += 1;
        }
        self.entries[index] = E::EMPTY;
        self.len -= 1;
        if self.len * 100 < self.buckets * MIN_LOAD_PERCENT && self.buckets > MIN_BUCKETS {
            self.resize(self.len * 4 / 3);
        }
    }

    /// Rebuilds the table with `buckets` buckets, or with [`MIN_BUCKETS`] if that is more. All
    /// indices change.
    fn resize(&mut self, buckets: usize) {
        self.buckets = buckets.max(MIN_BUCKETS);
        let old = std::mem::take(&mut self.entries);
        let mut entries = Vec::with_capacity(self.buckets + 4);
        for entry in old.into_iter().filter(|entry| !entry.is_empty()) {
            let ideal = self.ideal_index(entry.key());
            if entries.len() < ideal {
                entries.resize(ideal, E::EMPTY);
            }
            push(&mut entries, entry);
        }
        if entries.len() < self.buckets {
            entries.resize(self.buckets, E::EMPTY);
        }
        self.entries = entries;
    }
}

/// Appends an entry without doubling the allocation.
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

    impl TableSlot for Pair {
        const EMPTY: Self = Self(u64::MAX, u32::MAX);

        fn key(&self) -> u64 {
            self.0
        }

        fn is_empty(&self) -> bool {
            self.1 == u32::MAX
        }
    }

    /// Generates keys of all sizes, many of them close together at either end, up to the largest.
    fn key() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => any::<u64>(),
            2 => (0..40u64).prop_map(|high| high << 40),
            1 => (0..40u64).prop_map(|distance| u64::MAX - distance),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn a_table_behaves_like_a_map(steps in prop::collection::vec((key(), 0..100u32), 0..400)) {
            let mut table = OrderedHashTable::<Pair>::default();
            let mut model = BTreeMap::new();
            for (key, value) in steps {
                // Several entries may share a key.
                let found = table.find(key, |entry| entry.1 % 2 == value % 2);
                let is_known = model.contains_key(&(key, value % 2));
                prop_assert_eq!(found.is_ok(), is_known);
                match found {
                    Err(at) => {
                        table.insert(at, Pair(key, value));
                        model.insert((key, value % 2), value);
                    }
                    Ok(at) => {
                        let removed = model.remove(&(key, value % 2));
                        prop_assert_eq!(table.get(at).map(|entry| entry.1), removed);
                        table.remove(at);
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                // A table never stays so empty that it wastes memory.
                prop_assert!(table.entries.len() <= MIN_BUCKETS + 3 * model.len() + 32);
            }
            let remaining = table.entries.iter().filter(|entry| !entry.is_empty());
            let mut remaining: Vec<_> = remaining.map(|entry| ((entry.0, entry.1 % 2), entry.1)).collect();
            prop_assert!(remaining.is_sorted_by_key(|entry| entry.0.0));
            remaining.sort_unstable();
            prop_assert_eq!(remaining, model.into_iter().collect::<Vec<_>>());
        }
    }
}
