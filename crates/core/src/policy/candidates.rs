//! The workers among which a policy chooses, as rows over the router's columns.

use std::sync::LazyLock;
use std::time::Duration;

use foresee_forecast::{LatencyModel, SharedLatencyModel};
use foresee_prefix::{PrefixMatch, WorkerIndex};

use super::request_profile::RequestProfile;
use crate::load::Load;
use crate::outlier::FailureCharge;
use crate::pending_work::PendingWork;
use crate::queue::PrefillTotals;
use crate::workers::Workers;

/// Prompts of the same body that are placed on a worker before the present one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EarlierPrompts {
    /// Blocks that they add to the active blocks of the worker.
    pub(crate) active_blocks: u64,
    /// Their number and their prefill work.
    pub(crate) prefill: PrefillTotals,
}

/// One worker, with the prefix match of the request on it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WorkerView<'a> {
    /// Index of the worker, which stays the same as long as the worker exists.
    pub index: WorkerIndex,
    /// Hash of the worker's name. It does not change when other workers are added or removed.
    pub name_hash: u64,
    /// Number of requests booked on the worker, dispatched and queued.
    pub requests: u32,
    /// Blocks that these requests pin or will pin; shared blocks count once.
    pub active_blocks: u64,
    /// Prompt and output tokens of these requests, shared ones counted each time.
    pub context_tokens: u64,
    /// Prompt tokens that the worker has yet to compute: those of the requests without a first
    /// token that were not cached when the request was booked.
    pub pending_tokens: u64,
    /// Prefix match of the prompt on the worker.
    pub prefix_match: PrefixMatch,
    /// Charge for requests that the worker failed recently.
    pub failure_charge: FailureCharge,
    earlier: EarlierPrompts,
    pending: &'a PendingWork,
    /// All workers, which have the shared latency models; `None` for a view without a router.
    workers: Option<&'a Workers>,
}

/// Pending work of an idle worker.
static NO_WORK: LazyLock<PendingWork> = LazyLock::new(PendingWork::default);
/// Latency model that has learned nothing.
static NO_LATENCY: LazyLock<SharedLatencyModel> = LazyLock::new(SharedLatencyModel::default);

impl WorkerView<'_> {
    /// Returns an idle worker without caches. For tests of policies.
    #[must_use]
    pub fn idle(index: WorkerIndex) -> Self {
        Self {
            index,
            name_hash: 0,
            requests: 0,
            active_blocks: 0,
            context_tokens: 0,
            pending_tokens: 0,
            prefix_match: PrefixMatch::default(),
            failure_charge: FailureCharge::default(),
            earlier: EarlierPrompts::default(),
            pending: &NO_WORK,
            workers: None,
        }
    }
}

impl<'a> WorkerView<'a> {
    /// Returns the view of the worker at `index`, where the prompt has this prefix match. The view
    /// on the index of a removed worker is that on an empty one. Panics if no worker ever had the
    /// index.
    #[inline]
    pub(crate) fn new(
        workers: &'a Workers,
        index: WorkerIndex,
        prefix_match: PrefixMatch,
        now: Duration,
    ) -> Self {
        let load = workers.loads[index as usize];
        let pending = &workers.pending_work[index as usize];
        Self {
            index,
            name_hash: load.name_hash,
            requests: load.requests,
            active_blocks: load.projected_blocks(),
            context_tokens: load.context_tokens,
            pending_tokens: pending.prefill_work.new_tokens,
            prefix_match,
            failure_charge: workers.outliers.charge(index, now),
            earlier: EarlierPrompts::default(),
            pending,
            workers: Some(workers),
        }
    }

    /// Returns the view after `earlier` prompts were placed on the worker.
    pub(crate) fn after(self, earlier: EarlierPrompts) -> Self {
        Self {
            requests: self.requests + earlier.prefill.requests,
            active_blocks: self.active_blocks + earlier.active_blocks,
            pending_tokens: self.pending_tokens + earlier.prefill.work.new_tokens,
            earlier,
            ..self
        }
    }

    /// Returns the number of requests booked on the worker, with its failure charge.
    #[must_use]
    pub fn charged_requests(&self) -> f64 {
        f64::from(self.requests) + self.failure_charge.requests
    }

    /// Returns the leading blocks of the prompt that the worker does not have to compute.
    #[must_use]
    pub fn overlap_blocks(&self, request: &RequestProfile<'_>) -> u32 {
        self.prefix_match.overlap().min(request.max_reusable_blocks)
    }

    /// Returns the tokens of the prompt that the worker has to compute.
    #[must_use]
    pub fn new_tokens(&self, request: &RequestProfile<'_>) -> u32 {
        request.prompt_tokens - self.overlap_blocks(request) * request.block_size
    }

    /// Returns the prompts of the same body that are placed on the worker before this one.
    pub(crate) fn earlier(&self) -> EarlierPrompts {
        self.earlier
    }

    /// Returns the pending work of the worker, without earlier prompts of the same body.
    pub(crate) fn pending(&self) -> &'a PendingWork {
        self.pending
    }

    /// Returns the load of the worker, without earlier prompts of the same body.
    pub(crate) fn load(&self) -> Load {
        Load {
            active_blocks: self.active_blocks - self.earlier.active_blocks,
            context_tokens: self.context_tokens,
            requests: self.requests - self.earlier.prefill.requests,
            ..Load::default()
        }
    }

    /// Returns the latency model of the worker at `now`.
    pub(crate) fn latency_model(&self, now: Duration) -> LatencyModel {
        let shared = match self.workers {
            Some(workers) => workers.latency_model(self.pending),
            None => &*NO_LATENCY,
        };
        self.pending.latency.latency_model(shared, now)
    }
}

/// Workers among which a policy chooses.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a>(Rows<'a>);

#[derive(Clone, Copy, Debug)]
enum Rows<'a> {
    /// Workers of the router.
    Fleet {
        workers: &'a Workers,
        /// Candidates, by ascending index.
        indices: &'a [WorkerIndex],
        /// Prefix matches by worker index.
        prefix_matches: &'a [PrefixMatch],
        now: Duration,
    },
    /// Given views.
    Views(&'a [WorkerView<'a>]),
}

impl<'a> From<&'a [WorkerView<'a>]> for Candidates<'a> {
    fn from(views: &'a [WorkerView<'a>]) -> Self {
        Self(Rows::Views(views))
    }
}

impl<'a> Candidates<'a> {
    /// Returns the workers at `indices`, with prefix matches by worker index.
    pub(crate) fn new(
        workers: &'a Workers,
        indices: &'a [WorkerIndex],
        prefix_matches: &'a [PrefixMatch],
        now: Duration,
    ) -> Self {
        Self(Rows::Fleet {
            workers,
            indices,
            prefix_matches,
            now,
        })
    }

    /// Returns the number of candidates.
    #[must_use]
    pub fn len(&self) -> usize {
        match self.0 {
            Rows::Fleet { indices, .. } => indices.len(),
            Rows::Views(views) => views.len(),
        }
    }

    /// Returns whether there is no candidate.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the candidate at this position. Panics if there are fewer.
    #[inline]
    pub(crate) fn at(&self, position: usize) -> WorkerView<'a> {
        match self.0 {
            Rows::Fleet {
                workers,
                indices,
                prefix_matches,
                now,
            } => {
                let index = indices[position];
                WorkerView::new(workers, index, prefix_matches[index as usize], now)
            }
            Rows::Views(views) => views[position],
        }
    }

    /// Returns the workers of the router, the indices of the candidates among them, and the prefix
    /// matches by worker index. `None` for candidates that are given as views.
    pub(crate) fn fleet(&self) -> Option<(&'a Workers, &'a [WorkerIndex], &'a [PrefixMatch])> {
        match self.0 {
            Rows::Fleet {
                workers,
                indices,
                prefix_matches,
                ..
            } => Some((workers, indices, prefix_matches)),
            Rows::Views(_) => None,
        }
    }

    /// Returns the load and the prefix match of each candidate, if all that a policy needs is in
    /// them: the candidates are workers of the router, and no worker has a failure charge. A loop
    /// over them reads a tenth of the memory that a loop over the views reads.
    pub(crate) fn loads(&self) -> Option<impl Iterator<Item = (Load, PrefixMatch)> + use<'a>> {
        let (workers, indices, prefix_matches) = self.fleet()?;
        let loads = &workers.loads[..];
        let loads = indices.iter().map(|&index| {
            let index = index as usize;
            (loads[index], prefix_matches[index])
        });
        (!workers.outliers.has_charges()).then_some(loads)
    }

    /// Returns the candidates in their order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = WorkerView<'a>> + Clone + use<'a> {
        let candidates = *self;
        (0..self.len()).map(move |position| candidates.at(position))
    }
}
