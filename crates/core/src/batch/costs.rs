//! Costs of a batch on each worker.
//!
//! The delays of 64 prompts on 512 workers take milliseconds to compute. So they are computed in
//! several critical sections and, in a large fleet, only for a shortlist of workers.

use std::time::Duration;

use foresee_prefix::sequence::Sequence;
use foresee_prefix::{PrefixMatch, WorkerIndex};

use crate::batch::BatchRequest;
use crate::batch_costs::BatchCosts;
use crate::critical_section::{CriticalSection, SharedState};
use crate::policy::{BatchRule, Candidates, RequestProfile, WorkerView};
use crate::request::SelectError;
use crate::state::State;
use crate::worker_id::WorkerId;

/// Number of delays after which a critical section ends. A delay takes about a tenth of a
/// microsecond.
const MAX_DELAYS_PER_LOCK: usize = 128;

/// Number of delays that take as long as the prefix matches of one prompt on a few workers.
const DELAYS_PER_PROMPT: usize = 16;
/// Number of workers whose prefix match and cost in blocks take as long as one delay.
const WORKERS_PER_DELAY: usize = 8;

/// Number of workers up to which the delays of a batch are computed for all of them.
const MAX_WORKERS_EVALUATED: usize = 64;
/// Number of workers of least cost for the mean prompt, by a lower bound, in the shortlist of a
/// larger fleet.
const SHORTLIST_BY_BOUND: usize = 24;
/// Number of further workers in the shortlist, with the most overlap.
const SHORTLIST_BY_OVERLAP: usize = 8;

/// Purpose for which the costs of a batch are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// All costs on all workers.
    Explanation,
    /// The policy's costs on the workers that may have the least, and costs in blocks.
    Choice,
    /// Costs in blocks.
    Decision,
}

/// Critical section that lets other threads have the lock when it has done enough work.
struct PausingSection<'a> {
    state: CriticalSection<'a>,
    /// Time of the decision.
    now: Duration,
    /// Work since the last pause, as a number of delays.
    work: usize,
}

impl PausingSection<'_> {
    /// Announces work that takes as long as this many delays. Pauses before it if enough was done,
    /// and then adds new workers to `batch_costs`.
    fn begin(&mut self, delays: usize, batch_costs: &mut BatchCosts) {
        if self.work > 0 && self.work + delays > MAX_DELAYS_PER_LOCK {
            self.state.pause();
            self.state.advance_to(self.now);
            batch_costs.extend(&self.state.workers.loads);
            self.work = 0;
        }
        self.work += delays;
    }
}

impl SharedState {
    /// Returns the costs of the batch on every worker, with its prompts booked one after the other.
    /// Each prompt waits for the prefills of the prompts before it. Workers that cannot be chosen
    /// have entries too. Books nothing. The lock, in which the caller may choose and book, is
    /// returned as well; with many prompts or workers it was released meanwhile.
    pub(super) fn batch_costs(
        &self,
        batch: &BatchRequest<'_>,
        now: Duration,
        purpose: Purpose,
    ) -> (BatchCosts, CriticalSection<'_>) {
        let mut section = PausingSection {
            state: self.lock(),
            now,
            work: 0,
        };
        section.state.advance_to(now);
        let mut costs = BatchCosts::new(&section.state.workers.loads);
        let workers = section.state.workers.index_len();
        let rule = section.state.selector.policy().batch_rule();
        let needs_shortlist = purpose == Purpose::Choice
            && rule == BatchRule::SumOverShortlist
            && workers > MAX_WORKERS_EVALUATED;
        let needs_none = match purpose {
            Purpose::Explanation => false,
            Purpose::Choice => needs_shortlist || rule == BatchRule::FirstPrompt,
            Purpose::Decision => true,
        };
        let evaluated: Vec<WorkerIndex> = if needs_none {
            Vec::new()
        } else {
            (0..workers as WorkerIndex).collect()
        };
        section.add_prompts(batch, &evaluated, purpose, true, &mut costs);
        if needs_shortlist {
            section.begin(workers, &mut costs);
            let shortlist = section.state.shortlist(batch, &costs);
            section.add_prompts(batch, &shortlist, purpose, false, &mut costs);
        }
        (costs, section.state)
    }
}

impl PausingSection<'_> {
    /// Adds the costs of all prompts of the batch: those in blocks on all workers, if `adds_blocks`,
    /// and those of the policy on the `evaluated` workers.
    fn add_prompts(
        &mut self,
        batch: &BatchRequest<'_>,
        evaluated: &[WorkerIndex],
        purpose: Purpose,
        adds_blocks: bool,
        costs: &mut BatchCosts,
    ) {
        costs.start_objective(evaluated);
        for (request, &shared) in batch.requests.iter().zip(&batch.shared_with_earlier) {
            let workers = self.state.workers.index_len();
            self.begin(DELAYS_PER_PROMPT + workers / WORKERS_PER_DELAY, costs);
            let assessment = self.state.assess(request);
            let profile = self.state.request_profile(request, &assessment);
            let mut prefix_matches = assessment.prefix_matches;
            self.state.share_earlier(shared, &mut prefix_matches);
            for part in evaluated.chunks(MAX_DELAYS_PER_LOCK / 2) {
                self.begin(part.len(), costs);
                let is_explained = purpose == Purpose::Explanation;
                self.state
                    .add_objective(&profile, part, &prefix_matches, is_explained, costs);
            }
            if adds_blocks {
                costs.add_blocks(&profile, &prefix_matches);
            }
            costs.add_earlier(&profile, &prefix_matches);
        }
    }
}

impl State {
    /// Raises the prefix matches of a prompt to the `shared` leading blocks that it shares with an
    /// earlier prompt of its batch, on all workers that cache prefixes.
    fn share_earlier(&self, shared: u32, prefix_matches: &mut [PrefixMatch]) {
        if shared == 0 {
            return;
        }
        for worker in self.workers.iter().map(|worker| worker.id.index) {
            if self.prefixes.has_prefix_cache(worker)
                && let Some(prefix_match) = prefix_matches.get_mut(worker as usize)
            {
                prefix_match.active_blocks = prefix_match.active_blocks.max(shared);
            }
        }
    }

    /// Adds the costs of the next prompt on the workers at `indices`, and its delays if an
    /// explanation is wanted.
    fn add_objective(
        &self,
        profile: &RequestProfile<'_>,
        indices: &[WorkerIndex],
        prefix_matches: &[PrefixMatch],
        is_explained: bool,
        sums: &mut BatchCosts,
    ) {
        let views: Vec<WorkerView<'_>> = indices
            .iter()
            .map(|&index| {
                let view = self.view(index, prefix_matches[index as usize]);
                view.after(sums.earlier[index as usize])
            })
            .collect();
        let policy = self.selector.policy();
        let mut costs = Vec::with_capacity(views.len());
        policy.costs(profile, &Candidates::from(&views[..]), &mut costs);
        for (view, cost) in views.iter().zip(costs) {
            let index = view.index as usize;
            let is_first = sums.earlier[index].prefill.requests == 0;
            let standing = if is_first {
                0.0
            } else {
                policy.standing_cost(view)
            };
            sums.objective[index] += cost - standing;
            sums.tie_breakers[index] += policy.tie_breaker(profile, view);
            if is_explained {
                let mut delay = view.marginal_delay(profile);
                if !is_first {
                    // The charge is that of the worker, and counts once.
                    delay.failure_charge = 0.0;
                }
                sums.delays[index] += delay;
            }
        }
    }

    /// Returns the workers on which the batch may have the least cost: eligible workers with the
    /// least cost for its mean prompt, by a lower bound, and some of the others, with the most
    /// overlap. `costs` has its prefix matches.
    fn shortlist(&self, batch: &BatchRequest<'_>, costs: &BatchCosts) -> Vec<WorkerIndex> {
        let first = &batch.requests[0];
        let excluded = self.excluded(first);
        let eligible = self.workers.selectable(first, &excluded, self.now);
        let mut remaining: Vec<WorkerIndex> = eligible.unwrap_or_default().into_owned();
        let prompts = batch.requests.len() as u32;
        let mean = |sum: u64| u32::try_from(sum / u64::from(prompts)).unwrap_or(u32::MAX);
        let mean_over = |measure: fn(&Sequence) -> u32| {
            let all = batch.requests.iter();
            mean(all.map(|request| u64::from(measure(request.prompt))).sum())
        };
        let profile = RequestProfile {
            prompt_tokens: mean_over(Sequence::tokens),
            blocks: mean_over(Sequence::blocks),
            max_reusable_blocks: mean_over(Sequence::max_reusable_blocks),
            ..self.request_profile(first, &self.assess(first))
        };
        let lower_bound = |index: &WorkerIndex| {
            let sum = costs.prefix_matches[*index as usize];
            let prefix_match = PrefixMatch {
                cached_blocks: sum.cached_blocks / prompts,
                active_blocks: sum.active_blocks / prompts,
            };
            let view = self.view(*index, prefix_match);
            self.selector.policy().lower_bound(&profile, &view)
        };
        let lower_bounds = remaining.iter().map(lower_bound);
        let mut by_bound: Vec<(f64, WorkerIndex)> =
            lower_bounds.zip(remaining.iter().copied()).collect();
        by_bound.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        by_bound.truncate(SHORTLIST_BY_BOUND);
        let mut shortlist: Vec<WorkerIndex> =
            by_bound.into_iter().map(|(_, index)| index).collect();
        remaining.retain(|index| !shortlist.contains(index));
        remaining.sort_unstable_by_key(|&index| {
            std::cmp::Reverse(costs.prefix_matches[index as usize].overlap())
        });
        shortlist.extend(remaining.into_iter().take(SHORTLIST_BY_OVERLAP));
        shortlist
    }

    /// Chooses the worker for the whole batch: an ejected one whose trial is due, or the policy's
    /// choice. Books nothing.
    ///
    /// # Errors
    /// As [`select_worker`](Self::select_worker).
    pub(super) fn select_for_batch(
        &mut self,
        batch: &BatchRequest<'_>,
        batch_costs: &BatchCosts,
    ) -> Result<WorkerId, SelectError> {
        let now = self.now;
        if let Some(worker) = self.workers.take_due_trial(&batch.requests[0], now) {
            return Ok(worker);
        }
        // The model and the exclusions are equal for all prompts.
        let first = &batch.requests[0];
        if self.selector.policy().batch_rule() == BatchRule::FirstPrompt {
            return self.select_worker(first, &self.assess(first));
        }
        let excluded = self.excluded(first);
        let eligible = self.workers.selectable(first, &excluded, now)?;
        let of_eligible = |sums: &[f64]| -> Vec<f64> {
            let sums = eligible.iter().map(|&index| sums[index as usize]);
            sums.collect()
        };
        let tie_breakers = of_eligible(&batch_costs.tie_breakers);
        let mut objective = of_eligible(&batch_costs.objective);
        let position = self.selector.select_by_costs(&mut objective, &tie_breakers);
        let selected = position.map(|position| eligible[position]);
        let selected = selected.ok_or(SelectError::NoWorker)?;
        self.workers.on_selected(selected, first);
        let worker = self.workers.by_index(selected);
        worker.map(|worker| worker.id).ok_or(SelectError::NoWorker)
    }
}
