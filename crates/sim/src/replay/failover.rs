//! Failed requests of a replay: which fail, and how they are sent to another worker, as the gateway
//! does it.
//!
//! A request that its worker fails, or that has no first token within its bound, is reported to the
//! router and sent to another worker, at most twice and within the retry budget. Without worker
//! faults nothing of this happens.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use foresee_core::outlier::ExchangeResult;
use foresee_core::retry_budget::RetryBudget;
use foresee_core::workers::WorkerState;

use super::Replay;
use crate::faults::{Fate, fate};
use crate::outcome::FaultOutcome;
use crate::prompt::mix;

/// Retries of one request.
const MAX_RETRIES: u32 = 2;

/// Retries per request of the last ten seconds, and in addition per second.
const RETRY_RATIO: f64 = 0.2;
const RETRIES_PER_SECOND: f64 = 3.0;

/// Bound for the first token, in predicted times to first token, and its smallest and largest value.
const FIRST_TOKEN_FACTOR: u32 = 10;
const MIN_FIRST_TOKEN_BOUND: Duration = Duration::from_secs(30);
const MAX_FIRST_TOKEN_BOUND: Duration = Duration::from_secs(600);

/// Time after the start of the first fault within which lost requests are not counted as late.
const ONSET: Duration = Duration::from_secs(10);

/// Time after the end of a fault in which the worker must get back its share of the requests, and
/// the time over which the share is then measured.
const RECOVERY: Duration = Duration::from_secs(60);

/// An attempt of a request that fails at a known time unless its first token comes before.
type Failure = Reverse<(Duration, usize, u32)>;

/// State of the failover of a replay.
#[derive(Debug)]
pub(super) struct Failover {
    /// Time, request and attempt of each possible failure.
    failures: BinaryHeap<Failure>,
    budget: RetryBudget,
    /// Requests that were not retried.
    lost: usize,
    /// Of these, the ones later than [`ONSET`] after the start of the first fault.
    lost_late: usize,
    /// Requests sent to workers.
    sent: u64,
    /// Time and worker of every request that was sent; only with faults.
    sends: Vec<(Duration, usize)>,
}

impl Default for Failover {
    fn default() -> Self {
        Self {
            failures: BinaryHeap::new(),
            budget: RetryBudget::new(RETRY_RATIO, RETRIES_PER_SECOND),
            lost: 0,
            lost_late: 0,
            sent: 0,
            sends: Vec::new(),
        }
    }
}

impl Replay<'_> {
    /// Counts the arrival of a request in the retry budget.
    pub(super) fn count_arrival(&mut self, now: Duration) {
        self.failover.budget.on_request(now);
    }

    /// Counts a request that is sent to the worker at `worker`, and schedules its failure: an error
    /// of the worker, or the end of the bound for its first token. Returns whether the engine of
    /// the worker gets the request.
    pub(super) fn begin_attempt(&mut self, index: usize, worker: usize, now: Duration) -> bool {
        self.failover.sent += 1;
        let faults = &self.config.faults;
        let Some(flight) = self.in_flight[index]
            .as_ref()
            .filter(|_| !faults.is_empty())
        else {
            return true;
        };
        self.failover.sends.push((now, worker));
        let draw =
            mix(self.config.router.seed ^ mix(index as u64 ^ u64::from(flight.attempt) << 48));
        let fate = fate(faults, worker, draw, now);
        let bound = (flight.booking.predicted_ttft() * FIRST_TOKEN_FACTOR)
            .clamp(MIN_FIRST_TOKEN_BOUND, MAX_FIRST_TOKEN_BOUND);
        let fails_after = match fate {
            Fate::FailsAfter(time) => time.min(bound),
            Fate::Served | Fate::Hangs => bound,
        };
        self.failover
            .failures
            .push(Reverse((now + fails_after, index, flight.attempt)));
        fate == Fate::Served
    }

    /// Returns the time of the next failure.
    pub(super) fn next_failure(&self) -> Option<Duration> {
        self.failover.failures.peek().map(|Reverse((at, ..))| *at)
    }

    /// Returns whether the attempt still waits for its first token.
    fn is_pending(&self, index: usize, attempt: u32) -> bool {
        self.in_flight[index]
            .as_ref()
            .is_some_and(|flight| flight.attempt == attempt && flight.first_token.is_none())
    }

    /// Fails the attempts that are due, and forgets failures that can no longer happen. Must be
    /// called before the time of the next event is read.
    pub(super) fn fail_due_attempts(&mut self, now: Duration) {
        while let Some(&Reverse((at, index, attempt))) = self.failover.failures.peek() {
            let is_pending = self.is_pending(index, attempt);
            if is_pending && at > now {
                return;
            }
            self.failover.failures.pop();
            if is_pending {
                self.fail_attempt(index, now);
            }
        }
    }

    /// Reports the failure of a request to the router, and sends the request to another worker or
    /// counts it as lost.
    fn fail_attempt(&mut self, index: usize, now: Duration) {
        let Some(flight) = &mut self.in_flight[index] else {
            return;
        };
        let failed = flight.booking.worker();
        self.workers[self.by_id[&failed]].engine.abort(index as u64);
        flight.booking.report(ExchangeResult::Failure, now);
        flight.excluded.push(failed);
        flight.attempt += 1;
        let is_retried = flight.attempt <= MAX_RETRIES
            && self.failover.budget.try_retry(now)
            && flight.booking.reroute(&flight.excluded, now).is_ok();
        if is_retried {
            return self.send(index, now);
        }
        self.lose(index, now);
    }

    /// Ends a request without a response.
    pub(super) fn lose(&mut self, index: usize, now: Duration) {
        self.in_flight[index] = None;
        self.failover.lost += 1;
        let first_start = self.config.faults.iter().map(|fault| fault.from).min();
        if first_start.is_some_and(|start| now > start + ONSET) {
            self.failover.lost_late += 1;
        }
        self.missed += 1;
        self.on_request_end(index, now);
    }

    /// Returns the results of the failover.
    pub(super) fn fault_outcome(&self) -> FaultOutcome {
        let snapshots = self.router.workers(self.last_end);
        let ejected = snapshots
            .iter()
            .filter(|worker| worker.state == WorkerState::Ejected);
        let shares = self.config.faults.iter().filter_map(|fault| {
            let window = fault.until? + RECOVERY..fault.until? + 2 * RECOVERY;
            let sends = self.failover.sends.iter();
            let sends = sends.filter(|(at, _)| window.contains(at));
            let total = sends.clone().count();
            let own = sends.filter(|(_, worker)| *worker == fault.worker).count();
            (total > 0).then(|| own as f64 * self.workers.len() as f64 / total as f64)
        });
        FaultOutcome {
            lost: self.failover.lost,
            lost_late: self.failover.lost_late,
            sent_to_workers: self.failover.sent,
            recovered_share: shares.reduce(f64::min),
            ejected_at_end: ejected.count(),
        }
    }
}
