//! The assessment of one request: its prefix on every worker, its expected output, and the load of the
//! workers.

use foresee_forecast::LengthClass;
use foresee_prefix::{PrefixMatches, TreePosition};

use crate::queue::QueueTicket;

/// Properties of one request that a decision reads.
#[derive(Debug)]
pub(crate) struct RequestAssessment {
    /// Prefix match on each worker, by worker index.
    pub(crate) prefix_matches: PrefixMatches,
    /// Position at which the prompt leaves the active tree, and the largest overlap of any worker.
    pub(crate) tree_position: TreePosition,
    /// Length class of the output.
    pub(crate) length_class: LengthClass,
    /// Expected number of output tokens.
    pub(crate) expected_output_tokens: u32,
    /// Mean fraction of their time that prefills take on the workers of the request's model.
    pub(crate) mean_prefill_utilisation: f64,
    /// Queue ticket, which decides how many queued requests this one overtakes.
    pub(crate) ticket: QueueTicket,
    /// Whether the request is the trial of an ejected worker, which is sent at once.
    pub(crate) is_trial: bool,
}
