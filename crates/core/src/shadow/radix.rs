//! What SGLang's rule (`UnifiedRadixCache`, and `RadixCache` before it) does otherwise than vLLM's.
//!
//! Its cache is a radix tree, of which it evicts whole leaves, the least recently used first: a
//! node ends where a prompt left the tree, where a prompt ended and where an answer did. Whatever
//! uses a node uses all above it, so what one request used last lies on one path here as well, and
//! the queue of the freed is in the order of their use. A prompt that leaves the tree in the middle
//! of a node divides it, which renews its lower part, though nothing uses that.
//!
//! Where a request computes what is cached already, its copy goes when it is done. Before it takes
//! blocks, SGLang frees one more for each request that will: a prompt before it is computed, a
//! running request before each of its tokens.
//!
//! Here a prompt uses its path from the booking on. SGLang does not lock that before it admits the
//! request, so one that waits for memory may lose more than is foreseen; and of prompts that begin
//! alike and are admitted at once, each computes all of its own.

use crate::shadow::{Eviction, Shadow};
use crate::tree::{Pinned, PrefixTree, Slot};

impl Shadow {
    pub(crate) fn set_eviction(&mut self, eviction: Eviction) {
        self.eviction = eviction;
    }

    /// Whether blocks that are computed again are cached twice.
    pub(crate) fn keeps_copies(&self) -> bool {
        self.eviction == Eviction::Queue
    }

    /// What a request wants freed beyond the blocks it takes was `before` blocks and is `now`.
    pub(crate) fn change_headroom(&mut self, before: u32, now: u32) {
        self.headroom = self.headroom + u64::from(now) - u64::from(before);
    }

    /// Blocks to be freed, beyond the headroom, for a request that holds so many twice until it is
    /// computed. Those of the headroom that are not for its prompt will do.
    pub(crate) fn room_for_copies(&self, copies: u32) -> u64 {
        let wanted = if copies > 0 { copies + 1 } else { 0 };
        u64::from(wanted).saturating_sub(self.headroom)
    }

    /// A path was pinned of which the first `reusable` blocks at most are taken from the cache:
    /// the engine's nodes end where it does, and where it leaves what was there. Returns how many
    /// blocks are there twice until the request is computed.
    pub(crate) fn divide(
        &mut self,
        pinned: &Pinned,
        reusable: u32,
        worker: Slot,
        tree: &mut PrefixTree,
    ) -> u32 {
        if self.eviction != Eviction::Radix {
            return 0;
        }
        let divided = tree.divide(pinned.node, worker, pinned.held);
        if let (Some(above), Some(run)) = (divided, pinned.revived.first()) {
            let stamp = self.next_stamp();
            if let Some(entry) = self.entry_mut(run.freed_by)
                && let Some(rest) = tree.renew_below(above, entry.node, worker, entry.stamp, stamp)
            {
                entry.cached -= rest.cached;
                self.cached -= u64::from(rest.cached);
                self.free -= u64::from(rest.cached);
                self.freed(rest, 0, stamp);
            }
        }
        tree.divide(pinned.node, worker, pinned.held.min(reusable));
        tree.divide(pinned.node, worker, pinned.path);
        pinned.held.saturating_sub(reusable)
    }
}
