//! Replication of popular prefixes to idle workers.
//!
//! A cost like the marginal delay keeps a prefix on the workers that have it as long as recomputing it
//! elsewhere costs *this* request more than waiting. That ignores later requests with the same
//! prefix, whose number is unknown. So the delay that a replica would have saved is accumulated per
//! prefix (the *regret*). Once the sum reaches the cost of recomputing the prefix, an idle worker
//! recomputes it. This is ski rental (Karlin, Manasse, Rudolph and Sleator, 1988): at most twice
//! the cost of knowing the demand in advance.
//!
//! Only idle workers replicate. On a busy worker the time would be taken from other requests, and
//! where all workers are busy the load spreads prefixes by itself.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::time::Duration;

use foresee_prefix::sequence::{IdentityHasher, SequenceHash};
use foresee_prefix::{PrefixMatch, PrefixState, WorkerIndex};

use crate::assessment::RequestAssessment;
use crate::policy::{Policy, RequestProfile, WorkerView};
use crate::request::PreparedRequest;
use crate::worker_id::WorkerId;
use crate::workers::Workers;

/// Maximum number of prefixes in each of the two generations of regret.
const MAX_PREFIXES: usize = 4096;

/// Cost for each prefix, identified by the hash of its last block.
type SecondsByPrefix = HashMap<SequenceHash, f64, BuildHasherDefault<IdentityHasher>>;

/// Cost that requests paid because no idle worker has their prefix, by prefix.
///
/// A prefix without further regret is forgotten after a while: when the current generation is full,
/// it replaces the previous one.
#[derive(Debug, Default)]
pub(crate) struct ReplicationRegret {
    /// Prefixes with regret since the last change of generation.
    current_generation: SecondsByPrefix,
    /// Prefixes without regret since then, from the generation before.
    previous_generation: SecondsByPrefix,
}

impl ReplicationRegret {
    /// Adds the regret of one more request, and returns the sum for its prefix. A new prefix in a
    /// full generation starts the next one, which forgets the generation before.
    fn add(&mut self, prefix: SequenceHash, seconds: f64) -> f64 {
        if self.current_generation.len() == MAX_PREFIXES
            && !self.current_generation.contains_key(&prefix)
        {
            self.previous_generation = std::mem::take(&mut self.current_generation);
        }
        let previous = self.previous_generation.remove(&prefix).unwrap_or_default();
        let regret = self.current_generation.entry(prefix).or_insert(previous);
        *regret += seconds;
        *regret
    }

    /// Returns the regret of a prefix.
    fn seconds(&self, prefix: SequenceHash) -> f64 {
        let regret = self
            .current_generation
            .get(&prefix)
            .or(self.previous_generation.get(&prefix));
        regret.copied().unwrap_or_default()
    }

    /// Forgets the regret of a prefix, because it has a further replica.
    fn clear(&mut self, prefix: SequenceHash) {
        self.current_generation.remove(&prefix);
        self.previous_generation.remove(&prefix);
    }
}

/// A request with the worker that was chosen for it, and all that decides whether an idle worker
/// computes its prefix instead.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlacedRequest<'a> {
    pub(crate) request: &'a PreparedRequest<'a>,
    pub(crate) assessment: &'a RequestAssessment,
    /// Policy whose costs are compared.
    pub(crate) policy: &'a dyn Policy,
    pub(crate) profile: &'a RequestProfile<'a>,
    /// Worker of least cost.
    pub(crate) chosen: WorkerId,
    /// Workers that the request must not be sent to.
    pub(crate) excluded: &'a [WorkerIndex],
    pub(crate) workers: &'a Workers,
    pub(crate) prefixes: &'a PrefixState,
    /// Time of the decision.
    pub(crate) now: Duration,
}

/// Possible replication of a request's prefix.
struct ReplicationOffer {
    /// Idle worker that would compute the prefix.
    worker: WorkerId,
    /// Cost that the request would save if the idle worker already had the prefix.
    saving: f64,
    /// Additional cost if the idle worker takes this request and computes
    /// the prefix.
    extra_cost: f64,
}

impl ReplicationRegret {
    /// Returns the idle worker that is to take the request and compute its prefix once more,
    /// instead of the chosen one.
    ///
    /// Adds the regret of this request, and resets it if a worker is returned or if the chosen
    /// worker itself lacks the prefix. Returns `None` while the regret is below the cost, and if no
    /// replication is possible: see [`PlacedRequest::offer`].
    pub(crate) fn replicate(&mut self, placed: PlacedRequest<'_>) -> Option<WorkerId> {
        let (prefix, blocks) = placed.prefix()?;
        if placed.overlap(placed.chosen.index) < blocks {
            // The chosen worker computes the prefix itself.
            self.clear(prefix);
            return None;
        }
        let offer = placed.offer(blocks)?;
        if self.add(prefix, offer.saving) < offer.extra_cost {
            return None;
        }
        self.clear(prefix);
        Some(offer.worker)
    }

    /// Returns the worker that [`replicate`](Self::replicate) would return, without changing any
    /// regret.
    pub(crate) fn peek(&self, placed: PlacedRequest<'_>) -> Option<WorkerId> {
        let (prefix, blocks) = placed.prefix()?;
        if placed.overlap(placed.chosen.index) < blocks {
            return None;
        }
        let offer = placed.offer(blocks)?;
        let regret = self.seconds(prefix) + offer.saving;
        (regret >= offer.extra_cost).then_some(offer.worker)
    }
}

impl PlacedRequest<'_> {
    /// Returns the longest prefix of the request that some worker has: its hash and its number of
    /// blocks. `None` if no worker has one.
    fn prefix(&self) -> Option<(SequenceHash, u32)> {
        let prompt = self.request.prompt;
        let best_overlap = self.assessment.tree_position.best_overlap;
        let best_overlap = best_overlap.min(prompt.max_reusable_blocks());
        let last = best_overlap.checked_sub(1)? as usize;
        Some((*prompt.hashes().get(last)?, best_overlap))
    }

    /// Returns the number of blocks of the request that the worker need not compute.
    fn overlap(&self, worker: WorkerIndex) -> u32 {
        let prefix_match = self.assessment.prefix_matches[worker as usize];
        prefix_match
            .overlap()
            .min(self.request.prompt.max_reusable_blocks())
    }

    /// Returns whether the worker has no requests.
    fn is_idle(&self, worker: WorkerIndex) -> bool {
        self.workers.loads[worker as usize].requests == 0
    }

    /// Returns what a further replica of the first `blocks` blocks would save this request. `None`
    /// if the chosen worker, which has those blocks, is idle, if no idle worker without them is
    /// eligible, or if nothing would be saved.
    fn offer(&self, blocks: u32) -> Option<ReplicationOffer> {
        if self.is_idle(self.chosen.index) {
            return None;
        }
        let workers = self.workers;
        let has_restrictions = workers.has_restrictions();
        let is_passed_over = |worker: WorkerIndex| {
            has_restrictions && workers.restriction(worker, self.now).is_some()
        };
        let idle_candidates = workers.eligible(self.request.model_name())?.iter().copied();
        let idle_candidates = idle_candidates.filter(|&worker| {
            self.is_idle(worker)
                && self.overlap(worker) < blocks
                && !self.excluded.contains(&worker)
                && !is_passed_over(worker)
                && self.prefixes.has_prefix_cache(worker)
        });
        let idle = idle_candidates.max_by_key(|&worker| self.overlap(worker))?;

        let cost = |worker: WorkerIndex, prefix_match: PrefixMatch| {
            let view = WorkerView::new(workers, worker, prefix_match, self.now);
            self.policy.cost(self.profile, &view)
        };
        let match_on = |worker: WorkerIndex| self.assessment.prefix_matches[worker as usize];
        let chosen_cost = cost(self.chosen.index, match_on(self.chosen.index));
        let replicated = PrefixMatch {
            cached_blocks: blocks,
            ..match_on(idle)
        };
        let saving = chosen_cost - cost(idle, replicated);
        (saving > 0.0).then_some(ReplicationOffer {
            worker: workers.by_index(idle)?.id,
            saving,
            extra_cost: cost(idle, match_on(idle)) - chosen_cost,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regret_accumulates_until_the_prefix_is_replicated() {
        let mut regret = ReplicationRegret::default();
        assert_eq!(regret.add(1, 2.0), 2.0);
        assert_eq!(regret.add(2, 5.0), 5.0);
        assert_eq!(regret.add(1, 1.0), 3.0);
        regret.clear(1);
        assert_eq!(regret.add(1, 1.0), 1.0);
    }

    #[test]
    fn memory_is_bounded_and_recent_prefixes_stay() {
        let mut regret = ReplicationRegret::default();
        for prefix in 0..20 * MAX_PREFIXES as u64 {
            regret.add(prefix + 1, 1.0);
            assert_eq!(regret.add(0, 1.0), 1.0 + prefix as f64);
        }
        assert!(
            regret.current_generation.len() + regret.previous_generation.len() <= 2 * MAX_PREFIXES
        );
    }
}
