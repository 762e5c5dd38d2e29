//! Baseline with the true prefill times of the engines.

use rand::rngs::SmallRng;

use super::view::{self, DecisionView, InformedPolicy};

/// The least predicted time to first token, as Mooncake minimises it.
///
/// Cost: `time of the pending prefills + time of this prefill`, in seconds.
///
/// Source: Qin et al., 2024 (Mooncake), algorithm 1. The original takes prefill times from a
/// profile that is measured in advance. Here they come from the engine's own step-time model,
/// without concurrent decodes. The time since the current prefill started is subtracted, which the
/// paper does not specify.
pub(super) struct MinTtft;

impl InformedPolicy for MinTtft {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        view::argmin(view.workers, rng, |worker| {
            worker.pending_seconds + worker.prefill_seconds
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::view::EngineView;
    use super::*;

    #[test]
    fn wait_and_prefill_add_up() {
        let with_seconds = |pending_seconds, prefill_seconds| EngineView {
            pending_seconds,
            prefill_seconds,
            ..EngineView::default()
        };
        let view = DecisionView {
            request: 0,
            scrape: 0,
            prompt: &[],
            tokens: 16,
            block_size: 16,
            output_tokens: 1,
            workers: &[with_seconds(1.0, 0.1), with_seconds(0.5, 0.7)],
        };
        let chosen = MinTtft.choose(&view, &mut SmallRng::seed_from_u64(0));
        assert_eq!(chosen, 0);
    }
}
