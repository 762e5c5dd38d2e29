//! When a request that waits at the router is sent, and when it goes to another worker instead.
//!
//! A worker has room when no prompt sent to it is to be computed, or all are about to be. Then the
//! first in its line that fits into its memory is called and, when whoever carries it answers,
//! sent. An engine begins with a prompt of which but a piece fits, lets nobody by, and when its
//! answers grow throws away what it has computed; or it makes prompts wait for as much memory as
//! they [may](crate::admission) need.
//!
//! If nobody is in its line, the first in the longest other line may choose anew, with loads and
//! caches as they are by then, and moves if it costs much less there: to be placed late is worth
//! something, but a forecast that is wrong moves it in vain.
//!
//! Those in line count in every decision, as those that run do, but not in what a worker holds and
//! evicts: it knows nothing of them.

use std::task::{Context, Poll};
use std::time::Duration;

use crate::admission::Promised;
use crate::choose::Decision;
use crate::fleet::{Worker, WorkerId, WorkerState, seconds};
use crate::queue::{Order, Standing};
use crate::record::BookingKey;
use crate::request::Request;
use crate::shadow::Eviction;
use crate::state::{Reading, State};
use crate::tree::Slot;

/// Seconds of computing that a worker has room beside: as long as it may take a prompt to get
/// there, with room to spare.
const ABOUT_TO: f64 = 0.1;

/// A request in line moves for no more than this share of what it costs where it is.
const WORTH_MOVING: f64 = 0.5;

/// Nobody is asked to choose anew more often.
const THINKS_FOR: Duration = Duration::from_millis(25);

impl State {
    /// Books a request that has just come on `worker`, which gets it now or when it has room.
    pub(crate) fn book_and_enter(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> (BookingKey, Decision) {
        let (key, decision) = self.enter(worker, reading, request, self.now);
        self.comes(&reading.standing, std::iter::once(key));
        (key, decision)
    }

    /// A body that has just come was sent at once, the first of its prompts being this.
    pub(crate) fn came_and_was_sent(
        &mut self,
        first: &Request<'_>,
        keys: impl Iterator<Item = BookingKey>,
    ) {
        let standing = self.standing(first);
        self.queue.sends(&standing);
        self.comes(&standing, keys);
    }

    /// Takes note of a body that has come, with these prompts.
    fn comes(&mut self, standing: &Standing, keys: impl Iterator<Item = BookingKey>) {
        let takes = match self.config.queue {
            Some(Order::Fair) => keys.map(|key| self.takes(key)).sum(),
            _ => Duration::ZERO,
        };
        self.queue.comes(standing, takes);
    }

    /// What a request is predicted to take of its worker's time.
    fn takes(&mut self, key: BookingKey) -> Duration {
        let Some(record) = self.bookings.get(key.index) else {
            return Duration::ZERO;
        };
        let output = f64::from(record.expected_tokens);
        let context = f64::from(record.prompt_tokens) + output / 2.0;
        let now = self.now;
        let own_step = self.fleet.outlook_mut(record.worker).map(|(outlook, law)| {
            let pace = outlook.watch.pace(law, now);
            pace.sequence + pace.context * context
        });
        seconds(record.prefill + output * own_step.unwrap_or_default())
    }

    /// Books a request where its worker gets it now or as soon as it has room. It is not asked to
    /// choose anew before `thinks_until`.
    pub(crate) fn enter(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
        thinks_until: Duration,
    ) -> (BookingKey, Decision) {
        let booked = if self.gets_at_once(worker, reading, request) {
            self.queue.sends(&reading.standing);
            self.book(worker, reading, request)
        } else {
            self.line_up(worker, reading, request, thinks_until)
        };
        self.let_go(worker.slot);
        booked
    }

    fn gets_at_once(&self, worker: WorkerId, reading: &Reading, request: &Request<'_>) -> bool {
        if self.config.queue.is_none() {
            return true;
        }
        let Some(outlook) = self.fleet.outlooks.get(worker.slot as usize) else {
            return true;
        };
        let demand = Promised::new(request.max_tokens, request.ignores_eos, 0);
        let depth = reading.depths()[worker.slot as usize].active;
        let adds = request.sequence.blocks().saturating_sub(depth);
        outlook.line.is_empty()
            && self.has_room(worker.slot)
            && self.admits(worker.slot, adds.into(), demand)
    }

    /// Something may have made room at the worker in `slot`: the next in its line is called, or
    /// somebody else invited.
    pub(crate) fn let_go(&mut self, slot: Slot) {
        if self.queue.held == 0 || !self.has_room(slot) {
            return;
        }
        let line = &self.fleet.outlooks[slot as usize].line;
        if line.is_empty() {
            return self.invite_from_longest_line(slot);
        }
        if line.called.is_some() {
            return;
        }
        let next = line.next(self.now, |adds, answer| self.admits(slot, adds, answer));
        let may_overfill = !self.is_held_back_by_engine(slot);
        let Some((rank, key, _)) = next.filter(|(.., fits)| *fits || may_overfill) else {
            return;
        };
        if let Some(waiting) = self.record(key).and_then(|it| it.waiting.as_mut()) {
            let waker = waiting.waker.take();
            self.queue.woken.extend(waker);
            self.fleet.outlooks[slot as usize].line.called = Some(rank);
        }
    }

    fn has_room(&self, slot: Slot) -> bool {
        let Some(worker) = self.fleet.at(slot) else {
            return false;
        };
        if worker.state() == WorkerState::Unhealthy {
            return false;
        }
        let outlook = &self.fleet.outlooks[slot as usize];
        let pace = outlook.watch.pace(self.fleet.law(outlook), self.now);
        outlook.sent().requests == 0 || outlook.sent_backlog(&pace, self.now) < ABOUT_TO
    }

    /// Whether the engine of the worker in `slot` sets memory aside for answers, and makes prompts
    /// wait for it.
    fn is_held_back_by_engine(&self, slot: Slot) -> bool {
        let worker = self.fleet.at(slot);
        worker.is_some_and(|it| it.shadow.eviction() == Eviction::Radix)
    }

    /// Whether the worker in `slot` would begin at once with a request that `adds` blocks and may
    /// be answered so much, as far as its memory goes.
    fn admits(&self, slot: Slot, adds: u64, answer: Promised) -> bool {
        let Some(worker) = self.fleet.at(slot) else {
            return false;
        };
        let load = &self.fleet.loads[slot as usize];
        // Too small a guess would hold back what has room.
        let Some(capacity) = worker.told_capacity() else {
            return true;
        };
        // Whoever is alone there must do with what there is.
        if load.active_blocks == 0 {
            return true;
        }
        let capacity = u64::from(capacity);
        if !self.is_held_back_by_engine(slot) {
            return self.config.queue != Some(Order::Shortest)
                || load.active_blocks + adds <= capacity;
        }
        let block_size = u64::from(self.config.block_size.get());
        let a_page = u64::from(self.fleet.stride(slot).get());
        let answers = self.fleet.outlooks[slot as usize].reserve.tokens() + answer.tokens();
        let takes = (load.active_blocks + adds + a_page) * block_size + answers;
        takes < capacity * block_size
    }

    /// Workers of other models have nobody who could come.
    fn invite_from_longest_line(&mut self, slot: Slot) {
        let law = self.fleet.outlooks[slot as usize].law;
        let others = self.fleet.outlooks.iter().filter(|it| it.law == law);
        let longest = others.max_by_key(|it| it.line.all().requests);
        let Some(key) = longest.and_then(|it| it.line.first()) else {
            return;
        };
        let now = self.now;
        let waiting = self.record(key).and_then(|it| it.waiting.as_ref());
        if waiting.is_some_and(|it| it.thinks_until <= now) {
            self.invite(key);
        }
    }

    /// The worker is gone, and its line with it.
    pub(crate) fn close_line(&mut self, worker: WorkerId) {
        self.invite_all(worker);
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
            self.queue.held -= outlook.line.all().requests as usize;
        }
    }

    /// The worker takes no more: all in its line may choose anew.
    pub(crate) fn invite_all(&mut self, worker: WorkerId) {
        let Some((outlook, _)) = self.fleet.outlook_mut(worker) else {
            return;
        };
        let keys: Vec<BookingKey> = outlook.line.keys().collect();
        for key in keys {
            self.invite(key);
        }
    }

    /// Whoever carries the request is woken to choose anew.
    fn invite(&mut self, key: BookingKey) {
        if let Some(waiting) = self.record(key).and_then(|it| it.waiting.as_mut()) {
            waiting.is_invited = true;
            let waker = waiting.waker.take();
            self.queue.woken.extend(waker);
        }
    }

    /// Whether the request's worker is to get it now, or is gone, which the caller sees. Otherwise
    /// `context` is woken when to ask again.
    pub(crate) fn poll_sent(&mut self, key: BookingKey, context: &mut Context<'_>) -> Poll<()> {
        let Some(record) = self.record(key) else {
            return Poll::Ready(());
        };
        let worker = record.worker;
        let Some(waiting) = &mut record.waiting else {
            return Poll::Ready(());
        };
        waiting.waker = Some(context.waker().clone());
        match self.fleet.get(worker) {
            Some(_) => Poll::Pending,
            None => Poll::Ready(()),
        }
    }

    pub(crate) fn is_in_line(&mut self, key: BookingKey) -> bool {
        self.record(key).is_some_and(|it| it.waiting.is_some())
    }

    /// Whether the request is in line and was asked to choose anew.
    pub(crate) fn is_invited(&mut self, key: BookingKey) -> bool {
        let waiting = self.record(key).and_then(|it| it.waiting.as_mut());
        waiting.is_some_and(|it| std::mem::take(&mut it.is_invited))
    }

    /// Whether the request is in line and its worker has room for it.
    pub(crate) fn is_called(&mut self, key: BookingKey) -> bool {
        let Some(record) = self.record(key) else {
            return false;
        };
        let (worker, rank) = (record.worker, record.waiting.as_ref().map(|it| it.rank));
        let outlook = self.fleet.outlook_mut(worker);
        rank.is_some() && outlook.is_some_and(|(it, _)| it.line.called == rank)
    }

    /// Books a request in line where it is best by now. Its place among others stays what it was
    /// by when it came.
    pub(crate) fn choose_anew(
        &mut self,
        key: BookingKey,
        request: &Request<'_>,
    ) -> Option<(BookingKey, WorkerId, Decision)> {
        // Nobody behind it is called before it has chosen.
        let (home, standing) = self.unbook(key)?;
        let reading = self.read_again(request, standing);
        let chosen = match self.choose_by(request, &reading) {
            Ok(chosen) if self.is_worth_moving(home, chosen, &reading, request) => chosen,
            _ => home,
        };
        let thinks_until = self.now.saturating_add(THINKS_FOR);
        let (key, decision) = self.enter(chosen, &reading, request, thinks_until);
        if chosen != home {
            self.let_go(home.slot);
        }
        Some((key, chosen, decision))
    }

    /// The worker of a request in line gets it: what it finds cached there is what is cached now.
    pub(crate) fn send(
        &mut self,
        key: BookingKey,
        request: &Request<'_>,
    ) -> Option<(BookingKey, WorkerId, Decision)> {
        self.record(key).filter(|it| it.waiting.is_some())?;
        let (worker, standing) = self.unbook(key)?;
        let reading = self.read_as_sent(request, standing);
        self.queue.sends(&standing);
        let (key, decision) = self.book(worker, &reading, request);
        self.let_go(worker.slot);
        Some((key, worker, decision))
    }

    /// Takes a booking back that is to be made elsewhere, as if it had never been.
    pub(crate) fn withdraw(&mut self, key: BookingKey) -> Option<(WorkerId, Standing)> {
        let (worker, standing) = self.unbook(key)?;
        self.let_go(worker.slot);
        Some((worker, standing))
    }

    fn unbook(&mut self, key: BookingKey) -> Option<(WorkerId, Standing)> {
        self.record(key)?;
        let record = self.bookings.remove(key.index);
        let (worker, standing, now) = (record.worker, record.standing, self.now);
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
            let counted = (record.booked_at, record.prefill);
            outlook.inflow.take_back(counted, now);
        }
        self.take_back(record, None);
        Some((worker, standing))
    }

    fn is_worth_moving(
        &self,
        home: WorkerId,
        to: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> bool {
        let state = self.fleet.get(home).map(Worker::state);
        if state != Some(WorkerState::Healthy) {
            return true;
        }
        let placement = self.placement(request, reading);
        let cost = |worker: WorkerId| {
            let depth = reading.depths()[worker.slot as usize];
            let delay = self.fleet.delay(&placement, worker.slot, depth);
            placement.total(&delay)
        };
        cost(to) <= WORTH_MOVING * cost(home)
    }
}
