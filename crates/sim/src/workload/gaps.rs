//! Times between arrivals: even, Poisson, or in bursts.

use std::time::Duration;

use rand::Rng;
use rand_distr::{Distribution, Exp1, Gamma};

/// Gamma-distributed times between arrivals, drawn independently.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gaps {
    /// Mean gap.
    pub mean: Duration,
    /// Coefficient of variation: standard deviation divided by mean. 0 gives even arrivals, 1 a
    /// Poisson process, larger values bursts and pauses.
    pub cv: f64,
}

/// Maximum coefficient of variation. Above it nearly all gaps are zero, and the others are longer
/// than any trace.
const MAX_CV: f64 = 100.0;

/// Maximum mean gap, so that the sum of any number of gaps fits into a clock's range.
const MAX_MEAN: Duration = Duration::from_secs(1_000_000);

impl Gaps {
    /// Returns the gaps of a Poisson process with this mean.
    #[must_use]
    pub const fn poisson(mean: Duration) -> Self {
        Self { mean, cv: 1.0 }
    }

    /// Draws a gap.
    pub(super) fn sample(&self, rng: &mut impl Rng) -> Duration {
        self.mean.mul_f64(self.relative(rng))
    }

    /// Draws a gap divided by the mean. A coefficient of variation out of range is limited to 0 to
    /// [`MAX_CV`].
    fn relative(&self, rng: &mut impl Rng) -> f64 {
        if self.cv == 1.0 {
            return Exp1.sample(rng);
        }
        let variance = self.cv.clamp(0.0, MAX_CV).powi(2);
        match Gamma::new(1.0 / variance, variance) {
            Ok(gamma) => gamma.sample(rng),
            // The shape parameter is infinite without variance: all gaps equal the mean.
            Err(_) => 1.0,
        }
    }
}

/// Distribution of arrivals at a given rate: `poisson`, `even`, or `gamma:CV`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spacing {
    /// Coefficient of variation; see [`Gaps::cv`].
    pub cv: f64,
}

impl Spacing {
    /// Returns gaps of this distribution at `rate` arrivals per second.
    ///
    /// # Errors
    /// If the rate is not a positive number, or below one arrival in a million seconds.
    pub fn at(self, rate: f64) -> Result<Gaps, InvalidRequestRate> {
        let mean = Duration::try_from_secs_f64(1.0 / rate);
        match mean {
            Ok(mean) if rate > 0.0 && rate.is_finite() && mean <= MAX_MEAN => {
                Ok(Gaps { mean, cv: self.cv })
            }
            _ => Err(InvalidRequestRate { rate }),
        }
    }
}

/// Error: the arrival rate is invalid.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("invalid arrival rate of {rate} requests per second: it must be a positive number")]
pub struct InvalidRequestRate {
    /// The invalid rate, in requests per second.
    pub rate: f64,
}

/// Error: the text is no known spacing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown spacing of arrivals {text:?}: use poisson, even, or gamma:CV with a CV from 0 to 100"
)]
pub struct UnknownSpacing {
    /// The given text.
    pub text: String,
}

impl std::str::FromStr for Spacing {
    type Err = UnknownSpacing;

    fn from_str(text: &str) -> Result<Self, UnknownSpacing> {
        let cv = match text {
            "poisson" => Some(1.0),
            "even" => Some(0.0),
            _ => text.strip_prefix("gamma:").and_then(|cv| cv.parse().ok()),
        };
        let cv = cv.filter(|cv| (0.0..=MAX_CV).contains(cv));
        cv.map(|cv| Self { cv }).ok_or_else(|| UnknownSpacing {
            text: text.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn gaps_have_the_requested_mean_and_variation() {
        for (text, cv) in [("even", 0.0), ("poisson", 1.0), ("gamma:3", 3.0)] {
            let gaps = text.parse::<Spacing>().unwrap().at(20.0).unwrap();
            let mut rng = SmallRng::seed_from_u64(1);
            let samples: Vec<f64> = (0..100_000)
                .map(|_| gaps.sample(&mut rng).as_secs_f64())
                .collect();
            let mean = samples.iter().sum::<f64>() / samples.len() as f64;
            let squares = samples.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>();
            let deviation = (squares / samples.len() as f64).sqrt();
            assert!((mean - 0.05).abs() < 0.002, "{text}: {mean}");
            assert!((deviation / mean - cv).abs() < 0.06, "{text}: {deviation}");
        }
    }

    #[test]
    fn invalid_spacings_and_rates_are_rejected() {
        for text in ["", "gamma", "gamma:", "gamma:-1", "gamma:nan", "gamma:1e9"] {
            let error = text.parse::<Spacing>().unwrap_err().to_string();
            assert!(error.contains("gamma:CV"), "{error}");
        }
        let poisson = Spacing { cv: 1.0 };
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300] {
            assert!(poisson.at(rate).is_err());
        }
    }
}
