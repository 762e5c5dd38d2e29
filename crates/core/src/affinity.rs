//! Affinity: the worker that a request has to go to, and the one that it prefers because of something
//! that the router cannot hash.
//!
//! A prompt can have a part of unknown content: media, or the earlier turns of a stored response. The
//! worker that served the previous request of the session, or the same image, has probably cached that
//! part. The policy's choice gives way to it if the request then costs less there.

use foresee_prefix::WorkerIndex;

use crate::assessment::RequestAssessment;
use crate::request::PreparedRequest;
use crate::state::State;
use crate::worker_id::WorkerId;

/// Returns the part of `eligible` that consists of `only`, or all of it if `only` is `None`.
pub(crate) fn restrict(eligible: &[WorkerIndex], only: Option<WorkerIndex>) -> &[WorkerIndex] {
    let Some(only) = only else {
        return eligible;
    };
    let position = eligible.iter().position(|&index| index == only);
    position.map_or(&[], |position| &eligible[position..=position])
}

impl State {
    /// Returns the preferred worker of a request, if the request costs less there than on
    /// `selected` provided that it has cached the part of the prompt that is not hashed.
    ///
    /// Returns `None` if the whole prompt is hashed, because its matches are known then, if the
    /// preferred worker cannot be chosen, or if it lacks a part of the hashed prompt that another
    /// worker has.
    pub(crate) fn preferred_worker(
        &self,
        selected: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> Option<WorkerId> {
        let preferred = request.preferred_worker.filter(|&id| id != selected)?;
        let hashed_blocks = request.prompt.hashes().len() as u32;
        let is_hashed = hashed_blocks >= request.prompt.max_reusable_blocks();
        let is_eligible = self
            .workers
            .eligible(request.model_name())
            .is_some_and(|eligible| eligible.contains(&preferred.index))
            && self.workers.get(preferred).is_some()
            && !request.excluded_workers.contains(&preferred);
        if is_hashed || !is_eligible {
            return None;
        }
        let profile = self.request_profile(request, assessment);
        let matches = &assessment.prefix_matches;
        let cost = |worker: WorkerId, prefix_match| {
            let view = self.view(worker.index, prefix_match);
            self.selector.policy().cost(&profile, &view)
        };
        let mut with_unhashed = matches[preferred.index as usize];
        if with_unhashed.overlap() < assessment.tree_position.best_overlap.min(hashed_blocks) {
            return None;
        }
        with_unhashed.cached_blocks = request.prompt.max_reusable_blocks();
        let is_cheaper =
            cost(preferred, with_unhashed) < cost(selected, matches[selected.index as usize]);
        is_cheaper.then_some(preferred)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::router::{Request, RouteError, Router, RouterConfig};
    use crate::workers::WorkerSpec;
    use foresee_prefix::sequence::Sequence;

    fn fleet(count: usize) -> (Router, Vec<WorkerId>) {
        let router = Router::new(RouterConfig::default()).unwrap();
        let workers = (0..count).map(|number| {
            let name = number.to_string();
            let id = router
                .add_worker(WorkerSpec {
                    name,
                    prefix_caching: true,
                    ..WorkerSpec::default()
                })
                .unwrap();
            router.set_healthy(id, true);
            id
        });
        let workers = workers.collect();
        (router, workers)
    }

    #[test]
    fn a_request_goes_to_its_only_worker_or_to_none() {
        let (router, workers) = fleet(4);
        let prompt = Sequence::unhashed(100, RouterConfig::default().block_size);
        for &only in &workers {
            let request = Request {
                only_worker: Some(only),
                ..Request::new(&prompt)
            };
            for _ in 0..3 {
                let booking = router.route(&request, Duration::ZERO).unwrap();
                assert_eq!(booking.worker(), only);
            }
            router.set_healthy(only, false);
            let refused = router.route(&request, Duration::ZERO);
            assert!(matches!(refused, Err(RouteError::NoWorker(_))));
        }
    }

    #[test]
    fn an_unhashed_prompt_goes_to_the_preferred_worker_until_it_is_too_busy() {
        let (router, workers) = fleet(3);
        let block_size = RouterConfig::default().block_size;
        let prompt = Sequence::unhashed(4000, block_size);
        let preferred = workers[2];
        let request = Request {
            preferred_worker: Some(preferred),
            ..Request::new(&prompt)
        };
        for _ in 0..5 {
            let booking = router.route(&request, Duration::ZERO).unwrap();
            assert_eq!(booking.worker(), preferred);
        }
        let long = Sequence::unhashed(200_000, block_size);
        let only = Request {
            only_worker: Some(preferred),
            ..Request::new(&long)
        };
        let _load = router.route(&only, Duration::ZERO).unwrap();
        let booking = router.route(&request, Duration::ZERO).unwrap();
        assert_ne!(booking.worker(), preferred);
    }

    #[test]
    fn a_hashed_prompt_follows_its_known_matches() {
        let (router, workers) = fleet(2);
        let tokens: Vec<u32> = (0..4096).collect();
        let prompt = Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0);
        let mut first = router
            .route(&Request::new(&prompt), Duration::ZERO)
            .unwrap();
        let holder = first.worker();
        first.on_first_token(Duration::from_secs(1));
        first.complete(Duration::from_secs(2));
        let other = workers.iter().find(|&&id| id != holder).copied();
        let request = Request {
            preferred_worker: other,
            ..Request::new(&prompt)
        };
        let second = router.route(&request, Duration::from_secs(3)).unwrap();
        assert_eq!(second.worker(), holder);
    }
}
