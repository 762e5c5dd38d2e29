//! What bookings hold on workers, and every change of it.
//!
//! All that a booking adds to its worker's numbers is in its [`Record`], and freeing takes
//! exactly that back.

use std::time::Duration;

use slab::Slab;

use crate::admission::Promised;
use crate::choose::Decision;
use crate::fleet::{WorkerId, seconds};
use crate::forecast::pace::Work;
use crate::outlook::Share;
use crate::record::{BookingKey, Record, Waiting};
use crate::reports::{Hits, Verdict};
use crate::request::Request;
use crate::sequence::Sequence;
use crate::state::{Reading, State};
use crate::tree::{NO_NODE, Slot};

/// Whole answers with fewer steps say more of prefill than of steps.
const FEW_STEPS: u32 = 16;

/// For where the rest of the state is needed beside it.
pub(crate) fn record_of(bookings: &mut Slab<Record>, key: BookingKey) -> Option<&mut Record> {
    let record = bookings.get_mut(key.index)?;
    (record.serial == key.serial).then_some(record)
}

impl State {
    pub(crate) fn record(&mut self, key: BookingKey) -> Option<&mut Record> {
        record_of(&mut self.bookings, key)
    }

    /// Books on `worker`, which gets it now. Nothing may happen between reading and this.
    pub(crate) fn book(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> (BookingKey, Decision) {
        let (mut record, decision) = self.new_record(worker, reading, request);
        let (sequence, now) = (request.sequence, self.now);
        let mut is_idle = false;
        if let Some((worker, load)) = self.fleet.get_mut(worker) {
            let slot = worker.id.slot;
            let (mut pinned_blocks, mut copies) = (0, 0);
            if worker.prefix_caching {
                // An engine with larger blocks shares none that is not full.
                let chain = &sequence.whole_hashes(record.stride);
                let at = match chain.len() == sequence.hashes().len() {
                    true => reading.at,
                    false => self.tree.descend(chain, &mut []),
                };
                let pinned = self.tree.pin(at, chain, slot, record.serial);
                record.node = pinned.node;
                record.hashed_blocks = pinned.path;
                pinned_blocks = u64::from(pinned.blocks);
                worker.pinned += pinned_blocks;
                let depth = reading.depths()[slot as usize];
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
                copies = shadow.divide(&pinned, reusable, slot, &mut self.tree);
            }
            worker.shadow.waits();
            self.foreseen.booked(record.serial);
            is_idle = load.active_blocks == 0;
            if is_idle {
                self.tree.begin(slot, record.serial);
            }
            worker.shadow.change_headroom(0, record.headroom());
            load.requests += 1;
            load.context_tokens += record.context_tokens();
            load.active_blocks += pinned_blocks + u64::from(record.unshared_blocks());
            worker.shadow.make_room(
                load.active_blocks + worker.shadow.room_for_copies(copies),
                slot,
                &mut self.tree,
                &mut self.foreseen,
            );
        }
        self.add_to_outlook(&mut record);
        let mut is_started = false;
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
            outlook.send(&mut record.share, record.serial, now);
            // Who has no prompt has nothing to wait for, and its answer is not read.
            is_started = record.prompt_tokens == 0 && outlook.compute(&mut record.share);
            let reserve = &mut outlook.reserve;
            if is_idle {
                reserve.idles();
            }
            reserve.change(Promised::default(), record.promised());
        }
        let streams = record.streams;
        let key = self.insert(record);
        if is_started {
            self.started(worker, key.serial);
        }
        if !streams {
            self.look_after(worker, sequence, key);
        }
        (key, decision)
    }

    /// Books in the line of `worker`, which gets it later. Nothing may happen between reading and
    /// this.
    pub(crate) fn line_up(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
        thinks_until: Duration,
    ) -> (BookingKey, Decision) {
        let (mut record, decision) = self.new_record(worker, reading, request);
        let mut adds = 0;
        if let Some((worker, load)) = self.fleet.get_mut(worker) {
            let slot = worker.id.slot;
            let mut shared = 0;
            if worker.prefix_caching {
                let chain = request.sequence.shared_hashes();
                let at = self.lined_up.descend(chain, &mut []);
                let pinned = self.lined_up.pin(at, chain, slot, record.serial);
                record.node = pinned.node;
                record.hashed_blocks = pinned.path;
                shared = reading.depths()[slot as usize].active.min(pinned.path);
            }
            adds = u64::from(record.blocks() - shared);
            load.requests += 1;
            load.context_tokens += record.context_tokens();
            load.held_blocks += adds;
        }
        self.add_to_outlook(&mut record);
        let waiting = Waiting {
            rank: record.standing.rank(record.prefill),
            is_invited: false,
            thinks_until,
            waker: None,
        };
        let (rank, work) = (waiting.rank, record.share.work);
        let demand = (adds, record.promised());
        record.waiting = Some(Box::new(waiting));
        let key = self.insert(record);
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
            outlook.line.join(rank, key, work, demand);
            self.queue.held += 1;
        }
        (key, decision)
    }

    fn new_record(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> (Record, Decision) {
        let decision = self.decision(worker.slot, reading, request);
        self.serial += 1;
        let (sequence, now) = (request.sequence, self.now);
        let cached_tokens = decision.cost.overlap_blocks * sequence.block_size().get();
        let uncached_tokens = sequence.tokens().saturating_sub(cached_tokens);
        let work = Work::new(uncached_tokens, sequence.tokens());
        let context = u64::from(sequence.tokens());
        let mut share = Share::new(work, reading.expected_tokens, context);
        share.is_watched = request.streams;
        let record = Record {
            serial: self.serial,
            worker,
            node: NO_NODE,
            hashed_blocks: 0,
            block_size: sequence.block_size().get(),
            stride: self.fleet.stride(worker.slot).get(),
            prompt_tokens: sequence.tokens(),
            generated_tokens: 0,
            share,
            kind: reading.kind,
            max_tokens: request.max_tokens,
            ignores_eos: request.ignores_eos,
            said_tokens: request.expected_tokens,
            computed: false,
            counted: false,
            streams: request.streams,
            expected_tokens: reading.expected_tokens,
            booked_at: now,
            waited_for_memory: false,
            first_token_due: now,
            token_at: now,
            known: (now, 0),
            standing: reading.standing,
            prefill: 0.0,
            waiting: None,
            claim: None,
        };
        (record, decision)
    }

    /// The request, booked on its worker or in its line, is ahead of that.
    fn add_to_outlook(&mut self, record: &mut Record) {
        let now = self.now;
        let Some((worker, load)) = self.fleet.get_mut(record.worker) else {
            return;
        };
        let (capacity, booked) = (worker.known_capacity(), load.booked_blocks());
        let Some((outlook, law)) = self.fleet.outlook_mut(record.worker) else {
            return;
        };
        outlook.capacity = capacity;
        record.waited_for_memory = capacity.is_some_and(|it| booked > u64::from(it));
        let pace = outlook.watch.pace(law, now);
        record.prefill = pace.prefill(1.0 / outlook.watch.prompts_together(), record.share.work);
        let ahead = outlook.ahead_of(&record.standing, record.prefill, &pace, now);
        record.first_token_due = now.saturating_add(seconds(ahead.wait + record.prefill));
        outlook.add(&record.share);
        outlook.inflow.add(record.prefill, now);
    }

    fn insert(&mut self, record: Record) -> BookingKey {
        BookingKey {
            serial: record.serial,
            index: self.bookings.insert(record),
        }
    }

    pub(crate) fn first_token(&mut self, key: BookingKey, now: Duration) {
        let record = record_of(&mut self.bookings, key);
        let Some(record) = record.filter(|record| !record.computed) else {
            return;
        };
        record.computed = true;
        let (node, serial) = (record.node, record.serial);
        let (mut is_started, mut has_begun_anew) = (false, false);
        if let Some((outlook, law)) = self.fleet.outlook_mut(record.worker) {
            if record.streams {
                record.token_at = now;
                let booked_at = record.booked_at;
                let due = record.first_token_due.saturating_sub(booked_at);
                let (work, waited) = (record.share.work, record.waited_for_memory);
                if work.tokens > 0 {
                    outlook.watch.check(due, now.saturating_sub(booked_at));
                    outlook.begin(&record.share, now);
                    has_begun_anew = outlook.watch.first_token(law, work, booked_at, waited, now);
                }
            }
            // Otherwise this is the end of the whole answer: it tells nothing of prefill.
            is_started = outlook.compute(&mut record.share);
        }
        let id = record.worker;
        if self.fleet.get(id).is_some() {
            self.tree.mark_computed(node, id.slot);
            if is_started {
                self.started(id, serial);
            }
            if has_begun_anew {
                self.begins_step(id.slot, now);
            }
        }
    }

    /// A booking waits no longer.
    pub(crate) fn started(&mut self, worker: WorkerId, serial: u64) {
        let Some((worker, _)) = self.fleet.get_mut(worker) else {
            return;
        };
        let slot = worker.id.slot;
        match worker.shadow.waits_no_longer() {
            true => self.foreseen.started_all(slot),
            false => self.foreseen.started(slot, serial),
        }
        self.let_go(slot);
    }

    /// A step of the worker in `slot` has just begun, with all that has reached it.
    fn begins_step(&mut self, slot: Slot, now: Duration) {
        let underway = self.fleet.outlooks[slot as usize].first_underway(now);
        let begun = underway.map_or(self.serial, |first| first - 1);
        self.tree.begin(slot, begun);
    }

    pub(crate) fn tokens(&mut self, key: BookingKey, count: u32, now: Duration) {
        let Some(record) = self.record(key) else {
            return;
        };
        let elapsed = now.saturating_sub(record.token_at);
        let total = record.generated_tokens.saturating_add(count);
        let learns = record.streams && record.generated_tokens > 0;
        let (worker, last_token_at) = (record.worker, record.token_at);
        record.token_at = now.max(record.token_at);
        self.count(key, total);
        if learns && let Some((outlook, law)) = self.fleet.outlook_mut(worker) {
            let computes =
                outlook.sent().requests > 0 || outlook.watch.first_token_at() > last_token_at;
            let decoding = outlook.decoding();
            let watch = &mut outlook.watch;
            let has_line = !outlook.line.is_empty();
            if watch.tokens(law, count, elapsed, computes, decoding, now) {
                self.begins_step(worker.slot, now);
            }
            if has_line {
                // Time has passed.
                self.let_go(worker.slot);
            }
        }
    }

    /// The worker said that it has generated `total` tokens.
    pub(crate) fn count(&mut self, key: BookingKey, total: u32) {
        if let Some(record) = self.record(key) {
            record.counted = true;
            self.set_generated(key, total);
        }
    }

    pub(crate) fn set_generated(&mut self, key: BookingKey, total: u32) {
        let Some(record) = record_of(&mut self.bookings, key) else {
            return;
        };
        let (blocks_before, context_before) = (record.blocks(), record.context_tokens());
        let (headroom_before, promised_before) = (record.headroom(), record.promised());
        let count = total.saturating_sub(record.generated_tokens);
        record.generated_tokens = total;
        let (blocks, context) = (record.blocks(), record.context_tokens());
        let headroom = record.headroom();
        let worker = record.worker;
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
            let running = outlook.decoding().0;
            outlook.reserve.generates(count, running);
            outlook.reserve.change(promised_before, record.promised());
        }
        if blocks != blocks_before {
            // A block is little enough for a forecast to stand.
            let left = self.output_length.remaining_of(
                record.kind,
                total,
                record.max_tokens,
                record.said_tokens,
            );
            if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
                outlook.renew(&mut record.share, left, context);
            }
        }
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
        let (kind, expected) = (record.kind, record.expected_tokens);
        let max_tokens = record.max_tokens;
        // When the first token came was forecast at best, and is off by a share of the prefill.
        let (steps, has_begun) = (generated.saturating_sub(1), record.known.1 > 0);
        let tells_steps = !streams && has_begun && steps >= FEW_STEPS;
        let elapsed = now.saturating_sub(record.token_at);
        self.output_length.check(expected, generated);
        let is_cut = max_tokens.is_some_and(|most| generated >= most);
        self.output_length.observe(kind, generated, is_cut);
        if tells_steps && let Some((outlook, law)) = self.fleet.outlook_mut(worker) {
            let computes = outlook.sent().requests > 0;
            let decoding = outlook.decoding();
            let watch = &mut outlook.watch;
            watch.tokens(law, steps, elapsed, computes, decoding, now);
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
        let slot = record.worker.slot;
        self.take_back(record, answered);
        self.let_go(slot);
    }

    pub(crate) fn take_back(&mut self, record: Record, answered: Option<&Sequence>) {
        if let Some((outlook, _)) = self.fleet.outlook_mut(record.worker) {
            outlook.remove(&record.share);
        }
        if let Some(waiting) = &record.waiting {
            return self.leave_line(&record, waiting);
        }
        if let Some((outlook, _)) = self.fleet.outlook_mut(record.worker) {
            let promised = record.promised();
            outlook.reserve.change(promised, Promised::default());
        }
        let Some((worker, load)) = self.fleet.get_mut(record.worker) else {
            return;
        };
        if record.share.is_ahead() && worker.shadow.waits_no_longer() {
            self.foreseen.started_all(worker.id.slot);
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
            let chain = &answered.whole_hashes(record.stride);
            let at = self.tree.descend(chain, &mut []);
            let pinned = self.tree.pin(at, chain, slot, self.serial);
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
        if worker.shadow.is_told() {
            self.tree.awaits_told(slot, stamp);
        }
        worker.shadow.make_room(
            load.active_blocks,
            worker.id.slot,
            &mut self.tree,
            &mut self.foreseen,
        );
    }

    fn leave_line(&mut self, record: &Record, waiting: &Waiting) {
        let mut adds = 0;
        if let Some((outlook, _)) = self.fleet.outlook_mut(record.worker)
            && let Some(blocks) = outlook.line.leave(waiting.rank)
        {
            self.queue.held -= 1;
            adds = blocks;
        }
        if let Some((worker, load)) = self.fleet.get_mut(record.worker) {
            load.requests -= 1;
            load.context_tokens -= record.context_tokens();
            load.held_blocks -= adds;
            self.lined_up.unpin(record.node, worker.id.slot, 0);
        }
    }
}
