//! Limits of one key: what its requests have taken, and what may be taken now.
//!
//! Tokens are reserved when a request is admitted, prompt and predicted output together, and settled
//! when its response ends. Limits that count a request only at its end would admit any number of
//! requests that arrive together.

use std::num::NonZeroU32;
use std::time::Duration;

use parking_lot::Mutex;

use super::key_config::KeyLimits;

/// An amount that may be taken per minute, all at once or little by little.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// Amount that was taken and has not come back yet.
    taken: f64,
    /// Time up to which amounts have come back.
    updated_at: Duration,
}

/// Why a request exceeds a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Exceeded {
    /// The amount is available after this time.
    For(Duration),
    /// The amount is larger than the limit.
    TooLarge,
}

impl Bucket {
    /// Lets amounts come back until `now`.
    fn refill(&mut self, per_minute: NonZeroU32, now: Duration) {
        let elapsed = now.saturating_sub(self.updated_at).as_secs_f64();
        let returned = f64::from(per_minute.get()) / 60.0 * elapsed;
        self.taken = (self.taken - returned).max(0.0);
        self.updated_at = self.updated_at.max(now);
    }

    /// Takes an amount, or nothing if it is not available at `now`.
    fn take(&mut self, amount: f64, per_minute: NonZeroU32, now: Duration) -> Result<(), Exceeded> {
        self.refill(per_minute, now);
        let limit = f64::from(per_minute.get());
        if amount > limit {
            return Err(Exceeded::TooLarge);
        }
        let excess = self.taken + amount - limit;
        if excess > 0.0 {
            let seconds = excess / limit * 60.0;
            return Err(Exceeded::For(Duration::from_secs_f64(seconds)));
        }
        self.taken += amount;
        Ok(())
    }

    /// Changes what was taken by `change`.
    fn settle(&mut self, change: f64) {
        self.taken = (self.taken + change).max(0.0);
    }

    /// Returns what is available, and the time until everything is.
    fn state(&mut self, per_minute: NonZeroU32, now: Duration) -> LimitState {
        self.refill(per_minute, now);
        let limit = f64::from(per_minute.get());
        LimitState {
            limit: per_minute.get(),
            remaining: (limit - self.taken).max(0.0) as u32,
            reset: Duration::from_secs_f64(self.taken / limit * 60.0),
        }
    }
}

/// State of one limit, for the response headers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LimitState {
    /// Amount per minute.
    pub(crate) limit: u32,
    /// Amount that is available now.
    pub(crate) remaining: u32,
    /// Time until the whole amount is available.
    pub(crate) reset: Duration,
}

/// Amounts that the requests with one key have taken.
#[derive(Debug, Default)]
pub(crate) struct Usage(Mutex<Amounts>);

#[derive(Debug, Default)]
struct Amounts {
    requests: Bucket,
    tokens: Bucket,
    /// Requests that run now.
    running: u32,
}

impl Usage {
    /// Starts a request. Fails, and changes nothing, if too many run or arrived in the last minute.
    pub(crate) fn start(&self, limits: &KeyLimits, now: Duration) -> Result<(), RequestRefusal> {
        let mut amounts = self.0.lock();
        let limit = limits.concurrent_requests;
        if limit.is_some_and(|limit| amounts.running >= limit.get()) {
            return Err(RequestRefusal::Concurrency);
        }
        if let Some(per_minute) = limits.requests_per_minute {
            let taken = amounts.requests.take(1.0, per_minute, now);
            taken.map_err(RequestRefusal::Requests)?;
        }
        amounts.running += 1;
        Ok(())
    }

    /// Ends a request.
    pub(crate) fn end(&self) {
        let mut amounts = self.0.lock();
        amounts.running = amounts.running.saturating_sub(1);
    }

    /// Reserves tokens of a request.
    pub(crate) fn take_tokens(
        &self,
        tokens: f64,
        limits: &KeyLimits,
        now: Duration,
    ) -> Result<(), Exceeded> {
        match limits.tokens_per_minute {
            Some(per_minute) => self.0.lock().tokens.take(tokens, per_minute, now),
            None => Ok(()),
        }
    }

    /// Corrects the tokens that a request has reserved by `change`.
    pub(crate) fn settle_tokens(&self, change: f64) {
        self.0.lock().tokens.settle(change);
    }

    /// Returns the states of the limits of requests and of tokens.
    pub(crate) fn states(&self, limits: &KeyLimits, now: Duration) -> [Option<LimitState>; 2] {
        let mut amounts = self.0.lock();
        let Amounts {
            requests, tokens, ..
        } = &mut *amounts;
        [
            limits
                .requests_per_minute
                .map(|limit| requests.state(limit, now)),
            limits
                .tokens_per_minute
                .map(|limit| tokens.state(limit, now)),
        ]
    }
}

/// Why a request may not start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RequestRefusal {
    /// As many requests run as may.
    Concurrency,
    /// Too many requests arrived.
    Requests(Exceeded),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(requests: Option<u32>, tokens: Option<u32>, concurrent: Option<u32>) -> KeyLimits {
        KeyLimits {
            requests_per_minute: requests.and_then(NonZeroU32::new),
            tokens_per_minute: tokens.and_then(NonZeroU32::new),
            concurrent_requests: concurrent.and_then(NonZeroU32::new),
        }
    }

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn requests_come_back_one_by_one() {
        let (usage, limits) = (Usage::default(), limits(Some(60), None, None));
        let start = |now: f64| usage.start(&limits, at(now));
        assert!((0..60).all(|_| start(0.0).is_ok()));
        let Err(RequestRefusal::Requests(Exceeded::For(wait))) = start(0.0) else {
            panic!("the 61st request was admitted");
        };
        assert!((wait.as_secs_f64() - 1.0).abs() < 1e-6, "{wait:?}");
        assert!(start(1.0).is_ok());
        assert!(start(1.0).is_err());
        assert!((0..60).all(|_| start(120.0).is_ok()));
    }

    #[test]
    fn running_requests_are_counted_until_they_end() {
        let (usage, limits) = (Usage::default(), limits(None, None, Some(2)));
        let start = || usage.start(&limits, at(0.0));
        assert_eq!((start(), start()), (Ok(()), Ok(())));
        assert_eq!(start(), Err(RequestRefusal::Concurrency));
        usage.end();
        assert_eq!(start(), Ok(()));
    }

    #[test]
    fn tokens_are_reserved_and_settled() {
        let (usage, limits) = (Usage::default(), limits(None, Some(600), None));
        let take = |tokens: f64, now: f64| usage.take_tokens(tokens, &limits, at(now));
        assert_eq!(take(601.0, 0.0), Err(Exceeded::TooLarge));
        assert_eq!(take(500.0, 0.0), Ok(()));
        assert!(matches!(take(200.0, 0.0), Err(Exceeded::For(_))));
        // The response was shorter than predicted.
        usage.settle_tokens(-300.0);
        assert_eq!(take(200.0, 0.0), Ok(()));
        let [_, state] = usage.states(&limits, at(10.0));
        let state = state.unwrap();
        assert_eq!((state.limit, state.remaining), (600, 300));
        assert!((state.reset.as_secs_f64() - 30.0).abs() < 1e-6);
    }

    proptest! {
        /// A slow model: every amount that was taken comes back at the limit's rate, the oldest
        /// first.
        #[test]
        fn a_bucket_admits_as_the_model_does(
            steps in proptest::collection::vec((0_u32..200, 0_u32..3000), 1..60),
        ) {
            let per_minute = NonZeroU32::new(1000).unwrap();
            let (mut bucket, mut taken, mut now) = (Bucket::default(), 0.0_f64, 0_u64);
            for (amount, pause) in steps {
                now += u64::from(pause);
                for _ in 0..pause {
                    taken = (taken - 1000.0 / 60.0 / 1000.0).max(0.0);
                }
                let excess = taken + f64::from(amount) - 1000.0;
                let result = bucket.take(amount.into(), per_minute, Duration::from_millis(now));
                // Rounding decides a tie.
                prop_assume!(excess.abs() > 1e-6);
                prop_assert_eq!(result.is_ok(), excess < 0.0);
                if result.is_ok() {
                    taken += f64::from(amount);
                }
            }
        }
    }
}
