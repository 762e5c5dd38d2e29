//! Times between arrivals: even, Poisson, or in bursts.

use std::time::Duration;

use rand::Rng;
use rand_distr::{Distribution, Exp1, Gamma};

/// Gamma-distributed times between arrivals, drawn independently.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gaps {
    /// Their mean.
    pub mean: Duration,
    /// Their standard deviation over their mean: 0 is even, 1 a Poisson process, and above come
    /// bursts and lulls.
    pub cv: f64,
}

/// Above this coefficient of variation nearly all gaps are zero, and the rest beyond any trace.
const MOST_CV: f64 = 100.0;

/// What fits any number of times into what a clock can count.
const LONGEST_MEAN: Duration = Duration::from_secs(1_000_000);

impl Gaps {
    /// A Poisson process with this mean gap.
    #[must_use]
    pub const fn poisson(mean: Duration) -> Self {
        Self { mean, cv: 1.0 }
    }

    /// Draws one.
    pub(super) fn sample(&self, rng: &mut impl Rng) -> Duration {
        self.mean.mul_f64(self.relative(rng))
    }

    /// Draws one over the mean.
    fn relative(&self, rng: &mut impl Rng) -> f64 {
        if self.cv == 1.0 {
            return Exp1.sample(rng);
        }
        let variance = self.cv.clamp(0.0, MOST_CV).powi(2);
        match Gamma::new(1.0 / variance, variance) {
            Ok(gamma) => gamma.sample(rng),
            // There is no variance.
            Err(_) => 1.0,
        }
    }
}

/// How arrivals of a given rate are spread: `poisson`, `even`, or `gamma:CV`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spacing {
    /// See [`Gaps::cv`].
    pub cv: f64,
}

impl Spacing {
    /// Gaps of this spacing at `rate` arrivals a second.
    ///
    /// # Errors
    /// When the rate is not a positive number, or next to none.
    pub fn at(self, rate: f64) -> Result<Gaps, InvalidRequestRate> {
        let mean = Duration::try_from_secs_f64(1.0 / rate);
        match mean {
            Ok(mean) if rate > 0.0 && rate.is_finite() && mean <= LONGEST_MEAN => {
                Ok(Gaps { mean, cv: self.cv })
            }
            _ => Err(InvalidRequestRate { rate }),
        }
    }
}

/// A rate of requests that nothing can arrive at.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("requests cannot arrive at {rate} a second: it must be a positive number")]
pub struct InvalidRequestRate {
    /// The rate asked for.
    pub rate: f64,
}

/// A spacing that is none of those there are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown spacing of arrivals {text:?}: write poisson, even, or gamma:CV with a CV from 0 to 100"
)]
pub struct UnknownSpacing {
    /// What was written.
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
        let cv = cv.filter(|cv| (0.0..=MOST_CV).contains(cv));
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
    fn gaps_have_the_mean_and_spread_asked_for() {
        for (text, cv) in [("even", 0.0), ("poisson", 1.0), ("gamma:3", 3.0)] {
            let gaps = text.parse::<Spacing>().unwrap().at(20.0).unwrap();
            let mut rng = SmallRng::seed_from_u64(1);
            let samples: Vec<f64> = (0..100_000)
                .map(|_| gaps.sample(&mut rng).as_secs_f64())
                .collect();
            let mean = samples.iter().sum::<f64>() / samples.len() as f64;
            let squares = samples.iter().map(|it| (it - mean).powi(2)).sum::<f64>();
            let deviation = (squares / samples.len() as f64).sqrt();
            assert!((mean - 0.05).abs() < 0.002, "{text}: {mean}");
            assert!((deviation / mean - cv).abs() < 0.06, "{text}: {deviation}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
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
