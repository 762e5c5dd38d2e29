//! The id of a worker.

use foresee_prefix::WorkerIndex;

/// Identity of one worker. Never reused: a worker that is removed and added again, even under the
/// same name, gets another id. Ids are ordered by when the workers were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId {
    /// Number of the worker, counted over all that were ever added.
    pub(crate) generation: u64,
    /// Position in the router's arrays, reused after removal.
    pub(crate) index: WorkerIndex,
}
