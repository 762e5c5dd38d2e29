//! Ablations: the router's marginal delay without one of its terms, or without replication, which
//! shows what each is worth. Everything else is as in the router's default.

use foresee_core::policy::marginal_delay::MarginalDelay;
use foresee_core::policy::{Candidates, Policy, RequestProfile};

/// Selects a term of the marginal delay.
type Term = fn(&mut MarginalDelay) -> &mut f64;

/// Policy that chooses the worker with the smallest [`MarginalDelay`], computed without a term.
#[derive(Debug)]
struct Ablation {
    /// Term that is left out; `None` to keep all.
    left_out: Option<Term>,
    replicates_prefixes: bool,
}

impl Ablation {
    /// Returns the weighted sum of the terms that are not left out.
    fn total(&self, mut delay: MarginalDelay, ttft_weight: f64) -> f64 {
        if let Some(term) = self.left_out {
            *term(&mut delay) = 0.0;
        }
        delay.total(ttft_weight)
    }
}

impl Policy for Ablation {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(
            candidates
                .iter()
                .map(|worker| self.total(worker.marginal_delay(request), request.ttft_weight)),
        );
    }

    fn replicates_prefixes(&self) -> bool {
        self.replicates_prefixes
    }
}

/// Creates the policy of the smallest marginal delay without `term`.
pub(super) fn without(term: Term) -> Box<dyn Policy> {
    Box::new(Ablation {
        left_out: Some(term),
        replicates_prefixes: true,
    })
}

/// Creates the policy of the smallest marginal delay with all terms, without replication.
pub(super) fn without_replication() -> Box<dyn Policy> {
    Box::new(Ablation {
        left_out: None,
        replicates_prefixes: false,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use foresee_core::router::{Request, Router, RouterConfig};
    use foresee_core::workers::WorkerSpec;

    use super::*;
    use crate::prompt::Prompt;

    #[test]
    fn the_sum_of_the_other_terms_decides() {
        let delay = |queue_wait, prefill, prefill_stall_caused| MarginalDelay {
            queue_wait,
            prefill,
            prefill_stall_caused,
            ..MarginalDelay::default()
        };
        // Without the stall the workers cost 2 and 3, without the wait 6 and 2.
        let delays = [delay(1.0, 1.0, 5.0), delay(2.0, 1.0, 1.0)];
        let chosen = |term: Term, ttft_weight| {
            let ablation = Ablation {
                left_out: Some(term),
                replicates_prefixes: true,
            };
            let totals = delays.map(|delay| ablation.total(delay, ttft_weight));
            usize::from(totals[1] < totals[0])
        };
        assert_eq!(chosen(|delay| &mut delay.prefill_stall_caused, 1.0), 0);
        assert_eq!(chosen(|delay| &mut delay.queue_wait, 1.0), 1);
        assert_eq!(chosen(|delay| &mut delay.decode_slowdown_caused, 1.0), 1);
        assert_eq!(chosen(|delay| &mut delay.decode_slowdown_caused, 10.0), 0);
    }

    /// Ensures that an ablation differs from the router's policy in one term only.
    #[test]
    fn the_router_minimises_the_sum_of_all_terms() {
        let config = RouterConfig {
            ttft_weight: 3.0,
            queue_order: None,
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
            let totals = candidates
                .iter()
                .map(|candidate| candidate.delay.total(3.0));
            let smallest = totals.clone().fold(f64::INFINITY, f64::min);
            for (total, candidate) in totals.zip(candidates) {
                let is_chosen = candidate.probability > 0.0;
                assert!(
                    !is_chosen || total <= smallest * (1.0 + 1e-9),
                    "{candidate:?}"
                );
            }
            let mut booking = router.route(&request, now).unwrap();
            booking.on_tokens(1 + (number % 5) as u32, now + Duration::from_millis(40));
            bookings.push(booking);
            if number % 3 == 0 {
                bookings
                    .swap_remove(0)
                    .complete(now + Duration::from_millis(45));
            }
        }
    }
}
