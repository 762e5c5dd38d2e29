//! Where a worker's stream of events stands: which batch is next, and what all before it left in
//! the cache. Pure: it is handed messages, wherever they come from.

use std::num::NonZeroU32;

use foresee_core::cache::{CacheView, Changes, StoredBlocks};
use foresee_core::sequence::{self, SequenceHash};
use foresee_engine::kv_events::{
    Adapter, Attention, BlockKey, BlockRemoved, BlockStored, Event, EventBatch, Medium, Message,
    decode_batch,
};

use crate::subscribe::repeats::Repeats;

/// Batches in a row that cannot be read until the stream counts as unreadable.
const MOST_UNREADABLE: u32 = 3;

/// What became of a message.
#[derive(Debug, PartialEq)]
pub(super) enum Received {
    /// It was next, and changed this, event by event.
    Applied(Vec<Changes>),
    /// It is known already.
    Known,
    /// Batches are missing before it, from this number on. It was not applied.
    Gap(u64),
    /// The engine counts from the beginning: another process, with an empty cache. The message
    /// was not applied.
    Restarted(Changes),
}

/// The last batch that was applied, which also tells one engine process from another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Last {
    pub(super) sequence: u64,
    /// By the engine's clock, in seconds since 1970.
    pub(super) timestamp: Option<f64>,
}

/// Follows one engine's stream.
#[derive(Debug)]
pub(super) struct Follower {
    view: CacheView,
    repeats: Repeats,
    block_size: NonZeroU32,
    /// The name requests for the model itself come under.
    model: String,
    last: Option<Last>,
    /// The worker's data-parallel rank, if it has one.
    own_rank: Option<u32>,
    /// The rank that is followed: the worker's or, if it has none, the first that speaks.
    rank: Option<u32>,
    /// Another rank spoke, whose sequence numbers and blocks are its own.
    other_rank: Option<u32>,
    /// Nobody has spoken since a connection was made, so another rank may have come instead.
    is_anybody: bool,
    /// The group of layers that is followed: the first seen that attends to everything. A prefix
    /// that is cached for one such group is cached for all.
    group: Option<Option<u32>>,
    /// Something was missed or could not be read since the cache was last empty.
    missed: bool,
    unreadable: u32,
    /// Tokens of an engine's block; 0 until it is known.
    engine_block_size: u32,
    /// An engine's block size that the router's does not divide.
    unfit_block_size: Option<u32>,
}

impl Follower {
    /// Follows an engine whose cache is empty. `block_size` is the router's.
    pub(super) fn new(block_size: NonZeroU32, model: String, rank: Option<u32>) -> Self {
        Self {
            view: CacheView::new(block_size),
            repeats: Repeats::new(block_size),
            block_size,
            model,
            last: None,
            own_rank: rank,
            rank,
            other_rank: None,
            is_anybody: true,
            group: None,
            missed: false,
            unreadable: 0,
            engine_block_size: 0,
            unfit_block_size: None,
        }
    }

    /// A follower of the same engine that begins again, with an empty cache.
    pub(super) fn anew(&self, model: String) -> Self {
        Self {
            repeats: self.repeats.anew(),
            rank: self.rank,
            ..Self::new(self.block_size, model, self.own_rank)
        }
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    pub(super) fn last(&self) -> Option<Last> {
        self.last
    }

    /// All that is cached, for an index that begins anew.
    pub(super) fn contents(&self) -> Changes {
        self.view.contents()
    }

    /// Whether the view is what the engine has.
    pub(super) fn is_exact(&self) -> bool {
        !self.missed && self.view.is_exact()
    }

    /// A prompt was sent that is exactly one of the engine's blocks.
    pub(super) fn expect(&mut self, prompt: SequenceHash) {
        self.repeats.expect(prompt);
    }

    /// Tokens of an engine's block; 0 until it is known.
    pub(super) fn engine_block_size(&self) -> u32 {
        self.engine_block_size
    }

    /// Answers say that the view is not what the engine has.
    pub(super) fn doubt(&mut self) {
        self.missed = true;
    }

    /// Whether stores that say again what is known count as lists of what is cached.
    pub(super) fn has_lists(&self) -> bool {
        self.repeats.are_lists()
    }

    /// Whether such stores were counted, and may have been wrongly.
    pub(super) fn has_stores_in_doubt(&self) -> bool {
        self.repeats.excess() > 0
    }

    /// Whether more was stored than the engine has blocks, and only because of those in doubt.
    pub(super) fn is_overfull(&self, capacity: u32) -> bool {
        let (stored, excess) = (self.view.stored_blocks(), self.repeats.excess());
        let capacity = u64::from(capacity);
        stored > capacity && stored.saturating_sub(excess) <= capacity
    }

    /// Stores that say again what is known are lists from now on, and those counted are taken
    /// back.
    pub(super) fn take_back_repeats(&mut self) -> Vec<Changes> {
        self.repeats.take_back(&mut self.view)
    }

    /// Why the events cannot be used, if they cannot.
    pub(super) fn fault(&self) -> Option<String> {
        if let (Some(theirs), Some(ours)) = (self.other_rank, self.rank) {
            return Some(format!(
                "events of data-parallel rank {theirs} come where rank {ours} publishes: give \
                 each its own endpoint, or write ranks=N"
            ));
        }
        if let Some(theirs) = self.unfit_block_size {
            let ours = self.block_size;
            return Some(format!(
                "the engine's blocks of {theirs} tokens are no multiple of --block-size {ours}"
            ));
        }
        (self.unreadable >= MOST_UNREADABLE).then(|| "its batches cannot be read".to_owned())
    }

    /// Takes a message, if it is next.
    pub(super) fn receive(&mut self, message: &Message<'_>) -> Received {
        let next = self.last.map_or(0, |last| last.sequence.saturating_add(1));
        let decoded = decode_batch(message.payload);
        let speaker = decoded.as_ref().ok().and_then(|it| it.data_parallel_rank);
        let is_anybody = std::mem::take(&mut self.is_anybody);
        if let Some(speaker) = speaker
            && *self.rank.get_or_insert(speaker) != speaker
        {
            if is_anybody && self.own_rank.is_none() {
                return Received::Restarted(self.clear());
            }
            self.other_rank = Some(speaker);
            return Received::Known;
        }
        if message.sequence > next {
            return Received::Gap(next);
        }
        let timestamp = decoded.as_ref().ok().and_then(|batch| batch.timestamp);
        if let Some(last) = self.last
            && message.sequence < next
        {
            // Replay and the live stream overlap, so a lower number alone means nothing. A batch
            // made after the last one does, and where engines tell no time, the first number.
            let is_another = match (timestamp, last.timestamp) {
                (Some(now), Some(before)) => now > before,
                _ => message.sequence == 0 && last.sequence > 0,
            };
            if is_another {
                return Received::Restarted(self.clear());
            }
            return Received::Known;
        }
        self.last = Some(Last {
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

    /// Carries on at a batch although those before it are missing. Where more are than blocks are
    /// known, hardly one of these can still be cached, since each batch took some: all are
    /// forgotten, which is returned.
    pub(super) fn skip_to(&mut self, sequence: u64) -> Option<Changes> {
        let is_long = self.last.is_some_and(|last| {
            sequence.saturating_sub(last.sequence.saturating_add(1)) > self.view.stored_blocks()
        });
        let forgotten = is_long.then(|| self.forget_blocks());
        self.missed = true;
        let timestamp = self.last.and_then(|last| last.timestamp);
        self.last = sequence.checked_sub(1).map(|sequence| Last {
            sequence,
            timestamp,
        });
        forgotten
    }

    /// A connection was made: what ranks were heard before says nothing of who is there now.
    pub(super) fn is_connected(&mut self) {
        self.other_rank = None;
        self.is_anybody = true;
    }

    /// The engine is another process: nothing that was learned of it holds. Prompts that were sent
    /// may have gone to the new one.
    pub(super) fn clear(&mut self) -> Changes {
        let removed = self.forget_blocks();
        let anew = Self::new(
            self.block_size,
            std::mem::take(&mut self.model),
            self.own_rank,
        );
        let before = std::mem::replace(self, anew);
        self.repeats = before.repeats;
        removed
    }

    /// The cache is empty, of the same engine.
    fn forget_blocks(&mut self) -> Changes {
        self.missed = false;
        self.repeats.clear();
        self.view.clear()
    }

    fn apply(&mut self, batch: &EventBatch) -> Vec<Changes> {
        let mut changes = Vec::new();
        for event in &batch.events {
            match event {
                Event::Stored(stored) => changes.extend(self.store(stored)),
                Event::Removed(removed) => changes.extend(self.remove(removed)),
                Event::Cleared { medium } => {
                    if medium.is_none_or(|medium| medium == Medium::Gpu) {
                        changes.push(self.forget_blocks());
                    }
                }
            }
        }
        changes.retain(|it| !it.added.is_empty() || !it.removed.is_empty());
        self.missed |= batch.malformed > 0 || batch.truncated;
        changes
    }

    fn store(&mut self, stored: &BlockStored) -> Vec<Changes> {
        if stored.medium != Medium::Gpu || stored.attention == Attention::Other {
            return Vec::new();
        }
        if *self.group.get_or_insert(stored.group) != stored.group {
            return Vec::new();
        }
        let lora = match &stored.adapter {
            Adapter::Base => None,
            Adapter::Named(name) => Some(&**name),
            // No request can be matched with it.
            Adapter::Unnamed => return Vec::new(),
        };
        // What depends on media is more than its tokens say: no prompt of tokens matches it.
        let of_tokens_alone = stored.extras.iter().map(|extra| extra.block as usize).min();
        let blocks = of_tokens_alone.unwrap_or(usize::MAX);
        let blocks = blocks.min(stored.hashes.len());
        let hashes: Vec<u64> = stored.hashes[..blocks]
            .iter()
            .map(|&BlockKey(hash)| hash)
            .collect();
        if hashes.is_empty() {
            return Vec::new();
        }
        self.engine_block_size = stored.block_size;
        if stored.block_size % self.block_size != 0 {
            self.unfit_block_size = Some(stored.block_size);
        }
        if stored.blocks().is_none() {
            self.missed = true;
            return Vec::new();
        }
        let tokens = &stored.tokens[..blocks * stored.block_size as usize];
        // A request for an adapter names it instead of the model.
        let model = lora.unwrap_or(&self.model);
        let stored = StoredBlocks {
            parent: stored.parent.map(|BlockKey(hash)| hash),
            hashes: &hashes,
            tokens,
            block_size: stored.block_size,
            salt: sequence::salt(model, None, stored.cache_salt.as_deref()),
        };
        self.repeats.store(&mut self.view, &stored)
    }

    fn remove(&mut self, removed: &BlockRemoved) -> Option<Changes> {
        if removed.medium != Medium::Gpu || self.group != Some(removed.group) {
            return None;
        }
        let hashes: Vec<u64> = removed.hashes.iter().map(|&BlockKey(hash)| hash).collect();
        let changes = self.view.remove(&hashes);
        self.repeats.removed(&self.view, &hashes);
        Some(changes)
    }
}

#[cfg(test)]
mod tests;
