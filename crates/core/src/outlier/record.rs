//! The record of one worker: its recent results, ejection, backpressure and failure charge.

use std::collections::VecDeque;
use std::time::Duration;

use super::{ExchangeResult, OutlierConfig, OutlierSnapshot};

/// Number of recent results from which the failure rate is computed.
const RECENT_RESULTS: usize = 20;

/// Time without results after which the earlier ones are forgotten.
const MAX_RESULT_AGE: Duration = Duration::from_secs(300);

/// Time without an ejection after which one ejection less is counted.
const GOOD_BEHAVIOUR: Duration = Duration::from_secs(300);

/// First back-off after a 429 or 503 without `Retry-After`.
const BACKPRESSURE_BASE: Duration = Duration::from_secs(1);

/// Longest back-off after a 429 or 503 without `Retry-After`.
const MAX_BACKPRESSURE_BACKOFF: Duration = Duration::from_secs(10);

/// Longest `Retry-After` of an engine that is honoured.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Time after the end of backpressure from which a further 429 or 503 starts the back-off anew.
const BACKOFF_MEMORY: Duration = Duration::from_secs(30);

/// Largest failure charge in seconds. It decays to less than a hundredth of that in five time
/// constants.
const MAX_CHARGE_SECONDS: f64 = 300.0;

/// Charge, in requests, below which it no longer counts.
const NEGLIGIBLE_REQUESTS: f64 = 0.001;

/// Weight of a result in half failures.
type HalfFailures = u8;

/// Weight of [`ExchangeResult::Failure`].
const FAILURE: HalfFailures = 2;

/// Weight of [`ExchangeResult::SoftFailure`].
const SOFT_FAILURE: HalfFailures = 1;

/// Result that a booking has reported so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ReportedResult {
    /// None.
    #[default]
    Unknown,
    /// Success. A later failure of the same exchange, for example in the middle of its stream,
    /// replaces it.
    Success {
        /// Half failures in a row before this success, which the failure continues.
        consecutive_before: u32,
    },
    /// A failure or backpressure. Later reports are ignored.
    Final,
}

/// The last results of a worker, as weights in half failures.
#[derive(Debug, Default)]
struct RecentResults {
    /// Weights, oldest first; at most [`RECENT_RESULTS`].
    weights: VecDeque<HalfFailures>,
    /// Sum of the weights.
    half_failures: u32,
    /// Time of the latest result.
    last_at: Duration,
}

impl RecentResults {
    /// Adds a result. Forgets the earlier ones if the latest is older than [`MAX_RESULT_AGE`].
    fn push(&mut self, weight: HalfFailures, now: Duration) {
        if now.saturating_sub(self.last_at) > MAX_RESULT_AGE {
            *self = Self::default();
        }
        if self.weights.len() == RECENT_RESULTS
            && let Some(oldest) = self.weights.pop_front()
        {
            self.half_failures -= u32::from(oldest);
        }
        self.weights.push_back(weight);
        self.half_failures += u32::from(weight);
        self.last_at = now;
    }

    /// Turns the latest success into a result of this weight. Adds the result if there is no
    /// success any more.
    fn replace_success(&mut self, weight: HalfFailures, now: Duration) {
        match self.weights.iter_mut().rev().find(|known| **known == 0) {
            Some(known) => {
                *known = weight;
                self.half_failures += u32::from(weight);
                self.last_at = now;
            }
            None => self.push(weight, now),
        }
    }

    /// Returns the number of results and the fraction that failed; (0, 0) if they are too old.
    fn rate(&self, now: Duration) -> (usize, f64) {
        let count = self.weights.len();
        if count == 0 || now.saturating_sub(self.last_at) > MAX_RESULT_AGE {
            return (0, 0.0);
        }
        let failures = f64::from(self.half_failures) / f64::from(FAILURE);
        (count, failures / count as f64)
    }
}

/// Ejection of a worker that has not been closed by a successful trial yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ejection {
    /// Time at which the worker was ejected.
    pub(crate) since: Duration,
    /// Time at which the duration of the ejection has passed. The worker stays ejected until a
    /// trial succeeds.
    pub(crate) ends_at: Duration,
    /// Time from which a request may be sent as a trial.
    pub(crate) next_trial_at: Duration,
}

/// Time in which a worker gets no new bookings because it replied 429 or 503.
#[derive(Clone, Copy, Debug)]
struct Backpressure {
    /// Time of the reply that started it.
    since: Duration,
    /// End.
    until: Duration,
    /// Back-off that the next such reply without `Retry-After` doubles.
    backoff: Duration,
}

/// Cost that failed requests add to their worker, in the unit of each policy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FailureCharge {
    /// Seconds that the failed requests would have taken.
    pub seconds: f64,
    /// Cost in blocks that they would have had.
    pub blocks: f64,
    /// Their number.
    pub requests: f64,
}

impl FailureCharge {
    /// Returns the charge multiplied by `factor`.
    pub(crate) fn scaled(self, factor: f64) -> Self {
        Self {
            seconds: self.seconds * factor,
            blocks: self.blocks * factor,
            requests: self.requests * factor,
        }
    }

    /// Returns the sum of two charges. The seconds are at most [`MAX_CHARGE_SECONDS`].
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            seconds: (self.seconds + other.seconds).min(MAX_CHARGE_SECONDS),
            blocks: self.blocks + other.blocks,
            requests: self.requests + other.requests,
        }
    }
}

/// Recent results, ejection, backpressure and failure charge of one worker.
#[derive(Debug, Default)]
pub(crate) struct OutlierRecord {
    recent: RecentResults,
    /// Half failures since the last success.
    consecutive_half_failures: u32,
    /// Present ejection.
    pub(crate) ejection: Option<Ejection>,
    /// Number of recent ejections, as of `ejections_since`.
    ejections: u32,
    /// Time from which good behaviour reduces `ejections`: the end of the latest ejection.
    ejections_since: Duration,
    backpressure: Option<Backpressure>,
    /// Failure charge as of `charged_at`.
    charge: FailureCharge,
    charged_at: Duration,
    /// Whether the number of its requests is limited, because it has not produced output since it
    /// was added or restarted.
    pub(crate) is_warming_up: bool,
    /// Results of requests that were sent before this time are ignored: they tell about the time
    /// before the worker recovered or restarted.
    ignore_before: Duration,
}

impl OutlierRecord {
    /// Returns the record of a worker that was added or restarted at `now`.
    pub(crate) fn new(now: Duration) -> Self {
        Self {
            is_warming_up: true,
            ignore_before: now,
            ..Self::default()
        }
    }

    /// Returns whether the result of a request that was sent at `sent_at` tells nothing about the
    /// present state of the worker.
    pub(crate) fn is_stale(&self, sent_at: Duration) -> bool {
        let since = self.ejection.map(|ejection| ejection.since);
        sent_at < self.ignore_before.max(since.unwrap_or_default())
    }

    /// Counts a success of a request that has reported nothing before. Ends backpressure if the
    /// request was sent after it began. Returns the value that the booking must keep.
    pub(crate) fn on_success(&mut self, sent_at: Duration, now: Duration) -> ReportedResult {
        let consecutive_before = self.consecutive_half_failures;
        self.recent.push(0, now);
        self.consecutive_half_failures = 0;
        if self
            .backpressure
            .is_some_and(|backpressure| backpressure.since <= sent_at && backpressure.until <= now)
        {
            self.backpressure = None;
        }
        ReportedResult::Success { consecutive_before }
    }

    /// Counts a failure, in place of the success that the request reported before, if any.
    pub(crate) fn on_failure(
        &mut self,
        result: ExchangeResult,
        previous: ReportedResult,
        now: Duration,
    ) {
        let weight = match result {
            ExchangeResult::SoftFailure => SOFT_FAILURE,
            _ => FAILURE,
        };
        if let ReportedResult::Success { consecutive_before } = previous {
            self.recent.replace_success(weight, now);
            self.consecutive_half_failures = self.consecutive_half_failures.max(consecutive_before);
        } else {
            self.recent.push(weight, now);
        }
        self.consecutive_half_failures = self
            .consecutive_half_failures
            .saturating_add(u32::from(weight));
    }

    /// Starts backpressure, or extends it to a later `Retry-After`. The back-off doubles only if
    /// earlier backpressure has ended: replies to requests that were sent before it began say
    /// nothing new. It lasts a second at least. An ejected worker gets its next trial after it.
    pub(crate) fn on_backpressure(&mut self, retry_after: Option<Duration>, now: Duration) {
        // A worker that refuses requests at once would attract all others if it were chosen again at
        // once.
        let named = retry_after.map(|named| named.clamp(BACKPRESSURE_BASE, MAX_RETRY_AFTER));
        let backpressure = match self.backpressure {
            Some(present) if now < present.until => Backpressure {
                until: present
                    .until
                    .max(now.saturating_add(named.unwrap_or_default())),
                ..present
            },
            previous => {
                let backoff = match previous {
                    Some(previous) if now < previous.until.saturating_add(BACKOFF_MEMORY) => {
                        (previous.backoff * 2).min(MAX_BACKPRESSURE_BACKOFF)
                    }
                    _ => BACKPRESSURE_BASE,
                };
                Backpressure {
                    since: now,
                    until: now.saturating_add(named.unwrap_or(backoff)),
                    backoff,
                }
            }
        };
        self.backpressure = Some(backpressure);
        if let Some(ejection) = &mut self.ejection {
            ejection.next_trial_at = backpressure.until;
        }
    }

    /// Returns the end of the present backpressure, if there is one.
    pub(crate) fn backpressure_until(&self, now: Duration) -> Option<Duration> {
        let until = self.backpressure?.until;
        (now < until).then_some(until)
    }

    /// Returns the number of recent results, and the fraction of them that failed.
    pub(crate) fn failure_rate(&self, now: Duration) -> (usize, f64) {
        self.recent.rate(now)
    }

    /// Returns the failures since the last success. Two soft failures count as one.
    pub(crate) fn consecutive_failures(&self) -> u32 {
        self.consecutive_half_failures / u32::from(FAILURE)
    }

    /// Returns the number of recent ejections.
    fn recent_ejections(&self, now: Duration) -> u32 {
        if self.ejection.is_some() {
            return self.ejections;
        }
        let calm = now.saturating_sub(self.ejections_since).as_secs() / GOOD_BEHAVIOUR.as_secs();
        self.ejections
            .saturating_sub(u32::try_from(calm).unwrap_or(u32::MAX))
    }

    /// Ejects the worker, or ejects it again after a failed trial. The duration grows with the
    /// number of recent ejections.
    pub(crate) fn eject(&mut self, config: &OutlierConfig, now: Duration) {
        self.ejections = self.recent_ejections(now).saturating_add(1);
        self.ejections_since = now;
        let duration = config
            .base_ejection
            .saturating_mul(self.ejections)
            .min(config.max_ejection);
        self.ejection = Some(Ejection {
            since: now,
            ends_at: now.saturating_add(duration),
            next_trial_at: now.saturating_add(duration.min(config.trial_interval)),
        });
    }

    /// Ends the ejection and forgets the failures before it, because a trial succeeded.
    pub(crate) fn close(&mut self, now: Duration) {
        self.end_ejection(now);
        self.recent = RecentResults::default();
        self.consecutive_half_failures = 0;
        self.charge = FailureCharge::default();
        self.ignore_before = now;
    }

    /// Ends the ejection, but forgets no failure.
    pub(crate) fn end_ejection(&mut self, now: Duration) {
        self.ejection = None;
        self.ejections_since = now;
    }

    /// Adds to the failure charge.
    pub(crate) fn add_charge(
        &mut self,
        charge: FailureCharge,
        config: &OutlierConfig,
        now: Duration,
    ) {
        self.charge = self.charge(config, now).plus(charge);
        self.charged_at = now;
    }

    /// Returns the failure charge at `now`.
    pub(crate) fn charge(&self, config: &OutlierConfig, now: Duration) -> FailureCharge {
        let decay = config.charge_decay.as_secs_f64();
        let age = now.saturating_sub(self.charged_at).as_secs_f64();
        match decay > 0.0 && self.charge.requests > 0.0 {
            true => self.charge.scaled((-age / decay).exp()),
            false => FailureCharge::default(),
        }
    }

    /// Returns whether the failure charge is so small that it no longer counts.
    pub(crate) fn is_charge_negligible(&self, config: &OutlierConfig, now: Duration) -> bool {
        self.charge(config, now).requests < NEGLIGIBLE_REQUESTS
    }

    /// Sets the failure charge to zero.
    pub(crate) fn clear_charge(&mut self) {
        self.charge = FailureCharge::default();
    }

    /// Returns the state at `now`.
    pub(crate) fn snapshot(&self, config: &OutlierConfig, now: Duration) -> OutlierSnapshot {
        let ejection = self.ejection;
        OutlierSnapshot {
            is_ejected: ejection.is_some(),
            is_half_open: ejection.is_some_and(|ejection| ejection.ends_at <= now),
            ejections: self.recent_ejections(now),
            next_trial_at: ejection.map(|ejection| ejection.next_trial_at),
            ejected_until: ejection.map(|ejection| ejection.ends_at),
            failure_rate: self.failure_rate(now).1,
            consecutive_failures: self.consecutive_failures(),
            charge_seconds: self.charge(config, now).seconds,
            backpressure_until: self.backpressure_until(now),
            is_warming_up: self.is_warming_up,
        }
    }
}
