//! Baseline after the policy of vLLM's router that follows KV events.

use rand::rngs::SmallRng;

use super::view::{DecisionView, EngineView, InformedPolicy};

/// The policy `kv_aware` of vLLM's router, as of version 0.1.17, without prefill/decode
/// disaggregation.
///
/// Cost: `(pending tokens + uncached tokens of this prompt) × (requests + 1)`. Uncached are the
/// prompt tokens that KV events do not report as computed, the last token always included: a prefix
/// that another request is about to compute does not count. A prompt's uncached tokens are pending
/// from the decision to its first token. Of several workers with the least cost, the first one in a
/// fixed order is chosen.
///
/// Source: the released program, as this version has no public source; vllm-project/router's issue
/// 294 describes the design, with a sum in place of the product. Its machine code and runs of it
/// before two and four mock engines agree on the product, on which tokens count as cached and as
/// pending, and on ties, which always fall to the same worker during a run. Defaults apply:
/// temperature 0 and no session affinity. Differences to the original:
/// - The order of workers is that of the fleet; in the original it differs from run to run.
/// - Tokens stay pending until the first token of every request; the original holds those of a
///   request without streaming until its end, as it does not see the first token.
/// - Costs without a token, which decide by load alone, do not occur: all prompts are known as
///   tokens.
/// - All cached blocks are on the device: the credits for other tiers have no counterpart.
pub(super) struct KvAware;

/// Returns the cost of sending the request to a worker.
fn cost(view: &DecisionView<'_>, worker: &EngineView<'_>) -> u64 {
    let uncached = view.uncached_tokens(worker);
    (worker.pending_tokens + u64::from(uncached)) * (u64::from(worker.requests) + 1)
}

impl InformedPolicy for KvAware {
    fn choose(&mut self, view: &DecisionView<'_>, _rng: &mut SmallRng) -> usize {
        let workers = view.workers.iter().enumerate();
        let least = workers.min_by_key(|(_, worker)| (cost(view, worker), worker.worker));
        least.map_or(0, |(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Returns the index of the worker that gets a prompt of 1,600 tokens.
    fn chosen(workers: &[EngineView<'_>]) -> usize {
        let view = DecisionView {
            request: 0,
            scrape: 0,
            prompt: &[],
            tokens: 1600,
            block_size: 16,
            output_tokens: 1,
            workers,
        };
        KvAware.choose(&view, &mut SmallRng::seed_from_u64(0))
    }

    fn worker(requests: u32, cached_blocks: u32, pending_tokens: u64) -> EngineView<'static> {
        EngineView {
            requests,
            cached_blocks,
            pending_tokens,
            ..EngineView::default()
        }
    }

    #[test]
    fn uncached_and_pending_tokens_are_multiplied_by_requests() {
        // The released program was seen to decide these two cases so.
        assert_eq!(chosen(&[worker(0, 0, 0), worker(3, 74, 0)]), 0);
        assert_eq!(chosen(&[worker(0, 0, 0), worker(3, 76, 0)]), 1);

        assert_eq!(chosen(&[worker(2, 0, 0), worker(1, 0, 799)]), 1);
        assert_eq!(chosen(&[worker(2, 0, 0), worker(1, 0, 801)]), 0);
    }

    #[test]
    fn a_prefix_in_flight_does_not_count() {
        let in_flight = EngineView {
            active_blocks_matched: 99,
            overlap_blocks: 99,
            ..worker(0, 0, 1)
        };
        assert_eq!(chosen(&[in_flight, worker(0, 0, 0)]), 1);
    }

    #[test]
    fn ties_fall_to_the_first_worker_of_the_fleet() {
        let second = EngineView {
            worker: 1,
            ..worker(0, 0, 0)
        };
        let third = EngineView {
            worker: 2,
            ..worker(0, 0, 0)
        };
        for _ in 0..20 {
            assert_eq!(chosen(&[second, third]), 0);
            assert_eq!(chosen(&[third, second]), 1);
        }
    }
}
