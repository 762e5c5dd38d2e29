//! A paired t-test: whether the difference between two policies is larger than chance explains.

use serde::Serialize;

/// Student's t for 95 %, two-sided, for 1, 2, … degrees of freedom. The last value is used for more
/// degrees, for which t is only slightly smaller.
const T_95_PERCENT: [f64; 15] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
];

/// Difference of a policy from the best, over pairs of runs with the same seed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Mean of the policy's value minus the best policy's value.
    pub mean: f64,
    /// Standard error of the mean.
    pub standard_error: f64,
    /// Half the width of the 95 % confidence interval around the mean.
    pub margin: f64,
    /// Whether the interval contains zero, so that neither policy can be called better.
    pub is_tie: bool,
}

/// Compares values with those of the best policy, paired by position. Returns `None` for fewer than
/// two pairs. Values without a counterpart are ignored.
pub(crate) fn difference(values: &[f64], best: &[f64]) -> Option<Difference> {
    let differences: Vec<f64> = values
        .iter()
        .zip(best)
        .map(|(value, best)| value - best)
        .collect();
    let degrees = differences
        .len()
        .checked_sub(1)
        .filter(|degrees| *degrees > 0)?;
    let count = differences.len() as f64;
    let mean = differences.iter().sum::<f64>() / count;
    let squares = differences
        .iter()
        .map(|value| (value - mean).powi(2))
        .sum::<f64>();
    let standard_error = (squares / degrees as f64 / count).sqrt();
    let margin = T_95_PERCENT[(degrees - 1).min(T_95_PERCENT.len() - 1)] * standard_error;
    Some(Difference {
        mean,
        standard_error,
        margin,
        is_tie: mean.abs() <= margin,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variation_between_seeds_does_not_widen_the_margin() {
        // Seeds differ by tens, policies by one.
        let best = [10.0, 50.0, 30.0, 80.0];
        let worse = [11.1, 50.9, 31.0, 81.0];
        let difference = difference(&worse, &best).unwrap();
        assert!((difference.mean - 1.0).abs() < 1e-9 && !difference.is_tie);
        // Standard deviation of 1.1, 0.9, 1.0, 1.0 is 0.0816; half of it for four; times 3.182.
        assert!((difference.standard_error - 0.0408).abs() < 1e-3);
        assert!((difference.margin - 0.130).abs() < 1e-2);
    }

    #[test]
    fn a_difference_that_chance_explains_is_a_tie() {
        let worse = difference(&[12.0, 9.0, 11.0], &[10.0, 10.0, 10.0]).unwrap();
        assert!(worse.mean > 0.0 && worse.is_tie);
        assert!(difference(&[1.0, 1.0], &[1.0, 1.0]).unwrap().is_tie);
        assert_eq!(difference(&[1.0], &[2.0]), None);
    }
}
