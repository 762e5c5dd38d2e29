//! Planned cancellations: which streams clients close before their end, and when.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

/// The moment at which a client closes its stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cancellation {
    /// After this time, and at the latest when the first byte of the response arrives.
    BeforeFirstByte {
        /// Time since the request was sent, in the engine's time.
        patience: Duration,
    },
    /// After this number of tokens.
    AfterTokens(u32),
}

impl Cancellation {
    /// Draws whether and when a client closes a stream of `output_tokens`. A client does
    /// with probability `fraction`; `None` means that it reads the stream to its end.
    pub(super) fn draw(fraction: f64, output_tokens: u32, rng: &mut SmallRng) -> Option<Self> {
        const IMPATIENT_FRACTION: f64 = 0.25;
        if rng.random::<f64>() >= fraction {
            return None;
        }
        if rng.random::<f64>() < IMPATIENT_FRACTION {
            // Uniform in the logarithm, from a millisecond to ten seconds: some clients leave while
            // they connect, some while they are queued, some during prefill.
            let patience = 10_f64.powf(rng.random_range(-3.0..=1.0));
            return Some(Self::BeforeFirstByte {
                patience: Duration::from_secs_f64(patience),
            });
        }
        let last_but_one = output_tokens.saturating_sub(1).max(1);
        Some(Self::AfterTokens(rng.random_range(1..=last_but_one)))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn the_requested_fraction_leaves_at_all_points() {
        let mut rng = SmallRng::seed_from_u64(5);
        let drawn: Vec<_> = (0..4000)
            .map(|_| Cancellation::draw(0.5, 10, &mut rng))
            .collect();
        let aborted: Vec<Cancellation> = drawn.into_iter().flatten().collect();
        assert!((1800..2200).contains(&aborted.len()), "{}", aborted.len());
        let after = |tokens| aborted.contains(&Cancellation::AfterTokens(tokens));
        assert!((1..10).all(after) && !after(0) && !after(10));
        let early = aborted
            .iter()
            .filter(|drawn| matches!(drawn, Cancellation::BeforeFirstByte { .. }));
        assert!((350..650).contains(&early.count()));
    }

    #[test]
    fn zero_and_one_are_fractions_too() {
        let mut rng = SmallRng::seed_from_u64(5);
        assert!((0..1000).all(|_| Cancellation::draw(0.0, 1, &mut rng).is_none()));
        assert!((0..1000).all(|_| Cancellation::draw(1.0, 1, &mut rng).is_some()));
    }
}
