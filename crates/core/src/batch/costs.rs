//! Costs of a batch on each worker.
//!
//! The delays of 64 prompts on 512 workers take milliseconds to compute. So they are computed in
//! several critical sections and, in a large fleet, only for a shortlist of workers.

use std::time::Duration;

use crate::active_tree::{PrefixMatch, WorkerIndex};
use crate::batch::BatchRequest;
use crate::batch_costs::BatchCosts;
use crate::critical_section::{CriticalSection, SharedState};
use crate::marginal_delay::RequestProfile;
use crate::policy::{CostSource, Policy};
use crate::request::SelectError;
use crate::sequence::Sequence;
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
/// Number of workers of least delay, by a lower bound, in the shortlist of a larger fleet.
const SHORTLIST_BY_DELAY: usize = 24;
/// Number of further workers in the shortlist, with the most overlap.
const SHORTLIST_BY_OVERLAP: usize = 8;

/// Workers for which the delays of a batch are computed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Evaluation {
    /// All workers.
    All,
    /// The workers that may have the least delay.
    Shortlist,
    /// One worker.
    Only(WorkerIndex),
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
        evaluation: Evaluation,
    ) -> (BatchCosts, CriticalSection<'_>) {
        let mut section = PausingSection {
            state: self.lock(),
            now,
            work: 0,
        };
        section.state.advance_to(now);
        let mut costs = BatchCosts::new(&section.state.workers.loads);
        let workers = section.state.workers.index_len();
        let uses_delays = section.state.config.policy == Policy::MarginalDelay;
        let needs_shortlist = uses_delays && workers > MAX_WORKERS_EVALUATED;
        let evaluated: Vec<WorkerIndex> = match evaluation {
            Evaluation::Only(worker) => vec![worker],
            Evaluation::Shortlist if needs_shortlist || !uses_delays => Vec::new(),
            Evaluation::All | Evaluation::Shortlist => (0..workers as WorkerIndex).collect(),
        };
        section.add_prompts(batch, &evaluated, true, &mut costs);
        if needs_shortlist && matches!(evaluation, Evaluation::Shortlist) {
            section.begin(workers, &mut costs);
            let shortlist = section.state.shortlist(batch, &costs);
            section.add_prompts(batch, &shortlist, false, &mut costs);
        }
        (costs, section.state)
    }
}

impl PausingSection<'_> {
    /// Adds the costs of all prompts of the batch: those in blocks on all workers, if `adds_blocks`,
    /// and those in seconds on the `evaluated` workers.
    fn add_prompts(
        &mut self,
        batch: &BatchRequest<'_>,
        evaluated: &[WorkerIndex],
        adds_blocks: bool,
        costs: &mut BatchCosts,
    ) {
        for &index in evaluated {
            costs.objective[index as usize] = 0.0;
        }
        for (request, &shared) in batch.requests.iter().zip(&batch.shared_with_earlier) {
            let workers = self.state.workers.index_len();
            self.begin(DELAYS_PER_PROMPT + workers / WORKERS_PER_DELAY, costs);
            let assessment = self.state.assess(request);
            let profile = self.state.request_profile(request, &assessment);
            let mut prefix_matches = assessment.prefix_matches;
            self.state.share_earlier(shared, &mut prefix_matches);
            if adds_blocks {
                costs.add_blocks(self.state.kv_cost_input(request), &prefix_matches);
            }
            for part in evaluated.chunks(MAX_DELAYS_PER_LOCK / 2) {
                self.begin(part.len(), costs);
                for &index in part {
                    self.state
                        .add_delay(&profile, index, prefix_matches[index as usize], costs);
                }
            }
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

    /// Adds the delay of the next prompt on the worker at `index`.
    fn add_delay(
        &self,
        profile: &RequestProfile,
        index: WorkerIndex,
        prefix_match: PrefixMatch,
        costs: &mut BatchCosts,
    ) {
        let sum = &mut costs.delays[index as usize];
        let mut delay = self.workers.marginal_delay(profile, index, prefix_match);
        // The failure charge is that of the worker, and counts once.
        if sum.failure_charge > 0.0 {
            delay.failure_charge = 0.0;
        }
        // Each prompt also waits for the prefills of the prompts before it.
        delay.queue_wait += sum.prefill;
        costs.objective[index as usize] += profile.total(&delay);
        *sum += delay;
    }

    /// Returns the workers on which the batch may have the least delay: eligible workers
    /// with the least lower bound for its mean prompt, and some of the others, with the most overlap.
    /// `costs` has its prefix matches.
    fn shortlist(&self, batch: &BatchRequest<'_>, costs: &BatchCosts) -> Vec<WorkerIndex> {
        let first = &batch.requests[0];
        let excluded = self.excluded(first);
        let eligible = self.workers.selectable(first, &excluded, self.now);
        let eligible = eligible.unwrap_or_default().into_owned().into_iter();
        let mut remaining: Vec<WorkerIndex> =
            eligible.filter(|index| !excluded.contains(index)).collect();
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
            let workers = &self.workers;
            workers.marginal_delay_or_bound(f64::NEG_INFINITY, &profile, *index, prefix_match)
        };
        let bounds = remaining.iter().map(lower_bound);
        let mut by_bound: Vec<(f64, WorkerIndex)> = bounds.zip(remaining.iter().copied()).collect();
        by_bound.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        by_bound.truncate(SHORTLIST_BY_DELAY);
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
    /// As [`select_with_costs`](Self::select_with_costs).
    pub(super) fn select_for_batch(
        &mut self,
        batch: &BatchRequest<'_>,
        batch_costs: &BatchCosts,
    ) -> Result<WorkerId, SelectError> {
        let now = self.now;
        if let Some(worker) = self.workers.take_due_trial(&batch.requests[0], now) {
            return Ok(worker);
        }
        // The model and the exclusions are equal for all prompts. Consistent hashing uses the first
        // prompt.
        self.select_with_costs(
            &batch.requests[0],
            CostSource::Precomputed(&batch_costs.costs, &batch_costs.objective),
        )
    }
}
