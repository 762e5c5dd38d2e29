//! How far requests have come whose output nobody watches: as far as they should be by the
//! forecast, and where KV events tell of their blocks, as far as those say.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::BuildHasherDefault;
use std::time::Duration;

use crate::cache::Path;
use crate::fleet::{WorkerId, seconds};
use crate::ledger::record_of;
use crate::record::BookingKey;
use crate::sequence::{AlreadyHashed, Sequence, SequenceHash};
use crate::state::State;
use crate::tree::Slot;

/// Between two looks at a request that nobody watches, at least.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// What there is to look at.
#[derive(Debug, Default)]
pub(crate) struct Unwatched {
    /// When the next forecast of each is due.
    pub(crate) due: BinaryHeap<Reverse<(Duration, BookingKey)>>,
    /// Each by the last full block that it is known to have or to compute, on its worker.
    by_last_block: HashMap<u64, Followed, BuildHasherDefault<AlreadyHashed>>,
}

/// A request followed by its blocks.
#[derive(Clone, Copy, Debug)]
struct Followed {
    key: BookingKey,
    /// The router's blocks up to the end of that one.
    blocks: u32,
}

/// Names a block on one worker.
fn on(worker: Slot, hash: SequenceHash) -> u64 {
    hash.rotate_left(worker % u64::BITS) ^ u64::from(worker)
}

impl State {
    /// Looks after a request that nobody watches, which its worker has just got.
    pub(crate) fn look_after(&mut self, worker: WorkerId, prompt: &Sequence, key: BookingKey) {
        self.forget_ended();
        self.unwatched.due.push(Reverse((self.now, key)));
        let full = prompt.whole_hashes(self.fleet.stride(worker.slot).get());
        if let Some(&last) = full.last() {
            let blocks = full.len() as u32;
            let followed = Followed { key, blocks };
            let by_last_block = &mut self.unwatched.by_last_block;
            by_last_block.insert(on(worker.slot, last), followed);
        }
    }

    /// Requests that end early leave behind what was due at any later time.
    fn forget_ended(&mut self) {
        let (bookings, unwatched) = (&self.bookings, &mut self.unwatched);
        let is_live = |key: BookingKey| {
            let record = bookings.get(key.index);
            record.is_some_and(|record| record.serial == key.serial && !record.computed)
        };
        let most = 2 * bookings.len() + 64;
        if unwatched.due.len() > most {
            unwatched.due.retain(|Reverse((_, key))| is_live(*key));
        }
        if unwatched.by_last_block.len() > most {
            unwatched.by_last_block.retain(|_, it| is_live(it.key));
        }
    }

    /// Events say that a worker has stored these blocks.
    pub(crate) fn stored(&mut self, worker: WorkerId, path: Path<'_>) {
        if self.unwatched.by_last_block.is_empty() {
            return;
        }
        for &hash in path.told() {
            let followed = self.unwatched.by_last_block.get(&on(worker.slot, hash));
            if let Some(&Followed { key, .. }) = followed {
                self.begins(worker, key);
            }
        }
        // An answer fills one block after the other: several at once are somebody's prompt.
        if let ([hash], Some(before)) = (path.told(), path.before_told()) {
            self.goes_on(worker, before, *hash);
        }
    }

    /// Events tell that its prompt is computed, though nobody sees its first token.
    fn begins(&mut self, worker: WorkerId, key: BookingKey) {
        if let Some(record) = record_of(&mut self.bookings, key)
            && record.worker == worker
            && let Some((outlook, _)) = self.fleet.outlook_mut(worker)
        {
            outlook.begin(&record.share, self.now);
        }
    }

    /// Events tell that the block `hash` was filled, behind `before`.
    fn goes_on(&mut self, worker: WorkerId, before: SequenceHash, hash: SequenceHash) {
        let slot = worker.slot;
        let by_last_block = &mut self.unwatched.by_last_block;
        let Some(followed) = by_last_block.remove(&on(slot, before)) else {
            return;
        };
        let Followed { key, blocks } = followed;
        let record = record_of(&mut self.bookings, key).filter(|record| !record.computed);
        let Some(record) = record.filter(|record| record.worker == worker) else {
            return;
        };
        // Behind a prompt that several have, nobody knows whose block it is.
        let is_of_prompt = blocks <= record.hashed_blocks;
        if is_of_prompt && self.tree.pins_at(record.node, slot, blocks) != 1 {
            return;
        }
        let blocks = blocks.saturating_add(self.fleet.stride(slot).get());
        let tokens = blocks.saturating_mul(record.block_size);
        // What comes after the last token in it is being computed.
        let generated = tokens
            .saturating_sub(record.prompt_tokens)
            .saturating_add(1);
        if record.max_tokens.is_some_and(|most| generated > most) {
            return;
        }
        let was_ahead = record.share.is_ahead();
        if was_ahead {
            self.begins(worker, key);
            self.forecast_progress(key);
        }
        let now = self.now;
        let Some(record) = self.record(key) else {
            return;
        };
        record.known = (now, generated);
        let most = record.longest_answer();
        // Then it is due no more, and else it still is.
        let has_ended = !was_ahead && record.generated_tokens >= most;
        let unwatched = &mut self.unwatched;
        if has_ended && generated < most {
            unwatched.due.push(Reverse((now, key)));
        }
        let followed = Followed { key, blocks };
        unwatched.by_last_block.insert(on(slot, hash), followed);
        self.set_generated(key, generated);
    }

    /// Brings forecasts up to `now`: requests whose output nobody watches make the progress they
    /// should have made.
    pub(crate) fn advance(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while let Some(&Reverse((at, key))) = self.unwatched.due.peek()
            && at <= self.now
        {
            self.unwatched.due.pop();
            if let Some(next) = self.forecast_progress(key) {
                self.unwatched.due.push(Reverse((next, key)));
            }
        }
    }

    /// Gives an unwatched request the tokens it should have by now. Returns when its next block
    /// should fill, if it should grow further.
    fn forecast_progress(&mut self, key: BookingKey) -> Option<Duration> {
        let now = self.now;
        let record = record_of(&mut self.bookings, key).filter(|record| !record.computed)?;
        let (worker, expected) = (record.worker, record.expected_tokens);
        let block_size = record.block_size;
        let (outlook, law) = self.fleet.outlook_mut(worker)?;
        let (requests, context) = outlook.decoding();
        let pace = outlook.watch.pace(law, now);
        let step = pace.step(f64::from(requests.max(1)), context as f64);
        if record.share.is_ahead() {
            let due = record.first_token_due;
            let Some(since) = outlook.computed_since(&record.share, due, now) else {
                return now.checked_add(seconds(step).max(SHORTEST_PAUSE));
            };
            record.token_at = since;
            record.known = (since, expected.min(1));
        }
        let (is_started, serial) = (outlook.compute(&mut record.share), record.serial);
        let (since, known) = record.known;
        let since_then = now.saturating_sub(since).as_secs_f64() / step;
        let total = known.saturating_add(since_then as u32);
        let most = record.longest_answer().max(known);
        let total = total.min(most);
        let context = record.prompt_tokens.saturating_add(total);
        let to_next_block = block_size - context.saturating_sub(1) % block_size;
        if is_started {
            self.started(worker, serial);
        }
        self.set_generated(key, total);
        // Never again at this very instant, however fast the worker was learned to be.
        let pause = seconds(step)
            .saturating_mul(to_next_block)
            .max(SHORTEST_PAUSE);
        now.checked_add(pause).filter(|_| total < most)
    }
}
