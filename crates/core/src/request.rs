//! Requests to a router, and its replies: errors and explanations.

use std::num::NonZeroU32;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use foresee_forecast::LengthClass;
use foresee_prefix::PrefixMatch;
use foresee_prefix::sequence::Sequence;

use crate::model_name::{ModelName, hash_model_name};
use crate::outlier::Restriction;
use crate::policy::NamedPolicy;
use crate::policy::kv_cost::KvCost;
use crate::policy::marginal_delay::MarginalDelay;
use crate::worker_id::WorkerId;

/// Maximum length of a model name, in bytes. A request with a longer name is refused, because the
/// name would be compared and copied at every step.
pub const MAX_MODEL_NAME_BYTES: usize = 1024;

/// Reason why a request was not booked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RouteError {
    /// Workers are known, and none of them serves this model; or the name is longer than
    /// [`MAX_MODEL_NAME_BYTES`], of which only the beginning is given here.
    #[error("no worker serves the model `{0}`")]
    UnknownModel(String),
    /// Every worker that serves the model is unhealthy, draining, or was excluded.
    #[error("no worker is available for the model `{0}`")]
    NoWorker(String),
    /// Every worker that could be chosen has replied 429 or 503 and gets no requests for a while.
    #[error("every worker is at its limit: retry after {} s", retry_after.as_secs_f64().ceil())]
    Backpressure {
        /// Time until the first of them gets requests again.
        retry_after: Duration,
    },
    /// The request would have to be queued, and
    /// [`RouterConfig::queue_limit`](crate::router::RouterConfig::queue_limit) requests are queued
    /// already.
    #[error("the queue is full: {limit} requests are waiting")]
    QueueFull {
        /// Maximum number of queued requests.
        limit: usize,
    },
    /// The body has more prompts than [`MAX_BATCH_PROMPTS`](crate::batch::MAX_BATCH_PROMPTS).
    #[error("the body has {prompts} prompts; at most {limit} are booked in one batch")]
    TooManyPrompts {
        /// Number of prompts of the body.
        prompts: usize,
        /// Maximum number of prompts.
        limit: usize,
    },
    /// The prompt was divided into blocks of another size than the router's.
    #[error("the prompt has blocks of {prompt} tokens; the router has blocks of {router} tokens")]
    BlockSizeMismatch {
        /// Tokens per block of the prompt.
        prompt: NonZeroU32,
        /// Tokens per block of the router.
        router: NonZeroU32,
    },
}

/// Reason why a request was not booked, without the model name: it is copied only after the lock was
/// released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SelectError {
    /// See [`RouteError::UnknownModel`].
    UnknownModel,
    /// See [`RouteError::NoWorker`].
    NoWorker,
    /// See [`RouteError::Backpressure`].
    Backpressure {
        /// Time until the first worker gets requests again.
        retry_after: Duration,
    },
    /// See [`RouteError::QueueFull`].
    QueueFull {
        /// Maximum number of queued requests.
        limit: usize,
    },
}

impl SelectError {
    /// Returns the error for a request for `model`.
    pub(crate) fn for_model(self, model: &str) -> RouteError {
        match self {
            Self::UnknownModel => RouteError::UnknownModel(model.to_owned()),
            Self::NoWorker => RouteError::NoWorker(model.to_owned()),
            Self::Backpressure { retry_after } => RouteError::Backpressure { retry_after },
            Self::QueueFull { limit } => RouteError::QueueFull { limit },
        }
    }
}

/// Request to be routed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Model name of at most [`MAX_MODEL_NAME_BYTES`]; an empty name accepts any worker.
    pub model: &'a str,
    /// Prompt, divided into blocks of the router's block size and hashed.
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
    /// Worker that alone can serve the request, because it alone has something that the request
    /// continues. `None` if any worker can.
    pub only_worker: Option<WorkerId>,
    /// Worker that has probably cached the part of the prompt that is not hashed. The request goes
    /// there if that saves more than the worker's load costs.
    pub preferred_worker: Option<WorkerId>,
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
            only_worker: None,
            preferred_worker: None,
        }
    }
}

/// Request whose model name is hashed and checked, so that no work under the router's lock is
/// proportional to the name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PreparedRequest<'a> {
    request: Request<'a>,
    model_hash: u64,
    length_class: LengthClass,
}

impl<'a> Deref for PreparedRequest<'a> {
    type Target = Request<'a>;

    #[inline]
    fn deref(&self) -> &Request<'a> {
        &self.request
    }
}

impl<'a> PreparedRequest<'a> {
    /// Checks a request and hashes its model name. Does not need the router's lock. `block_size` is
    /// that of the router.
    ///
    /// # Errors
    /// [`RouteError::UnknownModel`] if the model name is too long,
    /// [`RouteError::BlockSizeMismatch`] if the prompt has another block size.
    pub(crate) fn new(request: &Request<'a>, block_size: NonZeroU32) -> Result<Self, RouteError> {
        if request.model.len() > MAX_MODEL_NAME_BYTES {
            let is_boundary = |&end: &usize| request.model.is_char_boundary(end);
            let end = (0..=MAX_MODEL_NAME_BYTES).rev().find(is_boundary);
            let beginning = &request.model[..end.unwrap_or(0)];
            return Err(RouteError::UnknownModel(beginning.to_owned()));
        }
        check_block_size(request.prompt, block_size)?;
        let model_hash = hash_model_name(request.model);
        Ok(Self::with_model_hash(*request, model_hash))
    }

    /// Returns a request that was checked before. `model_hash` is that of its model name.
    pub(crate) fn with_model_hash(request: Request<'a>, model_hash: u64) -> Self {
        let magnitude = |tokens: Option<u32>| {
            tokens.map_or(0, |tokens| u64::BITS - u64::from(tokens).leading_zeros())
        };
        let lengths =
            magnitude(request.max_tokens) | magnitude(request.expected_output_tokens) << 8;
        Self {
            request,
            model_hash,
            length_class: model_hash ^ u64::from(lengths | u32::from(request.has_tools) << 16),
        }
    }

    /// Returns the same request for another prompt of the same block size.
    pub(crate) fn with_prompt(self, prompt: &'a Sequence) -> Self {
        Self {
            request: Request {
                prompt,
                ..self.request
            },
            ..self
        }
    }

    /// Returns the hash of the model name.
    pub(crate) fn model_hash(&self) -> u64 {
        self.model_hash
    }

    /// Returns the model name and its hash.
    pub(crate) fn model_name(&self) -> ModelName<'a> {
        ModelName {
            name: self.request.model,
            hash: self.model_hash,
        }
    }

    /// Returns the length class: the model, the magnitudes (powers of two) of the output limit and
    /// of the client's expectation, and whether tools may be called. A missing number and 0 have
    /// the same magnitude.
    pub(crate) fn length_class(&self) -> LengthClass {
        self.length_class
    }
}

/// Checks that a prompt has the block size of the router.
///
/// # Errors
/// [`RouteError::BlockSizeMismatch`] if it has another.
pub(crate) fn check_block_size(
    prompt: &Sequence,
    block_size: NonZeroU32,
) -> Result<(), RouteError> {
    if prompt.block_size() == block_size {
        return Ok(());
    }
    Err(RouteError::BlockSizeMismatch {
        prompt: prompt.block_size(),
        router: block_size,
    })
}

/// One worker in an [`Explanation`].
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Worker id.
    pub id: WorkerId,
    /// Worker name.
    pub name: Arc<str>,
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
    /// Cost that the policy compares, in its own unit.
    pub policy_cost: f64,
    /// Probability that the policy chooses this worker now, before replication.
    pub probability: f64,
}

/// Decision that the router would make now.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Policy that decides.
    pub policy: NamedPolicy,
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
    /// Ejected worker that takes the request as a trial instead of the policy's choice.
    pub trial_on: Option<WorkerId>,
    /// Every worker among which the policy chooses, in the order in which the workers were added.
    pub candidates: Vec<Candidate>,
    /// Eligible workers that are passed over, in the order in which the workers were added.
    pub passed_over: Vec<PassedOver>,
}

/// An eligible worker that is passed over, in an [`Explanation`].
#[derive(Clone, Debug, PartialEq)]
pub struct PassedOver {
    /// Worker id.
    pub id: WorkerId,
    /// Worker name.
    pub name: Arc<str>,
    /// Reason.
    pub restriction: Restriction,
}

impl Explanation {
    /// Returns the worker that would take the request: the target of the replication, if there is
    /// one, and otherwise the most probable choice of the policy. Of several with the same
    /// probability, returns the worker that was added last. `None` if there are no candidates, or
    /// if the request is a [trial](Self::trial_on) on a worker that is no candidate.
    #[must_use]
    pub fn expected_choice(&self) -> Option<&Candidate> {
        let by_id = |id| self.candidates.iter().find(|candidate| candidate.id == id);
        if let Some(trial) = self.trial_on {
            return by_id(trial);
        }
        let most_probable = self
            .candidates
            .iter()
            .max_by(|a, b| a.probability.total_cmp(&b.probability));
        self.replicates_prefix_to.and_then(by_id).or(most_probable)
    }
}
