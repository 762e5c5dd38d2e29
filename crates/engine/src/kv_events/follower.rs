//! State of one worker's event stream: which batch is next, and which blocks the applied ones left in
//! the cache. Pure: messages are parameters, wherever they come from.

use std::num::NonZeroU32;

use foresee_core::event_index::{CacheDelta, CacheView, StoredBlocks};
use foresee_core::sequence::{self, SequenceHash};

use super::repeated_stores::RepeatedStores;
use super::{
    Adapter, Attention, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, Medium, Message,
    decode_batch,
};

/// Number of successive undecodable batches from which on the stream counts as unreadable.
const MAX_UNREADABLE: u32 = 3;

/// Result of [`Follower::receive`].
#[derive(Debug, PartialEq)]
pub enum Received {
    /// The batch was the next one and was applied; these are the changes, event by event.
    Applied(Vec<CacheDelta>),
    /// The batch was applied before, or belongs to another rank; nothing changed.
    AlreadyApplied,
    /// Batches are missing before this one; the first has this sequence number. The batch was not
    /// applied.
    Gap(u64),
    /// Another engine process (or another rank) sent the batch: its sequence numbers and its cache
    /// start anew. These blocks were removed; the batch was not applied.
    Restarted(CacheDelta),
}

/// The last batch that was applied. Its number and time distinguish one engine process from the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastBatch {
    /// Sequence number.
    pub sequence: u64,
    /// Time by the engine's clock, in seconds since 1970; `None` if the engine sends none.
    pub timestamp: Option<f64>,
}

/// Follows the event stream of one engine.
#[derive(Debug)]
pub struct Follower {
    /// The engine's cache according to the batches applied.
    view: CacheView,
    /// Stores that may be listings of cached blocks.
    repeated_stores: RepeatedStores,
    /// The router's block size.
    block_size: NonZeroU32,
    /// Name of the base model, which is part of its blocks' hashes.
    model: String,
    /// The last batch applied; `None` before the first.
    last: Option<LastBatch>,
    /// The worker's configured data-parallel rank, if it has one.
    own_rank: Option<u32>,
    /// The rank that is followed: `own_rank` or, without one, the rank of the first batch.
    rank: Option<u32>,
    /// Another rank that sent batches here. Its sequence numbers and blocks are its own, so the
    /// stream is unusable.
    other_rank: Option<u32>,
    /// Whether no batch has arrived since the last connection was made. Until then the address may
    /// have passed to another rank.
    accepts_any_rank: bool,
    /// The KV cache group that is followed: the first seen whose layers attend to all tokens. A
    /// prefix that is cached for one such group is cached for all. The inner `None` is the group of
    /// an engine that names no groups.
    group: Option<Option<u32>>,
    /// Whether a batch was missed or could not be read since the cache was last empty.
    missed: bool,
    /// Number of successive batches that could not be decoded.
    unreadable: u32,
    /// Tokens per engine block; 0 before the first store.
    engine_block_size: u32,
    /// An engine block size that is not a multiple of the router's.
    unsupported_block_size: Option<u32>,
}

impl Follower {
    /// Creates a follower of an engine with an empty cache. `block_size` is the router's; `rank` is
    /// the worker's configured rank.
    #[must_use]
    pub fn new(block_size: NonZeroU32, model: String, rank: Option<u32>) -> Self {
        Self {
            view: CacheView::new(block_size),
            repeated_stores: RepeatedStores::new(block_size),
            block_size,
            model,
            last: None,
            own_rank: rank,
            rank,
            other_rank: None,
            accepts_any_rank: true,
            group: None,
            missed: false,
            unreadable: 0,
            engine_block_size: 0,
            unsupported_block_size: None,
        }
    }

    /// Returns a follower with an empty cache for the same worker, serving `model`. Keeps the rank
    /// and the full report mode.
    #[must_use]
    pub fn for_new_process(&self, model: String) -> Self {
        Self {
            repeated_stores: self.repeated_stores.for_new_process(),
            rank: self.rank,
            ..Self::new(self.block_size, model, self.own_rank)
        }
    }

    /// Returns the name of the base model.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Returns the last batch that was applied.
    #[must_use]
    pub fn last(&self) -> Option<LastBatch> {
        self.last
    }

    /// Returns all cached blocks as stored blocks, for an empty index.
    #[must_use]
    pub fn snapshot(&self) -> CacheDelta {
        self.view.snapshot()
    }

    /// Returns the number of distinct blocks in the view.
    #[must_use]
    pub fn cached_blocks(&self) -> usize {
        self.view.len()
    }

    /// Returns whether the view is exact: nothing was missed since the cache was last empty.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.missed && self.view.is_complete()
    }

    /// Announces a prompt of exactly one engine block that was sent.
    pub fn expect(&mut self, prompt: SequenceHash) {
        self.repeated_stores.expect(prompt);
    }

    /// Returns the number of tokens per engine block; 0 before the first store.
    #[must_use]
    pub fn engine_block_size(&self) -> u32 {
        self.engine_block_size
    }

    /// Marks the view as not exact, because responses contradict it.
    pub fn mark_uncertain(&mut self) {
        self.missed = true;
    }

    /// Returns whether the engine is in full report mode: repeated stores are listings.
    #[must_use]
    pub fn is_full_report(&self) -> bool {
        self.repeated_stores.is_full_report()
    }

    /// Returns whether stores were counted that may be listings.
    #[must_use]
    pub fn has_uncertain_stores(&self) -> bool {
        self.repeated_stores.excess() > 0
    }

    /// Returns whether the view contains more than `capacity` engine blocks, and would not without
    /// its uncertain stores.
    #[must_use]
    pub fn is_overfull(&self, capacity: u32) -> bool {
        let (stored, excess) = (self.view.stored_blocks(), self.repeated_stores.excess());
        let capacity = u64::from(capacity);
        stored > capacity && stored.saturating_sub(excess) <= capacity
    }

    /// Enters full report mode: uncertain stores are undone, and later ones ignored. Returns the
    /// changes.
    pub fn undo_repeated_stores(&mut self) -> Vec<CacheDelta> {
        self.repeated_stores.undo(&mut self.view)
    }

    /// Returns the number of successive batches, up to the last one, that could not be decoded.
    #[must_use]
    pub fn unreadable_batches(&self) -> u32 {
        self.unreadable
    }

    /// Returns why the events cannot be used and what to do about it; `None` if they can. Of
    /// several faults, returns one.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        if let (Some(other), Some(expected)) = (self.other_rank, self.rank) {
            return Some(format!(
                "received events of data-parallel rank {other} where rank {expected} publishes; \
                 give each rank its own endpoint, or add ranks=N to the worker"
            ));
        }
        if let Some(engine_block_size) = self.unsupported_block_size {
            let block_size = self.block_size;
            return Some(format!(
                "engine block size {engine_block_size} is not a multiple of --block-size \
                 {block_size}; set --block-size to the engine's block size"
            ));
        }
        (self.unreadable >= MAX_UNREADABLE).then(|| "event batches cannot be decoded".to_owned())
    }

    /// Applies a message if it is the next batch; the first has number 0. An undecodable batch
    /// counts as applied, without changes, and makes the view inexact.
    ///
    /// Otherwise applies nothing and returns how the message relates to the batches applied so far.
    /// After [`Received::Restarted`] the view is empty, and the message can be passed again. A
    /// message of another rank in the middle of a connection is ignored and becomes a
    /// [`fault`](Self::fault).
    pub fn receive(&mut self, message: &Message<'_>) -> Received {
        let next = self.last.map_or(0, |last| last.sequence.saturating_add(1));
        let decoded = decode_batch(message.payload);
        let sender = decoded
            .as_ref()
            .ok()
            .and_then(|batch| batch.data_parallel_rank);
        let accepts_any_rank = std::mem::take(&mut self.accepts_any_rank);
        if let Some(sender) = sender
            && *self.rank.get_or_insert(sender) != sender
        {
            if accepts_any_rank && self.own_rank.is_none() {
                return Received::Restarted(self.clear());
            }
            self.other_rank = Some(sender);
            return Received::AlreadyApplied;
        }
        if message.sequence > next {
            return Received::Gap(next);
        }
        let timestamp = decoded.as_ref().ok().and_then(|batch| batch.timestamp);
        if let Some(last) = self.last
            && message.sequence < next
        {
            // Replay and the live stream overlap, so a lower number alone is no evidence of a
            // restart. A later timestamp is or, for engines without timestamps, the first number.
            let is_new_process = match (timestamp, last.timestamp) {
                (Some(now), Some(before)) => now > before,
                _ => message.sequence == 0 && last.sequence > 0,
            };
            if is_new_process {
                return Received::Restarted(self.clear());
            }
            return Received::AlreadyApplied;
        }
        self.last = Some(LastBatch {
            sequence: message.sequence,
            timestamp,
        });
        let Ok(batch) = decoded else {
            self.unreadable += 1;
            self.missed = true;
            return Received::Applied(Vec::new());
        };
        self.unreadable = 0;
        Received::Applied(self.apply(&batch))
    }

    /// Continues at batch `sequence` although earlier ones are missing: that batch is the next, and
    /// the view is not exact.
    ///
    /// If more batches are missing than blocks are stored, hardly any of the known blocks can still
    /// be cached, since each batch took some. Then all are removed, and returned. `None` means that
    /// the known blocks were kept.
    pub fn skip_to(&mut self, sequence: u64) -> Option<CacheDelta> {
        let is_long = self.last.is_some_and(|last| {
            sequence.saturating_sub(last.sequence.saturating_add(1)) > self.view.stored_blocks()
        });
        let removed = is_long.then(|| self.clear_blocks());
        self.missed = true;
        let timestamp = self.last.and_then(|last| last.timestamp);
        self.last = sequence.checked_sub(1).map(|sequence| LastBatch {
            sequence,
            timestamp,
        });
        removed
    }

    /// Records that a connection was made: its ranks may differ from those seen before.
    pub fn on_connected(&mut self) {
        self.other_rank = None;
        self.accepts_any_rank = true;
    }

    /// Starts again for another engine process at the same address, and returns the removed blocks.
    /// Keeps the model, the configured rank and the announced prompts, because the new process may
    /// have received them. Nothing else that was learned of the previous process is kept; the next
    /// batch has number 0.
    pub fn clear(&mut self) -> CacheDelta {
        let removed = self.clear_blocks();
        let fresh = Self::new(
            self.block_size,
            std::mem::take(&mut self.model),
            self.own_rank,
        );
        let before = std::mem::replace(self, fresh);
        self.repeated_stores = before.repeated_stores;
        removed
    }

    /// Removes all blocks, because the engine's cache was emptied, and returns them.
    fn clear_blocks(&mut self) -> CacheDelta {
        self.missed = false;
        self.repeated_stores.clear();
        self.view.clear()
    }

    /// Applies the events of a batch and returns the changes that are not empty. Malformed or
    /// missing events make the view inexact.
    fn apply(&mut self, batch: &EventBatch) -> Vec<CacheDelta> {
        let mut changes = Vec::new();
        for event in &batch.events {
            match event {
                Event::Stored(stored) => changes.extend(self.store(stored)),
                Event::Removed(removed) => changes.extend(self.remove(removed)),
                Event::Cleared { medium } => {
                    if medium.is_none_or(|medium| medium == Medium::Gpu) {
                        changes.push(self.clear_blocks());
                    }
                }
            }
        }
        changes.retain(|delta| !delta.stored.is_empty() || !delta.removed.is_empty());
        self.missed |= batch.malformed > 0 || batch.truncated;
        changes
    }

    /// Applies a store event, unless it is of another medium or group, or of an adapter without a
    /// name, which no request can match. The first store decides which group is followed. Blocks
    /// from the first one with extra keys on are left out. A store whose numbers of tokens and
    /// blocks contradict each other makes the view inexact.
    fn store(&mut self, stored: &BlockStored) -> Vec<CacheDelta> {
        if stored.medium != Medium::Gpu || stored.attention == Attention::Other {
            return Vec::new();
        }
        if *self.group.get_or_insert(stored.group) != stored.group {
            return Vec::new();
        }
        let lora = match &stored.adapter {
            Adapter::Base => None,
            Adapter::Named(name) => Some(&**name),
            Adapter::Unnamed => return Vec::new(),
        };
        // Blocks with extra keys, from images or audio, depend on more than their tokens, so no
        // prompt of tokens matches them or the blocks after them.
        let first_extra = stored.extras.iter().map(|extra| extra.block as usize).min();
        let blocks = first_extra.unwrap_or(usize::MAX).min(stored.hashes.len());
        let engine_hashes: Vec<u64> = stored.hashes[..blocks]
            .iter()
            .map(|&BlockKey(hash)| hash)
            .collect();
        if engine_hashes.is_empty() {
            return Vec::new();
        }
        self.engine_block_size = stored.block_size;
        if stored.block_size % self.block_size != 0 {
            self.unsupported_block_size = Some(stored.block_size);
        }
        if stored.blocks().is_none() {
            self.missed = true;
            return Vec::new();
        }
        let tokens = &stored.tokens[..blocks * stored.block_size as usize];
        // A request for an adapter names the adapter as its model.
        let model = lora.unwrap_or(&self.model);
        let stored = StoredBlocks {
            parent: stored.parent.map(|BlockKey(hash)| hash),
            engine_hashes: &engine_hashes,
            tokens,
            block_size: stored.block_size,
            salt: sequence::prefix_salt(model, None, stored.cache_salt.as_deref()),
        };
        self.repeated_stores.store(&mut self.view, &stored)
    }

    /// Applies a removal event. Returns `None` if it is of another medium or group. Unknown blocks
    /// are ignored.
    fn remove(&mut self, removed: &BlockRemoved) -> Option<CacheDelta> {
        if removed.medium != Medium::Gpu || self.group != Some(removed.group) {
            return None;
        }
        let engine_hashes: Vec<u64> = removed.hashes.iter().map(|&BlockKey(hash)| hash).collect();
        let changes = self.view.remove(&engine_hashes);
        self.repeated_stores.removed(&self.view, &engine_hashes);
        Some(changes)
    }
}
