//! What one routed request holds on one worker, from the instant it is chosen until it ends.
//!
//! [`Booking`] is the only thing that changes a worker's load, and dropping it is the only way
//! to free what it holds, so no path (abort, retry, error, panic) can forget to.

use std::cmp::Reverse;
use std::time::Duration;

use crate::choose::Decision;
use crate::fleet::WorkerId;
use crate::router::{Request, RouteError, Router, State, release};
use crate::sequence::Sequence;
use crate::tree::{Match, NO_NODE, NodeId};

/// Finds a booking's record, and never another's: slab keys are used again, serials are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BookingKey {
    serial: u64,
    index: usize,
}

/// The router's side of a booking.
#[derive(Debug)]
pub(crate) struct Record {
    serial: u64,
    worker: WorkerId,
    /// End of its path in the prefix tree.
    node: NodeId,
    /// Blocks of the prompt booked through the tree; the others are its own.
    hashed_blocks: u32,
    block_size: u32,
    prompt_tokens: u32,
    generated_tokens: u32,
    /// Share in its worker's prefill backlog: 0 once settled.
    unsettled_tokens: u32,
    /// The worker has computed the prompt; said by its first token, not by a forecast.
    computed: bool,
    /// The worker said how many tokens it generated; otherwise their number is a forecast.
    counted: bool,
    /// Its output is watched; otherwise it is forecast.
    streams: bool,
    expected_tokens: u32,
    booked_at: Duration,
    /// When its latest token came or, for the first and while unwatched, should have come.
    token_at: Duration,
}

impl Record {
    fn blocks(&self) -> u32 {
        let tokens = u64::from(self.prompt_tokens) + u64::from(self.generated_tokens);
        let blocks = tokens.div_ceil(u64::from(self.block_size));
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }

    /// Blocks that no other request can share: the partial one and those of the output.
    fn unshared_blocks(&self) -> u32 {
        self.blocks() - self.hashed_blocks
    }

    fn context_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.generated_tokens)
    }
}

/// A request's place on a worker. Dropping it frees all it holds there.
#[derive(Debug)]
#[must_use = "dropping a booking frees it"]
pub struct Booking {
    router: Router,
    key: BookingKey,
    worker: WorkerId,
    decision: Decision,
    model: Box<str>,
    sequence: Sequence,
    max_tokens: Option<u32>,
    streams: bool,
}

impl Booking {
    pub(crate) fn new(
        router: Router,
        key: BookingKey,
        worker: WorkerId,
        decision: Decision,
        request: &Request<'_>,
    ) -> Self {
        Self {
            router,
            key,
            worker,
            decision,
            model: request.model.into(),
            sequence: request.sequence.clone(),
            max_tokens: request.max_tokens,
            streams: request.streams,
        }
    }

    /// The worker it is booked on.
    #[must_use]
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// What spoke for that worker.
    #[must_use]
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// The prompt.
    #[must_use]
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// The worker produced the first output token, so the prompt is computed. Only the first
    /// call counts.
    pub fn first_token(&mut self, now: Duration) {
        let mut state = self.router.lock();
        state.advance(now);
        state.first_token(self.key, now);
        release(state);
    }

    /// The worker produced `count` further output tokens, the first one included.
    pub fn tokens(&mut self, count: u32, now: Duration) {
        if count == 0 {
            return;
        }
        let mut state = self.router.lock();
        state.advance(now);
        state.first_token(self.key, now);
        state.tokens(self.key, count, now);
        release(state);
    }

    /// The worker says it has produced `total` output tokens so far: replaces what was counted.
    pub fn set_tokens(&mut self, total: u32, now: Duration) {
        let mut state = self.router.lock();
        state.advance(now);
        if total > 0 {
            state.first_token(self.key, now);
        }
        state.count(self.key, total);
        release(state);
    }

    /// Frees everything on its worker and books the same request on another, in one step.
    /// Output counted so far is forgotten: the other worker starts from the prompt.
    ///
    /// # Errors
    /// If the worker is not known; the booking stays where it is.
    pub fn move_to(&mut self, worker: WorkerId, now: Duration) -> Result<(), RouteError> {
        self.rebook(now, &[], Some(worker))
    }

    /// As [`move_to`](Self::move_to), to the worker that the policy prefers among those not
    /// excluded.
    ///
    /// # Errors
    /// As [`Router::route`]; the booking stays where it is.
    pub fn reroute(&mut self, excluded: &[WorkerId], now: Duration) -> Result<(), RouteError> {
        self.rebook(now, excluded, None)
    }

    fn rebook(
        &mut self,
        now: Duration,
        excluded: &[WorkerId],
        worker: Option<WorkerId>,
    ) -> Result<(), RouteError> {
        let request = Request {
            model: &self.model,
            sequence: &self.sequence,
            max_tokens: self.max_tokens,
            streams: self.streams,
            excluded,
        };
        let mut state = self.router.lock();
        state.advance(now);
        let chosen = match worker {
            Some(worker) if state.fleet.get(worker).is_some() => worker,
            Some(_) => return Err(RouteError::NoWorker(request.model.to_owned())),
            None => state.choose(&request)?.0,
        };
        state.free(self.key);
        // Again, because its own blocks are no overlap any longer.
        let at = state.read(&request);
        (self.key, self.decision) = state.book(chosen, at, &request);
        self.worker = chosen;
        release(state);
        Ok(())
    }

    /// The request ended as it should. Like dropping, but teaches how long answers are.
    pub fn finish(self, now: Duration) {
        let mut state = self.router.lock();
        state.advance(now);
        state.first_token(self.key, now);
        state.learn_from_end(self.key, now);
        release(state);
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let mut state = self.router.lock();
        state.free(self.key);
        release(state);
    }
}

impl State {
    fn record(&mut self, key: BookingKey) -> Option<&mut Record> {
        self.bookings
            .get_mut(key.index)
            .filter(|record| record.serial == key.serial)
    }

    /// Books on `worker`. Nothing may happen between [`read`](Self::read), which told `at`, and
    /// this.
    pub(crate) fn book(
        &mut self,
        worker: WorkerId,
        at: Match,
        request: &Request<'_>,
    ) -> (BookingKey, Decision) {
        let decision = self.decision(worker.slot, at, request);
        self.serial += 1;
        let sequence = request.sequence;
        let now = self.now;
        let mut record = Record {
            serial: self.serial,
            worker,
            node: NO_NODE,
            hashed_blocks: 0,
            block_size: sequence.block_size().get(),
            prompt_tokens: sequence.tokens(),
            generated_tokens: 0,
            unsettled_tokens: 0,
            computed: false,
            counted: false,
            streams: request.streams,
            expected_tokens: self.output_length.expect(request.max_tokens),
            booked_at: now,
            token_at: now,
        };
        if let Some((worker, load)) = self.fleet.get_mut(worker) {
            let mut pinned_blocks = 0;
            if worker.prefix_caching {
                let chain = sequence.shared_hashes();
                let pinned = self.tree.pin(at, chain, worker.id.slot);
                record.node = pinned.node;
                record.hashed_blocks = pinned.path;
                pinned_blocks = u64::from(pinned.blocks);
                worker.pinned += pinned_blocks;
                worker.shadow.revived(pinned.revived);
            }
            let cached_tokens = decision.cost.overlap_blocks * record.block_size;
            record.unsettled_tokens = record.prompt_tokens.saturating_sub(cached_tokens);
            if !record.streams {
                let prefill = &worker.prefill;
                let wait = prefill.time_to_first_token(record.unsettled_tokens, now);
                record.token_at = now.saturating_add(wait);
            }
            worker.prefill.book(record.unsettled_tokens, now);
            load.requests += 1;
            load.context_tokens += record.context_tokens();
            load.active_blocks += pinned_blocks + u64::from(record.unshared_blocks());
            worker
                .shadow
                .make_room(load.active_blocks, worker.id.slot, &mut self.tree);
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

    fn first_token(&mut self, key: BookingKey, now: Duration) {
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
    }

    fn tokens(&mut self, key: BookingKey, count: u32, now: Duration) {
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
    fn count(&mut self, key: BookingKey, total: u32) {
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
        record.generated_tokens = total;
        let (blocks, context) = (record.blocks(), record.context_tokens());
        let worker = record.worker;
        if let Some((worker, load)) = self.fleet.get_mut(worker) {
            load.active_blocks = load.active_blocks + u64::from(blocks) - u64::from(blocks_before);
            load.context_tokens = load.context_tokens + context - context_before;
            if blocks > blocks_before {
                worker
                    .shadow
                    .make_room(load.active_blocks, worker.id.slot, &mut self.tree);
            }
        }
    }

    fn learn_from_end(&mut self, key: BookingKey, now: Duration) {
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

    /// Takes a booking back. What it computed stays in the worker's cache.
    fn free(&mut self, key: BookingKey) {
        let known = self.record(key).is_some();
        let Some(record) = known.then(|| self.bookings.remove(key.index)) else {
            return;
        };
        let Some((worker, load)) = self.fleet.get_mut(record.worker) else {
            return;
        };
        worker.prefill.release(record.unsettled_tokens, self.now);
        load.requests -= 1;
        load.context_tokens -= record.context_tokens();
        let unshared = record.unshared_blocks();
        load.active_blocks -= u64::from(unshared);
        if !worker.prefix_caching {
            return;
        }
        let stamp = worker.shadow.next_stamp();
        let unpinned = self.tree.unpin(record.node, worker.id.slot, stamp);
        worker.pinned -= u64::from(unpinned.blocks);
        load.active_blocks -= u64::from(unpinned.blocks);
        let left_behind = if record.computed { unshared } else { 0 };
        worker.shadow.freed(unpinned, left_behind, stamp);
        worker
            .shadow
            .make_room(load.active_blocks, worker.id.slot, &mut self.tree);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::fleet::WorkerSpec;
    use crate::router::RouterConfig;

    /// Behind a long backlog, forecasts are due long after their requests were given up.
    #[test]
    fn forecasts_of_ended_requests_do_not_pile_up() {
        let config = RouterConfig::default();
        let sequence = Sequence::opaque(1_000_000, config.block_size);
        let router = Router::new(config).unwrap();
        let worker = router.add_worker(WorkerSpec::default()).unwrap();
        router.set_healthy(worker, true);
        let unwatched = Request {
            streams: false,
            ..Request::new(&sequence)
        };
        let book = || router.route(&unwatched, Duration::ZERO).unwrap();
        let live: Vec<Booking> = (0..10).map(|_| book()).collect();
        for _ in 0..1_000 {
            drop(book());
        }
        assert!(router.lock().due.len() <= 2 * live.len() + 64 + 2);
    }
}
