//! Requests to a router, and its replies: errors and explanations.

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

use crate::active_tree::PrefixMatch;
use crate::forecast::output_length::LengthClass;
use crate::kv_cost::KvCost;
use crate::marginal_delay::MarginalDelay;
use crate::policy::Policy;
use crate::sequence::Sequence;
use crate::workers::WorkerId;

/// Reason why no worker was chosen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RouteError {
    /// Workers are known, and none of them serves this model.
    #[error("no worker serves the model `{0}`")]
    UnknownModel(String),
    /// Every worker that serves the model is unhealthy, draining, or was excluded.
    #[error("no worker is available for the model `{0}`")]
    NoWorker(String),
}

/// Request to be routed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Model name; an empty name accepts any worker.
    pub model: &'a str,
    /// Prompt, divided into blocks and hashed.
    pub prompt: &'a Sequence,
    /// Maximum number of output tokens, if the client sets one.
    pub max_tokens: Option<u32>,
    /// Whether the engine generates `max_tokens` tokens whatever the model predicts (`ignore_eos`).
    ///
    /// SGLang reserves more memory for such a request. Forecasts of output lengths ignore the
    /// field: only benchmarks set it, and they should measure what other requests would get.
    pub ignore_eos: bool,
    /// Number of output tokens that the client expects.
    ///
    /// The number is a hint. The forecast combines it with the observed lengths of requests whose
    /// hint had a similar magnitude; the more of them there are, the less the hint itself counts.
    pub expected_output_tokens: Option<u32>,
    /// Whether the request may call tools. Outputs of such requests have other lengths.
    pub has_tools: bool,
    /// Whether the response is streamed, so that the caller will report its tokens. Otherwise the
    /// progress of the request is estimated.
    pub is_streaming: bool,
    /// Priority in the worker's queue; requests with lower values are dispatched first.
    pub priority: i32,
    /// Tenant of the request, for [`FairByTenant`](crate::queue::QueueOrder::FairByTenant).
    pub tenant: u64,
    /// Workers that must not be chosen, for example because they already failed the request.
    pub excluded_workers: &'a [WorkerId],
}

impl<'a> Request<'a> {
    /// Returns a streamed request for any model, with defaults for everything else.
    #[must_use]
    pub fn new(sequence: &'a Sequence) -> Self {
        Self {
            model: "",
            prompt: sequence,
            max_tokens: None,
            ignore_eos: false,
            expected_output_tokens: None,
            has_tools: false,
            is_streaming: true,
            priority: 0,
            tenant: 0,
            excluded_workers: &[],
        }
    }

    /// Returns the length class: the model, the magnitudes (powers of two) of the output limit and
    /// of the client's expectation, and whether tools may be called. A missing number and 0 have
    /// the same magnitude.
    pub(crate) fn length_class(&self) -> LengthClass {
        let model = rapidhash_v3_seeded(self.model.as_bytes(), &DEFAULT_RAPID_SECRETS);
        let magnitude = |tokens: Option<u32>| {
            tokens.map_or(0, |tokens| u64::BITS - u64::from(tokens).leading_zeros())
        };
        let lengths = magnitude(self.max_tokens) | magnitude(self.expected_output_tokens) << 8;
        model ^ u64::from(lengths | u32::from(self.has_tools) << 16)
    }
}

/// One worker in an [`Explanation`].
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Worker id.
    pub id: WorkerId,
    /// Worker name.
    pub name: String,
    /// Number of requests booked on the worker.
    pub requests: u32,
    /// Active blocks of the worker without this request. Blocks that queued requests will pin are
    /// included.
    pub active_blocks: u64,
    /// Prefix match of the prompt on the worker.
    pub prefix_match: PrefixMatch,
    /// Cost of the request on the worker, in blocks.
    pub cost: KvCost,
    /// Cost of the request on the worker, in seconds.
    pub delay: MarginalDelay,
    /// Probability that the policy chooses this worker now, before replication.
    pub probability: f64,
}

/// Decision that the router would make now.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Policy that decides.
    pub policy: Policy,
    /// Weight of computing a prompt: see
    /// [`RouterConfig::overlap_weight`](crate::router::RouterConfig::overlap_weight).
    pub overlap_weight: f64,
    /// Weight of one second of the request's time to first token, relative to one second of any
    /// other delay.
    pub ttft_weight: f64,
    /// Temperature of the choice.
    pub temperature: f64,
    /// Idle worker that takes the request instead of the policy's choice, so that it computes and
    /// caches the request's prefix. Set once the regret for the prefix reaches the cost of
    /// computing it.
    pub replicates_prefix_to: Option<WorkerId>,
    /// Every eligible worker, in the order in which the workers were added.
    pub candidates: Vec<Candidate>,
}

impl Explanation {
    /// Returns the worker that would take the request: the target of the replication, if there is
    /// one, and otherwise the most probable choice of the policy. Of several with the same
    /// probability, returns the worker that was added last. `None` if there are no candidates.
    #[must_use]
    pub fn expected_choice(&self) -> Option<&Candidate> {
        let by_id = |id| self.candidates.iter().find(|candidate| candidate.id == id);
        let most_probable = self
            .candidates
            .iter()
            .max_by(|a, b| a.probability.total_cmp(&b.probability));
        self.replicates_prefix_to.and_then(by_id).or(most_probable)
    }
}
