//! The KV events of one worker: messages are followed, and the router learns the changes.

use std::num::NonZeroU32;

use foresee_core::event_index::CacheDelta;
use foresee_core::router::{CacheSource, Observed, Router};
use foresee_core::sequence::Sequence;
use foresee_core::workers::WorkerId;
use foresee_engine::kv_events::Message;
use foresee_engine::kv_events::follower::{Follower, Received};

use crate::errors::Error;

/// One message of a worker's event stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EventMessage<'a> {
    /// Encoded batch of events.
    pub(crate) payload: &'a [u8],
    /// Sequence number of the batch; `None` for the number after that of the last one.
    pub(crate) sequence: Option<u64>,
    /// Whether missing batches before this one are given up.
    pub(crate) skips_missing: bool,
    /// When the engine sent the batch.
    pub(crate) observed: Observed,
}

/// State of one worker's event stream.
#[derive(Debug)]
pub(crate) struct EventStream {
    follower: Follower,
    /// Whether the router uses the events, and not the estimated cache.
    is_used: bool,
}

impl EventStream {
    /// Returns a stream of which nothing was received. `model` is the base model of the engine.
    pub(crate) fn new(block_size: NonZeroU32, model: String, rank: Option<u32>) -> Self {
        Self {
            follower: Follower::new(block_size, model, rank),
            is_used: false,
        }
    }

    /// Returns whether the events describe the cache exactly: nothing was missed.
    pub(crate) fn is_exact(&self) -> bool {
        self.is_used && self.follower.is_complete()
    }

    /// Announces a prompt that the worker was sent: the engine stores a prompt of one block again
    /// even if it is cached.
    pub(crate) fn on_sent(&mut self, prompt: &Sequence) {
        if prompt.tokens() == self.follower.engine_block_size()
            && let Some(&hash) = prompt.hashes().last()
        {
            self.follower.expect(hash);
        }
    }

    /// Applies a message of `worker`. The router uses the events from the first one on. Returns the
    /// number of the first missing batch if batches before this one are missing, and then applies
    /// nothing.
    ///
    /// # Errors
    /// If the batch cannot be decoded, or the events cannot be used. In the second case the worker's
    /// cache is estimated from then on, until a message can be used again.
    pub(crate) fn apply(
        &mut self,
        router: &Router,
        worker: WorkerId,
        message: EventMessage<'_>,
    ) -> Result<Option<u64>, Error> {
        let last = self.follower.last();
        let next = last.map_or(0, |last| last.sequence.saturating_add(1));
        let received = Message {
            topic: b"",
            sequence: message.sequence.unwrap_or(next),
            payload: message.payload,
        };
        loop {
            match self.follower.receive(&received) {
                Received::Applied(changes) => {
                    self.publish(router, worker, &changes, message.observed);
                    break;
                }
                Received::AlreadyApplied => break,
                Received::Restarted(removed) => {
                    router.apply_cache_delta(worker, &removed, Observed::Replayed);
                }
                Received::Gap(_) if message.skips_missing => {
                    if let Some(removed) = self.follower.skip_to(received.sequence) {
                        router.apply_cache_delta(worker, &removed, Observed::Replayed);
                    }
                }
                Received::Gap(first_missing) => return Ok(Some(first_missing)),
            }
        }
        self.check(router, worker)?;
        Ok(None)
    }

    /// Sends the changes of a batch to the router, or everything known if the router does not use
    /// the events yet.
    fn publish(
        &mut self,
        router: &Router,
        worker: WorkerId,
        changes: &[CacheDelta],
        observed: Observed,
    ) {
        // A first batch that cannot be decoded says nothing about the cache.
        let is_unreadable = !self.is_used && self.follower.unreadable_batches() > 0;
        if self.follower.fault().is_some() || is_unreadable {
            return;
        }
        if !std::mem::replace(&mut self.is_used, true) {
            router.set_cache_source(worker, CacheSource::Events);
            router.apply_cache_delta(worker, &self.follower.snapshot(), Observed::Replayed);
            return;
        }
        for delta in changes {
            router.apply_cache_delta(worker, delta, observed);
        }
        if changes.is_empty() {
            router.apply_cache_delta(worker, &CacheDelta::default(), observed);
        }
    }

    /// Checks that the events can be used, and otherwise lets the router estimate the cache.
    ///
    /// # Errors
    /// If the events cannot be used, or the last batch could not be decoded.
    fn check(&mut self, router: &Router, worker: WorkerId) -> Result<(), Error> {
        if let Some(fault) = self.follower.fault() {
            self.is_used = false;
            router.set_cache_source(worker, CacheSource::Estimated);
            return Err(Error::Events { fault });
        }
        match self.follower.unreadable_batches() {
            0 => Ok(()),
            _ => Err(Error::Events {
                fault: "the batch of events cannot be decoded".to_owned(),
            }),
        }
    }
}
