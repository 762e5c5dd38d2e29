//! Percentiles of a bounded number of values.

/// Maximum number of values. Of more, each second, fourth, … is kept.
const MAX_VALUES: usize = 4096;

/// A sample of values: all of them, or every 2ⁿ-th of many.
#[derive(Clone, Debug, Default)]
pub(super) struct Percentiles {
    values: Vec<f32>,
    /// Number of values that are left out after each one that is kept.
    skips: usize,
    /// Number of values to leave out now.
    skips_left: usize,
}

impl Percentiles {
    /// Adds a value.
    pub(super) fn add(&mut self, value: f32) {
        if self.skips_left > 0 {
            self.skips_left -= 1;
            return;
        }
        if self.values.len() == MAX_VALUES {
            let mut is_kept = false;
            self.values.retain(|_| {
                is_kept = !is_kept;
                is_kept
            });
            self.skips = 2 * self.skips + 1;
        }
        self.values.push(value);
        self.skips_left = self.skips;
    }

    /// Adds the values of another sample.
    pub(super) fn extend(&mut self, other: &Self) {
        other.values.iter().for_each(|&value| self.add(value));
    }

    /// Returns the value below which a `fraction` of the values lies; `None` without values.
    pub(super) fn at(&self, fraction: f64) -> Option<f32> {
        let mut values = self.values.clone();
        let last = values.len().checked_sub(1)?;
        let index = (fraction * values.len() as f64) as usize;
        let (_, value, _) = values.select_nth_unstable_by(index.min(last), f32::total_cmp);
        Some(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_many_values_are_about_right() {
        let mut values = Percentiles::default();
        assert_eq!(values.at(0.5), None);
        values.add(7.0);
        assert_eq!((values.at(0.0), values.at(0.99)), (Some(7.0), Some(7.0)));
        let mut values = Percentiles::default();
        for value in 0..100_000 {
            values.add(value as f32);
        }
        assert!(values.values.len() <= MAX_VALUES);
        for fraction in [0.01, 0.5, 0.99] {
            let difference = f64::from(values.at(fraction).unwrap()) - fraction * 1e5;
            assert!(difference.abs() < 500.0, "{fraction} {difference}");
        }
    }
}
