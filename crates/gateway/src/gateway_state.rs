//! State of one gateway, shared by its listeners, requests and tasks.

use std::sync::Arc;

use foresee_core::retry_budget::RetryBudget;
use foresee_core::router::Router;
use parking_lot::Mutex;

use crate::admin::AdminState;
use crate::bytes_per_token::TextRatios;
use crate::clock::Clock;
use crate::config::GatewayConfig;
use crate::drain_rate::DrainRate;
use crate::metrics::Metrics;
use crate::parse_pool::ParsePool;
use crate::placement::affinity::Affinity;
use crate::recorder::Recorder;
use crate::request_body::RequestBodies;
use crate::request_ids::RequestIds;
use crate::shutdown::ShutdownSignal;
use crate::tokenization::PromptTokenizer;
use crate::workers::Workers;

/// State of one gateway.
#[derive(Debug)]
pub(crate) struct GatewayState {
    /// Settings from the start; they never change.
    pub(crate) config: GatewayConfig,
    /// Chooses workers and counts what is booked on them.
    pub(crate) router: Router,
    /// The router's workers.
    pub(crate) workers: Workers,
    /// Metrics of the admin listener's `/metrics`.
    pub(crate) metrics: Arc<Metrics>,
    /// Clock of all times that are passed to the router.
    pub(crate) clock: Clock,
    /// Learned bytes per token of each model, for prompts that are matched as text.
    pub(crate) text_ratios: TextRatios,
    /// Tokenizer of `--tokenizer`; without one, prompts are matched as text.
    pub(crate) tokenizer: Option<PromptTokenizer>,
    /// Limits how many requests are sent again after a worker failed them.
    pub(crate) retry_budget: Mutex<RetryBudget>,
    /// Rate at which queued requests are dispatched.
    pub(crate) drain_rate: DrainRate,
    /// Workers that remember stored responses, sessions and media.
    pub(crate) affinity: Affinity,
    /// Source of request ids.
    pub(crate) request_ids: RequestIds,
    /// State of the admin API.
    pub(crate) admin: AdminState,
    /// Writer of `--record`.
    pub(crate) recorder: Option<Recorder>,
    /// Reader of request bodies, which counts their bytes.
    pub(crate) bodies: RequestBodies,
    /// Threads that parse long bodies.
    pub(crate) parse_pool: ParsePool,
    /// Shutdown of the API's listener.
    pub(crate) shutdown: Arc<ShutdownSignal>,
}
