//! Output length model: the expected remaining tokens of an output, given how many it has already.

use std::collections::BTreeMap;

use crate::learned::{InvalidLearned, LearnedLengths, LengthBin, check};

/// Expected remaining tokens before any output has ended.
const PRIOR_REMAINING: f64 = 128.0;
/// Number of outputs that the prior counts as.
const PRIOR_OUTPUTS: f64 = 1.0;
/// Number of outputs of a length class that its prior counts as: the client's expectation, or else
/// the forecast from all outputs.
const HINT_WEIGHT: f64 = 10.0;
/// Approximate number of latest outputs that a histogram remembers.
const MEMORY_OUTPUTS: f64 = 2000.0;
/// Maximum number of length classes. A further class replaces the rarest one.
const MAX_LENGTH_CLASSES: usize = 64;
/// Factor on the weight of further outputs, in all classes, each time a class is replaced. Classes
/// without further outputs so become the rarest.
const EVICTION_AGEING: f32 = 1.02;

/// Histogram bins per factor of two in length: neighbouring bins differ by a fifth.
const BINS_PER_OCTAVE: f64 = 4.0;
/// Number of histogram bins. The last one has all lengths of 2²⁰ tokens or more.
const BINS: usize = 81;

/// Returns the histogram bin of a length.
fn bin(length: u32) -> usize {
    let octaves = f64::from(length.max(1)).log2();
    ((octaves * BINS_PER_OCTAVE) as usize).min(BINS - 1)
}

/// Histogram of output lengths with exponential forgetting. All sums are in units of `weight`.
#[derive(Clone, Debug)]
struct LengthHistogram {
    /// Weighted number of outputs in each bin.
    outputs: [f32; BINS],
    /// Weighted sum of output tokens in each bin.
    tokens: [f32; BINS],
    /// Weight of the next output. It grows with each output, which makes all earlier ones lighter.
    weight: f32,
}

impl Default for LengthHistogram {
    fn default() -> Self {
        Self {
            outputs: [0.0; BINS],
            tokens: [0.0; BINS],
            weight: 1.0,
        }
    }
}

impl LengthHistogram {
    /// Adds an output with this many tokens.
    fn observe(&mut self, length: u32) {
        let bin = bin(length);
        self.outputs[bin] += self.weight;
        self.tokens[bin] += self.weight * length as f32;
        self.weight *= 1.0 + 1.0 / MEMORY_OUTPUTS as f32;
        if self.weight > 1e6 {
            let values = self.outputs.iter_mut().chain(&mut self.tokens);
            values.for_each(|value| *value /= 1e6);
            self.weight /= 1e6;
        }
    }

    /// Returns how many outputs were longer than `generated` tokens, and how many tokens they had
    /// beyond that and within `limit`, which is a length of the whole output. Both results are
    /// weighted sums. If `generated` is 0, all outputs count.
    fn survivors(&self, generated: u32, limit: f64) -> (f64, f64) {
        let generated_tokens = f64::from(generated);
        let (mut outputs, mut remaining) = (0.0, 0.0);
        for bin in bin(generated)..BINS {
            let count = f64::from(self.outputs[bin]);
            if count == 0.0 {
                continue;
            }
            let mean = f64::from(self.tokens[bin]) / count;
            // A bin counts if its mean is longer. With nothing generated all outputs count, those
            // without any token too.
            if mean > generated_tokens || generated == 0 {
                outputs += count;
                remaining += count * (mean.min(limit) - generated_tokens).max(0.0);
            }
        }
        let weight = f64::from(self.weight);
        (outputs / weight, remaining / weight)
    }

    /// Returns the bins, with the weight of the next output as unit.
    fn learned(&self) -> Vec<LengthBin> {
        let bins = self.outputs.iter().zip(&self.tokens);
        let bins = bins.map(|(outputs, tokens)| LengthBin {
            outputs: outputs / self.weight,
            tokens: tokens / self.weight,
        });
        bins.collect()
    }

    /// Returns the histogram with these bins.
    fn restore(bins: &[LengthBin]) -> Result<Self, InvalidLearned> {
        let mut histogram = Self::default();
        check("length bins", &[bins.len() as f64], 0.0, BINS as f64)?;
        for (index, bin) in bins.iter().enumerate() {
            // At most as many outputs as are remembered, of at most a million tokens and more.
            check("outputs", &[f64::from(bin.outputs)], 0.0, 1e5)?;
            check("tokens", &[f64::from(bin.tokens)], 0.0, 1e14)?;
            histogram.outputs[index] = bin.outputs;
            histogram.tokens[index] = bin.tokens;
        }
        Ok(histogram)
    }

    /// Returns the weighted number of outputs.
    fn total_weight(&self) -> f32 {
        self.outputs.iter().sum()
    }
}

/// Hash of the properties of a request that determine its length class.
pub type LengthClass = u64;

/// Accuracy of the output lengths that are forecast when requests arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct OutputLengthAccuracy {
    /// Number of outputs that ended.
    pub outputs: u64,
    /// Expected tokens of the next output, if nothing is known about its request.
    pub expected_tokens: f64,
    /// Ratio of observed to forecast tokens over the latest outputs; 1 is unbiased.
    pub bias: f64,
    /// Mean absolute error over the latest outputs, as a fraction of their mean length.
    pub mean_abs_relative_error: f64,
}

/// Weight of one more output in a mean.
const MEAN_GAIN: f64 = 0.02;

/// Means over the latest outputs, in tokens.
#[derive(Clone, Debug, Default)]
struct ForecastAccuracy {
    /// Number of outputs that ended.
    outputs: u64,
    /// Mean forecast length.
    forecast: f64,
    /// Mean observed length.
    observed: f64,
    /// Mean absolute difference of the two.
    abs_error: f64,
}

impl ForecastAccuracy {
    /// Adds an output that was forecast to have `forecast` tokens and had `observed`.
    fn add(&mut self, forecast: u32, observed: u32) {
        self.outputs += 1;
        let gain = MEAN_GAIN.max(1.0 / self.outputs as f64);
        let (forecast, observed) = (f64::from(forecast), f64::from(observed));
        self.forecast += gain * (forecast - self.forecast);
        self.observed += gain * (observed - self.observed);
        self.abs_error += gain * ((forecast - observed).abs() - self.abs_error);
    }
}

/// Learned output lengths: of all requests, and of each length class.
#[derive(Clone, Debug, Default)]
pub struct OutputLengthModel {
    /// Lengths of all outputs, the prior of every class.
    all: LengthHistogram,
    /// Comparison of forecast and observed lengths.
    accuracy: ForecastAccuracy,
    /// Lengths by class, at most [`MAX_LENGTH_CLASSES`].
    by_class: BTreeMap<LengthClass, Box<LengthHistogram>>,
}

impl OutputLengthModel {
    /// Returns what was learned, without the accuracy.
    #[must_use]
    pub fn learned(&self) -> LearnedLengths {
        let classes = self.by_class.iter();
        LearnedLengths {
            all: self.all.learned(),
            by_class: classes
                .map(|(class, histogram)| (*class, histogram.learned()))
                .collect(),
        }
    }

    /// Returns the model that has learned this.
    ///
    /// # Errors
    /// Fails if there are too many classes or bins, or a number is not finite or out of range.
    pub fn restore(learned: &LearnedLengths) -> Result<Self, InvalidLearned> {
        let classes = learned.by_class.len() as f64;
        check("by_class", &[classes], 0.0, MAX_LENGTH_CLASSES as f64)?;
        let mut lengths = Self {
            all: LengthHistogram::restore(&learned.all)?,
            ..Self::default()
        };
        for (class, bins) in &learned.by_class {
            let histogram = LengthHistogram::restore(bins)?;
            lengths.by_class.insert(*class, Box::new(histogram));
        }
        Ok(lengths)
    }

    /// Returns the accuracy of recent forecasts. Before the first output the bias is 1 and the
    /// error 0.
    #[must_use]
    pub fn accuracy(&self) -> OutputLengthAccuracy {
        let ForecastAccuracy {
            outputs,
            forecast,
            observed,
            abs_error,
        } = self.accuracy;
        OutputLengthAccuracy {
            outputs,
            expected_tokens: f64::from(self.remaining(0, 0, None)),
            bias: if forecast > 0.0 {
                observed / forecast
            } else {
                1.0
            },
            mean_abs_relative_error: if observed > 0.0 {
                abs_error / observed
            } else {
                0.0
            },
        }
    }

    /// Records that an output ended after `tokens` tokens that was forecast to have `forecast`.
    pub fn record_accuracy(&mut self, forecast: u32, tokens: u32) {
        self.accuracy.add(forecast, tokens);
    }

    /// Learns from an output of this class that ended after `tokens` tokens. A `truncated` output
    /// is counted as if it had continued as long as other outputs of this length did. A new class
    /// beyond the maximum of 64 replaces the rarest one. The accuracy is recorded separately,
    /// with [`record_accuracy`](Self::record_accuracy).
    pub fn observe(&mut self, class: LengthClass, tokens: u32, truncated: bool) {
        let remaining = if truncated {
            self.remaining(class, tokens, None)
        } else {
            0
        };
        let tokens = tokens.saturating_add(remaining);
        self.all.observe(tokens);
        if self.by_class.len() == MAX_LENGTH_CLASSES && !self.by_class.contains_key(&class) {
            let weight = |histogram: &LengthHistogram| histogram.total_weight() / histogram.weight;
            let rarest = self
                .by_class
                .iter()
                .min_by(|(_, a), (_, b)| weight(a).total_cmp(&weight(b)));
            if let Some((&rarest, _)) = rarest {
                self.by_class.remove(&rarest);
            }
            // Classes without further outputs become the rarest.
            for histogram in self.by_class.values_mut() {
                histogram.weight *= EVICTION_AGEING;
            }
        }
        self.by_class.entry(class).or_default().observe(tokens);
    }

    /// Returns the expected number of tokens that an output still generates after `generated`
    /// tokens, if it ends by itself or at `limit` tokens, counted from its start. Returns 0 if the
    /// limit is reached. An unknown class is forecast from all outputs.
    #[must_use]
    pub fn remaining(&self, class: LengthClass, generated: u32, limit: Option<u32>) -> u32 {
        self.remaining_with_hint(class, generated, limit, None)
    }

    /// Returns the expected number of tokens that an output still generates after `generated`
    /// tokens, if it ends by itself or at `limit` tokens, counted from its start. Returns 0 if the
    /// limit is reached.
    ///
    /// `expected_output_tokens` is the client's expectation of the whole output; it counts as the
    /// prior of the class, and is ignored once the output is as long. An unknown class is forecast
    /// from all outputs.
    #[must_use]
    pub fn remaining_with_hint(
        &self,
        class: LengthClass,
        generated: u32,
        limit: Option<u32>,
        expected_output_tokens: Option<u32>,
    ) -> u32 {
        let limit = limit.map_or(f64::INFINITY, f64::from);
        let max_remaining = (limit - f64::from(generated)).max(0.0);
        let (outputs, remaining) = self.all.survivors(generated, limit);
        let overall = (remaining + PRIOR_OUTPUTS * PRIOR_REMAINING.min(max_remaining))
            / (outputs + PRIOR_OUTPUTS);
        // An output that is already longer than expected disproves the hint.
        let expected = expected_output_tokens.filter(|&tokens| tokens > generated);
        let prior = expected.map_or(overall, |tokens| {
            f64::from(tokens - generated).min(max_remaining)
        });
        let histogram = self.by_class.get(&class);
        let (outputs, remaining) = histogram.map_or((0.0, 0.0), |histogram| {
            histogram.survivors(generated, limit)
        });
        let remaining = (remaining + HINT_WEIGHT * prior) / (outputs + HINT_WEIGHT);
        remaining.round() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    fn is_close(actual: u32, expected: f64) -> bool {
        (f64::from(actual) / expected - 1.0).abs() < 0.12
    }

    #[test]
    fn a_model_without_samples_returns_the_prior() {
        let lengths = OutputLengthModel::default();
        assert_eq!(lengths.remaining(1, 0, None), 128);
        assert_eq!(lengths.remaining(1, 5000, None), 128);
        assert_eq!(lengths.remaining(1, 0, Some(16)), 16);
        assert_eq!(lengths.remaining(1, 16, Some(16)), 0);
        assert_eq!(lengths.remaining(1, 17, Some(16)), 0);
    }

    /// Uniform lengths: the mean remaining length is half of what is left of the range.
    #[test]
    fn the_remaining_length_follows_from_the_generated_tokens() {
        let mut lengths = OutputLengthModel::default();
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..4000 {
            lengths.observe(1, rng.random_range(1..=1000), false);
        }
        for generated in [0, 100, 300, 500, 700] {
            let expected = (1000.0 - f64::from(generated)) / 2.0;
            let remaining = lengths.remaining(1, generated, None);
            assert!(is_close(remaining, expected), "{remaining} of {expected}");
        }
        // With a limit of 500, half of the outputs reach it.
        let limited = lengths.remaining(1, 0, Some(500));
        assert!(is_close(limited, 375.0), "{limited}");
    }

    #[test]
    fn an_unknown_class_is_forecast_like_all_outputs() {
        let mut lengths = OutputLengthModel::default();
        for _ in 0..500 {
            lengths.observe(1, 10, false);
            lengths.observe(2, 1000, false);
        }
        assert!(lengths.remaining(1, 0, None) < 25);
        assert!(is_close(lengths.remaining(2, 0, None), 1000.0));
        assert!(is_close(lengths.remaining(3, 0, None), 505.0));
    }

    #[test]
    fn forecasts_are_compared_with_observed_lengths() {
        let mut lengths = OutputLengthModel::default();
        let mut rng = SmallRng::seed_from_u64(2);
        for _ in 0..2000 {
            let (forecast, tokens) = (lengths.remaining(1, 0, None), rng.random_range(1..=1000));
            lengths.record_accuracy(forecast, tokens);
            lengths.observe(1, tokens, false);
        }
        let OutputLengthAccuracy {
            outputs,
            expected_tokens: expected,
            bias,
            mean_abs_relative_error: error,
        } = lengths.accuracy();
        assert_eq!(outputs, 2000);
        assert!((expected / 500.0 - 1.0).abs() < 0.1, "{expected}");
        assert!((bias - 1.0).abs() < 0.2, "{bias}");
        // The mean absolute deviation of a uniform length is half of its mean.
        assert!((error - 0.5).abs() < 0.1, "{error}");
    }

    #[test]
    fn old_outputs_are_forgotten() {
        let mut lengths = OutputLengthModel::default();
        for _ in 0..5000 {
            lengths.observe(1, 1000, false);
        }
        for _ in 0..10_000 {
            lengths.observe(1, 10, false);
        }
        assert!(lengths.remaining(1, 0, None) < 20);
    }

    #[test]
    fn classes_are_bounded_and_forecasts_stay_finite() {
        let mut lengths = OutputLengthModel::default();
        for class in 0..100_000 {
            lengths.observe(class % 1000, u32::MAX, false);
        }
        assert!(lengths.by_class.len() <= MAX_LENGTH_CLASSES);
        assert!(lengths.remaining(0, u32::MAX, None) <= 128);
        assert!(lengths.remaining(0, 0, None) > 1 << 20);
    }

    #[test]
    fn new_classes_replace_classes_without_further_outputs() {
        let mut lengths = OutputLengthModel::default();
        for class in 0..MAX_LENGTH_CLASSES as LengthClass {
            (0..20).for_each(|_| lengths.observe(class, 1000, false));
        }
        let (short, long) = (1000, 2000);
        for _ in 0..500 {
            lengths.observe(short, 10, false);
            lengths.observe(long, 4000, false);
        }
        assert!(lengths.remaining(short, 0, None) < 100);
        assert!(is_close(lengths.remaining(long, 0, None), 4000.0));
    }

    #[test]
    fn outputs_without_tokens_are_learned_too() {
        let mut lengths = OutputLengthModel::default();
        (0..500).for_each(|_| lengths.observe(1, 1000, false));
        (0..500).for_each(|_| lengths.observe(2, 0, false));
        assert!(lengths.remaining(2, 0, None) < 20);
        assert!(is_close(lengths.remaining(1, 0, None), 1000.0));
    }

    #[test]
    fn a_client_hint_counts_until_outputs_contradict_it() {
        let mut lengths = OutputLengthModel::default();
        let (accurate, too_long) = (1, 2);
        (0..100).for_each(|_| lengths.observe(0, 100, false));
        let with_hint = |lengths: &OutputLengthModel, class| {
            lengths.remaining_with_hint(class, 0, None, Some(1000))
        };
        assert_eq!(with_hint(&lengths, accurate), 1000);
        assert_eq!(
            lengths.remaining_with_hint(accurate, 0, Some(600), Some(1000)),
            600
        );
        assert_eq!(
            lengths.remaining_with_hint(accurate, 400, None, Some(1000)),
            600
        );
        for _ in 0..200 {
            lengths.observe(accurate, 1000, false);
            lengths.observe(too_long, 20, false);
        }
        assert_eq!(with_hint(&lengths, accurate), 1000);
        assert!(
            with_hint(&lengths, too_long) < 80,
            "{}",
            with_hint(&lengths, too_long)
        );
        // An output longer than the hint is forecast as if there were no hint.
        let without_hint = lengths.remaining(3, 1500, None);
        assert_eq!(
            lengths.remaining_with_hint(3, 1500, None, Some(1000)),
            without_hint
        );
    }

    #[test]
    fn truncated_outputs_count_as_longer() {
        let mut lengths = OutputLengthModel::default();
        for _ in 0..100 {
            lengths.observe(1, 300, true);
        }
        assert_eq!(lengths.remaining(1, 0, Some(300)), 300);
        assert_eq!(lengths.remaining(1, 299, Some(300)), 1);
        // Half of the outputs end by themselves after 100 tokens.
        let mut lengths = OutputLengthModel::default();
        for _ in 0..1000 {
            lengths.observe(1, 100, false);
            lengths.observe(1, 200, true);
        }
        assert!(is_close(lengths.remaining(1, 0, Some(200)), 150.0));
        assert!(is_close(lengths.remaining(1, 120, Some(200)), 80.0));
    }
}
