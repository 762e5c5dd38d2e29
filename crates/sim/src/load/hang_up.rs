//! Clients that do not wait for the end: which streams they break off, and when.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

/// When a client breaks off its stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum HangUp {
    /// After this time, as the engine counts it, and at the latest when the first byte of the
    /// answer comes.
    BeforeFirstByte {
        /// Time since the request was sent.
        patience: Duration,
    },
    /// When it has as many tokens.
    AfterTokens(u32),
}

impl HangUp {
    /// Whether and when a client breaks off an answer of `output_tokens`; `share` of them do.
    pub(super) fn draw(share: f64, output_tokens: u32, rng: &mut SmallRng) -> Option<Self> {
        const IMPATIENT_SHARE: f64 = 0.25;
        if rng.random::<f64>() >= share {
            return None;
        }
        if rng.random::<f64>() < IMPATIENT_SHARE {
            // From a millisecond to ten seconds, each power of ten as likely: some leave while
            // connecting, some while queued, some while their prompts are computed.
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
    fn as_many_as_told_hang_up_at_all_points() {
        let mut rng = SmallRng::seed_from_u64(5);
        let drawn: Vec<_> = (0..4000).map(|_| HangUp::draw(0.5, 10, &mut rng)).collect();
        let aborted: Vec<HangUp> = drawn.into_iter().flatten().collect();
        assert!((1800..2200).contains(&aborted.len()), "{}", aborted.len());
        let after = |tokens| aborted.contains(&HangUp::AfterTokens(tokens));
        assert!((1..10).all(after) && !after(0) && !after(10));
        let early = aborted
            .iter()
            .filter(|it| matches!(it, HangUp::BeforeFirstByte { .. }));
        assert!((350..650).contains(&early.count()));
    }

    #[test]
    fn none_and_all_are_shares_too() {
        let mut rng = SmallRng::seed_from_u64(5);
        assert!((0..1000).all(|_| HangUp::draw(0.0, 1, &mut rng).is_none()));
        assert!((0..1000).all(|_| HangUp::draw(1.0, 1, &mut rng).is_some()));
    }
}
