//! The router's cost in seconds without one of its terms: what the term is worth. No idle worker is
//! given a copy of a prefix for what was lost for want of it.

use foresee_core::delay::Delay;
use rand::rngs::SmallRng;

use super::view::{self, Rule, View};

/// A term of the cost.
type Term = fn(&mut Delay) -> &mut f64;

/// Takes the worker of least [`Delay`], a term of which it may not see.
struct Without(Option<Term>);

impl Rule for Without {
    fn choose(&mut self, view: &View<'_>, rng: &mut SmallRng) -> usize {
        view::least(view.workers, rng, |worker| {
            let mut delay = worker.delay;
            if let Some(term) = self.0 {
                *term(&mut delay) = 0.0;
            }
            delay.total(view.ttft_weight)
        })
    }
}

/// The router's `delay` without this term.
pub(super) fn without(term: Term) -> Box<dyn Rule> {
    Box::new(Without(Some(term)))
}

/// The router's `delay` with all of its terms.
pub(super) fn without_copies() -> Box<dyn Rule> {
    Box::new(Without(None))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use foresee_core::choose::Policy;
    use foresee_core::fleet::WorkerSpec;
    use foresee_core::router::{Request, Router, RouterConfig};
    use rand::SeedableRng;

    use super::*;
    use crate::lab::view::Seen;
    use crate::prompt::Prompt;

    #[test]
    fn what_is_left_of_the_sum_chooses() {
        let seen = |wait, prefill, stalls| Seen {
            delay: Delay {
                wait,
                prefill,
                stalls,
                ..Delay::default()
            },
            ..Seen::default()
        };
        // Without stalls the first costs 2, the second 3; without the wait 6 and 2.
        let workers = [seen(1.0, 1.0, 5.0), seen(2.0, 1.0, 1.0)];
        let chosen = |term, ttft_weight| {
            let view = View {
                request: 0,
                scrape: 0,
                prompt: &[],
                tokens: 16,
                block_size: 16,
                output_tokens: 1,
                ttft_weight,
                workers: &workers,
            };
            without(term).choose(&view, &mut SmallRng::seed_from_u64(0))
        };
        assert_eq!(chosen(|it| &mut it.stalls, 1.0), 0);
        assert_eq!(chosen(|it| &mut it.wait, 1.0), 1);
        assert_eq!(chosen(|it| &mut it.slows, 1.0), 1);
        assert_eq!(chosen(|it| &mut it.slows, 10.0), 0);
    }

    /// So that an ablation lacks one term and no other.
    #[test]
    fn the_whole_sum_is_what_the_router_minimises() {
        let config = RouterConfig {
            policy: Policy::Delay,
            ttft_weight: 3.0,
            ..RouterConfig::default()
        };
        let router = Router::new(config.clone()).unwrap();
        for worker in 0..4 {
            let spec = WorkerSpec {
                name: format!("worker-{worker}"),
                models: Vec::new(),
                capacity_blocks: None,
                prefix_caching: true,
                ..WorkerSpec::default()
            };
            let id = router.add_worker(spec).unwrap();
            router.set_healthy(id, true);
        }
        let mut bookings = Vec::new();
        for number in 0..200_u64 {
            let now = Duration::from_millis(50 * number);
            let length = 100 + (number * 7919 % 3000) as u32;
            let prompt = Prompt::new().then(number % 7, length);
            let sequence = prompt.sequence(config.block_size);
            let request = Request::new(&sequence);
            let explanation = router.explain(&request, now).unwrap();
            let candidates = &explanation.candidates;
            let totals = candidates.iter().map(|it| it.delay.total(3.0));
            let least = totals.clone().fold(f64::INFINITY, f64::min);
            for (total, candidate) in totals.zip(candidates) {
                let is_chosen = candidate.probability > 0.0;
                assert!(!is_chosen || total <= least * (1.0 + 1e-9), "{candidate:?}");
            }
            let mut booking = router.route(&request, now).unwrap();
            booking.tokens(1 + (number % 5) as u32, now + Duration::from_millis(40));
            bookings.push(booking);
            if number % 3 == 0 {
                bookings
                    .swap_remove(0)
                    .finish(now + Duration::from_millis(45));
            }
        }
    }
}
