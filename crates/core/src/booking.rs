//! What one routed request holds on one worker, from the instant it is chosen until it ends.
//!
//! [`Booking`] is the only thing that changes a worker's load, and dropping it is the only way
//! to free what it holds, so no path (abort, retry, error, panic) can forget to.

use std::task::{Context, Poll};
use std::time::Duration;

use crate::choose::Decision;
use crate::fleet::WorkerId;
use crate::record::BookingKey;
use crate::request::{Request, RouteError};
use crate::sequence::Sequence;
use crate::state::{Locked, State, release};

/// A request's place on a worker. Dropping it frees all it holds there.
#[derive(Debug)]
#[must_use = "dropping a booking frees it"]
pub struct Booking {
    state: Locked,
    key: BookingKey,
    worker: WorkerId,
    decision: Decision,
    model: Box<str>,
    sequence: Sequence,
    max_tokens: Option<u32>,
    ignores_eos: bool,
    expected_tokens: Option<u32>,
    has_tools: bool,
    streams: bool,
    priority: i32,
    tenant: u64,
    /// Prompt and output, once the output is known.
    answered: Option<Sequence>,
}

impl Booking {
    pub(crate) fn new(
        state: Locked,
        key: BookingKey,
        worker: WorkerId,
        decision: Decision,
        request: &Request<'_>,
    ) -> Self {
        Self {
            state,
            key,
            worker,
            decision,
            model: request.model.into(),
            sequence: request.sequence.clone(),
            max_tokens: request.max_tokens,
            ignores_eos: request.ignores_eos,
            expected_tokens: request.expected_tokens,
            has_tools: request.has_tools,
            streams: request.streams,
            priority: request.priority,
            tenant: request.tenant,
            answered: None,
        }
    }

    pub(crate) fn router(&self) -> &Locked {
        &self.state
    }

    pub(crate) fn key(&self) -> BookingKey {
        self.key
    }

    /// What was asked for when it was booked.
    pub(crate) fn request<'a>(&'a self, excluded: &'a [WorkerId]) -> Request<'a> {
        Request {
            model: &self.model,
            sequence: &self.sequence,
            max_tokens: self.max_tokens,
            ignores_eos: self.ignores_eos,
            expected_tokens: self.expected_tokens,
            has_tools: self.has_tools,
            streams: self.streams,
            priority: self.priority,
            tenant: self.tenant,
            excluded,
        }
    }

    /// It was freed where it was and booked anew.
    pub(crate) fn is_now(&mut self, key: BookingKey, worker: WorkerId, decision: Decision) {
        // Another worker has stored nothing of what this one answered.
        self.answered = None;
        (self.key, self.worker, self.decision) = (key, worker, decision);
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

    /// Ready once the request is to be sent to [`worker`](Self::worker), which may have become
    /// another meanwhile, or have gone. Otherwise whoever asked is woken when to ask again. Always
    /// ready without a [queue](crate::queue).
    ///
    /// It does not move to a worker that is excluded.
    pub fn poll_sent(
        &mut self,
        context: &mut Context<'_>,
        excluded: &[WorkerId],
        now: Duration,
    ) -> Poll<()> {
        let router = self.state.clone();
        let mut state = router.lock();
        state.advance(now);
        if state.is_invited(self.key)
            && let Some((key, worker, decision)) =
                state.choose_anew(self.key, &self.request(excluded))
        {
            self.is_now(key, worker, decision);
        }
        if state.is_called(self.key) {
            self.send(&mut state);
        }
        let poll = state.poll_sent(self.key, context);
        release(state);
        poll
    }

    /// If it is in line, it is so no longer.
    fn send(&mut self, state: &mut State) {
        if let Some((key, worker, decision)) = state.send(self.key, &self.request(&[])) {
            self.is_now(key, worker, decision);
        }
    }

    /// What tells of an answer tells that it was sent, whether it should have been or not.
    fn hear(&mut self, now: Duration, what: impl FnOnce(&mut State, BookingKey)) {
        let mut state = self.state.lock();
        state.advance(now);
        if state.is_in_line(self.key) {
            drop(state);
            let router = self.state.clone();
            self.send(&mut router.lock());
            state = self.state.lock();
        }
        what(&mut state, self.key);
        release(state);
    }

    /// The worker produced the first output token, so the prompt is computed. Only the first
    /// call counts.
    pub fn first_token(&mut self, now: Duration) {
        self.hear(now, |state, key| state.first_token(key, now));
    }

    /// The worker produced `count` further output tokens, the first one included.
    pub fn tokens(&mut self, count: u32, now: Duration) {
        if count == 0 {
            return;
        }
        self.hear(now, |state, key| {
            state.first_token(key, now);
            state.tokens(key, count, now);
        });
    }

    /// The worker says it has produced `total` output tokens so far: replaces what was counted.
    pub fn set_tokens(&mut self, total: u32, now: Duration) {
        self.hear(now, |state, key| {
            if total > 0 {
                state.first_token(key, now);
            }
            state.count(key, total);
        });
    }

    /// It is known what the worker has stored: `sequence` is the prompt and, after it, output.
    /// When the booking ends, its blocks of output can be found again as those of a prompt can.
    /// A sequence that does not begin with the prompt is ignored.
    pub fn answered(&mut self, sequence: Sequence) {
        let prompt = self.sequence.hashes();
        // An equal hash is an equal prefix.
        let begins_with_prompt =
            prompt.is_empty() || sequence.hashes().get(prompt.len() - 1) == prompt.last();
        if begins_with_prompt && sequence.block_size() == self.sequence.block_size() {
            self.answered = Some(sequence);
        }
    }

    /// The worker says that it took `tokens` of the prompt from its cache. What was predicted is
    /// held against it: it tells how much the cache holds, and when it was lost. Only the first
    /// call counts.
    pub fn observed_cached(&mut self, tokens: u32) {
        let mut state = self.state.lock();
        state.observe_cached(self.key, &self.sequence, tokens);
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
    /// As [`Router::route`](crate::router::Router::route); the booking stays where it is.
    pub fn reroute(&mut self, excluded: &[WorkerId], now: Duration) -> Result<(), RouteError> {
        self.rebook(now, excluded, None)
    }

    fn rebook(
        &mut self,
        now: Duration,
        excluded: &[WorkerId],
        worker: Option<WorkerId>,
    ) -> Result<(), RouteError> {
        let request = self.request(excluded);
        let mut state = self.state.lock();
        state.advance(now);
        let standing = state.record(self.key).map(|it| it.standing);
        let standing = standing.unwrap_or_else(|| state.standing(&request));
        let reading = state.read_again(&request, standing);
        let chosen = match worker {
            Some(worker) if state.fleet.get(worker).is_some() => worker,
            Some(_) => return Err(RouteError::NoWorker(request.model.to_owned())),
            None => state.choose_by(&request, &reading)?,
        };
        state.withdraw(self.key);
        // Again, because its own blocks are no overlap any longer.
        let reading = state.read_again(&request, standing);
        let (key, decision) = state.enter(chosen, &reading, &request, now);
        release(state);
        self.is_now(key, chosen, decision);
        Ok(())
    }

    /// The request ended as it should. Like dropping, but teaches how long answers are.
    pub fn finish(mut self, now: Duration) {
        self.hear(now, |state, key| {
            state.first_token(key, now);
            state.learn_from_end(key, now);
        });
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        state.free(self.key, self.answered.as_ref());
        release(state);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::fleet::WorkerSpec;
    use crate::router::{Router, RouterConfig};

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
        let due = live[0].state.lock().unwatched.due.len();
        assert!(due <= 2 * live.len() + 64 + 2, "{due} forecasts");
    }
}
