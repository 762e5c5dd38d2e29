//! Outlier ejection, failure charge, backpressure and warm-up limit: how the results of past
//! requests decide which workers get new ones.
//!
//! A worker that fails at once has no load, so every cost that counts load finds it cheap. The
//! caller therefore reports how each exchange with a worker ended
//! ([`Booking::report`](crate::booking::Booking::report)), and the router draws four conclusions:
//!
//! - **Failure charge**: a failed request is added to the cost of its worker as if it were still
//!   there, and decays exponentially. It is in no load gauge.
//! - **Ejection** (after Envoy's outlier detection): a worker that fails several requests in a row,
//!   or clearly more often than its peers, gets no requests for a while. One request from time to
//!   time is a *trial*; its success ends the ejection.
//! - **Backpressure**: a worker that replied 429 or 503 is not at fault. It gets no new bookings
//!   until the time that it named, or for a short back-off.
//! - **Warm-up limit**: a worker that has not produced any output yet may be compiling or loading.
//!   It gets few requests until its first output. The limit is ignored if more workers are at it
//!   than not, as when the whole fleet is new.
//!
//! Neither ejection nor the warm-up limit makes a request fail: if no other worker is eligible, a
//! request goes to an ejected one.
//!
//! # Ejection
//!
//! A worker is compared with its peers: the healthy workers that serve its first model. Let `p` be
//! the median failure rate of the peers.
//!
//! - `consecutive_failures` failures in a row eject. If the peers fail too, more are required: so
//!   many that a worker that fails with probability `p` fails that often in a row by chance with a
//!   probability of at most 0.01 %. If all workers fail alike, none is ejected.
//! - A failure rate of at least `failure_rate` over the last 20 results ejects, if at least
//!   `min_results` are known and the rate exceeds `p` by at least 0.3 and by three standard
//!   deviations of the rate of a worker that fails with probability `p`.
//!
//! The n-th ejection lasts n times `base_ejection`, at most `max_ejection`; n decreases by one for
//! every five minutes without an ejection. At most `max_ejected_fraction` of the peers, but at
//! least one of two, are ejected at the same time, and never the only worker of a model. If the
//! fleet shrinks, the ejection that would end first is ended.
//!
//! A trial is a normal request without excluded workers, so its retry can go elsewhere. The first
//! one is due after `trial_interval` or at the end of the ejection, whichever is earlier. A trial
//! that succeeds ends the ejection. A failed trial that was sent after the end of the ejection
//! ejects again; an earlier one changes nothing. Further trials follow every `trial_interval`, even
//! if the previous one has no result, because a worker that hangs gives none.

mod detection;
mod record;
mod report;

use std::time::Duration;

pub(crate) use detection::Outliers;
pub use record::FailureCharge;
pub(crate) use record::ReportedResult;

/// Result of one exchange with a worker, as far as it says something about the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExchangeResult {
    /// The worker produced output or a complete response, including a 4xx other than 429. The
    /// first token of a booking reports this by itself.
    Success,
    /// The worker failed the request: refused or reset connection, TLS error, 500, 502, 504, an
    /// empty or unreadable response, no first byte within the router's own bound, or a silent
    /// stream.
    Failure,
    /// The stream ended without its end mark. Counts as half a failure.
    SoftFailure,
    /// The engine replied 429 or 503. Neither a success nor a failure. The worker gets no new
    /// bookings for `retry_after`, at most five minutes. Without one, for one second, which doubles
    /// up to ten seconds with each further such reply.
    Backpressure {
        /// Time after which the engine asked to be tried again.
        retry_after: Option<Duration>,
    },
}

/// Settings of outlier ejection, failure charge and warm-up limit.
#[derive(Clone, Debug, PartialEq)]
pub struct OutlierConfig {
    /// Failures in a row that eject a worker. 0 switches this rule off.
    pub consecutive_failures: u32,
    /// Failure rate that ejects a worker, from 0 to 1. 0 switches this rule off.
    pub failure_rate: f64,
    /// Number of results below which the failure rate of a worker is unknown.
    pub min_results: u32,
    /// Duration of a first ejection. The n-th one lasts n times as long.
    pub base_ejection: Duration,
    /// Longest ejection.
    pub max_ejection: Duration,
    /// Largest fraction of the healthy workers of a model that are ejected at the same time, from 0
    /// to 1. Of two workers, one may be ejected at any fraction.
    pub max_ejected_fraction: f64,
    /// Time between two trials of an ejected worker.
    pub trial_interval: Duration,
    /// Time constant with which a failure charge decays. Zero switches the charge off.
    pub charge_decay: Duration,
    /// Largest number of requests on a worker that has not produced output yet. 0 means no limit.
    pub warm_up_requests: u32,
}

impl OutlierConfig {
    /// Returns settings under which results of requests change nothing, except that backpressure is
    /// honoured.
    #[must_use]
    pub fn disabled() -> Self {
        Self {
            consecutive_failures: 0,
            failure_rate: 0.0,
            charge_decay: Duration::ZERO,
            warm_up_requests: 0,
            ..Self::default()
        }
    }
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            failure_rate: 0.5,
            min_results: 10,
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(300),
            max_ejected_fraction: 0.5,
            trial_interval: Duration::from_secs(30),
            charge_decay: Duration::from_secs(15),
            warm_up_requests: 2,
        }
    }
}

/// Failures, ejection, backpressure and warm-up of one worker at one instant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutlierSnapshot {
    /// Whether the worker is ejected.
    pub is_ejected: bool,
    /// Whether the worker is ejected and the duration of its ejection has passed, so that the next
    /// trial decides.
    pub is_half_open: bool,
    /// Number of recent ejections: increased by each, decreased by one for every five minutes
    /// without one.
    pub ejections: u32,
    /// Time from which a request may be sent as a trial; `None` unless ejected.
    pub next_trial_at: Option<Duration>,
    /// Time at which the ejection ends; `None` unless ejected.
    pub ejected_until: Option<Duration>,
    /// Fraction of the last results that were failures. 0 if there are none.
    pub failure_rate: f64,
    /// Failures since the last success. Half a failure is not counted.
    pub consecutive_failures: u32,
    /// Seconds that failed requests add to the cost of the worker now.
    pub charge_seconds: f64,
    /// Time until which the worker gets no new bookings because it replied 429 or 503; `None` if it
    /// gets them.
    pub backpressure_until: Option<Duration>,
    /// Whether the number of its requests is limited, because it has not produced output since it
    /// was added or restarted.
    pub is_warming_up: bool,
}

/// Reason why an eligible worker is passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restriction {
    /// The worker is ejected.
    Ejected,
    /// The worker replied 429 or 503 and gets no new bookings before this time.
    Backpressure {
        /// End of the backpressure.
        until: Duration,
    },
    /// The worker has not produced output yet and has as many requests as it may have until then.
    WarmUp,
}

impl Restriction {
    /// Returns the name used in the admin API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ejected => "ejected",
            Self::Backpressure { .. } => "backpressure",
            Self::WarmUp => "warm_up",
        }
    }
}
