//! Random variation of intervals, so that routers that start together do not ask together.

use std::hash::{BuildHasher, Hash, RandomState};
use std::ops::Range;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Source of random factors.
#[derive(Debug)]
pub(super) struct Jitter(SmallRng);

impl Jitter {
    /// Creates a source for what `key` names.
    pub(super) fn new(key: impl Hash) -> Self {
        Self(SmallRng::seed_from_u64(RandomState::new().hash_one(key)))
    }

    /// Returns an interval that differs by at most a tenth.
    pub(super) fn vary(&mut self, interval: Duration) -> Duration {
        self.scale(interval, 0.9..1.1)
    }

    /// Returns an interval times a random factor.
    pub(super) fn scale(&mut self, interval: Duration, factors: Range<f64>) -> Duration {
        interval.mul_f64(self.0.random_range(factors))
    }
}
