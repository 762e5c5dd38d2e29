//! The interface of a policy.

use std::fmt;

use foresee_prefix::WorkerIndex;

use super::candidates::{Candidates, WorkerView};
use super::request_profile::RequestProfile;
use crate::queue::QueueOrder;

/// Rule that chooses a worker: it gives each candidate a cost, and the candidate of least cost is
/// chosen. Among equal costs the [tie breaker](Self::tie_breaker) decides, and then chance.
///
/// Costs have any unit: they are compared with each other only. A cost that is not a number counts
/// as infinite. Only [`costs`](Self::costs) has to be written. Explanations, the temperature,
/// affinity and replication work with the costs of any policy.
///
/// A policy runs under the router's lock, so a cost must not take time in proportion to the prompt
/// or to the number of workers.
pub trait Policy: fmt::Debug + Send {
    /// Appends to `costs` the cost of the request on each candidate, in the order of `candidates`.
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    );

    /// Appends costs as [`costs`](Self::costs), but a candidate whose cost exceeds that of another
    /// one may get a lower bound instead, if that exceeds the least cost as well. Overridden by
    /// policies that can rule out a candidate at less expense.
    fn costs_or_bounds(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        self.costs(request, candidates, costs);
    }

    /// Returns whether [`costs_or_bounds`](Self::costs_or_bounds) reads the columns from which the
    /// router derives lower bounds of the marginal delay. Only then are they kept up to date.
    fn reads_bound_columns(&self) -> bool {
        false
    }

    /// Returns the cost of the request on one worker, without regard to other candidates.
    fn cost(&self, request: &RequestProfile<'_>, worker: &WorkerView<'_>) -> f64 {
        let mut costs = Vec::with_capacity(1);
        self.costs(request, &Candidates::from(&[*worker][..]), &mut costs);
        costs.first().copied().unwrap_or(f64::INFINITY)
    }

    /// Returns a lower bound of the cost that takes less time to compute. Ranks the workers of a
    /// large fleet for [`BatchRule::SumOverShortlist`].
    fn lower_bound(&self, request: &RequestProfile<'_>, worker: &WorkerView<'_>) -> f64 {
        self.cost(request, worker)
    }

    /// Returns a number that decides between workers of equal cost; the least wins.
    fn tie_breaker(&self, _request: &RequestProfile<'_>, _worker: &WorkerView<'_>) -> f64 {
        0.0
    }

    /// Returns the number of candidates among which the policy chooses.
    fn scope(&self) -> Scope {
        Scope::All
    }

    /// Returns how a worker for a body with several prompts is chosen.
    fn batch_rule(&self) -> BatchRule {
        BatchRule::FirstPrompt
    }

    /// Returns the part of the costs on this worker that does not depend on the request. It counts
    /// once in the sum over the prompts of a body.
    fn standing_cost(&self, _worker: &WorkerView<'_>) -> f64 {
        0.0
    }

    /// Returns whether an idle worker is to compute a popular prefix once more, when requests have
    /// lost enough by its absence.
    fn replicates_prefixes(&self) -> bool {
        false
    }

    /// Records that the request, which arrives now, is placed on `worker`. For policies that keep a
    /// history. Is not called for a trial of an ejected worker, nor for a body with several prompts.
    fn on_placed(&mut self, _request: &RequestProfile<'_>, _worker: WorkerIndex) {}
}

/// Candidates among which a policy chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All candidates.
    All,
    /// Two different candidates that are drawn at random for each request.
    RandomTwo,
}

/// Rule by which a worker for a body with several prompts is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchRule {
    /// The worker for the first prompt takes all.
    FirstPrompt,
    /// Least sum of the costs of the prompts, each placed after the ones before it. The policy is
    /// passed the workers of a large fleet in parts, so costs must not depend on other candidates.
    Sum,
    /// As `Sum`, but in a large fleet only over a shortlist of workers with little cost for the mean
    /// prompt. For costs that take long to compute.
    SumOverShortlist,
}

/// A policy by its name: an entry of [`ALL`](super::ALL), or one that a caller defines.
///
/// Two entries with one name are equal.
#[derive(Clone, Copy)]
pub struct NamedPolicy {
    /// Name in configuration: lower case, with hyphens.
    pub name: &'static str,
    /// One line on how the policy chooses, for help texts.
    pub description: &'static str,
    /// Queue order that suits the policy.
    pub default_queue: Option<QueueOrder>,
    /// Creates the policy, without any history.
    pub create: fn() -> Box<dyn Policy>,
}

impl PartialEq for NamedPolicy {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for NamedPolicy {}

impl fmt::Debug for NamedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NamedPolicy").field(&self.name).finish()
    }
}

impl fmt::Display for NamedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}
