//! Counters to which bookings add and from which they subtract.

/// Number that never becomes negative: load counters, totals and lengths.
pub trait Counter: Copy {
    /// Subtracts an amount that was added before. If it exceeds the number, which only a defect of
    /// the accounting causes, the number becomes 0 in a release build. If it wrapped instead, the
    /// worker would look overloaded until the router is restarted.
    fn subtract(&mut self, amount: Self);

    /// Replaces the part `old` of a sum by `new`.
    fn replace(&mut self, old: Self, new: Self);
}

macro_rules! counters {
    ($($number:ty),*) => {$(
        impl Counter for $number {
            #[inline]
            fn subtract(&mut self, amount: Self) {
                debug_assert!(*self >= amount, "{amount} is subtracted from a count of {self}");
                *self = self.saturating_sub(amount);
            }

            #[inline]
            fn replace(&mut self, old: Self, new: Self) {
                *self = self.saturating_add(new);
                self.subtract(old);
            }
        }
    )*};
}

counters!(u32, u64, usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_sum_is_replaced() {
        let mut sum = 10_u64;
        sum.replace(4, 1);
        sum.subtract(2);
        assert_eq!(sum, 5);
    }

    #[test]
    #[cfg_attr(debug_assertions, should_panic = "3 is subtracted from a count of 2")]
    fn a_counter_never_wraps() {
        let mut count = 2_u32;
        count.subtract(3);
        assert_eq!(count, 0);
    }
}
