//! Whether one policy's number is better than another's, or only luckier.

use serde::Serialize;

/// Student's t for 95 %, two-sided, by degrees of freedom from 1; behind these it hardly falls.
const T_95: [f64; 15] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
];

/// How a policy differs from the best, over pairs of runs with the same seed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The mean of its value less the best's.
    pub mean: f64,
    /// Standard error of that mean.
    pub standard_error: f64,
    /// The true mean is this close, with 95 % confidence.
    pub margin: f64,
    /// Zero is that close: neither can be called better.
    pub is_tie: bool,
}

/// Compares values with those of the `best`, paired by position; `None` if there are less than
/// two pairs.
pub(crate) fn difference(values: &[f64], best: &[f64]) -> Option<Difference> {
    let differences: Vec<f64> = values
        .iter()
        .zip(best)
        .map(|(it, best)| it - best)
        .collect();
    let degrees = differences.len().checked_sub(1).filter(|it| *it > 0)?;
    let count = differences.len() as f64;
    let mean = differences.iter().sum::<f64>() / count;
    let squares = differences
        .iter()
        .map(|it| (it - mean).powi(2))
        .sum::<f64>();
    let standard_error = (squares / degrees as f64 / count).sqrt();
    let margin = T_95[(degrees - 1).min(T_95.len() - 1)] * standard_error;
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
    fn what_pairs_have_in_common_does_not_blur_their_difference() {
        // Seeds differ by tens, policies by one.
        let best = [10.0, 50.0, 30.0, 80.0];
        let worse = [11.1, 50.9, 31.0, 81.0];
        let told = difference(&worse, &best).unwrap();
        assert!((told.mean - 1.0).abs() < 1e-9 && !told.is_tie);
        // Standard deviation of 1.1, 0.9, 1.0, 1.0 is 0.0816; half of it for four; times 3.182.
        assert!((told.standard_error - 0.0408).abs() < 1e-3);
        assert!((told.margin - 0.130).abs() < 1e-2);
    }

    #[test]
    fn what_may_be_luck_is_a_tie() {
        let told = difference(&[12.0, 9.0, 11.0], &[10.0, 10.0, 10.0]).unwrap();
        assert!(told.mean > 0.0 && told.is_tie);
        assert!(difference(&[1.0, 1.0], &[1.0, 1.0]).unwrap().is_tie);
        assert_eq!(difference(&[1.0], &[2.0]), None);
    }
}
