//! When a request that waits at the router is sent, and when it goes to another worker instead.
//!
//! A worker has room when no prompt sent to it is to be computed, or all are about to be. Then the
//! first in its line is sent. If nobody is in its line, the first in the longest other line may
//! choose anew, with loads and caches as they are by then, and moves if it costs much less there:
//! to be placed late is worth something, but a forecast that is wrong moves it in vain.

use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::choose::Decision;
use crate::fleet::{Worker, WorkerId, WorkerState, seconds};
use crate::queue::{Order, Standing};
use crate::record::{BookingKey, Waiting};
use crate::request::Request;
use crate::state::{Reading, State};
use crate::tree::Slot;

/// Seconds of computing that a worker has room beside: as long as it may take a prompt to get
/// there, with room to spare.
const ABOUT_TO: f64 = 0.1;

/// A request in line moves for no more than this share of what it costs where it is.
const WORTH_MOVING: f64 = 0.5;

/// Nobody is asked to choose anew more often.
const THINKS_FOR: Duration = Duration::from_millis(25);

/// A request between two bookings.
struct Unbooked {
    worker: WorkerId,
    standing: Standing,
    waker: Option<Waker>,
}

impl State {
    /// Books a request that has just come on `worker`, which gets it now or when it has room.
    pub(crate) fn book_and_enter(
        &mut self,
        worker: WorkerId,
        reading: &Reading,
        request: &Request<'_>,
    ) -> (BookingKey, Decision) {
        let (key, decision) = self.book(worker, reading, request);
        let takes = match self.config.queue {
            Some(Order::Fair) => self.takes(key),
            _ => Duration::ZERO,
        };
        self.queue.comes(&reading.standing, takes);
        self.enter(key);
        (key, decision)
    }

    /// What a request is predicted to take of its worker's time.
    fn takes(&mut self, key: BookingKey) -> Duration {
        let Some(record) = self.bookings.get(key.index) else {
            return Duration::ZERO;
        };
        let output = f64::from(record.expected_tokens);
        let context = f64::from(record.prompt_tokens) + output / 2.0;
        let own_step = self.fleet.outlook_mut(record.worker).map(|(outlook, law)| {
            let pace = outlook.watch.pace(law);
            pace.sequence + pace.context * context
        });
        seconds(record.prefill + output * own_step.unwrap_or_default())
    }

    /// The request's worker, booked just now, gets it now or as soon as it has room.
    pub(crate) fn enter(&mut self, key: BookingKey) {
        self.enter_again(key, None, self.now);
    }

    /// The same for one that was in line, with whom to wake, and when to ask it again to move.
    fn enter_again(&mut self, key: BookingKey, waker: Option<Waker>, thinks_until: Duration) {
        if self.config.queue.is_none() {
            return self.send(key);
        }
        let Some(record) = self.record(key) else {
            return;
        };
        let rank = record.standing.rank(record.prefill);
        let (worker, work) = (record.worker, record.share.work);
        record.waiting = Some(Box::new(Waiting {
            rank,
            is_invited: false,
            thinks_until,
            waker,
        }));
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker) {
            outlook.line.join(rank, key, work);
            self.queue.held += 1;
        }
        self.let_go(worker.slot);
    }

    /// Takes a request out of its line, if it is in one.
    pub(crate) fn leave_line(&mut self, worker: WorkerId, waiting: &Waiting) {
        if let Some((outlook, _)) = self.fleet.outlook_mut(worker)
            && outlook.line.leave(waiting.rank)
        {
            self.queue.held -= 1;
        }
    }

    /// Sends a request on its way to its worker.
    pub(crate) fn send(&mut self, key: BookingKey) {
        let now = self.now;
        let Some(record) = self.record(key) else {
            return;
        };
        record.sent_at = now;
        let (worker, standing, streams) = (record.worker, record.standing, record.streams);
        if let Some(mut waiting) = record.waiting.take() {
            let waker = waiting.waker.take();
            record.has_waited = waker.is_some();
            self.queue.woken.extend(waker);
            self.leave_line(worker, &waiting);
            self.queue.sends(&standing);
        }
        if let Some(record) = self.bookings.get_mut(key.index)
            && let Some((outlook, _)) = self.fleet.outlook_mut(worker)
        {
            outlook.send(&mut record.share, now);
        }
        if !streams {
            self.expect(key, now);
        }
    }

    /// Something may have made room at the worker in `slot`.
    pub(crate) fn let_go(&mut self, slot: Slot) {
        if self.queue.held == 0 {
            return;
        }
        while self.has_room(slot) {
            match self.fleet.outlooks[slot as usize].line.first() {
                Some(key) => self.send(key),
                None => return self.invite_from_longest_line(slot),
            }
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
        let pace = outlook.watch.pace(self.fleet.law(outlook));
        outlook.sent().requests == 0 || outlook.sent_backlog(&pace, self.now) < ABOUT_TO
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

    /// Whether the request was sent, and its worker is to get it now. Otherwise `context` is woken
    /// when to ask again.
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
            // The caller sees that the worker is gone.
            None => Poll::Ready(()),
        }
    }

    /// Whether the request is in line and was asked to choose anew.
    pub(crate) fn is_invited(&mut self, key: BookingKey) -> bool {
        let waiting = self.record(key).and_then(|it| it.waiting.as_mut());
        waiting.is_some_and(|it| std::mem::take(&mut it.is_invited))
    }

    /// Books a request in line where it is best by now. Its place among others stays what it was
    /// by when it came.
    pub(crate) fn choose_anew(
        &mut self,
        key: BookingKey,
        request: &Request<'_>,
    ) -> Option<(BookingKey, WorkerId, Decision)> {
        let Unbooked {
            worker: home,
            standing,
            waker,
        } = self.unbook(key)?;
        self.let_go(home.slot);
        let reading = self.read_again(request, standing);
        let chosen = match self.choose_by(request, &reading) {
            Ok(chosen) if self.is_worth_moving(home, chosen, &reading, request) => chosen,
            _ => home,
        };
        let (key, decision) = self.book(chosen, &reading, request);
        self.enter_again(key, waker, self.now.saturating_add(THINKS_FOR));
        Some((key, chosen, decision))
    }

    /// Books a request that has waited and was sent once more where it is: what it finds cached there
    /// is what is cached now.
    pub(crate) fn book_as_sent(
        &mut self,
        key: BookingKey,
        request: &Request<'_>,
    ) -> Option<(BookingKey, WorkerId, Decision)> {
        self.record(key).filter(|it| it.has_waited)?;
        // Nobody is let go in between: it makes no room.
        let Unbooked {
            worker, standing, ..
        } = self.unbook(key)?;
        let reading = self.read_again(request, standing);
        let (key, decision) = self.book(worker, &reading, request);
        self.send(key);
        Some((key, worker, decision))
    }

    /// Takes a booking back that is to be made anew at once, as if it had never been.
    fn unbook(&mut self, key: BookingKey) -> Option<Unbooked> {
        let record = self.record(key)?;
        let unbooked = Unbooked {
            worker: record.worker,
            standing: record.standing,
            waker: record.waiting.as_mut().and_then(|it| it.waker.take()),
        };
        let record = self.bookings.remove(key.index);
        let now = self.now;
        if let Some((outlook, _)) = self.fleet.outlook_mut(record.worker) {
            let counted = (record.booked_at, record.prefill);
            outlook.inflow.take_back(counted, now);
        }
        self.take_back(record, None);
        Some(unbooked)
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
