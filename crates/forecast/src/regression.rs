//! Least squares on a stream of samples, with forgetting: how a duration depends on a few features.

/// Factor by which one more sample reduces the weight of all earlier samples.
const FORGETTING: f64 = 0.998;
/// Largest error of a sample that is taken at face value, in mean absolute errors. A larger error
/// comes from a stall, a retry or a clock that jumped. It counts as if it were this large (Huber,
/// 1964).
const HUBER_DEVIATIONS: f64 = 3.0;
/// Weight of one more sample in the mean absolute error.
const DEVIATION_GAIN: f64 = 0.05;
/// Initial mean absolute relative error. Nothing is known yet, so any sample is taken at face
/// value.
const INITIAL_DEVIATION: f64 = 3.0;
/// Smallest mean absolute relative error that limits a sample's error. Without it, a long run of
/// exact samples would hide a change.
const MIN_DEVIATION: f64 = 0.02;

/// Linear model of a duration: a sum of `N` features with one coefficient each.
///
/// It is learned by recursive least squares with exponential forgetting (Ljung and Söderström,
/// 1983). It minimises *relative* errors, because a forecast is off by a fraction of a duration and
/// not by a fixed number of seconds.
#[derive(Clone, Debug)]
pub(crate) struct Regression<const N: usize> {
    /// Seconds for one unit of each feature. None is negative.
    coefficients: [f64; N],
    /// Covariance of the coefficients, for a noise variance of 1.
    covariance: [[f64; N]; N],
    /// Variances of the initial coefficients. Forgetting stops where it would exceed them, which it
    /// would if features did not vary.
    initial_variances: [f64; N],
    /// Mean absolute relative error of forecasts, each made before its sample was observed.
    mean_abs_relative_error: f64,
    /// Number of samples.
    samples: u64,
}

impl<const N: usize> Regression<N> {
    /// Returns a model that starts with a guess, which no longer matters after some thirty samples.
    /// Every coefficient must be positive.
    pub(crate) fn new(guess: [f64; N]) -> Self {
        // A standard deviation of twice the guess, where a sample is off by a tenth.
        let initial_variances = guess.map(|coefficient| (2.0 * coefficient / 0.1).powi(2));
        let mut covariance = [[0.0; N]; N];
        for (index, row) in covariance.iter_mut().enumerate() {
            row[index] = initial_variances[index];
        }
        Self {
            coefficients: guess,
            covariance,
            initial_variances,
            mean_abs_relative_error: INITIAL_DEVIATION,
            samples: 0,
        }
    }

    /// Returns the covariance of the coefficients.
    pub(crate) fn covariance(&self) -> [[f64; N]; N] {
        self.covariance
    }

    /// Replaces what was learned, whose values must be finite and not negative, apart from
    /// covariances of two coefficients.
    pub(crate) fn restore(
        &mut self,
        coefficients: [f64; N],
        covariance: [[f64; N]; N],
        mean_abs_relative_error: f64,
        samples: u64,
    ) {
        self.coefficients = coefficients;
        self.covariance = covariance;
        self.mean_abs_relative_error = mean_abs_relative_error;
        self.samples = samples;
    }

    /// Returns the seconds for one unit of each feature. None is negative.
    #[inline]
    pub(crate) fn coefficients(&self) -> [f64; N] {
        self.coefficients
    }

    /// Returns the number of samples.
    #[inline]
    pub(crate) fn samples(&self) -> u64 {
        self.samples
    }

    /// Returns the mean absolute error of forecasts, as a fraction of them.
    #[inline]
    pub(crate) fn mean_abs_relative_error(&self) -> f64 {
        self.mean_abs_relative_error
    }

    /// Returns the duration of work with these features, in seconds.
    #[inline]
    pub(crate) fn forecast(&self, features: &[f64; N]) -> f64 {
        let products = self.coefficients.iter().zip(features);
        products
            .map(|(coefficient, feature)| coefficient * feature)
            .sum()
    }

    /// Learns from work with these features that took `seconds`. A sample that is not finite, or
    /// whose forecast is zero, is ignored. A sample that is far off the forecast counts only as a
    /// smaller error. All coefficients stay nonnegative.
    pub(crate) fn observe(&mut self, features: &[f64; N], seconds: f64) {
        let forecast = self.forecast(features);
        if !(forecast > 0.0 && seconds.is_finite()) {
            return;
        }
        self.samples += 1;
        let scaled = features.map(|feature| feature / forecast);
        let error = seconds / forecast - 1.0;
        let max_error = HUBER_DEVIATIONS * self.mean_abs_relative_error.max(MIN_DEVIATION);
        let error = error.clamp(-max_error, max_error);
        self.mean_abs_relative_error +=
            DEVIATION_GAIN * (error.abs() - self.mean_abs_relative_error);

        let gains = self.covariance.map(|row| dot(&row, &scaled));
        let variance = dot(&gains, &scaled);
        let is_informed =
            (0..N).all(|index| self.covariance[index][index] < self.initial_variances[index]);
        let forgetting = if is_informed { FORGETTING } else { 1.0 };
        let total_variance = forgetting + variance;
        let previous = self.coefficients;
        for row in 0..N {
            self.coefficients[row] += gains[row] * error / total_variance;
            for column in 0..N {
                let reduction = gains[row] * gains[column] / total_variance;
                self.covariance[row][column] =
                    (self.covariance[row][column] - reduction) / forgetting;
            }
        }
        self.make_non_negative();
        if self.forecast(features) <= 0.0 {
            self.coefficients = previous.map(|coefficient| coefficient * (1.0 + error).max(0.1));
        }
    }

    /// Sets negative coefficients to zero, because no feature can make work faster. The other
    /// coefficients had compensated for the negative one; they move to their most likely values
    /// given that it is zero (Simon and Chia, 2002).
    fn make_non_negative(&mut self) {
        for _ in 0..N {
            let negative = (0..N).find(|&index| self.coefficients[index] < 0.0);
            let Some(negative) = negative else {
                return;
            };
            let variance = self.covariance[negative][negative];
            if variance > 0.0 {
                let ratio = -self.coefficients[negative] / variance;
                for row in 0..N {
                    self.coefficients[row] += ratio * self.covariance[row][negative];
                }
            }
            self.coefficients[negative] = 0.0;
        }
        self.coefficients = self.coefficients.map(|coefficient| coefficient.max(0.0));
    }
}

/// Returns the dot product of two vectors.
fn dot<const N: usize>(left: &[f64; N], right: &[f64; N]) -> f64 {
    left.iter().zip(right).map(|(a, b)| a * b).sum()
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

    /// Returns the mean relative error of forecasts.
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
    fn times_far_from_the_guess_are_learned_too() {
        let mut rng = SmallRng::seed_from_u64(9);
        for times in [0.01, 0.05, 0.3, 3.0] {
            for truth in [GUESS, [0.1, 0.0, 0.0], [0.0, 1e-4, 0.0]] {
                let truth = truth.map(|coefficient| coefficient * times);
                let mut regression = Regression::new(GUESS);
                observe(&mut regression, truth, 60, &mut rng);
                let error = error(&regression, truth, &mut rng);
                assert!(error < 0.1, "{error} of {truth:?}");
            }
        }
    }

    #[test]
    fn outliers_barely_change_the_coefficients() {
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
    fn constant_features_do_no_harm() {
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
    fn extreme_samples_keep_the_forecast_finite() {
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
