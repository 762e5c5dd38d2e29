//! Scratch for one decision: how deep its prompt reaches on each worker.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use crate::tree::Depth;

thread_local! {
    // Each thread's own: rewritten at every decision, it would otherwise wander between the
    // processors' caches with the lock.
    static SPARE: Cell<Vec<Depth>> = const { Cell::new(Vec::new()) };
}

/// A depth per slot. Its memory is used again by the thread's next decision.
#[derive(Debug)]
pub(crate) struct Depths(Vec<Depth>);

impl Depths {
    /// Zero for each of `slots` workers.
    pub(crate) fn zero(slots: usize) -> Self {
        let mut depths = SPARE.take();
        depths.clear();
        depths.resize(slots, Depth::default());
        Self(depths)
    }

    /// The largest overlap of any worker.
    pub(crate) fn best_overlap(&self) -> u32 {
        let overlaps = self.0.iter().map(|depth| depth.overlap());
        overlaps.max().unwrap_or(0)
    }
}

impl Drop for Depths {
    fn drop(&mut self) {
        SPARE.set(std::mem::take(&mut self.0));
    }
}

impl Deref for Depths {
    type Target = [Depth];

    fn deref(&self) -> &[Depth] {
        &self.0
    }
}

impl DerefMut for Depths {
    fn deref_mut(&mut self) -> &mut [Depth] {
        &mut self.0
    }
}
