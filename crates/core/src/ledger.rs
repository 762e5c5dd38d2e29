//! What bookings hold on workers, and every change of it.
//!
//! All that a booking adds to its worker's numbers is in its [`Record`], and freeing takes
//! exactly that back.

use std::cmp::Reverse;
use std::time::Duration;

use crate::choose::Decision;
use crate::fleet::WorkerId;
use crate::record::{BookingKey, Record};
use crate::reports::{Hits, Verdict};
use crate::request::Request;
use crate::sequence::Sequence;
use crate::state::{Reading, State};
use crate::tree::NO_NODE;

impl State {
    fn record(&mut self, key: BookingKey) -> Option<&mut Record> {
        self.bookings
            .get_mut(key.index)
            .filter(|record| record.serial == key.serial)
    }

    /// Books on `worker`. Nothing may happen between [`read`](Self::read) and this.
    pub(crate) fn book(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> (BookingKey, Decision) {
        let decision = self.decision(worker.slot, reading, request);
        self.serial += 1;
        let sequence = request.sequence;
        let now = self.now;
        let mut record = Record {
            serial: self.serial,
            worker,
            node: NO_NODE,
            hashed_blocks: 0,
            block_size: sequence.block_size().get(),
            stride: self.fleet.stride(worker.slot).get(),
            prompt_tokens: sequence.tokens(),
            generated_tokens: 0,
            unsettled_tokens: 0,
            computed: false,
            counted: false,
            streams: request.streams,
            expected_tokens: self.output_length.expect(request.max_tokens),
            booked_at: now,
            token_at: now,
            claim: None,
        };
        if let Some((worker, load)) = self.fleet.get_mut(worker) {
            let mut pinned_blocks = 0;
            let mut copies = 0;
            if worker.prefix_caching {
                let chain = sequence.shared_hashes();
                let pinned = self.tree.pin(reading.at, chain, worker.id.slot);
                record.node = pinned.node;
                record.hashed_blocks = pinned.path;
                pinned_blocks = u64::from(pinned.blocks);
                worker.pinned += pinned_blocks;
                let depth = reading.depths()[worker.id.slot as usize];
                let cached = depth.cached.min(sequence.reusable_blocks());
                let in_use = load.active_blocks;
                let shadow = &mut worker.shadow;
                record.claim = Some(shadow.claim(cached, depth.active, &pinned.revived, in_use));
                // Of a prompt that is cached whole the last block is computed again.
                let end = pinned
                    .revived
                    .first()
                    .map_or(0, |run| run.start + run.blocks);
                let reusable = sequence.reusable_blocks();
                shadow.revived(&pinned.revived, end.saturating_sub(reusable));
                copies = shadow.divide(&pinned, reusable, worker.id.slot, &mut self.tree);
            }
            let cached_tokens = decision.cost.overlap_blocks * record.block_size;
            record.unsettled_tokens = record.prompt_tokens.saturating_sub(cached_tokens);
            if !record.streams {
                let prefill = &worker.prefill;
                let wait = prefill.time_to_first_token(record.unsettled_tokens, now);
                record.token_at = now.saturating_add(wait);
            }
            worker.prefill.book(record.unsettled_tokens, now);
            worker.shadow.waits();
            worker.shadow.change_headroom(0, record.headroom());
            load.requests += 1;
            load.context_tokens += record.context_tokens();
            load.active_blocks += pinned_blocks + u64::from(record.unshared_blocks());
            worker.shadow.make_room(
                load.active_blocks + worker.shadow.room_for_copies(copies),
                worker.id.slot,
                &mut self.tree,
                &mut self.foreseen,
            );
        }
        let key = BookingKey {
            serial: self.serial,
            index: self.bookings.vacant_key(),
        };
        if !record.streams {
            self.due.push(Reverse((record.token_at, key)));
        }
        self.bookings.insert(record);
        self.drop_stale_forecasts();
        (key, decision)
    }

    /// Requests that end early leave their forecasts behind, due at any later time.
    fn drop_stale_forecasts(&mut self) {
        let bookings = &self.bookings;
        if self.due.len() > 2 * bookings.len() + 64 {
            self.due.retain(|Reverse((_, key))| {
                let record = bookings.get(key.index);
                record.is_some_and(|record| record.serial == key.serial && !record.computed)
            });
        }
    }

    pub(crate) fn first_token(&mut self, key: BookingKey, now: Duration) {
        let Some(record) = self
            .bookings
            .get_mut(key.index)
            .filter(|record| record.serial == key.serial && !record.computed)
        else {
            return;
        };
        record.computed = true;
        let unsettled = std::mem::take(&mut record.unsettled_tokens);
        let (node, booked_at) = (record.node, record.booked_at);
        if record.streams {
            record.token_at = now;
        }
        let Some((worker, _)) = self.fleet.get_mut(record.worker) else {
            return;
        };
        if record.streams {
            worker.prefill.settle(unsettled, booked_at, now);
        } else {
            // This is the end of the whole answer: it tells nothing of prefill.
            worker.prefill.release(unsettled, now);
        }
        self.tree.mark_computed(node, worker.id.slot);
        if worker.shadow.waits_no_longer() {
            self.foreseen.forget(worker.id.slot);
        }
    }

    pub(crate) fn tokens(&mut self, key: BookingKey, count: u32, now: Duration) {
        let Some(record) = self.record(key) else {
            return;
        };
        let elapsed = now.saturating_sub(record.token_at);
        let total = record.generated_tokens.saturating_add(count);
        let learns = record.streams && record.generated_tokens > 0;
        let worker = record.worker;
        record.token_at = now.max(record.token_at);
        self.count(key, total);
        if learns && let Some((worker, _)) = self.fleet.get_mut(worker) {
            worker.decode.observe(count, elapsed);
        }
    }

    /// The worker said that it has generated `total` tokens.
    pub(crate) fn count(&mut self, key: BookingKey, total: u32) {
        if let Some(record) = self.record(key) {
            record.counted = true;
            self.set_generated(key, total);
        }
    }

    fn set_generated(&mut self, key: BookingKey, total: u32) {
        let Some(record) = self.record(key) else {
            return;
        };
        let (blocks_before, context_before) = (record.blocks(), record.context_tokens());
        let headroom_before = record.headroom();
        record.generated_tokens = total;
        let (blocks, context) = (record.blocks(), record.context_tokens());
        let headroom = record.headroom();
        let worker = record.worker;
        if let Some((worker, load)) = self.fleet.get_mut(worker) {
            load.active_blocks = load.active_blocks + u64::from(blocks) - u64::from(blocks_before);
            load.context_tokens = load.context_tokens + context - context_before;
            worker.shadow.change_headroom(headroom_before, headroom);
            if blocks > blocks_before || headroom > headroom_before {
                worker.shadow.make_room(
                    load.active_blocks,
                    worker.id.slot,
                    &mut self.tree,
                    &mut self.foreseen,
                );
            }
        }
    }

    pub(crate) fn learn_from_end(&mut self, key: BookingKey, now: Duration) {
        // A forecast teaches nothing, least of all itself.
        let Some(record) = self.record(key).filter(|record| record.counted) else {
            return;
        };
        let (generated, streams, worker) = (record.generated_tokens, record.streams, record.worker);
        let decoding = now.saturating_sub(record.token_at);
        self.output_length.observe(generated);
        if !streams && let Some((worker, _)) = self.fleet.get_mut(worker) {
            worker.decode.observe(generated, decoding);
        }
    }

    /// The worker said that it found `tokens` of the prompt in its cache.
    pub(crate) fn observe_cached(&mut self, key: BookingKey, prompt: &Sequence, tokens: u32) {
        let Some(record) = self.record(key) else {
            return;
        };
        let (worker, block_size) = (record.worker, record.block_size);
        let Some(claim) = record.claim.take() else {
            return;
        };
        let Some((worker, load)) = self.fleet.get_mut(worker) else {
            return;
        };
        if worker.shadow.is_told() {
            return;
        }
        let next = prompt.hashes().get(claim.expected() as usize).copied();
        let hits = Hits {
            blocks: tokens / block_size,
            are_estimate: prompt.is_estimate(),
        };
        match worker.shadow.observe(&claim, hits, next) {
            Verdict::Kept => {}
            Verdict::LostBefore(stamp) => {
                worker.shadow.forget_freed_before(stamp);
                self.tree.forget_freed_before(worker.id.slot, stamp);
            }
        }
        worker.shadow.make_room(
            load.active_blocks,
            worker.id.slot,
            &mut self.tree,
            &mut self.foreseen,
        );
    }

    /// Takes a booking back. What it computed stays in the worker's cache, output included where
    /// `answered`, prompt and output, tells its content.
    pub(crate) fn free(&mut self, key: BookingKey, answered: Option<&Sequence>) {
        let known = self.record(key).is_some();
        let Some(record) = known.then(|| self.bookings.remove(key.index)) else {
            return;
        };
        let Some((worker, load)) = self.fleet.get_mut(record.worker) else {
            return;
        };
        worker.prefill.release(record.unsettled_tokens, self.now);
        if !record.computed && worker.shadow.waits_no_longer() {
            self.foreseen.forget(worker.id.slot);
        }
        worker.shadow.change_headroom(record.headroom(), 0);
        load.requests -= 1;
        load.context_tokens -= record.context_tokens();
        let unshared = record.unshared_blocks();
        load.active_blocks -= u64::from(unshared);
        if !worker.prefix_caching {
            return;
        }
        let slot = worker.id.slot;
        let mut stamp = worker.shadow.next_stamp();
        let mut left_behind = if record.computed {
            record.output_blocks()
        } else {
            0
        };
        let mut node = record.node;
        let has_computed = record.computed && self.tree.is_computed(node, slot);
        if let Some(answered) = answered.filter(|_| has_computed && !worker.shadow.is_idle()) {
            let chain = answered.shared_hashes();
            let at = self.tree.descend(chain, &mut []);
            let pinned = self.tree.pin(at, chain, slot);
            self.tree.mark_computed(pinned.node, slot);
            worker.shadow.revived(&pinned.revived, u32::MAX);
            worker
                .shadow
                .divide(&pinned, u32::MAX, slot, &mut self.tree);
            let known = match worker.shadow.keeps_copies() {
                true => pinned.blocks,
                false => pinned.path.saturating_sub(record.hashed_blocks),
            };
            left_behind = left_behind.saturating_sub(known);
            worker.pinned += u64::from(pinned.blocks);
            load.active_blocks += u64::from(pinned.blocks);
            // The longer path takes the place of the shorter, which frees nothing: but hashes
            // may collide.
            let shorter = self.tree.unpin(node, slot, stamp);
            worker.pinned -= u64::from(shorter.blocks);
            load.active_blocks -= u64::from(shorter.blocks);
            worker.shadow.freed(shorter, 0, stamp);
            stamp = worker.shadow.next_stamp();
            node = pinned.node;
        }
        let unpinned = self.tree.unpin(node, slot, stamp);
        worker.pinned -= u64::from(unpinned.blocks);
        load.active_blocks -= u64::from(unpinned.blocks);
        worker.shadow.freed(unpinned, left_behind, stamp);
        worker.shadow.make_room(
            load.active_blocks,
            worker.id.slot,
            &mut self.tree,
            &mut self.foreseen,
        );
    }

    /// Brings forecasts up to `now`: requests whose output nobody watches make the progress they
    /// should have made.
    pub(crate) fn advance(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while let Some(&Reverse((at, key))) = self.due.peek()
            && at <= self.now
        {
            self.due.pop();
            if let Some(next) = self.forecast_progress(key) {
                self.due.push(Reverse((next, key)));
            }
        }
    }

    /// Gives an unwatched request the tokens it should have by now. Returns when its next block
    /// should fill, if it should grow further.
    fn forecast_progress(&mut self, key: BookingKey) -> Option<Duration> {
        let now = self.now;
        let record = self.record(key).filter(|record| !record.computed)?;
        let (worker_id, expected) = (record.worker, record.expected_tokens);
        let unsettled = std::mem::take(&mut record.unsettled_tokens);
        let decoding = now.saturating_sub(record.token_at);
        let block_size = record.block_size;
        let (worker, _) = self.fleet.get_mut(worker_id)?;
        worker.prefill.release(unsettled, now);
        let total = worker
            .decode
            .tokens_after(decoding)
            .saturating_add(1)
            .min(expected);
        let inter_token = worker.decode.inter_token_latency();
        let per_block = inter_token.saturating_mul(block_size);
        self.set_generated(key, total);
        // Never again at this very instant, however fast the worker was learned to be.
        let pause = per_block.max(Duration::from_millis(1));
        now.checked_add(pause).filter(|_| total < expected)
    }
}
