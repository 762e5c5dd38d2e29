//! Context of a request while its response is observed.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use foresee_core::batch::Batch;
use foresee_core::router::Router;
use foresee_core::text_ratios::TextRatios;
use foresee_engine::output_text::Continuation;
use foresee_engine::request::{Endpoint, PromptSequences};

use crate::access_log::AccessEntry;
use crate::clock::Clock;
use crate::fleet_demand::FleetDemand;
use crate::keys::KeyGuard;
use crate::metrics::{Exemplar, Metrics};
use crate::parse_pool::ParsePool;
use crate::placement::affinity::Affinity;
use crate::placement::decision_log::DecisionTicket;
use crate::placement::ended_requests::EndedRequests;
use crate::placement::tokenization::PromptTokenizer;
use crate::recorder::Recorder;
use crate::traces::request_trace::RequestTrace;
use crate::workers::worker::Worker;

/// Parts of the gateway that the observations of all responses use.
#[derive(Debug)]
pub(crate) struct Observation {
    pub(super) router: Router,
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    /// Threads that parse long responses.
    pub(super) parse_pool: Arc<ParsePool>,
    /// Workers that remember stored responses, sessions and media.
    pub(super) affinity: Arc<Affinity>,
    /// Learned bytes per token of each model.
    pub(super) text_ratios: Arc<TextRatios>,
    pub(super) tokenizer: Option<Arc<PromptTokenizer>>,
    /// Writer of `--record`.
    pub(super) recorder: Option<Arc<Recorder>>,
    /// Load of the fleet, for autoscaling.
    pub(super) demand: Arc<FleetDemand>,
    /// Requests that ended, if the dashboard shows them.
    pub(super) ended_requests: Option<Arc<EndedRequests>>,
    /// The router's block size.
    pub(super) block_size: NonZeroU32,
    /// Whether workers share cached blocks between requests, unless their descriptions say otherwise.
    pub(super) prefix_caching: bool,
    /// Whether clients see the names of workers in error messages.
    pub(super) exposes_workers: bool,
}

/// Context of a request, for the observation of its response.
#[derive(Debug)]
pub(crate) struct RequestContext {
    /// Parts of the gateway that all observations share.
    pub(crate) shared: Arc<Observation>,
    /// Worker that responds.
    pub(crate) worker: Arc<Worker>,
    /// One booking for each choice; the last one may stand for several.
    pub(crate) batch: Batch,
    /// The request in the limits of its key, if it has one.
    pub(crate) key: Option<KeyGuard>,
    /// Line of the access log, if there is one.
    pub(crate) access: Option<Box<AccessEntry>>,
    /// Spans of the request, if it is sampled.
    pub(crate) trace: Option<Box<RequestTrace>>,
    /// Place of the outcome in the log of decisions, if this one was recorded.
    pub(crate) decision: Option<DecisionTicket>,
    /// API that the request called.
    pub(crate) endpoint: Endpoint,
    /// When the request arrived, by the gateway's clock.
    pub(crate) arrived_at: Duration,
    /// Request id that the client and the worker know, for log lines.
    pub(crate) request_id: String,
    /// Model as workers serve it; if the request named none, the model that all workers list first.
    pub(crate) model: String,
    /// Whether the request has one prompt, all of it hashed, and one output, so that the reported
    /// usage can be compared with the prediction.
    pub(crate) is_single: bool,
    /// Tokens of all prompts, counted or estimated.
    pub(crate) prompt_tokens: u32,
    /// Where the output continues the prompt's sequence, if that is known.
    pub(crate) continuation: Option<Continuation>,
    /// Prompt tokens that the worker has cached according to its KV events; `None` if the response
    /// cannot verify that number.
    pub(crate) predicted_tokens: Option<u32>,
    /// Bytes of prompt text, from which bytes per token are learned; 0 if there is nothing to learn.
    pub(crate) prompt_bytes: usize,
    /// Prompt tokens counted by the tokenizer; `None` if the engine's count can differ from it.
    pub(crate) tokenizer_count: Option<u32>,
    /// The prompts, if the request has to be added to a recording.
    pub(crate) recorded: Option<PromptSequences>,
}

impl RequestContext {
    /// Returns the label that names the request's trace, if it is sampled.
    pub(crate) fn exemplar(&self) -> Option<Exemplar> {
        self.trace.as_ref().map(|trace| trace.exemplar())
    }
}
