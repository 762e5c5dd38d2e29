//! State of the router, behind one lock, and the steps of a decision: assess, select.
//!
//! Assessing, choosing and booking are one critical section. Work that is proportional to a prompt
//! (hashing, tokenizing, allocating) is done before the lock is taken. Deallocation is done after it
//! is released.

use std::time::Duration;

use foresee_forecast::OutputLengthModel;
use foresee_prefix::{PrefixMatch, PrefixState, WorkerIndex};
use smallvec::SmallVec;

use crate::assessment::RequestAssessment;
use crate::bookings::Bookings;
use crate::config::{RouterConfig, RouterTuning};
use crate::dispatcher::{Dispatcher, FleetView};
use crate::policy::kv_cost::KvCostInput;
use crate::policy::{Candidates, Decision, RequestProfile, Selector, WorkerView};
use crate::progress_estimator::ProgressEstimator;
use crate::queue::QueueTicket;
use crate::replication::{PlacedRequest, ReplicationRegret};
use crate::request::{PreparedRequest, SelectError};
use crate::worker_id::WorkerId;
use crate::workers::Workers;

/// State of a router: everything behind its lock.
#[derive(Debug)]
pub(crate) struct State {
    /// Configuration. Only its [tuning](RouterConfig::tuning) changes.
    pub(crate) config: RouterConfig,
    /// Workers, with their loads and their pending work.
    pub(crate) workers: Workers,
    /// Prefixes that requests pin and that workers cache.
    pub(crate) prefixes: PrefixState,
    /// Records of all bookings.
    pub(crate) bookings: Bookings,
    /// Forecast of output lengths.
    pub(crate) output_length: OutputLengthModel,
    /// Progress of requests whose responses are not streamed.
    pub(crate) progress: ProgressEstimator,
    /// The rule by which queued requests are sent.
    pub(crate) dispatcher: Dispatcher,
    /// Regret per prefix, which decides when to replicate it.
    pub(crate) replication_regret: ReplicationRegret,
    /// The policy, and the state of its choices.
    pub(crate) selector: Selector,
    /// Latest time that a caller has passed in. Never goes back.
    pub(crate) now: Duration,
}

impl State {
    /// Returns the state of a router without workers.
    pub(crate) fn new(config: RouterConfig) -> Self {
        Self {
            selector: Selector::new((config.policy.create)(), config.temperature, config.seed),
            dispatcher: Dispatcher::new(&config),
            workers: Workers::new(config.outlier.clone()),
            config,
            prefixes: PrefixState::default(),
            bookings: Bookings::default(),
            output_length: OutputLengthModel::default(),
            progress: ProgressEstimator::default(),
            replication_regret: ReplicationRegret::default(),
            now: Duration::ZERO,
        }
    }

    /// Changes the settings that can change while the router runs.
    pub(crate) fn set_tuning(&mut self, tuning: RouterTuning) {
        let RouterTuning {
            overlap_weight,
            ttft_weight,
            temperature,
            queue_limit,
        } = tuning;
        self.config.overlap_weight = overlap_weight;
        self.config.ttft_weight = ttft_weight;
        self.config.temperature = temperature;
        self.config.queue_limit = queue_limit;
        self.selector.set_temperature(temperature);
        self.dispatcher.set_limit(queue_limit);
    }

    /// Returns the queue ticket of a request that arrives now.
    pub(crate) fn ticket(&self, request: &PreparedRequest<'_>) -> QueueTicket {
        self.dispatcher
            .ticket(request.priority, request.tenant, self.now)
    }

    /// Returns what the dispatcher reads.
    pub(crate) fn fleet(&self) -> FleetView<'_> {
        FleetView {
            workers: &self.workers,
            prefixes: &self.prefixes,
            now: self.now,
        }
    }

    /// Assesses a request that arrives now: its prefix match on every worker, its expected output
    /// and its queue ticket.
    pub(crate) fn assess(&self, request: &PreparedRequest<'_>) -> RequestAssessment {
        self.assess_with_ticket(request, self.ticket(request))
    }

    /// Assesses a request with an existing queue ticket. Used when a booked request is rebalanced
    /// or retried, so that it keeps its position among the queued requests. Blocks that queued
    /// requests will pin count as active.
    pub(crate) fn assess_with_ticket(
        &self,
        request: &PreparedRequest<'_>,
        ticket: QueueTicket,
    ) -> RequestAssessment {
        self.assess_with(request, ticket, self.dispatcher.queued_total > 0)
    }

    /// Assesses a request as if it were dispatched now: blocks that only queued requests will pin do
    /// not count as active.
    pub(crate) fn assess_ignoring_queue(
        &self,
        request: &PreparedRequest<'_>,
        ticket: QueueTicket,
    ) -> RequestAssessment {
        self.assess_with(request, ticket, false)
    }

    /// Assesses a request. With `with_queued`, blocks that queued requests will pin count as active.
    fn assess_with(
        &self,
        request: &PreparedRequest<'_>,
        ticket: QueueTicket,
        with_queued: bool,
    ) -> RequestAssessment {
        let (prefix_matches, tree_position) =
            self.prefixes.match_prefix(request.prompt, with_queued);
        let length_class = request.length_class();
        RequestAssessment {
            prefix_matches,
            tree_position,
            length_class,
            expected_output_tokens: self.expected_output_tokens(request),
            mean_prefill_utilisation: self.mean_prefill_utilisation(request),
            ticket,
            is_trial: false,
        }
    }

    /// Returns the number of output tokens that are expected of a request.
    pub(crate) fn expected_output_tokens(&self, request: &PreparedRequest<'_>) -> u32 {
        self.output_length.remaining_with_hint(
            request.length_class(),
            0,
            request.max_tokens,
            request.expected_output_tokens,
        )
    }

    /// Returns the properties of a request that its costs depend on.
    pub(crate) fn request_profile<'a>(
        &self,
        request: &PreparedRequest<'a>,
        assessment: &RequestAssessment,
    ) -> RequestProfile<'a> {
        let prompt = request.prompt;
        RequestProfile {
            hashes: prompt.hashes(),
            prompt_tokens: prompt.tokens(),
            blocks: prompt.blocks(),
            max_reusable_blocks: prompt.max_reusable_blocks(),
            block_size: prompt.block_size().get(),
            output_tokens: f64::from(assessment.expected_output_tokens),
            overlap_weight: self.config.overlap_weight,
            ttft_weight: self.config.ttft_weight,
            mean_prefill_utilisation: assessment.mean_prefill_utilisation,
            choices: self.selector.choices(),
            ticket: assessment.ticket,
            now: self.now,
        }
    }

    /// Returns the mean fraction of their time that prefills take on the workers that serve the
    /// model of the request; 0 without such workers. Workers that serve one model share a latency
    /// model, so one of them stands for all.
    fn mean_prefill_utilisation(&self, request: &PreparedRequest<'_>) -> f64 {
        let eligible = self.workers.eligible(request.model_name());
        let first = eligible.and_then(|eligible| eligible.first());
        first.map_or(0.0, |&index| {
            self.workers.mean_prefill_utilisation(index, self.now)
        })
    }

    /// Returns the view of the worker at `index`, where the prompt has this prefix match.
    pub(crate) fn view(&self, index: WorkerIndex, prefix_match: PrefixMatch) -> WorkerView<'_> {
        WorkerView::new(&self.workers, index, prefix_match, self.now)
    }

    /// Returns the decision to place the request on the worker at `index`, according to
    /// `assessment`.
    pub(crate) fn decision(
        &self,
        index: WorkerIndex,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> Decision {
        let cost_input = KvCostInput::from(&self.request_profile(request, assessment));
        let projected_blocks = self.workers.loads[index as usize].projected_blocks();
        let prefix_match = assessment.prefix_matches[index as usize];
        Decision {
            cost: cost_input.cost(projected_blocks, prefix_match),
            prefix_match,
            best_overlap_blocks: assessment
                .tree_position
                .best_overlap
                .min(cost_input.max_reusable_blocks),
        }
    }

    /// Returns the indices of the excluded workers that still exist.
    pub(crate) fn excluded(&self, request: &PreparedRequest<'_>) -> SmallVec<[WorkerIndex; 4]> {
        request
            .excluded_workers
            .iter()
            .filter_map(|&id| self.workers.get(id).map(|_| id.index))
            .collect()
    }

    /// Chooses a worker for a request that arrives now: an ejected worker whose trial is due, the
    /// policy's choice, or an idle worker to which its prefix is replicated. Returns the worker and
    /// the assessment on which the choice is based. Books nothing, but adds the regret of this
    /// request to its prefix.
    ///
    /// # Errors
    /// As [`select_worker`](Self::select_worker).
    pub(crate) fn choose(
        &mut self,
        request: &PreparedRequest<'_>,
    ) -> Result<(WorkerId, RequestAssessment), SelectError> {
        let mut assessment = self.assess(request);
        let now = self.now;
        if let Some(worker) = self.workers.take_due_trial(request, now) {
            assessment.is_trial = true;
            return Ok((worker, assessment));
        }
        let selected = self.select_worker(request, &assessment)?;
        let worker = match self.preferred_worker(selected, &assessment, request) {
            Some(preferred) => preferred,
            None if request.only_worker.is_some() => selected,
            None => self
                .replicate_to(selected, &assessment, request)
                .unwrap_or(selected),
        };
        let profile = self.request_profile(request, &assessment);
        self.selector.on_placed(&profile, worker.index);
        Ok((worker, assessment))
    }

    /// Returns the idle worker to which the prefix of a request is replicated instead of sending the
    /// request to `chosen`: see [`ReplicationRegret::replicate`].
    fn replicate_to(
        &mut self,
        chosen: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
    ) -> Option<WorkerId> {
        // Taken out, because the rest of the state is read meanwhile.
        let mut regret = std::mem::take(&mut self.replication_regret);
        let replica = self.with_placed(chosen, assessment, request, |placed| {
            regret.replicate(placed)
        });
        self.replication_regret = regret;
        replica
    }

    /// Calls `decide` with a request and the worker that was chosen for it. Returns `None` if the
    /// policy does not replicate, or if there is a temperature.
    pub(crate) fn with_placed(
        &self,
        chosen: WorkerId,
        assessment: &RequestAssessment,
        request: &PreparedRequest<'_>,
        decide: impl FnOnce(PlacedRequest<'_>) -> Option<WorkerId>,
    ) -> Option<WorkerId> {
        if !self.selector.policy().replicates_prefixes() || self.config.temperature > 0.0 {
            return None;
        }
        decide(PlacedRequest {
            request,
            assessment,
            policy: self.selector.policy(),
            profile: &self.request_profile(request, assessment),
            chosen,
            excluded: &self.excluded(request),
            workers: &self.workers,
            prefixes: &self.prefixes,
            now: self.now,
        })
    }

    /// Selects a worker by the configured policy. Books nothing.
    ///
    /// # Errors
    /// As [`Workers::selectable`], and [`SelectError::NoWorker`] if no worker that may serve the
    /// request can be chosen.
    pub(crate) fn select_worker(
        &mut self,
        request: &PreparedRequest<'_>,
        assessment: &RequestAssessment,
    ) -> Result<WorkerId, SelectError> {
        let profile = self.request_profile(request, assessment);
        let excluded = self.excluded(request);
        if self.selector.policy().reads_bound_columns() {
            self.workers.refresh_bound_columns(self.now);
        }
        let eligible = self.workers.selectable(request, &excluded, self.now)?;
        let prefix_matches = &assessment.prefix_matches;
        let candidates = Candidates::new(&self.workers, &eligible, prefix_matches, self.now);
        let selected = self.selector.select(&profile, &candidates);
        let selected = selected.ok_or(SelectError::NoWorker)?;
        self.workers.on_selected(selected, request);
        let worker = self.workers.by_index(selected);
        worker.map(|worker| worker.id).ok_or(SelectError::NoWorker)
    }
}
