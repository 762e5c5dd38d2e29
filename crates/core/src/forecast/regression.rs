//! Least squares on a stream of samples, which forgets: how a time depends on what it is spent on.

/// Share of the past that remains after one more sample.
const FORGETTING: f64 = 0.998;
/// How far, in deviations, a sample is believed to be off. Beyond it is a stall, a retry or a clock
/// that jumped, and counts as if it were no further off (Huber, 1964).
const BELIEVED_DEVIATIONS: f64 = 3.0;
/// Share of the deviation's estimate that one more sample makes up.
const DEVIATION_GAIN: f64 = 0.05;
/// What deviations begin as, in shares of the forecast: nothing is known, so anything is believed.
const FIRST_DEVIATION: f64 = 3.0;
const LEAST_DEVIATION: f64 = 0.02;

/// Times are forecast as a sum of so much for each of `N` features. Learned by recursive least
/// squares with exponential forgetting (Ljung and Söderström, 1983) on *relative* errors, for a
/// forecast is off by a share of a time, not by so many seconds.
#[derive(Clone, Debug)]
pub(crate) struct Regression<const N: usize> {
    coefficients: [f64; N],
    covariance: [[f64; N]; N],
    /// Forgetting must not make it less sure than it began, where features do not vary.
    first_variances: [f64; N],
    /// Mean absolute relative error of forecasts, each made before its sample was seen.
    deviation: f64,
    samples: u64,
}

impl<const N: usize> Regression<N> {
    /// Begins with a guess, which is gone after some thirty samples. Every coefficient must be
    /// positive.
    pub(crate) fn new(guess: [f64; N]) -> Self {
        // Twice the guess either way, where a sample is off by a tenth.
        let first_variances = guess.map(|it| (2.0 * it / 0.1).powi(2));
        let mut covariance = [[0.0; N]; N];
        for (index, row) in covariance.iter_mut().enumerate() {
            row[index] = first_variances[index];
        }
        Self {
            coefficients: guess,
            covariance,
            first_variances,
            deviation: FIRST_DEVIATION,
            samples: 0,
        }
    }

    /// Seconds for each feature. None is negative.
    pub(crate) fn coefficients(&self) -> [f64; N] {
        self.coefficients
    }

    pub(crate) fn samples(&self) -> u64 {
        self.samples
    }

    /// Mean absolute error of its forecasts, as a share of them.
    pub(crate) fn deviation(&self) -> f64 {
        self.deviation
    }

    pub(crate) fn forecast(&self, features: &[f64; N]) -> f64 {
        let products = self.coefficients.iter().zip(features);
        products
            .map(|(coefficient, feature)| coefficient * feature)
            .sum()
    }

    /// What has these features took so many seconds.
    pub(crate) fn observe(&mut self, features: &[f64; N], seconds: f64) {
        let forecast = self.forecast(features);
        if !(forecast > 0.0 && seconds.is_finite()) {
            return;
        }
        self.samples += 1;
        let scaled = features.map(|feature| feature / forecast);
        let error = seconds / forecast - 1.0;
        let believed = BELIEVED_DEVIATIONS * self.deviation.max(LEAST_DEVIATION);
        let error = error.clamp(-believed, believed);
        self.deviation += DEVIATION_GAIN * (error.abs() - self.deviation);

        let gains = self.covariance.map(|row| dot(&row, &scaled));
        let variance = dot(&gains, &scaled);
        let is_sure = (0..N).all(|it| self.covariance[it][it] < self.first_variances[it]);
        let forgetting = if is_sure { FORGETTING } else { 1.0 };
        let total = forgetting + variance;
        let before = self.coefficients;
        for row in 0..N {
            self.coefficients[row] += gains[row] * error / total;
            for column in 0..N {
                let known = gains[row] * gains[column] / total;
                self.covariance[row][column] = (self.covariance[row][column] - known) / forgetting;
            }
        }
        self.make_positive();
        if self.forecast(features) <= 0.0 {
            self.coefficients = before.map(|it| it * (1.0 + error).max(0.1));
        }
    }

    /// Nothing takes less than no time. What is less becomes nothing, and the others what they most
    /// likely are if it is: they had made up for it (Simon and Chia, 2002).
    fn make_positive(&mut self) {
        for _ in 0..N {
            let below = (0..N).find(|&it| self.coefficients[it] < 0.0);
            let Some(below) = below else {
                return;
            };
            let variance = self.covariance[below][below];
            if variance > 0.0 {
                let share = -self.coefficients[below] / variance;
                for row in 0..N {
                    self.coefficients[row] += share * self.covariance[row][below];
                }
            }
            self.coefficients[below] = 0.0;
        }
        self.coefficients = self.coefficients.map(|it| it.max(0.0));
    }
}

fn dot<const N: usize>(one: &[f64; N], other: &[f64; N]) -> f64 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    fn features(rng: &mut SmallRng) -> [f64; 3] {
        let tokens = rng.random_range(10.0..8000.0);
        [1.0, tokens, tokens * rng.random_range(0.5..20_000.0)]
    }

    fn observe(
        regression: &mut Regression<3>,
        truth: [f64; 3],
        samples: usize,
        rng: &mut SmallRng,
    ) {
        for _ in 0..samples {
            let features = features(rng);
            let noise = rng.random_range(0.9..1.1);
            regression.observe(&features, dot(&truth, &features) * noise);
        }
    }

    /// The mean relative error of forecasts.
    fn error(regression: &Regression<3>, truth: [f64; 3], rng: &mut SmallRng) -> f64 {
        let errors = (0..200).map(|_| {
            let features = features(rng);
            (regression.forecast(&features) / dot(&truth, &features) - 1.0).abs()
        });
        errors.sum::<f64>() / 200.0
    }

    const GUESS: [f64; 3] = [0.02, 1e-4, 5e-9];

    #[test]
    fn a_wrong_guess_is_gone_after_thirty_samples() {
        let mut rng = SmallRng::seed_from_u64(1);
        for truth in [[0.1, 1e-5, 1e-9], [0.005, 6e-4, 4e-8], [0.02, 1e-4, 0.0]] {
            let mut regression = Regression::new(GUESS);
            observe(&mut regression, truth, 30, &mut rng);
            let error = error(&regression, truth, &mut rng);
            assert!(error < 0.1, "{error} of {truth:?}");
        }
    }

    #[test]
    fn who_is_nothing_like_the_guess_is_learned_too() {
        let mut rng = SmallRng::seed_from_u64(9);
        for times in [0.01, 0.05, 0.3, 3.0] {
            for truth in [GUESS, [0.1, 0.0, 0.0], [0.0, 1e-4, 0.0]] {
                let truth = truth.map(|it| it * times);
                let mut regression = Regression::new(GUESS);
                observe(&mut regression, truth, 60, &mut rng);
                let error = error(&regression, truth, &mut rng);
                assert!(error < 0.1, "{error} of {truth:?}");
            }
        }
    }

    #[test]
    fn stalls_are_not_believed() {
        let mut rng = SmallRng::seed_from_u64(2);
        let truth = [0.03, 7e-5, 2e-9];
        let mut regression = Regression::new(GUESS);
        for _ in 0..50 {
            observe(&mut regression, truth, 19, &mut rng);
            let features = features(&mut rng);
            regression.observe(&features, 100.0 * dot(&truth, &features));
        }
        let error = error(&regression, truth, &mut rng);
        assert!(error < 0.1, "{error}");
    }

    #[test]
    fn what_never_varies_does_no_harm() {
        let mut rng = SmallRng::seed_from_u64(3);
        let truth = [0.03, 7e-5, 2e-9];
        let mut regression = Regression::new(GUESS);
        let same = [1.0, 1000.0, 1000.0 * 500.0];
        for _ in 0..100_000 {
            regression.observe(&same, dot(&truth, &same) * rng.random_range(0.9..1.1));
        }
        assert!((regression.forecast(&same) / dot(&truth, &same) - 1.0).abs() < 0.03);
        observe(&mut regression, truth, 300, &mut rng);
        let error = error(&regression, truth, &mut rng);
        assert!(error < 0.1, "{error}");
    }

    #[test]
    fn nothing_makes_it_anything_but_a_number() {
        let mut regression = Regression::new(GUESS);
        for seconds in [0.0, f64::MAX, f64::INFINITY, f64::NAN, 1e300, 0.0] {
            for _ in 0..1000 {
                regression.observe(&[1.0, f64::from(u32::MAX), 1e19], seconds);
                regression.observe(&[1.0, 0.0, 0.0], seconds);
            }
            assert!(regression.forecast(&[1.0, 1.0, 1.0]).is_finite());
        }
    }
}
