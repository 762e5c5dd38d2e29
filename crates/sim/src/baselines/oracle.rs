//! Oracle: a greedy policy with information that no router has.

use foresee_core::sequence::SequenceHash;
use rand::rngs::SmallRng;

use super::lookahead::{Lookahead, Milestone, ScheduledRequest};
use super::view::{self, DecisionView, EngineState, EngineView, InformedPolicy};
use crate::prompt::coarser_hashes;

/// Policy that chooses the worker on which the request delays all requests least, itself included.
///
/// For each worker, a [`Lookahead`] simulates the engine to its end, without and with the request.
/// It starts from the true state of the engine and uses its true step times and the true length of
/// every output. The cost, in seconds, is the time that the request adds to the other requests on
/// the worker, plus its own end-to-end latency, plus
/// [`first_token_weight`](Self::first_token_weight) × its time to first token.
///
/// The oracle is greedy: it ignores requests that have not arrived. A policy that reaches it shows
/// that better inputs would not improve this rule, not that no rule is better.
pub(super) struct Oracle {
    /// Weight of the request's time to first token, in addition to its part in the end-to-end
    /// latency.
    first_token_weight: f64,
    /// By request: blocks that counted for other requests when the request was placed.
    shared: Vec<u32>,
}

/// [`Oracle::first_token_weight`] that minimises end-to-end latency only.
pub(super) const END_TO_END: f64 = 0.0;
/// [`Oracle::first_token_weight`] with which a second before the first token counts as ten seconds.
pub(super) const FIRST_TOKEN: f64 = 9.0;

impl Oracle {
    /// Creates an oracle with this [`first_token_weight`](Self::first_token_weight).
    pub(super) fn new(first_token_weight: f64) -> Self {
        Self {
            first_token_weight,
            shared: Vec::new(),
        }
    }

    /// Returns the cost of the request on a worker, in seconds, as [`Oracle`] defines it. The cost
    /// is infinite if the engine's memory is too small for the request to generate a first token,
    /// or if `worker` contains no state of the engine.
    fn cost(&self, view: &DecisionView<'_>, worker: &EngineView<'_>) -> f64 {
        let Some(state) = &worker.engine else {
            return f64::INFINITY;
        };
        let without = Lookahead::new(state, |id| {
            self.shared.get(id as usize).copied().unwrap_or(0)
        });
        let mut with = without.clone();
        let Reuse { cached, shared } = reuse_on(view, state, worker.active_blocks_matched);
        let id = view.request as u64;
        let request =
            ScheduledRequest::arriving(id, view.tokens, view.output_tokens, cached, shared);
        with.submit(request);

        let mut ends_without = 0.0;
        without.run(|_, milestone, time| {
            if let Milestone::LastToken = milestone {
                ends_without += time;
            }
        });
        let mut ends_with = 0.0;
        let mut first_token = f64::INFINITY;
        with.run(|request, milestone, time| match milestone {
            Milestone::FirstToken if request.id == id => first_token = time,
            Milestone::FirstToken => {}
            Milestone::LastToken => ends_with += time,
        });
        if first_token.is_infinite() {
            return f64::INFINITY;
        }
        ends_with - ends_without + self.first_token_weight * first_token
    }
}

/// Part of a prompt that an engine does not compute or allocate again.
struct Reuse {
    /// Tokens that the engine has cached, or will have cached when the request is admitted.
    cached: u32,
    /// Blocks of the engine that other requests pin, or will pin by that time.
    shared: u32,
}

/// Returns what a request could reuse on an engine. `active` are the leading blocks of the prompt,
/// in blocks of the router, that requests booked on the worker pin. Both numbers are 0 without
/// prefix caching.
fn reuse_on(view: &DecisionView<'_>, state: &EngineState<'_>, active: u32) -> Reuse {
    let engine = state.engine;
    if !engine.config().prefix_caching {
        return Reuse {
            cached: 0,
            shared: 0,
        };
    }
    let prompt: Vec<SequenceHash> = coarser_hashes(view.prompt, state.engine_block_ratio).collect();
    let cached = engine.cached_tokens(&prompt, view.tokens);
    let shared = active / state.engine_block_ratio;
    Reuse {
        cached: cached.max(shared * engine.config().block_size.get()),
        shared,
    }
}

impl InformedPolicy for Oracle {
    fn choose(&mut self, view: &DecisionView<'_>, rng: &mut SmallRng) -> usize {
        let chosen = view::argmin(view.workers, rng, |worker| self.cost(view, worker));
        let worker = &view.workers[chosen];
        let reuse = worker
            .engine
            .map(|state| reuse_on(view, &state, worker.active_blocks_matched));
        if self.shared.len() <= view.request {
            self.shared.resize(view.request + 1, 0);
        }
        self.shared[view.request] = reuse.map_or(0, |reuse| reuse.shared);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::Arc;
    use std::time::Duration;

    use rand::SeedableRng;

    use super::*;
    use crate::engine::{Engine, EngineConfig, EngineRequest};
    use crate::step_time::L40S_8B;

    const BLOCK: NonZeroU32 = NonZeroU32::new(16).unwrap();

    fn hashes(prompt: u64, tokens: u32) -> Arc<[SequenceHash]> {
        let blocks = u64::from(tokens / BLOCK);
        (0..blocks).map(|block| (prompt << 32) + block).collect()
    }

    /// Returns an engine that has run five steps with requests of these prompt and output lengths.
    fn engine(blocks: u32, requests: &[(u32, u32)]) -> Engine {
        let mut engine = Engine::new(EngineConfig {
            blocks,
            ..EngineConfig::from_preset(&L40S_8B, BLOCK)
        });
        for (id, &(prompt_tokens, output_tokens)) in (0..).zip(requests) {
            let request = EngineRequest {
                id,
                hashes: hashes(id, prompt_tokens),
                prompt_tokens,
                output_tokens,
            };
            engine.submit(request).unwrap();
        }
        for _ in 0..5 {
            if let Some(step) = engine.begin_step() {
                engine.end_step(step);
            }
        }
        engine
    }

    /// Returns the index of the engine that `oracle` and `oracle:ttft` choose for a new prompt of
    /// `tokens` tokens.
    fn chosen(engines: [&Engine; 2], prompt: u64, tokens: u32) -> [usize; 2] {
        let workers = engines.map(|engine| EngineView {
            engine: Some(EngineState {
                worker: 0,
                engine,
                engine_block_ratio: 1,
                speed: 1.0,
                step_left: Duration::ZERO,
            }),
            ..EngineView::default()
        });
        let view = DecisionView {
            request: 1000,
            prompt: &hashes(prompt, tokens),
            tokens,
            block_size: BLOCK.get(),
            output_tokens: 50,
            scrape: 0,
            workers: &workers,
        };
        let mut rng = SmallRng::seed_from_u64(0);
        [END_TO_END, FIRST_TOKEN].map(|weight| Oracle::new(weight).choose(&view, &mut rng))
    }

    #[test]
    fn short_outputs_are_preferred_to_long_ones() {
        let long = engine(11_875, &[(100, 1000); 8]);
        let short = engine(11_875, &[(100, 10); 8]);
        assert_eq!(chosen([&long, &short], 99, 4000), [1, 1]);
    }

    #[test]
    fn a_prefill_avoids_stalling_many_outputs() {
        let decoding = engine(11_875, &[(100, 500); 20]);
        let prefilling = engine(11_875, &[(25_000, 2)]);
        // On the decoding engine the first token is earlier, but every other output stalls for it.
        assert_eq!(chosen([&decoding, &prefilling], 99, 2000), [1, 0]);
    }

    #[test]
    fn cached_prefixes_and_free_memory_are_preferred() {
        let cold = engine(11_875, &[(4000, 1), (4000, 1)]);
        let warm = engine(11_875, &[(4000, 1), (4000, 1), (4000, 1)]);
        assert_eq!(chosen([&cold, &warm], 2, 4000), [1, 1]);
        let full = engine(300, &[(4000, 400)]);
        let free = engine(11_875, &[(4000, 400), (4000, 400)]);
        assert_eq!(chosen([&full, &free], 99, 2000), [1, 1]);
        let too_small = engine(100, &[]);
        assert_eq!(chosen([&too_small, &free], 99, 2000), [1, 1]);
    }
}
