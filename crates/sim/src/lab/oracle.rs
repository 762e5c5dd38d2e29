//! The oracle: knows what nobody can, and chooses by what would come of it.

use foresee_core::sequence::SequenceHash;
use rand::rngs::SmallRng;

use super::rolling::{Rolling, Task, Told};
use super::view::{self, Rule, Seen, Standing, View};
use crate::replay::coarser;

/// For every worker, rolls its engine forward to its end without and with the request, from the
/// engine's true state, by its true step law, with the true length of every answer. What a
/// choice costs is the time it adds to all requests there, and the request's own from arrival to
/// end. The least wins.
///
/// It is greedy: it does not know what comes next. Whoever is as good shows that better inputs
/// would not help its own rule, not that no rule is better.
pub(super) struct Oracle {
    /// Weight of the request's own time to first token, beside that it is part of its time to
    /// the end.
    first_token_weight: f64,
    /// By request: blocks that counted for others when it was placed.
    shared: Vec<u32>,
}

/// Time from arrival to end, and nothing else.
pub(super) const END_TO_END: f64 = 0.0;
/// A second before the first token counts as ten.
pub(super) const FIRST_TOKEN: f64 = 9.0;

impl Oracle {
    pub(super) fn new(first_token_weight: f64) -> Self {
        Self {
            first_token_weight,
            shared: Vec::new(),
        }
    }

    /// What placing the request there costs, in seconds.
    fn cost(&self, view: &View<'_>, seen: &Seen<'_>) -> f64 {
        let Some(standing) = &seen.standing else {
            return f64::INFINITY;
        };
        let without = Rolling::new(standing, |id| {
            self.shared.get(id as usize).copied().unwrap_or(0)
        });
        let mut with = without.clone();
        let (cached, shared) = found(view, standing, seen.active);
        let id = view.request as u64;
        let newcomer = Task::new(id, view.tokens, view.output_tokens, cached, shared);
        with.submit(newcomer);

        let mut ends_without = 0.0;
        without.run(|_, told, time| {
            if let Told::Last = told {
                ends_without += time;
            }
        });
        let mut ends_with = 0.0;
        let mut first_token = f64::INFINITY;
        with.run(|task, told, time| match told {
            Told::First if task.id == id => first_token = time,
            Told::First => {}
            Told::Last => ends_with += time,
        });
        if first_token.is_infinite() {
            return f64::INFINITY;
        }
        ends_with - ends_without + self.first_token_weight * first_token
    }
}

/// Tokens of the prompt that need not be computed there, and the engine's blocks that others there
/// hold or will hold by then; the router knows of `active` of its own.
fn found(view: &View<'_>, standing: &Standing<'_>, active: u32) -> (u32, u32) {
    let engine = standing.engine;
    if !engine.config().prefix_caching {
        return (0, 0);
    }
    let prompt: Vec<SequenceHash> = coarser(view.prompt, standing.stride).collect();
    let cached = engine.cached_tokens(&prompt, view.tokens);
    let shared = active / standing.stride;
    (
        cached.max(shared * engine.config().block_size.get()),
        shared,
    )
}

impl Rule for Oracle {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        let chosen = view::least(view.workers, rng, |it| self.cost(view, it));
        let seen = &view.workers[chosen];
        let found = seen.standing.map(|it| found(view, &it, seen.active));
        if self.shared.len() <= view.request {
            self.shared.resize(view.request + 1, 0);
        }
        self.shared[view.request] = found.map_or(0, |(_, shared)| shared);
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
    use crate::law::L40S_8B;

    const BLOCK: NonZeroU32 = NonZeroU32::new(16).unwrap();

    fn hashes(prompt: u64, tokens: u32) -> Arc<[SequenceHash]> {
        let blocks = u64::from(tokens / BLOCK);
        (0..blocks).map(|it| (prompt << 32) + it).collect()
    }

    /// An engine that has begun with requests of these prompts and answer lengths.
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

    /// Where a new prompt of so many tokens goes, as `oracle` and as `oracle:ttft` see it.
    fn chosen(engines: [&Engine; 2], prompt: u64, tokens: u32) -> [usize; 2] {
        let workers = engines.map(|engine| Seen {
            standing: Some(Standing {
                worker: 0,
                engine,
                stride: 1,
                speed: 1.0,
                step_left: Duration::ZERO,
            }),
            ..Seen::default()
        });
        let view = View {
            request: 1000,
            prompt: &hashes(prompt, tokens),
            tokens,
            block_size: BLOCK.get(),
            output_tokens: 50,
            scrape: 0,
            ttft_weight: 1.0,
            workers: &workers,
        };
        let mut rng = SmallRng::seed_from_u64(0);
        [END_TO_END, FIRST_TOKEN].map(|weight| Oracle::new(weight).choose(&view, &mut rng))
    }

    #[test]
    fn it_knows_how_long_answers_are() {
        let long = engine(11_875, &[(100, 1000); 8]);
        let short = engine(11_875, &[(100, 10); 8]);
        assert_eq!(chosen([&long, &short], 99, 4000), [1, 1]);
    }

    #[test]
    fn it_spares_streams_a_long_prefill() {
        let streams = engine(11_875, &[(100, 500); 20]);
        let waits = engine(11_875, &[(25_000, 2)]);
        // The first token would come sooner among the streams, each of which would wait for it.
        assert_eq!(chosen([&streams, &waits], 99, 2000), [1, 0]);
    }

    #[test]
    fn it_knows_what_is_cached_and_what_fits() {
        let cold = engine(11_875, &[(4000, 1), (4000, 1)]);
        let warm = engine(11_875, &[(4000, 1), (4000, 1), (4000, 1)]);
        assert_eq!(chosen([&cold, &warm], 2, 4000), [1, 1]);
        let full = engine(300, &[(4000, 400)]);
        let roomy = engine(11_875, &[(4000, 400), (4000, 400)]);
        assert_eq!(chosen([&full, &roomy], 99, 2000), [1, 1]);
        let too_small = engine(100, &[]);
        assert_eq!(chosen([&too_small, &roomy], 99, 2000), [1, 1]);
    }
}
