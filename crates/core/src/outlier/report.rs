//! Reports of the results of exchanges, and their effects.

use std::time::Duration;

use super::{ExchangeResult, FailureCharge, ReportedResult};
use crate::batch::Batch;
use crate::booking::Booking;
use crate::booking_id::BookingId;
use crate::booking_record::BookingRecord;
use crate::router::Router;
use crate::state::State;
use crate::worker_id::WorkerId;
use crate::workers::Workers;

impl Booking {
    /// Reports how the exchange with the worker of this booking ended, or how far it succeeded.
    ///
    /// Must be called before the booking is released or moved: a failure charges the worker with
    /// the time that this request would have taken. Of several reports the first counts, except that a
    /// failure replaces an earlier success. The first token reports a success by itself. Has no
    /// effect if the worker was removed, or if the request was sent before the worker recovered
    /// from an ejection or restarted.
    pub fn report(&mut self, result: ExchangeResult, now: Duration) {
        let shared = self.shared();
        let mut state = shared.lock();
        state.advance_to(now);
        let restricted = state.report(self.id(), result);
        drop(state);
        if let Some(worker) = restricted {
            shared.offer_queue_to_others(worker);
        }
    }
}

impl Batch {
    /// Reports how the exchange with the worker of this batch ended, once for all prompts: see
    /// [`Booking::report`]. A failure charges the worker with every prompt that has not ended.
    pub fn report(&mut self, result: ExchangeResult, now: Duration) {
        let mut bookings = self.active_bookings();
        let Some(shared) = bookings.next().map(|booking| booking.shared().clone()) else {
            return;
        };
        drop(bookings);
        let ids: Vec<BookingId> = self.active_bookings().map(|booking| booking.id()).collect();
        let mut state = shared.lock();
        state.advance_to(now);
        let restricted = state.report_batch(&ids, result);
        drop(state);
        if let Some(worker) = restricted {
            shared.offer_queue_to_others(worker);
        }
    }
}

impl Router {
    /// Reports the result of an exchange for which there is no booking any more, as if its request
    /// had been sent now. A failure charges nothing. Has no effect if the worker was removed.
    pub fn report(&self, worker: WorkerId, result: ExchangeResult, now: Duration) {
        let mut state = self.shared().lock();
        state.advance_to(now);
        let exchange = Exchange {
            worker,
            sent_at: state.now,
            result,
            charge: FailureCharge::default(),
        };
        let is_restricted = state.apply_result(exchange, &mut ReportedResult::Unknown);
        drop(state);
        if is_restricted {
            self.shared().offer_queue_to_others(worker);
        }
    }

    /// Forgets all failures of a worker, its ejection and its backpressure, because its engine was
    /// restarted. The worker is warming up again. Results of requests that were sent before are
    /// ignored. Has no effect if the worker was removed.
    pub fn reset_outlier(&self, worker: WorkerId, now: Duration) {
        let mut state = self.shared().lock();
        state.advance_to(now);
        if state.workers.get(worker).is_some() {
            let now = state.now;
            state.workers.outliers.start(worker.index, now);
            state.workers.set_ejected(worker.index, false);
            state.try_dispatch_next(worker.index);
        }
    }
}

impl State {
    /// Applies the result of the exchange of one booking. Returns its worker if the worker takes no
    /// more requests because of it: the caller offers its queue to others. Has no effect if the
    /// booking has ended.
    pub(crate) fn report(&mut self, id: BookingId, result: ExchangeResult) -> Option<WorkerId> {
        let record = self.bookings.get(id)?;
        let (worker, mut reported) = (record.worker, record.reported);
        let exchange = Exchange {
            worker,
            sent_at: record.booked_at,
            result,
            charge: self.failure_charge(record, result),
        };
        let is_restricted = self.apply_result(exchange, &mut reported);
        if let Some(record) = self.bookings.get_mut(id) {
            record.reported = reported;
        }
        is_restricted.then_some(worker)
    }

    /// Applies one result for several bookings on one worker, and returns what
    /// [`report`](Self::report) returns. Has no effect if all have ended.
    fn report_batch(&mut self, ids: &[BookingId], result: ExchangeResult) -> Option<WorkerId> {
        let (&first, further) = ids.split_first()?;
        let restricted = self.report(first, result);
        for &id in further {
            let record = self.bookings.get(id);
            let Some(record) = record.filter(|record| record.reported != ReportedResult::Final)
            else {
                continue;
            };
            let (worker, now) = (record.worker, self.now);
            let charge = self.failure_charge(record, result);
            if let Some(record) = self.bookings.get_mut(id) {
                record.reported = match result {
                    ExchangeResult::Success => ReportedResult::Success {
                        consecutive_before: 0,
                    },
                    _ => ReportedResult::Final,
                };
            }
            if charge.requests > 0.0 && self.workers.get(worker).is_some() {
                self.workers.outliers.add_charge(worker.index, charge, now);
            }
        }
        restricted
    }

    /// Returns the charge of a booking with this result: see [`BookingRecord::failure_charge`].
    fn failure_charge(&self, record: &BookingRecord, result: ExchangeResult) -> FailureCharge {
        record.failure_charge(result, &self.workers, self.config.overlap_weight, self.now)
    }

    /// Applies the result of an exchange: see [`Workers::apply_result`]. Returns whether the worker
    /// takes no more requests because of it. Dispatches to a worker that takes requests again.
    fn apply_result(&mut self, exchange: Exchange, reported: &mut ReportedResult) -> bool {
        let effect = self.workers.apply_result(exchange, reported, self.now);
        if effect == ResultEffect::TakesRequestsAgain {
            self.try_dispatch_next(exchange.worker.index);
        }
        effect == ResultEffect::TakesNoMoreRequests
    }
}

/// Exchange with a worker, as far as its effect on the worker depends on it.
#[derive(Clone, Copy, Debug)]
struct Exchange {
    worker: WorkerId,
    /// Time at which the request was sent.
    sent_at: Duration,
    result: ExchangeResult,
    /// Charge that the result adds if it is a failure.
    charge: FailureCharge,
}

/// Effect of a result on the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResultEffect {
    /// The worker takes requests if it did before.
    Unchanged,
    /// The ejection of the worker has ended.
    TakesRequestsAgain,
    /// The worker is ejected or has backpressure.
    TakesNoMoreRequests,
}

impl Workers {
    /// Applies the result of an exchange, and changes `reported`, the earlier result of the request,
    /// accordingly. Has no effect if the worker was removed, if the earlier result is final, or if
    /// the worker has recovered since the request was sent.
    fn apply_result(
        &mut self,
        exchange: Exchange,
        reported: &mut ReportedResult,
        now: Duration,
    ) -> ResultEffect {
        let Exchange {
            worker,
            sent_at,
            result,
            charge,
        } = exchange;
        let index = worker.index;
        if self.get(worker).is_none() || *reported == ReportedResult::Final {
            return ResultEffect::Unchanged;
        }
        if result == ExchangeResult::Success {
            self.outliers.end_warm_up(index);
        }
        let Some((record, config)) = self.outliers.record_mut(index) else {
            return ResultEffect::Unchanged;
        };
        let previous = *reported;
        if result != ExchangeResult::Success {
            *reported = ReportedResult::Final;
        }
        if record.is_stale(sent_at) {
            return ResultEffect::Unchanged;
        }
        match result {
            ExchangeResult::Success if previous != ReportedResult::Unknown => {}
            ExchangeResult::Success => {
                *reported = record.on_success(sent_at, now);
                if record.ejection.is_some() {
                    record.close(now);
                    self.set_ejected(index, false);
                    return ResultEffect::TakesRequestsAgain;
                }
            }
            ExchangeResult::Failure | ExchangeResult::SoftFailure => {
                match record.ejection {
                    // A failed trial that was sent after the end of the ejection.
                    Some(ejection) if ejection.ends_at <= sent_at => record.eject(config, now),
                    Some(_) => {}
                    None => record.on_failure(result, previous, now),
                }
                self.outliers.add_charge(index, charge, now);
                if self.eject_if_outlier(index, now) {
                    return ResultEffect::TakesNoMoreRequests;
                }
            }
            ExchangeResult::Backpressure { retry_after } => {
                record.on_backpressure(retry_after, now);
                self.outliers.restrict(index);
                return ResultEffect::TakesNoMoreRequests;
            }
        }
        ResultEffect::Unchanged
    }
}
