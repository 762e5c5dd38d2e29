//! Values with stable small ids, in pages that never move.
//!
//! A [`Slab`] in one allocation is copied whenever it grows, which takes milliseconds with a hundred
//! thousand values. The router's lock would be held meanwhile.

use std::ops::{Index, IndexMut};

use slab::Slab;

const PAGE_BITS: u32 = 9;
/// Values per page.
const PAGE: usize = 1 << PAGE_BITS;

/// Values by id. Ids of removed values are reused.
#[derive(Debug)]
pub struct PagedSlab<T> {
    /// Pages, each allocated at once for [`PAGE`] values. Of the pages without values, all but one
    /// are not allocated.
    pages: Vec<Slab<T>>,
    /// Whether an allocated page has no values.
    has_spare_page: bool,
    /// Indices of the pages that are not full.
    with_room: Vec<usize>,
    /// Number of values.
    len: usize,
}

impl<T> Default for PagedSlab<T> {
    fn default() -> Self {
        Self {
            pages: Vec::new(),
            has_spare_page: false,
            with_room: Vec::new(),
            len: 0,
        }
    }
}

impl<T> PagedSlab<T> {
    /// Stores a value and returns its id.
    pub fn insert(&mut self, value: T) -> usize {
        let page_index = match self.with_room.last() {
            Some(&page_index) => page_index,
            None => {
                self.pages.push(Slab::new());
                self.with_room.push(self.pages.len() - 1);
                self.pages.len() - 1
            }
        };
        let page = &mut self.pages[page_index];
        match page.capacity() {
            0 => *page = Slab::with_capacity(PAGE),
            _ if page.is_empty() => self.has_spare_page = false,
            _ => {}
        }
        let index = page.insert(value);
        if page.len() == PAGE {
            self.with_room.pop();
        }
        self.len += 1;
        page_index << PAGE_BITS | index
    }

    /// Removes the value with this id and returns it; `None` if there is none.
    pub fn remove(&mut self, id: usize) -> Option<T> {
        let page = self.pages.get_mut(id >> PAGE_BITS)?;
        let was_full = page.len() == PAGE;
        let value = page.try_remove(id % PAGE)?;
        if was_full {
            self.with_room.push(id >> PAGE_BITS);
        }
        if page.is_empty() {
            match self.has_spare_page {
                true => *page = Slab::new(),
                false => self.has_spare_page = true,
            }
        }
        self.len -= 1;
        Some(value)
    }

    /// Returns the value with this id.
    #[inline]
    #[must_use]
    pub fn get(&self, id: usize) -> Option<&T> {
        self.pages.get(id >> PAGE_BITS)?.get(id % PAGE)
    }

    /// Returns the value with this id, for writing.
    #[inline]
    pub fn get_mut(&mut self, id: usize) -> Option<&mut T> {
        self.pages.get_mut(id >> PAGE_BITS)?.get_mut(id % PAGE)
    }

    /// Returns the number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns a number above all ids in use.
    #[must_use]
    pub fn id_end(&self) -> usize {
        self.pages.len() * PAGE
    }

    /// Returns all values with their ids.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.pages
            .iter()
            .enumerate()
            .flat_map(|(page_index, page)| {
                page.iter()
                    .map(move |(index, value)| (page_index << PAGE_BITS | index, value))
            })
    }
}

impl<T> Index<usize> for PagedSlab<T> {
    type Output = T;

    #[inline]
    fn index(&self, id: usize) -> &T {
        &self.pages[id >> PAGE_BITS][id % PAGE]
    }
}

impl<T> IndexMut<usize> for PagedSlab<T> {
    #[inline]
    fn index_mut(&mut self, id: usize) -> &mut T {
        &mut self.pages[id >> PAGE_BITS][id % PAGE]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Compares the slab with a map, over more values than a page has.
        #[test]
        fn a_paged_slab_behaves_like_a_map(
            steps in prop::collection::vec((0..3_u8, any::<prop::sample::Index>()), 1..60)
        ) {
            let (mut slab, mut model) = (PagedSlab::default(), BTreeMap::new());
            let mut next = 0_u64;
            for (kind, selector) in steps {
                // Values come and go in bursts, so that pages fill and empty.
                for _ in 0..PAGE / 4 {
                    if kind < 2 || model.is_empty() {
                        let id = slab.insert(next);
                        prop_assert_eq!(model.insert(id, next), None);
                        next += 1;
                    } else {
                        let id = *model.keys().nth(selector.index(model.len())).unwrap_or(&0);
                        prop_assert_eq!(slab.remove(id), model.remove(&id));
                        prop_assert_eq!(slab.remove(id), None);
                    }
                }
                prop_assert_eq!(slab.len(), model.len());
                prop_assert!(slab.iter().map(|(id, value)| (id, *value)).eq(model.clone()));
                prop_assert!(model.keys().all(|&id| id < slab.id_end()));
                let is_spare = |page: &&Slab<u64>| page.is_empty() && page.capacity() > 0;
                let spare_pages = slab.pages.iter().filter(is_spare).count();
                prop_assert_eq!(spare_pages, usize::from(slab.has_spare_page));
            }
        }
    }
}
